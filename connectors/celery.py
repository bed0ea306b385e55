"""The worker's slices carried by Celery, for those who run it anyway.

    celery -A connectors.celery worker --pool threads --concurrency 8
    celery -A connectors.celery beat

A message carries an id and means "look now". It may be lost, doubled or late: each task asks the database whether there
is anything due. Every few seconds `look` publishes a message for each connection that is due and that nobody serves, so
losing all messages delays work by no more than that. Nothing else publishes on its own: an edit costs no message.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import partial
from itertools import zip_longest
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

try:
    from celery import Celery
    from celery.schedules import crontab
    from celery.signals import worker_ready, worker_shutting_down
    from kombu.exceptions import OperationalError
except ImportError as error:
    raise ImportError(
        "Celery is not installed. Install the extra `celery` as well: uv sync --extra celery (or pip install"
        " 'celery[redis]~=5.7.0')."
    ) from error

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
if not apps.ready:
    django.setup()

from django.db.models import Exists, F, OuterRef, QuerySet

from connectors.models import Connection, CustomerLink
from connectors.sync import heartbeat
from connectors.sync.claim import LEASE
from connectors.sync.clock import database_clock
from connectors.worker import SLICES, Due, Rests, due_work, housekeep, in_thread, stop_in_time

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
LOOK_MESSAGES = 1000
# What has waited longer than this is dropped: `look` has published it again. More than clocks of hosts may differ.
MESSAGE_SECONDS = 60.0

if not settings.CELERY_BROKER_URL:
    raise ImproperlyConfigured(
        "CELERY_BROKER_URL is empty: set it to the address of the broker, such as redis://127.0.0.1:6379/0, or run"
        " `manage.py run_worker`, which needs none."
    )

app = Celery("hub")
app.conf.update(
    broker_url=settings.CELERY_BROKER_URL,
    broker_connection_retry_on_startup=True,
    task_default_queue="customer-hub",
    accept_content=["json"],
    task_ignore_result=True,
    # A message is gone when its slice has ended, not when a worker has seen it. A worker takes no more than it can run.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    # Slices wait for other systems, and only in one process can they share PostgreSQL's pool.
    worker_pool="threads",
    worker_hijack_root_logger=False,  # what is logged, and where, is for the settings to say
    beat_scheduler="celery.beat:Scheduler",  # in memory: there is nothing worth a file
    beat_schedule={
        "look": {"task": "hub.look", "schedule": LOOK_SECONDS, "options": {"expires": MESSAGE_SECONDS}},
        # By the clock, so that a beat which is often restarted comes to it.
        "housekeeping": {"task": "hub.housekeeping", "schedule": crontab(minute="17")},
    },
)

# Of this process. Other processes are told apart by the leases that they hold.
_lock = threading.Lock()
_under_way: set[Due] = set()
_rests = Rests()
_next_look = 0.0
_stopping = threading.Event()
_told: queue.SimpleQueue[bool] = queue.SimpleQueue()


@app.task(name="hub.look")
def look() -> None:
    """Publish one message for each connection that is due and that nobody serves."""
    global _next_look
    with _lock:
        if time.monotonic() < _next_look:
            return  # messages have piled up while all threads were busy
        _next_look = time.monotonic() + LOOK_SECONDS / 2
    now = database_clock()
    # One process tells for all: where no process takes this message, none takes the others either.
    heartbeat.beat(name=heartbeat.process_name(), kind="celery", at=now)
    found = due_work(now=now)
    served = set(_served(now).values_list("pk", flat=True))
    with _lock:
        _rests.forget(but={Due(one.kind, one.pk) for one in found})
    waiting = [one for one in found if one.kind != "push" or one.pk not in served]
    for one, _ in zip(_fairly(waiting), range(LOOK_MESSAGES), strict=False):
        _publish(one.kind, one.pk)


@app.task(name="hub.push")
def push(connection_id: int) -> None:
    """Push for one turn. What is left is published at once."""
    if not _served(database_clock()).filter(pk=connection_id).exists() and _run("push", connection_id):
        try:
            _publish("push", connection_id)
        except OperationalError as error:
            logger.warning("the broker takes no messages, the next look does it: %s", error)


@app.task(name="hub.pull")
def pull(connection_id: int) -> None:
    """Pull for one turn. `look` finds what is left."""
    _run("pull", connection_id)


@app.task(name="hub.batch")
def batch(run_id: int) -> None:
    """Carry out an API batch."""
    _run("batch", run_id)


@app.task(name="hub.housekeeping")
def housekeeping() -> None:
    housekeep(stop=_stopping.is_set)


TASKS = {"push": push, "pull": pull, "batch": batch}


def _publish(kind: str, pk: int) -> None:
    TASKS[kind].apply_async((pk,), expires=MESSAGE_SECONDS)


def _fairly(waiting: Iterable[Due]) -> Iterator[Due]:
    """One of each organization, then a second of each: a large one does not stand in the others' way.

    By chance inside an organization, so that whatever is dropped or left out is another one each time.
    """
    by_organization: defaultdict[int, list[Due]] = defaultdict(list)
    for one in waiting:
        by_organization[one.organization_id].append(one)
    queues = list(by_organization.values())
    random.shuffle(queues)
    for line in queues:
        random.shuffle(line)
    for row in zip_longest(*queues):
        yield from filter(None, row)


def _served(now: datetime) -> QuerySet[Connection]:
    """Connections that some process pushes to. Leases are renewed long before half of them is over."""
    held = CustomerLink.objects.filter(
        connection=OuterRef("pk"),
        pushed_version__lt=F("needed_version"),
        next_attempt_at__isnull=False,
        lease_until__gt=now + LEASE / 2,
    )
    return Connection.objects.filter(Exists(held), direction__in=Connection.PUSHING)


def _run(kind: str, pk: int) -> bool:
    """Run a slice, unless this process is at it or it rests. Returns whether it came to something."""
    one = Due(kind, pk)
    now = database_clock()
    with _lock:
        if one in _under_way or _rests.rests(one, now=now):
            return False
        _under_way.add(one)
    done: int | None = None
    try:
        done = in_thread(partial(SLICES[kind], pk, stop=_stopping.is_set))
    finally:
        now = database_clock()
        with _lock:
            _under_way.discard(one)
            _rests.ended(one, done, now=now)
    return bool(done)


@worker_ready.connect
def _stand_by(**signal: Any) -> None:
    """Slices end when the worker is told to, and the worker with them, as `manage.py run_worker` does."""
    threading.Thread(
        target=stop_in_time,
        args=(_told,),
        kwargs={"stop": _stopping.set, "under_way": lambda: tuple(_under_way)},
        name="stopper",
        daemon=True,
    ).start()


@worker_shutting_down.connect
def _stop(**signal: Any) -> None:
    _told.put(True)
