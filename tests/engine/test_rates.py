"""Eight workers share one account's rate: it is used up, not overstepped, and who waits for an answer goes first (R10).

Real processes call the fake provider, which has a rate limit of its own. The rule's 10 calls a second would take half
an hour for 20,000 links; the rate is scaled here, and with it all times: the first minute, and the ten seconds within
which a "push now" is to arrive, are so many calls at that rate.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from django.conf import settings
from django.db import connection as database

from connectors.models import Connection, CustomerLink, Issue
from connectors.sync.request import request
from customers import editing
from customers.models import Organization
from tests.engine.bench import CHUNK, FULL, STAFF, say, size
from tests.fake import register, running

WORKERS = 8
LINKS = size(700, 20_000)
RATE = 40
SCALE = RATE / 10
FIRST_MINUTE, PUSH_NOW = 60 / SCALE, 10 / SCALE
URGENT_EVERY = 0.4
# Its input ends when the test does, however that ends.
WORKER = """
import os, sys, threading
import django
django.setup()
from tests.fake import register
register()
from django.core.management import call_command
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(3)), daemon=True).start()
print("ready")
call_command("run_worker", threads=1)
"""


def database_url() -> str:
    name, login = database.settings_dict["NAME"], settings.DATABASES["default"]
    if database.vendor != "postgresql":
        return f"sqlite:///{name}"
    user = quote(login["USER"]) + (f":{quote(login['PASSWORD'])}" if login["PASSWORD"] else "")
    return f"postgres://{user}@{login['HOST']}:{login['PORT'] or 5432}/{name}"


@contextlib.contextmanager
def workers(folder: Path, url: str) -> Iterator[None]:
    """So many workers that look for work by themselves. Each must end cleanly."""
    environment = {
        **os.environ,
        "DATABASE_URL": database_url(),
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
        "ALLOW_HTTP_TARGETS": "true",
        "ALLOWED_TARGET_PORTS": str(urlsplit(url).port),
        "DATABASE_POOL_MAX": "4",
    }
    processes = []
    with (folder / "workers.log").open("wb") as log:
        try:
            for _ in range(WORKERS):
                started = subprocess.Popen(
                    [sys.executable, "-u", "-c", WORKER],
                    env=environment,
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
                processes.append(started)
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline(), (folder / "workers.log").read_text()
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(timeout=40) for process in processes]
            for process in processes:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.close()
                process.stdout.close()
    assert codes == [0] * WORKERS, (folder / "workers.log").read_text()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def test_eight_workers_use_the_rate_and_keep_to_it(transactional_db: None, tmp_path: Path) -> None:
    register()
    organization = Organization.objects.create(name="Demo", slug="demo")
    with running(tmp_path) as fake:
        account = fake.account("shop", capabilities={"upsert_external_id": True}, rate=float(RATE))
        connection = Connection.objects.create(
            organization=organization,
            provider="fake",
            name="shop",
            base_url=account.url,
            options=account.options(),
            rate=RATE,
        )
        for first in range(0, LINKS, CHUNK):
            number = min(CHUNK, LINKS - first)
            editing.create(organization=organization, values=[{"name": "Bulk"}] * number, actor=STAFF)
        asked: dict[str, float] = {}
        with workers(tmp_path, fake.url):
            request(connection=connection, actor=STAFF)
            bulk = {str(uid) for uid in CustomerLink.objects.values_list("uid", flat=True)}
            begun, end = time.time(), time.time() + 60 + 3 * LINKS / RATE
            while len(fake.rows()("SELECT 1 FROM records", [])) < LINKS + len(asked) and time.time() < end:
                if CustomerLink.objects.filter(pushed_version=0, customer__name="Bulk").exists():
                    [customer] = editing.create(organization=organization, values=[{"name": "Now"}], actor=STAFF)
                    at = time.time()
                    request(connection=connection, actor=STAFF, customer_ids=[customer.pk], urgent=True)
                    asked[str(CustomerLink.objects.get(customer=customer).uid)] = at
                time.sleep(URGENT_EVERY)
        judge = account.judge()
        requests = judge.requests()
        first_at = requests[0]["at"]
        arrived: dict[str, float] = {}
        for write in judge.writes(kind="create"):
            arrived.setdefault(write["marker"], write["at"])
        assert arrived.keys() == bulk | asked.keys()
        assert not judge.duplicates()

        later = [one["status"] for one in requests if one["at"] >= first_at + FIRST_MINUTE]
        refused = later.count(429)
        # While the bulk goes on, each call of the other kind takes one of its.
        last = max(arrived[uid] for uid in bulk)
        others = sum(at <= last for uid, at in arrived.items() if uid in asked)
        ideal = (LINKS + others - RATE) / RATE
        waited = [arrived[uid] - at for uid, at in asked.items()]
        say(
            workers=WORKERS,
            rate=f"{RATE}/s instead of 10/s",
            links=LINKS,
            refused_in_the_first_minute=sum(one["status"] == 429 for one in requests) - refused,
            refused_later=f"{refused} of {len(later)}",
            bulk=f"{last - first_at:.1f} s of an ideal {ideal:.1f} s, {100 * (last - first_at) / ideal:.1f} %",
            seconds_until_it_began=f"{first_at - begun:.2f}",
            push_now=f"{len(waited)} links, p50 {percentile(waited, 0.5):.2f} s, p95 {percentile(waited, 0.95):.2f} s,"
            f" of {PUSH_NOW:.2f} s allowed",
        )
        assert len(later) > 40
        assert len(waited) > 10
        assert refused <= 0.01 * len(later)
        assert last - first_at <= (1.15 if FULL else 1.5) * ideal
        assert percentile(waited, 0.95) < PUSH_NOW
        assert not Issue.objects.exists()
