"""The customers list: what its filters leave, what it costs, and what it counts."""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from unfold.templatetags import unfold_list

from connectors.admin import filters
from connectors.admin.filters import counts_by_status, in_status
from connectors.models import Conflict, Connection, CustomerLink
from connectors.states import STATUSES
from customers import editing
from customers.admin import customers as customer_admin
from customers.admin import filters as own_filters
from customers.admin.paging import BoundedPaginator, MoreThan
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.customers.test_customer_admin import LIST, staff

COMMAND = Actor(kind="command", name="test")
PERSON = Actor(kind="user", name="A. Clerk")
LOOK = ("customers.view_customer", "customers.view_personal_data")


def new(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[{"name": "Acme", **values}], actor=COMMAND)[0]


def link(customer: Customer, connection: Connection, **fields: Any) -> CustomerLink:
    now = timezone.now()
    return CustomerLink.objects.create(
        customer=customer, connection=connection, **{"created_at": now, "updated_at": now, **fields}
    )


def names(client: Client, **query: str) -> set[str]:
    return {customer.name for customer in client.get(LIST, query).context["cl"].result_list}


def test_filters_can_be_combined(organization: Organization, connect: Callable[..., Connection]) -> None:
    shop, books = connect("links", name="Shop", direction="push"), connect("commenda", name="Books", direction="push")
    german = new(organization, name="German", address_country="Germany", email="one@example.com")
    french = new(organization, name="French", address_country="FR", email="ONE@example.com", phone="+33123456789")
    link(german, shop, state="rejected", fingerprint="vat", error="VAT is wrong", error_field="tax")
    link(german, books, needed_version=0)
    link(french, shop, state="rejected", fingerprint="zip", error="no such code of a@example.com")
    editing.update(organization=organization, values={french.pk: {"currency": "EUR"}}, actor=PERSON)
    archived = new(organization, name="Gone")
    editing.archive(organization=organization, ids=[archived.pk], actor=COMMAND)
    Customer.objects.filter(pk=archived.pk).update(updated_at=timezone.now() - timedelta(days=40))
    client = staff(organization, *LOOK)

    rejected = {"system": str(shop.pk), "state": "rejected"}
    assert names(client, **rejected) == {"German", "French"}
    assert names(client, **rejected, country="DE") == {"German"}
    assert names(client, **rejected, reason="zip") == {"French"}
    assert names(client, **rejected, changed_by="user") == {"French"}
    assert names(client, **rejected, q="germ") == {"German"}
    assert names(client, state="not_linked", system=str(books.pk)) == {"French", "Gone"}
    assert names(client, system=str(books.pk)) == {"German"}
    assert names(client, system="999999") == set()
    assert names(client, changed_by="command") == {"German", "Gone"}
    assert names(client, duplicates="email") == {"German", "French"}
    assert names(client, duplicates="phone") == set()
    assert names(client, archived="yes") == {"Gone"}
    assert names(client, updated="30d") == {"German", "French"}
    assert names(client, updated="2020-01-31") == {"German", "French", "Gone"}
    assert names(client, updated="nonsense", country="", state="nonsense") == {"German", "French", "Gone"}
    page = client.get(LIST, rejected).content.decode()
    assert "tax: VAT is wrong (1)" in page
    assert "a@example.com" in page
    assert "A. Clerk (Person)" in page
    masked = staff(organization, "customers.view_customer", name="viewer").get(LIST, rejected).content.decode()
    assert "a@example.com" not in masked


@pytest.mark.parametrize("rare", [0, 2000])
def test_the_filter_calls_a_link_what_its_page_calls_it(
    organization: Organization, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch, rare: int
) -> None:
    monkeypatch.setattr(own_filters, "RARE", rare)
    now = timezone.now()
    later = now + timedelta(hours=1)
    connections = [
        connect("links", name="active", account="1", direction="push"),
        connect("links", name="limited", account="2", direction="push", not_before=later),
        connect("links", name="paused", account="3", direction="push", state="paused"),
        connect("links", name="reauth", account="4", direction="push", state="needs_reauth"),
        connect("links", name="calls", account="5", direction="calls_us"),
    ]
    dirty = {"needed_version": 1, "next_attempt_at": now}
    kinds: list[dict[str, Any]] = [
        {},
        dirty,
        {**dirty, "state": "retrying"},
        {**dirty, "lease_until": later},
        {"state": "rejected", "needed_version": 1},
        {"state": "uncertain"},
        {"state": "uncertain", "next_attempt_at": later},
        {"state": "conflict"},
        {"conflicts": {"phone": {}}},
        {"conflicts": {"phone": {}}, **dirty},
        {"state": "remote_deleted", "deleted_at": now},
        {"state": "remote_deleted"},
        {"state": "paused"},
        {"is_duplicate": True},
    ]
    for kind in kinds:
        for connection in connections:
            made = link(new(organization, name=str(kind)), connection, **kind)
            if kind.get("conflicts"):
                Conflict.objects.create(
                    organization=organization,
                    connection=connection,
                    link=made,
                    field="phone",
                    outcome="waiting",
                    at=now,
                )
    links = list(CustomerLink.objects.select_related("connection"))
    client = staff(organization, *LOOK)
    for key in STATUSES.keys() - {"not_linked"}:
        expected = {one.customer_id for one in links if one.status_key(now=now) == key}
        assert expected, key
        assert {one.customer_id for one in in_status(key, connections, now=now)} == expected, key
        shown = client.get(LIST, {"state": key}).context["cl"].result_list
        assert {customer.pk for customer in shown} == expected, key
    counts = counts_by_status(connections, now=now)
    for connection in connections:
        own = [one.status_key(now=now) for one in links if one.connection_id == connection.pk]
        assert counts[connection.pk] == Counter(own)


def test_a_large_connection_is_counted_no_further_than_an_index_goes(
    organization: Organization, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "COUNTED", 2)
    large, small = connect("links", name="L", account="1", direction="push"), connect("commenda", direction="push")
    for connection, number in ((large, 3), (small, 2)):
        for _ in range(number):
            link(new(organization), connection)
            link(new(organization), connection, state="rejected", needed_version=1)
    link(new(organization), small)
    counts = counts_by_status([large, small], now=timezone.now())
    assert str(counts[large.pk]["rejected"]) == "more than 2"
    assert counts[small.pk]["rejected"] == 2
    assert all(isinstance(one.get("in_sync", MoreThan(0)), MoreThan) for one in counts.values())


def test_what_no_index_tells_is_looked_for_among_the_newest_and_says_so(
    organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        new(organization, name=f"C {n}", email="same@example.com")
    client = staff(organization, *LOOK)
    words = "among the 2 customers that were changed last"
    for query in ({"state": "not_linked"}, {"duplicates": "email"}):
        assert names(client, **query) == {"C 0", "C 1", "C 2", "C 3"}
        with monkeypatch.context() as lowered:
            lowered.setattr(own_filters, "LOOKED_AT", 2)
            page = client.get(LIST, query)
            assert {one.name for one in page.context["cl"].result_list} == {"C 2", "C 3"}
            assert words in page.content.decode()
        assert words not in client.get(LIST, query).content.decode()


def test_many_hits_are_counted_no_further_than_they_are_paged_through(
    organization: Organization, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_filters, "RARE", 3)
    monkeypatch.setattr(customer_admin, "COUNTED_SLOWLY", 2)
    shop = connect("links", direction="push")
    for _ in range(5):
        link(new(organization), shop, state="rejected", needed_version=1)
    client = staff(organization, *LOOK)
    assert "more than 2" in client.get(LIST, {"state": "rejected"}).content.decode()
    # Of those that were read first too few are hits of the other filter, too.
    assert client.get(LIST, {"state": "rejected", "archived": "yes"}).context["cl"].result_count == 0


def test_the_list_costs_the_same_whatever_it_shows(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    client = staff(organization, *LOOK, "connectors.push_customerlink", "customers.change_customer")
    shops = [connect("links", name=f"Shop {n}", account=str(n), direction="push") for n in range(3)]

    def add(count: int) -> None:
        for _ in range(count):
            customer = new(organization, email="same@example.com")
            for shop in shops:
                link(customer, shop, state="rejected", fingerprint="x", error="no")

    queries: list[dict[str, str]] = [
        {},
        {"q": "acme"},
        {"q": "cme"},
        {"q": "same@example.com"},
        {"system": str(shops[0].pk), "state": "rejected"},
        {"changed_by": "command", "updated": "7d"},
        {"duplicates": "email", "archived": "no"},
        {"q": "acme", "state": "rejected"},
    ]

    def costs() -> list[int]:
        numbers = []
        for query in queries:
            client.get(LIST, query)
            with CaptureQueriesContext(database) as captured:
                assert client.get(LIST, query).status_code == 200
            numbers.append(len(captured))
        return numbers

    add(2)
    few = costs()
    add(48)
    assert costs() == few
    assert max(few) <= 12, dict(zip(map(str, queries), few, strict=True))


def test_what_is_not_counted_to_its_end_says_so(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedPaginator, "bound", 60)
    editing.create(organization=organization, values=[{"name": f"C {n}"} for n in range(70)], actor=COMMAND)
    client = staff(organization, *LOOK)
    page = client.get(LIST)
    assert "more than 60" in page.content.decode()
    assert len(page.context["cl"].result_list) == 50
    assert len(client.get(LIST, {"p": "2"}).context["cl"].result_list) == 10
    assert client.get(LIST, {"p": "3"}).status_code == 302, "beyond lies what filters lead to"


def test_only_what_an_index_keeps_in_order_is_sorted_by(organization: Organization) -> None:
    new(organization)
    client = staff(organization, *LOOK)
    for column in range(1, 9):
        with CaptureQueriesContext(database) as captured:
            assert client.get(LIST, {"o": str(column)}).status_code == 200
        ordered = " ".join(
            query["sql"].rpartition("ORDER BY")[2] for query in captured if "last_author" in query["sql"]
        )
        assert "email" not in ordered
        assert '"version"' not in ordered


@pytest.mark.parametrize("query", [{}, {"o": "1"}, {"_popup": "1"}])
def test_rows_are_written_as_the_theme_writes_them(
    organization: Organization, connect: Callable[..., Connection], admin_client: Client, query: dict[str, str]
) -> None:
    shop = connect("links", name="Shop", direction="push")
    for name in ("Acme <b>", "Beta & Co"):
        link(new(organization, name=name, email=f"{name[:4]}@example.com"), shop, remote_id=name)
    pages = ("customers/customer", "customers/customerchange", "connectors/customerlink", "connectors/connection")
    for page in pages:
        changes = admin_client.get(f"/admin/{page}/", query).context["cl"]
        theirs = ["".join(cells) for cells in unfold_list.results(changes)]
        assert theirs
        assert list(changes.rows()) == theirs
