"""Narrowing lists by connection and state, by conditions that indexes of the links serve at any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from datetime import datetime
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db.models import Exists, F, OuterRef, Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone

from connectors.admin.reasons import causes
from connectors.models import Conflict, Connection, CustomerLink
from connectors.states import STATUSES, LinkState
from customers.admin import COUNTED, narrowed, organizations
from customers.models import Customer
from customers.privacy import sees

REASONS_SHOWN = 10


def own_connections(request: HttpRequest) -> list[Connection]:
    """The connections of the person's own organizations, read once per request."""
    found: list[Connection] | None = getattr(request, "own_connections", None)
    if found is None:
        rows = Connection.objects.filter(organization__in=[own.pk for own in organizations(request)])
        found = list(rows.only("name", "organization", "direction", "state", "not_before"))
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
        return links.filter(Q(deleted_at__isnull=False) | Q(connection__in=active, state=LinkState.REMOTE_DELETED))
    links = links.filter(deleted_at=None)
    if key in ("calls_us", "reconnect"):
        return links.filter(connection__in=calls_us if key == "calls_us" else reauth)
    if key == "paused":
        return links.filter(Q(connection__in=paused) | Q(connection__in=active, state=LinkState.PAUSED))
    if key in ("checking", "uncertain"):
        held = links.filter(connection__in=active, state=LinkState.UNCERTAIN)
        return held.filter(next_attempt_at__isnull=key == "uncertain")
    if key == "rejected":
        return links.filter(connection__in=active, state=LinkState.REJECTED)
    moving = links.filter(connection__in=active, state__in=(LinkState.OPEN, LinkState.RETRYING))
    if key == "sending":
        return moving.filter(lease_until__gt=now)
    still = moving.filter(Q(lease_until=None) | Q(lease_until__lte=now))
    if key == "conflict":
        waiting = Conflict.objects.filter(
            connection__in=active, outcome=Conflict.Outcome.WAITING, resolved_at=None
        ).values("link")
        clean = still.filter(~Q(conflicts={}), pk__in=waiting, pushed_version__gte=F("needed_version"))
        # Read first: beside a subquery, OR would keep the databases from using an index for either part.
        ids = list(clean.order_by("-pk").values_list("pk", flat=True)[: COUNTED + 1])
        return links.filter(Q(connection__in=active, state=LinkState.CONFLICT) | Q(pk__in=ids))
    if key == "in_sync":
        return still.filter(pushed_version__gte=F("needed_version"), conflicts={})
    # A link that waits to be sent is due at some time: that is what its index holds.
    dirty = still.filter(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False)
    if key == "rate_limited":
        return dirty.filter(connection__in=limited)
    retrying = Q(state=LinkState.RETRYING)
    return dirty.filter(retrying if key == "retrying" else ~retrying, connection__in=free)


def with_links(
    request: HttpRequest, customers: QuerySet[Customer], links: QuerySet[CustomerLink]
) -> QuerySet[Customer]:
    """The customers who have one of these links. A search narrows enough by itself."""
    searching = bool(request.GET.get(SEARCH_VAR))
    few = customers if searching else narrowed(customers, links.values_list("customer_id", flat=True))
    return few.filter(Exists(links.filter(customer=OuterRef("pk"))))


class SystemFilter(admin.SimpleListFilter):
    """Together with the state: customers with a link in this state in this system."""

    title = "system"
    parameter_name = "system"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        own = {organization.pk: organization.name for organization in organizations(request)}
        several = len(own) > 1
        return [
            (str(one.pk), f"{one.name} ({own[one.organization_id]})" if several else one.name)
            for one in own_connections(request)
        ]

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
            return queryset.filter(~Exists(there.filter(customer=OuterRef("pk"))))
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
