"""What happened to a customer, in sentences, newest first: a page of events that several sources tell of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import Q, QuerySet

from customers.forms import label, shown
from customers.models import Customer, CustomerChange, MergeRecord, Note, Reveal
from customers.privacy import masked, redacted

ROWS = 20
PEOPLE, SYSTEMS = "people", "systems"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The last event of a page. `rank` orders the sources, `pk` the events of one source, within one moment."""

    at: datetime
    rank: int
    pk: int

    def __str__(self) -> str:
        return f"{(self.at - _EPOCH) // timedelta(microseconds=1)}.{self.rank}.{self.pk}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """None for a text that no page has given out."""
        parts = text.split(".")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            return None
        moment, rank, pk = map(int, parts)
        try:
            return cls(at=_EPOCH + timedelta(microseconds=moment), rank=rank, pk=pk)
        except OverflowError:
            return None


@dataclass(kw_only=True)
class Event:
    """One entry: who did what. `fields` are (label, old, new) as they may be shown; `facts` is the small print."""

    at: datetime
    rank: int
    pk: int
    author: str
    deed: str
    fields: list[tuple[str, str, str]] = field(default_factory=list)
    only_new: bool = False
    message: str = ""
    facts: list[str] = field(default_factory=list)
    request_id: str = ""
    icon: str = "✎"
    sort: str = "Change"
    cause: Hashable = None  # neighbours of one cause are one entry
    times: int = 1

    @property
    def cursor(self) -> Cursor:
        return Cursor(at=self.at, rank=self.rank, pk=self.pk)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which part of whose timeline is wanted. `clear`: personal data may be shown. `only`: PEOPLE, SYSTEMS or ""."""

    customer: Customer
    clear: bool
    only: str = ""
    before: Cursor | None = None
    rows: int = ROWS

    def page(self, rows: QuerySet[Any, Any], *, rank: int, moment: str = "at") -> Iterable[Any]:
        """The newest rows of a source that come after the page before, one more than a page."""
        if self.before is not None:
            older = Q(**{f"{moment}__lt": self.before.at})
            if rank < self.before.rank:
                older = Q(**{f"{moment}__lte": self.before.at})
            elif rank == self.before.rank:
                older |= Q(**{moment: self.before.at, "pk__lt": self.before.pk})
            rows = rows.filter(older)
        return rows.order_by(f"-{moment}", "-pk")[: self.rows + 1]

    def value(self, name: str, value: Any) -> str:
        """A customer field's value as this reader may see it."""
        return shown(value if self.clear else masked(name, value))

    def text(self, text: str) -> str:
        """A sentence that somebody wrote, perhaps another system, as this reader may see it."""
        return text if self.clear else redacted(text, vars(self.customer))


Source = Callable[[Asked], list[Event]]


def timeline(asked: Asked, sources: Sequence[Source]) -> tuple[list[Event], Cursor | None]:
    """One page, newest first, and where the older ones begin."""
    events = sorted(
        (event for source in sources for event in source(asked)),
        key=lambda event: (event.at, event.rank, event.pk),
        reverse=True,
    )
    page = events[: asked.rows]
    older = page[-1].cursor if len(events) > asked.rows else None
    entries: list[Event] = []
    for event in page:
        if entries and event.cause is not None and event.cause == entries[-1].cause:
            entries[-1].times += 1
        else:
            entries.append(event)
    return entries, older


# What the hub itself knows

CHANGES, NOTES, REVEALS = 30, 10, 5


def changes(asked: Asked) -> list[Event]:
    """Every version, with its author and message. A merge is told as such."""
    rows = CustomerChange.objects.filter(customer=asked.customer)
    if asked.only:
        by_people = Q(actor_kind=CustomerChange.Actor.USER)
        rows = rows.filter(by_people if asked.only == PEOPLE else ~by_people)
    found = list(asked.page(rows, rank=CHANGES))
    merges = _merges(asked.customer, [change.version for change in found])
    return [change_event(asked, change, merge=merges.get(change.version, "")) for change in found]


def change_event(asked: Asked, change: CustomerChange, *, merge: str = "") -> Event:
    """One version. `merge` tells, in words, of the merge that made it."""
    moved = [
        (label(name), asked.value(name, old), asked.value(name, new))
        for name, (old, new) in change.changes.items()
        if name not in ("archived_at", "merged_into")
    ]
    deed = "changed"
    if merge:
        deed = f"{merge}: changed" if moved else merge
    elif change.version == 1:
        deed = "created this customer:" if moved else "created this customer"
    elif pair := change.changes.get("archived_at"):
        deed = "archived this customer" if pair[1] else "restored this customer"
    elif "merged_into" in change.changes:
        deed = "moved this customer with the one that it is part of"
    by_system = change.actor_kind == CustomerChange.Actor.CONNECTION
    facts = [f"taken into the hub as version {change.version}" if by_system else f"version {change.version}"]
    # The hub's own words say of a merge what the deed says.
    message = "" if merge and change.message.startswith(("Merged: ", "Unmerged: ")) else change.message
    return Event(
        at=change.at,
        rank=CHANGES,
        pk=change.pk,
        author=change.actor_name,
        deed=deed,
        fields=moved,
        only_new=change.version == 1,
        message=asked.text(message),
        facts=[*facts, change.get_actor_kind_display()],
        request_id=change.request_id,
        icon="⇠" if by_system else "✎",
        sort="Taken over" if by_system else "Change",
    )


def _merges(customer: Customer, versions: Sequence[int]) -> dict[int, str]:
    """Versions of this customer that a merge or its undoing made, in words."""
    mine = Q(survivor=customer, survivor_version__in=versions) | Q(survivor=customer, undone_version__in=versions)
    rows = MergeRecord.objects.filter(mine | Q(loser=customer, loser_version__in=versions))
    told: dict[int, str] = {}
    names = ("survivor_id", "survivor_version", "loser_version", "undone_version", "survivor__name", "loser__name")
    for survivor_id, made, gone, undone, survivor, loser in rows.values_list(*names):
        if survivor_id == customer.pk:
            told[made] = f"merged {loser} into this customer"
            if undone:
                told[undone] = f"undid the merge with {loser}"
        else:
            told[gone] = f"merged this customer into {survivor}"
    return told


def notes(asked: Asked) -> list[Event]:
    """Notes, those of merged customers included."""
    if asked.only == SYSTEMS:
        return []
    of = Customer.objects.filter(Q(pk=asked.customer.pk) | Q(merged_into=asked.customer))
    rows = Note.objects.filter(customer__in=of.values("pk"))
    return [
        Event(
            at=note.at,
            rank=NOTES,
            pk=note.pk,
            author=note.author_name,
            deed="noted",
            message=asked.text(note.text),
            icon="✉",
            sort="Note",
        )
        for note in asked.page(rows, rank=NOTES)
    ]


def reveals(asked: Asked) -> list[Event]:
    """Who without the right to see personal data looked at this customer's."""
    if asked.only == SYSTEMS:
        return []
    return [
        Event(
            at=look.at,
            rank=REVEALS,
            pk=look.pk,
            author=look.user_name,
            deed="looked at the personal data",
            message=asked.text(look.reason),
            request_id=look.request_id,
            icon="◉",
            sort="Reveal",
        )
        for look in asked.page(Reveal.objects.filter(customer=asked.customer), rank=REVEALS)
    ]
