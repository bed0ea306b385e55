"""What connected systems add to a customer's timeline: what they took or refused, and what both sides changed."""

from __future__ import annotations

from collections.abc import Sequence

from connectors.models import Conflict, PushIntent
from customers.forms import label
from customers.models import CustomerChange
from customers.timeline import PEOPLE, SYSTEMS, Asked, Event, Source, changes, notes, reveals

PUSHES, DECIDED, CONFLICTS = 40, 20, 15
THERE = {
    PushIntent.Kind.CREATE.value: "the new record",
    PushIntent.Kind.UPDATE.value: "the change",
    PushIntent.Kind.DELETE.value: "the deletion",
}


def pushes(asked: Asked) -> list[Event]:
    """What was sent and what was answered. Tries that failed alike, one after the other, are one entry."""
    if asked.only == PEOPLE:
        return []
    rows = PushIntent.objects.filter(link__customer=asked.customer).select_related("link__connection")
    rows = rows.only(
        *("kind", "version", "outcome", "sent_at", "status", "error", "remote_request_id", "remote_id", "link_id"),
        *("link__remote_id", "link__connection__name"),
    )
    return [_push(asked, one) for one in asked.page(rows, rank=PUSHES, moment="sent_at")]


def _push(asked: Asked, intent: PushIntent) -> Event:
    what, outcome = THERE[intent.kind], intent.outcome
    system = intent.link.connection.name
    refused = intent.status is not None and 400 <= intent.status < 500 and intent.status not in (408, 429)
    if outcome == PushIntent.Outcome.OK:
        named = (
            f" as {intent.link.remote_id}" if intent.kind == PushIntent.Kind.CREATE and intent.link.remote_id else ""
        )
        deed, icon = f"accepted {what} of version {intent.version}{named}", "✓"
    elif outcome == PushIntent.Outcome.FAILED:
        deed, icon = f"{'refused' if refused else 'did not take'} {what} of version {intent.version}", "✕"
    elif outcome == PushIntent.Outcome.UNCERTAIN:
        deed, icon = f"has not said whether it stored {what} of version {intent.version}", "?"
    else:
        deed, icon = f"is being sent {what} of version {intent.version}", "⟳"
    facts = []
    if intent.status:
        facts.append(f"HTTP {intent.status}")
    if intent.remote_request_id:
        facts.append(f"their request {intent.remote_request_id}")
    return Event(
        at=intent.sent_at,
        rank=PUSHES,
        pk=intent.pk,
        author=system,
        deed=deed,
        message=asked.text(intent.error) if outcome != PushIntent.Outcome.OK else "",
        facts=facts,
        icon=icon,
        sort="Push",
        cause=(intent.link_id, intent.kind, intent.version, intent.error) if outcome == "failed" else None,
    )


def conflicts(asked: Asked) -> list[Event]:
    """Fields that were changed on both sides. One that the system won is told by the change that took its value."""
    if asked.only == PEOPLE:
        return []
    rows = Conflict.objects.filter(link__customer=asked.customer).exclude(outcome=Conflict.Outcome.SYSTEM)
    told = {
        Conflict.Outcome.HUB: "the hub's value stayed",
        Conflict.Outcome.WAITING: "it waits for a person",
    }
    return [
        Event(
            at=one.at,
            rank=CONFLICTS,
            pk=one.pk,
            author=one.connection.name,
            deed=(
                f"and the hub both changed {label(one.field)}, which was {asked.value(one.field, one.base)}: "
                f"here {asked.value(one.field, one.here)}, there {asked.value(one.field, one.there)}; "
                f"{'it was decided later' if one.resolved_at else told[Conflict.Outcome(one.outcome)]}"
            ),
            icon="⇄",
            sort="Conflict",
        )
        for one in asked.page(rows.select_related("connection"), rank=CONFLICTS)
    ]


def decisions(asked: Asked) -> list[Event]:
    """Conflicts that a person ended. Where the system's value was taken, the change tells it."""
    if asked.only == SYSTEMS:
        return []
    rows = Conflict.objects.filter(link__customer=asked.customer, resolved_at__isnull=False).exclude(resolved_by="")
    decided = list(asked.page(rows.select_related("connection"), rank=DECIDED, moment="resolved_at"))
    if not decided:
        return []
    made = CustomerChange.objects.filter(customer=asked.customer, at__in=[one.resolved_at for one in decided])
    taken = {(at, name) for at, fields in made.values_list("at", "changes") for name in fields}
    return [
        Event(
            at=one.resolved_at,
            rank=DECIDED,
            pk=one.pk,
            author=one.resolved_by,
            deed=f"decided that {label(one.field)} stays {asked.value(one.field, one.here)}, not "
            f"{asked.value(one.field, one.there)} as in {one.connection.name}",
            icon="⇄",
            sort="Decision",
        )
        for one in decided
        if (one.resolved_at, one.field) not in taken
    ]


SOURCES: Sequence[Source] = (changes, notes, reveals, pushes, conflicts, decisions)
