"""What an answer means for a link, its intent, its run and its connection, kept in one transaction."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from django.db import models, transaction

from connectors.exceptions import (
    AlreadyExists,
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
    StaleRevision,
)
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.provider import Record
from connectors.states import LinkState
from connectors.sync import deletes, issues, limits, runs
from connectors.sync.claim import held
from connectors.sync.merge import same
from connectors.sync.plan import SECOND_LOOK, look_up_at, plan, repeatable, sending
from connectors.sync.receive import receive
from connectors.sync.steps import (
    CREATED,
    REFUSED,
    RETRYING,
    SKIPPED,
    UNCERTAIN,
    UNCHANGED,
    UPDATED,
    Found,
    NotSent,
    Result,
    Sending,
    Settled,
    Slice,
    Step,
    our_fault,
)
from customers import bulk, editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange
from customers.prepared import Among, Param, Prepared

RETRY_BASE, RETRY_CAP = 2.0, 900.0
# A record that keeps failing while its neighbours do not is parked, and tried now and then.
POISON_TRIES, POISON_TIME = 8, timedelta(hours=1)
POISON_HOURLY = timedelta(days=3)
CRASHES = 3
ROUNDS = 3

LINK_COLUMNS = (
    "remote_id",
    "former_remote_id",
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
    "failing_since",
    "fingerprint",
    "crashes",
    "urgent",
    "next_attempt_at",
    "hold_until",
    "epoch",
    "lease_token",
    "lease_until",
    "run",
    "synced_at",
    "tombstone",
    "deleted_at",
    "updated_at",
)
INTENT_COLUMNS = (
    "outcome",
    "answered_at",
    "sent_at",
    "status",
    "error",
    "remote_request_id",
    "hold_until",
    "lost",
    "replayed",
    "look_ups",
)

Outcome = tuple[str, ConnectorError | None]


def settle(
    part: Slice, *, token: str, settled: Sequence[Settled] = (), answered: Sequence[Sending] = ()
) -> list[Sending]:
    """Write outcomes, all or none, in a constant number of statements; returns the calls that are to follow at once.

    A link that the token no longer holds is left alone: the fence. Its intent still keeps the id that a late answer
    named, because whoever holds the link now will look for it.
    """
    if not settled and not answered:
        return []
    own, totals = part.own, part.totals.copy()
    try:
        with transaction.atomic():
            return _Settling(part, token, part.clock()).run(settled, answered)
    except BaseException:
        part.own, part.totals = own, totals
        raise


class _Settling:
    """One transaction of settling: the links it holds, and what it gathers to write."""

    def __init__(self, part: Slice, token: str, now: datetime) -> None:
        self.part = part
        self.token = token
        self.now = now
        self.capabilities = part.capabilities
        self.outcomes: dict[int, Outcome] = {}
        self.follow: list[Sending] = []
        self.intents: dict[int, PushIntent] = {}
        self.replan: list[tuple[CustomerLink, bool, int]] = []
        self.troubles: list[issues.Trouble] = []

    def run(self, settled: Sequence[Settled], answered: Sequence[Sending]) -> list[Sending]:
        if any(one.step is Step.PROBE and not isinstance(one.answer, ConnectorError) for one in answered):
            self.part.account_answers = True
        stale = self._merge_what_was_read(answered)
        believed = self._archive_what_is_gone(answered)
        self.ours = held(token=self.token, links=[s.link for s in settled] + [s.link for s in answered])
        self.taken = _taken(self.part.connection, answered)
        for one in settled:
            if (link := self.ours.get(one.link.pk)) is not None:
                self._without_call(link, one)
        for call in answered:
            answer = _usable(call)
            if (link := self.ours.get(call.link.pk)) is None:
                _late(call, answer)
                continue
            if call.intent is not None:
                self.intents[id(call.intent)] = call.intent
            link.connection = self.part.connection
            link.updated_at = self.now
            self._answered(link, call, answer, stale=call.link.pk in stale, believed=call.link.pk in believed)
        bulk.update(list(self.intents.values()), INTENT_COLUMNS)
        self._plan_again()
        _count(self.part, self.ours, self.outcomes, self.now)
        bulk.update(list(self.ours.values()), LINK_COLUMNS)
        if self.troubles:
            issues.open_issues(connection=self.part.connection, troubles=self.troubles, at=self.now)
        return self.follow

    # Before the links are locked: customers come first, everywhere.

    def _merge_what_was_read(self, answered: Sequence[Sending]) -> set[int]:
        """Merge the records that were read before an update. Returns the links whose reading was too old."""
        read = [one for one in answered if one.step is Step.READ and isinstance(one.answer, Record)]
        if not read:
            return set()
        part = self.part
        received = receive(
            organization=part.connection.organization,
            connection=part.connection,
            records=[_of_link(one.answer, one) for one in read if isinstance(one.answer, Record)],
            actor=_actor(part.connection),
            fields=part.provider.fields,
            normalise=part.provider.normalise,
            takes=part.connection.pulls,
            at=self.now,
        )
        return {one.link.pk for one, result in zip(read, received, strict=True) if result.stale}

    def _archive_what_is_gone(self, answered: Sequence[Sending]) -> set[int]:
        """Which of the links that answered 404 may be believed: the account answers, and they are not too many."""
        gone = [one.link for one in answered if one.step is Step.PROBE and not isinstance(one.answer, ConnectorError)]
        gone += [one.link for one in answered if _is_gone(one)]
        if not gone or not self.part.account_answers:
            return set()
        connection = self.part.connection
        if not deletes.plausible(connection=connection, number=len(gone), at=self.now):
            deletes.pause(connection=connection)
            return set()
        if connection.delete_policy == Connection.DeletePolicy.ARCHIVE:
            ids = {link.customer_id for link in gone}
            editing.archive(organization=connection.organization, ids=ids, actor=_actor(connection), at=self.now)
        return {link.pk for link in gone}

    # One link

    def _without_call(self, link: CustomerLink, one: Settled) -> None:
        self._give_back(link)
        link.updated_at = self.now
        if one.outcome == UNCHANGED:
            self._clean(link, max(link.pushed_version, one.link.customer.version))
        elif one.error is not None:
            link.state = LinkState.REJECTED if one.outcome == REFUSED else LinkState.UNCERTAIN
            link.error, link.error_field = one.error.message[:500], one.error.field[:64]
            link.next_attempt_at = None
            if our_fault(one.error):
                self.troubles.append(_fault(link, one.error))
            elif one.outcome == REFUSED:
                self._tell_refused(link, one.error)
        else:
            link.next_attempt_at, link.state = one.again, one.state or link.state
        self.outcomes[link.pk] = (one.outcome, one.error)

    def _answered(self, link: CustomerLink, one: Sending, answer: Result, *, stale: bool, believed: bool) -> None:
        if one.writes and one.intent is not None:
            self._keep_intent(one, answer)
        if believed:
            self._gone(link)
        elif isinstance(answer, Gone) and one.step in (Step.UPDATE, Step.READ):
            self._doubt(link, one, answer)
        elif one.step is Step.FILL:
            self._fill(link, one, answer)
        elif one.step is Step.PROBE:
            # The account itself does not answer, or too many are gone: nothing is believed.
            self._failed(
                link, one, answer if isinstance(answer, ConnectorError) else ConnectionUnusable(deletes.TOO_MANY)
            )
        elif one.step is Step.DELETE and (answer is None or isinstance(answer, Gone)):
            self._deleted(link, one)
        elif one.step is Step.READ and isinstance(answer, Record):
            if stale and one.rounds >= ROUNDS:
                self._conflict(link)
            elif stale:
                self.follow.append(sending(link, Step.READ, rounds=one.rounds + 1))
            else:
                self.replan.append((link, True, one.rounds))
        elif one.step is Step.LOOK_UP and isinstance(answer, Found):
            self._found(link, one, answer.records)
        elif isinstance(answer, Record):
            self._stored(link, one, answer)
        elif isinstance(answer, StaleRevision) and one.step is Step.UPDATE:
            if one.rounds >= ROUNDS or not self.capabilities.fetches:
                self._conflict(link)
            else:
                self.follow.append(sending(link, Step.READ, rounds=one.rounds + 1))
        elif isinstance(answer, AlreadyExists) and answer.remote_id and self.capabilities.fetches:
            self.follow.append(sending(link, Step.LOOK_UP, one.intent, existing=answer.remote_id))
        else:
            error = answer if isinstance(answer, ConnectorError) else OutcomeUnknown("No answer came.")
            self._failed(link, one, error)

    def _stored(self, link: CustomerLink, one: Sending, record: Record) -> None:
        """A create or an update was accepted."""
        if self.taken.get(record.remote_id, link.pk) != link.pk:
            self._already_linked(link, one, record.remote_id or "")
            return
        assert one.intent is not None  # only writes come here
        if link.remote_id and link.remote_id != record.remote_id and one.step is not Step.UPDATE:
            self.troubles.append(duplicates(link, [link.remote_id, record.remote_id or ""]))
            record = replace(record, remote_id=link.remote_id)
        _accepted(link, one.intent, record, self.now)
        if one.intent.hold_until is not None and self.capabilities.upsert_external_id:
            # An earlier sending of it may still land: newer content must not be before it.
            link.hold_until = max(link.hold_until or one.intent.hold_until, one.intent.hold_until)
        self.outcomes[link.pk] = (CREATED if one.step is not Step.UPDATE else UPDATED, None)
        self._clean(link, link.pushed_version)
        if not record.values and not self.capabilities.echoes and self.capabilities.fetches:
            self.follow.append(sending(link, Step.FILL, one.intent))
        else:
            self._give_back(link)

    def _fill(self, link: CustomerLink, one: Sending, answer: Result) -> None:
        if isinstance(answer, Record) and one.intent is not None:
            stored = {n: v for n, v in answer.values.items() if n in one.intent.sent_values}
            link.base_remote = {**link.base_remote, **_texts(stored)}
            link.remote_data = {**link.remote_data, **answer.document}
            link.remote_revision = answer.revision or link.remote_revision
        self._give_back(link)

    def _found(self, link: CustomerLink, one: Sending, records: Sequence[Record]) -> None:
        """A look-up came back: link what is ours, or make sure that there is nothing, and create."""
        intent = one.intent
        assert intent is not None  # a look-up is for a create
        mine = records if not one.existing else [r for r in records if self._is_ours(link, intent, r)]
        record = next(iter(mine), None)
        if record is not None and self.taken.get(record.remote_id, link.pk) == link.pk:
            if len(mine) > 1:
                self.troubles.append(duplicates(link, [r.remote_id or "" for r in mine]))
            intent.outcome, intent.answered_at = PushIntent.Outcome.OK, self.now
            self._stored(link, one, self._as_created(intent, record))
        elif records and one.existing:
            self._not_ours(link, one, records[0])
        elif record is not None:
            self._already_linked(link, one, record.remote_id or "")
        elif one.existing and not intent.remote_id:
            intent.outcome, intent.answered_at = PushIntent.Outcome.FAILED, self.now
            self._give_back(link)
            error = Rejected(f"There is a record {one.existing} there already, which it does not show.")
            link.error, link.error_field = error.message[:500], ""
            self._refused(link, one, error)
        elif one.existing:
            # The id of a late answer leads nowhere: look for the marker, where that is possible.
            intent.remote_id = ""
            PushIntent.objects.filter(pk=intent.pk).update(remote_id="")
            self._give_back(link)
            link.next_attempt_at = self.now
            self.outcomes[link.pk] = (RETRYING, None)
        elif self.capabilities.look_up == "lagging" and not intent.look_ups:
            intent.look_ups, intent.hold_until = 1, self.now + SECOND_LOOK
            self._give_back(link)
            link.state, link.next_attempt_at = LinkState.UNCERTAIN, intent.hold_until
            self.outcomes[link.pk] = (RETRYING, None)
        else:
            intent.outcome, intent.answered_at = PushIntent.Outcome.FAILED, self.now
            intent.error = "It was looked for and is not there."
            link.epoch += 1
            link.state = LinkState.OPEN
            self.replan.append((link, True, 0))

    def _as_created(self, intent: PushIntent, record: Record) -> Record:
        """The record as the create must have left it. What was changed since is for a reading to find."""
        normalise = self.part.provider.normalise
        left = {name: normalise(name, value) for name, value in intent.sent_values.items()}
        untouched = all(same(record.values.get(name), value) for name, value in left.items() if name in record.values)
        return replace(record, values=left, revision=record.revision if untouched else "")

    def _is_ours(self, link: CustomerLink, intent: PushIntent, record: Record) -> bool:
        provider = self.part.provider
        marked = provider.marker(record.document)
        if marked is not None or intent.remote_id == record.remote_id:
            return marked == link.uid or intent.remote_id == record.remote_id
        says = all(
            same(record.values.get(n), v) or same(record.values.get(n), provider.normalise(n, v))
            for n, v in intent.sent_values.items()
            if n in record.values
        )
        return intent.lost > 0 and says

    def _not_ours(self, link: CustomerLink, one: Sending, record: Record) -> None:
        """The system has a record like it that somebody else made."""
        if one.intent is not None:
            one.intent.outcome, one.intent.answered_at = PushIntent.Outcome.FAILED, self.now
        if self.part.connection.adopt_existing and self.taken.get(record.remote_id, link.pk) == link.pk:
            link.remote_id, link.remote_revision = record.remote_id, record.revision
            link.remote_data = dict(record.document)
            # Read and merged before the first update where we read from it; otherwise the hub's values are sent.
            known = {} if self.part.connection.pulls else _texts(record.values)
            link.base_local, link.base_remote = known, dict(known)
            link.sync_seq += 1
            self.replan.append((link, False, 0))
            return
        error = Rejected(
            f"{self.part.connection.name} already has such a record, {record.remote_id}. Link that one or change this.",
            code="already_exists",
        )
        self._failed(link, one, error)

    def _already_linked(self, link: CustomerLink, one: Sending, remote_id: str) -> None:
        if one.intent is not None:
            one.intent.outcome = PushIntent.Outcome.FAILED
        error = Rejected(
            f"The system answered with record {remote_id}, which is linked to another customer.", code="already_linked"
        )
        self._failed(link, one, error)

    def _doubt(self, link: CustomerLink, one: Sending, answer: Gone) -> None:
        """A 404 may mean a lost permission: ask for something that any login may see before believing it."""
        if one.step is Step.UPDATE and one.intent is not None:
            one.intent.outcome = PushIntent.Outcome.FAILED
        if self.part.account_answers:
            self._failed(link, one, ConnectionUnusable(deletes.TOO_MANY))
        else:
            self.follow.append(sending(link, Step.PROBE, one.intent))

    def _gone(self, link: CustomerLink) -> None:
        """It was deleted there. Keep what is known of it, and do what the connection's policy says."""
        deletes.bury(link, evidence="The system answered 404 for its id.", at=self.now)
        if self.part.connection.delete_policy == Connection.DeletePolicy.RECREATE:
            deletes.detach(link)
            self.replan.append((link, False, 0))
            return
        self._give_back(link)
        self.outcomes[link.pk] = (REFUSED, Gone(f"Deleted in {self.part.connection.name}."))

    def _deleted(self, link: CustomerLink, one: Sending) -> None:
        if one.intent is not None:
            one.intent.outcome = PushIntent.Outcome.OK
        deletes.bury(link, evidence="The hub deleted it.", at=self.now, by=deletes.HUB)
        link.pushed_version = max(link.pushed_version, one.intent.version if one.intent else 0)
        link.sync_seq += 1
        self._give_back(link)
        self.outcomes[link.pk] = (UPDATED, None)

    def _conflict(self, link: CustomerLink) -> None:
        """Somebody writes there faster than we can read: leave it to a person."""
        self._give_back(link)
        link.state, link.next_attempt_at = LinkState.CONFLICT, None
        link.error = "It keeps changing there while it is sent."
        self.outcomes[link.pk] = (REFUSED, Rejected(link.error, code="conflict"))

    def _clean(self, link: CustomerLink, version: int) -> None:
        # Nothing more is sent to a second record: once it is known, it owes nothing.
        link.pushed_version = max(version, link.needed_version) if link.is_duplicate else version
        link.next_attempt_at = max(link.next_attempt_at or self.now, self.now) if link.is_dirty else None
        link.state, link.error, link.error_field = LinkState.OPEN, "", ""
        link.attempts, link.failing_since, link.fingerprint, link.crashes = 0, None, "", 0
        link.urgent = link.urgent and link.is_dirty

    def _give_back(self, link: CustomerLink) -> None:
        link.lease_token, link.lease_until = "", None

    # Failures

    def _keep_intent(self, one: Sending, answer: Result) -> None:
        intent = one.intent
        assert intent is not None  # asked by the caller
        intent.answered_at = self.now
        if answer is None or isinstance(answer, Record):
            intent.outcome, intent.error = PushIntent.Outcome.OK, ""
            return
        if not isinstance(answer, ConnectorError):
            return
        intent.error = answer.message[:500]
        intent.status = answer.status
        intent.remote_request_id = answer.remote_request_id[:128]
        if isinstance(answer, OutcomeUnknown):
            intent.outcome = PushIntent.Outcome.UNCERTAIN
            intent.lost += 1
            intent.replayed = intent.replayed or answer.replayed
            intent.hold_until = one.dead_by(now=self.now, life=self.capabilities.max_request_life)
        elif isinstance(answer, AlreadyExists) or (intent.lost and not isinstance(answer, Rejected)):
            # This sending came to nothing; an earlier one may have arrived.
            intent.outcome = PushIntent.Outcome.UNCERTAIN if intent.lost else PushIntent.Outcome.OPEN
        elif intent.lost and one.step is Step.CREATE and not self._finds_itself():
            # A repeat was refused, which says nothing of the sending that was lost: it is to be looked for.
            intent.outcome, intent.replayed = PushIntent.Outcome.UNCERTAIN, True
        else:
            intent.outcome = PushIntent.Outcome.FAILED

    def _finds_itself(self) -> bool:
        """Whether another create with other content would meet an earlier one of the same link."""
        return self.capabilities.upsert_external_id or self.capabilities.unique_keys

    def _failed(self, link: CustomerLink, one: Sending, error: ConnectorError) -> None:
        """Say what becomes of a link whose call failed: parked, or tried again at a time."""
        self._give_back(link)
        self.outcomes[link.pk] = (RETRYING, error)
        if isinstance(error, ConnectionUnusable | NotSent):
            if one.step is Step.LOOK_UP or (one.intent and one.intent.outcome == PushIntent.Outcome.UNCERTAIN):
                link.next_attempt_at = link.next_attempt_at or self.now
            return
        link.error, link.error_field = error.message[:500], error.field[:64]
        if our_fault(error):
            link.crashes += 1
        if (isinstance(error, Rejected) and one.step not in (Step.LOOK_UP, Step.PROBE)) or _settled_no(error):
            self._refused(link, one, error)
        elif link.crashes >= CRASHES:
            self._crashed(link, one, error)
        elif isinstance(error, OutcomeUnknown) and one.step is Step.CREATE and self._waits_for_look_up(link, one):
            pass
        elif isinstance(error, RetryLater) and error.retry_after is not None:
            # The whole account is asked to wait: not an attempt of this record.
            link.state = self._retrying(one)
            link.next_attempt_at = self.now + limits.wait_of(error.retry_after, self.part.rng)
        else:
            self._try_again(link, one, error)

    def _refused(self, link: CustomerLink, one: Sending, error: ConnectorError) -> None:
        if one.intent is not None and link.needed_version > one.intent.version:
            link.next_attempt_at = link.next_attempt_at or self.now
            return  # the refused content is no longer what the customer says
        link.state, link.next_attempt_at = LinkState.REJECTED, None
        self.outcomes[link.pk] = (REFUSED, error)
        self._tell_refused(link, error)

    def _tell_refused(self, link: CustomerLink, error: ConnectorError) -> None:
        """One issue for all records that are refused for one cause."""
        link.fingerprint = fingerprint(error)
        self.troubles.append(
            issues.Trouble(
                kind=Issue.Kind.REJECTED,
                fingerprint=link.fingerprint,
                message=f"{error.field or 'The record'}: {error.message}",
                details={"customer": str(link.customer_id), "field": error.field},
            )
        )

    def _crashed(self, link: CustomerLink, one: Sending, error: ConnectorError) -> None:
        unsettled = one.step is Step.CREATE and not self.capabilities.rows_independent
        link.state = LinkState.UNCERTAIN if unsettled else LinkState.REJECTED
        link.next_attempt_at = None
        link.fingerprint = fingerprint(error)
        self.outcomes[link.pk] = (UNCERTAIN if unsettled else REFUSED, error)
        self.troubles.append(_fault(link, error))

    def _waits_for_look_up(self, link: CustomerLink, one: Sending) -> bool:
        """Whether a lost create cannot be repeated: it is looked for once it must be dead, or left to a person."""
        intent = one.intent
        assert intent is not None  # a create has one
        if link.remote_id or repeatable(intent, self.capabilities, now=self.now):
            return False  # found meanwhile, by a pull, or to be sent again
        link.state = LinkState.UNCERTAIN
        if self.capabilities.look_up:
            link.next_attempt_at = look_up_at(intent, self.capabilities, now=self.now)
        else:
            link.next_attempt_at = None
            self.outcomes[link.pk] = (UNCERTAIN, self.outcomes[link.pk][1])
        return True

    def _retrying(self, one: Sending) -> LinkState:
        return LinkState.UNCERTAIN if one.step is Step.LOOK_UP else LinkState.RETRYING

    def _try_again(self, link: CustomerLink, one: Sending, error: ConnectorError) -> None:
        cause = fingerprint(error)
        if cause != link.fingerprint or link.failing_since is None:
            link.attempts, link.failing_since, link.fingerprint = 0, self.now, cause
        link.attempts += 1
        ceiling = min(RETRY_CAP, RETRY_BASE * 2 ** min(link.attempts - 1, 16))
        link.next_attempt_at = self.now + timedelta(seconds=self.part.rng.uniform(0, ceiling))
        lost_update = isinstance(error, OutcomeUnknown) and one.step is Step.UPDATE and one.intent is not None
        if lost_update and one.intent is not None:
            if self.capabilities.conditional:
                link.remote_revision = ""  # it may have moved: read before the next one
            elif one.intent.hold_until is not None:
                link.next_attempt_at = max(link.next_attempt_at, one.intent.hold_until)
        if isinstance(error, OutcomeUnknown) and one.step is Step.CREATE and self.capabilities.upsert_external_id:
            hold = one.intent.hold_until if one.intent else None
            link.hold_until = max(filter(None, (link.hold_until, hold)), default=None)
        failing = self.now - (link.failing_since or self.now)
        others_succeed = self.part.connection.last_success_at and self.part.connection.last_success_at > (
            link.failing_since or self.now
        )
        if link.attempts < POISON_TRIES or failing < POISON_TIME or not others_succeed:
            link.state = self._retrying(one)
            return
        link.state = LinkState.REJECTED
        link.next_attempt_at = self.now + (timedelta(hours=1) if failing < POISON_HOURLY else timedelta(days=1))
        self.outcomes[link.pk] = (REFUSED, error)
        self.troubles.append(
            issues.Trouble(
                kind=Issue.Kind.POISON,
                fingerprint=cause,
                message=f"Keeps failing while others succeed: {error.message}",
                details={"customer": str(link.customer_id), "attempts": link.attempts},
            )
        )

    # Afterwards

    def _plan_again(self) -> None:
        """Decide anew for links whose state has just moved, and write down what is sent next."""
        if not self.replan:
            return
        customers = Customer.objects.in_bulk([link.customer_id for link, _, _ in self.replan])
        earlier = unanswered([link for link, _, _ in self.replan])
        new: list[Sending] = []
        for link, read, rounds in self.replan:
            link.customer = customers[link.customer_id]
            try:
                following = plan(link, earlier.get(link.pk), provider=self.part.provider, now=self.now, read=read)
            except Rejected as error:
                following = Settled(link=link, outcome=REFUSED, error=error)
            if isinstance(following, Settled):
                self._without_call(link, following)
            else:
                following.rounds = rounds
                self.follow.append(following)
                new.append(following)
        insert_intents(new)
        bulk.update(list(earlier.values()), INTENT_COLUMNS)


def unanswered(links: Sequence[CustomerLink]) -> dict[int, PushIntent]:
    """Each link's intent that is open or uncertain, by link."""
    return {intent.link_id: intent for intent in _UNANSWERED(ids=[link.pk for link in links])}


_UNANSWERED = Prepared(
    lambda: PushIntent.objects.filter(
        Among("link_id", "ids", models.BigAutoField()),
        outcome__in=(PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN),
    ).order_by("pk")
)


def insert_intents(sendings: Sequence[Sending]) -> None:
    """Store the intents that are new; their sendings know their keys afterwards."""
    new: list[PushIntent] = []
    for one in sendings:
        if one.intent is not None and one.intent._state.adding:
            new.append(one.intent)
    if not new:
        return
    bulk.insert(new)
    # By link: that is what has an index.
    stored = dict(_STORED(links={intent.link_id for intent in new}, keys=[intent.key for intent in new]))
    for intent in new:
        intent.pk = stored[intent.key]


_STORED = Prepared(
    lambda: PushIntent.objects.filter(
        Among("link_id", "links", models.BigAutoField()), Among("key", "keys", models.UUIDField())
    ).values_list("key", "pk")
)


def fingerprint(error: ConnectorError) -> str:
    """Equal for errors of one cause: ids and numbers in the message do not count."""
    words = re.sub(r"[0-9]+|[0-9a-f]{8,}", "#", error.message.lower())
    cause = f"{type(error).__name__}/{error.status}/{error.code}/{error.field}/{words}"
    return hashlib.sha256(cause.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _settled_no(error: ConnectorError) -> bool:
    """A refusal that says of itself whose fault it is, whatever the step."""
    return isinstance(error, Rejected) and error.code in ("already_exists", "already_linked")


def _is_gone(one: Sending) -> bool:
    return one.step in (Step.UPDATE, Step.READ) and isinstance(one.answer, Gone)


def _actor(connection: Connection) -> Actor:
    return Actor(kind=CustomerChange.Actor.CONNECTION, id=str(connection.pk), name=connection.name)


def _texts(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in values.items()}


def _late(one: Sending, answer: Result) -> None:
    """An answer for a link that somebody else holds by now. The id that it names will be of use to them."""
    if one.intent is not None and one.step is Step.CREATE and isinstance(answer, Record):
        PushIntent.objects.filter(pk=one.intent.pk).update(remote_id=answer.remote_id or "")


def _usable(one: Sending) -> Result:
    """The answer, unless it is one that nothing can be kept of."""
    answer = one.answer
    if not isinstance(answer, Record):
        return answer
    remote_id = answer.remote_id or one.link.remote_id or ""
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
    ids: dict[str | None, int] = {}
    for one in reversed(answered):
        records = one.answer.records if isinstance(one.answer, Found) else [one.answer]
        ids |= {record.remote_id: one.link.pk for record in records if isinstance(record, Record)}
    if not ids:
        return {}
    return {**ids, **dict(_BY_REMOTE_ID(connection=connection.pk, ids=list(ids)))}


_BY_REMOTE_ID = Prepared(
    lambda: CustomerLink.objects.filter(
        Among("remote_id", "ids", models.CharField()), connection_id=Param("connection", models.BigAutoField())
    ).values_list("remote_id", "pk")
)


def _of_link(record: Record, one: Sending) -> Record:
    """A record that was read for a link, with what no customer may have left out."""
    wrong = editing.problems(record.values, creating=False)
    values = {name: value for name, value in record.values.items() if name not in wrong}
    return replace(record, values=values, link_id=one.link.pk, remote_id=None, customer_id=None, seq=one.seq)


def duplicates(link: CustomerLink, remote_ids: Sequence[str]) -> issues.Trouble:
    return issues.Trouble(
        kind=Issue.Kind.DUPLICATE,
        fingerprint=str(link.uid),
        message=f"There are {len(remote_ids)} records of one customer: {', '.join(remote_ids)}.",
        details={"customer": str(link.customer_id), "remote_ids": list(remote_ids)},
    )


def _fault(link: CustomerLink, error: ConnectorError) -> issues.Trouble:
    return issues.Trouble(
        kind=Issue.Kind.CONNECTOR,
        fingerprint=fingerprint(error),
        message=f"Sending failed in a way that nobody foresaw. {error.message}",
        details={"customer": str(link.customer_id)},
    )


def _accepted(link: CustomerLink, intent: PushIntent, record: Record, now: datetime) -> None:
    sent = intent.sent_values
    stored = _texts({name: value for name, value in record.values.items() if name in sent})
    link.remote_id = record.remote_id or link.remote_id
    link.remote_data = {**link.remote_data, **record.document}
    link.base_local = {**link.base_local, **sent}
    link.base_remote = {**link.base_remote, **sent, **stored}
    link.remote_revision = record.revision or link.remote_revision
    link.remote_created_at = record.created_at or link.remote_created_at
    link.sync_seq += 1
    # The version that was read, not the current one: an edit made meanwhile is still to be sent.
    link.pushed_version = max(link.pushed_version, intent.version)
    link.synced_at = now


def _count(part: Slice, links: Mapping[int, CustomerLink], outcomes: Mapping[int, Outcome], now: datetime) -> None:
    """Add the outcomes to the runs that wait for them; what no run asked for goes to the slice's own."""
    by_run: dict[int, tuple[Counter[str], list[dict[str, Any]]]] = {}
    for pk, (outcome, error) in outcomes.items():
        link = links[pk]
        part.totals[outcome] += 1
        if outcome == SKIPPED or (outcome == RETRYING and link.run_id):
            continue  # no outcome yet: the link stays with its run until there is one
        if link.run_id is None and part.own is None:
            part.own = runs.start(
                organization=part.connection.organization,
                connection=part.connection,
                kind=SyncRun.Kind.PUSH,
                actor=_actor(part.connection),
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
