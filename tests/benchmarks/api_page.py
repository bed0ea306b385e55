"""A page of 100 customers through the API, as a multiple of the time in which psycopg reads the same rows.

    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.api_page [--customers 50000] [--rounds 200]

Uses a database of its own on that server. Both sides are asked in turn, in one process: the API as a whole request,
key and JSON included, without a network; psycopg with one prepared join of customer, leading link and connection.
Prints medians and their ratio for the first page, one deep in the list, and the documented page of the same depth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from uuid import UUID

import psycopg

from tests.benchmarks.measuring import own_database

LIMIT = 100
COLUMNS = (
    "c.id, c.name, c.email, c.phone, c.is_active, c.version, c.archived_at, c.address_line1, c.address_line2,"
    " c.address_city, c.address_state, c.address_postal_code, c.address_country, c.shipping_address_line1,"
    " c.shipping_address_line2, c.shipping_address_city, c.shipping_address_state, c.shipping_address_postal_code,"
    " c.shipping_address_country, l.remote_id, l.remote_data, l.remote_created_at, l.created_at, l.pushed_version,"
    " l.needed_version, l.deleted_at, n.provider, n.uid"
)
RAW = (
    f"SELECT {COLUMNS} FROM (SELECT * FROM customers_customer WHERE organization_id = %s AND id > %s"
    f" AND archived_at IS NULL AND merged_into_id IS NULL ORDER BY id LIMIT {LIMIT}) c"
    " LEFT JOIN connectors_customerlink l ON l.customer_id = c.id AND l.is_primary"
    " LEFT JOIN connectors_connection n ON n.id = l.connection_id ORDER BY c.id"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--customers", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=200)
    chosen = parser.parse_args()
    if not os.environ.get("DATABASE_URL", "").startswith("postgres"):
        parser.error("Set DATABASE_URL to a PostgreSQL server.")
    with ExitStack() as stack:
        own_database(stack)
        _measure(stack, customers=chosen.customers, rounds=chosen.rounds)


def _measure(stack: ExitStack, *, customers: int, rounds: int) -> None:
    from django.db import connections
    from django.test import Client

    from connectors.models import ApiKey, Connection
    from connectors.provider import Record
    from connectors.sync.receive import receive
    from customers.editing import Actor
    from customers.models import Customer, Organization

    stack.callback(connections.close_all)
    organization = Organization.objects.create(name="Demo", slug="demo")
    shop = Connection.objects.create(organization=organization, provider="cheqpay", name="shop", direction="calls_us")
    for first in range(0, customers, 1000):
        records = [
            Record(
                values={"name": f"Customer {n}", "email": f"{n}@example.com", "address_city": "Berlin"},
                document={"externalId": f"{n}", "firstName": "Customer", "lastName": f"{n}"},
                remote_id=f"{n}",
            )
            for n in range(first, min(first + 1000, customers))
        ]
        receive(
            organization=organization,
            connection=shop,
            records=records,
            actor=Actor(kind="command", name="benchmark"),
        )
    _, secret = ApiKey.issue(organization=organization, name="benchmark", rate=0)
    client = Client(SERVER_NAME="localhost", headers={"Authorization": f"Bearer {secret}"})
    raw = stack.enter_context(psycopg.connect(os.environ["DATABASE_URL"], autocommit=True))
    raw.execute("VACUUM ANALYZE")

    def get(query: str) -> Any:
        answer = client.get(f"/api/v1/unified/customers?limit={LIMIT}&{query}")
        assert answer.status_code == 200, answer.content
        return answer

    def read(after: Any) -> list[Any]:
        return raw.execute(RAW, (organization.pk, after), prepare=True).fetchall()

    cursor, page = "", 1
    while page * LIMIT < customers * 0.9:
        cursor, page = get(f"cursor={cursor}").json()["next_cursor"], page + 1
    nowhere, deep = UUID(int=0), Customer.objects.order_by("id").values_list("pk", flat=True)[(page - 1) * LIMIT - 1]
    for name, query, after in (
        ("first page by cursor", "cursor=", nowhere),
        (f"page {page} by cursor", f"cursor={cursor}", deep),
        (f"page {page} as documented", f"page={page}", deep),
    ):
        assert [row["source_id"] for row in get(query).json()["data"]] == [row[19] for row in read(after)]
        api, plain = _in_turn(rounds, partial(get, query), partial(read, after))
        say = sys.stdout.write
        say(f"{name}: {1000 * api:.2f} ms, raw {1000 * plain:.2f} ms: {api / plain:.1f} times\n")


def _in_turn(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """The median time of each, asked in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 5):
        for side, kept in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            if turn >= 5:
                kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in times]


if __name__ == "__main__":
    main()
