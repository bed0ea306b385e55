"""Logins that die under load cost no attempt, no call with a wrong account, and one renewal each (R16).

Three workers push over real sockets; the provider's ledger tells every call and every renewal. `HUB_FULL=1` takes
10,000 links instead of 200.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection as database
from django.db.models import F, Q

from connectors import login
from connectors.guard import close_shared_client
from connectors.models import Connection, CustomerLink, Issue, PushIntent
from connectors.provider import Provider
from connectors.sync.clock import database_clock
from connectors.sync.limits import CANARY
from connectors.worker import push_slice
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.fake import Running, register, running
from tests.fake.control import Account

pytestmark = pytest.mark.django_db(transaction=True)

FULL = bool(os.environ.get("HUB_FULL"))
LINKS = 10_000 if FULL else 200
EXPIRIES = 20 if FULL else 3
WORKERS = 3
LIFE = 3600.0
STAFF = Actor(kind="user", name="Staff")
OFFERS = {"create_key": True, "look_up": "strong", "lists": True, "fetches": True, "max_request_life": 1.0}


@pytest.fixture
def provider(settings: Any) -> Provider:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    return register()


@pytest.fixture
def account(provider: Provider, tmp_path: Path) -> Iterator[Account]:
    with running(tmp_path) as fake:
        assert isinstance(fake, Running)
        yield fake.account("main", capabilities=OFFERS, auth="oauth", token_life=LIFE)
    close_shared_client()


@pytest.fixture
def connection(account: Account, organization: Organization) -> Connection:
    """A connection with a living login, and links to all customers of which none is there yet."""
    made = Connection(
        organization=organization,
        provider="fake",
        name="system",
        direction=Connection.Direction.PUSH,
        create_policy=Connection.CreatePolicy.AUTOMATIC,
        base_url=account.url,
        options=account.options(),
        remote_account_id="acct_main",
    )
    made.seal_credentials(account.credentials())
    made.save()
    editing.create(organization=organization, values=[{"name": f"Customer {n}"} for n in range(LINKS)], actor=STAFF)
    return made


def links() -> Any:
    return CustomerLink.objects.all()


def dirty() -> int:
    return int(links().filter(pushed_version__lt=F("needed_version")).count())


def burned() -> int:
    """Links that a failure was counted against."""
    return int(links().filter(Q(attempts__gt=0) | Q(crashes__gt=0)).count())


@contextmanager
def workers(connection: Connection) -> Iterator[None]:
    """Workers that push for as long as the block lasts."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                if not push_slice(connection.pk, stop=stop.is_set):
                    stop.wait(0.05)
        except BaseException as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Meanwhile no link may have a failure counted against it."""
    ends = time.monotonic() + seconds
    while not condition():
        assert burned() == 0
        assert time.monotonic() < ends, f"{dirty()} links are left: {list(links().values('state', 'error')[:3])}"
        time.sleep(0.02)
    assert burned() == 0


def drains(seconds: float = 30.0 + LINKS / 20) -> None:
    wait_until(lambda: dirty() == 0, seconds=seconds)


def all_is_there(account: Account) -> None:
    judge = account.judge()
    assert judge.lost(links().values_list("uid", flat=True)) == set()
    assert judge.duplicates() == {}
    assert judge.count() == LINKS
    assert not links().exclude(state="open").exists()
    assert not PushIntent.objects.filter(outcome=PushIntent.Outcome.UNCERTAIN).exists()


def token_requests(account: Account) -> list[int]:
    return [one["status"] for one in account.judge().requests(path="/token")]


def creates(account: Account) -> list[dict[str, Any]]:
    return account.judge().requests(method="POST", path="/customers")


def calm(account: Account) -> bool:
    """Whether no token has been refused for a while: every worker has the one that lives."""
    refused = account.judge().requests(status=401)
    now = time.time() + account.settings["time_offset"]
    return not refused or now - refused[-1]["at"] > 0.5


def reconnect(connection: Connection, account: Account, provider: Provider) -> None:
    """What a person does who logs in again."""
    connection.refresh_from_db()
    connection.seal_credentials(account.credentials())
    connection.save(update_fields=["credentials"])
    session = provider.session(connection, clock=database_clock)
    found = provider.account_id(session, connection)
    login.reconnect(connection, session=session, account_id=found, clock=database_clock)


def log_out(connection: Connection, account: Account) -> None:
    """The login ends, and the hub finds out."""
    account.revoke()
    push_slice(connection.pk)
    connection.refresh_from_db()
    assert connection.state == Connection.State.NEEDS_REAUTH


def figure(name: str, value: object) -> None:
    sys.stdout.write(f"R16 {name}: {value}\n")


def test_a_token_that_dies_under_load_is_renewed_once(connection: Connection, account: Account) -> None:
    begun = time.monotonic()
    # So slow that each worker has used a new token before it dies as well.
    account.set(latency=0.05 if FULL else 0.3)
    with workers(connection):
        for number in range(1, EXPIRIES + 1):
            enough = number * LINKS // (EXPIRIES + 2)
            # Answers are kept some together: enough may be there before the last token has been refused and renewed.
            wait_until(lambda: len(token_requests(account)) == number - 1, seconds=30)  # noqa: B023 # called at once
            wait_until(lambda enough=enough: LINKS - dirty() >= enough and calm(account), seconds=30 + LINKS / 20)  # type: ignore[misc] # a default in a lambda
            account.advance(LIFE + 1)
            account.set()  # reads the settings back
        account.set(latency=0.0)
        drains()
    all_is_there(account)
    assert token_requests(account) == [200] * EXPIRIES
    refused = [one for one in creates(account) if one["status"] == 401]
    connection.refresh_from_db()
    assert connection.state == Connection.State.ACTIVE
    assert not Issue.objects.exists()
    figure("links", LINKS)
    figure("expiries and renewals", f"{EXPIRIES} and {len(token_requests(account))}")
    figure("calls refused with a dead token", len(refused))
    figure("seconds", round(time.monotonic() - begun, 1))


def test_a_renewal_that_never_arrived_is_asked_for_again(connection: Connection, account: Account) -> None:
    account.script("reset_before", path="/token")
    account.revoke("access")
    with workers(connection):
        drains()
    all_is_there(account)
    assert token_requests(account) == [0, 200]


def test_a_login_server_that_fails_costs_no_attempt_and_parks_nothing(connection: Connection, account: Account) -> None:
    account.script("503", path="/token", times=6)
    account.revoke("access")
    with workers(connection):
        # Sooner than the leases end: what was claimed and not sent has been given back.
        drains(seconds=25.0 + LINKS / 20)
    all_is_there(account)
    assert token_requests(account) == [503] * 6 + [200]
    connection.refresh_from_db()
    assert connection.state == Connection.State.ACTIVE


def test_a_renewal_whose_answer_was_lost_waits_for_a_person_and_then_drains(
    connection: Connection, account: Account, provider: Provider
) -> None:
    account.script("reset_after", path="/token")
    account.revoke("access")
    with workers(connection):
        wait_until(lambda: Issue.objects.exists(), seconds=20)
        time.sleep(0.5)
        connection.refresh_from_db()
        assert connection.state == Connection.State.NEEDS_REAUTH
        # One request whose answer was lost, and its one repeat; after that nobody calls any more.
        assert token_requests(account) == [0, 400]
        called = account.judge().request_count()
        time.sleep(1.0)
        assert account.judge().request_count() == called
        assert dirty() == LINKS
        assert [(one.kind, one.resolved_at) for one in Issue.objects.all()] == [(Issue.Kind.LOGIN, None)]
        reconnect(connection, account, provider)
        drains()
    all_is_there(account)
    assert not Issue.objects.filter(resolved_at=None).exists()
    # A dead token was tried by as many calls as were under way at once.
    assert len([one for one in creates(account) if one["status"] == 401]) <= WORKERS * 8


def test_another_account_is_refused_and_gets_no_call(
    connection: Connection, account: Account, provider: Provider
) -> None:
    log_out(connection, account)
    account.set(account_id="acct_other")
    before = account.judge().request_count()
    with pytest.raises(login.WrongAccount):
        reconnect(connection, account, provider)
    with workers(connection):
        time.sleep(1.0)
    after = account.judge().requests()[before:]
    # The question which account it is, and nothing else.
    assert [(one["method"], one["path"].rpartition("/")[2]) for one in after] == [("GET", "account")]
    assert account.judge().count() == 0
    assert dirty() == LINKS
    assert burned() == 0
    account.set(account_id="acct_main")
    reconnect(connection, account, provider)
    with workers(connection):
        drains()
    all_is_there(account)


def test_after_a_reconnect_a_canary_goes_first(connection: Connection, account: Account, provider: Provider) -> None:
    log_out(connection, account)
    before = len(creates(account))
    reconnect(connection, account, provider)
    latency = 0.3
    account.set(latency=latency)
    with workers(connection):
        wait_until(lambda: len(creates(account)) > before + CANARY, seconds=20)
        account.set(latency=0.0)
        drains()
    all_is_there(account)
    sent = [one["at"] for one in creates(account)][before:]
    # The sixth was sent when the five had been answered, by whichever worker.
    assert sent[CANARY - 1] - sent[0] < latency
    assert sent[CANARY] - sent[CANARY - 1] > 0.9 * latency
    connection.refresh_from_db()
    assert connection.ramp is None


def test_a_canary_that_is_refused_lets_nobody_follow(
    connection: Connection, account: Account, provider: Provider
) -> None:
    log_out(connection, account)
    reconnect(connection, account, provider)
    account.revoke()
    before = len(creates(account))
    with workers(connection):
        wait_until(lambda: Connection.objects.filter(state=Connection.State.NEEDS_REAUTH).exists(), seconds=20)
        time.sleep(0.5)
    # Each worker may find out for itself that the login is dead; none goes beyond its canary.
    assert 1 <= len(creates(account)) - before <= CANARY * WORKERS
    assert dirty() == LINKS == Customer.objects.count()
    reconnect(connection, account, provider)
    with workers(connection):
        drains()
    all_is_there(account)
