"""Comparing tells what is, and leaves both sides as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext

from connectors.exceptions import ConnectionUnusable, Rejected, RetryLater
from connectors.models import Connection, CustomerLink
from connectors.states import LinkState
from connectors.sync.check import Check, Finding, check
from connectors.sync.push import push
from customers import editing
from customers.ids import uuid7
from customers.models import Customer
from tests.connectors.test_commands import run
from tests.connectors.test_sweep import ACTOR, NOTHING, Shop, shops
from tests.fake.connector import CONNECTORS, Fake

__all__ = ["shops"]  # a fixture
READS = {"lists": True, "fetches": True, "shows_deleted": "flag"}


@contextlib.contextmanager
def nothing_changes(shop: Shop) -> Iterator[None]:
    """Fails when a statement is no SELECT, or a request no GET."""
    before = shop.account.judge().request_count()
    with CaptureQueriesContext(database) as queries:
        yield
    assert queries.captured_queries
    assert [q["sql"] for q in queries if not q["sql"].startswith("SELECT")] == []
    assert {r["method"] for r in shop.account.ledger(after=before)} <= {"GET"}


def compare(shop: Shop, **options: Any) -> Check:
    with nothing_changes(shop):
        return check(**shop.engine, **options)


def counts(found: Check) -> dict[str, int]:
    assert all(len(samples) <= 5 for samples in found.samples.values())
    return {str(finding): number for finding, number in found.counts.items()}


def synced(shop: Shop, **values: Any) -> CustomerLink:
    [customer] = shop.customers(1, **values)
    shop.push(customer)
    return shop.link(customer)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connector refuses customers who are called so."""
    document = Fake.document

    def demanding(self: Fake, customer: Customer, **more: Any) -> dict[str, Any]:
        if customer.name.startswith("Refused"):
            raise Rejected("Give a nicer name.", field="name")
        return document(self, customer, **more)

    monkeypatch.setattr(Fake, "document", demanding)


def scene(shop: Shop) -> dict[str, CustomerLink]:
    """One customer, or record, of each finding."""
    links = {
        name: synced(shop, name=name, phone="1")
        for name in ("Same", "Update", "Conflict", "Changed there", "Gone", "Gone and known", "Refuse", "Parked")
    }
    shop.clock.advance(3600)
    shop.customers(1, name="Create")
    shop.customers(1, name="Refused before")
    shop.edit(links["Update"].customer, phone="22", address_city="Bonn")
    shop.edit(links["Conflict"].customer, phone="22")
    shop.account.edit(links["Conflict"].remote_id or "", phone="333")
    shop.account.edit(links["Changed there"].remote_id or "", phone="333")
    shop.account.delete(links["Gone"].remote_id or "")
    shop.edit(links["Refuse"].customer, name="Refused now")
    CustomerLink.objects.filter(pk=links["Parked"].pk).update(state=LinkState.REJECTED, error="No.")
    CustomerLink.objects.filter(pk=links["Gone and known"].pk).update(deleted_at=shop.clock())
    return links


ALL = {
    "same": 1,
    "would update": 1,
    "conflict": 1,
    "changed there": 1,
    "gone there": 2,
    "refused": 2,
    "waiting": 1,
    "would create": 1,
}


def test_each_customer_is_told_by_what_the_list_shows(shops: Any, refusing: None) -> None:
    shop = shops(**READS)
    links = scene(shop)
    stranger = shop.account.create(name="Stranger")
    found = compare(shop)
    assert (found.read, found.note, found.complete) == ("list", "", True)
    assert counts(found) == {**ALL, "not linked there": 1}
    assert found.refusals == {("name", "Give a nicer name."): 2}
    [update] = found.samples[Finding.UPDATE]
    assert (update.customer, update.remote_id) == (links["Update"].customer, links["Update"].remote_id)
    assert {name: here for name, (here, _) in update.fields.items()} == {"address_city": "Bonn", "phone": "22"}
    assert update.fields["phone"] == ["22", "1"]
    assert found.samples[Finding.CONFLICT][0].fields == {"phone": ["22", "333"]}
    assert found.samples[Finding.CHANGED_THERE][0].fields == {"phone": ["1", "333"]}
    assert found.samples[Finding.WAITING][0].reason == "No."
    assert [s.remote_id for s in found.samples[Finding.UNKNOWN]] == [stranger]
    assert found.samples[Finding.SAME] == []


def test_without_a_list_each_record_is_read_alone(shops: Any, refusing: None) -> None:
    shop = shops(fetches=True)
    scene(shop)
    shop.account.create(name="Stranger")
    found = compare(shop)
    assert found.read == "fetch"
    assert "read alone" in found.note
    assert counts(found) == ALL


def test_without_any_reading_it_compares_with_what_was_sent(shops: Any, refusing: None) -> None:
    shop = shops()
    scene(shop)
    found = compare(shop)
    assert found.read == ""
    assert "no way to read customers" in found.note
    # What was changed or deleted there is not known.
    assert counts(found) == {
        **{name: ALL[name] for name in ("refused", "waiting", "would create")},
        "same": 3,
        "would update": 2,
        "gone there": 1,
    }
    assert shop.account.judge().requests(method="GET") == []


def test_a_complete_list_without_it_means_gone(shops: Any) -> None:
    shop = shops(**{**READS, "shows_deleted": "scan"})
    link = synced(shop)
    shop.clock.advance(3600)
    shop.account.delete(link.remote_id or "")
    assert counts(compare(shop)) == {"gone there": 1}
    # So near to its creation the list may be behind.
    CustomerLink.objects.update(synced_at=shop.clock())
    assert counts(compare(shop)) == {"waiting": 1}


def test_archived_customers_and_second_records_are_left_out(shops: Any) -> None:
    shop = shops(**READS)
    archived, second = synced(shop), synced(shop)
    editing.archive(organization=shop.organization, ids=[archived.customer_id], actor=ACTOR)
    CustomerLink.objects.filter(pk=second.pk).update(is_duplicate=True)
    assert counts(compare(shop)) == {"would create": 1}


def test_a_lost_create_is_waiting_and_its_record_no_stranger(shops: Any) -> None:
    shop = shops(**READS)
    shop.lose()
    assert counts(compare(shop)) == {"waiting": 1}


def test_a_lost_update_is_our_own_and_no_conflict_however_it_is_stored(shops: Any) -> None:
    shop = shops(**READS)
    shop.account.set(normaliser="upper")
    shop.provider = next(one for one in CONNECTORS if one.slug == "fake_upper")
    Connection.objects.update(provider="fake_upper")
    shop.connection.refresh_from_db()
    link = synced(shop, address_city="Bonn")
    shop.edit(link.customer, address_city="Ulm")
    shop.account.script("reset_after", method="PATCH")
    shop.due()
    push(**shop.engine)
    assert shop.link(link.customer).base_local["address_city"] == "Bonn"
    shop.clock.advance(60)
    assert counts(compare(shop)) == {"same": 1}
    shop.edit(link.customer, address_city="Jena")
    found = compare(shop)
    assert counts(found) == {"would update": 1}
    assert found.samples[Finding.UPDATE][0].fields == {"address_city": ["Jena", "ULM"]}


def test_a_link_that_moves_meanwhile_is_not_judged(shops: Any) -> None:
    shop = shops(**READS)
    link = synced(shop, phone="1")
    shop.account.edit(link.remote_id or "", phone="333")
    CustomerLink.objects.update(synced_at=shop.clock() + timedelta(minutes=1))
    assert counts(compare(shop)) == {"waiting": 1}


def test_chosen_customers_are_read_alone(shops: Any) -> None:
    shop = shops(**READS)
    links = [synced(shop, name=f"Example {n}") for n in range(7)]
    shop.account.create(name="Stranger")
    before = shop.account.judge().request_count()
    assert counts(compare(shop, customer_ids=[links[3].customer_id])) == {"same": 1}
    assert [r["path"] for r in shop.account.ledger(after=before)] == [f"/a/shop/customers/{links[3].remote_id}"]
    assert counts(compare(shop, limit=3)) == {"same": 3}
    assert counts(compare(shop, since=shop.link(links[0].customer).customer.updated_at)) == {"same": 7}
    Connection.objects.update(options={"capabilities": {"lists": True}})
    shop.connection.refresh_from_db()
    assert counts(compare(shop, limit=3)) == {"same": 3}


def test_pages_are_joined_and_statements_stay_few(shops: Any) -> None:
    shop = shops(**READS, batch=100, upsert_external_id=True)
    made = shop.customers(230)
    shop.push(*made)
    for n in range(40):
        shop.account.create(name=f"Stranger {n}")
    shop.clock.advance(3600)
    with CaptureQueriesContext(database) as queries:
        found = compare(shop)
    assert counts(found) == {"same": 230, "not linked there": 40}
    assert len(queries) <= 3 * 7 + 6


def test_a_list_that_repeats_records_counts_each_once(shops: Any) -> None:
    shop = shops(**READS)
    link = synced(shop)
    page = shop.provider.page

    class Twice(Fake):
        def page(self, *args: Any, **options: Any) -> Any:
            found = page(*args, **options)
            return type(found)(records=[*found.records, *found.records], next=found.next)

    found = check(**{**shop.engine, "provider": Twice()})
    assert counts(found) == {"same": 1}
    assert found.samples[Finding.SAME] == []
    assert link.remote_id == "r1"


def test_a_404_is_believed_only_when_the_account_answers(shops: Any) -> None:
    shop = shops(fetches=True)
    for n in range(3):
        synced(shop, name=f"Example {n}")
    shop.account.script("404_all", method="GET", times=10)
    with pytest.raises(ConnectionUnusable, match="account"):
        compare(shop)


def test_it_waits_when_asked_to_and_keeps_to_the_rate(shops: Any) -> None:
    shop = shops(fetches=True)
    for n in range(5):
        synced(shop, name=f"Example {n}")
    shop.account.script("429", method="GET", retry_after=7)
    began = shop.clock.now
    assert counts(compare(shop)) == {"same": 5}
    assert timedelta(seconds=7) <= shop.clock.now - began < timedelta(seconds=9)
    assert shop.account.judge().impatient() == []
    Connection.objects.update(rate=0.5)
    began = shop.clock.now
    compare(shop)
    assert timedelta(seconds=8) <= shop.clock.now - began < timedelta(seconds=10)
    Connection.objects.update(not_before=shop.clock() + timedelta(hours=1))
    with pytest.raises(RetryLater, match="asked to wait until"):
        compare(shop)


def test_it_gives_up_on_a_system_that_keeps_failing(shops: Any) -> None:
    shop = shops(**READS)
    shop.account.script("503", method="GET", times=100)
    with pytest.raises(RetryLater):
        compare(shop)


def test_a_stop_ends_it_with_what_was_found(shops: Any) -> None:
    shop = shops(fetches=True)
    for n in range(5):
        synced(shop, name=f"Example {n}")
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        return len(seen) > 3

    found = compare(shop, stop=stop)
    assert (found.complete, counts(found)) == (False, {"same": 2})


def test_a_system_that_is_only_read_is_compared_without_pushing(shops: Any) -> None:
    shop = shops(**READS)
    links = scene(shop)
    shop.connection.direction = "pull"
    shop.connection.save()
    found = compare(shop)
    assert {name: n for name, n in counts(found).items() if name.startswith("would")} == {}
    assert found.counts[Finding.CHANGED_THERE] == 1
    assert len(links) == 8


# check_customers


@pytest.mark.django_db(transaction=True)
def test_the_command_counts_and_shows_samples(shops: Any, refusing: None) -> None:
    shop = shops(socket=True, **READS)
    links = scene(shop)
    CustomerLink.objects.update(synced_at="2026-01-01T00:00:00Z")
    shop.account.create(name="Stranger")
    with nothing_changes(shop):
        found = run("check_customers", "shop", "--json")
    assert (found.code, found.objects[0]["dry_run"]) == (3, True)
    assert found.totals == {"created": 1, "updated": 2, "unchanged": 1, "refused": 4, "uncertain": 2, "skipped": 1}
    assert {(p["state"], p["count"]) for p in found.objects[0]["problems"]} == {
        (state, 2 if state in ("gone there", "refused") else 1) for state in {*ALL, "not linked there"} - {"same"}
    }
    conflict = links["Conflict"].customer
    assert (
        f"conflict: Conflict ({conflict.public_id}), record {links['Conflict'].remote_id}: phone '22' here, '333' there"
        in found.objects[0]["samples"]
    )
    with nothing_changes(shop):
        one = run("check_customers", "shop", "--customer", conflict.public_id, "--json")
    assert one.totals == {"uncertain": 1}
    same = run("check_customers", "shop", "--customer", links["Same"].customer.public_id)
    assert same.code == 0
    header, row = same.out.splitlines()
    assert header.split()[:2] == ["would", "be"]
    assert row.split() == ["shop", "check", "0", "0", "1", "0", "0", "0", "0", "1"]
    assert "read alone" in same.err
    assert run("check_customers", "shop", "--limit=2", "--json").objects[0]["planned"] == 2


@pytest.mark.django_db(transaction=True)
def test_the_command_ends_with_the_documented_codes(shops: Any, connect: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    assert run("check_customers", "shop").code == 0
    assert run("check_customers", "shop", "--customer=nope").code == 2
    assert run("check_customers").code == 2
    connect("commenda", name="inbound")
    assert run("check_customers", "inbound").code == 2
    assert run("check_customers", "shop", f"--customer={uuid7()}").code == 1
    shop.account.script("401", method="GET")
    assert run("check_customers", "--all").code == 5
    Connection.objects.filter(name="shop").update(state="paused")
    assert run("check_customers", "shop").code == 5
