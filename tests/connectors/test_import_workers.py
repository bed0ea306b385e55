"""A file that several processes take in comes to what it comes to with one, also when some of them are killed."""

import csv
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.db import connection as database
from django.db import transaction

from connectors.models import Connection, CustomerLink, SyncRun
from connectors.sync import importing
from customers import editing
from customers.editing import EDITABLE, Actor
from customers.ids import new_public_id, public_id
from customers.models import Customer, CustomerChange, Organization
from tests.connectors.test_commands import Result, run

ACTOR = Actor(kind="user", name="Tester")
COLUMNS = ("id", "external_id", "name", "email", "phone", "is_active", "custom.x")
LOCK = 20261121

with_postgresql = pytest.mark.skipif(database.vendor != "postgresql", reason="SQLite lets one process write at a time")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "CHUNK_ROWS", 9)


def organization_with_customers(slug: str) -> dict[str, UUID]:
    """Its customers' ids by their external ids at `shop`: 20 of them, of which m0 has been merged into m1."""
    organization = Organization.objects.create(name="O", slug=slug, country="DE")
    shop = Connection.objects.create(
        organization=organization, provider="links", name="shop", direction=Connection.Direction.CALLS_US
    )
    names = [*(f"k{number}" for number in range(18)), "m0", "m1"]
    path = "external_id,name\n" + "".join(f"{name},{name}\n" for name in names)
    take_in(slug, path)
    there = CustomerLink.objects.filter(connection=shop)
    ids = dict(there.values_list("remote_id", "customer_id"))
    editing.merge(organization=organization, survivor=ids["m1"], loser=ids["m0"], values={}, actor=ACTOR)
    return {str(name): id_ for name, id_ in ids.items()}


def take_in(slug: str, text: str, *more: str) -> Result:
    with importing.TemporaryDirectory() as folder:
        path = Path(folder) / "customers.csv"
        path.write_text(text, encoding="utf-8")
        return run("import_customers", path, f"--organization={slug}", "--connection=shop", "--json", *more)


def a_row(chance: random.Random, *, with_ids: bool) -> dict[str, str]:
    """A row that may be new, known, unchanged, wrong, or of the same customer as another one."""
    known = [f"k{number}" for number in range(18)]
    row = {"external_id": chance.choice([*known, *known, "m0", "m1", *(f"n{n}" for n in range(40)), ""])}
    if with_ids and chance.random() < 0.3:
        row["id"] = chance.choice([*known, "m0", "m1", "unknown", "broken"])
        if chance.random() < 0.5:
            row["external_id"] = ""
    row["name"] = chance.choice([row["external_id"], "Ann", "Ben", "", "nul\x01"])
    row["email"] = chance.choice(["", "a@example.com", "b@example.com", "nothing"])
    row["phone"] = chance.choice(["", "030 123456", "1"])
    row["is_active"] = chance.choice(["", "yes", "no", "maybe"])
    row["custom.x"] = chance.choice(["", "1", "json:1", "json:[1,"])
    return row


def state(slug: str) -> Any:
    """All that is stored but for times and keys."""
    links = CustomerLink.objects.filter(connection__organization__slug=slug).order_by("remote_id")
    by_customer: dict[UUID, list[Any]] = {}
    for link in links:
        said = (link.remote_id, link.base_local, link.base_remote, link.is_primary, link.is_duplicate, link.is_dirty)
        by_customer.setdefault(link.customer_id, []).append((*said, link.pushed_version))
    shown = []
    for customer in Customer.objects.filter(organization__slug=slug):
        changes = CustomerChange.objects.filter(customer=customer).order_by("version")
        told = [
            (one.version, {name: pair for name, pair in one.changes.items() if name != "merged_into"})
            for one in changes
        ]
        values = {
            name: getattr(customer, name) for name in (*EDITABLE, "name_key", "email_key", "phone_key", "version")
        }
        shown.append((by_customer.get(customer.pk), values, told, customer.merged_into_id is not None))
    return sorted(shown, key=repr)


@with_postgresql
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("seed", "with_ids", "more"),
    [
        (1, False, ()),
        (2, True, ()),
        (3, True, ("--clear-empty",)),
        (4, True, ("--dry-run",)),
        (5, False, ("--limit=50",)),
    ],
)
def test_two_workers_come_to_what_one_comes_to(
    seed: int, with_ids: bool, more: tuple[str, ...], tmp_path: Path
) -> None:
    chance = random.Random(seed)
    rows = [a_row(chance, with_ids=with_ids) for _ in range(120)]
    told = []
    for slug, workers in (("shop-1", 1), ("shop-2", 2)):
        ids = organization_with_customers(slug)
        errors = tmp_path / f"{slug}.csv"
        path = tmp_path / f"in-{slug}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for row in rows:
                named = row.get("id", "")
                known = public_id("cust", ids[named]) if named in ids else named and new_public_id("cust")
                id_ = named if named == "broken" else known
                lines.writerow([id_, *(row.get(name, "") for name in COLUMNS[1:])])
        done = take_in(slug, path.read_text(encoding="utf-8"), f"--workers={workers}", f"--errors={errors}", *more)
        assert "Traceback" not in done.err
        kept = SyncRun.objects.filter(organization__slug=slug).order_by("pk").last()
        assert kept is not None
        found = sorted(errors.read_text(encoding="utf-8").replace(slug, "shop").splitlines())
        run_told = (kept.state, kept.total, kept.planned, sorted(map(repr, kept.problems)))
        told.append((done.code, done.totals, found, repr(run_told).replace(slug, "shop"), state(slug)))
    assert told[0] == told[1]
    assert {"created", "updated", "refused"} <= told[0][1].keys()


@contextmanager
def importing_in_a_thread(path: Path) -> Iterator[list[Result]]:
    """An import with two workers that goes on while the test does something else."""
    results: list[Result] = []

    def do() -> None:
        try:
            results.append(run("import_customers", path, "--organization=demo", "--workers=2", "--json"))
        finally:
            database.close()

    thread = threading.Thread(target=do)
    thread.start()
    try:
        yield results
    finally:
        thread.join(120)
    assert results, "the import did not end"


def until(what: str) -> None:
    """Wait until so many sessions are where the query tells."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with database.cursor() as cursor:
            cursor.execute("SELECT pg_stat_clear_snapshot()")
            cursor.execute(what)
            if cursor.fetchone()[0]:
                return
        time.sleep(0.05)
    raise AssertionError(f"never true: {what}")


WAITING = "SELECT count(*) = 2 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def kill_the_workers() -> None:
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def rows_without_ids(tmp_path: Path) -> Path:
    """Each of these is a new customer each time that it is taken in."""
    path = tmp_path / "new.csv"
    path.write_text("name\n" + "".join(f"N{number}\n" for number in range(60)), encoding="utf-8")
    return path


@with_postgresql
@pytest.mark.django_db(transaction=True)
def test_workers_that_are_killed_at_their_rows_lose_and_double_none(rows_without_ids: Path) -> None:
    Organization.objects.create(name="Demo", slug="demo")
    with importing_in_a_thread(rows_without_ids) as results, transaction.atomic(), database.cursor() as cursor:
        # Both come as far as their first row.
        cursor.execute("LOCK TABLE customers_customer IN EXCLUSIVE MODE")
        until(WAITING)
        kill_the_workers()
    assert (results[0].code, results[0].totals) == (0, {"created": 60})
    assert Customer.objects.values("name").distinct().count() == Customer.objects.count() == 60


@with_postgresql
@pytest.mark.django_db(transaction=True)
def test_workers_that_are_killed_while_they_commit_lose_and_double_none(rows_without_ids: Path) -> None:
    Organization.objects.create(name="Demo", slug="demo")
    with database.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS"
            f" 'BEGIN PERFORM pg_advisory_xact_lock_shared({LOCK}); RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER pause AFTER INSERT ON customers_customerchange"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pause()"
        )
    try:
        with importing_in_a_thread(rows_without_ids) as results, transaction.atomic(), database.cursor() as cursor:
            cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK})")
            # One commits, the other one waits for the run's row that the first has counted on.
            until(WAITING)
            kill_the_workers()
            time.sleep(0.5)
    finally:
        with database.cursor() as cursor:
            cursor.execute("DROP TRIGGER pause ON customers_customerchange; DROP FUNCTION pause()")
    assert (results[0].code, results[0].totals) == (0, {"created": 60})
    assert Customer.objects.values("name").distinct().count() == Customer.objects.count() == 60
    assert SyncRun.objects.get().created == 60


@with_postgresql
@pytest.mark.django_db(transaction=True)
def test_rows_that_kill_every_worker_end_the_import(rows_without_ids: Path) -> None:
    Organization.objects.create(name="Demo", slug="demo")
    with importing_in_a_thread(rows_without_ids) as results, transaction.atomic(), database.cursor() as cursor:
        cursor.execute("LOCK TABLE customers_customer IN EXCLUSIVE MODE")
        end = time.monotonic() + 100
        while not results and time.monotonic() < end:
            kill_the_workers()
            time.sleep(0.1)
    assert results[0].code == 1
    assert "2 processes were killed at them" in results[0].objects[0]["error"]
    assert Customer.objects.count() == results[0].totals.get("created", 0) == 0
    assert SyncRun.objects.get().state == SyncRun.State.FAILED


@with_postgresql
@pytest.mark.django_db(transaction=True)
def test_a_file_that_breaks_off_keeps_the_rows_before(tmp_path: Path) -> None:
    Organization.objects.create(name="Demo", slug="demo")
    path = tmp_path / "broken.csv"
    path.write_text("name\n" + "".join(f"N{number}\n" for number in range(40)) + '"never closed\n', encoding="utf-8")
    done = run("import_customers", path, "--organization=demo", "--workers=2", "--json")
    assert (done.code, done.totals) == (1, {"created": 40})
    assert "The rows before were taken in." in done.objects[0]["error"]


@pytest.mark.skipif(database.vendor == "postgresql", reason="PostgreSQL takes them")
def test_sqlite_takes_no_second_process(organization: Organization, tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_text("name\nA\n", encoding="utf-8")
    done = run("import_customers", path, "--organization=demo", "--workers=2")
    assert done.code == 2
    assert "SQLite lets one process write at a time" in done.err
    assert run("import_customers", path, "--organization=demo", "--workers=1").code == 0
