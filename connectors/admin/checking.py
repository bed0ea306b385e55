"""A dry run while somebody waits: what is here is compared with what is there, and nothing is sent."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from connectors.exceptions import ConnectorError
from connectors.models import Connection
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.sync.check import Check, Finding, Sample, check
from customers.forms import label, shown
from customers.models import Customer
from customers.privacy import masked, redacted

# So many customers, and so many seconds, are compared while somebody waits.
CHECKED, CHECK_SECONDS, CALL_SECONDS = 500, 20.0, 10.0
REFUSALS = 10

WORDS = {
    Finding.CREATE: ("+", "Would be created", "Not there yet."),
    Finding.UPDATE: ("→", "Would be updated", "Changed here."),
    Finding.SAME: ("✓", "Same", "Nothing would be sent."),
    Finding.REFUSED: ("✕", "Refused", "The connector would not send it, or the record cannot be read."),
    Finding.CONFLICT: ("⇄", "Conflict", "Changed on both sides."),
    Finding.CHANGED_THERE: ("←", "Changed there", "A pull would take it over."),
    Finding.GONE: ("⌫", "Gone there", "It is not there any more."),
    Finding.WAITING: ("●", "Waiting", "It is being sent, or waits for somebody."),
    Finding.UNKNOWN: ("?", "Not linked there", "A record that no customer is linked to."),
}


@dataclass(kw_only=True)
class Checked:
    """What to show of a check. `error` says why it ended early, or could not begin."""

    found: Check = field(default_factory=Check)
    error: str = ""
    all_of: int = 0

    @property
    def looked_at(self) -> int:
        return self.found.counts.total()


def may_check(user: Any) -> bool:
    return bool(user.has_perm("connectors.push_customerlink") or user.has_perm("connectors.pull_connection"))


def checked(connection: Connection, *, customer_ids: Sequence[UUID] | None = None) -> Checked:
    """Compare these customers, or all, as far as that goes in the time; `all_of` is how many there are."""
    ends = time.monotonic() + CHECK_SECONDS
    answer = Checked()
    if customer_ids is None:
        rows = Customer.objects.filter(organization=connection.organization_id, archived_at=None, merged_into=None)
        answer.all_of = rows.count()
    else:
        answer.all_of = len(customer_ids)
    chosen: Collection[UUID] | None = customer_ids[:CHECKED] if customer_ids is not None else None
    provider = PROVIDERS[connection.provider]
    try:
        session = provider.session(connection)
        session.deadline = CALL_SECONDS
        answer.found = check(
            connection=connection,
            provider=provider,
            session=session,
            customer_ids=chosen,
            limit=CHECKED if customer_ids is None and answer.all_of > CHECKED else None,
            stop=lambda: time.monotonic() >= ends,
        )
    except UnsealError as error:
        answer.error = f"The credentials cannot be read. {error}"
    except ConnectorError as error:
        answer.error = f"{connection} cannot be read now: {error.message}"
    return answer


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finding of a check as the page shows it. `samples`: customer, record id, [(field, here, there)], reason."""

    icon: str
    word: str
    meaning: str
    count: int
    samples: list[tuple[Customer | None, str, list[tuple[str, str, str]], str]]


def rows(found: Check, *, clear: bool) -> list[Row]:
    """The findings with their samples; personal values are masked for who does not see them."""
    return [
        Row(
            icon=icon,
            word=word,
            meaning=meaning,
            count=found.counts[finding],
            samples=[_sample(sample, clear=clear) for sample in found.samples.get(finding, ())],
        )
        for finding, (icon, word, meaning) in WORDS.items()
        if found.counts[finding]
    ]


def _sample(sample: Sample, *, clear: bool) -> tuple[Customer | None, str, list[tuple[str, str, str]], str]:
    reason = sample.reason
    if not clear:
        reason = redacted(reason, vars(sample.customer) if sample.customer else None)
    return sample.customer, sample.remote_id, differences(sample.fields, clear=clear), reason


def refusals(found: Check, *, clear: bool) -> list[tuple[str, int]]:
    """Why records would be refused, the most frequent first. Of a record that cannot be read, it is quoted why."""
    counted = found.refusals.most_common(REFUSALS)
    return [(text if clear else redacted(text), number) for (_, text), number in counted]


def differences(fields: Any, *, clear: bool) -> list[tuple[str, str, str]]:
    """`{field: [one, other]}` as a field's label and both values in words."""
    return [
        (label(name), shown(one if clear else masked(name, one)), shown(other if clear else masked(name, other)))
        for name, (one, other) in fields.items()
    ]
