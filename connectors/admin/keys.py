"""API keys: issued, shown once, revoked."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from connectors.admin.badges import badge
from connectors.models import ApiKey
from customers.admin import MOMENT, OrganizationFilter, OwnAdmin
from customers.theme import CheckboxSelectMultiple, ModelForm


class ApiKeyForm(ModelForm):
    class Meta:
        model = ApiKey
        fields = ("organization", "name", "scopes", "expires_at")

    def clean_expires_at(self) -> Any:
        moment = self.cleaned_data["expires_at"]
        if moment and moment <= timezone.now():
            raise ValidationError("Choose a time to come, or leave it empty.")
        return moment


@admin.register(ApiKey)
class ApiKeyAdmin(OwnAdmin):
    form = ApiKeyForm
    change_form_template = "connectors/key_form.html"
    list_display = ["name", "prefix_shown", "organization", "scopes_shown", "state", "used", "expires"]
    list_select_related = ["organization"]
    list_filter = [OrganizationFilter]
    search_fields = ["name", "prefix"]

    @admin.display(description="Key")
    def prefix_shown(self, key: ApiKey) -> str:
        return f"{key.prefix}…"

    @admin.display(description="May")
    def scopes_shown(self, key: ApiKey) -> str:
        return ", ".join(key.scopes) or "nothing"

    @admin.display(description="State")
    def state(self, key: ApiKey) -> str:
        if key.revoked_at:
            return badge("✕", "Revoked", "danger", title=f"Since {key.revoked_at.strftime(MOMENT)}")
        if key.expires_at and key.expires_at <= timezone.now():
            return badge("✕", "Expired", "danger")
        return badge("✓", "Usable", "success")

    @admin.display(description="Last used", empty_value="never")
    def used(self, key: ApiKey) -> str | None:
        return key.last_used_at.strftime(MOMENT) if key.last_used_at else None

    @admin.display(description="Expires", empty_value="never")
    def expires(self, key: ApiKey) -> str | None:
        return key.expires_at.strftime(MOMENT) if key.expires_at else None

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[Any]:
        if obj is None:
            return ["organization", "name", "scopes", "expires_at"]
        return ["organization", "name", "prefix_shown", "scopes_shown", "state", "used", "expires"]

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        return [name for name in self.get_fields(request, obj) if name != "name"] if obj else []

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
            obj.save(update_fields=["name"])
            return
        issued, secret = ApiKey.issue(
            organization=obj.organization, name=obj.name, scopes=obj.scopes, expires_at=obj.expires_at
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
        if not self.has_change_permission(request):
            raise PermissionDenied
        key = self.get_object(request, object_id)
        ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now())
        self.message_user(request, f"{key} is revoked: calls with it are refused from now on.", messages.SUCCESS)
        return self.back(key)
