"""The pages on which a person settles what waits: one link at a time, and fields that changed on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import models, transaction
from django.db.models import F, Func, Q, Window
from django.db.models.functions import RowNumber
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.crypto import salted_hmac
from django.utils.http import url_has_allowed_host_and_scheme, urlencode
from django.views.decorators.http import require_http_methods

from connectors.admin.badges import link_badge
from connectors.admin.filters import own_connections
from connectors.admin.needs import (
    EDIT,
    PAGE,
    NeedsYouPages,
    after,
    cursor_of,
    kind_of,
    safe_text,
    sentence,
)
from connectors.exceptions import ConnectorError, Gone
from connectors.models import MAY_NEED_SOMEBODY, Conflict, Connection, CustomerLink, PushIntent, SyncRun
from connectors.provider import Provider, Record
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import STATUSES, LinkState
from connectors.sync import resolve
from connectors.sync.clock import database_clock
from connectors.sync.deletes import goes_with_archive
from connectors.sync.resolve import HERE, THERE, Likely, WrongState
from connectors.sync.settle import unanswered
from customers import editing, jsontext
from customers.admin.person import actor_of, organizations
from customers.editing import EDITABLE, InvalidCustomer
from customers.forms import label, shown
from customers.models import Customer, CustomerChange
from customers.privacy import masked, sees

OTHER = "other"
SIDES = (HERE, THERE, OTHER)
# A person waits for the answers.
CALL_SECONDS = 10.0
CANDIDATES = 5
# Of each customer in conflict so many changes are looked through for who changed the field here.
CHANGES = 20
TOLD = {
    "release": "{customer} is sent to {system} again as soon as a worker is free.",
    "create_again": "{customer} is created in {system} again, once the lost request can no longer arrive.",
    "this_is_it": "{customer} is linked to the record in {system}. What has changed since follows as an update.",
    "keep_waiting": "Nothing was changed. A pull or the daily sweep may still find the record in {system}.",
    "recreate": "{customer} is created in {system} again as soon as a worker is free.",
    "unlink": "{customer} stays deleted in {system}. Nobody is asked about it again.",
    "archive": "{customer} is in the archive.",
    "keep_both": "Both records stay in {system}. Nobody is asked about it again.",
}


@dataclass(frozen=True, kw_only=True)
class InConflict:
    """A field that changed on both sides, as the page shows it: texts are masked for who may not see them."""

    link: CustomerLink
    field: str
    base: str
    here: str
    there: str
    who: str
    changed_at: datetime | None
    noticed_at: datetime | None
    suggested: str
    token: str

    @property
    def label(self) -> str:
        return label(self.field)

    @property
    def key(self) -> str:
        return f"{self.link.pk}-{self.field}"

    @property
    def can_type(self) -> bool:
        return self.field in EDITABLE and isinstance(Customer._meta.get_field(self.field), models.CharField)


def token_of(here: Any, there: Any) -> str:
    """Tells whether the two values are still those that a page showed."""
    # Keyed, because it stands on pages of people who may not see the values.
    return salted_hmac("conflict", jsontext.dumps([here, there], option=jsontext.SORT_KEYS)).hexdigest()[:16]


def in_conflict(links: Sequence[CustomerLink], *, clear: bool) -> list[InConflict]:
    """The fields of these links that wait for a decision. Two statements, however many there are."""
    links = [link for link in links if link.conflicts and not link.is_duplicate and link.deleted_at is None]
    if not links:
        return []
    log = Conflict.objects.filter(
        link__in=[link.pk for link in links], outcome=Conflict.Outcome.WAITING, resolved_at=None
    )
    noticed = {(pk, field): at for pk, field, at in log.order_by("pk").values_list("link_id", "field", "at")}
    fields = sorted({field for link in links for field in link.conflicts})
    authors = _authors([link.customer_id for link in links], fields)
    rows = []
    for link in links:
        policies = link.connection.field_policies
        for field, entry in sorted(link.conflicts.items()):
            here, there = getattr(link.customer, field), entry["there"]
            policy = policies.get(field, link.connection.conflict_policy)
            base, ours, theirs = (
                shown(value if clear else masked(field, value)) for value in (entry.get("base"), here, there)
            )
            change = authors.get((link.customer_id, field))
            rows.append(
                InConflict(
                    link=link,
                    field=field,
                    base=base,
                    here=ours,
                    there=theirs,
                    who=change[0] if change else "",
                    changed_at=change[1] if change else None,
                    noticed_at=noticed.get((link.pk, field)),
                    suggested={
                        Connection.ConflictPolicy.HUB_WINS: HERE,
                        Connection.ConflictPolicy.PROVIDER_WINS: THERE,
                    }.get(policy, ""),
                    token=token_of(here, there),
                )
            )
    return rows


def _authors(customers: Sequence[Any], fields: Sequence[str]) -> dict[tuple[Any, str], tuple[str, datetime]]:
    """Who changed a field of a customer last, and when, as far as its last changes tell."""
    rows = (
        CustomerChange.objects.filter(customer__in=customers, changes__has_any_keys=list(fields))
        .annotate(place=Window(RowNumber(), partition_by="customer_id", order_by="-version"))
        .filter(place__lte=CHANGES)
        .order_by("version")
    )
    return {
        (change.customer_id, field): (change.actor_name, change.at)
        for change in rows
        for field in change.changes
        if field in fields
    }


def decide_field(*, link: CustomerLink, field: str, side: str, other: str, seen: str, request: HttpRequest) -> SyncRun:
    """End the conflict over a field as the person chose. All or nothing. Raises WrongState."""
    actor = actor_of(request)
    organization = link.connection.organization
    with transaction.atomic():
        locked = editing.lock(organization=organization, ids=[link.customer_id])
        fresh = CustomerLink.objects.select_related("connection__organization", "customer").get(pk=link.pk)
        customer = locked.get(link.customer_id)
        entry = fresh.conflicts.get(field)
        if customer is not None and entry is not None and token_of(getattr(customer, field), entry["there"]) != seen:
            raise WrongState(
                f"{label(field)} of {fresh.customer} has changed since this page was made. Look again, then decide."
            )
        if side == OTHER and customer is not None and entry is not None:
            try:
                editing.update(
                    organization=organization, values={customer.pk: {field: other}}, actor=actor, locked=locked
                )
            except InvalidCustomer as error:
                words = " ".join(
                    text for fields in error.errors.values() for texts in fields.values() for text in texts
                )
                raise WrongState(f"{label(field)} of {fresh.customer}: {words}") from error
        return resolve.keep_field(link=fresh, field=field, side=THERE if side == THERE else HERE, actor=actor)


class ResolvePages(NeedsYouPages):
    """The pages that settle, on the admin of links."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        either = require_http_methods(["GET", "HEAD", "POST"])
        return [
            path("conflicts/", either(view(self.conflicts_view)), name="connectors_customerlink_conflicts"),
            path("<path:object_id>/resolve/", either(view(self.resolve_view)), name="connectors_customerlink_resolve"),
            *super().get_urls(),
        ]

    # One link

    def resolve_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """What is known of a link that waits, and what may be decided. Only a POST decides, or asks the system."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        link = self._link(request, object_id)
        if request.method != "POST":
            return self._page(request, link)
        if not self.has_push_permission(request):
            raise PermissionDenied
        decision = request.POST.get("decision", "")
        if decision == "search":
            return self._search(request, link)
        if decision == "fields":
            self._decide_fields(request, {link.pk: link})
            return self._onward(request, link)
        decide = self._decisions(request).get(decision)
        if decide is None:
            return HttpResponseBadRequest("There is no such decision.")
        if decision == "archive" and not request.user.has_perm(EDIT):
            raise PermissionDenied
        try:
            decide(link)
        except (WrongState, ConnectorError, UnsealError) as error:
            told = safe_text(str(error), link.customer, clear=sees(request.user))
            self.message_user(request, f"{told} Nothing was changed.", messages.WARNING)
            return HttpResponseRedirect(_own_address(request, link))
        text = TOLD[decision].format(customer=link.customer, system=link.connection)
        self.message_user(request, text, messages.SUCCESS)
        return self._onward(request, link)

    def _link(self, request: HttpRequest, object_id: str) -> CustomerLink:
        link: CustomerLink = self.get_object(request, object_id)
        return CustomerLink.objects.select_related("connection__organization", "customer", "original_customer").get(
            pk=link.pk
        )

    def _decisions(self, request: HttpRequest) -> dict[str, Callable[[CustomerLink], object]]:
        actor = actor_of(request)

        def this_is_it(link: CustomerLink) -> object:
            remote_id = request.POST.get("remote_id", "").replace("\x00", "").strip()
            provider = _provider(link.connection)
            record = _read(link, remote_id, provider) if remote_id else None
            return resolve.this_is_it(link=link, remote_id=remote_id, provider=provider, record=record, actor=actor)

        def release(link: CustomerLink) -> object:
            links = CustomerLink.objects.filter(pk=link.pk)
            return resolve.release(connection=link.connection, links=links, actor=actor)

        def archive(link: CustomerLink) -> object:
            organization = link.connection.organization
            return editing.archive(organization=organization, ids=[link.customer_id], actor=actor)

        return {
            "release": release,
            "this_is_it": this_is_it,
            "create_again": lambda link: resolve.create_again(link=link, actor=actor),
            "keep_waiting": lambda link: resolve.keep_waiting(link=link, actor=actor),
            "recreate": lambda link: resolve.recreate(link=link, actor=actor),
            "unlink": lambda link: resolve.unlink(link=link, actor=actor),
            "keep_both": lambda link: resolve.keep_both(link=link, actor=actor),
            "archive": archive,
        }

    def _search(self, request: HttpRequest, link: CustomerLink) -> HttpResponse:
        """Ask the system for records that may be the lost one. Reads only."""
        try:
            provider = _provider(link.connection)
            session = provider.session(link.connection)
            session.deadline = CALL_SECONDS
            found, whole = resolve.likely(link=link, provider=provider, session=session)
        except (WrongState, ConnectorError, UnsealError) as error:
            told = safe_text(str(error), link.customer, clear=sees(request.user))
            self.message_user(request, f"{link.connection} could not be searched: {told}", messages.WARNING)
            return HttpResponseRedirect(_own_address(request, link))
        lists = provider.capabilities(link.connection).lists
        return self._page(request, link, found=found[:CANDIDATES], whole=whole, lists=lists)

    def _page(
        self,
        request: HttpRequest,
        link: CustomerLink,
        *,
        found: Sequence[Likely] | None = None,
        whole: bool = False,
        lists: bool = True,
    ) -> HttpResponse:
        now = database_clock()
        clear = sees(request.user)
        key = link.status_key(now=now)
        kind = "" if link.connection.calls_us else kind_of(link)
        shown_key = kind or key
        context = {
            **self.admin_site.each_context(request),
            "title": f"{link.customer} in {link.connection}",
            "opts": self.opts,
            "link": link,
            "kind": kind,
            "badge": link_badge(shown_key),
            "sentence": sentence(link, kind, now=now, clear=clear),
            "held_up": safe_text(link.sentence(now=now), link.customer, clear=clear)
            if kind and key in ("paused", "reconnect")
            else "",
            "turn": STATUSES[shown_key].turn,
            "can_push": self.has_push_permission(request),
            "can_edit": request.user.has_perm(EDIT),
            "clear": clear,
            "next": safe_next(request),
            "customer_url": reverse("admin:customers_customer_change", args=[link.customer_id]),
            "link_url": reverse("admin:connectors_customerlink_change", args=[link.pk]),
            "connection_url": reverse("admin:connectors_connection_change", args=[link.connection_id]),
            "field": link.error_field if link.error_field in EDITABLE else "",
            "field_label": label(link.error_field) if link.error_field else "",
            "rows": in_conflict([link], clear=clear),
            "error": safe_text(link.error, link.customer, clear=clear),
        }
        if link.state == LinkState.UNCERTAIN and link.remote_id is None:
            context |= self._lost(link, clear=clear, found=found, whole=whole, lists=lists)
        if kind == "remote_deleted":
            context |= self._gone(link, clear=clear)
        if link.is_duplicate:
            context["leading"] = CustomerLink.objects.filter(
                connection=link.connection_id, customer=link.customer_id, is_duplicate=False
            ).first()
        return TemplateResponse(request, "connectors/resolve.html", context)

    def _lost(
        self, link: CustomerLink, *, clear: bool, found: Sequence[Likely] | None, whole: bool, lists: bool
    ) -> dict[str, Any]:
        lost = unanswered([link]).get(link.pk)
        if lost is None or lost.kind != PushIntent.Kind.CREATE:
            return {}
        provider = PROVIDERS.get(link.connection.provider)
        fields = [name for name, value in lost.sent_values.items() if value not in (None, "", {})]
        columns = found or ()

        def cell(name: str, values: Mapping[str, Any]) -> str:
            return shown(values.get(name) if clear else masked(name, values.get(name)))

        return {
            "lost": lost,
            "lost_error": safe_text(lost.error, link.customer, clear=clear),
            "looks": link.next_attempt_at is not None,
            "can_search": bool(provider and provider.capabilities(link.connection).lists),
            "sent": [
                (label(name), cell(name, lost.sent_values), [cell(name, one.record.values) for one in columns])
                for name in sorted(fields)
            ],
            "payload": jsontext.dumps(lost.payload, option=jsontext.INDENT).decode() if clear else "",
            "found": found,
            "whole": whole,
            "lists": lists,
        }

    def _gone(self, link: CustomerLink, *, clear: bool) -> dict[str, Any]:
        was = link.tombstone.get("base_remote") or link.tombstone.get("base_local") or {}
        others = CustomerLink.objects.filter(customer=link.customer_id, remote_id__isnull=False, deleted_at=None)
        return {
            "archiving_deletes": [
                one.connection.name
                for one in others.select_related("connection").defer("remote_data", "base_local", "base_remote")
                if goes_with_archive(one, PROVIDERS.get(one.connection.provider))
            ],
            "evidence": link.tombstone.get("evidence", ""),
            "was": [
                (label(name), shown(value if clear else masked(name, value)))
                for name, value in sorted(was.items())
                if value not in (None, "", {})
            ],
        }

    def _onward(self, request: HttpRequest, link: CustomerLink) -> HttpResponse:
        """To where the person came from, else to the customer."""
        if following := safe_next(request):
            return HttpResponseRedirect(following)
        if request.user.has_perm("customers.view_customer") or request.user.has_perm(EDIT):
            return HttpResponseRedirect(reverse("admin:customers_customer_change", args=[link.customer_id]))
        return HttpResponseRedirect(reverse("admin:connectors_customerlink_resolve", args=[link.pk]))

    # Fields in conflict

    def conflicts_view(self, request: HttpRequest) -> HttpResponse:
        """Fields that changed on both sides, oldest first; a POST settles those for which a side was chosen."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        connections = [connection for connection in own_connections(request) if not connection.calls_us]
        query = {name: request.GET[name] for name in ("connection", "field", "suggest") if request.GET.get(name)}
        if request.method == "POST":
            if not self.has_push_permission(request):
                raise PermissionDenied
            pks = {int(pk) for key in request.POST if (pk := _pk_of(key))}
            chosen = self.get_queryset(request).select_related("connection__organization", "customer")
            links = {link.pk: link for link in chosen.filter(pk__in=pks)}
            if links.keys() != pks:
                raise Http404
            self._decide_fields(request, links)
            left = {name: value for name, value in query.items() if name != "suggest"}
            return HttpResponseRedirect(f"{request.path}?{urlencode(left)}" if left else request.path)
        wanted, field = query.get("connection", ""), query.get("field", "")
        by_pk = {c.pk: c for c in connections if wanted in ("", str(c.pk))}
        nonempty = Q(Func(F("conflicts"), template="(%(expressions)s <> '{}')", output_field=models.BooleanField()))
        rows = CustomerLink.objects.filter(
            MAY_NEED_SOMEBODY, nonempty, connection__in=by_pk, is_duplicate=False, deleted_at=None
        )
        if field in EDITABLE:
            rows = rows.filter(conflicts__has_key=field)
        page = list(
            after(rows, request.GET.get("after", ""))
            .select_related("customer")
            .defer("remote_data", "base_local", "base_remote", "tombstone")
            .order_by("updated_at", "pk")[: PAGE + 1]
        )
        more, page = page[PAGE - 1] if len(page) > PAGE else None, page[:PAGE]
        for link in page:
            link.connection = by_pk[link.connection_id]
        shown_rows = [
            row for row in in_conflict(page, clear=sees(request.user)) if field not in EDITABLE or row.field == field
        ]
        context = {
            **self.admin_site.each_context(request),
            "title": "Conflicts",
            "opts": self.opts,
            "rows": shown_rows,
            "connections": connections,
            "fields": sorted(((name, label(name)) for name in fields_of(connections)), key=lambda pair: pair[1]),
            "chosen_connection": wanted,
            "chosen_field": field,
            "suggest": query.get("suggest") if query.get("suggest") in SIDES[:2] else "",
            "suggest_here": f"?{urlencode({**query, 'suggest': HERE})}",
            "can_push": self.has_push_permission(request),
            "can_edit": request.user.has_perm(EDIT),
            "several": True,
            "several_organizations": len(organizations(request)) > 1,
            "log_url": reverse("admin:connectors_conflict_changelist")
            if request.user.has_perm("connectors.view_conflict")
            else "",
            "next": f"?{urlencode({**query, 'after': cursor_of(more)})}" if more else "",
        }
        return TemplateResponse(request, "connectors/conflicts.html", context)

    def _decide_fields(self, request: HttpRequest, links: Mapping[int, CustomerLink]) -> None:
        """Settle the fields for which a side was chosen, each for itself, and say what came of it."""
        chosen = [
            (links[int(pk)], key.split("-", 2)[2], side)
            for key, side in request.POST.items()
            if (pk := _pk_of(key)) and int(pk) in links and side in SIDES
        ]
        if any(side != HERE for _, _, side in chosen) and not request.user.has_perm(EDIT):
            raise PermissionDenied
        done = 0
        for link, field, side in chosen:
            key = f"{link.pk}-{field}"
            try:
                decide_field(
                    link=link,
                    field=field,
                    side=side,
                    other=request.POST.get(f"other-{key}", "").replace("\x00", "").strip(),
                    seen=request.POST.get(f"seen-{key}", ""),
                    request=request,
                )
                done += 1
            except WrongState as error:
                self.message_user(request, f"{error} Nothing was changed there.", messages.WARNING)
        if done:
            self.message_user(request, f"{done} of {len(chosen)} fields are decided.", messages.SUCCESS)
        elif not chosen:
            self.message_user(request, "No side was chosen. Nothing was changed.", messages.WARNING)


def _pk_of(key: str) -> str:
    """The link that a choice posted as side-17-phone is about; "" for any other name."""
    name, _, rest = key.partition("-")
    pk, _, field = rest.partition("-")
    return pk if name == "side" and field and pk.isdecimal() and len(pk) <= 18 else ""


def fields_of(connections: Iterable[Connection]) -> set[str]:
    """What may be in conflict: the fields that these systems know."""
    providers = [PROVIDERS[c.provider] for c in connections if c.provider in PROVIDERS]
    return {name for provider in providers for name in provider.fields}


def _provider(connection: Connection) -> Provider:
    provider = PROVIDERS.get(connection.provider)
    if provider is None:
        raise WrongState(f"The provider of {connection} is not known here.")
    return provider


def _read(link: CustomerLink, remote_id: str, provider: Provider) -> Record | None:
    """The record, where the system can show it; None where it cannot. Raises WrongState if there is none."""
    if not provider.capabilities(link.connection).fetches:
        return None
    session = provider.session(link.connection)
    session.deadline = CALL_SECONDS
    try:
        record = provider.fetch(session, link.connection, remote_id)
    except Gone as error:
        raise WrongState(f"{link.connection} has no record {remote_id}.") from error
    if record.deleted:
        raise WrongState(f"Record {remote_id} is deleted in {link.connection}.")
    return record


def safe_next(request: HttpRequest) -> str:
    """Where to go afterwards, if that is an address of this admin."""
    wanted = request.POST.get("next") or request.GET.get("next") or ""
    own = url_has_allowed_host_and_scheme(wanted, allowed_hosts=None, require_https=request.is_secure())
    return wanted if own and wanted.startswith(reverse("admin:index")) else ""


def _own_address(request: HttpRequest, link: CustomerLink) -> str:
    following = safe_next(request)
    query = f"?{urlencode({'next': following})}" if following else ""
    return reverse("admin:connectors_customerlink_resolve", args=[link.pk]) + query
