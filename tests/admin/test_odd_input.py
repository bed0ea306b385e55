"""Addresses and searches that nobody means, but that somebody will send: no page breaks, on either database."""

from collections.abc import Callable

import pytest
from django.db import transaction
from django.test import Client

from connectors.models import Connection
from customers.models import Customer, Organization
from tests.connectors.test_admin import LIST, change, link, new_customer

RUNS, LINKS = "/admin/connectors/syncrun/", "/admin/connectors/customerlink/"
TERMS = [
    *("١٢٣٤٥", "²³¹²", "12345", "1" * 3000, "%%%", "___", "'''", '"""', 'a"b"c', "\\u00001", "$1234", "1e400"),
    *(
        "שלום עולם",
        "مرحبا 1234",
        "😀😀😀",
        "\U0010ffff" * 3,
        "\ud7ff\ue000",
        "\u202eabc123",
        "NEAR(abc def)",
        "name:abc",
    ),
]
VALUES = [
    *("abc", "9" * 30, "-1", "٣", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-23:00"),
    *("0001-01-01T00:00:00+14:00|1", "99999999999999999999|x", "a\x00b"),
]


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    Organization.objects.create(name="Second", slug="second")  # else there is no filter by organization
    return connect("links", name="Books", direction="push_and_pull")


@pytest.mark.parametrize("term", TERMS)
def test_a_search_finds_what_is_there_and_never_fails(
    books: Connection, organization: Organization, admin_client: Client, term: str
) -> None:
    named = new_customer(organization, name=f"Abc {term[:200]} xyz")
    filed = new_customer(organization, name="Other", custom_fields={"number": term})
    found: list[Customer] = list(admin_client.get(LIST, {"q": term}).context["cl"].result_list)
    if 3 <= len(term) < 250 and term not in ("²³¹²", "1e400"):
        assert named in found or filed in found
    assert admin_client.get(change(books, "first_steps"), {"q": term}).status_code == 200
    assert b"".join(admin_client.get(f"{LIST}export/csv/", {"q": term}))


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (LIST, ("organization", "updated", "changed_by", "country", "system", "state", "duplicates", "p", "o")),
        (RUNS, ("organization", "connection", "kind__exact", "state__exact", "p")),
        (LINKS, ("connection", "state")),
        ("/admin/connectors/issue/", ("organization", "connection", "kind__exact")),
        ("/admin/connectors/conflict/", ("organization", "connection")),
        ("/admin/connectors/connection/", ("organization", "state")),
        (f"{LINKS}needs-you/", ("kind", "connection", "cause", "after")),
        (f"{LINKS}conflicts/", ("field", "connection", "suggest", "after")),
        ("/admin/customers/customerchange/", ("organization", "customer__id__exact")),
    ],
)
def test_a_filter_by_what_there_is_not_shows_nothing_or_says_so(
    books: Connection, organization: Organization, admin_client: Client, page: str, names: tuple[str, ...]
) -> None:
    link(new_customer(organization), books, state="rejected", needed_version=1)
    for name in names:
        for value in VALUES:
            with transaction.atomic():
                assert admin_client.get(page, {name: value}).status_code in (200, 302, 400), (name, value)


def test_posted_ids_and_times_that_cannot_be(
    books: Connection, organization: Organization, admin_client: Client
) -> None:
    customer = new_customer(organization)
    for address, data in (
        (change(customer, "link_read"), {"connection": books.pk, "remote_id": "a\x00b"}),
        (f"{LINKS}push-again/", {"connection": books.pk, "cause": "a\x00b"}),
        (change(books, "pause"), {"reason": "why", "until": "9999-12-31T23:59:59-23:00"}),
        (change(books, "pause"), {"reason": "why", "until": "0001-01-01T00:00:00+14:00"}),
    ):
        with transaction.atomic():
            assert admin_client.post(address, data).status_code in (200, 302)
    assert Connection.objects.get().state == "active"
