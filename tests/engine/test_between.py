"""What can come between a call and its answer, or between a list and its end, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest

from connectors.exceptions import AlreadyExists, Gone, OutcomeUnknown
from connectors.models import Conflict, Connection, Issue, PushIntent
from connectors.states import LinkState
from connectors.sync.claim import LEASE
from connectors.sync.deletes import FEW
from connectors.sync.push import prepare
from connectors.sync.settle import settle
from connectors.sync.steps import Slice, Step
from customers import editing
from customers.models import Customer
from tests.engine.bench import STAFF, Hub, System, hub

BOTH = {"direction": Connection.Direction.PUSH_AND_PULL}


@pytest.fixture
def here(db: None) -> Iterator[Hub]:
    with hub() as made:
        yield made


def part(system: System) -> Slice:
    return Slice(connection=system.connection, provider=system.provider, clock=system.clock, rng=Random(1))


def own_provider(system: System) -> Any:
    """The system's provider, for this test alone: its methods may be replaced."""
    system.provider = copy.copy(system.provider)
    return system.provider


def test_a_pull_that_is_stopped_before_its_first_page_has_seen_nothing_deleted(here: Hub) -> None:
    here.customers([{"name": f"Ann {n}"} for n in range(10)])
    offers = {"upsert_external_id": True, "lists": True, "shows_deleted": "scan"}
    system = here.system(offers=offers, delete_policy=Connection.DeletePolicy.ARCHIVE, **BOTH)
    system.request()
    system.drain()
    system.pull()
    here.clock.sleep(60)
    system.pull(stop=lambda: True)
    assert system.links.filter(deleted_at=None).count() == 10
    assert not Customer.objects.exclude(archived_at=None).exists()
    assert not system.issues.exists()


def test_a_create_that_a_pull_found_and_whose_answer_is_lost_then_goes_on(here: Hub) -> None:
    [customer] = here.customers([{"name": "Bob"}])
    system = here.system(offers={"lists": True, "fetches": True}, **BOTH)
    system.request()
    token, [one], _ = prepare(part(system), rows=5)
    system.provider.create(system.session, system.connection, one.outgoing)
    system.pull()
    here.edit({customer.pk: {"address_city": "Delft"}})
    one.answer = OutcomeUnknown("No answer came.")
    settle(part(system), token=token, answered=[one])
    here.clock.sleep(7200)
    system.drain()
    link = system.links.get()
    assert (link.state, link.is_dirty) == (LinkState.OPEN, False)
    assert system.judge.live()[str(link.uid)][0]["address_city"] == "Delft"


def test_a_pull_that_finds_what_an_upsert_made_waits_until_none_is_under_way(here: Hub) -> None:
    """A repeat of the create that lands after a newer edit would take that back."""
    [customer] = here.customers([{"name": "Eve", "address_city": "Gouda"}])
    system = here.system(offers={"upsert_external_id": True, "lists": True, "fetches": True}, **BOTH)
    system.request()
    _, [one], _ = prepare(part(system), rows=5)
    system.provider.create(system.session, system.connection, one.outgoing)
    system.pull()
    assert (system.links.get().remote_id, Customer.objects.count()) == (None, 1)
    here.clock.sleep(LEASE.total_seconds())  # the worker died with a repeat under way
    system.pull()
    link = system.links.get()
    assert (link.remote_id, link.state, Customer.objects.count()) == ("r1", LinkState.OPEN, 1)
    here.edit({customer.pk: {"address_city": "Delft"}})
    here.clock.sleep(10)
    system.push()
    system.provider.create(system.session, system.connection, one.outgoing)
    assert system.judge.live()[str(link.uid)][0]["address_city"] == "Gouda"
    here.clock.sleep(7200)
    system.drain()
    system.pull()
    link.refresh_from_db()
    assert (link.customer.address_city, link.is_dirty) == ("Delft", False)
    assert system.judge.live()[str(link.uid)][0]["address_city"] == "Delft"


def test_a_connector_that_breaks_over_the_answer_of_a_batch_makes_no_record_twice(here: Hub) -> None:
    """The worker is stopped before the halves are sent: what was sent as a whole stays in doubt."""
    here.customers([{"name": f"Cid {n}"} for n in range(8)])
    system = here.system(offers={"create_key": True, "batch": 8})
    provider, broken = own_provider(system), []
    works = provider.create_many

    def breaks(*given: Any) -> Any:
        works(*given)
        broken.append(1)
        raise ValueError("This answer cannot be read.")

    provider.create_many = breaks
    system.request()
    system.push(stop=lambda: bool(broken))
    provider.create_many = works
    system.drain()
    assert (system.judge.count(), system.judge.duplicates()) == (8, {})


def test_an_answer_of_before_a_merge_is_none_to_what_was_claimed_since(here: Hub) -> None:
    kept, gone = here.customers(
        [{"name": "Dora", "address_city": "Delft"}, {"name": "Dora D", "address_city": "Gouda"}]
    )
    for n in range(8):
        here.edit({gone.pk: {"address_line1": f"Street {n}"}})
    system = here.system(offers={"upsert_external_id": True, "fetches": True})
    system.request([gone.pk])
    token, [one], _ = prepare(part(system), rows=5)
    one.answer = system.provider.create(system.session, system.connection, one.outgoing)
    editing.merge(
        organization=here.organization, survivor=kept.pk, loser=gone.pk, values={}, actor=STAFF, at=here.clock()
    )
    here.clock.sleep(1)
    _, again, _ = prepare(part(system), rows=5, token=token, but=[one.link.pk])
    assert again == []
    settle(part(system), token=token, answered=[one])
    here.edit({kept.pk: {"address_city": "Leiden"}})
    here.clock.sleep(7200)
    system.drain()
    link = system.links.get(customer=kept)
    assert not link.is_dirty
    [record] = system.judge.live()[str(link.uid)]
    assert (record["name"], record["address_city"]) == ("Dora", "Leiden")


def hidden(works: Callable[..., Any], ids: set[str | None]) -> Callable[..., Any]:
    def call(session: Any, connection: Any, asked: Any) -> Any:
        if (asked if isinstance(asked, str) else asked.remote_id) in ids:
            raise Gone("It is not there.", status=404)
        return works(session, connection, asked)

    return call


def test_records_that_are_made_again_count_as_deleted_for_the_guard(here: Hub) -> None:
    """A permission that was lost answers 404 for each: to make them all again would make all of them twice."""
    customers = here.customers([{"name": f"Eve {n}"} for n in range(200)])
    offers = {"fetches": True, "lists": True, "create_key": True}
    system = here.system(offers=offers, delete_policy=Connection.DeletePolicy.RECREATE)
    system.request()
    system.drain()
    provider, ids = own_provider(system), set(system.links.values_list("remote_id", flat=True))
    provider.update, provider.fetch = hidden(provider.update, ids), hidden(provider.fetch, ids)
    here.edit({one.pk: {"address_city": "Delft"} for one in customers})
    for _ in range(20):
        system.push()
        system.connection.refresh_from_db()
        here.clock.sleep(600)
    assert system.judge.count() <= 200 + FEW
    assert system.connection.state == Connection.State.PAUSED
    assert {issue.kind for issue in system.issues} == {Issue.Kind.MASS_DELETE}


def test_deletes_that_are_not_believed_are_judged_again(here: Hub) -> None:
    """A list of changes shows them once."""
    here.customers([{"name": f"Fay {n}"} for n in range(200)])
    offers = {"upsert_external_id": True, "lists": True, "fetches": True, "incremental": True, "shows_deleted": "flag"}
    system = here.system(offers=offers, **BOTH)
    system.request()
    system.drain()
    for _ in range(2):
        system.pull()
        here.clock.sleep(3600)
    for remote_id in list(system.links.values_list("remote_id", flat=True)[:60]):
        system.account.delete(remote_id or "")
    here.clock.sleep(60)
    for seen in (1, 2):
        system.pull()
        [issue] = system.issues
        assert (issue.kind, issue.count, issue.resolved_at) == (Issue.Kind.MASS_DELETE, seen, None)
        assert system.links.filter(deleted_at=None).count() == 200
        here.clock.sleep(timedelta(hours=1).total_seconds())


def test_a_record_that_exists_and_is_not_shown_is_refused_once(here: Hub) -> None:
    here.customers([{"name": "Gus"}])
    system = here.system(offers={"unique_keys": True, "fetches": True})
    provider, calls = own_provider(system), []

    def create(*given: Any) -> Any:
        calls.append("create")
        raise AlreadyExists("It exists.", remote_id="r-77", status=409)

    def fetch(*given: Any) -> Any:
        calls.append("fetch")
        raise Gone("It is not there.", status=404)

    provider.create, provider.fetch = create, fetch
    system.request()
    system.drain()
    link = system.links.get()
    assert calls == ["create", "fetch"]
    assert (link.state, "r-77" in link.error) == (LinkState.REJECTED, True)
    assert PushIntent.objects.get().outcome == PushIntent.Outcome.FAILED


def test_a_value_that_was_put_back_while_its_update_was_lost_is_sent_when_that_lands(here: Hub) -> None:
    [customer] = here.customers([{"name": "Hal", "address_city": "A"}])
    system = here.system(offers={"upsert_external_id": True, "lists": True, "fetches": True}, **BOTH)
    system.request()
    system.drain()
    system.pull()
    here.edit({customer.pk: {"address_city": "B"}})
    token, [one], _ = prepare(part(system), rows=5)
    if one.step is Step.READ:
        one.answer = system.provider.fetch(system.session, system.connection, one.outgoing.remote_id or "")
        [one] = settle(part(system), token=token, answered=[one])
    one.answer = OutcomeUnknown("No answer came.")
    settle(part(system), token=token, answered=[one])
    here.edit({customer.pk: {"address_city": "A"}})
    system.pull()
    system.provider.update(system.session, system.connection, one.outgoing)  # it lands late
    here.clock.sleep(60)
    for _ in range(3):
        system.pull()
        system.drain()
        here.clock.sleep(600)
    link = system.links.get()
    assert not link.is_dirty
    assert system.judge.live()[str(link.uid)][0]["address_city"] == "A"


def test_a_lost_update_that_lands_after_a_look_is_no_edit_of_somebody_else(here: Hub) -> None:
    """The look said that it had not been applied. A conflict with ourselves would be logged, and staff asked."""
    [customer] = here.customers([{"name": "Ida", "address_city": "A"}])
    offers = {"upsert_external_id": True, "lists": True, "fetches": True, "conditional": True}
    system = here.system(offers=offers, **BOTH)
    system.request()
    system.drain()
    system.pull()
    here.edit({customer.pk: {"address_city": "B"}})
    token, [lost], _ = prepare(part(system), rows=5)
    assert lost.intent is not None
    lost.answer = OutcomeUnknown("No answer came.")
    settle(part(system), token=token, answered=[lost])
    here.edit({customer.pk: {"address_city": "C"}})
    here.clock.sleep(60)
    token, [look], _ = prepare(part(system), rows=5)
    assert look.step is Step.READ
    look.answer = system.provider.fetch(system.session, system.connection, look.outgoing.remote_id or "")
    [newer] = settle(part(system), token=token, answered=[look])
    assert newer.step is Step.UPDATE
    assert PushIntent.objects.get(version=lost.intent.version, kind="update").outcome == PushIntent.Outcome.FAILED
    system.provider.update(system.session, system.connection, lost.outgoing)  # it lands after all
    newer.answer = OutcomeUnknown("The worker died.")
    settle(part(system), token=token, answered=[newer])
    system.pull()
    assert not Conflict.objects.exists()
    here.clock.sleep(600)
    system.drain()
    link = system.links.get()
    assert (link.customer.address_city, link.is_dirty) == ("C", False)
    assert system.judge.live()[str(link.uid)][0]["address_city"] == "C"


def test_a_create_that_was_lost_early_is_looked_for_when_it_must_be_dead(here: Hub) -> None:
    """A reset does not stop the system: what it got may be applied as late as after a time-out."""
    here.customers([{"name": "Jan"}])
    system = here.system(offers={"look_up": "strong", "fetches": True})
    provider, sent = own_provider(system), []
    works = provider.create

    def reset(session: Any, connection: Any, outgoing: Any) -> Any:
        sent.append(outgoing)
        raise OutcomeUnknown("The connection was reset.")

    provider.create = reset
    system.request()
    system.push()
    provider.create = works
    here.clock.sleep(system.session.deadline + 119)
    system.push()
    works(system.session, system.connection, sent[0])  # it lands at the last moment
    here.clock.sleep(600)
    system.drain()
    assert (system.judge.count(), system.judge.duplicates()) == (1, {})
    assert system.links.get().remote_id == "r1"


def test_a_second_record_with_our_marker_is_told_and_makes_no_customer(here: Hub) -> None:
    [customer] = here.customers([{"name": "Kim", "address_city": "Gouda"}])
    system = here.system(offers={"look_up": "lagging", "lists": True, "fetches": True}, **BOTH)
    system.request()
    token, [one], _ = prepare(part(system), rows=5)
    for city in ("Delft", "Gouda", "Leiden"):  # the second one is what was sent
        document = {**one.outgoing.document, "address_city": city}
        system.provider.create(system.session, system.connection, replace(one.outgoing, document=document))
    one.answer = OutcomeUnknown("No answer came.")
    settle(part(system), token=token, answered=[one])
    for _ in range(2):
        here.clock.sleep(60)
        system.pull()
    link = system.links.get()
    assert (link.remote_id, link.customer_id, link.customer.address_city) == ("r2", customer.pk, "Gouda")
    assert Customer.objects.count() == 1
    [issue] = system.issues
    assert (issue.kind, issue.count) == (Issue.Kind.DUPLICATE, 1)
    assert issue.details["remote_ids"] == ["r2", "r1", "r3"]
