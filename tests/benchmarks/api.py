"""The API over real sockets: requests per second beside servers that do the same to the same tables.

    python -m tests.benchmarks.api [--size smoke|small|full] [--rounds N]
    DATABASE_URL=postgres://user@host/postgres python -m tests.benchmarks.api

Eight clients keep a connection each to one server process of eight threads. The hub runs as `manage.py serve` runs it;
beside it a WSGI application without a framework on the same server, and on PostgreSQL a plain ModelViewSet and FastAPI
with SQLAlchemy (`uv sync --group benchmarks`). Each operation is put to all of them in turn, round after round, as so
many requests that were written down before. Rates are by wall time, which other work on the machine disturbs; the
`CPU` rows are the processor time of server and database a request, which it disturbs less. On SQLite two processes of
the hub are asked by eight clients at once, too: none may be turned away because the file is locked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import Figure, in_turn, options, own_database, ratio, report, table

CLIENTS = 8
CUSTOMERS = {"smoke": 250, "small": 10_000, "full": 100_000}
# How many requests of each operation a round sends, as a share of what is written beside the operation.
SHARE = {"smoke": 0.02, "small": 0.3, "full": 2.0}
ROUNDS = {"smoke": 1, "small": 3, "full": 7}
FASTAPI = "FastAPI + SQLAlchemy"
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`make` writes one request: method, path and body. `aims` are the least ratios to a yardstick, by its name."""

    name: str
    count: int
    make: Callable[[], tuple[str, str, Any]]
    goal: str
    aims: Mapping[str, float]
    peers: Sequence[str] = ("raw",)


@dataclass(kw_only=True)
class Server:
    """A running server and what it and its database used, in seconds of processor time, in each round."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    used: list[float] = field(default_factory=list)


def main() -> None:
    parser = options(description=__doc__)
    chosen = parser.parse_args()
    rounds = chosen.rounds or ROUNDS[chosen.size]
    with ExitStack() as stack:
        folder = own_database(stack, API_RATE="0")
        from django.db import connection

        postgresql = connection.vendor == "postgresql"
        operations, secret = _prepare(CUSTOMERS[chosen.size])
        connection.close()
        servers = [_start(stack, name, folder) for name in _names(postgresql and chosen.size != "smoke")]
        figures = []
        for operation in operations:
            measured = _measure(folder, operation, servers, secret, share=SHARE[chosen.size], rounds=rounds)
            sys.stderr.write(table(measured))
            figures += measured
        if not postgresql:
            for server in servers:
                server.process.terminate()
            figures.append(_crowd(stack, folder, operations, secret, share=SHARE[chosen.size]))
        report(figures)


def _names(peers: bool) -> list[str]:
    """Who is measured. A smoke is over before slow starters would have started."""
    names = ["hub", "raw"]
    if not peers:
        return names
    if all(importlib.util.find_spec(name) for name in ("fastapi", "sqlalchemy", "uvicorn", "greenlet")):
        names.append(FASTAPI)
    else:
        sys.stdout.write(f"{FASTAPI} is not installed: uv sync --group benchmarks\n")
    return [*names, "ModelViewSet"]


def _prepare(count: int) -> tuple[list[Operation], str]:
    """Fill the database; returns what is asked and the key to ask with."""
    from connectors.api.filters import write_cursor
    from connectors.models import ApiKey, Connection
    from customers.ids import public_id
    from customers.models import Customer
    from tests.benchmarks.people import customers, fill

    organization = fill(count=count)
    here = {"organization": organization, "direction": Connection.Direction.CALLS_US}
    shop = Connection.objects.create(provider="cheqpay", name="calls us", account="M-1", **here)
    Connection.objects.create(provider="rootfi", name="company", account="7", **here)
    _, secret = ApiKey.issue(organization=organization, name="benchmark")
    pks = [*Customer.objects.filter(archived_at=None).order_by("pk").values_list("pk", flat=True)]
    ids = [public_id("cust", pk) for pk in pks]
    deep = write_cursor(pks[len(pks) * 9 // 10], {}, organization=organization)
    chance = random.Random(7)
    new = customers(10_000_000, seed=77)
    number = iter(range(10**9))
    one, many = "/api/v1/unified/customer", "/api/v1/unified/customers"

    def values(*more: str) -> dict[str, Any]:
        given = {"phone": "", "email": "", **next(new)}
        given["email"] = f"c{next(number)}@example.com"  # Links wants one of each
        return {name: given[name] for name in ("name", "email", "phone", "address_line1", "address_city", *more)}

    def some(*more: str) -> dict[str, Any]:
        return values("address_postal_code", "address_country", *more)

    def rootfi() -> tuple[str, str, Any]:
        data = [
            {"platform_id": f"p{next(number)}", **{name: given[name] for name in ("name", "email", "phone")}}
            for given in (values() for _ in range(100))
        ]
        return "POST", "/v3/ecommerce/customers", {"company_id": 7, "data": data}

    def known() -> tuple[str, str, Any]:
        # Half of them are there already.
        which = chance.randrange(200) if chance.random() < 0.5 else 1000 + next(number)
        return "PUT", f"/api/v1/unified/connections/{shop.public_id}/customers/s{which}", some()

    def batch() -> tuple[str, str, Any]:
        return "POST", f"{many}/bulk", {"items": [{"action": "create", "values": some()} for _ in range(100)]}

    all_three = ("raw", FASTAPI, "ModelViewSet")
    four, create = {"raw": 0.4}, {"raw": 0.4, FASTAPI: 2.0}
    return [
        Operation(
            name="create", count=600, make=lambda: ("POST", one, some()), goal="G4", aims=create, peers=all_three
        ),
        Operation(
            name="update",
            count=600,
            make=lambda: ("PATCH", f"{one}/{chance.choice(ids)}", {"phone": f"+4930{chance.randrange(10**6, 10**7)}"}),
            goal="G4",
            aims=four,
            peers=all_three,
        ),
        Operation(
            name="read one",
            count=1000,
            make=lambda: ("GET", f"{one}/{chance.choice(ids)}", None),
            goal="G4",
            aims=four,
            peers=all_three,
        ),
        Operation(name="upsert by external id", count=500, make=known, goal="G5", aims=four),
        Operation(name="batch of 100", count=24, make=batch, goal="G5", aims={"raw": 0.6}),
        Operation(name="RootFi's batch of 100", count=24, make=rootfi, goal="G5", aims={"raw": 0.6}),
        Operation(
            name="list of 100",
            count=100,
            make=lambda: ("GET", f"{many}?limit=100&cursor=", None),
            goal="G5",
            aims={"raw": 0.5},
            peers=all_three,
        ),
        Operation(
            name="list of 100, deep",
            count=100,
            make=lambda: ("GET", f"{many}?limit=100&cursor={deep}", None),
            goal="G5",
            aims={"raw": 0.5},
        ),
    ], secret


def _measure(
    folder: Path, operation: Operation, servers: Sequence[Server], secret: str, *, share: float, rounds: int
) -> list[Figure]:
    from django.db import connection

    postgresql = connection.vendor == "postgresql"
    count = max(CLIENTS, round(operation.count * share))
    asked = {server.name: server for server in servers if server.name in ("hub", *operation.peers)}
    for server in asked.values():
        server.used.clear()

    def side(server: Server) -> Callable[[], float]:
        def rate() -> float:
            requests = [_request(*operation.make(), secret) for _ in range(count)]
            before = _used(server)
            took = _send(folder, server, requests)
            server.used.append((_used(server) - before) / count)
            return count / took

        return rate

    warm = 1
    rates = in_turn({name: side(server) for name, server in asked.items()}, rounds=rounds, warm=warm)
    hub = asked.pop("hub")
    figures = []
    for name, server in asked.items():
        aims: Any = {"at_least": operation.aims.get(name)}
        if not postgresql and operation.aims.get(name):
            aims = {"at_least": 0.3 if operation.name == "create" else None}
        goal = operation.goal if postgresql else "G10"
        what = f"{operation.name}, beside {name}"
        figures.append(
            Figure(
                goal=goal,
                what=what,
                hub=statistics.median(rates["hub"]),
                yardstick=statistics.median(rates[name]),
                unit="requests/s",
                ratio=ratio(rates["hub"], rates[name]),
                **aims,
            )
        )
        ours, theirs = hub.used[warm:], server.used[warm:]
        if all(ours) and all(theirs):
            figures.append(
                Figure(
                    goal=goal,
                    what=f"{what}, CPU",
                    hub=1000 * statistics.median(ours),
                    yardstick=1000 * statistics.median(theirs),
                    unit="ms/request",
                    ratio=ratio(theirs, ours),
                    **aims,
                )
            )
    return figures


def _crowd(stack: ExitStack, folder: Path, operations: Sequence[Operation], secret: str, *, share: float) -> Figure:
    """Two processes of the hub on one file, eight clients that write and read: the share of requests that were done."""
    server = _start(stack, "hub", folder, workers=2)
    mixed = [operation for operation in operations if operation.count >= 500]
    requests = [_request(*operation.make(), secret) for operation in mixed for _ in range(round(500 * share))]
    random.Random(1).shuffle(requests)
    bad = _answer(folder, server.port, requests)["bad"]
    failed = sum(number for status, number in bad.items())
    if failed:
        sys.stdout.write(f"turned away by two processes on one file: {bad}\n")
    done = len(requests) - failed
    return Figure(
        goal="G10",
        what="two processes, eight clients: done of what was asked",
        hub=done,
        yardstick=len(requests),
        unit="requests",
        ratio=done / len(requests),
        at_least=1.0,
    )


def _start(stack: ExitStack, name: str, folder: Path, *, workers: int = 1) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    granian = [sys.executable, "-m", "granian", "--interface", "wsgi", "--port", str(port), "--blocking-threads", "8"]
    granian += ["--http", "1", "--no-ws", "--log-level", "warning"]
    module = "tests.benchmarks.peers"
    command = {
        "hub": [
            *(sys.executable, "manage.py", "serve", "--no-worker", "--port", str(port)),
            *("--workers", str(workers), "--threads", "8"),
        ],
        "raw": [*granian, f"{module}.raw:application"],
        "ModelViewSet": [*granian, f"{module}.drf:application"],
        FASTAPI: [
            *(sys.executable, "-m", "uvicorn", "--port", str(port), "--log-level", "warning"),
            f"{module}.fast:app",
        ],
    }[name]
    log = stack.enter_context(_log(folder, name).open("wb"))
    process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    stack.callback(process.wait)
    stack.callback(process.terminate)
    ends = time.monotonic() + 60
    while time.monotonic() < ends and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return Server(name=name, port=port, process=process)
        time.sleep(0.1)
    raise SystemExit(f"{name} does not answer:\n{_log(folder, name).read_text()[-3000:]}")


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name.split()[0]}.log"


def _request(method: str, path: str, body: Any, secret: str) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\napi_key: {secret}\r\n"
    return head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def _answer(folder: Path, port: int, requests: Sequence[bytes]) -> dict[str, Any]:
    file = folder / "requests"
    file.write_bytes(pickle.dumps([*requests]))
    command = [sys.executable, "-m", "tests.benchmarks.peers.load", str(port), str(CLIENTS), str(file)]
    said: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return said


def _send(folder: Path, server: Server, requests: Sequence[bytes]) -> float:
    """Seconds. Every request must be answered well: a refusal is quicker than the work."""
    said = _answer(folder, server.port, requests)
    if said["bad"]:
        wrote = _log(folder, server.name).read_text()[-3000:]
        raise SystemExit(f"{server.name} answered {said['bad']} to {requests[0][:60]!r} and others:\n{wrote}")
    return float(said["seconds"])


def _used(server: Server) -> float:
    """Seconds of processor time that the server and its connections to the database have used; 0 where nobody tells."""
    processes = {int(path.name): _stat(path) for path in Path("/proc").glob("[0-9]*")}
    family = {server.process.pid}
    while more := {pid for pid, stat in processes.items() if stat and stat[0] in family} - family:
        family |= more
    family |= _backends()
    return sum(stat[1] for pid in family if (stat := processes.get(pid)))


def _stat(path: Path) -> tuple[int, float] | None:
    """The parent of a process and its processor time."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK


def _backends() -> set[int]:
    """The processes of a PostgreSQL on this machine that serve this database: only one server is asked at a time."""
    from django.db import connection

    if connection.vendor != "postgresql":
        return set()
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return {pid for (pid,) in cursor.fetchall()}


if __name__ == "__main__":
    main()
