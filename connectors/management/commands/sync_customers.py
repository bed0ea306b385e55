"""Read from connected systems, then send to them."""

from __future__ import annotations

from django.core.management.base import CommandParser

from connectors.management.cli import ConnectionCommand, Operation
from connectors.management.commands.pull_customers import pull, unfit_to_pull
from connectors.management.commands.push_customers import add_wait, push, unfit_to_push
from connectors.models import Connection


class Command(ConnectionCommand):
    help = "Read customers from connected systems, then send customers to them; each as far as a connection does it."
    examples = """\
  manage.py sync_customers books --dry-run
  manage.py sync_customers --all --organization demo"""

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        add_wait(parser)

    def unfit(self, connection: Connection) -> str:
        return unfit_to_push(connection) if unfit_to_pull(connection) else ""

    def operations(self, connection: Connection) -> list[Operation]:
        return [
            *([] if unfit_to_pull(connection) else [Operation("pull", pull)]),
            *([] if unfit_to_push(connection) else [Operation("push", push)]),
        ]
