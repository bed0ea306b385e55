"""One vocabulary of states: the word, the icon and whose turn it is, for admin, API and commands alike."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from django.db import models


class LinkState(models.TextChoices):
    """What a link is stored as. Whether it waits, is being sent or is in sync follows from its versions and lease."""

    OPEN = "open", "Open"
    RETRYING = "retrying", "Retrying"
    REJECTED = "rejected", "Rejected"
    UNCERTAIN = "uncertain", "Checking"
    CONFLICT = "conflict", "Conflict"
    REMOTE_DELETED = "remote_deleted", "Gone there"
    PAUSED = "paused", "Paused"


# States that wait for a person: no worker touches such a link.
PARKED = (
    LinkState.REJECTED,
    LinkState.UNCERTAIN,
    LinkState.CONFLICT,
    LinkState.REMOTE_DELETED,
    LinkState.PAUSED,
)


# What a person or a rule has to settle first. A rejected link is not among them: a change of the customer releases it.
WAITING = tuple(state for state in PARKED if state != LinkState.REJECTED)


@dataclass(frozen=True)
class Status:
    """How a link is shown. `turn` is "nobody", "you" or "connection owner"; `tone` colours beside icon and word."""

    key: str
    word: str
    icon: str
    turn: str
    tone: str
    sentence: str


STATUSES = {
    status.key: status
    for status in (
        Status("in_sync", "In sync", "✓", "nobody", "success", "Same as in {system} since {time}."),
        Status("waiting", "Waiting", "●", "nobody", "info", "Goes out within seconds."),
        Status("sending", "Sending", "⟳", "nobody", "info", "Being sent now."),
        Status("rate_limited", "Rate-limited", "⏳", "nobody", "warning", "{system} asked us to wait until {wait}."),
        Status("retrying", "Retrying", "↻", "nobody", "warning", "Next try at {next}. Last answer: {error}"),
        Status("rejected", "Rejected", "✕", "you", "danger", "{system} refuses {field}: {error}"),
        Status(
            "checking",
            "Checking",
            "?",
            "nobody",
            "warning",
            "It is not known whether {system} created the record. Checking until {next}.",
        ),
        Status("uncertain", "Checking", "?", "you", "warning", "It is not known whether {system} stored it. {error}"),
        Status("conflict", "Conflict", "⇄", "you", "warning", "Changed on both sides: {field}."),
        Status("remote_deleted", "Gone there", "⌫", "you", "danger", "Deleted in {system}."),
        Status("duplicate", "Duplicate there", "⧉", "you", "warning", "A second record in {system}."),
        Status("paused", "Paused", "‖", "you", "base", "Paused: {error}"),
        Status("reconnect", "Reconnect", "⚠", "connection owner", "danger", "{system} cannot be used: {error}"),
        Status("calls_us", "Reads from us", "⇠", "nobody", "base", "{system} reads this customer from the hub."),
        Status("not_linked", "Not linked", "–", "nobody", "base", "Not in {system}."),
    )
}


@dataclass(frozen=True)
class Health:
    """How a connection, or a run, is shown. `sentence` may name {reason}, {wait} and {parked}."""

    key: str
    word: str
    icon: str
    tone: str
    sentence: str = ""


HEALTH = {
    health.key: health
    for health in (
        Health("healthy", "Healthy", "✓", "success", "Customers go out and come in."),
        Health("degraded", "Degraded", "◐", "warning", "It works, but {parked}."),
        Health("rate_limited", "Rate-limited", "⏳", "warning", "It asked us to wait until {wait}."),
        Health("failing", "Failing", "✕", "danger", "It does not answer as it should. The next try is at {wait}."),
        Health("needs_login", "Needs login", "⚠", "danger", "The login has ended: {reason}"),
        Health("paused", "Paused", "‖", "base", "Paused: {reason}"),
        Health("calls_us", "Calls us", "⇠", "base", "It reads and writes customers through the hub's API."),
    )
}

RUN_STATUSES = {
    status.key: status
    for status in (
        Health("queued", "Queued", "●", "info"),
        Health("running", "Running", "⟳", "info"),
        Health("succeeded", "Succeeded", "✓", "success"),
        Health("partly_succeeded", "Partly succeeded", "◐", "warning"),
        Health("failed", "Failed", "✕", "danger"),
        Health("cancelled", "Cancelled", "–", "base"),
    )
}

# A customer that waits longer than this to be sent makes its connection degraded.
LATE = timedelta(hours=1)


class _Connection(Protocol):
    state: str
    state_reason: str
    direction: str
    not_before: datetime | None
    breaker_trips: int
    breaker_until: datetime | None


def health_key(connection: _Connection, *, parked: int = 0, oldest_due: datetime | None = None, now: datetime) -> str:
    """The key in HEALTH. `parked`: links there that wait for a person; `oldest_due`: since when one is due."""
    if connection.state == "needs_reauth":
        return "needs_login"
    if connection.state == "paused":
        return "paused"
    if connection.direction == "calls_us":
        return "calls_us"
    if connection.breaker_trips and connection.breaker_until is not None:
        return "failing"
    if connection.not_before is not None and connection.not_before > now:
        return "rate_limited"
    if parked or (oldest_due is not None and oldest_due < now - LATE):
        return "degraded"
    return "healthy"


def health_sentence(
    connection: _Connection, *, parked: int = 0, oldest_due: datetime | None = None, now: datetime
) -> str:
    key = health_key(connection, parked=parked, oldest_due=oldest_due, now=now)
    wait = connection.breaker_until if key == "failing" else connection.not_before
    told = [f"{parked} customers wait for a person"] if parked else []
    if oldest_due is not None and oldest_due < now - LATE:
        told.append(f"the first has waited since {oldest_due:%Y-%m-%d %H:%M} UTC")
    return HEALTH[key].sentence.format(
        reason=connection.state_reason or "no reason is given",
        wait=f"{wait:%Y-%m-%d %H:%M:%S} UTC" if wait else "later",
        parked=" and ".join(told),
    )
