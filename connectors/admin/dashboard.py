"""The first page of the admin: what needs this person, how the systems are, and what is going on."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any

from django.contrib import admin
from django.core.cache import cache
from django.db.models import Count, F, Min, Sum
from django.db.models.functions import TruncHour
from django.http import HttpRequest
from django.urls import reverse
from django.utils.http import urlencode

from connectors.admin.badges import connection_badge, run_badge
from connectors.admin.needs import counted, kind_badge, may_settle, open_issues, told
from connectors.admin.overview import parked
from connectors.models import Connection, CustomerLink, Heartbeat, SyncRun
from connectors.sync import heartbeat
from connectors.sync.claim import due
from connectors.sync.clock import database_clock
from customers.admin.own import MOMENT
from customers.admin.person import organizations
from customers.forms import label
from customers.models import CustomerChange

KEPT_SECONDS = 30
DAYS, HOURS = 14, 24
CHANGES, RUNS, WORKERS = 8, 8, 20
# The chart, in its own units.
BAR, GAP, HEIGHT, TOP, FOOT = 34, 14, 140, 16, 20
TINY_BAR, TINY_HEIGHT = 4, 24

admin.site.index_template = "connectors/dashboard.html"


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """What is on its way to one system: how many, and since when the first that could go waits."""

    number: int = 0
    due: int = 0
    oldest_due: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The counters of some organizations, as they were at `at`.

    `hours` are pushes and errors by connection and hour: a push is an outcome "created" or "updated" of a push run, an
    error one that was refused, lost or has to be tried again. A run counts in the hour in which it began.
    """

    at: datetime
    connections: list[Connection]
    needs: dict[tuple[int, str], tuple[int, datetime]]
    issues: tuple[int, datetime | None]
    backlogs: dict[int, Backlog]
    hours: dict[int, dict[datetime, tuple[int, int]]]
    workers: list[Heartbeat] = field(default_factory=list)


def figures(organization_ids: Sequence[int]) -> Figures:
    """The counters of these organizations alone, at most KEPT_SECONDS old. At most eight statements."""
    ids = sorted(organization_ids)
    key = "dashboard/" + hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    found: Figures | None = cache.get(key)
    if found is None:
        found = _count(ids)
        cache.set(key, found, KEPT_SECONDS)
    return found


def _count(organization_ids: Sequence[int]) -> Figures:
    now = database_clock()
    rows = Connection.objects.filter(organization__in=organization_ids)
    connections = list(rows.select_related("organization").defer("credentials", "checkpoint", "options"))
    issues = open_issues(connections).aggregate(n=Count("pk"), at=Min("first_at"))
    return Figures(
        at=now,
        connections=connections,
        needs=counted(connections),
        issues=(issues["n"], issues["at"]),
        backlogs=_backlogs(connections, now=now),
        hours=_hours(organization_ids, now=now),
        workers=list(Heartbeat.objects.filter(seen_at__gt=now - timedelta(hours=1))[:WORKERS]),
    )


def _backlogs(connections: Sequence[Connection], *, now: datetime) -> dict[int, Backlog]:
    rows = (
        CustomerLink.objects.filter(
            connection__in=[connection.pk for connection in connections if connection.pushes],
            pushed_version__lt=F("needed_version"),
            next_attempt_at__isnull=False,
        )
        .order_by()
        .values_list("connection_id")
        .annotate(
            n=Count("pk"),
            ready=Count("pk", filter=due(now=now)),
            oldest=Min("next_attempt_at", filter=due(now=now)),
        )
    )
    return {pk: Backlog(number=n, due=ready, oldest_due=oldest) for pk, n, ready, oldest in rows}


def _hours(organization_ids: Sequence[int], *, now: datetime) -> dict[int, dict[datetime, tuple[int, int]]]:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    rows = (
        SyncRun.objects.filter(
            organization__in=organization_ids,
            created_at__gte=midnight - timedelta(days=DAYS - 1),
            kind=SyncRun.Kind.PUSH,
            connection__isnull=False,
        )
        .annotate(hour=TruncHour("created_at"))
        .order_by()
        .values_list("connection_id", "hour")
        .annotate(
            pushed=Sum(F("created") + F("updated")),
            errors=Sum(F("refused") + F("uncertain") + F("retrying")),
        )
    )
    found: dict[int, dict[datetime, tuple[int, int]]] = defaultdict(dict)
    for pk, hour, pushed, errors in rows:
        found[pk or 0][hour] = (pushed or 0, errors or 0)
    return dict(found)


def nobody_sends(known: Figures, *, now: datetime) -> int:
    """How many customers are due at systems in use while no worker has been seen for a minute; 0 if all is well."""
    if any(worker.seen_at > now - heartbeat.SILENT for worker in known.workers):
        return 0
    late = 0
    for connection in known.connections:
        backlog = known.backlogs.get(connection.pk)
        held = any(until and until > now for until in (connection.not_before, connection.breaker_until))
        if backlog and backlog.oldest_due and connection.state == Connection.State.ACTIVE and not held:
            late += backlog.due if backlog.oldest_due < now - heartbeat.SILENT else 0
    return late


# What the page shows


@dataclass(frozen=True, kw_only=True)
class Need:
    badge: str
    number: int
    oldest: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Day:
    """One day of the chart; positions and heights are in its units."""

    day: date
    pushed: int
    errors: int
    x: int
    y_pushed: int
    height_pushed: int
    y_errors: int
    height_errors: int

    @property
    def middle(self) -> int:
        return self.x + BAR // 2


@dataclass(frozen=True, kw_only=True)
class System:
    connection: Connection
    badge: str
    backlog: int
    share: int  # of the largest backlog, in percent
    waiting: str
    parked: int
    pushed: int
    errors: int
    bars: list[tuple[int, int, int, int, int]]  # x, then y and height of pushes and of errors


def dashboard(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """What the theme's `DASHBOARD_CALLBACK` adds to the first page."""
    own = organizations(request)
    user = request.user
    known = figures([organization.pk for organization in own])
    now = database_clock()
    kinds = may_settle(request)
    needs = _needs(kinds, known, now=now)
    sees_systems = user.has_perm("connectors.view_connection") or user.has_perm("connectors.change_connection")
    context |= {
        "title": "Customer Hub",
        "needs": needs,
        "needs_total": sum(need.number for need in needs),
        "needs_url": reverse("admin:connectors_customerlink_needs_you"),
        "several_organizations": len(own) > 1,
        "counted_at": known.at.strftime(MOMENT),
        "sees_systems": sees_systems,
    }
    if sees_systems:
        systems = _systems(known, now=now)
        days = _days(known)
        context |= {
            "late": nobody_sends(known, now=now),
            "systems": systems,
            "days": days,
            "pushed_total": sum(day.pushed for day in days),
            "errors_total": sum(day.errors for day in days),
            "most": max((day.pushed + day.errors for day in days), default=0),
            "chart_width": DAYS * (BAR + GAP) + GAP,
            "chart_height": TOP + HEIGHT + FOOT,
            "chart_floor": TOP + HEIGHT,
            "bar": BAR,
            "tiny_width": HOURS * (TINY_BAR + 1),
            "tiny_height": TINY_HEIGHT,
            "tiny_bar": TINY_BAR,
            "workers": [(worker, worker.seen_at > now - heartbeat.SILENT) for worker in known.workers],
        }
    ids = [organization.pk for organization in own]
    if user.has_perm("connectors.view_syncrun"):
        running = SyncRun.objects.filter(
            organization__in=ids, state__in=(SyncRun.State.QUEUED, SyncRun.State.RUNNING)
        ).select_related("connection")
        context["sees_runs"] = True
        context["running"] = [(run, run_badge(run)) for run in running.defer("problems").order_by("-id")[:RUNS]]
    if user.has_perm("customers.view_customerchange"):
        changes = CustomerChange.objects.filter(organization__in=ids).select_related("customer").order_by("-id")
        context["sees_changes"] = True
        context["changes"] = [(change, _deed(change)) for change in changes[:CHANGES]]
    return context


def _needs(kinds: Sequence[str], known: Figures, *, now: datetime) -> list[Need]:
    page = reverse("admin:connectors_customerlink_needs_you")
    needs = []
    for kind in kinds:
        number, oldest = told(kind, known.needs, known.connections, issues=known.issues)
        needs.append(
            Need(
                badge=kind_badge(kind),
                number=number,
                oldest=f"oldest {age(now - oldest)}" if oldest else "",
                url=f"{page}?{urlencode({'kind': kind})}",
            )
        )
    return needs


def age(span: timedelta) -> str:
    """How long something waits, in the largest unit that fits."""
    seconds = max(int(span.total_seconds()), 0)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _days(known: Figures) -> list[Day]:
    sums: dict[date, Counter[str]] = defaultdict(Counter)
    for hours in known.hours.values():
        for hour, (pushed, errors) in hours.items():
            sums[hour.date()].update(pushed=pushed, errors=errors)
    first = known.at.date() - timedelta(days=DAYS - 1)
    shown = [first + timedelta(days=n) for n in range(DAYS)]
    most = max((sums[day].total() for day in shown), default=0) or 1
    days = []
    for n, day in enumerate(shown):
        pushed, errors = sums[day]["pushed"], sums[day]["errors"]
        high, low = _high(pushed, most, HEIGHT), _high(errors, most, HEIGHT)
        days.append(
            Day(
                day=day,
                pushed=pushed,
                errors=errors,
                x=GAP + n * (BAR + GAP),
                y_pushed=TOP + HEIGHT - high,
                height_pushed=high,
                y_errors=TOP + HEIGHT - high - low,
                height_errors=low,
            )
        )
    return days


def _high(number: int, most: int, height: int) -> int:
    """How high a bar is. Something is never shown as nothing."""
    return max(number * height // most, 1 if number else 0)


def _systems(known: Figures, *, now: datetime) -> list[System]:
    largest = max((backlog.number for backlog in known.backlogs.values()), default=0) or 1
    this_hour = known.at.replace(minute=0, second=0, microsecond=0)
    hours = [this_hour - timedelta(hours=HOURS - 1 - n) for n in range(HOURS)]
    systems = []
    for connection in known.connections:
        backlog = known.backlogs.get(connection.pk, Backlog())
        of: Mapping[datetime, tuple[int, int]] = known.hours.get(connection.pk, {})
        last = [of.get(hour, (0, 0)) for hour in hours]
        waits = parked(known.needs, connection)
        systems.append(
            System(
                connection=connection,
                badge=connection_badge(connection, parked=waits, oldest_due=backlog.oldest_due, now=now),
                backlog=backlog.number,
                share=_high(backlog.number, largest, 100),
                waiting=f"first due {age(now - backlog.oldest_due)} ago" if backlog.oldest_due else "",
                parked=waits,
                pushed=sum(pushed for pushed, _ in last),
                errors=sum(errors for _, errors in last),
                bars=_bars(last),
            )
        )
    return systems


def _bars(last: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int, int]]:
    most = max(pushed + errors for pushed, errors in last) or 1
    bars = []
    for n, (pushed, errors) in enumerate(last):
        high, low = _high(pushed, most, TINY_HEIGHT - 1), _high(errors, most, TINY_HEIGHT - 1)
        bars.append((n * (TINY_BAR + 1), TINY_HEIGHT - high, high, TINY_HEIGHT - high - low, low))
    return bars


def _deed(change: CustomerChange) -> str:
    """What was done, without values: these may be personal."""
    if change.version == 1:
        return "created"
    if archived := change.changes.get("archived_at"):
        return "archived" if archived[1] else "restored"
    return "changed " + ", ".join(label(name) for name in change.changes)
