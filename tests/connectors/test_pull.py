"""Reading a system page by page: checkpoints, echoes, bad records, and one pull at a time."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from django.utils import timezone

from connectors.exceptions import ConnectionUnusable, RetryLater
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.push import push
from connectors.sync.request import request
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization
from tests.connectors.fakes import FakeLinks, lost, status

ACTOR = Actor(kind="command", name="test")


@pytest.fixture
def system() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    return connect(
        "links",
        name="books",
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url="https://books.example.com/api/v1",
        credentials={"api_key": "remote-key"},
    )


def read(books: Connection, system: FakeLinks, **options: Any) -> SyncRun:
    links = PROVIDERS["links"]
    return pull(connection=books, provider=links, session=links.session(books, client=system.client()), **options)


def fill(system: FakeLinks, number: int) -> None:
    for n in range(number):
        id_ = f"cust_{next(system.numbers)}"
        system.records[id_] = {"id": id_, "name": f"Example {n}", "email": f"{n}@example.com", "phone": None}


def test_every_record_becomes_a_customer_and_a_second_pull_changes_nothing(
    books: Connection, system: FakeLinks
) -> None:
    fill(system, 250)
    run = read(books, system)
    assert (run.state, run.planned, run.created) == (SyncRun.State.SUCCEEDED, 250, 250)
    assert Customer.objects.count() == CustomerLink.objects.count() == 250
    again = read(books, system)
    assert (again.unchanged, again.planned) == (250, 250)
    assert CustomerChange.objects.count() == 250


def test_what_was_pushed_comes_back_as_nothing_new(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(30)]
    editing.create(organization=organization, values=values, actor=ACTOR)
    request(connection=books, actor=ACTOR)
    links = PROVIDERS["links"]
    push(connection=books, provider=links, session=links.session(books, client=system.client()))
    run = read(books, system)
    assert (run.unchanged, run.planned) == (30, 30)
    assert Customer.objects.count() == 30
    assert CustomerChange.objects.count() == 30
    assert not [link for link in CustomerLink.objects.all() if link.is_dirty]


def test_one_bad_record_never_stops_the_rest(books: Connection, system: FakeLinks) -> None:
    fill(system, 5)
    system.records["cust_2"]["name"] = "x" * 400
    system.records["cust_3"]["email"] = None
    run = read(books, system)
    assert (run.state, run.created, run.refused, run.planned) == (SyncRun.State.PARTLY, 3, 2, 5)
    assert any("cust_2" in problem["reason"] for problem in run.problems)


def test_an_interrupted_pull_goes_on_where_it_stopped(books: Connection, system: FakeLinks) -> None:
    fill(system, 250)
    system.fail(lambda request: None)
    system.fail(status(503))
    with pytest.raises(RetryLater):
        read(books, system)
    assert Customer.objects.count() == 100
    books.refresh_from_db()
    assert books.checkpoint["cursor"] == "2"
    system.ledger.clear()
    run = read(books, system)
    assert run.created == 150
    assert len(system.ledger) == 2
    assert Customer.objects.count() == 250


def test_two_pulls_of_one_connection_never_run_together(books: Connection, system: FakeLinks) -> None:
    fill(system, 1)

    def second(request: httpx2.Request) -> None:
        with pytest.raises(AlreadyRunning):
            read(books, FakeLinks())

    system.fail(second)
    assert read(books, system).created == 1
    assert SyncRun.objects.count() == 1


def test_a_dry_run_counts_and_stores_nothing(books: Connection, system: FakeLinks) -> None:
    fill(system, 3)
    run = read(books, system, dry_run=True)
    assert (run.created, run.planned) == (3, 3)
    assert not Customer.objects.exists()
    books.refresh_from_db()
    assert books.checkpoint == {}


def test_a_refused_login_stops_the_connection_and_says_so(books: Connection, system: FakeLinks) -> None:
    system.fail(status(401))
    with pytest.raises(ConnectionUnusable):
        read(books, system)
    books.refresh_from_db()
    assert books.state == Connection.State.NEEDS_REAUTH
    assert SyncRun.objects.get().state == SyncRun.State.FAILED


def deliver(books: Connection, system: FakeLinks) -> None:
    links = PROVIDERS["links"]
    push(connection=books, provider=links, session=links.session(books, client=system.client()))


def test_a_create_whose_answer_was_lost_is_found_again_by_the_next_pull(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    request(connection=books, actor=ACTOR)
    system.fail(lost, after=True)
    deliver(books, system)
    assert CustomerLink.objects.get().state == LinkState.UNCERTAIN
    run = read(books, system)
    assert (run.unchanged, run.planned) == (1, 1)
    assert Customer.objects.count() == 1
    link = CustomerLink.objects.get()
    assert (link.remote_id, link.state, link.is_dirty) == ("cust_1", LinkState.OPEN, False)


def test_a_record_that_may_be_ours_is_left_when_two_say_the_same(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    request(connection=books, actor=ACTOR)
    system.fail(lost, after=True)
    deliver(books, system)
    system.records["twin"] = {**system.records["cust_1"], "id": "twin"}
    run = read(books, system)
    assert (run.skipped, run.planned) == (2, 2)
    assert Customer.objects.count() == 1
    assert CustomerLink.objects.get().remote_id is None


def test_a_page_that_is_older_than_a_push_does_not_take_the_edit_back(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    [customer] = editing.create(
        organization=organization, values=[{"name": "A", "email": "a@example.com", "phone": "+1"}], actor=ACTOR
    )
    request(connection=books, actor=ACTOR)
    deliver(books, system)
    old = {"data": [dict(system.records["cust_1"])], "page": 1, "limit": 100, "totalPages": 1, "totalResults": 1}

    def meanwhile(asked: httpx2.Request) -> httpx2.Response:
        editing.update(organization=organization, values={customer.pk: {"phone": "+2"}}, actor=ACTOR)
        CustomerLink.objects.update(next_attempt_at=timezone.now())
        system.lock.release()  # the push reaches the same system while this page is on its way
        try:
            deliver(books, system)
        finally:
            system.lock.acquire()
        return httpx2.Response(200, json=old)

    system.fail(meanwhile)
    read(books, system)
    assert Customer.objects.get().phone == "+2"
    assert system.records["cust_1"]["phone"] == "+2"
    assert not CustomerLink.objects.get().is_dirty


def test_a_run_ends_when_a_pull_makes_its_link_clean(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    [customer] = editing.create(
        organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR
    )
    request(connection=books, actor=ACTOR)
    deliver(books, system)
    editing.update(organization=organization, values={customer.pk: {"phone": "+2"}}, actor=ACTOR)
    run = request(connection=books, actor=ACTOR)
    system.records["cust_1"]["phone"] = "+2"
    read(books, system)
    run.refresh_from_db()
    assert (run.state, run.unchanged, run.planned) == (SyncRun.State.SUCCEEDED, 1, 1)


def test_a_field_that_was_never_there_before_is_still_sent_after_a_pull(
    books: Connection, organization: Organization, system: FakeLinks
) -> None:
    system.records["cust_1"] = {"id": "cust_1", "name": "A", "email": "a@example.com"}
    read(books, system)
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"phone": "+2"}}, actor=ACTOR)
    read(books, system)
    CustomerLink.objects.update(next_attempt_at=timezone.now())
    deliver(books, system)
    assert system.records["cust_1"]["phone"] == "+2"


def test_a_place_that_the_system_has_forgotten_is_begun_again(books: Connection, system: FakeLinks) -> None:
    fill(system, 3)
    Connection.objects.update(checkpoint={"cursor": "7", "began": timezone.now().isoformat()})
    books.refresh_from_db()
    system.fail(status(400))
    assert read(books, system).created == 3
