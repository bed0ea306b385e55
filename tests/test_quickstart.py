"""The quickstart on a fresh machine: its printed commands work as they stand, and edits travel between its tenants."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

MANAGE = str(settings.BASE_DIR / "manage.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what leads a child to another database."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "HUB_DATA", "DJANGO_SETTINGS_MODULE")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def until(check: Callable[[], Any], *, seconds: float = 60.0) -> Any:
    """What `check` returns once it is true."""
    last = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < last, "It did not come about in time."
        time.sleep(0.1)
    return found


class Running:
    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    @property
    def out(self) -> str:
        return self.log.read_text()

    def ready(self) -> bool:
        assert self.process.poll() is None, self.out
        return "Ctrl-C stops the hub" in self.out

    @property
    def key(self) -> str:
        return found(r"API key\s+(hub_\S+)", self.out)

    def api(self, method: str, path: str, key: str, body: Any = None) -> Any:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v1/unified/{path}",
            method=method,
            data=json.dumps(body).encode() if body else None,
            headers={"Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)

    def count(self, key: str, name: str = "") -> int:
        """How many customers the organization with this key has, all or those of one name."""
        first = self.api("GET", "customers?limit=100", key)
        pages = [self.api("GET", f"customers?limit=100&page={n}", key) for n in range(2, first["totalPages"] + 1)]
        names = [row["name"] for page in (first, *pages) for row in page["data"]]
        return names.count(name) if name else len(names)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def group(leader: int) -> list[int]:
    """The processes that descend from this one, however far."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in table.splitlines()]
    family = [leader]
    for member in family:
        family += [pid for pid, parent in parents if parent == member]
    return family[1:]


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@contextmanager
def quickstart(data: Path, port: int, log: Path) -> Iterator[Running]:
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, MANAGE, "quickstart", "--port", str(port), "--data", str(data), "--no-browser"],
            env=environment(),
            stdout=out,
            stderr=out,
            text=True,
        )
    running = Running(process, port, log)
    try:
        until(running.ready)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.mark.skipif(not shutil.which("curl"), reason="the printed commands need curl")
def test_the_quickstart_works_as_it_says(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with quickstart(data, free_port(), tmp_path / "first.log") as hub:
        password, key = found(r"password\s+(\S+)", hub.out), hub.key
        notes = json.loads((data / "quickstart.json").read_text())
        assert oct((data / "quickstart.json").stat().st_mode & 0o777) == "0o600"
        assert (notes["password"], notes["demo_key"]) == (password, key)

        # The examples: once for each of the four systems, but for the one that Links refuses.
        until(lambda: hub.count(notes["partner_key"]) == 99)

        # What is printed, pasted.
        commands = re.findall(r"^curl .*?(?=\n\n)", hub.out, re.MULTILINE | re.DOTALL)
        assert len(commands) == 4
        assert sum("-H 'api_key: " in command for command in commands) == 1
        for command in commands:
            answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
            assert re.match(r"HTTP/1.1 20[01] ", answer), answer
            assert '"id"' in answer or '"externalId"' in answer or '"rootfi_id"' in answer, answer

        # An edit by a system that calls us arrives in the other tenant.
        rows = hub.api("GET", "customers?limit=100", key)["data"]
        edited = next(row for row in rows if row["name"].startswith("Example"))
        before = hub.count(notes["partner_key"], edited["name"])
        hub.api("PUT", f"customer/{edited['id']}", key, {"name": "Example Renamed", "email": edited["email"]})
        until(lambda: hub.count(notes["partner_key"], "Example Renamed") == before)

        family = group(hub.process.pid)
        assert len(family) >= 3  # the server, its worker process, and the worker
        hub.process.send_signal(signal.SIGINT)
        assert hub.process.wait(30) == 0
        assert not [pid for pid in family if alive(pid)]

    # Again, elsewhere: everything is still there, and still travels.
    with quickstart(data, free_port(), tmp_path / "second.log") as hub:
        assert hub.key == key
        assert found(r"password\s+(\S+)", hub.out) == password
        assert hub.api("GET", f"customer/{edited['id']}", key)["data"]["name"] == "Example Renamed"
        assert hub.count(key) == 25 + 4
        hub.api("PUT", f"customer/{edited['id']}", key, {"name": "Example Twice", "email": edited["email"]})
        until(lambda: hub.count(notes["partner_key"], "Example Twice") == before)


def once(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, MANAGE, *arguments],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_serving_it_is_set_up_and_printed(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    first = once("quickstart", "--no-serve", "--data", data)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    second = once("quickstart", "--no-serve", "--port", "8123", HUB_DATA=data)
    assert second.stdout == first.stdout.replace(":8000", ":8123")
    listed = once("shell", "-v0", "-c", SHOW, HUB_DATA=data).stdout.splitlines()
    assert listed == [
        "cheqpay push M-2002 http://127.0.0.1:8123 api_key",
        "commenda push_and_pull corp_partner http://127.0.0.1:8123/api/v1 api_key",
        "links push  http://127.0.0.1:8123/api/v1 api_key",
        "rootfi push_and_pull 2089 http://127.0.0.1:8123/v3 api_key",
        "25",
    ]


SHOW = """
from connectors.models import Connection
from customers.models import Customer
for c in Connection.objects.filter(organization__slug="demo").exclude(direction="calls_us"):
    print(c.name, c.direction, c.account, c.base_url, *c.unseal_credentials())
print(Customer.objects.count())
"""


def test_a_hub_in_use_is_left_alone(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    assert once("migrate", "-v0", HUB_DATA=data).returncode == 0
    assert once("create_api_key", "shop", "--name=x", "--create-organization", HUB_DATA=data).returncode == 0
    refused = once("quickstart", "--no-serve", HUB_DATA=data)
    assert refused.returncode == 2
    assert "leaves them alone" in refused.stderr
    assert refused.stdout == ""


def test_a_taken_port_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = once("quickstart", "--port", str(port), "--data", str(tmp_path / "data"))
    assert refused.returncode == 2
    assert f"--port {port + 1}" in refused.stderr
    assert not (tmp_path / "data" / "quickstart.json").exists()
    assert once("quickstart", "--port", "70000").returncode == 2


def test_production_has_no_quickstart(tmp_path: Path) -> None:
    refused = once(
        "quickstart",
        HUB_DATA=str(tmp_path),
        PRODUCTION="true",
        SECRET_KEY="x" * 50,
        SEALING_KEYS="A" * 43,
        ALLOWED_HOSTS="hub.example.com",
    )
    assert refused.returncode == 2
    assert "manage.py serve" in refused.stderr


def test_serve_ends_with_1_when_a_part_of_it_ends(tmp_path: Path) -> None:
    data, port = str(tmp_path / "data"), free_port()
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, MANAGE, "serve", "--migrate", "--port", str(port)],
            env=environment(HUB_DATA=data),
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: "The worker runs" in (tmp_path / "log").read_text())
        family = group(process.pid)
        os.kill(worker_of(family), signal.SIGKILL)
        assert process.wait(30) == 1
        assert not [pid for pid in family if alive(pid)]
        assert "stopped by itself" in (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()


def worker_of(family: list[int]) -> int:
    for pid in family:
        shown = subprocess.run(
            ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if "run_worker" in shown:
            return pid
    raise AssertionError("there is no worker")
