"""The admin's lists, searches and pages at size, beside a plain `ModelAdmin` over the same table, and beside itself.

    python -m tests.benchmarks.admin [--size smoke|small|full] [--rounds N] [--customers N] [--keep]

On SQLite, or with DATABASE_URL on PostgreSQL. Filling a database with a million customers takes minutes: with --keep
the one that DATABASE_URL names is filled when it is empty, measured and left for the next time. Each page is a whole
request of a superuser without a network. The plain admin has Django's defaults: `search_fields` on name, e-mail and
phone, and the default paginator; it is asked in turn with the hub's, in one process. A second process asks the same
pages of a hub of ten thousand customers, the first of those that the large one has.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report
from tests.benchmarks.scale import CUSTOMERS, FIRST, filled

ROUNDS = {"smoke": 1, "small": 5, "full": 5}
LIST, PLAIN = "/admin/customers/customer/", "/admin/customers/plaincustomer/"
LINKS, CONNECTIONS = "/admin/connectors/customerlink/", "/admin/connectors/connection/"
# What is not in the same place in both hubs.
CUSTOMER = "CUSTOMER"


def main() -> None:
    parser = options(description=__doc__)
    parser.add_argument("--customers", type=int)
    parser.add_argument(
        "--keep", action="store_true", help="Measure the database that DATABASE_URL names, and leave it."
    )
    parser.add_argument("--answer", action="store_true", help="Answer the times of the pages that are asked for.")
    chosen = parser.parse_args()
    count, rounds = chosen.customers or CUSTOMERS[chosen.size], chosen.rounds or ROUNDS[chosen.size]
    with ExitStack() as stack:
        own_database(stack, keep=chosen.keep, LOG_LEVEL="ERROR")
        if not _has_customers():
            filled(count)
        ask = _asking()
        if chosen.answer:
            sys.stdout.write("ready\n")
            for line in iter(sys.stdin.readline, ""):
                sys.stdout.write(f"{ask(*json.loads(line))}\n")
                sys.stdout.flush()
            return
        small = stack.enter_context(_Small(max(min(FIRST, count // 3), 100)))
        figures = [_compared(ask, small, name, *page, rounds=rounds) for name, page in _pages().items()]
    report([figure for pair in figures for figure in pair])


def _has_customers() -> bool:
    from customers.models import Customer

    return Customer.objects.exists()


class _Small:
    """A hub of few customers in a process of its own."""

    def __init__(self, customers: int) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.admin", "--answer", "--customers", str(customers)]
        self.process = subprocess.Popen(
            command, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @staticmethod
    def _environment() -> dict[str, str]:
        import os

        own = dict(os.environ)
        if own["DATABASE_URL"].startswith("sqlite"):
            del own["DATABASE_URL"]
        return own

    def __enter__(self) -> Callable[..., float]:
        self._line()
        return self.ask

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process with the small hub has ended"
        return line

    def ask(self, path: str, query: Mapping[str, str]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([path, query]) + "\n")
        self.process.stdin.flush()
        return float(self._line())


def _asking() -> Callable[..., float]:
    """What asks for a page of this process's hub and tells the seconds that it took."""
    import importlib

    from django.contrib import admin
    from django.contrib.auth.models import User
    from django.core.cache import cache
    from django.test import Client
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
    client = Client(SERVER_NAME="localhost")
    user, _ = User.objects.get_or_create(username="bench", defaults={"is_staff": True, "is_superuser": True})
    client.force_login(user)
    someone = Customer.objects.order_by("pk")[0]

    def ask(path: str, query: Mapping[str, str]) -> float:
        path = path.replace(CUSTOMER, str(someone.pk))
        cache.clear()  # the dashboard keeps its counters
        began = time.perf_counter()
        answer = client.get(path, query)
        took = time.perf_counter() - began
        assert answer.status_code == 200, (path, query, answer.status_code)
        return took

    return ask


def _pages() -> dict[str, tuple[str, dict[str, str]]]:
    """Of values that both hubs have."""
    from connectors.models import Connection
    from customers.models import Customer

    someone = Customer.objects.exclude(email="").exclude(phone="").order_by("created_at")[50]
    company = Customer.objects.exclude(custom_fields={}).exclude(email="").order_by("created_at")[5]
    shop = str(Connection.objects.order_by("pk")[0].pk)
    return {
        "list": (LIST, {}),
        "list, page 2": (LIST, {"p": "2"}),
        "search, rare part": (LIST, {"q": company.email.split("@")[0][5:]}),
        "search, beginning": (LIST, {"q": company.name[:6]}),
        "search, common part": (LIST, {"q": "midt"}),
        "search, absent": (LIST, {"q": "qxzvw"}),
        "search, e-mail": (LIST, {"q": someone.email}),
        "search, id": (LIST, {"q": someone.public_id}),
        "rejected in one system": (LIST, {"system": shop, "state": "rejected"}),
        "waiting in one system": (LIST, {"system": shop, "state": "waiting"}),
        "in sync in one system": (LIST, {"system": shop, "state": "in_sync"}),
        "not linked": (LIST, {"state": "not_linked"}),
        "changed by a person": (LIST, {"changed_by": "user"}),
        "in one country": (LIST, {"country": "BR"}),
        "same e-mail": (LIST, {"duplicates": "email"}),
        "customer": (f"{LIST}{CUSTOMER}/change/", {}),
        "links": (LINKS, {}),
        "links, rejected": (LINKS, {"connection": shop, "shown_state": "rejected"}),
        "links, search": (LINKS, {"q": someone.email}),
        "connections": (CONNECTIONS, {}),
        "connection": (f"{CONNECTIONS}{shop}/change/", {}),
        "needs you": (f"{LINKS}needs-you/", {}),
        "dashboard": ("/admin/", {}),
    }


def _compared(
    ask: Callable[..., float],
    small: Callable[..., float],
    name: str,
    path: str,
    query: Mapping[str, str],
    *,
    rounds: int,
) -> list[Figure]:
    sides = {"hub": lambda: ask(path, query), "small": lambda: small(path, query)}
    # The plain admin knows none of the hub's own filters.
    if path == LIST and not query.keys() - {"q", "p"}:
        sides["plain"] = lambda: ask(PLAIN, query)
    times = in_turn(sides, rounds=rounds, warm=min(rounds - 1, 1))
    ours = 1000 * statistics.median(times["hub"])
    figures = []
    if "plain" in times:
        aim = 15 if re.match("list", name) else 50
        figures.append(
            Figure(
                goal="G7",
                what=f"plain : hub, {name}",
                hub=ours,
                yardstick=1000 * statistics.median(times["plain"]),
                unit="ms",
                ratio=ratio(times["plain"], times["hub"]),
                at_least=aim,
            )
        )
    figures.append(
        Figure(
            goal="G7",
            what=f"hub : the same of few, {name}",
            hub=ours,
            yardstick=1000 * statistics.median(times["small"]),
            unit="ms",
            ratio=ratio(times["hub"], times["small"]),
            at_most=1.5,
        )
    )
    return figures


if __name__ == "__main__":
    main()
