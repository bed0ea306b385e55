"""Taking in a file with several processes on PostgreSQL: what comes of it is what comes of it with one.

The command reads the file and deals its rows out, as they stand there; a worker reads, checks and stores them, a part
in one transaction, on a connection of its own. All rows of one customer are dealt to the same worker, which takes them
in their order. What became of the rows is told in the order of the file.

A worker tells what it did, and the number of its transaction, before it commits. When it is killed, the database is
asked whether that transaction was committed; if not, another one takes its place and the part. So no row is lost or
taken twice.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any
from uuid import UUID

from django.db import connection as database
from django.db import transaction
from django.utils import timezone

from connectors.models import Connection, CustomerLink
from connectors.sync import importing, runs
from connectors.sync.importing import Import, Taken, kept
from connectors.sync.process import begin
from connectors.sync.races import start_over
from customers.editing import Actor
from customers.models import Customer, Organization
from customers.tabular import Line, Problem, Reader, UnreadableTable

logger = logging.getLogger(__name__)

# A part that has ended so many workers ends the import.
MOST_DEATHS = 2
# So many deals are dealt out and not done: a worker that is ahead of the others need not wait for them.
DEALS_AHEAD = 2
# So long may a transaction take to end whose worker is gone.
ENDS_WITHIN_SECONDS = 60
# Of more customers than these that have several ids it is not kept which they are, and one worker takes all rows.
TWOFOLD_KEPT = 50_000


class Failed(Exception):
    """A worker could not take its part in; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the workers of one import have in common. Without a run it is a dry run, and nothing is stored."""

    organization: int
    connection: int | None
    run: int | None
    actor: Actor
    clear_empty: bool
    reader: Reader


# What a worker says before it commits: the number of its transaction, and what that comes to.
_Told = tuple[str, Counter[str], list[Problem]]


def work(pipe: Pipe[Any, Any]) -> None:
    """What a worker does: take in one part after the other until there is no command any more."""
    with suppress(EOFError, OSError):
        job: Job = pipe.recv()
        organization = Organization.objects.get(pk=job.organization)
        connection = Connection.objects.get(pk=job.connection) if job.connection else None
        take = Import(
            organization=organization, connection=connection, actor=job.actor, clear_empty=job.clear_empty
        ).take
        while True:
            lines: Sequence[Line] = pipe.recv()
            try:
                _take(job, take, lines, pipe)
                pipe.send(None)
            except Exception as error:
                among = f"Rows among {lines[0][0]} to {lines[-1][0]} were not taken in."
                logger.exception(among)
                pipe.send(f"{among} {type(error).__name__}: {error}")


def _take(
    job: Job,
    take: Callable[[Sequence[Any]], tuple[Counter[str], list[Problem]]],
    lines: Sequence[Line],
    pipe: Pipe[Any, Any],
) -> None:
    def store() -> None:
        totals, problems = take([*map(job.reader.row, lines)])
        number = ""
        if job.run is None:
            transaction.set_rollback(True)
        else:
            runs.add(run_id=job.run, totals=totals, problems=kept(problems, refused=0), at=timezone.now())
            with database.cursor() as cursor:
                cursor.execute("SELECT pg_current_xact_id()::text")
                [number] = cursor.fetchone()
        told: _Told = number, totals, problems
        pipe.send(told)

    # Others may edit the same customers meanwhile; in a dry run another worker may have them, too.
    start_over(store)


def take_in(chunks: Iterator[list[Line]], *, job: Job, workers: int, stop: Callable[[], bool]) -> Generator[Taken]:
    """Take in all chunks and say what became of their rows; when told to stop, of those that were dealt out.

    Raises UnreadableTable after the rows before the damage, and Failed when the others have ended what they were at.
    """
    crew = _Crew(job, workers)
    try:
        yield from crew.run(chunks, stop)
    finally:
        crew.end()


class _Worker:
    """One process, the part that it is at, and those that come next."""

    def __init__(self, job: Job) -> None:
        # Not a fork: it would share this process's connection to the database.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = f"{__name__}.{work.__name__}", theirs, database.settings_dict["NAME"]
        self.process = context.Process(target=begin, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.part: _Part | None = None
        self.next: deque[_Part] = deque()
        self.told: _Told | None = None
        self._send(job)

    def give(self, part: _Part) -> None:
        self.part, self.told = part, None
        self._send(part.lines)

    def _send(self, message: Any) -> None:
        # One that is dead is found out where it is heard.
        with suppress(OSError):
            self.pipe.send(message)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


@dataclass(kw_only=True, eq=False)
class _Part:
    """Lines of one deal that one worker takes in together. `deaths` counts the workers that were killed at it."""

    deal: _Deal
    lines: list[Line]
    deaths: int = 0


@dataclass(kw_only=True, eq=False)
class _Deal:
    """Lines that follow each other in the file, and are dealt out in parts. `left` counts those that are not done.

    Of a row with an id and one with an external id alone only the database knows whether they mean the same customer:
    a deal with the former (`by_id`) and one with the latter (`by_external_id`) are not under way together.
    """

    last: int
    parts: list[tuple[int, list[Line]]] = field(default_factory=list)  # and which worker's each is
    by_id: bool = False
    by_external_id: bool = False
    left: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def mixes_with(self, other: _Deal) -> bool:
        return (self.by_id and other.by_external_id) or (self.by_external_id and other.by_id)

    def taken(self) -> Taken:
        problems = sorted(self.problems, key=lambda problem: problem.row)
        return Taken(totals=self.totals, problems=problems, last=self.last)


class _Crew:
    """The workers of one import, and the deals that they are at."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job = job
        # All at once: each takes a while to begin.
        self.workers = [_Worker(job) for _ in range(workers)]
        self.deals: deque[_Deal] = deque()
        self.twofold = _twofold(job)
        self.damage: UnreadableTable | None = None
        self.failed = ""

    def run(self, chunks: Iterator[list[Line]], stop: Callable[[], bool]) -> Iterator[Taken]:
        deals = self._deals(chunks)
        ahead: _Deal | None = None
        while True:
            while len(self.deals) < DEALS_AHEAD and not (stop() or self.failed):
                ahead = ahead or next(deals, None)
                if ahead is None or any(ahead.mixes_with(other) for other in self.deals):
                    break
                self._deal_out(ahead)
                ahead = None
            busy = {id(worker.pipe): worker for worker in self.workers if worker.part is not None}
            for pipe in wait([worker.pipe for worker in busy.values()]) if busy else ():
                self._hear(busy[id(pipe)])
            while self.deals and not self.deals[0].left:
                yield self.deals.popleft().taken()
            if not busy:
                break
        if self.failed:
            yield from (deal.taken() for deal in self.deals)
            raise Failed(self.failed)
        if self.damage is not None and not stop():
            raise self.damage

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _deals(self, chunks: Iterator[list[Line]]) -> Iterator[_Deal]:
        lines: list[Line] = []
        try:
            for chunk in chunks:
                lines += chunk
                if len(lines) >= importing.CHUNK_ROWS * len(self.workers):
                    yield self._deal(lines)
                    lines = []
        except UnreadableTable as error:
            self.damage = error
        if lines:
            yield self._deal(lines)

    def _deal(self, lines: list[Line]) -> _Deal:
        """The lines, dealt to the workers so that those of one customer fall to one of them."""
        deal = _Deal(last=lines[-1][0])
        if self.job.run is None:
            # A dry run is rolled back part by part: none sees another.
            size = importing.CHUNK_ROWS
            parts = [lines[start : start + size] for start in range(0, len(lines), size)]
            deal.parts = [(place % len(self.workers), part) for place, part in enumerate(parts)]
            return deal
        named = [self.job.reader.named(line) for line in lines]
        deal.by_id = any(id_ for id_, _ in named)
        deal.by_external_id = any(there and not id_ for id_, there in named)
        hands: list[list[Line]] = [[] for _ in self.workers]
        twofold, mixed = self.twofold, deal.by_id and deal.by_external_id
        for line, (id_, there) in zip(lines, named, strict=True):
            key = id_ or there or line[0]
            together = twofold is None or mixed or key in twofold
            hand = 0 if together else hash(key) % len(hands)
            hands[hand].append(line)
        # A hand is not much larger than a chunk, also where one worker gets all of them.
        size = importing.CHUNK_ROWS * 5 // 4
        deal.parts = [
            (place, hand[start : start + size])
            for place, hand in enumerate(hands)
            for start in range(0, len(hand), size)
        ]
        return deal

    def _deal_out(self, deal: _Deal) -> None:
        self.deals.append(deal)
        deal.left = len(deal.parts)
        for place, lines in deal.parts:
            self.workers[place].next.append(_Part(deal=deal, lines=lines))
        deal.parts = []
        for worker in self.workers:
            self._go_on(worker)

    def _go_on(self, worker: _Worker) -> None:
        if worker.part is None and worker.next and not self.failed:
            worker.give(worker.next.popleft())

    def _hear(self, worker: _Worker) -> None:
        """Take in what a worker has to say of its part, or that it is gone."""
        part = worker.part
        assert part is not None
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            worker = self._replace(worker)
            if worker.told is None or not (self.job.run is None or _is_committed(worker.told[0])):
                self._again(worker, part)
                return
            said = None
        if said is None:
            assert worker.told is not None
            _, totals, problems = worker.told
            part.deal.totals.update(totals)
            part.deal.problems += problems
            part.deal.left -= 1
        elif isinstance(said, str):
            self.failed = self.failed or said
        else:
            worker.told = said
            return
        worker.part = worker.told = None
        self._go_on(worker)

    def _replace(self, dead: _Worker) -> _Worker:
        """Another worker in the place of one that was killed: at the same part, and having told the same of it."""
        dead.end()
        worker = _Worker(self.job)
        worker.part, worker.told, worker.next = dead.part, dead.told, dead.next
        self.workers[self.workers.index(dead)] = worker
        return worker

    def _again(self, worker: _Worker, part: _Part) -> None:
        """Have a part taken in that the worker before was killed at."""
        part.deaths += 1
        if part.deaths < MOST_DEATHS:
            worker.give(part)
            return
        worker.part = None
        among = f"Rows among {part.lines[0][0]} to {part.lines[-1][0]} were not taken in."
        self.failed = self.failed or f"{among} {MOST_DEATHS} processes were killed at them."


def _twofold(job: Job) -> frozenset[UUID | str] | None:
    """The ids and external ids of customers that have several; None when there are very many."""
    merged = Customer.objects.filter(organization=job.organization, merged_into__isnull=False)
    links = CustomerLink.objects.filter(connection=job.connection)
    doubled = links.filter(customer__in=links.filter(is_duplicate=True).values("customer"))
    ids = chain.from_iterable(merged.values_list("id", "merged_into")[:TWOFOLD_KEPT])
    there = doubled.values_list("remote_id", flat=True)[:TWOFOLD_KEPT]
    found = frozenset(islice((key for key in chain(ids, there) if key), TWOFOLD_KEPT))
    return found if len(found) < TWOFOLD_KEPT else None


def _is_committed(number: str) -> bool:
    """Whether this transaction, which nobody can go on with any more, was committed."""
    until = time.monotonic() + ENDS_WITHIN_SECONDS
    while True:
        with database.cursor() as cursor:
            cursor.execute("SELECT pg_xact_status(%s::xid8)", [number])
            [state] = cursor.fetchone()
        if state != "in progress":
            return bool(state == "committed")
        if time.monotonic() > until:
            raise Failed(f"The transaction {number} of a process that was killed does not end. Look for it there.")
        time.sleep(0.05)
