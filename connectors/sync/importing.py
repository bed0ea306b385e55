"""Rows of a file into customers, one code path for the command, the upload and its preview."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import UUID

from django.db import transaction
from django.utils import timezone

from connectors.models import Connection, CustomerLink, ImportFile, SyncRun
from connectors.provider import Record
from connectors.sync import runs
from connectors.sync.clock import database_clock
from connectors.sync.races import start_over
from connectors.sync.receive import UNCHANGED, nothing_new, receive
from customers import bulk, editing, tabular
from customers.editing import Actor
from customers.models import Customer, Organization
from customers.normalize import clean_text, is_email
from customers.privacy import HIDDEN, PERSONAL
from customers.tabular import Problem, Row, Table

CHUNK_ROWS = 2500
# The connection that holds the external ids of files that name none.
FILE_PROVIDER, FILE_NAME = "file", "import"
# What an upload may bring; more is for the command.
MAX_FILE_BYTES, MAX_FILE_ROWS = 10 * 1024 * 1024, 20_000
ROWS_SHOWN, PROBLEMS_SHOWN = 20, 1000
FILE_LIFE = timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Where rows go. Without a connection (a dry run before the first import) no external id is known.

    `tell` is called for each row with its outcome and `{field: [before, after]}`.
    """

    organization: Organization
    connection: Connection | None
    actor: Actor
    clear_empty: bool
    tell: Callable[[Row, str, Mapping[str, list[Any]]], None] | None = None

    def take(self, rows: Sequence[Row]) -> tuple[Counter[str], list[Problem]]:
        """Take these rows in; a row that cannot be taken is told and spares the others."""
        totals: Counter[str] = Counter()
        problems: list[Problem] = []
        with bulk.uncollected():
            for part in _without_repeats(rows):
                outcomes, found = self._take_once(part)
                totals.update(outcomes)
                problems += found
        return totals, problems

    def _take_once(self, rows: Sequence[Row]) -> tuple[Counter[str], list[Problem]]:
        """As `take`, for rows no two of which have the same id or external id."""
        same, owners = self._known(rows)
        totals: Counter[str] = Counter({UNCHANGED: len(same)} if same else {})
        if same and self.tell:
            for row in rows:
                if row.external_id in same:
                    self.tell(row, UNCHANGED, {})
        rows = [row for row in rows if row.external_id not in same]
        if not rows:
            return totals, []
        wanted = {row.customer_id for row in rows if row.customer_id} | set(owners.values())
        own = Customer.objects.filter(organization=self.organization, pk__in=wanted)
        known = editing.lock(organization=self.organization, ids=own.values_list("pk", flat=True)) if wanted else {}
        plain: list[tuple[Row, Customer | None, Record]] = []
        linked: list[tuple[Row, Customer | None, Record]] = []
        custom: dict[UUID, dict[str, Any]] = {}
        problems: list[Problem] = []
        for row in rows:
            owner = owners.get(row.external_id) if row.external_id else None
            meant = row.customer_id or owner
            before = known.get(meant) if meant else None
            wrong = [*row.problems, *self._wrong_ids(row, before, known.get(owner) if owner else None)]
            if not wrong:
                values = self._values(row, before, custom)
                wrong = list(_problems(row, values, before))
            if wrong:
                totals["refused"] += 1
                problems += wrong
                if self.tell:
                    self.tell(row, "refused", {})
            elif before is not None and (row.customer_id or not self._is_source):
                plain.append((row, before, Record(values=values, customer_id=before.pk)))
            elif row.external_id:
                good = values if before else editing.Checked(values)
                linked.append((row, before, Record(values=good, remote_id=row.external_id)))
            else:
                plain.append((row, None, Record(values=editing.Checked(values))))
        for connection, taken in ((None, plain), (self.connection, linked)):
            received = receive(
                organization=self.organization,
                connection=connection,
                records=[record for _, _, record in taken],
                actor=self.actor,
            )
            totals.update(result.outcome for result in received)
            if self.tell:
                for (row, before, record), result in zip(taken, received, strict=True):
                    self.tell(row, result.outcome, _moved(before, result.customer, record.values))
        return totals, problems

    def _known(self, rows: Sequence[Row]) -> tuple[set[str], dict[str, UUID]]:
        """The external ids of rows that say nothing new, and the customers of the other known ones."""
        if self.connection is None:
            return set(), {}
        if not self.connection.calls_us:
            ids = bulk.among(row.external_id for row in rows if row.external_id)
            links = CustomerLink.objects.filter(connection=self.connection, remote_id__in=ids)
            return set(), {str(there): owner for there, owner in links.values_list("remote_id", "customer_id")}
        said = {row.external_id: self._said(row) for row in rows if row.external_id}
        same, owners = nothing_new(connection=self.connection, said=said) if said else (set(), {})
        return same, owners

    def _said(self, row: Row) -> Mapping[str, Any] | None:
        """What the row says, as `nothing_new` asks it; None where that is to be looked at more closely."""
        if row.customer_id or row.problems:
            return None
        if not row.custom and not self.clear_empty:
            return None if _masked(row.values) else row.values
        if self.clear_empty and any(name.startswith(tabular.CUSTOM) for name in row.empty):
            return None
        values = {**row.values, **(self._cleared(row) if self.clear_empty else {})}
        if row.custom:
            values["custom_fields"] = row.custom
        return None if _masked(values) else values

    def _cleared(self, row: Row) -> dict[str, Any]:
        """What the row's empty cells set where they clear, less custom fields."""
        texts = {name: "" for name in row.empty if name in editing.TEXTS}
        return texts | {name: name == "is_active" for name in row.empty if name in editing.FLAGS}

    def _wrong_ids(self, row: Row, before: Customer | None, owner: Customer | None) -> Iterator[Problem]:
        if row.customer_id is None:
            return
        if before is None:
            message = f"{self.organization.slug} has no such customer. Leave the cell empty to create one."
            yield Problem(row=row.number, field="id", message=message)
        elif row.external_id and (owner is None or owner.pk != before.pk):
            message = "This is not the external id of the customer in column id. Leave one of the two empty."
            yield Problem(row=row.number, field="external_id", message=message)

    def _values(self, row: Row, before: Customer | None, custom: dict[UUID, dict[str, Any]]) -> dict[str, Any]:
        """What the row sets: its filled cells, and the empty ones where those clear. `custom` collects the custom
        fields of each customer, so that a second row of the same one adds to the first.
        """
        values = dict(row.values)
        stored = before.custom_fields if before else {}
        fields = dict(custom.get(before.pk, stored) if before else {})
        fields |= row.custom
        if self.clear_empty:
            values |= self._cleared(row)
            cleared = {column.removeprefix(tabular.CUSTOM) for column in row.empty if column.startswith(tabular.CUSTOM)}
            fields = {name: value for name, value in fields.items() if name not in cleared}
        if before is not None:
            custom[before.pk] = fields
        if fields != stored:
            values["custom_fields"] = fields
        return values

    @property
    def _is_source(self) -> bool:
        """Whether rows with a known external id come from that system. Where the hub sends to it, a row is an edit of
        somebody's that is still to be sent there.
        """
        return self.connection is None or not self.connection.pushes


def _moved(before: Customer | None, after: Customer, names: Iterable[str]) -> dict[str, list[Any]]:
    sides = {name: [getattr(before, name, ""), getattr(after, name)] for name in names}
    return {name: pair for name, pair in sides.items() if pair[0] != pair[1]}


def _without_repeats(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in parts: of rows with the same id or external id, the second is in the second part, and so on.

    Whether a row with an id and one with an external id mean the same customer is not known here: the later one is in a
    later part.
    """
    parts: list[list[Row]] = []
    seen: Counter[tuple[str, object]] = Counter()
    first, by_id = 0, None
    for row in rows:
        keys: list[tuple[str, object]] = [("id", row.customer_id)] if row.customer_id else []
        keys += [("external_id", row.external_id)] if row.external_id else []
        if keys:
            if by_id is not None and by_id != bool(row.customer_id):
                first = len(parts)
            by_id = bool(row.customer_id)
        place = max(first, *(seen[key] for key in keys)) if keys else first
        for key in keys:
            seen[key] = place + 1
        while len(parts) <= place:
            parts.append([])
        parts[place].append(row)
    return parts


def _problems(row: Row, values: dict[str, Any], before: Customer | None) -> Iterator[Problem]:
    """What is wrong with the values of a row whose cells are each well-formed. An ill-formed e-mail address that is
    stored already may stay.
    """
    if "custom_fields" in values:
        wrong = editing.problems({"custom_fields": values["custom_fields"]}, creating=False)
        for message in wrong.get("custom_fields", ()):
            yield Problem(row=row.number, field="custom_fields", message=message)
    if message := editing.name_problem(values, creating=before is None):
        yield Problem(row=row.number, field="name", message=message)
    if name := _masked(values):
        message = "The value is masked, from an export without the right to personal data. Empty the cell."
        yield Problem(row=row.number, field=name, message=message)
        return
    email = values.get("email")
    if email and not is_email(email) and (before is None or clean_text(email) != before.email):
        message = "This is not an e-mail address, such as name@example.com."
        yield Problem(row=row.number, field="email", message=message)


def _masked(values: Mapping[str, Any]) -> str:
    """A field whose value comes from an export that hid it; "" when there is none."""
    for name, value in values.items():
        if name in PERSONAL and HIDDEN in (value if isinstance(value, str) else str(value)):
            return name
    return ""


def file_connection(organization: Organization, *, create: bool) -> Connection | None:
    """The connection under which the external ids of plain files are kept."""
    named = {"organization": organization, "provider": FILE_PROVIDER, "account": FILE_NAME}
    if not create:
        return Connection.objects.filter(**named).first()
    connection, _ = Connection.objects.get_or_create(
        **named, defaults={"name": FILE_NAME, "direction": Connection.Direction.CALLS_US}
    )
    return connection


def chunks(rows: Iterator[T], limit: int | None) -> Iterator[list[T]]:
    """The rows, so many at a time as one transaction takes. Raises UnreadableTable after those before the damage."""
    rows = islice(rows, limit)
    damaged = None
    while damaged is None:
        chunk: list[T] = []
        with bulk.uncollected():
            try:
                for row in islice(rows, CHUNK_ROWS):
                    chunk.append(row)
            except tabular.UnreadableTable as error:
                damaged = error
        if chunk:
            yield chunk
        elif damaged is None:
            return
    raise damaged


def kept(problems: Sequence[Problem], *, refused: int) -> list[dict[str, Any]]:
    """The problems as a run keeps them, unless it has its fill."""
    if refused >= runs.PROBLEMS_KEPT:
        return []
    return [
        {"row": problem.row, "state": "refused", "field": problem.field, "reason": problem.message}
        for problem in problems
    ]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of one chunk. `last` is the number of its last row."""

    totals: Counter[str]
    problems: Sequence[Problem]
    last: int


def take_in(
    chunks: Iterator[list[Row]], *, work: Import, run: SyncRun | None, stop: Callable[[], bool]
) -> Generator[Taken]:
    """Take in chunk after chunk, each in a transaction of its own, until told to stop, and say what became of each.

    Without a run it is a dry run: each chunk is taken in for real and rolled back.
    """
    refused = 0
    for chunk in chunks:

        def store(chunk: list[Row] = chunk, refused: int = refused) -> tuple[Counter[str], list[Problem]]:
            totals, problems = work.take(chunk)
            if run is not None:
                runs.add(run_id=run.pk, totals=totals, problems=kept(problems, refused=refused), at=timezone.now())
            else:
                transaction.set_rollback(True)
            return totals, problems

        totals, problems = start_over(store)
        refused += totals["refused"]
        yield Taken(totals=totals, problems=problems, last=chunk[-1].number)
        if stop():
            return


# Uploaded files


@dataclass(kw_only=True)
class Preview:
    """What taking a file in would come to. `rows` are the first ones: number, name, outcome, {field: [before, after]}.

    `damaged` says why the file cannot be read to its end, or at all.
    """

    number: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    columns: Sequence[str] = ()
    ignored: Sequence[str] = ()
    rows: list[tuple[int, str, str, Mapping[str, list[Any]]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    more_problems: bool = False
    damaged: str = ""


@contextmanager
def opened(file: ImportFile) -> Iterator[Table]:
    """The uploaded file as a table. Raises UnreadableTable, with words for people who have no command line."""
    with TemporaryDirectory(prefix="import-") as folder:
        kind = ".xlsx" if file.name.lower().endswith(".xlsx") else ".csv"
        path = Path(folder) / f"file{kind}"
        path.write_bytes(bytes(file.content))
        try:
            with tabular.open_table(path, ignore_unknown=bool(file.options.get("ignore_unknown"))) as table:
                yield table
        except tabular.UnknownColumns as error:
            names = ", ".join(map(repr, error.columns))
            raise tabular.UnreadableTable(
                f"Unknown columns: {names}. Rename them, or choose to leave them out."
            ) from None
        except tabular.UnreadableTable as error:
            raise tabular.UnreadableTable(str(error).replace(str(path), file.name)) from None


def preview(file: ImportFile, *, actor: Actor) -> Preview:
    """What taking the file in would do, row by row: each chunk is taken in for real and rolled back."""
    found = Preview()

    def tell(row: Row, outcome: str, changes: Mapping[str, list[Any]]) -> None:
        if row.number <= ROWS_SHOWN + 1:
            found.rows.append((row.number, str(row.values.get("name") or ""), outcome, changes))

    work = replace(_work(file, actor, create=False), tell=tell)
    try:
        with opened(file) as table:
            found.columns, found.ignored = table.columns, table.ignored
            for chunk in chunks(table.rows, MAX_FILE_ROWS + 1):
                found.number += len(chunk)
                if found.number > MAX_FILE_ROWS:
                    found.damaged = f"The file has more than {MAX_FILE_ROWS:,} rows. Use manage.py import_customers."
                    break
                with transaction.atomic():
                    totals, problems = work.take(chunk)
                    transaction.set_rollback(True)
                found.totals.update(totals)
                room = PROBLEMS_SHOWN - len(found.problems)
                found.problems += problems[:room]
                found.more_problems = found.more_problems or len(problems) > room
    except tabular.UnreadableTable as error:
        found.damaged = str(error)
    found.rows.sort(key=lambda row: row[0])
    return found


@transaction.atomic
def accept(file: ImportFile, *, actor: Actor, planned: int, at: datetime | None = None) -> SyncRun:
    """Have a worker take the file in. Pressed twice, it is still one run."""
    file = ImportFile.objects.select_for_update().get(pk=file.pk)
    if file.run is not None:
        return file.run
    file.run = runs.start(
        organization=file.organization,
        connection=file.connection,
        kind=SyncRun.Kind.IMPORT,
        actor=actor,
        at=at or database_clock(),
        planned=planned,
        state=SyncRun.State.QUEUED,
        request={"file": file.name},
    )
    file.save(update_fields=["run"])
    return file.run


def carry_out(
    run: SyncRun, *, clock: Callable[[], datetime] = database_clock, stop: Callable[[], bool] = lambda: False
) -> None:
    """Take in what is left of a run's file, in chunks; each is taken in once, whoever else is at it, or nobody was.

    Ends early when told to stop, when the run is cancelled, or when another worker has gone on with it.
    """
    file = ImportFile.objects.select_related("organization", "connection").filter(run=run).first()
    if file is None:
        with transaction.atomic():
            mine = SyncRun.objects.select_for_update().get(pk=run.pk)
            if mine.finished_at is None:
                runs.finish(run=mine, at=clock(), error="The file is not kept any more.")
        return
    actor = Actor(
        kind=run.actor_kind,
        id=run.actor_id,
        name=run.actor_name,
        request_id=run.request_id,
        message=run.request.get("message", ""),
    )
    ended = ""
    done = int(run.request.get("row", 0))
    try:
        with opened(file) as table:
            work = _work(file, actor, create="external_id" in table.columns)
            rows = (row for row in table.rows if row.number > done)
            for chunk in chunks(rows, MAX_FILE_ROWS):
                if stop():
                    return
                with transaction.atomic():
                    mine = SyncRun.objects.select_for_update().get(pk=run.pk)
                    waits = mine.state in (SyncRun.State.QUEUED, SyncRun.State.RUNNING)
                    if not waits or int(mine.request.get("row", 0)) != done:
                        return
                    totals, problems = work.take(chunk)
                    runs.add(run_id=run.pk, totals=totals, problems=kept(problems, refused=mine.refused), at=clock())
                    done = chunk[-1].number
                    SyncRun.objects.filter(pk=run.pk).update(
                        request={**mine.request, "row": done},
                        state=SyncRun.State.RUNNING,
                        started_at=mine.started_at or clock(),
                        updated_at=clock(),
                    )
    except tabular.UnreadableTable as error:
        ended = f"{error} The rows before were taken in."
    with transaction.atomic():
        mine = SyncRun.objects.select_for_update().get(pk=run.pk)
        if mine.finished_at is None:
            runs.finish(run=mine, at=clock(), error=ended)
        ImportFile.objects.filter(run=run).delete()


def forget_files(now: datetime) -> int:
    """Delete the uploads that nobody has had taken in for a day, and those whose run is over."""
    old = ImportFile.objects.filter(run=None, created_at__lt=now - FILE_LIFE)
    over = ImportFile.objects.filter(run__finished_at__isnull=False)
    return old.delete()[0] + over.delete()[0]


def _work(file: ImportFile, actor: Actor, *, create: bool) -> Import:
    connection = file.connection or file_connection(file.organization, create=create)
    return Import(
        organization=file.organization,
        connection=connection,
        actor=actor,
        clear_empty=bool(file.options.get("clear_empty")),
    )
