"""Customers from a file into the hub, beside the database taking ready-made rows, and beside other importers.

    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.bulk [--size small]

Uses a database of its own. The hub reads a CSV file of realistic customers with external ids and commits customers,
links and change rows in restartable transactions. The yardstick puts the very same rows, as bytes that were made
before, into the same three tables: COPY into temporary tables and INSERT … ON CONFLICT; on SQLite `executemany`.
Rates are rows per second of CPU time, of this process and of PostgreSQL's own together: they hold on a busy machine.
Memory is that of a process of its own for each size of file.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report, timed

ROWS = {"smoke": 300, "small": 20_000, "full": 100_000}
# Other importers are slow: they take so many of the rows.
SAMPLE = {"smoke": 40, "small": 1000, "full": 10_000}
MEMORY = {"smoke": (), "small": (10_000, 100_000), "full": (100_000, 1_000_000)}
TABLES = ("customers_customer", "connectors_customerlink", "customers_customerchange")
KEYS = {
    "customers_customer": ("id",),
    "connectors_customerlink": ("connection_id", "remote_id"),
    "customers_customerchange": ("customer_id", "version"),
}
MEGABYTE = 1024 * 1024


def main() -> None:
    chosen = options(description=__doc__).parse_args()
    rounds = chosen.rounds or 3
    with ExitStack() as stack:
        folder = own_database(stack)
        from django.db import connection

        bench = Bench(folder, ROWS[chosen.size], chosen.size)
        figures = postgresql(bench, rounds) if connection.vendor == "postgresql" else sqlite(bench, rounds)
        figures += memory(bench)
    report(figures)


class Bench:
    """The files that are imported, and the three tables as they are before and after."""

    def __init__(self, folder: Path, rows: int, size: str) -> None:
        from connectors.models import Connection
        from customers.models import Organization

        self.folder, self.rows, self.size = folder, rows, size
        self.organization = Organization.objects.create(name="Demo", slug="demo", country="DE")
        self.shop = Connection.objects.create(
            organization=self.organization, provider="links", name="shop", direction=Connection.Direction.CALLS_US
        )
        self.file = self.write("all.csv", rows)
        self.sample = self.write("sample.csv", SAMPLE[size])
        self.changed = self.write("changed.csv", rows, every=10)

    def write(self, name: str, rows: int, *, every: int = 0) -> Path:
        """A file of so many customers; every so-many-th of them has moved."""
        path = self.folder / name
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for number, values in enumerate(people(rows)):
                moved = {"address_line1": "1 New Street"} if every and number % every == 0 else {}
                lines.writerow(cells(f"shop-{number}", values | moved))
        return path

    def take(self, path: Path, *more: str) -> None:
        """The hub's import command, in this process."""
        from django.core.management import call_command

        call_command("import_customers", str(path), "--organization=demo", "--connection=shop", "--json", *more)


COLUMNS = (
    *("external_id", "name", "first_name", "last_name", "email", "phone", "address_line1", "address_city"),
    *("address_state", "address_postal_code", "address_country", "currency"),
    *("custom.tax_number", "custom.segment"),
)


def people(rows: int) -> Iterator[dict[str, Any]]:
    from tests.benchmarks.people import customers

    return customers(rows, seed=7)


def cells(external_id: str, values: dict[str, Any]) -> list[str]:
    custom = values.get("custom_fields", {})
    return [
        external_id,
        *(values.get(name, "") for name in COLUMNS[1:12]),
        custom.get("tax_number", ""),
        custom.get("segment", ""),
    ]


@contextmanager
def silent() -> Iterator[None]:
    """Without what commands print."""
    with Path(os.devnull).open("w") as nothing:
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = nothing
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def processor() -> float:
    """Seconds of CPU time that this process and its database backend have used."""
    from django.db import connection

    spent = time.process_time()
    if connection.vendor == "postgresql":
        connection.ensure_connection()
        stat = Path(f"/proc/{connection.connection.info.backend_pid}/stat")
        if stat.exists():  # a server elsewhere keeps its own time
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            spent += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return spent


def rate(do: Callable[[], object], *, rows: int, before: Callable[[], object] = lambda: None) -> float:
    """Rows per second of CPU time."""
    before()
    began = processor()
    with silent():
        do()
    return rows / max(processor() - began, 1e-3)


def pace(do: Callable[[], object], *, rows: int) -> float:
    """Rows per second of time, into empty tables."""
    empty()
    with silent():
        return rows / timed(do)


def figure(
    goal: str, what: str, kept: dict[str, list[float]], hub: str, other: str, aim: float | None = None
) -> Figure:
    return Figure(
        goal=goal,
        what=what,
        hub=median(kept[hub]),
        yardstick=median(kept[other]),
        unit="rows/s",
        ratio=ratio(kept[hub], kept[other]),
        at_least=aim,
    )


# PostgreSQL


def execute(*statements: str) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def value(query: str) -> Any:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def empty() -> None:
    execute(f"TRUNCATE {', '.join(TABLES)} CASCADE")


@dataclass(frozen=True)
class Stored:
    """The rows of one table as COPY wrote them."""

    table: str
    columns: Sequence[str]
    rows: bytes

    @classmethod
    def of(cls, table: str) -> Stored:
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM {table} LIMIT 0")
            columns = [column.name for column in cursor.description if table != TABLES[2] or column.name != "id"]
            with cursor.copy(f"COPY (SELECT {', '.join(columns)} FROM {table}) TO STDOUT") as copy:
                return cls(table, columns, b"".join(bytes(part) for part in copy))

    def load(self, cursor: Any) -> None:
        """COPY into a temporary table, then one INSERT … ON CONFLICT that skips what is the same."""
        names, keys = ", ".join(self.columns), KEYS[self.table]
        rest = [name for name in self.columns if name not in ("id", *keys)]
        cursor.execute(f"CREATE TEMPORARY TABLE given (LIKE {self.table}) ON COMMIT DROP")
        cursor.execute("ALTER TABLE given ALTER COLUMN id DROP NOT NULL")
        with cursor.copy(f"COPY given ({names}) FROM STDIN") as copy:
            copy.write(self.rows)
        sets = ", ".join(f"{name} = excluded.{name}" for name in rest)
        old, new = (", ".join(f"{of}.{name}" for name in rest) for of in ("t", "excluded"))
        cursor.execute(
            f"INSERT INTO {self.table} AS t ({names}) SELECT {names} FROM given ON CONFLICT ({', '.join(keys)})"
            f" DO UPDATE SET {sets} WHERE ({old}) IS DISTINCT FROM ({new})"
        )
        cursor.execute("DROP TABLE given")


def raw(stored: Sequence[Stored]) -> None:
    from django.db import connection, transaction

    with transaction.atomic(), connection.cursor() as cursor:
        for one in stored:
            one.load(cursor)


def postgresql(bench: Bench, rounds: int) -> list[Figure]:
    rows = bench.rows
    execute(*(f"ALTER TABLE {table} SET (autovacuum_enabled = off)" for table in TABLES))
    with silent():
        bench.take(bench.file)
    stored = [Stored.of(table) for table in TABLES]
    load = {
        "hub": partial(rate, partial(bench.take, bench.file), rows=rows, before=empty),
        "raw": partial(rate, partial(raw, stored), rows=rows, before=empty),
    }
    kept = in_turn(load, rounds=rounds)
    figures = [figure("G1", "new rows, one process, by raw COPY + ON CONFLICT", kept, "hub", "raw", 0.7)]

    # How long two processes take, their beginning included, by how long the one that PostgreSQL has for the raw side.
    both = {
        "hub": partial(pace, partial(bench.take, bench.file, "--workers=2"), rows=rows),
        "raw": partial(pace, partial(raw, stored), rows=rows),
    }
    kept = in_turn(both, rounds=rounds)
    figures.append(figure("G1", "new rows, two processes, by raw, in time", kept, "hub", "raw", 1.3))

    # Again, unchanged. What the raw side loaded last is what the hub left, but for the statistics.
    execute("VACUUM ANALYZE")
    same = {
        "hub": partial(rate, partial(bench.take, bench.file), rows=rows),
        "raw": partial(rate, partial(raw, stored[:2]), rows=rows),
    }
    written = written_rows()
    with silent():
        bench.take(bench.file)
    figures.append(nothing(rows, written))
    kept = in_turn(same, rounds=rounds)
    figures.append(figure("G2", "unchanged rows, by raw re-sync", kept, "hub", "raw", 0.6))
    return figures + peers(bench, rounds)


def peers(bench: Bench, rounds: int) -> list[Figure]:
    """Other ways to take the same customers, in samples, for they are slow.

    The hub reads, checks and derives; the others are given what came of that, in the same three tables or, where it is
    said, the customers alone.
    """
    empty()
    with silent():
        bench.take(bench.sample)
    tables = {model: list(model.objects.order_by("pk").values()) for model in models()}
    customers = dict([next(iter(tables.items()))])
    sides = {
        "hub": partial(rate, partial(bench.take, bench.sample)),
        "bulk_create": partial(rate, partial(at_once, tables)),
        "bulk_create, customers alone": partial(rate, partial(at_once, customers)),
        "update_or_create, customers alone": partial(rate, partial(singly, customers)),
    }
    aims = {"bulk_create": 6.0, "django-import-export": 100.0, "dlt merge": 7.0}
    if find_spec("import_export"):
        sides["django-import-export"] = partial(rate, partial(as_the_admin_imports, tables))
        sides["django-import-export, customers alone"] = partial(rate, partial(as_the_admin_imports, customers))
    else:
        sys.stdout.write("django-import-export is not installed: uv sync --group benchmarks\n")
    if find_spec("dlt"):
        sides["dlt merge"] = partial(rate, partial(dlt_merge, bench.folder, tables))
    else:
        sys.stdout.write("dlt is not installed: uv sync --group benchmarks\n")
    rows = SAMPLE[bench.size]
    kept = in_turn({name: partial(do, rows=rows, before=empty) for name, do in sides.items()}, rounds=rounds)
    return [figure("G1", f"new rows, by {name}", kept, "hub", name, aims.get(name)) for name in sides if name != "hub"]


# The rows of each model.
Tables = dict[Any, list[dict[str, Any]]]


def models() -> list[Any]:
    """What the hub writes for a row, in an order in which it can be stored."""
    from connectors.models import CustomerLink
    from customers.models import Customer, CustomerChange

    return [Customer, CustomerLink, CustomerChange]


def at_once(tables: Tables) -> None:
    for model, rows in tables.items():
        names = [name for name in rows[0] if name not in ("id", "tx")]
        made = [model(**{name: value for name, value in row.items() if name != "tx"}) for row in rows]
        model.objects.bulk_create(
            made, batch_size=1000, update_conflicts=True, unique_fields=["id"], update_fields=names
        )


def singly(tables: Tables) -> None:
    for model, rows in tables.items():
        for row in rows:
            model.objects.update_or_create(id=row["id"], defaults=row)


def as_the_admin_imports(tables: Tables) -> None:
    """A dry run of all rows, then all rows, table by table."""
    import tablib
    from import_export.resources import modelresource_factory

    for model, rows in tables.items():
        resource = modelresource_factory(model)()
        fields = [field for field in model._meta.concrete_fields if field.name != "tx"]
        resource.fields = {field.name: resource.fields[field.name] for field in fields}
        # As they are but for documents, which are read from texts; the widgets read no time zone.
        texts = {field.attname for field in fields if field.get_internal_type() == "JSONField"}
        data = tablib.Dataset(
            *(
                tuple(json.dumps(row[f.attname]) if f.attname in texts else row[f.attname] for f in fields)
                for row in rows
            ),
            headers=[field.name for field in fields],
        )
        for dry_run in (True, False):
            done = resource.import_data(data, dry_run=dry_run, raise_errors=True)
            assert done.total_rows == len(rows)


def dlt_merge(folder: Path, tables: Tables) -> None:
    """Into a schema of its own. What PostgreSQL does for it is not counted: those connections are dlt's."""
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    import dlt
    from django.db import connection

    info = connection.settings_dict
    place = f"{info['HOST']}:{info['PORT'] or 5432}/{info['NAME']}"
    server = f"postgresql://{info['USER']}:{info['PASSWORD'] or 'none'}@{place}"
    name = f"dlt_{time.monotonic_ns()}"
    pipeline = dlt.pipeline(
        name,
        destination=dlt.destinations.postgres(server),
        dataset_name=name,
        pipelines_dir=str(folder / "dlt"),
    )
    resources = []
    for model, rows in tables.items():
        documents = {f.attname for f in model._meta.concrete_fields if f.get_internal_type() == "JSONField"}
        resources.append(
            dlt.resource(
                [{**row, "id": str(row["id"])} for row in rows],
                name=model._meta.db_table,
                primary_key="id",
                write_disposition="merge",
                columns={name: {"data_type": "json"} for name in documents},
            )
        )
    pipeline.run(resources)


def written_rows() -> int:
    """Rows that were inserted, updated or deleted in the three tables since they were made."""
    execute("SELECT pg_stat_force_next_flush()")
    return int(
        value(
            "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del + n_dead_tup) FROM pg_stat_user_tables"
            f" WHERE relname IN ({', '.join(repr(table) for table in TABLES)})"
        )
    )


def nothing(rows: int, written: int) -> Figure:
    now = written_rows()
    return Figure(
        goal="G2",
        what="rows written for unchanged ones",
        hub=now - written,
        yardstick=rows,
        unit="rows",
        ratio=(now - written) / rows,
        at_most=0,
    )


# SQLite


def sqlite(bench: Bench, rounds: int) -> list[Figure]:
    """Each side begins with a copy of the database as it was before the first row."""
    from django.db import connection

    rows, file = bench.rows, Path(str(connection.settings_dict["NAME"]))
    clean, filled = bench.folder / "clean.sqlite3", bench.folder / "filled.sqlite3"

    def keep(path: Path) -> None:
        connection.close()
        shutil.copyfile(file, path)

    def put_back(path: Path) -> None:
        connection.close()
        for end in ("-wal", "-shm"):
            Path(f"{file}{end}").unlink(missing_ok=True)
        shutil.copyfile(path, file)

    keep(clean)
    with silent():
        bench.take(bench.file)
    stored = [ready_rows(table) for table in TABLES]
    keep(filled)

    def executemany(tables: Sequence[tuple[str, Sequence[Any]]]) -> None:
        from django.db import transaction

        with transaction.atomic():
            # Not Django's cursor: it would look for the marks in every statement.
            cursor = connection.connection.cursor()
            for statement, values in tables:
                cursor.executemany(statement, values)

    new = {
        "hub": partial(rate, partial(bench.take, bench.file), rows=rows, before=partial(put_back, clean)),
        "raw": partial(rate, partial(executemany, stored), rows=rows, before=partial(put_back, clean)),
    }
    same = {
        "hub": partial(rate, partial(bench.take, bench.file), rows=rows, before=partial(put_back, filled)),
        "raw": partial(rate, partial(executemany, stored[:2]), rows=rows, before=partial(put_back, filled)),
    }
    return [
        figure("G10", "new rows, by raw executemany", in_turn(new, rounds=rounds), "hub", "raw", 0.5),
        figure("G10", "unchanged rows, by raw executemany", in_turn(same, rounds=rounds), "hub", "raw", 0.5),
    ]


def ready_rows(table: str) -> tuple[str, Sequence[Any]]:
    """The statement that puts the rows of a table back where they are not the same, and those rows."""
    from django.db import connection

    cursor = connection.connection.cursor()
    cursor.execute(f"SELECT * FROM {table}")
    names = [column[0] for column in cursor.description]
    keys = KEYS[table]
    rest = [name for name in names if name not in ("id", *keys)]
    sets = ", ".join(f"{name} = excluded.{name}" for name in rest)
    moved = " OR ".join(f"{table}.{name} IS NOT excluded.{name}" for name in rest)
    statement = (
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {sets} WHERE {moved}"
    )
    return statement, [tuple(row) for row in cursor.fetchall()]


# Memory


def memory(bench: Bench) -> list[Figure]:
    """Peak memory of the command itself, for two sizes of file."""
    figures = []
    if not MEMORY[bench.size]:
        return []
    few, many = MEMORY[bench.size]
    names = "import_customers", "export_customers"
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for rows in (few, many):
        file, out = bench.write(f"{rows}.csv", rows), bench.folder / f"{rows}-out.csv"
        peaks["import_customers"].append(peak("import_customers", str(file), "--organization=demo", "--json"))
        if rows == few:
            peaks["export_customers"].append(peak("export_customers", f"--output={out}", "--organization=demo"))
    last = f"--output={bench.folder / 'all-out.csv'}"
    peaks["export_customers"].append(peak("export_customers", last, "--organization=demo"))
    for name, (small, large) in peaks.items():
        what = f"{name}: peak memory, {many:,} rows by {few:,}"
        figures.append(
            Figure(goal="G3", what=what, hub=large, yardstick=small, unit="MB", ratio=large / small, at_most=1.15)
        )
        figures.append(
            Figure(
                goal="G3",
                what=f"{name}: peak memory, by 150 MB",
                hub=large,
                yardstick=150,
                unit="MB",
                ratio=large / 150,
                at_most=1,
            )
        )
    return figures


def peak(*command: str) -> float:
    """The most memory that a command held, in megabytes, as Linux tells it."""
    script = (
        "import re, sys; from django.core.management import execute_from_command_line as run\n"
        "try: run(sys.argv)\n"
        "finally: sys.stderr.write('\\n' + re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]) * 1024 / MEGABYTE


if __name__ == "__main__":
    main()
