"""What was pushed, pulled, imported and taken in, with totals that add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.db.models import QuerySet
from django.urls import re_path
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import cursors
from connectors.api.connections import Paging, find_connection
from connectors.api.links import ConnectionNamed, named
from connectors.api.problems import Refusal
from connectors.api.resource import Nothing, Resource
from connectors.models import SyncRun
from connectors.providers.links import timestamp
from connectors.sync.runs import PROBLEMS_KEPT
from customers.ids import parse_public_id, public_id
from customers.models import CustomerChange

LIST = "runs"


class Filters(Paging):
    connection_id = serializers.CharField(required=False)
    kind = serializers.ChoiceField(choices=SyncRun.Kind.values, required=False)
    state = serializers.ChoiceField(choices=SyncRun.State.values, required=False)


class AuthorShown(serializers.Serializer[Any]):
    kind = serializers.ChoiceField(choices=CustomerChange.Actor.values)
    name = serializers.CharField()


class TotalsShown(serializers.Serializer[Any]):
    """How many records have which outcome."""

    created = serializers.IntegerField()
    updated = serializers.IntegerField()
    unchanged = serializers.IntegerField()
    refused = serializers.IntegerField()
    retrying = serializers.IntegerField()
    uncertain = serializers.IntegerField()
    skipped = serializers.IntegerField()


class RunShown(serializers.Serializer[Any]):
    id = serializers.CharField()
    kind = serializers.ChoiceField(choices=SyncRun.Kind.values)
    state = serializers.ChoiceField(choices=SyncRun.State.values)
    connection = ConnectionNamed(allow_null=True)
    actor = AuthorShown()
    request_id = serializers.CharField(allow_null=True, help_text="The API request that asked for it.")
    planned = serializers.IntegerField(help_text="All records, as far as known: the totals and `open` together.")
    open = serializers.IntegerField(help_text="Records that have no outcome yet.")
    totals = TotalsShown()
    error = serializers.CharField(allow_null=True, help_text="What ended it before its time.")
    created_at = serializers.DateTimeField()
    started_at = serializers.DateTimeField(allow_null=True)
    finished_at = serializers.DateTimeField(allow_null=True)


class OneRunShown(serializers.Serializer[Any]):
    data = RunShown()  # type: ignore[assignment] # hides Serializer.data, which is not used to describe


class RunsShown(serializers.Serializer[Any]):
    data = RunShown(many=True)  # type: ignore[assignment] # as above
    next_cursor = serializers.CharField(allow_null=True)


class RecordShown(serializers.Serializer[Any]):
    customer_id = serializers.CharField(allow_null=True)
    remote_id = serializers.CharField(allow_null=True)
    row = serializers.IntegerField(allow_null=True, help_text="The row of an imported file.")
    outcome = serializers.CharField(help_text="refused, uncertain, … or what was found, such as orphan.")
    field = serializers.CharField(allow_null=True)
    message = serializers.CharField()


class RecordsShown(serializers.Serializer[Any]):
    data = RecordShown(many=True)  # type: ignore[assignment] # as above
    need_attention = serializers.IntegerField(help_text="How many records of the run need somebody.")
    complete = serializers.BooleanField(help_text=f"False where there are more: a run keeps the first {PROBLEMS_KEPT}.")


EXAMPLE = {
    "id": "k3v9x1m2q8w7e6r5",
    "kind": "push",
    "state": "partly_succeeded",
    "connection": {"id": "con_01JD8B7V3N5R0Q2W4E6T8Y1A3T", "name": "Books", "provider": "links"},
    "actor": {"kind": "api_key", "name": "shop"},
    "request_id": "req_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
    "planned": 3,
    "open": 0,
    "totals": {
        "created": 1,
        "updated": 0,
        "unchanged": 1,
        "refused": 1,
        "retrying": 0,
        "uncertain": 0,
        "skipped": 0,
    },
    "error": None,
    "created_at": "2026-01-31T08:00:00Z",
    "started_at": None,
    "finished_at": "2026-01-31T08:00:01Z",
}
RUN_ID = OpenApiParameter("run_id", str, OpenApiParameter.PATH)


class Runs(Resource):
    scopes: ClassVar[Mapping[str, str]] = {
        "list": "connections:read",
        "retrieve": "connections:read",
        "records": "connections:read",
    }

    def runs(self) -> QuerySet[SyncRun]:
        # An API batch that still waits is a megabyte of `request`.
        bulky = ("request", "problems", "connection__credentials", "connection__checkpoint", "connection__options")
        return SyncRun.objects.filter(organization=self.organization).select_related("connection").defer(*bulky)

    @extend_schema(
        operation_id="listRuns",
        summary="What was pushed, pulled, imported and taken in",
        description="Newest first.",
        parameters=[Filters],
        responses=RunsShown,
        examples=[OpenApiExample("one", value={"data": [EXAMPLE], "next_cursor": None}, response_only=True)],
    )
    def list(self, request: Request) -> Response:
        query = self.read_query(Filters)
        rows = self.runs().order_by("-pk")
        if query.get("cursor"):
            rows = rows.filter(pk__lt=cursors.read_key(query["cursor"], of=LIST, organization_id=self.organization.pk))
        if "connection_id" in query:
            rows = rows.filter(connection=find_connection(self.organization, query["connection_id"]))
        rows = rows.filter(**{name: query[name] for name in ("kind", "state") if name in query})
        found = list(rows[: query["limit"] + 1])
        more, found = len(found) > query["limit"], found[: query["limit"]]
        following = cursors.write_key(found[-1].pk, of=LIST, organization_id=self.organization.pk) if more else None
        return Response({"data": [_shown(run) for run in found], "next_cursor": following})

    @extend_schema(
        operation_id="getRun",
        summary="One run",
        parameters=[RUN_ID],
        responses=OneRunShown,
        examples=[OpenApiExample("run", value={"data": EXAMPLE}, response_only=True)],
    )
    def retrieve(self, request: Request, run_id: str) -> Response:
        self.read_query(Nothing)
        return Response({"data": _shown(self._find(self.runs(), run_id))})

    @extend_schema(
        operation_id="listRunRecords",
        summary="The records of a run that need somebody",
        description=f"The first {PROBLEMS_KEPT} are kept. Of records that went well a run keeps only the number.",
        parameters=[RUN_ID],
        responses=RecordsShown,
        examples=[
            OpenApiExample(
                "one",
                value={
                    "data": [
                        {
                            "customer_id": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                            "remote_id": None,
                            "row": None,
                            "outcome": "refused",
                            "field": "email",
                            "message": "Links needs an e-mail address.",
                        }
                    ],
                    "need_attention": 1,
                    "complete": True,
                },
                response_only=True,
            )
        ],
    )
    def records(self, request: Request, run_id: str) -> Response:
        self.read_query(Nothing)
        run = self._find(SyncRun.objects.filter(organization=self.organization).defer("request"), run_id)
        need_attention = run.refused + run.uncertain
        records = [_record(problem) for problem in run.problems]
        # One record may have several problems, so that fewer records than problems need somebody.
        complete = len(run.problems) < PROBLEMS_KEPT and len(run.problems) >= need_attention
        return Response({"data": records, "need_attention": need_attention, "complete": complete})

    def _find(self, runs: QuerySet[SyncRun], run_id: str) -> SyncRun:
        run = runs.filter(public_id=run_id).first()
        if run is None:
            raise Refusal("not_found", "There is no such run.")
        return run


def _shown(run: SyncRun) -> dict[str, Any]:
    # A pull learns how many there are as it goes.
    planned = max(run.planned, run.total)
    return {
        "id": run.public_id,
        "kind": run.kind,
        "state": run.state,
        "connection": named(run.connection) if run.connection else None,
        "actor": {"kind": run.actor_kind, "name": run.actor_name},
        "request_id": run.request_id or None,
        "planned": planned,
        "open": planned - run.total,
        "totals": {name: getattr(run, name) for name in SyncRun.TOTALS},
        "error": run.error or None,
        "created_at": timestamp(run.created_at),
        "started_at": timestamp(run.started_at),
        "finished_at": timestamp(run.finished_at),
    }


def _record(problem: Mapping[str, Any]) -> dict[str, Any]:
    uid = parse_public_id("cust", str(problem.get("customer") or ""))
    return {
        "customer_id": public_id("cust", uid) if uid else None,
        "remote_id": problem.get("remote_id") or None,
        "row": problem.get("row"),
        "outcome": problem.get("state", ""),
        "field": problem.get("field") or None,
        "message": problem.get("reason", ""),
    }


urls = (
    re_path(r"^api/v1/unified/runs/?$", Runs.as_view({"get": "list"})),
    re_path(r"^api/v1/unified/runs/(?P<run_id>[^/]+)/?$", Runs.as_view({"get": "retrieve"})),
    re_path(r"^api/v1/unified/runs/(?P<run_id>[^/]+)/records/?$", Runs.as_view({"get": "records"})),
)
