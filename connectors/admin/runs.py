"""What was pushed, pulled and imported, with totals that add up; what was refused can be tried again or downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import URLPattern, path, reverse
from django.utils import timezone

from connectors.admin.badges import run_badge
from connectors.admin.filters import ConnectionFilter
from connectors.admin.reasons import causes
from connectors.models import CustomerLink, SyncRun
from connectors.states import STATUSES, LinkState
from connectors.sync import resolve
from connectors.sync.cancel import NotCancellable, cancel, cancellable
from customers import tabular
from customers.admin.filters import OrganizationFilter
from customers.admin.own import MOMENT, ReadOnlyAdmin
from customers.admin.person import actor_of
from customers.forms import label
from customers.models import Customer
from customers.privacy import redacted, sees

GROUPS = 20
REFRESH_SECONDS = 5
RUNNING = (SyncRun.State.QUEUED, SyncRun.State.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records of a run that have one problem. `word` and `icon` are the state's."""

    state: str
    field: str
    reason: str
    count: int

    @property
    def shown(self) -> tuple[str, str, str]:
        status = STATUSES.get("rejected" if self.state == "refused" else self.state)
        if status is None:
            return "!", self.state.capitalize(), "warning"
        return status.icon, "Refused" if self.state == "refused" else status.word, status.tone


@admin.register(SyncRun)
class SyncRunAdmin(ReadOnlyAdmin):
    change_form_template = "connectors/run.html"
    list_display = ["__str__", "connection", "state_shown", "author", "planned", "totals", "started", "duration"]
    list_select_related = ["connection"]
    list_filter = [OrganizationFilter, ConnectionFilter, "kind", "state"]
    search_fields = ["public_id"]
    ordering = ["-id"]
    sortable_by = []  # no index has them in another order
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

    # Rights

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.push_customerlink"))

    def has_cancel_permission(self, request: HttpRequest, run: SyncRun) -> bool:
        right = "customers.import_customer" if run.kind == SyncRun.Kind.IMPORT else "connectors.push_customerlink"
        return bool(request.user.has_perm(right))

    def has_download_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("customers.export_customer"))

    # One run

    def get_urls(self) -> list[URLPattern]:
        return [
            self.posted("retry", self.retry_view),
            self.posted("cancel", self.cancel_view),
            path(
                "<path:object_id>/errors/",
                self.admin_site.admin_view(self.errors_view),
                name="connectors_syncrun_errors",
            ),
            *super().get_urls(),
        ]

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
            now = timezone.now()
            waiting = max(obj.planned - obj.total, 0)
            clear = sees(request.user)
            groups, complete = groups_of(obj, clear=clear)
            again = releasable(obj, at=now)[:1].exists() if self.has_retry_permission(request) else False
            context |= {
                "title": str(obj),
                "badge": run_badge(obj),
                "started": self.started(obj) or "not yet",
                "duration": self.duration(obj),
                "totals": [(name.capitalize(), getattr(obj, name)) for name in SyncRun.TOTALS],
                "waiting": waiting,
                "sum": obj.total + waiting,
                "running": obj.finished_at is None,
                "refresh": REFRESH_SECONDS,
                "speed": _speed(obj, now),
                "error": obj.error if clear else redacted(obj.error),
                "message": obj.request.get("message", ""),
                "groups": groups,
                "groups_complete": complete,
                "problems": _problems(obj, clear=clear),
                "more_problems": obj.refused + obj.uncertain > len(obj.problems),
                "can_retry": again,
                "can_cancel": cancellable(obj) and self.has_cancel_permission(request, obj),
                "can_download": bool(obj.problems) and self.has_download_permission(request),
                "can_view_customers": request.user.has_perm("customers.view_customer"),
            }
        return super().render_change_form(request, context, add, change, form_url, obj)

    def retry_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Try again what this run was refused, and nothing else."""
        if not self.has_retry_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        run = self.get_object(request, object_id)
        if run.connection is None or not run.connection.pushes:
            self.message_user(request, "Nothing of this run can be sent again.", messages.WARNING)
            return self.back(run)
        try:
            again = resolve.release(connection=run.connection, links=refused_links(run), actor=actor_of(request))
        except resolve.WrongState:
            text = "Nothing of this run is refused any more: it was sent, changed or released since."
            self.message_user(request, text, messages.WARNING)
            return self.back(run)
        self.message_user(request, f"{again.planned} customers are tried again.", messages.SUCCESS)
        return self.back(again)

    def cancel_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        run = self.get_object(request, object_id) if self.has_view_permission(request) else None
        if run is None or not self.has_cancel_permission(request, run):
            raise PermissionDenied
        try:
            run = cancel(run=run, actor=actor_of(request))
        except NotCancellable as error:
            self.message_user(request, str(error), messages.WARNING)
        else:
            left = run.planned - run.total
            more = f" {left} are being sent right now: they are followed to their outcome." if left > 0 else ""
            self.message_user(request, f"{run} is cancelled. What was done stays done.{more}", messages.SUCCESS)
        return self.back(run)

    def errors_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """What needs attention, as CSV. It names customers; of their values it holds none."""
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        if not self.has_download_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        run = self.get_object(request, object_id)
        rows = ([tabular.protect(cell) for cell in row] for row in _error_rows(run, clear=sees(request.user)))
        return StreamingHttpResponse(
            tabular.csv_lines(rows),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="errors-{run.public_id}.csv"'},
        )

    def to_run(self, run: SyncRun) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[run.pk]))


def _speed(run: SyncRun, now: datetime) -> str:
    """How fast it goes and how long it still takes, as far as it can be told."""
    if run.started_at is None or run.finished_at is not None or not run.total:
        return ""
    passed = max((now - run.started_at).total_seconds(), 0.1)
    rate = run.total / passed
    left = max(run.planned - run.total, 0) / rate
    told = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
    return f"{rate:.1f} a second, about {told} left"


# What was refused


def _kept(run: SyncRun, *, state: str = "refused") -> set[UUID]:
    """The customers of the kept problems in this state."""
    found = set()
    for problem in run.problems:
        if problem.get("state") == state and (uid := _uuid(problem.get("customer"))):
            found.add(uid)
    return found


def refused_links(run: SyncRun) -> QuerySet[CustomerLink]:
    """The links that are rejected and that this run was refused.

    A run keeps its first hundred problems. Where it was refused more, the others are those that the connection rejected
    while the run went on.
    """
    known = _kept(run)
    which = Q(customer__in=known)
    if run.kind == SyncRun.Kind.PUSH and run.refused > len(known) and run.started_at is not None:
        which |= Q(updated_at__gte=run.started_at, updated_at__lte=run.finished_at or timezone.now())
    return CustomerLink.objects.filter(
        which, connection=run.connection_id, state=LinkState.REJECTED, is_duplicate=False, deleted_at=None
    )


def releasable(run: SyncRun, *, at: datetime) -> QuerySet[CustomerLink]:
    if run.connection is None or not run.connection.pushes:
        return CustomerLink.objects.none()
    return resolve.releasable(refused_links(run), at=at)


def groups_of(run: SyncRun, *, clear: bool) -> tuple[list[Group], bool]:
    """The problems by reason, the most frequent first, and whether they count all that the totals count."""
    kept = Counter((str(p.get("state", "")), p["field"], p["reason"]) for p in _problems(run, clear=clear))
    groups = [Group(state=state, field=name, reason=why, count=n) for (state, name, why), n in kept.items()]
    complete = run.refused + run.uncertain <= len(run.problems)
    if not complete and run.kind == SyncRun.Kind.PUSH:
        rejected = [
            Group(state="refused", field=label(cause.field), reason=cause.text, count=cause.number)
            for cause in causes(refused_links(run), clear=clear, most=GROUPS)
        ]
        if sum(group.count for group in rejected) >= sum(g.count for g in groups if g.state == "refused"):
            groups = [*rejected, *(group for group in groups if group.state != "refused")]
            complete = sum(group.count for group in groups) >= run.refused + run.uncertain
    return sorted(groups, key=lambda group: -group.count)[:GROUPS], complete


def _problems(run: SyncRun, *, clear: bool) -> list[dict[str, Any]]:
    """The problems with the names of the customers concerned, read in one query. Reasons may quote what was refused."""
    ids = {uid for problem in run.problems if (uid := _uuid(problem.get("customer")))}
    customers = Customer.objects.filter(organization=run.organization_id).in_bulk(ids)
    by_text = {str(pk): customer for pk, customer in customers.items()}
    found = []
    for problem in run.problems:
        known = by_text.get(str(problem.get("customer")))
        reason = str(problem.get("reason", ""))
        if not clear:
            reason = redacted(reason, vars(known) if known else None)
        found.append({**problem, "reason": reason, "known": known, "field": label(str(problem.get("field") or ""))})
    return found


def _error_rows(run: SyncRun, *, clear: bool) -> Iterator[Sequence[str]]:
    """The kept problems, then what else was refused while a push went on."""
    yield ("customer_id", "customer", "remote_id", "row", "state", "field", "reason")
    for problem in _problems(run, clear=clear):
        customer = problem["known"]
        yield (
            customer.public_id if customer else "",
            customer.name if customer else "",
            str(problem.get("remote_id") or ""),
            str(problem.get("row") or ""),
            str(problem.get("state") or ""),
            problem["field"],
            problem["reason"],
        )
    if run.connection_id is None or run.refused + run.uncertain <= len(run.problems):
        return
    others = refused_links(run).exclude(customer__in=_kept(run)).select_related("customer").order_by("pk")
    for link in others.defer("remote_data", "base_local", "base_remote").iterator(1000):
        yield (
            *(link.customer.public_id, link.customer.name, link.remote_id or "", "", "refused"),
            *(label(link.error_field), link.error if clear else redacted(link.error, vars(link.customer))),
        )


def _uuid(text: Any) -> UUID | None:
    try:
        return UUID(str(text or ""))
    except ValueError:
        return None
