"""What one system knows of one customer, as it came and as it was sent. Read-only but for pausing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from django.utils import timezone

from connectors.admin.badges import link_badge
from connectors.admin.filters import ConnectionFilter, chosen_connections, in_status, own_connections
from connectors.admin.needs import kind_of
from connectors.admin.resolving import ResolvePages
from connectors.models import CustomerLink, SyncRun
from connectors.states import STATUSES, LinkState
from connectors.sync.resolve import WrongState, pausable, pause, resume
from customers import jsontext
from customers.admin.own import MOMENT, link_to
from customers.admin.person import actor_of, organizations
from customers.editing import Actor
from customers.ids import parse_public_id
from customers.models import Customer
from customers.normalize import email_key, name_key
from customers.privacy import NEEDS_RIGHT, redacted, sees
from customers.search import LIMIT, beginning

INTENTS_SHOWN = 10


def pretty(document: Any) -> str:
    return jsontext.dumps(document, option=jsontext.INDENT).decode()


class LinkStateFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "shown_state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(s.key, f"{s.icon} {s.word}") for s in STATUSES.values() if s.key != "not_linked"]

    def queryset(self, request: HttpRequest, queryset: QuerySet[CustomerLink]) -> QuerySet[CustomerLink]:
        if (value := self.value()) not in STATUSES:
            return queryset
        connections = chosen_connections(request, ConnectionFilter.parameter_name)
        return queryset & in_status(value, connections, now=timezone.now())


@admin.register(CustomerLink)
class CustomerLinkAdmin(ResolvePages):
    organization_path = "connection__organization"
    change_form_template = "connectors/link.html"
    list_display = ["customer_name", "connection", "status", "remote_id", "versions", "synced", "error"]
    list_display_links = ["customer_name"]
    list_select_related = ["connection", "customer"]
    list_filter = [ConnectionFilter, LinkStateFilter]
    search_fields = ["remote_id"]
    search_help_text = "The id there, or the customer's id, e-mail or name."
    ordering = ["-id"]
    sortable_by = []  # no index has them in another order
    fields = []

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        own = [connection.pk for connection in own_connections(request)]
        # Not one condition with OR: the databases would read every link for it.
        found = [Q(remote_id=term)]
        if uid := parse_public_id("cust", term):
            found += [Q(customer=uid), Q(uid=uid)]
        within = Customer.objects.filter(organization__in=[one.pk for one in organizations(request)])
        if "@" in term:
            named = within.filter(~Q(email_key=""), email_key=email_key(term))
        else:
            named = within.filter(beginning("name_key", name_key(term))) if name_key(term) else within.none()
        found.append(Q(customer__in=list(named.order_by("name_key").values_list("pk", flat=True)[:LIMIT])))
        ids: set[int] = set()
        for wanted in found:
            rows = CustomerLink.objects.filter(wanted, connection__in=own)
            ids.update(rows.values_list("pk", flat=True)[:LIMIT])
        return queryset.filter(pk__in=ids), False

    @admin.display(description="Customer", ordering="customer__name_key")
    def customer_name(self, link: CustomerLink) -> str:
        return link.customer.name

    @admin.display(description="State")
    def status(self, link: CustomerLink) -> str:
        return link_badge(link.status_key(now=timezone.now()))

    @admin.display(description="Sent / wanted")
    def versions(self, link: CustomerLink) -> str:
        return f"{link.pushed_version} / {link.needed_version}"

    @admin.display(description="In sync since", ordering="synced_at")
    def synced(self, link: CustomerLink) -> str | None:
        return link.synced_at.strftime(MOMENT) if link.synced_at else None

    @admin.display(description="Error")
    def error_masked(self, link: CustomerLink) -> str:
        return redacted(link.error, vars(link.customer))

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        if sees(request.user):
            return list(self.list_display)
        return ["error_masked" if name == "error" else name for name in self.list_display]

    # Pausing

    def get_urls(self) -> list[URLPattern]:
        return [self.posted("pause", self.pause_view), self.posted("resume", self.resume_view), *super().get_urls()]

    def pause_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        link = self._to_decide(request, object_id)
        reason = " ".join(request.POST.get("reason", "").replace("\x00", "").split())
        if not reason:
            self.message_user(request, "Say why: the reason is shown to everybody who waits.", messages.ERROR)
            return self.back(link)
        return self._decided(request, link, "is paused", lambda actor: pause(link=link, actor=actor, reason=reason))

    def resume_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        link = self._to_decide(request, object_id)
        return self._decided(request, link, "is in use again", lambda actor: resume(link=link, actor=actor))

    def _to_decide(self, request: HttpRequest, object_id: str) -> CustomerLink:
        if not self.has_push_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        link: CustomerLink = self.get_object(request, object_id)
        return link

    def _decided(
        self, request: HttpRequest, link: CustomerLink, told: str, decide: Callable[[Actor], SyncRun]
    ) -> HttpResponse:
        try:
            decide(actor_of(request))
        except WrongState as error:
            self.message_user(request, f"{error} Nothing was changed.", messages.WARNING)
        else:
            self.message_user(request, f"{link.customer} in {link.connection} {told}.", messages.SUCCESS)
        return self.back(link)

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: CustomerLink | None = None,
    ) -> HttpResponse:
        if obj is not None:
            now = timezone.now()
            clear = sees(request.user)
            values = {} if clear else vars(obj.customer)
            if not clear:
                obj.error = redacted(obj.error, values)  # shown, never saved
            context |= {
                "title": f"{obj.customer.name} in {obj.connection}",
                "badge": link_badge(obj.status_key(now=now)),
                "can_resume": self.has_push_permission(request) and obj.state == LinkState.PAUSED,
                "can_pause": self.has_push_permission(request) and obj.connection.pushes and pausable(obj),
                "sentence": obj.sentence(now=now),
                "waits_for_somebody": kind_of(obj) and not obj.connection.calls_us,
                "customer_link": link_to("admin:customers_customer_change", obj.customer_id, text=obj.customer.name),
                "connection_link": link_to(
                    "admin:connectors_connection_change", obj.connection_id, text=obj.connection.name
                ),
                "document": pretty(obj.remote_data) if clear else NEEDS_RIGHT,
                "intents": [
                    (
                        intent,
                        intent.error if clear else redacted(intent.error, values),
                        pretty(intent.payload) if clear else NEEDS_RIGHT,
                    )
                    for intent in obj.intents.order_by("-pk")[:INTENTS_SHOWN]
                ],
            }
        return super().render_change_form(request, context, add, change, form_url, obj)
