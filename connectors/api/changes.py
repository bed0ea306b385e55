"""Every new version of every customer, in an order that can be resumed: for those who keep a copy of their own.

On PostgreSQL ids are taken before the commit, so a row may appear behind one that has been shown. The feed is therefore
ordered by transaction and shows what all running transactions, of the whole cluster, began after: a long one delays
the feed, and nothing is ever passed over. SQLite lets one transaction write at a time: ids are the order of commits.

A cursor names the last row shown, and the cluster that numbered its transaction. A database that was restored has lost
rows or numbers anew: a cursor from before is told apart by either, and whoever holds it starts over.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

from django.db import connection as database
from django.db import models
from django.db.models.expressions import RawSQL
from django.urls import re_path
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import cursors
from connectors.api.problems import Refusal
from connectors.api.resource import Resource, Strict
from connectors.api.runs import AuthorShown
from connectors.providers.links import WIRE, Shown, one, timestamp, with_leading
from customers import editing
from customers.ids import parse_public_id, public_id
from customers.models import Customer, CustomerChange, Organization

LIST = "changes"
TYPES = ("created", "updated", "archived", "restored", "merged", "unmerged")
# Of the cursor: its form, transaction and id of the last row, the cluster, and which change that row is.
_PLACE = struct.Struct(">BQQ4s4s")
FORM = 1


class ChangesQuery(Strict):
    cursor = serializers.CharField(
        required=False,
        allow_blank=True,
        help_text="The next_cursor of the answer before; left out: from the beginning.",
    )
    limit = serializers.IntegerField(default=100, min_value=1, max_value=1000)
    expand = serializers.ChoiceField(choices=["customer"], required=False, help_text="Each customer as it is now.")


class ChangeShown(serializers.Serializer[Any]):
    id = serializers.CharField(help_text="Of this version of this customer, for ever.")
    customer_id = serializers.CharField()
    version = serializers.IntegerField()
    type = serializers.ChoiceField(choices=TYPES)
    fields = serializers.ListField(  # type: ignore[assignment] # hides Serializer.fields, which the metaclass keeps
        child=serializers.CharField(), help_text="The names of what changed."
    )
    merged_into = serializers.CharField(allow_null=True, help_text="Of a merge: the customer that it is part of now.")
    message = serializers.CharField(allow_null=True, help_text="Why, in the author's words.")
    at = serializers.DateTimeField()
    actor = AuthorShown()
    request_id = serializers.CharField(allow_null=True, help_text="The request that made it.")
    customer = Shown(
        required=False,
        allow_null=True,
        help_text="With `expand=customer`: the customer as it is now; null while it is part of another.",
    )


class ChangesShown(serializers.Serializer[Any]):
    data = ChangeShown(many=True)  # type: ignore[assignment] # hides Serializer.data, which is not used to describe
    next_cursor = serializers.CharField(help_text="There is always one: poll on with it, also at the end.")
    has_more = serializers.BooleanField(help_text="False: what comes next has not happened yet.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """After this row; at the beginning of all where `id` is 0."""

    tx: int = 0
    id: int = 0
    cluster: bytes
    change: bytes = bytes(4)

    @classmethod
    def of(cls, change: CustomerChange, *, cluster: bytes) -> Place:
        return cls(tx=change.tx, id=change.pk, cluster=cluster, change=_mark(change))

    def write(self, organization: Organization) -> str:
        raw = _PLACE.pack(FORM, self.tx, self.id, self.cluster, self.change)
        return cursors.write(raw, of=LIST, organization_id=organization.pk)

    @classmethod
    def read(cls, cursor: str, organization: Organization) -> Place:
        """Raises ValidationError."""
        raw = cursors.read(cursor, of=LIST, organization_id=organization.pk)
        _, tx, id_, cluster, change = _PLACE.unpack(raw)
        return cls(tx=tx, id=id_, cluster=cluster, change=change)


def _mark(change: CustomerChange) -> bytes:
    """Tells this row from another one that got its id after a backup was restored."""
    return hashlib.sha256(b"%s/%d" % (change.customer_id.bytes, change.version)).digest()[:4]


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How far the rows of an organization are complete: up to below `tx`; None: all. `cluster` numbered them."""

    tx: int | None
    cluster: bytes


def horizon(organization: Organization) -> Horizon:
    """What may be shown now. Rows that were numbered by another cluster are put in order first."""
    if database.vendor != "postgresql":
        return Horizon(tx=None, cluster=bytes(4))
    with database.cursor() as cursor:
        # Nobody else sees rows of the own transaction's number yet, and they are not of another cluster either.
        cursor.execute(
            "SELECT pg_snapshot_xmin(now)::text::bigint,"
            " greatest(pg_snapshot_xmax(now)::text::bigint, pg_current_xact_id_if_assigned()::text::bigint + 1),"
            " (SELECT system_identifier FROM pg_control_system()),"
            " (SELECT tx FROM customers_customerchange WHERE organization_id = %s ORDER BY tx DESC LIMIT 1)"
            " FROM pg_current_snapshot() AS now",
            [organization.pk],
        )
        complete, beyond, system, newest = cursor.fetchone()
    if newest is not None and newest >= beyond:
        editing.renumber(organization=organization, beyond=beyond)
    return Horizon(tx=complete, cluster=hashlib.sha256(str(system).encode()).digest()[:4])


def page(organization: Organization, place: Place, *, limit: int, until: Horizon) -> list[CustomerChange]:
    """Up to so many rows after this place, oldest first. Raises Refusal where the place is not there any more."""
    gone = Refusal("cursor_expired", "The hub's database was restored since this cursor was given out.")
    rows = CustomerChange.objects.filter(organization=organization).order_by("tx", "id")
    if until.tx is not None:
        rows = rows.filter(tx__lt=until.tx)
    if not place.id:
        return list(rows[:limit])
    if place.cluster != until.cluster:
        raise gone
    table = CustomerChange._meta.db_table
    here = RawSQL(f"({table}.tx, {table}.id) >= (%s, %s)", (place.tx, place.id), output_field=models.BooleanField())
    found = list(rows.filter(here)[: limit + 1])
    if not found or Place.of(found[0], cluster=until.cluster) != place:
        raise gone
    return found[1:]


class Changes(Resource):
    scopes: ClassVar[Mapping[str, str]] = {"list": "customers:read"}

    @extend_schema(
        operation_id="listChanges",
        summary="What has changed since",
        description="One entry for each version of each customer, in an order in which each version comes after the "
        "one before. Read on with `next_cursor` at once while `has_more`, and otherwise whenever you like: no change "
        "is left out and none comes twice. To keep a copy, read with `expand=customer` and for every entry put "
        "`customer` in the place of what you have under `customer_id`, or take it out where `customer` is null. What a "
        "source knows of a customer is not a change of the customer.",
        parameters=[ChangesQuery],
        responses={
            200: ChangesShown,
            410: OpenApiResponse(description="Start over: read from the beginning, into an empty copy."),
        },
        examples=[
            OpenApiExample(
                "a merge",
                value={
                    "data": [
                        {
                            "id": "evt_01JD8B7V3N5R0Q2W4E6T8Y1A3S_2",
                            "customer_id": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                            "version": 2,
                            "type": "merged",
                            "fields": ["merged_into"],
                            "merged_into": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3T",
                            "message": None,
                            "at": "2026-01-31T08:00:00Z",
                            "actor": {"kind": "user", "name": "Jo"},
                            "request_id": None,
                        }
                    ],
                    "next_cursor": "AQAAAAAAAAA",
                    "has_more": False,
                },
                response_only=True,
            )
        ],
    )
    def list(self, request: Request) -> Response:
        query = self.read_query(ChangesQuery)
        until = horizon(self.organization)
        place = Place(cluster=until.cluster)
        if query.get("cursor"):
            place = Place.read(query["cursor"], self.organization)
        limit = query["limit"]
        found = page(self.organization, place, limit=limit + 1, until=until)
        more, found = len(found) > limit, found[:limit]
        if found:
            place = Place.of(found[-1], cluster=until.cluster)
        data = [shown(change) for change in found]
        if query.get("expand"):
            customers = self._customers({change.customer_id for change in found})
            data = [
                {**entry, "customer": customers[change.customer_id]} for entry, change in zip(data, found, strict=True)
            ]
        return Response({"data": data, "next_cursor": place.write(self.organization), "has_more": more})

    def _customers(self, ids: Iterable[UUID]) -> dict[UUID, dict[str, Any] | None]:
        """The customers as Links shows them; None for one that is part of another."""
        origin = f"{self.request.scheme}://{self.request.get_host()}"
        rows = Customer.objects.filter(organization=self.organization, pk__in=[*ids])
        found: dict[UUID, dict[str, Any] | None] = {}
        for customer, link in map(one, with_leading(rows)):
            found[customer.pk] = None if customer.merged_into_id else WIRE.show(customer, link, origin=origin)
        return found


def shown(change: CustomerChange) -> dict[str, Any]:
    """One entry of the feed."""
    type_ = kind_of(change)
    uid = parse_public_id("cust", str(change.changes["merged_into"][1])) if type_ == "merged" else None
    return {
        "id": f"{public_id('evt', change.customer_id)}_{change.version}",
        "customer_id": public_id("cust", change.customer_id),
        "version": change.version,
        "type": type_,
        "fields": [*change.changes],
        "merged_into": public_id("cust", uid) if uid else None,
        "message": change.message or None,
        "at": timestamp(change.at),
        "actor": {"kind": change.actor_kind, "name": change.actor_name},
        "request_id": change.request_id or None,
    }


def kind_of(change: CustomerChange) -> str:
    """Which of TYPES this version is."""
    if change.version == 1:
        return "created"
    for name, done, undone in (("merged_into", "merged", "unmerged"), ("archived_at", "archived", "restored")):
        if name in change.changes:
            return done if change.changes[name][1] is not None else undone
    return "updated"


urls = (re_path(r"^api/v1/unified/changes/?$", Changes.as_view({"get": "list"})),)
