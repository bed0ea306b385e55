"""Pushing to a system that answers in 50 ms: claim, call and stored result, through a worker.

    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.push [--size small] [--rounds 3]

The ideal is the calls under way divided by the time of one. Beside the hub, in the same rounds, bare clients send the
same documents to the same system and keep nothing: aiohttp where it is installed, and asyncio's sockets, which are the
limit. CPU time counts where the machine is busy; the hub's is told apart into calls and keeping. Then batches, the
database connections of a worker whose calls are all waiting, and fair shares: how long many small connections of
several organizations take beside some with a backlog, and without them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch
from uuid import uuid4

import httpx2
import orjson

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report
from tests.benchmarks.provider import Provider, running

LATENCY = 0.05
DOCUMENT = {
    "name": "Jürgen Größmann",
    "email": "juergen@example.com",
    "phone": "+493012345678",
    "address_line1": "Hauptstraße 7",
    "address_city": "Berlin",
    "address_postal_code": "10115",
    "notify_email": True,
}
BATCH = 50
WORKER_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """`cycles` of calls for each side; `small` connections with a link each, and in `organizations` a `backlog`."""

    at_once: tuple[int, ...]
    cycles: int
    small: int
    organizations: int
    backlog: int


SIZES = {
    "smoke": Size(at_once=(4,), cycles=5, small=10, organizations=2, backlog=20),
    "small": Size(at_once=(8, 50, 200), cycles=8, small=200, organizations=4, backlog=500),
    "full": Size(at_once=(8, 50, 200), cycles=50, small=1_000, organizations=10, backlog=5_000),
}


def main() -> None:
    chosen = options(description=__doc__).parse_args()
    size = SIZES[chosen.size]
    with ExitStack() as stack:
        own_database(stack, ALLOWED_PRIVATE_NETWORKS="127.0.0.0/8", ALLOW_HTTP_TARGETS="true")
        provider = stack.enter_context(running(latency=LATENCY))
        bench = Bench(provider)
        figures = bench.rates(size, rounds=chosen.rounds or 3)
        figures += bench.batches(size, rounds=chosen.rounds or 3)
        figures += bench.waiting()
        figures += bench.fairness(size)
        report(figures)


class Bench:
    """An organization whose connections all lead to accounts of one provider."""

    def __init__(self, provider: Provider) -> None:
        from customers.editing import Actor
        from customers.models import Organization
        from tests.fake import register

        register()
        self.provider = provider
        self.organizations = [Organization.objects.create(name="Demo", slug="demo")]
        self.staff = Actor(kind="command", name="benchmark")
        self.names = (f"account{n}" for n in itertools.count())
        self.ids: dict[Any, list[Any]] = {}

    def organization(self, number: int) -> Any:
        from customers.models import Organization

        while len(self.organizations) <= number:
            name = f"demo{len(self.organizations)}"
            self.organizations.append(Organization.objects.create(name=name, slug=name))
        return self.organizations[number]

    def customers(self, number: int, *, organization: Any) -> list[Any]:
        """The ids of so many customers; those that are there are taken again."""
        from customers import editing

        ids = self.ids.setdefault(organization.pk, [])
        while len(ids) < number:
            values = [{**DOCUMENT, "email": f"{uuid4()}@example.com"} for _ in range(min(2000, number - len(ids)))]
            made = editing.create(organization=organization, values=values, actor=self.staff)
            ids += [one.pk for one in made]
        return ids[:number]

    def connection(
        self, *, links: int, url: str = "", state: str = "active", owner: int = 0, **capabilities: Any
    ) -> Any:
        """A connection of an organization, the first one or another, to which so many customers are due."""
        from connectors.models import Connection
        from connectors.sync.request import request

        name = next(self.names)
        organization = self.organization(owner)
        made = Connection.objects.create(
            organization=organization,
            provider="fake",
            name=name,
            account=name,
            direction=Connection.Direction.PUSH,
            state=state,
            base_url=url or self.provider.address(name),
            options={"capabilities": {"upsert_external_id": True, **capabilities}},
        )
        request(connection=made, actor=self.staff, customer_ids=self.customers(links, organization=organization))
        return made

    def work(self, *, at_once: int, threads: int = 1) -> Spent:
        """Let a worker do all that is due."""
        from django.conf import settings

        from connectors.guard import close_shared_client
        from connectors.outbound import Session
        from connectors.worker import Worker

        calls: list[float] = []
        send = Session.send

        def timed(*given: Any, **more: Any) -> Any:
            began = time.thread_time()
            try:
                return send(*given, **more)
            finally:
                calls.append(time.thread_time() - began)

        close_shared_client()
        settings.PUSH_CONCURRENT_CALLS = at_once
        worker = Worker(threads=threads, idle=0.05)
        with patch.object(Session, "send", timed):
            began, cpu = time.perf_counter(), time.process_time()
            worker.run(once=True)
            return Spent(
                seconds=time.perf_counter() - began, cpu=time.process_time() - cpu, calls=sum(calls), memory=memory()
            )

    # Rates

    def rates(self, size: Size, *, rounds: int) -> list[Figure]:
        figures: list[Figure] = []
        alone = self.rate(at_once=1, links=20)
        memory_of: dict[int, float] = {}
        for at_once in size.at_once:
            ideal = at_once / LATENCY
            links = max(at_once, 25) * size.cycles
            spent: list[Spent] = []
            cpu: dict[str, list[float]] = {"asyncio's sockets": []}
            sides: dict[str, Callable[[], float]] = {
                "hub": partial(self.rate, at_once=at_once, links=links, spent=spent),
                "asyncio's sockets": partial(
                    self.bare, _sockets, at_once=at_once, calls=links, cpu=cpu["asyncio's sockets"]
                ),
            }
            if importlib.util.find_spec("aiohttp"):
                cpu["aiohttp"] = []
                sides["aiohttp"] = partial(self.bare, _aiohttp, at_once=at_once, calls=links, cpu=cpu["aiohttp"])
            else:
                sys.stdout.write("aiohttp is not installed: uv sync --group benchmarks\n")
            kept = in_turn(sides, rounds=rounds)
            hub = statistics.median(kept["hub"])
            aims = {50: 0.9, 200: 0.6}
            what = f"{at_once} under way"
            figures.append(
                Figure(
                    goal="G8",
                    what=f"push, {what}, to the ideal",
                    hub=hub,
                    yardstick=ideal,
                    unit="/s",
                    ratio=hub / ideal,
                    at_least=aims.get(at_once),
                )
            )
            figures += [
                Figure(
                    goal="G8",
                    what=f"push, {what}, to {name}",
                    hub=hub,
                    yardstick=statistics.median(kept[name]),
                    unit="/s",
                    ratio=ratio(kept["hub"], kept[name]),
                )
                for name in cpu
            ]
            name, bare = next(reversed(cpu.items()))
            calls = [1000 * one.calls / links for one in spent]
            keeping = [1000 * (one.cpu - one.calls) / links for one in spent]
            figures += [
                Figure(
                    goal="G8",
                    what=f"CPU of the {part} of a push, {what}, to all of one by {name}",
                    hub=statistics.median(hubs),
                    yardstick=statistics.median(bare),
                    unit="ms",
                    ratio=ratio(hubs, bare),
                )
                for part, hubs in (("call", calls), ("keeping", keeping))
            ]
            memory_of[at_once] = spent[-1].memory
        most, fewest = max(size.at_once), min(size.at_once)
        figures.append(
            Figure(
                goal="G8",
                what=f"memory of this process after {most} under way, to {fewest}",
                hub=memory_of[most],
                yardstick=memory_of[fewest],
                unit="MB",
                ratio=memory_of[most] / memory_of[fewest],
            )
        )
        figures.append(
            Figure(
                goal="G8",
                what=f"push, {most} under way, to one after the other",
                hub=hub,
                yardstick=alone,
                unit="/s",
                ratio=hub / alone,
                at_least=50 if most >= 50 else None,
            )
        )
        return figures

    def rate(self, *, at_once: int, links: int, spent: list[Spent] | None = None) -> float:
        self.connection(links=links)
        took = self.work(at_once=at_once)
        if spent is not None:
            spent.append(took)
        return links / took.seconds

    def bare(self, send: Callable[..., Any], *, at_once: int, calls: int, cpu: list[float]) -> float:
        began, spent = time.perf_counter(), time.process_time()
        asyncio.run(send(self.provider.address(next(self.names)), at_once=at_once, calls=calls))
        cpu.append(1000 * (time.process_time() - spent) / calls)
        return calls / (time.perf_counter() - began)

    def batches(self, size: Size, *, rounds: int) -> list[Figure]:
        links = 2 * BATCH * size.cycles

        def rate(**offers: Any) -> float:
            self.connection(links=links, **offers)
            return links / self.work(at_once=8).seconds

        kept = in_turn({"one by one": rate, "batches": partial(rate, batch=BATCH)}, rounds=rounds)
        return [
            Figure(
                goal="G8",
                what=f"push in batches of {BATCH}, 8 under way, to one by one",
                hub=statistics.median(kept["batches"]),
                yardstick=statistics.median(kept["one by one"]),
                unit="/s",
                ratio=ratio(kept["batches"], kept["one by one"]),
            )
        ]

    # The database

    def waiting(self) -> list[Figure]:
        """The database connections that a worker holds while all its calls wait, on PostgreSQL."""
        from django.db import connection as database

        if database.vendor != "postgresql":
            return []
        threads, at_once = 4, 8
        with running(latency=2.0) as slow:
            for number in range(threads):
                self.connection(links=at_once, url=slow.address(f"slow{number}"))
            worker = threading.Thread(target=partial(self.work, at_once=at_once, threads=threads))
            worker.start()
            while len(slow.counted()) < threads or any(c["requests"] < at_once for c in slow.counted().values()):
                time.sleep(0.05)
            time.sleep(0.5)
            pool = database.pool
            out = pool.get_stats()["pool_size"] - pool.get_stats()["pool_available"]
            with database.cursor() as cursor:
                mine = 1  # this thread's own
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND state LIKE 'idle in transaction%'"
                )
                open_transactions = cursor.fetchone()[0]
            worker.join()
        calls = threads * at_once
        return [
            Figure(
                goal="G8",
                what=f"calls that wait without {name}, to all",
                hub=calls - held,
                yardstick=calls,
                unit="",
                ratio=(calls - held) / calls,
                at_least=1.0,
            )
            for name, held in (("a database connection", out - mine), ("an open transaction", open_transactions))
        ]

    # Fair shares

    def fairness(self, size: Size) -> list[Figure]:
        """How long the small connections take beside big ones, and by themselves; and what the worker needs for it."""
        seconds: dict[str, float] = {}
        needs: dict[str, Needs] = {}
        cpu: dict[str, float] = {}
        threads = 1
        with worker_process() as process:
            for name, small, backlog in (
                ("few", max(1, size.small // 10), 0),
                ("alone", size.small, 0),
                ("beside", size.small, size.backlog),
            ):
                owners = range(size.organizations)
                if backlog:
                    for owner in owners:
                        self.connection(links=backlog, state="paused", owner=owner)
                made = [self.connection(links=1, state="paused", owner=n % len(owners)) for n in range(small)]
                accounts = [one.account for one in made]
                spent = needs_of(process).cpu
                began = self.begin()
                while not self.have(accounts, 1):
                    threads = max(threads, needs_of(process).threads)
                    time.sleep(0.1)
                counted = self.provider.counted()
                seconds[name] = max(counted[account]["last"] for account in accounts) - began
                needs[name] = needs_of(process)
                cpu[name] = 1000 * (needs[name].cpu - spent) / small
        n = size.small
        what = f"{n} connections of {size.organizations} organizations with a link each"
        return [
            Figure(
                goal="G8",
                what=f"{what}, beside a backlog of {size.backlog} in each, to themselves alone",
                hub=seconds["beside"],
                yardstick=seconds["alone"],
                unit="s",
                ratio=seconds["beside"] / seconds["alone"],
            ),
            Figure(
                goal="G8",
                what=f"CPU for one of {n} connections with a link each, to one of a tenth",
                hub=cpu["alone"],
                yardstick=cpu["few"],
                unit="ms",
                ratio=cpu["alone"] / cpu["few"],
                at_most=1.5,
            ),
            Figure(
                goal="G8",
                what=f"memory of a worker with {n} connections, to one with a tenth",
                hub=needs["beside"].megabytes,
                yardstick=needs["few"].megabytes,
                unit="MB",
                ratio=needs["beside"].megabytes / needs["few"].megabytes,
                at_most=1.15,
            ),
            Figure(
                goal="G8",
                what=f"threads of a worker with {n} connections, to those of its calls and slices",
                hub=threads,
                yardstick=WORKER_THREADS * (1 + 8),
                unit="",
                ratio=threads / (WORKER_THREADS * (1 + 8)),
                at_most=1.2,
            ),
        ]

    def begin(self) -> float:
        """Let the workers have what was made paused. Returns when that was, by the monotonic clock."""
        from connectors.models import Connection

        Connection.objects.filter(state=Connection.State.PAUSED).update(state=Connection.State.ACTIVE)
        return time.monotonic()

    def have(self, accounts: list[str], each: int) -> bool:
        counted = self.provider.counted()
        return all(account in counted and counted[account]["records"] >= each for account in accounts)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a worker needed: seconds, seconds of CPU time, those of its calls, and megabytes at the end."""

    seconds: float
    cpu: float
    calls: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a process has needed until now: megabytes at most, threads, and seconds of CPU time."""

    megabytes: float
    threads: int
    cpu: float


def needs_of(process: subprocess.Popen[bytes]) -> Needs:
    status = _status(process.pid)
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return Needs(
        megabytes=int(status["VmHWM"].split()[0]) / 1024,
        threads=int(status["Threads"]),
        cpu=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def memory() -> float:
    """Megabytes of this process."""
    return int(_status(os.getpid())["VmRSS"].split()[0]) / 1024


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


@contextmanager
def worker_process(*, log: int | IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, ready when this begins and ended in good order when it ends."""
    command = [sys.executable, "-m", "tests.engine.storm", "--threads", str(WORKER_THREADS), "work"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


async def _sockets(address: str, *, at_once: int, calls: int) -> None:
    url = httpx2.URL(address)
    body = orjson.dumps(DOCUMENT)
    left = iter(range(calls))

    async def sender() -> None:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        for _ in left:
            head = f"PUT {url.path}/customers/by-external/{uuid4()} HTTP/1.1\r\nHost: {url.host}\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            orjson.loads(await reader.readexactly(int(answer.rpartition(b"Content-Length: ")[2])))
        writer.close()

    await asyncio.gather(*(sender() for _ in range(at_once)))


async def _aiohttp(address: str, *, at_once: int, calls: int) -> None:
    import aiohttp

    left = iter(range(calls))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as client:

        async def sender() -> None:
            for _ in left:
                async with client.put(f"{address}/customers/by-external/{uuid4()}", json=DOCUMENT) as answer:
                    await answer.json()

        await asyncio.gather(*(sender() for _ in range(at_once)))


if __name__ == "__main__":
    main()
