"""Ending a run before its time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from uuid import UUID

from django.db import connection as database
from django.db import transaction
from django.db.models import Exists, Min, OuterRef, Q
from django.utils.dateparse import parse_datetime

from connectors.models import CustomerLink, ImportFile, PushIntent, SyncRun
from connectors.sync import runs
from connectors.sync.clock import database_clock
from customers.editing import Actor

# So many ids are named in one statement: SQLite takes a limited number.
ROWS = 10_000
WAITS = (SyncRun.State.QUEUED, SyncRun.State.RUNNING)


class NotCancellable(Exception):
    """The run cannot be cancelled. The text says why."""


def cancellable(run: SyncRun) -> bool:
    return run.state in WAITS and run.kind in (SyncRun.Kind.PUSH, SyncRun.Kind.IMPORT)


@transaction.atomic
def cancel(*, run: SyncRun, actor: Actor, at: datetime | None = None) -> SyncRun:
    """Stop a push or an import. What it has done stays done. Raises NotCancellable.

    Of a push: customers that were never sent to the system, and that this run linked or took over from an earlier one
    that did, are not linked any more. Changes of customers that the system knows go out all the same, as every change
    does, but are no longer this run's. What is being sent right now is followed to its outcome. Of an import: the rows
    that are left are not taken in.
    """
    at = at or database_clock()
    run = SyncRun.objects.select_for_update().get(pk=run.pk)
    if run.state not in WAITS:
        raise NotCancellable(f"{run} has ended.")
    if not cancellable(run):
        raise NotCancellable(f"A {run.get_kind_display().lower()} cannot be cancelled: pause the connection instead.")
    run.state, run.error = SyncRun.State.CANCELLED, f"Cancelled by {actor.name}."[:500]
    run.save(update_fields=["state", "error", "updated_at"])
    if run.kind == SyncRun.Kind.IMPORT:
        ImportFile.objects.filter(run=run).delete()
        return runs.finish(run=run, at=at)
    # Whoever is sending one of them has it locked or leased: those are left alone.
    free = (
        CustomerLink.objects.filter(Q(lease_until=None) | Q(lease_until__lte=at), run=run)
        .order_by("pk")
        .select_for_update(skip_locked=database.features.has_select_for_update_skip_locked)
    )
    ids = list(free.values_list("pk", flat=True))
    linked_at = parse_datetime(run.request.get("linked_at", ""))
    for start in range(0, len(ids), ROWS):
        _take_back(ids[start : start + ROWS], linked_at=linked_at, at=at)
    run.refresh_from_db()
    if run.finished_at is None and run.total >= run.planned:
        runs.finish(run=run, at=at)
    return run


def _take_back(ids: Sequence[int], *, linked_at: datetime | None, at: datetime) -> None:
    """Take these links from their run; those that were made since `linked_at` and never sent are not links any more."""
    never = CustomerLink.objects.none()
    if linked_at is not None:
        never = CustomerLink.objects.filter(
            ~Exists(PushIntent.objects.filter(link=OuterRef("pk"))),
            pk__in=ids,
            remote_id=None,
            lease_token="",
            pushed_version=0,
            former_remote_id="",
            created_at__gte=linked_at,
        )
    unlinked = list(never.values_list("pk", "customer", "is_primary"))
    runs.release(links=CustomerLink.objects.filter(pk__in=ids), at=at)
    CustomerLink.objects.filter(pk__in=[pk for pk, _, _ in unlinked]).delete()
    _lead_anew([customer for _, customer, led in unlinked if led])


def _lead_anew(customer_ids: Collection[UUID]) -> None:
    """Have the oldest link of these customers lead, now that the one that led is gone."""
    rows = (
        CustomerLink.objects.filter(customer__in=customer_ids).order_by().values("customer").annotate(first=Min("pk"))
    )
    CustomerLink.objects.filter(pk__in=[row["first"] for row in rows]).update(is_primary=True)
