"""Finding due work in the database and doing it, a bounded slice per connection at a time, until told to stop."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

from django.db import DatabaseError, InterfaceError, OperationalError, close_old_connections, connection, transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet, Subquery

from connectors import login
from connectors.exceptions import ConnectorError
from connectors.inbound.idempotency import LIFE
from connectors.models import Connection, CustomerLink, IdempotencyKey, Issue, SyncRun
from connectors.outbound import Session
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import LinkState
from connectors.sync import heartbeat, importing, runs
from connectors.sync.claim import due_connection, due_connections
from connectors.sync.clock import database_clock
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.push import push
from connectors.sync.races import start_over
from connectors.sync.schedule import next_pull
from connectors.sync.settle import CRASHES
from connectors.sync.sweep import due_sweeps, sweep
from customers.editing import Actor
from customers.models import CustomerChange

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
Stop = Callable[[], bool]
# One connection's turn: long enough to be efficient, short enough that the others are not starved.
SLICE = timedelta(seconds=20)
SLICE_LINKS = 1000
# A list is read in longer turns: each is a run of its own.
PULL_SLICE = timedelta(minutes=2)
PULL_AGAIN = timedelta(hours=1)
BATCHES = 1000
IDLE_SECONDS = 1.0
REST, REST_CAP = timedelta(seconds=1), timedelta(minutes=1)
# Calls under way when a stop is asked for end before the process must, and the process before it is killed.
CALL_SECONDS = 25.0
STOP_SECONDS = 28.0
HOUSEKEEPING_SECONDS = 3600.0
DEAD_AFTER = timedelta(hours=1)
REJECTED_AFTER = timedelta(hours=24)
REJECTED_SAMPLE = 10


# What is due


class Due(NamedTuple):
    """A slice that may be run: its kind and the id of its connection or run. The organization is for fair shares."""

    kind: str
    pk: int
    organization_id: int = 0


def due_work(*, now: datetime) -> list[Due]:
    """Everything that is due, wherever it may be under way already."""
    columns = ("pk", "organization_id")
    end_pauses(now)
    return [
        *(Due("push", one.pk, one.organization_id) for one in due_connections(now=now)),
        *(Due("pull", *row) for row in due_pulls(now=now).values_list(*columns)),
        *(Due("batch", *row) for row in queued_batches().values_list(*columns)[:BATCHES]),
    ]


def end_pauses(now: datetime) -> int:
    """Use connections again whose pause was to end by now. One that turned out to reach another account meanwhile, or
    to have lost its login, waits for a person instead.
    """
    over = Connection.objects.filter(state=Connection.State.PAUSED, paused_until__lte=now)
    if not over.exists():  # asked first: an UPDATE takes SQLite's lock even where it changes nothing
        return 0
    kinds = (Issue.Kind.WRONG_ACCOUNT, Issue.Kind.LOGIN)
    lost = Issue.objects.filter(connection=OuterRef("pk"), kind__in=kinds, resolved_at=None).order_by("-last_at")
    ended = over.filter(Exists(lost)).update(
        state=Connection.State.NEEDS_REAUTH,
        state_reason=Subquery(lost.values("message")[:1]),
        paused_until=None,
        updated_at=now,
    )
    return ended + over.filter(~Exists(lost)).update(
        state=Connection.State.ACTIVE, state_reason="", paused_until=None, updated_at=now
    )


def due_pulls(*, now: datetime) -> QuerySet[Connection]:
    """Connections with an interval or a schedule whose time has come and that nobody pulls."""
    return Connection.objects.filter(
        Q(pull_until=None) | Q(pull_until__lte=now),
        Q(next_pull_at=None) | Q(next_pull_at__lte=now),
        Q(not_before=None) | Q(not_before__lte=now),
        Q(pull_interval__gt=0) | ~Q(pull_cron=""),
        opened_at__isnull=False,
        direction__in=Connection.PULLING,
        state=Connection.State.ACTIVE,
    ).select_related("organization")


def queued_batches() -> QuerySet[SyncRun]:
    """API batches and uploaded files that wait. Their kind is not pushed: a push run is carried by its links."""
    kinds = Q(kind=SyncRun.Kind.RECEIVE) | Q(kind=SyncRun.Kind.IMPORT, file__isnull=False)
    states = (SyncRun.State.QUEUED, SyncRun.State.RUNNING)
    return SyncRun.objects.filter(kinds, state__in=states, finished_at=None).order_by("pk")


# Slices. Each first asks whether it is due, so that being told to run too often, too late or twice does no harm.


def push_slice(connection_id: int, *, clock: Clock = database_clock, stop: Stop = lambda: False) -> int | None:
    """Push what is due at one connection for one turn. Returns how many links had an outcome; None: nothing is due."""
    chosen = due_connection(connection_id, now=clock())
    if chosen is None:
        return None
    session = _session(chosen, clock)
    if session is None:
        return 0
    try:
        return push(
            connection=chosen,
            provider=PROVIDERS[chosen.provider],
            session=session,
            limit=SLICE_LINKS,
            until=clock() + SLICE,
            clock=clock,
            stop=stop,
        ).total()
    except ConnectorError as error:
        logger.warning("connection %s waits: %s", chosen.pk, error.message)
        return 0


def pull_slice(connection_id: int, *, clock: Clock = database_clock, stop: Stop = lambda: False) -> int | None:
    """Pull a connection whose time has come, for one turn; a longer list goes on in the next.

    Returns how many records were read; None: it is not due.
    """
    now = clock()
    chosen = due_pulls(now=now).filter(pk=connection_id).first()
    if chosen is None:
        return None
    if chosen.next_pull_at is None and chosen.pull_cron and not chosen.checkpoint.get("cursor"):
        # A schedule that has just been entered: it begins at its first time, not now.
        first = next_pull(chosen, after=now)
        Connection.objects.filter(pk=chosen.pk, next_pull_at=None).update(next_pull_at=first)
        return 0
    session = _session(chosen, clock)
    if session is None:
        _pull_soon(chosen, clock())
        return 0
    until = now + PULL_SLICE
    cut_short = False

    def over() -> bool:
        nonlocal cut_short
        cut_short = cut_short or stop() or clock() >= until
        return cut_short

    try:
        run = pull(
            connection=chosen,
            provider=PROVIDERS[chosen.provider],
            session=session,
            clock=clock,
            stop=over,
        )
    except AlreadyRunning:
        return None
    except ConnectorError as error:
        logger.warning("pull of connection %s failed: %s", chosen.pk, error)
        _pull_soon(chosen, clock())
        return 0
    if cut_short:  # it goes on where it stopped when the others have had their turn
        Connection.objects.filter(pk=chosen.pk, pull_token="").update(next_pull_at=clock())
    return run.total


def _pull_soon(chosen: Connection, now: datetime) -> None:
    """A failed pull does not wait for a schedule that may come once a week."""
    again = min(filter(None, (next_pull(chosen, after=now), now + PULL_AGAIN)))
    Connection.objects.filter(pk=chosen.pk).update(next_pull_at=again)


def batch_slice(run_id: int, *, clock: Clock = database_clock, stop: Stop = lambda: False) -> int | None:
    """Carry out an API batch or an upload that was accepted to be worked on later. None: it does not wait any more."""
    with transaction.atomic():
        # One that is under way elsewhere is locked: to wait for it would only hold up a thread.
        free = SyncRun.objects.filter(pk__in=queued_batches().filter(pk=run_id).order_by().values("pk"))
        free = free.select_for_update(skip_locked=connection.features.has_select_for_update_skip_locked)
        if not list(free.values_list("pk", flat=True)):
            return None
    run = SyncRun.objects.select_related("connection__organization", "organization").get(pk=run_id)
    if run.kind != SyncRun.Kind.IMPORT and run.connection is None:
        return 0
    try:
        if run.kind == SyncRun.Kind.IMPORT:
            importing.carry_out(run, clock=clock, stop=stop)
        elif run.connection is not None:
            PROVIDERS[run.connection.provider].run_queued(run)
    except (InterfaceError, OperationalError):
        logger.exception("the queued batch %s waits for the database", run.public_id)
        return 0
    except Exception as error:
        logger.exception("the queued batch %s failed", run.public_id)
        if run.kind != SyncRun.Kind.IMPORT:  # the chunks before are taken in and counted
            SyncRun.objects.filter(pk=run.pk).update(refused=F("planned"))
        runs.finish(run=run, at=clock(), error=f"The batch failed: {type(error).__name__}.")
    return 1


def _session(chosen: Connection, clock: Clock) -> Session | None:
    """A way to the account whose calls end before a stop is over; None when there is none at the moment."""
    try:
        session = PROVIDERS[chosen.provider].session(chosen, clock=clock)
    except UnsealError as error:
        Connection.objects.filter(pk=chosen.pk, state=Connection.State.ACTIVE).update(
            state=Connection.State.NEEDS_REAUTH, state_reason=str(error)[:500]
        )
        return None
    except ConnectorError as error:
        logger.warning("connection %s waits: %s", chosen.pk, error.message)
        return None
    session.deadline = min(session.deadline, CALL_SECONDS)
    return session


SLICES: dict[str, Callable[..., int | None]] = {"push": push_slice, "pull": pull_slice, "batch": batch_slice}


# Housekeeping. Each must do no harm when another worker does it, too.


def close_dead_runs(now: datetime) -> int:
    """End runs whose process died: untouched for an hour, and nothing left that would carry them to their end."""
    carried = CustomerLink.objects.filter(run=OuterRef("pk"))
    being_pulled = Connection.objects.filter(pk=OuterRef("connection_id"), pull_until__gt=now)
    dead = SyncRun.objects.filter(
        (Q(kind=SyncRun.Kind.PUSH) & ~Exists(carried))
        | (Q(kind=SyncRun.Kind.PULL) & ~Exists(being_pulled))
        | Q(kind=SyncRun.Kind.IMPORT, file=None)
        | Q(kind=SyncRun.Kind.SYNC),
        state__in=(SyncRun.State.QUEUED, SyncRun.State.RUNNING),
        finished_at=None,
        updated_at__lt=now - DEAD_AFTER,
    )
    closed = 0
    for pk in list(dead.order_by("pk").values_list("pk", flat=True)):
        with transaction.atomic():
            of = ("self",) if connection.features.has_select_for_update_of else ()
            run = dead.filter(pk=pk).select_for_update(of=of).first()
            if run is None:
                continue
            # The links of a push have had their outcomes, whoever was to close it.
            ended = "" if run.kind == SyncRun.Kind.PUSH else "The process that ran it ended."
            runs.finish(run=run, at=now, error=ended)
            closed += 1
    return closed


def retry_rejected(now: datetime) -> int:
    """Once a day, try a small sample of what a connection rejects: the oldest, in a run that shows what came of it."""
    parked = CustomerLink.objects.filter(
        state=LinkState.REJECTED,
        next_attempt_at=None,
        updated_at__lt=now - REJECTED_AFTER,
        pushed_version__lt=F("needed_version"),
        crashes__lt=CRASHES,
        is_duplicate=False,
        deleted_at=None,
    )
    samples = SyncRun.objects.filter(
        kind=SyncRun.Kind.PUSH, request__customers="sample", created_at__gt=now - REJECTED_AFTER
    )
    connections = Connection.objects.filter(
        Exists(parked.filter(connection=OuterRef("pk"))),
        ~Exists(samples.filter(connection=OuterRef("pk"))),
        opened_at__isnull=False,
        direction__in=Connection.PUSHING,
        state=Connection.State.ACTIVE,
    ).select_related("organization")

    def sample(chosen: Connection) -> int:
        oldest = parked.filter(connection=chosen).order_by("updated_at", "pk")
        ids = list(oldest.values_list("pk", flat=True)[:REJECTED_SAMPLE])
        # Another worker that does the same meets this one at the oldest link, and then finds its run.
        ids = list(parked.filter(pk__in=ids).order_by("pk").select_for_update().values_list("pk", flat=True))
        if not ids or samples.filter(connection=chosen).exists():
            return 0
        run = runs.start(
            organization=chosen.organization,
            connection=chosen,
            kind=SyncRun.Kind.PUSH,
            actor=Actor(kind=CustomerChange.Actor.CONNECTION, id=str(chosen.pk), name=chosen.name),
            at=now,
            planned=len(ids),
            state=SyncRun.State.QUEUED,
            request={"customers": "sample"},
        )
        return CustomerLink.objects.filter(pk__in=ids).update(run=run, next_attempt_at=now, updated_at=now)

    return sum(start_over(partial(sample, chosen)) for chosen in list(connections))


def resolve_issues(now: datetime) -> int:
    """Close issues about refused records once none is left that is refused for that cause."""
    left = CustomerLink.objects.filter(
        connection=OuterRef("connection"), state=LinkState.REJECTED, fingerprint=OuterRef("fingerprint")
    )
    kinds = (Issue.Kind.REJECTED, Issue.Kind.POISON, Issue.Kind.CONNECTOR)
    return Issue.objects.filter(~Exists(left), kind__in=kinds, resolved_at=None).update(resolved_at=now)


def keep_logins(now: datetime) -> int:
    """Refresh the logins that nobody has used for a day, before they die of disuse."""
    idle = login.idle(now)
    for chosen in idle:
        try:
            login.keep_alive(chosen, database_clock)
        except (ConnectorError, UnsealError) as error:
            logger.warning("the login of connection %s could not be kept alive: %s", chosen.pk, error)
    return len(idle)


def forget_answers(now: datetime) -> int:
    """Delete the idempotency keys that have lived their day, a bounded number at a time: others need the table."""
    over = IdempotencyKey.objects.filter(created_at__lt=now - LIFE)
    forgotten = 0
    while chosen := list(over.order_by("created_at").values_list("pk", flat=True)[:BATCHES]):
        # Asked again, because a key that is used anew begins a new day.
        forgotten += over.filter(pk__in=chosen).delete()[0]
    return forgotten


HOUSEKEEPING: tuple[Callable[[datetime], object], ...] = (
    close_dead_runs,
    retry_rejected,
    resolve_issues,
    keep_logins,
    forget_answers,
    heartbeat.forget,
    importing.forget_files,
)


def housekeep(*, clock: Clock = database_clock, stop: Stop = lambda: False) -> None:
    """Do what has to be done now and then. One part that fails does not keep the others from being done."""
    for part in HOUSEKEEPING:
        if stop():
            return
        try:
            part(clock())
        except Exception:
            logger.exception("housekeeping failed: %s", getattr(part, "__name__", part))
    sweep_daily(clock=clock, stop=stop)


def sweep_daily(*, clock: Clock = database_clock, stop: Stop = lambda: False) -> None:
    """Look for second records and orphans, once a day at each system that can be asked for all it has."""
    for chosen in due_sweeps(providers=PROVIDERS, now=clock()):
        session = _session(chosen, clock)
        if stop() or session is None:
            continue
        try:
            sweep(connection=chosen, provider=PROVIDERS[chosen.provider], session=session, clock=clock, stop=stop)
        except AlreadyRunning:
            continue
        except ConnectorError as error:
            logger.warning("connection %s could not be swept: %s", chosen.pk, error.message)


# Carrying


class Rests:
    """What came to nothing though it was due rests before it is tried again, longer each time."""

    def __init__(self) -> None:
        self.until: dict[Due, tuple[datetime, timedelta]] = {}

    def rests(self, one: Due, *, now: datetime) -> bool:
        return one in self.until and self.until[one][0] > now

    def ended(self, one: Due, done: int | None, *, now: datetime) -> None:
        """A slice has ended. One that was not due after all rests for a moment, so that nobody asks it in circles."""
        if done:
            self.until.pop(one, None)
            return
        _, before = self.until.get(one, (now, REST / 2))
        rest = REST if done is None else min(REST_CAP, 2 * before)
        self.until[one] = (now + rest, rest)

    def forget(self, *, but: Collection[Due]) -> None:
        self.until = {one: rest for one, rest in self.until.items() if one in but}


class Worker:
    """Runs slices in threads, one connection in one thread at a time, until `stop` is set and they have ended.

    A free thread goes to the organization with the fewest slices under way; among equals to the one that was served
    longest ago, and there to the connection that was served longest ago.
    """

    def __init__(self, *, threads: int = 4, clock: Clock = database_clock, idle: float = IDLE_SECONDS) -> None:
        self.clock = clock
        self.idle = idle
        self.threads = threads
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="slice")
        self.busy: dict[Due, Future[int | None]] = {}
        self.rests = Rests()
        self.turn = itertools.count(1)
        self.served: dict[Due, int] = {}
        self.served_organizations: dict[int, int] = {}
        # What is due, by organization, what was served longest ago first. Asked for anew once in `idle` seconds.
        self.waiting: dict[int, deque[Due]] = {}
        self.find_at = 0.0
        self.keeps_house = False
        self.housekeep_at = 0.0
        self.name = heartbeat.process_name()
        self.beat_at = 0.0

    def beat(self) -> None:
        """Say now and then that this worker lives."""
        if time.monotonic() >= self.beat_at:
            heartbeat.beat(name=self.name, kind="run_worker", at=self.clock())
            self.beat_at = time.monotonic() + heartbeat.EVERY.total_seconds()

    def look(self) -> int:
        """Give the free threads to what is due, neither under way nor resting; returns how many slices were started."""
        now = self.clock()
        self._collect(now)
        if self.keeps_house and time.monotonic() >= self.housekeep_at and len(self.busy) < self.threads:
            self.housekeep_at = time.monotonic() + HOUSEKEEPING_SECONDS
            self._start(Due("housekeeping", 0), partial(housekeep, clock=self.clock, stop=self.stop.is_set))
        if len(self.busy) < self.threads and (not self.waiting or time.monotonic() >= self.find_at):
            self._find(now)
        started = 0
        while self.waiting and len(self.busy) < self.threads:
            one = self._next()
            self._start(one, partial(SLICES[one.kind], one.pk, clock=self.clock, stop=self.stop.is_set))
            started += 1
        return started

    def _find(self, now: datetime) -> None:
        found = due_work(now=now)
        self.find_at = time.monotonic() + self.idle
        known = {*found, *self.busy}
        self.rests.forget(but=known)
        organizations = {one.organization_id for one in known}
        # What is not due any more is forgotten: what comes back has waited longest.
        self.served = {one: turn for one, turn in self.served.items() if one in known}
        self.served_organizations = {pk: n for pk, n in self.served_organizations.items() if pk in organizations}
        self.waiting = {}
        for one in sorted(found, key=lambda one: self.served.get(one, 0)):
            if one not in self.busy and not self.rests.rests(one, now=now):
                self.waiting.setdefault(one.organization_id, deque()).append(one)

    def _next(self) -> Due:
        under_way = Counter(one.organization_id for one in self.busy)
        chosen = min(self.waiting, key=lambda pk: (under_way[pk], self.served_organizations.get(pk, 0)))
        one = self.waiting[chosen].popleft()
        if not self.waiting[chosen]:
            del self.waiting[chosen]
        return one

    def _start(self, one: Due, do: Callable[[], int | None]) -> None:
        self.served[one] = self.served_organizations[one.organization_id] = next(self.turn)
        self.busy[one] = self.pool.submit(in_thread, do)

    def _collect(self, now: datetime) -> None:
        for one, future in list(self.busy.items()):
            if not future.done():
                continue
            del self.busy[one]
            done = future.result()
            self.rests.ended(one, done, now=now)
            if done:
                # There may be more: it asks for itself when its turn comes.
                self.waiting.setdefault(one.organization_id, deque()).append(one)

    def run(self, *, once: bool = False) -> None:
        """Work until `stop` is set; with `once`, until nothing is due. Then wait for what is under way.

        Housekeeping is for workers that stay.
        """
        self.keeps_house = not once
        try:
            while not self.stop.is_set():
                started = 0
                try:
                    self.beat()
                    started = self.look()
                except Exception:
                    if once:
                        raise
                    # The database went away: keep looking until it is back.
                    logger.exception("looking for work failed")
                    connection.close()
                finally:
                    close_old_connections()
                if once and not started and not self.busy:
                    break
                self._pause()
        finally:
            self.stop.set()
            self.pool.shutdown(wait=True)
            with contextlib.suppress(DatabaseError):
                heartbeat.gone(name=self.name)
            connection.close()

    def _pause(self) -> None:
        """Until a thread is free or it is time to look anew."""
        if self.busy:
            wait(self.busy.values(), timeout=self.idle, return_when=FIRST_COMPLETED)
        else:
            self.stop.wait(self.idle)


def in_thread(do: Callable[[], int | None]) -> int | None:
    """Run a slice and give its database connection back, whatever happens."""
    try:
        return do()
    except Exception:
        logger.exception("a slice failed")
        return 0
    finally:
        if not transaction.get_connection().in_atomic_block:
            connection.close()


def stop_in_time(
    told: queue.SimpleQueue[bool],
    *,
    stop: Callable[[], None],
    under_way: Callable[[], Collection[Due]],
    code: int = 0,
) -> None:
    """Stop when told True, and end the process if it has not told False STOP_SECONDS later. For a thread of its own.

    A signal handler may put into a SimpleQueue, but must not set an Event: the thread that it interrupts may be at it.
    What was being sent stays behind as open intents, which the next worker takes for uncertain.
    """
    if not told.get():
        return
    stop()
    try:
        told.get(timeout=STOP_SECONDS)
    except queue.Empty:
        left = ", ".join(f"{one.kind} {one.pk}" for one in under_way()) or "nothing"
        logger.warning("ending with slices under way: %s. What they were sending is uncertain.", left)
        os._exit(code)
