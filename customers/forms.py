"""The form in which staff edit a customer, and what it does when somebody else was faster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from customers import editing
from customers.models import Customer, CustomerChange
from customers.normalize import is_email
from customers.theme import EmailInput, ModelForm, TextInput


def label(name: str) -> str:
    """A customer field as staff read it."""
    if name not in editing.EDITABLE:
        return name
    verbose = Customer._meta.get_field(name).verbose_name  # type: ignore[union-attr] # EDITABLE are columns
    return str(verbose)[:1].upper() + str(verbose)[1:]


def shown(value: Any) -> str:
    """A stored value as staff read it."""
    if value in (None, "", {}):
        return "‹empty›"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"‹{json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value}›"


class JSONText(forms.JSONField):
    """Shows a lone surrogate, which a refused input may hold, as the escape it was typed as: no page can hold it."""

    def prepare_value(self, value: Any) -> Any:
        text = super().prepare_value(value)
        try:
            str(text).encode()
        except UnicodeEncodeError:
            return json.dumps(value)
        return text


class CustomerForm(ModelForm):
    """Edits one customer. `seen_version` is the version that the page showed.

    When the customer has moved on, nothing is valid to save: the form then holds what the others changed, what this
    person changed, and the new version, and says which is which. Saving again stores what is seen.
    """

    seen_version = forms.IntegerField(required=False, widget=forms.HiddenInput)
    message = forms.CharField(
        required=False,
        max_length=500,
        label="Message",
        help_text="Optional, shown in the history.",
        widget=TextInput,
    )

    class Meta:
        model = Customer
        fields = ("organization", *editing.EDITABLE)
        widgets = {"email": EmailInput}
        field_classes = {"custom_fields": JSONText}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.adding:
            del self.fields["seen_version"]
        else:
            self.fields["seen_version"].initial = self.instance.version
        if "name" in self.fields:
            # First and last name make up the name; that there is one is checked with the other rules.
            self.fields["name"].required = False

    @property
    def adding(self) -> bool:
        return bool(self.instance._state.adding)

    def clean_email(self) -> str:
        email: str = self.cleaned_data["email"]
        # Systems may bring malformed addresses: one that is not touched does not stop other edits.
        if email and "email" in self.changed_data and not is_email(email):
            raise ValidationError("Enter a valid e-mail address, such as name@example.com.")
        return email

    def clean_custom_fields(self) -> Any:
        value = self.cleaned_data["custom_fields"]
        return {} if value is None else value

    def values(self) -> dict[str, Any]:
        """What to store: everything of a new customer, what was changed of a known one."""
        return {
            name: self.cleaned_data[name]
            for name in editing.EDITABLE
            if name in self.cleaned_data and (self.adding or name in self.changed_data)
        }

    def clean(self) -> None:
        for name, messages in editing.problems(self.values(), creating=self.adding).items():
            if name not in self.errors:
                self.add_error(name if name in self.fields else None, messages)
        if not self.adding:
            self._compare_versions()

    def _compare_versions(self) -> None:
        seen, current = self.cleaned_data.get("seen_version"), self.instance.version
        if seen == current:
            return
        if seen is None:
            self.add_error(None, "The page was sent without the version it showed. Open it again.")
            return
        since = CustomerChange.objects.filter(customer=self.instance, version__gt=seen).order_by("version")
        before: dict[str, Any] = {}
        author: dict[str, str] = {}
        authors: list[str] = []
        for name, changes in since.values_list("actor_name", "changes"):
            authors.append(name)
            for field, (old, _) in changes.items():
                before.setdefault(field, old)
                author[field] = name
        messages = [
            f"{' and '.join(dict.fromkeys(authors)) or 'Somebody'} changed this customer after you opened it "
            f"(version {seen} is now {current}). Nothing was saved. Check what follows, then save again."
        ]
        kept = {}
        for field, old in before.items():
            now = getattr(self.instance, field, None)
            if field not in self.fields:
                what = "in or out of the archive" if field == "archived_at" else ""
                messages.append(f"{label(field)}: changed {what or 'meanwhile'} by {author[field]}.")
                continue
            mine = self.cleaned_data.get(field)
            moved = f"{label(field)}: {shown(old)} was changed to {shown(now)} by {author[field]}"
            if field in self.cleaned_data and mine in (old, old or "", now):
                messages.append(f"{moved}. The form has it now.")
                kept[field] = now
            else:
                messages.append(f"{moved}; the form keeps yours, {shown(mine)}.")
        self._put({**kept, "seen_version": current})
        self.add_error(None, [ValidationError(message, code="stale") for message in messages])

    def _put(self, values: Mapping[str, Any]) -> None:
        """Show these values when the form is displayed again."""
        data: Any = self.data
        data = data.copy()
        for field, value in values.items():
            name = self.add_prefix(field)
            if isinstance(value, bool):
                data.pop(name, None)
                if value:
                    data[name] = "on"
            else:
                data[name] = json.dumps(value) if isinstance(value, dict) else value
        self.data = data
