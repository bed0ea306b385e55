"""Logins are renewed once for all, lost ones wait for a person; judged by the ledger of a login server on a socket."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx2
import pytest
from django.conf import settings as django_settings
from django.db import connection as database

from connectors import login
from connectors.exceptions import ConnectionUnusable, ConnectorError, Rejected, RetryLater
from connectors.guard import close_shared_client
from connectors.models import Connection, CustomerLink, Issue
from connectors.outbound import Session
from connectors.provider import Provider
from connectors.sealing import Secret
from customers import editing
from customers.editing import Actor
from customers.models import Organization

pytestmark = pytest.mark.django_db(transaction=True)

CLIENT_ID, CLIENT_SECRET = "client-7", "canary-client-secret"
FIRST = "canary-refresh-0"
DAY = 24 * 3600


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.slept = 0.0

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.pass_(seconds)


class System:
    """An API at /api and its login server at /token. Every refresh token is good for one use unless `lenient`.

    `script` holds what the login server does with the next requests: it is called with the handler after the request
    was applied, and answers by returning (status, body, headers), or loses the answer by returning None.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.refresh, self.access, self.number, self.life = FIRST, "", 0, 3600
        self.lenient = False
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []  # of the login server: path, headers, form
        self.called: list[tuple[int, str]] = []  # of the API: status, token
        self.script: list[Callable[[], tuple[int, Any, dict[str, str]] | None]] = []
        self.during: Callable[[], None] = lambda: None
        self.together: threading.Barrier | None = None
        self.account = "A-1"
        self.useless = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        close_shared_client()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def token(self, form: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        known = {FIRST} | {f"canary-refresh-{n}" for n in range(1, self.number + 1)}
        if form["grant_type"] == "refresh_token":
            given = form.get("refresh_token")
            if given != self.refresh and not (self.lenient and given in known):
                said = f"the token {given} of {CLIENT_SECRET} is not known"
                return 400, {"error": "invalid_grant", "error_description": said}, {}
        self.number += 1
        self.access = f"canary-access-{self.number}"
        body = {"access_token": self.access, "token_type": "Bearer", "expires_in": self.life}
        if form["grant_type"] == "refresh_token":
            self.refresh = f"canary-refresh-{self.number}"
            body["refresh_token"] = self.refresh
        return 200, body, {}

    def _handler(system) -> type[BaseHTTPRequestHandler]:  # noqa: N805 # `self` is the handler's, below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {name: values[0] for name, values in parse_qs(text, keep_blank_values=True).items()}
                system.during()
                with system.lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    system.asked.append((self.path, headers, form))
                    answer: tuple[int, Any, dict[str, str]] | None = system.token(form)
                    if system.script:
                        answer = system.script.pop(0)()
                if answer is None:
                    self.close_connection = True
                    return
                self.reply(*answer)

            def do_GET(self) -> None:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                good = bool(token) and token == system.access and not system.useless
                if not good and system.together is not None:
                    with suppress(threading.BrokenBarrierError):
                        system.together.wait(10)
                with system.lock:
                    system.called.append((200 if good else 401, token))
                self.reply(200 if good else 401, {"account": system.account} if good else {"message": token}, {})

            def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        return Handler


class Books(Provider):
    """A provider that logs in by OAuth."""

    slug = "books"
    label = "Books"
    credentials = login.ENTERED

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"Authorization": Secret(f"Bearer {credentials.get('access_token', '')}")}

    def account_id(self, session: Session, connection: Connection) -> str:
        return str(session.request("GET", "me").body["account"])


BOOKS = Books()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def system(settings: Any) -> Iterator[System]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    system = System()
    yield system
    system.close()


@pytest.fixture
def make(connect: Callable[..., Connection], system: System, clock: Clock) -> Callable[..., Connection]:
    def make(name: str = "books", **credentials: str | None) -> Connection:
        given: dict[str, str | None] = {
            "token_url": f"{system.base}/token",
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
            "refresh_token": FIRST,
            "access_token": "canary-access-0",
            "refreshed_at": str(int(clock.now.timestamp())),
            "expires_at": str(int(clock.now.timestamp()) + 3600),
            **credentials,
        }
        return connect(
            "books",
            name=name,
            account=name,
            direction=Connection.Direction.PUSH,
            base_url=f"{system.base}/api",
            credentials={name: value for name, value in given.items() if value is not None},
        )

    return make


def stored(connection: Connection) -> dict[str, str]:
    return Connection.objects.get(pk=connection.pk).unseal_credentials()


def in_threads(number: int, do: Callable[[int], Any]) -> list[Any]:
    """What each of so many threads returned or raised, each with its own database connection."""

    def run(position: int) -> Any:
        try:
            return do(position)
        except Exception as error:
            return error
        finally:
            database.close()

    with ThreadPoolExecutor(max_workers=number) as pool:
        return list(pool.map(run, range(number)))


def call(session: Session) -> Any:
    """What the engine does: log in anew once after a 401."""
    try:
        return session.request("GET", "me").body
    except ConnectionUnusable as error:
        if error.status != 401 or session.renew is None or not session.renew():
            raise
    return session.request("GET", "me").body


# When


def test_other_credentials_pass_through_without_a_look_at_the_database(
    connect: Callable[..., Connection], clock: Clock, django_assert_num_queries: Any
) -> None:
    plain = connect("links", credentials={"api_key": "k", "access_token": "t", "refresh_token": "no url"})
    with django_assert_num_queries(0):
        assert login.fresh(plain, clock=clock) == {"api_key": "k", "access_token": "t", "refresh_token": "no url"}
        assert BOOKS.session(plain, clock=clock).renew is None


@pytest.mark.parametrize(
    ("life", "left", "renewed"),
    [
        (1800, 301, 0),
        (1800, 299, 1),
        (10 * DAY, DAY + 1, 0),
        (10 * DAY, DAY - 1, 1),
        (240, 121, 0),
        (240, 119, 1),
        (3600, -5, 1),
    ],
)
def test_a_token_is_renewed_ahead_of_its_end(
    make: Callable[..., Connection], system: System, clock: Clock, life: int, left: int, renewed: int
) -> None:
    ends = int(clock.now.timestamp()) + left
    books = make(expires_at=str(ends), refreshed_at=str(ends - life))
    credentials = login.fresh(books, clock=clock)
    assert len(system.asked) == renewed
    assert credentials["access_token"] == f"canary-access-{renewed}"
    assert credentials == stored(books) == books.unseal_credentials()
    if renewed:
        now = int(clock.now.timestamp())
        assert (credentials["refreshed_at"], credentials["expires_at"]) == (str(now), str(now + 3600))
        login.fresh(Connection.objects.get(), clock=clock)
        assert len(system.asked) == 1


@pytest.mark.parametrize("ends", [None, "soon", "nan", "inf", "1e999"])
def test_a_token_without_a_known_end_is_used_until_it_is_refused(
    make: Callable[..., Connection], system: System, clock: Clock, ends: str | None
) -> None:
    assert login.fresh(make(expires_at=ends), clock=clock)["access_token"] == "canary-access-0"
    assert system.asked == []


@pytest.mark.parametrize("life", [None, 0, -1, "", "never", [1], {}])
def test_an_answer_that_names_no_end_is_believed(
    make: Callable[..., Connection], system: System, clock: Clock, life: Any
) -> None:
    system.script.append(lambda: (200, {"access_token": "canary-new", "expires_in": life}, {}))
    credentials = login.fresh(make(access_token=None), clock=clock)
    assert "expires_at" not in credentials
    assert credentials["refresh_token"] == FIRST, "an answer without a refresh token keeps the old one"


# What is asked


def test_the_request_is_that_of_rfc_6749(make: Callable[..., Connection], system: System, clock: Clock) -> None:
    books = make(access_token=None, scope="read write", token_url=f"{system.base}/token?tenant=a%20b")
    login.fresh(books, clock=clock)
    [(path, headers, form)] = system.asked
    assert parse_qs(urlsplit(path).query) == {"tenant": ["a b"]}
    assert form == {"grant_type": "refresh_token", "refresh_token": FIRST, "scope": "read write"}
    assert headers["content-type"] == "application/x-www-form-urlencoded"
    assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"client-7:canary-client-secret"
    assert "cookie" not in headers


def test_the_client_can_be_named_in_the_body_or_without_a_secret(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    login.fresh(make(access_token=None, token_endpoint_auth_method="client_secret_post"), clock=clock)
    public = make("public", access_token=None, client_secret=None, refresh_token="canary-refresh-1")
    login.fresh(public, clock=clock)
    (_, posted, form), (_, bare, public_form) = system.asked
    assert (form["client_id"], form["client_secret"]) == (CLIENT_ID, CLIENT_SECRET)
    assert "client_secret" not in public_form
    assert public_form["client_id"] == CLIENT_ID
    assert "authorization" not in posted | bare


def test_client_credentials_alone_log_in_again_and_again(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make(refresh_token=None, access_token=None, scope="all")
    session = BOOKS.session(books, clock=clock)
    assert call(session) == {"account": "A-1"}
    system.access = "dead"
    system.script.append(
        lambda: (200, system.token({"grant_type": "client_credentials"})[1] | {"refresh_token": "r"}, {})
    )
    assert call(session) == {"account": "A-1"}
    assert [form for _, _, form in system.asked] == [{"grant_type": "client_credentials", "scope": "all"}] * 2
    assert "refresh_token" not in stored(books), "it would turn this into another kind of login"


@pytest.mark.parametrize("kind", ["private", "redirect", "no-url", "method", "key"])
def test_a_login_server_that_must_not_be_reached_is_not(
    make: Callable[..., Connection], system: System, clock: Clock, settings: Any, kind: str
) -> None:
    books = {
        "private": lambda: make(access_token=None, token_url=system.base.replace("127.0.0.1", "127.0.0.2") + "/token"),
        "redirect": lambda: make(access_token=None),
        "no-url": lambda: make(access_token=None, token_url="file:///etc/passwd"),
        "method": lambda: make(access_token=None, token_endpoint_auth_method="private_key_jwt"),
        "key": lambda: make(access_token=None, client_secret="schlüssel-\N{EURO SIGN}"),
    }[kind]()
    if kind == "private":
        settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.1/32"]
    system.script.append(lambda: (307, {}, {"Location": f"{system.base}/elsewhere"}))
    with pytest.raises(login.LoginLost) as caught:
        login.fresh(books, clock=clock)
    assert len(system.asked) == (1 if kind == "redirect" else 0)
    books.refresh_from_db()
    assert books.state == Connection.State.NEEDS_REAUTH
    assert books.state_reason == caught.value.message
    assert "schl" not in "".join(traceback.format_exception(caught.value))


def test_the_login_server_may_be_another_host_than_the_api(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    other = System()
    try:
        login.fresh(make(access_token=None, token_url=f"{other.base}/token"), clock=clock)
        assert (len(other.asked), len(system.asked)) == (1, 0)
    finally:
        other.close()


# Once for all


def test_eight_threads_of_one_slice_that_meet_a_dead_token_renew_it_once(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    session = BOOKS.session(make(), clock=clock)
    for death in (1, 2):  # also a second time: an old refusal is not taken for a new one, nor a new one for an old
        system.together = threading.Barrier(8)
        answers = in_threads(8, lambda _: call(session))
        assert answers == [{"account": "A-1"}] * 8
        assert len(system.asked) == death
        assert system.called.count((401, f"canary-access-{death - 1}")) == 8
        assert len(system.called) == 16 * death
        system.access = "dead"


def test_a_late_refusal_of_the_old_token_does_not_renew_again(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    session = BOOKS.session(make(), clock=clock)
    system.together = threading.Barrier(2)
    late = threading.Thread(target=lambda: session.send("GET", "me"))
    late.start()
    while not system.together.n_waiting:
        time.sleep(0.01)
    held, system.together = system.together, None
    call(session)
    held.abort()
    late.join()
    assert session.renew is not None
    assert session.renew()
    assert call(session) == {"account": "A-1"}
    assert len(system.asked) == 1


def test_a_late_refusal_of_the_old_token_does_not_hide_that_the_new_one_died(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    session = BOOKS.session(make(), clock=clock)
    system.together = threading.Barrier(2)
    late = threading.Thread(target=lambda: session.send("GET", "me"))
    late.start()
    while not system.together.n_waiting:
        time.sleep(0.01)
    held, system.together = system.together, None
    call(session)
    system.access = "dead"
    assert session.send("GET", "me").status == 401
    held.abort()
    late.join()
    assert session.renew is not None
    assert session.renew()
    assert session.request("GET", "me").body == {"account": "A-1"}
    assert len(system.asked) == 2


def test_eight_sessions_with_a_database_connection_each_renew_once(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make()
    system.together = threading.Barrier(8)
    system.during = lambda: time.sleep(0.3)

    def work(_: int) -> Any:
        return call(BOOKS.session(Connection.objects.get(pk=books.pk), clock=clock))

    assert in_threads(8, work) == [{"account": "A-1"}] * 8
    assert len(system.asked) == 1
    row = Connection.objects.get()
    assert (row.login_token, row.login_until) == ("", None)


def test_eight_workers_that_find_the_token_about_to_expire_renew_it_once(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    now = int(clock.now.timestamp())
    books = make(expires_at=str(now + 60), refreshed_at=str(now - 3540))
    system.during = lambda: time.sleep(0.3)
    tokens = in_threads(8, lambda _: login.fresh(Connection.objects.get(pk=books.pk), clock=clock)["access_token"])
    assert tokens == ["canary-access-1"] * 8
    assert len(system.asked) == 1


WORKER = """
import sys, threading
import django
django.setup()
from concurrent.futures import ThreadPoolExecutor
from django.db import connection as database
from connectors.models import Connection
from tests.connectors.test_login import BOOKS, call

def work(_):
    try:
        session = BOOKS.session(Connection.objects.get(pk=int(sys.argv[1])))
        return call(session)["account"]
    finally:
        database.close()

Connection.objects.count()
database.close()
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(max_workers=4) as pool:
    print(*pool.map(work, range(4)))
"""


def test_two_worker_processes_renew_once(make: Callable[..., Connection], system: System) -> None:
    books = make()
    name = database.settings_dict["NAME"]
    url = f"sqlite:///{name}"
    if database.vendor == "postgresql":
        known = django_settings.DATABASES["default"]
        user = quote(known["USER"]) + (f":{quote(known['PASSWORD'])}" if known["PASSWORD"] else "")
        url = f"postgres://{user}@{known['HOST']}:{known['PORT'] or 5432}/{name}"
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
        "SEALING_KEYS": ",".join(django_settings.SEALING_KEYS),
    }
    system.together = threading.Barrier(8)
    system.during = lambda: time.sleep(0.3)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(books.pk)],
            env=environment,
            cwd=django_settings.BASE_DIR,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate(timeout=30)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        said = [worker.communicate(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [out for out, _ in said] == ["A-1 A-1 A-1 A-1\n"] * 2, said
    assert len(system.asked) == 1
    assert system.called.count((401, "canary-access-0")) == 8


def test_a_dead_workers_lease_is_waited_for_and_then_taken_over(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make(access_token=None)
    Connection.objects.update(login_token="died", login_until=clock.now + timedelta(seconds=60))
    assert login.fresh(books, clock=clock, sleep=clock.sleep)["access_token"] == "canary-access-1"
    assert 59 < clock.slept < 61
    assert len(system.asked) == 1
    assert Connection.objects.get().login_token == ""


def test_a_lease_that_does_not_end_is_not_waited_for_without_end(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make(access_token=None)
    Connection.objects.update(login_token="skewed", login_until=clock.now + timedelta(days=1))
    with pytest.raises(RetryLater):
        login.fresh(books, clock=clock, sleep=clock.sleep)
    assert 59 < clock.slept < 62
    assert system.asked == []
    assert Connection.objects.get().login_token == "skewed"


def test_who_waits_takes_what_the_other_stored(make: Callable[..., Connection], system: System, clock: Clock) -> None:
    books = make(access_token=None)
    Connection.objects.update(login_token="other", login_until=clock.now + timedelta(seconds=60))

    def sleep(seconds: float) -> None:
        other = Connection.objects.get()
        other.seal_credentials({**other.unseal_credentials(), "access_token": "theirs"})
        other.login_token, other.login_until = "", None
        other.save()

    assert login.fresh(books, clock=clock, sleep=sleep)["access_token"] == "theirs"
    assert system.asked == []


def test_the_rotated_token_is_committed_before_the_new_one_is_used(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    seen: list[tuple[str, str]] = []

    class Watching(Books):
        def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
            # By another database connection: it sees only what is committed.
            [row] = in_threads(1, lambda _: stored(books))
            seen.append((credentials["access_token"], row["refresh_token"]))
            return super().headers(account=account, credentials=credentials)

    books = make()
    call(Watching().session(books, clock=clock))
    assert seen == [("canary-access-0", FIRST), ("canary-access-1", "canary-refresh-1")]


def test_no_transaction_is_open_while_the_login_server_is_asked(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make(access_token=None)
    wrote: list[Any] = []
    # Somebody else writes the same row meanwhile: with a lock held on it this would wait for the answer.
    system.during = lambda: wrote.extend(in_threads(1, lambda _: Connection.objects.update(name="renamed")))
    login.fresh(books, clock=clock)
    assert wrote == [1]
    assert Connection.objects.get().name == "renamed"


def test_what_a_person_enters_meanwhile_stays(make: Callable[..., Connection], system: System, clock: Clock) -> None:
    books = make(access_token=None)

    def enter() -> None:
        def do(_: int) -> None:
            row = Connection.objects.get()
            row.seal_credentials({**row.unseal_credentials(), "access_token": "entered"})
            row.save(update_fields=["credentials"])

        in_threads(1, do)

    system.during = enter
    assert login.fresh(books, clock=clock)["access_token"] == "entered"
    assert stored(books)["access_token"] == "entered"
    assert len(system.asked) == 1


def test_what_was_entered_for_another_host_never_reaches_the_old_one(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make()
    session = BOOKS.session(books, clock=clock)
    moved = Connection.objects.get()
    moved.base_url = "https://elsewhere.example/api"
    moved.seal_credentials({"token_url": "https://elsewhere.example/t", "refresh_token": "r", "access_token": "theirs"})
    moved.save()
    books.refresh_from_db()  # the engine reads it again now and then
    with pytest.raises(RetryLater):
        call(session)
    assert [token for _, token in system.called] == ["canary-access-0"]
    assert system.asked == []


# Lost


@pytest.fixture
def link(organization: Organization, make: Callable[..., Connection]) -> CustomerLink:
    """A link in the middle of its retries."""
    [customer] = editing.create(
        organization=organization, values=[{"name": "Ann"}], actor=Actor(kind="user", name="Tester")
    )
    now = datetime.now(UTC)
    return CustomerLink.objects.create(
        connection=make(), customer=customer, attempts=3, needed_version=1, created_at=now, updated_at=now
    )


def test_a_lost_answer_is_asked_for_once_more(make: Callable[..., Connection], system: System, clock: Clock) -> None:
    system.lenient = True
    system.script.append(lambda: None)
    assert call(BOOKS.session(make(), clock=clock)) == {"account": "A-1"}
    assert [form["refresh_token"] for _, _, form in system.asked] == [FIRST, FIRST]
    assert Connection.objects.get().state == Connection.State.ACTIVE


def test_a_lost_answer_that_killed_the_token_means_reconnect(link: CustomerLink, system: System, clock: Clock) -> None:
    before = CustomerLink.objects.values().get()
    session = BOOKS.session(link.connection, clock=clock)
    system.together = threading.Barrier(8)
    system.script.append(lambda: None)
    answers = in_threads(8, lambda _: call(session))
    assert [(type(answer), answer.status) for answer in answers] == [(ConnectionUnusable, 401)] * 8
    assert len(system.asked) == 2
    row = Connection.objects.get()
    assert row.state == Connection.State.NEEDS_REAUTH
    assert "Connect it again" in row.state_reason
    assert (row.login_token, row.login_until) == ("", None)
    issue = Issue.objects.get()
    assert (issue.kind, issue.count, issue.message) == (Issue.Kind.LOGIN, 1, row.state_reason)
    assert (issue.connection, issue.organization, issue.first_at) == (row, row.organization, clock.now)
    assert CustomerLink.objects.values().get() == before


def test_a_login_that_another_worker_found_lost_is_not_tried_again(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make()
    system.refresh = "another"
    system.together = threading.Barrier(8)
    system.during = lambda: time.sleep(0.3)

    def work(_: int) -> Any:
        return call(BOOKS.session(Connection.objects.get(pk=books.pk), clock=clock))

    answers = in_threads(8, work)
    assert [type(answer) for answer in answers] == [ConnectionUnusable] * 8
    assert len(system.asked) == 1
    assert Issue.objects.get().count == 1


@pytest.mark.parametrize("state", ["paused", "needs_reauth"])
def test_a_session_whose_login_was_lost_asks_no_more(
    make: Callable[..., Connection], system: System, clock: Clock, state: str
) -> None:
    books = make()
    Connection.objects.update(state=state)
    books.refresh_from_db()
    session = BOOKS.session(books, clock=clock)
    system.refresh = "another"
    system.together = threading.Barrier(8)
    assert {type(answer) for answer in in_threads(8, lambda _: call(session))} == {ConnectionUnusable}
    assert len(system.asked) == 1


def test_a_lost_login_that_a_person_repairs_is_tried(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make()
    books.state = Connection.State.NEEDS_REAUTH
    books.save()
    assert call(BOOKS.session(books, clock=clock)) == {"account": "A-1"}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_grant"}),
        (401, {"error": "invalid_client"}),
        (400, {"error": "something_of_their_own"}),
        (403, "Forbidden"),
        (404, {}),
        (200, {"error": "bad_refresh_token"}),
    ],
)
def test_a_refusal_ends_the_login(
    make: Callable[..., Connection], system: System, clock: Clock, status: int, body: Any
) -> None:
    system.script.append(lambda: (status, body, {}))
    with pytest.raises(login.LoginLost):
        login.fresh(make(access_token=None), clock=clock)
    assert len(system.asked) == 1
    assert Connection.objects.get().state == Connection.State.NEEDS_REAUTH


@pytest.mark.parametrize(
    ("status", "body", "asked"),
    [
        (503, {}, 1),
        (429, {"error": "slow_down"}, 1),
        (408, {}, 1),
        (400, {"error": "temporarily_unavailable"}, 1),
        (500, {}, 2),
        (502, "Bad gateway", 2),
        (200, {"token_type": "Bearer"}, 2),
        (200, {"access_token": ["no"]}, 2),
        (200, [], 2),
    ],
)
def test_a_login_server_that_fails_is_asked_again_later(
    make: Callable[..., Connection], system: System, clock: Clock, status: int, body: Any, asked: int
) -> None:
    system.lenient = True
    system.script += [lambda: (status, body, {"Retry-After": "7"})] * asked
    with pytest.raises(RetryLater) as caught:
        login.fresh(make(access_token=None), clock=clock)
    assert caught.value.retry_after == (7 if status in (503, 408) else None)
    assert len(system.asked) == asked
    row = Connection.objects.get()
    assert (row.state, row.login_until) == (Connection.State.ACTIVE, None)
    assert not Issue.objects.exists()
    assert login.fresh(row, clock=clock)["access_token"] == system.access


def test_a_proxy_that_does_not_say_when_to_come_back_may_have_lost_the_answer(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    system.lenient = True
    system.script.append(lambda: (503, "Service Unavailable", {}))
    assert login.fresh(make(access_token=None), clock=clock)["access_token"] == "canary-access-2"
    assert len(system.asked) == 2


def test_a_token_that_still_works_is_used_while_the_login_server_fails(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    now = int(clock.now.timestamp())
    books = make(expires_at=str(now + 60), refreshed_at=str(now - 3540))
    system.script += [lambda: (503, {}, {"Retry-After": "7"})] * 2
    assert login.fresh(books, clock=clock)["access_token"] == "canary-access-0"
    assert len(system.asked) == 1
    clock.pass_(61)
    with pytest.raises(RetryLater):
        login.fresh(books, clock=clock)


def test_eight_threads_ask_a_failing_login_server_once(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    system.lenient = True
    session = BOOKS.session(make(), clock=clock)
    together = system.together = threading.Barrier(8)
    system.during = lambda: time.sleep(0.3)
    system.script.append(lambda: (503, {}, {"Retry-After": "7"}))
    answers = in_threads(8, lambda _: call(session))
    assert [(type(answer), getattr(answer, "retry_after", 0)) for answer in answers] == [(RetryLater, 7.0)] * 8
    assert len(system.asked) == 1
    assert together.n_waiting == 0
    system.together = None
    assert session.renew is not None
    assert session.renew(), "the next one tries again"


def test_a_renewed_token_that_is_refused_at_once_ends_the_login(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    session = BOOKS.session(make(), clock=clock)
    system.useless = True
    for _ in range(5):
        with pytest.raises(ConnectionUnusable):
            call(session)
    assert len(system.asked) == 1
    assert Connection.objects.get().state == Connection.State.NEEDS_REAUTH
    assert Issue.objects.get().kind == Issue.Kind.LOGIN


def test_a_token_of_another_worker_that_died_before_it_was_used_is_renewed(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make()
    slow, quick = BOOKS.session(books, clock=clock), BOOKS.session(Connection.objects.get(), clock=clock)
    system.access = "canary-access-1-old"  # what both hold has died
    call(quick)
    assert slow.renew is not None
    slow.refused = slow.headers
    assert slow.renew(), "it takes what the other was given"
    assert len(system.asked) == 1
    system.access = "canary-access-2-old"  # and that dies before the first call
    call(slow)
    assert len(system.asked) == 2
    assert Connection.objects.get().state == Connection.State.ACTIVE


def test_credentials_that_cannot_be_read_any_more_end_the_login(
    make: Callable[..., Connection], system: System, clock: Clock, settings: Any
) -> None:
    session = BOOKS.session(make(), clock=clock)
    settings.SEALING_KEYS = ["A" * 43]
    assert session.renew is not None
    assert not session.renew()
    assert "SEALING_KEYS" in Connection.objects.get().state_reason


def test_no_secret_is_shown_anywhere(
    make: Callable[..., Connection], system: System, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []
    echo = {"error": "invalid_grant", "error_description": f"{FIRST} {CLIENT_SECRET} canary-access-0"}
    with caplog.at_level(logging.DEBUG):
        good = make("good")
        session = BOOKS.session(good, clock=clock)
        call(session)
        shown += [repr(session), repr(session.renew), repr(good), str(vars(session.renew))]
        for name, status, body in [
            ("refused", 400, echo),
            ("of their own", 400, {"error": f"{FIRST} is unknown", "message": CLIENT_SECRET}),
            ("page", 403, f"{FIRST} {CLIENT_SECRET}"),
            ("failing", 500, echo),
            ("slow", 503, echo),
        ]:
            system.refresh = FIRST
            system.script = [lambda status=status, body=body: (status, body, {})] * 2  # type: ignore[misc] # bound early
            with pytest.raises(ConnectorError) as caught:
                login.fresh(make(name, access_token=None), clock=clock)
            shown += [*traceback.format_exception(caught.value), repr(vars(caught.value))]
    shown += [record.getMessage() + (record.exc_text or "") for record in caplog.records]
    shown += [f"{row.state_reason} {row.credentials} {row.options}" for row in Connection.objects.all()]
    shown += [f"{issue.message} {issue.details}" for issue in Issue.objects.all()]
    assert Issue.objects.count() == 3
    assert [text for text in shown if "canary" in text or "is unknown" in text] == []
    assert any("is lost" in text for text in shown), "the log was looked at"


# Reconnect


@pytest.fixture
def lost(link: CustomerLink, system: System, clock: Clock) -> Connection:
    """A connection whose login was lost, with new credentials entered."""
    system.refresh = "another"
    books = link.connection
    books.remote_account_id = "A-1"
    books.save()
    with pytest.raises(ConnectionUnusable):
        call(BOOKS.session(books, clock=clock))
    books.refresh_from_db()
    books.seal_credentials(login.merged(books.unseal_credentials(), {"refresh_token": "another"}))
    books.save(update_fields=["credentials"])
    return books


@pytest.mark.parametrize("known", ["A-1", ""])
def test_the_same_account_is_used_again_and_links_keep_their_attempts(
    lost: Connection, system: System, clock: Clock, known: str
) -> None:
    Connection.objects.update(remote_account_id=known)
    lost.refresh_from_db()
    before = CustomerLink.objects.values().get()
    session = BOOKS.session(lost, clock=clock)
    account = BOOKS.account_id(session, lost)
    login.reconnect(lost, session=session, account_id=account, clock=clock)
    row = Connection.objects.get()
    assert (row.state, row.state_reason, row.remote_account_id, row.ramp) == ("active", "", "A-1", 5)
    assert (lost.state, lost.ramp) == ("active", 5)
    assert Issue.objects.get().resolved_at == clock.now
    assert CustomerLink.objects.values().get() == before
    assert call(session) == {"account": "A-1"}


@pytest.mark.parametrize("found", ["B-2", ""])
@pytest.mark.parametrize("state", ["needs_reauth", "active", "paused"])
def test_another_account_is_refused_and_not_called(
    lost: Connection, system: System, clock: Clock, state: str, found: str
) -> None:
    system.account = found
    Connection.objects.update(state=state, state_reason="as it was")
    lost.refresh_from_db()
    session = BOOKS.session(lost, clock=clock)
    account = BOOKS.account_id(session, lost)
    before = Connection.objects.values().get()
    links = CustomerLink.objects.values().get()
    calls = len(system.called), len(system.asked)
    for times in (1, 2):
        with pytest.raises(login.WrongAccount, match="make a new connection"):
            login.reconnect(lost, session=session, account_id=account, clock=clock)
        issue = Issue.objects.get(kind=Issue.Kind.WRONG_ACCOUNT)
        assert (issue.count, issue.details) == (times, {"expected": "A-1", "found": found})
    with pytest.raises(ConnectionUnusable):
        session.send("GET", "me")
    assert session.renew is None
    assert (len(system.called), len(system.asked)) == calls
    after = Connection.objects.values().get()
    changed = {name for name in after if after[name] != before[name]} - {"updated_at"}
    # One that was in use must not be used: it waits like the others.
    assert changed == ({"state", "state_reason"} if state == "active" else set())
    assert after["state"] != "active"
    assert CustomerLink.objects.values().get() == links
    assert Issue.objects.get(kind=Issue.Kind.LOGIN).resolved_at is None


def test_the_right_account_after_a_wrong_one_settles_both_issues(
    lost: Connection, system: System, clock: Clock
) -> None:
    with pytest.raises(login.WrongAccount):
        login.reconnect(lost, session=BOOKS.session(lost, clock=clock), account_id="B-2", clock=clock)
    login.reconnect(lost, session=BOOKS.session(lost, clock=clock), account_id="A-1", clock=clock)
    assert not Issue.objects.filter(resolved_at=None).exists()


def test_a_pause_outlives_a_reconnect(lost: Connection, clock: Clock) -> None:
    Connection.objects.update(state=Connection.State.PAUSED, state_reason="Stocktaking")
    session = BOOKS.session(lost, clock=clock)
    login.reconnect(lost, session=session, account_id="A-1", clock=clock)
    row = Connection.objects.get()
    assert (row.state, row.state_reason, row.ramp) == ("paused", "Stocktaking", 5)


def test_credentials_that_were_changed_since_the_test_are_not_trusted(
    lost: Connection, system: System, clock: Clock
) -> None:
    session = BOOKS.session(lost, clock=clock)
    other = Connection.objects.get()
    other.seal_credentials({**other.unseal_credentials(), "refresh_token": "of another account"})
    other.save()
    with pytest.raises(RetryLater):
        login.reconnect(lost, session=session, account_id="A-1", clock=clock)
    assert Connection.objects.get().state == Connection.State.NEEDS_REAUTH


def test_the_default_test_call_makes_one_call_where_there_is_a_list(connect: Callable[..., Connection]) -> None:
    calls: list[str] = []

    class Listing(Books):
        def capabilities(self, connection: Connection) -> Any:
            return super().capabilities(connection).__class__(lists=True)

        def page(self, session: Session, connection: Connection, **known: Any) -> Any:
            calls.append(session.request("GET", "list").method)

        account_id = Provider.account_id

    client = httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(200, json=[])))
    plain = connect("books", base_url="https://books.example", credentials={"access_token": "t"})
    assert Listing().account_id(Listing().session(plain, client=client), plain) == ""
    assert calls == ["GET"]


def test_entering_credentials_drops_the_token_that_was_given_for_others() -> None:
    kept = {
        "api_key": "k",
        "token_url": "https://a.example/token",
        "client_secret": "s",
        "refresh_token": "r",
        "access_token": "t",
        "expires_at": "1",
        "refreshed_at": "1",
    }
    assert login.merged(kept, {}) == kept
    assert login.merged(kept, {"api_key": "k2"}) == {**kept, "api_key": "k2"}
    assert login.merged(kept, {"refresh_token": "r"}) == kept
    given = {"api_key": "k", "token_url": "https://a.example/token", "client_secret": "s"}
    assert login.merged(kept, {"refresh_token": "r2"}) == {**given, "refresh_token": "r2"}
    same_host = {"token_url": "https://A.example/other"}
    assert login.merged(kept, same_host) == {**given, "refresh_token": "r", **same_host}
    for elsewhere in ("https://b.example/token", "http://a.example/token", "https://a.example:8443/token", "https://["):
        assert login.merged(kept, {"token_url": elsewhere}) == {"api_key": "k", "token_url": elsewhere}


# Disuse


def test_a_refresh_token_is_used_once_a_day(
    make: Callable[..., Connection], connect: Callable[..., Connection], system: System, clock: Clock
) -> None:
    ages = {"now": 0, "yesterday": DAY + 1, "almost": DAY - 1, "needs_reauth": 2 * DAY, "paused": 2 * DAY}
    now = int(clock.now.timestamp())
    for name, age in ages.items():
        made = make(name, refreshed_at=str(now - age), expires_at=str(now + 90 * DAY))
        if name in Connection.State.values:
            Connection.objects.filter(pk=made.pk).update(state=name)
    make("unused", refreshed_at=None)
    make("client", refresh_token=None, refreshed_at="1")
    connect("links", name="plain", account="plain", credentials={"api_key": "k"})
    broken = make("broken", refreshed_at="1")
    Connection.objects.filter(pk=broken.pk).update(credentials="v1:none:none")
    found = login.idle(clock.now)
    assert [connection.name for connection in found] == ["yesterday", "paused", "unused"]
    chosen = found[0]
    in_threads(4, lambda _: login.keep_alive(Connection.objects.get(pk=chosen.pk), clock))
    assert len(system.asked) == 1
    assert stored(chosen)["refresh_token"] == "canary-refresh-1"
    assert [connection.name for connection in login.idle(clock.now)] == ["paused", "unused"]


def test_looking_for_idle_tokens_is_one_query(
    make: Callable[..., Connection], clock: Clock, django_assert_num_queries: Any
) -> None:
    for number in range(3):
        make(f"books {number}", refreshed_at="1")
    with django_assert_num_queries(1):
        assert [row.organization.slug for row in login.idle(clock.now)] == ["demo"] * 3


def test_a_paused_connection_whose_login_ends_stays_paused(
    make: Callable[..., Connection], system: System, clock: Clock
) -> None:
    books = make(refreshed_at="1")
    Connection.objects.update(state=Connection.State.PAUSED, state_reason="Stocktaking")
    system.refresh = "another"
    with pytest.raises(login.LoginLost):
        login.keep_alive(books, clock)
    row = Connection.objects.get()
    assert (row.state, row.state_reason) == ("paused", "Stocktaking")
    assert Issue.objects.get().kind == Issue.Kind.LOGIN


def test_a_form_body_is_sent_as_it_is() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={})

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as client:
        Session(base_url="https://h.example", client=client).send("POST", "t", form="a=1&b=x%20y")
        with pytest.raises(Rejected):
            Session(base_url="https://h.example", client=client).send("POST", "../t", form="a=1")
    assert seen[0].content == b"a=1&b=x%20y"
    assert seen[0].headers["content-type"] == "application/x-www-form-urlencoded"
