"""Compare customers with what connected systems hold, and change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from django.core.management.base import CommandParser

from connectors.exceptions import Rejected
from connectors.management.cli import (
    ConnectionCommand,
    Exit,
    HubCommand,
    Operation,
    Outcome,
    Progress,
    Stop,
    WrongUse,
    worst,
)
from connectors.models import Connection
from connectors.providers import PROVIDERS
from connectors.sync.check import Finding, Sample
from connectors.sync.check import check as compare
from customers.ids import parse_public_id
from customers.models import Customer

# The column of the table that a finding is counted in: what a push, or a pull, would make of it.
COLUMNS = {
    Finding.CREATE: "created",
    Finding.UPDATE: "updated",
    Finding.CHANGED_THERE: "updated",
    Finding.SAME: "unchanged",
    Finding.REFUSED: "refused",
    Finding.GONE: "refused",
    Finding.CONFLICT: "uncertain",
    Finding.WAITING: "uncertain",
    Finding.UNKNOWN: "skipped",
}
REASONS = {
    Finding.UPDATE: "Changed here.",
    Finding.CREATE: "Not there yet.",
    Finding.CHANGED_THERE: "Changed there.",
    Finding.GONE: "It is not there any more.",
    Finding.CONFLICT: "Changed on both sides.",
    Finding.WAITING: "It is being sent, or waits for somebody: retry_customers --list tells.",
    Finding.UNKNOWN: "No customer is linked to the record.",
}


def check(
    command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]
) -> None:
    """Compare, and count. Raises what ends it early; what was found before stays."""
    provider = PROVIDERS[connection.provider]
    chosen = None
    if options["customer"] is not None:
        chosen = [options["customer"]]
        if not Customer.objects.filter(
            pk=options["customer"], organization_id=connection.organization_id, archived_at=None, merged_into=None
        ).exists():
            raise Rejected(f"{connection.organization.slug} has no such customer, or it is archived or merged.")
    outcome.dry_run = True
    with Progress(command, f"{connection.name} check", options["limit"] or 0) as progress:

        def show(counts: Mapping[Finding, int]) -> None:
            outcome.totals = _totals(counts)
            progress.update(sum(counts.values()), {str(finding): number for finding, number in counts.items()})

        found = compare(
            connection=connection,
            provider=provider,
            session=provider.session(connection),
            customer_ids=chosen,
            since=options["since"],
            limit=options["limit"],
            stop=stop,
            progress=show,
        )
    outcome.totals = _totals(found.counts)
    for finding in Finding:
        if finding in REASONS and found.counts[finding]:
            outcome.problems[str(finding), "", REASONS[finding]] = found.counts[finding]
        outcome.samples += [_words(finding, sample) for sample in found.samples.get(finding, ())]
    for (name, reason), number in found.refusals.items():
        outcome.problems[str(Finding.REFUSED), name, reason] = number
    if found.note:
        command.say(f"{connection.name}: {found.note}")
    if not found.complete:
        outcome.code = worst((outcome.code, Exit.STOPPED))


def _totals(counts: Mapping[Finding, int]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for finding, number in counts.items():
        totals[COLUMNS[finding]] += number
    return totals


def _words(finding: Finding, sample: Sample) -> str:
    who = f"{sample.customer.name} ({sample.customer.public_id})" if sample.customer else ""
    where = f"record {sample.remote_id}" if sample.remote_id else ""
    fields = ", ".join(f"{name} {here!r} here, {there!r} there" for name, (here, there) in sample.fields.items())
    return f"{finding}: {', '.join(filter(None, (who, where)))}" + (f": {fields or sample.reason}").rstrip(": ")


def _customer(text: str) -> Any:
    if (found := parse_public_id("cust", text)) is None:
        raise WrongUse(f"{text!r} is not the id of a customer, such as cust_01ABC….")
    return found


class Command(ConnectionCommand):
    help = """\
Compare customers with what connected systems hold: what a push would create or change, what was changed there, is in
conflict, is gone, or is linked to nobody. Nothing is sent and nothing is stored."""
    examples = """\
  manage.py check_customers books                            everything
  manage.py check_customers books --customer cust_01ABC…     one customer
  manage.py check_customers --all --limit 100 --json         a hundred customers in each system, for a script"""
    stop_text = "Ending the comparison. Press Ctrl-C again to stop at once."

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--customer", metavar="ID", help="Only this customer.")

    def handle(self, *args: Any, **options: Any) -> None:
        options["customer"] = _customer(options["customer"]) if options["customer"] else None
        super().handle(*args, **options)

    def unfit(self, connection: Connection) -> str:
        if connection.provider not in PROVIDERS:
            return f"{connection.name} speaks {connection.provider!r}, which is no API that the hub calls."
        if connection.calls_us:
            return f"{connection.name} cannot be compared: its direction is {connection.get_direction_display()!r}."
        return ""

    def operations(self, connection: Connection) -> list[Operation]:
        return [Operation("check", check)]
