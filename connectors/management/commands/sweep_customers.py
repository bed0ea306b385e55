"""Look for lost creates, second records and records of nobody in connected systems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from connectors.management.cli import (
    ConnectionCommand,
    HubCommand,
    Operation,
    Outcome,
    Progress,
    Stop,
    WrongUse,
    command_actor,
    problems_of,
    totals_of,
)
from connectors.models import Connection
from connectors.providers import PROVIDERS
from connectors.sync import sweep as sweeping


def sweep(
    command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]
) -> None:
    """Read every record there and count. Raises what ends it early; what was found before stays."""
    provider = PROVIDERS[connection.provider]
    with Progress(command, f"{connection.name} sweep", options["limit"] or 0) as progress:

        def show(totals: Mapping[str, int]) -> None:
            outcome.totals = Counter(totals)
            progress.update(sum(totals.values()), totals)

        run = sweeping.sweep(
            connection=connection,
            provider=provider,
            session=provider.session(connection),
            actor=command_actor("sweep_customers"),
            limit=options["limit"],
            dry_run=options["dry_run"],
            stop=stop,
            progress=show,
        )
    outcome.run = run.public_id
    outcome.totals = totals_of(run)
    outcome.problems = problems_of(run)


class Command(ConnectionCommand):
    help = """\
Look through all records of connected systems for those that the hub made: a create whose answer was lost is linked to
its record; a second record of one customer, and one that no customer is linked to, is reported. Nothing is deleted."""
    examples = """\
  manage.py sweep_customers books --dry-run   what would be linked and reported
  manage.py sweep_customers --all             every system whose records carry the hub's marker"""
    stop_text = "Finishing this page. The next sweep begins anew. Press Ctrl-C again to stop at once."

    def handle(self, *args: Any, **options: Any) -> None:
        if options["since"]:
            raise WrongUse("A sweep reads the whole list: leave out --since.")
        super().handle(*args, **options)

    def unfit(self, connection: Connection) -> str:
        if connection.provider not in PROVIDERS:
            return f"{connection.name} speaks {connection.provider!r}, which is no API that the hub calls."
        return sweeping.unfit(connection=connection, provider=PROVIDERS[connection.provider])

    def operations(self, connection: Connection) -> list[Operation]:
        return [Operation("sweep", sweep)]
