"""The customer screens: find, read, edit, archive. Every write goes through `customers.editing`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.views.main import ORDER_VAR, ChangeList
from django.core.exceptions import PermissionDenied
from django.db import connection
from django.db.models import OuterRef, Q, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, reverse
from django.utils import timezone
from django.utils.html import format_html

from customers import editing, jsontext, search
from customers.admin.filters import (
    ArchivedFilter,
    AuthorFilter,
    CountryFilter,
    DuplicatesFilter,
    OrganizationFilter,
    UpdatedFilter,
)
from customers.admin.own import MOMENT, OwnAdmin
from customers.admin.paging import COUNTED_SLOWLY, BoundedChangeList
from customers.admin.person import actor_of, organizations
from customers.editing import StaleVersion
from customers.forms import ABSENT, Clash, CustomerForm, label, shown
from customers.ids import parse_public_id
from customers.models import Customer, CustomerChange, Reveal
from customers.normalize import clean_text, has_control_characters
from customers.privacy import PERSONAL, REVEAL, masked, sees
from customers.timeline import PEOPLE, SYSTEMS, Asked, Cursor, Source, changes, notes, reveals, timeline

NOTE_LENGTH = 2000


class LastAuthors(BoundedChangeList):
    """Customers with who changed them last, as `last_author` and `last_kind`: read for the page's rows alone."""

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        last = CustomerChange.objects.filter(customer=OuterRef("pk"), version=OuterRef("version"))
        rows: QuerySet[Any] = super().get_queryset(request, exclude_parameters)
        authors = {"last_author": Subquery(last.values("actor_name")), "last_kind": Subquery(last.values("actor_kind"))}
        found: QuerySet[Any] = rows.annotate(**authors)
        return found


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
    list_select_related = ()  # joined, SQLite would begin with the organization and sort all its customers
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

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changes = super().get_changelist_instance(request)
        own = {organization.pk: organization for organization in organizations(request)}
        changes.result_list = list(changes.result_list)
        for customer in changes.result_list:
            customer.organization = own[customer.organization_id]
        return changes

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
            context["raw"] = self._raw(obj, clear=clear)
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
        asked = Asked(customer=customer, clear=shows_personal(request, customer), only=only, before=before)
        entries, older = timeline(asked, self.sources)
        return {"timeline": entries, "timeline_only": only, "timeline_before": before, "timeline_older": older}

    def _raw(self, customer: Customer, *, clear: bool) -> str:
        """Everything that the hub keeps of the customer itself, as JSON."""
        values = {name: getattr(customer, name) for name in editing.EDITABLE}
        kept = {
            "id": customer.public_id,
            "version": customer.version,
            "created_at": customer.created_at,
            "updated_at": customer.updated_at,
            "archived_at": customer.archived_at,
            **{name: value if clear else masked(name, value) for name, value in values.items()},
        }
        return jsontext.dumps(kept, option=jsontext.INDENT).decode()

    def _stale_page(self, request: HttpRequest, form: CustomerForm, customer: Customer) -> HttpResponse:
        """Who changed what since the form was opened, with a choice for each field that both changed."""
        stale, clear = form.stale, sees(request.user)
        assert stale is not None

        def told(clash: Clash) -> dict[str, Any]:
            def value(one: Any) -> str:
                return shown(one if clear or one is ABSENT else masked(clash.name, one))

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
