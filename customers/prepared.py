"""Queries whose SQL is built once: for a request of a few statements Django spends most of its time building them.

    FIND = Prepared(lambda: Customer.objects.filter(organization_id=Param("organization", BigAutoField())))
    customers = FIND(organization=organization.pk)

What is asked stays an ordinary queryset, so both databases answer it as they answer any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from django.db import connection, models
from django.db.models import Expression, Field, Func, QuerySet
from django.db.models.query import ValuesListIterable, get_related_populators
from django.db.models.sql import UpdateQuery
from django.db.transaction import TransactionManagementError

T = TypeVar("T")


class Param(Expression):
    """A value that is given with each call, as a field of this kind takes it."""

    def __init__(self, name: str, output_field: Field[Any, Any]) -> None:
        super().__init__(output_field=output_field)
        self.name = name

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        return "%s", [self]

    def value(self, given: Mapping[str, Any]) -> Any:
        return self.output_field.get_db_prep_value(given[self.name], connection)


class Params(Param):
    """Any number of values, for `Among`."""

    def value(self, given: Mapping[str, Any]) -> Any:
        values = [self.output_field.get_db_prep_value(one, connection) for one in given[self.name]]
        return values if connection.vendor == "postgresql" else orjson.dumps(values).decode()


class Among(Func):
    """Whether a column is one of the values that are given: `IN`, with one SQL for any number of them."""

    output_field = models.BooleanField()
    template = "%(expressions)s)"

    def __init__(self, column: str, name: str, field: Field[Any, Any]) -> None:
        super().__init__(models.F(column), Params(name, field))

    def as_postgresql(self, compiler: Any, connection: Any) -> Any:
        return self.as_sql(compiler, connection, arg_joiner=" = ANY(")

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(
            compiler, connection, template="%(expressions)s))", arg_joiner=" IN (SELECT value FROM json_each("
        )


@dataclass(frozen=True, kw_only=True)
class _Built:
    sql: str
    params: Sequence[Any]
    locks: bool
    read: Callable[[Sequence[Any]], list[Any]]


class Prepared(Generic[T]):
    """The rows of a queryset as it gives them: objects, or tuples where it is a `values_list`.

    `by_key`: it looks for one row by a unique key, so one plan serves all values, and PostgreSQL keeps it. Nothing else
    may say so: a plan for any value reads a list from its beginning to reach a page deep in it.
    """

    def __init__(self, build: Callable[[], QuerySet[Any, T]], *, by_key: bool = False) -> None:
        self.build = build
        self.by_key = by_key
        # By thread, like Django's connections: what turns columns into values belongs to one of these.
        self.kept = threading.local()

    def __call__(self, **given: Any) -> list[T]:
        """Ask the database. `given` are the values of the parameters, by name."""
        built: _Built | None = getattr(self.kept, "built", None)
        if built is None:
            built = self.kept.built = self._built()
        if built.locks and not connection.in_atomic_block:
            raise TransactionManagementError("select_for_update cannot be used outside of a transaction.")
        with _executed(built.sql, _values(built.params, given), keep=self.by_key) as cursor:
            rows = cursor.fetchall()
        return built.read(rows)

    def _built(self) -> _Built:
        queryset = self.build()
        compiler = queryset.query.get_compiler(connection=connection)
        sql, params = compiler.as_sql()
        plain = issubclass(queryset._iterable_class, ValuesListIterable)
        return _Built(
            sql=sql,
            params=params,
            locks=bool(queryset.query.select_for_update),
            read=_tuples(compiler) if plain else _objects(compiler),
        )


class PreparedUpdate:
    """An update of the rows of a queryset; `values` as `QuerySet.update` takes them."""

    def __init__(self, build: Callable[[], tuple[QuerySet[Any], Mapping[str, Any]]]) -> None:
        self.build = build
        self.kept = threading.local()

    def __call__(self, **given: Any) -> int:
        """Returns how many rows were changed."""
        if not hasattr(self.kept, "built"):
            queryset, values = self.build()
            query = queryset.query.chain(UpdateQuery)
            query.add_update_values(values)  # type: ignore[attr-defined] # an UpdateQuery by now
            self.kept.built = query.get_compiler(connection=connection).as_sql()
        sql, params = self.kept.built
        with _executed(sql, _values(params, given)) as cursor:
            changed: int = cursor.rowcount
        return changed


@contextmanager
def _executed(sql: str, params: Sequence[Any], *, keep: bool = False) -> Iterator[Any]:
    """A cursor that has carried it out; with `keep` PostgreSQL keeps the statement and its plan.

    Not through Django's own cursor, which writes the values into the text; but where somebody listens to what is
    executed it is that one.
    """
    if connection.vendor != "postgresql" or connection.execute_wrappers or connection.queries_logged:
        with connection.cursor() as cursor:
            cursor.execute(sql, params)
            yield cursor
        return
    import psycopg

    connection.ensure_connection()
    connection.validate_no_broken_transaction()
    server: Any = connection.connection
    with connection.wrap_database_errors, psycopg.Cursor(server) as cursor:
        cursor.execute(sql, params, prepare=keep and server.prepare_threshold is not None)
        yield cursor


def _values(params: Sequence[Any], given: Mapping[str, Any]) -> list[Any]:
    return [param.value(given) if isinstance(param, Param) else param for param in params]


def _tuples(compiler: Any) -> Callable[[Sequence[Any]], list[Any]]:
    converters = [*compiler.get_converters([one[0] for one in compiler.select]).items()]

    def read(rows: Sequence[Any]) -> list[Any]:
        if not converters:
            return [*rows]
        return [tuple(row) for row in compiler.apply_converters(rows, dict(converters))]

    return read


def _objects(compiler: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """As django.db.models.query.ModelIterable, less what it finds out anew each time."""
    klass = compiler.klass_info
    model, places = klass["model"], klass["select_fields"]
    first, last = places[0], places[-1] + 1
    names = [one[0].target.attname for one in compiler.select[first:last]]
    related = get_related_populators(klass, compiler.select, connection.alias)  # type: ignore[call-arg] # the stubs are of Django 6
    added = [*(compiler.annotation_col_map or {}).items()]
    tuples = _tuples(compiler)

    def read(rows: Sequence[Any]) -> list[Any]:
        found = []
        for row in tuples(rows):
            one = model.from_db(connection.alias, names, row[first:last])
            for populator in related:
                populator.populate(row, one)
            for name, column in added:
                setattr(one, name, row[column])
            found.append(one)
        return found

    return read
