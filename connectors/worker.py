"""Finding due work in the database and doing it, a bounded slice per connection at a time, until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial

from django.db import InterfaceError, OperationalError, close_old_connections, connection, transaction
from django.db.models import F, Q
from django.utils import timezone

from connectors.exceptions import ConnectorError
from connectors.models import Connection, SyncRun
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.sync import runs
from connectors.sync.claim import due_connections
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.push import push

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
# One connection's turn: long enough to be efficient, short enough that the others are not starved.
SLICE = timedelta(seconds=20)
SLICE_LINKS = 1000
IDLE_SECONDS = 1.0
REST, REST_CAP = timedelta(seconds=1), timedelta(minutes=1)


def push_slice(chosen: Connection, *, clock: Clock = timezone.now, stop: Callable[[], bool] = lambda: False) -> int:
    """Push what is due at one connection for one turn. Returns how many links had an outcome."""
    provider = PROVIDERS[chosen.provider]
    try:
        session = provider.session(chosen)
    except UnsealError as error:
        Connection.objects.filter(pk=chosen.pk).update(
            state=Connection.State.NEEDS_REAUTH, state_reason=str(error)[:500]
        )
        return 0
    try:
        return push(
            connection=chosen,
            provider=provider,
            session=session,
            limit=SLICE_LINKS,
            until=clock() + SLICE,
            clock=clock,
            stop=stop,
        ).total()
    except ConnectorError as error:
        logger.warning("connection %s waits: %s", chosen.pk, error.message)
        return 0


def pull_due(chosen: Connection, *, clock: Clock = timezone.now, stop: Callable[[], bool] = lambda: False) -> int:
    """Pull a connection whose time has come. Returns how many records were read."""
    provider = PROVIDERS[chosen.provider]
    try:
        return pull(
            connection=chosen, provider=provider, session=provider.session(chosen), clock=clock, stop=stop
        ).total
    except AlreadyRunning:
        return 0
    except (ConnectorError, UnsealError) as error:
        logger.warning("pull of connection %s failed: %s", chosen.pk, error)
        Connection.objects.filter(pk=chosen.pk).update(
            next_pull_at=clock() + timedelta(seconds=chosen.pull_interval or 3600)
        )
        return 0


def run_queued(run: SyncRun, *, clock: Clock = timezone.now) -> int:
    """Carry out an API batch that was accepted to be worked on later."""
    if run.connection is None:
        return 0
    try:
        PROVIDERS[run.connection.provider].run_queued(run)
    except (InterfaceError, OperationalError):
        logger.exception("the queued batch %s waits for the database", run.public_id)
        return 0
    except Exception as error:
        logger.exception("the queued batch %s failed", run.public_id)
        SyncRun.objects.filter(pk=run.pk).update(refused=F("planned"))
        runs.finish(run=run, at=clock(), error=f"The batch failed: {type(error).__name__}.")
    return 1


def due_pulls(*, now: datetime) -> list[Connection]:
    free = Q(pull_until=None) | Q(pull_until__lte=now)
    come = Q(next_pull_at=None) | Q(next_pull_at__lte=now)
    return list(
        Connection.objects.filter(
            free, come, direction__in=Connection.PULLING, state=Connection.State.ACTIVE, pull_interval__isnull=False
        ).select_related("organization")
    )


def queued_batches() -> list[SyncRun]:
    """Batches that wait. Their kind is not pushed: a push run is carried by its links."""
    return list(
        SyncRun.objects.filter(kind=SyncRun.Kind.RECEIVE, state__in=(SyncRun.State.QUEUED, SyncRun.State.RUNNING))
        .filter(finished_at=None)
        .select_related("connection__organization", "organization")
        .order_by("pk")[:20]
    )


class Worker:
    """Runs slices in threads, one connection in one thread at a time, until `stop` is set and they have ended.

    What came to nothing though it was due rests before it is tried again, longer each time.
    """

    def __init__(self, *, threads: int = 4, clock: Clock = timezone.now, idle: float = IDLE_SECONDS) -> None:
        self.clock = clock
        self.idle = idle
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="slice")
        self.busy: dict[tuple[str, int], Future[int]] = {}
        self.resting: dict[tuple[str, int], tuple[datetime, timedelta]] = {}

    def look(self) -> int:
        """Start what is due, neither under way nor resting; returns how many slices were started."""
        now = self.clock()
        self._collect(now)
        work: list[tuple[tuple[str, int], Callable[[], int]]] = []
        for chosen in due_connections(now=now):
            work.append((("push", chosen.pk), partial(push_slice, chosen, clock=self.clock, stop=self.stop.is_set)))
        for chosen in due_pulls(now=now):
            work.append((("pull", chosen.pk), partial(pull_due, chosen, clock=self.clock, stop=self.stop.is_set)))
        for run in queued_batches():
            work.append((("batch", run.pk), partial(run_queued, run, clock=self.clock)))
        started = 0
        for key, do in work:
            if key not in self.busy and (key not in self.resting or self.resting[key][0] <= now):
                self.busy[key] = self.pool.submit(_in_thread, do)
                started += 1
        return started

    def _collect(self, now: datetime) -> None:
        for key, future in list(self.busy.items()):
            if not future.done():
                continue
            del self.busy[key]
            if future.result():
                self.resting.pop(key, None)
            else:
                rest = min(REST_CAP, 2 * self.resting[key][1] if key in self.resting else REST)
                self.resting[key] = (now + rest, rest)

    def run(self, *, once: bool = False) -> None:
        """Work until `stop` is set; with `once`, until nothing is due. Then wait for what is under way."""
        try:
            while not self.stop.is_set():
                started = 0
                try:
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
                self.stop.wait(0.05 if started or (once and self.busy) else self.idle)
        finally:
            self.stop.set()
            self.pool.shutdown(wait=True)
            connection.close()


def _in_thread(do: Callable[[], int]) -> int:
    """Run a slice and give its database connection back, whatever happens."""
    try:
        return do()
    except Exception:
        logger.exception("a slice failed")
        return 0
    finally:
        if not transaction.get_connection().in_atomic_block:
            connection.close()
