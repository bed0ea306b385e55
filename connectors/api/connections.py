"""The systems of an organization and how they are. What they are logged in with is never shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, ClassVar

from django.db.models import Case, CharField, Count, F, Q, Value, When, Window
from django.db.models.functions import RowNumber
from django.urls import re_path
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import cursors
from connectors.api.links import named
from connectors.api.problems import Refusal
from connectors.api.resource import Nothing, Resource, Strict
from connectors.models import Connection, CustomerLink, Issue
from connectors.providers.links import timestamp
from connectors.states import PARKED, LinkState
from connectors.sync.clock import database_clock
from customers.ids import parse_public_id
from customers.models import Organization

# Of more open issues the newest are shown, and how many there are.
ISSUES_SHOWN = 20
LIST = "connections"
WAITS = ("due", "waiting", "retrying", "checking")


class Paging(Strict):
    limit = serializers.IntegerField(default=50, min_value=1, max_value=200)
    cursor = serializers.CharField(
        required=False, allow_blank=True, help_text="The next_cursor of the answer before; left out for the first page."
    )


class IssueShown(serializers.Serializer[Any]):
    kind = serializers.ChoiceField(choices=Issue.Kind.values)
    message = serializers.CharField()
    count = serializers.IntegerField(help_text="How often it has happened.")
    first_at = serializers.DateTimeField()
    last_at = serializers.DateTimeField()


class BreakerShown(serializers.Serializer[Any]):
    open = serializers.BooleanField(help_text="Too many calls failed: the hub holds back.")
    until = serializers.DateTimeField(allow_null=True, help_text="When one call is tried.")


class ParkedShown(serializers.Serializer[Any]):
    """Links that wait for a person, by state."""

    rejected = serializers.IntegerField()
    uncertain = serializers.IntegerField()
    conflict = serializers.IntegerField()
    remote_deleted = serializers.IntegerField()
    paused = serializers.IntegerField()


class BacklogShown(serializers.Serializer[Any]):
    due = serializers.IntegerField(help_text="Customers to be sent now.")
    waiting = serializers.IntegerField(help_text="Customers to be sent in a moment.")
    retrying = serializers.IntegerField(help_text="Customers that could not be sent and are tried again.")
    checking = serializers.IntegerField(help_text="Customers of which the hub finds out whether they were stored.")
    parked = ParkedShown()


class HealthShown(serializers.Serializer[Any]):
    last_success_at = serializers.DateTimeField(allow_null=True, help_text="The last call that went well, to 30 s.")
    waiting_until = serializers.DateTimeField(allow_null=True, help_text="The system asked not to be called before.")
    breaker = BreakerShown()
    open_issue_count = serializers.IntegerField()
    open_issues = IssueShown(many=True, help_text=f"The newest {ISSUES_SHOWN}.")
    backlog = BacklogShown()


class ConnectionShown(serializers.Serializer[Any]):
    id = serializers.CharField()
    name = serializers.CharField()
    provider = serializers.CharField(help_text="The API that it speaks.")
    account = serializers.CharField(allow_null=True, help_text="The account there.")
    direction = serializers.ChoiceField(choices=Connection.Direction.values)
    state = serializers.ChoiceField(choices=Connection.State.values)
    state_reason = serializers.CharField(allow_null=True)
    health = HealthShown()
    created_at = serializers.DateTimeField()


class OneConnectionShown(serializers.Serializer[Any]):
    data = ConnectionShown()  # type: ignore[assignment] # hides Serializer.data, which is not used to describe


class ConnectionsShown(serializers.Serializer[Any]):
    data = ConnectionShown(many=True)  # type: ignore[assignment] # as above
    next_cursor = serializers.CharField(allow_null=True)


EXAMPLE = {
    "id": "con_01JD8B7V3N5R0Q2W4E6T8Y1A3T",
    "name": "Books",
    "provider": "links",
    "account": None,
    "direction": "push",
    "state": "active",
    "state_reason": None,
    "health": {
        "last_success_at": "2026-01-31T08:00:00Z",
        "waiting_until": None,
        "breaker": {"open": False, "until": None},
        "open_issue_count": 1,
        "open_issues": [
            {
                "kind": "rejected",
                "message": "Books refuses 12 customers: phone is too short.",
                "count": 12,
                "first_at": "2026-01-30T08:00:00Z",
                "last_at": "2026-01-31T08:00:00Z",
            }
        ],
        "backlog": {
            "due": 0,
            "waiting": 1,
            "retrying": 0,
            "checking": 0,
            "parked": {"rejected": 12, "uncertain": 0, "conflict": 0, "remote_deleted": 0, "paused": 0},
        },
    },
    "created_at": "2026-01-01T08:00:00Z",
}


def find_connection(organization: Organization, connection_id: str) -> Connection:
    """The organization's connection with this public id. Raises Refusal."""
    uid = parse_public_id("con", connection_id)
    connection = Connection.objects.filter(organization=organization, uid=uid).first() if uid else None
    if connection is None:
        raise Refusal("not_found", "There is no such connection.")
    return connection


class Connections(Resource):
    scopes: ClassVar[Mapping[str, str]] = {"list": "connections:read", "retrieve": "connections:read"}

    @extend_schema(
        operation_id="listConnections",
        summary="The connected systems and how they are",
        parameters=[Paging],
        responses=ConnectionsShown,
        examples=[OpenApiExample("one", value={"data": [EXAMPLE], "next_cursor": None}, response_only=True)],
    )
    def list(self, request: Request) -> Response:
        query = self.read_query(Paging)
        rows = Connection.objects.filter(organization=self.organization).order_by("pk")
        if query.get("cursor"):
            rows = rows.filter(pk__gt=cursors.read_key(query["cursor"], of=LIST, organization_id=self.organization.pk))
        found = list(rows.defer("credentials", "checkpoint", "options")[: query["limit"] + 1])
        more, found = len(found) > query["limit"], found[: query["limit"]]
        following = cursors.write_key(found[-1].pk, of=LIST, organization_id=self.organization.pk) if more else None
        return Response({"data": shown_connections(found, now=database_clock()), "next_cursor": following})

    @extend_schema(
        operation_id="getConnection",
        summary="One connected system and how it is",
        parameters=[OpenApiParameter("connection_id", str, OpenApiParameter.PATH)],
        responses=OneConnectionShown,
        examples=[OpenApiExample("connection", value={"data": EXAMPLE}, response_only=True)],
    )
    def retrieve(self, request: Request, connection_id: str) -> Response:
        self.read_query(Nothing)
        found = find_connection(self.organization, connection_id)
        [shown] = shown_connections([found], now=database_clock())
        return Response({"data": shown})


def shown_connections(connections: Collection[Connection], *, now: datetime) -> list[dict[str, Any]]:
    """These connections as the API shows them; two statements for all."""
    issues = _open_issues(connections)
    backlogs = _backlogs(connections, now=now)
    shown = []
    for one in connections:
        waits = one.not_before is not None and one.not_before > now
        own = issues.get(one.pk, [])
        shown.append(
            {
                **named(one),
                "account": one.account or None,
                "direction": one.direction,
                "state": one.state,
                "state_reason": one.state_reason or None,
                "health": {
                    "last_success_at": timestamp(one.last_success_at),
                    "waiting_until": timestamp(one.not_before) if waits else None,
                    # Set while it is open, also when its wait is over and the call that is tried is on its way. After a
                    # reconnect it only spaces the first calls.
                    "breaker": {
                        "open": one.breaker_trips > 0 and one.breaker_until is not None,
                        "until": timestamp(one.breaker_until) if one.breaker_trips else None,
                    },
                    "open_issue_count": own[0].open_issues if own else 0,
                    "open_issues": [
                        {
                            "kind": issue.kind,
                            "message": issue.message,
                            "count": issue.count,
                            "first_at": timestamp(issue.first_at),
                            "last_at": timestamp(issue.last_at),
                        }
                        for issue in own
                    ],
                    "backlog": backlogs[one.pk],
                },
                "created_at": timestamp(one.created_at),
            }
        )
    return shown


def _open_issues(connections: Collection[Connection]) -> dict[int, list[Any]]:
    """The newest open issues of each connection; `open_issues` on them is how many it has."""
    rows = (
        Issue.objects.filter(connection__in=connections, resolved_at=None)
        .annotate(
            place=Window(RowNumber(), partition_by="connection_id", order_by=["-last_at", "-pk"]),
            open_issues=Window(Count("pk"), partition_by="connection_id"),
        )
        .filter(place__lte=ISSUES_SHOWN)
        .defer("details")
        .order_by("connection_id", "place")
    )
    found: dict[int, list[Any]] = {}
    for issue in rows:
        found.setdefault(issue.connection_id, []).append(issue)
    return found


def _backlogs(connections: Collection[Connection], *, now: datetime) -> dict[int, dict[str, Any]]:
    """What is not in sync in each connection, counted by what it waits for."""
    # Each part by an index of its own: what waits to be sent is due at some time.
    dirty = Q(connection__in=connections, pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False)
    rows = (
        CustomerLink.objects.filter(dirty | Q(connection__in=connections, state__in=PARKED))
        .filter(is_duplicate=False, deleted_at=None)
        .annotate(
            waits=Case(
                When(state=LinkState.UNCERTAIN, next_attempt_at__isnull=False, then=Value("checking")),
                When(state__in=PARKED, then=F("state")),
                When(state=LinkState.RETRYING, then=Value("retrying")),
                When(next_attempt_at__lte=now, then=Value("due")),
                default=Value("waiting"),
                output_field=CharField(),
            )
        )
        .order_by()
        .values_list("connection_id", "waits")
        .annotate(Count("pk"))
    )
    counts: dict[int, dict[str, int]] = {}
    for connection_id, waits, number in rows:
        counts.setdefault(connection_id, {})[waits] = number
    return {
        one.pk: {
            **{name: counts.get(one.pk, {}).get(name, 0) for name in WAITS},
            "parked": {str(state): counts.get(one.pk, {}).get(state, 0) for state in PARKED},
        }
        for one in connections
    }


urls = (
    re_path(r"^api/v1/unified/connections/?$", Connections.as_view({"get": "list"})),
    re_path(r"^api/v1/unified/connections/(?P<connection_id>[^/]+)/?$", Connections.as_view({"get": "retrieve"})),
)
