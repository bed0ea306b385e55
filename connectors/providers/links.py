"""Links, the unified customer API.

Documentation: https://docs.thelinks.ai/docs/sdk/api-references/unified-models/unified-customer/createUnifiedCustomer
(and updateUnifiedCustomer, getUnifiedCustomerById, getPaginatedUnifiedCustomerLists). Its records are the golden
records themselves: what it shows of a source is the customer's leading link.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

from django.db.models import Prefetch, QuerySet, prefetch_related_objects
from django.templatetags.static import static
from django.urls import re_path
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.inbound.errors import Fault, dotted
from connectors.inbound.fields import Text, well_formed
from connectors.inbound.mirror import Mirror, read_query
from connectors.models import Connection, CustomerLink
from connectors.outbound import Session
from connectors.provider import Capabilities, Outgoing, Page, Provider, Record
from connectors.sealing import Secret
from connectors.sync.receive import receive
from customers.ids import parse_public_id
from customers.models import Customer
from customers.normalize import is_email

ADDRESSES = tuple(
    f"{kind}address_{part}"
    for kind in ("", "shipping_")
    for part in ("line1", "line2", "city", "country", "state", "postal_code")
)


def timestamp(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None


class Wire(serializers.Serializer[Any]):
    """A customer in Links' words. Keys outside the request table are read-only: they are ignored when sent."""

    email = Text(max_length=254, validators=[well_formed])
    name = Text(max_length=255)
    address_line1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_city = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_country = Text(max_length=64, required=False, allow_null=True, allow_blank=True)
    address_state = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_postal_code = Text(max_length=32, required=False, allow_null=True, allow_blank=True)
    shipping_address_line1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    shipping_address_line2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    shipping_address_city = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    shipping_address_country = Text(max_length=64, required=False, allow_null=True, allow_blank=True)
    shipping_address_state = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    shipping_address_postal_code = Text(max_length=32, required=False, allow_null=True, allow_blank=True)
    phone = Text(max_length=64, required=False, allow_null=True, allow_blank=True)

    def read(self, document: Any) -> dict[str, Any]:
        """Document -> the customer's fields. Raises ValidationError."""
        values: dict[str, Any] = self.run_validation(document)
        return values

    def show(self, customer: Customer, link: CustomerLink | None, *, origin: str) -> dict[str, Any]:
        """Customer and leading link -> the 28 documented keys. `origin` is scheme and host for the logo's address."""
        # A tombstone is no source any more, and it confirms that the record is gone there, too.
        gone = link is not None and link.deleted_at is not None
        link = None if gone else link
        connection = link.connection if link else None
        return {
            "id": customer.public_id,
            "source_system": connection.provider if connection else None,
            "source_system_img_url": (
                f"{origin}{static(f'connectors/{connection.provider}.svg')}" if connection else None
            ),
            "source_id": link.remote_id if link else None,
            "external_system_provider_id": connection.provider if connection else None,
            "external_system_config_id": connection.public_id if connection else None,
            "external_system_data": link.remote_data if link else None,
            "supporting_data_definition_id": f"{connection.provider}.customer" if connection else None,
            "email": customer.email,
            "name": customer.name,
            **{name: getattr(customer, name) or None for name in ADDRESSES},
            "phone": customer.phone or None,
            "is_primary": True,
            "local_was_deleted": customer.archived_at is not None and not gone,
            "local_was_updated": link.is_dirty if link else False,
            "source_data_created_at": timestamp(link.remote_created_at or link.created_at) if link else None,
            "is_active": customer.is_active,
        }


WIRE = Wire()


def leading_links() -> Prefetch[Any]:
    links = CustomerLink.objects.filter(is_primary=True).select_related("connection")
    return Prefetch("links", queryset=links, to_attr="leading_links")


class ListQuery(serializers.Serializer[Any]):
    page = serializers.IntegerField(default=1, min_value=1, max_value=10_000_000)
    limit = serializers.IntegerField(default=10, min_value=1, max_value=100)


class UnifiedCustomers(Mirror):
    provider = "links"

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        errors: dict[str, list[str]] = {}
        for path, message in fault.fields:
            errors.setdefault(dotted(path), []).append(message)
        return {"message": fault.message, "errors": errors}

    def customers(self) -> QuerySet[Customer]:
        return Customer.objects.filter(organization=self.organization).prefetch_related(leading_links())

    def shown(self, customer: Customer) -> dict[str, Any]:
        leading = getattr(customer, "leading_links", [])
        origin = f"{self.request.scheme}://{self.request.get_host()}"
        return WIRE.show(customer, leading[0] if leading else None, origin=origin)

    def find(self, unified_customer_id: str) -> Customer:
        """The customer with this id, or the survivor that it was merged into."""
        uid = parse_public_id("cust", unified_customer_id)
        customer = self.customers().filter(pk=uid).first() if uid else None
        if customer is not None and customer.merged_into_id:
            customer = self.customers().filter(pk=customer.merged_into_id).first()
        if customer is None:
            raise NotFound
        return customer

    def create(self, request: Request) -> Response:
        values = WIRE.read(request.data)
        [received] = receive(
            organization=self.organization,
            connection=None,
            records=[Record(values=values)],
            actor=self.actor,
        )
        # Systems that new customers are sent to at once have their links by now.
        prefetch_related_objects([received.customer], leading_links())
        return Response({"data": self.shown(received.customer)}, status=201)

    def update(self, request: Request, unified_customer_id: str) -> Response:
        customer = self.find(unified_customer_id)
        values = WIRE.read(request.data)
        receive(
            organization=self.organization,
            connection=None,
            records=[Record(values=values, customer_id=customer.pk)],
            actor=self.actor,
        )
        return Response({"data": self.shown(self.find(unified_customer_id))})

    def retrieve(self, request: Request, unified_customer_id: str) -> Response:
        return Response({"data": self.shown(self.find(unified_customer_id))})

    def list(self, request: Request) -> Response:
        query = read_query(ListQuery, request)
        page, limit = query["page"], query["limit"]
        rows = self.customers().filter(archived_at=None)
        total = Customer.objects.filter(organization=self.organization, archived_at=None).count()
        first = (page - 1) * limit
        shown = [self.shown(c) for c in rows.order_by("id")[first : first + limit]] if first < total else []
        return Response(
            {
                "data": shown,
                "page": page,
                "limit": limit,
                "totalPages": -(-total // limit),
                "totalResults": total,
            }
        )


class Links(Provider):
    slug = "links"
    label = "Links"
    documentation = "https://docs.thelinks.ai"
    base_url = "https://dev-backend.thelinks.ai/api/v1"
    fields = frozenset({"name", "email", "phone", *ADDRESSES})
    urls: ClassVar = (
        re_path(r"^api/v1/unified/customer/?$", UnifiedCustomers.as_view({"post": "create"})),
        re_path(
            r"^api/v1/unified/customer/(?P<unified_customer_id>[^/]+)/?$",
            UnifiedCustomers.as_view({"get": "retrieve", "put": "update"}),
        ),
        re_path(r"^api/v1/unified/customers/?$", UnifiedCustomers.as_view({"get": "list"})),
    )

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"Authorization": Secret(f"Bearer {credentials.get('api_key', '')}")}

    def capabilities(self, connection: Connection) -> Capabilities:
        return Capabilities(lists=True, fetches=True)

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        if not is_email(customer.email):
            raise Rejected(
                "Links needs an e-mail address. Enter one, such as name@example.com.", field="email", code="required"
            )
        # PUT demands both again.
        sent: dict[str, Any] = {"email": customer.email, "name": customer.name}
        for name in ("phone", *ADDRESSES):
            value = getattr(customer, name)
            if name in fields if fields is not None else value:
                sent[name] = value or None
        return sent

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        answer = session.request("POST", "/unified/customer", json=outgoing.document)
        return self.stored(answer.body)

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        answer = session.request(
            "PUT", f"/unified/customer/{quote(outgoing.remote_id or '', safe='')}", json=outgoing.document
        )
        return self.record(answer.body)

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        return self.record(session.request("GET", f"/unified/customer/{quote(remote_id, safe='')}").body)

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        number = int(cursor or 1)
        try:
            body = session.request("GET", "/unified/customers", params={"page": number, "limit": limit}).body
        except Gone as error:
            raise ConnectionUnusable(
                "There is no Links API at this address. Check the base address.", status=error.status
            ) from None
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise RetryLater("Links answered a list without data.")
        records: list[Record | Rejected] = []
        for document in body["data"]:
            try:
                records.append(self.record({"data": document}))
            except (Rejected, OutcomeUnknown) as error:
                records.append(Rejected(error.message, code="unreadable"))
        pages = body.get("totalPages")
        last = not records or not isinstance(pages, int) or number >= pages
        return Page(records=records, next=None if last else str(number + 1))

    def stored(self, body: Any) -> Record:
        """What a write answered. It is stored, however strange the answer: the id is known if nothing else."""
        try:
            return self.record(body)
        except Rejected:
            return Record(values={}, document=body["data"], remote_id=body["data"]["id"])

    def record(self, body: Any) -> Record:
        """`{"data": {…}}` -> Record. What Links itself would refuse is kept out of the hub, too."""
        document = body.get("data") if isinstance(body, dict) else None
        if not isinstance(document, dict) or not isinstance(document.get("id"), str) or not document["id"]:
            raise OutcomeUnknown("Links answered without the customer's id.")
        try:
            values = WIRE.read({k: v for k, v in document.items() if v is not None or k in ("email", "name")})
        except serializers.ValidationError as error:
            raise Rejected(
                f"Links' record {document['id']} cannot be read: {error.detail}", code="unreadable"
            ) from None
        values |= {k: "" for k in (*ADDRESSES, "phone") if k in document and document[k] is None}
        return Record(
            values=values,
            document=document,
            remote_id=document["id"],
            deleted=document.get("local_was_deleted") is True,
        )
