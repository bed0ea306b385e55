"""Customers as rows of a file, one code path for the command and the download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.db.models import Q, QuerySet

from connectors.models import Connection, CustomerLink
from customers import tabular
from customers.models import Customer
from customers.privacy import HIDDEN, PERSONAL, masked

PAGE_ROWS = 1000


def rows(
    customers: QuerySet[Customer], *, connection: Connection | None = None, clear: bool = True
) -> Iterator[Sequence[str]]:
    """The header, then each customer's protected cells, masked without `clear`; `connection` adds its ids."""
    columns = tabular.columns_for(custom=custom_names(customers, None), external_id=connection is not None)
    yield columns
    for page in pages(customers, None):
        ids = external_ids(page, connection)
        for customer in page:
            if not clear:
                mask(customer)
            yield tabular.cells_of(customer, columns, external_id=ids.get(customer.pk, ""))


def mask(customer: Customer) -> None:
    """Hide what is personal on an object that is only shown, never saved."""
    for name in PERSONAL - {"custom_fields"}:
        setattr(customer, name, masked(name, getattr(customer, name)))
    customer.custom_fields = dict.fromkeys(customer.custom_fields, HIDDEN)


def pages(customers: QuerySet[Customer], limit: int | None) -> Iterator[list[Customer]]:
    """Keyset pages: each costs what it holds, however far in it is."""
    left = limit
    last = None
    while left is None or left > 0:
        rows = customers.filter(Q(pk__gt=last) if last else Q()).order_by("pk")
        page = list(rows[: PAGE_ROWS if left is None else min(PAGE_ROWS, left)])
        if not page:
            return
        yield page
        last = page[-1].pk
        left = None if left is None else left - len(page)


def custom_names(customers: QuerySet[Customer], limit: int | None) -> list[str]:
    """The names of the custom fields that these customers have."""
    names: set[str] = set()
    for page in pages(customers.only("pk", "custom_fields"), limit):
        for customer in page:
            names |= customer.custom_fields.keys()
    return sorted(names)


def external_ids(page: list[Customer], connection: Connection | None) -> dict[Any, str]:
    """What that system calls these customers; of a customer with two records there, the one that counts."""
    if connection is None:
        return {}
    links = CustomerLink.objects.filter(
        connection=connection, customer__in=page, is_duplicate=False, deleted_at=None, remote_id__isnull=False
    )
    return {customer_id: remote_id or "" for customer_id, remote_id in links.values_list("customer_id", "remote_id")}
