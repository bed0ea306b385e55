"""A provider that costs next to nothing, in a process of its own: the dialect of tests.fake, without faults or ledger.

    python -m tests.benchmarks.provider --latency 0.05

prints its address once it listens, and ends with its standard input. It answers each request after the same time, and
`GET /counted` says for each account how many requests and records came, and when the last record did.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import orjson


class Counted:
    def __init__(self) -> None:
        self.requests = 0
        self.sent = 0
        self.records: set[bytes] = set()
        self.last = 0.0

    def take(self, marker: bytes) -> None:
        self.sent += 1
        if marker not in self.records:
            self.records.add(marker)
            self.last = time.monotonic()


class Http(asyncio.Protocol):
    """One connection: each request is counted when it comes and answered `latency` seconds later."""

    def __init__(self, accounts: dict[bytes, Counted], latency: float) -> None:
        self.accounts = accounts
        self.latency = latency
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            at = head.lower().find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            path = head.split(b" ", 2)[1]
            if path == b"/counted":
                self.answer(self.counted())
            else:
                self.loop.call_later(self.latency, self.answer, self.stored(path, body))

    def stored(self, path: bytes, body: bytes) -> bytes:
        _, _, account, _, *rest = path.split(b"/")
        counted = self.accounts.setdefault(account, Counted())
        counted.requests += 1
        if rest[0] != b"batch":  # by-external/{marker}
            counted.take(rest[1])
            return body[:-1] + b',"id":"%s","revision":"1"}' % rest[1]
        rows = []
        for row in orjson.loads(body)["rows"]:
            counted.take(row["marker"].encode())
            rows.append({"marker": row["marker"], "status": 201, "record": {**row, "id": row["marker"]}})
        return orjson.dumps({"rows": rows})

    def counted(self) -> bytes:
        return orjson.dumps(
            {
                name.decode(): {"requests": c.requests, "sent": c.sent, "records": len(c.records), "last": c.last}
                for name, c in self.accounts.items()
            }
        )

    def answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


class Provider:
    """The running process. Times are of this machine's monotonic clock."""

    def __init__(self, url: str) -> None:
        self.url = url

    def address(self, account: str) -> str:
        """A connection's base_url."""
        return f"{self.url}/a/{account}"

    def counted(self) -> dict[str, dict[str, Any]]:
        with httpx2.Client(trust_env=False, timeout=60) as client:
            found: dict[str, dict[str, Any]] = client.get(f"{self.url}/counted").json()
        return found


@contextmanager
def running(*, latency: float) -> Iterator[Provider]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.provider", "--latency", str(latency)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Provider(process.stdout.readline().decode().strip())
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


async def _serve(latency: float) -> None:
    loop = asyncio.get_running_loop()
    accounts: dict[bytes, Counted] = {}
    server = await loop.create_server(lambda: Http(accounts, latency), "127.0.0.1", 0, backlog=2048)
    ended = asyncio.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await ended.wait()
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, required=True)
    asyncio.run(_serve(parser.parse_args().latency))
