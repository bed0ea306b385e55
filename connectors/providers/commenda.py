"""Commenda, the customers of a corporation in its Global Indirect Tax API.

Documentation: https://docs.commenda.io/engine/indirect-tax/customers/customers-POST (and customers-GET,
customers-id-GET, customers-id-POST, customers-id-DELETE). For callers of the hub `id` is the link's `uid` and
`external_id` its `remote_id`.
"""

from __future__ import annotations

import binascii
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

from django.db import transaction
from django.db.models import Exists, OuterRef, Prefetch, QuerySet
from django.urls import re_path
from django.utils import timezone
from rest_framework import exceptions, serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.inbound.errors import Fault
from connectors.inbound.mirror import Mirror, read_query
from connectors.models import Connection, CustomerLink
from connectors.outbound import Session, raise_for_answer
from connectors.provider import Capabilities, Outgoing, Page, Provider, Record
from connectors.sealing import Secret
from connectors.sync.receive import CREATED, receive
from customers import editing
from customers.countries import ALPHA2
from customers.models import Customer
from customers.normalize import clean_text, has_control_characters, is_email, name_key

DOCUMENTATION = "https://docs.commenda.io/engine/indirect-tax/customers/customers-POST"
PARTS = ("line1", "line2", "city", "state", "postal_code", "country")
SHIPPING = frozenset(f"shipping_address_{part}" for part in PARTS)
# The spelling of the generated schema, beside the one of the prose.
SPELLINGS = {"address_line_1": "line1", "address_line_2": "line2", "address_line_3": "line2"}
FIELD_OF = {
    "/name": "name",
    "/email": "email",
    "/shipping_address": "shipping_address_line1",
    **{f"/shipping_address/{part}": f"shipping_address_{part}" for part in PARTS},
    **{f"/shipping_address/{key}": f"shipping_address_{part}" for key, part in SPELLINGS.items()},
}
NUMBER = "business_identification_number"
COLLECTION = "/customers"
MAX_KEY = 2**63 - 1
EXEMPTIONS = {
    "total_certificates": 0,
    "total_exempted_states": 0,
    "active_exemptions_count": 0,
    "inactive_exemptions_count": 0,
    "expired_exemptions_count": 0,
    "non_expired_exemptions_count": 0,
    "certificate_types": [],
    "exempted_states": [],
}
ERRORS = {
    401: ("CLIENT_UNAUTHORIZED", "Failed to authenticate the request"),
    403: ("CLIENT_FORBIDDEN", "The API token does not permit this"),
    404: ("CLIENT_RESOURCE_NOT_FOUND", "Failed to find the resource"),
    405: ("CLIENT_METHOD_NOT_ALLOWED", "The method is not allowed here"),
}


def well_formed(text: str) -> None:
    if not is_email(text):
        raise serializers.ValidationError("Give an e-mail address, such as name@example.com.")


def alpha2(text: str) -> None:
    if text not in ALPHA2:
        raise serializers.ValidationError("Give the country as its ISO 3166-1 alpha-2 code, such as US.")


class Text(serializers.CharField):
    """A JSON string in the form in which the hub stores it. Numbers are not texts."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        if has_control_characters(data):
            raise serializers.ValidationError("Remove the control characters.")
        text = super().to_internal_value(data)
        return clean_text(text) if self.trim_whitespace else text


class Words(serializers.CharField):
    """A comma list in the query."""

    def to_internal_value(self, data: Any) -> list[str]:  # type: ignore[override] # a list is what it reads
        return [word for part in super().to_internal_value(data).split(",") if (word := part.strip())]


class Address(serializers.Serializer[Any]):
    """A shipping address in either spelling, as Commenda answers it."""

    line1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    line2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_3 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    city = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    state = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    postal_code = Text(max_length=32, required=False, allow_null=True, allow_blank=True)
    country = Text(max_length=64, required=False, allow_null=True, allow_blank=True)

    def validate(self, attrs: dict[str, Any]) -> dict[str, str]:
        """The six parts; an address is read as a whole, so what it does not name is empty."""
        second = attrs.get("line2") or attrs.get("address_line_2") or ""
        third = attrs.get("address_line_3") or ""
        parts = {
            **{part: attrs.get(part) or "" for part in PARTS},
            "line1": attrs.get("line1") or attrs.get("address_line_1") or "",
            "line2": f"{second}, {third}" if second and third else second or third,
        }
        if len(parts["line2"]) > 255:
            raise serializers.ValidationError({"address_line_3": ["Use at most 255 characters with line 2."]})
        return parts


class GivenAddress(Address):
    country = Text(validators=[alpha2])


class Answered(serializers.Serializer[Any]):
    """What Commenda answers: customers synced from elsewhere may hold what it would refuse from a caller."""

    name = Text(max_length=255)
    email = Text(max_length=254, required=False, allow_null=True, allow_blank=True)
    shipping_address = Address(required=False, allow_null=True)


class Change(serializers.Serializer[Any]):
    """The body of an update. A key that is absent leaves what is stored; null empties it."""

    name = Text(min_length=3, max_length=255, required=False)
    email = Text(max_length=254, required=False, allow_null=True, validators=[well_formed])
    shipping_address = GivenAddress(required=False, allow_null=True)
    business_identification_number = Text(max_length=255, required=False, allow_null=True, allow_blank=True)


class Creation(Change):
    name = Text(min_length=3, max_length=255)
    corporation_id = Text(trim_whitespace=False)
    external_id = Text(max_length=255, required=False, allow_null=True, trim_whitespace=False)


ANSWERED, CHANGE, CREATION = Answered(), Change(), Creation()


def documented(document: Any, serializer: serializers.Serializer[Any]) -> dict[str, Any]:
    """The document without the keys that Commenda does not have."""
    return {name: value for name, value in document.items() if name in serializer.fields}


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a validated document names, as the customer's fields."""
    values: dict[str, Any] = {}
    if "name" in given:
        values["name"] = given["name"]
    if "email" in given:
        values["email"] = given["email"] or ""
    if "shipping_address" in given:
        address = given["shipping_address"] or {}
        values |= {f"shipping_address_{part}": address.get(part, "") for part in PARTS}
    return values


def address_of(customer: Customer) -> dict[str, str | None] | None:
    """The documented address; null when the customer has none. The country is its code or null."""
    parts = {part: getattr(customer, f"shipping_address_{part}") or None for part in PARTS}
    if not any(parts.values()):
        return None
    return parts | {"country": customer.shipping_address_country_code or None}


def show(link: CustomerLink, leading: CustomerLink | None, *, extend: Collection[str]) -> dict[str, Any]:
    """Link (customer and connection loaded) and the customer's leading link -> the documented object."""
    customer = link.customer
    source = leading if leading and leading.connection_id != link.connection_id else None
    number = customer.custom_fields.get(NUMBER)
    shown: dict[str, Any] = {
        "id": str(link.uid),
        "corporation_id": link.connection.account,
        "name": customer.name,
        "email": customer.email or None,
        "created_at": int(link.created_at.timestamp()),
        "external_id": link.remote_id,
        "source_platform": source.connection.provider if source else None,
        "source_platform_id": source.remote_id if source else None,
        NUMBER: number if isinstance(number, str) else None,
    }
    if "shipping_address" in extend:
        shown["shipping_address"] = address_of(customer)
    if "exemption_metadata" in extend:
        shown["exemption_metadata"] = EXEMPTIONS
    return shown


class CursorField(serializers.CharField):
    """The primary key of the last link seen, in a form that invites nobody to compute with it."""

    def to_internal_value(self, data: Any) -> int:  # type: ignore[override] # a key is what it reads
        text = super().to_internal_value(data)
        try:
            digits = urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4)).decode("ascii")
        except (binascii.Error, ValueError):
            digits = ""
        key = int(digits) if re.fullmatch("[1-9][0-9]{0,18}", digits) else MAX_KEY + 1
        # One key has one cursor: whatever else decodes to it was not made here.
        if key > MAX_KEY or cursor(key) != text:
            raise serializers.ValidationError("Give the cursor of an earlier answer, as it was.")
        return key


def cursor(key: int) -> str:
    return urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


class ListQuery(serializers.Serializer[Any]):
    corporation_id = serializers.CharField(trim_whitespace=False)
    cursor = CursorField(required=False)
    limit = serializers.IntegerField(default=10, min_value=1, max_value=100)
    name = serializers.CharField(required=False, allow_blank=True)
    search_term = serializers.CharField(required=False, allow_blank=True)
    source_platforms = Words(required=False, allow_blank=True)
    source_platform_ids = Words(required=False, allow_blank=True)
    extend = Words(required=False, allow_blank=True)
    certificate_types = Words(required=False, allow_blank=True)
    exemption_jurisdiction = serializers.RegexField(r"^[A-Z]{2}(_[A-Z0-9]{1,3})?$", required=False)
    expiration_status = serializers.ChoiceField(("ACTIVE", "EXPIRED"), required=False)
    exemption_status = serializers.ChoiceField(("ACTIVE", "INACTIVE"), required=False)
    has_exemption = serializers.BooleanField(required=False)

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        # `cursor=` is how a client writes the null of a first page.
        given = {name: value for name, value in data.items() if name != "cursor" or value}
        values: dict[str, Any] = super().to_internal_value(given)
        return values

    def validate_extend(self, words: list[str]) -> list[str]:
        if unknown := set(words) - {"shipping_address", "exemption_metadata"}:
            raise serializers.ValidationError(
                f"{', '.join(sorted(unknown))} cannot be extended: only shipping_address, exemption_metadata."
            )
        return words


EXEMPTION_FILTERS = (
    "certificate_types",
    "exemption_jurisdiction",
    "expiration_status",
    "exemption_status",
    "has_exemption",
)


class UnknownCorporation(exceptions.APIException):
    status_code = 404
    default_detail = "No such corporation. Check corporation_id."


class Customers(Mirror):
    provider = "commenda"

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        if fault.status == 400:
            part = "query" if self.request.method in ("GET", "HEAD", "DELETE") else "body"
            kind, title = f"CLIENT_INVALID_REQUEST_{part.upper()}", f"Failed to validate the request {part}"
        else:
            kind, title = ERRORS.get(fault.status, ("SERVER_ERROR", "Failed to process the request"))
        return {
            "error": {
                "type": kind,
                "doc_url": DOCUMENTATION,
                "title": title,
                "detail": fault.message,
                "status": fault.status,
                "instance": self.request.path,
                "Errors": [
                    {"details": text, "pointer": "".join(f"/{part}" for part in path)} for path, text in fault.fields
                ],
            }
        }

    def corporation(self, corporation_id: str) -> Connection:
        connection = self.find_connection(corporation_id)
        if connection is None:
            raise UnknownCorporation
        return connection

    def links(self) -> QuerySet[CustomerLink]:
        return CustomerLink.objects.filter(
            connection__organization=self.organization,
            connection__provider=self.provider,
            connection__direction=Connection.Direction.CALLS_US,
            deleted_at=None,
        ).select_related("customer", "connection")

    def find(self, customer_id: str) -> CustomerLink:
        try:
            uid = UUID(customer_id)
        except ValueError:
            raise exceptions.NotFound from None
        link = self.links().filter(uid=uid).first()
        if link is None:
            raise exceptions.NotFound
        return link

    def answer(self, link: CustomerLink, message: str, *, extend: Collection[str] = ("shipping_address",)) -> Response:
        leading = None
        if not link.is_primary:
            primary = CustomerLink.objects.filter(customer=link.customer_id, is_primary=True, deleted_at=None)
            leading = primary.select_related("connection").first()
        shown = show(link, leading, extend=extend)
        return Response({**shown, "data": shown, "message": message})

    def create(self, request: Request) -> Response:
        given = CREATION.run_validation(request.data)
        connection = self.corporation(given["corporation_id"])
        external_id = given.get("external_id")
        values = fields_of(given)
        with transaction.atomic():
            if NUMBER in given:
                known = CustomerLink.objects.filter(connection=connection, remote_id=external_id).first()
                before = self.locked(known) if known and external_id is not None else None
                values["custom_fields"] = with_number(before, given[NUMBER])
            [received] = receive(
                organization=self.organization,
                connection=connection,
                records=[
                    Record(
                        values=values,
                        document=documented(request.data, CREATION),
                        remote_id=external_id,
                    )
                ],
                actor=self.actor,
            )
        assert received.link is not None  # a connection was given
        done = "created" if received.outcome == CREATED else "updated"
        return self.answer(received.link, f"Successfully {done} customer.")

    def update(self, request: Request, customer_id: str) -> Response:
        link = self.find(customer_id)
        given = CHANGE.run_validation(request.data)
        values = fields_of(given)
        with transaction.atomic():
            before = self.locked(link)
            # Deleted since it was found: an update brings nothing back.
            if not CustomerLink.objects.filter(pk=link.pk, deleted_at=None).exists():
                raise exceptions.NotFound
            if NUMBER in given:
                values["custom_fields"] = with_number(before, given[NUMBER])
            [received] = receive(
                organization=self.organization,
                connection=link.connection,
                records=[
                    Record(
                        values=values,
                        document=documented(request.data, CHANGE),
                        link_id=link.pk,
                    )
                ],
                actor=self.actor,
            )
        assert received.link is not None  # a connection was given
        return self.answer(received.link, "Successfully updated customer.")

    def retrieve(self, request: Request, customer_id: str) -> Response:
        extend = ("shipping_address", "exemption_metadata")
        return self.answer(self.find(customer_id), "Successfully fetched customer.", extend=extend)

    def destroy(self, request: Request, customer_id: str) -> Response:
        link = self.find(customer_id)
        now = timezone.now()
        with transaction.atomic():
            editing.archive(organization=self.organization, ids=[link.customer_id], actor=self.actor, at=now)
            alive = CustomerLink.objects.filter(pk=link.pk, deleted_at=None)
            if not alive.update(deleted_at=now, updated_at=now):
                raise exceptions.NotFound
        return Response(status=204)

    def list(self, request: Request) -> Response:
        query = read_query(ListQuery, request)
        connection = self.corporation(query["corporation_id"])
        rows = self.matching(self.links().filter(connection=connection, customer__archived_at=None), query)
        total = rows.count()
        after = query.get("cursor", 0)
        primary = CustomerLink.objects.filter(is_primary=True, deleted_at=None).select_related("connection")
        rows = rows.prefetch_related(Prefetch("customer__links", queryset=primary, to_attr="leading_links"))
        found = list(rows.filter(pk__gt=after).order_by("pk")[: query["limit"] + 1])
        page = found[: query["limit"]]
        extend = query.get("extend", ())
        listed = {
            "customers": [
                show(link, leading, extend=extend)
                for link in page
                for leading in getattr(link.customer, "leading_links", []) or [None]
            ],
            "total_customers": total,
            "cursor": cursor(page[-1].pk) if len(found) > len(page) else None,
        }
        return Response({**listed, "data": listed, "message": "Successfully fetched customers."})

    def matching(self, rows: QuerySet[CustomerLink], query: Mapping[str, Any]) -> QuerySet[CustomerLink]:
        if any(query.get(name) for name in EXEMPTION_FILTERS):
            return rows.none()  # the hub keeps no exemption certificates
        if name := query.get("name"):
            # The key is indexed, the text decides.
            rows = rows.filter(
                customer__organization=self.organization,
                customer__name_key=name_key(name)[: editing.LENGTHS["name_key"]],
                customer__name=clean_text(name),
            )
        if term := name_key(query.get("search_term", "")):
            rows = rows.filter(customer__organization=self.organization, customer__name_key__contains=term)
        platforms, ids = query.get("source_platforms"), query.get("source_platform_ids")
        if platforms or ids:
            source = CustomerLink.objects.filter(
                customer=OuterRef("customer"), is_primary=True, deleted_at=None
            ).exclude(connection=OuterRef("connection"))
            if platforms:
                source = source.filter(connection__provider__in=platforms)
            if ids:
                source = source.filter(remote_id__in=ids)
            rows = rows.filter(Exists(source))
        return rows

    def locked(self, link: CustomerLink) -> Customer:
        return editing.lock(organization=self.organization, ids=[link.customer_id])[link.customer_id]


def with_number(customer: Customer | None, number: str | None) -> dict[str, Any]:
    """The custom fields with this business identification number; those of others stay."""
    others = {name: v for name, v in (customer.custom_fields if customer else {}).items() if name != NUMBER}
    return others | {NUMBER: number} if number else others


class Commenda(Provider):
    slug = "commenda"
    label = "Commenda"
    documentation = DOCUMENTATION
    base_url = "https://transaction-tax.api.in.commenda.io/api/v1"
    account_label = "corporation_id"
    options: ClassVar = {
        "upsert_by_external_id": (
            "A create whose external_id is known there changes that customer instead of making a second one."
            " Commenda does not document this; the hub's own Commenda endpoints do it."
        )
    }
    fields = frozenset({"name", "email", *SHIPPING})
    urls: ClassVar = (
        re_path(r"^(?:api/v1/)?customers/?$", Customers.as_view({"get": "list", "post": "create"})),
        re_path(
            r"^api/v1/customers/(?P<customer_id>[^/]+)/?$",
            Customers.as_view({"get": "retrieve", "post": "update", "delete": "destroy"}),
        ),
    )

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"Authorization": Secret(f"Bearer {credentials.get('api_key', '')}")}

    def capabilities(self, connection: Connection) -> Capabilities:
        return Capabilities(
            upsert_external_id=connection.options.get("upsert_by_external_id") is True,
            lists=True,
            fetches=True,
            deletes="call",
        )

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        sent: dict[str, Any] = {}
        if fields is None:
            sent = {"corporation_id": connection.account, "external_id": str(uid)}
        if fields is None or "name" in fields:
            if len(customer.name) < 3:
                raise Rejected(
                    "Commenda needs a name of at least three characters. Enter a longer one.",
                    field="name",
                    code="min_length",
                )
            sent["name"] = customer.name
        if "email" in fields if fields is not None else customer.email:
            if customer.email and not is_email(customer.email):
                raise Rejected(
                    "Commenda takes only a well-formed e-mail address."
                    " Correct it, as in name@example.com, or remove it.",
                    field="email",
                    code="invalid",
                )
            sent["email"] = customer.email or None
        parts = {part: getattr(customer, f"shipping_address_{part}") for part in PARTS}
        filled = {part: text for part, text in parts.items() if text}
        if fields & SHIPPING if fields is not None else filled:
            sent["shipping_address"] = None
            if filled:
                code = customer.shipping_address_country_code
                if not code:
                    raise Rejected(
                        "Commenda needs the country of a shipping address. Enter its name or two-letter code,"
                        " such as US.",
                        field="shipping_address_country",
                        code="invalid" if parts["country"] else "required",
                    )
                # Named even if they are empty now, should Commenda keep what an address does not name.
                moved = {part: None for part in PARTS if f"shipping_address_{part}" in (fields or ())}
                sent["shipping_address"] = {**moved, **filled, "country": code}
        return sent

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        document = customer_in(send(session, "POST", COLLECTION, json=outgoing.document))
        if document is None:
            raise OutcomeUnknown("Commenda answered without the customer's id.")
        return self.stored(document)

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        remote_id = outgoing.remote_id or ""
        document = customer_in(send(session, "POST", item(remote_id), json=outgoing.document))
        # The prose shows a message alone.
        return self.fetch(session, connection, remote_id) if document is None else self.stored(document)

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        document = customer_in(send(session, "GET", item(remote_id)))
        if document is None:
            raise RetryLater("Commenda answered without the customer's id.")
        return self.record(document)

    def delete(self, session: Session, connection: Connection, remote_id: str) -> None:
        """Delete the record there. Raises Gone when it is not there, ConnectorError otherwise."""
        send(session, "DELETE", item(remote_id))

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        params = {
            "corporation_id": connection.account,
            "limit": min(limit, 100),
            "extend": "shipping_address",
            **({"cursor": cursor} if cursor else {}),
        }
        body = send(session, "GET", COLLECTION, params=params)
        listed = body.get("data") if isinstance(body, dict) and isinstance(body.get("data"), dict) else body
        if not isinstance(listed, dict) or not isinstance(listed.get("customers"), list):
            raise RetryLater("Commenda answered a list without customers.")
        records: list[Record | Rejected] = []
        for entry in listed["customers"]:
            document = customer_in(entry)
            if document is None:
                records.append(Rejected("Commenda listed a customer without an id.", code="unreadable"))
                continue
            try:
                records.append(self.record(document))
            except Rejected as error:
                records.append(error)
        following = listed.get("cursor")
        if following and (not isinstance(following, str) or following == cursor):
            raise RetryLater("Commenda answered a cursor that leads nowhere.")
        return Page(records=records, next=following or None)

    def record(self, document: Mapping[str, Any]) -> Record:
        """Raises Rejected when the hub cannot hold what the document says."""
        try:
            values = fields_of(ANSWERED.run_validation(document))
        except serializers.ValidationError as error:
            raise Rejected(
                f"Commenda's record {document['id']} cannot be read: {error.detail}", code="unreadable"
            ) from None
        seconds = document.get("created_at")
        dated = isinstance(seconds, int) and 0 < seconds < 2**36
        return Record(
            values=values,
            document=document,
            remote_id=document["id"],
            created_at=datetime.fromtimestamp(int(seconds or 0), UTC) if dated else None,
        )

    def stored(self, document: Mapping[str, Any]) -> Record:
        """What a write answered. It is stored, however strange the answer: the id is known if nothing else."""
        try:
            return self.record(document)
        except Rejected:
            return Record(values={}, document=document, remote_id=document["id"])


def item(remote_id: str) -> str:
    return f"{COLLECTION}/{quote(remote_id, safe='')}"


def customer_in(body: Any) -> dict[str, Any] | None:
    """The customer in an envelope or flat; None where there is none with an id."""
    for document in (body.get("data"), body) if isinstance(body, dict) else ():
        uid = document.get("id") if isinstance(document, dict) else None
        if isinstance(uid, str) and 0 < len(uid) <= 255:
            return document
    return None


def send(session: Session, method: str, path: str, *, json: Any = None, params: Mapping[str, Any] | None = None) -> Any:
    """The body of the answer. Raises ConnectorError, with the customer field and the words of a refusal."""
    answer = session.send(method, path, json=json, params=params)
    try:
        raise_for_answer(answer)
    except Gone as error:
        if path == COLLECTION:
            raise ConnectionUnusable(
                "Commenda does not know this corporation, or its API is not at this address. Check both.",
                status=error.status,
                code=error.code,
            ) from None
        raise
    except Rejected as error:
        error.field, error.message = explained(answer.body, error.message)
        raise
    return answer.body


def explained(body: Any, message: str) -> tuple[str, str]:
    """The customer field that a refusal points at, "" if none, and its words."""
    error = body.get("error") if isinstance(body, dict) else None
    errors = error.get("Errors") if isinstance(error, dict) else None
    named = [e for e in errors if isinstance(e, dict)] if isinstance(errors, list) else []
    words = "; ".join(e["details"] for e in named if isinstance(e.get("details"), str))
    fields = (FIELD_OF.get(str(e.get("pointer")), "") for e in named)
    return next(filter(None, fields), ""), words[:300] or message
