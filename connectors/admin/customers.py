"""The customer screens with what each connected system knows, and the buttons that push."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import PermissionDenied
from django.db.models import Count, Prefetch, Q, QuerySet, prefetch_related_objects
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, reverse
from django.utils import timezone

from connectors.admin.badges import connection_badge, link_badge, status_column, summary
from connectors.admin.filters import ReasonFilter, StateFilter, SystemFilter
from connectors.exceptions import ConnectionUnusable, RetryLater
from connectors.models import Connection, CustomerLink
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import STATUSES
from connectors.sync.plan import changed_values
from connectors.sync.push import push
from connectors.sync.request import request as request_push
from customers.admin import MOMENT, CustomerAdmin, actor_of, by_organization, shows_personal
from customers.editing import EDITABLE, Actor
from customers.forms import label
from customers.ids import parse_public_id
from customers.models import Customer
from customers.privacy import redacted

# One button press waits this long for one answer, and about this long in all; the worker does what is left.
CALL_SECONDS = 10.0
PRESS_SECONDS = 20.0
# More than this is for the command that pushes.
MAX_CHOSEN = 10_000
LEVELS = {"success": messages.SUCCESS, "warning": messages.WARNING, "danger": messages.ERROR}
BULKY = ("remote_data", "base_local", "base_remote")


@dataclass(kw_only=True)
class System:
    """One row of the table of systems on a customer's page."""

    connection: Connection
    link: CustomerLink | None
    key: str
    sentence: str
    waiting: str

    @property
    def badge(self) -> str:
        return link_badge(self.key)

    @property
    def can_push(self) -> bool:
        return self.connection.pushes and not (self.link and (self.link.is_duplicate or self.link.deleted_at))


def systems_of(customer: Customer, *, now: datetime) -> list[System]:
    """Every connection of the customer's organization and what it knows of the customer, in two queries."""
    links: dict[int, list[CustomerLink]] = {}
    for link in CustomerLink.objects.filter(customer=customer).order_by("is_duplicate", "pk"):
        links.setdefault(link.connection_id, []).append(link)
    systems = []
    for connection in Connection.objects.filter(organization=customer.organization_id):
        known: Sequence[CustomerLink | None] = links.get(connection.pk) or [None]
        systems += [_system(customer, connection, link, now) for link in known]
    return systems


def _system(customer: Customer, connection: Connection, link: CustomerLink | None, now: datetime) -> System:
    if link is None:
        sentence = STATUSES["not_linked"].sentence.format(system=connection.name)
        return System(connection=connection, link=None, key="not_linked", sentence=sentence, waiting="")
    link.connection = connection
    waiting = ""
    if connection.pushes and link.is_dirty and connection.provider in PROVIDERS:
        if not link.remote_id:
            waiting = "all fields"
        else:
            fields = changed_values(link, customer, PROVIDERS[connection.provider].fields)
            waiting = ", ".join(label(name) for name in fields)
    return System(
        connection=connection,
        link=link,
        key=link.status_key(now=now),
        sentence=link.sentence(now=now),
        waiting=waiting,
    )


def push_now(*, customer: Customer, connections: Sequence[Connection], actor: Actor) -> Iterator[tuple[int, str]]:
    """Push one customer to these systems, one after the other, and say in words what came of each."""
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
            yield _push_one(customer, connection, actor, in_time=time.monotonic() < ends)


def _push_one(customer: Customer, connection: Connection, actor: Actor, *, in_time: bool) -> tuple[int, str]:
    request_push(connection=connection, actor=actor, customer_ids=[customer.pk], urgent=True)
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
class LinkedCustomerAdmin(CustomerAdmin):
    """The customer screens, extended by links and push buttons."""

    change_form_template = "connectors/customer_form.html"
    list_display = ["name_shown", "email", "phone", "organization", "systems", "updated", "author", "version"]
    list_filter = [SystemFilter, StateFilter, ReasonFilter, *CustomerAdmin.list_filter]
    actions = [*CustomerAdmin.actions, "push_selected"]

    # Finding and listing

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """The page's links come in one query, whatever the number of rows."""
        changes = super().get_changelist_instance(request)
        changes.result_list = list(changes.result_list)
        links = CustomerLink.objects.select_related("connection").defer(*BULKY)
        prefetch_related_objects(changes.result_list, Prefetch("links", queryset=links))
        return changes

    @admin.display(description="Systems")
    def systems(self, customer: Customer) -> str:
        now = timezone.now()
        return summary(Counter(link.status_key(now=now) for link in customer.links.all()))

    def exact_matches(
        self, request: HttpRequest, customers: QuerySet[Customer], term: str
    ) -> list[QuerySet[Customer, Any]]:
        linked = Q(remote_id=term)
        if uid := parse_public_id("lnk", term):
            linked |= Q(uid=uid)
        if term.isdecimal() and len(term) < 19:
            linked |= Q(pk=int(term))
        links = CustomerLink.objects.filter(linked)
        ids = customers.filter(pk__in=links.values("customer")).values_list("pk", flat=True)
        return [*super().exact_matches(request, customers, term), ids]

    # One customer

    def has_push_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.push_customerlink"))

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
        if obj is not None:
            in_use = not obj.archived_at and not obj.merged_into_id
            context["systems"] = systems = systems_of(obj, now=timezone.now())
            if not shows_personal(request, obj):
                for link in (system.link for system in systems if system.link):
                    link.error = redacted(link.error, vars(obj))  # shown, never saved
                for system in systems:
                    if system.link:
                        system.sentence = system.link.sentence(now=timezone.now())
            context["can_push"] = context["can_push"] and in_use
            context["can_push_all"] = context["can_push"] and any(system.can_push for system in systems)
            context["rejections"] = [
                (system, label(field) if (field := system.link.error_field) in EDITABLE else field, field in EDITABLE)
                for system in systems
                if system.link and system.key == "rejected"
            ]
            context["can_view_links"] = request.user.has_perm("connectors.view_customerlink")
        return super().render_change_form(request, context, add, change, form_url, obj)

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
        told = list(push_now(customer=customer, connections=list(connections), actor=actor_of(request)))
        if not told:
            told = [(messages.WARNING, "There is no system that the hub sends to. Add a connection first.")]
        for level, text in told:
            self.message_user(request, text, level)
        return self.back(customer)

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

    # Many customers

    @admin.action(description="Push to connected systems…", permissions=["push"])
    def push_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> HttpResponse | None:
        """First shows how many go where; the second POST makes the runs."""
        customers = queryset.filter(archived_at=None, merged_into=None)
        chosen = {organization.pk: ids for organization, ids in by_organization(customers, limit=MAX_CHOSEN + 1)}
        total = sum(map(len, chosen.values()))
        if total > MAX_CHOSEN:
            text = f"At most {MAX_CHOSEN} customers at once: narrow the choice, or use manage.py push_customers."
            self.message_user(request, text, messages.ERROR)
            return None
        connections = list(
            Connection.objects.filter(organization__in=chosen, direction__in=Connection.PUSHING).select_related(
                "organization"
            )
        )
        if not connections:
            text = "Nothing to send: the customers are archived, or the hub sends to no system of theirs."
            self.message_user(request, text, messages.WARNING)
            return None
        if request.POST.get("confirmed"):
            wanted = [c for c in connections if str(c.pk) in request.POST.getlist("connections")]
            return self._request(request, wanted, chosen)
        now = timezone.now()
        context = {
            **self.admin_site.each_context(request),
            "title": "Push to connected systems",
            "opts": self.opts,
            "rows": [
                (connection, connection_badge(connection, now=now), len(ids), _expected(connection, ids, now=now))
                for connection in connections
                for ids in [chosen[connection.organization_id]]
            ],
            "left_out": queryset.count() - total,
            "total": total,
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
            "select_across": request.POST.get("select_across", "0"),
            "checkbox": ACTION_CHECKBOX_NAME,
        }
        return TemplateResponse(request, "connectors/push_selected.html", context)

    def _request(
        self, request: HttpRequest, connections: Sequence[Connection], chosen: dict[int, list[UUID]]
    ) -> HttpResponse | None:
        if not connections:
            self.message_user(request, "No system was chosen. Nothing is sent.", messages.WARNING)
            return None
        made = [
            request_push(
                connection=connection, actor=actor_of(request), customer_ids=chosen[connection.organization_id]
            )
            for connection in connections
        ]
        for run in made:
            clean = f"{run.unchanged} already up to date"
            text = f"{run.connection}: {run.planned} customers, {clean}. Run {run.public_id}."
            self.message_user(request, text, messages.SUCCESS)
        if not request.user.has_perm("connectors.view_syncrun"):
            return None
        if len(made) == 1:
            return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[made[0].pk]))
        return HttpResponseRedirect(reverse("admin:connectors_syncrun_changelist"))


def _expected(connection: Connection, ids: Collection[UUID], *, now: datetime) -> str:
    """What pushing these customers there comes down to, as far as the links tell."""
    rows = (
        CustomerLink.objects.filter(connection=connection, customer__in=ids, is_duplicate=False)
        .annotate(shown_state=status_column(now=now))
        .order_by()
        .values_list("shown_state")
        .annotate(Count("pk"))
    )
    counts = dict(rows)
    parts = [f"{len(ids) - sum(counts.values())} new there"]
    parts += [f"{number} {STATUSES[key].word.lower()}" for key, number in counts.items()]
    return ", ".join(parts)
