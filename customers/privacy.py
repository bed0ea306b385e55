"""What is personal of a customer, and how it is shown to those who may not see it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from django.contrib.auth.models import AnonymousUser
from django.db.models import Model

from customers.editing import ADDRESS

SEE, REVEAL = "customers.view_personal_data", "customers.reveal_personal_data"
# A customer's name stays readable: without it nobody could work.
PERSONAL = frozenset(
    {"email", "phone", "custom_fields"}
    | {f"{prefix}_{part}" for prefix in ("address", "shipping_address") for part in ADDRESS if part != "country"}
)
HIDDEN = "•••"
NEEDS_RIGHT = "Shown to those who may see personal data."
_ADDRESS = re.compile(r"[^\s@<>\"'(),;:]+@[^\s@<>\"'(),;:]+")
_NUMBER = re.compile(r"\+?\d(?:[\s./()-]{0,2}\d){5,}")


def sees(user: Model | AnonymousUser) -> bool:
    """Whether this person may see personal data without asking."""
    return bool(user.has_perm(SEE))  # type: ignore[union-attr] # every user model of Django has it


def masked(name: str, value: Any) -> Any:
    """The value of this customer field with what is personal hidden; an empty value stays empty.

    An e-mail address keeps its first letter and its domain, a phone number its last two digits.
    """
    if name not in PERSONAL or value in (None, "", {}):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    if name == "email" and "@" in text:
        box, _, domain = text.rpartition("@")
        return f"{box[:1]}{HIDDEN}@{domain}"
    if name == "phone" and len(text) > 5:
        return f"{HIDDEN} {text[-2:]}"
    return HIDDEN


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers of a field's value, those inside custom fields included."""
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(one)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def redacted(text: str, values: Mapping[str, Any] | None = None) -> str:
    """A sentence that another system or a person wrote, without e-mail addresses and long numbers.

    `values` are a customer's fields: what is personal among them is hidden too where the sentence quotes it.
    """
    personal = [value for name in PERSONAL if values and name in values for value in _leaves(values[name])]
    for value in sorted(personal, key=len, reverse=True):  # a part of another value must not break that one up
        if len(value) > 2:
            text = re.sub(re.escape(value), HIDDEN, text, flags=re.IGNORECASE)
    return _NUMBER.sub(HIDDEN, _ADDRESS.sub(HIDDEN, text))
