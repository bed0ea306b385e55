"""The one door out: what is due at a connection is claimed, sent, and its answer kept.

A worker, a command and a button all come through here. No transaction is open while a call is under way, and what may
have been sent is on disk before the first byte leaves.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from uuid import UUID

from django.conf import settings
from django.db import connection as database
from django.db import models, transaction

from connectors.exceptions import (
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
)
from connectors.models import Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider, Record
from connectors.sync import issues, limits, runs
from connectors.sync.claim import LEASE, claim, due, renew
from connectors.sync.clock import database_clock
from connectors.sync.plan import plan, repeatable
from connectors.sync.settle import CRASHES, INTENT_COLUMNS, insert_intents, settle, unanswered
from connectors.sync.steps import REFUSED, UNCERTAIN, Found, NotSent, Sending, Settled, Slice, Step, our_fault
from customers import bulk
from customers.prepared import Among, Param, Prepared

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
CLAIM_ROWS = 50
# Answers that come within this time are kept together: what it costs to keep some is mostly the cost of keeping one.
TOGETHER = 0.1
# Whoever has waited for an answer this long lets others have the database connection.
LONG = 0.1
# How often to look at leases, and whether the work is to stop, while no answer comes.
LOOK = 1.0
# While nothing may be sent: how often to look whether the work is to stop.
NAP = 0.25
# A call that may not be made within this many seconds is not waited for.
PATIENCE = 900.0


def push(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    customer_ids: Collection[UUID] | None = None,
    limit: int | None = None,
    until: datetime | None = None,
    clock: Clock = database_clock,
    rng: random.Random | None = None,
    sleep: Callable[[float], None] = time.sleep,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Mapping[str, int]], None] = lambda totals: None,
) -> Counter[str]:
    """Send what is due, in claims, until nothing is (or `limit` links, or the time `until`), and count the outcomes.

    Links that belong to a run add to its totals; the others to a run of their own. Raises ConnectionUnusable when the
    account cannot be used: the connection then waits for a person, and its links keep their attempts.
    """
    part = Slice(
        connection=connection,
        provider=provider,
        clock=clock,
        rng=rng or random.Random(),
        sleep=sleep,
        stop=stop,
        until=until,
    )
    try:
        _Sender(part, session, customer_ids=customer_ids, limit=limit, progress=progress).run()
    finally:
        if part.own is not None:
            runs.finish(run=part.own, at=clock())
    return part.totals


@transaction.atomic
def prepare(
    part: Slice,
    *,
    rows: int,
    customer_ids: Collection[UUID] | None = None,
    token: str = "",
    but: Collection[int] = (),
) -> tuple[str, list[Sending], list[Settled]]:
    """Claim links, under `token` if there is one already, and write down what is about to be sent."""
    now = part.clock()
    claimed = claim(connection=part.connection, now=now, limit=rows, customer_ids=customer_ids, token=token, but=but)
    links = claimed.links
    if not links:
        return claimed.token, [], []
    sendings: list[Sending] = []
    settled: list[Settled] = []
    earlier = unanswered(links)
    for link in links:
        intent = earlier.get(link.pk)
        if intent is not None and intent.outcome == PushIntent.Outcome.OPEN:
            _died(part, link, intent, claimed.died.get(link.pk), now)
        try:
            if link.crashes >= CRASHES:
                settled.append(_suspect(part, link, intent, now))
                continue
            following = plan(link, intent, provider=part.provider, now=now)
        except Rejected as error:
            following = Settled(link=link, outcome=REFUSED, error=error)
        except Exception as error:  # a fault in a provider's code parks this record and spares the others
            logger.exception("the connector of %s failed", part.provider.slug)
            fault = Rejected(f"The connector failed: {type(error).__name__}.", code="internal")
            following = Settled(link=link, outcome=REFUSED, error=fault)
        if isinstance(following, Settled):
            settled.append(following)
        else:
            sendings.append(following)
    bulk.update(links, ("lease_token", "lease_until", "crashes", "hold_until"))
    bulk.update(list(earlier.values()), INTENT_COLUMNS)
    insert_intents(sendings)
    run_ids = {link.run_id for link in links if link.run_id}
    if run_ids and (queued := [pk for (pk,) in _QUEUED(ids=run_ids)]):
        SyncRun.objects.filter(pk__in=queued).update(state=SyncRun.State.RUNNING, started_at=now)
    return claimed.token, sendings, settled


_QUEUED = Prepared(
    lambda: (
        SyncRun.objects.filter(Among("id", "ids", models.BigAutoField()), state=SyncRun.State.QUEUED)
        .order_by("pk")
        .select_for_update()
        .values_list("pk")
    )
)


def _died(part: Slice, link: CustomerLink, intent: PushIntent, held_until: datetime | None, now: datetime) -> None:
    """Its worker never answered: the request may have been applied, or may still be. Never "not sent"."""
    intent.outcome = PushIntent.Outcome.UNCERTAIN
    intent.lost += 1
    # A call begins while half of the lease is left, so it had ended when the lease did.
    ended = held_until or now + LEASE / 2
    intent.hold_until = ended + timedelta(seconds=part.capabilities.max_request_life)
    if intent.kind == PushIntent.Kind.CREATE and part.capabilities.upsert_external_id:
        link.hold_until = max(link.hold_until or intent.hold_until, intent.hold_until)
    if held_until is not None:  # else a merge of customers took it from a living worker
        link.crashes += 1


def _suspect(part: Slice, link: CustomerLink, intent: PushIntent | None, now: datetime) -> Settled:
    """A record on which workers die is not sent again until somebody has looked."""
    error = Rejected(f"The worker died {link.crashes} times while it sent this record.", code="internal")
    lost = intent is not None and intent.kind == PushIntent.Kind.CREATE
    if lost and intent is not None and not repeatable(intent, part.capabilities, now=now):
        return Settled(link=link, outcome=UNCERTAIN, error=error)
    return Settled(link=link, outcome=REFUSED, error=error)


@dataclass(kw_only=True)
class _Calls:
    """The calls that this worker may make: taken from the bucket that all workers of the connection share."""

    part: Slice
    left: int = 0
    wait: float = 0.0  # seconds until the next one

    @property
    def limited(self) -> bool:
        return limits.limited(self.part.connection)

    @property
    def over(self) -> bool:
        """Whether the next call may be made so late that others had better use this thread: the day's are used up."""
        return self.wait > PATIENCE

    def rows(self, *, queued: int) -> int | None:
        """How many links to claim, so that others are not kept waiting for calls that may not be made yet."""
        if not self.limited:
            return None
        capabilities = self.part.capabilities
        return (self.left - queued) * max(capabilities.batch, capabilities.update_batch)

    def take(self, *, urgent: bool) -> bool:
        """One call, if there is one."""
        if not self.limited:
            return True
        if not self.left:
            self._reserve(1, urgent=urgent)
        if not self.left:
            return False
        self.left -= 1
        return True

    def there_is_one(self, *, queued: int, wait: bool) -> bool:
        """Whether a call may be made beside those that are queued; with `wait`, when one may be. False when the work is
        to stop before that.
        """
        if not self.limited:
            return True
        if self.left <= queued:
            self._reserve(settings.PUSH_CONCURRENT_CALLS)
        while self.left <= queued:
            if not wait or self.over:
                return False
            if self.part.stop() or (self.part.until is not None and self.part.clock() >= self.part.until):
                return False
            self.part.sleep(min(max(self.wait, 0.01), NAP))
            self._reserve(settings.PUSH_CONCURRENT_CALLS)
        return True

    def give_back(self) -> None:
        if self.limited and self.left:
            limits.give_back(connection=self.part.connection, calls=self.left, now=self.part.clock())
            self.left = 0

    def _reserve(self, want: int, *, urgent: bool = False) -> None:
        connection = self.part.connection
        now = self.part.clock()
        # Somebody waits for these: they may use what bulk runs leave in the bucket.
        due_now = CustomerLink.objects.filter(due(now=now), connection=connection, urgent=True)[:want].count()
        granted, self.wait = limits.reserve(
            connection=connection, want=min(want, due_now) or want, urgent=urgent or due_now > 0, now=now
        )
        self.left += granted


@dataclass(kw_only=True)
class _Batch:
    """What goes out in one call. `error` is an answer to the batch as a whole.

    While a record is searched that a refusal did not name: if this call passes, the record is among the `others`; what
    else was refused with it is `waiting`.
    """

    sendings: list[Sending]
    error: ConnectorError | None = None
    others: list[Sending] = field(default_factory=list)
    waiting: list[Sending] = field(default_factory=list)

    @property
    def urgent(self) -> bool:
        return any(one.link.urgent for one in self.sendings)

    def held(self) -> list[Sending]:
        return [*self.sendings, *self.others, *self.waiting]


def send(part: Slice, session: Session, token: str, sendings: Sequence[Sending]) -> None:
    """Send what has been claimed and nothing else."""
    sender = _Sender(part, session, token=token, limit=0)
    sender.take_over(sendings)
    sender.run()


class _Sender:
    """Sends side by side, keeps each answer as soon as it is known, and claims more while calls are under way.

    Database work stays in the thread that calls `run`; the calls are made in others.
    """

    def __init__(
        self,
        part: Slice,
        session: Session,
        *,
        token: str = "",
        customer_ids: Collection[UUID] | None = None,
        limit: int | None = None,
        progress: Callable[[Mapping[str, int]], None] = lambda totals: None,
    ) -> None:
        self.part = part
        self.session = session
        self.token = token
        self.customer_ids = customer_ids
        self.limit = limit
        self.progress = progress
        self.calls = _Calls(part=part)
        self.at_once = settings.PUSH_CONCURRENT_CALLS
        # Links to claim, and answers to keep, at once. What is claimed when a worker dies counts as sent.
        self.full = max(self.at_once + CLAIM_ROWS, part.capabilities.batch, part.capabilities.update_batch)
        self.queue: deque[_Batch] = deque()
        self.running: dict[Future[None], _Batch] = {}
        self.unkept: list[Sending] = []  # answered, none of them longer ago than TOGETHER
        self.keep_at = 0.0
        self.holding: set[int] = set()
        self.renewed = part.clock()
        self.claims = True  # there may be more to claim
        self.closed = False  # no more calls are to begin
        self.unusable: ConnectionUnusable | None = None

    def run(self) -> None:
        """Until nothing is left that may be sent now. Raises ConnectionUnusable."""
        try:
            with ThreadPoolExecutor(max_workers=self.at_once) as self.pool:
                while self._goes_on():
                    self._start()
                    if self.running:
                        self._collect()
                        self.progress(self.part.totals)
                    else:
                        self.part.sleep(min(max(self.calls.wait, 0.01), NAP))
                        self.closed = self.closed or self.calls.over or self._is_late()
        finally:
            # Also when the login server gives no token now: what was not sent is not to count as lost.
            unsent = self._keep_answers() + [one for batch in self.queue for one in batch.held()]
            for one in unsent:
                one.answer = NotSent("There was no time left to send it.")
            _keep(self.part, self.token, unsent)
            self.calls.give_back()
        if self.unusable is not None:
            lost_login(connection=self.part.connection, error=self.unusable, at=self.part.clock())
            raise self.unusable

    def take_over(self, sendings: Sequence[Sending], *, first: bool = False) -> None:
        """Queue what is claimed: behind the rest, or before it if somebody waits for it or with `first`."""
        for batch in reversed(list(_batches(self.part, sendings))) if first else _batches(self.part, sendings):
            if first or batch.urgent:
                self.queue.appendleft(batch)
            else:
                self.queue.append(batch)
        self.holding |= {one.link.pk for one in sendings}

    def _goes_on(self) -> bool:
        """Look around: whether to stop, whether leases need renewing, whether more can be claimed."""
        part = self.part
        if part.stop():
            self.closed = True
        if not self.running and self.unusable is not None:
            # The account does not let us in: log in anew where that can be done, else leave it to a person.
            if self.unusable.status != 401 or self.session.renew is None or not self.session.renew():
                return False
            self.unusable, self.closed = None, part.stop() or _must_wait(part.connection, part.clock())
        if not self.closed and part.clock() - self.renewed > LEASE / 4:
            self._renew()
        while not self.closed and self.claims and len(self.queue) < self.at_once:
            if not self._claim_more():
                break
        return bool(self.running or (self.queue and not self.closed))

    def _renew(self) -> None:
        """Hold on to what is claimed. What another worker took over while this one stood still is not sent here."""
        self.renewed = self.part.clock()
        if renew(token=self.token, links=self.holding, now=self.renewed) == len(self.holding):
            return
        rows = CustomerLink.objects.filter(pk__in=self.holding, lease_token=self.token)
        self.holding = set(rows.values_list("pk", flat=True))
        self.queue = deque(self._held(self.queue))

    def _held(self, batches: Iterable[_Batch]) -> list[_Batch]:
        """The batches without what was taken from this worker."""
        batches = list(batches)
        for batch in batches:
            for sendings in (batch.sendings, batch.others, batch.waiting):
                sendings[:] = [one for one in sendings if one.link.pk in self.holding]
            if not batch.sendings:  # all that was to be tried is gone: what is left begins anew
                batch.sendings, batch.others, batch.waiting = [*batch.others, *batch.waiting], [], []
        return [batch for batch in batches if batch.sendings]

    def _is_late(self) -> bool:
        return self.part.until is not None and self.part.clock() >= self.part.until

    def _claim_more(self) -> bool:
        """Claim what is due and queue it. False when nothing more is to be had for now."""
        part, idle = self.part, not self.running and not self.queue
        left = None if self.limit is None else self.limit - part.totals.total() - len(self.holding)
        if self._is_late() or (left is not None and left <= 0):
            self.claims = False
            return False
        # Another worker may have been told to wait, or a person may have paused it.
        admitted = limits.admit(connection=part.connection, now=part.clock())
        if admitted == 0:
            self.claims = False
            return False
        queued = len(self.queue)
        if (admitted is not None and not idle) or not self.calls.there_is_one(queued=queued, wait=idle):
            return False  # few are let through at a time: these first
        before = part.totals.total()
        bounds = (self.full, admitted, self.calls.rows(queued=queued), left)
        rows = min(bound for bound in bounds if bound is not None)
        # A merge may have taken a link from this worker whose answer is still out: under the same token that would pass
        # for an answer to what is claimed now.
        batches = (*self.queue, *self.running.values())
        out = [one.link.pk for one in self.unkept] + [one.link.pk for batch in batches for one in batch.held()]
        self.token, sendings, settled = prepare(
            part, rows=rows, customer_ids=self.customer_ids, token=self.token, but=out
        )
        settle(part, token=self.token, settled=settled)
        self.take_over(sendings)
        # What is under way may leave more to be done: it is asked again when all has come back.
        self.claims = bool(sendings) or part.totals.total() > before
        return self.claims

    def _start(self) -> None:
        # A call may take half a lease: the other half must still be there.
        now = self.part.clock()
        if now - self.renewed > LEASE / 2:
            self._renew()
        while self.queue and not self.closed and len(self.running) < self.at_once:
            if not self.calls.take(urgent=self.queue[0].urgent):
                break
            batch = self.queue.popleft()
            for one in batch.sendings:
                one.ends = now + timedelta(seconds=self.session.deadline)
            self.running[self.pool.submit(_call, self.part, self.session, batch)] = batch

    def _collect(self) -> None:
        """Wait for answers, and keep them when some have come together. The next calls are under way meanwhile."""
        patience = max(0.0, self.keep_at - time.monotonic()) if self.unkept else LONG
        done, _ = wait(self.running, timeout=patience, return_when=FIRST_COMPLETED)
        if not done and not self.unkept:
            _lend_connection()
            done, _ = wait(self.running, timeout=LOOK, return_when=FIRST_COMPLETED)
        finished = [self.running.pop(future) for future in done]
        answered: list[Sending] = []
        for batch in finished:
            if isinstance(batch.error, ConnectionUnusable):
                self.unusable, self.closed = batch.error, True
            elif isinstance(batch.error, RetryLater) and batch.error.retry_after is not None:
                self.closed = True
            known, following = _search(self.part, batch)
            answered += known
            self.queue.extendleft(self._held(following))
        if finished:
            # First what the other workers have to know: until then they go on calling.
            _listen(self.part, self.session, finished)
            self.closed = self.closed or _must_wait(self.part.connection, self.part.clock())
            self._start()
        if answered and not self.unkept:
            self.keep_at = time.monotonic() + TOGETHER
        self.unkept += answered
        if not self.running or len(self.unkept) >= self.full or time.monotonic() >= self.keep_at:
            self.take_over(self._keep_answers(), first=True)

    def _keep_answers(self) -> list[Sending]:
        """Keep what has been answered; returns the calls that follow."""
        answered, self.unkept = self.unkept, []
        follow = _keep(self.part, self.token, answered)
        self.holding -= {one.link.pk for one in answered}
        return follow


def _lend_connection() -> None:
    """Give the database connection back to its pool, where there is one; the next query takes one again."""
    if getattr(database, "pool", None) is not None and not database.in_atomic_block:
        database.close()


def _must_wait(connection: Connection, now: datetime) -> bool:
    """Whether the whole connection is to wait: an answer has just said so, here or to another worker."""
    ((connection.state, connection.not_before),) = _TOLD(pk=connection.pk)
    return (
        connection.state != Connection.State.ACTIVE
        or (connection.not_before is not None and connection.not_before > now)
        or (connection.breaker_until is not None and connection.breaker_until > now)
    )


_TOLD = Prepared(
    lambda: Connection.objects.filter(pk=Param("pk", models.BigAutoField())).values_list("state", "not_before")
)


def lost_login(*, connection: Connection, error: ConnectionUnusable, at: datetime) -> None:
    """The connection waits for a person. Its links keep their attempts."""
    reason = error.message[:500]
    Connection.objects.filter(pk=connection.pk, state=Connection.State.ACTIVE).update(
        state=Connection.State.NEEDS_REAUTH, state_reason=reason
    )
    connection.state, connection.state_reason = Connection.State.NEEDS_REAUTH, reason
    issues.open_issue(connection=connection, kind=Issue.Kind.LOGIN, message=reason, at=at)


def _batches(part: Slice, sendings: Sequence[Sending]) -> Iterable[_Batch]:
    """One call each, but for creates and updates that may share one. What once killed a worker goes alone."""
    capabilities = part.capabilities
    # A create that others share can only be repeated where each of its records can.
    sizes = {
        Step.CREATE: capabilities.batch if capabilities.rows_independent else 1,
        Step.UPDATE: capabilities.update_batch,
    }
    for step in Step:
        alike = [one for one in sendings if one.step is step]
        together = [one for one in alike if not one.link.crashes]
        size = sizes.get(step, 1)
        for first in range(0, len(together), size):
            yield _Batch(sendings=together[first : first + size])
        for one in alike:
            if one.link.crashes:
                yield _Batch(sendings=[one])


def _search(part: Slice, batch: _Batch) -> tuple[list[Sending], list[_Batch]]:
    """Which records of a call are answered, and the call that follows to find one that a refusal did not name.

    Half of what was refused is sent. If it passes, the bad record is in the other half, and that need not be refused
    again to be known; if not, the other half waits. So each call halves what is left, the bad record at last is refused
    alone, and all that waited goes out together: among n records ⌈log₂ n⌉ + 1 calls find it.
    """
    if batch.error is not None and _is_unnamed(part, batch):
        answered: list[Sending] = []
        suspects, waiting = batch.sendings, [*batch.others, *batch.waiting]
        now, life = part.clock(), part.capabilities.max_request_life
        for one in suspects:
            one.answer = None
            if our_fault(batch.error) and one.intent is not None:
                # It may have been applied, which whoever sends it next has to know.
                one.intent.lost, one.intent.hold_until = one.intent.lost + 1, one.dead_by(now=now, life=life)
    elif batch.error is None:
        answered, suspects, waiting = batch.sendings, batch.others, batch.waiting
    else:
        answered, suspects, waiting = batch.sendings, [], [*batch.others, *batch.waiting]
    if suspects:
        half = max(1, len(suspects) // 2)
        return answered, [_Batch(sendings=suspects[:half], others=suspects[half:], waiting=waiting)]
    return answered, [_Batch(sendings=waiting)] if waiting else []


def _is_unnamed(part: Slice, batch: _Batch) -> bool:
    """Whether several records were refused as a whole, or brought our code down, and may be sent again."""
    if len(batch.sendings) == 1 or batch.error is None:
        return False
    repeats = batch.sendings[0].step is Step.UPDATE or part.capabilities.rows_independent
    return isinstance(batch.error, Rejected) or (our_fault(batch.error) and repeats)


def _listen(part: Slice, session: Session, finished: Sequence[_Batch]) -> None:
    """Tell the limits what the answers say of the account as a whole."""
    heard: list[ConnectorError | None] = []
    for batch in finished:
        answers = [one.answer for one in batch.sendings]
        errors = [answer for answer in answers if isinstance(answer, ConnectorError)]
        heard.append(batch.error or (errors[0] if len(errors) == len(answers) and errors else None))
    limits.heard(
        connection=part.connection,
        calls=heard,
        exhausted=session.take_exhausted(),
        now=part.clock(),
        rng=part.rng,
    )


def _keep(part: Slice, token: str, answered: Sequence[Sending]) -> list[Sending]:
    """Settle answers; one that cannot be kept does not take the others with it."""
    if not answered:
        return []
    try:
        return settle(part, token=token, answered=answered)
    except Exception:
        logger.exception("answers of %s could not be kept together", part.connection.pk)
    follow: list[Sending] = []
    for one in answered:
        try:
            follow += settle(part, token=token, answered=[one])
        except Exception:
            logger.exception("the answer for link %s could not be kept", one.link.pk)
            one.answer = OutcomeUnknown("The answer could not be kept.", code="internal")
            settle(part, token=token, answered=[one])
    return follow


def _call(part: Slice, session: Session, batch: _Batch) -> None:
    """Make one call and lay each answer beside its record; whatever happens, each record has one."""
    try:
        call(part.provider, session, part.connection, batch.sendings)
    except ConnectorError as error:
        batch.error = error
    except Exception as error:  # a fault in a provider's code parks these records and spares the others
        logger.exception("the connector of %s failed", part.provider.slug)
        batch.error = OutcomeUnknown(f"The connector failed: {type(error).__name__}.", code="internal")
    if batch.error is not None:
        for one in batch.sendings:
            one.answer = batch.error


def call(provider: Provider, session: Session, connection: Connection, batch: Sequence[Sending]) -> None:
    """Make the one call that these sendings of one step are, and keep the answers. Raises ConnectorError."""
    first = batch[0]
    if first.step in (Step.CREATE, Step.UPDATE):
        outgoing = [one.outgoing for one in batch]
        offers = provider.capabilities(connection)
        # A system knows a key again only in the form of call that brought it: what may have gone out with others is
        # not repeated in the call for one.
        keyed = first.step is Step.CREATE and offers.create_key and not offers.upsert_external_id and offers.batch > 1
        if len(batch) == 1 and not keyed:
            one = provider.create if first.step is Step.CREATE else provider.update
            first.answer = one(session, connection, outgoing[0])
            return
        many = provider.create_many if first.step is Step.CREATE else provider.update_many
        answers = many(session, connection, outgoing)
        missing = OutcomeUnknown("The system answered fewer records than it was sent.")
        for position, sent in enumerate(batch):
            sent.answer = answers[position] if position < len(answers) else missing
    elif first.step is Step.DELETE:
        provider.delete(session, connection, first.outgoing.remote_id or "")
    elif first.step is Step.PROBE:
        try:
            provider.account_id(session, connection)
        except Gone as error:
            message = "The account of this connection is not there, or the login may not see it."
            raise ConnectionUnusable(message, status=error.status) from error
    elif first.step is Step.LOOK_UP:
        first.answer = Found(records=_look_up(provider, session, connection, first))
    else:
        record = provider.fetch(session, connection, first.outgoing.remote_id or "")
        if record.deleted:
            raise Gone("It is deleted there.")
        first.answer = record


def _look_up(provider: Provider, session: Session, connection: Connection, one: Sending) -> list[Record]:
    if not one.existing:
        return provider.look_up(session, connection, one.outgoing.uid)
    if not provider.capabilities(connection).fetches:
        return [Record(values={}, remote_id=one.existing)]
    try:
        record = provider.fetch(session, connection, one.existing)
    except Gone:
        return []
    return [] if record.deleted else [replace(record, remote_id=record.remote_id or one.existing)]
