"""What happened: the changes of customers, and who looked at whose personal data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from customers.admin.filters import OrganizationFilter
from customers.admin.own import MOMENT, ReadOnlyAdmin, link_to
from customers.models import CustomerChange, Reveal
from customers.privacy import redacted, sees
from customers.timeline import Asked, change_event


def sentence_of(change: CustomerChange, *, clear: bool) -> str:
    """One change as the timeline tells it, of a new customer without its values."""
    event = change_event(Asked(customer=change.customer, clear=clear), change)
    if event.only_new:
        return event.deed.removesuffix(":")
    told = "; ".join(f"{name} from {old} to {new}" for name, old, new in event.fields)
    return f"{event.deed} {told}".strip()


@admin.register(Reveal)
class RevealAdmin(ReadOnlyAdmin):
    """Who looked at whose personal data."""

    list_display = ["moment", "customer_link", "user_name", "reason"]
    list_display_links = ["moment"]
    list_select_related = ["customer"]
    list_filter = [OrganizationFilter]
    ordering = ["-id"]
    sortable_by = ["moment"]
    fields = ["moment", "customer_link", "user_name", "reason", "request_id", "organization"]

    @admin.display(description="Time", ordering="id")
    def moment(self, reveal: Reveal) -> str:
        return reveal.at.strftime(MOMENT)

    @admin.display(description="Customer")
    def customer_link(self, reveal: Reveal) -> str:
        return link_to("admin:customers_customer_change", reveal.customer_id, text=reveal.customer.name)


@admin.register(CustomerChange)
class CustomerChangeAdmin(ReadOnlyAdmin):
    list_display = ["moment", "customer_link", "version", "author", "sentence", "message"]
    list_display_links = ["moment"]
    list_select_related = ["customer"]
    list_filter = [OrganizationFilter, ("actor_kind", admin.ChoicesFieldListFilter)]
    ordering = ["-id"]
    fields = ["moment", "customer_link", "version", "author", "sentence", "message", "request_id", "organization"]

    @admin.display(description="Time", ordering="id")
    def moment(self, change: CustomerChange) -> str:
        return change.at.strftime(MOMENT)

    @admin.display(description="Customer")
    def customer_link(self, change: CustomerChange) -> str:
        return link_to("admin:customers_customer_change", change.customer_id, text=change.customer.name)

    @admin.display(description="By")
    def author(self, change: CustomerChange) -> str:
        return f"{change.actor_name} ({change.get_actor_kind_display()})"

    @admin.display(description="What")
    def sentence(self, change: CustomerChange) -> str:
        return sentence_of(change, clear=True)

    @admin.display(description="message")
    def message_masked(self, change: CustomerChange) -> str:
        return redacted(change.message, vars(change.customer))

    @admin.display(description="What")
    def sentence_masked(self, change: CustomerChange) -> str:
        return sentence_of(change, clear=False)

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        return self._shown(request, self.list_display)

    def get_fields(self, request: HttpRequest, obj: CustomerChange | None = None) -> list[Any]:
        return self._shown(request, self.fields)

    def _shown(self, request: HttpRequest, names: Iterable[Any]) -> list[Any]:
        if sees(request.user):
            return list(names)
        return [f"{name}_masked" if name in ("sentence", "message") else name for name in names]
