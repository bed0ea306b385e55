"""What the page of a connection tells: health, queue, limits, abilities and mapping. A constant number of queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from django.urls import reverse

from connectors.admin.filters import counts_by_status
from connectors.admin.needs import KINDS, counted
from connectors.admin.reasons import causes
from connectors.exceptions import Rejected
from connectors.models import Connection, CustomerLink
from connectors.provider import Provider
from connectors.states import STATUSES, LinkState
from connectors.sync import limits
from connectors.sync.claim import due
from connectors.sync.preview import leaves
from customers.admin.paging import MoreThan
from customers.editing import EDITABLE, FLAGS, draft, imagined
from customers.forms import label, shown
from customers.ids import parse_public_id, uuid7
from customers.models import Customer
from customers.privacy import HIDDEN, PERSONAL, masked

REASONS = 10
# Among so many customers an example is looked for.
RECENT = 50
MOMENT = "%Y-%m-%d %H:%M:%S UTC"
QUEUE = ("waiting", "sending", "retrying", "checking", *KINDS, "in_sync")


@dataclass(frozen=True, kw_only=True)
class Waits:
    key: str
    count: int
    url: str

    @property
    def status(self) -> Any:
        return STATUSES[self.key]

    @property
    def shown(self) -> str:
        return str(self.count) if isinstance(self.count, MoreThan) else f"{self.count:,}"


@dataclass(frozen=True, kw_only=True)
class Reason:
    field: str
    text: str
    count: int
    url: str


@dataclass(kw_only=True)
class Queue:
    """What waits at a connection, `parked` of it for a person: what somebody has settled, such as a record that is to
    stay deleted, is shown in its state and waits no more.
    """

    counts: list[Waits] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    parked: int = 0
    oldest_due: datetime | None = None


def links_url(**query: Any) -> str:
    return f"{reverse('admin:connectors_customerlink_changelist')}?{urlencode(query)}"


def queue(connection: Connection, *, clear: bool, now: datetime) -> Queue:
    """Six queries. What systems say may quote personal data: it is hidden from who does not see that."""
    links = CustomerLink.objects.filter(connection=connection)
    found = Queue()
    counts = counts_by_status([connection], now=now)[connection.pk]
    found.counts = [
        Waits(key=key, count=counts[key], url=links_url(connection=connection.pk, shown_state=key))
        for key in (*QUEUE, *sorted(counts.keys() - set(QUEUE)))
        if counts.get(key)
    ]
    found.parked = parked(counted([connection]), connection)
    found.reasons = [
        Reason(
            field=label(cause.field),
            text=cause.text,
            count=cause.number,
            url=f"{reverse('admin:customers_customer_changelist')}?"
            + urlencode({"system": connection.pk, "state": "rejected", "reason": cause.fingerprint}),
        )
        for cause in causes(links.filter(state=LinkState.REJECTED), clear=clear, most=REASONS)
    ]
    waits = links.filter(due(now=now)).order_by("next_attempt_at").values_list("next_attempt_at", flat=True)
    found.oldest_due = waits[:1].first() if connection.pushes else None
    return found


def parked(numbers: Mapping[tuple[int, str], tuple[int, datetime]], connection: Connection) -> int:
    """How many links of the connection wait for a person, of what `needs.counted` tells."""
    return sum(n for (pk, _), (n, _) in numbers.items() if pk == connection.pk)


# Limits


def limit_facts(connection: Connection, *, now: datetime) -> list[tuple[str, str]]:
    """Name and sentence. Asks the database nothing."""
    facts = []
    left = limits.calls_left(connection=connection, now=now)
    if left is None:
        facts.append(("Rate", "No limit is set. The hub stops when the system asks it to."))
    else:
        facts.append(("Rate", f"{connection.rate:g} calls a second at most; {left:.0f} may follow at once now."))
    if connection.day_limit is not None:
        taken = limits.calls_today(connection, now)
        rest = "The last tenth is left to what somebody waits for. It begins anew at 00:00 UTC."
        facts.append(("Today", f"{taken:,} of {connection.day_limit:,} calls. {rest}"))
    if connection.not_before is not None and connection.not_before > now:
        facts.append(("Waiting", f"It asked us to wait until {connection.not_before.strftime(MOMENT)}."))
    else:
        facts.append(("Waiting", "Not waiting."))
    failed = connection.breaker_calls.count("0")
    seen = len(connection.breaker_calls)
    if connection.breaker_until is not None and connection.breaker_trips:
        until = connection.breaker_until.strftime(MOMENT)
        facts.append(("Failures", f"Too many calls failed: nothing is sent until {until}, then one try."))
    elif seen:
        facts.append(("Failures", f"{failed} of the last {seen} calls failed."))
    else:
        facts.append(("Failures", "No call is remembered."))
    if connection.ramp is not None:
        facts.append(("After the login", "A few customers go first; then more, at a part of the rate."))
    return facts


# Abilities


@dataclass(frozen=True, kw_only=True)
class Ability:
    name: str
    good: bool
    text: str


def abilities(provider: Provider, connection: Connection) -> Iterator[Ability]:
    """What this account offers, and what it means where something is missing."""
    offers = provider.capabilities(connection)

    def told(name: str, good: bool, there: str, missing: str) -> Ability:
        return Ability(name=name, good=good, text=there if good else missing)

    lost = "A create whose answer is lost"
    if offers.upsert_external_id:
        yield Ability(name="Create", good=True, text=f"{lost} is sent again: our id makes it the same record.")
    elif offers.create_key:
        hours = offers.key_life / 3600
        yield Ability(name="Create", good=True, text=f"{lost} is sent again with its key, for {hours:g} hours.")
    elif offers.unique_keys:
        yield Ability(name="Create", good=True, text=f"{lost} is sent again: the system refuses a second one.")
    elif offers.look_up:
        yield Ability(name="Create", good=True, text=f"{lost} is looked up by our mark before it is sent again.")
    else:
        text = f"{lost} cannot be settled by the hub: a person is asked whether the record is there."
        yield Ability(name="Create", good=False, text=text)
    if not offers.updates:
        yield Ability(name="Update", good=False, text="Records cannot be changed there: edits stay in the hub.")
    yield told(
        "Conditional updates",
        offers.conditional,
        "An update is refused when somebody else has changed the record meanwhile.",
        "An edit made there between our reading and our writing can be overwritten.",
    )
    yield told(
        "Read all",
        offers.lists,
        "All records can be read: pulls and dry runs compare with what is there.",
        "Records cannot be listed: the hub cannot pull, and a dry run compares with what was sent last.",
    )
    yield told(
        "Read one",
        offers.fetches,
        "One record can be read: a comparison shows what is there now.",
        "One record cannot be read alone.",
    )
    yield told(
        "Read changes",
        offers.incremental,
        "A pull asks for what has changed since the last one.",
        "Every pull reads the whole list." if offers.lists else "There is nothing to pull.",
    )
    yield told("Delete", offers.deletes, "A record can be deleted from here.", "Records cannot be deleted from here.")
    seen = {
        "flag": "Records deleted there are marked in its list.",
        "scan": "Records deleted there are missed when the whole list is read.",
    }
    yield told(
        "See deletes",
        bool(offers.shows_deleted),
        seen.get(offers.shows_deleted, ""),
        "A record deleted there is noticed when the hub next sends to it.",
    )
    yield told(
        "Batches",
        offers.batch > 1,
        f"Up to {offers.batch} new customers go in one call.",
        "Each customer takes a call of its own.",
    )


# Mapping


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """A field of the hub: `places` are its names there, `example` what would be sent for the chosen customer."""

    field: str
    name: str
    places: str
    needed: str
    example: str


@dataclass(kw_only=True)
class Fields:
    rows: list[Mapped] = field(default_factory=list)
    refused: str = ""


EXAMPLE: Mapping[str, Any] = {
    "name": "Jane Doe",
    "first_name": "Jane",
    "last_name": "Doe",
    "email": "jane.doe@example.com",
    "phone": "+442079460958",
    "address_line1": "1 Example Street",
    "address_line2": "Floor 2",
    "address_city": "London",
    "address_state": "London",
    "address_postal_code": "SW1A 1AA",
    "address_country": "GB",
    "shipping_address_line1": "2 Example Street",
    "shipping_address_line2": "Floor 3",
    "shipping_address_city": "Leeds",
    "shipping_address_state": "Yorkshire",
    "shipping_address_postal_code": "LS1 1AA",
    "shipping_address_country": "GB",
    "currency": "GBP",
    "notify_email": True,
    "notify_phone": True,
    "is_active": True,
    "custom_fields": {},
}
OTHER: Mapping[str, Any] = {
    "name": "John Roe",
    "first_name": "John",
    "last_name": "Roe",
    "email": "john.roe@example.com",
    "phone": "+442079460959",
    "address_country": "IE",
    "shipping_address_country": "IE",
    "currency": "EUR",
    "custom_fields": {"example": "value"},
}
_ABSENT = object()


def mapping(provider: Provider, connection: Connection, *, example: Customer | None, clear: bool) -> Fields:
    """Which field goes where, found out by asking the connector for documents that differ in one field.

    `example` is a stored customer to show; its values are masked for who does not see them.
    """
    found = Fields()
    uid = uuid7()

    def document(customer: Customer) -> dict[str, Any]:
        return provider.document(customer, connection=connection, uid=uid, fields=None)

    known = imagined(draft(organization=connection.organization), EXAMPLE)
    try:
        base = leaves(document(known))
    except Rejected as error:
        found.refused = error.message
        return found
    sent: dict[str, Any] = {}
    if example is not None:
        try:
            sent = leaves(document(example))
        except Rejected as error:
            named = f"{label(error.field)}: " if error.field else ""
            found.refused = f"{example.name} would be refused. {named}{error.message}"
    places = {name: _places(document, known, name, base) for name in EDITABLE if name in provider.fields}
    # Something that is made of several fields is hidden when one of them is personal.
    personal = {place for name in PERSONAL & places.keys() for place in places[name]}

    def told(name: str, place: str) -> str:
        value = sent[place]
        if not clear and place in personal:
            value = masked(name, value) if name in PERSONAL else HIDDEN
        return f"{place} = {shown(value)}"

    for name, there in places.items():
        found.rows.append(
            Mapped(
                field=name,
                name=label(name),
                places=", ".join(there) or "–",
                needed=_needed(document, known, name),
                example="; ".join(told(name, place) for place in there if place in sent) or "–",
            )
        )
    return found


def _places(document: Any, known: Customer, name: str, base: Mapping[str, Any]) -> list[str]:
    before = getattr(known, name)
    other = (not before) if name in FLAGS else OTHER.get(name, f"{before} B")
    try:
        after = leaves(document(imagined(known, {name: other})))
    except Rejected:
        return []
    changed = (place for place in {**base, **after} if base.get(place, _ABSENT) != after.get(place, _ABSENT))
    return list(dict.fromkeys(changed))


def _needed(document: Any, known: Customer, name: str) -> str:
    """What the connector says when the field is empty; "" where it may be."""
    if name in FLAGS:
        return ""
    try:
        document(imagined(known, {name: {} if name == "custom_fields" else ""}))
    except Rejected as error:
        return error.message
    return ""


def example_of(connection: Connection, chosen: str) -> Customer | None:
    """The customer to show: the one that was asked for, else the one changed last. One query."""
    rows = Customer.objects.filter(organization=connection.organization_id, merged_into=None)
    wanted = parse_public_id("cust", chosen.strip()) if chosen else None
    if chosen:
        return rows.filter(pk=wanted).first() if wanted else None
    # Of those that changed last: asked for one in use, SQLite would sort all that are.
    recent = Customer.objects.filter(organization=connection.organization_id).order_by("-updated_at", "-id")[:RECENT]
    return next((one for one in recent if not one.archived_at and not one.merged_into_id), None)
