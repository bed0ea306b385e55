"""What RootFi's lists understand: `<field>[<operator>]`, `sort[<field>]`, `limit`, and cursors both ways."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

import orjson
from django.db.models import Model, Q, QuerySet
from django.db.models.expressions import Combinable
from django.http import QueryDict
from django.utils.datastructures import MultiValueDict
from rest_framework import serializers

from connectors.providers.rootfi.wire import MAX_ID, NUMBERED, timestamp
from customers.normalize import clean_text

M = TypeVar("M", bound=Model)
Filter = tuple[str, str, list[Any]]
BRACKETS = re.compile(r"([A-Za-z_]+)\[([A-Za-z_]*)\]")
# Beyond these a query is no longer planned well, and SQLite refuses it.
MAX_FILTERS, MAX_VALUES, MAX_PART = 20, 100, 255
# So often one request looks on.
LOOKS = 4
MILLISECOND = timedelta(milliseconds=1)
TIME = serializers.DateTimeField(default_timezone=UTC)


class Field:
    """A field that a list can be filtered by: what it is made of and how its values are written."""

    operators: Sequence[str] = ("eq", "neq", "in")

    def __init__(self, expression: Combinable | None = None) -> None:
        self.expression = expression

    def parse(self, text: str) -> Any:
        """The value in a query. Raises ValueError with the remedy."""
        return clean_text(text)

    def condition(self, at: str, operator: str, values: Sequence[Any]) -> Q:
        """What holds for the rows that the filter keeps; `at` is the name of the field in the query."""
        match operator:
            case "eq":
                return Q(**{at: values[0]})
            case "neq":
                return ~Q(**{at: values[0]})
            case "in":
                return Q(**{f"{at}__in": values})
            case "contains":
                return Q(**{f"{at}__icontains": values[0]})
        return Q(**{f"{at}__{operator}": values[0]})


class Number(Field):
    operators = ("eq", "neq", "gt", "gte", "lt", "lte", "in")

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise ValueError("Give a whole number.")
        return int(text)


class Text(Field):
    """`key` names the column that is indexed and what makes its values: exact searches go through it."""

    operators = ("eq", "neq", "in", "contains")

    def __init__(self, expression: Combinable, *, key: tuple[str, Callable[[str], str]] | None = None) -> None:
        super().__init__(expression)
        self.key = key

    def condition(self, at: str, operator: str, values: Sequence[Any]) -> Q:
        if operator == "contains" and len(values[0]) > MAX_PART:
            raise ValueError(f"Use at most {MAX_PART} characters.")
        exact = super().condition(at, operator, values)
        if self.key is None or operator not in ("eq", "in") or "" in values:
            return exact
        column, make = self.key
        return exact & Q(**{f"{column}__in": [make(value) for value in values]})


class Choice(Field):
    def __init__(self, expression: Combinable, *, choices: Sequence[str]) -> None:
        super().__init__(expression)
        self.choices = choices

    def parse(self, text: str) -> str:
        if text not in self.choices:
            raise ValueError(f"Use one of {', '.join(self.choices)}.")
        return text


class Time(Field):
    """A moment. Answers show whole milliseconds, so a moment in a query means all of its millisecond."""

    operators = ("eq", "neq", "gt", "gte", "lt", "lte", "in")

    def parse(self, text: str) -> datetime | None:
        if text == "null":
            return None
        # A "+" that was not percent-encoded arrives as a blank.
        text = re.sub(r"(T\S+) (\d\d:?\d\d)$", r"\1+\2", text)
        try:
            moment: datetime = TIME.run_validation(text)
        except serializers.ValidationError:
            moment = datetime.max.replace(tzinfo=UTC)
        if moment.year > 9000:
            raise ValueError("Give a time such as 2024-01-22T05:07:31.465Z.")
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)

    def bound(self, moment: datetime) -> Any:
        return moment

    def condition(self, at: str, operator: str, values: Sequence[Any]) -> Q:
        if operator == "in":
            either = Q()
            for value in values:
                either |= self.condition(at, "eq", [value])
            return either
        [value] = values
        if value is None:
            if operator not in ("eq", "neq"):
                raise ValueError("Give a time: null is neither before nor after another.")
            return Q(**{f"{at}__isnull": operator == "eq"})
        begin, end = self.bound(value), self.bound(value + MILLISECOND)
        match operator:
            case "eq":
                return Q(**{f"{at}__gte": begin, f"{at}__lt": end})
            case "neq":
                return Q(**{f"{at}__lt": begin}) | Q(**{f"{at}__gte": end})
            case "gt":
                return Q(**{f"{at}__gte": end})
            case "lte":
                return Q(**{f"{at}__lt": end})
        return Q(**{f"{at}__{operator}": begin})


class KeptTime(Time):
    """A moment kept as text in a document; where it has none, the column `otherwise` is shown for it."""

    def __init__(self, expression: Combinable, *, otherwise: str) -> None:
        super().__init__(expression)
        self.otherwise = otherwise

    def bound(self, moment: datetime) -> Any:
        return timestamp(moment)

    def condition(self, at: str, operator: str, values: Sequence[Any]) -> Q:
        if None in values:
            raise ValueError("Give a time: it is never null.")
        instead = Time().condition(self.otherwise, operator, values)
        return super().condition(at, operator, values) | Q(**{f"{at}__isnull": True}) & instead


class UniqueId(Field):
    """The platform's own id, found in the composed one."""

    def condition(self, at: str, operator: str, values: Sequence[Any]) -> Q:
        whole = [value for value in values if not NUMBERED.search(value)]
        any_of = "|".join(re.escape(value) for value in values)
        found = Q(**{f"{at}__in": whole}) | Q(**{f"{at}__regex": rf"^({any_of})_[0-9]+$"})
        return ~found if operator == "neq" else found


class Options(serializers.Serializer[Any]):
    limit = serializers.IntegerField(default=100, min_value=1, max_value=500)
    next = serializers.CharField(default="")
    prev = serializers.CharField(default="")
    select = serializers.CharField(default="")
    include_deleted_records = serializers.BooleanField(default=False)
    return_count = serializers.BooleanField(default=False)

    def validate_select(self, text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in ("raw_data", "data_hash")]:
            raise serializers.ValidationError(f"{unknown[0]} cannot be selected: use raw_data and data_hash.")
        return names


OPTIONS = Options()


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is read at once: the rows that `only` keeps, up to and with the place `until`; None: all that follow."""

    only: Q = field(default_factory=Q)
    until: Mapping[str, Any] | None = None


# From a place in the order of reading, or from its beginning, what to look at next.
Looks = Callable[[Mapping[str, Any] | None], Look]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One request for a list, understood. `order` ends with the row's id; `cursor` has a value for each."""

    limit: int
    filters: Sequence[Filter]
    order: Sequence[tuple[str, bool]]
    cursor: Mapping[str, Any] | None
    backwards: bool
    select: Sequence[str]
    include_deleted: bool
    count: bool

    def filtered(self, rows: QuerySet[M], fields: Mapping[str, Field]) -> QuerySet[M]:
        """The rows that the filters keep. A field without an expression is the caller's to filter by."""
        names = {name for name, _, _ in self.filters} | {name for name, _ in self.order}
        rows = rows.alias(**{f"shown_{n}": e for n in names if (e := fields[n].expression) is not None})
        for name, operator, values in self.filters:
            if fields[name].expression is None:
                continue
            try:
                rows = rows.filter(fields[name].condition(f"shown_{name}", operator, values))
            except ValueError as error:
                raise serializers.ValidationError({f"{name}[{operator}]": [str(error)]}) from None
        return rows

    def since(self, name: str) -> list[Any]:
        """From when on the filters on this time keep rows."""
        return [values[0] for of, how, values in self.filters if of == name and how in ("gt", "gte")]

    @property
    def ascending(self) -> bool:
        """Whether the rows are read from the least to the greatest."""
        return self.order[0][1] == self.backwards

    def ordered(self, rows: QuerySet[M]) -> QuerySet[M]:
        """The rows in the order of reading."""
        marks = ["-" if descending != self.backwards else "" for _, descending in self.order]
        return rows.order_by(*(f"{mark}shown_{name}" for mark, (name, _) in zip(marks, self.order, strict=True)))

    def page(
        self, rows: QuerySet[M], values_of: Callable[[M], Mapping[str, Any]], *, looks: Looks | None = None
    ) -> tuple[list[M], str | None, str | None]:
        """One page of filtered rows, and the cursors of the pages before and after it.

        Where no index finds the rows, `looks` parts them: then a page may hold fewer than `limit` though others follow.
        """
        place, found, looked = self.cursor, cast("list[M]", []), 0
        while True:
            look = looks(place) if looks else Look()
            part = rows.filter(look.only)
            if place is not None:
                part = part.filter(self.side(place, after=True))
            if look.until is not None:
                part = part.filter(self.side(look.until, after=False))
            found += self.ordered(part)[: self.limit + 1 - len(found)]
            place, looked = look.until, looked + 1
            if place is None or len(found) > self.limit or looked == LOOKS:
                break
        # Where the next page in this direction begins; None where there is none.
        beyond = place
        if len(found) > self.limit:
            found = found[: self.limit]
            beyond = values_of(found[-1])
        if not found and beyond is None:
            return [], None, None
        if self.backwards:
            found.reverse()
            back = values_of(found[-1]) if found else beyond
            return found, self._encode(beyond), self._encode(back)
        back = values_of(found[0]) if found else beyond
        return found, self._encode(back) if self.cursor is not None else None, self._encode(beyond)

    def side(self, place: Mapping[str, Any], *, after: bool) -> Q:
        """Rows after this place in the order of reading; or else those up to and with it."""
        side, level = Q(), Q()
        for name, descending in self.order:
            step = "gt" if (descending == self.backwards) == after else "lt"
            ends = "e" if not after and name == self.order[-1][0] else ""
            side |= level & Q(**{f"shown_{name}__{step}{ends}": place[name]})
            level &= Q(**{f"shown_{name}": place[name]})
        if len(self.order) == 1:
            return side
        # Said again of the first, because no index is read from the middle on for one of several conditions.
        step = "gte" if self.ascending == after else "lte"
        return Q(**{f"shown_{self.order[0][0]}__{step}": place[self.order[0][0]]}) & side

    def _encode(self, values: Mapping[str, Any] | None) -> str | None:
        if values is None:
            return None
        return urlsafe_b64encode(orjson.dumps({name: values[name] for name, _ in self.order})).decode()


def understand(
    query: QueryDict,
    *,
    fields: Mapping[str, Field],
    sortable: Sequence[str] = (),
    order: Sequence[tuple[str, bool]] = (("rootfi_id", False),),
) -> Listing:
    """The query string -> Listing. Raises ValidationError by the parameters' own names."""
    names = [str(name) for name in OPTIONS.fields]
    given = {name: query[name] for name in names if query.get(name) not in (None, "", "null")}
    options = OPTIONS.run_validation(given)
    filters: list[Filter] = []
    sorts: list[tuple[str, bool]] = []
    for parameter, texts in MultiValueDict.lists(query):
        match = BRACKETS.fullmatch(parameter)
        if parameter in names or (match is None and parameter not in fields):
            continue
        name, operator = match.groups() if match else (parameter, "eq")
        try:
            if name == "sort":
                sorts.append(_sort(operator, texts[-1], sortable))
            else:
                filters += _filters(name, operator, texts, fields)
        except ValueError as error:
            raise serializers.ValidationError({parameter: [str(error)]}) from None
    if len(filters) > MAX_FILTERS:
        raise serializers.ValidationError({filters[-1][0]: [f"Use at most {MAX_FILTERS} filters."]})
    if sorts:
        order = sorts if "rootfi_id" in dict(sorts) else [*sorts, ("rootfi_id", sorts[-1][1])]
    if options["next"] and options["prev"]:
        raise serializers.ValidationError({"prev": ["Send next or prev, not both."]})
    which = "prev" if options["prev"] else "next"
    try:
        cursor = _decode(options[which], [name for name, _ in order]) if options[which] else None
    except ValueError:
        text = f"Send the {which} of an earlier answer as it came, with the same sort."
        raise serializers.ValidationError({which: [text]}) from None
    return Listing(
        limit=options["limit"],
        filters=filters,
        order=order,
        cursor=cursor,
        backwards=which == "prev",
        select=options["select"],
        include_deleted=options["include_deleted_records"],
        count=options["return_count"],
    )


def _filters(name: str, operator: str, texts: Sequence[str], fields: Mapping[str, Field]) -> list[Filter]:
    field = fields.get(name)
    if field is None:
        raise ValueError(f"There is no such field to filter by: use {', '.join(fields)}.")
    if operator not in field.operators:
        raise ValueError(f"The operators of {name} are {', '.join(field.operators)}.")
    if operator != "in":
        return [(name, operator, [field.parse(text)]) for text in texts]
    values = [field.parse(part.strip()) for text in texts for part in text.split(",")]
    if len(values) > MAX_VALUES:
        raise ValueError(f"Use at most {MAX_VALUES} values.")
    return [(name, operator, values)]


def _sort(name: str, direction: str, sortable: Sequence[str]) -> tuple[str, bool]:
    if name not in sortable:
        raise ValueError(f"This list cannot be sorted by that: use {', '.join(sortable) or 'no sort'}.")
    if direction.upper() not in ("ASC", "DESC"):
        raise ValueError("Use ASC or DESC.")
    return name, direction.upper() == "DESC"


def _decode(text: str, names: Sequence[str]) -> dict[str, Any]:
    """The cursor's values by name. Raises ValueError unless `_encode` made it for the same order."""
    cursor = orjson.loads(urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)))
    if not isinstance(cursor, dict) or list(cursor) != list(names):
        raise ValueError(text)
    values: dict[str, Any] = {}
    for name, value in cursor.items():
        if name == "rootfi_id":
            if type(value) is not int or not 0 <= value <= MAX_ID:
                raise ValueError(text)
            values[name] = value
        else:
            moment = datetime.fromisoformat(value) if isinstance(value, str) else None
            if moment is None or moment.tzinfo is None:
                raise ValueError(text)
            values[name] = moment
    return values
