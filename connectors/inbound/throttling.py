"""How many requests each API key may make, however many processes serve them.

A key has a bucket that holds two seconds' worth of requests and fills at the key's rate. Its level is on the key's row,
which every request reads anyway. What a process has let through it writes there a tenth of the bucket at a time, and
at least once a minute in which the key is used; until then only that process knows. So together P processes may let
through (P - 1) tenths of a bucket too much at once, and nothing too much in the long run, because what was let through
is written in the end, and a level may be below zero.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import F

from connectors.models import ApiKey

BURST_SECONDS = 2
PARTS = 10
USED_EVERY = timedelta(minutes=1)

# By the key's hash: requests that this process has let through and not yet written down.
_unwritten: Counter[str] = Counter()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a key has left after a request. `wait` is None when it was let through, else the seconds to wait."""

    limit: int
    remaining: int
    reset: int
    wait: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The most that may come at once, what is left of it, and the seconds until all of it is there again."""
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.reset),
        }


def take(key: ApiKey, *, at: datetime) -> Quota | None:
    """Count a request and note the key's use; None for a key without a limit. `at` is the database's time.

    Needs the key as it was just read.
    """
    rate = settings.API_RATE if key.rate is None else key.rate
    used = key.last_used_at is None or at - key.last_used_at > USED_EVERY
    if rate <= 0:
        if used:
            ApiKey.objects.filter(pk=key.pk, last_used_at=key.last_used_at).update(last_used_at=at)
        return None
    burst = max(1, math.ceil(rate * BURST_SECONDS))
    written = _level(key, rate=rate, burst=burst, at=at)
    with _lock:
        level = written - _unwritten[key.hash]
        passes = level >= 1
        if passes:
            level -= 1
            _unwritten[key.hash] += 1
        due = _unwritten[key.hash]
        writes = used or due * PARTS >= burst
        if writes:
            _unwritten[key.hash] = 0
    if writes:
        _write(key, level=written - due, due=due, at=at)
    return Quota(
        limit=burst,
        remaining=max(0, math.floor(level)),
        reset=math.ceil((burst - level) / rate),
        wait=None if passes else (1 - level) / rate,
    )


def _level(key: ApiKey, *, rate: float, burst: int, at: datetime) -> float:
    if key.bucket_at is None or key.bucket_calls is None:
        return burst
    passed = max(0.0, (at - key.bucket_at).total_seconds())
    return min(burst, key.bucket_calls + passed * rate)


def _write(key: ApiKey, *, level: float, due: int, at: datetime) -> None:
    row = ApiKey.objects.filter(pk=key.pk)
    unmoved = row.filter(bucket_at=key.bucket_at, bucket_calls=key.bucket_calls)
    if not unmoved.update(bucket_calls=level, bucket_at=at, last_used_at=at):
        # Another has written since the key was read, and filled the bucket up to then.
        row.update(bucket_calls=F("bucket_calls") - due)
