"""A provider that speaks a dialect of its own, can be told to misbehave, and keeps a ledger of all that reached it.

    fake = in_process(clock=clock)                      no sockets; fake.client() goes into a Session
    with running(tmp_path) as fake:                     a process of its own, on a real socket

    shop = fake.account("shop", capabilities={"create_key": True})
    shop.script("reset_after", method="POST")           the next POST is applied, and its answer lost
    shop.judge().duplicates()

`register` makes the connector known, also in a worker that a test starts.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from tests.fake.control import Account
from tests.fake.system import Refused

if TYPE_CHECKING:
    from tests.fake.connector import Fake
    from tests.fake.server import FakeProvider

# The connector and the server are imported inside the functions: `python -m tests.fake.server` runs without the hub,
# and must not have imported itself before.


def register() -> Fake:
    """Put the connector into the list of providers, once. Needs Django to be set up."""
    from connectors.providers import PROVIDERS
    from tests.fake.connector import CONNECTORS

    for connector in CONNECTORS:
        PROVIDERS.setdefault(connector.slug, connector)
    return CONNECTORS[0]


def in_process(**given: Any) -> FakeProvider:
    """The provider in this process: see `FakeProvider`."""
    from tests.fake.server import FakeProvider

    return FakeProvider(**given)


class Running:
    """The provider as a process, steered over its own HTTP."""

    def __init__(self, url: str, file: Path) -> None:
        self.url = url
        self.file = file
        self.http = httpx2.Client(base_url=url, trust_env=False, timeout=30)
        self._judging: list[sqlite3.Connection] = []

    def account(self, name: str = "main", **settings: Any) -> Account:
        return Account(self, name, settings)

    def configure(self, name: str, **settings: Any) -> dict[str, Any]:
        return dict(self._read(self.http.put(f"/control/{name}", json=settings)))

    def control(self, name: str, verb: str, **given: Any) -> Any:
        return self._read(self.http.post(f"/control/{name}/{verb}", json=given))

    def rows(self) -> Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]:
        database = sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)
        self._judging.append(database)
        return lambda sql, values: database.execute(sql, values).fetchall()

    def close(self) -> None:
        self.http.close()
        for database in self._judging:
            database.close()

    def _read(self, response: httpx2.Response) -> Any:
        if response.status_code != 200:
            raise Refused(response.status_code, **response.json()["error"])
        return response.json()


@contextlib.contextmanager
def running(folder: Path, *, port: int = 0) -> Iterator[Running]:
    """Start the provider as a process with its file in `folder`, and stop it at the end. A second time it goes on."""
    file = folder / "provider.sqlite3"
    with (folder / "provider.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake.server", "--port", str(port), "--file", str(file), "--until-eof"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,  # its end is the sign that this process is gone
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        if not url:
            raise RuntimeError((folder / "provider.log").read_text())
        fake = Running(url, file)
        try:
            yield fake
        finally:
            fake.close()
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdin.close()
        process.stdout.close()
