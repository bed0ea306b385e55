"""Serializer fields that read JSON as it is: no number passes for a text and no text for a flag."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from customers.normalize import clean_text, has_control_characters, is_email


class Text(serializers.CharField):
    """A JSON string, in the form in which the hub stores it."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        if has_control_characters(data):
            raise serializers.ValidationError("Remove the control characters.")
        text = super().to_internal_value(data)
        return clean_text(text) if self.trim_whitespace else text


class Flag(serializers.BooleanField):
    """A JSON true or false."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


class Whole(serializers.IntegerField):
    """A JSON whole number. JSON knows one kind of number, so 5.0 is one, too."""

    def to_internal_value(self, data: Any) -> int:
        if type(data) is not int and not (isinstance(data, float) and data.is_integer()):
            self.fail("invalid")
        number: int = super().to_internal_value(data)
        return number


def well_formed(text: str) -> None:
    """A validator: an e-mail address as far as its form can tell."""
    if not is_email(text):
        raise serializers.ValidationError("Give an e-mail address, such as name@example.com.")
