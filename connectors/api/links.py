"""What each system knows of a customer and whose turn it is; and asking for the customer to be sent now."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from django.db import connection as database
from django.db.models import Q
from django.urls import re_path
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api.problems import Refusal
from connectors.api.resource import Nothing, Resource, Strict, parse_ids
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.providers.links import timestamp
from connectors.states import STATUSES
from connectors.sync.clock import database_clock
from connectors.sync.request import request as request_push
from customers.ids import parse_public_id, public_id
from customers.models import Customer, Organization

# What a link holds that no answer shows.
BULKY = ("remote_data", "base_local", "base_remote", "tombstone", "connection__credentials", "connection__checkpoint")
MAX_WAIT = 30  # seconds
# A waiting request looks often at first, as most pushes take less than a second.
FIRST_LOOK, LONGEST_LOOK = 0.1, 1.0
# Each waiting request keeps a thread of the server busy; the rest of them is for the others.
MAX_WAITING = 4
_waiting = threading.BoundedSemaphore(MAX_WAITING)


class ConnectionNamed(serializers.Serializer[Any]):
    id = serializers.CharField()
    name = serializers.CharField()
    provider = serializers.CharField(help_text="The API that this system speaks.")


class ErrorShown(serializers.Serializer[Any]):
    field = serializers.CharField(allow_null=True, help_text="The customer's field that the system objects to.")
    message = serializers.CharField()


class LinkShown(serializers.Serializer[Any]):
    id = serializers.CharField()
    connection = ConnectionNamed()
    is_leading = serializers.BooleanField(help_text="Stands for the customer where one source only is shown.")
    remote_id = serializers.CharField(allow_null=True, help_text="The record's id there; null until it is known.")
    state = serializers.ChoiceField(choices=[*STATUSES])
    word = serializers.CharField(help_text="The state in a word for people.")
    sentence = serializers.CharField(help_text="What is going on.")
    turn = serializers.ChoiceField(
        choices=["nobody", "you", "connection_owner"],
        help_text="Who has to act: nobody, whoever sees to the customer, or whoever owns the connection.",
    )
    needed_version = serializers.IntegerField(help_text="The customer's last version that concerns the system.")
    pushed_version = serializers.IntegerField(help_text="The last version that the system accepted.")
    next_attempt_at = serializers.DateTimeField(allow_null=True)
    error = ErrorShown(allow_null=True)
    conflicts = serializers.ListField(
        child=serializers.CharField(), help_text="Fields that changed on both sides and wait for a person."
    )
    synced_at = serializers.DateTimeField(allow_null=True)
    updated_at = serializers.DateTimeField()


class LinksShown(serializers.Serializer[Any]):
    data = LinkShown(many=True)  # type: ignore[assignment] # hides Serializer.data, which is not used to describe


class ResultShown(serializers.Serializer[Any]):
    connection_id = serializers.CharField()
    state = serializers.ChoiceField(choices=[*STATUSES], help_text="The link's state now.")
    sentence = serializers.CharField(help_text="What is going on.")
    outcome = serializers.ChoiceField(choices=SyncRun.TOTALS, allow_null=True, help_text="Null until there is one.")
    remote_id = serializers.CharField(allow_null=True)
    error = ErrorShown(allow_null=True)


class OperationShown(serializers.Serializer[Any]):
    id = serializers.CharField()
    customer_id = serializers.CharField()
    state = serializers.ChoiceField(choices=["running", "succeeded", "partly_succeeded", "failed"])
    done = serializers.BooleanField(help_text="Every system has an outcome. It may take hours where one is down.")
    created_at = serializers.DateTimeField()
    finished_at = serializers.DateTimeField(allow_null=True)
    results = ResultShown(many=True)


class OneOperationShown(serializers.Serializer[Any]):
    data = OperationShown()  # type: ignore[assignment] # as above


class PushOrder(Strict):
    connection_ids = serializers.ListField(
        child=serializers.CharField(),
        required=False,
        allow_empty=False,
        max_length=100,
        help_text="Send it to these, also where it is not known yet. Left out: to every system that knows it.",
    )


class Waiting(Strict):
    wait = serializers.IntegerField(
        default=0, min_value=0, max_value=MAX_WAIT, help_text="Seconds to wait for the operation to be done."
    )


def find_customer(organization: Organization, unified_customer_id: str) -> Customer:
    """The customer with this id, or the survivor that it was merged into. Raises NotFound."""
    uid = parse_public_id("cust", unified_customer_id)
    rows = Customer.objects.filter(organization=organization)
    customer = rows.filter(pk=uid).first() if uid else None
    if customer is not None and customer.merged_into_id:
        customer = rows.filter(pk=customer.merged_into_id).first()
    if customer is None:
        raise NotFound
    return customer


def shown_links(customer_ids: Collection[UUID], *, now: datetime) -> dict[UUID, list[dict[str, Any]]]:
    """Every link of each of these customers as the API shows it, the leading one first. One statement for all."""
    links = (
        CustomerLink.objects.filter(customer__in=customer_ids)
        .select_related("connection")
        .defer(*BULKY)
        .order_by("-is_primary", "connection__name", "pk")
    )
    found: dict[UUID, list[dict[str, Any]]] = {pk: [] for pk in customer_ids}
    for link in links:
        found[link.customer_id].append(_shown(link, now=now))
    return found


def named(connection: Connection) -> dict[str, str]:
    return {"id": connection.public_id, "name": connection.name, "provider": connection.provider}


def _shown(link: CustomerLink, *, now: datetime) -> dict[str, Any]:
    status = link.status(now=now)
    return {
        "id": public_id("lnk", link.uid),
        "connection": named(link.connection),
        "is_leading": link.is_primary,
        "remote_id": link.remote_id,
        "state": status.key,
        "word": status.word,
        "sentence": link.sentence(now=now),
        "turn": status.turn.replace(" ", "_"),
        "needed_version": link.needed_version,
        "pushed_version": link.pushed_version,
        "next_attempt_at": timestamp(link.next_attempt_at),
        "error": _error(link.error_field, link.error),
        "conflicts": [*link.conflicts],
        "synced_at": timestamp(link.synced_at),
        "updated_at": timestamp(link.updated_at),
    }


def _error(field: str, message: str) -> dict[str, str | None] | None:
    return {"field": field or None, "message": message} if message else None


class Links(Resource):
    scopes: ClassVar[Mapping[str, str]] = {
        "list": "customers:read",
        "push": "customers:push",
        "retrieve": "customers:push",
    }

    @extend_schema(
        operation_id="listCustomerLinks",
        summary="What each system knows of a customer",
        description="Every link with its state and whose turn it is, the leading one first.",
        responses=LinksShown,
        examples=[
            OpenApiExample(
                "links",
                value={
                    "data": [
                        {
                            "id": "lnk_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                            "connection": {
                                "id": "con_01JD8B7V3N5R0Q2W4E6T8Y1A3T",
                                "name": "Books",
                                "provider": "links",
                            },
                            "is_leading": True,
                            "remote_id": None,
                            "state": "rejected",
                            "word": "Rejected",
                            "sentence": "Books refuses email: Links needs an e-mail address.",
                            "turn": "you",
                            "needed_version": 2,
                            "pushed_version": 0,
                            "next_attempt_at": None,
                            "error": {"field": "email", "message": "Links needs an e-mail address."},
                            "conflicts": [],
                            "synced_at": None,
                            "updated_at": "2026-01-31T08:00:00Z",
                        }
                    ]
                },
                response_only=True,
            )
        ],
    )
    def list(self, request: Request, unified_customer_id: str) -> Response:
        self.read_query(Nothing)
        customer = find_customer(self.organization, unified_customer_id)
        return Response({"data": shown_links([customer.pk], now=database_clock())[customer.pk]})

    @extend_schema(
        operation_id="pushCustomer",
        summary="Send a customer now",
        description="Asks for the customer to be in the systems named, or in all that know it, before anything else "
        "that waits to be sent. With `wait` the answer comes when all have an outcome, or after so many seconds. "
        "Asking again is safe: nothing is sent twice.",
        parameters=[Waiting],
        request=PushOrder,
        responses={
            200: OpenApiResponse(OneOperationShown, description="`wait` was given, and it is done."),
            202: OpenApiResponse(OneOperationShown, description="It is under way: `Location` tells how it goes on."),
            409: OpenApiResponse(description="There is nothing to push; the detail says why."),
        },
        examples=[
            OpenApiExample(
                "to one system", value={"connection_ids": ["con_01JD8B7V3N5R0Q2W4E6T8Y1A3T"]}, request_only=True
            ),
        ],
    )
    def push(self, request: Request, unified_customer_id: str) -> Response:
        wait = self.read_query(Waiting)["wait"]
        order = self.read_body(PushOrder)
        customer = find_customer(self.organization, unified_customer_id)
        connections = self._targets(customer, order.get("connection_ids"))
        if customer.archived_at is not None:
            raise Refusal("nothing_to_push", f"{customer.name} is archived. Restore the customer first.")
        runs = [
            request_push(connection=one, actor=self.actor, customer_ids=[customer.pk], urgent=True)
            for one in connections
        ]
        # The first run stands for all.
        lead = runs[0]
        lead.request = {**lead.request, "customer": str(customer.pk), "runs": [run.public_id for run in runs]}
        lead.save(update_fields=["request"])
        if wait:
            # Not before the runs are committed: until then no worker sees them.
            self.afterwards = lambda: self._pushed(lead.public_id, wait)
        return self._pushed(lead.public_id, 0)

    @extend_schema(
        operation_id="getOperation",
        summary="How a push goes on",
        parameters=[Waiting, OpenApiParameter("operation_id", str, OpenApiParameter.PATH)],
        responses=OneOperationShown,
        examples=[
            OpenApiExample(
                "done",
                value={
                    "data": {
                        "id": "k3v9x1m2q8w7e6r5",
                        "customer_id": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                        "state": "succeeded",
                        "done": True,
                        "created_at": "2026-01-31T08:00:00Z",
                        "finished_at": "2026-01-31T08:00:01Z",
                        "results": [
                            {
                                "connection_id": "con_01JD8B7V3N5R0Q2W4E6T8Y1A3T",
                                "state": "in_sync",
                                "sentence": "Same as in Books since 2026-01-31 08:00:01 UTC.",
                                "outcome": "created",
                                "remote_id": "cust_42",
                                "error": None,
                            }
                        ],
                    }
                },
                response_only=True,
            )
        ],
    )
    def retrieve(self, request: Request, operation_id: str) -> Response:
        return Response({"data": self._awaited(operation_id, self.read_query(Waiting)["wait"])})

    def _pushed(self, operation_id: str, wait: int) -> Response:
        shown = self._awaited(operation_id, wait)
        address = f"/api/v1/unified/operations/{operation_id}"
        if wait and shown["done"]:
            return Response({"data": shown}, headers={"Location": address})
        return Response({"data": shown}, status=202, headers={"Location": address, "Retry-After": "1"})

    def _targets(self, customer: Customer, connection_ids: Sequence[str] | None) -> Sequence[Connection]:
        """The connections to push to. Raises ValidationError for one that cannot be, Refusal where there is none."""
        own = Connection.objects.filter(organization=self.organization).select_related("organization").order_by("pk")
        if connection_ids is None:
            known = own.filter(
                direction__in=Connection.PUSHING, links__customer=customer, links__is_duplicate=False
            ).distinct()
            if found := list(known):
                return found
            raise Refusal(
                "nothing_to_push",
                f"No system that the hub sends to knows {customer.name}. Name those to send it to in connection_ids.",
            )
        ids = parse_ids("con", connection_ids)
        by_uid = {one.uid: one for one in own.filter(uid__in=ids.values())}
        chosen: dict[int, Connection] = {}
        wrong: dict[Any, Any] = {}
        for position, text in enumerate(connection_ids):
            connection = by_uid.get(ids[text]) if text in ids else None
            if connection is None:
                wrong[position] = ["There is no such connection."]
            elif connection.calls_us:
                wrong[position] = [f"{connection.name} calls the hub: nothing is sent to it."]
            elif not connection.pushes:
                wrong[position] = [f"The hub only reads from {connection.name}: nothing is sent to it."]
            else:
                chosen[connection.pk] = connection
        if wrong:
            raise serializers.ValidationError({"connection_ids": wrong})
        return list(chosen.values())

    def _awaited(self, operation_id: str, wait: int) -> dict[str, Any]:
        """The operation as it is when it is done, or else after so many seconds.

        No connection to the database is kept between two looks. Where too many wait already, this one does not.
        """
        shown = operation(self.organization, operation_id)
        if shown["done"] or not wait or not _waiting.acquire(blocking=False):
            return shown
        try:
            ends, pause = time.monotonic() + wait, FIRST_LOOK
            while not shown["done"] and (left := ends - time.monotonic()) > 0:
                if not database.in_atomic_block:
                    database.close()
                time.sleep(min(pause, left))
                pause = min(pause * 1.5, LONGEST_LOOK)
                shown = operation(self.organization, operation_id)
        finally:
            _waiting.release()
        return shown


def operation(organization: Organization, operation_id: str) -> dict[str, Any]:
    """How a push that the API asked for goes on: its runs, one for each connection. Raises Refusal."""
    runs = SyncRun.objects.filter(organization=organization, kind=SyncRun.Kind.PUSH)
    lead = runs.filter(public_id=operation_id).first()
    if lead is None or "runs" not in lead.request:
        raise Refusal("not_found", "There is no such operation.")
    customer_id = UUID(lead.request["customer"])
    runs = runs.filter(public_id__in=lead.request["runs"]).select_related("connection")
    own = list(runs.defer("connection__credentials", "connection__checkpoint").order_by("pk"))
    # The link may have moved to a survivor since.
    whose = Q(customer=customer_id) | Q(original_customer=customer_id)
    links = CustomerLink.objects.filter(whose, connection__in=[run.connection_id for run in own], is_duplicate=False)
    by_connection = {link.connection_id: link for link in links.defer(*BULKY[:4])}
    now = database_clock()
    done = all(run.finished_at for run in own)
    states = {run.state for run in own}
    return {
        "id": lead.public_id,
        "customer_id": public_id("cust", customer_id),
        "state": (states.pop() if len(states) == 1 else SyncRun.State.PARTLY) if done else SyncRun.State.RUNNING,
        "done": done,
        "created_at": timestamp(lead.created_at),
        "finished_at": timestamp(max(run.finished_at for run in own if run.finished_at)) if done else None,
        "results": [_result(run, by_connection.get(run.connection_id or 0), now=now) for run in own],
    }


def _result(run: SyncRun, link: CustomerLink | None, *, now: datetime) -> dict[str, Any]:
    """What became of the customer in one system. `run` is of this one customer."""
    connection = run.connection
    assert connection is not None  # a push is one of a connection
    outcome = next((name for name in SyncRun.TOTALS if getattr(run, name)), "skipped") if run.finished_at else None
    problem = next(iter(run.problems), None)
    if problem is not None:
        error = _error(problem.get("field", ""), problem.get("reason", ""))
    else:
        error = _error(link.error_field, link.error) if link and outcome not in ("created", "updated") else None
    if link is None:
        state, sentence = "not_linked", STATUSES["not_linked"].sentence.format(system=connection.name)
    else:
        link.connection = connection
        state, sentence = link.status_key(now=now), link.sentence(now=now)
    if outcome == "skipped":
        sentence = f"Something newer came before it. {sentence}"
    return {
        "connection_id": connection.public_id,
        "state": state,
        "sentence": sentence,
        "outcome": outcome,
        "remote_id": link.remote_id if link else None,
        "error": error,
    }


urls = (
    re_path(r"^api/v1/unified/customer/(?P<unified_customer_id>[^/]+)/links/?$", Links.as_view({"get": "list"})),
    re_path(r"^api/v1/unified/customer/(?P<unified_customer_id>[^/]+)/push/?$", Links.as_view({"post": "push"})),
    re_path(r"^api/v1/unified/operations/(?P<operation_id>[^/]+)/?$", Links.as_view({"get": "retrieve"})),
)
