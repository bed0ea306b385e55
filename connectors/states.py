"""One vocabulary of states: the word, the icon and whose turn it is, for admin, API and commands alike."""

from dataclasses import dataclass

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
