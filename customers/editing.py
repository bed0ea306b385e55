"""The only writers of customers: create, update, archive, restore; for one and for many with the same statements.

Each call is one transaction. It locks what it changes, writes one change row per new version, and tells
`customers_changed` before it commits. Values that equal what is stored make no version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import models, transaction
from django.dispatch import Signal
from django.utils import timezone

from customers import bulk
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization
from customers.normalize import (
    clean_text,
    country_code,
    email_key,
    has_control_characters,
    join_name,
    name_key,
    phone_key,
)

ADDRESS = ("line1", "line2", "city", "state", "postal_code", "country")
TEXTS = (
    "name",
    "first_name",
    "last_name",
    "email",
    "phone",
    *(f"address_{part}" for part in ADDRESS),
    *(f"shipping_address_{part}" for part in ADDRESS),
    "currency",
)
MAX_DEPTH = 16
FLAGS = ("notify_email", "notify_phone", "is_active")
# What a person, a system or a file may set. Everything else on a customer follows from these.
EDITABLE = (*TEXTS, *FLAGS, "custom_fields")
LENGTHS: Mapping[str, int] = {
    name: column.max_length
    for name in (*TEXTS, "name_key", "email_key", "phone_key")
    if isinstance(column := Customer._meta.get_field(name), models.CharField) and column.max_length
}

Values = Mapping[str, Any]

# Sent inside the transaction with `organization`, `actor` and `changes`, a list of `Changed`.
customers_changed = Signal()


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Who or what causes a change, and why. `kind` is one of `CustomerChange.Actor`."""

    kind: str
    name: str
    id: str = ""
    request_id: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One customer's step to a new version: the names of the fields that moved."""

    customer_id: UUID
    version: int
    fields: frozenset[str]
    created: bool = False


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What an update did to one customer: `{field: [old, new]}`, empty when nothing was to change."""

    customer: Customer
    changes: dict[str, list[Any]] = field(default_factory=dict)


class InvalidCustomer(Exception):
    """Values that no customer may have. `errors` is `{position: {field: [message]}}`."""

    def __init__(self, errors: Mapping[int, Mapping[str, list[str]]]) -> None:
        self.errors = errors
        super().__init__(f"{len(errors)} customers have invalid values: {dict(errors)}")


class StaleVersion(Exception):
    """Somebody else changed these customers since they were read. `customers` are as they are now."""

    def __init__(self, customers: Sequence[Customer]) -> None:
        self.customers = customers
        super().__init__(f"{len(customers)} customers were changed since they were read")


class UnknownCustomer(Exception):
    """No such customer in this organization. `ids` are those asked for."""

    def __init__(self, ids: Iterable[UUID]) -> None:
        self.ids = list(ids)
        super().__init__(f"no such customer: {', '.join(map(str, self.ids))}")


def problems(values: Values, *, creating: bool) -> dict[str, list[str]]:
    """What is wrong with these values, as `{field: [message with the remedy]}`; empty when they can be stored.

    An e-mail address may be malformed: RootFi's document allows it, so its form is each boundary's own question.
    """
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        if name in FLAGS:
            if not isinstance(value, bool):
                found[name] = ["Give true or false."]
        elif name == "custom_fields":
            if not isinstance(value, dict):
                found[name] = ["Give an object of names and values."]
            elif wrong := _unstorable(value):
                found[name] = [wrong]
        elif name not in LENGTHS or name not in TEXTS:
            found[name] = ["A customer has no such field."]
        elif value is not None and not isinstance(value, str):
            found[name] = ["Give a text."]
        elif value and has_control_characters(value):
            found[name] = ["Remove the control characters."]
        elif value and len(clean_text(value)) > LENGTHS[name]:
            found[name] = [f"Use at most {LENGTHS[name]} characters."]
    named = "name" in values or (creating and ("first_name" in values or "last_name" in values))
    if named and "name" not in found:
        name = values.get("name") or join_name(values.get("first_name") or "", values.get("last_name") or "")
        if not clean_text(str(name)):
            found["name"] = ["A customer needs a name."]
        elif len(clean_text(str(name))) > LENGTHS["name"]:
            found["name"] = [f"Use at most {LENGTHS['name']} characters for first and last name together."]
    elif creating and not named:
        found["name"] = ["A customer needs a name."]
    return found


def _unstorable(value: Any, depth: int = 0) -> str:
    """Why a JSON value cannot be kept alike by both databases; "" when it can."""
    if depth > MAX_DEPTH:
        return f"Nest at most {MAX_DEPTH} levels."
    if isinstance(value, str) and any(c == "\x00" or "\ud800" <= c <= "\udfff" for c in value):
        return "Remove the NUL characters and lone surrogates."
    if isinstance(value, float) and not math.isfinite(value):
        return "Give numbers that are finite."
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "Give whole numbers of at most 64 bits, or put them in quotes."
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, (_unstorable(one, depth + 1) for one in inner)), "")


def _columns(values: Values, *, organization: Organization, before: Customer | None) -> dict[str, Any]:
    """The columns that these values set, derived ones included."""
    columns: dict[str, Any] = {
        name: clean_text(value or "") if name in TEXTS else value for name, value in values.items()
    }
    parts = {"first_name", "last_name"} & columns.keys()
    if parts and not columns.get("name"):
        first = columns.get("first_name", before.first_name if before else "")
        last = columns.get("last_name", before.last_name if before else "")
        columns["name"] = join_name(first, last)[: LENGTHS["name"]].strip() or (before.name if before else "")
    elif "name" in columns and not parts and before and columns["name"] != before.name:
        # A format with one name changed it: the two parts no longer make it up.
        columns |= {"first_name": "", "last_name": ""}
    if "name" in columns:
        columns["name_key"] = name_key(columns["name"])[: LENGTHS["name_key"]]
    if "email" in columns:
        columns["email_key"] = email_key(columns["email"])[: LENGTHS["email_key"]]
    if "phone" in columns:
        columns["phone_key"] = phone_key(columns["phone"], country=organization.country)[: LENGTHS["phone_key"]]
    for name in ("address_country", "shipping_address_country"):
        if name in columns:
            columns[f"{name}_code"] = country_code(columns[name])
    return columns


def _change(customer: Customer, changes: dict[str, list[Any]], *, actor: Actor, at: datetime) -> CustomerChange:
    return CustomerChange(
        organization_id=customer.organization_id,
        customer_id=customer.id,
        version=customer.version,
        at=at,
        actor_kind=actor.kind,
        actor_id=actor.id[:64],
        actor_name=actor.name[:200],
        request_id=actor.request_id[:64],
        message=actor.message[:500],
        changes=changes,
    )


def create(
    *, organization: Organization, values: Sequence[Values], actor: Actor, at: datetime | None = None
) -> list[Customer]:
    """New customers, in the order of `values`. Raises InvalidCustomer, and then stores none of them."""
    if errors := {i: e for i, row in enumerate(values) if (e := problems(row, creating=True))}:
        raise InvalidCustomer(errors)
    at = at or timezone.now()
    customers, changes = [], []
    for row in values:
        columns = _columns(row, organization=organization, before=None)
        customer = Customer(id=uuid7(), organization=organization, version=1, created_at=at, updated_at=at, **columns)
        customers.append(customer)
        filled = {name: [None, columns[name]] for name in EDITABLE if columns.get(name) not in (None, "", {})}
        changes.append(_change(customer, filled, actor=actor, at=at))
    with transaction.atomic(savepoint=False):
        bulk.insert(customers)
        bulk.insert(changes)
        changed = [Changed(customer_id=c.id, version=1, fields=frozenset(EDITABLE), created=True) for c in customers]
        if changed:
            customers_changed.send(sender=Customer, organization=organization, actor=actor, changes=changed)
    return customers


def lock(*, organization: Organization, ids: Iterable[UUID]) -> dict[UUID, Customer]:
    """The customers with these ids, locked until the transaction ends; the id of a merged one leads to its survivor.

    Raises UnknownCustomer, also for another organization's id.
    """
    wanted = set(ids)
    rows = Customer.objects.filter(organization=organization).order_by("id").select_for_update()
    found = {customer.id: customer for customer in rows.filter(id__in=wanted)}
    if missing := wanted - found.keys():
        raise UnknownCustomer(missing)
    if survivors := {c.merged_into_id for c in found.values() if c.merged_into_id} - found.keys():
        found |= {customer.id: customer for customer in rows.filter(id__in=survivors)}
    return {id_: found[found[id_].merged_into_id or id_] for id_ in wanted}


def update(
    *,
    organization: Organization,
    values: Mapping[UUID, Values],
    actor: Actor,
    at: datetime | None = None,
    expected: Mapping[UUID, int] | None = None,
    locked: Mapping[UUID, Customer] | None = None,
) -> dict[UUID, Edit]:
    """Set the given fields of the given customers; fields not named stay.

    `expected` holds the version each caller last saw: a customer that has moved on raises StaleVersion.
    `locked` hands over customers that the caller has already locked in this transaction.
    Raises InvalidCustomer (positions are those of `values`) or UnknownCustomer. On any error nothing is stored.
    """
    if errors := {i: e for i, row in enumerate(values.values()) if (e := problems(row, creating=False))}:
        raise InvalidCustomer(errors)
    # A savepoint only where somebody may catch StaleVersion and go on in the same transaction.
    with transaction.atomic(savepoint=bool(expected)):
        found = locked or lock(organization=organization, ids=values)
        if stale := [found[id_] for id_, version in (expected or {}).items() if found[id_].version != version]:
            raise StaleVersion(stale)
        return _write(
            {
                id_: (found[id_], _columns(row, organization=organization, before=found[id_]))
                for id_, row in values.items()
            },
            organization=organization,
            actor=actor,
            at=at or timezone.now(),
        )


def _write(
    edits: Mapping[UUID, tuple[Customer, dict[str, Any]]],
    *,
    organization: Organization,
    actor: Actor,
    at: datetime,
) -> dict[UUID, Edit]:
    results: dict[UUID, Edit] = {}
    touched: dict[UUID, tuple[Customer, dict[str, list[Any]]]] = {}
    written = {"version", "updated_at"}
    for id_, (customer, columns) in edits.items():
        moved = {name: value for name, value in columns.items() if getattr(customer, name) != value}
        seen = {
            name: [getattr(customer, name), value]
            for name, value in moved.items()
            if not name.endswith(("_key", "_code"))
        }
        if moved:
            written |= moved.keys()
            for name, value in moved.items():
                setattr(customer, name, value)
        if seen:
            # Two ids of one merged customer may meet here: one customer, one new version.
            earlier = touched.setdefault(customer.id, (customer, {}))[1]
            for name, (old, new) in seen.items():
                earlier[name] = [earlier[name][0] if name in earlier else old, new]
        results[id_] = Edit(customer=customer, changes=seen)
    for customer, _ in touched.values():
        customer.version += 1
        customer.updated_at = at
    if touched:
        bulk.update([customer for customer, _ in touched.values()], written)
        bulk.insert([_change(customer, _plain(changes), actor=actor, at=at) for customer, changes in touched.values()])
        changed = [
            Changed(customer_id=customer.id, version=customer.version, fields=frozenset(changes))
            for customer, changes in touched.values()
        ]
        customers_changed.send(sender=Customer, organization=organization, actor=actor, changes=changed)
    return results


def _plain(changes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [value.isoformat() if isinstance(value, datetime) else value for value in pair]
        for name, pair in changes.items()
    }


@transaction.atomic
def archive(
    *, organization: Organization, ids: Iterable[UUID], actor: Actor, at: datetime | None = None
) -> dict[UUID, Edit]:
    """Take customers out of use without losing them. An archived one is left as it is."""
    at = at or timezone.now()
    found = lock(organization=organization, ids=ids)
    return _write(
        {id_: (c, {"archived_at": c.archived_at or at}) for id_, c in found.items()},
        organization=organization,
        actor=actor,
        at=at,
    )


@transaction.atomic
def restore(
    *, organization: Organization, ids: Iterable[UUID], actor: Actor, at: datetime | None = None
) -> dict[UUID, Edit]:
    """Bring archived customers back into use."""
    found = lock(organization=organization, ids=ids)
    return _write(
        {id_: (c, {"archived_at": None}) for id_, c in found.items()},
        organization=organization,
        actor=actor,
        at=at or timezone.now(),
    )
