"""How many there are, for documented answers that have to say it, and how many are few."""

from __future__ import annotations

import json
from typing import Any

from django.db import connections
from django.db.models import QuerySet

# So many are counted; more than that PostgreSQL estimates.
COUNTED = 10_000
TOLD = "Exact up to 10,000; above that about as many, and at least as many as the pages up to this one show."
# Of no more hits than this the ids are read first, where a list is in another order than the index that finds them.
# Of more a page is soon full, however it is read.
FEW = 5000
# Where no index finds them, the hits among so many rows are counted.
LOOKED_AT = 100_000


def total_of(rows: QuerySet[Any], *, least: int = 0, ended: bool = False, among: QuerySet[Any] | None = None) -> int:
    """How many rows there are: exactly up to COUNTED, then on PostgreSQL about as many.

    At least `least`, as many as are known of; exactly that where it is known to be all (`ended`). So whoever reads one
    page after the other until the last is never told too early that there are no more.

    `among` are rows that an index counts and of which `rows` are those that no index finds: where they are more than
    LOOKED_AT, PostgreSQL looks at these and estimates the others.
    """
    if ended:
        return least
    rows = rows.order_by().values("pk")
    if connections[rows.db].vendor != "postgresql":
        return rows.count()
    edge: list[Any] = []
    if among is not None:
        edge = list(among.order_by("pk").values_list("pk", flat=True)[LOOKED_AT : LOOKED_AT + 1])
    looked_at = rows.filter(pk__lt=edge[0]) if edge else rows
    number = looked_at[: COUNTED + 1].count()
    if number <= COUNTED and not edge:
        return number
    estimated = json.loads(rows.explain(format="json"))[0]["Plan"]["Plan Rows"]
    return max(int(estimated), number, least)
