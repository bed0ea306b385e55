"""The worker finds what is due in the database and needs nothing else to be told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.conf import settings as django_settings
from django.db import connection as database
from django.utils import timezone

from connectors import worker as working
from connectors.guard import close_shared_client
from connectors.models import ApiKey, Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync import runs
from connectors.sync.claim import due_connections
from connectors.sync.push import push
from connectors.sync.request import request
from connectors.worker import Worker, housekeep
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.fake import in_process, register

ACTOR = Actor(kind="user", name="Tester")


class Wire:
    """Systems over a real socket. The first part of a path is the name of the connection that calls.

    `answer` makes of name, method, the rest of the path and the body a status and a body, or None: no answer, ever.
    """

    def __init__(self, answer: Callable[[str, str, str, Any], tuple[int, Any] | None]) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str, Any]] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                _, name, path = self.path.split("/", 2)
                with wire.lock:
                    wire.calls.append((name, self.command, body))
                answered = wire.answer(name, self.command, path, body)
                if answered is None:
                    wire.closed.wait()
                    self.close_connection = True
                    return
                content = json.dumps(answered[1]).encode()
                self.send_response(answered[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:  # the caller was killed
                    self.close_connection = True

            do_GET = do_POST = do_PUT = handle_one  # noqa: N815 # the names that the base class asks for

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign] # callers are killed here
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def stored(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
    """Links, as it answers a create or lists nothing."""
    if method == "GET":
        return 200, {"data": [], "page": 1, "limit": 100, "totalPages": 1, "totalResults": 0}
    return 201, {"data": {"id": f"{name}-{body['name']}", **body}}


@pytest.fixture
def wire(settings: Any) -> Iterator[Wire]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    made = Wire(stored)
    yield made
    close_shared_client()
    made.close()


def child_environment(**variables: str) -> dict[str, str]:
    """What a process of its own needs to work on the tests' database and to reach this machine."""
    login = database.settings_dict
    url = f"sqlite:///{login['NAME']}"
    if database.vendor == "postgresql":
        user = quote(login["USER"]) + (f":{quote(login['PASSWORD'])}" if login["PASSWORD"] else "")
        url = f"postgres://{user}@{login['HOST']}:{login['PORT'] or 5432}/{login['NAME']}"
    ours = {
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
        "LOG_LEVEL": "WARNING",
        "PYTHONPATH": str(django_settings.BASE_DIR),
    }
    return {**os.environ, **ours, **variables}


def system(connect: Callable[..., Connection], wire: Wire, name: str, **fields: Any) -> Connection:
    given = {"direction": Connection.Direction.PUSH, "credentials": {"api_key": "k"}, "account": name, **fields}
    return connect(given.pop("provider", "links"), name=name, base_url=f"{wire.url}/{name}", **given)


def customers_of(organization: Organization, number: int, prefix: str = "Example") -> list[Customer]:
    values = [{"name": f"{prefix} {n}", "email": f"{n}@example.com"} for n in range(number)]
    return editing.create(organization=organization, values=values, actor=ACTOR)


@pytest.fixture
def partner(
    transactional_db: None,
    other_organization: Organization,
    connect: Callable[..., Connection],
    live_server: object,
    settings: Any,
) -> Connection:
    """A connection that reaches another organization of the same hub over a real socket."""
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8", "::1/128"]
    key = ApiKey.issue(organization=other_organization, name="demo")[1]
    return connect(
        "links",
        name="partner",
        direction=Connection.Direction.PUSH,
        base_url=f"{live_server}/api/v1",
        credentials={"api_key": key},
    )


def work() -> None:
    try:
        Worker(threads=2).run(once=True)
    finally:
        close_shared_client()


@pytest.mark.django_db(transaction=True)
def test_what_is_due_is_sent_and_arrives(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(20)]
    customers = editing.create(organization=organization, values=values, actor=ACTOR)
    request(connection=partner, actor=ACTOR)
    work()
    arrived = Customer.objects.filter(organization=other_organization)
    assert sorted(arrived.values_list("email", flat=True)) == sorted(c.email for c in customers)
    assert not [link for link in CustomerLink.objects.all() if link.is_dirty]

    editing.update(organization=organization, values={customers[0].pk: {"phone": "+4930123456"}}, actor=ACTOR)
    CustomerLink.objects.update(next_attempt_at=timezone.now() - timedelta(seconds=1))
    work()
    assert arrived.get(email=customers[0].email).phone == "+4930123456"


@pytest.mark.django_db(transaction=True)
def test_a_paused_connection_sends_nothing(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    request(connection=partner, actor=ACTOR)
    Connection.objects.update(state=Connection.State.PAUSED)
    work()
    assert not Customer.objects.filter(organization=other_organization).exists()


@pytest.mark.django_db(transaction=True)
def test_new_customers_of_an_automatic_connection_need_no_request(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    Connection.objects.update(create_policy=Connection.CreatePolicy.AUTOMATIC)
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    # The edit was made by this machine's clock, the worker goes by the database's, which may be a moment behind.
    CustomerLink.objects.update(next_attempt_at=timezone.now() - timedelta(seconds=1))
    work()
    assert Customer.objects.get(organization=other_organization).email == "a@example.com"


@pytest.mark.django_db(transaction=True)
def test_a_worker_stops_when_told(transactional_db: None) -> None:
    worker = Worker(threads=1, idle=0.05)
    thread = threading.Thread(target=worker.run)
    thread.start()
    worker.stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()


# Fair shares


def served(wire: Wire, apart: str) -> str:
    """The slices in the order in which they were served: S for the connection set apart, o for another."""
    order: list[str] = []
    for name, _, _ in wire.calls:
        if not order or order[-1] != name:
            order.append(name)
    return "".join("S" if name == apart else "o" for name in order)


@pytest.mark.django_db(transaction=True)
def test_a_small_organization_gets_every_second_slice_beside_one_with_fifty_connections(
    organization: Organization,
    other_organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(working, "SLICE_LINKS", 2)
    customers_of(organization, 1)
    for n in range(50):
        request(connection=system(connect, wire, f"large{n}"), actor=ACTOR)
    customers_of(other_organization, 30)
    request(connection=system(connect, wire, "small", organization=other_organization), actor=ACTOR)
    try:
        Worker(threads=1).run(once=True)
    finally:
        close_shared_client()
    order = served(wire, "small")
    assert (order.count("S"), order.count("o")) == (15, 50)
    assert order[: 2 * 15 - 1] in ("So" * 14 + "S", "oS" * 14 + "o")


@pytest.mark.django_db(transaction=True)
def test_a_backlog_has_its_second_slice_when_each_small_connection_of_its_organization_had_one(
    organization: Organization, connect: Callable[..., Connection], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "SLICE_LINKS", 2)
    ids = [one.pk for one in customers_of(organization, 10)]
    request(connection=system(connect, wire, "backlog"), actor=ACTOR)
    for n in range(30):
        request(connection=system(connect, wire, f"small{n}"), actor=ACTOR, customer_ids=ids[:1])
    try:
        Worker(threads=1).run(once=True)
    finally:
        close_shared_client()
    assert served(wire, "backlog") == "S" + "o" * 30 + "S"
    assert len(wire.calls) == 10 + 30


@pytest.mark.django_db(transaction=True)
def test_of_two_threads_a_large_organization_never_has_both_while_another_waits(
    organization: Organization,
    other_organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(working, "SLICE_LINKS", 1)
    lock = threading.Lock()
    under_way: list[str] = []
    beside: list[set[str]] = []

    def slow(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        with lock:
            under_way.append(name)
            beside.append(set(under_way))
        time.sleep(0.02 if name == "small" else 0.2)
        with lock:
            under_way.remove(name)
        return stored(name, method, path, body)

    wire.answer = slow
    customers_of(organization, 1)
    for n in range(20):
        request(connection=system(connect, wire, f"large{n}"), actor=ACTOR)
    customers_of(other_organization, 10)
    request(connection=system(connect, wire, "small", organization=other_organization), actor=ACTOR)
    try:
        Worker(threads=2).run(once=True)
    finally:
        close_shared_client()
    last = max(position for position, names in enumerate(beside) if "small" in names)
    both = [names for names in beside[:last] if len(names) == 2 and "small" not in names]
    assert not both
    assert len(wire.calls) == 30


@pytest.mark.django_db(transaction=True)
def test_what_comes_to_nothing_is_not_asked_in_circles(
    organization: Organization, connect: Callable[..., Connection], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice that fails before it claims anything leaves its links due."""
    asked: list[float] = []

    def broken(connection_id: int, **how: Any) -> int | None:
        asked.append(time.monotonic())
        raise RuntimeError("the login server is down")

    monkeypatch.setitem(working.SLICES, "push", broken)
    customers_of(organization, 1)
    request(connection=system(connect, wire, "books"), actor=ACTOR)
    worker = Worker(threads=2, idle=0.05)
    thread = threading.Thread(target=worker.run)
    thread.start()
    time.sleep(4)
    worker.stop.set()
    thread.join(timeout=10)
    assert len(asked) == 3  # at once, after 1 s, after 2 s more
    assert asked[2] - asked[1] > 1.8


# Stopping


def started_worker(script: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", f"import django; django.setup()\n{script}"],
            env=child_environment(),
            cwd=django_settings.BASE_DIR,
            stdout=file,
            stderr=file,
        )


FULL = pytest.mark.skipif(not os.environ.get("HUB_FULL"), reason="takes half a minute each: set HUB_FULL=1")


@pytest.mark.parametrize(
    ("call_seconds", "stop_seconds", "known"),
    [
        pytest.param(2.0, 20.0, True, id="calls end by their deadline"),
        pytest.param(60.0, 2.0, False, id="the process ends though a call hangs"),
        pytest.param(working.CALL_SECONDS, working.STOP_SECONDS, True, id="as set", marks=FULL),
        pytest.param(60.0, working.STOP_SECONDS, False, id="as set, though a call hangs", marks=FULL),
    ],
)
@pytest.mark.django_db(transaction=True)
def test_a_worker_ends_in_time_though_a_system_never_answers(
    organization: Organization,
    connect: Callable[..., Connection],
    wire: Wire,
    tmp_path: Path,
    call_seconds: float,
    stop_seconds: float,
    known: bool,
) -> None:
    wire.answer = lambda name, method, path, body: None
    customers_of(organization, 1)
    request(connection=system(connect, wire, "books"), actor=ACTOR)
    script = f"""
from django.core.management import call_command
from connectors import worker
worker.CALL_SECONDS, worker.STOP_SECONDS = {call_seconds}, {stop_seconds}
session = worker._session
def hanging(*known):
    found = session(*known)
    found.deadline = {call_seconds}
    return found
if {not known}:
    worker._session = hanging
call_command("run_worker", threads=2)
"""
    process = started_worker(script, tmp_path / "worker.log")
    try:
        until = time.monotonic() + 30
        while not wire.calls:
            assert process.poll() is None, (tmp_path / "worker.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 0
        took = time.monotonic() - asked
    finally:
        process.kill()
        process.wait()
    log = (tmp_path / "worker.log").read_text()
    assert took < 30
    assert len(wire.calls) == 1
    intent = PushIntent.objects.get()
    if known:
        assert took < call_seconds + 2
        assert intent.outcome == PushIntent.Outcome.UNCERTAIN
        assert "uncertain" not in log
    else:
        assert stop_seconds <= took < stop_seconds + 2
        assert intent.outcome == PushIntent.Outcome.OPEN
        assert f"ending with slices under way: push {intent.link.connection_id}." in log
        assert CustomerLink.objects.get().lease_token


def test_calls_end_before_the_process_does_and_the_process_before_it_is_killed() -> None:
    assert working.CALL_SECONDS + 2 < working.STOP_SECONDS
    assert working.STOP_SECONDS + 1 < 30


# Pulls


def pulled(connect: Callable[..., Connection], wire: Wire, **fields: Any) -> Connection:
    return system(connect, wire, "books", direction=Connection.Direction.PULL, **fields)


def due(connection: Connection) -> bool:
    return working.due_pulls(now=timezone.now()).filter(pk=connection.pk).exists()


@pytest.mark.django_db(transaction=True)
def test_an_interval_is_pulled_at_once_and_then_when_it_is_over(connect: Callable[..., Connection], wire: Wire) -> None:
    books = pulled(connect, wire, pull_interval=3600)
    work()
    work()
    assert [call[:2] for call in wire.calls] == [("books", "GET")]
    books.refresh_from_db()
    assert books.next_pull_at is not None
    assert timedelta(minutes=59) < books.next_pull_at - timezone.now() <= timedelta(hours=1)


@pytest.mark.django_db(transaction=True)
def test_a_schedule_is_pulled_when_its_time_comes_and_not_when_it_is_entered(
    connect: Callable[..., Connection], wire: Wire
) -> None:
    books = pulled(connect, wire, pull_cron="30 2 * * 0")
    work()
    assert wire.calls == []
    books.refresh_from_db()
    assert books.next_pull_at is not None
    assert (books.next_pull_at.weekday(), books.next_pull_at.hour, books.next_pull_at.minute) == (6, 2, 30)
    Connection.objects.update(next_pull_at=timezone.now() - timedelta(seconds=1))
    work()
    assert len(wire.calls) == 1
    books.refresh_from_db()
    assert books.next_pull_at > timezone.now()


@pytest.mark.django_db(transaction=True)
def test_only_connections_with_an_interval_or_a_schedule_are_due(
    connect: Callable[..., Connection], wire: Wire
) -> None:
    books = pulled(connect, wire)
    assert not due(books)
    for fields, expected in (
        ({"pull_interval": 60}, True),
        ({"pull_interval": 0}, False),
        ({"pull_interval": None, "pull_cron": "* * * * *"}, True),
        ({"not_before": timezone.now() + timedelta(hours=1)}, False),
        ({"not_before": None, "pull_until": timezone.now() + timedelta(minutes=1)}, False),
        ({"pull_until": None, "next_pull_at": timezone.now() + timedelta(minutes=1)}, False),
        ({"next_pull_at": None, "state": Connection.State.PAUSED}, False),
        ({"state": Connection.State.ACTIVE, "direction": Connection.Direction.PUSH}, False),
    ):
        Connection.objects.update(**fields)
        assert due(books) is expected, fields


@pytest.mark.django_db(transaction=True)
def test_a_failed_pull_of_a_weekly_schedule_is_tried_again_within_the_hour(
    connect: Callable[..., Connection], wire: Wire
) -> None:
    wire.answer = lambda name, method, path, body: (500, {"message": "Broken."})
    books = pulled(connect, wire, pull_cron="30 2 * * 0", next_pull_at=timezone.now() - timedelta(seconds=1))
    work()
    books.refresh_from_db()
    assert books.next_pull_at is not None
    assert timedelta(0) < books.next_pull_at - timezone.now() <= timedelta(hours=1)


@pytest.mark.django_db(transaction=True)
def test_a_long_list_is_read_in_turns(
    connect: Callable[..., Connection], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn ends when its time is over, after a page at the least; the next goes on where it stopped."""
    pages: list[str] = []

    def listed(name: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        time.sleep(0.3)
        number = int(path.partition("page=")[2].partition("&")[0])
        pages.append(path.partition("page=")[2].partition("&")[0])
        row = {"id": f"c{number}", "name": f"Example {number}", "email": f"{number}@example.com"}
        return 200, {"data": [row], "page": number, "limit": 100, "totalPages": 5, "totalResults": 5}

    wire.answer = listed
    # Long enough to ask for the first page, over when it has been read.
    monkeypatch.setattr(working, "PULL_SLICE", timedelta(milliseconds=250))
    books = pulled(connect, wire, pull_interval=3600)
    for _ in range(40):
        work()
        if len(pages) >= 5:
            break
    assert pages == ["1", "2", "3", "4", "5"]
    assert Customer.objects.count() == 5
    assert SyncRun.objects.filter(kind=SyncRun.Kind.PULL).count() >= 2
    books.refresh_from_db()
    assert not due(books)


@pytest.mark.django_db(transaction=True)
def test_credentials_that_cannot_be_opened_pause_the_connection(
    organization: Organization, connect: Callable[..., Connection], wire: Wire
) -> None:
    customers_of(organization, 1)
    books = system(connect, wire, "books")
    request(connection=books, actor=ACTOR)
    Connection.objects.update(credentials="v1:00000000:AAAA")
    work()
    books.refresh_from_db()
    assert books.state == Connection.State.NEEDS_REAUTH
    assert "SEALING_KEYS" in books.state_reason
    assert wire.calls == []


# Batches


@pytest.mark.django_db(transaction=True)
def test_a_batch_that_cannot_be_carried_out_ends_and_says_so(connect: Callable[..., Connection]) -> None:
    company = connect("rootfi")
    run = SyncRun.objects.create(
        public_id="b" * 16,
        organization=company.organization,
        connection=company,
        kind=SyncRun.Kind.RECEIVE,
        actor_kind="api_key",
        actor_name="shop",
        planned=2,
        request={},
    )
    assert working.batch_slice(run.pk) == 1
    run.refresh_from_db()
    assert (run.state, run.refused) == (SyncRun.State.FAILED, 2)
    assert "KeyError" in run.error
    assert working.batch_slice(run.pk) is None


# Housekeeping


def old_run(connection: Connection, kind: str, *, age: timedelta = timedelta(hours=2), **fields: Any) -> SyncRun:
    run = runs.start(
        organization=connection.organization,
        connection=connection,
        kind=kind,
        actor=ACTOR,
        at=timezone.now() - age,
        **fields,
    )
    SyncRun.objects.filter(pk=run.pk).update(updated_at=timezone.now() - age)
    return run


@pytest.mark.django_db
def test_runs_whose_process_died_are_closed(organization: Organization, connect: Callable[..., Connection]) -> None:
    books = connect("links", direction=Connection.Direction.PUSH_AND_PULL)
    being_pulled = connect("cheqpay", pull_until=timezone.now() + timedelta(minutes=1))
    customers_of(organization, 1)
    carried = request(connection=books, actor=ACTOR)
    SyncRun.objects.filter(pk=carried.pk).update(updated_at=timezone.now() - timedelta(days=3))
    dead = {
        "push": old_run(books, SyncRun.Kind.PUSH, planned=3),
        "import": old_run(books, SyncRun.Kind.IMPORT),
        "sync": old_run(books, SyncRun.Kind.SYNC),
        "pull": old_run(books, SyncRun.Kind.PULL),
    }
    alive = [
        carried,
        old_run(books, SyncRun.Kind.PUSH, age=timedelta(minutes=50)),
        old_run(books, SyncRun.Kind.IMPORT, age=timedelta(minutes=50)),
        old_run(being_pulled, SyncRun.Kind.PULL),
        old_run(books, SyncRun.Kind.RECEIVE),
    ]
    assert working.close_dead_runs(timezone.now()) == 4
    assert working.close_dead_runs(timezone.now()) == 0
    for run in alive:
        run.refresh_from_db()
        assert run.finished_at is None, run.kind
    for kind, run in dead.items():
        run.refresh_from_db()
        assert run.finished_at is not None
        if kind == "push":
            assert (run.state, run.error, run.skipped) == (SyncRun.State.SUCCEEDED, "", 3)
        else:
            assert (run.state, run.error) == (SyncRun.State.FAILED, "The process that ran it ended.")


def reject(links: Any, *, hours: int) -> None:
    at = timezone.now() - timedelta(hours=hours)
    links.update(state=LinkState.REJECTED, next_attempt_at=None, updated_at=at, run=None, error="No.")


@pytest.mark.django_db
def test_a_few_of_the_rejected_are_tried_once_a_day(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    books = connect("links", direction=Connection.Direction.PUSH)
    paused = connect("commenda", direction=Connection.Direction.PUSH, state=Connection.State.PAUSED)
    customers_of(organization, 40)
    for connection in (books, paused):
        request(connection=connection, actor=ACTOR)
    links = CustomerLink.objects.filter(connection=books).order_by("pk")
    pks = list(links.values_list("pk", flat=True))
    reject(CustomerLink.objects.all(), hours=30)
    reject(CustomerLink.objects.filter(pk__in=pks[:5]), hours=20)  # too fresh
    CustomerLink.objects.filter(pk__in=pks[5:8]).update(crashes=3)  # a worker died on them too often
    reject(CustomerLink.objects.filter(pk__in=pks[30:]), hours=50)  # the oldest
    assert working.retry_rejected(timezone.now()) == 10
    again = links.filter(next_attempt_at__lte=timezone.now())
    assert list(again.values_list("pk", flat=True)) == pks[30:]
    run = SyncRun.objects.get(request__customers="sample")
    assert (run.planned, run.state, set(again.values_list("run", flat=True))) == (10, SyncRun.State.QUEUED, {run.pk})
    # Not again before a day is over, whatever has become of them, and whoever does it.
    reject(again, hours=26)
    assert working.retry_rejected(timezone.now()) == 0
    assert working.retry_rejected(timezone.now() + timedelta(hours=25)) == 10
    assert not CustomerLink.objects.filter(connection=paused, next_attempt_at__isnull=False).exists()


@pytest.mark.django_db(transaction=True)
def test_several_workers_that_keep_house_together_take_one_sample(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    books = connect("links", direction=Connection.Direction.PUSH)
    customers_of(organization, 40)
    request(connection=books, actor=ACTOR)
    reject(CustomerLink.objects.all(), hours=30)
    barrier = threading.Barrier(4)

    def keep() -> None:
        try:
            barrier.wait()
            working.housekeep()
        finally:
            database.close()

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CustomerLink.objects.filter(next_attempt_at__isnull=False).count() == 10
    assert SyncRun.objects.filter(request__customers="sample").count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_sample_is_sent_and_its_run_ends(
    organization: Organization, connect: Callable[..., Connection], wire: Wire
) -> None:
    books = system(connect, wire, "books")
    customers_of(organization, 3)
    request(connection=books, actor=ACTOR)
    reject(CustomerLink.objects.all(), hours=30)
    assert not due_connections(now=timezone.now())
    working.housekeep()
    work()
    run = SyncRun.objects.get(request__customers="sample")
    assert (run.state, run.created, run.planned) == (SyncRun.State.SUCCEEDED, 3, 3)


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_stays_keeps_house_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []

    def fails(now: Any) -> None:
        kept.append("fails")
        raise RuntimeError("no")

    monkeypatch.setattr(working, "HOUSEKEEPING", (fails, lambda now: kept.append("works")))
    Worker(threads=1).run(once=True)
    assert kept == []
    worker = Worker(threads=1, idle=0.02)
    thread = threading.Thread(target=worker.run)
    thread.start()
    time.sleep(0.5)
    worker.housekeep_at = 0.0
    time.sleep(0.5)
    worker.stop.set()
    thread.join(timeout=10)
    assert kept == ["fails", "works"] * 2


@pytest.mark.django_db(transaction=True)
def test_housekeeping_sweeps_once_a_day(
    organization: Organization, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    with in_process() as fake:
        account = fake.account("shop", capabilities={"upsert_external_id": True, "lists": True, "fetches": True})
        shop = connect(
            "fake", name="shop", direction=Connection.Direction.PUSH, base_url=account.url, options=account.options()
        )
        [customer] = editing.create(organization=organization, values=[{"name": "A"}], actor=ACTOR)
        request(connection=shop, actor=ACTOR)
        provider = PROVIDERS["fake"]
        push(connection=shop, provider=provider, session=provider.session(shop, client=fake.client()))
        account.create(marker=str(CustomerLink.objects.get().uid), name="A again")
        monkeypatch.setattr(
            "connectors.worker._session", lambda chosen, clock: provider.session(chosen, client=fake.client())
        )
        now = timezone.now()
        for _ in range(2):
            housekeep(clock=lambda: now)
        assert len(account.ledger()) == 2, "one create, one list"
        assert Issue.objects.get().kind == Issue.Kind.DUPLICATE
        assert not Customer.objects.exclude(pk=customer.pk).exists()


def test_an_issue_about_refused_records_ends_with_the_last_of_them(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    register()
    with in_process() as fake:
        account = fake.account("shop", capabilities={"upsert_external_id": True})
        shop = connect(
            "fake", name="shop", direction=Connection.Direction.PUSH, base_url=account.url, options=account.options()
        )
        values = [{"name": "BAD 1"}, {"name": "BAD 2"}]
        customers = editing.create(organization=organization, values=values, actor=ACTOR)
        request(connection=shop, actor=ACTOR)
        provider = PROVIDERS["fake"]
        session = provider.session(shop, client=fake.client())
        for left, customer in enumerate(reversed(customers)):
            push(connection=shop, provider=provider, session=session)
            housekeep(clock=timezone.now, stop=lambda: False)
            issue = Issue.objects.get()
            assert (issue.kind, issue.count, issue.resolved_at) == (Issue.Kind.REJECTED, 2, None), left
            editing.update(organization=organization, values={customer.pk: {"name": "Good"}}, actor=ACTOR)
            CustomerLink.objects.filter(customer=customer).update(next_attempt_at=timezone.now() - timedelta(seconds=1))
        push(connection=shop, provider=provider, session=session)
        housekeep(clock=timezone.now)
        assert Issue.objects.get().resolved_at is not None
