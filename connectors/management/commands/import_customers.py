"""Take customers in from a CSV or XLSX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

from django.core.management.base import CommandParser
from django.db import transaction
from django.utils import timezone

from connectors.management.cli import (
    EXIT_CODES,
    Exit,
    HubCommand,
    Outcome,
    Progress,
    WrongUse,
    command_actor,
    find_connections,
    find_organization,
    positive,
    report,
    stopping,
    worst,
)
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.provider import Record
from connectors.sync import runs
from connectors.sync.receive import receive
from customers import editing, tabular
from customers.editing import Actor
from customers.models import Customer, Organization
from customers.normalize import clean_text, is_email
from customers.tabular import Problem, Row

CHUNK_ROWS = 1000
ERRORS_SHOWN = 20
# The connection that holds the external ids of files that name none.
FILE_PROVIDER, FILE_NAME = "file", "import"


@dataclass(frozen=True, kw_only=True)
class Import:
    """Where rows go. Without a connection (a dry run before the first import) no external id is known."""

    organization: Organization
    connection: Connection | None
    actor: Actor
    clear_empty: bool

    def take(self, rows: Sequence[Row]) -> tuple[Counter[str], list[Problem]]:
        """Take these rows in; a row that cannot be taken is told and spares the others."""
        totals: Counter[str] = Counter()
        problems: list[Problem] = []
        for part in _without_repeats(rows):
            outcomes, found = self._take_once(part)
            totals.update(outcomes)
            problems += found
        return totals, problems

    def _take_once(self, rows: Sequence[Row]) -> tuple[Counter[str], list[Problem]]:
        """As `take`, for rows no two of which have the same id or external id."""
        owners = self._owners(rows)
        wanted = {row.customer_id for row in rows if row.customer_id} | set(owners.values())
        own = Customer.objects.filter(organization=self.organization, pk__in=wanted)
        known = editing.lock(organization=self.organization, ids=own.values_list("pk", flat=True)) if wanted else {}
        plain: list[Record] = []
        linked: list[Record] = []
        custom: dict[UUID, dict[str, Any]] = {}
        problems: list[Problem] = []
        totals: Counter[str] = Counter()
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
            elif before is not None and (row.customer_id or not self._is_source):
                plain.append(Record(values=values, customer_id=before.pk))
            elif row.external_id:
                linked.append(Record(values=values, remote_id=row.external_id))
            else:
                plain.append(Record(values=values))
        for connection, records in ((None, plain), (self.connection, linked)):
            received = receive(organization=self.organization, connection=connection, records=records, actor=self.actor)
            totals.update(result.outcome for result in received)
        return totals, problems

    def _owners(self, rows: Sequence[Row]) -> dict[str, UUID]:
        """The customers that have these external ids."""
        ids = [row.external_id for row in rows if row.external_id]
        if self.connection is None or not ids:
            return {}
        links = CustomerLink.objects.filter(connection=self.connection, remote_id__in=ids)
        return {str(remote_id): customer_id for remote_id, customer_id in links.values_list("remote_id", "customer_id")}

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
            values |= {name: "" for name in row.empty if name in editing.TEXTS}
            values |= {name: name == "is_active" for name in row.empty if name in editing.FLAGS}
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


def _without_repeats(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in parts: of rows with the same id or external id, the second is in the second part, and so on."""
    parts: list[list[Row]] = []
    seen: Counter[tuple[str, object]] = Counter()
    for row in rows:
        keys: list[tuple[str, object]] = [("id", row.customer_id)] if row.customer_id else []
        keys += [("external_id", row.external_id)] if row.external_id else []
        place = max((seen[key] for key in keys), default=0)
        for key in keys:
            seen[key] = place + 1
        while len(parts) <= place:
            parts.append([])
        parts[place].append(row)
    return parts


def _problems(row: Row, values: dict[str, Any], before: Customer | None) -> Iterator[Problem]:
    """What is wrong with the values. An ill-formed e-mail address that is stored already may stay."""
    for name, messages in editing.problems(values, creating=before is None).items():
        yield Problem(row=row.number, field=name, message=" ".join(messages))
    email = values.get("email")
    if email and not is_email(email) and (before is None or clean_text(email) != before.email):
        message = "This is not an e-mail address, such as name@example.com."
        yield Problem(row=row.number, field="email", message=message)


class Command(HubCommand):
    help = "Take customers in from a CSV (UTF-8; comma, semicolon or tab) or XLSX file."
    examples = """\
  manage.py import_customers customers.csv --organization demo --dry-run
  manage.py import_customers customers.xlsx --organization demo --errors errors.csv
  manage.py import_customers books.csv --organization demo --connection books"""
    epilog = f"""columns (capitals, blanks and dashes do not matter; "e-mail", "zip" or "company" are understood):
  {", ".join(tabular.FIELDS[:5])}, …, {", ".join(tabular.FIELDS[-4:])}
  external_id     the id of the row where it comes from: importing the file again then changes nothing
  id              cust_…, to change that customer; rows without id and external_id become new customers
  custom.<name>   a custom field; json:… for one that is not text
An empty cell leaves what is known as it is. An apostrophe before = + - @ is taken away, as spreadsheets do.

--json prints one object: {{"connection", "organization", "operation", "dry_run", "run", "planned", "totals",
"problems": [{{"state", "field", "reason", "count"}}], "samples", "error", "exit_code"}} and then
{{"connections", "planned", "totals", "exit_code"}}.

{EXIT_CODES}"""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path, help="A CSV file, or XLSX if its name says so.")
        parser.add_argument("--organization", required=True, metavar="SLUG")
        parser.add_argument("--connection", metavar="NAME", help="Whose ids external_id holds; else the file's own.")
        parser.add_argument("--dry-run", action="store_true", help="Check every row and store nothing.")
        parser.add_argument("--limit", type=positive, metavar="N", help="Read at most so many rows.")
        parser.add_argument("--clear-empty", action="store_true", help="Let empty cells empty the fields.")
        parser.add_argument("--ignore-unknown", action="store_true", help="Leave out columns that are not known.")
        parser.add_argument("--raw", action="store_true", help="Keep apostrophes: for files that export --raw wrote.")
        parser.add_argument("--errors", type=Path, metavar="FILE", help="Write every error as CSV to this file.")
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print JSON, described below.")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = find_organization(options["organization"])
        named = options["connection"]
        [chosen] = find_connections([named], every=False, slug=organization.slug) if named else [None]
        outcome = Outcome(
            label=named or FILE_NAME,
            organization=organization.slug,
            operation="import",
            dry_run=options["dry_run"],
        )
        with ExitStack() as stack:
            try:
                table = stack.enter_context(
                    tabular.open_table(options["file"], ignore_unknown=options["ignore_unknown"], raw=options["raw"])
                )
            except tabular.UnreadableTable as error:
                raise WrongUse(str(error)) from error
            if table.ignored:
                self.say(f"Left out: {', '.join(table.ignored)}.")
            tell = stack.enter_context(self._errors(options["errors"]))
            stop = stack.enter_context(stopping(self.say, "Finishing these rows. Press Ctrl-C again to stop at once."))
            self._import(organization, chosen, table, outcome, tell, stop, options)
        if outcome.totals["refused"]:
            outcome.code = worst((outcome.code, Exit.ATTENTION))
        if outcome.error:
            self.complain(outcome.error)
        report(self, [outcome], as_json=options["as_json"], stopped=stop())

    def _import(
        self,
        organization: Organization,
        chosen: Connection | None,
        table: tabular.Table,
        outcome: Outcome,
        tell: Callable[[Sequence[Problem]], None],
        stop: Callable[[], bool],
        options: dict[str, Any],
    ) -> None:
        dry_run, limit = options["dry_run"], options["limit"]
        actor = command_actor("import_customers")
        connection = chosen or file_connection(organization, create="external_id" in table.columns and not dry_run)
        run = None
        if not dry_run:
            run = runs.start(
                organization=organization,
                connection=connection,
                kind=SyncRun.Kind.IMPORT,
                actor=actor,
                at=timezone.now(),
                request={"file": options["file"].name, "limit": limit},
            )
            outcome.run = run.public_id
        work = Import(organization=organization, connection=connection, actor=actor, clear_empty=options["clear_empty"])
        ended = "The hub failed."
        try:
            with Progress(self, "import", table.size) as progress:
                for chunk in _chunks(table.rows, limit):
                    with transaction.atomic():
                        totals, problems = work.take(chunk)
                        if run is not None:
                            runs.add(run_id=run.pk, totals=totals, problems=_kept(problems, outcome), at=timezone.now())
                        else:
                            transaction.set_rollback(True)
                    outcome.totals.update(totals)
                    outcome.problems.update(("refused", problem.field, problem.message) for problem in problems)
                    tell(problems)
                    progress.update(table.done(), outcome.totals)
                    if stop():
                        ended = f"Stopped by hand after row {chunk[-1].number}."
                        break
                else:
                    ended = ""
        except tabular.UnreadableTable as error:
            ended = f"{error} The rows before were {'checked' if dry_run else 'taken in'}."
            outcome.fail(Exit.FAILED, ended)
        finally:
            if run is not None:
                runs.finish(run=run, at=timezone.now(), error=ended)
        if ended and stop():
            self.say(ended)

    def _errors(self, path: Path | None) -> _ErrorLog:
        try:
            return _ErrorLog(self, path)
        except OSError as error:
            raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error


class _ErrorLog:
    """Tells the first errors on stderr, and all of them to a file if there is one."""

    def __init__(self, command: HubCommand, path: Path | None) -> None:
        self.command = command
        self.told = 0
        self.path = path
        self.file = path.open("w", encoding="utf-8", newline="") if path else None
        self.writer = tabular.CsvWriter(self.file) if self.file else None

    def __enter__(self) -> Callable[[Sequence[Problem]], None]:
        if self.writer:
            self.writer.write(["row", "field", "message"])
        return self.tell

    def tell(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            self.told += 1
            if self.told <= ERRORS_SHOWN:
                name = f"{problem.field}: " if problem.field else ""
                self.command.complain(f"row {problem.row}: {name}{problem.message}")
            if self.writer:
                self.writer.write([str(problem.row), tabular.protect(problem.field), tabular.protect(problem.message)])

    def __exit__(self, *failure: object) -> None:
        if self.file:
            self.file.close()
        if self.told > ERRORS_SHOWN:
            where = f"all are in {self.path}" if self.path else "--errors FILE writes all"
            self.command.complain(f"… and {self.told - ERRORS_SHOWN:,} more errors; {where}.")


def file_connection(organization: Organization, *, create: bool) -> Connection | None:
    """The connection under which the external ids of plain files are kept."""
    named = {"organization": organization, "provider": FILE_PROVIDER, "account": FILE_NAME}
    if not create:
        return Connection.objects.filter(**named).first()
    connection, _ = Connection.objects.get_or_create(
        **named, defaults={"name": FILE_NAME, "direction": Connection.Direction.CALLS_US}
    )
    return connection


def _chunks(rows: Iterator[Row], limit: int | None) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    damaged = None
    try:
        for row in islice(rows, limit):
            chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk = []
    except tabular.UnreadableTable as error:
        damaged = error
    if chunk:
        yield chunk
    if damaged:
        raise damaged


def _kept(problems: Sequence[Problem], outcome: Outcome) -> list[dict[str, Any]]:
    """The problems as the run keeps them, unless it has its fill."""
    if outcome.totals["refused"] >= runs.PROBLEMS_KEPT:
        return []
    return [
        {"row": problem.row, "state": "refused", "field": problem.field, "reason": problem.message}
        for problem in problems
    ]
