"""What the commands share: flags, choosing connections, stopping, progress, reports and exit codes.

Data goes to stdout, messages and progress to stderr.
"""

from __future__ import annotations

import argparse
import getpass
import logging
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import orjson
import rich.progress
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime
from rich.console import Console

from connectors.exceptions import ConnectionUnusable, ConnectorError, Rejected
from connectors.models import Connection, SyncRun
from connectors.sealing import UnsealError
from connectors.states import STATUSES
from connectors.sync.pull import AlreadyRunning
from customers.editing import Actor
from customers.models import CustomerChange, Organization

logger = logging.getLogger(__name__)

PLAIN_PROGRESS_SECONDS = 10.0
NAMES_SHOWN = 20


class Exit(IntEnum):
    """What a command ends with. Of several, the one that `worst` picks."""

    DONE = 0
    FAILED = 1
    WRONG_USE = 2
    ATTENTION = 3
    RUNNING = 4
    UNUSABLE = 5
    STOPPED = 130


EXIT_CODES = """exit codes:
  0 all done    1 failed    2 wrong use    3 finished, some rows need attention
  4 already running    5 connection unusable (login, network)    130 stopped by the user"""
JSON_REPORT = """--json prints one object per connection and operation:
  {"connection", "organization", "operation", "dry_run", "run", "planned",
   "totals": {"created", "updated", "unchanged", "refused", "retrying", "uncertain", "skipped"},
   "problems": [{"state", "field", "reason", "count"}], "samples": [text], "error", "exit_code"}
and at the end {"connections", "planned", "totals", "exit_code"}. The totals add up to planned."""
BY_SEVERITY = (Exit.DONE, Exit.ATTENTION, Exit.RUNNING, Exit.UNUSABLE, Exit.FAILED, Exit.WRONG_USE, Exit.STOPPED)
UNTIDY = ("refused", "retrying", "uncertain")


def worst(codes: Iterable[Exit]) -> Exit:
    return max(codes, key=BY_SEVERITY.index, default=Exit.DONE)


class WrongUse(CommandError):
    """The command line asks for something that cannot be; the message names the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(message, returncode=Exit.WRONG_USE)


class _HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Django's order of options, and the line breaks of the text."""


class HubCommand(BaseCommand):
    """A command whose help begins with examples, and that speaks to people on stderr alone."""

    examples = ""
    epilog = EXIT_CODES

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        parser = super().create_parser(prog_name, subcommand, **kwargs)
        parser.formatter_class = _HelpFormatter
        parser.description = f"{self.help}\n\nexamples:\n{self.examples}" if self.examples else self.help
        parser.epilog = self.epilog
        return parser

    def say(self, text: str) -> None:
        self.stderr.write(text, style_func=str)

    def complain(self, text: str) -> None:
        self.stderr.write(text)

    def end(self, code: Exit) -> None:
        """Leave with this code; 0 returns."""
        if code is not Exit.DONE:
            raise SystemExit(int(code))


def command_actor(name: str) -> Actor:
    """The author of what a command changes: its name, and who is logged in on this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        user = ""
    return Actor(kind=CustomerChange.Actor.COMMAND, name=name, id=user)


def positive(text: str) -> int:
    """An argument type: a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")
    return number


def moment(text: str) -> datetime:
    """An argument type: an ISO 8601 time or date, or how long ago, such as 2h or 1d."""
    if match := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[match[2]]
        return timezone.now() - timedelta(**{unit: int(match[1])})
    try:
        day = parse_date(text)
        at = datetime(day.year, day.month, day.day) if day else parse_datetime(text)
    except ValueError:
        at = None
    if at is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time (2026-01-31T12:00Z), nor a date (2026-01-31), nor how long ago (2h, 1d)."
        )
    return timezone.make_aware(at) if timezone.is_naive(at) else at


def find_organization(slug: str) -> Organization:
    """Raises WrongUse, naming the organizations there are."""
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        raise WrongUse(f"There is no organization {slug!r}. {_known('organizations', Organization, 'slug')}")
    return organization


def _known(what: str, model: Any, column: str, **scope: Any) -> str:
    rows = model.objects.filter(**scope).order_by(column).values_list(column, flat=True).distinct()
    names = list(rows[: NAMES_SHOWN + 1])
    if not names:
        return f"There are no {what} yet."
    more = " …" if len(names) > NAMES_SHOWN else ""
    return f"Known {what}: {', '.join(names[:NAMES_SHOWN])}{more}."


def find_connections(names: Sequence[str], *, every: bool, slug: str | None) -> list[Connection]:
    """The named connections, or every one. All names that are unknown or ambiguous are told at once, as WrongUse."""
    if bool(names) == every:
        raise WrongUse("Name connections, or give --all (not both).")
    scope = {"organization": find_organization(slug)} if slug else {}
    rows = Connection.objects.filter(**scope).select_related("organization").order_by("organization__slug", "name")
    if every:
        return list(rows)
    found: dict[str, list[Connection]] = {name: [] for name in names}
    for connection in rows.filter(name__in=names):
        found[connection.name].append(connection)
    wrong = [f"There is no connection {name!r}." for name, matches in found.items() if not matches]
    unknown = bool(wrong)
    for name, matches in found.items():
        if len(matches) > 1:
            slugs = ", ".join(match.organization.slug for match in matches)
            wrong.append(f"{name!r} is a connection of {slugs}: add --organization.")
    if unknown:
        wrong.append(_known("connections", Connection, "name", **scope))
    if wrong:
        raise WrongUse(" ".join(wrong))
    return [matches[0] for matches in found.values()]


class Stop:
    """Calling it tells whether the user asked to stop. `wait` sleeps until then, at most so many seconds."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        self._asked.set()

    def wait(self, seconds: float) -> bool:
        return self._asked.wait(seconds)


@contextmanager
def stopping(tell: Callable[[str], None], text: str) -> Iterator[Stop]:
    """Turn the first Ctrl-C, SIGTERM or closed terminal into a question that the work asks itself; the second ends it
    at once.
    """
    stop = Stop()

    def asked(number: int, frame: FrameType | None) -> None:
        if stop():
            raise KeyboardInterrupt
        stop.ask()
        tell(text)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal; elsewhere one line every ten seconds. Always on stderr.

    `total` is 0 where it is not known.
    """

    def __init__(self, command: HubCommand, label: str, total: int = 0) -> None:
        self.command = command
        self.label = label
        self.total = total
        self.told = time.monotonic()
        self.bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self.command.stderr.isatty():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[counts]}"),
                rich.progress.TimeRemainingColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self.bar.add_task(self.label, total=self.total or None, counts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, counts: Mapping[str, int] | str) -> None:
        words = counts if isinstance(counts, str) else "  ".join(f"{name} {n:,}" for name, n in counts.items() if n)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, counts=words)
        elif time.monotonic() - self.told >= PLAIN_PROGRESS_SECONDS:
            self.told = time.monotonic()
            of = f" {min(done / self.total, 1):.0%}" if self.total else ""
            self.command.say(f"{self.label}:{of} {words}")


@dataclass(kw_only=True)
class Outcome:
    """What one operation did, or with `dry_run` would do. The totals add up to `planned`."""

    label: str
    organization: str
    operation: str
    dry_run: bool = False
    run: str = ""
    totals: Counter[str] = field(default_factory=Counter)
    problems: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    error: str = ""
    code: Exit = Exit.DONE

    @property
    def planned(self) -> int:
        return sum(self.totals[name] for name in SyncRun.TOTALS)

    def fail(self, code: Exit, error: str) -> None:
        self.code, self.error = worst((self.code, code)), error

    def as_json(self) -> str:
        return orjson.dumps(
            {
                "connection": self.label,
                "organization": self.organization,
                "operation": self.operation,
                "dry_run": self.dry_run,
                "run": self.run,
                "planned": self.planned,
                "totals": {name: self.totals[name] for name in SyncRun.TOTALS},
                "problems": [
                    {"state": state, "field": name, "reason": reason, "count": count}
                    for (state, name, reason), count in self.problems.most_common()
                ],
                "samples": self.samples,
                "error": self.error,
                "exit_code": int(self.code),
            }
        ).decode()


def problems_of(run: SyncRun) -> Counter[tuple[str, str, str]]:
    """The reasons that a run keeps, as (state, field, reason) with how many records each concerns."""
    grouped: Counter[tuple[str, str, str]] = Counter()
    for problem in run.problems:
        state = problem.get("state") or ("conflict" if "customer" in problem else "refused")
        # What was written on either side differs in each record, and belongs on no screen but the record's.
        reason = "Changed on both sides." if state == "conflict" else problem.get("reason", "")
        grouped[state, problem.get("field", ""), reason] += 1
    return grouped


def totals_of(run: SyncRun) -> Counter[str]:
    return Counter({name: getattr(run, name) for name in SyncRun.TOTALS})


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as lines of one table, with reasons and samples below."""
    dry = any(outcome.dry_run for outcome in outcomes)
    rows = [[("would be" if dry else ""), *SyncRun.TOTALS, "total"]]
    rows += [
        [
            " ".join(dict.fromkeys((outcome.label, outcome.operation))),
            *(f"{outcome.totals[name]:,}" for name in SyncRun.TOTALS),
            f"{outcome.planned:,}",
        ]
        for outcome in outcomes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    for outcome in outcomes:
        before = f"{outcome.label}: " if len(outcomes) > 1 else ""
        for (state, name, reason), count in outcome.problems.most_common(10):
            word = STATUSES[state].word if state in STATUSES else state
            lines.append(f"{before}{word}: {count:,} x {f'{name}: ' if name else ''}{reason}")
        lines += [f"{before}{sample}" for sample in outcome.samples]
    return "\n".join(lines)


def report(command: HubCommand, outcomes: Sequence[Outcome], *, as_json: bool, stopped: bool) -> None:
    """Print what was done and leave with the worst code."""
    code = worst([*(outcome.code for outcome in outcomes), Exit.STOPPED if stopped else Exit.DONE])
    if as_json:
        for outcome in outcomes:
            command.stdout.write(outcome.as_json())
        totals = sum((outcome.totals for outcome in outcomes), Counter[str]())
        final = {
            "connections": len({(outcome.organization, outcome.label) for outcome in outcomes}),
            "planned": sum(outcome.planned for outcome in outcomes),
            "totals": {name: totals[name] for name in SyncRun.TOTALS},
            "exit_code": int(code),
        }
        command.stdout.write(orjson.dumps(final).decode())
    elif outcomes:
        command.stdout.write(table(outcomes))
    command.end(code)


class ConnectionCommand(HubCommand):
    """A command that works on connections one after the other. Each is tried, whatever becomes of the others."""

    epilog = f"{JSON_REPORT}\n\n{EXIT_CODES}"
    stop_text = "Finishing the calls already sent. Press Ctrl-C again to stop at once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("names", nargs="*", metavar="CONNECTION", help="Names of connections.")
        parser.add_argument("--all", action="store_true", dest="every", help="Every connection that can do this.")
        parser.add_argument("--organization", metavar="SLUG", help="Names are unique in one organization only.")
        parser.add_argument("--since", type=moment, help="Only what changed since a time or date, or 2h or 1d ago.")
        parser.add_argument("--limit", type=positive, metavar="N", help="At most so many customers.")
        parser.add_argument("--dry-run", action="store_true", help="Tell what would be done; send and store nothing.")
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print JSON, described below.")

    def handle(self, *args: Any, **options: Any) -> None:
        connections = find_connections(options["names"], every=options["every"], slug=options["organization"])
        if options["every"]:
            connections = [connection for connection in connections if not self.unfit(connection)]
            if not connections:
                self.say("No connection can do this.")
        elif reasons := [reason for connection in connections if (reason := self.unfit(connection))]:
            raise WrongUse(" ".join(reasons))
        outcomes: list[Outcome] = []
        with stopping(self.say, self.stop_text) as stop:
            for connection in connections:
                if options["every"] and connection.state == Connection.State.PAUSED:
                    self.say(f"{connection.name} is paused and left out.")
                    continue
                for operation in self.operations(connection):
                    if stop():
                        break
                    outcomes.append(self._work(operation, connection, stop, options))
        report(self, outcomes, as_json=options["as_json"], stopped=stop())

    def _work(self, operation: Operation, connection: Connection, stop: Stop, options: Mapping[str, Any]) -> Outcome:
        outcome = Outcome(
            label=connection.name,
            organization=connection.organization.slug,
            operation=operation.name,
            dry_run=options["dry_run"],
        )
        try:
            if connection.state != Connection.State.ACTIVE:
                reason = connection.state_reason or "See the connection in the admin."
                raise ConnectionUnusable(f"{connection.get_state_display()}: {reason}")
            operation.work(self, connection, outcome, stop, options)
        except AlreadyRunning as error:
            outcome.fail(Exit.RUNNING, str(error))
        except UnsealError as error:
            outcome.fail(Exit.UNUSABLE, str(error))
        except Rejected as error:
            outcome.fail(Exit.FAILED, error.message)
        except ConnectorError as error:
            outcome.fail(Exit.UNUSABLE, error.message)
        except Exception as error:  # the other connections have nothing to do with it
            logger.exception("%s at connection %s failed", operation.name, connection.pk)
            outcome.fail(Exit.FAILED, f"The hub failed: {type(error).__name__}.")
        if any(outcome.totals[name] for name in UNTIDY):
            outcome.code = worst((outcome.code, Exit.ATTENTION))
        if outcome.error:
            self.complain(f"{outcome.label}: {outcome.error}")
        return outcome

    def unfit(self, connection: Connection) -> str:
        """Why this connection can never do what the command does; "" when it can."""
        raise NotImplementedError

    def operations(self, connection: Connection) -> Sequence[Operation]:
        """What is done at this connection, in order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Operation:
    """A named piece of work on one connection. It fills in the outcome, also before it raises."""

    name: str
    work: Callable[[HubCommand, Connection, Outcome, Stop, Mapping[str, Any]], None]
