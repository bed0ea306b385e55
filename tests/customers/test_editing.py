"""The only writers of customers: versions, changes, locking, and a constant number of statements."""

import ast
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from customers import bulk, editing
from customers.editing import Actor, InvalidCustomer, StaleVersion, UnknownCustomer
from customers.models import Customer, CustomerChange, Organization

ACTOR = Actor(kind="user", name="Tester", id="1", request_id="req_1", message="why")


def make(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[{"name": "Acme Corp", **values}], actor=ACTOR)[0]


def test_creating_stores_the_text_as_given_beside_its_keys(organization: Organization) -> None:
    customer = make(
        organization,
        name="  Dö & Söhne ",
        email="Jane.Doe@Example.com",
        phone="+49 (30) 5550-1",
        address_country="United States",
    )
    stored = Customer.objects.get(pk=customer.pk)
    assert (stored.name, stored.name_key) == ("Dö & Söhne", "do & sohne")
    assert (stored.email, stored.email_key) == ("Jane.Doe@Example.com", "jane.doe@example.com")
    assert (stored.phone, stored.phone_key) == ("+49 (30) 5550-1", "+493055501")
    assert (stored.address_country, stored.address_country_code) == ("United States", "US")
    assert stored.version == 1
    assert stored.public_id.startswith("cust_")
    assert len(stored.public_id) == 31


def test_every_version_has_one_change_with_its_author(organization: Organization) -> None:
    customer = make(organization, email="a@example.com")
    editing.update(organization=organization, values={customer.pk: {"email": "b@example.com"}}, actor=ACTOR)
    first, second = CustomerChange.objects.filter(customer=customer).order_by("version")
    assert first.changes == {"name": [None, "Acme Corp"], "email": [None, "a@example.com"]}
    assert second.changes == {"email": ["a@example.com", "b@example.com"]}
    assert (second.version, second.actor_name, second.request_id, second.message) == (2, "Tester", "req_1", "why")


@pytest.mark.parametrize("name", editing.TEXTS)
def test_a_change_of_one_field_alone_is_stored_and_told(organization: Organization, name: str) -> None:
    customer = make(organization)
    editing.update(organization=organization, values={customer.pk: {name: "1234"}}, actor=ACTOR)
    assert getattr(Customer.objects.get(pk=customer.pk), name) == "1234"
    assert name in CustomerChange.objects.get(customer=customer, version=2).changes


def test_values_that_are_stored_already_make_no_version(organization: Organization) -> None:
    customer = make(organization, phone="+1234567890")
    result = editing.update(
        organization=organization, values={customer.pk: {"name": " Acme Corp ", "phone": "+1234567890"}}, actor=ACTOR
    )
    assert result[customer.pk].changes == {}
    assert Customer.objects.get(pk=customer.pk).version == 1
    assert CustomerChange.objects.filter(customer=customer).count() == 1


def test_a_stale_version_stores_nothing(organization: Organization) -> None:
    one, other = make(organization), make(organization)
    editing.update(organization=organization, values={one.pk: {"name": "Newer"}}, actor=ACTOR)
    with pytest.raises(StaleVersion) as caught:
        editing.update(
            organization=organization,
            values={one.pk: {"name": "Mine"}, other.pk: {"name": "Mine"}},
            actor=ACTOR,
            expected={one.pk: 1, other.pk: 1},
        )
    assert [customer.name for customer in caught.value.customers] == ["Newer"]
    assert Customer.objects.get(pk=other.pk).name == "Acme Corp"


def test_one_invalid_record_keeps_the_whole_batch_out_and_names_the_field(organization: Organization) -> None:
    with pytest.raises(InvalidCustomer) as caught:
        editing.create(
            organization=organization,
            values=[{"name": "Fine"}, {"name": " "}, {"name": "Fine", "phone": "1" * 65}, {"name": "a\x00b"}],
            actor=ACTOR,
        )
    assert caught.value.errors.keys() == {1, 2, 3}
    assert "64 characters" in caught.value.errors[2]["phone"][0]
    assert not Customer.objects.exists()


def test_another_organizations_customer_is_unknown(
    organization: Organization, other_organization: Organization
) -> None:
    foreign = make(other_organization)
    for ids in ([foreign.pk], [uuid4()]):
        with pytest.raises(UnknownCustomer):
            editing.archive(organization=organization, ids=ids, actor=ACTOR)


def test_archiving_and_restoring_are_versions_too(organization: Organization) -> None:
    customer = make(organization)
    editing.archive(organization=organization, ids=[customer.pk], actor=ACTOR)
    editing.archive(organization=organization, ids=[customer.pk], actor=ACTOR)
    stored = Customer.objects.get(pk=customer.pk)
    assert stored.archived_at is not None
    assert stored.version == 2
    editing.restore(organization=organization, ids=[customer.pk], actor=ACTOR)
    stored.refresh_from_db()
    assert (stored.archived_at, stored.version) == (None, 3)


def test_a_name_and_its_two_parts_follow_each_other(organization: Organization) -> None:
    customer = make(organization, name=None, first_name="John", last_name="Doe")
    assert customer.name == "John Doe"
    editing.update(organization=organization, values={customer.pk: {"first_name": "Jane"}}, actor=ACTOR)
    assert Customer.objects.get(pk=customer.pk).name == "Jane Doe"
    editing.update(organization=organization, values={customer.pk: {"name": "Jane Roe"}}, actor=ACTOR)
    stored = Customer.objects.get(pk=customer.pk)
    assert (stored.name, stored.first_name, stored.last_name) == ("Jane Roe", "", "")


def test_the_id_of_a_merged_customer_leads_to_its_survivor(organization: Organization) -> None:
    survivor, merged = make(organization), make(organization)
    Customer.objects.filter(pk=merged.pk).update(merged_into=survivor)
    editing.update(organization=organization, values={merged.pk: {"name": "Renamed"}}, actor=ACTOR)
    assert Customer.objects.get(pk=survivor.pk).name == "Renamed"
    assert Customer.objects.get(pk=merged.pk).name == "Acme Corp"


def statements(organization: Organization, size: int) -> tuple[int, int]:
    with CaptureQueriesContext(connection) as creating:
        customers = editing.create(
            organization=organization,
            values=[{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(size)],
            actor=ACTOR,
        )
    with CaptureQueriesContext(connection) as updating:
        editing.update(
            organization=organization,
            values={c.pk: {"phone": f"+1234567{n:03}"} for n, c in enumerate(customers)},
            actor=ACTOR,
        )
    assert set(Customer.objects.filter(pk__in=[c.pk for c in customers]).values_list("version", flat=True)) == {2}
    return len(creating), len(updating)


def test_the_number_of_statements_does_not_grow_with_the_number_of_records(organization: Organization) -> None:
    assert statements(organization, 2) == statements(organization, 150)


def test_copy_and_the_json_parameter_store_the_same(
    organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    awkward = {
        "name": 'Tab\there "quoted" \\ back',
        "address_line1": "line\nbreak",
        "custom_fields": {"nested": {"a": [1, None, "ü"]}},
        "is_active": False,
    }
    by_json = editing.create(organization=organization, values=[awkward] * 3, actor=ACTOR)
    monkeypatch.setattr(bulk, "COPY_FROM_ROWS", 1)
    by_copy = editing.create(organization=organization, values=[awkward] * 3, actor=ACTOR)
    columns = [f.attname for f in Customer._meta.concrete_fields if f.name not in ("id", "created_at", "updated_at")]
    rows = Customer.objects.filter(pk__in=[c.pk for c in (*by_json, *by_copy)]).values_list(*columns)
    assert len({repr(row) for row in rows}) == 1


def test_only_editing_writes_customers() -> None:
    """No other module makes, saves, updates or deletes customers or their changes."""
    root = Path(editing.__file__).parent.parent
    writes = {"create", "bulk_create", "bulk_update", "update", "get_or_create", "update_or_create", "delete"}
    offences = []
    for package in ("hub", "customers", "connectors"):
        for path in (root / package).rglob("*.py"):
            if path.name == "editing.py" or "migrations" in path.parts:
                continue
            for call in ast.walk(ast.parse(path.read_text())):
                if not isinstance(call, ast.Call):
                    continue
                makes = isinstance(call.func, ast.Name) and call.func.id in ("Customer", "CustomerChange")
                asks = ast.unparse(call.func)
                stores = asks.startswith(("Customer.objects", "CustomerChange.objects")) or ".customers." in asks
                if makes or (stores and isinstance(call.func, ast.Attribute) and call.func.attr in writes):
                    offences.append(f"{path.relative_to(root)}:{call.lineno}: {asks}")
    assert offences == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite's planner needs no statistics for these tables")
def test_a_table_that_has_doubled_is_counted_again(transactional_db: None, organization: Organization) -> None:
    """Autovacuum comes later or never; a page of a fresh bulk load is asked for at once."""

    def counted(new: int) -> int:
        bulk._inserted.clear()  # as in a process that has just begun
        values = [{"name": f"Example {n}"} for n in range(new)]
        editing.create(organization=organization, values=values, actor=ACTOR)
        with connection.cursor() as cursor:
            cursor.execute("SELECT reltuples FROM pg_class WHERE relname = 'customers_customer'")
            return int(cursor.fetchone()[0])

    assert counted(1100) == 1100
    assert counted(3300) == 4400
    assert counted(1100) == 4400  # a quarter more: what is known of it is still good


def test_a_number_beyond_64_bits_survives_both_databases(organization: Organization) -> None:
    customer = make(organization, custom_fields={"far": 8.7e23})
    for value in ("b", "c"):
        editing.update(
            organization=organization,
            values={customer.pk: {"name": value, "custom_fields": {"far": 8.7e23, "near": value}}},
            actor=ACTOR,
        )
    kept = Customer.objects.get(pk=customer.pk).custom_fields
    assert (float(kept["far"]), kept["near"]) == (8.7e23, "c")
