"""How the hub's own endpoints write customers: one is a batch of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from django.db import IntegrityError, models
from rest_framework import serializers
from rest_framework.exceptions import NotFound

from connectors.api import problems
from connectors.api.problems import Refusal
from connectors.api.resource import Strict
from connectors.inbound.fields import Flag, Text, well_formed
from connectors.models import Connection, CustomerLink
from connectors.provider import Record
from connectors.sync.races import start_over
from connectors.sync.receive import CREATED, UNCHANGED, receive
from customers import editing
from customers.editing import FLAGS, LENGTHS, TEXTS, Actor, Checked, StaleVersion, UnknownCustomer
from customers.models import Customer, CustomerChange, Organization
from customers.prepared import Among, Prepared

CREATE, UPDATE, UPSERT = "create", "update", "upsert"
FAILED = "failed"
Path = tuple[str | int, ...]


class Values(Strict):
    """What can be set of a customer. A field that is absent stays as it is; null empties a text.

    Of `custom_fields` the names given are set, null removes one, and the others stay.
    """

    custom_fields = serializers.DictField(required=False, help_text="Names to set; null removes one.")

    def get_fields(self) -> dict[str, Any]:
        texts = {
            name: Text(
                max_length=LENGTHS[name],
                required=False,
                allow_null=True,
                allow_blank=True,
                validators=[well_formed] if name == "email" else [],
            )
            for name in TEXTS
        }
        return {**texts, **{name: Flag(required=False) for name in FLAGS}, **super().get_fields()}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One customer to be written: `customer_id`, or `source_id` at `connection`, or neither for a new one.

    `action` says whether it may be new, must be, or must not. `expected` is the version that the caller has read. `at`
    and `values_at` are where the item and its values stand in the body.
    """

    action: str
    values: Mapping[str, Any]
    customer_id: UUID | None = None
    connection: Connection | None = None
    source_id: str | None = None
    expected: int | None = None
    at: Path = ()
    values_at: Path = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one item: `status` is created, updated, unchanged or failed, and then `refusal` says why."""

    status: str
    customer: Customer | None = None
    refusal: Refusal | None = None


def write(
    *, organization: Organization, items: Sequence[Item | Refusal], actor: Actor, whole: bool = False
) -> list[Outcome]:
    """Write these customers in one transaction and answer for each in order; with `whole`, one refusal keeps all out.

    An item that is refused already passes through. The number of statements does not depend on that of the items, only
    on that of the connections they name. A customer that two items mean is written by the first, the second fails.
    """
    return start_over(lambda: _write(organization, items, actor, whole))


def write_one(*, organization: Organization, item: Item, actor: Actor) -> tuple[Customer, bool]:
    """The customer as written, and whether it is new. Raises Refusal."""
    [outcome] = write(organization=organization, items=[item], actor=actor)
    if outcome.refusal is not None:
        raise NotFound if outcome.refusal.code == "not_found" else outcome.refusal
    assert outcome.customer is not None  # only a refusal has none
    return outcome.customer, outcome.status == CREATED


def check_version(customer: Customer, expected: int | None) -> None:
    """Raises StaleVersion unless the customer, locked by the caller, is at the version that was read."""
    if expected is not None and customer.version != expected:
        raise StaleVersion([customer])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """An item that nothing speaks against, `before` the customer that it changes."""

    item: Item
    values: Mapping[str, Any]
    before: Customer | None


def _write(organization: Organization, items: Sequence[Item | Refusal], actor: Actor, whole: bool) -> list[Outcome]:
    owners = _owners([item for item in items if isinstance(item, Item)])
    wanted = {id_ for item in items if isinstance(item, Item) and (id_ := _meant(item, owners))}
    locked = _lock(organization, wanted)
    plans: dict[int, _Plan] = {}
    outcomes: dict[int, Outcome] = {}
    seen: dict[object, int] = {}
    for position, item in enumerate(items):
        if isinstance(item, Refusal):
            outcomes[position] = Outcome(status=FAILED, refusal=item)
            continue
        before = locked.get(id_) if (id_ := _meant(item, owners)) else None
        try:
            plans[position] = _plan(item, before, seen, position)
        except Refusal as refusal:
            outcomes[position] = Outcome(status=FAILED, customer=before, refusal=refusal)
    if whole and outcomes:
        outcomes |= {position: Outcome(status=UNCHANGED, customer=plan.before) for position, plan in plans.items()}
    else:
        done = _carry_out(organization, plans, actor, locked)
        now = {outcome.customer.pk: outcome.customer for outcome in done.values() if outcome.customer}
        for position, outcome in outcomes.items():
            if outcome.customer and outcome.customer.pk in now:  # another item has written it
                outcomes[position] = replace(outcome, customer=now[outcome.customer.pk])
        outcomes |= done
    return [outcomes[position] for position in range(len(items))]


def _owners(items: Iterable[Item]) -> dict[tuple[int, str], CustomerLink]:
    """The links that the items name by connection and source id."""
    named = {(item.connection.pk, item.source_id) for item in items if item.connection and item.source_id is not None}
    if not named:
        return {}
    links = _OWNERS(connections={pk for pk, _ in named}, ids={id_ for _, id_ in named})
    return {(link.connection_id, str(link.remote_id)): link for link in links}


_OWNERS = Prepared(
    lambda: CustomerLink.objects.filter(
        Among("connection_id", "connections", models.BigAutoField()), Among("remote_id", "ids", models.CharField())
    ).only("connection_id", "remote_id", "customer_id", "deleted_at")
)


def _meant(item: Item, owners: Mapping[tuple[int, str], CustomerLink]) -> UUID | None:
    """The id of the customer that the item is to change, if there is one."""
    if item.connection is None or item.source_id is None:
        return item.customer_id
    link = owners.get((item.connection.pk, item.source_id))
    # What was deleted there can be sent again, but not changed.
    return None if link is None or (link.deleted_at and item.action == UPDATE) else link.customer_id


def _lock(organization: Organization, ids: set[UUID]) -> dict[UUID, Customer]:
    """As editing.lock, leaving out those that there are not."""
    try:
        return editing.lock(organization=organization, ids=ids) if ids else {}
    except UnknownCustomer as error:
        return _lock(organization, ids - set(error.ids))


def _plan(item: Item, before: Customer | None, seen: dict[object, int], position: int) -> _Plan:
    """The item, ready to be written. Raises Refusal. `seen` has the positions of the customers before it."""
    named = (*item.at, "source_id" if item.source_id is not None else "id")
    if before is None and item.action == UPDATE:
        raise unknown_customer(named)
    if before is not None and item.action == CREATE:
        known = f"There is {before.public_id} with this source_id already. Send upsert to change it."
        raise Refusal("conflict", known, errors=[(named, "taken", known)])
    which = before.pk if before else (item.connection and item.connection.pk, item.source_id)
    if (before is not None or item.source_id is not None) and seen.setdefault(which, position) != position:
        twice = f"Item {seen[which]} is the same customer. Send one item for each customer."
        raise Refusal("conflict", twice, errors=[(item.at, "repeated", twice)])
    if before is None and item.expected is not None:
        raise Refusal("version_conflict", "There is no such customer yet.")
    if before is not None:
        try:
            check_version(before, item.expected)
        except StaleVersion as error:
            raise problems.stale(error) from None
    values = dict(item.values)
    if "custom_fields" in values:
        fields = {**(before.custom_fields if before else {}), **values["custom_fields"]}
        removed = {name for name, value in values["custom_fields"].items() if value is None}
        values["custom_fields"] = {name: value for name, value in fields.items() if name not in removed}
    if wrong := editing.problems(values, creating=before is None):
        raise invalid(
            ((*item.values_at, name), "invalid" if name in values else "required", text)
            for name, texts in wrong.items()
            for text in texts
        )
    return _Plan(item=item, values=values, before=before)


def _carry_out(
    organization: Organization, plans: Mapping[int, _Plan], actor: Actor, locked: Mapping[UUID, Customer]
) -> dict[int, Outcome]:
    batches: dict[Connection | None, dict[int, Record]] = {}
    for position, plan in plans.items():
        item, before = plan.item, plan.before
        connection = item.connection
        if before is not None and (connection is None or connection.pushes):
            # Where the hub sends to that system, this is an edit that is still to be sent there.
            connection, record = None, Record(values=plan.values, customer_id=before.pk)
        else:
            # `_plan` found nothing wrong with them, for a new customer if it is one.
            values = Checked(plan.values) if before is None else plan.values
            record = Record(values=values, remote_id=item.source_id)
        batches.setdefault(connection, {})[position] = record
    outcomes = {}
    for connection, records in batches.items():
        results = receive(
            organization=organization,
            connection=connection,
            records=list(records.values()),
            actor=_source(connection, actor) if connection is not None and connection.pushes else actor,
            locked=locked,
        )
        for position, received in zip(records, results, strict=True):
            before = plans[position].before
            if (before is None and received.outcome != CREATED) or (
                before is not None and before.pk != received.customer.pk
            ):
                raise IntegrityError("a link was made or moved while its customer was looked up")
            outcomes[position] = Outcome(status=received.outcome, customer=received.customer)
    return outcomes


def _source(connection: Connection, actor: Actor) -> Actor:
    """The system itself as the author, so that a customer from there is not at once sent there as a new one."""
    return Actor(
        kind=CustomerChange.Actor.CONNECTION,
        id=str(connection.pk),
        name=connection.name,
        request_id=actor.request_id,
        message=actor.message or f"Sent by {actor.name}.",
    )


def unknown_customer(at: Path) -> Refusal:
    return Refusal("not_found", "Customer not found.", errors=[(at, "not_found", "There is no such customer.")])


def invalid(errors: Iterable[tuple[Path, str, str]]) -> Refusal:
    errors = list(errors)
    count = "1 field needs" if len(errors) == 1 else f"{len(errors)} fields need"
    return Refusal("validation_failed", f"{count} attention.", errors=errors)
