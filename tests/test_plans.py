"""No page, search, number or look-up reads a whole table: every statement of every hot place is explained.

A hub of a few thousand customers whose bounds are lowered in proportion: what reads more than MOST rows of a large
table there would read it all at ten million. PostgreSQL carries each statement out and tells what it read; it may not
scan a table, as it would rather do with one this small. SQLite tells how it would find the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection as database
from django.test import Client
from django.utils import timezone

from connectors import worker
from connectors.admin import filters, links
from connectors.api import filters as api_filters
from connectors.inbound import totals
from connectors.models import ApiKey, CustomerLink, PushIntent
from connectors.providers.commenda import api as commenda
from connectors.providers.rootfi import api as rootfi
from connectors.providers.rootfi import looks
from connectors.states import STATUSES
from connectors.sync import deletes, fights
from connectors.sync.claim import claim, due_connections
from connectors.sync.settle import unanswered
from customers import editing, search
from customers.admin import customers as customer_admin
from customers.admin import filters as own_filters
from customers.admin.paging import BoundedPaginator
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.benchmarks import people

LARGE = ("customers_customer", "customers_customerchange", "connectors_customerlink", "connectors_pushintent")
CUSTOMERS, MOST, BOUND = 3000, 1200, 100
ACTOR = Actor(kind="command", name="test")
Ask = Callable[[], object]


@pytest.fixture
def hub(db: None, monkeypatch: pytest.MonkeyPatch) -> Organization:
    """Customers of one organization; the connections are one of each kind."""
    monkeypatch.setattr(filters, "COUNTED", BOUND)
    monkeypatch.setattr(BoundedPaginator, "bound", BOUND)
    monkeypatch.setattr(own_filters, "RARE", BOUND)
    monkeypatch.setattr(own_filters, "LOOKED_AT", BOUND)
    monkeypatch.setattr(customer_admin, "COUNTED_SLOWLY", BOUND)
    monkeypatch.setattr(links, "LIMIT", BOUND)
    monkeypatch.setattr(search, "LIMIT", BOUND)
    monkeypatch.setattr(totals, "COUNTED", BOUND)
    monkeypatch.setattr(totals, "LOOKED_AT", BOUND)
    monkeypatch.setattr(api_filters, "STRETCH", BOUND)
    monkeypatch.setattr(looks, "CHANGED", BOUND)
    for module in (commenda, looks):
        monkeypatch.setattr(module, "ROWS", BOUND)
    for module in (api_filters, commenda, rootfi):
        monkeypatch.setattr(module, "FEW", BOUND)
    shares = {"shop": 0.9, "books": 0.5, "billing": 0.4, "pay": 0.4, "mail": 0.2}
    organization = people.fill(count=CUSTOMERS, shares=shares)
    for name, provider, account in (
        ("books", "rootfi", "1089"),
        ("billing", "commenda", "corp_1"),
        ("pay", "cheqpay", "M-1"),
    ):
        organization.connections.filter(name=name).update(provider=provider, account=account, direction="calls_us")
    sent = CustomerLink.objects.filter(connection__name="shop")[:500]
    PushIntent.objects.bulk_create(
        PushIntent(
            link=link,
            kind="create",
            payload={},
            sent_values={},
            version=1,
            outcome="ok",
            first_sent_at=link.created_at,
            sent_at=link.created_at,
        )
        for link in sent
    )
    with database.cursor() as cursor:
        cursor.execute("ANALYZE")
        if database.vendor == "postgresql":
            cursor.execute(
                "SELECT gin_clean_pending_list('customer_haystack'), gin_clean_pending_list('customer_custom')"
            )
            # So that it plans as for a large table: there these would read all of it, too.
            for way in ("seqscan", "hashjoin", "mergejoin"):
                cursor.execute(f"SET LOCAL enable_{way} = off")
    return organization


def pages(organization: Organization) -> Iterator[tuple[str, Ask]]:
    """Lists, searches and pages of the admin, as somebody sees them who may see everything."""
    staff = User.objects.create_superuser("staff", password="x")
    client = Client()
    client.force_login(staff)
    someone = Customer.objects.exclude(email="").exclude(phone="").order_by("pk")[CUSTOMERS // 2]
    company = Customer.objects.exclude(custom_fields={}).order_by("pk")[CUSTOMERS // 20]
    shop = organization.connections.get(name="shop")
    link = shop.links.order_by("pk")[CUSTOMERS // 2]
    customers, linked = "/admin/customers/customer/", "/admin/connectors/customerlink/"
    asked: list[tuple[str, dict[str, str]]] = [
        (customers, {}),
        (customers, {"p": "2"}),
        (customers, {"o": "1"}),
        *((customers, {"state": key}) for key in STATUSES),
        *((customers, {"state": key, "system": str(shop.pk)}) for key in STATUSES),
        (customers, {"system": str(shop.pk)}),
        (customers, {"changed_by": "user"}),
        (customers, {"changed_by": "connection"}),
        (customers, {"archived": "yes"}),
        (customers, {"archived": "no"}),
        (customers, {"country": "BR"}),
        (customers, {"country": "FI"}),
        (customers, {"updated": "1d"}),
        (customers, {"updated": "2024-01-02"}),
        (customers, {"duplicates": "email"}),
        (customers, {"duplicates": "phone"}),
        *(
            (customers, {"q": term})
            for term in (
                someone.public_id,
                str(link.remote_id),
                someone.email,
                someone.phone,
                company.name[:6],
                company.email.split("@")[0][5:],
                company.custom_fields["tax_number"],
                "schmidt anna",
                "midt",
                "qxzvw",
                "mi",
            )
        ),
        (f"{customers}{someone.pk}/change/", {}),
        (linked, {}),
        (linked, {"o": "6"}),
        (linked, {"connection": str(shop.pk)}),
        *((linked, {"shown_state": key, "connection": str(shop.pk)}) for key in STATUSES),
        *((linked, {"q": term}) for term in (str(link.remote_id), someone.email, "schmidt", someone.public_id, "qx")),
        (f"{linked}{link.pk}/change/", {}),
        (f"{linked}needs-you/", {}),
        (f"{linked}needs-you/", {"kind": "rejected", "connection": str(shop.pk)}),
        (f"{linked}conflicts/", {}),
        ("/admin/connectors/connection/", {}),
        (f"/admin/connectors/connection/{shop.pk}/change/", {}),
        ("/admin/connectors/syncrun/", {"state__exact": "failed"}),
        ("/admin/connectors/issue/", {}),
        ("/admin/connectors/conflict/", {}),
        ("/admin/", {}),
    ]
    for path, query in asked:
        yield f"{path} {query}", lambda path=path, query=query: client.get(path, query)


def lists(organization: Organization) -> Iterator[tuple[str, Ask]]:
    """The API's lists and those that mirror the documented ones."""
    secret = ApiKey.issue(organization=organization, name="shop", rate=0)[1]
    client = Client(
        headers={"authorization": f"Bearer {secret}", "x-api-key": secret, "api_key": secret, "x-merchant-id": "M-1"}
    )
    someone = Customer.objects.exclude(email="").exclude(phone="").order_by("pk")[CUSTOMERS // 2]
    link = CustomerLink.objects.filter(connection__name="books").order_by("pk")[500]
    paid = CustomerLink.objects.filter(connection__name="pay").order_by("pk")[500]
    customers, v3, v1 = "/api/v1/unified/customers", "/v3/ecommerce/customers", "/api/v1/customers"
    asked: list[tuple[str, dict[str, str]]] = [
        (customers, {}),
        (customers, {"cursor": "", "expand": "links"}),
        *(
            (customers, {**query, **paged})
            for paged in ({}, {"cursor": ""})
            for query in (
                {"email": someone.email},
                {"phone": someone.phone},
                {"name": "schmidt"},
                {"q": "schmidt"},
                {"q": someone.public_id},
                {"updated_since": "2026-01-01T00:00:00Z"},
                {"updated_since": "2026-08-01T00:00:00Z"},
                {"updated_since": "2027-01-01T00:00:00Z"},
                {"source_id": str(link.remote_id)},
                {"source_system": "rootfi"},
                {"is_active": "false"},
                {"include_archived": "true"},
            )
        ),
        (f"/api/v1/unified/customer/{someone.public_id}", {}),
        (f"/api/v1/unified/customer/{someone.public_id}/links", {}),
        ("/api/v1/unified/changes", {}),
        ("/api/v1/unified/connections", {}),
        ("/api/v1/unified/runs", {}),
        (v3, {"return_count": "true"}),
        (v3, {"rootfi_updated_at[gte]": "2027-01-01T00:00:00Z"}),
        (v3, {"rootfi_updated_at[gte]": "2027-01-01T00:00:00Z", "sort[rootfi_updated_at]": "asc"}),
        # Not what no index has of the customer itself, such as a part of a phone number: that ends after so many looks,
        # but of a table this small PostgreSQL rather reads all customers at once than so many one by one.
        *(
            (v3, {**query, **{f"sort[{name}]": direction for name in names}})
            for names in ([], ["rootfi_created_at"], ["rootfi_updated_at"])
            for direction in (["asc", "desc"] if names else [""])
            for query in (
                {},
                {"rootfi_created_at[gte]": "2026-08-01T00:00:00Z"},
                {"created_at[gte]": "2026-08-01T00:00:00Z"},
                {"created_at[lt]": "2024-01-01T00:00:10Z"},
                {"rootfi_updated_at[gte]": "2026-08-01T00:00:00Z"},
                {"name[contains]": "schmidt"},
                {"name[contains]": "qx", "return_count": "true"},
                {"email[contains]": "qxzvw"},
                {"platform_id[contains]": "qxz"},
                {"status[eq]": "UNKNOWN", "return_count": "true"},
                {"updated_at[gte]": "2026-08-01T00:00:00Z"},
            )
        ),
        (v3, {"email[eq]": someone.email}),
        (v3, {"name[eq]": someone.name}),
        (v3, {"platform_id[eq]": str(link.remote_id)}),
        (v1, {"corporation_id": "corp_1"}),
        (v1, {"corporation_id": "corp_1", "name": someone.name}),
        (v1, {"corporation_id": "corp_1", "search_term": "qxzvw"}),
        (v1, {"corporation_id": "corp_1", "source_platforms": "cheqpay"}),
        (v1, {"corporation_id": "corp_1", "source_platform_ids": "shop-1"}),
        (f"/customers/{paid.remote_id}", {}),
    ]
    for path, query in asked:
        yield f"{path} {query}", lambda path=path, query=query: client.get(path, query)


def work(organization: Organization) -> Iterator[tuple[str, Ask]]:
    """What workers look for, and what one customer's change makes them find."""
    now = timezone.now()
    shop = organization.connections.get(name="shop")
    someone = Customer.objects.order_by("pk")[CUSTOMERS // 2]
    some = list(shop.links.order_by("pk")[:50])
    yield "connections with due work", lambda: list(due_connections(now=now))
    yield "claim", lambda: claim(connection=shop, now=now, limit=50)
    yield "due pulls", lambda: list(worker.due_pulls(now=now))
    yield "queued batches", lambda: list(worker.queued_batches())
    yield "dead runs", lambda: worker.close_dead_runs(now)
    yield "a sample of the rejected", lambda: worker.retry_rejected(now + timedelta(days=9000))
    yield "issues that are over", lambda: worker.resolve_issues(now)
    yield "few deletes", lambda: deletes.plausible(connection=shop, number=5, at=now)
    yield "overwriting", lambda: fights.fights(customers=[someone.pk], connection=shop, at=now)
    yield "open intents", lambda: unanswered(some)
    yield "links of records", lambda: list(shop.links.filter(remote_id__in=[link.remote_id for link in some]))
    yield (
        "a changed customer",
        lambda: editing.update(organization=organization, values={someone.pk: {"name": "Other"}}, actor=ACTOR),
    )


@pytest.mark.parametrize("places", [pages, lists, work])
def test_no_statement_reads_a_whole_table(
    hub: Organization, places: Callable[[Organization], Iterator[tuple[str, Ask]]]
) -> None:
    wrong = []
    for name, ask in places(hub):
        answer, statements = _statements(ask)
        status = getattr(answer, "status_code", 200)
        assert status in (200, 302, 404), (name, status)
        wrong += [f"{name}: {fault}\n  {sql[:900]}" for sql, params in statements for fault in _faults(sql, params)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(database.vendor == "postgresql", reason="it tells what it read, above")
def test_sqlite_brings_a_page_of_customers_in_order_and_counts_by_indexes_of_few(hub: Organization) -> None:
    """What `_scans` does not see: SEARCH by an index that holds all of an organization, or of a connection."""
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))
    Organization.objects.exclude(pk=hub.pk).delete()
    for path, query in (("/admin/customers/customer/", {}), ("/admin/customers/customer/", {"p": "2"})):
        _, statements = _statements(lambda path=path, query=query: client.get(path, query))
        lines = [line for sql, params in statements for line in _lines(sql, params)]
        assert any("customer_recent_of" in line for line in lines)
        assert not [line for line in lines if "TEMP B-TREE" in line]
    parked = list(hub.connections.all())
    _, statements = _statements(lambda: filters.counts_by_status(parked, now=timezone.now()))
    lines = [line for sql, params in statements for line in _lines(sql, params)]
    assert sum("link_parked" in line for line in lines) == 5


def _lines(sql: str, params: Any) -> list[str]:
    with database.cursor() as cursor:
        cursor.execute(f"EXPLAIN QUERY PLAN {sql}", params)
        return [row[3] for row in cursor.fetchall()]


def test_a_whole_table_is_noticed(hub: Organization) -> None:
    _, statements = _statements(lambda: Customer.objects.filter(address_city="Nowhere").count())
    assert [fault for sql, params in statements for fault in _faults(sql, params)]
    _, statements = _statements(lambda: list(CustomerLink.objects.order_by("synced_at")[:10]))
    assert [fault for sql, params in statements for fault in _faults(sql, params)]


def _statements(ask: Ask) -> tuple[object, list[tuple[str, Any]]]:
    found: list[tuple[str, Any]] = []

    def keep(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if not many and re.match(r"\W*(SELECT|UPDATE)\b", sql) and any(table in sql for table in LARGE):
            found.append((sql, params))
        return execute(sql, params, many, context)

    with database.execute_wrapper(keep):
        return ask(), found


def _faults(sql: str, params: Any) -> list[str]:
    with database.cursor() as cursor:
        if database.vendor != "postgresql":
            ordered = re.search(r'ORDER BY "connectors_customerlink"."id" \w+ LIMIT \d+$', sql) is not None
            return _scans(_lines(sql, params), ordered=ordered)
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}", params)
        plan = cursor.fetchone()[0]
    return list(_read(json.loads(plan)[0]["Plan"] if isinstance(plan, str) else plan[0]["Plan"]))


def _scans(lines: list[str], *, ordered: bool) -> list[str]:
    """The lines by which SQLite says that it would read a large table, or sort all of it.

    `ordered`: the statement asks for the first rows by the number of the row, which is how the table lies.
    """
    scanned = [line for line in lines if line.startswith("SCAN ") and line.split()[1] in LARGE]
    sorts = any("TEMP B-TREE FOR ORDER BY" in line for line in lines)
    return [line for line in scanned if sorts or not (" USING " in line or ordered)]


def _read(node: dict[str, Any]) -> Iterator[str]:
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    rows = (node["Actual Rows"] + removed) * node["Actual Loops"]
    if node.get("Relation Name") in LARGE and (node["Node Type"] == "Seq Scan" or rows > MOST):
        index = node.get("Index Name", "")
        yield f"{node['Node Type']} of {node['Relation Name']} {index} reads {rows} rows"
    for below in node.get("Plans", ()):
        yield from _read(below)
