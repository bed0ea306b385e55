"""Narrowing lists by connection and state, by conditions that indexes of the links serve at any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from datetime import datetime
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db.models import Case, Exists, F, IntegerField, OuterRef, Q, QuerySet, Subquery, When
from django.http import HttpRequest
from django.utils import timezone

from connectors.admin.reasons import causes
from connectors.models import IS_PARKED, Conflict, Connection, CustomerLink
from connectors.states import STATUSES, LinkState
from customers.admin.filters import narrowed, newest, offered
from customers.admin.paging import COUNTED, MoreThan
from customers.admin.person import organizations
from customers.models import Customer
from customers.privacy import sees

REASONS_SHOWN = 10


def own_connections(request: HttpRequest) -> list[Connection]:
    """The connections of the person's own organizations, with these, read once per request."""
    found: list[Connection] | None = getattr(request, "own_connections", None)
    if found is None:
        own = {organization.pk: organization for organization in organizations(request)}
        found = list(Connection.objects.filter(organization__in=own).defer("credentials", "checkpoint", "options"))
        for one in found:
            one.organization = own[one.organization_id]
        request.own_connections = found  # type: ignore[attr-defined] # kept where it belongs: on this request
    return found


def chosen_connections(request: HttpRequest, parameter: str) -> list[Connection]:
    """The one that the address names, or all; none where it names one that is not the person's own."""
    chosen = request.GET.get(parameter)
    return [one for one in own_connections(request) if not chosen or str(one.pk) == chosen]


def in_status(key: str, connections: Collection[Connection], *, now: datetime) -> QuerySet[CustomerLink]:
    """The links in these connections that `CustomerLink.status_key` calls `key`; a test holds the two together."""
    active, limited, calls_us, reauth, paused = [], [], [], [], []
    for connection in connections:
        if connection.calls_us:
            calls_us.append(connection.pk)
        elif connection.state == Connection.State.NEEDS_REAUTH:
            reauth.append(connection.pk)
        elif connection.state == Connection.State.PAUSED:
            paused.append(connection.pk)
        else:
            active.append(connection.pk)
            if connection.not_before is not None and connection.not_before > now:
                limited.append(connection.pk)
    free = [pk for pk in active if pk not in limited]
    links = CustomerLink.objects.filter(connection__in=[connection.pk for connection in connections])
    links = links.filter(is_duplicate=key == "duplicate")
    if key == "duplicate":
        return links
    if key == "remote_deleted":
        # The connections in each part: SQLite finds neither by its index else.
        buried = Q(connection__in=[connection.pk for connection in connections], deleted_at__isnull=False)
        return links.filter(buried | Q(IS_PARKED, connection__in=active, state=LinkState.REMOTE_DELETED))
    links = links.filter(deleted_at=None)
    if key in ("calls_us", "reconnect"):
        return links.filter(connection__in=calls_us if key == "calls_us" else reauth)
    if key == "paused":
        return links.filter(Q(connection__in=paused) | Q(IS_PARKED, connection__in=active, state=LinkState.PAUSED))
    if key in ("checking", "uncertain"):
        held = links.filter(IS_PARKED, connection__in=active, state=LinkState.UNCERTAIN)
        return held.filter(next_attempt_at__isnull=key == "uncertain")
    if key == "rejected":
        return links.filter(connection__in=active, state=LinkState.REJECTED)
    moving = links.filter(connection__in=active, state__in=(LinkState.OPEN, LinkState.RETRYING))
    if key == "conflict":
        # Read first: beside a subquery, OR would keep the databases from using an index for either part.
        ids = list(_clashing(moving, connection__in=active).order_by("-pk").values_list("pk", flat=True)[: COUNTED + 1])
        return links.filter(Q(IS_PARKED, connection__in=active, state=LinkState.CONFLICT) | Q(pk__in=ids))
    if key == "in_sync":
        return moving.filter(_IN_SYNC)
    # A link that waits to be sent, or is being sent, is due at some time: that is what its index holds.
    dirty = moving.filter(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False)
    if key == "sending":
        return dirty.filter(lease_until__gt=now)
    still = dirty.filter(Q(lease_until=None) | Q(lease_until__lte=now))
    if key == "rate_limited":
        return still.filter(connection__in=limited)
    retrying = Q(state=LinkState.RETRYING)
    return still.filter(retrying if key == "retrying" else ~retrying, connection__in=free)


_IN_SYNC = Q(pushed_version__gte=F("needed_version"), conflicts={})


def _clashing(links: QuerySet[CustomerLink], **where: Any) -> QuerySet[CustomerLink]:
    """Those of these that wait for nothing but a field that was changed on both sides, in the log `where` that says."""
    waiting = Conflict.objects.filter(outcome=Conflict.Outcome.WAITING, resolved_at=None, **where)
    clean = links.filter(~Q(conflicts={}), pushed_version__gte=F("needed_version"))
    return clean.filter(pk__in=waiting.values("link"))


class Counted(Subquery):
    """How many rows a query gives up to its limit, for each row of the query around it."""

    template = "(SELECT COUNT(*) FROM (%(subquery)s) AS counted)"
    output_field = IntegerField()
    empty_result_set_value = 0


# More than there are rows in any `Summed`.
_MANY = 1_000_000


class Summed(Subquery):
    """The sum of the column `one` over the rows that a query gives up to its limit."""

    template = "(SELECT COALESCE(SUM(counted.one), 0) FROM (%(subquery)s) AS counted)"
    output_field = IntegerField()
    empty_result_set_value = 0


def _state_of_all(connection: Connection) -> str | None:
    """What all links of a connection are in that is not in use; None of one that is."""
    if connection.calls_us:
        return "calls_us"
    states = {Connection.State.NEEDS_REAUTH: "reconnect", Connection.State.PAUSED: "paused"}
    return states.get(Connection.State(connection.state))


def counts_by_status(connections: Collection[Connection], *, now: datetime) -> dict[int, dict[str, int]]:
    """How many links of each connection are in which status, in one query that reads COUNTED links of each at most.

    What an index does not tell, such as how many of a large connection are in sync, is "more than" a lower number.
    """
    active = [one for one in connections if not one.calls_us and one.state == Connection.State.ACTIVE]
    own = CustomerLink.objects.filter(connection=OuterRef("pk")).order_by()
    alive = own.filter(is_duplicate=False, deleted_at=None)
    # In an order that only the index by connection has: else the whole table may be read for one that has no links.
    every = alive.order_by("updated_at")
    in_sync = Q(_IN_SYNC, state__in=(LinkState.OPEN, LinkState.RETRYING))
    moving = alive.filter(state__in=(LinkState.OPEN, LinkState.RETRYING))
    parts: dict[str, QuerySet[CustomerLink]] = {
        key: in_status(key, active, now=now).filter(connection=OuterRef("pk")).order_by()
        for key in ("waiting", "sending", "rate_limited", "retrying", "rejected", "checking", "uncertain")
    }
    parts |= {
        "duplicate": own.filter(is_duplicate=True),
        "buried": own.filter(is_duplicate=False, deleted_at__isnull=False),
        "gone": alive.filter(IS_PARKED, state=LinkState.REMOTE_DELETED),
        "paused": alive.filter(IS_PARKED, state=LinkState.PAUSED),
        "asked": alive.filter(IS_PARKED, state=LinkState.CONFLICT),
        "clashing": _clashing(moving, connection=OuterRef(OuterRef("pk"))),
    }
    numbers: dict[str, Subquery] = {key: Counted(rows.values("pk")[: COUNTED + 1]) for key, rows in parts.items()}
    # Those that are in sync and all of them in one number: either count reads the same links.
    weight = Case(When(in_sync, then=_MANY + 1), default=1)
    numbers["every"] = Summed(every.annotate(one=weight).values("one")[: COUNTED + 1])
    by_pk = {one.pk: one for one in connections}
    found: dict[int, dict[str, int]] = {}
    counted = (
        Connection.objects.filter(pk__in=[one.pk for one in connections])
        .order_by()
        .annotate(**{f"n_{key}": number for key, number in numbers.items()})
    )
    for row in counted.values("pk", *(f"n_{key}" for key in numbers)):
        counts = {key: row[f"n_{key}"] for key in numbers}
        in_sync_of_them, known = divmod(counts.pop("every"), _MANY)
        gone, asked = counts.pop("gone"), counts.pop("asked")
        counts["remote_deleted"] = counts.pop("buried")
        clashing = counts.pop("clashing")
        if (whole := _state_of_all(by_pk[row["pk"]])) is not None:
            kept = ("duplicate", "remote_deleted")
            counts = {**{key: counts[key] for key in kept}, whole: known}
        else:
            counts["remote_deleted"] += gone
            counts["conflict"] = asked + clashing
        counts = {key: MoreThan(COUNTED) if n > COUNTED else n for key, n in counts.items() if n}
        if whole is None and known > COUNTED and in_sync_of_them:
            counts["in_sync"] = MoreThan((in_sync_of_them - 1) // 1000 * 1000)
        elif whole is None and in_sync_of_them:
            counts["in_sync"] = in_sync_of_them
        found[row["pk"]] = {key: counts[key] for key in STATUSES if counts.get(key)}
    return found


def with_links(
    request: HttpRequest, customers: QuerySet[Customer], links: QuerySet[CustomerLink]
) -> QuerySet[Customer]:
    """The customers who have one of these links. A search narrows enough by itself."""
    searching = bool(request.GET.get(SEARCH_VAR))
    few = customers if searching else narrowed(request, customers, links.values_list("customer_id", flat=True))
    return few.filter(Exists(links.filter(customer=OuterRef("pk"))))


def connection_choices(request: HttpRequest) -> list[tuple[str, str]]:
    several = len(organizations(request)) > 1
    return [
        (str(one.pk), f"{one.name} ({one.organization.name})" if several else one.name)
        for one in own_connections(request)
    ]


class ConnectionFilter(admin.SimpleListFilter):
    title = "system"
    parameter_name = "connection"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return connection_choices(request)

    def queryset(self, request: HttpRequest, queryset):  # type: ignore[no-untyped-def] # any model with a connection
        return offered(self, queryset, "connection")


class SystemFilter(admin.SimpleListFilter):
    """Together with the state: customers with a link in this state in this system."""

    title = "system"
    parameter_name = "system"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return connection_choices(request)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        if self.value() and not request.GET.get(StateFilter.parameter_name):
            connections = [one.pk for one in chosen_connections(request, self.parameter_name)]
            return with_links(request, queryset, CustomerLink.objects.filter(connection__in=connections))
        return queryset


class StateFilter(admin.SimpleListFilter):
    title = "state there"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        # Two that have one word differ in whose turn it is.
        words = Counter(status.word for status in STATUSES.values())
        return [
            (one.key, f"{one.icon} {one.word}{f', turn: {one.turn}' if words[one.word] > 1 else ''}")
            for one in STATUSES.values()
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        if (state := self.value()) not in STATUSES:
            return queryset
        connections = chosen_connections(request, SystemFilter.parameter_name)
        if state == "not_linked":
            there = CustomerLink.objects.filter(connection__in=[one.pk for one in connections])
            return newest(request, queryset).filter(~Exists(there.filter(customer=OuterRef("pk"))))
        links = in_status(state, connections, now=timezone.now())
        if state == "rejected" and (reason := request.GET.get(ReasonFilter.parameter_name)):
            links = links.filter(fingerprint=reason)
        return with_links(request, queryset, links)


class ReasonFilter(admin.SimpleListFilter):
    """Why records are refused: offered where the list shows the rejected of one system."""

    title = "kind of error"
    parameter_name = "reason"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        chosen = request.GET.get(SystemFilter.parameter_name)
        if not chosen or request.GET.get(StateFilter.parameter_name) != "rejected":
            return []
        connections = chosen_connections(request, SystemFilter.parameter_name)
        rejected = in_status("rejected", connections, now=timezone.now()).exclude(fingerprint="")
        return [
            (one.fingerprint, f"{f'{one.field}: ' if one.field else ''}{one.text} ({one.number})")
            for one in causes(rejected, clear=sees(request.user), most=REASONS_SHOWN)
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        return queryset  # the state's filter asks for both of one link
