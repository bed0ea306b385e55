"""Take customers in from a CSV or XLSX file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.db import connection as database
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
from connectors.models import Connection, SyncRun
from connectors.sync import import_workers, runs
from connectors.sync.import_workers import Failed, Job
from connectors.sync.importing import FILE_NAME, Import, Taken, chunks, file_connection, take_in
from customers import tabular
from customers.editing import Actor
from customers.models import Organization
from customers.tabular import Problem

ERRORS_SHOWN = 20


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
        parser.add_argument("--workers", type=positive, default=1, metavar="N", help="Use N processes (PostgreSQL).")
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print JSON, described below.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["workers"] > 1 and database.vendor != "postgresql":
            raise WrongUse("SQLite lets one process write at a time: leave --workers out, or use PostgreSQL.")
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
        dry_run = options["dry_run"]
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
                request={"file": options["file"].name, "limit": options["limit"]},
            )
            outcome.run = run.public_id
        taken = self._taken(table, run, connection, actor, stop, organization, options)
        ended = "The hub failed."
        last = 0
        try:
            with Progress(self, "import", table.size) as progress, closing(taken):
                for part in taken:
                    outcome.totals.update(part.totals)
                    outcome.problems.update(("refused", problem.field, problem.message) for problem in part.problems)
                    tell(part.problems)
                    progress.update(table.done(), outcome.totals)
                    last = part.last
            ended = f"Stopped by hand after row {last}." if stop() else ""
        except Failed as error:
            ended = str(error)
            outcome.fail(Exit.FAILED, ended)
        except tabular.UnreadableTable as error:
            ended = f"{error} The rows before were {'checked' if dry_run else 'taken in'}."
            outcome.fail(Exit.FAILED, ended)
        finally:
            if run is not None:
                runs.finish(run=run, at=timezone.now(), error=ended)
        if ended and stop():
            self.say(ended)

    def _taken(
        self,
        table: tabular.Table,
        run: SyncRun | None,
        connection: Connection | None,
        actor: Actor,
        stop: Callable[[], bool],
        organization: Organization,
        options: dict[str, Any],
    ) -> Generator[Taken]:
        """What becomes of the rows, chunk by chunk, with as many processes as are asked for."""
        limit, clear_empty = options["limit"], options["clear_empty"]
        if options["workers"] == 1:
            work = Import(organization=organization, connection=connection, actor=actor, clear_empty=clear_empty)
            return take_in(chunks(table.rows, limit), work=work, run=run, stop=stop)
        job = Job(
            organization=organization.pk,
            connection=connection.pk if connection else None,
            run=run.pk if run else None,
            actor=actor,
            clear_empty=clear_empty,
            reader=table.reader,
        )
        return import_workers.take_in(chunks(table.lines, limit), job=job, workers=options["workers"], stop=stop)

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
