"""Looking through all that a system holds for our markers: creates that were lost, second records, records of nobody.

A lagging search misses a lost create now and then, and makes a second record of it. The sweep finds both. It links and
it reports; it never deletes.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Exists, OuterRef, Q, Subquery
from django.utils.dateparse import parse_datetime

from connectors.exceptions import ConnectionUnusable, ConnectorError, Rejected
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider, Record
from connectors.sync import issues, runs
from connectors.sync.claim import LEASE
from connectors.sync.clock import database_clock
from connectors.sync.plan import sending
from connectors.sync.pull import PAGE_ROWS, AlreadyRunning, Reading, read_page, says
from connectors.sync.push import lost_login
from connectors.sync.receive import TOMBSTONE_LAG
from connectors.sync.settle import duplicates, settle
from connectors.sync.steps import CREATED, REFUSED, SKIPPED, UNCERTAIN, UNCHANGED, Found, Slice, Step
from customers.editing import Actor
from customers.models import CustomerChange

EVERY, TRY_AGAIN = timedelta(days=1), timedelta(hours=1)
# A sweep that has told nothing for so long is dead.
SILENCE = timedelta(minutes=15)
# So many records of unlinked links are kept until the end, to tell which one is the oldest.
KEPT = 500
SECOND = "A second record of one customer. The linked one is kept; nothing was deleted."
ORPHAN = "It carries our marker, but no customer is linked to it."
STOPPED = "It was stopped before its end."


def unfit(*, connection: Connection, provider: Provider) -> str:
    """Why this connection cannot be swept; "" when it can."""
    if not connection.pushes:
        return f"Nothing is sent to {connection.name}, so nothing there carries our markers."
    if not provider.capabilities(connection).lists:
        return f"{connection.name} cannot be swept: {provider.label} documents no way to list customers."
    if type(provider).marker is Provider.marker:
        return f"{connection.name} cannot be swept: {provider.label}'s format has no room for our marker."
    return ""


def due_sweeps(*, providers: Mapping[str, Provider], now: datetime) -> list[Connection]:
    """Connections whose last whole sweep ended more than a day ago; one that came to nothing is due after an hour."""
    whole = SyncRun.objects.filter(
        connection=OuterRef("pk"),
        kind=SyncRun.Kind.SYNC,
        request__sweep=True,
        request__limit=None,
        request__dry_run=False,
    ).order_by("-pk")
    rows = (
        Connection.objects.filter(
            Q(not_before=None) | Q(not_before__lte=now),
            Exists(CustomerLink.objects.filter(connection=OuterRef("pk"))),
            direction__in=Connection.PUSHING,
            state=Connection.State.ACTIVE,
            provider__in=providers,
        )
        .annotate(
            last_state=Subquery(whole.values("state")[:1]),
            last_ended=Subquery(whole.values("finished_at")[:1]),
            last_told=Subquery(whole.values("updated_at")[:1]),
        )
        .select_related("organization")
        .order_by("pk")
    )
    due: list[Connection] = []
    for connection in rows:
        if connection.last_state is None:
            rested = True
        elif connection.last_ended is None:
            rested = connection.last_told + SILENCE <= now
        else:
            failed = connection.last_state in (SyncRun.State.FAILED, SyncRun.State.CANCELLED)
            rested = connection.last_ended + (TRY_AGAIN if failed else EVERY) <= now
        if rested and not unfit(connection=connection, provider=providers[connection.provider]):
            due.append(connection)
    return due


@dataclass(kw_only=True)
class _Sweep:
    """One sweep under way. `unlinked` are the records seen of links that know none yet, by link and remote id.

    `fresh` counts what is yet to be added to the run, with `problems` and `troubles` to go with it.
    """

    reading: Reading
    part: Slice
    run: SyncRun
    began: datetime
    dry_run: bool
    totals: Counter[str] = field(default_factory=Counter)
    fresh: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, str]] = field(default_factory=list)
    troubles: list[issues.Trouble] = field(default_factory=list)
    unlinked: dict[int, dict[str, Record]] = field(default_factory=dict)
    unreadable: bool = False

    @property
    def connection(self) -> Connection:
        return self.reading.connection

    @property
    def provider(self) -> Provider:
        return self.reading.provider

    @property
    def seen(self) -> int:
        return self.totals.total() + sum(map(len, self.unlinked.values()))

    def orphan(self, record: Record) -> None:
        self.troubles.append(
            issues.Trouble(
                kind=Issue.Kind.ORPHAN,
                fingerprint=record.remote_id or "",
                message=f"Record {record.remote_id} carries our marker, but no customer is linked to it.",
                details={"remote_id": record.remote_id, "marker": str(self.provider.marker(record.document))},
            )
        )
        self.needs_somebody("orphan", [record.remote_id or ""], ORPHAN)

    def needs_somebody(self, state: str, remote_ids: Sequence[str], reason: str) -> None:
        self.fresh[UNCERTAIN] += len(remote_ids)
        self.problems += [{"state": state, "remote_id": one, "field": "", "reason": reason} for one in remote_ids]

    def refuse(self, error: Rejected) -> None:
        self.unreadable = True
        self.fresh[REFUSED] += 1
        self.problems.append({"state": REFUSED, "remote_id": "", "field": error.field, "reason": error.message})

    def store(self, at: datetime) -> None:
        """Write down what was found, and show that the sweep lives."""
        runs.add(run_id=self.run.pk, totals=self.fresh, problems=self.problems, at=at)
        SyncRun.objects.filter(pk=self.run.pk).update(updated_at=at)
        if not self.dry_run:
            issues.open_issues(connection=self.connection, troubles=self.troubles, at=at)
        self.totals += self.fresh
        self.fresh, self.problems, self.troubles = Counter(), [], []


def sweep(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    actor: Actor | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    clock: Callable[[], datetime] = database_clock,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Mapping[str, int]], None] = lambda totals: None,
) -> SyncRun:
    """Read every record there, and return the ended run. Each record counts once:

    created     a create whose answer was lost had made it: it is linked, and what is newer follows as an update
    uncertain   a second record of one customer, or one that carries the marker of nobody: an issue is open for it
    refused     it cannot be read
    unchanged   linked, deleted there, or the former record of a link
    skipped     without a marker of ours, or just being sent

    A sweep that read everything closes the issues that no longer hold. A `dry_run` only counts. Memory does not grow
    with the number of records. Raises AlreadyRunning; Rejected where there is nothing to sweep by; ConnectorError when
    the list cannot be read.
    """
    if reason := unfit(connection=connection, provider=provider):
        raise Rejected(reason, code="unsupported")
    began = clock()
    rng = rng or random.Random()
    author = Actor(kind=CustomerChange.Actor.CONNECTION, id=str(connection.pk), name=connection.name)
    run = _start(connection, actor or author, began, limit, dry_run)
    this = _Sweep(
        reading=reader(
            connection=connection, provider=provider, session=session, clock=clock, sleep=sleep, rng=rng, stop=stop
        ),
        part=Slice(connection=connection, provider=provider, clock=clock, rng=rng, own=run),
        run=run,
        began=began,
        dry_run=dry_run,
    )
    error, complete = "", False
    cursor: str | None = None
    try:
        while True:
            rows = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit - this.seen)
            page = read_page(this.reading, cursor=cursor, since=None, rows=rows)
            if page is None:
                break
            records = page.records if limit is None else page.records[:rows]
            with transaction.atomic():
                _look(this, records, clock())
                this.store(clock())
            if len(this.unlinked) >= KEPT:
                _link(this, clock())
            progress(this.totals)
            cursor = page.next
            complete = cursor is None and len(records) == len(page.records)
            if cursor is None or stop() or (limit is not None and this.seen >= limit):
                break
        _link(this, clock())
        progress(this.totals)
        if complete and not dry_run and not this.unreadable:
            _close(connection, began, clock())
    except ConnectionUnusable as unusable:
        error = unusable.message
        lost_login(connection=connection, error=unusable, at=clock())
        raise
    except ConnectorError as failure:
        error = failure.message
        raise
    except BaseException as failure:
        error = f"The hub failed: {type(failure).__name__}."
        raise
    finally:
        runs.finish(run=run, at=clock(), error=error)
    if not complete and stop():
        run.state, run.error = SyncRun.State.CANCELLED, STOPPED
        run.save(update_fields=["state", "error"])
    return run


def reader(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    clock: Callable[[], datetime] = database_clock,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Reading:
    """What `pull.read_page` needs to read a page within the limits that all workers share."""
    return Reading(
        connection=connection,
        provider=provider,
        session=session,
        author=Actor(kind=CustomerChange.Actor.CONNECTION, id=str(connection.pk), name=connection.name),
        clock=clock,
        sleep=sleep,
        rng=rng or random.Random(),
        stop=stop,
        dry_run=True,
    )


def link_found(part: Slice, found: Sequence[tuple[CustomerLink, PushIntent, Sequence[Record]]]) -> None:
    """Link each to the first of its records, as a look-up that had found them would; further ones are duplicates.

    The caller has locked the links, in order, and knows that nobody holds them.
    """
    if not found:
        return
    token = secrets.token_hex(16)
    links = CustomerLink.objects.filter(pk__in=[link.pk for link, _, _ in found])
    links.update(lease_token=token, lease_until=part.clock() + LEASE)
    answered = []
    for link, intent, records in found:
        intent.error = ""
        answered.append(sending(link, Step.LOOK_UP, intent, answer=Found(records=list(records))))
    settle(part, token=token, answered=answered)
    # What is still held was to be read once more. The next pull does that.
    links.filter(lease_token=token).update(lease_token="", lease_until=None)


def _start(connection: Connection, actor: Actor, at: datetime, limit: int | None, dry_run: bool) -> SyncRun:
    with transaction.atomic():
        # Two who begin at once meet here.
        Connection.objects.select_for_update().get(pk=connection.pk)
        unfinished = SyncRun.objects.filter(
            connection=connection, kind=SyncRun.Kind.SYNC, request__sweep=True, finished_at=None
        )
        if unfinished.filter(updated_at__gt=at - SILENCE).exists():
            raise AlreadyRunning(f"A sweep of {connection.name} is already running.")
        for dead in unfinished:
            runs.finish(run=dead, at=at, error="The process that ran it ended.")
        run = runs.start(
            organization=connection.organization,
            connection=connection,
            kind=SyncRun.Kind.SYNC,
            actor=actor,
            at=at,
            request={"sweep": True, "limit": limit, "dry_run": dry_run},
        )
        SyncRun.objects.filter(pk=run.pk).update(updated_at=at)
    return run


def _look(this: _Sweep, page: Sequence[Record | Rejected], at: datetime) -> None:
    """Judge one page, in a constant number of statements."""
    records: list[Record] = []
    for record in page:
        if isinstance(record, Rejected):
            this.refuse(record)
        elif not 0 < len(record.remote_id or "") <= REMOTE_ID_LENGTH:
            this.refuse(Rejected("The record has no id that can be kept."))
        else:
            records.append(record)
    ids = [record.remote_id or "" for record in records]
    markers = [this.provider.marker(record.document) for record in records]
    links = CustomerLink.objects.filter(connection=this.connection).defer("remote_data", "base_local", "base_remote")
    by_uid = {link.uid: link for link in links.filter(uid__in=[uid for uid in markers if uid is not None])}
    owners = {link.remote_id: link for link in links.filter(remote_id__in=ids)}
    former = set(
        links.filter(~Q(former_remote_id=""), former_remote_id__in=ids).values_list("former_remote_id", flat=True)
    )
    seconds: dict[int, list[str]] = {}
    for record, remote_id, marker in zip(records, ids, markers, strict=True):
        link = by_uid.get(marker) if marker is not None else None
        owner = owners.get(remote_id)
        outcome = UNCHANGED
        if record.deleted:
            pass
        elif marker is None:
            outcome = UNCHANGED if owner else SKIPPED
        elif link is None:
            if owner is not None or remote_id in former:
                pass
            elif marker.version != 7:
                outcome = SKIPPED  # a key of somebody else's: ours are all of version 7
            else:
                this.orphan(record)
                continue
        elif link.remote_id == remote_id or link.deleted_at is not None or _is_former(link, remote_id, at):
            pass
        elif owner is not None and owner.is_duplicate and owner.customer_id == link.customer_id:
            pass  # known since the customers were merged
        elif link.remote_id is None:
            this.unlinked.setdefault(link.pk, {})[remote_id] = record
            continue
        else:
            seconds.setdefault(link.pk, []).append(remote_id)
            continue
        this.fresh[outcome] += 1
    _report(this, [(link, seconds[link.pk]) for link in by_uid.values() if link.pk in seconds])


def _report(this: _Sweep, seconds: Sequence[tuple[CustomerLink, Sequence[str]]]) -> None:
    """Open an issue for each link that is linked to one record while others carry its marker, of earlier pages too."""
    if not seconds:
        return
    told = Issue.objects.filter(
        connection=this.connection,
        kind=Issue.Kind.DUPLICATE,
        fingerprint__in=[str(link.uid) for link, _ in seconds],
        resolved_at=None,
        last_at__gte=this.began,
    )
    earlier = {issue.fingerprint: list(issue.details.get("remote_ids", ())) for issue in told}
    for link, remote_ids in seconds:
        all_of_them = dict.fromkeys([link.remote_id or "", *earlier.get(str(link.uid), ()), *remote_ids])
        this.troubles.append(duplicates(link, list(all_of_them)))
        this.needs_somebody("duplicate", remote_ids, SECOND)


def _is_former(link: CustomerLink, remote_id: str, at: datetime) -> bool:
    """Whether a link's earlier record shows. Still shown long after it was deleted, it is a second record."""
    if not remote_id or remote_id != link.former_remote_id:
        return False
    buried = parse_datetime(str(link.tombstone.get("at", "")))
    return link.remote_id is None or (buried is not None and buried + TOMBSTONE_LAG >= at)


def _link(this: _Sweep, at: datetime) -> None:
    """Link the creates that were lost to what they made: the oldest record, where there are several."""
    if not this.unlinked:
        return
    seen = {pk: sorted(records.values(), key=_age) for pk, records in this.unlinked.items()}
    this.unlinked = {}
    with transaction.atomic():
        rows = CustomerLink.objects.filter(pk__in=seen).order_by("pk")
        links = {link.pk: link for link in rows.select_for_update()}
        creates: dict[int, list[PushIntent]] = {}
        for intent in PushIntent.objects.filter(link__in=links, kind=PushIntent.Kind.CREATE).order_by("-pk"):
            creates.setdefault(intent.link_id, []).append(intent)
        found: list[tuple[CustomerLink, PushIntent, Sequence[Record]]] = []
        linked: list[tuple[CustomerLink, Sequence[str]]] = []
        for pk, records in seen.items():
            link = links.get(pk)
            if link is None or link.deleted_at is not None or (link.lease_until is not None and link.lease_until > at):
                this.fresh[SKIPPED] += len(records)  # just being sent: the answer will tell
            elif link.remote_id is not None:
                others = [record.remote_id or "" for record in records if record.remote_id != link.remote_id]
                this.fresh[UNCHANGED] += len(records) - len(others)
                if others:
                    linked.append((link, others))
            elif (made_by := _made_by(this.provider, records[0], creates.get(pk, ()))) is None:
                for record in records:
                    this.orphan(record)
            else:
                found.append((link, made_by, records))
                this.needs_somebody("duplicate", [record.remote_id or "" for record in records[1:]], SECOND)
        _report(this, linked)
        if this.dry_run:
            this.fresh[CREATED] += len(found)
        else:
            of_runs = [link.pk for link, _, _ in found if link.run_id]
            before = this.part.totals.copy()
            link_found(this.part, found)
            # Settling has counted those of no run on this one; the others on theirs.
            this.totals += this.part.totals - before
            done = CustomerLink.objects.filter(pk__in=of_runs, remote_id__isnull=False).count() if of_runs else 0
            theirs = Counter({CREATED: done, REFUSED: len(of_runs) - done})
            this.totals -= theirs
            this.fresh += theirs
        this.store(at)


def _age(record: Record) -> float:
    return record.created_at.timestamp() if record.created_at else math.inf


def _made_by(provider: Provider, record: Record, creates: Sequence[PushIntent]) -> PushIntent | None:
    """The create that made a record with our marker, of those given newest first; None when that cannot be told."""
    waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    if (open_one := next((intent for intent in creates if intent.outcome in waiting), None)) is not None:
        return open_one
    return next((intent for intent in creates if says(provider, record, intent.sent_values)), None)


def _close(connection: Connection, began: datetime, at: datetime) -> None:
    """Close what a complete sweep has not met again."""
    Issue.objects.filter(
        connection=connection,
        kind__in=(Issue.Kind.DUPLICATE, Issue.Kind.ORPHAN),
        resolved_at=None,
        last_at__lt=began,
    ).update(resolved_at=at)
