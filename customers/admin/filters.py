"""What a list is narrowed by, by conditions that indexes serve at any size."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db.models import Exists, OuterRef, Q, QuerySet, Subquery
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import mark_safe

from customers.admin.person import organizations
from customers.countries import NAME_OF
from customers.models import Customer, CustomerChange

# Of fewer hits than this the ids are read first; of more, each row of the list is asked about in turn.
RARE = 5000
# As far back as a filter looks for which no index names the hits.
LOOKED_AT = 20_000


def offered(choice: admin.SimpleListFilter, rows: QuerySet[Any], column: str) -> QuerySet[Any]:
    """The rows with the value that the address names; none where the filter offers no such value."""
    if not (value := choice.value()):
        return rows
    return rows.filter(**{column: value}) if value in dict(choice.lookup_choices) else rows.none()


class OrganizationFilter(admin.SimpleListFilter):
    title = "organization"
    parameter_name = "organization"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        own = organizations(request)
        return [(str(organization.pk), organization.name) for organization in own] if len(own) > 1 else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return offered(self, queryset, "organization")


class ArchivedFilter(admin.SimpleListFilter):
    title = "archived"
    parameter_name = "archived"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("no", "In use"), ("yes", "Archived")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(archived_at__isnull=self.value() == "no") if self.value() else queryset


_COUNTRIES = sorted(((code, name.title()) for code, name in NAME_OF.items()), key=lambda country: country[1])
# The same on every page of the list: a template would take longer for them than for the rows.
_COUNTRY_OPTIONS = format_html_join("", '<option value="{}">{}</option>', [("", "All"), *_COUNTRIES])


class CountryFilter(admin.SimpleListFilter):
    title = "country"
    parameter_name = "country"
    template = "customers/filter_choice.html"

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Nothing: the template shows a list to choose from, and hands on what else the address holds."""
        given = self.request.GET.lists()
        self.others = [(name, values) for name, values in given if name not in (self.parameter_name, "p", "e")]
        chosen = format_html('value="{}"', self.value())
        self.options = mark_safe(_COUNTRY_OPTIONS.replace(chosen, f"{chosen} selected"))
        return iter(())

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return _COUNTRIES

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        # An empty code is no country: this is the index's own condition.
        rows = queryset.exclude(address_country_code="") if self.value() else queryset
        return offered(self, rows, "address_country_code")


class UpdatedFilter(admin.SimpleListFilter):
    """By a number of days, or by any date in the address, such as updated=2026-01-31."""

    title = "updated"
    parameter_name = "updated"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("1d", "In the last day"), ("7d", "In the last 7 days"), ("30d", "In the last 30 days")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        value = self.value() or ""
        if value[:-1].isdecimal() and value.endswith("d") and len(value) < 6:
            return queryset.filter(updated_at__gte=timezone.now() - timedelta(days=int(value[:-1])))
        try:
            since = datetime.fromisoformat(value)
            since = since.astimezone(UTC) if since.tzinfo else since.replace(tzinfo=UTC)
        except (ValueError, OverflowError):  # a year that there is not in UTC
            return queryset
        return queryset.filter(updated_at__gte=since)


class AuthorFilter(admin.SimpleListFilter):
    title = "last changed by"
    parameter_name = "changed_by"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return list(CustomerChange.Actor.choices)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        if (value := self.value()) not in CustomerChange.Actor.values:
            return queryset
        theirs = CustomerChange.objects.filter(
            organization__in=[own.pk for own in organizations(request)], actor_kind=value
        )
        last = theirs.filter(customer=OuterRef("pk"), version=OuterRef("version"))
        return narrowed(request, queryset, theirs.values_list("customer_id", flat=True)).filter(Exists(last))


class DuplicatesFilter(admin.SimpleListFilter):
    title = "has duplicates"
    parameter_name = "duplicates"
    fields = {"email": "email_key", "phone": "phone_key"}

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("email", "With the same e-mail"), ("phone", "With the same phone")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Customer]) -> QuerySet[Customer]:
        if (column := self.fields.get(self.value() or "")) is None:
            return queryset
        alike = Customer.objects.filter(
            ~Q((column, "")),
            Q((column, OuterRef(column))),
            organization=OuterRef("organization"),
            merged_into=None,
        ).exclude(pk=OuterRef("pk"))
        # Asked of one row after the other, as far as the page goes: joined, every customer would be compared first.
        twin = Subquery(alike.values("pk")[:1])
        rows = newest(request, queryset).alias(twin=twin)
        return rows.filter(~Q((column, "")), twin__isnull=False, merged_into=None)


def narrowed(request: HttpRequest, customers: QuerySet[Customer], ids: QuerySet[Any, Any]) -> QuerySet[Customer]:
    """`customers`, where `ids` names few of them less the others: the caller's own condition is then asked of these."""
    few = list(ids.order_by()[: RARE + 1])
    if len(few) <= RARE:
        return customers.filter(pk__in=few)
    request.among = few  # type: ignore[attr-defined] # for the paginator: many of them are hits
    return customers


def newest(request: HttpRequest, customers: QuerySet[Customer]) -> QuerySet[Customer]:
    """Those of `customers` that are among the LOOKED_AT that were changed last; tells the person where there are more.

    For conditions that may hold for nobody and that no index answers: the list would be read to its end.
    """
    own = [organization.pk for organization in organizations(request)]
    chosen = [pk for pk in own if str(pk) == request.GET.get(OrganizationFilter.parameter_name)] or own
    rows = Customer.objects.filter(organization__in=chosen).order_by("-updated_at", "-id")
    oldest = rows.values_list("updated_at", flat=True)[LOOKED_AT - 1 : LOOKED_AT].first()
    if oldest is None:
        return customers
    messages.info(request, f"Looked for among the {LOOKED_AT:,} customers that were changed last.")
    return customers.filter(updated_at__gte=oldest)
