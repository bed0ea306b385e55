"""The one door in: upserts by key, races, folds, merges, and a constant number of statements."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext

from connectors.models import Connection, CustomerLink
from connectors.provider import Record
from connectors.sync.receive import receive
from customers import editing
from customers.editing import Actor, InvalidCustomer, UnknownCustomer
from customers.models import Customer, CustomerChange, Organization

ACTOR = Actor(kind="api_key", name="shop", id="1")
FIELDS = frozenset({"name", "email", "phone"})


def take(connection: Connection | None, *records: Record, **options: Any) -> list[Any]:
    organization = options.pop("organization", None) or connection.organization  # type: ignore[union-attr]
    return receive(organization=organization, connection=connection, records=records, actor=ACTOR, **options)


def record(remote_id: str | None, **values: Any) -> Record:
    return Record(remote_id=remote_id, values={"name": "Acme", **values}, document={"from": "them", **values})


def test_a_known_remote_id_changes_its_customer_and_an_unknown_one_makes_one(
    connect: Callable[..., Connection],
) -> None:
    shop = connect("cheqpay")
    [first] = take(shop, record("A", email="a@example.com"))
    [second, other] = take(shop, record("A", phone="+1234567890"), record("B"))
    assert (first.outcome, second.outcome, other.outcome) == ("created", "updated", "created")
    assert first.customer.pk == second.customer.pk != other.customer.pk
    stored = Customer.objects.get(pk=first.customer.pk)
    assert (stored.email, stored.phone, stored.version) == ("a@example.com", "+1234567890", 2)
    link = CustomerLink.objects.get(remote_id="A")
    assert link.remote_data == {"from": "them", "email": "a@example.com", "phone": "+1234567890"}
    assert not link.is_dirty
    [same] = take(shop, record("A"))
    assert same.outcome == "unchanged"
    assert Customer.objects.get(pk=first.customer.pk).version == 2


def test_one_key_twice_in_a_batch_is_one_customer(connect: Callable[..., Connection]) -> None:
    shop = connect("cheqpay")
    first, second = take(shop, record("A", email="a@example.com"), record("A", name="Later"))
    assert first.customer.pk == second.customer.pk
    assert Customer.objects.get().name == "Later"
    assert Customer.objects.get().email == "a@example.com"


def test_records_without_a_key_are_new_each_time(connect: Callable[..., Connection]) -> None:
    shop = connect("rootfi")
    take(shop, record(None), record(None))
    assert Customer.objects.count() == CustomerLink.objects.count() == 2


def test_one_bad_record_keeps_the_whole_batch_out(connect: Callable[..., Connection]) -> None:
    with pytest.raises(InvalidCustomer):
        take(connect("rootfi"), record("A"), record("B", phone="1" * 100))
    assert not Customer.objects.exists()
    assert not CustomerLink.objects.exists()


def test_ids_of_another_organization_are_unknown(
    organization: Organization, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    [foreign] = editing.create(organization=other_organization, values=[{"name": "Theirs"}], actor=ACTOR)
    with pytest.raises(UnknownCustomer):
        take(None, Record(values={"name": "Mine"}, customer_id=foreign.pk), organization=organization)
    theirs = connect("commenda", organization=other_organization)
    take(theirs, record("A"))
    with pytest.raises(UnknownCustomer):
        take(connect("commenda"), Record(values={"name": "Mine"}, link_id=CustomerLink.objects.get().pk))
    assert not Customer.objects.filter(name="Mine").exists()


@pytest.mark.django_db(transaction=True)
def test_parallel_upserts_of_one_key_make_one_customer(
    transactional_db: None, connect: Callable[..., Connection]
) -> None:
    shop = connect("cheqpay")
    ready = threading.Barrier(8)
    failures: list[BaseException] = []

    def upsert(number: int) -> None:
        try:
            ready.wait()
            for key in ("A", "B"):
                take(shop, record(key, phone=f"+123456789{number}"))
        except BaseException as error:
            failures.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=upsert, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert Customer.objects.count() == 2
    assert CustomerLink.objects.count() == 2
    for customer in Customer.objects.all():
        versions = list(
            CustomerChange.objects.filter(customer=customer).values_list("version", flat=True).order_by("version")
        )
        assert versions == list(range(1, customer.version + 1)), "each accepted write is one version"
        assert customer.version == 8


def test_a_change_that_arrives_dirties_other_systems_but_not_the_one_it_came_from(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    there = connect(
        "links", name="there", direction=Connection.Direction.PUSH_AND_PULL, base_url="https://a.example.com"
    )
    other = connect(
        "links", name="other", account="2", direction=Connection.Direction.PUSH, base_url="https://b.example.com"
    )
    take(there, record("R1", phone="+1"), fields=FIELDS)
    customer = Customer.objects.get()
    CustomerLink.objects.create(
        customer=customer,
        connection=other,
        remote_id="O1",
        needed_version=1,
        pushed_version=1,
        created_at=customer.created_at,
        updated_at=customer.updated_at,
    )
    take(there, record("R1", phone="+2"), fields=FIELDS)
    assert not CustomerLink.objects.get(connection=there).is_dirty
    assert CustomerLink.objects.get(connection=other).is_dirty


def test_a_pull_keeps_an_edit_made_here_and_takes_what_moved_there(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    there = connect("links", direction=Connection.Direction.PUSH_AND_PULL, base_url="https://a.example.com")
    take(there, record("R1", email="a@example.com", phone="+1"), fields=FIELDS)
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"email": "mine@example.com"}}, actor=ACTOR)
    [result] = take(there, record("R1", email="a@example.com", phone="+2"), fields=FIELDS)
    stored = Customer.objects.get()
    assert (stored.email, stored.phone) == ("mine@example.com", "+2")
    assert result.merge.conflicts == {}
    assert CustomerLink.objects.get().is_dirty, "the edit made here is still to be sent"


@pytest.mark.parametrize(
    ("policy", "wins"), [("hub_wins", "mine@example.com"), ("provider_wins", "theirs@example.com")]
)
def test_a_field_changed_on_both_sides_follows_the_policy_and_tells_all_three_values(
    organization: Organization, connect: Callable[..., Connection], policy: str, wins: str
) -> None:
    there = connect(
        "links", direction=Connection.Direction.PUSH_AND_PULL, base_url="https://a.example.com", conflict_policy=policy
    )
    take(there, record("R1", email="a@example.com"), fields=FIELDS)
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"email": "mine@example.com"}}, actor=ACTOR)
    [result] = take(there, record("R1", email="theirs@example.com"), fields=FIELDS)
    assert Customer.objects.get().email == wins
    assert result.merge.conflicts == {"email": ["a@example.com", "mine@example.com", "theirs@example.com"]}
    assert CustomerLink.objects.get().is_dirty is (policy == "hub_wins")
    [again] = take(there, record("R1", email="theirs@example.com"), fields=FIELDS)
    assert again.merge.conflicts == {}, "one conflict is told once"


def test_the_number_of_statements_does_not_grow_with_the_batch(connect: Callable[..., Connection]) -> None:
    shop = connect("rootfi")
    counts = []
    take(shop, record("first"))  # a table's first rows have its statistics made
    for size in (2, 150):
        with CaptureQueriesContext(database) as creating:
            take(shop, *(record(f"{size}-{n}", email=f"{n}@example.com") for n in range(size)))
        with CaptureQueriesContext(database) as updating:
            take(shop, *(record(f"{size}-{n}", phone=f"+1234567{n:03}") for n in range(size)))
        counts.append((len(creating), len(updating)))
    assert counts[0] == counts[1]


def test_what_is_imported_for_a_system_that_new_customers_are_sent_to_is_linked_and_not_sent(
    connect: Callable[..., Connection],
) -> None:
    books = connect(
        "links", direction=Connection.Direction.PUSH, create_policy=Connection.CreatePolicy.AUTOMATIC, account=""
    )
    records = [Record(values={"name": f"Ann {n}"}, remote_id=f"r{n}") for n in range(3)]
    receive(
        organization=books.organization,
        connection=books,
        records=records,
        actor=Actor(kind="command", name="import_customers"),
    )
    links = CustomerLink.objects.filter(connection=books)
    assert {link.remote_id for link in links} == {"r0", "r1", "r2"}
    assert not any(link.is_dirty for link in links)
