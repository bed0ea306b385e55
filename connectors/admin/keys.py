"""API keys: issued, shown once, revoked."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from connectors.admin.badges import badge
from connectors.models import ApiKey
from customers.admin.filters import OrganizationFilter
from customers.admin.own import MOMENT, OwnAdmin
from customers.theme import CheckboxSelectMultiple, ModelForm


class ApiKeyForm(ModelForm):
    class Meta:
        model = ApiKey
        fields = ("organization", "name", "scopes", "expires_at", "rate", "strict")

    def clean_expires_at(self) -> Any:
        moment = self.cleaned_data["expires_at"]
        if moment and moment <= timezone.now():
            raise ValidationError("Choose a time to come, or leave it empty.")
        return moment


class StateFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(str(value), str(label)) for value, label in ApiKey.State.choices]

    def queryset(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> QuerySet[ApiKey]:
        expired = Q(revoked_at=None, expires_at__lte=timezone.now())
        match self.value():
            case ApiKey.State.ACTIVE:
                return queryset.filter(revoked_at=None).exclude(expired)
            case ApiKey.State.EXPIRED:
                return queryset.filter(expired)
            case ApiKey.State.REVOKED:
                return queryset.exclude(revoked_at=None)
        return queryset


@admin.register(ApiKey)
class ApiKeyAdmin(OwnAdmin):
    form = ApiKeyForm
    change_form_template = "connectors/key_form.html"
    list_display = ["name", "prefix_shown", "organization", "scopes_shown", "state", "used", "expires"]
    list_select_related = ["organization"]
    list_filter = [OrganizationFilter, StateFilter]
    actions = ["revoke_selected"]
    search_fields = ["name", "prefix"]

    @admin.display(description="Key")
    def prefix_shown(self, key: ApiKey) -> str:
        return f"{key.prefix}…"

    @admin.display(description="May")
    def scopes_shown(self, key: ApiKey) -> str:
        return ", ".join(key.scopes) or "nothing"

    @admin.display(description="State")
    def state(self, key: ApiKey) -> str:
        state = key.state(now=timezone.now())
        if state == ApiKey.State.ACTIVE:
            return badge("✓", state.label, "success")
        since = key.revoked_at or key.expires_at
        return badge("✕", state.label, "danger", title=f"Since {since.strftime(MOMENT)}" if since else "")

    @admin.display(description="Last used", empty_value="never")
    def used(self, key: ApiKey) -> str | None:
        return key.last_used_at.strftime(MOMENT) if key.last_used_at else None

    @admin.display(description="Expires", empty_value="never")
    def expires(self, key: ApiKey) -> str | None:
        return key.expires_at.strftime(MOMENT) if key.expires_at else None

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[Any]:
        if obj is None:
            return ["organization", "name", "scopes", "expires_at", "rate", "strict"]
        return ["organization", "name", "prefix_shown", "scopes_shown", "rate", "strict", "state", "used", "expires"]

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        return [name for name in self.get_fields(request, obj) if name not in ("name", "rate", "strict")] if obj else []

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.name == "scopes":
            return forms.MultipleChoiceField(
                choices=[(scope, scope) for scope in ApiKey.SCOPES],
                initial=list(ApiKey.SCOPES),
                widget=CheckboxSelectMultiple,
                label="May",
            )
        return super().formfield_for_dbfield(db_field, request, **kwargs)

    @sensitive_variables("secret")
    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            obj.save(update_fields=["name", "rate", "strict"])
            return
        issued, secret = ApiKey.issue(
            organization=obj.organization,
            name=obj.name,
            scopes=obj.scopes,
            expires_at=obj.expires_at,
            rate=obj.rate,
            strict=obj.strict,
        )
        obj.__dict__.update(issued.__dict__)
        request.issued_secret = secret  # type: ignore[attr-defined] # kept no longer than this request

    def response_add(self, request: HttpRequest, obj: ApiKey, post_url_continue: str | None = None) -> HttpResponse:
        """The page that shows the key, once: it is the answer to the POST and nothing keeps it."""
        context = {
            **self.admin_site.each_context(request),
            "title": f"API key {obj.name}",
            "opts": self.opts,
            "key": obj,
            "secret": getattr(request, "issued_secret", ""),
        }
        return TemplateResponse(request, "connectors/key_issued.html", context)

    def has_delete_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        return False

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: ApiKey | None = None,
    ) -> HttpResponse:
        # One key at a time: the answer to saving it is the page that shows it.
        context |= {"show_save_and_add_another": False, "show_save_and_continue": False}
        if obj is not None:
            context["can_revoke"] = obj.revoked_at is None and self.has_change_permission(request, obj)
        return super().render_change_form(request, context, add, change, form_url, obj)

    def get_urls(self) -> list[URLPattern]:
        return [self.posted("revoke", self.revoke_view), *super().get_urls()]

    def revoke_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The first POST asks whether it is meant, the second revokes."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        key = self.get_object(request, object_id)
        if request.POST.get("confirmed"):
            self._revoke(request, [key])
            return self.back(key)
        return self._confirmation(request, [key])

    @admin.action(description="Revoke…", permissions=["change"])
    def revoke_selected(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> HttpResponse | None:
        """As `revoke_view`, for many."""
        keys = list(queryset.filter(revoked_at=None).select_related("organization"))
        if not keys:
            self.message_user(request, "These keys are revoked already.", messages.WARNING)
        elif request.POST.get("confirmed"):
            self._revoke(request, keys)
        else:
            return self._confirmation(request, keys, action="revoke_selected")
        return None

    def _confirmation(self, request: HttpRequest, keys: list[ApiKey], *, action: str = "") -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": "Revoke API keys" if len(keys) > 1 else f"Revoke {keys[0]}",
            "opts": self.opts,
            "rows": [(key, self.used(key) or "never") for key in keys],
            "action": action,
            "checkbox": ACTION_CHECKBOX_NAME,
        }
        return TemplateResponse(request, "connectors/key_revoke.html", context)

    def _revoke(self, request: HttpRequest, keys: list[ApiKey]) -> None:
        unrevoked = ApiKey.objects.filter(pk__in=[key.pk for key in keys], revoked_at=None)
        number = unrevoked.update(revoked_at=timezone.now())
        told = f"{keys[0]} is revoked" if len(keys) == 1 else f"{number} keys are revoked"
        self.message_user(request, f"{told}: calls are refused from now on.", messages.SUCCESS)
