"""Comparing the customers of the hub with the records of a system. Nothing is changed on either side, not even a run is
kept: what is found is only told.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from django.db.models import Max, Min, Q, QuerySet

from connectors.exceptions import ConnectionUnusable, Gone, Rejected, RetryLater
from connectors.models import Connection, CustomerLink, PushIntent
from connectors.outbound import Session
from connectors.provider import Page, Provider, Record
from connectors.states import PARKED, LinkState
from connectors.sync.clock import database_clock
from connectors.sync.merge import merge, same
from connectors.sync.plan import changed_values
from connectors.sync.pull import PAGE_ROWS
from connectors.sync.push import NAP
from connectors.sync.receive import TOMBSTONE_LAG
from customers.ids import uuid7
from customers.models import Customer

CUSTOMER_ROWS = 500
SAMPLES = 5
# A system that asks to wait is waited for so long, so often in a row; then the check gives up.
PATIENCE, TRIES = timedelta(minutes=2), 5
T = TypeVar("T")


class Finding(StrEnum):
    """What a customer, or a record there, comes to. Each counts once, under the first of these that is true of it."""

    WAITING = "waiting"  # just being sent, or parked for a person
    GONE = "gone there"
    CONFLICT = "conflict"  # one field was changed on both sides
    CHANGED_THERE = "changed there"
    REFUSED = "refused"  # the connector would not send it, or what is there cannot be read
    CREATE = "would create"
    UPDATE = "would update"
    SAME = "same"
    UNKNOWN = "not linked there"  # a record that no customer is linked to


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One customer or record behind a finding. `fields` is {field: [here, there]}."""

    remote_id: str = ""
    customer: Customer | None = None
    fields: Mapping[str, list[Any]] = field(default_factory=dict)
    reason: str = ""


@dataclass(kw_only=True)
class Check:
    """What was found: how often, with at most five samples each, and why customers would be refused.

    `read` says how the system was read: "list", "fetch", or "" where it was not; `note` what that means for the
    findings. `complete` is False when the check was stopped.
    """

    read: str = ""
    note: str = ""
    complete: bool = True
    counts: Counter[Finding] = field(default_factory=Counter)
    samples: dict[Finding, list[Sample]] = field(default_factory=dict)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, finding: Finding, sample: Sample) -> None:
        self.counts[finding] += 1
        kept = self.samples.setdefault(finding, [])
        if len(kept) < SAMPLES and finding is not Finding.SAME:
            kept.append(sample)


class Stopped(Exception):
    """The user asked to stop."""


@dataclass(kw_only=True)
class _Checking:
    """One check under way. `unreadable` says that the list held records that nothing can be told of."""

    connection: Connection
    provider: Provider
    session: Session
    clock: Callable[[], datetime]
    sleep: Callable[[float], None]
    stop: Callable[[], bool]
    began: datetime
    customers: QuerySet[Customer]
    chosen: bool
    found: Check
    unreadable: bool = False
    called: datetime | None = None
    account_answers: bool = False


def check(
    *,
    connection: Connection,
    provider: Provider,
    session: Session,
    customer_ids: Collection[UUID] | None = None,
    since: datetime | None = None,
    limit: int | None = None,
    clock: Callable[[], datetime] = database_clock,
    sleep: Callable[[float], None] = time.sleep,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Mapping[Finding, int]], None] = lambda counts: None,
) -> Check:
    """Compare these customers (None: all of the organization that are not archived) with what is there now.

    Reads the list where the system has one, else (and for chosen customers) one record after the other, else compares
    with what was last sent, and says so. Sends nothing but reads, and writes nothing to the database; a login that has
    ended is renewed all the same. Keeps to the connection's rate by itself, since the shared bucket would be a write.
    Memory grows by one bit per link. Raises ConnectorError when the system cannot be read.
    """
    customers = Customer.objects.filter(organization_id=connection.organization_id, archived_at=None, merged_into=None)
    if customer_ids is not None:
        customers = customers.filter(pk__in=customer_ids)
    if since is not None:
        customers = customers.filter(updated_at__gte=since)
    if limit is not None:
        customers = customers.filter(pk__in=customers.order_by("pk").values("pk")[:limit])
    chosen = customer_ids is not None or since is not None or limit is not None
    found = Check()
    this = _Checking(
        connection=connection,
        provider=provider,
        session=session,
        clock=clock,
        sleep=sleep,
        stop=stop,
        began=clock(),
        customers=customers,
        chosen=chosen,
        found=found,
    )
    capabilities = provider.capabilities(connection)
    if capabilities.fetches and (chosen or not capabilities.lists):
        found.read = "fetch"
        found.note = "Each record was read alone: records there that no customer is linked to were not looked for."
    elif capabilities.lists:
        found.read = "list"
    else:
        found.note = f"{provider.label} documents no way to read customers: compared with what was last sent alone."
    try:
        seen = _Seen(connection)
        if found.read == "list":
            _list(this, seen, progress)
        for page in _pages(this.customers):
            _customers(this, page, seen)
            progress(found.counts)
    except Stopped:
        found.complete = False
    return found


class _Seen:
    """Which links of a connection were met: a bit for each id between the first and the last."""

    def __init__(self, connection: Connection) -> None:
        ids = CustomerLink.objects.filter(connection=connection).aggregate(first=Min("pk"), last=Max("pk"))
        self.first, self.last = ids["first"] or 0, ids["last"] or 0
        self.bits = bytearray((self.last - self.first) // 8 + 1)

    def add(self, link: CustomerLink) -> bool:
        """True the first time. A link that is newer than the check counts as met."""
        place = link.pk - self.first
        if not 0 <= place <= self.last - self.first or self.bits[place // 8] & 1 << place % 8:
            return False
        self.bits[place // 8] |= 1 << place % 8
        return True

    def __contains__(self, link: CustomerLink) -> bool:
        place = link.pk - self.first
        return not 0 <= place <= self.last - self.first or bool(self.bits[place // 8] & 1 << place % 8)


# From their side


def _list(this: _Checking, seen: _Seen, progress: Callable[[Mapping[Finding, int]], None]) -> None:
    cursor: str | None = None
    while True:
        fetched = this.clock()
        page = _ask(this, lambda: _page(this, cursor))  # noqa: B023 # called at once
        records: list[Record] = []
        for record in page.records:
            if isinstance(record, Record) and record.remote_id:
                records.append(record)
                continue
            this.unreadable = True
            if not this.chosen:
                error = record if isinstance(record, Rejected) else Rejected("The record has no id.")
                this.found.add(Finding.REFUSED, Sample(reason=error.message))
                this.found.refusals[error.field, error.message] += 1
        _records(this, records, seen, fetched)
        progress(this.found.counts)
        cursor = page.next
        if cursor is None:
            return


def _page(this: _Checking, cursor: str | None) -> Page:
    return this.provider.page(this.session, this.connection, cursor=cursor, since=None, limit=PAGE_ROWS)


def _records(this: _Checking, records: Sequence[Record], seen: _Seen, fetched: datetime) -> None:
    """Judge one page of the list, in a constant number of statements."""
    ids = [record.remote_id or "" for record in records]
    rows = CustomerLink.objects.filter(connection=this.connection)
    markers = [this.provider.marker(record.document) for record in records]
    links = {link.remote_id: link for link in rows.filter(remote_id__in=ids)}
    former = set(
        rows.filter(~Q(former_remote_id=""), former_remote_id__in=ids).values_list("former_remote_id", flat=True)
    )
    # Creates whose answer was lost: the link is yet to learn the id.
    lost = rows.filter(uid__in=[uid for uid in markers if uid is not None], remote_id=None)
    expected = set(lost.values_list("uid", flat=True))
    asked = this.customers.filter(pk__in=[link.customer_id for link in links.values()]).in_bulk()
    sent = _unanswered(list(links.values()))
    for record, marker in zip(records, markers, strict=True):
        link = links.get(record.remote_id)
        if link is not None:
            if link.customer_id in asked and not link.is_duplicate and link.deleted_at is None and seen.add(link):
                _compare(this, link, asked[link.customer_id], record, sent.get(link.pk, ()), fetched)
        elif not (this.chosen or record.deleted or record.remote_id in former or marker in expected):
            this.found.add(Finding.UNKNOWN, Sample(remote_id=record.remote_id or ""))


# From our side


def _pages(customers: QuerySet[Customer]) -> Iterator[list[Customer]]:
    rows = customers.order_by("pk")
    page = list(rows[:CUSTOMER_ROWS])
    while page:
        yield page
        page = list(rows.filter(pk__gt=page[-1].pk)[:CUSTOMER_ROWS])


def _customers(this: _Checking, page: Sequence[Customer], seen: _Seen) -> None:
    """Judge these customers, but for those that the list has shown."""
    if this.stop():
        raise Stopped
    rows = CustomerLink.objects.filter(connection=this.connection, customer__in=page, is_duplicate=False)
    links = {link.customer_id: link for link in rows}
    sent = _unanswered(list(links.values()))
    now = this.clock()
    for customer in page:
        link = links.get(customer.pk)
        if link is None:
            if this.connection.pushes:
                _create(this, customer, uuid7())
            continue
        sample = Sample(customer=customer, remote_id=link.remote_id or "", reason=link.error)
        if link.deleted_at is not None:
            this.found.add(Finding.GONE, sample)
        elif link.remote_id is None:
            if link.pk in sent or _waits(link, now):
                this.found.add(Finding.WAITING, sample)
            elif this.connection.pushes:
                _create(this, customer, link.uid, sample.remote_id)
        elif this.found.read == "list" and not this.unreadable:
            if link not in seen:
                _missing(this, link, sample)
        elif this.found.read == "" or not this.provider.capabilities(this.connection).fetches:
            if link not in seen:
                _as_sent(this, link, customer)
        elif this.found.read == "fetch" or link not in seen:
            _fetch(this, link, customer, sent.get(link.pk, ()))


def _missing(this: _Checking, link: CustomerLink, sample: Sample) -> None:
    """The list has not shown its record: it is gone, unless it came while the list was read."""
    new = link.synced_at is not None and link.synced_at + TOMBSTONE_LAG >= this.began
    this.found.add(Finding.WAITING if new else Finding.GONE, sample)


def _fetch(this: _Checking, link: CustomerLink, customer: Customer, sent: Sequence[Mapping[str, Any]]) -> None:
    remote_id = link.remote_id or ""
    sample = Sample(customer=customer, remote_id=remote_id)
    fetched = this.clock()
    try:
        record = _ask(this, lambda: this.provider.fetch(this.session, this.connection, remote_id))
    except Gone:
        if not this.account_answers:
            # A lost permission looks like that, too.
            _ask(this, lambda: _account(this))
            this.account_answers = True
        this.found.add(Finding.GONE, sample)
    except Rejected as error:
        _refuse(this, error, customer, remote_id)
    else:
        _compare(this, link, customer, record, sent, fetched)


def _account(this: _Checking) -> None:
    try:
        this.provider.account_id(this.session, this.connection)
    except Gone as error:
        message = "The account of this connection is not there, or the login may not see it."
        raise ConnectionUnusable(message, status=error.status) from error


# One customer


def _compare(
    this: _Checking,
    link: CustomerLink,
    customer: Customer,
    record: Record,
    sent: Sequence[Mapping[str, Any]],
    fetched: datetime,
) -> None:
    fields = this.provider.fields
    remote = {name: value for name, value in record.values.items() if name in fields}
    merged = merge(
        local={name: getattr(customer, name) for name in fields},
        remote=remote,
        base_local=link.base_local,
        base_remote=link.base_remote,
        policy=lambda name: Connection.ConflictPolicy.ASK,
        normalise=this.provider.normalise,
        sent=sent,
        waiting=link.conflicts,
    )
    moved = link.synced_at is not None and link.synced_at >= fetched
    sides = {name: [getattr(customer, name), remote.get(name, link.base_remote.get(name))] for name in sorted(fields)}
    out = {
        name
        for name in fields - merged.waiting.keys()
        if name not in merged.take and not same(getattr(customer, name), merged.base_local.get(name))
    }

    def told(finding: Finding, names: Collection[str] = (), reason: str = "") -> None:
        shown = {name: values for name, values in sides.items() if name in names}
        remote_id = link.remote_id or ""
        this.found.add(finding, Sample(customer=customer, remote_id=remote_id, fields=shown, reason=reason))

    if record.deleted:
        told(Finding.GONE)
    elif moved or _waits(link, fetched):
        told(Finding.WAITING, merged.waiting, link.error)
    elif merged.waiting:
        told(Finding.CONFLICT, merged.waiting)
    elif merged.take:
        told(Finding.CHANGED_THERE, merged.take)
    elif not out or not this.connection.pushes:
        told(Finding.SAME)
    elif (error := _refusal(this, customer, link.uid, frozenset(out))) is not None:
        _refuse(this, error, customer, link.remote_id or "")
    else:
        told(Finding.UPDATE, out)


def _as_sent(this: _Checking, link: CustomerLink, customer: Customer) -> None:
    """Compare with what was sent last: what is there now cannot be read."""
    remote_id = link.remote_id or ""
    out = changed_values(link, customer, this.provider.fields) if this.connection.pushes else {}
    shown = {name: [value, link.base_remote.get(name)] for name, value in out.items()}
    if _waits(link, this.clock()) or link.conflicts:
        this.found.add(Finding.WAITING, Sample(customer=customer, remote_id=remote_id, reason=link.error))
    elif not out:
        this.found.add(Finding.SAME, Sample(customer=customer, remote_id=remote_id))
    elif (error := _refusal(this, customer, link.uid, frozenset(out))) is not None:
        _refuse(this, error, customer, remote_id)
    else:
        this.found.add(Finding.UPDATE, Sample(customer=customer, remote_id=remote_id, fields=shown))


def _create(this: _Checking, customer: Customer, uid: UUID, remote_id: str = "") -> None:
    if (error := _refusal(this, customer, uid, None)) is not None:
        _refuse(this, error, customer, remote_id)
    else:
        this.found.add(Finding.CREATE, Sample(customer=customer))


def _refusal(this: _Checking, customer: Customer, uid: UUID, fields: frozenset[str] | None) -> Rejected | None:
    try:
        this.provider.document(customer, connection=this.connection, uid=uid, fields=fields)
    except Rejected as error:
        return error
    return None


def _refuse(this: _Checking, error: Rejected, customer: Customer, remote_id: str) -> None:
    this.found.refusals[error.field, error.message] += 1
    this.found.add(Finding.REFUSED, Sample(customer=customer, remote_id=remote_id, reason=error.message))


def _waits(link: CustomerLink, now: datetime) -> bool:
    held = link.lease_until is not None and link.lease_until > now
    return held or (link.state in PARKED and link.state != LinkState.REMOTE_DELETED)


def _unanswered(links: Sequence[CustomerLink]) -> dict[int, list[Mapping[str, Any]]]:
    """What pushes whose answer is out or was lost have sent, by link."""
    waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    rows = PushIntent.objects.filter(link__in=[link.pk for link in links], outcome__in=waiting)
    sent: dict[int, list[Mapping[str, Any]]] = {}
    for link_id, values in rows.order_by("pk").values_list("link_id", "sent_values"):
        sent.setdefault(link_id, []).append(values)
    return sent


# One call


def _ask(this: _Checking, call: Callable[[], T]) -> T:
    """Make a call when the connection may be used, and again when the system asked to wait a little."""
    renewed = False
    tries = 0
    while True:
        _pace(this)
        try:
            return call()
        except RetryLater as error:
            tries += 1
            wait = timedelta(seconds=max(error.retry_after or 1.0, 1.0))
            if wait > PATIENCE or tries >= TRIES:
                raise
            _rest(this, this.clock() + wait)
        except ConnectionUnusable as error:
            if error.status != 401 or renewed or this.session.renew is None or not this.session.renew():
                raise
            renewed = True


def _pace(this: _Checking) -> None:
    connection = this.connection
    connection.refresh_from_db(fields=["not_before", "rate"])
    now = this.clock()
    if connection.not_before is not None and connection.not_before > now:
        if connection.not_before > now + PATIENCE:
            raise RetryLater(f"{connection.name} asked to wait until {connection.not_before:%Y-%m-%d %H:%M:%S} UTC.")
        _rest(this, connection.not_before)
    if connection.rate and this.called is not None:
        _rest(this, this.called + timedelta(seconds=1 / connection.rate))
    if this.stop():
        raise Stopped
    this.called = this.clock()


def _rest(this: _Checking, until: datetime) -> None:
    while (left := (until - this.clock()).total_seconds()) > 0:
        if this.stop():
            raise Stopped
        this.sleep(min(left, NAP))
