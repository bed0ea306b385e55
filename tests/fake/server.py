"""The fake provider on a socket, and in this process.

    python -m tests.fake.server --port 0 --file provider.sqlite3

prints the address once it listens. One thread serves everybody: an answer that waits is a timer, so that it holds up
nobody else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Any

import httpx2

from tests.fake.control import Account
from tests.fake.system import Answer, Request, System

HANG = 300.0  # seconds after which a caller that still waits is cut off
COMMIT_EVERY = 0.05
PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Http(asyncio.Protocol):
    """One keep-alive connection: a request at a time, each answered before the next is looked at."""

    def __init__(self, system: System, connections: set[Http]) -> None:
        self.system = system
        self.connections = connections
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connections.add(self)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self.connections.discard(self)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.timer is None:
            self.work()

    def work(self) -> None:
        while self.timer is None and not self.transport.is_closing():
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {}
            for line in lines[1:]:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            words = lines[0].split(" ")
            length = headers.get("content-length", "0")
            if len(words) != 3 or not length.isdigit() or "transfer-encoding" in headers:
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.transport.close()
                return
            whole = end + 4 + int(length)
            if len(self.buffer) < whole:
                return
            body = bytes(self.buffer[end + 4 : whole])
            del self.buffer[:whole]
            answer = self.system.handle(Request(method=words[0], target=words[1], headers=headers, body=body))
            closes = headers.get("connection", "").lower() == "close"
            if answer.delay > 0:
                self.timer = self.loop.call_later(answer.delay, self.later, answer, closes)
            else:
                self.send(answer, closes)

    def later(self, answer: Answer, closes: bool) -> None:
        self.timer = None
        self.send(answer, closes)
        self.work()

    def send(self, answer: Answer, closes: bool) -> None:
        if answer.wire == "hang":
            self.timer = self.loop.call_later(HANG, self.reset)
            return
        if answer.wire == "reset":
            self.reset()
            return
        head = [f"HTTP/1.1 {answer.status} {PHRASES.get(answer.status, '')}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        if answer.status != 204:
            head.append(f"Content-Length: {len(answer.body)}")
        if closes:
            head.append("Connection: close")
        raw = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n"
        if answer.wire == "half_body":
            self.transport.write(raw + answer.body[: len(answer.body) // 2])
            self.transport.close()
        elif answer.wire == "drip":
            self.transport.write(raw)
            self.timer = self.loop.call_later(answer.pause, self.drip, answer, 0, closes)
        else:
            self.transport.write(raw + answer.body)
            if closes:
                self.transport.close()

    def drip(self, answer: Answer, position: int, closes: bool) -> None:
        self.timer = None
        self.transport.write(answer.body[position : position + 1])
        if position + 1 < len(answer.body):
            self.timer = self.loop.call_later(answer.pause, self.drip, answer, position + 1, closes)
        elif closes:
            self.transport.close()
        else:
            self.work()

    def reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            # Zero seconds to linger: the other side reads a reset, not an orderly end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


async def serve(system: System, *, port: int, ready: Callable[[int], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set. `ready` is told the port."""
    loop = asyncio.get_running_loop()
    connections: set[Http] = set()
    server = await loop.create_server(lambda: Http(system, connections), "127.0.0.1", port, backlog=512)
    ready(server.sockets[0].getsockname()[1])
    try:
        while not stop.is_set():
            system.flush()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), COMMIT_EVERY)
    finally:
        server.close()
        for connection in list(connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        await server.wait_closed()


class Body(httpx2.SyncByteStream):
    """An answer's body on its way through no socket at all."""

    def __init__(self, answer: Answer, request: httpx2.Request) -> None:
        self.answer = answer
        self.request = request

    def __iter__(self) -> Iterator[bytes]:
        if self.answer.wire == "drip":
            yield self.answer.body[:1]
            raise httpx2.ReadTimeout("The answer drips.", request=self.request)
        if self.answer.wire == "half_body":
            yield self.answer.body[: len(self.answer.body) // 2]
            raise httpx2.RemoteProtocolError("The connection was closed in the body.", request=self.request)
        yield self.answer.body


class FakeProvider:
    """The provider in this process. `client` reaches it without sockets; `start` also opens a port.

    `clock` is the provider's time. Without sockets nothing waits: a hang is a ReadTimeout at once, and `sleep`, if
    there is one, is told how many seconds an answer would have taken.
    """

    def __init__(
        self,
        *,
        file: str | None = None,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.system = System(file, clock=clock)
        self.sleep = sleep
        self.url = "https://fake.example.com"
        self._thread: threading.Thread | None = None
        self._end: Callable[[], object] = lambda: None

    def __enter__(self) -> FakeProvider:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def account(self, name: str = "main", **settings: Any) -> Account:
        return Account(self, name, settings)

    def configure(self, name: str, **settings: Any) -> dict[str, Any]:
        return self.system.configure(name, **settings)

    def control(self, name: str, verb: str, **given: Any) -> Any:
        return self.system.control(name, verb, **given)

    def rows(self) -> Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]:
        return self.system.query

    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self._respond)

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=self.transport())

    def _respond(self, request: httpx2.Request) -> httpx2.Response:
        answer = self.system.handle(
            Request(
                method=request.method,
                target=request.url.raw_path.decode(),
                headers={name.lower(): value for name, value in request.headers.items()},
                body=request.content,
            )
        )
        taken = answer.delay
        if answer.wire in ("hang", "drip"):
            taken = request.extensions.get("timeout", {}).get("read") or 0.0
        if self.sleep is not None and taken:
            self.sleep(taken)
        if answer.wire == "hang":
            raise httpx2.ReadTimeout("No answer came.", request=request)
        if answer.wire == "reset":
            raise httpx2.ReadError("The connection was reset.", request=request)
        headers = dict(answer.headers)
        if answer.status != 204:
            headers["Content-Length"] = str(len(answer.body))
        return httpx2.Response(answer.status, headers=headers, stream=Body(answer, request), request=request)

    def start(self, port: int = 0) -> str:
        """Listen, in a thread. Returns the address, which is `url` from then on."""
        started = threading.Event()
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        failed: list[BaseException] = []

        def ready(number: int) -> None:
            self.url = f"http://127.0.0.1:{number}"
            started.set()

        def run() -> None:
            try:
                loop.run_until_complete(serve(self.system, port=port, ready=ready, stop=stop))
            except BaseException as error:
                failed.append(error)
            finally:
                loop.close()
                started.set()

        self._end = lambda: loop.call_soon_threadsafe(stop.set)
        self._thread = threading.Thread(target=run, name="fake provider")
        self._thread.start()
        started.wait(10)
        if failed:
            raise failed[0]
        return self.url

    def close(self) -> None:
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._end()
            self._thread.join(10)
            self._thread = None
        self.system.close()


async def _main(system: System, port: int, until_eof: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_eof:

        def watch() -> None:
            sys.stdin.buffer.read()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=watch, daemon=True).start()

    def ready(number: int) -> None:
        sys.stdout.write(f"http://127.0.0.1:{number}\n")
        sys.stdout.flush()

    await serve(system, port=port, ready=ready, stop=stop)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A provider that can misbehave, for the tests of the engine.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--file", required=True, help="the SQLite file of records and ledger")
    parser.add_argument("--until-eof", action="store_true", help="stop when standard input ends")
    chosen = parser.parse_args(arguments)
    system = System(chosen.file)
    try:
        asyncio.run(_main(system, chosen.port, chosen.until_eof))
    finally:
        system.close()


if __name__ == "__main__":
    main()
