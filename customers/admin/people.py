"""People, their groups, and the organizations that they work with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin
from django.contrib.admin.options import BaseModelAdmin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, Permission, User
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.http import Http404, HttpRequest

from customers import theme
from customers.admin.person import organizations
from customers.models import Organization

admin.site.unregister(User)
admin.site.unregister(Group)
admin.site.site_header = admin.site.site_title = "Customer Hub"


def within_own_rights(request: HttpRequest, permissions: Iterable[Permission]) -> bool:
    """Whether the person behind the request has each of these rights."""
    user = request.user
    if getattr(user, "is_superuser", False):
        return True
    own = user.get_all_permissions()
    return all(f"{one.content_type.app_label}.{one.codename}" in own for one in permissions)


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
        # Django answers that whoever is out of use has no rights: with a new password they would be back.
        return obj is None or within_own_rights(
            request, Permission.objects.filter(Q(user=obj) | Q(group__user=obj)).select_related("content_type")
        )

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> list[Any]:
        return [] if getattr(request.user, "is_superuser", False) else ["is_superuser", "user_permissions"]

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        if db_field.name == "groups" and not getattr(request.user, "is_superuser", False):
            groups = Group.objects.prefetch_related("permissions__content_type")
            kwargs["queryset"] = Group.objects.filter(
                pk__in=[group.pk for group in groups if within_own_rights(request, group.permissions.all())]
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
    """Groups. Who is no superuser gives no group a right that they lack, and leaves groups alone that have one."""

    def has_change_permission(self, request: HttpRequest, obj: Group | None = None) -> bool:
        return bool(super().has_change_permission(request, obj)) and self._within_own_rights(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Group | None = None) -> bool:
        return bool(super().has_delete_permission(request, obj)) and self._within_own_rights(request, obj)

    def _within_own_rights(self, request: HttpRequest, obj: Group | None) -> bool:
        return obj is None or within_own_rights(request, obj.permissions.select_related("content_type"))

    def formfield_for_manytomany(self, db_field: Any, request: Any = None, **kwargs: Any) -> Any:
        if db_field.name == "permissions" and not getattr(request.user, "is_superuser", False):
            every = Permission.objects.select_related("content_type")
            kwargs["queryset"] = every.filter(pk__in=[one.pk for one in every if within_own_rights(request, [one])])
        return super().formfield_for_manytomany(db_field, request, **kwargs)
