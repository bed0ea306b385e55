"""What all lists and pages share: they show and offer what belongs to the person's own organizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db.models import ForeignKey, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from customers import theme
from customers.admin.paging import BoundedChangeList, BoundedPaginator
from customers.admin.person import organizations
from customers.models import Organization

MOMENT = "%Y-%m-%d %H:%M:%S UTC"
# How Django's own filters end the names of what they filter by.
ENDS = ("exact", "in", "isnull", "gte", "lt")


def link_to(address: str, *args: Any, text: object) -> str:
    return format_html('<a class="hub-link" href="{}">{}</a>', reverse(address, args=args), text)


class OwnAdmin(theme.ModelAdmin):
    """Shows and offers what belongs to the person's own organizations.

    Another organization's id answers like an id that does not exist: 404. An action without its right answers 403.
    """

    organization_path = "organization"
    show_full_result_count = False
    list_per_page = 50
    change_list_template = "customers/list.html"
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
