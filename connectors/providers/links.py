"""Links, the unified customer API.

Documentation: https://docs.thelinks.ai/docs/sdk/api-references/unified-models/unified-customer/createUnifiedCustomer
(and updateUnifiedCustomer, getUnifiedCustomerById, getPaginatedUnifiedCustomerLists). Its records are the golden
records themselves: what it shows of a source is the customer's leading link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote
from uuid import UUID

from django.db.models import BigAutoField, FilteredRelation, Q, QuerySet, TextField, UUIDField
from django.db.models.functions import Cast
from django.templatetags.static import static
from django.urls import get_script_prefix, re_path
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    extend_schema_serializer,
)
from orjson import Fragment
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.inbound.errors import Fault, dotted
from connectors.inbound.fields import Text, well_formed
from connectors.inbound.mirror import Mirror, read_query
from connectors.inbound.quick import Quick
from connectors.inbound.totals import TOLD, total_of
from connectors.models import Connection, CustomerLink
from connectors.outbound import Session
from connectors.provider import ALWAYS, Capabilities, Outgoing, Page, Provider, Record
from connectors.sealing import Secret
from connectors.sync.receive import receive
from customers.ids import parse_public_id, public_id
from customers.models import Customer
from customers.normalize import is_email
from customers.prepared import Param, Prepared

ADDRESSES = tuple(
    f"{kind}address_{part}"
    for kind in ("", "shipping_")
    for part in ("line1", "line2", "city", "country", "state", "postal_code")
)


def timestamp(moment: datetime | None) -> str | None:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='seconds')}Z" if moment else None


@extend_schema_serializer(component_name="LinksCustomer")
class Wire(Quick):
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

    def show(self, customer: Customer | Seen, link: Leading | None, *, origin: str) -> dict[str, Any]:
        """Customer and leading link -> the 28 documented keys. `origin` is scheme and host for the logo's address."""
        # A tombstone is no source any more, and it confirms that the record is gone there, too.
        gone = link is not None and link.deleted_at is not None
        link = None if gone else link
        return {
            "id": customer.public_id,
            "source_system": link.provider if link else None,
            "source_system_img_url": f"{origin}{logo(link.provider, get_script_prefix())}" if link else None,
            "source_id": link.remote_id if link else None,
            "external_system_provider_id": link.provider if link else None,
            "external_system_config_id": public_id("con", link.connection_uid) if link else None,
            "external_system_data": link.remote_data if link else None,
            "supporting_data_definition_id": f"{link.provider}.customer" if link else None,
            "email": customer.email,
            "name": customer.name,
            "address_line1": customer.address_line1 or None,
            "address_line2": customer.address_line2 or None,
            "address_city": customer.address_city or None,
            "address_country": customer.address_country or None,
            "address_state": customer.address_state or None,
            "address_postal_code": customer.address_postal_code or None,
            "shipping_address_line1": customer.shipping_address_line1 or None,
            "shipping_address_line2": customer.shipping_address_line2 or None,
            "shipping_address_city": customer.shipping_address_city or None,
            "shipping_address_country": customer.shipping_address_country or None,
            "shipping_address_state": customer.shipping_address_state or None,
            "shipping_address_postal_code": customer.shipping_address_postal_code or None,
            "phone": customer.phone or None,
            "is_primary": True,
            "local_was_deleted": customer.archived_at is not None and not gone,
            "local_was_updated": link.pushed_version < link.needed_version if link else False,
            "source_data_created_at": timestamp(link.remote_created_at or link.created_at) if link else None,
            "is_active": customer.is_active,
        }


WIRE = Wire()


@extend_schema_serializer(component_name="LinksCustomer")
class Shown(serializers.Serializer[Any]):
    """A customer, and the leading one of the systems that know it."""

    id = serializers.RegexField(r"^cust_[0-9A-Za-z]+$")
    source_system = serializers.CharField(allow_null=True)
    source_system_img_url = serializers.URLField(allow_null=True)
    source_id = serializers.CharField(allow_null=True)
    external_system_provider_id = serializers.CharField(allow_null=True)
    external_system_config_id = serializers.CharField(allow_null=True)
    external_system_data = serializers.DictField(allow_null=True)
    supporting_data_definition_id = serializers.CharField(allow_null=True)
    email = serializers.CharField(help_text="Empty where the hub knows none.")
    name = serializers.CharField()
    phone = serializers.CharField(allow_null=True)
    is_primary = serializers.BooleanField()
    local_was_deleted = serializers.BooleanField(help_text="Archived in the hub, not yet confirmed by the source.")
    local_was_updated = serializers.BooleanField(help_text="Changed in the hub, not yet accepted by the source.")
    source_data_created_at = serializers.DateTimeField(allow_null=True)
    is_active = serializers.BooleanField()

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        return super().get_fields() | {name: serializers.CharField(allow_null=True) for name in ADDRESSES}


@extend_schema_serializer(component_name="LinksCustomerAnswer")
class ShownOne(serializers.Serializer[Any]):
    data = Shown()  # type: ignore[assignment] # hides Serializer.data, which is not used to describe


@extend_schema_serializer(component_name="LinksCustomerList")
class ShownPage(serializers.Serializer[Any]):
    data = Shown(many=True)  # type: ignore[assignment] # as above
    page = serializers.IntegerField(min_value=1)
    limit = serializers.IntegerField(min_value=1, max_value=100)
    totalPages = serializers.IntegerField(min_value=0)  # noqa: N815 # the wire name
    totalResults = serializers.IntegerField(min_value=0, help_text=TOLD)  # noqa: N815 # the wire name


@extend_schema_serializer(component_name="LinksError")
class Refusal(serializers.Serializer[Any]):
    message = serializers.CharField()
    errors = serializers.DictField(  # type: ignore[assignment] # hides Serializer.errors, as above
        child=serializers.ListField(child=serializers.CharField()), help_text="The wrong fields by name."
    )


GIVEN_EXAMPLE = OpenApiExample(
    "A customer", value={"email": "customer@example.com", "name": "Acme Corp"}, request_only=True
)
SHOWN_EXAMPLE = {
    "id": "cust_12345",
    "source_system": "salesforce",
    "source_system_img_url": "https://cdn.example.com/salesforce.png",
    "source_id": "sf_98765",
    "external_system_provider_id": "provider_001",
    "external_system_config_id": "config_abc",
    "external_system_data": {"custom_field": "value"},
    "supporting_data_definition_id": "support_001",
    "email": "customer@example.com",
    "name": "Acme Corp",
    "address_line1": "123 Main St",
    "address_line2": "Suite 456",
    "address_city": "Los Santos",
    "address_country": "USA",
    "address_state": "California",
    "address_postal_code": "90001",
    "shipping_address_line1": "789 Market St",
    "shipping_address_line2": "Floor 2",
    "shipping_address_city": "San Fierro",
    "shipping_address_country": "USA",
    "shipping_address_state": "Nevada",
    "shipping_address_postal_code": "94103",
    "phone": "+123456789",
    "is_primary": True,
    "local_was_deleted": False,
    "local_was_updated": True,
    "source_data_created_at": "2024-01-01T12:00:00Z",
    "is_active": True,
}
ONE = OpenApiResponse(
    ShownOne,
    description="The customer.",
    examples=[OpenApiExample("A customer", value={"data": SHOWN_EXAMPLE})],
)
REFUSED = {
    400: OpenApiResponse(
        Refusal,
        description="The request is not valid. Nothing was stored.",
        examples=[
            OpenApiExample(
                "A field is missing",
                value={
                    "message": "name: This field is required.",
                    "errors": {"name": ["This field is required."]},
                },
            )
        ],
    ),
    401: OpenApiResponse(Refusal, description="The API key is missing or not valid."),
    403: OpenApiResponse(Refusal, description="The API key lacks the scope."),
    500: OpenApiResponse(Refusal, description="Something went wrong in the hub."),
}
UNKNOWN = {404: OpenApiResponse(Refusal, description="There is no such customer.")}
CUSTOMER_ID = OpenApiParameter(
    "unified_customer_id",
    str,
    OpenApiParameter.PATH,
    description="An id from an earlier answer. That of a merged customer leads to the survivor.",
)


class Seen(NamedTuple):
    """What is shown of a customer, under the names that it has there."""

    pk: UUID
    name: str
    email: str
    phone: str
    address_line1: str
    address_line2: str
    address_city: str
    address_country: str
    address_state: str
    address_postal_code: str
    shipping_address_line1: str
    shipping_address_line2: str
    shipping_address_city: str
    shipping_address_country: str
    shipping_address_state: str
    shipping_address_postal_code: str
    is_active: bool
    archived_at: datetime | None
    version: int
    merged_into_id: UUID | None

    @property
    def public_id(self) -> str:
        return public_id("cust", self.pk)


class Leading(NamedTuple):
    """What is shown of the link that stands for a customer, and of its connection."""

    provider: str
    connection_uid: UUID
    remote_id: str | None
    remote_data: Mapping[str, Any] | Fragment
    remote_created_at: datetime | None
    created_at: datetime
    pushed_version: int
    needed_version: int
    deleted_at: datetime | None


One = tuple[Customer | Seen, Leading | None]


def _leading(path: str) -> list[Any]:
    """The columns of Leading; the document as the text that it is kept as, because it is only handed on."""
    own = [f"{path}{name}" for name in Leading._fields[4:]]
    document = Cast(f"{path}remote_data", TextField())
    return [f"{path}connection__provider", f"{path}connection__uid", f"{path}remote_id", document, *own]


def with_leading(rows: QuerySet[Customer], *, beyond: Any = None) -> QuerySet[Customer, tuple[Any, ...]]:
    """These customers and their leading links as rows that `one` reads; all of them come after the id `beyond`.

    Said of the links, too: PostgreSQL may read these along the customers, and would do so from the first one on.
    """
    leads = Q(links__is_primary=True)
    if beyond is not None:
        leads &= Q(links__customer_id__gt=beyond)
    chosen = FilteredRelation("links", condition=leads)
    return rows.annotate(chosen=chosen).values_list(*Seen._fields, *_leading("chosen__"))


def one(row: tuple[Any, ...]) -> One:
    return Seen._make(row[: len(Seen._fields)]), _read(row[len(Seen._fields) :])


def _read(columns: tuple[Any, ...]) -> Leading | None:
    provider, uid, remote_id, document, *others = columns
    return None if provider is None else Leading(provider, uid, remote_id, Fragment(document), *others)


# Of some customers in the order of their ids: so many, from the first, second, … on, in that order.
Part = Callable[[QuerySet[Customer], int, int], QuerySet[Customer]]


def by_id(rows: QuerySet[Customer], first: int, number: int) -> QuerySet[Customer]:
    """A `Part` for rows that stand close together in that order."""
    ordered = rows.order_by("id")
    if first:
        # An index alone tells which to skip; only those of the page are read.
        ordered = ordered.filter(pk__in=rows.order_by("id")[first : first + number].values("pk"))
    return ordered


_OF = Param("organization", BigAutoField())
_FIND = Prepared(
    lambda: with_leading(Customer.objects.filter(organization_id=_OF, pk=Param("id", UUIDField()))), by_key=True
)
_LEADING = Prepared(
    lambda: CustomerLink.objects.filter(customer_id=Param("id", UUIDField()), is_primary=True).values_list(
        *_leading("")
    ),
    by_key=True,
)


def leading_link(customer: Customer) -> Leading | None:
    for columns in _LEADING(id=customer.pk):
        return _read(columns)
    return None


@cache
def logo(provider: str, prefix: str) -> str:
    """The address of a provider's picture on this host; `prefix` is where the hub is mounted."""
    return static(f"connectors/{provider}.svg")


class ListQuery(serializers.Serializer[Any]):
    page = serializers.IntegerField(default=1, min_value=1, max_value=10_000_000)
    limit = serializers.IntegerField(default=10, min_value=1, max_value=100)


class UnifiedCustomers(Mirror):
    provider = "links"
    list_query: ClassVar[type[serializers.Serializer[Any]]] = ListQuery

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        errors: dict[str, list[str]] = {}
        for path, message in fault.fields:
            errors.setdefault(dotted(path), []).append(message)
        return {"message": fault.message, "errors": errors}

    def customers(self) -> QuerySet[Customer]:
        return Customer.objects.filter(organization=self.organization)

    def shown_all(self, customers: Sequence[One]) -> list[dict[str, Any]]:
        """These customers as documented."""
        origin = f"{self.request.scheme}://{self.request.get_host()}"
        return [WIRE.show(customer, link, origin=origin) for customer, link in customers]

    def find(self, unified_customer_id: str) -> One:
        """The customer with this id, or the survivor that it was merged into."""
        uid = parse_public_id("cust", unified_customer_id)
        while uid is not None:
            found = _FIND(organization=self.key.organization_id, id=uid)
            if not found:
                break
            customer, link = one(found[0])
            if customer.merged_into_id is None:
                return customer, link
            uid = customer.merged_into_id
        raise NotFound

    @extend_schema(
        operation_id="createUnifiedCustomer",
        summary="Create a customer",
        request=Wire,
        responses={201: ONE, **REFUSED},
        examples=[GIVEN_EXAMPLE],
    )
    def create(self, request: Request) -> Response:
        values = WIRE.read(request.data)
        [received] = receive(
            organization=self.organization,
            connection=None,
            records=[Record(values=values)],
            actor=self.actor,
        )
        # Systems that new customers are sent to at once have their links by now.
        return self.answer((received.customer, leading_link(received.customer)), status=201)

    @extend_schema(
        operation_id="updateUnifiedCustomer",
        summary="Change a customer",
        description="A field that is left out stays as it is; null empties it. Fields that are not listed are ignored.",
        parameters=[CUSTOMER_ID],
        request=Wire,
        responses={200: ONE, **REFUSED, **UNKNOWN},
        examples=[GIVEN_EXAMPLE],
    )
    def update(self, request: Request, unified_customer_id: str) -> Response:
        customer, _ = self.find(unified_customer_id)
        self.change(customer.pk, WIRE.read(request.data))
        return self.answer(self.find(unified_customer_id))

    @extend_schema(
        operation_id="getUnifiedCustomerById",
        summary="Read a customer",
        parameters=[CUSTOMER_ID],
        request=None,
        responses={200: ONE, **REFUSED, **UNKNOWN},
    )
    def retrieve(self, request: Request, unified_customer_id: str) -> Response:
        return self.answer(self.find(unified_customer_id))

    @extend_schema(
        operation_id="getPaginatedUnifiedCustomerLists",
        summary="List customers",
        parameters=[ListQuery],
        request=None,
        responses={
            200: OpenApiResponse(
                ShownPage,
                description="One page. Past the last, `data` is empty.",
                examples=[
                    OpenApiExample(
                        "A page",
                        value={"data": [SHOWN_EXAMPLE], "page": 1, "limit": 10, "totalPages": 5, "totalResults": 50},
                    )
                ],
            ),
            **REFUSED,
        },
    )
    def list(self, request: Request) -> Response:
        return self.listed(read_query(self.list_query, request))

    def change(self, uid: UUID, values: Mapping[str, Any]) -> None:
        receive(
            organization=self.organization,
            connection=None,
            records=[Record(values=values, customer_id=uid)],
            actor=self.actor,
        )

    def listed(self, query: Mapping[str, Any]) -> Response:
        """The answer to a list that `list_query` has read."""
        rows = self.customers().filter(archived_at=None, merged_into=None)
        return self.page(rows, page=query["page"], limit=query["limit"])

    def answer(self, found: One, *, status: int = 200) -> Response:
        """The documented answer that shows one customer."""
        return Response({"data": self.shown_all([found])[0]}, status=status)

    def page(self, rows: QuerySet[Customer], *, page: int, limit: int, part: Part = by_id) -> Response:
        """The documented answer that shows a page of these."""
        first = (page - 1) * limit
        found = list(with_leading(part(rows, first, limit + 1))[: limit + 1])
        if found:
            total = total_of(rows, least=first + len(found), ended=len(found) <= limit)
        else:
            total = min(total_of(rows), first)
        return Response(
            {
                "data": self.shown_all([one(row) for row in found[:limit]]),
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
    required: ClassVar = {"email": ALWAYS, "name": ALWAYS}
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
