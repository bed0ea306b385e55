"""Merging two customers and undoing it: what each becomes, what leads where, and what is refused."""

from datetime import UTC, datetime, timedelta
from threading import Barrier, Thread
from typing import Any
from uuid import uuid4

import pytest
from django.db import close_old_connections, connection, connections
from django.test.utils import CaptureQueriesContext

from customers import editing
from customers.editing import (
    EDITABLE,
    Actor,
    CannotMerge,
    CannotUnmerge,
    Changed,
    InvalidCustomer,
    StaleVersion,
    UnknownCustomer,
    customers_changed,
)
from customers.models import Customer, CustomerChange, MergeRecord, Organization

ACTOR = Actor(kind="user", name="Tester", id="1", request_id="req_1")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def make(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[{"name": "Acme GmbH", **values}], actor=ACTOR)[0]


def merge(survivor: Customer, loser: Customer, *, at: datetime = NOW, **values: Any) -> MergeRecord:
    return editing.merge(
        organization=survivor.organization, survivor=survivor.pk, loser=loser.pk, values=values, actor=ACTOR, at=at
    )


def unmerge(loser: Customer, *, at: datetime = NOW) -> MergeRecord:
    return editing.unmerge(organization=loser.organization, loser=loser.pk, actor=ACTOR, at=at)


def edit(customer: Customer, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=ACTOR)


def columns(customer: Customer) -> dict[str, Any]:
    """Everything stored of a customer but what each version moves."""
    customer.refresh_from_db()
    moving = ("version", "updated_at", "merged_into_id")
    return {f.attname: getattr(customer, f.attname) for f in Customer._meta.concrete_fields if f.attname not in moving}


def changes_of(customer: Customer) -> list[dict[str, Any]]:
    return list(CustomerChange.objects.filter(customer=customer).order_by("version").values_list("changes", flat=True))


def leads_to(customer: Customer) -> Customer:
    return editing.lock(organization=customer.organization, ids=[customer.pk])[customer.pk]


@pytest.fixture
def a(organization: Organization) -> Customer:
    return make(organization, email="ap@acme.example", custom_fields={"vat": "DE1", "n": [1, 2.5, None]})


@pytest.fixture
def b(organization: Organization) -> Customer:
    return make(
        organization, name="ACME  Gmbh", email="info@acme.example", phone="+49 30 5550", address_country="Germany"
    )


def test_the_survivor_takes_what_was_chosen_and_the_loser_leads_to_it(a: Customer, b: Customer) -> None:
    before = columns(b)
    record = merge(a, b, phone="+49 30 5550")
    assert columns(b) == before
    a.refresh_from_db()
    assert (a.phone, a.phone_key, a.email, a.version) == ("+49 30 5550", "+49305550", "ap@acme.example", 2)
    assert (b.merged_into, b.version, b.updated_at) == (a, 2, NOW)
    assert leads_to(b) == a
    assert changes_of(a)[-1] == {"phone": ["", "+49 30 5550"]}
    assert changes_of(b)[-1] == {"merged_into": [None, str(a.pk)]}
    record.refresh_from_db()
    assert (record.survivor, record.loser, record.actor_name, record.at) == (a, b, "Tester", NOW)
    assert record.changes == {"phone": ["", "+49 30 5550"]}
    assert record.survivor_before.keys() == record.loser_before.keys() == set(EDITABLE)
    assert record.survivor_before["custom_fields"] == {"vat": "DE1", "n": [1, 2.5, None]}
    assert (record.loser_before["phone"], record.survivor_version, record.loser_version) == ("+49 30 5550", 2, 2)


def test_a_merge_that_changes_no_value_is_a_version_with_its_author(a: Customer, b: Customer) -> None:
    merge(a, b, email="ap@acme.example")
    change = CustomerChange.objects.get(customer=a, version=2)
    assert change.changes == {}
    assert (change.actor_name, change.request_id) == ("Tester", "req_1")
    assert b.public_id in change.message
    assert Customer.objects.get(pk=a.pk).version == 2


def test_unmerging_restores_every_field_of_both(a: Customer, b: Customer) -> None:
    before = columns(a), columns(b)
    merge(a, b, name="ACME Gmbh", phone="+49 30 5550", custom_fields={"x": 1}, notify_email=True)
    record = unmerge(b, at=NOW + timedelta(days=30))
    assert (columns(a), columns(b)) == before
    assert (a.version, b.version, b.merged_into) == (3, 3, None)
    assert changes_of(a)[-1]["phone"] == ["+49 30 5550", ""]
    assert changes_of(b)[-1] == {"merged_into": [str(a.pk), None]}
    assert (record.undone_at, record.undone_by) == (NOW + timedelta(days=30), "Tester")
    assert leads_to(b) == b


def test_what_somebody_changed_since_stays(a: Customer, b: Customer) -> None:
    merge(a, b, name="ACME", phone="+49 30 5550", currency="EUR")
    edit(a, phone="+49 30 1", notify_email=True)
    edit(a, currency="USD")
    edit(b, currency="EUR")  # through the old id, and back to what the merge set: a decision all the same
    unmerge(b)
    a.refresh_from_db()
    assert (a.name, a.phone, a.currency, a.notify_email) == ("Acme GmbH", "+49 30 1", "EUR", True)


def test_a_later_merge_that_was_undone_does_not_count_as_a_change(
    organization: Organization, a: Customer, b: Customer
) -> None:
    c = make(organization, phone="+49 30 333")
    merge(a, b, phone="+49 30 222")
    merge(a, c, phone="+49 30 333")
    unmerge(c)
    assert columns(a)["phone"] == "+49 30 222"
    unmerge(b)
    assert (columns(a)["phone"], columns(a)["phone_key"]) == ("", "")


def test_chains_stay_flat_and_come_apart_in_turn(organization: Organization, a: Customer, b: Customer) -> None:
    c, d = make(organization, name="C"), make(organization, name="D")
    merge(b, c)
    merge(a, d)
    record = merge(a, b)
    assert record.followers == [str(c.pk)]
    assert {leads_to(one) for one in (a, b, c, d)} == {a}
    c.refresh_from_db()
    assert (c.merged_into, c.version) == (a, 3)
    assert changes_of(c)[-1] == {"merged_into": [str(b.pk), str(a.pk)]}
    with pytest.raises(CannotUnmerge, match=b.public_id):
        unmerge(c)
    unmerge(b)
    assert (leads_to(c), leads_to(b), leads_to(d)) == (b, b, a)
    unmerge(c)
    assert leads_to(c) == c
    assert [one.merged_into for one in Customer.objects.order_by("pk")] == [None, None, None, a]
    for one in (a, b, c, d):
        one.refresh_from_db()
        assert len(changes_of(one)) == one.version


def test_a_merge_can_be_done_again_after_it_was_undone(a: Customer, b: Customer) -> None:
    merge(a, b)
    unmerge(b)
    merge(b, a)
    assert leads_to(a) == b
    unmerge(a)
    assert MergeRecord.objects.filter(undone_at=None).count() == 0


def test_what_makes_no_sense_is_refused_and_stores_nothing(
    organization: Organization, other_organization: Organization, a: Customer, b: Customer
) -> None:
    c, foreign = make(organization), make(other_organization)
    merge(a, b)
    before = list(Customer.objects.order_by("pk").values())
    with pytest.raises(CannotMerge, match="itself"):
        merge(a, a)
    with pytest.raises(CannotMerge, match=f"{b.public_id} has already been merged"):
        merge(a, b)
    with pytest.raises(CannotMerge, match=f"{b.public_id} has already been merged"):
        merge(b, a)
    with pytest.raises(CannotMerge, match=f"{b.public_id} has already been merged"):
        merge(c, b)
    for id_ in (foreign.pk, uuid4()):
        for survivor, loser in ((c.pk, id_), (id_, c.pk)):
            with pytest.raises(UnknownCustomer):
                editing.merge(organization=organization, survivor=survivor, loser=loser, values={}, actor=ACTOR)
        with pytest.raises(UnknownCustomer):
            editing.unmerge(organization=organization, loser=id_, actor=ACTOR)
    with pytest.raises(InvalidCustomer) as caught:
        merge(a, c, phone="1" * 65)
    assert caught.value.errors.keys() == {0}
    with pytest.raises(CannotUnmerge, match="not merged"):
        unmerge(c)
    assert list(Customer.objects.order_by("pk").values()) == before
    assert MergeRecord.objects.count() == 1


def test_another_organizations_merge_cannot_be_undone(
    other_organization: Organization, a: Customer, b: Customer
) -> None:
    merge(a, b)
    with pytest.raises(UnknownCustomer):
        editing.unmerge(organization=other_organization, loser=b.pk, actor=ACTOR)


def test_an_archived_customer_may_be_merged_but_not_survive(a: Customer, b: Customer) -> None:
    editing.archive(organization=b.organization, ids=[b.pk], actor=ACTOR)
    with pytest.raises(CannotMerge, match="Restore"):
        merge(b, a)
    before = columns(b)
    merge(a, b)
    unmerge(b)
    assert columns(b) == before
    assert b.archived_at is not None


def test_a_merge_of_what_has_been_changed_meanwhile_is_refused(a: Customer, b: Customer) -> None:
    edit(b, phone="+49 30 1")
    with pytest.raises(StaleVersion) as caught:
        editing.merge(
            organization=a.organization,
            survivor=a.pk,
            loser=b.pk,
            values={"phone": "+49 30 5550"},
            actor=ACTOR,
            expected={a.pk: 1, b.pk: 1},
        )
    assert caught.value.customers == [b]
    assert set(Customer.objects.values_list("merged_into", flat=True)) == {None}


def test_after_thirty_days_a_merge_stays(a: Customer, b: Customer) -> None:
    merge(a, b)
    with pytest.raises(CannotUnmerge, match="30 days"):
        unmerge(b, at=NOW + timedelta(days=30, seconds=1))
    assert leads_to(b) == a


def test_the_one_signal_tells_who_became_whom_and_keeps_what_receivers_note(a: Customer, b: Customer) -> None:
    heard: list[dict[Any, Changed]] = []

    def listen(changes: list[Changed], **_: Any) -> None:
        assert connection.in_atomic_block
        heard.append({change.customer_id: change for change in changes})
        for change in changes:
            if change.merged_into:
                change.notes["test"] = {"kept": [1]}

    customers_changed.connect(listen)
    try:
        merge(a, b, phone="+49 30 5550")
        unmerge(b)
    finally:
        customers_changed.disconnect(listen)
    merged, unmerged = heard
    assert (merged[a.pk].fields, merged[a.pk].merged_into, merged[a.pk].version) == ({"phone"}, None, 2)
    assert (merged[b.pk].merged_into, merged[b.pk].unmerged_from) == (a.pk, None)
    assert (unmerged[b.pk].merged_into, unmerged[b.pk].unmerged_from) == (None, a.pk)
    assert unmerged[b.pk].notes["test"] == {"kept": [1]}


def test_the_number_of_statements_does_not_grow_with_the_followers(organization: Organization) -> None:
    counts = []
    for size in (1, 12):
        a, b, *others = (make(organization) for _ in range(size + 2))
        for other in others:
            merge(b, other)
        with CaptureQueriesContext(connection) as merging:
            merge(a, b, phone="+49 30 5550")
        with CaptureQueriesContext(connection) as unmerging:
            unmerge(b)
        counts.append((len(merging), len(unmerging)))
    assert counts[0] == counts[1]


def at_once(*jobs: Any) -> list[Any]:
    """What each of these came to, begun together in threads of their own."""
    barrier, results = Barrier(len(jobs)), [None] * len(jobs)

    def run(position: int) -> None:
        try:
            barrier.wait(timeout=10)
            results[position] = jobs[position]()
        except Exception as error:
            results[position] = error
        finally:
            connections.close_all()

    threads = [Thread(target=run, args=(position,)) for position in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    close_old_connections()
    return results


@pytest.mark.django_db(transaction=True)
def test_of_two_merges_that_cross_one_wins_and_the_other_is_told(
    transactional_db: None, organization: Organization
) -> None:
    for _ in range(10):
        a, b = make(organization), make(organization)
        results = at_once(lambda a=a, b=b: merge(a, b), lambda a=a, b=b: merge(b, a))
        assert sorted(type(result).__name__ for result in results) == ["CannotMerge", "MergeRecord"], results
        won = next(result for result in results if isinstance(result, MergeRecord))
        assert leads_to_outside(a) == leads_to_outside(b) == won.survivor_id


@pytest.mark.django_db(transaction=True)
def test_a_merge_is_undone_once(transactional_db: None, organization: Organization) -> None:
    for _ in range(10):
        a, b = make(organization), make(organization)
        merge(a, b)
        results = at_once(*[lambda b=b: unmerge(b)] * 4)
        names = sorted(type(result).__name__ for result in results)
        assert names == ["CannotUnmerge", "CannotUnmerge", "CannotUnmerge", "MergeRecord"], results
        assert set(Customer.objects.filter(pk__in=[a.pk, b.pk]).values_list("version", flat=True)) == {3}


@pytest.mark.django_db(transaction=True)
def test_edits_through_the_old_id_never_wait_in_a_circle_with_merging(
    transactional_db: None, organization: Organization
) -> None:
    for turn in range(10):
        a, b = sorted((make(organization), make(organization)), key=lambda one: one.pk, reverse=turn % 2 == 0)
        merge(a, b)
        results = at_once(
            lambda b=b: unmerge(b), lambda b=b: edit(b, phone="+49 30 1"), lambda a=a, b=b: edit(a, currency="EUR")
        )
        assert not [result for result in results if isinstance(result, Exception)], results
        phones = dict(Customer.objects.filter(pk__in=[a.pk, b.pk]).values_list("pk", "phone"))
        assert sorted(phones.values()) == ["", "+49 30 1"]


def leads_to_outside(customer: Customer) -> Any:
    return Customer.objects.values_list("merged_into", flat=True).get(pk=customer.pk) or customer.pk
