"""The customer screens: find, read, edit, archive. Every write goes through `customers.editing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.core.exceptions import PermissionDenied
from django.db.models import ForeignKey, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from customers import editing, jsontext, theme
from customers.editing import Actor, StaleVersion
from customers.forms import ABSENT, Clash, CustomerForm, label, shown
from customers.ids import parse_public_id
from customers.models import Customer, CustomerChange, Organization
from customers.normalize import clean_text, email_key, has_control_characters, name_key, phone_key
from customers.privacy import masked, masked_all, sees
from customers.timeline import PEOPLE, SYSTEMS, Asked, Cursor, Source, changes, notes, timeline

MOMENT = "%Y-%m-%d %H:%M:%S UTC"
NOTE_LENGTH = 2000


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


class OrganizationFilter(admin.SimpleListFilter):
    title = "organization"
    parameter_name = "organization"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        own = organizations(request)
        return [(str(organization.pk), organization.name) for organization in own] if len(own) > 1 else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(organization=value) if (value := self.value()) else queryset


class ArchivedFilter(admin.SimpleListFilter):
    title = "archived"
    parameter_name = "archived"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("no", "In use"), ("yes", "Archived")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(archived_at__isnull=self.value() == "no") if self.value() else queryset


class OwnAdmin(theme.ModelAdmin):
    """Shows and offers what belongs to the person's own organizations.

    Another organization's id answers like an id that does not exist: 404. An action without its right answers 403.
    """

    organization_path = "organization"
    show_full_result_count = False
    list_per_page = 50

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


@admin.register(Customer)
class CustomerAdmin(OwnAdmin):
    form = CustomerForm
    change_form_template = "customers/customer_form.html"
    list_display = ["name_shown", "email", "phone", "organization", "updated", "version"]
    list_display_links = ["name_shown"]
    list_select_related = ["organization"]
    list_filter = [OrganizationFilter, ArchivedFilter]
    ordering = ["-updated_at", "-id"]
    search_fields = ["name"]
    search_help_text = "Name, e-mail, phone, or any id: the hub's or another system's."
    actions = ["archive_selected", "restore_selected"]
    sources: Sequence[Source] = (changes, notes)  # of the timeline

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

    # Finding

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """What an id, an e-mail address, a phone number or the beginning of a name hits; without a hit, its parts."""
        term = search_term.strip()
        if not term:
            return queryset, False
        exact = self.exact_matches(request, self.get_queryset(request).order_by(), term)
        ids = list(exact[0].union(*exact[1:])[:1000]) if exact else []
        hits = Q(pk__in=ids)
        if key := name_key(term):
            hits |= Q(name_key__startswith=key)
        if ids or queryset.filter(hits).exists():
            return queryset.filter(hits), False
        parts = Q(email_key__contains=email_key(term)) if email_key(term) else Q()
        return queryset.filter(parts | Q(name_key__contains=key) if key else parts), False

    def exact_matches(
        self, request: HttpRequest, customers: QuerySet[Customer], term: str
    ) -> list[QuerySet[Customer, Any]]:
        """Queries for the ids of the customers that the term names exactly."""
        found = Q()
        if uid := parse_public_id("cust", term):
            found |= Q(pk=uid)
        if "@" in term:
            found |= Q(email_key=email_key(term))
        countries = {organization.country for organization in organizations(request)} or {""}
        if phones := {key for country in countries if (key := phone_key(term, country=country))}:
            found |= Q(phone_key__in=phones)
        return [customers.filter(found).values_list("pk", flat=True)] if found else []

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
        allowed = self.has_add_permission(request) if obj is None else self.has_change_permission(request, obj)
        return (
            [*fieldsets, ("This change", {"fields": ["message"], "classes": ["hub-message"]})] if allowed else fieldsets
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Customer | None = None) -> list[str]:
        return ["organization"] if obj else []

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
            context["can_archive"] = self.has_change_permission(request, obj)
            context["can_note"] = self.has_note_permission(request)
            context["raw"] = self._raw(obj, open_=sees(request.user))
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
        asked = Asked(customer=customer, sees=sees(request.user), only=only, before=before)
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
            **(values if open_ else masked_all(values)),
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

    @admin.action(description="Archive", permissions=["change"])
    def archive_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> None:
        self._move_selected(request, queryset.filter(archived_at=None), editing.archive, "in the archive")

    @admin.action(description="Restore", permissions=["change"])
    def restore_selected(self, request: HttpRequest, queryset: QuerySet[Customer]) -> None:
        self._move_selected(request, queryset.exclude(archived_at=None), editing.restore, "in use again")

    def _move_selected(
        self,
        request: HttpRequest,
        queryset: QuerySet[Customer],
        move: Callable[..., Mapping[UUID, Any]],
        where: str,
    ) -> None:
        moved = 0
        for organization, ids in by_organization(queryset.filter(merged_into=None)):
            moved += len(move(organization=organization, ids=ids, actor=actor_of(request)))
        self.message_user(request, f"{moved} customers are {where}.", messages.SUCCESS)


def by_organization(
    customers: QuerySet[Customer], *, limit: int | None = None
) -> Iterator[tuple[Organization, list[UUID]]]:
    """The ids of these customers (at most `limit`), apart for each organization."""
    ids: dict[int, list[UUID]] = {}
    for organization, pk in customers.order_by("pk").values_list("organization_id", "pk")[:limit]:
        ids.setdefault(organization, []).append(pk)
    for found in Organization.objects.filter(pk__in=ids):
        yield found, ids[found.pk]


class Entry:
    """One change as the timeline tells it."""

    def __init__(self, change: CustomerChange) -> None:
        self.change = change
        self.author = change.actor_name
        self.kind = change.get_actor_kind_display()
        self.at = change.at.strftime(MOMENT)
        self.fields = [
            (label(name), shown(old), shown(new))
            for name, (old, new) in change.changes.items()
            if name != "archived_at"
        ]
        archived = change.changes.get("archived_at")
        if change.version == 1:
            self.deed = "created this customer"
        elif archived:
            self.deed = "archived this customer" if archived[1] else "restored this customer"
        else:
            self.deed = "changed"

    @property
    def sentence(self) -> str:
        told = "; ".join(f"{name} from {old} to {new}" for name, old, new in self.fields)
        return f"{self.deed} {told}" if self.deed == "changed" else self.deed


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
        return Entry(change).sentence


class TickedAdmin(theme.ModelAdmin):
    """Offers what is many as boxes to tick: Django's two lists need scripts, and more width than a phone has."""

    filter_horizontal = ()

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        kwargs.setdefault("widget", theme.CheckboxSelectMultiple)
        return super().formfield_for_manytomany(db_field, request, **kwargs)


@admin.register(Organization)
class OrganizationAdmin(TickedAdmin):
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
class UserAdmin(TickedAdmin, DjangoUserAdmin):  # type: ignore[type-arg] # none at run time
    form = theme.UserChangeForm
    add_form = theme.UserCreationForm
    change_password_form = theme.AdminPasswordChangeForm


@admin.register(Group)
class GroupAdmin(TickedAdmin, DjangoGroupAdmin):
    pass
