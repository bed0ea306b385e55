"""Customers at the addresses of Links: its documented operations with versions, filters and cursors, and more of them.

The documented operations keep Links' bodies and errors; the added ones answer problem documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar
from uuid import UUID

from django.db.models import BigAutoField, QuerySet, UUIDField
from django.urls import re_path
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    PolymorphicProxySerializer,
    extend_schema,
    extend_schema_serializer,
    extend_schema_view,
)
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import problems
from connectors.api.bulk import Bulk
from connectors.api.filters import FILTERS, Expanding, Filters, read_cursor, select, write_cursor
from connectors.api.links import LinkShown, shown_links
from connectors.api.problems import CODES, Refusal
from connectors.api.resource import Nothing, Resource
from connectors.api.schema import PLAIN
from connectors.api.writing import UPDATE, UPSERT, Item, Values, check_version, write_one
from connectors.inbound.errors import Fault
from connectors.inbound.fields import Text
from connectors.inbound.mirror import Mirror, read_query
from connectors.models import REMOTE_ID_LENGTH, Connection
from connectors.providers.links import (
    CUSTOMER_ID,
    ONE,
    REFUSED,
    UNKNOWN,
    One,
    Shown,
    ShownPage,
    UnifiedCustomers,
    leading_link,
    one,
    with_leading,
)
from connectors.providers.links import Refusal as LinksError
from connectors.sync.clock import database_clock
from connectors.sync.races import start_over
from customers import editing
from customers.editing import StaleVersion
from customers.ids import parse_public_id
from customers.models import Customer
from customers.prepared import Param, Prepared

FIRST = UUID(int=0)
DOCUMENTED = frozenset({"create", "retrieve", "update", "list"})
SOURCE_ID = Text(max_length=REMOTE_ID_LENGTH, trim_whitespace=False)


@extend_schema_serializer(component_name="LinksCustomerExpanded")
class Expanded(Shown):
    links = LinkShown(many=True, required=False, help_text="With `expand=links`: as the list of links shows them.")


@extend_schema_serializer(component_name="LinksCustomerExpandedAnswer")
class ExpandedOne(serializers.Serializer[Any]):
    data = Expanded()  # type: ignore[assignment] # hides Serializer.data, which is not used to describe


@extend_schema_serializer(component_name="LinksCustomerExpandedList")
class Page(ShownPage):
    data = Expanded(many=True)


@extend_schema_serializer(component_name="LinksCustomerCursorPage")
class CursorPage(Page):
    """A page that was asked for by cursor: nothing is counted."""

    page = serializers.IntegerField(allow_null=True, help_text="Null.")
    totalPages = serializers.IntegerField(allow_null=True, help_text="Null.")  # noqa: N815 # the wire name
    totalResults = serializers.IntegerField(allow_null=True, help_text="Null.")  # noqa: N815 # the wire name
    next_cursor = serializers.CharField(allow_null=True, help_text="Where the next page begins; null on the last.")


def header(name: str, description: str, **more: Any) -> OpenApiParameter:
    return OpenApiParameter(name, str, OpenApiParameter.HEADER, description=description, **more)


IF_MATCH = header("If-Match", "The ETag of what you read: the request is refused if it has been changed since.")
IF_NONE_MATCH = header("If-None-Match", "The ETag of what you have: it is sent again only if it is another.")
ETAG = header("ETag", "The customer's version, for If-Match.", response=[200, 201, 304])
STALE = {412: OpenApiResponse(description=CODES["version_conflict"].title)}
MISSING = {428: OpenApiResponse(description=CODES["version_required"].title)}
VALUES_EXAMPLE = OpenApiExample(
    "Some fields",
    value={"first_name": "Ada", "phone": "+4930123456", "currency": None, "custom_fields": {"tier": "gold"}},
    request_only=True,
)
LINKS_STALE = {
    412: OpenApiResponse(LinksError, description=CODES["version_conflict"].title),
    428: OpenApiResponse(LinksError, description=CODES["version_required"].title),
}


@extend_schema_view(
    create=extend_schema(parameters=[ETAG]),
    retrieve=extend_schema(
        description="With `expand` it is always sent: a link may change while the customer stays as it is.",
        parameters=[Expanding, IF_NONE_MATCH, ETAG],
        responses={
            200: OpenApiResponse(ExpandedOne, description=ONE.description, examples=ONE.examples),
            304: OpenApiResponse(description="It is as you have it."),
            **REFUSED,
            **UNKNOWN,
        },
    ),
    update=extend_schema(parameters=[IF_MATCH, ETAG], responses={200: ONE, **REFUSED, **UNKNOWN, **LINKS_STALE}),
    list=extend_schema(
        description="Filters narrow the list together. With `cursor` no customer is skipped or shown twice, whatever "
        "changes meanwhile, and a page costs the same however far in it is.",
        parameters=[Filters],
        responses={
            200: PolymorphicProxySerializer(
                component_name="CustomerList", serializers=[Page, CursorPage], resource_type_field_name=None
            ),
            **REFUSED,
        },
    ),
)
class Customers(UnifiedCustomers, Resource):
    """The documented operations, and what the hub adds at their addresses."""

    list_query = Filters
    scopes: ClassVar[Mapping[str, str]] = {
        "create": "customers:write",
        "update": "customers:write",
        "partial_update": "customers:write",
        "destroy": "customers:write",
        "restore": "customers:write",
        "upsert": "customers:write",
    }

    def handle_exception(self, exc: Exception) -> Response:
        actions = {self.action} if self.action else set(self.action_map.values())
        if not DOCUMENTED & actions:
            return super().handle_exception(exc)
        if isinstance(exc, StaleVersion):
            exc = problems.stale(exc)
        if not isinstance(exc, Refusal):
            return Mirror.handle_exception(self, exc)
        fault = Fault(status=CODES[exc.code].status, kind=exc.code, message=exc.detail)
        response = Response(self.fault(fault), status=fault.status, headers=exc.headers)
        response.exception = True
        return response

    # What Links documents

    def answer(self, found: One, *, status: int = 200) -> Response:
        tag = problems.etag(found[0].version)
        expand = self.action == "retrieve" and read_query(Expanding, self.request).get("expand")
        if self.action == "retrieve" and not expand and _names(self.request.headers.get("If-None-Match", ""), tag):
            return Response(status=304, headers={"ETag": tag})
        response = super().answer(found, status=status)
        response["ETag"] = tag
        return response

    def shown_all(self, customers: Sequence[One]) -> list[dict[str, Any]]:
        """These customers as documented; where a read asks for it, with what every system knows of them."""
        shown = super().shown_all(customers)
        if self.action in ("retrieve", "list") and self.request.query_params.get("expand") == "links":
            links = shown_links([customer.pk for customer, _ in customers], now=database_clock())
            for document, (customer, _) in zip(shown, customers, strict=True):
                document["links"] = links[customer.pk]
        return shown

    def change(self, uid: UUID, values: Mapping[str, Any]) -> None:
        expected = self.expected_version()
        if expected is None:
            super().change(uid, values)
            return

        def change() -> None:
            locked = editing.lock(organization=self.organization, ids=[uid])
            check_version(locked[uid], expected)
            super(Customers, self).change(uid, values)

        start_over(change)

    def listed(self, query: Mapping[str, Any]) -> Response:
        if query.get("cursor") is None:
            rows, part = select(self.customers(), query, organization=self.organization)
            return self.page(rows, page=query["page"], limit=query["limit"], part=part)
        if "page" in self.request.query_params:
            raise serializers.ValidationError({"page": ["Send page or cursor, not both."]})
        given = self.request.query_params.dict()
        after = read_cursor(query["cursor"], given, organization=self.organization) if query["cursor"] else FIRST
        limit = query["limit"]
        if not any(query.get(name) for name in FILTERS) and "is_active" not in query:
            found = [one(row) for row in _page(limit + 1)(organization=self.key.organization_id, after=after)]
        else:
            own = self.customers().filter(pk__gt=after)
            rows, part = select(own, query, organization=self.organization)
            found = [one(row) for row in with_leading(part(rows, 0, limit + 1), beyond=after)[: limit + 1]]
        more, found = len(found) > limit, found[:limit]
        return Response(
            {
                "data": self.shown_all(found),
                "page": None,
                "limit": limit,
                "totalPages": None,
                "totalResults": None,
                "next_cursor": write_cursor(found[-1][0].pk, given, organization=self.organization) if more else None,
            }
        )

    # What the hub adds

    @extend_schema(
        operation_id="patchUnifiedCustomer",
        summary="Change some fields of a customer",
        description="A field that is left out stays as it is; null empties a text. Of `custom_fields` the names given "
        "are set, null removes one, and the others stay.",
        parameters=[CUSTOMER_ID, IF_MATCH, ETAG],
        request=Values,
        responses={200: ONE, **STALE, **MISSING},
        examples=[VALUES_EXAMPLE],
    )
    def partial_update(self, request: Request, unified_customer_id: str) -> Response:
        self.read_query(Nothing)
        item = Item(
            action=UPDATE,
            customer_id=self.uid(unified_customer_id),
            values=self.read_body(Values),
            expected=self.expected_version(),
        )
        return self.written(item)

    @extend_schema(
        operation_id="upsertCustomerBySource",
        summary="Create or change the customer that a connection knows under an id",
        description="The same call again changes nothing. Fields are read as in the change of some fields. A slash at "
        "the end of the address is not part of the id.",
        parameters=[
            OpenApiParameter("connection_id", str, OpenApiParameter.PATH, description="The connection's id."),
            OpenApiParameter(
                "source_id",
                {"type": "string", "minLength": 1, "maxLength": REMOTE_ID_LENGTH, "pattern": PLAIN},
                OpenApiParameter.PATH,
                description="The customer's id over there.",
            ),
            IF_MATCH,
            ETAG,
        ],
        request=Values,
        responses={200: ONE, 201: ONE, **STALE},
        examples=[VALUES_EXAMPLE],
    )
    def upsert(self, request: Request, connection_id: str, source_id: str) -> Response:
        self.read_query(Nothing)
        uid = parse_public_id("con", connection_id)
        connections = _CONNECTION(organization=self.key.organization_id, uid=uid) if uid else []
        if not connections:
            raise NotFound
        try:
            source_id = SOURCE_ID.run_validation(source_id)
        except serializers.ValidationError as error:
            raise serializers.ValidationError({"source_id": error.detail}) from None
        item = Item(
            action=UPSERT,
            connection=connections[0],
            source_id=source_id,
            values=self.read_body(Values),
            # It may be new: then there is no version to name.
            expected=self.expected_version(required=False),
        )
        return self.written(item)

    @extend_schema(
        operation_id="archiveUnifiedCustomer",
        summary="Archive a customer",
        description="Takes it out of use; nothing is lost, and it can be restored. One that is archived already stays "
        "as it is, whatever If-Match says.",
        parameters=[CUSTOMER_ID, IF_MATCH],
        request=None,
        responses={204: OpenApiResponse(description="It is archived."), **STALE, **MISSING},
    )
    def destroy(self, request: Request, unified_customer_id: str) -> Response:
        customer = self.set_archived(unified_customer_id, True)
        return Response(status=204, headers={"ETag": problems.etag(customer.version)})

    @extend_schema(
        operation_id="restoreUnifiedCustomer",
        summary="Bring an archived customer back into use",
        description="One that is in use stays as it is, whatever If-Match says.",
        parameters=[CUSTOMER_ID, IF_MATCH, ETAG],
        request=None,
        responses={200: ONE, **STALE},
    )
    def restore(self, request: Request, unified_customer_id: str) -> Response:
        self.read_body(Nothing)
        customer = self.set_archived(unified_customer_id, False)
        return self.answer((customer, leading_link(customer)))

    def written(self, item: Item) -> Response:
        customer, created = write_one(organization=self.organization, item=item, actor=self.actor)
        return self.answer((customer, leading_link(customer)), status=201 if created else 200)

    def set_archived(self, unified_customer_id: str, archived: bool) -> Customer:
        self.read_query(Nothing)
        # Bringing one back takes nothing of anybody's change away.
        uid, expected = self.uid(unified_customer_id), self.expected_version(required=archived)
        move = editing.archive if archived else editing.restore

        def change() -> Customer:
            customer = editing.lock(organization=self.organization, ids=[uid])[uid]
            if (customer.archived_at is not None) == archived:
                return customer
            check_version(customer, expected)
            return move(organization=self.organization, ids=[uid], actor=self.actor)[uid].customer

        return start_over(change)

    def uid(self, unified_customer_id: str) -> UUID:
        uid = parse_public_id("cust", unified_customer_id)
        if uid is None:
            raise NotFound
        return uid


def _names(header: str, tag: str) -> bool:
    """Whether an If-None-Match names this tag; weak ones are as good (RFC 9110, 13.1.2)."""
    return any(one.strip().removeprefix("W/") in (tag, "*") for one in header.split(","))


_CONNECTION = Prepared(
    lambda: Connection.objects.filter(
        organization_id=Param("organization", BigAutoField()), uid=Param("uid", UUIDField())
    ).order_by(),
    by_key=True,
)


# The list as it is read most: all that are in use, from one id on.
@lru_cache(maxsize=100)
def _page(number: int) -> Prepared[tuple[Any, ...]]:
    def build() -> QuerySet[Customer, tuple[Any, ...]]:
        own = Customer.objects.filter(organization_id=Param("organization", BigAutoField()))
        after = Param("after", UUIDField())
        rows = own.filter(pk__gt=after, archived_at=None, merged_into=None)
        return with_leading(rows.order_by("id"), beyond=after)[:number]

    return Prepared(build)


# An id may hold slashes; one at the end is part of the address.
BY_SOURCE = r"^api/v1/unified/connections/(?P<connection_id>[^/]+)/customers/(?P<source_id>(?s:.+?))/?$"
urls = (
    re_path(r"^api/v1/unified/customer/?$", Customers.as_view({"post": "create"})),
    re_path(
        r"^api/v1/unified/customer/(?P<unified_customer_id>[^/]+)/?$",
        Customers.as_view({"get": "retrieve", "put": "update", "patch": "partial_update", "delete": "destroy"}),
    ),
    re_path(
        r"^api/v1/unified/customer/(?P<unified_customer_id>[^/]+)/restore/?$", Customers.as_view({"post": "restore"})
    ),
    re_path(r"^api/v1/unified/customers/?$", Customers.as_view({"get": "list"})),
    re_path(r"^api/v1/unified/customers/bulk/?$", Bulk.as_view({"post": "create"})),
    re_path(BY_SOURCE, Customers.as_view({"put": "upsert"})),
)
