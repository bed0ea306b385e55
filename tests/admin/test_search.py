"""Finding customers: by what, in which order, and never more than the person may know."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.utils import timezone

from connectors.models import Connection, CustomerLink
from customers import editing, search
from customers.editing import Actor
from customers.ids import public_id
from customers.models import Customer, Organization
from tests.customers.test_customer_admin import LIST, staff

COMMAND = Actor(kind="command", name="test")
LOOK = "customers.view_customer"
SEE = "customers.view_personal_data"


def new(organization: Organization, *values: dict[str, Any]) -> list[Customer]:
    return editing.create(organization=organization, values=[{"name": "Acme", **one} for one in values], actor=COMMAND)


def found(client: Client, term: str, **query: str) -> list[str]:
    return [customer.name for customer in client.get(LIST, {"q": term, **query}).context["cl"].result_list]


@pytest.fixture
def people(organization: Organization) -> list[Customer]:
    organization.country = "DE"
    organization.save()
    return new(
        organization,
        {"name": "Anna Schmidt", "email": "anna.schmidt@example.com", "phone": "+493012345678"},
        {"name": "Schmidt & Söhne KG", "custom_fields": {"vat": "DE123456789", "deep": {"number": 48151623}}},
        {"name": "Jürgen Groß", "email": "smithy@example.net", "phone": "+4989555666"},
        {"name": "佐藤 花子", "email": "hanako@example.org"},
    )


@pytest.mark.parametrize(
    ("term", "names"),
    [
        ("schmidt", ["Schmidt & Söhne KG", "Anna Schmidt"]),
        ("schmidt anna", ["Anna Schmidt"]),
        ("mid", ["Anna Schmidt", "Schmidt & Söhne KG"]),
        ("SÖHNE", ["Schmidt & Söhne KG"]),
        ("jurgen", ["Jürgen Groß"]),
        ("GROSS", ["Jürgen Groß"]),
        ("ithy@exam", ["Jürgen Groß"]),
        ("smithy", ["Jürgen Groß"]),
        ("030 12345678", ["Anna Schmidt"]),
        ("0049 30 12345678", ["Anna Schmidt"]),
        ("555 666", ["Jürgen Groß"]),
        ("DE123456789", ["Schmidt & Söhne KG"]),
        ("de123456789", ["Schmidt & Söhne KG"]),
        ("48151623", ["Schmidt & Söhne KG"]),
        ("DE12345678", []),
        ("佐藤", ["佐藤 花子"]),
        ("花子", []),
        ("%", []),
        ('"', []),
        ("' OR 1=1 --", []),
        ("a*b^c:(d)", []),
    ],
)
def test_each_term_finds_whom_it_means(
    organization: Organization, people: list[Customer], term: str, names: list[str]
) -> None:
    assert found(staff(organization, LOOK, SEE), term) == names


def test_ids_of_every_kind_find_the_customer(
    organization: Organization, people: list[Customer], connect: Callable[..., Connection]
) -> None:
    anna, now = people[0], timezone.now()
    link = CustomerLink.objects.create(
        customer=anna, connection=connect("links"), remote_id="88-102", created_at=now, updated_at=now
    )
    client = staff(organization, LOOK)
    for term in (
        *(anna.public_id, str(anna.pk), "88-102", str(link.uid), public_id("lnk", link.uid), str(link.pk)),
        f" {anna.public_id} ",
    ):
        assert found(client, term) == ["Anna Schmidt"], term


def test_an_exact_hit_comes_before_names_that_begin_so(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    now = timezone.now()
    target, _, _ = new(organization, {"name": "Zeta"}, {"name": "4711 Ltd"}, {"name": "Shop 4711"})
    CustomerLink.objects.create(
        customer=target, connection=connect("links"), remote_id="4711", created_at=now, updated_at=now
    )
    assert found(staff(organization, LOOK), "4711") == ["Zeta", "4711 Ltd"]


def test_search_follows_what_changes(organization: Organization, people: list[Customer]) -> None:
    client = staff(organization, LOOK, SEE)
    anna = people[0]
    values = {"name": "Anna Kowalska", "phone": "", "custom_fields": {"tax": "PL5260001246"}}
    editing.update(organization=organization, values={anna.pk: values}, actor=COMMAND)
    assert found(client, "walska") == ["Anna Kowalska"]
    assert found(client, "PL5260001246") == ["Anna Kowalska"]
    assert found(client, "schmidt") == ["Schmidt & Söhne KG", "Anna Kowalska"], "her e-mail address says so still"
    assert found(client, "12345678") == []


def test_filters_narrow_what_a_term_finds(organization: Organization, people: list[Customer]) -> None:
    client = staff(organization, LOOK, SEE)
    editing.archive(organization=organization, ids=[people[0].pk], actor=COMMAND)
    assert found(client, "schmidt", archived="yes") == ["Anna Schmidt"]
    assert found(client, "anna.schmidt@example.com", archived="no") == []


def test_nothing_of_another_organization_is_found(
    organization: Organization, other_organization: Organization, people: list[Customer]
) -> None:
    client = staff(other_organization, LOOK, SEE)
    for term in ("schmidt", "mid", people[0].public_id, "anna.schmidt@example.com", "DE123456789", "030 12345678"):
        assert found(client, term) == []


def test_personal_data_is_not_found_out_letter_by_letter(organization: Organization, people: list[Customer]) -> None:
    client = staff(organization, LOOK)
    for part in ("smithy", "ithy@exam", "555 666", "DE123456789", "48151623"):
        assert found(client, part) == [], part
    assert found(client, "smithy@example.net") == ["Jürgen Groß"], "who knows the whole address learns nothing by it"
    assert found(client, "mid") == ["Anna Schmidt", "Schmidt & Söhne KG"]
    for lookup in ("email__startswith", "phone_key__contains", "custom_fields__vat", "email"):
        assert client.get(LIST, {lookup: "s"}).status_code == 400, lookup


def test_a_term_that_many_share_ends_in_time(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LIMIT", 7)
    new(organization, *({"name": f"Common {n}"} for n in range(20)))
    page = staff(organization, LOOK).get(LIST, {"q": "common"})
    assert page.context["cl"].result_count == 7


@pytest.mark.parametrize("key", ["abc", "z", "\U0010ffff", "a\U0010ffff", "\ud7ff", "ß"])
def test_the_range_of_a_beginning_holds_what_begins_so(organization: Organization, key: str) -> None:
    names = [key, f"{key}a", f"{key}\U0010fffd", f"{key}😀", f"b{key}", "a", "zz"]
    Customer.objects.all().delete()
    now = timezone.now()
    Customer.objects.bulk_create(
        Customer(organization=organization, name="x", name_key=name, created_at=now, updated_at=now) for name in names
    )
    begins = set(Customer.objects.filter(search.beginning("name_key", key)).values_list("name_key", flat=True))
    assert begins == {name for name in names if name.startswith(key)}


@pytest.mark.skipif(database.vendor != "sqlite", reason="PostgreSQL keeps an index")
def test_sqlite_gets_its_triggers_back_after_a_table_was_made_anew(
    organization: Organization, people: list[Customer]
) -> None:
    with database.cursor() as cursor:
        for name in search.TRIGGERS:
            cursor.execute(f"DROP TRIGGER {name}")
    [late] = new(organization, {"name": "Late Comer"})
    client = staff(organization, LOOK, SEE)
    assert found(client, "omer") == []
    search.prepare(database)
    assert found(client, "omer") == ["Late Comer"]
    editing.update(organization=organization, values={late.pk: {"name": "Early Bird"}}, actor=COMMAND)
    assert found(client, "omer") == []
    assert found(client, "arly") == ["Early Bird"]
    with database.cursor() as cursor:
        cursor.execute("INSERT INTO customers_searchindex (customers_searchindex) VALUES ('integrity-check')")
