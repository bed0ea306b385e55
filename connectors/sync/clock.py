"""What time it is for every host that works on one database: leases and fences are compared across hosts."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.db import DatabaseError, connection
from django.db.transaction import TransactionManagementError
from django.utils import timezone

ASK_EVERY = 60.0
# This machine slept, or somebody set its clock: what was carried on since may be wrong.
JUMP = 1.0


@dataclass(frozen=True)
class _Reading:
    """The database's time, and what the two clocks of this machine showed then."""

    at: datetime
    monotonic: float
    machine: float

    def carried_on(self) -> datetime:
        return self.at + timedelta(seconds=time.monotonic() - self.monotonic)

    def is_good(self) -> bool:
        passed = time.monotonic() - self.monotonic
        return passed < ASK_EVERY and abs(time.time() - self.machine - passed) < JUMP


_reading: _Reading | None = None
_asking = threading.Lock()


def database_clock() -> datetime:
    """The time of the database's host: asked at most once a minute, and carried on by the monotonic clock in between.

    SQLite has no host but this machine, and is not asked. Raises DatabaseError only when the time was never known.
    """
    global _reading
    if connection.vendor != "postgresql":
        return timezone.now()
    known = _reading
    if known is not None and known.is_good():
        return known.carried_on()
    # One thread asks. The others go on with what they know: they may hold what it needs to be able to ask.
    mine = _asking.acquire(blocking=False)
    if not mine and known is not None:
        return known.carried_on()
    try:
        known = _reading = _ask()
    except (DatabaseError, TransactionManagementError):
        if known is None:
            raise
    finally:
        if mine:
            _asking.release()
    return known.carried_on()


def _ask() -> _Reading:
    opened = connection.connection is None
    before = time.monotonic()
    try:
        with connection.cursor() as cursor:
            if opened:
                before = time.monotonic()  # the time that it took to connect is none that passed since
            cursor.execute("SELECT clock_timestamp()")
            at: datetime = cursor.fetchone()[0]
    finally:
        if opened and not connection.in_atomic_block:
            connection.close()  # a thread that makes calls keeps no connection
    now = time.monotonic()
    # The database looked at its clock some time between question and answer.
    middle = at.astimezone(UTC) + timedelta(seconds=(now - before) / 2)
    return _Reading(at=middle, monotonic=now, machine=time.time())
