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
ANALYZE_FROM_ROWS = 1024
# A table is counted again when it has grown by this power of two.
ANALYZE_BITS = 3
_inserted: dict[str, int] = {}
M = TypeVar("M", bound=models.Model)


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
    """Makes new rows of one model that have much in common, at little more than the cost of a dict.

    `same` is what all rows share, given as the model's constructor takes it. Defaults are made once: what is to differ,
    such as a key, each row must name.
    """

    def __init__(self, model: type[M], **same: Any) -> None:
        pattern = model(**same)
        self.model = model
        self.values = {name: value for name, value in vars(pattern).items() if name != "_state"}
        # Each row gets an object of its own.
        self.own = {name: type(value) for name, value in self.values.items() if isinstance(value, dict | list)}
        self.related = dict(pattern._state.fields_cache)

    def make(self, values: Mapping[str, Any], **related: models.Model) -> M:
        """A row with these columns; `related` holds what foreign keys of it lead to, where that is at hand."""
        made = self.model.__new__(self.model)
        state = ModelState()
        state.fields_cache = self.related | related
        vars(made).update(self.values, _state=state, **values)
        for name, new in self.own.items():
            if name not in values:
                vars(made)[name] = new()
        return made


def _columns(
    model: type[models.Model], names: Iterable[str] | None = None, *, numbered: bool = False
) -> list[models.Field[Any, Any]]:
    fields = [field for field in model._meta.concrete_fields if numbered or not isinstance(field, models.AutoField)]
    if names is None:
        return [field for field in fields if not field.has_db_default()]
    wanted = set(names)
    return [field for field in fields if field.name in wanted or field.attname in wanted]


def _json(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> str:
    return jsontext.dumps(
        [{str(column.column): getattr(row, column.attname) for column in columns} for row in rows]
    ).decode()


def _turned(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> list[tuple[Any, ...]]:
    """The values of the rows, column by column."""
    names = [column.attname for column in columns]
    if len(names) == 1:
        return [tuple(map(attrgetter(names[0]), rows))]
    # Not by attribute: that of a foreign key is slow to ask. What was just made or read whole has them all at hand.
    return list(zip(*map(itemgetter(*names), map(vars, rows)), strict=True))


def _prepared(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> list[tuple[Any, ...]]:
    """The rows as the database's driver takes them."""

    def ready(column: models.Field[Any, Any], values: tuple[Any, ...]) -> Iterable[Any]:
        if isinstance(column, models.CharField) and set(map(type, values)) == {str}:
            return values
        make = partial(column.get_db_prep_save, connection=connection)
        return _documents(make, values) if isinstance(column, models.JSONField) else _each(make, values)

    return list(zip(*map(ready, columns, _turned(rows, columns)), strict=True))


def _each(make: Callable[[Any], Any], values: tuple[Any, ...]) -> Iterable[Any]:
    """`make` of each value; once where all are alike."""
    first = values[0]
    if not isinstance(first, UUID) and values.count(first) == len(values) and len(set(map(type, values))) == 1:
        return repeat(make(first), len(values))
    return map(make, values)


def _documents(make: Callable[[Any], Any], values: tuple[Any, ...], *, nothing: str | None = None) -> Iterable[Any]:
    """`make` of each JSON value, which takes no two for alike: 1 and true are equal."""
    return ["{}" if value == {} else nothing if value is None else make(value) for value in values]


def _copied(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> bytes:
    """The rows as COPY reads them: a line each, cells parted by tabs."""
    texts = map(_texts, columns, _turned(rows, columns))
    return "".join(map("{}\n".format, map("\t".join, zip(*texts, strict=True)))).encode()


def _texts(column: models.Field[Any, Any], values: tuple[Any, ...]) -> Iterable[str]:
    if isinstance(column, models.JSONField):
        # JSON holds no tab or line end as it stands.
        return _documents(lambda value: jsontext.dumps(value).decode().replace("\\", "\\\\"), values, nothing="\\N")
    if set(map(type, values)) == {str}:
        whole = "".join(values)
        if not ("\\" in whole or "\t" in whole or "\n" in whole or "\r" in whole):
            return values
    return _each(_text, values)


def _text(value: Any) -> str:
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return value.isoformat() if isinstance(value, datetime) else str(value)


def number(rows: Sequence[models.Model]) -> None:
    """Give new rows of a model with an automatic key their keys before they are inserted."""
    model = type(rows[0])
    table, key = model._meta.db_table, str(model._meta.pk.column)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT nextval(pg_get_serial_sequence(%s, %s)) FROM generate_series(1, %s)", [table, key, len(rows)]
            )
            keys = [pk for (pk,) in cursor.fetchall()]
        else:
            # Nobody else writes until this transaction ends.
            cursor.execute("SELECT seq FROM sqlite_sequence WHERE name = %s", [table])
            last = (cursor.fetchone() or (0,))[0]
            keys = list(range(last + 1, last + 1 + len(rows)))
    for row, pk in zip(rows, keys, strict=True):
        row.pk = pk


def insert(rows: Sequence[models.Model]) -> None:
    """Insert new rows of one model. What the database fills in, such as automatic keys, is not read back."""
    if not rows:
        return
    model = type(rows[0])
    columns = _columns(model, numbered=rows[0].pk is not None)
    table = connection.ops.quote_name(model._meta.db_table)
    names = ", ".join(connection.ops.quote_name(str(column.column)) for column in columns)
    with connection.cursor() as cursor:
        if connection.vendor != "postgresql":
            marks = ", ".join(["%s"] * len(columns))
            cursor.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", _prepared(rows, columns))
        elif len(rows) < COPY_FROM_ROWS:
            cursor.execute(
                f"INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, %s::json)",
                [_json(rows, columns)],
            )
        else:
            with connection.wrap_database_errors, cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
                copy.write(_copied(rows, columns))
    for row in rows:
        row._state.adding = False
        row._state.db = connection.alias
    _grown(model._meta.db_table, len(rows))


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


def _analyze(table: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"ANALYZE {connection.ops.quote_name(table)}")


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
                [_json(rows, [key, *columns])],
            )
        else:
            sets = ", ".join(f"{quote(str(c.column))} = %s" for c in columns)
            cursor.executemany(
                f"UPDATE {table} SET {sets} WHERE {quote(str(key.column))} = %s", _prepared(rows, [*columns, key])
            )
