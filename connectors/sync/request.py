"""Wanting customers to be in a system: missing links are made, waiting ones become due, and a run follows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from uuid import UUID

from django.db import transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet

from connectors.models import Connection, CustomerLink, SyncRun
from connectors.states import WAITING, LinkState
from connectors.sync import runs
from connectors.sync.clock import database_clock
from connectors.sync.races import start_over
from customers import bulk
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer

# New links are made in pieces, so that linking a million customers holds no million objects.
LINK_ROWS = 2000


def request(
    *,
    connection: Connection,
    actor: Actor,
    customer_ids: Collection[UUID] | None = None,
    since: datetime | None = None,
    limit: int | None = None,
    urgent: bool = False,
    uids: Mapping[UUID, UUID] | None = None,
    now: datetime | None = None,
) -> SyncRun:
    """Ask for these customers (None: all of the organization that are not archived) to be in that system, now.

    Links that are missing are made. Links that are in sync are counted as unchanged at once; the others become due,
    also those that were rejected. The run ends when each has an outcome. Uncertain and conflicting links are left to
    their rules and count as uncertain; what was deleted there is not made again and counts as refused. `urgent` ones go
    before the others. `uids` are marks that new links of these customers are to have, where nobody else has them.
    """
    now = now or database_clock()
    customers = Customer.objects.filter(organization_id=connection.organization_id, archived_at=None, merged_into=None)
    if customer_ids is not None:
        customers = customers.filter(pk__in=customer_ids)
    if since is not None:
        customers = customers.filter(updated_at__gte=since)
    if limit is not None:
        customers = customers.filter(pk__in=customers.order_by("pk").values("pk")[:limit])
    _link_missing(connection, customers, now, uids or {})
    links = CustomerLink.objects.filter(
        connection=connection, customer__in=customers, is_duplicate=False, deleted_at=None
    )
    tombstones = CustomerLink.objects.filter(
        connection=connection, customer__in=customers, is_duplicate=False, deleted_at__isnull=False
    )
    waits = Q(state__in=WAITING)
    dirty = Q(pushed_version__lt=F("needed_version"))

    def ask() -> tuple[SyncRun, int]:
        # Links that an earlier run made and that none has sent are this run's from now on.
        earlier = SyncRun.objects.filter(pk__in=links.filter(dirty, run__isnull=False).exclude(waits).values("run"))
        marks = (asked_for.get("linked_at") for asked_for in earlier.values_list("request", flat=True))
        linked_at = min([now.isoformat(), *filter(None, marks)])
        run = runs.start(
            organization=connection.organization,
            connection=connection,
            kind=SyncRun.Kind.PUSH,
            actor=actor,
            at=now,
            state=SyncRun.State.QUEUED,
            # `linked_at` tells which links were made for this run: `cancel` takes back those that were never sent.
            request={"customers": "chosen" if customer_ids is not None else "all", "linked_at": linked_at},
        )
        runs.release(links=links.filter(dirty).exclude(waits), at=now)
        asked = (
            links.filter(dirty)
            .exclude(waits)
            .update(
                run=run,
                next_attempt_at=now,
                state=LinkState.OPEN,
                attempts=0,
                failing_since=None,
                crashes=0,
                urgent=urgent,
                updated_at=now,
            )
        )
        waiting = links.filter(dirty & waits).count()
        clean = links.exclude(dirty).count()
        gone = list(tombstones.values_list("customer", flat=True)[: runs.PROBLEMS_KEPT])
        run.unchanged, run.uncertain, run.refused = clean, waiting, tombstones.count() if gone else 0
        run.planned = asked + run.total
        run.problems = [
            {"customer": str(pk), "state": "refused", "field": "", "reason": f"Deleted in {connection.name}."}
            for pk in gone
        ]
        run.save(update_fields=["planned", "unchanged", "uncertain", "refused", "problems"])
        return run, asked

    run, asked = start_over(ask)
    if not asked:
        runs.finish(run=run, at=now)
    return run


def _link_missing(
    connection: Connection, customers: QuerySet[Customer], now: datetime, uids: Mapping[UUID, UUID]
) -> None:
    if uids:
        taken = set(CustomerLink.objects.filter(uid__in=uids.values()).values_list("uid", flat=True))
        uids = {pk: uid for pk, uid in uids.items() if uid not in taken}
    linked = CustomerLink.objects.filter(connection=connection, customer=OuterRef("pk"), is_duplicate=False)
    leading = CustomerLink.objects.filter(customer=OuterRef("pk"), is_primary=True)
    missing = (
        customers.filter(~Exists(linked))
        .annotate(has_leading=Exists(leading))
        .order_by("pk")
        .values_list("pk", "version", "has_leading")
    )
    while rows := list(missing[:LINK_ROWS]):
        with transaction.atomic():
            # Locked in order: two who link the same customers meet here, and the second finds the first one's links.
            list(
                Customer.objects.filter(pk__in=[row[0] for row in rows])
                .order_by("pk")
                .select_for_update()
                .values_list("pk")
            )
            rows = list(missing.filter(pk__in=[row[0] for row in rows]))
            bulk.insert(
                [
                    CustomerLink(
                        uid=uids.get(pk) or uuid7(),
                        customer_id=pk,
                        connection=connection,
                        needed_version=version,
                        is_primary=not has_leading,
                        created_at=now,
                        updated_at=now,
                    )
                    for pk, version, has_leading in rows
                ]
            )
