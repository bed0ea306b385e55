"""Reading a system's customers into the hub, page by page, each page and its checkpoint in one transaction."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from connectors.exceptions import ConnectionUnusable, ConnectorError, Rejected
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider, Record
from connectors.states import LinkState
from connectors.sync import runs
from connectors.sync.merge import same
from connectors.sync.receive import UNCHANGED, UPDATED, receive
from customers import editing
from customers.editing import Actor
from customers.models import CustomerChange

# Rows committed late or with equal times would be missed without it; reading them twice is harmless.
OVERLAP = timedelta(minutes=5)
LEASE = timedelta(minutes=5)
PAGE_ROWS = 100


class AlreadyRunning(Exception):
    """Another pull of this connection is under way."""


def pull(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    actor: Actor | None = None,
    since: datetime | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    clock: Callable[[], datetime] = timezone.now,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Mapping[str, int]], None] = lambda totals: None,
) -> SyncRun:
    """Read what is new there and merge it; a known record keeps what was edited here. Returns the ended run.

    Goes on where an interrupted pull stopped. With `since`, reads what changed from then on and leaves the checkpoint
    alone, as does a `dry_run`, which writes nothing but its run. Raises AlreadyRunning, or ConnectorError when the list
    cannot be read; what was read before stays.
    """
    started = clock()
    token = _lease(connection, started)
    # Whoever holds the lease knows that earlier pulls which never ended are dead.
    for dead in SyncRun.objects.filter(connection=connection, kind=SyncRun.Kind.PULL, finished_at=None):
        runs.finish(run=dead, at=started, error="The process that ran it ended.")
    author = Actor(kind=CustomerChange.Actor.CONNECTION, id=str(connection.pk), name=connection.name)
    run = runs.start(
        organization=connection.organization,
        connection=connection,
        kind=SyncRun.Kind.PULL,
        actor=actor or author,
        at=started,
        request={"since": since.isoformat() if since else None, "limit": limit, "dry_run": dry_run},
    )
    keeps_place = since is None and limit is None and not dry_run
    checkpoint: dict[str, Any] = dict(connection.checkpoint) if keeps_place else {}
    incremental = provider.capabilities(connection).incremental
    since = since or (_time(checkpoint.get("since")) if incremental else None)
    cursor: str | None = checkpoint.get("cursor")
    kept_cursor = cursor
    began = _time(checkpoint.get("began")) or started
    totals: Counter[str] = Counter()
    error = ""
    try:
        while True:
            rows = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit - totals.total())
            fetched = clock()
            try:
                page = provider.page(session, connection, cursor=cursor, since=since, limit=rows)
            except Rejected:
                if cursor is None or cursor != kept_cursor:
                    raise
                # The system has forgotten the place where an earlier pull stopped: begin again.
                cursor = kept_cursor = None
                continue
            records = list(page.records)[:rows] if limit is not None else list(page.records)
            with transaction.atomic():
                outcomes, problems = _take_page(
                    connection, provider, records, author, fetched, clock(), dry_run=dry_run
                )
                runs.add(run_id=run.pk, totals=outcomes, problems=problems, at=clock())
                if keeps_place:
                    checkpoint = {"cursor": page.next, "began": began.isoformat(), "since": checkpoint.get("since")}
                    if page.next is None:
                        checkpoint = {"since": (began - OVERLAP).isoformat()}
                    connection.checkpoint = checkpoint
                    Connection.objects.filter(pk=connection.pk).update(checkpoint=checkpoint)
                _renew(connection, token, clock())
            totals.update(outcomes)
            progress(totals)
            cursor = page.next
            if cursor is None or (limit is not None and totals.total() >= limit) or stop():
                break
    except ConnectionUnusable as unusable:
        error = unusable.message
        Connection.objects.filter(pk=connection.pk).update(
            state=Connection.State.NEEDS_REAUTH, state_reason=error[:500]
        )
        raise
    except ConnectorError as failure:
        error = failure.message
        raise
    except Exception as failure:
        error = f"The hub failed: {type(failure).__name__}."
        raise
    finally:
        runs.finish(run=run, at=clock(), error=error)
        _release(connection, token, clock())
    return run


def _time(text: str | None) -> datetime | None:
    return parse_datetime(text) if text else None


def _lease(connection: Connection, now: datetime) -> str:
    token = secrets.token_hex(16)
    taken = Connection.objects.filter(Q(pull_until=None) | Q(pull_until__lte=now), pk=connection.pk).update(
        pull_token=token, pull_until=now + LEASE
    )
    if not taken:
        raise AlreadyRunning(f"A pull of {connection.name} is already running.")
    connection.refresh_from_db(fields=["checkpoint"])
    return token


def _renew(connection: Connection, token: str, now: datetime) -> None:
    held = Connection.objects.filter(pk=connection.pk, pull_token=token).update(pull_until=now + LEASE)
    if not held:
        raise AlreadyRunning(f"Another pull of {connection.name} took over.")


def _release(connection: Connection, token: str, now: datetime) -> None:
    due = now + timedelta(seconds=connection.pull_interval) if connection.pull_interval else None
    Connection.objects.filter(pk=connection.pk, pull_token=token).update(
        pull_token="", pull_until=None, next_pull_at=due
    )


def _without_our_own(
    connection: Connection, records: list[Record], outcomes: Counter[str], at: datetime
) -> list[Record]:
    """The records, less those that may be creates of ours whose answer is still out or was lost.

    Such a record is taken for its link when it carries the link's marker, or when it alone says what was sent;
    otherwise it is left for the next pull, because a second golden record could not be taken back.
    """
    rows = CustomerLink.objects.filter(connection=connection, remote_id__in=[record.remote_id for record in records])
    linked = set(rows.values_list("remote_id", flat=True))
    unknown = [record for record in records if record.remote_id not in linked]
    if not unknown:
        return records
    waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    intents = list(
        PushIntent.objects.filter(
            link__connection=connection, link__remote_id=None, kind=PushIntent.Kind.CREATE, outcome__in=waiting
        ).select_related("link")
    )
    if not intents:
        return records
    left_out = set()
    for record in unknown:
        # A marker is the link's uid, in whichever form and place the format has room for.
        text = " ".join(value for value in record.document.values() if isinstance(value, str))
        marked = [i for i in intents if str(i.link.uid) in text or i.link.uid.hex in text]
        alike = marked or [i for i in intents if _says(record, i.sent_values)]
        twins = [other for other in unknown if alike and _says(other, alike[0].sent_values)]
        if len(alike) == 1 and (marked or len(twins) == 1):
            link, intent = alike[0].link, alike[0]
            CustomerLink.objects.filter(pk=link.pk, remote_id=None).update(
                remote_id=record.remote_id,
                base_local=intent.sent_values,
                pushed_version=intent.version,
                state=LinkState.OPEN,
                error="",
                next_attempt_at=at,
                updated_at=at,
            )
            PushIntent.objects.filter(pk=intent.pk).update(outcome=PushIntent.Outcome.OK, answered_at=at)
            intents.remove(intent)
        elif alike:
            left_out.add(record.remote_id)
            outcomes["skipped"] += 1
    return [record for record in records if record.remote_id not in left_out]


def _says(record: Record, sent: Mapping[str, Any]) -> bool:
    """Whether a record says what was sent, in the fields that both name."""
    both = record.values.keys() & sent.keys()
    return bool(both) and all(same(record.values[name], sent[name]) for name in both)


def _take_page(
    connection: Connection,
    provider: Provider,
    page: list[Record | Rejected],
    actor: Actor,
    fetched: datetime,
    at: datetime,
    *,
    dry_run: bool,
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Receive one page. A record that cannot be taken is counted and named; its neighbours are."""
    outcomes: Counter[str] = Counter()
    problems: list[dict[str, str]] = []
    records = []
    for record in page:
        if isinstance(record, Rejected):
            outcomes["refused"] += 1
            problems.append({"remote_id": "", "field": record.field, "reason": record.message})
        elif not 0 < len(record.remote_id or "") <= REMOTE_ID_LENGTH:
            outcomes["refused"] += 1
            problems.append({"remote_id": "", "field": "", "reason": "The record has no id that can be kept."})
        else:
            records.append(record)
    if not dry_run:
        records = _without_our_own(connection, records, outcomes, at)
    known = dict(
        CustomerLink.objects.filter(
            connection=connection, remote_id__in=[record.remote_id for record in records]
        ).values_list("remote_id", "pk")
    )
    gone = [record for record in records if record.deleted]
    alive = [record for record in records if not record.deleted]
    outcomes["skipped"] += sum(record.remote_id not in known for record in gone)
    deleted = [known[record.remote_id] for record in gone if record.remote_id in known]
    if dry_run:
        outcomes["updated"] += sum(record.remote_id in known for record in alive) + len(deleted)
        outcomes["created"] += sum(record.remote_id not in known for record in alive)
        return outcomes, problems
    good = []
    for record in alive:
        if wrong := editing.problems(record.values, creating=record.remote_id not in known):
            outcomes["refused"] += 1
            for name, messages in wrong.items():
                problems.append({"remote_id": record.remote_id or "", "field": name, "reason": " ".join(messages)})
        else:
            good.append(record)
    received = receive(
        organization=connection.organization,
        connection=connection,
        records=good,
        actor=actor,
        fields=provider.fields,
        fetched=fetched,
        at=at,
    )
    outcomes.update(result.outcome for result in received)
    # After the customers are locked, as everywhere: links come second.
    if deleted:
        runs.release(links=CustomerLink.objects.filter(pk__in=deleted), at=at)
        moved = CustomerLink.objects.filter(pk__in=deleted, deleted_at=None).update(
            deleted_at=at, state=LinkState.REMOTE_DELETED, next_attempt_at=None, updated_at=at
        )
        outcomes[UPDATED] += moved
        outcomes[UNCHANGED] += len(deleted) - moved
    for result in received:
        for name, (base, ours, theirs) in (result.merge.conflicts if result.merge else {}).items():
            problems.append(
                {
                    "remote_id": (result.link.remote_id if result.link else None) or "",
                    "customer": str(result.customer.pk),
                    "field": name,
                    "reason": f"Changed on both sides. Before: {base!r}; here: {ours!r}; there: {theirs!r}.",
                }
            )
    return outcomes, problems
