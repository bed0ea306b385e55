"""What pushing customers would come to, told by the links and the connector alone: nothing is asked of the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from uuid import UUID

from connectors.exceptions import Rejected
from connectors.models import Connection, CustomerLink
from connectors.provider import Provider
from connectors.states import WAITING
from connectors.sync.plan import changed_values
from customers.ids import uuid7
from customers.models import Customer

LOOKED_AT, SAMPLES = 1000, 5


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One customer: `outcome` is created, updated, unchanged, refused or uncertain; `fields` {field: [there, here]}."""

    customer: Customer
    outcome: str
    fields: Mapping[str, list[Any]] = field(default_factory=dict)
    error: Rejected | None = None


@dataclass(kw_only=True)
class Forecast:
    """Of `looked_at` customers: how many come to which outcome, why some are refused, and examples of what goes out.

    `seconds` is how long sending those takes at the connection's rate; None where it has no rate.
    """

    looked_at: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    samples: list[Expected] = field(default_factory=list)
    seconds: float | None = None


def expected(customer: Customer, link: CustomerLink | None, connection: Connection, provider: Provider) -> Expected:
    """What pushing this customer would come to, as far as the hub can tell."""
    if link is not None and link.deleted_at is not None:
        error = Rejected(f"Deleted in {connection.name}.")
        return Expected(customer=customer, outcome="refused", error=error)
    if link is not None and not link.is_dirty:
        return Expected(customer=customer, outcome="unchanged")
    if link is not None and link.state in WAITING:
        return Expected(customer=customer, outcome="uncertain")
    known = link is not None and bool(link.remote_id)
    moved = changed_values(link, customer, provider.fields) if link is not None and known else {}
    if known and not moved:
        return Expected(customer=customer, outcome="unchanged")
    try:
        provider.document(
            customer,
            connection=connection,
            uid=link.uid if link is not None else uuid7(),
            fields=frozenset(moved) if known else None,
        )
    except Rejected as error:
        return Expected(customer=customer, outcome="refused", error=error)
    if link is None or not known:
        sides = {name: ["", value] for name in sorted(provider.fields) if (value := getattr(customer, name))}
        return Expected(customer=customer, outcome="created", fields=sides)
    sides = {name: [link.base_remote.get(name, link.base_local.get(name)), value] for name, value in moved.items()}
    return Expected(customer=customer, outcome="updated", fields=sides)


def forecast(
    *, connection: Connection, provider: Provider, customer_ids: Sequence[UUID], limit: int = LOOKED_AT
) -> Forecast:
    """Look at the first of these customers, in three queries."""
    ids = customer_ids[:limit]
    links = _links(connection, ids)
    found = Forecast(looked_at=len(ids))
    for customer in Customer.objects.filter(pk__in=ids).order_by("pk"):
        one = expected(customer, links.get(customer.pk), connection, provider)
        found.counts[one.outcome] += 1
        if one.error is not None:
            found.refusals[one.error.field, one.error.message] += 1
        elif one.outcome in ("created", "updated") and len(found.samples) < SAMPLES:
            found.samples.append(one)
    found.seconds = seconds(connection, provider, created=found.counts["created"], updated=found.counts["updated"])
    return found


def seconds(connection: Connection, provider: Provider, *, created: int, updated: int) -> float | None:
    """How long so many creates and updates take at the connection's rate; None where it has no rate."""
    if not connection.rate:
        return None
    offers = provider.capabilities(connection)
    calls = ceil(created / max(offers.batch, 1)) + ceil(updated / max(offers.update_batch, 1))
    return calls / connection.rate


def _links(connection: Connection, ids: Collection[UUID]) -> dict[UUID, CustomerLink]:
    rows = CustomerLink.objects.filter(connection=connection, customer__in=ids, is_duplicate=False)
    return {link.customer_id: link for link in rows.defer("remote_data")}
