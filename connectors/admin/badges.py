"""States as staff see them: an icon and a word, never colour alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from django.db.models import Case, CharField, F, Q, Value, When
from django.utils.html import format_html, format_html_join

from connectors.models import Connection, SyncRun
from connectors.states import HEALTH, PARKED, RUN_STATUSES, STATUSES, LinkState, health_key, health_sentence
from customers.privacy import redacted


def badge(icon: str, word: str, tone: str, *, title: str = "") -> str:
    return format_html(
        '<span class="hub-badge hub-{}" title="{}"><span aria-hidden="true">{}</span> {}</span>',
        tone,
        title or word,
        icon,
        word,
    )


def link_badge(key: str) -> str:
    status = STATUSES[key]
    return badge(status.icon, status.word, status.tone)


def run_badge(run: SyncRun) -> str:
    # Lists show the title to everybody; the page of the run says it in full to who may read it.
    status = RUN_STATUSES[run.state]
    return badge(status.icon, status.word, status.tone, title=redacted(run.error))


def connection_badge(
    connection: Connection, *, parked: int = 0, oldest_due: datetime | None = None, now: datetime
) -> str:
    """Healthy, Degraded and so on, with the sentence for the pointer."""
    health = HEALTH[health_key(connection, parked=parked, oldest_due=oldest_due, now=now)]
    sentence = health_sentence(connection, parked=parked, oldest_due=oldest_due, now=now)
    return badge(health.icon, health.word, health.tone, title=sentence)


def summary(counts: Mapping[str, int]) -> str:
    """Counts of links by status, such as ✓3 ✕1; the word is there for the pointer and for screen readers."""
    if not any(counts.values()):
        return link_badge("not_linked")
    return format_html_join(
        " ",
        '<span class="hub-badge hub-{}" title="{} {}"><span aria-hidden="true">{}{}</span>'
        '<span class="hub-unseen">{} {}</span></span>',
        (
            (status.tone, counts[key], status.word, status.icon, counts[key], counts[key], status.word)
            for key, status in STATUSES.items()
            if counts.get(key)
        ),
    )


def status_column(*, now: datetime) -> Case:
    """`CustomerLink.status_key` as a column. A test holds the two together."""
    conditions: Iterable[When] = (
        When(is_duplicate=True, then=Value("duplicate")),
        When(deleted_at__isnull=False, then=Value("remote_deleted")),
        When(connection__direction=Connection.Direction.CALLS_US, then=Value("calls_us")),
        When(connection__state=Connection.State.NEEDS_REAUTH, then=Value("reconnect")),
        When(connection__state=Connection.State.PAUSED, then=Value("paused")),
        When(state=LinkState.UNCERTAIN, next_attempt_at__isnull=False, then=Value("checking")),
        When(state__in=PARKED, then=F("state")),
        When(~Q(conflicts={}), pushed_version__gte=F("needed_version"), then=Value("conflict")),
        When(pushed_version__gte=F("needed_version"), then=Value("in_sync")),
        When(lease_until__gt=now, then=Value("sending")),
        When(connection__not_before__gt=now, then=Value("rate_limited")),
        When(state=LinkState.RETRYING, then=Value("retrying")),
    )
    return Case(*conditions, default=Value("waiting"), output_field=CharField())
