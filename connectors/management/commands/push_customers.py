"""Send customers to connected systems and follow each to its outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from django.core.management.base import CommandParser
from django.db.models import Max, Min
from django.utils import timezone

from connectors.exceptions import ConnectionUnusable
from connectors.management.cli import (
    ConnectionCommand,
    Exit,
    HubCommand,
    Operation,
    Outcome,
    Progress,
    Stop,
    command_actor,
    problems_of,
    totals_of,
)
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.forecast import expected
from connectors.sync.push import push as push_due
from connectors.sync.request import request
from customers.models import Customer

PAGE_ROWS = 500
SAMPLES = 5
# How often to look whether a worker that holds the links has brought their outcome.
LOOK_SECONDS = 0.5


def unfit_to_push(connection: Connection) -> str:
    if connection.provider not in PROVIDERS:
        return f"{connection.name} speaks {connection.provider!r}, which is no API that the hub calls."
    if not connection.pushes:
        return f"Nothing is sent to {connection.name}: its direction is {connection.get_direction_display()!r}."
    return ""


def push(command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]) -> None:
    """Ask for the customers to be there, send until each has an outcome, and count. Raises what ends it early."""
    provider = PROVIDERS[connection.provider]
    session = provider.session(connection)
    if options["dry_run"]:
        _preview(command, connection, provider, outcome, stop, options)
        return
    run = request(
        connection=connection,
        actor=command_actor("push_customers"),
        since=options["since"],
        limit=options["limit"],
    )
    outcome.run = run.public_id
    try:
        with Progress(command, f"{connection.name} push", run.planned) as progress:
            until_ended(run, connection, provider, session, stop, progress, options)
    finally:
        run.refresh_from_db()
        outcome.totals = totals_of(run)
        outcome.problems = problems_of(run)
        if run.finished_at is None:
            left = max(run.planned - run.total, 0)
            retrying = min(CustomerLink.objects.filter(run=run, state=LinkState.RETRYING).count(), left)
            outcome.totals.update(retrying=retrying, skipped=left - retrying)
            outcome.code = Exit.ATTENTION
            command.say(f"{connection.name}: {left:,} are still to be sent, by a worker or by this command again.")


def until_ended(
    run: SyncRun,
    connection: Connection,
    provider: Provider,
    session: Session,
    stop: Stop,
    progress: Progress,
    options: Mapping[str, Any],
) -> None:
    """Send until the run has ended, or what is left cannot be sent within the time to wait."""
    waited, before = 0.0, run.total
    while not stop() and run.finished_at is None:
        for ids in _parts(run, options["limit"]):
            base = run.total

            def show(totals: Mapping[str, int], base: int = base) -> None:
                settled = sum(n for name, n in totals.items() if name not in ("retrying", "skipped"))
                progress.update(base + settled, totals)

            push_due(
                connection=connection, provider=provider, session=session, customer_ids=ids, stop=stop, progress=show
            )
        run.refresh_from_db()
        connection.refresh_from_db(fields=["state", "state_reason", "not_before"])
        if connection.state != Connection.State.ACTIVE:
            raise ConnectionUnusable(f"{connection.get_state_display()}: {connection.state_reason}")
        if run.total > before:
            waited, before = 0.0, run.total
        pause = _pause(run, connection)
        waited += pause or 0.0
        if run.finished_at or pause is None or waited > options["wait"]:
            return
        stop.wait(pause)


def _parts(run: SyncRun, limit: int | None) -> Iterator[list[Any] | None]:
    """The customers to send, in parts; None for all that are due: without a limit nothing is left out."""
    if limit is None:
        yield None
        return
    ids = list(CustomerLink.objects.filter(run=run).order_by("pk").values_list("customer_id", flat=True))
    for first in range(0, len(ids), PAGE_ROWS):
        yield ids[first : first + PAGE_ROWS]


def _pause(run: SyncRun, connection: Connection) -> float | None:
    """Seconds until there is something to do for this run; None when nothing is left to wait for."""
    now = timezone.now()
    links = CustomerLink.objects.filter(run=run)
    waiting = links.aggregate(due=Min("next_attempt_at"), held=Max("lease_until"))
    times = [time for time in (waiting["due"], connection.not_before) if time is not None]
    if waiting["due"] is None:
        return None
    if waiting["held"] is not None and waiting["held"] > now:
        return LOOK_SECONDS
    return max((max(times) - now).total_seconds(), LOOK_SECONDS)


def _preview(
    command: HubCommand,
    connection: Connection,
    provider: Provider,
    outcome: Outcome,
    stop: Stop,
    options: Mapping[str, Any],
) -> None:
    """Count what `push` would come to, from the links and documents alone."""
    shown: Counter[str] = Counter()
    with Progress(command, f"{connection.name} dry run", options["limit"] or 0) as progress:
        for customer, link in _candidates(connection, since=options["since"], limit=options["limit"]):
            if stop():
                break
            result, sample = would_be(customer, link, connection, provider, outcome)
            outcome.totals[result] += 1
            if sample and shown[result] < SAMPLES:
                shown[result] += 1
                outcome.samples.append(sample)
            progress.update(outcome.totals.total(), outcome.totals)


def _candidates(
    connection: Connection, *, since: datetime | None, limit: int | None
) -> Iterator[tuple[Customer, CustomerLink | None]]:
    """The customers that `request` would ask for, each with its link, page by page."""
    customers = Customer.objects.filter(
        organization_id=connection.organization_id, archived_at=None, merged_into=None
    ).order_by("pk")
    if since is not None:
        customers = customers.filter(updated_at__gte=since)
    left = limit
    page = list(customers[: min(PAGE_ROWS, left or PAGE_ROWS)])
    while page:
        links = {
            link.customer_id: link
            for link in CustomerLink.objects.filter(connection=connection, customer__in=page, is_duplicate=False)
        }
        for customer in page:
            link = links.get(customer.pk)
            if link is None or link.deleted_at is None:
                yield customer, link
        if left is not None:
            left -= len(page)
            if left <= 0:
                return
        page = list(customers.filter(pk__gt=page[-1].pk)[: min(PAGE_ROWS, left or PAGE_ROWS)])


def would_be(
    customer: Customer, link: CustomerLink | None, connection: Connection, provider: Provider, outcome: Outcome
) -> tuple[str, str]:
    """The outcome that this customer would have, and a line that shows it."""
    one = expected(customer, link, connection, provider)
    if one.error is not None:
        outcome.problems["refused", one.error.field, one.error.message] += 1
    if one.outcome == "created":
        return one.outcome, f"would create {customer.name}"
    if one.outcome == "updated" and link is not None:
        steps = ", ".join(f"{name} {link.base_local.get(name)!r} -> {new!r}" for name, (_, new) in one.fields.items())
        return one.outcome, f"would update {customer.name}: {steps}"
    return one.outcome, ""


class Command(ConnectionCommand):
    help = "Send customers to connected systems, creating there what is missing."
    examples = """\
  manage.py push_customers books --dry-run        what would be sent
  manage.py push_customers books crm --since 1d   what changed since yesterday
  manage.py push_customers --all --json           everything, for a script"""

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        add_wait(parser)

    def unfit(self, connection: Connection) -> str:
        return unfit_to_push(connection)

    def operations(self, connection: Connection) -> list[Operation]:
        return [Operation("push", push)]


def add_wait(parser: CommandParser) -> None:
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="How long to wait for records that are to be tried again (default %(default)s).",
    )
