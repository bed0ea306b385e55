"""Which processes carry out due work, and when they last said so: it tells "nothing is due" from "nobody looks"."""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta

from connectors.models import Heartbeat

EVERY = timedelta(seconds=10)
# A process that has not been seen for this long is taken for dead.
SILENT = timedelta(seconds=60)
KEPT = timedelta(days=1)


def process_name() -> str:
    return f"{socket.gethostname()[:180]}/{os.getpid()}"


def beat(*, name: str, kind: str, at: datetime) -> None:
    """Say that this process looks for work."""
    if not Heartbeat.objects.filter(name=name).update(seen_at=at, kind=kind):
        Heartbeat.objects.bulk_create(
            [Heartbeat(name=name, kind=kind, started_at=at, seen_at=at)], ignore_conflicts=True
        )


def gone(*, name: str) -> None:
    """Say that this process has ended in good order."""
    Heartbeat.objects.filter(name=name).delete()


def forget(now: datetime) -> int:
    """Delete what processes left that died long ago."""
    return Heartbeat.objects.filter(seen_at__lt=now - KEPT).delete()[0]
