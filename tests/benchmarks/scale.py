"""What it costs to find a few among many: pages at depth, totals, search, due work, and what each index costs.

    python -m tests.benchmarks.scale [--size smoke|small|full] [--rounds N] [--customers N]

On SQLite, or with DATABASE_URL on PostgreSQL, which multiplies what it was filled with: ten million customers took it
three quarters of an hour on a busy machine. Each side is asked in turn in one process, without a network. The indexes
are measured on PostgreSQL alone: rows are added with all of them and without one, and taken back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report, timed

CUSTOMERS = {"smoke": 400, "small": 30_000, "full": 1_000_000}
ROUNDS = {"smoke": 1, "small": 7, "full": 7}
# PostgreSQL multiplies this many.
FIRST = 10_000
PAGE, DUE, DUE_SECONDS = 100, 100, 0.010
# Rows that are added to see what an index costs.
ADDED = {"smoke": 50, "small": 5000, "full": 20_000}


def main() -> None:
    parser = options(description=__doc__)
    parser.add_argument("--customers", type=int)
    chosen = parser.parse_args()
    count, rounds = chosen.customers or CUSTOMERS[chosen.size], chosen.rounds or ROUNDS[chosen.size]
    with ExitStack() as stack:
        own_database(stack)
        filled(count)
        figures = [*_lists(rounds), *_search(rounds), *_due(rounds), *_indexes(rounds, ADDED[chosen.size])]
    report(figures)


def filled(count: int) -> None:
    """Fill the database with customers of one organization, and with more than ten thousand on PostgreSQL of four."""
    from django.db import connection

    from tests.benchmarks import people

    if connection.vendor == "postgresql" and count > FIRST:
        people.multiply(people.fill(count=FIRST), times=count // FIRST)
    else:
        people.fill(count=count)


def _lists(rounds: int) -> Iterator[Figure]:
    from django.test import Client

    from connectors.api.filters import write_cursor
    from connectors.inbound.totals import total_of
    from connectors.models import ApiKey
    from customers.models import Customer, Organization

    organization = Organization.objects.get(slug="people")
    secret = ApiKey.issue(organization=organization, name="scale", rate=0)[1]
    client = Client(SERVER_NAME="localhost", headers={"authorization": f"Bearer {secret}"})
    rows = Customer.objects.filter(organization=organization, archived_at=None, merged_into=None)
    count = rows.count()
    depth = max(count * 9 // 10 // PAGE * PAGE, PAGE)
    query = {"limit": str(PAGE)}
    last = rows.order_by("pk").values_list("pk", flat=True)[depth - 1 : depth].get()
    at_depth = write_cursor(last, query, organization=organization)
    since = rows.order_by("-updated_at", "-id").values_list("updated_at", flat=True)[count // 2].isoformat()

    def ask(**more: object) -> float:
        began = time.perf_counter()
        answer = client.get("/api/v1/unified/customers", {**query, **more})
        took = time.perf_counter() - began
        assert answer.status_code == 200, answer.content
        return took

    sides = {
        "first": lambda: ask(cursor=""),
        "deep": lambda: ask(cursor=at_depth),
        "first page": lambda: ask(page=1),
        "deep page": lambda: ask(page=depth // PAGE + 1),
        # Half of them, which were changed last.
        "changed": lambda: ask(cursor="", updated_since=since),
        "counted": lambda: timed(rows.count),
        "total": lambda: timed(lambda: total_of(rows)),
    }
    times = in_turn(sides, rounds=rounds, warm=min(rounds - 1, 1))
    yield _compared("G6", f"page at {depth:,} by cursor : the first", times["deep"], times["first"], at_most=1.3)
    yield _compared("G6", f"page at {depth:,} by number : the first", times["deep page"], times["first page"])
    yield _compared(
        "G6", f"page of the half of {count:,} that changed last : the first", times["changed"], times["first"]
    )
    yield _compared("G6", f"count(*) of {count:,} : the total", times["total"], times["counted"], at_least=50)


def _search(rounds: int) -> Iterator[Figure]:
    from django.db import connection
    from django.db.models import Q

    from customers import search
    from customers.models import Customer, Organization

    organization = Organization.objects.get(slug="people")
    company = Customer.objects.exclude(custom_fields={}).exclude(email="").order_by("pk")[0]
    terms = {"rare": company.email.partition("@")[0][5:], "absent": "qxzvw"}
    aim = 50 if connection.vendor == "postgresql" else 150
    for name, term in terms.items():

        def ours(term: str = term) -> object:
            rows = Customer.objects.filter(organization=organization)
            found, _ = search.find(rows, term, organizations=[organization.pk], exact=[], personal=True)
            return list(found[:PAGE])

        def theirs(term: str = term) -> object:
            part = Q(name__icontains=term) | Q(email__icontains=term) | Q(phone__icontains=term)
            return list(Customer.objects.filter(part, organization=organization)[:PAGE])

        sides = {"hub": lambda ask=ours: timed(ask), "icontains": lambda ask=theirs: timed(ask)}
        times = in_turn(sides, rounds=rounds, warm=min(rounds - 1, 1))
        yield _compared("G7", f"icontains : search, {name} part", times["hub"], times["icontains"], at_least=aim)


def _due(rounds: int) -> Iterator[Figure]:
    from django.db import connection, transaction
    from django.db.models import F
    from django.utils import timezone

    from connectors.models import CustomerLink
    from connectors.sync.claim import claim, due_connections

    waiting = CustomerLink.objects.filter(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False)
    kept = list(waiting.order_by("pk").values_list("pk", flat=True)[:DUE])
    waiting.exclude(pk__in=kept).update(pushed_version=F("needed_version"), next_attempt_at=None)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE" if connection.vendor == "postgresql" else "ANALYZE")
    now = timezone.now()

    def find() -> object:
        with transaction.atomic():
            return [
                claim(connection=one, now=now, limit=DUE)
                for one in sorted(due_connections(now=now), key=lambda c: c.pk)
            ]

    def read() -> object:
        return list(CustomerLink.objects.filter(pk__in=kept).select_related("customer"))

    times = in_turn({"hub": lambda: timed(find), "read": lambda: timed(read)}, rounds=rounds, warm=min(rounds - 1, 1))
    links = CustomerLink.objects.count()
    what = f"{len(kept)} due among {links:,} links"
    yield _compared("G9", f"{what} : ten milliseconds", times["hub"], [DUE_SECONDS] * rounds, at_most=1)
    yield _compared("G9", f"{what} : reading them by id", times["hub"], times["read"])


def _indexes(rounds: int, rows: int) -> Iterator[Figure]:
    from django.db import connection

    if connection.vendor != "postgresql":
        return
    from connectors.models import CustomerLink
    from customers.models import Customer

    with connection.cursor() as cursor:
        for model in (Customer, CustomerLink):
            cursor.execute(
                "SELECT quote_ident(relname) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
                " WHERE indrelid = %s::regclass AND NOT indisprimary"
                " AND NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conindid = indexrelid) ORDER BY relname",
                [model._meta.db_table],
            )
            names = [name for (name,) in cursor.fetchall()]
            sides = {name: _adding(model, rows, without=name) for name in ("", *names)}
            times = in_turn(sides, rounds=rounds, warm=min(rounds - 1, 1))
            for name in names:
                what = f"{rows:,} {model._meta.verbose_name_plural} with all indexes : without {name}"
                yield _compared("", what, times[""], times[name])


def _adding(model: Any, rows: int, *, without: str) -> Callable[[], float]:
    """Seconds that it takes to add rows, which are taken back."""
    from django.db import connection, transaction

    from tests.benchmarks import people

    source = f"(SELECT * FROM {model._meta.db_table} ORDER BY id LIMIT {rows}) AS first"
    known = {
        "copy": 999_999,
        "later": int(timedelta(days=9000).total_seconds() * 1000),
        "organization": "organization_id",
        "connections": "{}",
    }

    def add() -> float:
        with transaction.atomic(), connection.cursor() as cursor:
            if without:
                cursor.execute(f"DROP INDEX {without}")
            took = timed(lambda: people.add_copies(cursor, model, source=source, **known))
            transaction.set_rollback(True)
        return took

    return add


def _compared(
    goal: str,
    what: str,
    hub: list[float],
    other: list[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """Seconds of both; with `at_least` the ratio is how many times as long the other takes."""
    faster = ratio(other, hub) if at_least is not None else ratio(hub, other)
    return Figure(
        goal=goal,
        what=what,
        hub=1000 * statistics.median(hub),
        yardstick=1000 * statistics.median(other),
        unit="ms",
        ratio=faster,
        at_least=at_least,
        at_most=at_most,
    )


if __name__ == "__main__":
    main()
