"""Two systems that keep overwriting each other through the hub."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from datetime import datetime, timedelta
from uuid import UUID

from connectors.models import Connection, Issue
from connectors.sync import issues
from customers.models import CustomerChange

ROUNDS, WINDOW = 6, timedelta(minutes=10)


def fights(*, customers: Collection[UUID], connection: Connection, at: datetime) -> dict[UUID, set[str]]:
    """The fields of these customers that systems have moved too often of late, with an issue opened for each customer.

    A field counts once two systems have made ROUNDS versions of it within WINDOW: the next one would go on for ever.
    """
    if not customers:
        return {}
    rows = CustomerChange.objects.filter(
        customer__in=customers, actor_kind=CustomerChange.Actor.CONNECTION, at__gt=at - WINDOW
    ).values_list("customer_id", "actor_id", "actor_name", "changes")
    moved: Counter[tuple[UUID, str]] = Counter()
    movers: dict[tuple[UUID, str], dict[str, str]] = defaultdict(dict)
    for customer_id, actor_id, actor_name, changes in rows:
        for name in changes:
            moved[customer_id, name] += 1
            movers[customer_id, name][actor_id] = actor_name
    found: dict[UUID, set[str]] = {}
    for (customer_id, name), times in moved.items():
        if times >= ROUNDS and len({*movers[customer_id, name], str(connection.pk)}) > 1:
            found.setdefault(customer_id, set()).add(name)
    troubles = []
    for customer_id, names in found.items():
        systems = {n for name in names for n in movers[customer_id, name].values()} | {connection.name}
        message = f"{' and '.join(sorted(systems))} keep overwriting each other's {', '.join(sorted(names))}."
        details = {"customer": str(customer_id), "fields": sorted(names)}
        trouble = issues.Trouble(kind=Issue.Kind.FIGHT, fingerprint=str(customer_id), message=message, details=details)
        troubles.append(trouble)
    if troubles:
        issues.open_issues(connection=connection, troubles=troubles, at=at)
    return found
