"""What the tests of sizes stand on: a hub and the fake provider in one process, in a time that only sleeping moves."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import httpx2
from django.conf import settings
from django.db.models import F, QuerySet

from connectors.models import Connection, CustomerLink, Issue, SyncRun
from connectors.outbound import Session
from connectors.provider import Provider
from connectors.sync.pull import pull
from connectors.sync.push import push
from connectors.sync.request import request
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.fake import in_process, register
from tests.fake.connector import CONNECTORS
from tests.fake.control import Account
from tests.fake.judge import Judge
from tests.fake.server import FakeProvider

STAFF = Actor(kind="user", name="Staff")
FULL = bool(os.environ.get("HUB_FULL"))
SEED = int(os.environ.get("HUB_SEED", "7"))
CHUNK = 2000


def size(commit: int, full: int) -> int:
    """How many, by commit and with HUB_FULL=1."""
    return full if FULL else commit


def say(**figures: object) -> None:
    """One line per figure, for whoever runs pytest with -s or reads a failure."""
    for name, value in figures.items():
        sys.stdout.write(f"{name.replace('_', ' ')}: {value}\n")


class Clock:
    """A time that passes by a millisecond whenever somebody looks, and by as much as anybody sleeps."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.lock = threading.Lock()

    def __call__(self) -> datetime:
        with self.lock:
            self.now += timedelta(milliseconds=1)
            return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += timedelta(seconds=seconds)


class Wire(httpx2.BaseTransport):
    """The way to the fake provider, with a hand in it: `change` is given each answer's body and returns another."""

    def __init__(self, fake: FakeProvider) -> None:
        self.inner = fake.transport()
        self.change: Callable[[bytes], bytes] = lambda body: body

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self.inner.handle_request(request)
        body = self.change(response.read())
        headers = {name: value for name, value in response.headers.items() if name.lower() != "content-length"}
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)


@dataclass(kw_only=True)
class System:
    """A connection, and the account that it leads to."""

    connection: Connection
    account: Account
    provider: Provider
    session: Session
    wire: Wire
    clock: Clock
    rng: Random = field(default_factory=lambda: Random(SEED))

    @property
    def links(self) -> QuerySet[CustomerLink]:
        return CustomerLink.objects.filter(connection=self.connection)

    @property
    def dirty(self) -> QuerySet[CustomerLink]:
        return self.links.filter(pushed_version__lt=F("needed_version"), deleted_at=None)

    @property
    def issues(self) -> QuerySet[Issue]:
        return Issue.objects.filter(connection=self.connection).order_by("pk")

    @property
    def judge(self) -> Judge:
        return self.account.judge()

    def request(self, ids: Sequence[UUID] | None = None) -> SyncRun:
        return request(connection=self.connection, actor=STAFF, customer_ids=ids, now=self.clock())

    def push(self, **more: Any) -> Counter[str]:
        return push(
            connection=self.connection,
            provider=self.provider,
            session=self.session,
            clock=self.clock,
            rng=self.rng,
            sleep=self.clock.sleep,
            **more,
        )

    def pull(self, **more: Any) -> SyncRun:
        return pull(
            connection=self.connection,
            provider=self.provider,
            session=self.session,
            clock=self.clock,
            rng=self.rng,
            sleep=self.clock.sleep,
            **more,
        )

    def drain(self, *, days: int = 2) -> None:
        """Push until nothing waits for its time any more; what is parked stays."""
        end = self.clock.now + timedelta(days=days)
        while self.clock.now < end:
            self.push()
            due = self.dirty.exclude(next_attempt_at=None).order_by("next_attempt_at").values_list("next_attempt_at")
            first = due.first()
            if first is None:
                return
            self.connection.refresh_from_db(fields=["not_before", "breaker_until"])
            waits = (first[0], self.connection.not_before, self.connection.breaker_until)
            self.clock.now = max(self.clock.now, *filter(None, waits))
        raise AssertionError(f"{self.dirty.count()} links are still waiting")


@dataclass(kw_only=True)
class Hub:
    fake: FakeProvider
    clock: Clock
    organization: Organization

    def system(
        self,
        name: str = "shop",
        *,
        offers: Mapping[str, Any],
        normaliser: str = "same",
        **fields: Any,
    ) -> System:
        """An account that offers this, and a connection that knows it."""
        account = self.fake.account(name, capabilities=dict(offers), normaliser=normaliser, seed=SEED)
        connection = Connection.objects.create(
            organization=self.organization,
            provider="fake" if normaliser == "same" else f"fake_{normaliser}",
            name=name,
            account=name,
            base_url=account.url,
            options=account.options(),
            **fields,
        )
        provider = next(one for one in CONNECTORS if one.slug == connection.provider)
        wire = Wire(self.fake)
        session = provider.session(connection, client=httpx2.Client(transport=wire))
        return System(
            connection=connection, account=account, provider=provider, session=session, wire=wire, clock=self.clock
        )

    def customers(self, values: Sequence[Mapping[str, Any]]) -> list[Customer]:
        made: list[Customer] = []
        for first in range(0, len(values), CHUNK):
            made += editing.create(
                organization=self.organization,
                values=values[first : first + CHUNK],
                actor=STAFF,
                at=self.clock(),
            )
        return made

    def edit(self, values: Mapping[UUID, Mapping[str, Any]]) -> None:
        """As staff do, and wait until it is due."""
        ids = list(values)
        for first in range(0, len(ids), CHUNK):
            some = {pk: values[pk] for pk in ids[first : first + CHUNK]}
            editing.update(organization=self.organization, values=some, actor=STAFF, at=self.clock())
        self.clock.sleep(settings.PUSH_DEBOUNCE_SECONDS)


@contextlib.contextmanager
def hub(slug: str = "demo") -> Iterator[Hub]:
    """An empty hub. Prints its seed."""
    say(seed=SEED)
    register()
    clock = Clock()
    with in_process(clock=lambda: clock.now, sleep=clock.sleep) as fake:
        organization = Organization.objects.create(name="Demo", slug=slug)
        yield Hub(fake=fake, clock=clock, organization=organization)
