"""Reading a system's customers into the hub, page by page, each page and its checkpoint in one transaction."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils.dateparse import parse_datetime

from connectors.exceptions import ConnectionUnusable, ConnectorError, Gone, Rejected, RetryLater
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Page, Provider, Record
from connectors.states import LinkState
from connectors.sync import deletes, issues, limits, runs
from connectors.sync.clock import database_clock
from connectors.sync.merge import same
from connectors.sync.push import NAP, PATIENCE, lost_login
from connectors.sync.receive import UNCHANGED, UPDATED, Received, receive
from connectors.sync.schedule import next_pull
from connectors.sync.settle import duplicates
from customers import bulk, editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange
from customers.normalize import name_key

# Rows committed late or with equal times would be missed without it; reading them twice is harmless.
OVERLAP = timedelta(minutes=5)
T = TypeVar("T")
LEASE = timedelta(minutes=5)
PAGE_ROWS = 100
# How often a record that moved while it was read is read again.
READ_AGAIN = 3


class AlreadyRunning(Exception):
    """Another pull of this connection is under way."""


@dataclass(kw_only=True)
class Reading:
    """One pull under way. `gone` are links, and the record of each that was shown as deleted; believed at the end."""

    connection: Connection
    provider: Provider
    session: Session
    author: Actor
    clock: Callable[[], datetime]
    sleep: Callable[[float], None]
    rng: random.Random
    stop: Callable[[], bool]
    dry_run: bool
    generation: int = 0
    gone: dict[int, str] = field(default_factory=dict)
    left_behind: bool = False  # a record could not be read again: the next pull starts where this one did
    unreadable: bool = False  # whose record one was is not known: what the list leaves out says nothing
    ours: dict[str, list[PushIntent]] = field(default_factory=dict)
    ours_until: datetime | None = None
    seconds: list[issues.Trouble] = field(default_factory=list)  # of the page that is being taken


def pull(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    actor: Actor | None = None,
    since: datetime | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    clock: Callable[[], datetime] = database_clock,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
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
    capabilities = provider.capabilities(connection)
    keeps_place = since is None and limit is None and not dry_run
    checkpoint: dict[str, Any] = dict(connection.checkpoint) if keeps_place else {}
    since = since or (_time(checkpoint.get("since")) if capabilities.incremental else None)
    cursor: str | None = checkpoint.get("cursor")
    kept_cursor = cursor
    began = _time(checkpoint.get("began")) or started
    this = Reading(
        connection=connection,
        provider=provider,
        session=session,
        author=author,
        clock=clock,
        sleep=sleep,
        rng=rng or random.Random(),
        stop=stop,
        dry_run=dry_run,
        gone=dict(checkpoint.get("gone", ())),
        left_behind=bool(checkpoint.get("left_behind")),
        unreadable=bool(checkpoint.get("unreadable")),
    )
    if keeps_place and capabilities.shows_deleted == "scan" and since is None:
        this.generation = int(checkpoint.get("generation", 0)) or _new_generation(connection)
    totals: Counter[str] = Counter()
    error = ""
    ended = False
    try:
        while True:
            rows = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit - totals.total())
            fetched = clock()
            try:
                page = read_page(this, cursor=cursor, since=since, rows=rows)
            except Rejected:
                if cursor is None or cursor != kept_cursor:
                    raise
                # The system has forgotten the place where an earlier pull stopped: begin again.
                cursor = kept_cursor = None
                if this.generation:
                    this.generation, this.unreadable = _new_generation(connection), False
                continue
            if page is None:
                break
            records = list(page.records)[:rows] if limit is not None else list(page.records)
            outcomes: Counter[str] = Counter()
            problems: list[dict[str, str]] = []
            for again in range(READ_AGAIN + 1):
                with transaction.atomic():
                    counted, found, stale = take_page(this, records, fetched, clock())
                    outcomes += counted
                    problems += found
                    if not stale or again == READ_AGAIN or not capabilities.fetches:
                        this.left_behind = this.left_behind or bool(stale)
                        outcomes[UNCHANGED] += len(stale)
                        if keeps_place:
                            checkpoint = _checkpoint(this, page.next, began, checkpoint, clock())
                            Connection.objects.filter(pk=connection.pk).update(checkpoint=checkpoint)
                            connection.checkpoint = checkpoint
                        runs.add(run_id=run.pk, totals=outcomes, problems=problems, at=clock())
                        _renew(connection, token, clock())
                        break
                # They moved while they were read: each is read alone.
                links = CustomerLink.objects.filter(connection=connection, remote_id__in=stale)
                moved = list(links.values_list("remote_id", "sync_seq"))
                read = [_alone(this, remote_id or "", seq) for remote_id, seq in moved]
                records = [record for record in read if record is not None]
                this.left_behind = this.left_behind or len(records) < len(read)
            totals.update(outcomes)
            progress(totals)
            cursor = page.next
            ended = cursor is None
            if ended or (limit is not None and totals.total() >= limit) or stop():
                break
        if not dry_run and (ended or not keeps_place):
            buried = _believe_deletes(this, token, began=began, complete=ended and keeps_place)
            runs.add(run_id=run.pk, totals=buried, at=clock())
            totals.update(buried)
    except ConnectionUnusable as unusable:
        error = unusable.message
        lost_login(connection=connection, error=unusable, at=clock())
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


def read_page(this: Reading, *, cursor: str | None, since: datetime | None, rows: int) -> Page | None:
    """The next page, within the limits that all workers share; None when the pull is to stop before."""
    connection = this.connection
    connection.refresh_from_db(fields=["not_before", "state", "rate", "burst", "day_limit"])
    if connection.not_before is not None and connection.not_before > this.clock():
        raise RetryLater(f"{connection.name} asked to wait until {connection.not_before:%Y-%m-%d %H:%M:%S} UTC.")
    return _ask(this, lambda: this.provider.page(this.session, connection, cursor=cursor, since=since, limit=rows))


def _ask(this: Reading, call: Callable[[], T]) -> T | None:
    """Make one call within the limits that all workers share, and tell them what it brought; None when the pull is to
    stop before. It waits for no probe of the breaker. A login that has run out is renewed once.
    """
    connection = this.connection
    while not this.stop():
        granted, wait = limits.reserve(connection=connection, want=1, urgent=False, now=this.clock())
        if granted:
            break
        if wait > PATIENCE:
            raise RetryLater(f"The calls that {connection.name} may be sent today are used up.")
        this.sleep(min(max(wait, 0.01), NAP))
    else:
        return None
    heard: ConnectorError | None = None
    renewed = False
    while True:
        try:
            return call()
        except ConnectorError as error:
            heard = error
            lost = isinstance(error, ConnectionUnusable) and error.status == 401
            if not lost or renewed or this.session.renew is None or not this.session.renew():
                raise
            renewed, heard = True, None
        finally:
            limits.heard(
                connection=connection,
                calls=[heard],
                exhausted=this.session.take_exhausted(),
                now=this.clock(),
                rng=this.rng,
            )


def _alone(this: Reading, remote_id: str, seq: int) -> Record | Rejected | None:
    """One record as it is now; one that is gone says so. None when the pull is to stop before it is asked for."""
    try:
        record = _ask(this, lambda: this.provider.fetch(this.session, this.connection, remote_id))
    except Gone:
        return Record(values={}, remote_id=remote_id, deleted=True)
    except Rejected as error:
        return error
    return None if record is None else replace(record, remote_id=remote_id, seq=seq)


def _checkpoint(
    this: Reading, following: str | None, began: datetime, before: Mapping[str, Any], at: datetime
) -> dict[str, Any]:
    """Where the next pull goes on: inside this list, or from its beginning less the overlap."""
    since = before.get("since")
    if following is None:
        since = since if this.left_behind else (began - OVERLAP).isoformat()
        return {"since": since, "generation": this.generation, "gone": list(this.gone.items())}
    return {
        "cursor": following,
        "began": began.isoformat(),
        "since": since,
        "generation": this.generation,
        "gone": list(this.gone.items()),
        "left_behind": this.left_behind,
        "unreadable": this.unreadable,
    }


def _new_generation(connection: Connection) -> int:
    """Begin a complete list: what it does not show by its end is gone."""
    connection.scan_generation += 1
    Connection.objects.filter(pk=connection.pk).update(scan_generation=connection.scan_generation)
    return connection.scan_generation


def _believe_deletes(this: Reading, token: str, *, began: datetime, complete: bool) -> Counter[str]:
    """At the end of a list: bury what it showed as deleted, and what a complete one did not show at all."""
    connection = this.connection
    unseen: dict[int, str] = {}
    if this.generation and complete and not this.unreadable:
        rows = CustomerLink.objects.filter(
            connection=connection,
            remote_id__isnull=False,
            deleted_at=None,
            seen_generation__lt=this.generation,
            created_at__lt=began,
        ).exclude(synced_at__gte=began)
        unseen = {pk: remote_id or "" for pk, remote_id in rows.values_list("pk", "remote_id")}
    number = _live(this.gone | unseen).count()
    believed = not number or deletes.plausible(connection=connection, number=number, at=this.clock())
    if believed and unseen and this.provider.capabilities(connection).fetches:
        unseen = _without_drift(this, token, {pk: there for pk, there in unseen.items() if pk not in this.gone})
    buried = 0
    with transaction.atomic():
        if believed:
            buried = _bury(connection, this.gone | unseen, this.author, this.clock()) if number else 0
            if complete:
                issues.resolve(connection=connection, kind=Issue.Kind.MASS_DELETE, at=this.clock())
        if complete:
            # What is not believed is shown no second time by a list of changes: it is judged again with the next.
            kept = ("since",) if believed else ("since", "gone")
            connection.checkpoint = {name: v for name, v in connection.checkpoint.items() if name in kept}
            Connection.objects.filter(pk=connection.pk).update(checkpoint=connection.checkpoint)
    return Counter({UPDATED: buried, UNCHANGED: max(0, len(this.gone) - buried)})


def _live(gone: Mapping[int, str]) -> QuerySet[CustomerLink]:
    """Those of these links that still have the record that was seen to be gone: another may have been made since."""
    return CustomerLink.objects.filter(pk__in=gone, remote_id__in=gone.values(), deleted_at=None)


def _without_drift(this: Reading, token: str, unseen: Mapping[int, str]) -> dict[int, str]:
    """Those of these links whose record is gone when it is asked for by its id.

    A record that moves between two pages while the list is read stands on neither of those that come.
    """
    gone: dict[int, str] = {}
    for pk, remote_id in unseen.items():
        record = _alone(this, remote_id, 0)
        if record is None:
            break
        _renew(this.connection, token, this.clock())
        if isinstance(record, Record) and record.deleted:
            gone[pk] = remote_id
    return gone


def _bury(connection: Connection, gone: Mapping[int, str], actor: Actor, at: datetime) -> int:
    """Make tombstones of these links and do what the connection's policy says. Customers first, links second."""
    rows = _live(gone)
    if connection.delete_policy == Connection.DeletePolicy.ARCHIVE:
        ids = set(rows.values_list("customer_id", flat=True))
        editing.archive(organization=connection.organization, ids=ids, actor=actor, at=at)
    links = list(rows.order_by("pk").select_for_update())
    runs.release(links=CustomerLink.objects.filter(pk__in=[link.pk for link in links]), at=at)
    for link in links:
        deletes.bury(link, evidence="The list no longer shows it, or shows it as deleted.", at=at)
        if connection.delete_policy == Connection.DeletePolicy.RECREATE and not link.is_duplicate:
            deletes.detach(link)
            link.next_attempt_at = at
    bulk.update(links, BURIED)
    return len(links)


BURIED = (
    "tombstone",
    "deleted_at",
    "state",
    "next_attempt_at",
    "former_remote_id",
    "remote_id",
    "base_local",
    "base_remote",
    "remote_data",
    "remote_revision",
    "remote_created_at",
    "pushed_version",
    "epoch",
    "sync_seq",
    "updated_at",
)


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
    due = next_pull(connection, after=now)
    Connection.objects.filter(pk=connection.pk, pull_token=token).update(
        pull_token="", pull_until=None, next_pull_at=due
    )


def _without_our_own(this: Reading, records: list[Record], outcomes: Counter[str], at: datetime) -> list[Record]:
    """The records, less those that our creates made or may have made.

    Where the answer is still out or was lost, such a record is taken for its link when it carries the link's marker, or
    when it alone says what was sent; otherwise it is left for the next pull, because a second golden record could not
    be taken back. Nor does a further record with the marker of a link make one: it is told to somebody.
    """
    connection = this.connection
    ids = [record.remote_id for record in records]
    rows = CustomerLink.objects.filter(connection=connection, remote_id__in=ids)
    linked = set(rows.values_list("remote_id", flat=True))
    unknown = [record for record in records if record.remote_id not in linked]
    if not unknown:
        return records
    # What was deleted and made again: its old record is not a new customer.
    former = set(
        CustomerLink.objects.filter(
            ~Q(former_remote_id=""),  # names the partial index
            connection=connection,
            former_remote_id__in=[record.remote_id or "" for record in unknown],
        ).values_list("former_remote_id", flat=True)
    )
    _our_creates(this, at)
    left_out: set[str | None] = {record.remote_id for record in unknown if record.remote_id in former}
    fresh = [record for record in unknown if record.remote_id not in former]
    markers = [this.provider.marker(record.document) for record in fresh]
    marked: dict[UUID, list[Record]] = {}
    for record, marker in zip(fresh, markers, strict=True):
        if marker is not None:
            marked.setdefault(marker, []).append(record)
    carried = CustomerLink.objects.filter(connection=connection, uid__in=marked, deleted_at=None) if marked else ()
    owned = {link.uid: link for link in carried}
    adopted: list[tuple[PushIntent, Record]] = []
    for record, marker in zip(fresh, markers, strict=True):
        waiting = this.ours.get(_key(record.values), [])
        if marker is not None:
            alike = [i for intents in this.ours.values() for i in intents if i.link.uid == marker]
            if alike and record is not _made_by(this.provider, alike[0], marked[marker]):
                left_out.add(record.remote_id)
                continue
        else:
            alike = [i for i in waiting if says(this.provider, record, i.sent_values)]
        twins = [o for o in unknown if alike and says(this.provider, o, alike[0].sent_values)]
        if len(alike) == 1 and (marker is not None or len(twins) == 1):
            this.ours[_key(alike[0].sent_values)].remove(alike[0])
            adopted.append((alike[0], record))
        elif alike or marker in owned:
            left_out.add(record.remote_id)
    if adopted:
        # Customers before links, and all of the page at once: an edit locks them in that order.
        links = Q(remote_id__in=ids) | Q(pk__in=[intent.link_id for intent, _ in adopted])
        owners = CustomerLink.objects.filter(links, connection=connection).values("customer_id")
        list(Customer.objects.filter(pk__in=owners).order_by("pk").select_for_update().values_list("pk"))
        left_out |= _adopt(this, adopted, at)
    outcomes["skipped"] += len(left_out)
    this.seconds = [
        duplicates(link, [link.remote_id, *others])
        for uid, link in owned.items()
        if link.remote_id and (others := [record.remote_id or "" for record in marked[uid] if not record.deleted])
    ]
    return [record for record in records if record.remote_id not in left_out]


def _made_by(provider: Provider, intent: PushIntent, records: Sequence[Record]) -> Record:
    """Which of the records with its marker a create made: the first that says what was sent, else the first."""
    return next((record for record in records if says(provider, record, intent.sent_values)), records[0])


def _tell_seconds(this: Reading, at: datetime) -> None:
    """Open an issue for each second record of a link, unless one is open: a sweep's may know of more records."""
    known = Issue.objects.filter(connection=this.connection, kind=Issue.Kind.DUPLICATE, resolved_at=None)
    told = set(
        known.filter(fingerprint__in=[one.fingerprint for one in this.seconds]).values_list("fingerprint", flat=True)
    )
    new = [one for one in this.seconds if one.fingerprint not in told]
    issues.open_issues(connection=this.connection, troubles=new, at=at)
    this.seconds = []


def _our_creates(this: Reading, at: datetime) -> None:
    """Bring the list of creates that may have arrived up to date: whole at first, then what was sent since."""
    waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    rows = PushIntent.objects.filter(
        link__connection=this.connection, link__remote_id=None, kind=PushIntent.Kind.CREATE, outcome__in=waiting
    ).select_related("link")
    if this.ours_until is not None:
        rows = rows.filter(sent_at__gte=this.ours_until)
    known = {intent.pk for intents in this.ours.values() for intent in intents} if this.ours_until else set()
    for intent in rows:
        if intent.pk not in known:
            this.ours.setdefault(_key(intent.sent_values), []).append(intent)
    this.ours_until = at - LEASE


# The columns of a link that taking a record for its own moves.
ADOPTED = (
    *("remote_id", "base_local", "base_remote", "pushed_version", "state", "error"),
    *("next_attempt_at", "hold_until", "updated_at"),
)


def _adopt(this: Reading, adopted: Sequence[tuple[PushIntent, Record]], at: datetime) -> set[str | None]:
    """Each record is what its create made: link it, unless the answer has come meanwhile.

    Returns the remote ids of the records that are to be left: where a create is sent again as long as its answer is
    out, a worker may be doing so right now, and what it sends would land on newer content.
    """
    offers = this.provider.capabilities(this.connection)
    locked = CustomerLink.objects.filter(pk__in=[intent.link_id for intent, _ in adopted], remote_id=None)
    links = {link.pk: link for link in locked.order_by("pk").select_for_update()}
    intents = PushIntent.objects.in_bulk([intent.pk for intent, _ in adopted])
    moved: dict[int, CustomerLink] = {}
    left: set[str | None] = set()
    for known, record in adopted:
        link, intent = links.get(known.link_id), intents[known.pk]
        if link is None:
            continue
        if offers.upsert_external_id and intent.outcome == PushIntent.Outcome.OPEN:
            if link.lease_until is not None and link.lease_until > at:
                left.add(record.remote_id)
                this.ours[_key(known.sent_values)].append(known)
                continue
            # Its worker died. The call had ended when the lease did.
            ended = (link.lease_until or at) + timedelta(seconds=offers.max_request_life)
            link.hold_until = max(link.hold_until or ended, ended)
        link.remote_id = record.remote_id
        link.base_local = intent.sent_values
        link.base_remote = {name: this.provider.normalise(name, value) for name, value in intent.sent_values.items()}
        link.pushed_version = intent.version  # as it is now: a merge may have given the link to another customer
        link.state, link.error, link.next_attempt_at, link.updated_at = LinkState.OPEN, "", at, at
        intent.outcome, intent.answered_at = PushIntent.Outcome.OK, at
        moved[intent.pk] = link
    bulk.update(list(moved.values()), ADOPTED)
    bulk.update([intents[pk] for pk in moved], ("outcome", "answered_at"))
    return left


def _key(values: Mapping[str, Any]) -> str:
    """What a record and the create that made it have in common, however the system formats it."""
    return name_key(str(values.get("name") or ""))


def says(provider: Provider, record: Record, sent: Mapping[str, Any]) -> bool:
    """Whether a record says what was sent, in the fields that both name."""
    both = record.values.keys() & sent.keys()
    return bool(both) and all(
        same(record.values[name], sent[name]) or same(record.values[name], provider.normalise(name, sent[name]))
        for name in both
    )


def take_page(
    this: Reading, page: Sequence[Record | Rejected], fetched: datetime, at: datetime
) -> tuple[Counter[str], list[dict[str, str]], list[str]]:
    """Receive one page. A record that cannot be taken is counted and named; its neighbours are.

    The last of the three are remote ids of records that moved while they were read: they are not counted.
    """
    connection, provider = this.connection, this.provider
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
    this.unreadable = this.unreadable or len(records) < len(page)
    if not this.dry_run:
        records = _without_our_own(this, records, outcomes, at)
    known = dict(
        CustomerLink.objects.filter(
            connection=connection, remote_id__in=[record.remote_id for record in records]
        ).values_list("remote_id", "pk")
    )
    gone = [record for record in records if record.deleted]
    alive = [record for record in records if not record.deleted]
    outcomes["skipped"] += sum(record.remote_id not in known for record in gone)
    deleted = {known[there]: there for record in gone if (there := record.remote_id or "") in known}
    if this.dry_run:
        outcomes["updated"] += sum(record.remote_id in known for record in alive) + len(deleted)
        outcomes["created"] += sum(record.remote_id not in known for record in alive)
        return outcomes, problems, []
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
        actor=this.author,
        fields=provider.fields,
        fetched=fetched,
        normalise=provider.normalise,
        at=at,
    )
    if this.seconds:
        _tell_seconds(this, at)
    outcomes.update(result.outcome for result in received if not result.stale)
    if this.generation and known:
        CustomerLink.objects.filter(pk__in=known.values()).update(seen_generation=this.generation)
    shown = {known[record.remote_id] for record in alive if record.remote_id in known}
    this.gone = {pk: there for pk, there in (this.gone | deleted).items() if pk not in shown}
    return (
        outcomes,
        problems + _conflicts(received),
        [record.remote_id or "" for record, result in zip(good, received, strict=True) if result.stale],
    )


def _conflicts(received: Sequence[Received]) -> list[dict[str, str]]:
    return [
        {
            "remote_id": (result.link.remote_id if result.link else None) or "",
            "customer": str(result.customer.pk),
            "field": name,
            "reason": f"Changed on both sides. Before: {base!r}; here: {ours!r}; there: {theirs!r}.",
        }
        for result in received
        for name, (base, ours, theirs) in (result.merge.conflicts if result.merge else {}).items()
    ]
