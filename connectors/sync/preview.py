"""What a push of one customer would do, field by field, and the request that it would send. Nothing is stored or sent.

The plan and the call are the engine's own: what is shown is what is done, unless something changes in between.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from connectors.exceptions import ConnectorError, Rejected
from connectors.models import Connection, CustomerLink, PushIntent
from connectors.outbound import Request, rehearse
from connectors.provider import Provider, Record
from connectors.states import WAITING
from connectors.sync.merge import Merge, merge, same
from connectors.sync.plan import changed_values, plan
from connectors.sync.push import call
from connectors.sync.steps import Sending, Settled, Step
from customers.editing import EDITABLE, imagined
from customers.models import Customer


class Will(StrEnum):
    """What happens to one field."""

    SAME = "same"
    WRITTEN_SO = "written so"  # the same, in that system's own spelling
    SENT = "sent"
    WAITS = "waits"  # it is to be sent, but nothing is sent now
    OVERWRITES = "overwrites"  # sent, although it was changed there as well
    CONFLICT = "conflict"
    TAKEN = "taken over"  # read before the push, and changed there alone
    STAYS = "stays"  # changed there alone, and the hub does not read from there
    EMPTY = "empty"  # nothing to create there
    UNKNOWN = "unknown"  # what is there cannot be told
    NOT_MAPPED = "not mapped"


SENDS = (Will.SENT, Will.OVERWRITES)
UNKNOWN = object()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One field: the hub's value, the one there (UNKNOWN if it cannot be told) and what happens.

    `sent_as` are the parts of the document that carry it, by their path.
    """

    name: str
    here: Any
    there: Any
    will: Will
    sent_as: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Preview:
    """`requests` are in order. `refusal`: the connector would not send it. `held`: why nothing is sent now, in words.

    `live`: the values there were read just now, else they are those that were last seen.
    """

    rows: list[Row]
    requests: list[Request] = field(default_factory=list)
    refusal: Rejected | None = None
    held: str = ""
    live: bool = False
    creates: bool = False
    deletes: bool = False

    @property
    def changes(self) -> int:
        return sum(row.will in SENDS for row in self.rows)

    @property
    def sends(self) -> bool:
        return any(request.method != "GET" for request in self.requests)


def preview(
    *,
    link: CustomerLink,
    provider: Provider,
    lost: PushIntent | None,
    now: datetime,
    record: Record | None = None,
) -> Preview:
    """What a push of this link would do. The link may be one that is yet to be made; its customer and connection are
    loaded. `lost` is its open or uncertain intent; `record` is the record there, when it has just been read.
    """
    link, lost = copy.copy(link), copy.copy(lost)
    merged: Merge | None = None
    if record is not None and link.connection.pulls and not link.is_duplicate:
        merged = _merged(link, provider, record, lost)
        link.customer = customer = copy.copy(link.customer)
        for name, value in merged.take.items():
            setattr(customer, name, value)
        link.base_local, link.base_remote, link.conflicts = merged.base_local, merged.base_remote, merged.waiting
    link.remote_revision = record.revision if record is not None and record.revision else link.remote_revision
    held = _held(link, lost, now)
    made = Preview(rows=[], held=held, live=record is not None, creates=not link.remote_id)
    changed: Mapping[str, Any] = changed_values(link, link.customer, provider.fields)
    if not held:
        changed = _rehearse(made, link, lost, provider, now, read=record is not None) or changed
    mapped = [name for name in EDITABLE if name in provider.fields]
    for name in mapped:
        there = _there(link, record, name)
        row = Row(
            name=name,
            here=getattr(link.customer, name),
            there=there,
            will=_will(link, name, there, record, merged, changed=name in changed, sends=made.sends),
        )
        if row.will in SENDS:
            row = replace(row, sent_as=sent_as(link, provider, name))
        made.rows.append(row)
    for name in EDITABLE:
        if name not in provider.fields:
            value = getattr(link.customer, name)
            made.rows.append(Row(name=name, here=value, there=UNKNOWN, will=Will.NOT_MAPPED))
    return made


def _held(link: CustomerLink, lost: PushIntent | None, now: datetime) -> str:
    """Why nothing is sent now; "" when something may be."""
    customer, connection = link.customer, link.connection
    if customer.archived_at or customer.merged_into_id:
        return "The customer is archived or merged: nothing is sent. Restore it first."
    if not connection.pushes:
        return f"The hub does not send to {connection.name}."
    if connection.state != Connection.State.ACTIVE:
        why = connection.state_reason or "no reason is given"
        return f"{connection.name} is out of use: {why}. Repair or resume the connection first."
    if link.is_duplicate:
        return f"This is a second record in {connection.name}. Only the first one is sent to."
    if link.deleted_at is not None or link.state in WAITING:
        return f"{link.sentence(now=now)} Decide that first: nothing is sent before."
    if link.lease_until is not None and link.lease_until > now:
        return "It is being sent just now. Look again in a minute."
    if lost is not None and lost.outcome == PushIntent.Outcome.OPEN:
        return "The last try ended without an answer. A worker settles that first."
    if link.pk and not link.is_dirty:
        return "Nothing to send: it is up to date."
    return ""


def _rehearse(
    made: Preview, link: CustomerLink, lost: PushIntent | None, provider: Provider, now: datetime, *, read: bool
) -> Mapping[str, Any]:
    """Find the requests that follow, each made by the connector itself. Returns the fields that they carry."""
    try:
        following = plan(link, copy.copy(lost), provider=provider, now=now, read=read)
        if isinstance(following, Sending) and following.step is Step.READ:
            _play(made, following, provider)
            following = plan(link, lost, provider=provider, now=now, read=True)
        if isinstance(following, Settled):
            made.held = _why(link, following)
        elif following.step is Step.LOOK_UP:
            made.held = f"The answer to a create was lost: {link.connection.name} is asked for the record first."
        else:
            made.deletes = following.step is Step.DELETE
            _play(made, following, provider)
            if following.intent is not None:
                carried: dict[str, Any] = following.intent.sent_values
                return carried
    except Rejected as error:
        made.refusal = error
    except ConnectorError as error:
        made.held = error.message
    return {}


def _why(link: CustomerLink, settled: Settled) -> str:
    if settled.error is not None:
        return settled.error.message
    if settled.again is not None:
        return f"An earlier try may still arrive there. It is sent after {settled.again:%Y-%m-%d %H:%M:%S} UTC."
    return "Nothing to send: no mapped field has changed."


def _play(made: Preview, sending: Sending, provider: Provider) -> None:
    connection = sending.link.connection
    headers = provider.headers(account=connection.account, credentials=dict.fromkeys(provider.credentials, "***"))
    request = rehearse(
        base_url=connection.base_url,
        headers=headers,
        do=lambda session: call(provider, session, connection, [sending]),
    )
    if request is not None:
        made.requests.append(request)
    elif isinstance(sending.answer, Rejected):
        raise sending.answer


def _merged(link: CustomerLink, provider: Provider, record: Record, lost: PushIntent | None) -> Merge:
    connection = link.connection
    return merge(
        local={name: getattr(link.customer, name) for name in provider.fields},
        remote={name: value for name, value in record.values.items() if name in provider.fields},
        base_local=link.base_local,
        base_remote=link.base_remote,
        policy=lambda name: connection.field_policies.get(name, connection.conflict_policy),
        normalise=provider.normalise,
        sent=[lost.sent_values] if lost is not None else [],
        waiting=link.conflicts,
    )


def _there(link: CustomerLink, record: Record | None, name: str) -> Any:
    if record is not None and name in record.values:
        return record.values[name]
    if name in link.conflicts:
        return link.conflicts[name]["there"]
    return link.base_remote.get(name, UNKNOWN)


def _will(
    link: CustomerLink,
    name: str,
    there: Any,
    record: Record | None,
    merged: Merge | None,
    *,
    changed: bool,
    sends: bool,
) -> Will:
    here = getattr(link.customer, name)
    if name in link.conflicts:
        return Will.CONFLICT
    if merged is not None and name in merged.take:
        return Will.TAKEN
    # What a system stores of a record that is yet to be made is its own affair: an empty field is not named to it.
    if changed and (link.remote_id or here not in ("", None, {})):
        if not sends:
            return Will.WAITS
        known = link.base_remote.get(name, UNKNOWN)
        moved = record is not None and there is not UNKNOWN and not same(there, known) and not same(there, here)
        both = moved if merged is None else name in merged.conflicts
        return Will.OVERWRITES if both and link.remote_id else Will.SENT
    if there is UNKNOWN:
        return Will.UNKNOWN if link.remote_id else Will.EMPTY
    if same(here, there):
        return Will.SAME
    known = link.base_remote.get(name, UNKNOWN)
    if merged is None and record is not None and known is not UNKNOWN and not same(there, known):
        return Will.STAYS
    return Will.WRITTEN_SO if same(here, link.base_local.get(name)) else Will.STAYS


def sent_as(link: CustomerLink, provider: Provider, name: str) -> dict[str, Any]:
    """The parts of the document that carry one field, by path: those that would be others if the field were."""
    here = getattr(link.customer, name)
    other = imagined(link.customer, {name: _probe(name, here)})
    fields = frozenset({name}) if link.remote_id else None

    def parts(customer: Customer) -> dict[str, Any]:
        return leaves(provider.document(customer, connection=link.connection, uid=link.uid, fields=fields))

    try:
        sent, otherwise = parts(link.customer), parts(other)
    except Rejected:
        return {}
    moved = {path: value for path, value in sent.items() if path not in otherwise or otherwise[path] != value}
    return moved or {path: value for path, value in sent.items() if value == here}


def _probe(name: str, here: Any) -> Any:
    """Another value that every document takes."""
    if isinstance(here, bool):
        return not here
    if name.endswith("_country"):
        return "FR" if here != "FR" else "DE"
    if name == "email":
        return "a@example.com" if here != "a@example.com" else "b@example.com"
    if name == "phone":
        return "+15550100" if here != "+15550100" else "+15550101"
    return "Some Other" if here != "Some Other" else "Yet Another"


def leaves(document: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a document by their dotted paths; the items of a list share one path, and the first one shows."""
    if isinstance(document, Mapping):
        found: dict[str, Any] = {}
        for name, value in document.items():
            found |= leaves(value, f"{path}.{name}" if path else str(name))
        return found
    if isinstance(document, list):
        found = {}
        for item in document:
            found = {**leaves(item, f"{path}[]"), **found}
        return found
    return {path: document}
