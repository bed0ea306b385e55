"""What is due is sent once, and what came back is kept; judged by the ledger of the system on the far side."""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import httpx2
import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext

from connectors.exceptions import ConnectionUnusable
from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.push import prepare, push
from connectors.sync.push import send as send_claimed
from connectors.sync.request import request
from connectors.sync.steps import Slice
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.connectors.fakes import FakeLinks, lost, status

ACTOR = Actor(kind="user", name="Tester")


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **amount: float) -> None:
        self.now += timedelta(**amount)


@pytest.fixture
def system() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    return connect(
        "links",
        name="books",
        direction=Connection.Direction.PUSH,
        base_url="https://books.example.com/api/v1",
        credentials={"api_key": "remote-key"},
    )


@pytest.fixture
def customer(organization: Organization) -> Customer:
    return add(organization, 1)[0]


@pytest.fixture
def send(books: Connection, system: FakeLinks, clock: Clock) -> Callable[..., Counter[str]]:
    """Push what is due to the fake system."""
    links = PROVIDERS["links"]

    def go(**options: Any) -> Counter[str]:
        books.refresh_from_db()
        session = links.session(books, client=system.client())
        return push(connection=books, provider=links, session=session, clock=clock, **options)

    return go


def add(organization: Organization, number: int) -> list[Customer]:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com", "phone": "+1234567890"} for n in range(number)]
    return editing.create(organization=organization, values=values, actor=ACTOR)


def edit(customer: Customer, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=ACTOR)


def test_a_customer_is_sent_once_and_its_remote_id_kept(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    run = request(connection=books, actor=ACTOR, customer_ids=[customer.pk], now=clock())
    assert send() == {"created": 1}
    link = CustomerLink.objects.get()
    assert link.remote_id == "cust_1"
    assert (link.pushed_version, link.needed_version, link.is_primary) == (1, 1, True)
    assert link.base_local["email"] == "0@example.com"
    assert link.status_key(now=clock()) == "in_sync"
    run.refresh_from_db()
    assert (run.state, run.planned, run.created) == (SyncRun.State.SUCCEEDED, 1, 1)
    assert PushIntent.objects.get().outcome == PushIntent.Outcome.OK
    again = request(connection=books, actor=ACTOR, now=clock())
    assert send() == {}
    assert (again.state, again.unchanged, again.planned) == (SyncRun.State.SUCCEEDED, 1, 1)
    assert len(system.ledger) == 1


def test_an_edit_sends_the_changed_fields_only(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    edit(customer, phone="+4930123456", currency="EUR")
    assert CustomerLink.objects.get().is_dirty
    assert send() == {}, "the edit waits for its debounce"
    clock.pass_(seconds=5)
    assert send() == {"updated": 1}
    assert system.writes[-1] == (
        "PUT",
        "/api/v1/unified/customer/cust_1",
        {"email": "0@example.com", "name": "Example 0", "phone": "+4930123456"},
    )
    run = SyncRun.objects.latest("pk")
    assert (run.kind, run.updated, run.planned) == ("push", 1, 1)


def test_a_field_the_system_does_not_map_makes_nothing_due(
    books: Connection, customer: Customer, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    edit(customer, currency="EUR")
    assert not CustomerLink.objects.get().is_dirty


def test_an_edit_that_is_taken_back_sends_nothing(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    edit(customer, phone="+4930123456")
    edit(customer, phone="+1234567890")
    clock.pass_(seconds=5)
    assert send() == {"unchanged": 1}
    assert not CustomerLink.objects.get().is_dirty
    assert len(system.ledger) == 1


def test_what_the_format_demands_is_refused_before_sending(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    [nameless] = editing.create(organization=organization, values=[{"name": "No mail"}], actor=ACTOR)
    good = add(organization, 3)
    run = request(connection=books, actor=ACTOR, now=clock())
    assert send() == {"created": 3, "refused": 1}
    link = CustomerLink.objects.get(customer=nameless)
    assert (link.state, link.error_field, link.next_attempt_at) == (LinkState.REJECTED, "email", None)
    assert "e-mail" in link.sentence(now=clock())
    run.refresh_from_db()
    assert (run.state, run.planned, run.created, run.refused) == (SyncRun.State.PARTLY, 4, 3, 1)
    assert run.problems[0]["field"] == "email"
    assert len(system.records) == len(good)
    clock.pass_(days=1)
    assert send() == {}, "a rejected record waits for a change"
    edit(nameless, email="now@example.com")
    clock.pass_(seconds=5)
    assert send() == {"created": 1}


@pytest.mark.django_db(transaction=True)
def test_an_edit_during_the_call_is_still_to_be_sent(
    transactional_db: None,
    books: Connection,
    customer: Customer,
    system: FakeLinks,
    clock: Clock,
    send: Callable[..., Counter[str]],
) -> None:
    request(connection=books, actor=ACTOR, now=clock())

    def edit_meanwhile(request: Any) -> None:
        edit(customer, phone="+4930123456")  # would wait for ever if a transaction were open during the call
        database.close()

    system.fail(edit_meanwhile, after=True)
    assert send(limit=1) == {"created": 1}
    link = CustomerLink.objects.get()
    assert (link.pushed_version, link.needed_version) == (1, 2)
    clock.pass_(seconds=5)
    assert send() == {"updated": 1}
    assert system.records["cust_1"]["phone"] == "+4930123456"


def test_a_transient_failure_is_tried_again_until_it_works(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    run = request(connection=books, actor=ACTOR, now=clock())
    system.fail(status(425), times=2)
    assert send() == {"retrying": 1}
    assert CustomerLink.objects.get().status_key(now=clock()) == "retrying"
    clock.pass_(minutes=1)
    send()
    clock.pass_(minutes=1)
    assert send() == {"created": 1}
    run.refresh_from_db()
    assert (run.state, run.created, run.planned) == (SyncRun.State.SUCCEEDED, 1, 1)


def test_retry_after_makes_the_whole_connection_wait(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    add(organization, 30)
    request(connection=books, actor=ACTOR, now=clock())
    system.fail(status(429, retry_after="60"), times=30)
    send()
    asked = len(system.ledger)
    assert asked <= 16, "calls under way when the answer came may end; no others begin"
    books.refresh_from_db()
    assert books.not_before is not None
    assert timedelta(seconds=60) <= books.not_before - clock() <= timedelta(seconds=66)
    clock.pass_(seconds=59)
    assert send() == {}
    assert len(system.ledger) == asked
    system.faults.clear()
    clock.pass_(seconds=8)
    assert send() == {"created": 30}
    assert CustomerLink.objects.filter(attempts__gt=0).count() == 0
    assert len(system.records) == 30


def test_a_create_whose_answer_is_lost_is_never_repeated_blindly(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    run = request(connection=books, actor=ACTOR, now=clock())
    system.fail(lost, after=True)
    assert send() == {"uncertain": 1}
    link = CustomerLink.objects.get()
    assert (link.state, link.next_attempt_at) == (LinkState.UNCERTAIN, None)
    assert PushIntent.objects.get().outcome == PushIntent.Outcome.UNCERTAIN
    edit(customer, phone="+4930123456")
    clock.pass_(days=3)
    assert send() == {}
    assert len(system.records) == 1
    run.refresh_from_db()
    assert (run.uncertain, run.planned) == (1, 1)
    asked_again = request(connection=books, actor=ACTOR, now=clock())
    assert (asked_again.uncertain, asked_again.planned) == (1, 1)


def test_a_lost_update_holds_newer_ones_until_it_must_be_dead(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    edit(customer, phone="+4930111111")
    clock.pass_(seconds=5)
    system.fail(lost)
    assert send() == {"retrying": 1}
    edit(customer, phone="+4930222222")
    clock.pass_(seconds=30)
    assert send() == {"skipped": 1}
    assert len(system.writes) == 2
    clock.pass_(seconds=120)
    assert send() == {"updated": 1}
    assert system.records["cust_1"]["phone"] == "+4930222222"


def test_what_a_lost_update_may_have_left_there_is_taken_back(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    edit(customer, phone="+4930111111")
    clock.pass_(seconds=5)
    system.fail(lost, after=True)
    assert send() == {"retrying": 1}
    edit(customer, phone="+1234567890")
    clock.pass_(seconds=200)
    assert send() == {"updated": 1}
    assert system.records["cust_1"]["phone"] == "+1234567890"


def slice_of(books: Connection, clock: Clock) -> Slice:
    return Slice(connection=books, provider=PROVIDERS["links"], clock=clock, rng=Random(1))


def test_a_worker_that_died_between_sending_and_keeping_leaves_an_uncertain_create(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    prepare(slice_of(books, clock), rows=10)
    assert PushIntent.objects.get().outcome == PushIntent.Outcome.OPEN
    assert send() == {}, "the dead worker's lease still holds"
    clock.pass_(minutes=5)
    assert send() == {"uncertain": 1}
    assert system.ledger == []


def test_a_refused_login_stops_the_connection_and_costs_no_attempt(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    add(organization, 20)
    request(connection=books, actor=ACTOR, now=clock())
    system.fail(status(401), times=20)
    with pytest.raises(ConnectionUnusable):
        send()
    books.refresh_from_db()
    assert books.state == Connection.State.NEEDS_REAUTH
    assert not CustomerLink.objects.filter(attempts__gt=0).exists()
    assert not CustomerLink.objects.exclude(lease_token="").exists()
    system.faults.clear()
    Connection.objects.update(state=Connection.State.ACTIVE)
    assert send() == {"created": 20}
    assert len(system.records) == 20


def test_a_record_that_is_gone_there_is_parked_as_gone(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    system.records.clear()
    edit(customer, phone="+4930111111")
    clock.pass_(seconds=5)
    assert send() == {"refused": 1}
    assert CustomerLink.objects.get().state == LinkState.REMOTE_DELETED


def test_a_second_request_takes_the_links_over_and_the_first_run_ends(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    first = request(connection=books, actor=ACTOR, now=clock())
    second = request(connection=books, actor=ACTOR, now=clock())
    send()
    for run, outcome in ((first, "skipped"), (second, "created")):
        run.refresh_from_db()
        assert (run.state, run.planned, getattr(run, outcome)) == (SyncRun.State.SUCCEEDED, 1, 1)


def test_a_late_answer_is_fenced_off_but_the_id_that_it_names_is_of_use(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    part = slice_of(books, clock)
    token, sendings, _ = prepare(part, rows=10)
    CustomerLink.objects.update(lease_token="somebody else")
    session = PROVIDERS["links"].session(books, client=system.client())
    send_claimed(part, session, token, sendings)
    assert part.totals == {}
    assert CustomerLink.objects.get().remote_id is None
    intent = PushIntent.objects.get()
    assert (intent.outcome, intent.remote_id) == (PushIntent.Outcome.OPEN, "cust_1"), "whoever holds it will find it"
    clock.pass_(minutes=5)
    assert send() == {"created": 1}
    assert CustomerLink.objects.get().remote_id == "cust_1"
    assert len(system.records) == 1


def test_a_remote_id_that_belongs_to_another_customer_is_refused(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    add(organization, 1)
    request(connection=books, actor=ACTOR, now=clock())
    send()
    [second] = add(organization, 1)
    system.numbers = iter([1])  # type: ignore[assignment] # the system answers with an id it has given before
    request(connection=books, actor=ACTOR, now=clock())
    assert send() == {"refused": 1}
    assert "another customer" in CustomerLink.objects.get(customer=second).error


def test_statements_do_not_grow_with_the_number_of_links(
    books: Connection, organization: Organization, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    counts = []
    for number in (2, 60):
        books.refresh_from_db()
        customers = add(organization, number)
        with CaptureQueriesContext(database) as asking:
            request(connection=books, actor=ACTOR, customer_ids=[c.pk for c in customers], now=clock())
        with CaptureQueriesContext(database) as editing_:
            editing.update(
                organization=organization, values={c.pk: {"phone": "+4930123"} for c in customers}, actor=ACTOR
            )
        clock.pass_(seconds=5)
        counts.append((len(asking), len(editing_)))
        send()
    assert counts[0] == counts[1]


def test_an_answer_that_cannot_be_kept_does_not_take_its_neighbours_along(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    add(organization, 30)
    request(connection=books, actor=ACTOR, now=clock())
    system.fail(lambda _: httpx2.Response(201, json={"data": {"id": "x" * 300, "name": "A", "email": "a@example.com"}}))
    assert send() == {"created": 29, "uncertain": 1}
    assert CustomerLink.objects.exclude(remote_id=None).count() == 29


def test_an_answer_without_an_id_makes_no_second_create(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    system.fail(lambda _: httpx2.Response(201, json={"data": {"id": "", "name": "A", "email": "a@example.com"}}))
    assert send() == {"uncertain": 1}
    edit(customer, phone="+4930123456")
    clock.pass_(days=1)
    assert send() == {}
    assert len(system.writes) == 1


def test_a_pause_is_obeyed_in_the_middle_of_a_slice(
    books: Connection,
    organization: Organization,
    system: FakeLinks,
    clock: Clock,
    send: Callable[..., Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("connectors.sync.push.CLAIM_ROWS", 5)
    monkeypatch.setattr("django.conf.settings.PUSH_CONCURRENT_CALLS", 2)
    add(organization, 20)
    request(connection=books, actor=ACTOR, now=clock())
    paused = send(progress=lambda _: Connection.objects.update(state=Connection.State.PAUSED))
    assert paused["created"] <= 8, "what was under way may end; nothing else begins"


def test_what_was_deleted_there_is_not_made_again_and_counts_as_refused(
    books: Connection, customer: Customer, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    request(connection=books, actor=ACTOR, now=clock())
    send()
    CustomerLink.objects.update(deleted_at=clock())
    run = request(connection=books, actor=ACTOR, now=clock())
    assert (run.state, run.planned, run.refused) == (SyncRun.State.FAILED, 1, 1)
    assert send() == {}
