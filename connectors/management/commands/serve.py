"""Serve the hub, and do its work, until told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import CommandParser

from connectors.management.cli import Exit, HubCommand, WrongUse, positive, stopping

READY_SECONDS = 30.0
# A call to a provider may take half a lease; after that nothing worth waiting for is left.
STOP_SECONDS = 40.0


class Command(HubCommand):
    help = "Serve the hub and run a worker beside it, until Ctrl-C or SIGTERM."
    examples = """\
  manage.py serve
  manage.py serve --migrate --host 0.0.0.0 --port 8080 --threads 16
  manage.py serve --no-worker          where workers run elsewhere"""
    epilog = """Both are stopped together, with exit code 0. If one of them ends by itself the other is stopped and the
code is 1. A second Ctrl-C stops at once. Code 2: the port is taken."""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (default %(default)s).")
        parser.add_argument("--port", type=port, default=8000, help="Port to listen on (default %(default)s).")
        parser.add_argument("--workers", type=positive, default=1, metavar="N", help="Processes that answer requests.")
        parser.add_argument("--threads", type=positive, default=8, metavar="N", help="Threads of each.")
        parser.add_argument("--no-worker", action="store_true", help="Only answer requests.")
        parser.add_argument("--migrate", action="store_true", help="Bring the database up to date first.")

    def handle(self, *args: Any, **options: Any) -> None:
        check_port(options["host"], options["port"])
        if options["migrate"]:
            call_command("migrate", interactive=False, verbosity=0)
        address = url_of(options["host"], options["port"])

        def tell() -> None:
            self.say(f"The hub is at {address}/ and its admin at {address}/admin/. Ctrl-C stops it.")

        self.end(
            serve(
                self,
                host=options["host"],
                port=options["port"],
                workers=options["workers"],
                threads=options["threads"],
                with_worker=not options["no_worker"],
                ready=tell,
            )
        )


def port(text: str) -> int:
    """An argument type: a port number."""
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port: the highest is 65535.")
    return number


def check_port(host: str, number: int) -> None:
    """Raises WrongUse when the port cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise WrongUse(
            f"Port {number} of {host} cannot be used: {error.strerror}. Choose another, as in --port {number + 1}."
        ) from error


def url_of(host: str, number: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::", "localhost"):
        host = "127.0.0.1"
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"


def serve(
    command: HubCommand,
    *,
    host: str,
    port: int,
    workers: int = 1,
    threads: int = 8,
    with_worker: bool = True,
    environment: Mapping[str, str] | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Exit:
    """Run the web server and a worker as children until told to stop; stop both when either ends.

    `ready` is called when the server answers. The worker starts then: a hub that sends to itself is awake by that time.
    """
    server = [sys.executable, "-m", "granian", "hub.wsgi:application", "--interface", "wsgi"]
    server += ["--host", host, "--port", str(port), "--workers", str(workers), "--blocking-threads", str(threads)]
    server += ["--http", "1", "--no-ws", "--log-level", "warning", "--workers-kill-timeout", "30"]
    worker = [sys.executable, str(settings.BASE_DIR / "manage.py"), "run_worker"]
    family = Family({**os.environ, **(environment or {})}, settings.BASE_DIR)
    with stopping(command.say, "Stopping. Press Ctrl-C again to stop at once.") as stop:
        try:
            family.start(server)
            began = time.monotonic()
            while not (answered := _is_ready(url_of(host, port))) and not stop() and not family.ended():
                if time.monotonic() - began > READY_SECONDS:
                    break
                stop.wait(0.1)
            if answered and not stop():
                if with_worker:
                    family.start(worker)
                ready()
                while not stop.wait(0.3) and not family.ended():
                    pass
            if stop():
                return Exit.DONE
            command.complain("The hub has stopped by itself." if family.ended() else "The hub does not answer.")
            return Exit.FAILED
        finally:
            family.stop()


class Family:
    """Child processes that live and end together.

    Each leads a process group of its own: a terminal's Ctrl-C reaches this process alone, and a child is asked once.
    """

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self.environment = environment
        self.directory = directory
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str]) -> None:
        self.children.append(
            subprocess.Popen(
                arguments,
                env=dict(self.environment),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        )

    def ended(self) -> bool:
        """Whether any child has ended."""
        return any(child.poll() is not None for child in self.children)

    def stop(self) -> None:
        """Ask all to end and wait for it; end those that do not, and whatever they have started."""
        for child in self.children:
            if child.poll() is None:
                child.terminate()
        try:
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                last = time.monotonic() + STOP_SECONDS
                for child in self.children:
                    child.wait(max(last - time.monotonic(), 0.1))
        finally:
            for child in self.children:
                with suppress(ProcessLookupError):  # the usual case: nobody of that group is left
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
