"""What was pushed, pulled and imported, with totals that add up. Read-only."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from connectors.admin.badges import ConnectionFilter, run_badge
from connectors.models import SyncRun
from customers.admin import MOMENT, OrganizationFilter, ReadOnlyAdmin
from customers.models import Customer
from customers.privacy import redacted, sees


@admin.register(SyncRun)
class SyncRunAdmin(ReadOnlyAdmin):
    change_form_template = "connectors/run.html"
    list_display = ["__str__", "connection", "state_shown", "author", "planned", "totals", "started", "duration"]
    list_select_related = ["connection"]
    list_filter = [OrganizationFilter, ConnectionFilter, "kind", "state"]
    search_fields = ["public_id"]
    ordering = ["-id"]
    fields = []

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        return (queryset.filter(public_id=term) if (term := search_term.strip()) else queryset), False

    @admin.display(description="State", ordering="state")
    def state_shown(self, run: SyncRun) -> str:
        return run_badge(run)

    @admin.display(description="By")
    def author(self, run: SyncRun) -> str:
        return run.actor_name

    @admin.display(description="Totals")
    def totals(self, run: SyncRun) -> str:
        return ", ".join(f"{number} {name}" for name in SyncRun.TOTALS if (number := getattr(run, name))) or "–"

    @admin.display(description="Started", empty_value="not yet")
    def started(self, run: SyncRun) -> str | None:
        return run.started_at.strftime(MOMENT) if run.started_at else None

    @admin.display(description="Took")
    def duration(self, run: SyncRun) -> str:
        if not run.started_at:
            return "–"
        return f"{((run.finished_at or timezone.now()) - run.started_at).total_seconds():.1f} s"

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: SyncRun | None = None,
    ) -> HttpResponse:
        if obj is not None:
            waiting = max(obj.planned - obj.total, 0)
            context |= {
                "badge": run_badge(obj),
                "started": self.started(obj) or "not yet",
                "duration": self.duration(obj),
                "totals": [(name.capitalize(), getattr(obj, name)) for name in SyncRun.TOTALS],
                "waiting": waiting,
                "sum": obj.total + waiting,
                "problems": _problems(obj, clear=sees(request.user)),
                "more_problems": obj.refused + obj.uncertain > len(obj.problems),
            }
        return super().render_change_form(request, context, add, change, form_url, obj)


def _problems(run: SyncRun, *, clear: bool) -> list[dict[str, Any]]:
    """The problems with the names of the customers concerned, read in one query. Reasons may quote what was refused."""
    ids = set()
    for problem in run.problems:
        try:
            ids.add(UUID(str(problem.get("customer", ""))))
        except ValueError:
            continue
    customers = Customer.objects.filter(organization=run.organization_id).in_bulk(ids)
    by_text = {str(pk): customer for pk, customer in customers.items()}
    found = []
    for problem in run.problems:
        known = by_text.get(str(problem.get("customer")))
        reason = str(problem.get("reason", ""))
        if not clear:
            reason = redacted(reason, vars(known) if known else None)
        found.append({**problem, "reason": reason, "known": known})
    return found
