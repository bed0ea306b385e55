"""Many rows in one statement, on either database: the one seam where the two differ in how they take rows in bulk.

PostgreSQL takes one JSON parameter, or COPY where there are many rows; SQLite takes `executemany`, which is its
fastest. The ORM's own bulk methods send one statement per few dozen rows and spend their time building SQL. What many
rows cost here is the database's own time: texts are made a column at a time, and a column that says the same in every
row is made once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, Generic, TypeVar
from uuid import UUID

from django.db import connection, models, transaction
from django.db.models.base import ModelState
from django.db.models.expressions import RawSQL

from customers import jsontext

# From here on COPY is faster than a JSON parameter.
COPY_FROM_ROWS = 200
# So many at a time are made ready: the database stores some while others are made, and their texts take little memory.
COPY_ROWS = 500
ANALYZE_FROM_ROWS = 1024
# A table is counted again when it has grown by this power of two.
ANALYZE_BITS = 3
_inserted: dict[str, int] = {}
M = TypeVar("M", bound=models.Model)
Same = Mapping["models.Field[Any, Any]", Any]


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for cycles among the many objects that rows are made of: they form none, and to look is dearer
    than to make them. Whatever else forms cycles meanwhile is found afterwards.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Of several threads the first one finds it enabled, and enables it again.
        if was:
            gc.enable()


class Mould(Generic[M]):
    """New rows of one model that have much in common, at little more than the cost of a dict for each.

    `same` is what all rows share, given as the model's constructor takes it. Defaults are made once: what is to differ,
    such as a key, each row must name. `given` are the columns of each row so far, less what all share.
    """

    def __init__(self, model: type[M], **same: Any) -> None:
        pattern = model(**same)
        self.model = model
        self.values = {name: value for name, value in vars(pattern).items() if name != "_state"}
        # Each row gets an object of its own.
        self.own = {name: type(value) for name, value in self.values.items() if isinstance(value, dict | list)}
        self.related = dict(pattern._state.fields_cache)
        self.given: list[dict[str, Any]] = []
        self.alias = connection.alias

    def add(self, values: dict[str, Any]) -> None:
        """A row with these columns, of which nobody needs an object."""
        self.given.append(values)

    def make(self, values: dict[str, Any], **related: models.Model) -> M:
        """A row with these columns, as an object that counts as stored; `related` holds what foreign keys of it lead
        to, where that is at hand.
        """
        self.given.append(values)
        made = self.model.__new__(self.model)
        state = ModelState()
        state.adding, state.db = False, self.alias
        state.fields_cache = self.related | related
        made.__dict__ = {**self.values, "_state": state, **values}
        for name, new in self.own.items():
            if name not in values:
                made.__dict__[name] = new()
        return made

    def insert(self) -> None:
        """Store all rows so far, which are no more `given` then."""
        if not self.given:
            return
        names = set().union(*self.given)
        columns = _columns(self.model, numbered=self.model._meta.pk.attname in names)
        differ = [column for column in columns if column.attname in names]
        if all(len(row) == len(names) for row in self.given):
            values = _cells(self.given, differ)
        else:
            defaults = [(column.attname, self.values[column.attname]) for column in differ]
            values = [tuple([row.get(name, default) for row in self.given]) for name, default in defaults]
        same = [column for column in columns if column.attname not in names]
        self.given.clear()
        _put(self.model, differ, values, {column: self.values[column.attname] for column in same})


def _columns(
    model: type[models.Model], names: Iterable[str] | None = None, *, numbered: bool = False
) -> list[models.Field[Any, Any]]:
    fields = [field for field in model._meta.concrete_fields if numbered or not isinstance(field, models.AutoField)]
    if names is None:
        return [field for field in fields if not field.has_db_default()]
    wanted = set(names)
    return [field for field in fields if field.name in wanted or field.attname in wanted]


def _json(columns: Sequence[models.Field[Any, Any]], values: Sequence[tuple[Any, ...]], same: Same) -> str:
    names = [str(column.column) for column in columns]
    rest = {str(column.column): value for column, value in same.items()}
    return jsontext.dumps(
        [{**dict(zip(names, row, strict=True)), **rest} for row in zip(*values, strict=True)]
    ).decode()


def _turned(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> list[tuple[Any, ...]]:
    """The values of the rows, column by column."""
    if len(columns) == 1:
        return [tuple(map(attrgetter(columns[0].attname), rows))]
    # Not by attribute: that of a foreign key is slow to ask. What was just made or read whole has them all at hand.
    return _cells([*map(vars, rows)], columns)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[models.Field[Any, Any]]) -> list[tuple[Any, ...]]:
    names = [column.attname for column in columns]
    if len(names) == 1:
        return [tuple(row[names[0]] for row in rows)]
    return list(zip(*map(itemgetter(*names), rows), strict=True))


def _prepared(
    columns: Sequence[models.Field[Any, Any]], values: Sequence[tuple[Any, ...]], same: Same
) -> list[tuple[Any, ...]]:
    """The rows as the database's driver takes them."""

    def ready(column: models.Field[Any, Any], values: tuple[Any, ...]) -> Iterable[Any]:
        if isinstance(column, models.CharField) and set(map(type, values)) == {str}:
            return values
        make = partial(column.get_db_prep_save, connection=connection)
        return _documents(make, values) if isinstance(column, models.JSONField) else _each(make, values)

    rest = [repeat(next(iter(ready(column, (value,)))), len(values[0])) for column, value in same.items()]
    return list(zip(*map(ready, columns, values), *rest, strict=False))


def _each(make: Callable[[Any], Any], values: tuple[Any, ...]) -> Iterable[Any]:
    """`make` of each value; once where all are alike."""
    first = values[0]
    if not isinstance(first, UUID) and values.count(first) == len(values) and len(set(map(type, values))) == 1:
        return repeat(make(first), len(values))
    return map(make, values)


def _documents(make: Callable[[Any], Any], values: tuple[Any, ...]) -> Iterable[Any]:
    """`make` of each JSON value, which takes no two for alike: 1 and true are equal."""
    return ["{}" if value == {} else None if value is None else make(value) for value in values]


def _copied(columns: Sequence[models.Field[Any, Any]], values: Sequence[tuple[Any, ...]], same: Same) -> bytes:
    """The rows as COPY reads them: a line each, cells parted by tabs."""
    rest = b"".join(b"\t" + next(iter(_texts(column, (value,)))) for column, value in same.items()) + b"\n"
    return rest.join([*map(b"\t".join, zip(*map(_texts, columns, values), strict=True)), b""])


def _texts(column: models.Field[Any, Any], values: tuple[Any, ...]) -> Iterable[bytes]:
    if isinstance(column, models.JSONField):
        # JSON holds no tab or line end as it stands.
        return [
            b"{}" if value == {} else b"\\N" if value is None else jsontext.dumps(value).replace(b"\\", b"\\\\")
            for value in values
        ]
    kinds = set(map(type, values))
    if kinds == {UUID}:
        return [b"%032x" % value.int for value in values]
    if kinds == {str}:
        # As one text: to look for what is to be escaped, and to encode it.
        whole = "\n".join(values)
        if not ("\\" in whole or "\t" in whole or "\r" in whole or whole.count("\n") >= len(values)):
            return whole.encode().split(b"\n")
    return _each(_text, values)


def _text(value: Any) -> bytes:
    if value is None:
        return b"\\N"
    if isinstance(value, str):
        text = value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    else:
        text = value.isoformat() if isinstance(value, datetime) else str(value)
    return text.encode()


def numbers(model: type[models.Model], count: int) -> list[int]:
    """Keys for so many new rows of a model with an automatic key."""
    table, key = model._meta.db_table, str(model._meta.pk.column)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT nextval(pg_get_serial_sequence(%s, %s)) FROM generate_series(1, %s)", [table, key, count]
            )
            return [pk for (pk,) in cursor.fetchall()]
        # Nobody else writes until this transaction ends.
        cursor.execute("SELECT seq FROM sqlite_sequence WHERE name = %s", [table])
        last = (cursor.fetchone() or (0,))[0]
        return list(range(last + 1, last + 1 + count))


def insert(rows: Sequence[models.Model]) -> None:
    """Insert new rows of one model. What the database fills in, such as automatic keys, is not read back."""
    if not rows:
        return
    model = type(rows[0])
    columns = _columns(model, numbered=rows[0].pk is not None)
    _put(model, columns, _turned(rows, columns), {})
    alias = connection.alias
    for row in rows:
        row._state.adding = False
        row._state.db = alias


def _put(
    model: type[models.Model],
    columns: Sequence[models.Field[Any, Any]],
    values: Sequence[tuple[Any, ...]],
    same: Same,
) -> None:
    """Insert rows, given column by column; `same` holds what is the same in all of them."""
    table, count = connection.ops.quote_name(model._meta.db_table), len(values[0])
    names = ", ".join(connection.ops.quote_name(str(column.column)) for column in (*columns, *same))
    with connection.cursor() as cursor:
        if connection.vendor != "postgresql":
            marks = ", ".join(["%s"] * (len(columns) + len(same)))
            cursor.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", _prepared(columns, values, same))
        elif count < COPY_FROM_ROWS:
            cursor.execute(
                f"INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, %s::json)",
                [_json(columns, values, same)],
            )
        else:
            with connection.wrap_database_errors, cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
                for start in range(0, count, COPY_ROWS):
                    part = [cells[start : start + COPY_ROWS] for cells in values]
                    copy.write(_copied(columns, part, same))
    _grown(model._meta.db_table, count)


def among(texts: Iterable[str]) -> RawSQL:
    """Any number of texts as one parameter, for a look-up with `__in`."""
    if connection.vendor == "postgresql":
        return RawSQL("SELECT json_array_elements_text(%s::json)", [jsontext.dumps(list(texts)).decode()])
    return RawSQL("SELECT value FROM json_each(%s)", [jsontext.dumps(list(texts)).decode()])


def _grown(table: str, number: int) -> None:
    """Have PostgreSQL count a table again each time what this process put in has grown a lot.

    Without statistics it plans for a single row, and a page of a freshly loaded table takes seconds; autovacuum comes a
    minute later or, where it is off, never.
    """
    before = _inserted.get(table, 0)
    _inserted[table] = after = before + number
    steps = [rows.bit_length() // ANALYZE_BITS for rows in (before, after)]
    if connection.vendor == "postgresql" and after >= ANALYZE_FROM_ROWS and steps[0] != steps[1]:
        # After the commit: ANALYZE takes a lock that two transactions could otherwise wait for in a circle.
        transaction.on_commit(partial(_analyze, table), robust=True)


_DOUBLED = (
    "SELECT pg_relation_size(oid) >= 2 * relpages::bigint * current_setting('block_size')::bigint"
    " FROM pg_class WHERE oid = %s::regclass"
)


def _analyze(table: str) -> None:
    """Count a table again, unless somebody has since it was half as large: what one process puts into a table is little
    beside what is there, or what others put there.
    """
    name = connection.ops.quote_name(table)
    with connection.cursor() as cursor:
        cursor.execute(_DOUBLED, [name])
        if cursor.fetchone() == (True,):
            cursor.execute(f"ANALYZE {name}")


def update(rows: Sequence[models.Model], names: Iterable[str]) -> None:
    """Write the named fields of existing rows of one model, found by primary key."""
    names = set(names)
    if not rows or not names:
        return
    model = type(rows[0])
    key = model._meta.pk
    columns = _columns(model, names)
    quote = connection.ops.quote_name
    table = quote(model._meta.db_table)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            sets = ", ".join(f"{quote(str(c.column))} = given.{quote(str(c.column))}" for c in columns)
            cursor.execute(
                f"UPDATE {table} SET {sets} FROM json_populate_recordset(NULL::{table}, %s::json) AS given"
                f" WHERE {table}.{quote(str(key.column))} = given.{quote(str(key.column))}",
                [_json([key, *columns], _turned(rows, [key, *columns]), {})],
            )
        else:
            sets = ", ".join(f"{quote(str(c.column))} = %s" for c in columns)
            cursor.executemany(
                f"UPDATE {table} SET {sets} WHERE {quote(str(key.column))} = %s",
                _prepared([*columns, key], _turned(rows, [*columns, key]), {}),
            )
