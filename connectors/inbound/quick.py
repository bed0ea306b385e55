"""Serializers that read what is usual at a fraction of the cost, and everything else as DRF does.

What is not as expected is read again from the start: errors, their order and their words are DRF's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from django.core.exceptions import ValidationError as DjangoValidationError
from django.core.validators import MaxLengthValidator, ProhibitNullCharactersValidator
from rest_framework import serializers
from rest_framework.fields import empty
from rest_framework.validators import ProhibitSurrogateCharactersValidator

from connectors.inbound.fields import Flag, Text
from customers.normalize import clean_text, has_control_characters

Read = Callable[[Any], Any]


class Unusual(Exception):
    """The value has to be read as DRF reads it."""


class _Known(NamedTuple):
    name: str
    read: Read
    needed: bool  # what is absent has to be refused, or has a default


class Quick(serializers.Serializer[Any]):
    """A serializer of JSON objects. A subclass that reads in a way of its own is simply read as DRF does."""

    # Whether names that are not known are refused, and the method that reads as this class knows it is read.
    strict: ClassVar[bool] = False
    usually: ClassVar[Any] = serializers.Serializer.to_internal_value
    _known: list[_Known] | None = None
    _asked = False

    def run_validation(self, data: Any = empty) -> Any:
        if type(data) is dict:
            if not self._asked:
                self._known, self._asked = self._readers(), True
            if self._known is not None and (values := self._quickly(data, self._known)) is not None:
                return values
        return super().run_validation(data)

    def _quickly(self, data: Mapping[str, Any], known: list[_Known]) -> dict[str, Any] | None:
        values = {}
        try:
            for name, read, needed in known:
                if name in data:
                    values[name] = read(data[name])
                elif needed:
                    return None
            if self.strict and len(values) != len(data):
                return None
            checked: dict[str, Any] = self.validate(values)
        except (Unusual, serializers.ValidationError, DjangoValidationError):
            return None
        return checked

    def _readers(self) -> list[_Known] | None:
        if type(self).to_internal_value is not type(self).usually or self.partial or self.validators:
            return None
        fields = [field for field in self.fields.values() if not field.read_only]
        if any(field.source != field.field_name or hasattr(self, f"validate_{field.field_name}") for field in fields):
            return None
        return [
            _Known(str(field.field_name), _reader(field), field.required or field.default is not empty)
            for field in fields
        ]


def _reader(field: Any) -> Read:
    """Reads one value as the field does; raises ValidationError, or Unusual where it does not know."""
    if isinstance(field, Text) and type(field).to_internal_value is Text.to_internal_value:
        return _text(field)
    plain: Mapping[Any, Any] = {}
    if type(field) is Flag and not field.validators:
        plain = {True: True, False: False}
    elif type(field) is serializers.ChoiceField and not field.validators:
        plain = {text: value for text, value in field.choice_strings_to_values.items() if text}
    kind = bool if type(field) is Flag else str

    def read(value: Any) -> Any:
        return plain[value] if type(value) is kind and value in plain else field.run_validation(value)

    return read


def _text(field: Text) -> Read:
    seen_to = (MaxLengthValidator, ProhibitNullCharactersValidator, ProhibitSurrogateCharactersValidator)
    others: list[Any] = [validator for validator in field.validators if type(validator) not in seen_to]
    if any(getattr(validator, "requires_context", False) for validator in others):
        return field.run_validation
    trim, blank, null, most = field.trim_whitespace, field.allow_blank, field.allow_null, field.max_length

    def read(value: Any) -> str | None:
        if type(value) is not str:
            if value is None and null:
                return None
            raise Unusual
        text = clean_text(value.strip()) if trim else value
        if not text and blank:
            return ""
        if not text or (most is not None and len(text) > most):
            raise Unusual
        if not value.isprintable() and has_control_characters(value):
            raise Unusual
        for validator in others:
            validator(text)
        return text

    return read
