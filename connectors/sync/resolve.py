"""What a person decides about a link that waits for one. Each decision is one transaction and leaves a run that tells
who decided what; where something is to be sent, the run follows it to its outcome.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import connection as database
from django.db import transaction
from django.db.models import F, Q, QuerySet

from connectors.models import REMOTE_ID_LENGTH, Conflict, Connection, CustomerLink, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider, Record
from connectors.states import WAITING, LinkState
from connectors.sync import deletes, runs
from connectors.sync.clock import database_clock
from connectors.sync.merge import same
from connectors.sync.pull import PAGE_ROWS, read_page
from connectors.sync.races import start_over
from connectors.sync.settle import unanswered
from connectors.sync.steps import SKIPPED, UPDATED, Slice
from connectors.sync.sweep import link_found, reader
from customers import editing
from customers.editing import Actor, InvalidCustomer
from customers.ids import uuid7
from customers.models import Customer
from customers.normalize import email_key, name_key

HERE, THERE = "here", "there"
# Fields that are taken from one side together.
_GROUPS: Mapping[str, Sequence[str]] = {
    name: group
    for group in (
        ("name", "first_name", "last_name"),
        *(tuple(f"{prefix}_{part}" for part in editing.ADDRESS) for prefix in ("address", "shipping_address")),
    )
    for name in group
}
# States that `release` ends. The others ask a person for more than "try again".
RELEASED = (LinkState.REJECTED, LinkState.CONFLICT)
# What makes a link's next try its first.
AS_NEW: Mapping[str, Any] = {
    "state": LinkState.OPEN,
    "attempts": 0,
    "failing_since": None,
    "fingerprint": "",
    "crashes": 0,
}
# How far a system's clock may be off, when a record is asked whether it is as old as the create.
SKEW = timedelta(minutes=10)
# So many pages are read while somebody waits for `likely`.
LIKELY_PAGES = 10


class WrongState(Exception):
    """The link is not in a state that this decides about. The text says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Likely:
    """A record there that no link knows and that may be the lost create; `why` says what they have in common."""

    record: Record
    why: str


def start_run(
    *, connection: Connection, actor: Actor, decision: str, planned: int, at: datetime, customer: UUID | None = None
) -> SyncRun:
    """The run of a decision after which something is sent: it ends when each of the planned links has an outcome."""
    request: dict[str, Any] = {"decision": decision}
    if customer is not None:
        request["customer"] = str(customer)
    return runs.start(
        organization=connection.organization,
        connection=connection,
        kind=SyncRun.Kind.PUSH,
        actor=actor,
        at=at,
        planned=planned,
        state=SyncRun.State.QUEUED,
        request=request,
    )


# A create whose answer was lost


@transaction.atomic
def create_again(
    *, link: CustomerLink, actor: Actor, at: datetime | None = None, run: SyncRun | None = None
) -> SyncRun:
    """The lost create came to nothing: create the record anew, once the lost request must be dead.

    With `run` it counts there, where it is planned. Raises WrongState, also while the record is still looked for.
    """
    at = at or database_clock()
    link = _locked(link, at)
    lost = _lost_create(link)
    if link.next_attempt_at is not None:
        raise WrongState(f"{link.customer} is still being looked for in {link.connection}. Wait for that.")
    _may_be_sent(link)
    lost.outcome, lost.answered_at = PushIntent.Outcome.FAILED, at
    lost.error = f"{actor.name} had it created again."[:500]
    lost.save(update_fields=["outcome", "answered_at", "error"])
    link.epoch += 1
    return _send(link, "create_again", actor, due=max(at, lost.hold_until or at), at=at, run=run)


@transaction.atomic
def this_is_it(
    *,
    link: CustomerLink,
    remote_id: str,
    provider: Provider,
    actor: Actor,
    record: Record | None = None,
    at: datetime | None = None,
) -> SyncRun:
    """This record is what the lost create made: link it, as if it had answered. What is newer follows as an update.

    `record` is the record, where it is at hand. Raises WrongState, also for an id that is linked already.
    """
    at = at or database_clock()
    remote_id = remote_id.strip()
    link = _locked(link, at)
    lost = _lost_create(link)
    if not 0 < len(remote_id) <= REMOTE_ID_LENGTH:
        raise WrongState(f"Give the record's id in {link.connection}, of at most {REMOTE_ID_LENGTH} characters.")
    rows = CustomerLink.objects.filter(connection=link.connection_id, remote_id=remote_id).select_related("customer")
    if (other := rows.first()) is not None:
        raise WrongState(f"Record {remote_id} is linked to {other.customer}. Choose another, or merge the customers.")
    runs.release(links=CustomerLink.objects.filter(pk=link.pk), at=at)
    run = start_run(
        connection=link.connection, actor=actor, decision="this_is_it", planned=1, at=at, customer=link.customer_id
    )
    CustomerLink.objects.filter(pk=link.pk).update(run=run)
    found = replace(record or Record(values={}), remote_id=remote_id)
    part = Slice(connection=link.connection, provider=provider, clock=lambda: at, rng=random.Random())
    link_found(part, [(link, lost, [found])])
    run.refresh_from_db()
    return run


@transaction.atomic
def keep_waiting(*, link: CustomerLink, actor: Actor, at: datetime | None = None) -> SyncRun:
    """Leave a lost create as it is: a pull or a sweep may still find its record. Raises WrongState."""
    at = at or database_clock()
    link = _locked(link, at)
    _lost_create(link)
    return _decided(link, "keep_waiting", actor, SKIPPED, at)


def likely(
    *,
    link: CustomerLink,
    provider: Provider,
    session: Session,
    clock: Callable[[], datetime] = database_clock,
) -> tuple[list[Likely], bool]:
    """Records there that may be what a lost create made, and whether the whole list was looked through.

    They are linked to nobody, were made while the create may have been applied, and have its e-mail address, or its
    name and postal code. Reads ten pages at most; only what has changed since, where the system's list can tell.
    Empty where the system cannot list. Raises WrongState, ConnectorError.
    """
    connection = link.connection
    lost = _lost_create(link)
    capabilities = provider.capabilities(connection)
    if not capabilities.lists:
        return [], False
    begins, ends = lost.first_sent_at - SKEW, lost.sent_at + timedelta(seconds=capabilities.max_request_life) + SKEW
    this = reader(connection=connection, provider=provider, session=session, clock=clock)
    found: dict[str, Likely] = {}
    cursor: str | None = None
    for _ in range(LIKELY_PAGES):
        page = read_page(this, cursor=cursor, since=begins if capabilities.incremental else None, rows=PAGE_ROWS)
        for record in page.records if page else ():
            if not isinstance(record, Record) or record.deleted or not record.remote_id:
                continue
            fits = record.created_at is None or begins <= record.created_at <= ends
            if fits and (why := _alike(record.values, lost.sent_values)):
                found[record.remote_id] = Likely(record=record, why=why)
        cursor = page.next if page else None
        if cursor is None:
            break
    known = CustomerLink.objects.filter(connection=connection)
    taken = set(known.filter(remote_id__in=found).values_list("remote_id", flat=True))
    taken |= set(
        known.filter(~Q(former_remote_id=""), former_remote_id__in=found).values_list("former_remote_id", flat=True)
    )
    free = [one for remote_id, one in found.items() if remote_id not in taken]
    return sorted(free, key=lambda one: one.record.created_at is None), cursor is None


# A field that was changed on both sides


@transaction.atomic
def keep_field(*, link: CustomerLink, field: str, side: str, actor: Actor, at: datetime | None = None) -> SyncRun:
    """End the conflict over a field: the value from "here" is sent, or the one from "there" taken over.

    Raises WrongState, also when the hub can store no such value.
    """
    if side not in (HERE, THERE):
        raise ValueError(f"a side is {HERE!r} or {THERE!r}, not {side!r}")
    at = at or database_clock()
    organization = link.connection.organization
    # Customers are locked before links, everywhere.
    customers = editing.lock(organization=organization, ids=[link.customer_id])
    link = _locked(link, at)
    if link.customer_id not in customers or field not in link.conflicts or link.deleted_at is not None:
        raise WrongState(f"{field} of {link.customer} is not in conflict with {link.connection} any more.")
    link.customer = customer = customers[link.customer_id]
    theirs, was_dirty = link.conflicts[field]["there"], link.is_dirty
    if side == THERE:
        _take_over(link, field, theirs, actor, at, customers)
        link.refresh_from_db(fields=["needed_version", "next_attempt_at", "state", "attempts"])
    link.conflicts = {name: entry for name, entry in link.conflicts.items() if name != field}
    # Either way the base says what is there: ours differs from it and goes out, theirs does not.
    link.base_local = {**link.base_local, field: theirs}
    Conflict.objects.filter(link=link, field=field, outcome=Conflict.Outcome.WAITING, resolved_at=None).update(
        resolved_at=at, resolved_by=actor.name[:200]
    )
    differs = not same(getattr(customer, field), theirs)
    if differs and link.connection.pushes and link.state not in WAITING:
        return _send(link, f"keep_{side}", actor, due=at, at=at)
    if not differs and not was_dirty:
        link.pushed_version, link.next_attempt_at = link.needed_version, None
    return _decided(link, f"keep_{side}", actor, UPDATED, at)


def _take_over(
    link: CustomerLink, field: str, value: Any, actor: Actor, at: datetime, customers: Mapping[UUID, Customer]
) -> None:
    try:
        editing.update(
            organization=link.connection.organization,
            values={link.customer_id: {field: value}},
            actor=actor,
            at=at,
            locked=customers,
        )
    except InvalidCustomer as error:
        raise WrongState(f"The value from {link.connection} cannot be taken over. {_words(error)}") from error


# A record that is there already


@dataclass(frozen=True, kw_only=True)
class Joined:
    """One field of a customer and a record that are to be one: both values, and the one that each side's rule keeps."""

    name: str
    here: Any
    there: Any
    keeps: Mapping[str, Any]

    @property
    def differs(self) -> bool:
        return not same(self.here, self.there)


def joined(*, customer: Customer, record: Record, provider: Provider) -> list[Joined]:
    """What `link_existing` would make of each field that the record names.

    Fields that make sense only together, such as the parts of an address, come from one side; the other side's are
    kept where the preferred one has none at all, so that linking empties nothing.
    """
    named = [name for name in editing.EDITABLE if name in provider.fields and name in record.values]
    here = {name: getattr(customer, name) for name in named}
    there = {name: "" if record.values[name] is None else record.values[name] for name in named}
    rows = []
    for name in named:
        group = [other for other in _GROUPS.get(name, (name,)) if other in here]
        keeps = {}
        for side, first, second in ((HERE, here, there), (THERE, there, here)):
            filled = any(first[other] not in ("", None, {}) for other in group)
            keeps[side] = (first if filled else second)[name]
        if same(here[name], there[name]) or same(there[name], provider.normalise(name, here[name])):
            keeps = {HERE: here[name], THERE: here[name]}
        rows.append(Joined(name=name, here=here[name], there=there[name], keeps=keeps))
    return rows


def link_existing(
    *,
    customer: Customer,
    connection: Connection,
    provider: Provider,
    record: Record,
    side: str,
    actor: Actor,
    expected: int | None = None,
    at: datetime | None = None,
) -> SyncRun:
    """Link a customer to a record that is there already, which has just been read, instead of creating one.

    Where the two differ, the hub takes over the values from "there", or sends its own from "here", as `joined` says;
    what the hub is to send follows as an update. `expected` is the customer's version that was looked at. Raises
    WrongState, also for a record that is linked to another customer, StaleVersion.
    """
    if side not in (HERE, THERE):
        raise ValueError(f"a side is {HERE!r} or {THERE!r}, not {side!r}")
    at = at or database_clock()
    return start_over(
        lambda: _link_existing(customer.pk, connection, provider, record, side, actor, expected=expected, at=at)
    )


def _link_existing(
    customer_id: UUID,
    connection: Connection,
    provider: Provider,
    record: Record,
    side: str,
    actor: Actor,
    *,
    expected: int | None,
    at: datetime,
) -> SyncRun:
    remote_id = record.remote_id or ""
    if not 0 < len(remote_id) <= REMOTE_ID_LENGTH:
        raise WrongState(f"Give the record's id in {connection}, of at most {REMOTE_ID_LENGTH} characters.")
    if record.deleted:
        raise WrongState(f"Record {remote_id} is deleted in {connection}.")
    if connection.calls_us:
        raise WrongState(f"{connection} calls the hub: it links its records itself.")
    # Customers are locked before links, everywhere.
    locked = editing.lock(organization=connection.organization, ids=[customer_id])
    customer = locked[customer_id]
    if customer.pk != customer_id or customer.archived_at:
        raise WrongState(f"{customer} is archived or merged. Restore the customer first.")
    if expected is not None and customer.version != expected:
        raise editing.StaleVersion([customer])
    rows = CustomerLink.objects.filter(connection=connection)
    other = rows.filter(remote_id=remote_id).exclude(customer=customer).select_related("customer").first()
    if other is not None:
        raise WrongState(
            f"Record {remote_id} is linked to {other.customer} ({other.customer.public_id}). "
            "Choose another, or merge the customers."
        )
    link = _free_link(customer, connection, at)
    if rows.filter(remote_id=remote_id).exclude(pk=link.pk).exists():
        raise WrongState(f"{customer} is linked to record {remote_id} in {connection} already.")
    link.connection = connection
    rows_joined = joined(customer=customer, record=record, provider=provider)
    taken = {row.name: row.keeps[side] for row in rows_joined if not same(row.keeps[side], row.here)}
    if taken:
        customer = _take_over_all(customer, connection, taken, remote_id, actor, at, locked)
        if not link._state.adding:
            link.refresh_from_db(fields=["needed_version"])
    link.customer = customer
    link.remote_id, link.remote_data, link.remote_revision = remote_id, dict(record.document), record.revision
    link.remote_created_at = record.created_at
    link.base_remote = {row.name: row.there for row in rows_joined}
    # As after any reading: the base says what is there, so what differs from it goes out.
    link.base_local = {
        row.name: row.here if same(row.there, provider.normalise(row.name, row.here)) else row.there
        for row in rows_joined
    }
    link.conflicts, link.error, link.error_field = {}, "", ""
    for name, value in AS_NEW.items():
        setattr(link, name, value)
    link.sync_seq += 1
    link.synced_at = link.updated_at = at
    link.needed_version = link.pushed_version = customer.version
    link.next_attempt_at = None
    link.save()
    differs = any(not same(getattr(customer, name), link.base_local.get(name)) for name in provider.fields)
    if differs and connection.pushes:
        return _send(link, "link_existing", actor, due=at, at=at)
    runs.release(links=CustomerLink.objects.filter(pk=link.pk), at=at)
    link.run = None
    return _decided(link, "link_existing", actor, UPDATED, at)


def _free_link(customer: Customer, connection: Connection, at: datetime) -> CustomerLink:
    """The customer's link there, locked, or a new one that is yet to be stored. Raises WrongState unless it is free."""
    held = CustomerLink.objects.filter(connection=connection, customer=customer, is_duplicate=False).first()
    if held is None:
        leads = not CustomerLink.objects.filter(customer=customer, is_primary=True).exists()
        return CustomerLink(
            uid=uuid7(),
            customer=customer,
            connection=connection,
            is_primary=leads,
            created_at=at,
            updated_at=at,
        )
    link = _locked(held, at)
    if link.deleted_at is not None:
        deletes.detach(link)
        link.is_active = True
    if link.remote_id is not None:
        raise WrongState(f"{customer} is linked to record {link.remote_id} in {connection} already.")
    if unanswered([link]):
        raise WrongState(
            f"The answer to a create of {customer} in {connection} is missing. Say whether this is the record that "
            "it made."
        )
    return link


def _take_over_all(
    customer: Customer,
    connection: Connection,
    values: Mapping[str, Any],
    remote_id: str,
    actor: Actor,
    at: datetime,
    locked: Mapping[UUID, Customer],
) -> Customer:
    why = replace(actor, message=actor.message or f"Linked to {remote_id} in {connection}.")
    try:
        edits = editing.update(
            organization=connection.organization, values={customer.pk: values}, actor=why, at=at, locked=locked
        )
    except InvalidCustomer as error:
        raise WrongState(f"The record in {connection} cannot be taken over. {_words(error)}") from error
    return edits[customer.pk].customer


def _words(error: InvalidCustomer) -> str:
    return " ".join(text for fields in error.errors.values() for texts in fields.values() for text in texts)


# A record that was deleted there


@transaction.atomic
def recreate(*, link: CustomerLink, actor: Actor, at: datetime | None = None, run: SyncRun | None = None) -> SyncRun:
    """Create there again what was deleted; the old id stays known. Raises WrongState."""
    at = at or database_clock()
    link = _locked(link, at)
    _tombstone(link)
    _may_be_sent(link)
    deletes.detach(link)
    link.is_active = True
    return _send(link, "recreate", actor, due=at, at=at, run=run)


@transaction.atomic
def unlink(*, link: CustomerLink, actor: Actor, at: datetime | None = None) -> SyncRun:
    """Leave it deleted there: nobody is asked again. The tombstone stays, so that no old page brings the record back.

    `recreate` may still follow. Raises WrongState.
    """
    at = at or database_clock()
    link = _locked(link, at)
    _tombstone(link)
    link.tombstone = {**link.tombstone, "unlinked": {"by": actor.name, "at": at.isoformat()}}
    link.is_active = False
    return _decided(link, "unlink", actor, UPDATED, at)


# A second record of a customer


@transaction.atomic
def keep_both(*, link: CustomerLink, actor: Actor, at: datetime | None = None) -> SyncRun:
    """Leave a second record of a customer as it is: nobody is asked about it again. Raises WrongState."""
    at = at or database_clock()
    link = _locked(link, at)
    if not link.is_duplicate:
        raise WrongState(f"This is the record of {link.customer} in {link.connection} that is sent to.")
    link.is_active = False
    return _decided(link, "keep_both", actor, UPDATED, at)


# What was refused, or kept failing


def releasable(links: QuerySet[CustomerLink], *, at: datetime) -> QuerySet[CustomerLink]:
    """Those of these links that `release` takes: refused, in conflict or given up, and held by nobody."""
    return links.filter(
        Q(lease_until=None) | Q(lease_until__lte=at),
        state__in=RELEASED,
        pushed_version__lt=F("needed_version"),
        deleted_at=None,
        is_duplicate=False,
    )


def release(
    *, connection: Connection, links: QuerySet[CustomerLink], actor: Actor, at: datetime | None = None
) -> SyncRun:
    """Try these links of one connection again, now and as if for the first time. Raises WrongState if none waits."""
    at = at or database_clock()

    waiting = releasable(links.filter(connection=connection), at=at)

    def ask() -> SyncRun:
        runs.release(links=waiting, at=at)
        run = start_run(connection=connection, actor=actor, decision="release", planned=0, at=at)
        run.planned = waiting.update(run=run, next_attempt_at=at, **AS_NEW, updated_at=at)
        if not run.planned:
            raise WrongState(f"Nothing of {connection} was refused or is in conflict.")
        run.save(update_fields=["planned"])
        return run

    return start_over(ask)


# Sending, stopped and begun again


def pausable(link: CustomerLink) -> bool:
    """Whether the link is sent by itself, as opposed to one that waits for a person."""
    return not link.is_duplicate and link.deleted_at is None and link.state in (LinkState.OPEN, LinkState.RETRYING)


@transaction.atomic
def pause(*, link: CustomerLink, actor: Actor, reason: str, at: datetime | None = None) -> SyncRun:
    """Send nothing of this link until somebody resumes it. Raises WrongState where it waits for a person already."""
    at = at or database_clock()
    link = _locked(link, at)
    if not pausable(link):
        raise WrongState(f"{link.customer} in {link.connection} is paused, or waits for a decision: settle that first.")
    runs.release(links=CustomerLink.objects.filter(pk=link.pk), at=at)
    link.run, link.next_attempt_at = None, None
    link.state, link.error, link.error_field = LinkState.PAUSED, f"{reason} ({actor.name})"[:500], ""
    return _decided(link, "pause", actor, SKIPPED, at)


@transaction.atomic
def resume(*, link: CustomerLink, actor: Actor, at: datetime | None = None) -> SyncRun:
    """End a pause: what has changed meanwhile goes out. Raises WrongState where the link is not paused."""
    at = at or database_clock()
    link = _locked(link, at)
    if link.state != LinkState.PAUSED:
        raise WrongState(f"{link.customer} in {link.connection} is not paused.")
    for name, value in AS_NEW.items():
        setattr(link, name, value)
    link.error, link.next_attempt_at = "", at if link.is_dirty and link.connection.pushes else None
    return _decided(link, "resume", actor, SKIPPED, at)


# What they share


def _locked(link: CustomerLink, at: datetime) -> CustomerLink:
    """The link as it is now, locked, with its customer and connection. Raises WrongState while it is being sent."""
    of = ("self",) if database.features.has_select_for_update_of else ()
    rows = CustomerLink.objects.select_for_update(of=of).select_related("customer", "connection__organization")
    fresh = rows.get(pk=link.pk)
    if fresh.lease_until is not None and fresh.lease_until > at:
        raise WrongState(f"{fresh.customer} is being sent to {fresh.connection} just now. Try again in a minute.")
    return fresh


def _lost_create(link: CustomerLink) -> PushIntent:
    """The link's create whose answer was lost. Raises WrongState when there is none."""
    lost = unanswered([link]).get(link.pk)
    if link.remote_id is not None:
        raise WrongState(f"{link.customer} is linked to record {link.remote_id} in {link.connection} by now.")
    if lost is None or lost.kind != PushIntent.Kind.CREATE or link.state != LinkState.UNCERTAIN:
        raise WrongState(f"No answer about {link.customer} from {link.connection} is missing.")
    return lost


def _tombstone(link: CustomerLink) -> None:
    if link.deleted_at is None:
        raise WrongState(f"{link.customer} is not known to be deleted in {link.connection}.")


def _may_be_sent(link: CustomerLink) -> None:
    if link.is_duplicate:
        raise WrongState(f"{link.customer} has another record in {link.connection}. Only that one is sent to.")
    if not link.connection.pushes:
        raise WrongState(f"Nothing is sent to {link.connection}: change its direction first.")
    if link.customer.archived_at or link.customer.merged_into_id:
        raise WrongState(f"{link.customer} is archived or merged. Restore the customer first.")


def _send(
    link: CustomerLink, decision: str, actor: Actor, *, due: datetime, at: datetime, run: SyncRun | None = None
) -> SyncRun:
    """Have the link sent from `due` on, followed by a run: the given one, which has planned it, or one of its own."""
    runs.release(links=CustomerLink.objects.filter(pk=link.pk), at=at)
    if run is None:
        run = start_run(
            connection=link.connection, actor=actor, decision=decision, planned=1, at=at, customer=link.customer_id
        )
    for name, value in AS_NEW.items():
        setattr(link, name, value)
    link.run, link.next_attempt_at, link.updated_at = run, due, at
    if due > at:
        link.hold_until = max(link.hold_until or due, due)
    link.needed_version = max(link.needed_version, link.customer.version)
    link.pushed_version = min(link.pushed_version, link.needed_version - 1)
    link.error, link.error_field = "", ""
    link.save()
    return run


def _decided(link: CustomerLink, decision: str, actor: Actor, outcome: str, at: datetime) -> SyncRun:
    """A run that has ended: nothing is to be sent, and it tells who decided what. Stores the link."""
    run = runs.start(
        organization=link.connection.organization,
        connection=link.connection,
        kind=SyncRun.Kind.SYNC,
        actor=actor,
        at=at,
        planned=1,
        request={"decision": decision, "customer": str(link.customer_id)},
    )
    runs.add(run_id=run.pk, totals={outcome: 1}, at=at)
    link.updated_at = at
    link.save()
    return runs.finish(run=run, at=at)


def _alike(record: Mapping[str, Any], sent: Mapping[str, Any]) -> str:
    """What a record has in common with what was sent, in words; "" when that is too little."""
    one, other = (email_key(str(values.get("email") or "")) for values in (record, sent))
    if one and one == other:
        return "The same e-mail address."
    one, other = (name_key(str(values.get("name") or "")) for values in (record, sent))
    if not one or one != other:
        return ""
    one, other = ("".join(name_key(str(v.get("address_postal_code") or "")).split()) for v in (record, sent))
    if one != other:
        return ""
    return "The same name and postal code." if one else "The same name; neither has a postal code."
