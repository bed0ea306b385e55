"""Push storms: workers are killed, answers are lost, and the provider has every customer once (R1, R2, R3, R4).

Real worker processes against the fake provider in a process of its own. The provider's ledger is the judge. All waiting
times of the engine and of the provider are divided by FACTOR (see storm.py), so five minutes are thirty seconds here; a
Retry-After is in real seconds.

`HUB_FULL=1` runs each kind of provider by itself in full size and in real time, `HUB_STORM=20000` with so many links,
`HUB_FACTOR=10` with times divided by so much. `HUB_SEED` repeats a run's draws; what the processes do at the same time
is never the same twice.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection as database
from django.db.models import F, Sum

from connectors.models import Connection, CustomerLink, PushIntent
from connectors.states import PARKED, LinkState
from connectors.sync.push import CLAIM_ROWS, push
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.connectors.test_worker import child_environment
from tests.fake import Running, in_process, register, running
from tests.fake.control import Account
from tests.fake.server import FakeProvider

STAFF = Actor(kind="user", name="Staff")
FULL = bool(os.environ.get("HUB_FULL"))
# In full size the times are real: how soon all is clean then also depends on how much was left, and that is not scaled.
FACTOR = float(os.environ.get("HUB_FACTOR") or (1.0 if FULL else 10.0))
DEADLINE, LIFE, CLEAN_WITHIN = 25 / FACTOR, 120 / FACTOR, 300 / FACTOR
KILLS = 3
HUB = "hub under test"  # what the processes call themselves to PostgreSQL
CALLS_PER_CHANGE = 1.45
ROWS = CLAIM_ROWS if FULL else 8
# What a worker may hold at one connection: under way, about to be, and the claim that was made meanwhile.
HELD = ROWS + 2 * django_settings.PUSH_CONCURRENT_CALLS
RETRY_AFTER = 3.0
# An answer has to travel and to be written down before the other workers can know. How many calls that may cost is held
# by a test of its own further down, which no load of the machine can disturb.
# On SQLite, writing it down waits for its turn, seconds long where ten slices write without a pause: there it is shown
# and not judged.
KNOWN_AFTER = 0.25
# Refusals, failures before and after the write, and silence: a fifth of all requests.
FAULTS = {
    "429_missing": 0.05,
    "500": 0.015,
    "502": 0.01,
    "503": 0.005,
    "500_after": 0.01,
    "502_after": 0.01,
    "503_after": 0.005,
    "stored_500": 0.01,
    "reset_before": 0.015,
    "reset_after": 0.025,
    "lost": 0.01,
    "late": 0.02,
    "half_body": 0.01,
    "hang": 0.0025,
    "hang_after": 0.0025,
}
CLEAN_FAILURES = ("429", "429_missing")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "upsert": {"upsert_external_id": True},
    # The look-up is for a stored failure that is repeated.
    "key": {"create_key": True, "look_up": "strong", "conditional": True, "fetches": True},
    "unique": {"unique_keys": True, "fetches": True},
    "marker": {"look_up": "strong"},
    "lagging": {"look_up": "lagging", "look_up_lag": 90 / FACTOR},
    "nothing": {},
}
SAFE = ("upsert", "key", "unique", "marker")


def size(full: int, small: int) -> int:
    return int(os.environ.get("HUB_STORM") or (full if FULL else small))


@dataclass
class Storm:
    """One hub, its workers, and an account at the provider for each variant."""

    fake: Running
    folder: Path
    organization: Organization
    variants: Sequence[str]
    number: int
    workers: int
    rng: random.Random
    accounts: dict[str, Account] = field(default_factory=dict)
    connections: dict[str, Connection] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    edited: Counter[Any] = field(default_factory=Counter)
    deaths: int = 0
    died_at: list[float] = field(default_factory=list)
    started: float = 0.0
    stopped: float = 0.0  # when the faults stopped
    ended: float = 0.0
    names: Iterator[int] = field(default_factory=itertools.count)

    def set_up(self) -> None:
        for name in self.variants:
            offers = {**VARIANTS[name], "max_request_life": LIFE}
            self.accounts[name] = account = self.fake.account(
                name,
                capabilities=offers,
                faults=FAULTS,
                seed=self.rng.randrange(10**9),
                retry_after=RETRY_AFTER,
                late_max=0.9 * LIFE,
                latency=0.0 if FULL else 0.01,
                index_lag=0.9 * offers.get("look_up_lag", 0.0),
                index_outage=1 / 500 if name == "lagging" else 0.0,
            )
            self.connections[name] = Connection.objects.create(
                organization=self.organization,
                provider="fake",
                name=name,
                account=name,
                direction=Connection.Direction.PUSH,
                create_policy=Connection.CreatePolicy.AUTOMATIC,
                base_url=account.url,
                options=account.options(),
            )
        for first in range(0, self.number, 500):
            numbers = range(first, min(first + 500, self.number))
            values = [{"name": f"Customer {n}", "email": f"{n}@example.com", "address_city": "v0"} for n in numbers]
            editing.create(organization=self.organization, values=values, actor=STAFF)

    # Processes

    def run(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A worker or a command; its output is in a file of its own."""
        with (self.folder / f"process-{next(self.names)}.log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.engine.storm", "--factor", str(FACTOR)),
                    *("--claim-rows", str(ROWS), *arguments),
                ],
                cwd=django_settings.BASE_DIR,
                env=child_environment(PUSH_DEBOUNCE_SECONDS=str(2 / FACTOR), DATABASE_POOL_MAX="32", PGAPPNAME=HUB),
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        self.started = time.time()
        self.processes = [self.run("work") for _ in range(self.workers)]

    def kill_a_worker(self) -> None:
        """kill -9 while links are held, and another in its place."""
        one = self.rng.randrange(self.workers)
        until = time.monotonic() + 1
        while time.monotonic() < until and not CustomerLink.objects.exclude(lease_token="").exists():
            time.sleep(0.001)
        self.died_at.append(time.time())
        self.processes[one].kill()
        self.processes[one].wait()
        self.processes[one] = self.run("work")
        self.deaths += 1

    def cut_the_database_off(self) -> None:
        """End every connection of the hub's processes: what a restart of PostgreSQL means to those who use it."""
        self.died_at.append(time.time())
        with database.cursor() as cursor:
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = %s",
                [HUB],
            )
            assert cursor.fetchone()[0], "nobody was connected"
        # What was being kept at that moment may be left as a dead worker leaves it.
        self.deaths += self.workers

    def edit(self, customers: Sequence[Any]) -> None:
        for pk in customers:
            self.edited[pk] += 1
        values = {pk: {"address_city": f"v{self.edited[pk]}"} for pk in customers}
        editing.update(organization=self.organization, values=values, actor=STAFF)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        codes = [process.wait(timeout=40) for process in self.processes]
        assert codes == [0] * len(codes), f"workers ended with {codes}: {self.words()}"

    def words(self) -> str:
        """What the processes said."""
        logs = sorted(self.folder.glob("process-*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)

    # The course of it

    def rage(self, *events: tuple[float, Callable[[], object]], more: Callable[[], bool] = lambda: False) -> None:
        """Let each event happen when that share of the work is done; then stop the faults and wait until all is clean.

        The faults go on while there is `more` to come.
        """
        pause = 0.5 if FULL else 0.05
        limit = time.monotonic() + (180 if not FULL else 120 + self.number * len(self.variants) / 20)
        rows = self.fake.rows()
        waiting = sorted(events, key=lambda event: event[0])
        expected = self.number * len(self.variants)
        untried = CustomerLink.objects.filter(next_attempt_at__isnull=False, intents=None)

        def done(sql: str) -> int:
            next(iter(self.accounts.values())).controls.control(self.variants[0], "flush")
            return int(rows(sql, [])[0][0] or 0)

        while waiting or more() or untried.exists():
            share = done("SELECT max(id) FROM requests") / expected
            ended = [worker for worker in self.processes if worker.poll() is not None]
            assert not ended, f"a worker ended by itself\n{self.words()}"
            while waiting and waiting[0][0] <= share:
                waiting.pop(0)[1]()
            assert time.monotonic() < limit, f"after {share:.0%}: {self.left()}\n{self.cases()}\n{self.words()}"
            time.sleep(pause)
        for account in self.accounts.values():
            account.set(faults={})
        self.stopped = time.time()
        while self.left():
            assert time.monotonic() < limit, f"{self.left()}\n{self.cases()}\n{self.words()}"
            time.sleep(pause)
        self.ended = time.time()
        for account in self.accounts.values():
            account.advance(LIFE)
            assert account.waiting() == 0

    def left(self) -> dict[str, int]:
        """How many links are still to be sent."""
        due = CustomerLink.objects.filter(next_attempt_at__isnull=False, pushed_version__lt=F("needed_version"))
        return Counter(link for link in due.values_list("connection__name", flat=True))

    # The verdict

    def links(self, name: str) -> list[CustomerLink]:
        return list(CustomerLink.objects.filter(connection=self.connections[name]).select_related("customer"))

    def parked(self, name: str) -> list[CustomerLink]:
        return [link for link in self.links(name) if link.state in PARKED]

    def cases(self) -> str:
        """What is known of some links that did not end well."""
        told = []
        for name in self.variants:
            judge = self.accounts[name].judge()
            twice = set(judge.duplicates())
            bad = [
                one
                for one in self.links(name)
                if one.is_dirty or one.next_attempt_at or one.state in PARKED or str(one.uid) in twice
            ]
            for link in bad[:3] if name in SAFE else []:
                intents = [
                    (one.kind, one.outcome, one.lost, one.replayed, one.sent_at, one.hold_until, one.error)
                    for one in link.intents.all()
                ]
                calls = [
                    (request["at"], request["method"], request["fault"], request["status"])
                    for request in judge.requests()
                    if str(link.uid) in (request["marker"], request["query"].get("marker"))
                ]
                told.append(f"{name} {link.pk}: {vars(link)}\n  intents {intents}\n  calls {calls}")
        return "\n".join(told)

    def left_behind(self, name: str, requests: Sequence[Mapping[str, Any]]) -> int:
        """How many links dead workers held. Each costs a call to find out: a fixed price, which in a small storm is not
        to hide the price per link.
        """
        intents = PushIntent.objects.filter(link__connection=self.connections[name])
        unknown = sum(
            request["method"] != "GET" and request["fault"] not in ("", *CLEAN_FAILURES) for request in requests
        )
        total = intents.aggregate(Sum("lost"))["lost__sum"] or 0
        return int(min(max(total - unknown, 0), self.deaths * HELD))

    def verdict(self, name: str, *, commands: int = 0) -> dict[str, Any]:
        """The figures of one account: from the ledger, but for what is stuck and parked."""
        account, links = self.accounts[name], self.links(name)
        judge = account.judge()
        live = judge.live()
        parked = {link.pk for link in self.parked(name)}
        calls = judge.request_count()
        changes = len(judge.writes(who="api", kind="create")) + len(judge.writes(who="api", kind="update"))
        requests = judge.requests()
        faulty = sum(count for fault, count in judge.faults().items() if fault not in ("", "429"))
        left_behind = self.left_behind(name, judge.requests())
        raged = sum(request["at"] < self.stopped for request in requests)
        return {
            "links": len(links),
            "lost": len(judge.lost(link.uid for link in links if link.pk not in parked)),
            "duplicates": len(judge.duplicates()),
            "strangers": len(set(live) - {str(link.uid) for link in links}),
            "wrong": sum(
                live[str(link.uid)][-1].get("address_city") != link.customer.address_city
                for link in links
                if link.pk not in parked and str(link.uid) in live
            ),
            "older after newer": len(judge.older_after_newer()),
            "stuck": sum(link.is_dirty and link.pk not in parked for link in links),
            "clean and yet due": sum(not link.is_dirty and link.next_attempt_at is not None for link in links),
            "parked": len(parked),
            "parked for": dict(Counter(link.error for link in links if link.pk in parked)),
            "changes": changes,
            "requests": calls,
            "faults": round(faulty / max(raged, 1), 3),
            "most calls for a link": max(judge.calls_per_marker().values()),
            "calls per link": round(calls / len(links), 3),
            "calls per change": round((calls - left_behind) / changes, 3),
            "left behind by the dead": left_behind,
            "429 with Retry-After": judge.faults()["429"],
            "calls after a 429": max(after_each_429(requests, self.died_at, grace=0.0), default=0),
            "calls once it is known": max(after_each_429(requests, self.died_at, grace=KNOWN_AFTER), default=0),
            "impatient calls": sum(after_each_429(requests, self.died_at, grace=RETRY_AFTER / 2)),
            "clean after": round((max(request["at"] for request in requests) - self.stopped) * FACTOR),
            "links per second": round(len(links) / (self.stopped - self.started)),
        }


def after_each_429(requests: Sequence[Mapping[str, Any]], died_at: Sequence[float], *, grace: float) -> list[int]:
    """How many requests came while each Retry-After was running, from `grace` seconds after the first answer on. One
    that is told during another belongs to that.

    One that is told around a death is left out: who dies with the answer tells nobody.
    """
    counts: list[int] = []
    since = until = 0.0
    for request in requests:
        if request["at"] < until:
            counts[-1] += request["at"] >= since
        elif request["wait_until"] is not None:
            since = request["at"] + grace
            counts.append(0)
            if any(abs(request["at"] - at) < 1.0 for at in died_at):
                counts[-1] = -(10**9)
        until = max(until, request["wait_until"] or 0.0)
    return [count for count in counts if count >= 0]


@contextmanager
def a_storm(
    folder: Path, organization: Organization, variants: Sequence[str], *, number: int, workers: int
) -> Iterator[Storm]:
    seed = int(os.environ.get("HUB_SEED") or random.SystemRandom().randrange(10**6))
    sys.stdout.write(f"\nseed {seed}, {number} links, times divided by {FACTOR:g}, {workers} workers\n")
    register()
    with ExitStack() as stack:
        fake = stack.enter_context(running(folder))
        storm = Storm(fake, folder, organization, variants, number, workers, random.Random(seed))
        storm.set_up()
        try:
            yield storm
        finally:
            for process in storm.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def troubles(storm: Storm) -> list[tuple[float, Callable[[], object]]]:
    """Kills, edits of a third of the customers, and the provider's requests to wait, at random moments."""
    rng = storm.rng
    everybody = list(Customer.objects.filter(organization=storm.organization).values_list("pk", flat=True))
    chosen = rng.sample(everybody, len(everybody) // 3)
    step = min(500, -(-len(chosen) // 6))
    events: list[tuple[float, Callable[[], object]]] = []
    for first in range(0, len(chosen), step):
        events.append((rng.uniform(0.1, 0.9), lambda part=chosen[first : first + step]: storm.edit(part)))
    events += [(rng.uniform(0.1, 0.9), storm.kill_a_worker) for _ in range(KILLS)]
    if database.vendor == "postgresql":
        events.append((rng.uniform(0.2, 0.8), storm.cut_the_database_off))
    for account in storm.accounts.values():
        for _ in range(10 if FULL else 1):
            events.append((rng.uniform(0.1, 0.9), lambda account=account: account.script("429")))
    return events


def show(name: str, figures: Mapping[str, Any]) -> None:
    if FULL:
        lines = [f"{name}, {database.vendor}, {figure}: {value}\n" for figure, value in figures.items()]
        sys.stdout.writelines(lines)
    else:
        sys.stdout.write(f"{name}: {dict(figures)}\n")


def wrong(storm: Storm, name: str, figures: Mapping[str, Any], *, senders: int) -> dict[str, Any]:
    """The figures that do not pass."""
    found = {
        key: figures[key]
        for key in ("lost", "duplicates", "strangers", "wrong", "older after newer", "stuck")
        if figures[key]
    }
    limits = {
        # What chance may add where there are few.
        "calls per change": CALLS_PER_CHANGE + 2.5 / figures["changes"] ** 0.5,
        "clean after": CLEAN_WITHIN * FACTOR,
    }
    if database.vendor == "postgresql":
        limits |= {"calls once it is known": django_settings.PUSH_CONCURRENT_CALLS * senders, "impatient calls": 0}
    found |= {key: figures[key] for key, most in limits.items() if figures[key] > most}
    if name in SAFE and figures["parked"]:
        found["parked"] = figures["parked for"]
    return found


@pytest.fixture
def quick(settings: Any) -> None:
    settings.PUSH_DEBOUNCE_SECONDS = 2 / FACTOR


@pytest.mark.parametrize(
    "variants", [(name,) for name in (*SAFE, "nothing")] if FULL else [(*SAFE, "nothing")], ids="+".join
)
def test_a_storm_loses_nothing_and_makes_nothing_twice(
    transactional_db: None, quick: None, organization: Organization, tmp_path: Path, variants: Sequence[str]
) -> None:
    workers = 3 if database.vendor == "postgresql" else 2
    with a_storm(tmp_path, organization, variants, number=size(100_000, 150), workers=workers) as storm:
        events = troubles(storm)
        storm.start()
        storm.rage(*events)
        storm.stop()
        figures = {name: storm.verdict(name) for name in variants}
        for name in variants:
            show(name, figures[name])
        bad = {name: found for name in variants if (found := wrong(storm, name, figures[name], senders=workers))}
        if "nothing" in variants:
            nobody_guessed(storm)
        assert not bad, f"{storm.cases()}\n{storm.words()}"
        assert storm.deaths >= KILLS
        assert all(0.1 < figures[name]["faults"] < 0.3 for name in variants), "the faults did not strike"
        assert "database is locked" not in storm.words()


def test_a_storm_while_people_write_and_a_command_sends(
    transactional_db: None, quick: None, organization: Organization, api_key: str, tmp_path: Path
) -> None:
    """Two workers, the web server and a command on one database; on SQLite that is one file (R4)."""
    number = size(20_000, 60) // 4 if FULL else 60
    with a_storm(tmp_path, organization, SAFE, number=number, workers=2) as storm, web(tmp_path) as address:
        events = troubles(storm)
        commands: list[subprocess.Popen[bytes]] = []
        for share in (0.2, 0.7):
            events.append(
                (share, lambda: commands.append(storm.run("command", "push_customers", *SAFE, "--wait", "2")))
            )
        people = People(address, api_key, number=max(number // 5, 20))
        storm.start()
        people.start()
        storm.rage(*events, more=people.left)
        people.end()
        codes = [command.wait(timeout=60) for command in commands]
        storm.stop()
        figures = {name: storm.verdict(name) for name in SAFE}
        for name in SAFE:
            show(name, figures[name])
        slowest = max(people.seconds)
        show("people", {"writes": len(people.seconds), "slowest write": slowest, "statuses": dict(people.statuses)})
        bad = {name: found for name in SAFE if (found := wrong(storm, name, figures[name], senders=4))}
        assert not bad, f"{storm.cases()}\n{storm.words()}"
        assert set(people.statuses) <= {200, 201}, f"{people.statuses} {(tmp_path / 'web.log').read_text()[-3000:]}"
        assert people.statuses[200], "nobody edited"
        assert Customer.objects.filter(name__startswith="By hand").count() == people.statuses[201]
        # A command whose connection to the database was cut ends with 1, and says so.
        assert set(codes) <= ({0, 1, 3} if database.vendor == "postgresql" else {0, 3}), (
            f"the command ended with {codes}: {storm.words()}"
        )
        assert storm.deaths >= KILLS
        assert "database is locked" not in storm.words() + (tmp_path / "web.log").read_text()


@contextmanager
def web(folder: Path) -> Iterator[str]:
    """The hub's web server on the tests' database. It knows the fake provider: else no edit would make links dirty."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "web.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1", "--port", str(port)),
                *("--blocking-threads", "4", "--no-ws", "tests.engine.storm:application"),
            ],
            cwd=django_settings.BASE_DIR,
            env=child_environment(PUSH_DEBOUNCE_SECONDS=str(2 / FACTOR), PGAPPNAME=HUB),
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with suppress(OSError), urllib.request.urlopen(f"{address}/livez", timeout=5):
                break
            assert process.poll() is None, (folder / "web.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


class People:
    """Three at a time write through the API: each makes a customer, then changes it."""

    def __init__(self, address: str, key: str, *, number: int) -> None:
        self.address = address
        self.key = key
        self.numbers = iter(range(number))
        self.lock = threading.Lock()
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.threads = [threading.Thread(target=self.write) for _ in range(3)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def left(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        for thread in self.threads:
            thread.join()

    def write(self) -> None:
        path = "/api/v1/unified/customer"
        while True:
            with self.lock:
                number = next(self.numbers, None)
            if number is None:
                return
            person = {"name": f"By hand {number}", "email": f"hand{number}@example.com", "address_city": "here"}
            made = self.send("POST", path, person)
            if made:
                self.send("PUT", f"{path}/{made['id']}", {**person, "address_city": "there"})

    def send(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}",
            data=json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        began = time.monotonic()
        status, answer = 0, {}
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, answer = response.status, json.loads(response.read())["data"]
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 599  # no answer at all
        with self.lock:
            self.statuses[status] += 1
            self.seconds.append(round(time.monotonic() - began, 3))
        return answer


def nobody_guessed(storm: Storm) -> None:
    """Where a lost create cannot be looked up, it is not sent again, and every one of them is shown to a person."""
    judge = storm.accounts["nothing"].judge()
    sent: dict[str, list[str]] = {}
    for request in judge.requests(method="POST"):
        sent.setdefault(request["marker"], []).append(request["fault"])
    again = {marker: faults for marker, faults in sent.items() if any(one not in CLEAN_FAILURES for one in faults[:-1])}
    assert not again, "a create that may have arrived was sent again"
    uncertain = {marker for marker, faults in sent.items() if faults[-1] not in ("", *CLEAN_FAILURES)}
    parked = storm.parked("nothing")
    assert {link.state for link in parked} <= {LinkState.UNCERTAIN.value}
    assert all(link.next_attempt_at is None and link.error for link in parked), "it waits, and says for what"
    shown = {str(link.uid) for link in parked}
    assert uncertain <= shown, "a create with an unknown end is not shown"
    assert len(shown - uncertain) <= storm.deaths * HELD, "more are parked than dead workers can have left behind"
    show("nothing", {"uncertain": len(uncertain), "left by dead workers": len(shown - uncertain)})


# What storms have brought to light, each by itself


@dataclass
class Calm:
    """One worker, one account in this process, and a clock that is moved by hand."""

    connection: Connection
    account: Account
    fake: FakeProvider
    now: datetime

    def clock(self) -> datetime:
        return self.now

    def push(self, *, after: float = 0.0) -> Counter[str]:
        self.now += timedelta(seconds=after)
        self.connection.refresh_from_db()
        return push(
            connection=self.connection,
            provider=register(),
            session=register().session(self.connection, client=self.fake.client()),
            clock=self.clock,
            rng=random.Random(1),
            sleep=lambda seconds: None,
        )


@pytest.fixture
def calm(transactional_db: None, organization: Organization) -> Callable[..., Calm]:
    def make(variant: str, *, number: int = 1, sleep: Callable[[float], None] | None = None) -> Calm:
        register()
        start = datetime.now(UTC)
        fake = in_process(clock=lambda: made.now, sleep=sleep)
        made = Calm(None, None, fake, start)  # type: ignore[arg-type] # the fake's clock needs it before they are made
        made.account = fake.account("main", capabilities=VARIANTS[variant], latency=0.001)
        made.connection = Connection.objects.create(
            organization=organization,
            provider="fake",
            name="main",
            direction=Connection.Direction.PUSH,
            create_policy=Connection.CreatePolicy.AUTOMATIC,
            base_url=made.account.url,
            options=made.account.options(),
        )
        values = [{"name": f"Customer {n}", "email": f"{n}@example.com", "phone": "+493012345"} for n in range(number)]
        editing.create(organization=organization, values=values, actor=STAFF, at=start)
        made.now = datetime.now(UTC)
        return made

    return make


def test_the_repeat_of_a_create_is_the_same_to_the_byte(calm: Callable[..., Calm]) -> None:
    shop = calm("key")
    shop.account.script("reset_after", method="POST")
    shop.push()
    assert shop.push(after=60) == {"created": 1}, "the key was accepted a second time"
    first, second = (request["body"] for request in shop.account.judge().requests(method="POST"))
    assert first == second


def test_a_refused_repeat_proves_nothing_of_the_create_that_was_lost(calm: Callable[..., Calm]) -> None:
    shop = calm("key")
    shop.account.script("reset_after", method="POST")
    shop.account.script("404_all", method="POST")
    shop.push()
    assert shop.push(after=60) == {"refused": 1}
    [customer] = Customer.objects.all()
    edit = {"address_city": "there"}
    editing.update(organization=customer.organization, values={customer.pk: edit}, actor=STAFF)
    for _ in range(4):
        shop.push(after=200)
    judge = shop.account.judge()
    assert not judge.duplicates()
    assert [fields["address_city"] for [fields] in judge.live().values()] == ["there"]


def test_a_system_that_calls_its_failure_internal_parks_nothing(calm: Callable[..., Calm]) -> None:
    shop = calm("marker")
    shop.account.script("reset_after", method="POST")
    shop.account.script("500_after", method="GET", times=5)
    for _ in range(8):
        shop.push(after=1000)
    link = CustomerLink.objects.get()
    assert (link.state, link.crashes, link.is_dirty) == (LinkState.OPEN, 0, False)
    assert shop.account.judge().statuses()[500] == 5


def test_what_another_worker_was_told_stops_this_one_within_its_calls_under_way(calm: Callable[..., Calm]) -> None:
    def another_is_told(seconds: float) -> None:
        until = shop.now + timedelta(minutes=1)
        try:
            Connection.objects.filter(pk=shop.connection.pk, not_before=None).update(not_before=until)
        finally:
            database.close()

    shop = calm("upsert", number=60, sleep=another_is_told)
    shop.push()
    assert shop.account.judge().request_count() <= 2 * django_settings.PUSH_CONCURRENT_CALLS
    assert shop.push(after=70)["created"] > 0


def test_a_worker_that_stood_still_sends_nothing_that_another_took_over(calm: Callable[..., Calm]) -> None:
    asleep, awake = threading.Event(), threading.Event()

    def stand_still(seconds: float) -> None:
        if asleep.is_set():
            return
        asleep.set()
        try:
            while shop.account.judge().request_count() < django_settings.PUSH_CONCURRENT_CALLS:
                time.sleep(0.01)
            for _ in range(3):
                shop.push(after=300)
        finally:
            awake.set()
            database.close()

    class Sleeper(Calm):
        def clock(self) -> datetime:
            if asleep.is_set() and threading.current_thread() is threading.main_thread():
                assert awake.wait(30)
            return shop.now

    shop = calm("marker", number=60, sleep=stand_still)
    Sleeper(shop.connection, shop.account, shop.fake, shop.now).push()
    for _ in range(4):
        shop.push(after=300)
    judge = shop.account.judge()
    assert judge.count() == 60
    assert not judge.duplicates()
    assert not CustomerLink.objects.exclude(state=LinkState.OPEN).exists()
