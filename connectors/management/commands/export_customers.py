"""Write customers to a CSV or XLSX file that import_customers reads back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from django.core.management.base import CommandError, CommandParser

from connectors.management.cli import (
    EXIT_CODES,
    Exit,
    HubCommand,
    Progress,
    WrongUse,
    find_connections,
    find_organization,
    moment,
    positive,
    stopping,
)
from connectors.sync.exporting import custom_names, external_ids, pages
from customers import tabular
from customers.models import Customer

Writer = tabular.CsvWriter | tabular.XlsxWriter


class Command(HubCommand):
    help = "Write customers to a file. Importing it again changes nothing."
    examples = """\
  manage.py export_customers --organization demo > customers.csv
  manage.py export_customers --organization demo --output customers.xlsx
  manage.py export_customers --organization demo --connection books --since 1d --output changed.csv"""
    epilog = f"""Cells that a spreadsheet would calculate (= + - @ first, so every +49… phone) get an apostrophe, which
the import takes away. --raw writes them as they are: for machines only, never to be opened as a spreadsheet.

--json prints {{"organization", "output", "format", "raw", "columns", "rows", "exit_code"}}; it needs --output FILE.

{EXIT_CODES}"""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--organization", required=True, metavar="SLUG")
        parser.add_argument("--output", default="-", metavar="FILE", help="Where to; - is stdout, the default.")
        parser.add_argument("--format", choices=tabular.FORMATS, help="Else what the name of the file says, else csv.")
        parser.add_argument("--connection", metavar="NAME", help="Add external_id, the customer's id in that system.")
        parser.add_argument("--since", type=moment, help="Only what changed since a time or date, or 2h or 1d ago.")
        parser.add_argument("--limit", type=positive, metavar="N", help="At most so many customers.")
        parser.add_argument("--include-archived", action="store_true", help="Archived customers, too.")
        parser.add_argument("--raw", action="store_true", help="Without protection against formulas; see below.")
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print JSON, described below.")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = find_organization(options["organization"])
        named = options["connection"]
        connection = find_connections([named], every=False, slug=organization.slug)[0] if named else None
        output = options["output"]
        kind = options["format"] or ("xlsx" if output.lower().endswith(".xlsx") else "csv")
        if options["as_json"] and output == "-":
            raise WrongUse("With --json the customers need an --output FILE of their own.")
        if options["raw"]:
            self.say("Without protection against formulas (--raw): do not open this as a spreadsheet.")
        customers = Customer.objects.filter(organization=organization, merged_into=None)
        if not options["include_archived"]:
            customers = customers.filter(archived_at=None)
        if options["since"]:
            customers = customers.filter(updated_at__gte=options["since"])
        rows = 0
        with stopping(self.say, "Stopping. Press Ctrl-C again to stop at once.") as stop:
            columns = tabular.columns_for(
                custom=custom_names(customers, options["limit"]), external_id=connection is not None
            )
            with self._writer(output, kind) as writer, Progress(self, "export", options["limit"] or 0) as progress:
                writer.write(columns)
                for page in pages(customers, options["limit"]):
                    ids = external_ids(page, connection)
                    for customer in page:
                        cells = tabular.cells_of(
                            customer, columns, external_id=ids.get(customer.pk, ""), raw=options["raw"]
                        )
                        try:
                            writer.write(cells)
                        except ValueError as error:
                            raise CommandError(f"{customer.public_id}: {error}", returncode=Exit.FAILED) from error
                    rows += len(page)
                    progress.update(rows, f"{rows:,} rows")
                    if stop():
                        # Leaves the writer with an error, so that no file pretends to hold everything.
                        raise CommandError("Stopped; nothing more was written.", returncode=Exit.STOPPED)
        if options["as_json"]:
            summary = {
                "organization": organization.slug,
                "output": output,
                "format": kind,
                "raw": options["raw"],
                "columns": columns,
                "rows": rows,
                "exit_code": int(Exit.DONE),
            }
            self.stdout.write(orjson.dumps(summary).decode())
        else:
            self.say(f"{rows:,} customers written{'' if output == '-' else f' to {output}'}.")

    @contextmanager
    def _writer(self, output: str, kind: str) -> Iterator[Writer]:
        """Rows to stdout, or to a file that appears under its name when it is complete."""
        if output == "-":
            binary = getattr(getattr(self.stdout, "_out", None), "buffer", None)
            writer: Writer
            if kind == "csv":
                writer = tabular.CsvWriter(_Stdout(self))
            elif binary is None or self.stdout.isatty():
                raise WrongUse("XLSX is not for a screen: give --output FILE.")
            else:
                writer = tabular.XlsxWriter(binary)
            yield writer
            writer.close()
            return
        path = Path(output)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            file = part.open("w", encoding="utf-8", newline="") if kind == "csv" else part.open("wb")
        except OSError as error:
            raise WrongUse(f"{output} cannot be written: {error.strerror}.") from error
        try:
            with file:
                writer = tabular.CsvWriter(file) if kind == "csv" else tabular.XlsxWriter(file)  # type: ignore[arg-type] # opened to suit
                try:
                    yield writer
                    writer.close()
                except BaseException:
                    writer.discard()
                    raise
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class _Stdout:
    """The command's stdout as csv wants a file: what is written is not given line ends of its own."""

    def __init__(self, command: HubCommand) -> None:
        self.command = command

    def write(self, text: str) -> None:
        self.command.stdout.write(text, ending="")
