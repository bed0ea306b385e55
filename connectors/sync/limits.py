"""What all workers together may ask of one account: rate, waiting times, breaker, and the start after a reconnect.

Everything is kept in the connection's row, so it holds across threads, processes and hosts.

A rate is a token bucket. What an account says of itself (Retry-After, nothing left in the window) is `not_before`. The
breaker opens when too many calls fail; when its wait is over, one caller probes. After a reconnect the first links go
out as a canary, then more at a part of the rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from django.db import connection as database
from django.db import models, transaction
from django.db.models import Case, F, Q, QuerySet, Value, When
from django.db.models.functions import Length

from connectors.exceptions import ConnectionUnusable, ConnectorError, OutcomeUnknown, RetryLater
from connectors.models import Connection, CustomerLink, Issue
from connectors.states import LinkState
from connectors.sync import issues
from connectors.sync.steps import our_fault
from customers.prepared import Param, Prepared

# Waiting times in seconds. A provider that says "0" would be asked again in a tight loop.
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 24 * 3600.0
JITTER = 0.1

# The bucket
BURST = 0.5  # seconds' worth of calls in a full bucket: a system whose own holds a second's worth may get them late
SHORT_WINDOW = 2.0  # seconds
RESERVE = 0.1  # for calls that somebody waits for: of the bucket, and of a day's calls
SKEW = timedelta(seconds=60)  # a time in the bucket that is further ahead was written by a wrong clock
ROUNDING = 2e-6  # times are kept to the microsecond: whoever waits as long as told is not to be a hair too early
NO_RATE = 60.0  # a rate of zero: how long to wait before looking whether it has changed

# The breaker
HISTORY, ENOUGH, FAILING = 50, 20, 0.5
GOOD, FAILED = "1", "0"
FIRST_OPEN, LONGEST_OPEN = 30.0, 900.0
PROBE = timedelta(seconds=60)  # longer than any call: without an answer by then, another caller probes
SUCCESS_EVERY = timedelta(seconds=30)  # how exact `last_success_at` is

# After a reconnect `ramp` counts the canary down to 0, and from there good calls up: from 25 at a quarter of the rate,
# from 50 at half of it, and at 100 it is over.
CANARY, QUARTER, HALF, FULL = 5, 25, 50, 100

_FRESH = ("state", "not_before", "breaker_calls", "breaker_until", "breaker_trips", "ramp", "rate", "burst")
_HEARD = ("breaker_calls", "breaker_until", "breaker_trips", "ramp", "last_success_at")
_BUCKET = ("rate", "burst", "ramp", "bucket_calls", "bucket_at", "day_limit", "day_calls", "day")


_ADMITS = (*_FRESH, "last_success_at")
_ROW = Prepared(lambda: Connection.objects.filter(pk=Param("pk", models.BigAutoField())).values_list(*_ADMITS))


def admit(*, connection: Connection, now: datetime) -> int | None:
    """How many links may be claimed now, by the connection's row as it is; None: as many as one likes.

    0 while it is paused, waits for a login or was told to wait, and while the breaker is open. When the breaker's wait
    is over, one caller gets 1, the probe, and the others 0 until its answer is heard or PROBE has passed; likewise one
    caller gets the canary after a reconnect.
    """
    known = connection.breaker_calls
    for name, value in zip(_ADMITS, _ROW(pk=connection.pk)[0], strict=True):
        setattr(connection, name, value)
    connection.breaker_calls = _longer(connection.breaker_calls, known)
    if connection.state != Connection.State.ACTIVE:
        return 0
    if connection.not_before is not None and connection.not_before > now:
        return 0
    until, ramp = connection.breaker_until, connection.ramp
    if until is not None and until > now:
        return 0
    canary = ramp is not None and ramp <= CANARY
    if until is not None or canary:
        # Empty while a probe is out: this is how `heard` tells its answer from those to calls made before.
        changes = {"breaker_until": now + PROBE, "breaker_calls": ""}
        if not Connection.objects.filter(pk=connection.pk, breaker_until=until).update(**changes):
            return 0
        # The object keeps what it read: for this caller the way is free.
        if until is not None:
            return 1
    if ramp is None:
        return None
    if canary:
        return ramp
    return QUARTER if ramp < HALF else HALF


def reserve(*, connection: Connection, want: int, urgent: bool, now: datetime) -> tuple[int, float]:
    """Take up to `want` calls from the bucket and from the day: how many were granted, and the seconds until the next.

    A part of both is left to urgent callers. Once that part of the bucket is full, all that flows in is anybody's. A
    connection without limits grants everything and asks the database nothing.
    """
    if not limited(connection):
        return want, 0.0
    with transaction.atomic():
        row = _locked(connection).only(*_BUCKET).get()
        want, tomorrow = _of_the_day(row, want, urgent=urgent, now=now)
        if not want:
            return 0, tomorrow
        granted, wait = _of_the_bucket(row, want, urgent=urgent, now=now)
        if granted and row.day_limit is not None:
            _count(row, granted, now)
    return granted, wait


def limited(connection: Connection) -> bool:
    return connection.rate is not None or connection.day_limit is not None


def calls_left(*, connection: Connection, now: datetime) -> float | None:
    """How many calls are in the bucket now; None without a rate. Reads the object, asks the database nothing."""
    return None if connection.rate is None else _left(connection, now)[0]


def give_back(*, connection: Connection, calls: int, now: datetime) -> None:
    """Put calls that were reserved and not made into the bucket again, and into the day."""
    if not limited(connection) or calls <= 0:
        return
    with transaction.atomic():
        row = _locked(connection).only(*_BUCKET).get()
        if row.rate is not None:
            _fill(row, _left(row, now)[0] + calls, now)
        if row.day_limit is not None:
            _count(row, -min(calls, calls_today(row, now)), now)


def heard(
    *,
    connection: Connection,
    calls: Sequence[ConnectorError | None],
    exhausted: float | None,
    now: datetime,
    rng: random.Random,
) -> None:
    """Learn what the answers of some calls say of the account as a whole. One entry per call; None is a good answer.

    `exhausted` is the time in seconds until the account's window starts anew, when nothing is left of it. Lost logins
    are not judged here.
    """
    _wait(connection, calls, exhausted, now, rng)
    marks = "".join(_mark(call) for call in calls)
    good = sum(call is None for call in calls)
    healthy = not connection.breaker_trips and connection.breaker_until is None and connection.ramp is None
    if not marks:
        return
    history = (connection.breaker_calls + marks)[-HISTORY:]
    if healthy and FAILED not in history:
        if not good or not _is_old(connection.last_success_at, now):
            connection.breaker_calls = history
            return
        if _all_is_well(connection, history, now):
            return
    unusable = any(isinstance(call, ConnectionUnusable) for call in calls)
    if _learn(connection, marks, 0 if unusable else good, now):
        _release(connection, now)


def wait_of(error_retry_after: float, rng: random.Random) -> timedelta:
    """How long to wait where a provider asked for so many seconds: a little longer, so that not all come at once."""
    return _jittered(max(SHORTEST_WAIT, error_retry_after), rng)


# The row


def _locked(connection: Connection) -> QuerySet[Connection]:
    # NO KEY: whoever adds a link, run or issue of this connection need not wait. SQLite ignores the row lock: there the
    # IMMEDIATE transaction keeps others out.
    return Connection.objects.select_for_update(no_key=True).filter(pk=connection.pk)


# The bucket


def _speed(row: Connection) -> tuple[float, float]:
    """Calls per second and the size of the bucket, at the present stage after a reconnect."""
    share = 1.0 if row.ramp is None else 0.5 if row.ramp >= HALF else 0.25
    rate = (row.rate or 0.0) * share
    return rate, max(1.0, BURST * rate if row.burst is None else row.burst * share)


def _of_the_bucket(row: Connection, want: int, *, urgent: bool, now: datetime) -> tuple[int, float]:
    if row.rate is None:
        return want, 0.0
    rate, size = _speed(row)
    if rate <= 0:
        return 0, NO_RATE
    calls, ahead = _left(row, now)
    kept = 0.0 if urgent or size < 2 else max(1.0, RESERVE * size)
    granted = max(0, min(want, math.floor(calls - kept + rate * ROUNDING)))
    if granted or ahead:
        _fill(row, calls - granted, now)
    return granted, max(0.0, (kept + 1 - (calls - granted)) / rate)


def _left(row: Connection, now: datetime) -> tuple[float, bool]:
    """How many calls are in the bucket now, and whether its time is too far ahead to be true."""
    rate, size = _speed(row)
    if row.bucket_calls is None or row.bucket_at is None:
        return size, False
    passed = (now - row.bucket_at).total_seconds()
    return min(size, row.bucket_calls + max(0.0, passed) * rate), row.bucket_at - now > SKEW


@transaction.atomic
def _empty(connection: Connection, now: datetime) -> None:
    row = _locked(connection).only(*_BUCKET).get()
    if row.rate is not None and _left(row, now)[0] >= 1:
        _fill(row, 0.0, now)


def _fill(row: Connection, calls: float, now: datetime) -> None:
    # A worker whose clock is a little behind must not make time that has been counted count again.
    ahead = row.bucket_at is not None and timedelta(0) < row.bucket_at - now <= SKEW
    at = row.bucket_at if ahead else now
    Connection.objects.filter(pk=row.pk).update(bucket_calls=calls, bucket_at=at)


# The day


def calls_today(row: Connection, now: datetime) -> int:
    """The calls that were taken on this day."""
    return row.day_calls if row.day == now.astimezone(UTC).date() else 0


def _of_the_day(row: Connection, want: int, *, urgent: bool, now: datetime) -> tuple[int, float]:
    """How many of these calls the day still has for this caller, and the seconds until the next day."""
    if row.day_limit is None:
        return want, 0.0
    today = now.astimezone(UTC)
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC) + timedelta(days=1)
    usable = row.day_limit if urgent else math.floor(row.day_limit * (1 - RESERVE))
    return max(0, min(want, usable - calls_today(row, now))), (midnight - today).total_seconds()


def _count(row: Connection, calls: int, now: datetime) -> None:
    today = now.astimezone(UTC).date()
    Connection.objects.filter(pk=row.pk).update(day_calls=calls_today(row, now) + calls, day=today)


# Waiting times


def _jittered(seconds: float, rng: random.Random) -> timedelta:
    return timedelta(seconds=min(seconds * (1 + rng.uniform(0, JITTER)), LONGEST_WAIT))


def _wait(
    connection: Connection,
    calls: Sequence[ConnectorError | None],
    exhausted: float | None,
    now: datetime,
    rng: random.Random,
) -> None:
    """Keep the longest waiting time that was asked for; a shorter one never ends it sooner.

    A window of a second or two that is used up means that calls came late, not that there were too many: the bucket is
    emptied, and what flows into it goes on flowing. To stop all workers would leave a second unused.
    """
    asked = [call.retry_after for call in calls if isinstance(call, RetryLater) and call.retry_after is not None]
    asked = [max(SHORTEST_WAIT, seconds) for seconds in asked]
    if exhausted is not None:
        if connection.rate is not None and exhausted <= SHORT_WINDOW:
            _empty(connection, now)
        else:
            asked.append(exhausted)
    if not asked:
        return
    until = now + _jittered(max(asked), rng)
    sooner = Q(not_before=None) | Q(not_before__lt=until)
    Connection.objects.filter(sooner, pk=connection.pk).update(not_before=until)
    connection.not_before = max(connection.not_before or until, until)
    if max(asked) >= LONGEST_WAIT:
        issues.open_issue(
            connection=connection,
            kind=Issue.Kind.RATE_LIMIT,
            message=f"{connection.name} asks to wait for a day or longer. It is asked again after a day.",
            details={"until": until.isoformat()},
            at=now,
        )


# The breaker


def _mark(call: ConnectorError | None) -> str:
    """What a call is in the breaker's history: failed if the network or the system did; "" if it says nothing."""
    if isinstance(call, ConnectionUnusable):
        return GOOD if call.status is not None else ""
    if isinstance(call, OutcomeUnknown):
        return "" if our_fault(call) else FAILED
    if isinstance(call, RetryLater) and call.retry_after is None and (call.status is None or call.status >= 500):
        return FAILED
    return GOOD


def _longer(stored: str, known: str) -> str:
    """The stored history, or what this worker has heard and not stored since, while all of it was good."""
    return known if FAILED not in stored + known and len(known) > len(stored) else stored


def _is_old(last_success_at: datetime | None, now: datetime) -> bool:
    return last_success_at is None or now - last_success_at >= SUCCESS_EVERY


def _all_is_well(connection: Connection, history: str, now: datetime) -> bool:
    """Store a success and the good history in one UPDATE. False if another worker has heard of failures."""
    rows = Connection.objects.annotate(known=Length("breaker_calls")).filter(
        pk=connection.pk, breaker_until=None, ramp=None
    )
    longer = Case(When(known__lt=len(history), then=Value(history)), default=F("breaker_calls"))
    if not rows.exclude(breaker_calls__contains=FAILED).update(last_success_at=now, breaker_calls=longer):
        return False
    connection.last_success_at, connection.breaker_calls = now, history
    return True


@transaction.atomic
def _learn(connection: Connection, marks: str, proven: int, now: datetime) -> bool:
    """Bring answers into the row, one worker at a time. Returns whether the breaker has just closed."""
    row = _locked(connection).only(*_HEARD).get()
    before = {name: getattr(row, name) for name in _HEARD}
    closed = _judge(row, _longer(row.breaker_calls, connection.breaker_calls), marks, now)
    if proven:
        if _is_old(row.last_success_at, now):
            row.last_success_at = now
        if row.ramp is not None:
            row.ramp = _climbed(row.ramp, proven)
    changes = {name: getattr(row, name) for name in _HEARD if getattr(row, name) != before[name]}
    if changes:
        Connection.objects.filter(pk=row.pk).update(**changes)
    for name in _HEARD:
        setattr(connection, name, getattr(row, name))
    return closed


def _judge(row: Connection, history: str, marks: str, now: datetime) -> bool:
    if row.breaker_until is None:
        row.breaker_calls = (history + marks)[-HISTORY:]
        failures, seen = row.breaker_calls.count(FAILED), len(row.breaker_calls)
        if FAILED in marks and seen >= ENOUGH and failures >= FAILING * seen:
            _trip(row, now)
        return False
    if row.breaker_until > now and row.breaker_calls:
        return False  # open: these were under way when it opened
    if GOOD in marks:
        tripped = row.breaker_trips > 0
        row.breaker_calls, row.breaker_until, row.breaker_trips = "", None, 0
        return tripped
    if FAILED in marks:
        row.breaker_calls = FAILED
        _trip(row, now)
    return False


def _trip(row: Connection, now: datetime) -> None:
    row.breaker_trips = min(row.breaker_trips + 1, 1000)
    wait = min(FIRST_OPEN * 2 ** min(row.breaker_trips - 1, 16), LONGEST_OPEN)
    row.breaker_until = now + timedelta(seconds=wait)


def _climbed(ramp: int, good: int) -> int | None:
    if ramp <= CANARY:
        return ramp - good if good < ramp else QUARTER
    return ramp + good if ramp + good < FULL else None


def _release(connection: Connection, now: datetime) -> None:
    """Let links that failed with the account be tried again at once instead of sitting out their wait.

    After the commit that closed the breaker: they may be many, and others need the connection's row. What another
    transaction holds is being decided there.
    """
    waiting = CustomerLink.objects.filter(
        connection=connection, state=LinkState.RETRYING, pushed_version__lt=F("needed_version"), next_attempt_at__gt=now
    ).select_for_update(skip_locked=database.features.has_select_for_update_skip_locked)
    due = Case(When(hold_until__gt=now, then=F("hold_until")), default=Value(now))
    with transaction.atomic():
        CustomerLink.objects.filter(pk__in=waiting.values("pk")).update(next_attempt_at=due)
