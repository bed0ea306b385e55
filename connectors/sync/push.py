"""The one door out: what is due at a connection is claimed, sent, and its answer kept.

A worker, a command and a button all come through here. No transaction is open while a call is under way, and what may
have been sent is on disk before the first byte leaves.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import DatabaseError, transaction
from django.utils import timezone

from connectors.exceptions import ConnectionUnusable, ConnectorError, OutcomeUnknown, Rejected, RetryLater
from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Outgoing, Provider
from connectors.sync import runs
from connectors.sync.claim import LEASE, claim
from connectors.sync.merge import same
from connectors.sync.settle import (
    REFUSED,
    SKIPPED,
    UNCERTAIN,
    UNCHANGED,
    NotSent,
    Sending,
    Settled,
    Slice,
    settle,
)
from customers import bulk
from customers.ids import uuid7
from customers.models import Customer

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
CLAIM_ROWS = 100
CONCURRENT_CALLS = 8


def push(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    customer_ids: Collection[UUID] | None = None,
    limit: int | None = None,
    until: datetime | None = None,
    clock: Clock = timezone.now,
    rng: random.Random | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Mapping[str, int]], None] = lambda totals: None,
) -> Counter[str]:
    """Send what is due, in claims, until nothing is (or `limit` links, or the time `until`), and count the outcomes.

    Links that belong to a run add to its totals; the others to a run of their own. Raises ConnectionUnusable when the
    account cannot be used: the connection then waits for a person, and its links keep their attempts.
    """
    part = Slice(
        connection=connection,
        capabilities=provider.capabilities(connection),
        clock=clock,
        rng=rng or random.Random(),
    )
    try:
        while not stop() and (limit is None or part.totals.total() < limit):
            now = clock()
            # Another worker may have been told to wait, or a person may have paused it.
            connection.refresh_from_db(fields=["not_before", "state"])
            if connection.state != Connection.State.ACTIVE:
                break
            if (until is not None and now >= until) or (connection.not_before and connection.not_before > now):
                break
            rows = CLAIM_ROWS if limit is None else min(CLAIM_ROWS, limit - part.totals.total())
            token, sendings, settled = _prepare(part, provider, customer_ids, rows, now)
            if not sendings and not settled:
                break
            settle(part, token=token, settled=settled)
            if sendings:
                _send(part, provider, session, token, sendings, stop)
            progress(part.totals)
    finally:
        if part.own is not None:
            runs.finish(run=part.own, at=clock())
    return part.totals


@transaction.atomic
def _prepare(
    part: Slice, provider: Provider, customer_ids: Collection[UUID] | None, rows: int, now: datetime
) -> tuple[str, list[Sending], list[Settled]]:
    """Claim links and write down what is about to be sent."""
    token, links = claim(connection=part.connection, now=now, limit=rows, customer_ids=customer_ids)
    if not links:
        return token, [], []
    sendings: list[Sending] = []
    settled: list[Settled] = []
    earlier = _unanswered(links)
    for link in links:
        intent = earlier.get(link.pk)
        if intent is not None and intent.outcome == PushIntent.Outcome.OPEN:
            # Its worker died with the lease: the request may have been applied.
            intent.outcome = PushIntent.Outcome.UNCERTAIN
            intent.hold_until = intent.sent_at + LEASE / 2 + timedelta(seconds=part.capabilities.max_request_life)
        if intent is not None and intent.kind == PushIntent.Kind.CREATE and not link.remote_id:
            if part.capabilities.upsert_external_id:
                # Frozen payload, same marker: repeating it changes nothing. What is newer follows as an update.
                intent.outcome, intent.sent_at = PushIntent.Outcome.OPEN, now
                sendings.append(_sending(link, intent))
            else:
                lost = Rejected("The answer to a create was lost, and this system offers no way to look it up.")
                settled.append(Settled(link=link, outcome=UNCERTAIN, error=lost))
        elif intent is not None and intent.hold_until and intent.hold_until > now:
            # No newer patch while the lost one may still be applied: it would land last.
            settled.append(Settled(link=link, outcome=SKIPPED, again=intent.hold_until))
        else:
            if intent is not None:
                intent.outcome = PushIntent.Outcome.FAILED
            try:
                fresh = _intent(link, provider, now)
            except Rejected as error:
                settled.append(Settled(link=link, outcome=REFUSED, error=error))
                continue
            except Exception as error:  # a fault in a provider's code parks this record and spares the others
                logger.exception("the connector of %s failed", provider.slug)
                fault = Rejected(f"The connector failed: {type(error).__name__}.", code="internal")
                settled.append(Settled(link=link, outcome=REFUSED, error=fault))
                continue
            if fresh is None:
                settled.append(Settled(link=link, outcome=UNCHANGED))
            else:
                sendings.append(_sending(link, fresh))
    bulk.update(links, ("lease_token", "lease_until"))
    bulk.update(list(earlier.values()), ("outcome", "sent_at", "hold_until"))
    new = [sending.intent for sending in sendings if sending.intent.pk is None]
    bulk.insert(new)
    made = dict(PushIntent.objects.filter(key__in=[i.key for i in new]).values_list("key", "pk")) if new else {}
    for intent in new:
        intent.pk = made[intent.key]
    if run_ids := {link.run_id for link in links if link.run_id}:
        queued = SyncRun.objects.filter(pk__in=run_ids, state=SyncRun.State.QUEUED).order_by("pk")
        queued = SyncRun.objects.filter(pk__in=[run.pk for run in queued.select_for_update()])
        queued.update(state=SyncRun.State.RUNNING, started_at=now)
    return token, sendings, settled


def _unanswered(links: Sequence[CustomerLink]) -> dict[int, PushIntent]:
    waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    rows = PushIntent.objects.filter(link__in=[link.pk for link in links], outcome__in=waiting).order_by("pk")
    return {intent.link_id: intent for intent in rows}


def changed_values(link: CustomerLink, customer: Customer, fields: frozenset[str]) -> dict[str, Any]:
    """The mapped fields in which the customer differs from what was last sent; all of them before the first push."""
    values = {name: getattr(customer, name) for name in sorted(fields)}
    if not link.remote_id:
        return values
    return {n: v for n, v in values.items() if not same(v, link.base_local.get(n))}


def _intent(link: CustomerLink, provider: Provider, now: datetime) -> PushIntent | None:
    """What would bring the link up to date; None when nothing differs. Raises Rejected."""
    values = changed_values(link, link.customer, provider.fields)
    if not values:
        return None
    payload = provider.document(
        link.customer,
        connection=link.connection,
        uid=link.uid,
        fields=frozenset(values) if link.remote_id else None,
    )
    return PushIntent(
        link=link,
        kind=PushIntent.Kind.UPDATE if link.remote_id else PushIntent.Kind.CREATE,
        key=uuid7(),
        payload=payload,
        sent_values=values,
        version=link.customer.version,
        sent_at=now,
    )


def _sending(link: CustomerLink, intent: PushIntent) -> Sending:
    return Sending(
        link=link,
        intent=intent,
        outgoing=Outgoing(
            uid=link.uid,
            remote_id=link.remote_id,
            key=intent.key,
            document=intent.payload,
            remote_data=link.remote_data,
            revision=link.remote_revision,
        ),
    )


def _batches(part: Slice, sendings: Sequence[Sending]) -> Iterator[list[Sending]]:
    for creates, size in ((True, part.capabilities.batch), (False, part.capabilities.update_batch)):
        alike = [sending for sending in sendings if sending.creates is creates]
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _send(
    part: Slice,
    provider: Provider,
    session: Session,
    token: str,
    sendings: Sequence[Sending],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Send side by side, and keep each answer as soon as it is known. Database work stays in this thread."""
    last_start = part.clock() + LEASE / 2
    queue = list(_batches(part, sendings))
    unusable: ConnectionUnusable | None = None
    with ThreadPoolExecutor(max_workers=CONCURRENT_CALLS) as pool:
        running: dict[Future[None], list[Sending]] = {}
        while queue or running:
            while (
                queue
                and len(running) < CONCURRENT_CALLS
                and unusable is None
                and not stop()
                and part.clock() < last_start
            ):
                batch = queue.pop(0)
                running[pool.submit(_call, provider, session, part.connection, batch)] = batch
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            answered = [sending for future in done for sending in running.pop(future)]
            _keep(part, token, answered)
            for sending in answered:
                if isinstance(sending.answer, ConnectionUnusable):
                    unusable = sending.answer
                elif isinstance(sending.answer, RetryLater) and sending.answer.retry_after is not None:
                    last_start = part.clock()
    unsent = [sending for batch in queue for sending in batch]
    for sending in unsent:
        sending.answer = NotSent("There was no time left to send it.")
    _keep(part, token, unsent)
    if unusable is not None:
        raise unusable


def _keep(part: Slice, token: str, answered: Sequence[Sending]) -> None:
    """Settle answers; one that cannot be kept does not take the others with it."""
    try:
        settle(part, token=token, answered=answered)
        return
    except Exception:
        logger.exception("answers of %s could not be kept together", part.connection.pk)
    for sending in answered:
        try:
            settle(part, token=token, answered=[sending])
        except DatabaseError:
            logger.exception("the answer for link %s could not be kept", sending.link.pk)
            sending.answer = OutcomeUnknown("The answer could not be kept.", code="internal")
            settle(part, token=token, answered=[sending])


def _call(provider: Provider, session: Session, connection: Connection, batch: Sequence[Sending]) -> None:
    """Send one batch and lay each answer beside its record; whatever happens, each record has one."""
    send = provider.create_many if batch[0].creates else provider.update_many
    try:
        answers = send(session, connection, [sending.outgoing for sending in batch])
    except ConnectorError as error:
        answers = [error] * len(batch)
    except Exception as error:  # a fault in a provider's code parks these records and spares the others
        logger.exception("the connector of %s failed", provider.slug)
        answers = [OutcomeUnknown(f"The connector failed: {type(error).__name__}.", code="internal")] * len(batch)
    missing = OutcomeUnknown("The system answered fewer records than it was sent.")
    for position, sending in enumerate(batch):
        sending.answer = answers[position] if position < len(answers) else missing
