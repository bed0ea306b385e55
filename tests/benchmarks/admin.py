"""The admin's lists, searches and pages at size, beside a plain `ModelAdmin` over the same table, and beside itself.

    python -m tests.benchmarks.admin [--size smoke|small|full] [--rounds N] [--customers N] [--keep]

On SQLite, or with DATABASE_URL on PostgreSQL. Filling a database with a million customers takes minutes: with --keep
the one that DATABASE_URL names is filled when it is empty, measured and left for the next time.

Each page is a whole request of a superuser without a network. The plain admin is written as Django's tutorial has it,
over the same table with the same indexes: six columns, `search_fields` on name, e-mail and phone, two filters of which
one is on a text, the default paginator. The look, the middleware and the rows on a page are the hub's. A second one has
no filters, because the text is most of what a first page costs the first. They are asked in turn with the hub's, in one
process. Another process asks the same pages of a hub of ten thousand customers, the first of those that the large one
has. CPU is that of the asking process: on PostgreSQL the server's is not in it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report
from tests.benchmarks.scale import CUSTOMERS, FIRST, filled

ROUNDS = {"smoke": 1, "small": 7, "full": 20}
LIST, PLAIN = "/admin/customers/customer/", "/admin/customers/plaincustomer/"
NO_FILTERS = "/admin/customers/unfilteredcustomer/"
# What staff wait at most, in seconds, for nineteen pages of twenty.
PATIENCE = {LIST: 0.5, "customer": 0.4}
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
                sys.stdout.write(f"{json.dumps(ask(*json.loads(line)))}\n")
                sys.stdout.flush()
            return
        small = stack.enter_context(_Small(max(min(FIRST, count // 3), 100)))
        figures = [_compared(ask, small, name, *page, rounds=rounds) for name, page in _pages().items()]
    report([figure for page in figures for figure in page])


class Took(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


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

    def __enter__(self) -> Callable[..., Took]:
        self._line()
        return self.ask

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process with the small hub has ended"
        return line

    def ask(self, path: str, query: Mapping[str, str]) -> Took:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([path, query]) + "\n")
        self.process.stdin.flush()
        return Took(*json.loads(self._line()))


def _asking() -> Callable[..., Took]:
    """What asks for a page of this process's hub and tells what it took."""
    import importlib

    from django.contrib import admin
    from django.contrib.auth.models import User
    from django.core.cache import cache
    from django.test import Client
    from django.urls import clear_url_caches

    import hub.urls
    from customers import theme
    from customers.admin.own import OwnAdmin
    from customers.models import Customer

    class PlainCustomer(Customer):
        class Meta:
            app_label = "customers"
            proxy = True

    class UnfilteredCustomer(Customer):
        class Meta:
            app_label = "customers"
            proxy = True

    class UnfilteredCustomerAdmin(theme.ModelAdmin):
        list_display = ("name", "email", "phone", "organization", "updated_at", "version")
        list_select_related = ("organization",)
        list_per_page = OwnAdmin.list_per_page
        search_fields = ("name", "email", "phone")
        ordering = ("-updated_at",)

    class PlainCustomerAdmin(UnfilteredCustomerAdmin):
        list_filter = ("is_active", "address_country")

    admin.site.register(PlainCustomer, PlainCustomerAdmin)
    admin.site.register(UnfilteredCustomer, UnfilteredCustomerAdmin)
    importlib.reload(hub.urls)
    clear_url_caches()
    client = Client(SERVER_NAME="localhost")
    user, _ = User.objects.get_or_create(username="bench", defaults={"is_staff": True, "is_superuser": True})
    client.force_login(user)
    someone = Customer.objects.order_by("pk")[0]

    def ask(path: str, query: Mapping[str, str]) -> Took:
        path = path.replace(CUSTOMER, str(someone.pk))
        cache.clear()  # the dashboard keeps its counters
        began, cpu = time.perf_counter(), time.process_time()
        answer = client.get(path, query)
        took = Took(time.perf_counter() - began, time.process_time() - cpu)
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
    ask: Callable[..., Took],
    small: Callable[..., Took],
    name: str,
    path: str,
    query: Mapping[str, str],
    *,
    rounds: int,
) -> list[Figure]:
    sides = {"hub": lambda: ask(path, query), "small": lambda: small(path, query)}
    # The plain admin knows none of the hub's own filters.
    if path.startswith(LIST) and not query.keys() - {"q", "p"}:
        sides["plain"] = lambda: ask(path.replace(LIST, PLAIN), query)
    if path == LIST and not query:
        sides["no filters"] = lambda: ask(NO_FILTERS, query)
    times = in_turn(sides, rounds=rounds, warm=min(rounds - 1, 1))
    wall = {side: [took.wall for took in taken] for side, taken in times.items()}
    cpu = {side: [took.cpu for took in taken] for side, taken in times.items()}
    figures = [_beside(f"hub : the same of few, {name}", wall["hub"], wall["small"], at_most=1.5)]
    if "plain" in sides:
        aim = {"customer": None}.get(name, 15 if name.startswith("list") else 50)
        figures.append(_beside(f"plain : hub, {name}", wall["hub"], wall["plain"], at_least=aim, slower=True))
        figures.append(_beside(f"plain : hub, {name}, p95", *_p95(wall["hub"], wall["plain"]), slower=True))
        figures.append(_beside(f"plain : hub, {name}, CPU", cpu["hub"], cpu["plain"], slower=True))
        patience = [PATIENCE.get(name, PATIENCE[LIST])]
        figures.append(_beside(f"p95 : what staff wait at most, {name}", *_p95(wall["hub"]), patience, at_most=1))
    if "no filters" in sides:
        what = f"plain without filters : hub, {name}"
        figures.append(_beside(what, wall["hub"], wall["no filters"], slower=True))
        figures.append(_beside(f"{what}, CPU", cpu["hub"], cpu["no filters"], slower=True))
    return figures


def _p95(*sides: list[float]) -> list[list[float]]:
    return [[sorted(times)[math.ceil(0.95 * len(times)) - 1]] for times in sides]


def _beside(
    what: str,
    hub: list[float],
    other: list[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    slower: bool = False,
) -> Figure:
    """Seconds of both; `slower` tells how many times as long the other takes."""
    return Figure(
        goal="G7",
        what=what,
        hub=1000 * statistics.median(hub),
        yardstick=1000 * statistics.median(other),
        unit="ms",
        ratio=ratio(other, hub) if slower else ratio(hub, other),
        at_least=at_least,
        at_most=at_most,
    )


if __name__ == "__main__":
    main()
