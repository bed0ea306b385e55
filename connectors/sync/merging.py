"""What a merge of two customers means for their links, and its undoing: a few statements, whatever the number of links.

Of two links in one connection the one leads that knows more of the record there; the survivor's in a tie. The other
one stays as a duplicate: never pushed, but a create of it that may have been sent is still looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Any
from uuid import UUID

from django.db import connection as database

from connectors.models import Connection, CustomerLink, PushIntent
from connectors.states import WAITING, LinkState
from connectors.sync import runs
from customers import bulk
from customers.editing import Changed

NOTES = "connectors"
COLUMNS = (
    "customer",
    "original_customer",
    "is_primary",
    "is_duplicate",
    "pushed_version",
    "needed_version",
    "state",
    "attempts",
    "failing_since",
    "fingerprint",
    "crashes",
    "next_attempt_at",
    "lease_token",
    "lease_until",
    "updated_at",
)
# Who a link belongs to and what it is there: what an unmerge restores, by the link's uid.
Roles = Mapping[str, Any]


class _Known(IntEnum):
    """How much a link knows of a record at the system, least first."""

    GONE = 0
    NOTHING = 1
    PERHAPS = 2  # a create may have been sent
    RECORD = 3


def move_links(*, changes: Sequence[Changed], at: datetime) -> None:
    """Move the links of customers that have just been merged or come back. Call it in the transaction of the change,
    with the customers locked.
    """
    versions = {change.customer_id: change.version for change in changes}
    for change in changes:
        if change.merged_into is not None:
            pair = _Pair(change.merged_into, change.customer_id, versions, at)
            change.notes[NOTES] = pair.merge()
        elif change.unmerged_from is not None:
            pair = _Pair(change.unmerged_from, change.customer_id, versions, at)
            pair.unmerge(change.notes.get(NOTES, {}))


class _Pair:
    """Survivor and loser, with the links of both, locked."""

    def __init__(self, survivor: UUID, loser: UUID, versions: Mapping[UUID, int], at: datetime) -> None:
        self.survivor, self.loser, self.versions = survivor, loser, versions
        self.now = at
        # In the order in which a push locks them, so that the two never wait for each other in a circle.
        of = ("self",) if database.features.has_select_for_update_of else ()
        rows = CustomerLink.objects.filter(customer__in=(survivor, loser)).order_by("pk")
        self.links = list(rows.select_for_update(of=of).select_related("connection"))
        # Asked for now that they are locked: a worker writes lease and intent in one transaction.
        creates = PushIntent.objects.filter(
            link__in=[link.pk for link in self.links],
            kind=PushIntent.Kind.CREATE,
            outcome__in=(PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN),
        )
        asked = set(creates.values_list("link_id", flat=True))
        self.unresolved = {link.uid for link in self.links if link.remote_id is None and link.pk in asked}
        self.before: dict[str, Roles] = {str(link.uid): _roles(link) for link in self.links}

    def merge(self) -> dict[str, Any]:
        """The loser's links become the survivor's. Returns what undoing it needs."""
        dropped: list[CustomerLink] = []
        for here, there in self._both_linked():
            other = there if self._known(here) >= self._known(there) else here
            # A row that says no more than that the customer is wanted there; an old id still guards against old lists.
            if self._known(other) is _Known.NOTHING and not other.former_remote_id:
                dropped.append(other)
            else:
                other.is_duplicate = True
        kept = [link for link in self.links if link not in dropped]
        leading = self._leading_after_merge(kept)
        for link in kept:
            if link.customer_id == self.loser:
                # Of a link that has moved before, it stays known whose it was at first.
                link.original_customer_id = link.original_customer_id or self.loser
                link.customer_id = self.survivor
            link.is_primary = link is leading
        self._store(kept, dropped=dropped)
        return {"links": self.before, "dropped": [_remembered(link) for link in dropped]}

    def _both_linked(self) -> list[tuple[CustomerLink, CustomerLink]]:
        """The survivor's link and the loser's in each connection where both have one; duplicates are none."""
        mine, theirs = (
            {link.connection_id: link for link in self.links if link.customer_id == one and not link.is_duplicate}
            for one in (self.survivor, self.loser)
        )
        return [(mine[pk], theirs[pk]) for pk in mine.keys() & theirs.keys()]

    def _known(self, link: CustomerLink) -> _Known:
        if link.deleted_at is not None:
            return _Known.GONE
        if link.remote_id is not None:
            return _Known.RECORD
        return _Known.PERHAPS if link.uid in self.unresolved else _Known.NOTHING

    def _leading_after_merge(self, kept: Sequence[CustomerLink]) -> CustomerLink | None:
        """The survivor's leading link, else the loser's; where that gave way to the other one, the other."""
        for customer in (self.survivor, self.loser):
            was = next((link for link in self.links if link.is_primary and link.customer_id == customer), None)
            if was is not None:
                stands = was in kept and was.is_duplicate == self.before[str(was.uid)]["is_duplicate"]
                return was if stands else next((one for one in _leads(kept, was.connection_id)), None)
        return None

    def unmerge(self, notes: Mapping[str, Any]) -> None:
        """The links that came with the loser go back, and all get the roles back that they had, as far as what has
        happened since allows.
        """
        then: Mapping[str, Roles] = notes.get("links", {})
        home = [link for link in self.links if self._came_along(link, then)]
        stay = [link for link in self.links if link not in home]
        leading_left = any(link.is_primary and link.customer_id == self.survivor for link in home)
        for link in home:
            original = then.get(str(link.uid), {}).get("original_customer")
            link.customer_id = self.loser
            link.original_customer_id = UUID(original) if original else None
        for owner, links in ((self.loser, home), (self.survivor, stay)):
            for connection_id in {link.connection_id for link in links}:
                group = [link for link in links if link.connection_id == connection_id]
                lead = self._lead_after_unmerge(group, then, owner)
                for link in group:
                    link.is_duplicate = link is not lead
        made = self._made_again(notes.get("dropped", ()), home, stay)
        for owner, links in ((self.loser, home), (self.survivor, stay)):
            if owner == self.loser or leading_left:
                _restore_leading([*links, *(link for link in made if link.customer_id == owner)], then, owner)
        self._store([*home, *stay], made=made)

    def _came_along(self, link: CustomerLink, then: Mapping[str, Roles]) -> bool:
        if (roles := then.get(str(link.uid))) is not None:
            return bool(roles["customer"] == str(self.loser))
        return self.loser in (link.customer_id, link.original_customer_id)

    def _lead_after_unmerge(
        self, group: Sequence[CustomerLink], then: Mapping[str, Roles], owner: UUID
    ) -> CustomerLink | None:
        """Which link of one customer in one connection leads, now that the other customer's are gone from it.

        What led before the merge; but what somebody made lead since stays so, where it stays. Where nothing of that is
        left, a link that came with a later merge.
        """
        led = next((link for link in group if _had(then, link, owner, is_duplicate=False)), None)
        leads = next((link for link in group if not link.is_duplicate), None)
        if owner == self.loser:
            return led or leads
        newcomers = [link for link in group if str(link.uid) not in then]
        return leads or led or max(newcomers, key=self._known, default=None)

    def _made_again(
        self, dropped: Iterable[Mapping[str, Any]], home: Sequence[CustomerLink], stay: Sequence[CustomerLink]
    ) -> list[CustomerLink]:
        """The rows that the merge dropped, where their customer is again without a link."""
        rows = {int(row["connection"]): row for row in dropped}
        if not rows:
            return []
        made = []
        for connection in Connection.objects.filter(pk__in=rows):
            row = rows[connection.pk]
            owner = UUID(row["customer"])
            if not _leads(home if owner == self.loser else stay, connection.pk):
                made.append(
                    CustomerLink(
                        uid=UUID(row["uid"]),
                        customer_id=owner,
                        original_customer_id=UUID(row["original_customer"]) if row["original_customer"] else None,
                        connection=connection,
                        epoch=row["epoch"],
                        is_active=row["is_active"],
                        created_at=datetime.fromisoformat(row["created_at"]),
                    )
                )
        return made

    def _store(
        self,
        links: Sequence[CustomerLink],
        *,
        dropped: Sequence[CustomerLink] = (),
        made: Sequence[CustomerLink] = (),
    ) -> None:
        """Write the links. No statement may meet two links where the constraints allow one."""
        changed = [link for link in links if self.before[str(link.uid)] != _roles(link)]
        moved = [link for link in changed if self.before[str(link.uid)]["customer"] != str(link.customer_id)]
        for link in (*links, *made):
            # Whoever holds one of them read the other customer: its answer comes too late.
            link.lease_token, link.lease_until, link.updated_at = "", None, self.now
            if link in made or link in moved or self.before[str(link.uid)]["is_duplicate"] != link.is_duplicate:
                self._wake(link)
        silent = [link for link in changed if link.is_duplicate and link.uid not in self.unresolved]
        if ended := [link.pk for link in (*silent, *dropped)]:
            runs.release(links=CustomerLink.objects.filter(pk__in=ended), at=self.now)
        if dropped:
            CustomerLink.objects.filter(pk__in=[link.pk for link in dropped]).delete()
        if moved:
            # Their versions were counted by the other customer: an answer to them proves nothing of this one's.
            PushIntent.objects.filter(
                link__in=moved, outcome__in=(PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
            ).update(version=0)
        if changed:
            # Out of the way first: each row then takes its place among rows that claim none.
            rows = CustomerLink.objects.filter(pk__in=[link.pk for link in changed])
            rows.update(is_primary=False, is_duplicate=True)
        bulk.update(links, COLUMNS)
        bulk.insert(made)

    def _wake(self, link: CustomerLink) -> None:
        """What a link in a new place has to do: be compared and pushed, be looked for, or nothing."""
        version = self.versions[link.customer_id]
        unresolved = link.uid in self.unresolved and link.deleted_at is None
        pushed = link.connection.pushes and link.deleted_at is None and not link.is_duplicate
        if not unresolved and not pushed:
            link.pushed_version = link.needed_version = version
            link.next_attempt_at = None
            return
        # The bases, not the versions, say what has to be sent.
        link.pushed_version, link.needed_version = 0, version
        if unresolved and (link.is_duplicate or link.state != LinkState.PAUSED):
            link.state, link.next_attempt_at = LinkState.UNCERTAIN, self.now
        elif link.state not in WAITING:
            link.state = LinkState.OPEN
            link.attempts, link.failing_since, link.fingerprint, link.crashes = 0, None, "", 0
            link.next_attempt_at = max(self.now, link.hold_until or self.now)


def _roles(link: CustomerLink) -> Roles:
    return {
        "customer": str(link.customer_id),
        "original_customer": str(link.original_customer_id) if link.original_customer_id else None,
        "is_primary": link.is_primary,
        "is_duplicate": link.is_duplicate,
    }


def _remembered(link: CustomerLink) -> dict[str, Any]:
    return {
        **_roles(link),
        "uid": str(link.uid),
        "connection": link.connection_id,
        "epoch": link.epoch,
        "is_active": link.is_active,
        "created_at": link.created_at.isoformat(),
    }


def _leads(links: Iterable[CustomerLink], connection_id: int) -> list[CustomerLink]:
    return [link for link in links if link.connection_id == connection_id and not link.is_duplicate]


def _had(then: Mapping[str, Roles], link: CustomerLink, owner: UUID, **role: bool) -> bool:
    """Whether this link had this role with this customer before the merge."""
    roles = then.get(str(link.uid), {})
    return roles.items() >= {"customer": str(owner), **role}.items()


def _restore_leading(links: Sequence[CustomerLink], then: Mapping[str, Roles], owner: UUID) -> None:
    led = next((link for link in links if _had(then, link, owner, is_primary=True)), None)
    for link in links:
        link.is_primary = link is led
