"""Before a push: what every system has, what would happen to each field, and the request as it would be sent.

Opening the page reads the database and nothing else. A press of "Read it now" reads the records there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.core import signing
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils import timezone
from django.views.decorators.http import require_safe

from connectors.admin.badges import link_badge
from connectors.admin.links import pretty
from connectors.exceptions import ConnectorError, Gone
from connectors.models import Connection, CustomerLink
from connectors.outbound import Request
from connectors.provider import Provider, Record
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from connectors.states import STATUSES
from connectors.sync.preview import SENDS, UNKNOWN, Preview, Row, Will, preview
from connectors.sync.settle import unanswered
from customers.admin.customers import CustomerAdmin
from customers.editing import EDITABLE
from customers.forms import label, shown
from customers.ids import uuid7
from customers.models import Customer
from customers.privacy import PERSONAL, masked, redacted, sees

READ_SECONDS = 10.0
MARK_AGE = 24 * 3600
# The icon and the words of what happens to a field; {system} is where it happens.
WORDS: Mapping[Will, tuple[str, str]] = {
    Will.SAME: ("=", "same"),
    Will.WRITTEN_SO: ("=", "same, {system} writes it so"),
    Will.SENT: ("→", "is sent"),
    Will.OVERWRITES: ("→", "is sent over what was changed there"),
    Will.WAITS: ("●", "differs, and waits"),
    Will.CONFLICT: ("⇄", "conflict: changed on both sides. It waits until somebody decides"),
    Will.TAKEN: ("⇠", "is taken into the hub: changed there alone"),
    Will.STAYS: ("–", "stays as it is there: the hub has not changed it"),
    Will.EMPTY: ("–", "empty"),
    Will.UNKNOWN: ("?", "cannot tell what is there"),
    Will.NOT_MAPPED: ("–", "not mapped"),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the comparison, as this reader may see it."""

    title: str
    here: str
    there: str
    icon: str
    words: str
    sent_as: str
    sends: bool


@dataclass(kw_only=True)
class Compared:
    """One system on the page."""

    connection: Connection
    link: CustomerLink | None
    badge: str
    sentence: str
    lines: list[Line]
    unmapped: list[str]
    requests: list[tuple[Request, str, str]]
    made: Preview | None
    mark: str = ""
    read_at: datetime | None = None
    elapsed: int = 0
    error: str = ""
    refusal: str = ""
    refused_field: str = ""
    can_read: bool = False
    note: str = ""


@dataclass(kw_only=True)
class Read:
    """What came of reading one record there."""

    at: datetime
    record: Record | None = None
    elapsed: int = 0
    error: str = ""


def read_record(
    connection: Connection, provider: Provider, remote_id: str, *, request_id: str = "", seconds: float = READ_SECONDS
) -> Read:
    """Read one record there, now; what goes wrong is told in words. Nothing of it is kept."""
    began, now = time.monotonic(), timezone.now()
    if connection.state != Connection.State.ACTIVE:
        return Read(at=now, error=f"{connection.name} is out of use. Repair or resume the connection first.")
    if connection.not_before is not None and connection.not_before > now:
        until = f"{connection.not_before:%Y-%m-%d %H:%M:%S} UTC"
        return Read(at=now, error=f"{connection.name} asked us to wait until {until}. Try again then.")
    try:
        session = provider.session(connection, request_id=request_id)
        session.deadline = seconds
        record = provider.fetch(session, connection, remote_id)
    except Gone:
        return Read(at=now, error=f"{connection.name} has no record {remote_id}, or the login may not see it.")
    except (ConnectorError, UnsealError) as error:
        return Read(at=now, error=f"{connection.name} could not be read: {error} Nothing was changed. Try again later.")
    elapsed = round((time.monotonic() - began) * 1000)
    if record.deleted:
        return Read(at=now, error=f"{connection.name} shows record {remote_id} as deleted.", elapsed=elapsed)
    return Read(at=now, record=record, elapsed=elapsed)


def _line(row: Row, connection: Connection, *, clear: bool, creates: bool) -> Line:
    icon, words = WORDS[row.will]
    hidden = not clear and row.name in PERSONAL
    there = row.there if row.there is UNKNOWN or clear else masked(row.name, row.there)
    sent = [path if hidden else f"{path} {pretty(value)}" for path, value in row.sent_as.items()]
    return Line(
        title=label(row.name),
        here=shown(row.here if clear else masked(row.name, row.here)),
        there=("–" if creates else "not known") if there is UNKNOWN else shown(there),
        icon=icon,
        words=words.format(system=connection.name),
        sent_as=", ".join(sent),
        sends=row.will in SENDS,
    )


def mark_of(customer: Customer, connection: Connection, uid: UUID) -> str:
    """The mark that the shown request carries, signed: the push that follows makes the link with it."""
    return signing.dumps([str(customer.pk), connection.pk, str(uid)], salt="push preview")


def uid_of_mark(text: str, customer: Customer, connection: Connection) -> UUID | None:
    try:
        customer_id, connection_id, uid = signing.loads(text, salt="push preview", max_age=MARK_AGE)
    except (signing.BadSignature, ValueError, TypeError):
        return None
    return UUID(uid) if (customer_id, connection_id) == (str(customer.pk), connection.pk) else None


def compare(
    customer: Customer,
    connections: Sequence[Connection],
    *,
    now: datetime,
    clear: bool,
    reads: Mapping[int, Read] | None = None,
) -> list[Compared]:
    """What a push to each of these systems would do, in two queries. `clear`: personal data may be shown."""
    rows = CustomerLink.objects.filter(customer=customer, connection__in=connections, is_duplicate=False)
    links = {link.connection_id: link for link in rows}
    lost = unanswered(list(links.values()))
    compared = []
    for connection in connections:
        provider = PROVIDERS.get(connection.provider)
        link = links.get(connection.pk)
        if provider is None:
            continue
        at_hand = link or CustomerLink(
            uid=uuid7(), connection=connection, needed_version=customer.version, created_at=now, updated_at=now
        )
        at_hand.customer, at_hand.connection = customer, connection
        read = (reads or {}).get(connection.pk)
        made = preview(
            link=at_hand,
            provider=provider,
            lost=lost.get(at_hand.pk) if link else None,
            now=now,
            record=read.record if read else None,
        )
        key = link.status_key(now=now) if link else "not_linked"
        sentence = STATUSES[key].sentence.format(system=connection.name) if link is None else link.sentence(now=now)
        compared.append(
            _compared(customer, connection, link, provider, made, key, sentence, read, clear, mark_uid=at_hand.uid)
        )
    return compared


def _compared(
    customer: Customer,
    connection: Connection,
    link: CustomerLink | None,
    provider: Provider,
    made: Preview,
    key: str,
    sentence: str,
    read: Read | None,
    clear: bool,
    *,
    mark_uid: UUID,
) -> Compared:
    def told(text: str) -> str:
        return text if clear else redacted(text, vars(customer))

    fetches = provider.capabilities(connection).fetches
    result = Compared(
        connection=connection,
        link=link,
        badge=link_badge(key),
        sentence=told(sentence),
        lines=[
            _line(row, connection, clear=clear, creates=made.creates)
            for row in made.rows
            if row.will is not Will.NOT_MAPPED
        ],
        unmapped=[label(row.name) for row in made.rows if row.will is Will.NOT_MAPPED],
        requests=[_request(request, clear=clear) for request in made.requests],
        made=made,
        mark="" if link else mark_of(customer, connection, mark_uid),
        read_at=read.at if read and read.record else None,
        elapsed=read.elapsed if read else 0,
        error=told(read.error) if read else "",
        can_read=fetches and link is not None and bool(link.remote_id) and link.deleted_at is None,
    )
    if made.refusal is not None:
        field = made.refusal.field
        result.refusal = told(made.refusal.message)
        result.refused_field = field if field in EDITABLE else ""
    if not fetches:
        result.note = f"{provider.label} documents no way to read one customer: what is there now cannot be told."
    elif made.live:
        result.note = "The values there were read just now."
    elif link is not None and link.remote_id:
        result.note = "The values there are those that were last seen."
    else:
        result.note = "There is no record there yet."
    return result


def _request(request: Request, *, clear: bool) -> tuple[Request, str, str]:
    headers = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
    if request.body is None:
        return request, headers, ""
    return request, headers, pretty(request.body) if clear else ""


class CompareAdmin(CustomerAdmin):
    """The pages that show a push beforehand."""

    def has_push_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("connectors.push_customerlink"))

    def has_compare_permission(self, request: HttpRequest) -> bool:
        return self.has_push_permission(request) or bool(request.user.has_perm("connectors.view_customerlink"))

    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                "<path:object_id>/preview/",
                require_safe(self.admin_site.admin_view(self.preview_view)),
                name="customers_customer_preview",
            ),
            self.posted("read", self.read_view),
            *super().get_urls(),
        ]

    def preview_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """What a push would do. Calls nobody and changes nothing."""
        if not self.has_view_permission(request) or not self.has_compare_permission(request):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        return self._compare_page(request, customer, self.chosen(customer, request.GET.get("connection", "")))

    def read_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The same with what is there now."""
        if not self.has_view_permission(request) or not self.has_push_permission(request):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        connections = self.chosen(customer, request.POST.get("connection", ""))
        ids = dict(
            CustomerLink.objects.filter(
                customer=customer, connection__in=connections, is_duplicate=False, remote_id__isnull=False
            ).values_list("connection_id", "remote_id")
        )
        reads: dict[int, Read] = {}
        ends = time.monotonic() + 2 * READ_SECONDS
        for connection in connections:
            provider = PROVIDERS.get(connection.provider)
            remote_id = ids.get(connection.pk)
            if provider is None or not remote_id or not provider.capabilities(connection).fetches:
                continue
            if time.monotonic() > ends:
                reads[connection.pk] = Read(at=timezone.now(), error="The others took long. Read this one by itself.")
                continue
            reads[connection.pk] = read_record(
                connection, provider, remote_id, request_id=getattr(request, "request_id", "")
            )
        return self._compare_page(request, customer, connections, reads)

    def chosen(self, customer: Customer, text: str) -> list[Connection]:
        """The connection that is named, or all that the hub sends to. Another organization's is not found."""
        rows = Connection.objects.filter(organization=customer.organization_id).select_related("organization")
        if not text:
            return list(rows.filter(direction__in=Connection.PUSHING))
        found = list(rows.filter(pk=int(text))) if text.isascii() and text.isdigit() and len(text) < 19 else []
        if not found:
            raise Http404
        return found

    def _compare_page(
        self,
        request: HttpRequest,
        customer: Customer,
        connections: Sequence[Connection],
        reads: Mapping[int, Read] | None = None,
    ) -> HttpResponse:
        clear = sees(request.user)
        systems = compare(customer, connections, now=timezone.now(), clear=clear, reads=reads)
        one = connections[0] if len(connections) == 1 else None
        can_push = self.has_push_permission(request)
        context = {
            **self.admin_site.each_context(request),
            "title": f"Push {customer.name} to {one.name}" if one else f"Push {customer.name}",
            "opts": self.opts,
            "customer": customer,
            "systems": systems,
            "one": one,
            "can_push": can_push,
            "can_read": can_push and any(system.can_read for system in systems),
            "sending": sum(1 for system in systems if system.made and system.made.sends),
            "clear": clear,
        }
        return TemplateResponse(request, "connectors/compare.html", context)
