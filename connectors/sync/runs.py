"""Keeping the totals of a run: they only grow, and when they reach what was planned the run has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from django.db import models
from django.db.models import Count, F, QuerySet

from connectors.models import Connection, CustomerLink, SyncRun
from customers.editing import Actor
from customers.models import Organization
from customers.prepared import Among, Prepared

# Each list of problems on a run is cut here: totals count all of them.
PROBLEMS_KEPT = 100


def start(
    *,
    organization: Organization,
    connection: Connection | None,
    kind: str,
    actor: Actor,
    at: datetime,
    planned: int = 0,
    state: str = SyncRun.State.RUNNING,
    request: Mapping[str, Any] | None = None,
) -> SyncRun:
    said = {"message": actor.message} if actor.message else {}
    return SyncRun.objects.create(
        public_id=SyncRun.new_public_id(),
        organization=organization,
        connection=connection,
        kind=kind,
        state=state,
        actor_kind=actor.kind,
        actor_id=actor.id,
        actor_name=actor.name,
        request_id=actor.request_id,
        planned=planned,
        request={**(request or {}), **said},
        started_at=at if state == SyncRun.State.RUNNING else None,
    )


def add(*, run_id: int, totals: Mapping[str, int], problems: Sequence[Mapping[str, Any]] = (), at: datetime) -> None:
    """Add outcomes to a run. Counting is done by the database: several workers may add at once."""
    changes: dict[str, Any] = {name: F(name) + count for name, count in totals.items() if count}
    if changes:
        SyncRun.objects.filter(pk=run_id).update(updated_at=at, **changes)
    if problems:
        run = SyncRun.objects.select_for_update().get(pk=run_id)
        # By the rows of a file, where they have one: of several processes one may be ahead of another.
        run.problems = sorted([*run.problems, *problems], key=lambda one: one.get("row") or 0)[:PROBLEMS_KEPT]
        run.save(update_fields=["problems"])


def verdict(run: SyncRun, *, error: str = "") -> str:
    """The state that a run with these totals ends in."""
    if error:
        return SyncRun.State.FAILED
    trouble = run.refused + run.retrying + run.uncertain
    if not trouble:
        return SyncRun.State.SUCCEEDED
    return SyncRun.State.FAILED if trouble == run.total else SyncRun.State.PARTLY


def finish(*, run: SyncRun, at: datetime, error: str = "") -> SyncRun:
    """End a run with what its totals say; what was planned and has no outcome counts as skipped. One that was
    cancelled stays so.
    """
    run.refresh_from_db()
    run.planned = max(run.planned, run.total)
    run.skipped += run.planned - run.total
    if run.state != SyncRun.State.CANCELLED:
        run.state = verdict(run, error=error)
        run.error = error[:500]
    run.finished_at = at
    run.save(update_fields=["planned", "skipped", "state", "error", "finished_at", "updated_at"])
    return run


def release(*, links: QuerySet[CustomerLink], at: datetime) -> None:
    """Take these links from the runs that wait for them, as skipped: another run or a delete has come first."""
    waiting = links.exclude(run=None).order_by().values_list("run").annotate(number=Count("pk"))
    numbers = {run_id: number for run_id, number in waiting if run_id is not None}
    if not numbers:
        return
    links.exclude(run=None).update(run=None)
    for run_id, number in sorted(numbers.items()):
        add(run_id=run_id, totals={"skipped": number}, at=at)
    close_done(run_ids=set(numbers), at=at)


def close_done(*, run_ids: set[int], at: datetime) -> None:
    """End those of these runs whose totals have reached what was planned."""
    for run in _UNFINISHED(ids=run_ids):
        if run.total >= run.planned:
            finish(run=run, at=at)


_UNFINISHED = Prepared(
    lambda: SyncRun.objects.filter(
        Among("id", "ids", models.BigAutoField()), finished_at=None, kind=SyncRun.Kind.PUSH
    ).order_by("pk")
)
