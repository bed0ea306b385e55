"""Pushes per second through one worker against a system that answers in 50 ms.

    python -m tests.benchmarks.push_rate [--links 2000] [--latency 0.05]

Uses a database of its own: a file of SQLite, or with DATABASE_URL a new database on that server. Prints the rate as a
share of the ideal (concurrent calls / latency), the CPU time of this process per push, and how many connections to the
database it held while calls were under way.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--links", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.05)
    chosen = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _database(folder, stack)
        _measure(folder, stack, links=chosen.links, latency=chosen.latency)


def _database(folder: Path, stack: ExitStack) -> None:
    url = os.environ.get("DATABASE_URL", "")
    if url:
        import psycopg

        name = f"hub_bench_{os.getpid()}"
        server = stack.enter_context(psycopg.connect(url, autocommit=True))
        server.execute(f"CREATE DATABASE {name}")
        stack.callback(server.execute, f"DROP DATABASE {name} WITH (FORCE)")
        os.environ["DATABASE_URL"] = f"{url.rpartition('/')[0]}/{name}"
    else:
        os.environ["DATABASE_URL"] = f"sqlite:///{folder / 'hub.sqlite3'}"
    os.environ["ALLOWED_PRIVATE_NETWORKS"] = "127.0.0.0/8"
    os.environ["ALLOW_HTTP_TARGETS"] = "true"
    os.environ["DJANGO_SETTINGS_MODULE"] = "hub.settings"
    os.environ["HUB_DATA"] = str(folder)
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def _measure(folder: Path, stack: ExitStack, *, links: int, latency: float) -> None:
    from django.db import connection as database
    from django.db import connections

    from connectors.models import Connection, CustomerLink
    from connectors.sync.push import CONCURRENT_CALLS
    from connectors.sync.request import request
    from connectors.worker import Worker
    from customers import editing
    from customers.editing import Actor
    from customers.models import Organization
    from tests.fake import register, running

    stack.callback(connections.close_all)
    register()
    staff = Actor(kind="command", name="benchmark")
    organization = Organization.objects.create(name="Demo", slug="demo")
    fake = stack.enter_context(running(folder))
    account = fake.account("shop", capabilities={"upsert_external_id": True}, latency=latency)
    connection = Connection.objects.create(
        organization=organization,
        provider="fake",
        name="shop",
        direction=Connection.Direction.PUSH,
        base_url=account.url,
        options=account.options(),
    )
    values = [{"name": f"Customer {n}", "email": f"{n}@example.com"} for n in range(links)]
    editing.create(organization=organization, values=values, actor=staff)
    request(connection=connection, actor=staff)

    held: list[tuple[int, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            with database.cursor() as cursor:
                if database.vendor == "postgresql":
                    cursor.execute(
                        "SELECT count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%')"
                        " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                    held.append(cursor.fetchone())
        database.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    worker = Worker(threads=1)
    began, cpu = time.monotonic(), time.process_time()
    worker.run(once=True)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    sent = CustomerLink.objects.exclude(remote_id=None).count()
    ideal = CONCURRENT_CALLS / latency
    say = sys.stdout.write
    say(f"{database.vendor}: {sent} of {links} pushed in {took:.1f} s: {sent / took:.0f}/s,")
    say(f" {100 * sent / took / ideal:.0f} % of the ideal {ideal:.0f}/s")
    say(f" ({CONCURRENT_CALLS} calls of {latency * 1000:.0f} ms)\n")
    say(f"CPU of the worker: {1000 * cpu / max(sent, 1):.2f} ms per push\n")
    if held:
        say(f"connections to the database while calls were under way: at most {max(total for total, _ in held)},")
        say(f" in an open transaction on average {sum(idle for _, idle in held) / len(held):.2f}\n")


if __name__ == "__main__":
    main()
