"""What waits for somebody in connected systems: list it by reason, or try it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from django.core.management.base import CommandParser
from django.db import transaction
from django.db.models import Count, F, Q, QuerySet, Window
from django.db.models.functions import RowNumber
from django.utils import timezone

from connectors.management.cli import (
    ConnectionCommand,
    Exit,
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
from connectors.management.commands.push_customers import add_wait, unfit_to_push, until_ended, would_be
from connectors.models import Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import PARKED, STATUSES, LinkState
from connectors.sync import runs
from connectors.sync.resolve import RELEASED, WrongState, create_again, recreate, releasable, release, start_run
from customers.ids import public_id

SAMPLES = 5
ROWS = 500
GONE = LinkState.REMOTE_DELETED
STATES = {
    "rejected": LinkState.REJECTED,
    "conflict": LinkState.CONFLICT,
    "uncertain": LinkState.UNCERTAIN,
    "gone": GONE,
}
COLUMNS = {LinkState.REJECTED: "refused", GONE: "refused"}
DANGERS = {
    "uncertain": "Their creates may have arrived: sending them again may make a second record of each customer."
    " Look for them there first, or run sweep_customers. Add --yes to create them again.",
    "gone": "Somebody deleted these records there. Add --yes to create them again.",
}


def parked(connection: Connection, options: Mapping[str, Any], states: Sequence[str]) -> QuerySet[CustomerLink]:
    """The links in these states that wait for a person, of those that the flags choose."""
    links = CustomerLink.objects.filter(connection=connection, is_duplicate=False, state__in=states)
    # A lost create that is still looked for waits for nobody, nor does what somebody left deleted.
    links = links.exclude(state=LinkState.UNCERTAIN, next_attempt_at__isnull=False)
    links = links.exclude(deleted_at__isnull=False, tombstone__has_key="unlinked")
    if options["reason"]:
        links = links.filter(error__icontains=options["reason"])
    if options["since"]:
        links = links.filter(updated_at__gte=options["since"])
    if options["run"]:
        links = links.filter(Q(run=options["run"]) | Q(customer__in=_customers_of(options["run"])))
    if options["limit"]:
        links = links.filter(pk__in=links.order_by("pk").values("pk")[: options["limit"]])
    return links


def _customers_of(run: SyncRun) -> list[str]:
    return [problem["customer"] for problem in run.problems if problem.get("customer")]


def show(command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]) -> None:
    """Count what waits by reason, with five customers of each."""
    links = parked(connection, options, [STATES[options["state"]]] if options["state"] else PARKED)
    reasons = ("state", "error_field", "error")
    for state, name, error, number in links.order_by().values_list(*reasons).annotate(n=Count("pk")):
        outcome.problems[state, name, error or _sentence(state)] += number
        outcome.totals[COLUMNS.get(LinkState(state), "uncertain")] += number
    place = Window(RowNumber(), partition_by=[F(column) for column in reasons], order_by="pk")
    first = links.annotate(place=place).filter(place__lte=SAMPLES).order_by(*reasons, "pk")
    samples: dict[tuple[str, str, str], list[str]] = {}
    for state, name, error, customer in first.values_list(*reasons, "customer"):
        samples.setdefault((state, name, error or _sentence(state)), []).append(public_id("cust", customer))
    for (state, name, reason), _ in outcome.problems.most_common():
        ids = samples.get((state, name, reason), [])
        outcome.samples.append(f"{STATUSES[state].word}: {f'{name}: ' if name else ''}{reason} {', '.join(ids)}")


def _sentence(state: str) -> str:
    return f"{STATUSES[state].word}."


def retry(
    command: HubCommand, connection: Connection, outcome: Outcome, stop: Stop, options: Mapping[str, Any]
) -> None:
    """Release what the flags choose, send it, and follow it to its outcome. Raises what ends it early."""
    provider = PROVIDERS[connection.provider]
    session = provider.session(connection)
    now = timezone.now()
    states = [STATES[options["state"]]] if options["state"] else RELEASED
    links = parked(connection, options, states)
    by_hand = options["state"] in DANGERS
    if not by_hand:
        links = releasable(links, at=now)
    if options["dry_run"]:
        _preview(connection, links, by_hand, outcome, stop)
        return
    run = _each_by_hand(connection, links, stop, options) if by_hand else _released(connection, links)
    if run is None:
        return
    outcome.run = run.public_id
    try:
        with Progress(command, f"{connection.name} retry", run.planned) as progress:
            until_ended(run, connection, provider, session, stop, progress, {**options, "limit": None})
    finally:
        run.refresh_from_db()
        outcome.totals = totals_of(run)
        outcome.problems = problems_of(run)
        if run.finished_at is None:
            left = max(run.planned - run.total, 0)
            outcome.totals["skipped"] += left
            outcome.code = Exit.ATTENTION
            command.say(f"{connection.name}: {left:,} are still to be sent, by a worker or by push_customers.")


def _released(connection: Connection, links: QuerySet[CustomerLink]) -> SyncRun | None:
    try:
        return release(connection=connection, links=links, actor=command_actor("retry_customers"))
    except WrongState:
        return None  # nothing waits


def _each_by_hand(
    connection: Connection, links: QuerySet[CustomerLink], stop: Stop, options: Mapping[str, Any]
) -> SyncRun | None:
    """Decide for each of these links what a person would decide one by one."""
    decide = recreate if options["state"] == "gone" else create_again
    ids = list(links.order_by("pk").values_list("pk", flat=True))
    if not ids:
        return None
    now = timezone.now()
    actor = command_actor("retry_customers")
    run = start_run(connection=connection, actor=actor, decision=decide.__name__, planned=len(ids), at=now)
    left, problems = len(ids), []
    for first in range(0, len(ids), ROWS):
        for link in CustomerLink.objects.filter(pk__in=ids[first : first + ROWS]).order_by("pk"):
            if stop():
                break
            try:
                decide(link=link, actor=actor, run=run)
                left -= 1
            except WrongState as error:
                problems.append(
                    {"customer": str(link.customer_id), "state": "skipped", "field": "", "reason": str(error)}
                )
    with transaction.atomic():
        runs.add(run_id=run.pk, totals={"skipped": left}, problems=problems[: runs.PROBLEMS_KEPT], at=timezone.now())
    runs.close_done(run_ids={run.pk}, at=timezone.now())
    run.refresh_from_db()
    return run


def _preview(
    connection: Connection, links: QuerySet[CustomerLink], by_hand: bool, outcome: Outcome, stop: Stop
) -> None:
    """Count what trying again would come to, from the links and documents alone."""
    shown: Counter[str] = Counter()
    for link in links.select_related("customer").order_by("pk").iterator(ROWS):
        if stop():
            break
        link.state = LinkState.OPEN
        result, sample = would_be(
            link.customer, None if by_hand else link, connection, PROVIDERS[connection.provider], outcome
        )
        outcome.totals[result] += 1
        if sample and shown[result] < SAMPLES:
            shown[result] += 1
            outcome.samples.append(sample)


class Command(ConnectionCommand):
    help = """\
Try again what connected systems refused, what is in conflict and what kept failing, as if for the first time. With
--list, only tell what waits for somebody, and why."""
    examples = """\
  manage.py retry_customers books --list                        what waits, by reason
  manage.py retry_customers books --reason "VAT number"         what was refused for this reason
  manage.py retry_customers --all --run abcdefgh12345678        what one run left
  manage.py retry_customers books --state gone --yes            create again what was deleted there"""

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        add_wait(parser)
        parser.add_argument("--state", choices=sorted(STATES), help="Only what waits so.")
        parser.add_argument("--run", metavar="RUN", help="Only what needed attention in this run.")
        parser.add_argument("--reason", metavar="TEXT", help="Only where the reason contains this.")
        parser.add_argument("--list", action="store_true", dest="listing", help="Tell what waits, and do nothing.")
        parser.add_argument("--yes", action="store_true", help="Create again what may be there, or was deleted there.")

    def handle(self, *args: Any, **options: Any) -> None:
        harmless = options["listing"] or options["dry_run"] or options["yes"]
        if options["state"] in DANGERS and not harmless:
            raise WrongUse(DANGERS[options["state"]])
        if options["run"]:
            run = SyncRun.objects.filter(public_id=options["run"]).first()
            if run is None:
                raise WrongUse(f"There is no run {options['run']!r}.")
            if len(run.problems) >= runs.PROBLEMS_KEPT:
                self.say(f"Of run {run.public_id} only the first {runs.PROBLEMS_KEPT} problems are kept.")
            options["run"] = run
        super().handle(*args, **options)

    def unfit(self, connection: Connection) -> str:
        return unfit_to_push(connection)

    def operations(self, connection: Connection) -> list[Operation]:
        return [Operation("retry", retry)]

    def _work(self, operation: Operation, connection: Connection, stop: Stop, options: Mapping[str, Any]) -> Outcome:
        if options["listing"]:
            operation = Operation("list", show)
        return super()._work(operation, connection, stop, options)
