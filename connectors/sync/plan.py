"""What to do next with one link: decided from what is on disk, so that any worker comes to the same answer.

The rules for updates, for creates whose answer was lost, and for deletes are all here; `settle` keeps what came back.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from connectors.exceptions import Rejected
from connectors.models import Connection, CustomerLink, PushIntent
from connectors.provider import Capabilities, Outgoing, Provider
from connectors.states import LinkState
from connectors.sync.merge import same
from connectors.sync.steps import SKIPPED, UNCERTAIN, UNCHANGED, Sending, Settled, Step
from customers import jsontext
from customers.ids import uuid7
from customers.models import Customer

# A repeat with the same idempotency key must reach the provider well before it forgets the key.
KEY_SHARE = 0.9
# A lagging search is asked twice.
SECOND_LOOK = timedelta(seconds=60)
LOST = "The answer to a create was lost, and this system offers no way to look it up."


def plan(
    link: CustomerLink, lost: PushIntent | None, *, provider: Provider, now: datetime, read: bool = False
) -> Sending | Settled:
    """The next call for a link that this worker holds, or why there is none. Raises Rejected.

    `lost` is the link's open or uncertain intent, if it has one; `read` says that the record there has just been read
    and merged. A new intent is made here and stored by the caller before anything is sent. Needs the link's customer
    and connection loaded.
    """
    capabilities = provider.capabilities(link.connection)
    if lost is not None and lost.kind == PushIntent.Kind.CREATE and not link.remote_id:
        return _lost_create(link, lost, capabilities, now)
    if link.hold_until is not None and link.hold_until > now:
        return Settled(link=link, outcome=SKIPPED, again=link.hold_until)
    if lost is not None and lost.kind == PushIntent.Kind.DELETE and _to_delete(link, capabilities):
        return _again(link, lost, now)
    if lost is not None and not capabilities.conditional and lost.hold_until is not None and lost.hold_until > now:
        # No newer patch while the lost one may still be applied: it would land last.
        return Settled(link=link, outcome=SKIPPED, again=lost.hold_until)
    deletes = _to_delete(link, capabilities)
    values = {} if deletes or link.is_duplicate else changed_values(link, link.customer, provider.fields)
    if lost is not None and lost.kind == PushIntent.Kind.UPDATE and not deletes and not link.is_duplicate:
        # What it sent may be there: a value that has come back to its base meanwhile is to be sent as well.
        again = lost.sent_values.keys() - link.conflicts.keys()
        values |= {name: getattr(link.customer, name) for name in sorted(again)}
    if values and link.remote_id and not read and _reads_first(link, lost, capabilities):
        # A lost push stays uncertain until then: what it sent is not to be taken for somebody's edit.
        return sending(link, Step.READ)
    if lost is not None:
        lost.outcome = PushIntent.Outcome.FAILED
    if deletes and link.remote_id and not link.is_duplicate:
        return sending(link, Step.DELETE, _intent(link, PushIntent.Kind.DELETE, {}, {}, now))
    if not values:
        return Settled(link=link, outcome=UNCHANGED)
    payload = provider.document(
        link.customer, connection=link.connection, uid=link.uid, fields=frozenset(values) if link.remote_id else None
    )
    if link.remote_id:
        return sending(link, Step.UPDATE, _intent(link, PushIntent.Kind.UPDATE, payload, values, now))
    return sending(link, Step.CREATE, _intent(link, PushIntent.Kind.CREATE, payload, values, now))


def repeatable(intent: PushIntent, capabilities: Capabilities, *, now: datetime) -> bool:
    """Whether the frozen create may be sent again although an earlier one may have been applied."""
    if capabilities.upsert_external_id:
        return True
    key_holds = now - intent.first_sent_at < timedelta(seconds=KEY_SHARE * capabilities.key_life)
    if capabilities.create_key and key_holds and not intent.replayed:
        return True
    return capabilities.unique_keys


def look_up_at(intent: PushIntent, capabilities: Capabilities, *, now: datetime) -> datetime:
    """When looking for a lost create can tell something: it must be dead by then, and the index must know it."""
    lag = capabilities.look_up_lag if capabilities.look_up == "lagging" and not intent.look_ups else 0.0
    return (intent.hold_until or now) + timedelta(seconds=lag)


def changed_values(link: CustomerLink, customer: Customer, fields: frozenset[str]) -> dict[str, Any]:
    """The mapped fields in which the customer differs from what was last sent; all of them before the first push.

    Fields in conflict wait for a person and are left out.
    """
    values = {name: getattr(customer, name) for name in sorted(fields)}
    if not link.remote_id:
        return values
    return {n: v for n, v in values.items() if n not in link.conflicts and not same(v, link.base_local.get(n))}


def sending(link: CustomerLink, step: Step, intent: PushIntent | None = None, **more: Any) -> Sending:
    return Sending(
        link=link,
        step=step,
        intent=intent,
        seq=link.sync_seq,
        outgoing=Outgoing(
            uid=link.uid,
            remote_id=link.remote_id,
            key=intent.key if intent else link.uid,
            # PostgreSQL does not keep the order of keys, and a provider may compare a repeat byte by byte.
            document=json.loads(jsontext.dumps(intent.payload, option=jsontext.SORT_KEYS)) if intent else {},
            remote_data=link.remote_data,
            revision=link.remote_revision,
        ),
        **more,
    )


def _lost_create(
    link: CustomerLink, intent: PushIntent, capabilities: Capabilities, now: datetime
) -> Sending | Settled:
    if intent.remote_id:
        return sending(link, Step.LOOK_UP, intent, existing=intent.remote_id)
    if repeatable(intent, capabilities, now=now):
        # Frozen payload, same marker and key. What is newer follows as an update.
        return _again(link, intent, now)
    if not capabilities.look_up:
        return Settled(link=link, outcome=UNCERTAIN, error=Rejected(LOST))
    ready = look_up_at(intent, capabilities, now=now)
    if ready > now:
        return Settled(link=link, outcome=SKIPPED, again=ready, state=LinkState.UNCERTAIN)
    return sending(link, Step.LOOK_UP, intent)


def _again(link: CustomerLink, intent: PushIntent, now: datetime) -> Sending:
    intent.outcome, intent.sent_at = PushIntent.Outcome.OPEN, now
    return sending(link, Step(intent.kind), intent)


def _to_delete(link: CustomerLink, capabilities: Capabilities) -> bool:
    policy = link.connection.archive_policy
    return bool(link.customer.archived_at and policy == Connection.ArchivePolicy.DELETE and capabilities.deletes)


def _reads_first(link: CustomerLink, lost: PushIntent | None, capabilities: Capabilities) -> bool:
    """Whether the record is read and merged before it is changed: where the provider cannot refuse a stale update and
    its edits matter here, and where the revision that it would refuse by is not known, or is from a page that may have
    been read before a lost update was applied.
    """
    if not capabilities.fetches:
        return False
    if capabilities.conditional:
        return lost is not None or not link.remote_revision
    return link.connection.pulls


def _intent(link: CustomerLink, kind: str, payload: Any, values: dict[str, Any], now: datetime) -> PushIntent:
    return PushIntent(
        link=link,
        kind=kind,
        key=uuid7(),
        epoch=link.epoch,
        payload=payload,
        sent_values=values,
        version=link.customer.version,
        first_sent_at=now,
        sent_at=now,
    )
