"""The first steps of a new connection: log in, see whose account it is, choose what goes where, compare, send a few
customers, open. Nothing goes out or comes in by itself before it is open, and everything is never the first push.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone

from connectors.admin.badges import link_badge
from connectors.exceptions import ConnectorError, Rejected
from connectors.models import Connection, CustomerLink
from connectors.provider import Provider, Record
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.push import push
from connectors.sync.request import request as request_push
from customers.admin.own import OwnAdmin
from customers.admin.person import actor_of
from customers.ids import parse_public_id, uuid7
from customers.models import Customer
from customers.normalize import email_key, name_key
from customers.privacy import masked, redacted, sees

CANARY = 10
CALL_SECONDS, CANARY_SECONDS, MATCH_SECONDS = 10.0, 20.0, 20.0
MATCH_PAGES, MATCH_ROWS = 5, 100
OFFERED = 50


def canary_succeeded(connection: Connection) -> bool:
    """Whether a customer has been accepted there."""
    return CustomerLink.objects.filter(
        connection=connection, pushed_version__gt=0, is_duplicate=False, deleted_at=None, remote_id__isnull=False
    ).exists()


STEPS = ("login", "direction", "match", "canary", "open")


def progress(connection: Connection, *, sent: bool) -> dict[str, str]:
    """Where a connection is: each step is "done", "now" or "later"."""
    done = {
        "login": bool(connection.setup.get("test", {}).get("good")),
        "direction": bool(connection.setup.get("direction")),
        "match": bool(connection.setup.get("match")),
        "canary": sent or bool(connection.setup.get("pulled")),
        "open": connection.opened_at is not None,
    }
    steps: dict[str, str] = {}
    for name in STEPS:
        now = "now" not in steps.values()
        steps[name] = "done" if done[name] else "now" if now else "later"
    return steps


@dataclass(kw_only=True)
class Matches:
    """Records there, by what the hub knows of them."""

    counts: Counter[str]
    complete: bool


def matches(connection: Connection, provider: Provider, *, customers: int) -> Matches:
    """Read the first records there and look for customers of the same e-mail address, or else the same name.

    Counts `linked`, `email`, `name`, `several` (not certain), `nobody` and `unreadable`. Raises ConnectorError.
    """
    session = provider.session(connection)
    session.deadline = CALL_SECONDS
    ends = time.monotonic() + MATCH_SECONDS
    found: Counter[str] = Counter()
    cursor: str | None = None
    for _ in range(MATCH_PAGES):
        page = provider.page(session, connection, cursor=cursor, since=None, limit=MATCH_ROWS)
        records = [record for record in page.records if isinstance(record, Record)]
        found["unreadable"] += len(page.records) - len(records)
        found.update(_judged(connection, records))
        cursor = page.next
        if cursor is None or time.monotonic() >= ends:
            break
    return Matches(counts=found, complete=cursor is None)


def _judged(connection: Connection, records: Sequence[Record]) -> Counter[str]:
    """Three queries for a page of records."""
    ids = [record.remote_id for record in records if record.remote_id]
    linked = set(
        CustomerLink.objects.filter(connection=connection, remote_id__in=ids).values_list("remote_id", flat=True)
    )
    rows = Customer.objects.filter(organization=connection.organization_id, archived_at=None, merged_into=None)
    emails = {key for record in records if (key := email_key(str(record.values.get("email") or "")))}
    names = {key for record in records if (key := name_key(str(record.values.get("name") or "")))}
    by_email = Counter(rows.filter(email_key__in=emails).values_list("email_key", flat=True))
    by_name = Counter(rows.filter(name_key__in=names).values_list("name_key", flat=True))
    found: Counter[str] = Counter()
    for record in records:
        email = by_email[email_key(str(record.values.get("email") or ""))] if record.values.get("email") else 0
        name = by_name[name_key(str(record.values.get("name") or ""))] if record.values.get("name") else 0
        if record.remote_id in linked:
            found["linked"] += 1
        elif email > 1 or (not email and name > 1):
            found["several"] += 1
        elif email:
            found["email"] += 1
        elif name:
            found["name"] += 1
        else:
            found["nobody"] += 1
    return found


class FirstSteps(OwnAdmin):
    """The page of the first steps, and its buttons."""

    def get_urls(self) -> list[URLPattern]:
        opts = self.opts
        return [
            path(
                "<path:object_id>/first-steps/",
                self.admin_site.admin_view(self.first_steps_view),
                name=f"{opts.app_label}_{opts.model_name}_first_steps",
            ),
            self.posted("direction", self.direction_view),
            self.posted("match", self.match_view),
            self.posted("canary", self.canary_view),
            self.posted("open", self.open_view),
            *super().get_urls(),
        ]

    def to_first_steps(self, connection: Connection) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:connectors_connection_first_steps", args=[connection.pk]))

    def response_add(self, request: HttpRequest, obj: Connection, post_url_continue: str | None = None) -> HttpResponse:
        answer = super().response_add(request, obj, post_url_continue)
        plain = not {"_addanother", "_continue", "_popup"} & request.POST.keys()
        return self.to_first_steps(obj) if plain and obj.opened_at is None else answer

    def remember(self, connection: Connection, name: str, **what: Any) -> None:
        """Keep what a step found: counts and names of accounts, nothing of customers."""
        with transaction.atomic():
            row = Connection.objects.select_for_update().only("setup").get(pk=connection.pk)
            connection.setup = {**row.setup, name: {**what, "at": timezone.now().isoformat(timespec="seconds")}}
            Connection.objects.filter(pk=connection.pk).update(setup=connection.setup)

    def open_now(self, connection: Connection) -> None:
        if connection.opened_at is None:
            connection.opened_at = timezone.now()
            Connection.objects.filter(pk=connection.pk, opened_at=None).update(opened_at=connection.opened_at)

    def first_steps_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        if not self.has_view_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if connection.calls_us or connection.provider not in PROVIDERS:
            return self.back(connection)
        provider = PROVIDERS[connection.provider]
        may_push = connection.pushes and request.user.has_perm("connectors.push_customerlink")
        now = timezone.now()
        clear = sees(request.user)
        sent = []
        for link in (
            CustomerLink.objects.filter(connection=connection)
            .select_related("customer")
            .defer("remote_data", "base_local", "base_remote")
            .order_by("-updated_at")[:CANARY]
        ):
            link.connection = connection
            sentence = link.sentence(now=now)
            sentence = sentence if clear else redacted(sentence, vars(link.customer))
            sent.append((link, link_badge(link.status_key(now=now)), sentence))
        succeeded = canary_succeeded(connection)
        term = request.GET.get("q", "").replace("\x00", "").strip()
        may_view = may_push and request.user.has_perm("customers.view_customer")
        context = {
            **self.admin_site.each_context(request),
            "title": f"First steps with {connection}",
            "opts": self.opts,
            "connection": connection,
            "provider": provider,
            "step": progress(connection, sent=succeeded),
            "setup": connection.setup,
            "match": connection.setup.get("match", {}),
            "directions": [
                (value, text, value == connection.direction)
                for value, text in Connection.Direction.choices
                if value != Connection.Direction.CALLS_US and self._possible(connection, value)
            ],
            "create_policies": Connection.CreatePolicy.choices,
            "sent": sent,
            "succeeded": succeeded,
            "offered": self._offered(request, connection, provider, term) if may_view else [],
            "term": term,
            "most": CANARY,
            "can_change": self.has_change_permission(request, connection),
            "can_push": may_push,
            "can_pull": connection.pulls and request.user.has_perm("connectors.pull_connection"),
        }
        return TemplateResponse(request, "connectors/first_steps.html", context)

    def _possible(self, connection: Connection, direction: str) -> bool:
        offers = PROVIDERS[connection.provider].capabilities(connection)
        return direction not in Connection.PULLING or offers.lists

    def _offered(
        self, request: HttpRequest, connection: Connection, provider: Provider, term: str
    ) -> list[tuple[Customer, str, str]]:
        """Customers to begin with: those that the connector would take, or what was looked for. One query."""
        rows = Customer.objects.filter(organization=connection.organization_id, archived_at=None, merged_into=None)
        if uid := parse_public_id("cust", term):
            rows = rows.filter(pk=uid)
        elif "@" in term:
            rows = rows.filter(email_key=email_key(term))
        elif term:
            rows = rows.filter(name_key__startswith=name_key(term))
        linked = CustomerLink.objects.filter(connection=connection).values("customer")
        clear = sees(request.user)
        offered = []
        for customer in rows.exclude(pk__in=linked).order_by("-updated_at", "-id")[:OFFERED]:
            refused = ""
            try:
                provider.document(customer, connection=connection, uid=uuid7(), fields=None)
            except Rejected as error:
                refused = error.message
            if refused and not term:
                continue
            email = customer.email if clear else str(masked("email", customer.email))
            offered.append((customer, email, refused))
        return offered[:CANARY]

    def direction_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if connection.calls_us or connection.provider not in PROVIDERS:
            return self.back(connection)  # its settings are where it begins to be sent to, and closed until then
        direction, policy = request.POST.get("direction", ""), request.POST.get("create_policy", "")
        known = direction in Connection.Direction.values and direction != Connection.Direction.CALLS_US
        if not known or policy not in Connection.CreatePolicy.values or not self._possible(connection, direction):
            self.message_user(request, "Choose what goes where.", messages.ERROR)
            return self.to_first_steps(connection)
        connection.direction, connection.create_policy = direction, policy
        connection.save(update_fields=["direction", "create_policy", "updated_at"])
        self.remember(connection, "direction", chosen=direction)
        return self.to_first_steps(connection)

    def match_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """A dry run: reads there and counts; nothing is stored but the counts."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        if connection.calls_us or connection.provider not in PROVIDERS:
            return self.back(connection)
        provider = PROVIDERS[connection.provider]
        rows = Customer.objects.filter(organization=connection.organization_id, archived_at=None, merged_into=None)
        customers = rows.count()
        if not provider.capabilities(connection).lists:
            self.remember(connection, "match", counts={}, customers=customers, listed=False, complete=True)
            return self.to_first_steps(connection)
        try:
            found = matches(connection, provider, customers=customers)
        except UnsealError as error:
            self.message_user(request, f"The credentials cannot be read. {error}", messages.ERROR)
        except ConnectorError as error:
            self.message_user(request, f"{connection} cannot be read now: {error.message}", messages.ERROR)
        else:
            self.remember(
                connection,
                "match",
                counts=dict(found.counts),
                read=found.counts.total(),
                customers=customers,
                listed=True,
                complete=found.complete,
            )
        return self.to_first_steps(connection)

    def canary_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Send up to ten chosen customers now; where the hub only reads, read ten records."""
        connection = self.get_object(request, object_id) if self.has_view_permission(request) else None
        right = "connectors.push_customerlink"
        if connection is not None and not connection.pushes:
            right = "connectors.pull_connection"
        if connection is None or not request.user.has_perm(right):
            raise PermissionDenied
        if connection.state != Connection.State.ACTIVE or connection.calls_us:
            why = connection.state_reason or connection.get_state_display()
            self.message_user(request, f"{connection} is out of use: {why}", messages.ERROR)
            return self.to_first_steps(connection)
        provider = PROVIDERS[connection.provider]
        try:
            session = provider.session(connection, request_id=actor_of(request).request_id)
            session.deadline = CALL_SECONDS
            if connection.pushes:
                self._send(request, connection, provider, session)
            else:
                run = pull(
                    connection=connection, provider=provider, session=session, actor=actor_of(request), limit=CANARY
                )
                self.remember(connection, "pulled", read=run.total, run=run.public_id)
                text = f"Read {run.total} records: {run.created} created, {run.updated} updated."
                self.message_user(request, text, messages.SUCCESS)
        except AlreadyRunning as error:
            self.message_user(request, str(error), messages.WARNING)
        except (ConnectorError, UnsealError) as error:
            self.message_user(request, f"{connection} cannot be used now: {error}", messages.ERROR)
        return self.to_first_steps(connection)

    def _send(self, request: HttpRequest, connection: Connection, provider: Provider, session: Any) -> None:
        ids = [uid for text in request.POST.getlist("customers") if (uid := _uuid(text))]
        rows = Customer.objects.filter(
            organization=connection.organization_id, archived_at=None, merged_into=None, pk__in=ids[: CANARY + 1]
        )
        chosen = list(rows.values_list("pk", flat=True))
        if not chosen or len(ids) > CANARY:
            self.message_user(request, f"Choose 1 to {CANARY} customers.", messages.ERROR)
            return
        ends = time.monotonic() + CANARY_SECONDS
        run = request_push(connection=connection, actor=actor_of(request), customer_ids=chosen, urgent=True)
        push(
            connection=connection,
            provider=provider,
            session=session,
            customer_ids=chosen,
            stop=lambda: time.monotonic() >= ends,
        )
        run.refresh_from_db()
        good = run.created + run.updated + run.unchanged
        level = messages.SUCCESS if good == run.planned else messages.WARNING
        self.message_user(request, f"{good} of {run.planned} customers were accepted. Look at each below.", level)

    def open_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        connection = self.get_object(request, object_id)
        typed = request.POST.get("typed_name", "").strip() == connection.name
        tried = canary_succeeded(connection) or (not connection.pushes and connection.setup.get("pulled"))
        if not (typed or tried):
            text = f"{connection} stays closed: send the first customers, or type its name exactly to do without."
            self.message_user(request, text, messages.ERROR)
            return self.to_first_steps(connection)
        self.open_now(connection)
        self.message_user(request, f"{connection} is open: customers go out and come in as its settings say.")
        return self.back(connection)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
