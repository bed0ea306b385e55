"""Many rows in one statement, on either database: the one seam where the two differ in how they take rows in bulk.

PostgreSQL takes one JSON parameter, or COPY where there are many rows; SQLite takes `executemany`, which is its
fastest. The ORM's own bulk methods send one statement per few dozen rows and spend their time building SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from django.db import connection, models, transaction

from customers import jsontext

# From here on COPY is faster than a JSON parameter.
COPY_FROM_ROWS = 200
ANALYZE_FROM_ROWS = 1024
_inserted: dict[str, int] = {}


def _columns(model: type[models.Model], names: Iterable[str] | None = None) -> list[models.Field[Any, Any]]:
    fields = [field for field in model._meta.concrete_fields if not isinstance(field, models.AutoField)]
    if names is None:
        return [field for field in fields if not field.has_db_default()]
    wanted = set(names)
    return [field for field in fields if field.name in wanted or field.attname in wanted]


def _json(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> str:
    return jsontext.dumps(
        [{str(column.column): getattr(row, column.attname) for column in columns} for row in rows]
    ).decode()


def _prepared(rows: Sequence[models.Model], columns: Sequence[models.Field[Any, Any]]) -> list[list[Any]]:
    return [[column.get_db_prep_save(getattr(row, column.attname), connection) for column in columns] for row in rows]


def insert(rows: Sequence[models.Model]) -> None:
    """Insert new rows of one model. What the database fills in, such as automatic keys, is not read back."""
    if not rows:
        return
    model = type(rows[0])
    columns = _columns(model)
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
                for values in _prepared(rows, columns):
                    copy.write_row(values)
    for row in rows:
        row._state.adding = False
        row._state.db = connection.alias
    _grown(model._meta.db_table, len(rows))


def _grown(table: str, number: int) -> None:
    """Have PostgreSQL count a table again each time this process has doubled what it put in.

    Without statistics it plans for a single row, and a page of a freshly loaded table takes seconds; autovacuum comes a
    minute later or, where it is off, never.
    """
    before = _inserted.get(table, 0)
    _inserted[table] = after = before + number
    if connection.vendor == "postgresql" and after >= ANALYZE_FROM_ROWS and before.bit_length() != after.bit_length():
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
