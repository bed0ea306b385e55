"""The customer screens: find, read, edit, archive. Every write goes through `customers.editing`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.options import BaseModelAdmin, IncorrectLookupParameters
from django.contrib.admin.views.main import ORDER_VAR, ChangeList
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, Permission, User
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db import connection
from django.db.models import Exists, ForeignKey, OuterRef, Q, QuerySet, Subquery
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from customers import editing, jsontext, search, theme
from customers.countries import NAME_OF
from customers.editing import Actor, StaleVersion
from customers.forms import ABSENT, Clash, CustomerForm, label, shown
from customers.ids import parse_public_id
from customers.models import Customer, CustomerChange, Organization, Reveal
from customers.normalize import clean_text, has_control_characters
from customers.privacy import PERSONAL, REVEAL, masked, redacted, sees
from customers.timeline import PEOPLE, SYSTEMS, Asked, Cursor, Source, change_event, changes, notes, reveals, timeline

MOMENT = "%Y-%m-%d %H:%M:%S UTC"
NOTE_LENGTH = 2000
# Rows that a list counts and leads to; what lies beyond is reached by filters and search.
COUNTED = 10_000
# As far as a filter is counted and paged through that asks of one row of the list after the other.
COUNTED_SLOWLY = 1000
# Of fewer hits than this the ids are read first; of more, each row of the list is asked about in turn.
RARE = 5000
# As far back as a filter looks for which no index names the hits.
LOOKED_AT = 20_000


def actor_of(request: HttpRequest, *, message: str = "") -> Actor:
    """The person behind the request, as the author of a change."""
    user = request.user
    return Actor(
        kind=CustomerChange.Actor.USER,
        id=str(user.pk),
        name=(user.get_full_name() or user.get_username()) if user.is_authenticated else "",
        request_id=getattr(request, "request_id", ""),
        message=message,
    )


def organizations(request: HttpRequest) -> list[Organization]:
    """The organizations that this person may work with, read once per request."""
    found: list[Organization] | None = getattr(request, "own_organizations", None)
    if found is None:
        found = list(Organization.objects.of(request.user))
        request.own_organizations = found  # type: ignore[attr-defined] # kept where it belongs: on this request
    return found


def link_to(address: str, *args: Any, text: object) -> str:
    return format_html('<a class="hub-link" href="{}">{}</a>', reverse(address, args=args), text)


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


# How Django's own filters end the names of what they filter by.
ENDS = ("exact", "in", "isnull", "gte", "lt")


class CountryFilter(admin.SimpleListFilter):
    title = "country"
    parameter_name = "country"
    template = "customers/filter_choice.html"

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Nothing: the template shows a list to choose from, and hands on what else the address holds."""
        given = self.request.GET.lists()
        self.others = [(name, values) for name, values in given if name not in (self.parameter_name, "p", "e")]
        return iter(())

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return sorted(((code, name.title()) for code, name in NAME_OF.items()), key=lambda country: country[1])

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


class MoreThan(int):
    """A number that was not counted to its end: shown as "more than" it."""

    def __str__(self) -> str:
        return f"more than {int(self):,}"


class BoundedPaginator(Paginator):  # type: ignore[type-arg] # none at run time
    """Counts and pages to `bound` rows: neither a count nor a page ever reads a whole table."""

    bound = COUNTED
    among: Sequence[Any] = ()  # ids of which many are hits: if they are enough, no others are asked about

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment] # the admin pages through nothing else
        rows = rows.order_by()
        number = rows.filter(pk__in=self.among).values("pk")[: self.bound + 1].count() if self.among else 0
        if number <= self.bound:
            number = rows.values("pk")[: self.bound + 1].count()
        return MoreThan(self.bound) if number > self.bound else number


class BoundedChangeList(ChangeList):
    """Sorts by what an index can bring in order, and by nothing else."""

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        sortable = set(self.sortable_by or ())
        wanted = self.params.get(ORDER_VAR, "")
        positions = [part.lstrip("-") for part in wanted.split(".")]
        names = [self.list_display[int(p)] for p in positions if p.isdecimal() and int(p) < len(self.list_display)]
        if any(name not in sortable for name in names):
            self.params.pop(ORDER_VAR, None)
        return super().get_ordering(request, queryset)


class LastAuthors(BoundedChangeList):
    """Customers with who changed them last, as `last_author` and `last_kind`: read for the page's rows alone."""

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        last = CustomerChange.objects.filter(customer=OuterRef("pk"), version=OuterRef("version"))
        rows: QuerySet[Any] = super().get_queryset(request, exclude_parameters)
        authors = {"last_author": Subquery(last.values("actor_name")), "last_kind": Subquery(last.values("actor_kind"))}
        found: QuerySet[Any] = rows.annotate(**authors)
        return found


class OwnAdmin(theme.ModelAdmin):
    """Shows and offers what belongs to the person's own organizations.

    Another organization's id answers like an id that does not exist: 404. An action without its right answers 403.
    """

    organization_path = "organization"
    show_full_result_count = False
    list_per_page = 50
    paginator = BoundedPaginator
    show_facets = admin.ShowFacets.NEVER  # numbers beside the filters would count whole tables

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return BoundedChangeList

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:
        """What the list offers to filter by, and related records by id.

        Any other look-up could find out letter by letter what a page hides, or read a whole table.
        """
        names = set()
        for choice in self.get_list_filter(request) if request else self.list_filter:
            names.add(choice[0] if isinstance(choice, tuple) else getattr(choice, "parameter_name", choice))
        keys = [field.name for field in self.opts.fields if field.remote_field] + ["pk", str(self.opts.pk.name)]
        names |= {end for key in keys for end in (key, f"{key}__id", f"{key}__pk")}
        return any(lookup == name or lookup in {f"{name}__{end}" for end in ENDS} for name in names)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = super().get_queryset(request)
        if getattr(request.user, "is_superuser", False):
            return rows
        return rows.filter(**{f"{self.organization_path}__in": [own.pk for own in organizations(request)]})

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        found = super().get_object(request, object_id, from_field)
        if found is None:
            raise Http404
        return found

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        # PostgreSQL refuses the character in every text that is asked for.
        if any("\x00" in value for values in request.GET.lists() for value in values[1]):
            raise IncorrectLookupParameters
        return super().get_changelist_instance(request)

    def formfield_for_foreignkey(self, db_field: ForeignKey[Any, Any], request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.related_model is Organization:
            kwargs["queryset"] = Organization.objects.of(request.user)
            if len(own := organizations(request)) == 1:
                kwargs["initial"] = own[0].pk
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        action = request.POST.get("action")
        if request.method == "POST" and action in (self.actions or ()) and action not in self.get_actions(request):
            raise PermissionDenied
        return super().changelist_view(request, extra_context)

    def posted(self, name: str, view: Callable[..., HttpResponse]) -> URLPattern:
        """The address of a button on an object's page. It answers POST alone: no link can press it."""
        opts = self.opts
        return path(
            f"<path:object_id>/{name}/",
            require_POST(self.admin_site.admin_view(view)),
            name=f"{opts.app_label}_{opts.model_name}_{name}",
        )

    def back(self, obj: Any) -> HttpResponse:
        return HttpResponseRedirect(
            reverse(f"admin:{self.opts.app_label}_{self.opts.model_name}_change", args=[obj.pk])
        )


class ReadOnlyAdmin(OwnAdmin):
    """Shows what the hub itself keeps."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def _address(prefix: str) -> list[tuple[str, str]]:
    """The parts of an address, two in a row."""
    line1, line2, city, state, postal_code, country = (f"{prefix}_{part}" for part in editing.ADDRESS)
    return [(line1, line2), (postal_code, city), (state, country)]


def _as_text(name: str, *, clear: bool) -> Callable[[Customer], str | None]:
    """A personal field as text: never one that a form takes back."""

    @admin.display(description=label(name), empty_value="–")
    def shown_text(customer: Customer) -> str | None:
        value = getattr(customer, name)
        text = value if clear else masked(name, value)
        return (text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)) if text else None

    shown_text.__name__ = f"{name}_shown"
    return shown_text


MASKED = {name: _as_text(name, clear=False) for name in sorted(PERSONAL)}
REVEALED = {name: _as_text(name, clear=True) for name in sorted(PERSONAL)}


def shows_personal(request: HttpRequest, customer: Customer) -> bool:
    """Whether this answer shows the customer's personal data: to who may see it, or has just revealed it."""
    return sees(request.user) or getattr(request, "revealed", None) == customer.pk


def _replaced(field: Any, shown: Mapping[str, Any]) -> Any:
    return tuple(shown.get(one, one) for one in field) if isinstance(field, tuple) else shown.get(field, field)


@admin.register(Customer)
class CustomerAdmin(OwnAdmin):
    form = CustomerForm
    change_form_template = "customers/customer_form.html"
    list_display = ["name_shown", "email", "phone", "organization", "updated", "author", "version"]
    list_display_links = ["name_shown"]
    list_select_related = ["organization"]
    list_filter = [OrganizationFilter, ArchivedFilter, UpdatedFilter, AuthorFilter, DuplicatesFilter, CountryFilter]
    ordering = ["-updated_at", "-id"]
    search_fields = ["name"]
    search_help_text = "Name, e-mail, phone, tax number, or any id: the hub's or another system's."
    sources: Sequence[Source] = (changes, notes, reveals)  # of the timeline

    @admin.display(description="Name", ordering="name_key")
    def name_shown(self, customer: Customer) -> str:
        if customer.merged_into_id:
            return format_html('{} <span class="hub-badge hub-base">merged</span>', customer.name)
        if customer.archived_at:
            return format_html('{} <span class="hub-badge hub-base">archived</span>', customer.name)
        return customer.name

    @admin.display(description="Updated", ordering="updated_at")
    def updated(self, customer: Customer) -> str:
        return customer.updated_at.strftime(MOMENT)

    @admin.display(description="By")
    def author(self, customer: Customer) -> str:
        kind = dict(CustomerChange.Actor.choices).get(getattr(customer, "last_kind", None) or "")
        return f"{customer.last_author} ({kind})" if kind else "–"  # type: ignore[attr-defined] # from `LastAuthors`

    @admin.display(description="e-mail", empty_value="–")
    def email_masked(self, customer: Customer) -> str | None:
        return masked("email", customer.email) or None

    @admin.display(description="phone", empty_value="–")
    def phone_masked(self, customer: Customer) -> str | None:
        return masked("phone", customer.phone) or None

    # Finding and listing

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        if sees(request.user):
            return list(self.list_display)
        return [f"{name}_masked" if name in PERSONAL else name for name in self.list_display]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return LastAuthors

    def get_sortable_by(self, request: HttpRequest) -> list[Any]:
        """An index has the names of one organization in order, and the times of all; SQLite would sort them anew."""
        one = len(organizations(request)) == 1 or bool(request.GET.get(OrganizationFilter.parameter_name))
        return ["name_shown", "updated"] if one and connection.vendor == "postgresql" else ["updated"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Customer]:
        rows = super().get_queryset(request)
        if len(own := organizations(request)) == 1:
            rows = rows.filter(organization=own[0])
        return rows

    def get_paginator(self, request: HttpRequest, queryset: Any, per_page: int, *args: Any, **kwargs: Any) -> Any:
        paginator: Any = super().get_paginator(request, queryset, per_page, *args, **kwargs)
        if among := getattr(request, "among", ()):
            paginator.among, paginator.bound = among, COUNTED_SLOWLY
        if (found := getattr(request, "found", None)) is not None:
            paginator.count = found
        return paginator

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """What an id, an e-mail address, a phone or a part of a name hits, best first; see `customers.search`."""
        term = search_term.strip()
        if not term:
            return queryset, False
        chosen = queryset.query.order_by if request.GET.get(ORDER_VAR) else ()
        found, request.found = search.find(  # type: ignore[attr-defined] # what the paginator need not count
            queryset,
            term,
            organizations=[organization.pk for organization in organizations(request)],
            exact=self.exact_matches(request, self.get_queryset(request).order_by(), term),
            personal=sees(request.user),
        )
        return found.order_by(*chosen) if chosen else found, False

    def exact_matches(
        self, request: HttpRequest, customers: QuerySet[Customer], term: str
    ) -> list[QuerySet[Customer, Any]]:
        """Queries for the ids of the customers that the term names exactly."""
        own = organizations(request)
        wanted = [search.exactly(term, countries={organization.country for organization in own})]
        if uid := parse_public_id("cust", term):
            wanted.append(Q(pk=uid))
        if sees(request.user):
            wanted.append(search.custom_value(term, organizations=[organization.pk for organization in own]))
        within = customers.filter(organization__in=[organization.pk for organization in own])
        return [within.filter(found).values_list("pk", flat=True) for found in wanted if found]

    # Editing

    def get_fieldsets(self, request: HttpRequest, obj: Customer | None = None) -> Any:
        fieldsets: list[tuple[str | None, dict[str, Any]]] = [
            ("Identity", {"fields": ["organization", "name", ("first_name", "last_name"), "is_active"]}),
            ("Contact", {"fields": ["email", "phone"]}),
            ("Address", {"fields": _address("address"), "classes": ["hub-addresses"]}),
            ("Shipping address", {"fields": _address("shipping_address"), "classes": ["hub-addresses"]}),
            ("Preferences", {"fields": ["currency", ("notify_email", "notify_phone")]}),
            ("Custom fields", {"fields": ["custom_fields"]}),
        ]
        if obj is not None and not sees(request.user):
            shown = REVEALED if shows_personal(request, obj) else MASKED
            for _, options in fieldsets:
                options["fields"] = [_replaced(field, shown) for field in options["fields"]]
        allowed = self.has_add_permission(request) if obj is None else self.has_change_permission(request, obj)
        return (
            [*fieldsets, ("This change", {"fields": ["message"], "classes": ["hub-message"]})] if allowed else fieldsets
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Customer | None = None) -> list[Any]:
        if obj is None:
            return []
        return ["organization"] if sees(request.user) else ["organization", *MASKED.values(), *REVEALED.values()]

    def has_change_permission(self, request: HttpRequest, obj: Customer | None = None) -> bool:
        merged = obj is not None and obj.merged_into_id is not None
        return not merged and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Customer | None = None) -> bool:
        return False

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        try:
            return super().changeform_view(request, object_id, form_url, extra_context)
        except StaleVersion:
            # Somebody saved between the form's own check and its writing. Read again, it sees that and says so.
            return super().changeform_view(request, object_id, form_url, extra_context)

    def save_model(self, request: HttpRequest, obj: Customer, form: Any, change: bool) -> None:
        actor = actor_of(request, message=form.cleaned_data.get("message", ""))
        values = form.values()
        if change:
            seen = {obj.pk: form.cleaned_data["seen_version"]}
            edits = editing.update(organization=obj.organization, values={obj.pk: values}, actor=actor, expected=seen)
            stored = edits[obj.pk].customer
        else:
            [stored] = editing.create(organization=obj.organization, values=[values], actor=actor)
        obj.__dict__.update(stored.__dict__)

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Customer | None = None,
    ) -> HttpResponse:
        form = context["adminform"].form
        if obj is not None and getattr(form, "stale", None):
            return self._stale_page(request, form, obj)
        if obj is not None:
            clear = shows_personal(request, obj)
            context["masked"] = not clear
            context["can_reveal"] = not clear and request.user.has_perm(REVEAL)
            context["revealed"] = clear and not sees(request.user)
            context["can_archive"] = self.has_change_permission(request, obj)
            context["can_note"] = self.has_note_permission(request)
            context["raw"] = self._raw(obj, open_=clear)
            context |= self._timeline(request, obj)
            if request.user.has_perm("customers.view_customerchange"):
                context["all_changes"] = (
                    reverse("admin:customers_customerchange_changelist") + f"?customer__id__exact={obj.pk}"
                )
        return super().render_change_form(request, context, add, change, form_url, obj)

    def _timeline(self, request: HttpRequest, customer: Customer) -> dict[str, Any]:
        only = request.GET.get("timeline", "")
        only = only if only in (PEOPLE, SYSTEMS) else ""
        before = Cursor.parse(request.GET.get("before", ""))
        asked = Asked(customer=customer, sees=shows_personal(request, customer), only=only, before=before)
        entries, older = timeline(asked, self.sources)
        return {"timeline": entries, "timeline_only": only, "timeline_before": before, "timeline_older": older}

    def _raw(self, customer: Customer, *, open_: bool) -> str:
        """Everything that the hub keeps of the customer itself, as JSON."""
        values = {name: getattr(customer, name) for name in editing.EDITABLE}
        kept = {
            "id": customer.public_id,
            "version": customer.version,
            "created_at": customer.created_at,
            "updated_at": customer.updated_at,
            "archived_at": customer.archived_at,
            **{name: value if open_ else masked(name, value) for name, value in values.items()},
        }
        return jsontext.dumps(kept, option=jsontext.INDENT).decode()

    def _stale_page(self, request: HttpRequest, form: CustomerForm, customer: Customer) -> HttpResponse:
        """Who changed what since the form was opened, with a choice for each field that both changed."""
        stale, open_ = form.stale, sees(request.user)
        assert stale is not None

        def told(clash: Clash) -> dict[str, Any]:
            def value(one: Any) -> str:
                return shown(one if open_ or one is ABSENT else masked(clash.name, one))

            sides = (("original", "As it was"), ("theirs", "Theirs"), ("yours", "Yours"))
            return {
                "key": clash.key,
                "title": clash.title,
                "by": clash.by,
                "sides": [(side, title, value(getattr(clash.sides, side))) for side, title in sides],
                "chosen": clash.chosen,
                "missing": clash.key in form.undecided,
            }

        context = {
            **self.admin_site.each_context(request),
            "title": "Changed since you opened it",
            "opts": self.opts,
            "customer": customer,
            "stale": stale,
            "undecided": form.undecided,
            "clashes": [told(one) for one in stale.clashes],
            "taken": [told(one) for one in stale.taken],
            "kept": [told(one) for one in stale.kept],
            "inputs": [bound.as_hidden() for bound in form],
            "buttons": [name for name in ("_push", "_continue", "_addanother") if name in request.POST],
        }
        return TemplateResponse(request, "customers/stale.html", context)

    def history_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        customer = self.get_object(request, object_id)
        if not self.has_view_or_change_permission(request, customer):
            raise PermissionDenied
        return HttpResponseRedirect(
            reverse("admin:customers_customerchange_changelist") + f"?customer__id__exact={customer.pk}"
        )

    # Notes

    def has_note_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("customers.add_note"))

    def note_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        if not self.has_view_permission(request) or not self.has_note_permission(request):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        text = clean_text(request.POST.get("text", ""))
        if not 0 < len(text) <= NOTE_LENGTH or has_control_characters(text):
            self.message_user(request, f"Write a note of at most {NOTE_LENGTH} characters.", messages.ERROR)
        else:
            editing.note(customer=customer, text=text, actor=actor_of(request))
            self.message_user(request, "The note is in the timeline.", messages.SUCCESS)
        return self.back(customer)

    # Archiving

    def get_urls(self) -> list[URLPattern]:
        return [
            self.posted("note", self.note_view),
            self.posted("archive", self.archive_view),
            self.posted("restore", self.restore_view),
            self.posted("reveal", self.reveal_view),
            *super().get_urls(),
        ]

    def archive_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        return self._move(request, object_id, editing.archive, "in the archive")

    def restore_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        return self._move(request, object_id, editing.restore, "in use again")

    def _move(
        self, request: HttpRequest, object_id: str, move: Callable[..., Mapping[UUID, Any]], where: str
    ) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        if not self.has_change_permission(request, customer):
            raise PermissionDenied
        move(organization=customer.organization, ids=[customer.pk], actor=actor_of(request))
        self.message_user(request, f"{customer.name} is {where}.", messages.SUCCESS)
        return self.back(customer)

    def reveal_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Show the page of one customer in clear, this once, and keep who looked and why."""
        if not self.has_view_permission(request) or not request.user.has_perm(REVEAL):
            raise PermissionDenied
        customer = self.get_object(request, object_id)
        person = actor_of(request)
        reason = clean_text(request.POST.get("reason", ""))
        Reveal.objects.create(
            organization=customer.organization,
            customer=customer,
            at=timezone.now(),
            user_id=person.id,
            user_name=person.name[:200],
            reason="".join(c for c in reason if not has_control_characters(c))[:500],
            request_id=person.request_id[:64],
        )
        # The answer is the page itself: there is no address that shows it a second time.
        request.revealed = customer.pk  # type: ignore[attr-defined] # for this request alone
        request.method = "GET"
        page = reverse("admin:customers_customer_change", args=[customer.pk])
        response = self.changeform_view(request, str(customer.pk), page)
        response["Cache-Control"] = "no-store"
        return response


def by_organization(
    customers: QuerySet[Customer], *, limit: int | None = None
) -> Iterator[tuple[Organization, list[UUID]]]:
    """The ids of these customers (at most `limit`), apart for each organization."""
    ids: dict[int, list[UUID]] = {}
    for organization, pk in customers.order_by("pk").values_list("organization_id", "pk")[:limit]:
        ids.setdefault(organization, []).append(pk)
    for found in Organization.objects.filter(pk__in=ids):
        yield found, ids[found.pk]


def sentence_of(change: CustomerChange, *, clear: bool) -> str:
    """One change as the timeline tells it, of a new customer without its values."""
    event = change_event(Asked(customer=change.customer, sees=clear), change)
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


class Ticked(BaseModelAdmin):  # type: ignore[type-arg] # none at run time
    """Offers what is many as boxes to tick: Django's two lists need scripts, and more width than a phone has."""

    filter_horizontal = ()

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        kwargs.setdefault("widget", theme.CheckboxSelectMultiple)
        return super().formfield_for_manytomany(db_field, request, **kwargs)


@admin.register(Organization)
class OrganizationAdmin(Ticked, theme.ModelAdmin):
    """Who works with whose customers: for superusers alone."""

    list_display = ["name", "slug", "country"]
    search_fields = ["name", "slug"]

    def has_module_permission(self, request: HttpRequest) -> bool:
        return self._superuser(request)

    def has_view_permission(self, request: HttpRequest, obj: Organization | None = None) -> bool:
        return self._superuser(request)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self._superuser(request)

    def has_change_permission(self, request: HttpRequest, obj: Organization | None = None) -> bool:
        return self._superuser(request)

    def has_delete_permission(self, request: HttpRequest, obj: Organization | None = None) -> bool:
        # Customers and their history hang on it.
        return False

    def _superuser(self, request: HttpRequest) -> bool:
        return bool(request.user.is_active and getattr(request.user, "is_superuser", False))


admin.site.unregister(User)
admin.site.unregister(Group)
admin.site.site_header = admin.site.site_title = "Customer Hub"


@admin.register(User)
class UserAdmin(Ticked, DjangoUserAdmin, theme.ModelAdmin):  # type: ignore[type-arg] # none at run time
    """People. Who is no superuser sees those of the own organizations, and gives nobody more than they have."""

    form = theme.UserChangeForm
    add_form = theme.UserCreationForm
    change_password_form = theme.AdminPasswordChangeForm

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        people: QuerySet[User] = super().get_queryset(request)
        if getattr(request.user, "is_superuser", False):
            return people
        own = [organization.pk for organization in organizations(request)]
        theirs = Organization.objects.filter(members=OuterRef("pk"))
        return people.filter(Exists(theirs.filter(pk__in=own)), ~Exists(theirs.exclude(pk__in=own)), is_superuser=False)

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> User:
        found: User | None = super().get_object(request, object_id, from_field)
        if found is None:
            raise Http404
        return found

    def has_change_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        return bool(super().has_change_permission(request, obj)) and self._within_own_rights(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        return bool(super().has_delete_permission(request, obj)) and self._within_own_rights(request, obj)

    def _within_own_rights(self, request: HttpRequest, obj: User | None) -> bool:
        """Whether these people have no right that this person lacks, were they in use."""
        if obj is None or getattr(request.user, "is_superuser", False):
            return True
        # Django answers that whoever is out of use has no rights: with a new password they would be back.
        held = Permission.objects.filter(Q(user=obj.pk) | Q(group__user=obj.pk)).select_related("content_type")
        return {f"{p.content_type.app_label}.{p.codename}" for p in held} <= request.user.get_all_permissions()

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> list[Any]:
        return [] if getattr(request.user, "is_superuser", False) else ["is_superuser", "user_permissions"]

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        if db_field.name == "groups" and not getattr(request.user, "is_superuser", False):
            own = request.user.get_all_permissions()
            groups = Group.objects.prefetch_related("permissions__content_type")
            kwargs["queryset"] = Group.objects.filter(
                pk__in=[
                    group.pk
                    for group in groups
                    if {f"{p.content_type.app_label}.{p.codename}" for p in group.permissions.all()} <= own
                ]
            )
        return super().formfield_for_manytomany(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if not change and not getattr(request.user, "is_superuser", False):
            # Of no organization they would be nobody's, and this person could not even open them again.
            for organization in organizations(request):
                organization.members.add(obj)


@admin.register(Group)
class GroupAdmin(Ticked, DjangoGroupAdmin, theme.ModelAdmin):
    pass
