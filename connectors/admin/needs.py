"""Needs you: everything that waits for a person, what it is, since when, and the button that settles it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db.models import Case, CharField, Count, Exists, F, Min, OuterRef, Q, QuerySet, Value, When
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.dateparse import parse_datetime
from django.utils.http import urlencode
from django.views.decorators.http import require_POST, require_safe

from connectors.admin.badges import badge, link_badge
from connectors.admin.filters import own_connections
from connectors.models import MAY_NEED_SOMEBODY, Connection, CustomerLink, Issue
from connectors.states import HEALTH, STATUSES, LinkState, health_sentence
from connectors.sync.clock import database_clock
from connectors.sync.resolve import WrongState, releasable, release
from customers.admin.own import ReadOnlyAdmin
from customers.admin.person import actor_of, organizations
from customers.editing import EDITABLE
from customers.forms import label
from customers.models import Customer
from customers.privacy import redacted, sees

# What a link may wait for, in the order in which it is shown; the words are those of `states.STATUSES`.
KINDS = ("rejected", "conflict", "uncertain", "remote_deleted", "duplicate")
# What is seen to elsewhere but belongs to the same queue.
RECONNECT, ISSUE = "reconnect", "issue"
# Issues about what the queue lists as links or as logins.
LISTED = (Issue.Kind.REJECTED, Issue.Kind.POISON, Issue.Kind.CONNECTOR, Issue.Kind.LOGIN)
PAGE = 50
REASONS = 20
OTHERS = 20
PUSH, EDIT, LINKS = "connectors.push_customerlink", "customers.change_customer", "connectors.view_customerlink"
BULKY = ("remote_data", "base_local", "base_remote", "tombstone")

_IN_USE = Exists(Customer.objects.filter(pk=OuterRef("customer_id"), archived_at=None, merged_into=None))
_LEADS = Q(is_duplicate=False, deleted_at=None)
# A lost create that is still looked for waits for nobody, nor does what somebody has left as it is.
_WAITS = (
    Q(is_duplicate=True, is_active=True)
    | (Q(is_duplicate=False, deleted_at__isnull=False) & ~Q(tombstone__has_key="unlinked") & _IN_USE)
    | (_LEADS & Q(state__in=(LinkState.REJECTED, LinkState.CONFLICT)))
    | (_LEADS & Q(state=LinkState.UNCERTAIN, next_attempt_at=None))
    | (_LEADS & ~Q(state=LinkState.UNCERTAIN) & ~Q(conflicts={}))
)
_KIND = Case(
    When(is_duplicate=True, then=Value("duplicate")),
    When(deleted_at__isnull=False, then=Value("remote_deleted")),
    When(state__in=(LinkState.REJECTED, LinkState.UNCERTAIN), then=F("state")),
    default=Value("conflict"),
    output_field=CharField(),
)


def waiting(connections: Iterable[Connection]) -> QuerySet[Any]:
    """The links of these connections that wait for a person, each with its `kind`."""
    ids = [connection.pk for connection in connections if not connection.calls_us]
    return CustomerLink.objects.filter(MAY_NEED_SOMEBODY, _WAITS, connection__in=ids).annotate(kind=_KIND)


def kind_of(link: CustomerLink) -> str:
    """The kind that `waiting` gives this link, or "" where it does not wait for a person."""
    if link.is_duplicate:
        return "duplicate" if link.is_active else ""
    if link.deleted_at is not None:
        customer = link.customer
        left = "unlinked" in link.tombstone or customer.archived_at or customer.merged_into_id
        return "" if left else "remote_deleted"
    if link.state == LinkState.REJECTED:
        return "rejected"
    if link.state == LinkState.UNCERTAIN:
        return "uncertain" if link.next_attempt_at is None else ""
    return "conflict" if link.state == LinkState.CONFLICT or link.conflicts else ""


def counted(connections: Iterable[Connection]) -> dict[tuple[int, str], tuple[int, datetime]]:
    """How many links of each connection wait for what, and since when the oldest does. One statement."""
    rows = waiting(connections).order_by().values_list("connection_id", "kind")
    return {(pk, kind): (n, oldest) for pk, kind, n, oldest in rows.annotate(n=Count("pk"), at=Min("updated_at"))}


def may_settle(request: HttpRequest) -> tuple[str, ...]:
    """The kinds that this person may act on."""
    user = request.user
    kinds: tuple[str, ...] = ()
    if user.has_perm(LINKS):
        kinds = KINDS if user.has_perm(PUSH) else KINDS[:1] if user.has_perm(EDIT) else ()
    if user.has_perm("connectors.change_connection"):
        kinds = (*kinds, RECONNECT)
    if user.has_perm("connectors.change_issue"):
        kinds = (*kinds, ISSUE)
    return kinds


def open_issues(connections: Iterable[Connection]) -> QuerySet[Issue]:
    """What else a person has to see to at these connections."""
    return Issue.objects.filter(connection__in=list(connections), resolved_at=None).exclude(kind__in=LISTED)


def kind_badge(kind: str) -> str:
    if kind == ISSUE:
        return badge("!", "Issue", "warning")
    return link_badge(kind)


def safe_text(text: str, customer: Customer, *, clear: bool) -> str:
    """What a system said of a customer; without the right (`clear`), without what is personal."""
    return text if clear else redacted(text, vars(customer))


def sentence(link: CustomerLink, kind: str, *, now: datetime, clear: bool) -> str:
    """What happened to this link, as that kind. Needs connection and customer loaded."""
    return safe_text(link.sentence(now=now, key=kind), link.customer, clear=clear)


def cursor_of(link: CustomerLink) -> str:
    return f"{link.updated_at.isoformat()}|{link.pk}"


def after(rows: QuerySet[CustomerLink], cursor: str) -> QuerySet[CustomerLink]:
    """The rows behind the one with this cursor; all of them where it is none."""
    moment, _, pk = cursor.partition("|")
    try:
        at = parse_datetime(moment)
        at = at.astimezone(UTC) if at and timezone.is_aware(at) else None
    except (ValueError, OverflowError):
        at = None
    if at is None or not pk.isdecimal() or len(pk) > 18:
        return rows
    return rows.filter(Q(updated_at__gt=at) | Q(updated_at=at, pk__gt=int(pk)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One link that waits, as the list shows it."""

    link: CustomerLink
    kind: str
    sentence: str
    field: str  # the customer's field that the system objects to, where this person can edit it
    can_release: bool

    @property
    def badge(self) -> str:
        return kind_badge(self.kind)

    @property
    def field_label(self) -> str:
        return label(self.field)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Links of one connection that were refused for one cause."""

    connection: Connection
    cause: str
    number: int
    oldest: datetime
    words: str


class NeedsYouPages(ReadOnlyAdmin):
    """The pages of the queue, on the admin of links."""

    def has_push_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm(PUSH))

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path(
                "needs-you/",
                require_safe(view(self.needs_you_view)),
                name="connectors_customerlink_needs_you",
            ),
            path(
                "push-again/",
                require_POST(view(self.push_again_view)),
                name="connectors_customerlink_push_again",
            ),
            *super().get_urls(),
        ]

    def needs_you_view(self, request: HttpRequest) -> HttpResponse:
        """What waits for this person, oldest first."""
        kinds = may_settle(request)
        if not kinds and not self.has_view_permission(request):
            raise PermissionDenied
        now = database_clock()
        clear = sees(request.user)
        connections = own_connections(request)
        chosen = _chosen(connections, request.GET.get("connection", ""))
        wanted = request.GET.get("kind", "")
        shown = [kind for kind in kinds if wanted in ("", kind)]
        cause = request.GET.get("cause", "").replace("\x00", "")
        of_links = [kind for kind in shown if kind in KINDS]
        numbers = counted(connections) if set(kinds) & set(KINDS) else {}
        rows: QuerySet[Any] = waiting(chosen) if of_links else CustomerLink.objects.none()
        if of_links and len(of_links) < len(KINDS):
            rows = rows.filter(kind__in=of_links)
        if cause:
            rows = rows.filter(state=LinkState.REJECTED, fingerprint=cause)
        by_pk = {connection.pk: connection for connection in connections}
        page = list(
            after(rows, request.GET.get("after", ""))
            .select_related("customer")
            .defer(*BULKY)
            .order_by("updated_at", "pk")[: PAGE + 1]
        )
        more, page = page[PAGE - 1] if len(page) > PAGE else None, page[:PAGE]
        for link in page:
            link.connection = by_pk[link.connection_id]
        issues = self._issues(chosen) if ISSUE in shown and not cause else []
        query = {name: request.GET[name] for name in ("kind", "connection", "cause") if request.GET.get(name)}
        context = {
            **self.admin_site.each_context(request),
            "title": "Needs you",
            "opts": self.opts,
            "may_act": bool(kinds),
            "kinds": _tabs(kinds, numbers, connections, request, issues=self._issue_counts(connections, kinds)),
            "chosen_kind": wanted,
            "connections": [c for c in connections if not c.calls_us],
            "chosen_connection": request.GET.get("connection", ""),
            "reconnect": [
                (connection, health_sentence(connection, now=now))
                for connection in chosen
                if RECONNECT in shown and connection.state == Connection.State.NEEDS_REAUTH and not cause
            ],
            "reconnect_badge": link_badge(RECONNECT),
            "issues": issues[:OTHERS],
            "more_issues": len(issues) > OTHERS,
            "issue_badge": kind_badge(ISSUE),
            "reasons": self._reasons(chosen, clear=clear) if "rejected" in shown else [],
            "cause": cause,
            "rows": [self._row(request, link, now=now, clear=clear) for link in page],
            "shows_links": bool(of_links),
            "several_organizations": len(organizations(request)) > 1,
            "can_release": self.has_push_permission(request),
            "next": f"?{urlencode({**query, 'after': cursor_of(more)})}" if more else "",
            "here": f"{request.path}?{urlencode(query)}" if query else request.path,
            "conflicts_url": reverse("admin:connectors_customerlink_conflicts"),
        }
        return TemplateResponse(request, "connectors/needs_you.html", context)

    def _row(self, request: HttpRequest, link: Any, *, now: datetime, clear: bool) -> Row:
        editable = link.error_field in EDITABLE and request.user.has_perm(EDIT)
        return Row(
            link=link,
            kind=link.kind,
            sentence=sentence(link, link.kind, now=now, clear=clear),
            field=link.error_field if editable and link.kind == "rejected" else "",
            can_release=link.kind == "rejected" and self.has_push_permission(request),
        )

    def _issues(self, chosen: Sequence[Connection]) -> list[Issue]:
        by_pk = {connection.pk: connection for connection in chosen}
        issues = list(open_issues(chosen).order_by("first_at").defer("details")[: OTHERS + 1])
        for issue in issues:
            issue.connection = by_pk[issue.connection_id]
        return issues

    def _issue_counts(self, connections: Sequence[Connection], kinds: Sequence[str]) -> tuple[int, datetime | None]:
        if ISSUE not in kinds:
            return 0, None
        found = open_issues(connections).aggregate(n=Count("pk"), at=Min("first_at"))
        return found["n"], found["at"]

    def _reasons(self, chosen: Sequence[Connection], *, clear: bool) -> list[Reason]:
        """What was refused for one cause, the most frequent first. Without the right no record's words are shown."""
        by_pk = {connection.pk: connection for connection in chosen}
        rows = (
            waiting(chosen)
            .filter(kind="rejected")
            .order_by()
            .values("connection_id", "fingerprint")
            .annotate(n=Count("pk"), at=Min("updated_at"), error=Min("error"), field=Min("error_field"))
            .order_by("-n", "connection_id", "fingerprint")
        )
        reasons = []
        for row in rows[:REASONS]:
            system = by_pk[row["connection_id"]]
            field = label(row["field"]) if row["field"] else "the record"
            words = STATUSES["rejected"].sentence.format(system=system.name, field=field, error=row["error"])
            reasons.append(
                Reason(
                    connection=system,
                    cause=row["fingerprint"],
                    number=row["n"],
                    oldest=row["at"],
                    words=words if clear else f"{system.name} refuses {field}.",
                )
            )
        return reasons

    def push_again_view(self, request: HttpRequest) -> HttpResponse:
        """First tells how many are tried again; the second POST does it."""
        if not self.has_push_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        connection = next(iter(_chosen(own_connections(request), request.POST.get("connection", "") or "-")), None)
        if connection is None:
            raise Http404
        cause = request.POST.get("cause", "").replace("\x00", "")
        links = CustomerLink.objects.filter(connection=connection, state=LinkState.REJECTED, fingerprint=cause)
        back = reverse("admin:connectors_customerlink_needs_you")
        if not request.POST.get("confirmed"):
            ready = releasable(links, at=database_clock())
            clear = sees(request.user)
            first = list(ready.select_related("customer").defer(*BULKY).order_by("updated_at", "pk")[:5])
            for link in first:
                link.connection = connection
            context = {
                **self.admin_site.each_context(request),
                "title": f"Push again to {connection}",
                "opts": self.opts,
                "connection": connection,
                "health": health_sentence(connection, now=timezone.now()),
                "health_word": HEALTH["paused"].word if connection.state == Connection.State.PAUSED else "",
                "cause": cause,
                "number": ready.count(),
                "first": [(link, safe_text(link.error, link.customer, clear=clear)) for link in first],
                "back": back,
            }
            return TemplateResponse(request, "connectors/push_again.html", context)
        try:
            run = release(connection=connection, links=links, actor=actor_of(request))
        except WrongState as error:
            self.message_user(request, str(error), messages.WARNING)
            return HttpResponseRedirect(back)
        text = f"{run.planned} customers are sent to {connection} again, as soon as a worker is free."
        self.message_user(request, text, messages.SUCCESS)
        if request.user.has_perm("connectors.view_syncrun"):
            return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[run.pk]))
        return HttpResponseRedirect(back)


def _chosen(connections: Sequence[Connection], wanted: str) -> list[Connection]:
    """The connection that is asked for, if it is one of these; all of them where none is asked for."""
    return [connection for connection in connections if not wanted or str(connection.pk) == wanted]


def _tabs(
    kinds: Sequence[str],
    numbers: Mapping[tuple[int, str], tuple[int, datetime]],
    connections: Sequence[Connection],
    request: HttpRequest,
    *,
    issues: tuple[int, datetime | None],
) -> list[tuple[str, str, int, datetime | None, str]]:
    """Kind, badge, how many, the oldest, and the query that shows these alone."""
    chosen = request.GET.get("connection", "")
    tabs = []
    for kind in kinds:
        number, oldest = told(kind, numbers, connections, issues=issues)
        query = urlencode({"kind": kind, **({"connection": chosen} if chosen else {})})
        tabs.append((kind, kind_badge(kind), number, oldest, f"?{query}"))
    return tabs


def told(
    kind: str,
    numbers: Mapping[tuple[int, str], tuple[int, datetime]],
    connections: Sequence[Connection],
    *,
    issues: tuple[int, datetime | None],
) -> tuple[int, datetime | None]:
    """How many of this kind wait in all, and since when the oldest does, where that is known."""
    if kind == ISSUE:
        return issues
    if kind == RECONNECT:
        return sum(connection.state == Connection.State.NEEDS_REAUTH for connection in connections), None
    found = [entry for (_, of), entry in numbers.items() if of == kind]
    return sum(n for n, _ in found), min((at for _, at in found), default=None)
