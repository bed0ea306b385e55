"""Pushing to a system that answers in 50 ms: claim, call and stored result, through a worker.

    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.push [--size small] [--rounds 3]

The ideal is the calls under way divided by the time of one. Beside the hub, in the same rounds, bare clients send the
same documents to the same system and keep nothing: httpx2 in threads, aiohttp where it is installed, and asyncio's
sockets, which are the limit. Then batches, the database connections of a worker whose calls are all waiting, and fair
shares: how long a thousand small connections take beside one with a backlog, and without it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
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
    """`seconds` of the ideal rate for each side; `small` connections with `each` links, and one with a `backlog`."""

    at_once: tuple[int, ...]
    seconds: float
    small: int
    each: int
    backlog: int


SIZES = {
    "smoke": Size(at_once=(4,), seconds=0.5, small=5, each=2, backlog=20),
    "small": Size(at_once=(8, 50, 200), seconds=2.0, small=100, each=10, backlog=2_000),
    "full": Size(at_once=(8, 50, 200), seconds=5.0, small=1_000, each=10, backlog=20_000),
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
        self.organization = Organization.objects.create(name="Demo", slug="demo")
        self.staff = Actor(kind="command", name="benchmark")
        self.names = (f"account{n}" for n in itertools.count())
        self.ids: list[Any] = []

    def customers(self, number: int) -> list[Any]:
        """The ids of so many customers; those that are there are taken again."""
        from customers import editing

        while len(self.ids) < number:
            values = [{**DOCUMENT, "email": f"{uuid4()}@example.com"} for _ in range(min(2000, number - len(self.ids)))]
            made = editing.create(organization=self.organization, values=values, actor=self.staff)
            self.ids += [one.pk for one in made]
        return self.ids[:number]

    def connection(self, *, links: int, url: str = "", state: str = "active", **capabilities: Any) -> Any:
        """A connection to which so many customers are due."""
        from connectors.models import Connection
        from connectors.sync.request import request

        name = next(self.names)
        made = Connection.objects.create(
            organization=self.organization,
            provider="fake",
            name=name,
            account=name,
            direction=Connection.Direction.PUSH,
            state=state,
            base_url=url or self.provider.address(name),
            options={"capabilities": {"upsert_external_id": True, **capabilities}},
        )
        request(connection=made, actor=self.staff, customer_ids=self.customers(links))
        return made

    def work(self, *, at_once: int, threads: int = 1) -> tuple[float, float]:
        """Seconds, and seconds of CPU time, in which a worker does all that is due."""
        from django.conf import settings

        from connectors.guard import close_shared_client
        from connectors.worker import Worker

        close_shared_client()
        settings.PUSH_CONCURRENT_CALLS = at_once
        worker = Worker(threads=threads, idle=0.05)
        began, cpu = time.perf_counter(), time.process_time()
        worker.run(once=True)
        return time.perf_counter() - began, time.process_time() - cpu

    # Rates

    def rates(self, size: Size, *, rounds: int) -> list[Figure]:
        figures: list[Figure] = []
        alone = self.rate(at_once=1, links=max(4, round(size.seconds / LATENCY)))
        for at_once in size.at_once:
            ideal = at_once / LATENCY
            links = round(ideal * size.seconds)
            cpu: dict[str, list[float]] = {"hub": [], "httpx2": []}
            sides: dict[str, Callable[[], float]] = {
                "hub": partial(self.rate, at_once=at_once, links=links, cpu=cpu["hub"]),
                "httpx2 in threads": partial(self.bare_threads, at_once=at_once, calls=links, cpu=cpu["httpx2"]),
                "asyncio's sockets": partial(self.bare, _sockets, at_once=at_once, calls=links),
            }
            if importlib.util.find_spec("aiohttp"):
                sides["aiohttp"] = partial(self.bare, _aiohttp, at_once=at_once, calls=links)
            else:
                sys.stdout.write("aiohttp is not installed: uv sync --group benchmarks\n")
            kept = in_turn(sides, rounds=rounds)
            hub = statistics.median(kept["hub"])
            aims = {50: 0.9, 200: 0.6}
            what = f"push, {at_once} under way"
            figures.append(
                Figure(
                    goal="G8",
                    what=f"{what}, to the ideal",
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
                    what=f"{what}, to {name}",
                    hub=hub,
                    yardstick=statistics.median(kept[name]),
                    unit="/s",
                    ratio=ratio(kept["hub"], kept[name]),
                )
                for name in sides
                if name != "hub"
            ]
            figures.append(
                Figure(
                    goal="G8",
                    what=f"CPU of a push, {at_once} under way, to httpx2 in threads",
                    hub=statistics.median(cpu["hub"]),
                    yardstick=statistics.median(cpu["httpx2"]),
                    unit="ms",
                    ratio=ratio(cpu["hub"], cpu["httpx2"]),
                )
            )
        most = max(size.at_once)
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

    def rate(self, *, at_once: int, links: int, cpu: list[float] | None = None) -> float:
        self.connection(links=links)
        seconds, spent = self.work(at_once=at_once)
        if cpu is not None:
            cpu.append(1000 * spent / links)
        return links / seconds

    def bare_threads(self, *, at_once: int, calls: int, cpu: list[float]) -> float:
        address = self.provider.address(next(self.names))
        limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)

        def send(_: int) -> None:
            client.put(f"{address}/customers/by-external/{uuid4()}", json=DOCUMENT).json()

        began, spent = time.perf_counter(), time.process_time()
        with httpx2.Client(trust_env=False, limits=limits, timeout=60) as client, ThreadPoolExecutor(at_once) as pool:
            list(pool.map(send, range(calls)))
        cpu.append(1000 * (time.process_time() - spent) / calls)
        return calls / (time.perf_counter() - began)

    def bare(self, send: Callable[..., Any], *, at_once: int, calls: int) -> float:
        began = time.perf_counter()
        asyncio.run(send(self.provider.address(next(self.names)), at_once=at_once, calls=calls))
        return calls / (time.perf_counter() - began)

    def batches(self, size: Size, *, rounds: int) -> list[Figure]:
        links = round(8 / LATENCY * size.seconds)

        def rate(**offers: Any) -> float:
            self.connection(links=links, **offers)
            return links / self.work(at_once=8)[0]

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
        with running(latency=3.0) as slow:
            for number in range(threads):
                self.connection(links=at_once, url=slow.address(f"slow{number}"))
            worker = threading.Thread(target=partial(self.work, at_once=at_once, threads=threads))
            worker.start()
            while len(slow.counted()) < threads or any(c["requests"] < at_once for c in slow.counted().values()):
                time.sleep(0.05)
            time.sleep(1.0)
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
        """How long the small connections take beside a big one, and by themselves; and what the worker needs for it."""
        seconds: dict[str, float] = {}
        needs: dict[str, Needs] = {}
        threads = 1
        with worker_process() as process:
            for name, small, backlog in (
                ("few", max(1, size.small // 10), 0),
                ("alone", size.small, 0),
                ("beside", size.small, size.backlog),
            ):
                if backlog:
                    self.connection(links=backlog, state="paused")
                accounts = [self.connection(links=size.each, state="paused").account for _ in range(small)]
                began = self.begin()
                while not self.have(accounts, size.each):
                    threads = max(threads, needs_of(process).threads)
                    time.sleep(0.1)
                counted = self.provider.counted()
                seconds[name] = max(counted[account]["last"] for account in accounts) - began
                needs[name] = needs_of(process)
        n = size.small
        return [
            Figure(
                goal="G8",
                what=f"{n} small connections beside a backlog of {size.backlog}, to themselves alone",
                hub=seconds["beside"],
                yardstick=seconds["alone"],
                unit="s",
                ratio=seconds["beside"] / seconds["alone"],
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
class Needs:
    """What a process has needed at most until now."""

    megabytes: float
    threads: int


def needs_of(process: subprocess.Popen[bytes]) -> Needs:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return Needs(megabytes=int(status["VmHWM"].split()[0]) / 1024, threads=int(status["Threads"]))


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
