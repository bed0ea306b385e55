"""Read customers from connected systems and merge them."""

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
    command_actor,
    problems_of,
    totals_of,
)
from connectors.models import Connection
from connectors.providers import PROVIDERS
from connectors.sync.pull import pull as pull_pages


def unfit_to_pull(connection: Connection) -> str:
    if connection.provider not in PROVIDERS:
        return f"{connection.name} speaks {connection.provider!r}, which is no API that the hub calls."
    if not connection.pulls:
        return f"Nothing is read from {connection.name}: its direction is {connection.get_direction_display()!r}."
    provider = PROVIDERS[connection.provider]
    if not provider.capabilities(connection).lists:
        return f"Nothing is read from {connection.name}: {provider.label} documents no way to list customers."
    return ""


def pull(command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]) -> None:
    """Read and merge what is new there, and count. Raises what ends it early; what was counted before stays."""
    provider = PROVIDERS[connection.provider]
    with Progress(command, f"{connection.name} pull", options["limit"] or 0) as progress:

        def show(totals: Mapping[str, int]) -> None:
            outcome.totals = Counter(totals)
            progress.update(sum(totals.values()), totals)

        run = pull_pages(
            connection=connection,
            provider=provider,
            session=provider.session(connection),
            actor=command_actor("pull_customers"),
            since=options["since"],
            limit=options["limit"],
            dry_run=options["dry_run"],
            stop=stop,
            progress=show,
        )
    outcome.run = run.public_id
    outcome.totals = totals_of(run)
    outcome.problems = problems_of(run)


class Command(ConnectionCommand):
    help = "Read customers from connected systems. An edit made here is kept; what moved there is taken over."
    examples = """\
  manage.py pull_customers books --dry-run   what would be taken over
  manage.py pull_customers books --since 2h  what changed there, where its API can tell
  manage.py pull_customers --all             everything that is new, going on where the last pull stopped"""
    stop_text = "Finishing this page. The next pull goes on there. Press Ctrl-C again to stop at once."

    def unfit(self, connection: Connection) -> str:
        return unfit_to_pull(connection)

    def operations(self, connection: Connection) -> list[Operation]:
        return [Operation("pull", pull)]
