"""The admin's list, search and customer page at size, beside a plain `ModelAdmin` over the same table.

    python -m tests.benchmarks.admin_pages [--customers 20000] [--rounds 20] [--naive-rounds 5] [--keep]

Makes a database of its own: a file of SQLite, or with DATABASE_URL a new one on that server; with --keep it uses the
database that DATABASE_URL names, and fills it when it is empty. Each page is a whole request of a superuser without
a network; hub and plain admin are asked in turn in one process. Prints p50 and p95 in milliseconds and the ratio of the
medians. The plain admin has Django's defaults: `search_fields` on name, e-mail and phone, and the default paginator.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.measuring import own_database

LIST = "/admin/customers/customer/"
PLAIN = "/admin/customers/plaincustomer/"
COUNT = re.compile(r"((?:more than )?[\d,]+)\s+customers?\s+</div>")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--naive-rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        if chosen.keep:
            os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
            import django
            from django.core.management import call_command

            django.setup()
            call_command("migrate", verbosity=0)
        else:
            own_database(stack)
        _measure(stack, customers=chosen.customers, rounds=chosen.rounds, plain_rounds=chosen.naive_rounds)


def _register_plain() -> None:
    """The customers once more on the same site, as a `ModelAdmin` comes."""
    import importlib

    from django.contrib import admin
    from django.urls import clear_url_caches

    import hub.urls
    from customers import theme
    from customers.models import Customer

    class PlainCustomer(Customer):
        class Meta:
            app_label = "customers"
            proxy = True

    class PlainCustomerAdmin(theme.ModelAdmin):
        list_display = ("name", "email", "phone", "organization", "updated_at", "version")
        list_select_related = ("organization",)
        list_filter = ("is_active", "organization")
        search_fields = ("name", "email", "phone")
        ordering = ("-updated_at",)

    admin.site.register(PlainCustomer, PlainCustomerAdmin)
    importlib.reload(hub.urls)
    clear_url_caches()


def _measure(stack: ExitStack, *, customers: int, rounds: int, plain_rounds: int) -> None:
    from django.contrib.auth.models import User
    from django.db import connection, connections
    from django.test import Client

    from customers.models import Customer
    from tests.benchmarks import people

    stack.callback(connections.close_all)
    say = sys.stdout.write
    if not Customer.objects.exists():
        began = time.monotonic()
        people.fill(count=customers)
        say(f"filled in {time.monotonic() - began:.0f} s\n")
    _register_plain()
    staff, _ = User.objects.get_or_create(username="bench", defaults={"is_staff": True, "is_superuser": True})
    client = Client(SERVER_NAME="localhost")
    client.force_login(staff)
    number = Customer.objects.order_by().count()
    say(f"{connection.vendor}, {number:,} customers\n")
    say(f"{'':34}{'hub p50':>9}{'p95':>9}{'plain p50':>11}{'p95':>9}{'ratio':>8}{'hits':>9}\n")
    for name, query in _questions():
        _compare(name, query, client, rounds=rounds, plain_rounds=plain_rounds, say=say)


def _questions() -> Iterator[tuple[str, dict[str, str] | str]]:
    """The list, its filters, eight kinds of term and a few more, and a customer's page."""
    from connectors.models import Connection, CustomerLink
    from customers.models import Customer

    count = Customer.objects.count()
    middle = Customer.objects.order_by("id")[count // 2]
    someone = Customer.objects.filter(pk__gte=middle.pk).exclude(email="").exclude(phone="").order_by("id")[0]
    company = Customer.objects.filter(pk__gte=middle.pk).exclude(custom_fields={}).order_by("id")[0]
    link = CustomerLink.objects.filter(customer__gte=middle.pk, connection__name="books").order_by("customer_id")[0]
    shop = str(Connection.objects.get(name="shop").pk)
    yield "list, first page", {}
    deep = str(min(100, max(count // 100, 1)))
    yield f"list, page {deep}", {"p": deep}
    yield "list by name", {"o": "1"}
    yield "rejected in one system", {"system": shop, "state": "rejected"}
    yield "waiting in one system", {"system": shop, "state": "waiting"}
    yield "conflict in one system", {"system": shop, "state": "conflict"}
    yield "in sync in one system", {"system": shop, "state": "in_sync"}
    yield "not linked to one system", {"system": shop, "state": "not_linked"}
    yield "last changed by a person", {"changed_by": "user"}
    yield "last changed by a system", {"changed_by": "connection"}
    yield "in one country, archived", {"country": "BR", "archived": "yes"}
    yield "updated in 30 days", {"updated": "30d"}
    yield "same e-mail as another", {"duplicates": "email"}
    yield "1 customer id", {"q": someone.public_id}
    yield "2 id in another system", {"q": str(link.remote_id)}
    yield "3 e-mail address", {"q": someone.email}
    yield "4 phone number", {"q": someone.phone}
    yield "5 beginning of a name", {"q": company.name[:6]}
    yield "6 rare part of an e-mail", {"q": company.email.split("@")[0][5:]}
    yield "7 first and last name", {"q": "schmidt anna"}
    yield "8 tax number", {"q": company.custom_fields["tax_number"]}
    yield "common part of a name", {"q": "midt"}
    yield "common part of e-mails", {"q": "example.com"}
    yield "two letters", {"q": "mi"}
    yield "nothing there", {"q": "qxzvw"}
    yield "name, rejected in one system", {"q": "schmidt", "system": shop, "state": "rejected"}
    yield "customer page", f"{someone.pk}/change/"


def _compare(
    name: str,
    query: dict[str, str] | str,
    client: Any,
    *,
    rounds: int,
    plain_rounds: int,
    say: Callable[[str], Any],
) -> None:
    tail, asked = (query, {}) if isinstance(query, str) else ("", query)
    hits = ""

    def ours() -> None:
        nonlocal hits
        answer = client.get(LIST + tail, asked)
        assert answer.status_code == 200, answer.status_code
        told = COUNT.search(answer.content.decode())
        hits = told[1].replace("more than ", ">") if told else ""

    def theirs() -> None:
        answer = client.get(PLAIN + tail, asked)
        assert answer.status_code == 200, answer.status_code

    # The plain admin knows none of the hub's own filters.
    comparable = not asked.keys() - {"q", "p", "o"}
    mine: list[float] = []
    other: list[float] = []
    for turn in range(rounds + 1):
        mine.append(_timed(ours))
        if comparable and turn <= plain_rounds:
            other.append(_timed(theirs))
    mine, other = mine[1:], other[1:]
    line = f"{name:34}{statistics.median(mine):9.1f}{_p95(mine):9.1f}"
    if other:
        line += f"{statistics.median(other):11.1f}{_p95(other):9.1f}"
        line += f"{statistics.median(other) / statistics.median(mine):8.1f}"
    else:
        line += f"{'–':>11}{'–':>9}{'–':>8}"
    say(f"{line}{hits:>9}\n")
    sys.stdout.flush()


def _timed(do: Callable[[], None]) -> float:
    began = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - began)


def _p95(times: list[float]) -> float:
    return sorted(times)[max(math.ceil(0.95 * len(times)) - 1, 0)]


if __name__ == "__main__":
    main()
