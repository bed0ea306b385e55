"""The only writers of customers: create, update, archive, restore, for one and for many with the same statements;
merge and unmerge.

Each call is one transaction. It locks what it changes, writes one change row per new version, and tells
`customers_changed` before it commits. Values that equal what is stored make no version.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import models, transaction
from django.db.models import Q, QuerySet
from django.dispatch import Signal
from django.utils import timezone

from customers import bulk
from customers.ids import uuid7, uuid7s
from customers.models import Customer, CustomerChange, MergeRecord, Note, Organization
from customers.normalize import (
    clean_text,
    country_code,
    email_key,
    has_control_characters,
    join_name,
    name_key,
    phone_key,
)
from customers.prepared import Among, Param, Prepared

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
# What follows from other columns.
DERIVED = frozenset({"name_key", "email_key", "phone_key", "address_country_code", "shipping_address_country_code"})
UNMERGE_DAYS = 30
LENGTHS: Mapping[str, int] = {
    name: column.max_length
    for name in (*TEXTS, "name_key", "email_key", "phone_key")
    if isinstance(column := Customer._meta.get_field(name), models.CharField) and column.max_length
}
_LENGTH_OF = {name: LENGTHS[name] for name in TEXTS}
# So many characters one may become by composition.
MOST_COMPOSED = 3

Values = Mapping[str, Any]

# Sent inside the transaction with `organization`, `actor`, `at` and `changes`, a list of `Changed`.
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
    """One customer's step to a new version: the names of the fields that moved.

    `merged_into` is set on the customer that a merge has just made part of another, `unmerged_from` on the one that
    stands for itself again. What a receiver puts into `notes` at a merge is kept with its record and comes back at the
    unmerge; it must be JSON.
    """

    customer_id: UUID
    version: int
    fields: frozenset[str]
    created: bool = False
    merged_into: UUID | None = None
    unmerged_from: UUID | None = None
    notes: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)


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


class CannotMerge(Exception):
    """These two customers cannot be merged; the message says why and what to do."""


class CannotUnmerge(Exception):
    """This merge cannot be undone; the message says why."""


def problems(values: Values, *, creating: bool) -> dict[str, list[str]]:
    """What is wrong with these values, as `{field: [message with the remedy]}`; empty when they can be stored.

    An e-mail address may be malformed: RootFi's document allows it, so its form is each boundary's own question.
    """
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        if (length := _LENGTH_OF.get(name)) is not None:
            if value is None or value == "":
                continue
            if not isinstance(value, str):
                found[name] = ["Give a text."]
            elif not value.isprintable() and has_control_characters(value):
                found[name] = ["Remove the control characters."]
            elif len(value) * (1 if value.isascii() else MOST_COMPOSED) > length and len(clean_text(value)) > length:
                found[name] = [f"Use at most {length} characters."]
        elif name in FLAGS:
            if not isinstance(value, bool):
                found[name] = ["Give true or false."]
        elif name == "custom_fields":
            if not isinstance(value, dict):
                found[name] = ["Give an object of names and values."]
            elif wrong := _unstorable(value):
                found[name] = [wrong]
        else:
            found[name] = ["A customer has no such field."]
    if "name" not in found and (wrong := name_problem(values, creating=creating)):
        found["name"] = [wrong]
    return found


def name_problem(values: Values, *, creating: bool) -> str:
    """What keeps these values, each well-formed, from giving the customer a name; "" when nothing does."""
    if not creating and "name" not in values:
        return ""
    name = values.get("name") or join_name(values.get("first_name") or "", values.get("last_name") or "")
    cleaned = clean_text(str(name))
    if not cleaned:
        return "A customer needs a name."
    if len(cleaned) > LENGTHS["name"]:
        return f"Use at most {LENGTHS['name']} characters for first and last name together."
    return ""


class Checked(dict[str, Any]):
    """Values for a new customer that `problems` found nothing wrong with: `create` does not look again."""


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
        name: clean_text(value or "") if name in _LENGTH_OF else value for name, value in values.items()
    }
    parts = {"first_name", "last_name"} & columns.keys()
    if parts and not columns.get("name"):
        first = columns.get("first_name", before.first_name if before else "")
        last = columns.get("last_name", before.last_name if before else "")
        columns["name"] = join_name(first, last)[: LENGTHS["name"]].strip() or (before.name if before else "")
    elif "name" in columns and not parts and before and columns["name"] != before.name:
        # A format with one name changed it: the two parts no longer make it up.
        columns |= {"first_name": "", "last_name": ""}
    return columns | _keys(columns, organization)


def _keys(columns: Values, organization: Organization) -> dict[str, str]:
    """The look-up keys of these columns."""
    keys = {}
    if "name" in columns:
        keys["name_key"] = name_key(columns["name"])[: LENGTHS["name_key"]]
    if "email" in columns:
        keys["email_key"] = email_key(columns["email"])[: LENGTHS["email_key"]]
    if "phone" in columns:
        keys["phone_key"] = phone_key(columns["phone"], country=organization.country)[: LENGTHS["phone_key"]]
    for name in ("address_country", "shipping_address_country"):
        if name in columns:
            keys[f"{name}_code"] = country_code(columns[name])
    return keys


def _change(
    customer: Customer, changes: Mapping[str, list[Any]], *, actor: Actor, at: datetime, message: str = ""
) -> CustomerChange:
    return CustomerChange(
        organization_id=customer.organization_id,
        customer_id=customer.id,
        version=customer.version,
        at=at,
        changes=_plain(changes),
        **_author(actor, message),
    )


def _author(actor: Actor, message: str = "") -> dict[str, str]:
    """What a change row says of who made it, and why."""
    return {
        "actor_kind": actor.kind,
        "actor_id": actor.id[:64],
        "actor_name": actor.name[:200],
        "request_id": actor.request_id[:64],
        "message": (actor.message or message)[:500],
    }


def create(
    *, organization: Organization, values: Sequence[Values], actor: Actor, at: datetime | None = None
) -> list[Customer]:
    """New customers, in the order of `values`. Raises InvalidCustomer, and then stores none of them."""
    checked = ((i, problems(row, creating=True)) for i, row in enumerate(values) if not isinstance(row, Checked))
    if errors := {i: wrong for i, wrong in checked if wrong}:
        raise InvalidCustomer(errors)
    at = at or timezone.now()
    customers: list[Customer] = []
    blank = bulk.Mould(Customer, organization=organization, version=1, created_at=at, updated_at=at)
    said = bulk.Mould(CustomerChange, organization=organization, version=1, at=at, **_author(actor))
    for row, id_ in zip(values, uuid7s(len(values)), strict=True):
        columns = _columns(row, organization=organization, before=None)
        columns["id"] = id_
        customers.append(blank.make(columns))
        filled = {name: [None, v] for name in EDITABLE if (v := columns.get(name)) or v is False}
        said.add({"customer_id": id_, "changes": filled})
    with transaction.atomic(savepoint=False):
        blank.insert()
        said.insert()
        changed = [Changed(customer_id=c.id, version=1, fields=frozenset(EDITABLE), created=True) for c in customers]
        if changed:
            customers_changed.send(sender=Customer, organization=organization, actor=actor, changes=changed, at=at)
    return customers


def draft(*, organization: Organization) -> Customer:
    """A customer that is not stored and never is: to ask what a system would be sent."""
    return Customer(id=uuid7(), organization=organization)


def imagined(customer: Customer, values: Values) -> Customer:
    """The customer as it would be with these values, for asking only: a copy that is never stored."""
    other = copy.copy(customer)
    for name, value in {**values, **_keys(values, customer.organization)}.items():
        setattr(other, name, value)
    return other


def lock(*, organization: Organization, ids: Iterable[UUID]) -> dict[UUID, Customer]:
    """The customers with these ids, locked until the transaction ends; the id of a merged one leads to its survivor.

    Raises UnknownCustomer, also for another organization's id.
    """
    wanted = set(ids)
    found = {customer.id: customer for customer in _LOCKED_WITH_SURVIVORS(organization=organization.pk, ids=wanted)}
    if missing := wanted - found.keys():
        raise UnknownCustomer(missing)
    # Empty, but where somebody merged while we waited for the lock.
    while late := {c.merged_into_id for c in found.values() if c.merged_into_id} - found.keys():
        found |= {customer.id: customer for customer in _LOCKED(organization=organization.pk, ids=late)}
    return {id_: _survivor(found, id_) for id_ in wanted}


def _named() -> QuerySet[Customer]:
    rows = Customer.objects.filter(organization_id=Param("organization", models.BigAutoField()))
    return rows.filter(Among("id", "ids", models.UUIDField()))


def _with_survivors() -> QuerySet[Customer]:
    merged = _named().filter(merged_into__isnull=False)
    ids = _named().values("id").union(merged.values("merged_into_id"))
    return Customer.objects.filter(organization_id=Param("organization", models.BigAutoField()), id__in=ids)


# In one order everywhere, so that two who lock never wait for each other in a circle.
_LOCKED = Prepared(lambda: _named().order_by("id").select_for_update())
_LOCKED_WITH_SURVIVORS = Prepared(lambda: _with_survivors().order_by("id").select_for_update())


def _survivor(found: Mapping[UUID, Customer], id_: UUID) -> Customer:
    customer = found[id_]
    while customer.merged_into_id:
        customer = found[customer.merged_into_id]
    return customer


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
    steps: dict[UUID, _Step] = {}
    written: set[str] = set()
    for id_, (customer, columns) in edits.items():
        moved, seen = _set(customer, columns)
        written |= moved
        if seen:
            # Two ids of one merged customer may meet here: one customer, one new version.
            earlier = steps.setdefault(customer.id, _Step(customer=customer)).changes
            for name, (old, new) in seen.items():
                earlier[name] = [earlier[name][0] if name in earlier else old, new]
        results[id_] = Edit(customer=customer, changes=seen)
    if steps:
        _advance(list(steps.values()), written, organization=organization, actor=actor, at=at)
    return results


def _set(customer: Customer, columns: Values) -> tuple[set[str], dict[str, list[Any]]]:
    """Give a customer these values. Returns the columns that moved and, less what follows from others, [old, new]."""
    moved = {name: [getattr(customer, name), value] for name, value in columns.items()}
    moved = {name: pair for name, pair in moved.items() if pair[0] != pair[1]}
    for name, (_, new) in moved.items():
        setattr(customer, name, new)
    return set(moved), {name: pair for name, pair in moved.items() if name not in DERIVED}


@dataclass(kw_only=True)
class _Step:
    """One customer on its way to its next version. `message` is for an actor who gave none."""

    customer: Customer
    changes: dict[str, list[Any]] = field(default_factory=dict)
    message: str = ""
    merged_into: UUID | None = None
    unmerged_from: UUID | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def _advance(
    steps: Sequence[_Step], columns: set[str], *, organization: Organization, actor: Actor, at: datetime
) -> None:
    """Store the next version of each of these customers: its columns, its change row, and the signal."""
    for step in steps:
        step.customer.version += 1
        step.customer.updated_at = at
    bulk.update([step.customer for step in steps], {"version", "updated_at", *columns})
    bulk.insert([_change(step.customer, step.changes, actor=actor, at=at, message=step.message) for step in steps])
    changed = [
        Changed(
            customer_id=step.customer.id,
            version=step.customer.version,
            fields=frozenset(step.changes),
            merged_into=step.merged_into,
            unmerged_from=step.unmerged_from,
            notes=step.notes,
        )
        for step in steps
    ]
    customers_changed.send(sender=Customer, organization=organization, actor=actor, changes=changed, at=at)


def _plain(changes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat()
        return str(value) if isinstance(value, UUID) else value

    return {name: [plain(value) for value in pair] for name, pair in changes.items()}


def note(*, customer: Customer, text: str, actor: Actor, at: datetime | None = None) -> Note:
    """Write something down about a customer. It makes no version and reaches no other system."""
    return Note.objects.create(
        customer=customer, at=at or timezone.now(), author_id=actor.id[:64], author_name=actor.name[:200], text=text
    )


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


@transaction.atomic
def merge(
    *,
    organization: Organization,
    survivor: UUID,
    loser: UUID,
    values: Values,
    actor: Actor,
    expected: Mapping[UUID, int] | None = None,
    at: datetime | None = None,
) -> MergeRecord:
    """Make one customer of two. The survivor takes the chosen `values`; the loser's id leads to it from now on.

    Both get a new version, the survivor also when no value differs. Customers that had been merged into the loser lead
    to the survivor too. `expected` holds the versions that were looked at. Raises CannotMerge, StaleVersion,
    InvalidCustomer or UnknownCustomer; on any error nothing is stored.
    """
    at = at or timezone.now()
    if errors := problems(values, creating=False):
        raise InvalidCustomer({0: errors})
    if survivor == loser:
        raise CannotMerge("A customer cannot be merged with itself. Choose two.")
    rows = Customer.objects.filter(organization=organization).order_by("id").select_for_update()
    found = {one.id: one for one in rows.filter(Q(id__in=(survivor, loser)) | Q(merged_into=loser))}
    if missing := {survivor, loser} - found.keys():
        raise UnknownCustomer(missing)
    # Again, for those that were merged into the loser while we waited for its lock.
    found |= {one.id: one for one in rows.filter(merged_into=loser)}
    kept, gone = found[survivor], found[loser]
    for one in (kept, gone):
        if one.merged_into_id:
            raise CannotMerge(f"{one.public_id} has already been merged into another customer. Merge that one.")
    if kept.archived_at:
        raise CannotMerge(f"{kept.public_id} is archived. Restore it first, or keep the other one.")
    if stale := [found[id_] for id_, version in (expected or {}).items() if found[id_].version != version]:
        raise StaleVersion(stale)

    followers = [one for one in found.values() if one.merged_into_id == loser]
    before = _snapshot(kept), _snapshot(gone)
    columns, changes = _set(kept, _columns(values, organization=organization, before=kept))
    notes: dict[str, Any] = {}
    steps = [
        _Step(customer=kept, changes=changes, message=f"Merged: {gone.public_id} is part of this customer now."),
        _Step(customer=gone, changes={"merged_into": [None, survivor]}, merged_into=survivor, notes=notes),
        *(_Step(customer=one, changes={"merged_into": [loser, survivor]}) for one in followers),
    ]
    for one in (gone, *followers):
        one.merged_into = kept
    _advance(steps, {*columns, "merged_into"}, organization=organization, actor=actor, at=at)
    return MergeRecord.objects.create(
        organization=organization,
        survivor=kept,
        loser=gone,
        survivor_before=before[0],
        loser_before=before[1],
        survivor_version=kept.version,
        loser_version=gone.version,
        changes=_plain(changes),
        followers=[str(one.id) for one in followers],
        notes=notes,
        at=at,
        actor_kind=actor.kind,
        actor_id=actor.id[:64],
        actor_name=actor.name[:200],
    )


def _snapshot(customer: Customer) -> dict[str, Any]:
    return {name: getattr(customer, name) for name in EDITABLE}


@transaction.atomic
def unmerge(*, organization: Organization, loser: UUID, actor: Actor, at: datetime | None = None) -> MergeRecord:
    """Undo the merge that made this customer part of another, up to 30 days after it.

    The loser is what it was. On the survivor each field goes back that the merge changed and nobody has changed since.
    Raises CannotUnmerge or UnknownCustomer.
    """
    at = at or timezone.now()
    done = MergeRecord.objects.filter(organization=organization, loser=loser, undone_at=None)
    record = done.first()
    ids = {loser} if record is None else {loser, record.survivor_id, *map(UUID, record.followers)}
    rows = Customer.objects.filter(organization=organization, id__in=ids).order_by("id").select_for_update()
    found = {one.id: one for one in rows}
    if loser not in found:
        raise UnknownCustomer([loser])
    if record is not None:
        record = done.filter(pk=record.pk).first()  # again: another may have undone it while we waited
    if record is None:
        raise CannotUnmerge(f"{found[loser].public_id} is not merged into another customer.")
    kept, gone = found[record.survivor_id], found[loser]
    if at - record.at > timedelta(days=UNMERGE_DAYS):
        raise CannotUnmerge(
            f"These customers were merged on {record.at:%Y-%m-%d}. A merge can be undone for {UNMERGE_DAYS} days."
        )
    if kept.merged_into_id:
        raise CannotUnmerge(f"{kept.public_id} has been merged into another customer since. Undo that merge first.")

    back = {name: old for name, (old, new) in _untouched(record).items() if getattr(kept, name) == new}
    columns, changes = _set(kept, back | _keys(back, organization))
    lost = {name: value for name, value in record.loser_before.items() if getattr(gone, name) != value}
    more, restored = _set(gone, lost | _keys(lost, organization))
    followers = [one for id_ in record.followers if (one := found[UUID(id_)]).merged_into_id == kept.id]
    steps = [
        _Step(customer=kept, changes=changes, message=f"Unmerged: {gone.public_id} stands for itself again."),
        _Step(
            customer=gone,
            changes={"merged_into": [kept.id, None], **restored},
            unmerged_from=kept.id,
            notes=record.notes,
        ),
        *(_Step(customer=one, changes={"merged_into": [kept.id, gone.id]}) for one in followers),
    ]
    gone.merged_into = None
    for one in followers:
        one.merged_into = gone
    _advance(steps, {*columns, *more, "merged_into"}, organization=organization, actor=actor, at=at)
    record.survivor, record.loser = kept, gone
    record.undone_at, record.undone_by, record.undone_version = at, actor.name[:200], kept.version
    record.save(update_fields=["undone_at", "undone_by", "undone_version"])
    return record


def _untouched(record: MergeRecord) -> dict[str, list[Any]]:
    """What the merge changed on the survivor and nobody since. A later merge that was undone has changed nothing."""
    if not record.changes:
        return {}
    undone = MergeRecord.objects.filter(survivor=record.survivor_id, undone_at__isnull=False)
    taken_back = {version for pair in undone.values_list("survivor_version", "undone_version") for version in pair}
    later = CustomerChange.objects.filter(
        customer=record.survivor_id, version__gt=record.survivor_version, changes__has_any_keys=list(record.changes)
    )
    touched = {
        name
        for version, changes in later.values_list("version", "changes")
        if version not in taken_back
        for name in changes
    }
    return {name: pair for name, pair in record.changes.items() if name not in touched}


def renumber(*, organization: Organization, beyond: int) -> None:
    """Put the changes that were restored into another PostgreSQL cluster before everything written there.

    A transaction number of `beyond` or more is not of this cluster. All rows up to the last such one came with it: they
    get 0, and their ids keep them in order.
    """
    with transaction.atomic():
        # Two who find out at once take turns; writers of customers need not wait.
        Organization.objects.select_for_update(no_key=True).get(pk=organization.pk)
        rows = CustomerChange.objects.filter(organization=organization)
        last = rows.filter(tx__gte=beyond).aggregate(last=models.Max("id"))["last"]
        if last is not None:
            rows.filter(tx__gt=0, id__lte=last).update(tx=0)
