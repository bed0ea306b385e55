"""What a network may do between worker and provider, it does: each call ends in time, and all comes right after (R8).

The provider is a process on a socket, and a relay that misbehaves stands before each of its accounts. One real worker
serves all cases side by side, in real time with a short deadline. `HUB_FULL=1` runs 200 cases of up to two minutes,
`HUB_SEED=7` repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.db.models import F
from django.utils import timezone

from connectors import worker as working
from connectors.guard import close_shared_client
from connectors.models import Connection, CustomerLink
from connectors.outbound import Session
from connectors.worker import Worker
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.fake import Running, register, running
from tests.fake.control import Account

FULL = bool(os.environ.get("HUB_FULL"))
SEED = int(os.environ.get("HUB_SEED") or random.SystemRandom().randrange(10_000))
CASES = 200 if FULL else 20
OUTAGE = (1.0, 120.0) if FULL else (1.0, 4.0)
# So many systems are dead at once, and so many threads a worker has: a dead one is to hold up no other here.
TOGETHER = 24 if FULL else 20
THREADS = 24 if FULL else 8
DEADLINE, EXACT = 2.0, 1.0
RECOVERY = 60.0
STAFF = Actor(kind="user", name="Staff")
READS = {"lists": True, "fetches": True, "max_request_life": 1.0}
OFFERS: dict[str, dict[str, Any]] = {
    "upsert": {"upsert_external_id": True},
    "key": {"create_key": True, "look_up": "strong"},
    "strong": {"look_up": "strong", "conditional": True},
}
# What the relay does with bytes. The first five keep the caller waiting.
SILENT = (
    "hang",  # the request never arrives
    "hang_after",  # it arrives, and the answer does not
    "drip",  # the answer comes at a byte a second
    "partition",  # nothing passes in either direction, on old connections and new ones
    "deaf",  # nobody takes the connection
)
BROKEN = ("reset_in_body", "half_body", "refuse")


class Line:
    """A port that leads to the provider. What passes it suffers the `fault` of the moment; "" for none."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.fault = ""
        self.server: asyncio.Server | None = None
        self.deaf: list[socket.socket] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for one in self.deaf:
            one.close()
        self.server, self.deaf = None, []

    async def change(self, fault: str) -> None:
        self.fault = fault
        if fault in ("deaf", "refuse"):
            await self.close()
        if fault == "deaf":
            await self.fill_queue()
        if not fault:
            await self.close()
            await self.listen()

    async def fill_queue(self) -> None:
        """Listen without taking connections; the queue is full, so that those who knock get no answer at all."""
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("127.0.0.1", self.port))
        door.listen(0)
        self.deaf = [door]
        for _ in range(4):
            knock = socket.socket()
            knock.setblocking(False)
            knock.connect_ex(("127.0.0.1", self.port))
            self.deaf.append(knock)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sides, pumps = [writer], set[asyncio.Task[None]]()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.network.target)
            sides.append(back)
            pumps = {asyncio.ensure_future(self.pump(reader, back, True))}
            pumps.add(asyncio.ensure_future(self.pump(there, writer, False)))
            self.tasks.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the test is over and this is cancelled
            for pump in pumps:
                pump.cancel()
            self.tasks -= pumps
            for side in sides:
                side.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asking: bool) -> None:
        """Bytes of one direction. What was once swallowed is missing for good, so nothing follows it."""
        silent = False
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                fault = self.fault
                silent = silent or fault in ("partition", "deaf", "refuse", "hang" if asking else "hang_after")
                if silent:
                    continue
                if asking or fault in ("", "hang", "hang_after"):
                    writer.write(data)
                elif fault == "drip":
                    for position in range(len(data)):
                        writer.write(data[position : position + 1])
                        await asyncio.sleep(1.0)
                else:
                    body = data.find(b"\r\n\r\n") + 4
                    writer.write(data[: (body + len(data)) // 2])
                    await asyncio.sleep(0.02)  # else a reset would overtake the bytes
                    if fault == "reset_in_body":
                        end = writer.get_extra_info("socket")
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    else:
                        writer.close()
                    return


class Network:
    """All lines, served by one thread."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).port
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="network")
        self.thread.start()
        self.lines: list[Line] = []

    def line(self) -> Line:
        made = Line(self)
        self.do(made.listen())
        self.lines.append(made)
        return made

    def do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self.loop).result(30)

    def close(self) -> None:
        async def end() -> None:
            for line in self.lines:
                await line.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)  # an abort closes its socket in the loop's next round

        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@dataclass(kw_only=True)
class Case:
    """One connection over one line: what goes wrong, for how long, and during which work."""

    name: str
    fault: str
    work: str
    kind: str
    outage: float
    account: Account
    line: Line
    connection: Connection
    begun_at: float = 0.0
    healed_at: float = 0.0
    recovered_at: float = 0.0
    calls: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Two customers are linked; the network breaks, and then there is work to do."""
        self.line.network.do(self.line.change(self.fault))
        self.begun_at = time.monotonic()
        if self.work == "push":
            linked = list(Customer.objects.filter(organization=self.connection.organization))
            editing.update(
                organization=self.connection.organization,
                values={one.pk: {"address_city": f"Moved {one.name}"} for one in linked},
                actor=STAFF,
            )
            self.create(3, "New")
            return
        for record in self.account.records():
            self.account.edit(record["id"], address_city=f"Theirs {record['fields']['name']}")
        for number in range(3):
            self.account.create(name=f"There {number}", address_city="There")
        Connection.objects.filter(pk=self.connection.pk).update(pull_interval=1, next_pull_at=None)

    def rest(self) -> None:
        """Pull no more."""
        Connection.objects.filter(pk=self.connection.pk).update(pull_interval=None)

    def create(self, number: int, name: str) -> None:
        values = [{"name": f"{name} {n}", "address_city": "Here"} for n in range(number)]
        editing.create(organization=self.connection.organization, values=values, actor=STAFF)

    def heal(self) -> None:
        self.line.network.do(self.line.change(""))
        self.healed_at = time.monotonic()

    def is_done(self) -> bool:
        if self.work == "push":
            dirty = CustomerLink.objects.filter(connection=self.connection, pushed_version__lt=F("needed_version"))
            return not dirty.exists()
        return self.here() == self.there()

    def here(self) -> list[tuple[str, str]]:
        links = CustomerLink.objects.filter(connection=self.connection).select_related("customer")
        return sorted((one.customer.name, one.customer.address_city) for one in links)

    def there(self) -> list[tuple[str, str]]:
        records = self.account.records()
        return sorted((one["fields"]["name"], one["fields"]["address_city"]) for one in records)

    def trouble(self) -> str:
        self.connection.refresh_from_db()
        links = CustomerLink.objects.filter(connection=self.connection)
        columns = ("state", "attempts", "error", "next_attempt_at", "hold_until", "lease_until")
        now = timezone.now()
        known = ("state", "breaker_until", "breaker_trips", "breaker_calls", "not_before", "next_pull_at", "pull_until")
        states = {name: str(getattr(self.connection, name)) for name in known}
        outage = self.healed_at - self.begun_at
        return f"{self.name}, {outage:.1f} s: at {now} not well again: {states} {list(links.values_list(*columns))}"

    @property
    def limit(self) -> float:
        """How long it may take until all is well. The breaker and the backoff of a record wait as long as all of the
        outage before, and the breaker at first for 30 s: only for longer outages is that more than a minute.
        """
        return max(RECOVERY, self.healed_at - self.begun_at + 35.0)

    def check(self) -> None:
        assert self.here() == self.there()
        judge = self.account.judge()
        assert judge.duplicates() == {}
        links = CustomerLink.objects.filter(connection=self.connection)
        assert links.count() == Customer.objects.filter(organization=self.connection.organization).count() == 5
        assert judge.count() == 5
        assert not links.exclude(state="open").exists()
        assert judge.older_after_newer() == []
        # A call that nobody answers ends by its deadline: not much later, and not before.
        assert max(self.calls) < DEADLINE + EXACT, max(self.calls)
        if self.fault in SILENT:
            assert max(self.calls) > DEADLINE - EXACT, max(self.calls)


@pytest.fixture
def fake(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    register()
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    settings.PUSH_DEBOUNCE_SECONDS = 0
    monkeypatch.setattr(working, "CALL_SECONDS", DEADLINE)
    with running(tmp_path) as provider:
        yield provider
    close_shared_client()


@pytest.fixture
def network(fake: Running) -> Iterator[Network]:
    made = Network(fake.url)
    yield made
    made.close()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """How long each call took, by the address that it went to."""
    send = Session.send
    taken: dict[str, list[float]] = {}

    def sending(session: Session, *given: Any, **more: Any) -> Any:
        begun = time.monotonic()
        try:
            return send(session, *given, **more)
        finally:
            taken.setdefault(session.base_url, []).append(time.monotonic() - begun)

    monkeypatch.setattr(Session, "send", sending)
    return taken


def cases(fake: Running, network: Network, rng: random.Random) -> list[Case]:
    """Each fault during each work first, the others drawn."""
    combined = [(fault, work) for fault in (*SILENT, *BROKEN) for work in ("push", "pull")]
    combined += [(rng.choice((*SILENT, *BROKEN)), rng.choice(("push", "pull"))) for _ in range(len(combined), CASES)]
    made = []
    for number, (fault, work) in enumerate(combined):
        kind = rng.choice(list(OFFERS))
        account = fake.account(f"a{number}", capabilities={**READS, **OFFERS[kind]})
        line = network.line()
        connection = Connection.objects.create(
            organization=Organization.objects.create(name=f"Demo {number}", slug=f"demo-{number}"),
            provider="fake",
            name="system",
            direction=Connection.Direction.PUSH if work == "push" else Connection.Direction.PULL,
            create_policy=Connection.CreatePolicy.AUTOMATIC,
            base_url=f"http://127.0.0.1:{line.port}/a/{account.name}",
            options=account.options(),
            pull_interval=1 if work == "pull" else None,
        )
        case = Case(
            name=f"{number} {fault} {work} {kind}",
            fault=fault,
            work=work,
            kind=kind,
            outage=OUTAGE[0] * (OUTAGE[1] / OUTAGE[0]) ** rng.random(),  # as many short ones as long ones
            account=account,
            line=line,
            connection=connection,
        )
        if work == "push":
            case.create(2, "Old")
        else:
            for person in range(2):
                account.create(name=f"Old {person}", address_city="There")
        # On a busy machine a call may pass its deadline, and is made again.
        turn = working.push_slice if work == "push" else working.pull_slice
        patience = time.monotonic() + 10
        turn(connection.pk)
        while not case.is_done() and time.monotonic() < patience:
            time.sleep(0.1)
            turn(connection.pk)
        case.rest()
        assert len(case.here()) == 2
        assert case.is_done(), case.trouble()
        made.append(case)
    return made


def until(*conditions: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not all(condition() for condition in conditions):
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.05)


@pytest.mark.django_db(transaction=True)
def test_whatever_the_network_does_calls_end_in_time_and_all_comes_right(
    fake: Running, network: Network, timed: dict[str, list[float]]
) -> None:
    sys.stdout.write(f"HUB_SEED={SEED}\n")
    rng = random.Random(SEED)
    all_cases = cases(fake, network, rng)
    timed.clear()
    before = set(threading.enumerate())
    worker = Worker(threads=THREADS, idle=0.1)
    running_worker = threading.Thread(target=worker.run)
    most = 0
    try:
        running_worker.start()
        waiting, active = list(all_cases), list[Case]()
        while waiting or active:
            while waiting and len(active) < TOGETHER:
                active.append(waiting.pop(0))
                timed.pop(active[-1].connection.base_url, None)
                active[-1].begin()
            most = max(most, threading.active_count())
            for case in list(active):
                now = time.monotonic()
                if not case.healed_at:
                    # Not before a call has suffered.
                    if now >= case.begun_at + case.outage and timed.get(case.connection.base_url):
                        case.heal()
                elif case.is_done():
                    case.recovered_at = time.monotonic()
                    case.rest()
                    active.remove(case)
                else:
                    assert now < case.healed_at + case.limit, case.trouble()
            time.sleep(0.1)
    finally:
        worker.stop.set()
        if running_worker.ident is not None:
            running_worker.join(60)
    left = set(threading.enumerate()) - before
    assert not left, f"threads that nobody ended: {left}"
    assert most <= len(before) + 1 + THREADS * (1 + settings.PUSH_CONCURRENT_CALLS)
    for case in all_cases:
        case.calls = timed[case.connection.base_url]
        try:
            case.check()
        except AssertionError as error:
            error.add_note(f"case {case.name}, {case.outage:.1f} s")
            raise
    slowest = max(all_cases, key=lambda case: case.recovered_at - case.healed_at)
    longest = max(max(case.calls) for case in all_cases)
    sys.stdout.write(f"R8 cases: {len(all_cases)}, calls: {sum(len(case.calls) for case in all_cases)}\n")
    sys.stdout.write(f"R8 longest call: {longest:.2f} s of {DEADLINE} s\n")
    sys.stdout.write(
        f"R8 slowest recovery: {slowest.recovered_at - slowest.healed_at:.1f} s"
        f" after an outage of {slowest.outage:.1f} s ({slowest.name})\n"
    )
    late = [case for case in all_cases if case.recovered_at - case.healed_at >= RECOVERY]
    sys.stdout.write(f"R8 recoveries of more than {RECOVERY:.0f} s: {len(late)}\n")
