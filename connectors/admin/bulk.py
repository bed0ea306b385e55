"""What is done to many customers at once: a page that shows what it comes to, and a run that tells what came of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db import transaction
from django.db.models import Count, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone

from connectors.admin import checking
from connectors.admin.badges import connection_badge, status_column
from connectors.admin.wizard import CANARY, canary_succeeded
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import STATUSES
from connectors.sync import runs
from connectors.sync.forecast import LOOKED_AT, Expected, Forecast, forecast
from connectors.sync.request import request as request_push
from customers import editing
from customers.admin.customers import CustomerAdmin
from customers.admin.person import actor_of
from customers.models import Customer, Organization
from customers.privacy import sees

# More than this is for the command that pushes.
MAX_CHOSEN = 10_000
# With more systems than this, fewer customers are looked at for each.
MANY_SYSTEMS, FEWER = 5, 200
EXAMPLE_FIELDS = 6
# Of no more than this, a change since the page was shown is told before anything is done.
SEEN_CLOSELY = 50


@dataclass(frozen=True, kw_only=True)
class Target:
    """A system that the chosen customers may go to, and what that comes to."""

    connection: Connection
    badge: str
    number: int
    today: str
    forecast: Forecast | None
    examples: list[tuple[Customer, str, list[tuple[str, str, str]]]]
    held: str

    @property
    def checked(self) -> bool:
        return self.connection.state == Connection.State.ACTIVE and not self.held

    @property
    def refusals(self) -> list[tuple[str, int]]:
        return [(why, n) for (_, why), n in self.forecast.refusals.most_common(5)] if self.forecast else []

    @property
    def took(self) -> str:
        """About how long sending takes at the rate that is set."""
        if self.forecast is None:
            return "not known"
        if self.forecast.seconds is None:
            return "as fast as it answers: no rate is set"
        seconds = self.forecast.seconds * self.number / max(self.forecast.looked_at, 1)
        return f"about {max(seconds, 1):.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


class BulkActions(CustomerAdmin):
    """The actions of the list of customers."""

    actions = ["push_selected", "check_selected", "archive_selected", "restore_selected"]

    def has_push_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.push_customerlink"))

    def has_check_permission(self, request: HttpRequest) -> bool:
        return checking.may_check(request.user)

    # Pushing

    @admin.action(description="Push to connected systems…", permissions=["push"])
    def push_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> HttpResponse | None:
        """First shows what goes where; the second POST makes the runs."""
        chosen = self._chosen(request, queryset.filter(archived_at=None, merged_into=None))
        if chosen is None:
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
        if request.POST.get("confirmed") and not self._moved(request, chosen):
            wanted = [c for c in connections if str(c.pk) in request.POST.getlist("connections")]
            return self._request(request, wanted, chosen)
        limit = LOOKED_AT if len(connections) <= MANY_SYSTEMS else FEWER
        targets = [self._target(request, connection, chosen, limit) for connection in connections]
        return self._bulk_page(
            request, "connectors/push_selected.html", "push_selected", queryset, chosen,
            title="Push to connected systems", targets=targets,
        )  # fmt: skip

    def _target(
        self, request: HttpRequest, connection: Connection, chosen: dict[int, list[UUID]], limit: int
    ) -> Target:
        now = timezone.now()
        ids = chosen[connection.organization_id]
        provider = PROVIDERS.get(connection.provider)
        found = None
        if provider is not None:
            found = forecast(connection=connection, provider=provider, customer_ids=ids, limit=limit)
        return Target(
            connection=connection,
            badge=connection_badge(connection, now=now),
            number=len(ids),
            today=_expected(connection, ids, now=now),
            forecast=found,
            examples=[_example(one, clear=sees(request.user)) for one in (found.samples if found else ())],
            held=_held(connection, len(ids)),
        )

    def _request(
        self, request: HttpRequest, connections: Sequence[Connection], chosen: dict[int, list[UUID]]
    ) -> HttpResponse | None:
        open_ones = []
        for connection in connections:
            if held := _held(connection, len(chosen[connection.organization_id])):
                self.message_user(request, f"{connection}: {held}", messages.ERROR)
            else:
                open_ones.append(connection)
        if not open_ones:
            self.message_user(request, "No system was chosen. Nothing is sent.", messages.WARNING)
            return None
        actor = actor_of(request, message=message_of(request))
        made = [
            request_push(connection=connection, actor=actor, customer_ids=chosen[connection.organization_id])
            for connection in open_ones
        ]
        for run in made:
            clean = f"{run.unchanged} already up to date"
            text = f"{run.connection}: {run.planned} customers, {clean}. Run {run.public_id}."
            self.message_user(request, text, messages.SUCCESS)
        return self._to_runs(request, made)

    # Comparing

    @admin.action(description="Check against… (dry run)", permissions=["check"])
    def check_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> HttpResponse | None:
        """First asks which system; the second POST reads there and shows what is different. Nothing is sent."""
        chosen = self._chosen(request, queryset.filter(archived_at=None, merged_into=None))
        if chosen is None:
            return None
        connections = list(
            Connection.objects.filter(organization__in=chosen, provider__in=PROVIDERS)
            .exclude(direction=Connection.Direction.CALLS_US)
            .select_related("organization")
        )
        if not connections:
            self.message_user(request, "There is no system of theirs that the hub calls.", messages.WARNING)
            return None
        wanted = [c for c in connections if str(c.pk) == request.POST.get("connection")]
        if request.POST.get("confirmed") and wanted:
            [connection] = wanted
            result = checking.checked(connection, customer_ids=chosen[connection.organization_id])
            context = {
                **self.admin_site.each_context(request),
                "title": f"{result.all_of} customers compared with {connection}",
                "opts": self.opts,
                "connection": connection,
                "checked": result,
                "rows": checking.rows(result.found, clear=sees(request.user)),
                "refusals": checking.refusals(result.found, clear=sees(request.user)),
                "can_view_customers": True,
                **self._push_instead(request, connection),
            }
            return TemplateResponse(request, "connectors/check.html", context)
        rows = [(c, connection_badge(c, now=timezone.now()), len(chosen[c.organization_id])) for c in connections]
        return self._bulk_page(
            request, "connectors/check_selected.html", "check_selected", queryset, chosen,
            title="Check against a system", rows=rows, most=checking.CHECKED,
        )  # fmt: skip

    def _push_instead(self, request: HttpRequest, connection: Connection) -> dict[str, Any]:
        """The button that turns a check into a push of the same customers, by the page that asks first."""
        if not connection.pushes or not self.has_push_permission(request):
            return {}
        chosen = [(ACTION_CHECKBOX_NAME, pk) for pk in request.POST.getlist(ACTION_CHECKBOX_NAME)]
        across = ("select_across", request.POST.get("select_across", "0"))
        return {
            "push_address": request.get_full_path(),
            "push_fields": [("action", "push_selected"), ("index", "0"), across, *chosen],
        }

    # Archiving

    @admin.action(description="Archive…", permissions=["change"])
    def archive_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> HttpResponse | None:
        return self._move_after_a_page(request, queryset, "archive", queryset.filter(archived_at=None))

    @admin.action(description="Restore…", permissions=["change"])
    def restore_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> HttpResponse | None:
        return self._move_after_a_page(request, queryset, "restore", queryset.exclude(archived_at=None))

    def _move_after_a_page(
        self, request: HttpRequest, queryset: QuerySet[Customer], deed: str, customers: QuerySet[Customer]
    ) -> HttpResponse | None:
        chosen = self._chosen(request, customers.filter(merged_into=None))
        if chosen is None:
            return None
        if not chosen:
            self.message_user(request, f"None of these customers is to be {deed}d.", messages.WARNING)
            return None
        if request.POST.get("confirmed") and not self._moved(request, chosen):
            return self._move_now(request, deed, chosen)
        deletes = Connection.objects.filter(
            organization__in=chosen,
            direction__in=Connection.PUSHING,
            archive_policy=Connection.ArchivePolicy.DELETE,
        )
        return self._bulk_page(
            request, "connectors/move_selected.html", f"{deed}_selected", queryset, chosen,
            title=f"{deed.capitalize()} customers", deed=deed, deletes=list(deletes),
            examples=list(customers.filter(merged_into=None).order_by("name_key")[:5]),
        )  # fmt: skip

    def _move_now(self, request: HttpRequest, deed: str, chosen: dict[int, list[UUID]]) -> HttpResponse | None:
        """All of an organization's in one bulk edit, with a run that tells of it."""
        move: Callable[..., Any] = {"archive": editing.archive, "restore": editing.restore}[deed]
        actor = actor_of(request, message=message_of(request))
        made = []
        for organization in Organization.objects.filter(pk__in=chosen):
            ids = chosen[organization.pk]
            with transaction.atomic():
                at = timezone.now()
                run = runs.start(
                    organization=organization,
                    connection=None,
                    kind=SyncRun.Kind.SYNC,
                    actor=actor,
                    at=at,
                    planned=len(ids),
                    request={"decision": deed},
                )
                edits = move(organization=organization, ids=ids, actor=actor)
                moved = sum(bool(edit.changes) for edit in edits.values())
                runs.add(run_id=run.pk, totals={"updated": moved, "unchanged": len(edits) - moved}, at=at)
                made.append(runs.finish(run=run, at=timezone.now()))
            where = {"archive": "in the archive", "restore": "in use again"}[deed]
            self.message_user(request, f"{moved} customers are {where}.", messages.SUCCESS)
        return self._to_runs(request, made)

    # What they share

    def _chosen(self, request: HttpRequest, customers: QuerySet[Customer]) -> dict[int, list[UUID]] | None:
        """The ids by organization; None, having said so, when they are too many."""
        chosen = {organization.pk: ids for organization, ids in _by_organization(customers, limit=MAX_CHOSEN + 1)}
        if sum(map(len, chosen.values())) <= MAX_CHOSEN:
            return chosen
        text = f"At most {MAX_CHOSEN} customers at once: narrow the choice, or use manage.py push_customers."
        self.message_user(request, text, messages.ERROR)
        return None

    def _moved(self, request: HttpRequest, chosen: dict[int, list[UUID]]) -> bool:
        """Whether others than the page showed would be meant now, or few that have changed; then it is shown again."""
        mark = _mark_of(chosen)
        if request.POST.get("seen", mark) == mark:
            return False
        text = (
            "Not the customers that the page showed are meant now, or they have changed. Nothing was done: look again."
        )
        self.message_user(request, text, messages.WARNING)
        return True

    def _bulk_page(
        self,
        request: HttpRequest,
        template: str,
        action: str,
        queryset: QuerySet[Customer],
        chosen: dict[int, list[UUID]],
        **more: Any,
    ) -> HttpResponse:
        total = sum(map(len, chosen.values()))
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "action": action,
            "total": total,
            "seen": _mark_of(chosen),
            "left_out": max(queryset.count() - total, 0),
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
            "select_across": request.POST.get("select_across", "0"),
            "checkbox": ACTION_CHECKBOX_NAME,
            "message": message_of(request),
            **more,
        }
        return TemplateResponse(request, template, context)

    def _to_runs(self, request: HttpRequest, made: Sequence[SyncRun]) -> HttpResponse | None:
        if not request.user.has_perm("connectors.view_syncrun"):
            return None
        if len(made) == 1:
            return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[made[0].pk]))
        return HttpResponseRedirect(reverse("admin:connectors_syncrun_changelist"))


def _mark_of(chosen: dict[int, list[UUID]]) -> str:
    """Stands for these customers; of few, for what is in them too. Of many, some change all the time."""
    ids = sorted(pk for of_one in chosen.values() for pk in of_one)
    named: Iterable[object] = ids
    if len(ids) <= SEEN_CLOSELY:
        named = Customer.objects.filter(pk__in=ids).order_by("pk").values_list("pk", "version")
    return sha256(" ".join(map(str, named)).encode()).hexdigest()


def message_of(request: HttpRequest) -> str:
    return " ".join(request.POST.get("message", "").replace("\x00", "").split())[:500]


def _held(connection: Connection, number: int) -> str:
    """Why so many customers may not go there yet; "" where they may."""
    if connection.opened_at is not None or number <= CANARY or canary_succeeded(connection):
        return ""
    return f"it is new. At most {CANARY} customers go there before one was accepted: take its first steps."


def _example(one: Expected, *, clear: bool) -> tuple[Customer, str, list[tuple[str, str, str]]]:
    """A customer, what would be done, and the first fields that go out: label, there, here."""
    word = "create" if one.outcome == "created" else "update"
    return one.customer, word, checking.differences(one.fields, clear=clear)[:EXAMPLE_FIELDS]


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


def _by_organization(customers: QuerySet[Customer], *, limit: int) -> Iterator[tuple[Organization, list[UUID]]]:
    """The ids of these customers (at most `limit`), apart for each organization."""
    ids: dict[int, list[UUID]] = {}
    for organization, pk in customers.order_by("pk").values_list("organization_id", "pk")[:limit]:
        ids.setdefault(organization, []).append(pk)
    for found in Organization.objects.filter(pk__in=ids):
        yield found, ids[found.pk]
