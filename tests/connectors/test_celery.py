"""Celery carries the worker's slices: losing messages or workers loses no work, and nothing is sent twice."""

import fcntl
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection as database
from django.utils import timezone

from connectors import worker as working
from connectors.guard import close_shared_client
from connectors.models import Connection, CustomerLink, PushIntent
from connectors.sync.request import request
from connectors.worker import Due
from customers import editing
from customers.models import Organization
from tests.connectors.test_worker import (  # noqa: F401 # `wire` is a fixture
    ACTOR,
    FULL,
    Wire,
    child_environment,
    customers_of,
    stored,
    system,
    wire,
)

BROKER = "redis://127.0.0.1:6379/15"
QUEUE = "customer-hub"


def _answers() -> bool:
    try:
        with socket.create_connection(("127.0.0.1", 6379), timeout=1) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
    except OSError:
        return False


with_redis = pytest.mark.skipif(not _answers(), reason="no Redis answers at 127.0.0.1:6379")


@pytest.fixture
def redis() -> Iterator[Any]:
    """Redis' database 15, empty, for this test alone."""
    from redis import Redis

    with (Path(tempfile.gettempdir()) / "customer-hub-tests-redis-15.lock").open("w") as lock:
        last = time.monotonic() + (3600 if os.environ.get("HUB_FULL") else 180)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < last, f"another test has held {lock.name} for minutes"
                time.sleep(0.1)
        client = Redis(port=6379, db=15)
        client.flushdb()
        yield client
        client.flushdb()
        client.close()


@pytest.fixture
def carrier(settings: Any) -> Iterator[ModuleType]:
    """The Celery module inside this process, as fresh as after a start."""
    settings.CELERY_BROKER_URL = BROKER
    module = importlib.import_module("connectors.celery")
    module._rests.until.clear()
    module._next_look = 0.0
    yield module
    close_shared_client()


# Processes. Leases and looks are shortened, so that the tests need not wait for them.

SHORT = """
import sys
from datetime import timedelta
import django
django.setup()
import connectors.worker
from connectors.provider import Capabilities
from connectors.providers.cheqpay import Cheqpay
import connectors.sync.claim
before, short = connectors.sync.claim.LEASE, timedelta(seconds=4)
for name, module in list(sys.modules.items()):
    if name.startswith("connectors.sync.") and getattr(module, "LEASE", None) is before:
        module.LEASE = short
Cheqpay.capabilities = lambda *ignored: Capabilities(upsert_external_id=True, fetches=True, max_request_life=1.0)
connectors.worker.STOP_SECONDS = {stop}
import connectors.celery
from connectors.celery import app
assert connectors.celery.LEASE is short
connectors.celery.LOOK_SECONDS = app.conf.beat_schedule["look"]["schedule"] = 1.0
"""


class Processes:
    """Celery in processes of their own, with their logs."""

    def __init__(self, directory: Path, *, stop: float = 28.0) -> None:
        self.directory = directory
        (directory / "short.py").write_text(SHORT.format(stop=stop))
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, app: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = f"{self.directory}{os.pathsep}{django_settings.BASE_DIR}"
        with (self.directory / f"{len(self.children)}.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, *arguments],
                env=child_environment(CELERY_BROKER_URL=BROKER, PYTHONPATH=path),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self.children.append(child)
        return child

    def worker(self, app: str = "short") -> subprocess.Popen[bytes]:
        return self.start(app, "worker", "--pool", "threads", "--concurrency", "8")

    def beat(self, app: str = "short") -> subprocess.Popen[bytes]:
        return self.start(app, "beat")

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("*.log")))

    def until(self, reached: Callable[[], object], seconds: float = 60.0) -> None:
        last = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < last, self.logs()
            time.sleep(0.02)

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        # The server ends the sessions of a killed process a moment later: the database cannot be dropped before.
        last = time.monotonic() + 10
        while others() and time.monotonic() < last:
            time.sleep(0.05)


def others() -> int:
    """How many other sessions the tests' database has."""
    if database.vendor != "postgresql":
        return 0
    with database.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def dirty() -> int:
    return sum(link.is_dirty for link in CustomerLink.objects.all())


@with_redis
@pytest.mark.parametrize(
    ("number", "app"),
    [(200, "short"), pytest.param(2000, "connectors.celery", marks=FULL, id="2000, as it comes")],
)
@pytest.mark.django_db(transaction=True)
def test_a_flushed_broker_loses_nothing_and_doubles_nothing(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    tmp_path: Path,
    number: int,
    app: str,
) -> None:
    def slowly(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        time.sleep(0.05)
        return stored(name, method, path, body)

    wire.answer = slowly
    customers_of(organization, 1)
    for n in range(number):
        request(connection=system(connect, wire, f"system{n}"), actor=ACTOR)
    with ExitStack() as stack:
        celery = Processes(tmp_path)
        stack.callback(celery.close)
        celery.worker(app)
        celery.beat(app)
        celery.until(lambda: len(wire.calls) >= number * 0.3)
        assert redis.llen(QUEUE) > number * 0.2
        redis.flushdb()
        celery.until(lambda: len(wire.calls) >= number, 60.0 + number / 10)
        celery.until(lambda: dirty() == 0)
    assert Counter(name for name, _, _ in wire.calls) == Counter(f"system{n}" for n in range(number))
    assert not [name for name in os.listdir(tmp_path) if "beat" in name]


@with_redis
@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=FULL)])
@pytest.mark.django_db(transaction=True)
def test_what_a_killed_worker_was_sending_is_taken_over_when_its_lease_is_over(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    tmp_path: Path,
    number: int,
) -> None:
    records: dict[str, dict[str, Any]] = {}
    arrivals: Counter[str] = Counter()
    lock = threading.Lock()

    def upsert(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        assert (method, path) == ("POST", "customers/add-update")
        with lock:
            key = f"{name}/{body['externalId']}"
            arrivals[key] += 1
            records[key] = {**records.get(key, {"active": True, "createdAt": "2026-11-20T00:00:00Z"}), **body}
        time.sleep(0.1)
        return 200, records[key]

    wire.answer = upsert
    customers_of(organization, number)
    for n in range(2):
        request(connection=system(connect, wire, f"merchant{n}", provider="cheqpay"), actor=ACTOR)
    with ExitStack() as stack:
        celery = Processes(tmp_path)
        stack.callback(celery.close)
        victim = celery.worker()
        celery.beat()
        # Some are kept by then, and some are not.
        celery.until(lambda: len(arrivals) >= number * 0.5 and dirty() < 2 * number - 1)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        unanswered = PushIntent.objects.filter(outcome=PushIntent.Outcome.OPEN).select_related("link__connection")
        in_flight = {f"{intent.link.connection.account}/{intent.link.uid}" for intent in unanswered}
        assert 0 < len(in_flight) < dirty() + 1 < 2 * number
        celery.worker()
        celery.until(lambda: dirty() == 0, 60.0 + number / 5)
    uids = {f"{link.connection.account}/{link.uid}" for link in CustomerLink.objects.select_related("connection")}
    assert set(records) == uids
    assert len(records) == 2 * number
    again = {key for key, times in arrivals.items() if times > 1}
    assert again <= in_flight
    assert all(arrivals[key] == 2 for key in again)
    assert set(CustomerLink.objects.values_list("remote_id", flat=True)) == {key.partition("/")[2] for key in uids}


@with_redis
@pytest.mark.django_db(transaction=True)
def test_a_worker_ends_in_time_though_a_system_never_answers(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
    tmp_path: Path,
) -> None:
    wire.answer = lambda name, method, path, body: None
    customers_of(organization, 1)
    books = system(connect, wire, "books")
    request(connection=books, actor=ACTOR)
    carrier.push.apply_async((books.pk,))
    with ExitStack() as stack:
        celery = Processes(tmp_path, stop=2.0)
        stack.callback(celery.close)
        worker = celery.worker()
        celery.until(lambda: wire.calls)
        asked = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0
        assert 2 <= time.monotonic() - asked < 5
    assert "ending with slices under way: push" in celery.logs()
    assert PushIntent.objects.get().outcome == PushIntent.Outcome.OPEN


# Messages are hints


@with_redis
@pytest.mark.django_db(transaction=True)
def test_ten_edits_or_ten_thousand_cost_one_message_for_a_connection(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
) -> None:
    customers = customers_of(organization, 20)
    request(connection=system(connect, wire, "books"), actor=ACTOR)
    for n in range(10):
        values = {customer.pk: {"phone": f"+4930{n}"} for customer in customers}
        editing.update(organization=organization, values=values, actor=ACTOR)
    assert redis.llen(QUEUE) == 0
    CustomerLink.objects.update(next_attempt_at=timezone.now() - timedelta(seconds=1))
    carrier.look()
    assert redis.llen(QUEUE) == 1
    carrier.look()  # a second look that had waited in the queue
    assert redis.llen(QUEUE) == 1


@with_redis
@pytest.mark.django_db(transaction=True)
def test_look_publishes_what_is_due_and_not_served(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
) -> None:
    customers_of(organization, 2)
    due, served, died = (system(connect, wire, name) for name in ("due", "served", "died"))
    for connection in (due, served, died):
        request(connection=connection, actor=ACTOR)
    system(connect, wire, "read", direction=Connection.Direction.PULL, pull_interval=60)
    system(connect, wire, "idle")
    for connection, lease in ((served, timedelta(seconds=55)), (died, timedelta(seconds=25))):
        first = CustomerLink.objects.filter(connection=connection)[:1].get()
        CustomerLink.objects.filter(pk=first.pk).update(lease_token="t", lease_until=timezone.now() + lease)
    carrier.look()
    published = Counter(task for (task,) in _published(redis))
    assert published == {"hub.push": 2, "hub.pull": 1}
    assert carrier.push(served.pk) is None
    assert wire.calls == []


def _published(redis: Any) -> list[tuple[str]]:
    import json

    return [(json.loads(message)["headers"]["task"],) for message in redis.lrange(QUEUE, 0, -1)]


@with_redis
@pytest.mark.django_db(transaction=True)
def test_a_push_with_work_left_publishes_itself(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(working, "SLICE_LINKS", 2)
    customers_of(organization, 3)
    books = system(connect, wire, "books")
    request(connection=books, actor=ACTOR)
    carrier.push(books.pk)
    assert (len(wire.calls), redis.llen(QUEUE)) == (2, 1)
    redis.flushdb()
    carrier.push(books.pk)
    redis.flushdb()
    carrier.push(books.pk)  # nothing is left
    assert (len(wire.calls), redis.llen(QUEUE)) == (3, 0)


@with_redis
@pytest.mark.django_db(transaction=True)
def test_a_message_that_is_late_or_doubled_does_nothing(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
) -> None:
    def slowly(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        time.sleep(0.3)
        return stored(name, method, path, body)

    wire.answer = slowly
    customers_of(organization, 5)
    books = system(connect, wire, "books")
    request(connection=books, actor=ACTOR)
    threads = [threading.Thread(target=carrier.push, args=(books.pk,)) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    ended = []
    for thread in reversed(threads):
        thread.join()
        ended.append(time.monotonic() - began)
    assert ended[0] < 0.3 < ended[-1]  # the doubles did not wait for the first
    assert len(wire.calls) == 5
    carrier.push(books.pk)
    carrier.pull(books.pk)
    carrier.push(-1)
    carrier.batch(-1)
    assert len(wire.calls) == 5


@with_redis
@pytest.mark.django_db(transaction=True)
def test_a_doubled_message_does_not_wait_where_the_rate_keeps_the_first_waiting(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    redis: Any,
    carrier: ModuleType,
) -> None:
    customers_of(organization, 3)
    books = system(connect, wire, "books", rate=1.0, burst=1)
    request(connection=books, actor=ACTOR)
    first = threading.Thread(target=carrier.push, args=(books.pk,))
    first.start()
    while not wire.calls:
        time.sleep(0.01)
    time.sleep(0.3)
    began = time.monotonic()
    carrier.push(books.pk)
    assert time.monotonic() - began < 0.3
    first.join()
    assert len(wire.calls) == 3


@pytest.mark.django_db(transaction=True)
def test_a_push_survives_a_broker_that_is_down(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,  # noqa: F811 # the fixture
    carrier: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def down(kind: str, pk: int) -> None:
        raise carrier.OperationalError("connection refused")

    monkeypatch.setattr(carrier, "_publish", down)
    customers_of(organization, 1)
    books = system(connect, wire, "books")
    request(connection=books, actor=ACTOR)
    carrier.push(books.pk)
    assert len(wire.calls) == 1
    assert "the broker takes no messages" in caplog.text


def test_organizations_take_turns_in_the_queue(carrier: ModuleType) -> None:
    waiting = [*(Due("push", n, 1) for n in range(50)), Due("push", 50, 2), Due("push", 51, 2)]
    order = [one.organization_id for one in carrier._fairly(waiting)]
    assert sorted(order[:2]) == sorted(order[2:4]) == [1, 2]
    assert order[4:] == [1] * 48


def test_a_message_is_kept_until_its_slice_has_ended_and_is_never_planned_for_later(carrier: ModuleType) -> None:
    conf = carrier.app.conf
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (True, True)
    assert (conf.worker_prefetch_multiplier, conf.task_ignore_result, conf.worker_pool) == (1, True, "threads")
    assert conf.accept_content == ["json"]
    assert conf.beat_schedule["look"]["schedule"] <= 5
    # Redis delivers again what is not acknowledged within an hour: no turn may come near that.
    assert max(working.SLICE, working.PULL_SLICE) <= timedelta(minutes=6)


# Without it


def imported(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "hub.settings", **variables},
        cwd=django_settings.BASE_DIR,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_celery_the_message_names_the_extra() -> None:
    found = imported("import sys; sys.modules['celery'] = None; import connectors.celery", CELERY_BROKER_URL=BROKER)
    assert found.returncode == 1
    assert "uv sync --extra celery" in found.stderr.splitlines()[-1]


def test_without_a_broker_the_message_names_the_setting() -> None:
    found = imported("import connectors.celery", CELERY_BROKER_URL="")
    assert found.returncode == 1
    assert "CELERY_BROKER_URL is empty" in found.stderr.splitlines()[-1]


def test_nothing_else_needs_celery() -> None:
    script = (
        "import sys; sys.modules['celery'] = sys.modules['kombu'] = None; import django; django.setup();"
        "import hub.urls, connectors.worker, connectors.admin.links, connectors.management.commands.serve"
    )
    found = imported(script, CELERY_BROKER_URL=BROKER)
    assert found.returncode == 0, found.stderr
