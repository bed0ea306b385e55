"""Keeping answers: what a push brought back goes to links, intents, runs and the connection in one transaction."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction

from connectors.exceptions import ConnectionUnusable, ConnectorError, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink, PushIntent, SyncRun
from connectors.provider import Capabilities, Outgoing, Record
from connectors.states import LinkState
from connectors.sync import runs
from connectors.sync.claim import held
from customers import bulk
from customers.editing import Actor
from customers.models import CustomerChange

CREATED, UPDATED, UNCHANGED = "created", "updated", "unchanged"
REFUSED, RETRYING, UNCERTAIN, SKIPPED = "refused", "retrying", "uncertain", "skipped"

RETRY_BASE, RETRY_CAP = 2.0, 900.0
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 24 * 3600.0


class NotSent(RetryLater):
    """The call was not begun. Costs no attempt."""


@dataclass(kw_only=True)
class Sending:
    """One link on its way: what is sent, of which version, and what came back."""

    link: CustomerLink
    intent: PushIntent
    outgoing: Outgoing
    answer: Record | ConnectorError | None = None

    @property
    def creates(self) -> bool:
        return self.intent.kind == PushIntent.Kind.CREATE


@dataclass(kw_only=True)
class Settled:
    """One link that needs no call: nothing to send, refused before sending, or still held until `again`."""

    link: CustomerLink
    outcome: str
    error: Rejected | None = None
    again: datetime | None = None


@dataclass(kw_only=True)
class Slice:
    """One go of pushing at one connection. `own` is the run for changes that no run asked for, made when needed."""

    connection: Connection
    capabilities: Capabilities
    clock: Callable[[], datetime]
    rng: random.Random
    totals: Counter[str] = field(default_factory=Counter)
    own: SyncRun | None = None


LINK_COLUMNS = (
    "remote_id",
    "remote_data",
    "base_local",
    "base_remote",
    "remote_revision",
    "remote_created_at",
    "sync_seq",
    "pushed_version",
    "state",
    "error",
    "error_field",
    "attempts",
    "next_attempt_at",
    "lease_token",
    "lease_until",
    "run",
    "synced_at",
    "updated_at",
)
INTENT_COLUMNS = ("outcome", "answered_at", "status", "error", "remote_request_id", "hold_until")


def settle(part: Slice, *, token: str, settled: Sequence[Settled] = (), answered: Sequence[Sending] = ()) -> None:
    """Write outcomes, all or none, in a constant number of statements. A link that the token no longer holds is left
    alone: the fence. Its intent still tells what was answered.
    """
    if not settled and not answered:
        return
    own, totals = part.own, part.totals.copy()
    try:
        with transaction.atomic():
            _settle(part, token, settled, answered)
    except BaseException:
        part.own, part.totals = own, totals
        raise


def _settle(part: Slice, token: str, settled: Sequence[Settled], answered: Sequence[Sending]) -> None:
    now = part.clock()
    ours = held(token=token, links=[s.link for s in settled] + [s.link for s in answered])
    taken = _taken(part.connection, answered)
    outcomes: dict[int, tuple[str, ConnectorError | None]] = {}
    for one in settled:
        if (link := ours.get(one.link.pk)) is not None:
            _without_call(link, one, now)
            outcomes[link.pk] = (one.outcome, one.error)
    for sending in answered:
        answer = _usable(sending)
        if isinstance(answer, Record) and taken.get(answer.remote_id, sending.link.pk) != sending.link.pk:
            answer = Rejected(
                f"The system answered with record {answer.remote_id}, which is linked to another customer.",
                code="already_linked",
            )
        _keep_intent(sending.intent, answer, part.capabilities, now)
        if (link := ours.get(sending.link.pk)) is None:
            continue
        link.lease_token, link.lease_until, link.updated_at = "", None, now
        if isinstance(answer, Record):
            _accepted(link, sending, answer, now)
            outcomes[link.pk] = (CREATED if sending.creates else UPDATED, None)
        else:
            outcomes[link.pk] = (_failed(link, sending, answer, part, now), answer)
    bulk.update([sending.intent for sending in answered], INTENT_COLUMNS)
    _count(part, ours, outcomes, now)
    bulk.update(list(ours.values()), LINK_COLUMNS)
    _judge_connection(part.connection, [sending.answer for sending in answered], now)


def _usable(sending: Sending) -> Record | ConnectorError:
    """The answer, unless it is one that nothing can be kept of."""
    answer = sending.answer or OutcomeUnknown("No answer came.")
    if not isinstance(answer, Record):
        return answer
    remote_id = answer.remote_id or sending.link.remote_id or ""
    if not 0 < len(remote_id) <= REMOTE_ID_LENGTH:
        return OutcomeUnknown("The system answered without an id that can be kept.")
    dated = answer.created_at is not None and 1900 <= answer.created_at.year <= 9000
    return replace(
        answer,
        remote_id=remote_id,
        revision=answer.revision[:REMOTE_ID_LENGTH],
        created_at=answer.created_at if dated else None,
    )


def _taken(connection: Connection, answered: Sequence[Sending]) -> dict[str | None, int]:
    """Remote ids in these answers that already belong to a link, with that link. Twice in one batch counts too."""
    ids = {s.answer.remote_id: s.link.pk for s in reversed(answered) if isinstance(s.answer, Record)}
    if not ids:
        return {}
    rows = CustomerLink.objects.filter(connection=connection, remote_id__in=ids)
    return {**ids, **dict(rows.values_list("remote_id", "pk"))}


def _without_call(link: CustomerLink, one: Settled, now: datetime) -> None:
    link.lease_token, link.lease_until, link.updated_at = "", None, now
    if one.outcome == UNCHANGED:
        link.pushed_version = max(link.pushed_version, one.link.customer.version)
        link.next_attempt_at = link.next_attempt_at if link.is_dirty else None
        link.state, link.error, link.error_field, link.attempts = LinkState.OPEN, "", "", 0
    elif one.error is not None:
        link.state = LinkState.REJECTED if one.outcome == REFUSED else LinkState.UNCERTAIN
        link.error, link.error_field = one.error.message[:500], one.error.field[:64]
        link.next_attempt_at = None
    else:
        link.next_attempt_at = one.again


def _keep_intent(
    intent: PushIntent, answer: Record | ConnectorError, capabilities: Capabilities, now: datetime
) -> None:
    intent.answered_at = now
    if isinstance(answer, Record):
        intent.outcome, intent.error = PushIntent.Outcome.OK, ""
        return
    if isinstance(answer, OutcomeUnknown):
        intent.outcome = PushIntent.Outcome.UNCERTAIN
        intent.hold_until = now + timedelta(seconds=capabilities.max_request_life)
    else:
        intent.outcome = PushIntent.Outcome.FAILED
    intent.error = answer.message[:500]
    intent.status = answer.status
    intent.remote_request_id = answer.remote_request_id[:128]


def _accepted(link: CustomerLink, sending: Sending, record: Record, now: datetime) -> None:
    sent = sending.intent.sent_values
    stored = {name: "" if value is None else value for name, value in record.values.items() if name in sent}
    link.remote_id = record.remote_id or link.remote_id
    link.remote_data = {**link.remote_data, **record.document}
    link.base_local = {**link.base_local, **sent}
    link.base_remote = {**link.base_remote, **sent, **stored}
    link.remote_revision = record.revision or link.remote_revision
    link.remote_created_at = record.created_at or link.remote_created_at
    link.sync_seq += 1
    # The version that was read, not the current one: an edit made meanwhile is still to be sent.
    link.pushed_version = max(link.pushed_version, sending.intent.version)
    link.next_attempt_at = (link.next_attempt_at or now) if link.is_dirty else None
    link.state, link.error, link.error_field, link.attempts = LinkState.OPEN, "", "", 0
    link.synced_at = now


def _failed(link: CustomerLink, sending: Sending, error: ConnectorError, part: Slice, now: datetime) -> str:
    """Say what becomes of a link whose call failed: parked, or tried again at a time."""
    if isinstance(error, ConnectionUnusable | NotSent):
        return RETRYING
    link.error, link.error_field = error.message[:500], error.field[:64]
    if isinstance(error, Rejected):
        if link.needed_version > sending.intent.version:
            return RETRYING  # the refused content is no longer what the customer says
        gone = isinstance(error, Gone) and not sending.creates
        link.state = LinkState.REMOTE_DELETED if gone else LinkState.REJECTED
        link.next_attempt_at = None
        return REFUSED
    if isinstance(error, OutcomeUnknown):
        if sending.creates and not part.capabilities.upsert_external_id:
            link.state, link.next_attempt_at = LinkState.UNCERTAIN, None
            return UNCERTAIN
        if not sending.creates:
            # A newer update waits until the lost one must be dead.
            link.state, link.next_attempt_at = LinkState.RETRYING, sending.intent.hold_until
            return RETRYING
        # A create that carries our id may be repeated: it is tried again like any other.
    link.state = LinkState.RETRYING
    if isinstance(error, RetryLater) and error.retry_after is not None:
        # The whole account is asked to wait: not an attempt of this record.
        link.next_attempt_at = now + _wait(error.retry_after)
    else:
        link.attempts += 1
        ceiling = min(RETRY_CAP, RETRY_BASE * 2 ** min(link.attempts, 16))
        link.next_attempt_at = now + timedelta(seconds=part.rng.uniform(0, ceiling))
    return RETRYING


def _wait(seconds: float) -> timedelta:
    return timedelta(seconds=min(max(seconds, SHORTEST_WAIT), LONGEST_WAIT))


def _count(
    part: Slice,
    links: Mapping[int, CustomerLink],
    outcomes: Mapping[int, tuple[str, ConnectorError | None]],
    now: datetime,
) -> None:
    """Add the outcomes to the runs that wait for them; what no run asked for goes to the slice's own."""
    by_run: dict[int, tuple[Counter[str], list[dict[str, Any]]]] = {}
    for pk, (outcome, error) in outcomes.items():
        link = links[pk]
        part.totals[outcome] += 1
        if outcome in (RETRYING, SKIPPED) and link.run_id:
            continue  # no outcome yet: the link stays with its run until there is one
        if link.run_id is None and part.own is None:
            part.own = runs.start(
                organization=part.connection.organization,
                connection=part.connection,
                kind=SyncRun.Kind.PUSH,
                actor=Actor(
                    kind=CustomerChange.Actor.CONNECTION, id=str(part.connection.pk), name=part.connection.name
                ),
                at=now,
            )
        counter, problems = by_run.setdefault(link.run_id or (part.own.pk if part.own else 0), (Counter(), []))
        counter[outcome] += 1
        if error is not None:
            problems.append(
                {"customer": str(link.customer_id), "state": outcome, "field": error.field, "reason": error.message}
            )
        link.run_id = None
    for run_id, (counter, problems) in sorted(by_run.items()):
        runs.add(run_id=run_id, totals=counter, problems=problems, at=now)
    runs.close_done(run_ids={pk for pk in by_run if part.own is None or pk != part.own.pk}, at=now)


def _judge_connection(connection: Connection, answers: Sequence[Record | ConnectorError | None], now: datetime) -> None:
    """What the answers say of the account as a whole: wait, or stop until somebody repairs it."""
    changes: dict[str, Any] = {}
    waits = [a.retry_after for a in answers if isinstance(a, RetryLater) and a.retry_after is not None]
    if waits:
        changes["not_before"] = now + _wait(max(waits))
    for answer in answers:
        if isinstance(answer, ConnectionUnusable):
            changes |= {"state": Connection.State.NEEDS_REAUTH, "state_reason": answer.message[:500]}
    if changes:
        Connection.objects.filter(pk=connection.pk).update(**changes)
        for name, value in changes.items():
            setattr(connection, name, value)
