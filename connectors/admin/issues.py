"""What a person has to see to at a connection, and the log of fields that changed on both sides."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern

from connectors.admin.badges import badge
from connectors.admin.filters import ConnectionFilter, own_connections
from connectors.admin.resolving import fields_of, safe_next
from connectors.models import Conflict, Issue
from connectors.sync import issues
from connectors.sync.clock import database_clock
from customers import jsontext
from customers.admin.filters import OrganizationFilter
from customers.admin.own import MOMENT, ReadOnlyAdmin, link_to
from customers.forms import label, shown
from customers.privacy import masked, sees

# Their messages are what a system said of a customer.
QUOTES = (Issue.Kind.REJECTED, Issue.Kind.POISON, Issue.Kind.CONNECTOR)


def words_of(issue: Issue, *, clear: bool) -> str:
    """The issue's message; without the right (`clear`), not what a system said of a customer."""
    if clear or issue.kind not in QUOTES:
        return issue.message
    field = issue.details.get("field") or ""
    return f"{label(field) if field else 'The record'} (the reason may name personal data, which you may not see)"


class OpenFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "open"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "Open"), ("no", "Seen to")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Issue]) -> QuerySet[Issue]:
        return queryset.filter(resolved_at__isnull=self.value() == "yes") if self.value() else queryset


@admin.register(Issue)
class IssueAdmin(ReadOnlyAdmin):
    change_form_template = "connectors/issue.html"
    list_display = ["kind", "connection", "state_shown", "count", "first", "last"]
    list_display_links = ["kind"]
    list_select_related = ["connection"]
    list_filter = [OrganizationFilter, ConnectionFilter, OpenFilter, "kind"]
    ordering = ["-last_at", "-id"]
    actions = ["see_to_selected"]
    fields = []

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        clear = sees(request.user)

        @admin.display(description="What happened")
        def words(issue: Issue) -> str:
            return words_of(issue, clear=clear)

        first, *others = self.list_display
        return [first, words, *others]

    @admin.display(description="State")
    def state_shown(self, issue: Issue) -> str:
        return badge("✓", "Seen to", "success") if issue.resolved_at else badge("!", "Open", "warning")

    @admin.display(description="First", ordering="first_at")
    def first(self, issue: Issue) -> str:
        return issue.first_at.strftime(MOMENT)

    @admin.display(description="Last", ordering="last_at")
    def last(self, issue: Issue) -> str:
        return issue.last_at.strftime(MOMENT)

    def has_see_to_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.change_issue"))

    def get_urls(self) -> list[URLPattern]:
        return [self.posted("seen", self.see_to_view), *super().get_urls()]

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Issue | None = None,
    ) -> HttpResponse:
        if obj is not None:
            clear = sees(request.user)
            context |= {
                "title": obj.get_kind_display(),
                "badge": self.state_shown(obj),
                "words": words_of(obj, clear=clear),
                "connection_link": link_to(
                    "admin:connectors_connection_change", obj.connection_id, text=obj.connection.name
                ),
                "details": jsontext.dumps(obj.details, option=jsontext.INDENT).decode() if clear else "",
                "can_see_to": obj.resolved_at is None and self.has_see_to_permission(request),
            }
        return super().render_change_form(request, context, add, change, form_url, obj)

    def see_to_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Close the issue. It opens again by itself if the cause comes back."""
        if not self.has_see_to_permission(request):
            raise PermissionDenied
        issue = self.get_object(request, object_id)
        self._see_to(request, [issue])
        following = safe_next(request)
        return HttpResponseRedirect(following) if following else self.back(issue)

    @admin.action(description="Seen to", permissions=["see_to"])
    def see_to_selected(self, request: HttpRequest, queryset: QuerySet[Issue]) -> None:
        self._see_to(request, queryset.filter(resolved_at=None).select_related("connection"))

    def _see_to(self, request: HttpRequest, chosen: Any) -> None:
        at = database_clock()
        closed = 0
        for issue in chosen:
            number = issues.resolve(connection=issue.connection, kind=issue.kind, fingerprint=issue.fingerprint, at=at)
            if number:
                self.log_change(request, issue, "Seen to.")
            closed += number
        text = f"{closed} seen to. What happens again is told again." if closed else "That was seen to before."
        self.message_user(request, text, messages.SUCCESS if closed else messages.WARNING)


class ConflictFieldFilter(admin.SimpleListFilter):
    title = "field"
    parameter_name = "field"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return sorted(((name, label(name)) for name in fields_of(own_connections(request))), key=lambda pair: pair[1])

    def queryset(self, request: HttpRequest, queryset: QuerySet[Conflict]) -> QuerySet[Conflict]:
        return queryset.filter(field=value) if (value := self.value()) else queryset


@admin.register(Conflict)
class ConflictAdmin(ReadOnlyAdmin):
    """The log: who won each time that a field had changed on both sides, and who decided."""

    change_form_template = "connectors/conflict.html"
    list_select_related = ["connection", "link__customer"]
    list_display_links = ["moment"]
    list_filter = [OrganizationFilter, ConnectionFilter, ConflictFieldFilter, "outcome"]
    ordering = ["-id"]
    fields = []
    list_display = ["moment", "customer", "connection", "field_label", "outcome_shown", "decided"]

    @admin.display(description="Noticed", ordering="id")
    def moment(self, conflict: Conflict) -> str:
        return conflict.at.strftime(MOMENT)

    @admin.display(description="Customer")
    def customer(self, conflict: Conflict) -> str:
        return conflict.link.customer.name

    @admin.display(description="Field")
    def field_label(self, conflict: Conflict) -> str:
        return label(conflict.field)

    @admin.display(description="Outcome")
    def outcome_shown(self, conflict: Conflict) -> str:
        if conflict.outcome != Conflict.Outcome.WAITING:
            return conflict.get_outcome_display()
        return "Decided" if conflict.resolved_at else conflict.get_outcome_display()

    @admin.display(description="Decided by")
    def decided(self, conflict: Conflict) -> str:
        if conflict.outcome != Conflict.Outcome.WAITING:
            return "the rule of the connection"
        if conflict.resolved_at is None:
            return "–"
        return f"{conflict.resolved_by or 'newer values'}, {conflict.resolved_at.strftime(MOMENT)}"

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Conflict | None = None,
    ) -> HttpResponse:
        if obj is not None:
            clear = sees(request.user)
            values = (obj.base, obj.here, obj.there)
            context |= {
                "title": f"{label(obj.field)} of {obj.link.customer} in {obj.connection}",
                "field_label": label(obj.field),
                "values": [shown(value if clear else masked(obj.field, value)) for value in values],
                "outcome": self.outcome_shown(obj),
                "decided": self.decided(obj),
                "moment": self.moment(obj),
                "waits": obj.outcome == Conflict.Outcome.WAITING and obj.resolved_at is None,
            }
        return super().render_change_form(request, context, add, change, form_url, obj)
