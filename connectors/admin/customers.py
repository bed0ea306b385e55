"""The customer screens with what each connected system knows, and the buttons that push."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Max, Prefetch, Q, QuerySet, prefetch_related_objects
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join

from connectors.admin import history
from connectors.admin.badges import link_badge, summary
from connectors.admin.bulk import BulkActions
from connectors.admin.compare import uid_of_mark
from connectors.admin.filters import ReasonFilter, StateFilter, SystemFilter, own_connections
from connectors.admin.linking import LinkAdmin
from connectors.admin.tables import Tables
from connectors.exceptions import ConnectionUnusable, RetryLater
from connectors.models import Connection, CustomerLink, PushIntent
from connectors.provider import Provider
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import STATUSES
from connectors.sync.deletes import goes_with_archive
from connectors.sync.merge import same
from connectors.sync.plan import changed_values
from connectors.sync.push import push
from connectors.sync.request import request as request_push
from customers.admin.customers import CustomerAdmin, shows_personal
from customers.admin.own import MOMENT
from customers.admin.person import actor_of, organizations
from customers.editing import EDITABLE, Actor
from customers.forms import label
from customers.ids import parse_public_id
from customers.models import Customer
from customers.privacy import redacted
from customers.timeline import Asked

# One button press waits this long for one answer, and about this long in all; the worker does what is left.
CALL_SECONDS = 10.0
PRESS_SECONDS = 20.0
LEVELS = {"success": messages.SUCCESS, "warning": messages.WARNING, "danger": messages.ERROR}
ASKS = ("conflict", "uncertain", "remote_deleted", "duplicate")
# What `CustomerLink.status_key` reads.
TOLD = (
    *("customer", "connection", "is_duplicate", "deleted_at", "state", "conflicts"),
    *("next_attempt_at", "lease_until", "pushed_version", "needed_version"),
)


def reads_one(provider: Provider, connection: Connection) -> bool:
    return provider.capabilities(connection).fetches


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field of which the system had another value when it was last seen, and why."""

    name: str
    there: Any
    why: str

    @property
    def title(self) -> str:
        return label(self.name)


@dataclass(kw_only=True)
class System:
    """One row of the table of systems on a customer's page."""

    connection: Connection
    link: CustomerLink | None
    key: str
    sentence: str
    waiting: str = ""
    differs: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # fields that it demands and that are empty

    @property
    def address(self) -> str:
        """Where people see the record in that system; "" when that is not known."""
        return self.connection.record_address(self.link.remote_id) if self.link and not self.link.deleted_at else ""

    @property
    def can_link(self) -> bool:
        provider = PROVIDERS.get(self.connection.provider)
        free = self.link is None or (not self.link.remote_id and self.key not in ASKS) or self.key == "remote_deleted"
        return bool(free and not self.connection.calls_us and provider and reads_one(provider, self.connection))

    @property
    def resolve(self) -> str:
        """The page on which a person decides what this link waits for; "" when it waits for nobody."""
        if self.link is None or self.key not in ASKS:
            return ""
        return reverse("admin:connectors_customerlink_resolve", args=[self.link.pk])

    @property
    def badge(self) -> str:
        return link_badge(self.key)

    @property
    def deletes(self) -> bool:
        """Whether the record there is deleted when the customer is archived."""
        return self.link is not None and goes_with_archive(self.link, PROVIDERS.get(self.connection.provider))

    @property
    def can_push(self) -> bool:
        return self.connection.pushes and not (self.link and (self.link.is_duplicate or self.link.deleted_at))


def systems_of(customer: Customer, *, now: datetime) -> list[System]:
    """Every connection of the customer's organization and what it knows of the customer, in two queries."""
    links: dict[int, list[CustomerLink]] = {}
    rows = CustomerLink.objects.filter(customer=customer).defer("remote_data", "tombstone")
    for link in rows.order_by("is_duplicate", "pk"):
        links.setdefault(link.connection_id, []).append(link)
    systems = []
    for connection in Connection.objects.filter(organization=customer.organization_id):
        known: Sequence[CustomerLink | None] = links.get(connection.pk) or [None]
        systems += [_system(customer, connection, link, now) for link in known]
    return systems


def _system(customer: Customer, connection: Connection, link: CustomerLink | None, now: datetime) -> System:
    provider = PROVIDERS.get(connection.provider)
    missing = provider.missing(customer) if provider and connection.pushes else []
    if link is None:
        sentence = STATUSES["not_linked"].sentence.format(system=connection.name)
        return System(connection=connection, link=None, key="not_linked", sentence=sentence, missing=missing)
    link.connection = connection
    waiting = ""
    changed = changed_values(link, customer, provider.fields) if provider else {}
    if connection.pushes and link.is_dirty and provider:
        waiting = "all fields" if not link.remote_id else ", ".join(label(name) for name in changed)
    return System(
        connection=connection,
        link=link,
        key=link.status_key(now=now),
        sentence=link.sentence(now=now),
        waiting=waiting,
        differs=_differences(link, customer, changed) if provider and link.deleted_at is None else [],
        missing=[] if link.is_duplicate or link.deleted_at else missing,
    )


def _differences(link: CustomerLink, customer: Customer, changed: Collection[str]) -> list[Difference]:
    """What the system had when it was last seen, where that is not what the hub has. Asks nobody."""
    found = []
    for name in EDITABLE:
        there = link.conflicts[name]["there"] if name in link.conflicts else link.base_remote.get(name, "")
        if (name not in link.base_remote and name not in link.conflicts) or same(there, getattr(customer, name)):
            continue
        if name in link.conflicts:
            why = "in conflict"
        elif name in changed:
            why = "the hub's value waits to be sent" if link.connection.pushes else "the hub does not send there"
        else:
            why = f"{link.connection.name} writes it so"
        found.append(Difference(name=name, there=there, why=why))
    return found


def hints(
    fields: Collection[str], systems: Sequence[System], *, told: Callable[[str, Any], str]
) -> dict[str, list[tuple[str, str, bool]]]:
    """What to say beside each field: (icon, words, whether it needs attention)."""
    said: dict[str, list[tuple[str, str, bool]]] = {}
    demanding: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    for system in systems:
        provider = PROVIDERS.get(system.connection.provider)
        if provider is None:
            continue
        name = system.connection.name
        if system.connection.pushes and not (system.link and (system.link.is_duplicate or system.link.deleted_at)):
            for needed, others in provider.required.items():
                if needed in system.missing:
                    lacking.setdefault(needed, []).append(name)
                elif not others and needed != "name":  # which the hub itself demands
                    demanding.setdefault(needed, []).append(name)
        for one in system.differs:
            icon = "⇄" if one.why == "in conflict" else "≠"
            said.setdefault(one.name, []).append((icon, f"{name}: {told(one.name, one.there)} ({one.why})", False))
    for needed, names in demanding.items():
        said.setdefault(needed, []).append(("", f"Needed by {', '.join(names)}.", False))
    for needed, names in lacking.items():
        text = f"Needed by {', '.join(names)}: the customer is not sent there while this is empty."
        said.setdefault(needed, []).append(("⚠", text, True))
    return {name: lines for name, lines in said.items() if name in fields}


def put_hints(form: Any, systems: Sequence[System], *, told: Callable[[str, Any], str]) -> None:
    """Show the hints under the inputs of a form."""
    for name, lines in hints(form.fields, systems, told=told).items():
        shown_lines = format_html_join(
            "",
            '<span class="hub-hint{}">{} {}</span>',
            ((" hub-hint-needed" if needed else "", icon, text) for icon, text, needed in lines),
        )
        help_text = form.fields[name].help_text
        form.fields[name].help_text = format_html("{}{}", help_text, shown_lines)


def push_now(
    *,
    customer: Customer,
    connections: Sequence[Connection],
    actor: Actor,
    marks: Mapping[int, UUID | None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Push one customer to these systems, one after the other, and say in words what came of each.

    `marks` are the marks that a preview showed, by connection: links that are made now carry them.
    """
    ends = time.monotonic() + PRESS_SECONDS
    for connection in connections:
        if customer.archived_at or customer.merged_into_id:
            yield messages.WARNING, f"{customer.name} is archived or merged: nothing was sent to {connection.name}."
        elif connection.state != Connection.State.ACTIVE:
            why = connection.state_reason or "no reason is given"
            yield (
                messages.ERROR,
                f"{connection.name} is out of use ({connection.get_state_display()}: {why}). Nothing was sent. "
                "Repair or resume the connection, then push again.",
            )
        else:
            mark = (marks or {}).get(connection.pk)
            yield _push_one(customer, connection, actor, mark, in_time=time.monotonic() < ends)


def _push_one(
    customer: Customer, connection: Connection, actor: Actor, mark: UUID | None, *, in_time: bool
) -> tuple[int, str]:
    uids = {customer.pk: mark} if mark else {}
    request_push(connection=connection, actor=actor, customer_ids=[customer.pk], urgent=True, uids=uids)
    if not in_time:
        return messages.INFO, f"The others took long: {connection.name} follows as soon as a worker is free."
    provider = PROVIDERS[connection.provider]
    outcome: Counter[str] = Counter()
    try:
        session = provider.session(connection, request_id=actor.request_id)
        session.deadline = CALL_SECONDS
        outcome = push(connection=connection, provider=provider, session=session, customer_ids=[customer.pk])
    except (ConnectionUnusable, RetryLater, UnsealError) as error:
        return (
            messages.ERROR,
            f"{connection.name} cannot be used: {error} {customer.name} waits until the connection is repaired.",
        )
    link = CustomerLink.objects.filter(connection=connection, customer=customer, is_duplicate=False).first()
    if link is None:
        return messages.ERROR, f"{customer.name} could not be linked to {connection.name}."
    link.connection = connection
    now = timezone.now()
    key = link.status_key(now=now)
    if key == "in_sync" and (outcome["created"] or outcome["updated"]):
        return (
            messages.SUCCESS,
            f"Sent. {connection.name} accepted version {link.pushed_version} as {link.remote_id or 'its record'}.",
        )
    if key == "in_sync":
        return messages.INFO, f"Already up to date, nothing was sent to {connection.name}."
    if key == "rate_limited" and connection.not_before is not None:
        return (
            messages.WARNING,
            f"{connection.name} asked to wait until {connection.not_before.strftime(MOMENT)}. It is sent then.",
        )
    status = STATUSES[key]
    return (
        LEVELS.get(status.tone, messages.INFO),
        f"{connection.name}: {status.word}. {link.sentence(now=now)}",
    )


admin.site.unregister(Customer)


@admin.register(Customer)
class LinkedCustomerAdmin(BulkActions, Tables, LinkAdmin):
    """The customer screens, extended by links and push buttons."""

    sources = history.SOURCES
    change_form_template = "connectors/customer_form.html"
    list_display = ["name_shown", "email", "phone", "organization", "systems", "updated", "author", "version"]
    list_filter = [SystemFilter, StateFilter, ReasonFilter, *CustomerAdmin.list_filter]
    change_list_template = "connectors/customer_list.html"

    # Finding and listing

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """The page's links come in one query, whatever the number of rows."""
        changes = super().get_changelist_instance(request)
        prefetch_related_objects(changes.result_list, Prefetch("links", queryset=CustomerLink.objects.only(*TOLD)))
        connections = {one.pk: one for one in own_connections(request)}
        for customer in changes.result_list:
            for link in customer.links.all():
                link.connection = connections[link.connection_id]
        return changes

    @admin.display(description="Systems")
    def systems(self, customer: Customer) -> str:
        now = timezone.now()
        return summary(Counter(link.status_key(now=now) for link in customer.links.all()))

    def exact_matches(
        self, request: HttpRequest, customers: QuerySet[Customer], term: str
    ) -> list[QuerySet[Customer, Any]]:
        # By connection: that is how the index has the ids.
        wanted = [Q(remote_id=term, connection__in=[one.pk for one in own_connections(request)])]
        if uid := parse_public_id("lnk", term):
            wanted.append(Q(uid=uid))
        if term.isdecimal() and len(term) < 19:
            wanted.append(Q(pk=int(term)))
        linked = [
            customers.filter(pk__in=CustomerLink.objects.filter(one).values("customer")).values_list("pk", flat=True)
            for one in wanted
        ]
        return [*super().exact_matches(request, customers, term), *linked]

    # One customer

    def get_urls(self) -> list[URLPattern]:
        return [self.posted("push", self.push_view), *super().get_urls()]

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Customer | None = None,
    ) -> HttpResponse:
        context["can_push"] = self.has_push_permission(request)
        form = context["adminform"].form
        if obj is None:
            own = Connection.objects.filter(organization__in=organizations(request), direction__in=Connection.PUSHING)
            put_hints(form, [_system(form.instance, one, None, timezone.now()) for one in own], told=lambda *_: "")
        elif not getattr(form, "stale", None):
            self._add_systems(request, context, obj)
        return super().render_change_form(request, context, add, change, form_url, obj)

    def _add_systems(self, request: HttpRequest, context: dict[str, Any], customer: Customer) -> None:
        asked = Asked(customer=customer, clear=shows_personal(request, customer))
        # A refused save leaves what was typed on the customer: what systems have is compared with what is stored.
        stored = Customer.objects.get(pk=customer.pk) if request.method == "POST" else customer
        systems = systems_of(stored, now=timezone.now())
        put_hints(context["adminform"].form, systems, told=asked.value)
        in_use = not stored.archived_at and not stored.merged_into_id
        can_push = self.has_push_permission(request) and in_use
        refused = [system for system in systems if system.key == "rejected" and system.link]
        context |= {
            "systems": [
                (
                    system,
                    asked.text(system.sentence),
                    [(one.title, asked.value(one.name, one.there), one.why) for one in system.differs],
                    [label(name) for name in system.missing],
                )
                for system in systems
            ],
            "counts": summary(Counter(system.key for system in systems if system.link)),
            "archiving_deletes": [system.connection.name for system in systems if system.deletes],
            "can_push": can_push,
            "can_push_all": can_push and any(system.can_push for system in systems),
            "can_compare": self.has_compare_permission(request),
            "can_link": can_push,
            "rejections": self._rejections(refused, asked),
            "can_view_links": request.user.has_perm("connectors.view_customerlink"),
            "can_view_connections": request.user.has_perm("connectors.view_connection"),
        }

    def _rejections(self, systems: Sequence[System], asked: Asked) -> list[dict[str, Any]]:
        """What each refusal says: which field, in whose words, when, and the ids to quote."""
        if not systems:
            return []
        last: dict[int, PushIntent] = {}
        links = [system.link.pk for system in systems if system.link]
        failed = PushIntent.objects.filter(link__in=links, outcome=PushIntent.Outcome.FAILED).order_by()
        newest = failed.values("link").annotate(newest=Max("pk")).values("newest")
        tried = PushIntent.objects.filter(pk__in=newest)
        for intent in tried.only("link_id", "answered_at", "status", "remote_request_id"):
            last[intent.link_id] = intent
        return [
            {
                "system": system,
                "field": label(name) if (name := system.link.error_field) in EDITABLE else name,
                "target": name if name in EDITABLE else "",
                "error": asked.text(system.link.error),
                "intent": last.get(system.link.pk),
            }
            for system in systems
            if system.link
        ]

    def push_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Push one customer to the system named in the form, or to all that the hub sends to."""
        if not self.has_push_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        connections = Connection.objects.filter(
            organization=customer.organization_id, direction__in=Connection.PUSHING
        ).select_related("organization")
        if chosen := request.POST.get("connection"):
            connections = connections.filter(pk=chosen) if chosen.isdecimal() else connections.none()
            if not connections:
                raise Http404
        chosen_ones = list(connections)
        from_preview = request.POST.get("back") == "preview"
        if from_preview and request.POST.get("version") != str(customer.version):
            text = f"{customer.name} has changed since you looked: nothing was sent. Look again, then push."
            self.message_user(request, text, messages.WARNING)
            return self._back_to_preview(customer, chosen)
        marks = {one.pk: uid_of_mark(request.POST.get(f"mark-{one.pk}", ""), customer, one) for one in chosen_ones}
        told = list(push_now(customer=customer, connections=chosen_ones, actor=actor_of(request), marks=marks))
        if not told:
            told = [(messages.WARNING, "There is no system that the hub sends to. Add a connection first.")]
        for level, text in told:
            text = text if shows_personal(request, customer) else redacted(text, vars(customer))
            self.message_user(request, text, level)
        return self._back_to_preview(customer, chosen) if from_preview else self.back(customer)

    def _back_to_preview(self, customer: Customer, connection: str | None) -> HttpResponse:
        address = reverse("admin:customers_customer_preview", args=[customer.pk])
        return HttpResponseRedirect(f"{address}?connection={connection}" if connection else address)

    def response_add(self, request: HttpRequest, obj: Customer, post_url_continue: str | None = None) -> HttpResponse:
        return self._then_push(request, obj, super().response_add(request, obj, post_url_continue))

    def response_change(self, request: HttpRequest, obj: Customer) -> HttpResponse:
        return self._then_push(request, obj, super().response_change(request, obj))

    def _then_push(self, request: HttpRequest, obj: Customer, response: HttpResponse) -> HttpResponse:
        if "_push" not in request.POST or not self.has_push_permission(request):
            return response
        # The browser posts again to the push button's address: the edit is committed before anything is sent.
        address = reverse("admin:customers_customer_push", args=[obj.pk])
        return HttpResponseRedirect(address, preserve_request=True)
