"""Commenda's endpoints, served by the hub."""

from __future__ import annotations

import binascii
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Exists, OuterRef, Prefetch, QuerySet
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.inbound.errors import Fault
from connectors.inbound.mirror import Mirror, read_query
from connectors.inbound.totals import FEW, total_of
from connectors.models import Connection, CustomerLink
from connectors.provider import Record
from connectors.providers.commenda.shapes import (
    CHANGE_EXAMPLE,
    CREATION_EXAMPLE,
    CUSTOMER_ID,
    DELETED,
    EXTEND,
    PAGE,
    REFUSED,
    answered,
)
from connectors.providers.commenda.wire import (
    CHANGE,
    CREATION,
    DOCUMENTATION,
    NUMBER,
    Change,
    Creation,
    documented,
    fields_of,
    show,
)
from connectors.sync.receive import CREATED, receive
from customers import editing, search
from customers.models import Customer
from customers.normalize import clean_text, name_key

MAX_KEY = 2**63 - 1
# Where no index finds what is wanted: how many rows are looked at together, and how often one request looks on.
ROWS, LOOKS = 10_000, 4
ERRORS = {
    401: ("CLIENT_UNAUTHORIZED", "Failed to authenticate the request"),
    403: ("CLIENT_FORBIDDEN", "The API token does not permit this"),
    404: ("CLIENT_RESOURCE_NOT_FOUND", "Failed to find the resource"),
    405: ("CLIENT_METHOD_NOT_ALLOWED", "The method is not allowed here"),
    409: ("CLIENT_CONFLICT", "The same request is still being processed"),
    429: ("CLIENT_TOO_MANY_REQUESTS", "The API token makes too many requests"),
}


class Words(serializers.CharField):
    """A comma list in the query."""

    def to_internal_value(self, data: Any) -> list[str]:  # type: ignore[override] # a list is what it reads
        return [word for part in super().to_internal_value(data).split(",") if (word := part.strip())]


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
    search_term = serializers.CharField(required=False, allow_blank=True, max_length=editing.LENGTHS["name"])
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

    @extend_schema(
        operation_id="createCustomer",
        summary="Create a customer",
        description="An `external_id` that the corporation has already changes its customer. Also at `/customers`.",
        request=Creation,
        responses={**answered("Successfully created customer."), **REFUSED},
        examples=[CREATION_EXAMPLE],
    )
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

    @extend_schema(
        operation_id="updateCustomer",
        summary="Change a customer",
        description="A field that is left out stays as it is; null empties it.",
        parameters=[CUSTOMER_ID],
        request=Change,
        responses={**answered("Successfully updated customer."), **REFUSED},
        examples=[CHANGE_EXAMPLE],
    )
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

    @extend_schema(
        operation_id="getCustomer",
        summary="Read a customer",
        parameters=[CUSTOMER_ID],
        request=None,
        responses={**answered("Successfully fetched customer."), **REFUSED},
    )
    def retrieve(self, request: Request, customer_id: str) -> Response:
        extend = ("shipping_address", "exemption_metadata")
        return self.answer(self.find(customer_id), "Successfully fetched customer.", extend=extend)

    @extend_schema(
        operation_id="deleteCustomer",
        summary="Delete a customer",
        description="The hub archives the customer: in this API it is gone.",
        parameters=[CUSTOMER_ID],
        request=None,
        responses={**DELETED, **REFUSED},
    )
    def destroy(self, request: Request, customer_id: str) -> Response:
        link = self.find(customer_id)
        now = timezone.now()
        with transaction.atomic():
            editing.archive(organization=self.organization, ids=[link.customer_id], actor=self.actor, at=now)
            alive = CustomerLink.objects.filter(pk=link.pk, deleted_at=None)
            if not alive.update(deleted_at=now, updated_at=now):
                raise exceptions.NotFound
        return Response(status=204)

    @extend_schema(
        operation_id="listCustomers",
        summary="List customers",
        description="Also at `/customers`. Where a filter makes the hub look through very many customers, a page may "
        "hold fewer than `limit`, even none: read on with `cursor` until it is null.",
        parameters=[ListQuery, EXTEND],
        request=None,
        responses={200: PAGE, **REFUSED},
    )
    def list(self, request: Request) -> Response:
        query = read_query(ListQuery, request)
        connection = self.corporation(query["corporation_id"])
        rows, found_by_index = self.matching(
            self.links().filter(connection=connection, customer__archived_at=None), query
        )
        after = query.get("cursor", 0)
        primary = CustomerLink.objects.filter(is_primary=True, deleted_at=None).select_related("connection")
        rows = rows.prefetch_related(Prefetch("customer__links", queryset=primary, to_attr="leading_links"))
        own = CustomerLink.objects.filter(connection=connection)
        found, looked_to = following(after, rows, own=None if found_by_index else own, number=query["limit"] + 1)
        page = found[: query["limit"]]
        ended = len(found) <= query["limit"] and looked_to is None
        total = total_of(rows, least=len(found), ended=ended and not after, among=None if found_by_index else own)
        last = page[-1].pk if len(found) > len(page) else looked_to
        extend = query.get("extend", ())
        listed = {
            "customers": [
                show(link, leading, extend=extend)
                for link in page
                for leading in getattr(link.customer, "leading_links", []) or [None]
            ],
            "total_customers": total,
            "cursor": None if last is None else cursor(last),
        }
        return Response({**listed, "data": listed, "message": "Successfully fetched customers."})

    def matching(self, rows: QuerySet[CustomerLink], query: Mapping[str, Any]) -> tuple[QuerySet[CustomerLink], bool]:
        """Those of the rows that the query wants, and whether an index finds them."""
        if any(query.get(name) for name in EXEMPTION_FILTERS):
            return rows.none(), True  # the hub keeps no exemption certificates
        indexed = not (query.get("search_term") or query.get("source_platforms")) or bool(query.get("name"))
        if name := query.get("name"):
            # The key is indexed, the text decides.
            rows = rows.filter(
                customer__organization=self.organization,
                customer__name_key=name_key(name)[: editing.LENGTHS["name_key"]],
                customer__name=clean_text(name),
            )
        if term := name_key(query.get("search_term", "")):
            rows = rows.filter(customer__organization=self.organization, customer__name_key__contains=term)
            named = search.named(term, organization=self.organization)
            if named is not None and len(few := list(named.values_list("pk", flat=True)[: FEW + 1])) <= FEW:
                rows, indexed = rows.filter(customer__in=few), True
        platforms, ids = query.get("source_platforms"), query.get("source_platform_ids")
        if platforms or ids:
            sources = Connection.objects.filter(organization=self.organization)
            if platforms:
                sources = sources.filter(provider__in=platforms)
            source = CustomerLink.objects.filter(
                connection__in=list(sources.values_list("pk", flat=True)), is_primary=True, deleted_at=None
            )
            if ids:
                source = source.filter(remote_id__in=ids)
                rows, indexed = rows.filter(customer__in=list(source.values_list("customer", flat=True))), True
            source = source.filter(customer=OuterRef("customer")).exclude(connection=OuterRef("connection"))
            rows = rows.filter(Exists(source))
        return rows, indexed

    def locked(self, link: CustomerLink) -> Customer:
        return editing.lock(organization=self.organization, ids=[link.customer_id])[link.customer_id]


def following(
    key: int, rows: QuerySet[CustomerLink], *, own: QuerySet[CustomerLink] | None, number: int
) -> tuple[list[CustomerLink], int | None]:
    """The next of these rows, and the key up to which was looked for them; None: to the end.

    `own` are all rows of the corporation, where no index finds the ones that are wanted among them: then so many are
    looked at and no more.
    """
    found: list[CustomerLink] = []
    for _ in range(LOOKS):
        part, ends = rows.filter(pk__gt=key), []
        if own is not None:
            beyond = own.filter(pk__gt=key).order_by("pk").values_list("pk", flat=True)
            ends = list(beyond[ROWS - 1 : ROWS])
        if ends:
            part = part.filter(pk__lte=ends[0])
        found += part.order_by("pk")[: number - len(found)]
        if not ends:
            return found, None
        key = ends[0]
        if len(found) == number:
            break
    return found, key


def with_number(customer: Customer | None, number: str | None) -> dict[str, Any]:
    """The custom fields with this business identification number; those of others stay."""
    others = {name: v for name, v in (customer.custom_fields if customer else {}).items() if name != NUMBER}
    return others | {NUMBER: number} if number else others
