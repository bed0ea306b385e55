"""What a person has to see to: one open issue per connection, kind and cause, however often it happens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from connectors.models import Connection, Issue
from connectors.sync.races import start_over
from customers import bulk

MESSAGE_LENGTH, FINGERPRINT_LENGTH = 500, 64


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One thing that went wrong. `fingerprint` is equal for one cause; "" where the kind is the cause."""

    kind: str
    message: str
    fingerprint: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cause(self) -> tuple[str, str]:
        return str(self.kind), _short(self.fingerprint)


def open_issue(
    *,
    connection: Connection,
    kind: str,
    fingerprint: str = "",
    message: str,
    details: Mapping[str, Any] | None = None,
    at: datetime,
) -> bool:
    """`open_issues` for one trouble. True when there was no open issue of this cause."""
    trouble = Trouble(kind=kind, fingerprint=fingerprint, message=message, details=details or {})
    return open_issues(connection=connection, troubles=[trouble], at=at) == 1


def open_issues(*, connection: Connection, troubles: Sequence[Trouble], at: datetime) -> int:
    """Open an issue for each cause, or count it on the open one, whose message and details become the latest.

    A constant number of statements. Returns how many issues were newly opened.
    """
    return start_over(partial(_open, connection, troubles, at)) if troubles else 0


def resolve(*, connection: Connection, kind: str, fingerprint: str | None = None, at: datetime) -> int:
    """Close the open issues of a kind, or the one with this fingerprint. Returns how many there were."""
    rows = Issue.objects.filter(connection=connection, kind=kind, resolved_at=None)
    if fingerprint is not None:
        rows = rows.filter(fingerprint=_short(fingerprint))
    return rows.update(resolved_at=at)


def _open(connection: Connection, troubles: Sequence[Trouble], at: datetime) -> int:
    causes = {trouble.cause for trouble in troubles}
    rows = Issue.objects.filter(
        connection=connection,
        resolved_at=None,
        kind__in={kind for kind, _ in causes},
        fingerprint__in={fingerprint for _, fingerprint in causes},
    )
    # In one order everywhere, so that two batches never wait for each other in a circle.
    opened = {(row.kind, row.fingerprint): row for row in rows.select_for_update().order_by("kind", "fingerprint")}
    known: dict[tuple[str, str], Issue] = {}
    new: dict[tuple[str, str], Issue] = {}
    for trouble in sorted(troubles, key=lambda trouble: trouble.cause):
        kind, fingerprint = cause = trouble.cause
        issue = opened.get(cause) or new.get(cause)
        if issue is None:
            issue = new[cause] = Issue(
                organization_id=connection.organization_id,
                connection=connection,
                kind=kind,
                fingerprint=fingerprint,
                count=0,
                first_at=at,
                last_at=at,
            )
        elif cause in opened:
            known[cause] = issue
        issue.count += 1
        issue.last_at = max(issue.last_at, at)
        issue.message = trouble.message[:MESSAGE_LENGTH]
        issue.details = dict(trouble.details)
    bulk.update(list(known.values()), ("count", "last_at", "message", "details"))
    bulk.insert(list(new.values()))
    return len(new)


def _short(fingerprint: str) -> str:
    """A fingerprint that fits its column; two long ones with one beginning stay two."""
    if len(fingerprint) <= FINGERPRINT_LENGTH:
        return fingerprint
    return hashlib.sha256(fingerprint.encode("utf-8", "surrogateescape")).hexdigest()[:FINGERPRINT_LENGTH]
