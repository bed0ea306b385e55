"""One, two and four worker processes on one database, and one provider that counts what reaches it.

    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.workers [--size small] [--rounds 3]

Links of eight connections are due. Measured are the links that arrive in a second, the workers' CPU time for each,
calls beyond one per link (work done twice), how many backends wait for locks, and deadlocks; on SQLite, with one and
two workers, whether a worker was told that the database is locked.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report
from tests.benchmarks.provider import running
from tests.benchmarks.push import Bench, needs_of, worker_process

LATENCY = 0.05
CONNECTIONS = 8
LINKS = {"smoke": 4, "small": 250, "full": 2_500}  # of each connection
LOCKED = "database is locked"


def main() -> None:
    chosen = options(description=__doc__).parse_args()
    with ExitStack() as stack:
        folder = own_database(stack, ALLOWED_PRIVATE_NETWORKS="127.0.0.0/8", ALLOW_HTTP_TARGETS="true")
        from django.db import connection as database

        measured = Workers(Bench(stack.enter_context(running(latency=LATENCY))), folder, links=LINKS[chosen.size])
        numbers = (1, 2, 4) if database.vendor == "postgresql" else (1, 2)
        if chosen.size == "smoke":
            numbers = (1, 2)
        sides = {f"{number} workers": partial(measured.rate, number) for number in numbers}
        kept = in_turn(sides, rounds=chosen.rounds or 3)
        report(figures(kept, measured, database.vendor))


class Workers:
    """What is pushed in turn by some workers, and what was seen of it."""

    def __init__(self, bench: Bench, folder: Path, *, links: int) -> None:
        self.bench = bench
        self.log = folder / "workers.log"
        self.links = links
        self.records = 0
        self.calls = 0
        self.waiting: list[int] = []
        self.cpu: dict[int, list[float]] = {}

    def rate(self, number: int) -> float:
        """Links per second from the moment when they are due."""
        made = [self.bench.connection(links=self.links, state="paused") for _ in range(CONNECTIONS)]
        accounts = [one.account for one in made]
        with ExitStack() as stack:
            log = stack.enter_context(self.log.open("ab"))
            workers = [stack.enter_context(worker_process(log=log)) for _ in range(number)]
            before = sum(needs_of(one).cpu for one in workers)
            stack.enter_context(watched(self.waiting))
            began = self.bench.begin()
            while not self.bench.have(accounts, self.links):
                time.sleep(0.05)
            counted = self.bench.provider.counted()
            took = max(counted[account]["last"] for account in accounts) - began
            spent = sum(needs_of(one).cpu for one in workers) - before
        counted = self.bench.provider.counted()  # the workers have ended
        self.cpu.setdefault(number, []).append(1000 * spent / (CONNECTIONS * self.links))
        self.calls += sum(counted[account]["sent"] for account in accounts)
        self.records += sum(counted[account]["records"] for account in accounts)
        return CONNECTIONS * self.links / took


@contextmanager
def watched(seen: list[int]) -> Iterator[None]:
    """Looks every now and then how many backends of this database wait for a lock."""
    from django.db import connection as database

    done = threading.Event()

    def watch() -> None:
        with database.cursor() as cursor:
            while not done.wait(0.02):
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock'"
                )
                seen.append(cursor.fetchone()[0])
        database.close()

    if database.vendor != "postgresql":
        yield
        return
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def figures(kept: dict[str, list[float]], measured: Workers, vendor: str) -> list[Figure]:
    one = kept["1 workers"]
    found = [
        Figure(
            goal="G8",
            what=f"{name}, to one",
            hub=statistics.median(rates),
            yardstick=statistics.median(one),
            unit="/s",
            ratio=ratio(rates, one),
        )
        for name, rates in kept.items()
        if rates is not one
    ]
    found += [
        Figure(
            goal="G8",
            what=f"CPU of a push by {number} workers, to one",
            hub=statistics.median(spent),
            yardstick=statistics.median(measured.cpu[1]),
            unit="ms",
            ratio=ratio(spent, measured.cpu[1]),
        )
        for number, spent in measured.cpu.items()
        if number > 1
    ]
    found.append(whole("links that took one call, to the calls", measured.records, measured.calls))
    if vendor == "postgresql":
        free = sum(waiting == 0 for waiting in measured.waiting)
        found.append(
            whole("looks at which nobody waited for a lock, to all", free, len(measured.waiting), at_least=0.9)
        )
        committed, ended = transactions()
        found.append(whole("transactions that no deadlock ended, to all", committed, committed + ended))
    else:
        told = sum(LOCKED in line for line in measured.log.read_text(errors="replace").splitlines())
        found.append(whole(f'calls without "{LOCKED}" in a log', measured.calls - told, measured.calls, goal="G10"))
    return found


def whole(what: str, number: int, of: int, *, at_least: float = 1.0, goal: str = "G8") -> Figure:
    return Figure(goal=goal, what=what, hub=number, yardstick=of, unit="", ratio=number / of, at_least=at_least)


def transactions() -> tuple[int, int]:
    """Those that were committed in this database, and those that a deadlock ended."""
    from django.db import connection as database

    with database.cursor() as cursor:
        cursor.execute("SELECT xact_commit, deadlocks FROM pg_stat_database WHERE datname = current_database()")
        found: tuple[int, int] = cursor.fetchone()
    return found


if __name__ == "__main__":
    main()
