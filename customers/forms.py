"""The form in which staff edit a customer, and what it does when somebody else was faster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from customers import editing
from customers.models import Customer, CustomerChange
from customers.normalize import clean_text, is_email
from customers.theme import EmailInput, ModelForm, TextInput

ABSENT = object()  # of a custom field: there is none of that name


def label(name: str) -> str:
    """A customer field as staff read it."""
    if name not in editing.EDITABLE:
        return name
    verbose = Customer._meta.get_field(name).verbose_name  # type: ignore[union-attr] # EDITABLE are columns
    return str(verbose)[:1].upper() + str(verbose)[1:]


def shown(value: Any) -> str:
    """A stored value as staff read it."""
    if value in (None, "", {}, ABSENT):
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


CHOICES = ("original", "theirs", "yours")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """A value as it was, as they made it, and as this person wants it."""

    original: Any
    theirs: Any
    yours: Any


@dataclass(kw_only=True)
class Clash:
    """What both changed. `key` names it in the form: a field, or one custom field as `custom_fields:name`."""

    key: str
    name: str
    sides: Sides
    by: str
    chosen: str = ""

    @property
    def title(self) -> str:
        _, _, part = self.key.partition(":")
        return part or label(self.name)


@dataclass(kw_only=True)
class Stale:
    """What changed since the form was opened: `taken` by them alone, `kept` by this person alone, and by both."""

    opened: int
    current: int
    authors: list[str]
    clashes: list[Clash] = dataclasses.field(default_factory=list)
    taken: list[Clash] = dataclasses.field(default_factory=list)
    kept: list[Clash] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)

    def add(self, key: str, name: str, sides: Sides, *, by: str) -> bool:
        """Judge one value. True when theirs is to be in the form."""
        one = Clash(key=key, name=name, sides=sides, by=by)
        if sides.theirs == sides.original:
            if sides.yours != sides.original:
                self.kept.append(one)
            return False
        if sides.yours in (sides.original, sides.theirs):
            self.taken.append(one)
            return True
        self.clashes.append(one)
        return False

    def add_parts(self, name: str, sides: Sides, *, by: str) -> dict[str, Any]:
        """Judge an object part by part. Returns what is to be in the form."""
        original, theirs, yours = sides.original or {}, sides.theirs or {}, sides.yours or {}
        merged = {}
        for part in dict.fromkeys([*theirs, *yours, *original]):
            values = Sides(
                original=original.get(part, ABSENT), theirs=theirs.get(part, ABSENT), yours=yours.get(part, ABSENT)
            )
            value = values.theirs if self.add(f"{name}:{part}", name, values, by=by) else values.yours
            if value is not ABSENT:
                merged[part] = value
        return merged


class CustomerForm(ModelForm):
    """Edits one customer. `seen_version` is the version that the page showed.

    When the customer has moved on, nothing is valid to save: `stale` says who changed what. The form then holds what
    the others changed, what this person changed, and the new version. For each field that both changed the next save
    brings a choice: the inputs `decide` name these fields, `choice-<field>` is one of CHOICES, and `opened_version` is
    the version that the original values are of.
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
        self.stale: Stale | None = None
        self.undecided: list[str] = []
        if "name" in self.fields:
            # First and last name make up the name; that there is one is checked with the other rules.
            self.fields["name"].required = False
        if self.is_bound and not self.adding:
            self._take_choices()

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
            self._check_version()

    # Somebody else was faster

    def _check_version(self) -> None:
        seen, current = self.cleaned_data.get("seen_version"), self.instance.version
        if seen is None or seen > current:
            self.add_error(None, "The page was sent without the version it showed. Open it again.")
            return
        # What is wrong by itself is said first: the form comes back as it is, and with it the version it showed.
        if self.errors or (seen == current and not self.undecided):
            return
        opened = self._version("opened_version") if self.undecided else None
        self.stale = self._compare(seen if opened is None else min(opened, seen))
        self._put({"seen_version": current})
        self.add_error(None, ValidationError("Changed since you opened it. Nothing was saved.", code="stale"))

    def _compare(self, opened: int) -> Stale:
        """What they and this person changed since that version. The form then holds both, and of a clash this person's
        value.
        """
        before: dict[str, Any] = {}
        author: dict[str, str] = {}
        authors: list[str] = []
        for name, changes in self._changes_since(opened):
            authors.append(name)
            for field, (old, _) in changes.items():
                before.setdefault(field, old)
                author[field] = name
        found = Stale(opened=opened, current=self.instance.version, authors=list(dict.fromkeys(authors)))
        for name in editing.EDITABLE:
            now = getattr(self.instance, name)
            if name not in self.cleaned_data:
                if name in before:
                    found.notices.append(f"{label(name)} was changed by {author[name]}.")
                continue
            sides = Sides(original=before.get(name, now), theirs=now, yours=self._entered(name))
            if name == "custom_fields":
                self._put({name: found.add_parts(name, sides, by=author.get(name, ""))})
            elif found.add(name, name, sides, by=author.get(name, "")):
                self._put({name: now})
        if "archived_at" in before:
            found.notices.append(f"{author['archived_at']} moved the customer into or out of the archive.")
        for clash in found.clashes:
            chosen = self.data.get(f"choice-{clash.key}", "")
            clash.chosen = chosen if self.undecided and chosen in CHOICES else ""
        return found

    def _entered(self, name: str) -> Any:
        value = self.cleaned_data[name]
        return clean_text(value or "") if name in editing.TEXTS else value

    def _changes_since(self, version: int) -> list[tuple[str, dict[str, list[Any]]]]:
        rows = CustomerChange.objects.filter(customer=self.instance, version__gt=version).order_by("version")
        return list(rows.values_list("actor_name", "changes"))

    def _version(self, name: str) -> int | None:
        text = self.data.get(name, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None

    def _take_choices(self) -> None:
        """Put what was chosen for each clash into the form. Where a choice is missing, none is taken."""
        keys = self.data.getlist("decide") if hasattr(self.data, "getlist") else []
        seen, opened = self._version("seen_version"), self._version("opened_version")
        self.undecided = [key for key in keys if self.data.get(f"choice-{key}") not in CHOICES]
        if seen is None or opened is None or self.undecided:
            return
        sides = {"theirs": self._values_at(seen), "original": self._values_at(opened)}
        for key in keys:
            name, _, part = key.partition(":")
            side = sides.get(self.data[f"choice-{key}"])
            if side is None or name not in self.fields or name not in editing.EDITABLE:
                continue
            value = side.get(name, getattr(self.instance, name))
            if part:
                value = self._with_part(name, part, (value or {}).get(part, ABSENT))
            self._put({name: value})

    def _with_part(self, name: str, part: str, value: Any) -> Any:
        try:
            parts = json.loads(self.data.get(name) or "{}")
        except ValueError:
            return self.data.get(name)  # the field itself says what is wrong with it
        if not isinstance(parts, dict):
            return parts
        parts.pop(part, None)
        return parts if value is ABSENT else {**parts, part: value}

    def _values_at(self, version: int) -> dict[str, Any]:
        """The fields that have moved since, as they were at that version."""
        values: dict[str, Any] = {}
        for _, changes in self._changes_since(version):
            for field, (old, _) in changes.items():
                values.setdefault(field, old)
        return values

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
                data[name] = json.dumps(value) if isinstance(value, dict | list) else value
        self.data = data
