"""What the engine does with one link at a time, and what came of it."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from connectors.exceptions import ConnectorError, Rejected, RetryLater
from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.provider import Capabilities, Outgoing, Provider, Record
from connectors.states import LinkState

CREATED, UPDATED, UNCHANGED = "created", "updated", "unchanged"
REFUSED, RETRYING, UNCERTAIN, SKIPPED = "refused", "retrying", "uncertain", "skipped"


class Step(Enum):
    """One call. A link may take several in one go: read, update, and so on."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    READ = "read"  # before an update where the provider knows no conditions, and after a refused one
    FILL = "read what was stored"  # after a write whose answer did not show it
    LOOK_UP = "look up"  # after a create whose answer was lost
    PROBE = "probe"  # after a 404: is the record gone, or the permission?


def our_fault(error: ConnectorError) -> bool:
    """Whether the hub or its connector failed. A system's own words are none of ours, even if it says "internal"."""
    return error.code == "internal" and error.status is None


class NotSent(RetryLater):
    """The call was not begun. Costs no attempt."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a look-up brought, oldest first."""

    records: list[Record]


Result = Record | Found | None | ConnectorError


@dataclass(kw_only=True)
class Sending:
    """One link on its way: the call, what is sent of which version, and what came back.

    `existing` is the record that a look-up is about, when its id is known. `seq` is the link's `sync_seq` when a read
    began: if it has moved by the time of the answer, the answer is old. `ends` is when the call's time is up.
    """

    link: CustomerLink
    step: Step
    outgoing: Outgoing
    intent: PushIntent | None = None
    existing: str = ""
    seq: int = 0
    rounds: int = 0
    ends: datetime | None = None
    answer: Result = None

    @property
    def writes(self) -> bool:
        return self.step in (Step.CREATE, Step.UPDATE, Step.DELETE)

    def dead_by(self, *, now: datetime, life: float) -> datetime:
        """From when on a sending that was lost by `now` can no longer be applied: `life` seconds after its time-out.

        That it was lost early, by a reset say, tells nothing of how long the system may still be at it.
        """
        return max(now, self.ends or now) + timedelta(seconds=life)


@dataclass(kw_only=True)
class Settled:
    """One link that needs no call: nothing to send, refused before sending, or still held until `again`."""

    link: CustomerLink
    outcome: str
    error: Rejected | None = None
    again: datetime | None = None
    state: LinkState | None = None


@dataclass(kw_only=True)
class Slice:
    """One go of pushing at one connection. `own` is the run for changes that no run asked for, made when needed."""

    connection: Connection
    provider: Provider
    clock: Callable[[], datetime]
    rng: random.Random
    sleep: Callable[[float], None] = time.sleep
    stop: Callable[[], bool] = lambda: False
    until: datetime | None = None
    totals: Counter[str] = field(default_factory=Counter)
    own: SyncRun | None = None
    account_answers: bool = False  # a probe has shown that the credentials still reach the account

    @property
    def capabilities(self) -> Capabilities:
        return self.provider.capabilities(self.connection)
