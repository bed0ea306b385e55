"""What is read quickly is read, and refused, exactly as DRF reads and refuses it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from rest_framework import serializers

from connectors.api.bulk import BulkItem
from connectors.api.links import PushOrder
from connectors.api.writing import Values
from connectors.inbound.fields import Text
from connectors.inbound.quick import Quick
from connectors.providers.links import Wire as LinksWire
from connectors.providers.rootfi.wire import Wire as RootFiWire

ANY = [
    *("Ada", " Ada ", "", " ", "\x1c", "\t", "a\tb", "a\nb", "a\x00b", "a\x07b", "\ud800", "x" * 64, "x" * 300, "ﬁ"),
    *("A\u030angstro\u0308m", "\u00a0Ada\u3000", "ada@example.com", "ADA@example", "é@example.com", "v3", "create"),
    *("update", "upsert", "ACTIVE", "GONE", "2024-01-22T05:07:31.465Z", "soon", "con_01JD8B7V3N5R0Q2W4E6T8Y1A3S"),
    *(None, True, False, 0, 1, 1.5, [], ["a"], {}, {"street": "1 Main St", "rootfi_id": 5}, {"street": 1}),
    *({"tier": "gold", "old": None}, {"name": "Ada", "email": "ada@example.com"}, {"name": ""}, {"nmae": "Ada"}),
]


def documents(serializer: Quick, chance: random.Random) -> Iterator[Any]:
    """Valid and invalid ones; most have few wrong fields."""
    names = [*serializer.fields]
    yield from (None, [], "text", {}, dict.fromkeys(names))
    usual = {"name": "Ada", "email": "ada@example.com", "action": "create", "values": {"name": "Ada"}}
    usual = {name: value for name, value in usual.items() if name in names}
    yield usual
    for name in names:
        yield from ({**usual, name: value} for value in ANY)
    yield from ({k: v for k, v in usual.items() if k != name} for name in usual)
    yield from ({**usual, "unheard_of": value} for value in ANY)
    for _ in range(300):
        some = chance.sample(names, chance.randrange(len(names) + 1))
        yield {**usual, **{name: chance.choice(ANY) for name in some}}


def outcome(serializer: Quick, document: Any) -> Any:
    try:
        values = serializer.run_validation(document)
    except serializers.ValidationError as error:
        return "refused", error.get_codes(), error.detail
    return values, [*values] if isinstance(values, dict) else None


@pytest.mark.parametrize("serializer", [Values, BulkItem, PushOrder, LinksWire, RootFiWire])
def test_what_is_usual_is_read_as_ever(serializer: type[Quick], monkeypatch: pytest.MonkeyPatch) -> None:
    given = list(documents(serializer(), random.Random(5)))
    quick = serializer()
    quickly = [outcome(quick, document) for document in given]
    monkeypatch.setattr(Quick, "_quickly", lambda self, data, known: None)
    slow = serializer()
    for document, found in zip(given, quickly, strict=True):
        assert found == outcome(slow, document), document


@pytest.mark.parametrize("serializer", [Values, BulkItem, LinksWire, RootFiWire])
def test_what_is_usual_does_not_pass_through_the_fields(
    serializer: type[Quick], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"name": "Ada", "email": "ada@example.com", "phone": "+49 30 123456"}
    document = {"action": "create", "values": usual} if serializer is BulkItem else usual
    quick = serializer()
    expected = outcome(quick, document)

    def never(self: object, data: object) -> None:
        raise AssertionError(data)

    monkeypatch.setattr(Text, "to_internal_value", never)
    monkeypatch.setattr(serializers.Serializer, "to_internal_value", never)
    assert outcome(quick, document) == expected


def test_a_serializer_that_reads_in_its_own_way_is_read_so() -> None:
    class Shouting(Quick):
        name = Text()

        def validate_name(self, text: str) -> str:
            return text.upper()

    class Odd(Quick):
        name = Text(source="title")

    assert Shouting().run_validation({"name": "Ada"}) == {"name": "ADA"}
    assert Odd().run_validation({"name": "Ada"}) == {"title": "Ada"}
