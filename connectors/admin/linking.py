"""Linking a customer to a record that a system has already, instead of creating a second one there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db.models import Exists, OuterRef
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.crypto import salted_hmac
from django.views.decorators.http import require_safe

from connectors.admin.compare import CompareAdmin, read_record
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink
from connectors.provider import Record
from connectors.providers import PROVIDERS
from connectors.sync.resolve import HERE, THERE, Joined, WrongState, joined, link_existing
from customers import jsontext
from customers.admin.person import actor_of
from customers.editing import StaleVersion
from customers.forms import label, shown
from customers.models import Customer
from customers.privacy import masked, redacted, sees


@dataclass(frozen=True, kw_only=True)
class Side:
    """One field of both, and what each choice leaves."""

    title: str
    here: str
    there: str
    differs: bool
    with_theirs: str
    with_ours: str


def digest(record: Record) -> str:
    """Tells whether a record is still the one that was shown."""
    values = {name: record.values[name] for name in sorted(record.values)}
    # Keyed, because it stands on pages of people who may not see the values.
    text = jsontext.dumps([record.remote_id, values], option=jsontext.SORT_KEYS)
    return salted_hmac("record", text, algorithm="sha256").hexdigest()[:32]


def owner_of(connection: Connection, remote_id: str, customer: Customer) -> str:
    """Why this record cannot be linked to the customer; "" when nobody has it."""
    rows = CustomerLink.objects.filter(connection=connection, remote_id=remote_id).select_related("customer")
    owner = rows.first()
    if owner is None or (owner.customer_id == customer.pk and owner.deleted_at is not None):
        return ""
    if owner.customer_id == customer.pk:
        return f"{customer.name} is linked to this record already."
    return (
        f"Record {remote_id} is linked to {owner.customer.name} ({owner.customer.public_id}). "
        "Choose another, or merge the customers."
    )


class LinkAdmin(CompareAdmin):
    def get_urls(self) -> list[URLPattern]:
        return [
            path(
                "<path:object_id>/link/",
                require_safe(self.admin_site.admin_view(self.link_view)),
                name="customers_customer_link",
            ),
            self.posted("link_read", self.link_read_view),
            self.posted("link_save", self.link_save_view),
            *super().get_urls(),
        ]

    def linkable(self, customer: Customer) -> list[Connection]:
        """The systems that can be read and have no record of this customer yet."""
        held = CustomerLink.objects.filter(connection=OuterRef("pk"), customer=customer, is_duplicate=False)
        free = Connection.objects.filter(
            ~Exists(held.filter(remote_id__isnull=False, deleted_at=None)), organization=customer.organization_id
        ).exclude(direction=Connection.Direction.CALLS_US)
        return [
            connection
            for connection in free.select_related("organization")
            if (provider := PROVIDERS.get(connection.provider)) and provider.capabilities(connection).fetches
        ]

    def link_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        customer = self._asked(request, object_id)
        return self._link_page(request, customer, chosen=request.GET.get("connection", ""))

    def link_read_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Read the record there and show both side by side. Links nothing."""
        customer = self._asked(request, object_id)
        return self._shown(request, customer)

    def link_save_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Link, as chosen, if both are still what was shown."""
        customer = self._asked(request, object_id)
        side = request.POST.get("side", "")
        if side not in (HERE, THERE):
            return self._shown(request, customer, error="Choose whose values are kept.")
        if side == THERE and not self.has_change_permission(request, customer):
            raise PermissionDenied
        connection, record, answer = self._read(request, customer)
        if record is None or connection is None:
            return answer
        if request.POST.get("shown") != digest(record) or request.POST.get("version") != str(customer.version):
            return self._shown(request, customer, error="Something changed since you looked. Look again, then choose.")
        try:
            link_existing(
                customer=customer,
                connection=connection,
                provider=PROVIDERS[connection.provider],
                record=record,
                side=side,
                actor=actor_of(request),
                expected=customer.version,
            )
        except WrongState as error:
            return self._shown(request, customer, error=str(error))
        except StaleVersion:
            return self._shown(request, customer, error="Something changed since you looked. Look again, then choose.")
        text = f"{customer.name} is linked to record {record.remote_id} in {connection.name}."
        self.message_user(request, text, messages.SUCCESS)
        address = reverse("admin:customers_customer_preview", args=[customer.pk])
        return HttpResponseRedirect(f"{address}?connection={connection.pk}")

    def _asked(self, request: HttpRequest, object_id: str) -> Customer:
        if not self.has_view_permission(request) or not self.has_push_permission(request):
            raise PermissionDenied
        customer: Customer = self.get_object(request, object_id)
        return customer

    def _read(self, request: HttpRequest, customer: Customer) -> tuple[Connection | None, Record | None, HttpResponse]:
        """The connection and the record that the form names, or the page that says why there are none."""
        chosen, remote_id = (
            request.POST.get("connection", ""),
            request.POST.get("remote_id", "").replace("\x00", "").strip(),
        )
        connection = next((one for one in self.linkable(customer) if str(one.pk) == chosen), None)
        error = ""
        if customer.archived_at or customer.merged_into_id:
            error = "The customer is archived or merged. Restore it first."
        elif connection is None:
            error = "Choose a system that has no record of this customer yet."
        elif not 0 < len(remote_id) <= REMOTE_ID_LENGTH:
            error = f"Give the record's id there, of at most {REMOTE_ID_LENGTH} characters."
        else:
            error = owner_of(connection, remote_id, customer)
        if connection is None or error:
            return None, None, self._link_page(request, customer, chosen=chosen, remote_id=remote_id, error=error)
        read = read_record(
            connection, PROVIDERS[connection.provider], remote_id, request_id=getattr(request, "request_id", "")
        )
        if read.record is None:
            page = self._link_page(request, customer, chosen=chosen, remote_id=remote_id, error=read.error)
            return connection, None, page
        return connection, read.record, HttpResponse()

    def _shown(self, request: HttpRequest, customer: Customer, *, error: str = "") -> HttpResponse:
        connection, record, answer = self._read(request, customer)
        if connection is None or record is None:
            return answer
        clear = sees(request.user)
        rows = joined(customer=customer, record=record, provider=PROVIDERS[connection.provider])
        return self._link_page(
            request,
            customer,
            chosen=str(connection.pk),
            remote_id=record.remote_id or "",
            error=error,
            found={
                "connection": connection,
                "record": record,
                "rows": [_side(row, clear=clear) for row in rows],
                "digest": digest(record),
                "unlike": sum(row.differs for row in rows),
                "can_take": self.has_change_permission(request, customer),
            },
        )

    def _link_page(
        self,
        request: HttpRequest,
        customer: Customer,
        *,
        chosen: str = "",
        remote_id: str = "",
        error: str = "",
        found: Mapping[str, object] | None = None,
    ) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"Link {customer.name} to a record that is there already",
            "opts": self.opts,
            "customer": customer,
            "connections": self.linkable(customer),
            "chosen": chosen,
            "remote_id": remote_id,
            "error": error if sees(request.user) else redacted(error, vars(customer)),
            "found": found,
            "length": REMOTE_ID_LENGTH,
            "clear": sees(request.user),
        }
        return TemplateResponse(request, "connectors/link_existing.html", context)


def _side(row: Joined, *, clear: bool) -> Side:
    def told(value: object) -> str:
        return shown(value if clear else masked(row.name, value))

    return Side(
        title=label(row.name),
        here=told(row.here),
        there=told(row.there),
        differs=row.differs,
        with_theirs=told(row.keeps[THERE]),
        with_ours=told(row.keeps[HERE]),
    )
