"""What the benchmarks share: a database of their own, sides that are measured in turn, and a table of ratios.

Each benchmark is a module with `main()` and the options of `options()`; `python -m tests.benchmarks` runs them all.
Only ratios within one run are worth quoting: every figure is put beside a yardstick that did the same work, on the same
data, in interleaved rounds of the same run, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

Told = TypeVar("Told")
# `smoke` shows that a benchmark runs, `small` is a laptop's minute, `full` what the goals are stated for.
SIZES = ("smoke", "small", "full")
# Where the figures of one benchmark go when several run one after the other.
RESULTS = "BENCHMARK_RESULTS"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The hub beside one yardstick: `ratio` is to be at least, or at most, `aim`. Without an aim it is for looking at.

    `hub` and `yardstick` are in `unit`; they depend on the machine and on what else it does.
    """

    goal: str
    what: str
    hub: float
    yardstick: float
    unit: str
    ratio: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def aim(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""

    @property
    def reached(self) -> str:
        if self.at_least is not None:
            return "yes" if self.ratio >= self.at_least else "no"
        if self.at_most is not None:
            return "yes" if self.ratio <= self.at_most else "no"
        return ""


def options(**more: str) -> argparse.ArgumentParser:
    """The command line of a benchmark; its module's docstring is the help."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **more)  # type: ignore[arg-type]  # only texts are passed on
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, help="How often each side is measured.")
    return parser


def own_database(stack: ExitStack, *, keep: bool = False, **environment: str) -> Path:
    """A new database, migrated, and Django set up for it; returns a folder that goes with it when `stack` closes.

    A file of SQLite, or with DATABASE_URL a new database on that server; with `keep` the very one that DATABASE_URL
    names, which stays. `environment` is set before Django reads it.
    """
    # Whoever ends a benchmark early leaves no database behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hub-benchmark-")))
    url = os.environ.get("DATABASE_URL", "")
    if keep:
        assert url, "--keep needs DATABASE_URL: the database that is kept"
    elif url:
        import psycopg

        name = f"hub_bench_{os.getpid()}"
        server = stack.enter_context(psycopg.connect(url, autocommit=True))
        server.execute(f"CREATE DATABASE {name}")
        stack.callback(server.execute, f"DROP DATABASE {name} WITH (FORCE)")
        os.environ["DATABASE_URL"] = f"{url.rpartition('/')[0]}/{name}"
    else:
        os.environ["DATABASE_URL"] = f"sqlite:///{folder / 'hub.sqlite3'}"
    os.environ["DJANGO_SETTINGS_MODULE"] = "hub.settings"
    os.environ["HUB_DATA"] = str(folder)
    os.environ.update(environment)
    import django
    from django.core.management import call_command
    from django.db import connections

    django.setup()
    call_command("migrate", verbosity=0)
    stack.callback(connections.close_all)
    return folder


def timed(do: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def in_turn(sides: Mapping[str, Callable[[], Told]], *, rounds: int, warm: int = 0) -> dict[str, list[Told]]:
    """What each side says of itself (a rate, or seconds), measured in turn, round after round."""
    kept: dict[str, list[Told]] = {name: [] for name in sides}
    for turn in range(warm + rounds):
        for name, measure in sides.items():
            value = measure()
            if turn >= warm:
                kept[name].append(value)
    return kept


def ratio(hub: Sequence[float], other: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(ours / theirs for ours, theirs in zip(hub, other, strict=True))


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text."""
    rows = [("goal", "what", "hub", "yardstick", "", "ratio", "aim", "reached")]
    rows += [
        (f.goal, f.what, f"{f.hub:,.4g}", f"{f.yardstick:,.4g}", f.unit, f"{f.ratio:.3g}", f.aim, f.reached)
        for f in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (2, 3, 5)
    lines = [
        "  ".join(
            cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def report(figures: Sequence[Figure]) -> None:
    """Print the table, and hand the figures on where several benchmarks run."""
    sys.stdout.write(table(figures))
    if path := os.environ.get(RESULTS):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(figure)) + "\n" for figure in figures)
