"""RootFi's documented endpoints, served by the hub."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from typing import Any, ClassVar
from urllib.parse import parse_qs

from django.db import transaction
from django.db.models import Case, F, Q, QuerySet, TextField, Value, When
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce, Greatest
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.inbound import fields
from connectors.inbound.authentication import BearerKey
from connectors.inbound.errors import Fault, dotted
from connectors.inbound.mirror import Mirror
from connectors.inbound.totals import FEW, total_of
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.provider import Record
from connectors.providers.rootfi import shapes
from connectors.providers.rootfi.listing import (
    Choice,
    Field,
    KeptTime,
    Listing,
    Looks,
    Number,
    Text,
    Time,
    UniqueId,
    understand,
)
from connectors.providers.rootfi.looks import by_change, in_index
from connectors.providers.rootfi.wire import (
    ACTIVE,
    ARCHIVED,
    MAX_ID,
    STATUSES,
    UNKNOWN,
    WIRE,
    data_hash,
    timestamp,
    updated,
)
from connectors.sync.receive import Received, receive
from customers import search
from customers.editing import LENGTHS, Actor
from customers.models import Customer
from customers.normalize import email_key, name_key

MAX_BATCH = 500
# How many wrong fields an error message names.
SHOWN_ERRORS = 20
CUSTOMERS = "ECOMMERCE_CUSTOMERS"
# What a list is filtered by through an index: exactly, or whatever is asked of it.
EXACT = frozenset({"rootfi_id", "platform_id", "name", "email"})
INDEXED = frozenset({"rootfi_id", "rootfi_company_id"})
# The columns, each with an index, one of which is what a field shows.
COLUMNS = {
    "rootfi_created_at": ("created_at",),
    "created_at": ("created_at", "remote_created_at"),
    "rootfi_updated_at": ("updated_at",),
}
IDENTIFIER = r"^[A-Z0-9_]{2,40}$"
BOOLEAN = serializers.BooleanField()


class ApiKeyHeader(BearerKey):
    """`api_key: <key>`. WSGI makes one of `-` and `_` in a header's name, so `api-key` serves too."""

    header = "api_key"
    keyword = ""

    def secret(self, request: Request) -> str:
        value: str = request.META.get("HTTP_API_KEY", "")
        return value.strip()


class Batch(serializers.Serializer[Any]):
    company_id = fields.Whole(min_value=0, max_value=MAX_ID)
    data = serializers.ListField(  # type: ignore[assignment] # hides Serializer.data, which reading never uses
        max_length=MAX_BATCH,
        error_messages={"max_length": f"Send at most {MAX_BATCH} records in one call."},
    )
    run_async = serializers.BooleanField(default=False)


@extend_schema_serializer(component_name="RootFiSyncOrder")
class SyncOrder(serializers.Serializer[Any]):
    company_id = fields.Whole(min_value=0, max_value=MAX_ID)
    integration_type = serializers.RegexField(IDENTIFIER)
    full_sync = fields.Flag()
    data_models_to_sync = serializers.ListField(child=serializers.RegexField(IDENTIFIER), min_length=1, max_length=50)


def read_body(serializer: serializers.Serializer[Any], body: Any) -> dict[str, Any]:
    """The body as the serializer reads it; a null or an empty list is as good as absent."""
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if value is not None and value != []}
    values: dict[str, Any] = serializer.run_validation(body)
    return values


BATCH = Batch()
SYNC_ORDER = SyncOrder()


def read_items(items: Sequence[Any]) -> list[Record]:
    """Records in order. Raises ValidationError with every wrong field of every item."""
    records: list[Record] = []
    errors: dict[Any, Any] = {}
    for position, item in enumerate(items):
        try:
            records.append(WIRE.read(item))
        except serializers.ValidationError as error:
            errors[position] = error.detail
    if errors:
        raise serializers.ValidationError({"data": errors})
    return records


def store(connection: Connection, records: Sequence[Record], *, actor: Actor) -> list[Received]:
    """Take records in, all or none. A platform_id that is known changes its record, any other makes one."""
    given = {record.remote_id for record in records if record.remote_id}
    addresses: dict[str | None, Any] = {}
    if given:
        known = CustomerLink.objects.filter(connection=connection, remote_id__in=given)
        addresses = dict(known.values_list("remote_id", "remote_data__address"))
    complete: list[Record] = []
    for record in records:
        if record.remote_id is None:
            record = replace(record, remote_id=f"{secrets.token_hex(10)}_1")
        elif "address" in record.document:
            # An address given in part leaves its other parts, and its ids, as they were.
            sent, before = record.document["address"], addresses.get(record.remote_id)
            if isinstance(sent, dict) and isinstance(before, dict):
                sent = {**before, **sent}
                record = replace(record, document={**record.document, "address": sent})
            addresses[record.remote_id] = sent
        complete.append(record)
    return receive(organization=connection.organization, connection=connection, records=complete, actor=actor)


def close(run: SyncRun, received: Sequence[Received]) -> None:
    """Set the run's totals and state from what became of its records; the caller saves."""
    for result in received:
        setattr(run, result.outcome, getattr(run, result.outcome) + 1)
    run.state = SyncRun.State.SUCCEEDED
    run.finished_at = timezone.now()
    run.request = {}


def run_queued(run: SyncRun) -> None:
    """Carry out a batch that was accepted with run_async. One that has ended is left alone."""
    with transaction.atomic():
        run.refresh_from_db(from_queryset=SyncRun.objects.select_for_update())
        if run.state not in (SyncRun.State.QUEUED, SyncRun.State.RUNNING) or run.connection is None:
            return
        run.started_at = timezone.now()
        actor = Actor(kind=run.actor_kind, id=run.actor_id, name=run.actor_name, request_id=run.request_id)
        try:
            received = store(run.connection, read_items(run.request["data"]), actor=actor)
        except serializers.ValidationError as error:
            # It was valid when it was accepted: the hub's rules have changed since.
            run.refused = run.planned
            run.state = SyncRun.State.FAILED
            run.error = str(error.detail)[:500]
            run.finished_at = timezone.now()
            run.request = {}
        else:
            close(run, received)
        run.save()


class RootFiMirror(Mirror):
    provider = "rootfi"
    authentication_classes = [ApiKeyHeader]

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        code, message = "operation-denied", f"Operation Denied: {fault.message}"
        if fault.fields:
            path, _ = fault.fields[0]
            code = "missing-params" if path in fault.missing else "invalid-params"
            message = " ".join(
                f"Missing required field: {dotted(path)}."
                if path in fault.missing
                else f"Invalid field: {dotted(path) or 'body'}. {text}"
                for path, text in fault.fields[:SHOWN_ERRORS]
            )
        elif fault.kind in ("invalid", "malformed"):
            code, message = "invalid-params", f"Invalid field: body. {fault.message}"
        elif fault.kind == "not_found":
            message = "Operation Denied: This API key reaches no company with this company_id."
        elif fault.kind == "failed":
            code, message = "unknown-error", f"Unknown error: {fault.message}"
        return {"error": {"code": code, "message": message, "platform_error": ""}}

    def company(self, company_id: int) -> Connection:
        connection = self.find_connection(str(company_id))
        if connection is None:
            raise NotFound
        connection.organization = self.organization
        return connection

    def companies(self, listing: Listing) -> dict[int, int]:
        """The company_id of each connection that the key and the filters on rootfi_company_id leave."""
        accounts = Connection.objects.filter(
            organization=self.organization, provider=self.provider, direction=Connection.Direction.CALLS_US
        ).values_list("pk", "account")
        filters = [(o, v) for name, o, v in listing.filters if name == "rootfi_company_id"]
        return {
            pk: int(account)
            for pk, account in accounts
            if account.isascii()
            and account.isdigit()
            and all(COMPARE[how](int(account), values) for how, values in filters)
        }

    def start(self, connection: Connection, kind: SyncRun.Kind, **fields: Any) -> SyncRun:
        """A run, not yet saved."""
        actor = self.actor
        return SyncRun(
            public_id=SyncRun.new_public_id(),
            organization=self.organization,
            connection=connection,
            kind=kind,
            actor_kind=actor.kind,
            actor_id=actor.id,
            actor_name=actor.name,
            request_id=actor.request_id,
            **fields,
        )


COMPARE: dict[str, Callable[[int, list[int]], bool]] = {
    "eq": lambda one, others: one == others[0],
    "neq": lambda one, others: one != others[0],
    "gt": lambda one, others: one > others[0],
    "gte": lambda one, others: one >= others[0],
    "lt": lambda one, others: one < others[0],
    "lte": lambda one, others: one <= others[0],
    "in": lambda one, others: one in others,
}


class Customers(RootFiMirror):
    fields: ClassVar[Mapping[str, Field]] = {
        "rootfi_id": Number(F("pk")),
        "rootfi_company_id": Number(),
        "rootfi_created_at": Time(F("created_at")),
        "rootfi_updated_at": Time(Greatest("updated_at", "customer__updated_at")),
        "rootfi_deleted_at": Time(Coalesce("deleted_at", "customer__archived_at")),
        "platform_id": Text(F("remote_id")),
        "platform_unique_id": UniqueId(F("remote_id")),
        "name": Text(
            F("customer__name"),
            key=("customer__name_key", lambda name: name_key(name)[: LENGTHS["name_key"]]),
        ),
        "email": Text(
            F("customer__email"),
            key=("customer__email_key", lambda email: email_key(email)[: LENGTHS["email_key"]]),
        ),
        "phone": Text(F("customer__phone")),
        "currency_id": Text(F("customer__currency")),
        "status": Choice(
            Case(
                When(customer__is_active=False, then=Value(ARCHIVED)),
                When(remote_data__status=UNKNOWN, then=Value(UNKNOWN)),
                default=Value(ACTIVE),
            ),
            choices=STATUSES,
        ),
        "created_at": Time(Coalesce("remote_created_at", "created_at")),
        "updated_at": KeptTime(
            # Cast, because SQLite compares a bare key with JSON.
            Cast(KT("remote_data__updated_at"), TextField()),
            otherwise="created_at",
        ),
    }
    sortable = ("rootfi_id", "rootfi_created_at", "rootfi_updated_at")

    @extend_schema(
        operation_id="createEcommerceCustomers",
        summary="Create or change customers",
        description="All or none. An item with a `platform_id` that the company has changes that record.",
        parameters=[
            OpenApiParameter("run_async", bool, description="As in the body, before which it comes."),
        ],
        request=shapes.Batch,
        responses={200: shapes.STORED, **shapes.REFUSED, **shapes.UNKNOWN},
        examples=[shapes.BATCH_EXAMPLE],
    )
    def create(self, request: Request) -> Response:
        body = read_body(BATCH, request.data)
        run_async = body["run_async"]
        if "run_async" in request.query_params:
            try:
                run_async = BOOLEAN.run_validation(request.query_params["run_async"])
            except serializers.ValidationError as error:
                raise serializers.ValidationError({"run_async": error.detail}) from None
        records = read_items(body["data"])
        connection = self.company(body["company_id"])
        run = self.start(connection, SyncRun.Kind.RECEIVE, planned=len(records))
        if run_async:
            run.request = {"data": body["data"]}
            run.save()
            return Response({"data": [], "sync_id": run.public_id})
        with transaction.atomic():
            run.started_at = timezone.now()
            received = store(connection, records, actor=self.actor)
            close(run, received)
            run.save()
        shown = [WIRE.show(result.link, company_id=body["company_id"]) for result in received if result.link]
        return Response({"data": shown, "sync_id": run.public_id})

    @extend_schema(
        operation_id="listEcommerceCustomers",
        summary="List customers",
        description="Where a filter or the order makes the hub look through very many records, a page may hold fewer "
        "than `limit`, even none: read on with `next` until it is null.",
        parameters=shapes.query(fields, sortable=sortable, names=("select", "include_deleted_records", "return_count")),
        request=None,
        responses={200: shapes.CUSTOMERS, **shapes.REFUSED},
    )
    def list(self, request: Request) -> Response:
        listing = understand(request.query_params, fields=self.fields, sortable=self.sortable)
        companies = self.companies(listing)
        # The organization again, on the customer: the indexes for exact searches begin with it.
        rows = CustomerLink.objects.filter(connection__in=list(companies), customer__organization=self.organization)
        if not listing.include_deleted:
            rows = rows.filter(deleted_at=None, customer__archived_at=None)
        rows = listing.filtered(rows, self.fields)
        few = self.few(listing, companies)
        if few is not None:
            rows = rows.filter(few)
        looks = None if few is not None else self.looks(listing, companies)
        links, prev, following = listing.page(
            rows.select_related("customer").defer("base_local", "base_remote", "customer__custom_fields"),
            lambda link: {
                "rootfi_id": link.pk,
                "rootfi_created_at": link.created_at,
                "rootfi_updated_at": updated(link),
            },
            looks=looks,
        )
        among = CustomerLink.objects.filter(connection__in=list(companies)) if looks and listing.filters else None
        total = total_of(rows, among=among) if listing.count else None
        data = []
        for link in links:
            shown = WIRE.show(link, company_id=companies[link.connection_id])
            if "raw_data" in listing.select:
                shown["raw_data"] = link.remote_data
            if "data_hash" in listing.select:
                shown["data_hash"] = data_hash(link.remote_data)
            data.append(shown)
        return Response({"data": data, "prev": prev, "next": following, "total_count": total})

    def few(self, listing: Listing, companies: Mapping[int, int]) -> Q | None:
        """A condition that holds for every row that the filters keep, and for few others; None where there is none.

        What an index finds is read first where it is little: the list is in another order than that index.
        """
        links = CustomerLink.objects.filter(connection__in=list(companies))
        customers = Customer.objects.filter(organization=self.organization)
        for name, operator, values in listing.filters:
            if name in EXACT and operator in ("eq", "in") and "" not in values:
                return Q()  # the database finds these itself
        for name in ("created_at", "rootfi_created_at"):
            if made := self.made(name, listing, links):
                return made
        since = [moment for moment in listing.since("rootfi_updated_at") if moment]
        if since:
            # The later one of two tables' moments: what has changed in either.
            changed = customers.filter(updated_at__gte=max(since)).order_by("-updated_at", "-id")
            theirs = list(changed.values_list("pk", flat=True)[: FEW + 1])
            own = links.filter(updated_at__gte=max(since)).order_by("-updated_at", "-pk").values_list("pk", flat=True)
            ids = set(own[: FEW + 1])
            if len(ids) <= FEW and len(theirs) <= FEW:
                ids.update(links.filter(customer__in=theirs).values_list("pk", flat=True))
                return Q(pk__in=ids)
        for name, operator, values in listing.filters:
            if name in ("name", "email") and operator == "contains":
                named = search.written(values[0], organization=self.organization)
                if named is not None and len(found := list(named.values_list("pk", flat=True)[: FEW + 1])) <= FEW:
                    return Q(customer__in=found)
        return None

    def made(self, name: str, listing: Listing, links: QuerySet[CustomerLink]) -> Q | None:
        """The links that the filters on this time keep, if they are few."""
        ids: set[int] = set()
        for column, part in self.made_by(name, listing).items():
            ids.update(links.filter(part).order_by(column).values_list("pk", flat=True)[: FEW + 1])
            if len(ids) > FEW:
                return None
        return Q(pk__in=ids) if self.made_by(name, listing) else None

    def made_by(self, name: str, listing: Listing) -> dict[str, Q]:
        """What the filters on this time say of each column that may hold it; empty where they say nothing."""
        filters = [(how, values) for of, how, values in listing.filters if of == name and how != "neq"]
        if not filters or any(None in values for _, values in filters):
            return {}
        return {
            column: reduce(and_, (Time().condition(column, how, values) for how, values in filters))
            for column in COLUMNS[name]
        }

    def looks(self, listing: Listing, companies: Mapping[int, int]) -> Looks | None:
        """How to read a list whose rows or order no index has; None where one does."""
        names = [name for name, _ in listing.order]
        if len({descending for _, descending in listing.order}) > 1:
            return None
        if names == ["rootfi_updated_at", "rootfi_id"]:
            when = self.made_by("rootfi_updated_at", listing).get("updated_at", Q())
            return by_change(listing, [*companies], organization=self.organization, when=when)
        filtered = {name for name, _, _ in listing.filters}
        if filtered <= INDEXED | {names[0]} or names not in (["rootfi_id"], ["rootfi_created_at", "rootfi_id"]):
            return None
        made = [self.made_by(name, listing) for name in ("created_at", "rootfi_created_at") if names == ["rootfi_id"]]
        return in_index(listing, [*companies], made=[*next(filter(None, made), {}).values()])


class Syncs(RootFiMirror):
    fields: ClassVar[Mapping[str, Field]] = {
        "rootfi_id": Number(F("pk")),
        "rootfi_company_id": Number(),
        "rootfi_created_at": Time(F("created_at")),
        "rootfi_updated_at": Time(F("updated_at")),
        "sync_id": Text(F("public_id")),
    }
    statuses: ClassVar[Mapping[str, str]] = {
        SyncRun.State.QUEUED: "PENDING",
        SyncRun.State.RUNNING: "RUNNING",
        SyncRun.State.SUCCEEDED: "SUCCESS",
        SyncRun.State.PARTLY: "PARTIAL",
        SyncRun.State.FAILED: "FAILED",
        SyncRun.State.CANCELLED: "FAILED",
    }

    @extend_schema(
        operation_id="createSync",
        summary="Sync a company",
        request=SyncOrder,
        responses={200: shapes.ORDERED, **shapes.REFUSED, **shapes.UNKNOWN},
        examples=[shapes.ORDER_EXAMPLE],
    )
    def create(self, request: Request) -> Response:
        body = read_body(SYNC_ORDER, request.data)
        connection = self.company(body.pop("company_id"))
        links = CustomerLink.objects.filter(connection=connection, deleted_at=None, customer__archived_at=None)
        live = total_of(links)
        # What the hub has is current at any time, so a sync has nothing to wait for.
        now = timezone.now()
        run = self.start(
            connection,
            SyncRun.Kind.SYNC,
            state=SyncRun.State.SUCCEEDED,
            planned=live,
            unchanged=live,
            request=body,
            started_at=now,
            finished_at=now,
        )
        run.save()
        return Response({"data": self.shown(run, body, company_id=int(connection.account))})

    @extend_schema(
        operation_id="listSyncs",
        summary="List syncs",
        parameters=shapes.query(fields),
        request=None,
        responses={200: shapes.SYNCS, **shapes.REFUSED},
    )
    def list(self, request: Request) -> Response:
        query = request.query_params.copy()
        for name in ("next", "prev"):
            given = query.get(name) or ""
            if given.startswith(("http://", "https://")):
                # Not urlsplit: it raises for a host that is none, and the host does not matter here.
                query[name] = parse_qs(given.partition("?")[2].partition("#")[0]).get(name, [given])[-1]
        listing = understand(query, fields=self.fields, order=(("rootfi_id", True),))
        companies = self.companies(listing)
        rows = listing.filtered(
            SyncRun.objects.filter(
                organization=self.organization,
                connection__in=list(companies),
                kind__in=(SyncRun.Kind.SYNC, SyncRun.Kind.RECEIVE),
            ),
            self.fields,
        )
        runs, prev, following = listing.page(
            # A batch that still waits is a megabyte of `request`.
            rows.defer("problems", "request"),
            lambda run: {"rootfi_id": run.pk},
        )
        syncs = [run.pk for run in runs if run.kind == SyncRun.Kind.SYNC]
        asked = dict(SyncRun.objects.filter(pk__in=syncs).values_list("pk", "request"))

        def address(name: str, cursor: str | None) -> str | None:
            if cursor is None:
                return None
            again = query.copy()
            for stale in ("next", "prev"):
                again.pop(stale, None)
            again[name] = cursor
            return request.build_absolute_uri(f"{request.path}?{again.urlencode()}")

        return Response(
            {
                "data": [
                    self.shown(run, asked.get(run.pk, {}), company_id=companies[run.connection_id or 0]) for run in runs
                ],
                "prev": address("prev", prev),
                "next": address("next", following),
            }
        )

    def shown(self, run: SyncRun, asked: Mapping[str, Any], *, company_id: int) -> dict[str, Any]:
        """Run -> the documented keys; `asked` is the body that a sync was asked for with."""
        open_ = run.planned - run.total
        return {
            "rootfi_id": run.pk,
            "rootfi_company_id": company_id,
            "rootfi_created_at": timestamp(run.created_at),
            "rootfi_updated_at": timestamp(run.updated_at),
            "start_time": timestamp(run.started_at),
            "end_time": timestamp(run.finished_at),
            # An API batch names no platform, and the documented list has none that is RootFi's own but this.
            "integration_type": asked.get("integration_type", "ROOTFI_SANDBOX"),
            "full_sync": asked.get("full_sync", False),
            "sync_type": "MANUAL",
            "config_mode": "READ" if run.kind == SyncRun.Kind.SYNC else "CREATE",
            "sync_data_models": asked.get("data_models_to_sync", [CUSTOMERS]),
            "sync_id": run.public_id,
            "total_count": run.planned,
            "success_count": run.created + run.updated + run.unchanged,
            "failed_count": run.refused,
            "running_count": open_ if run.state == SyncRun.State.RUNNING else 0,
            "pending_count": open_ if run.state == SyncRun.State.QUEUED else 0,
            "status": self.statuses[run.state],
        }
