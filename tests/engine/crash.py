"""A hub that dies at a numbered point of its work, and the clean one that goes on after it: a process of its own.

    python -m tests.engine.crash        reads jobs, a line of JSON each, and answers each with a line

Django is set up once. A job is two forks with an organization and an account of their own: the first does the work of a
scenario and ends with `os._exit(137)` at the point it was told, the second works on until nothing is left to do.

Points are before and after every commit, every write outside a transaction, and every request. The product knows
nothing of them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import django

ROOT = Path(__file__).resolve().parents[2]
KILLED = 137
# What a lost request, a dead lease and a waiting retry need at most; the clocks of hub and provider are moved by it.
ROUND = 400.0
ROUNDS = 12
OFFERS: dict[str, dict[str, Any]] = {
    "upsert": {"upsert_external_id": True},
    "strong": {"look_up": "strong", "conditional": True},
    "nothing": {},
}
READS = {"lists": True, "fetches": True, "incremental": True, "shows_deleted": "flag", "deletes": True}
SCENARIOS = ("push", "pull", "login", "merge")

Tell = Callable[[dict[str, Any]], None]


class Points:
    """The points that were passed, in order. At number `die_at` the process ends; None lets it live."""

    def __init__(self, die_at: int | None, tell: Tell) -> None:
        self.die_at = die_at
        self.tell = tell
        self.armed = False
        self.passed = 0

    def reach(self, what: str) -> None:
        if not self.armed:
            return
        self.passed += 1
        self.tell({"point": self.passed, "name": f"{what} {_place()}"})
        if self.passed == self.die_at:
            os._exit(KILLED)


def _place() -> str:
    """The function of the product that the point is in."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("connectors", "customers"):
            named = path.relative_to(ROOT).as_posix()
            if named not in ("connectors/outbound.py", "customers/bulk.py"):
                return f"{named}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def counted(points: Points) -> Iterator[None]:
    """Pass a point before and after every commit, every write outside a transaction, and every request."""
    from unittest import mock

    from django.db import connection as database
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.test import override_settings

    from connectors.outbound import Session

    commit, send = BaseDatabaseWrapper.commit, Session.send

    def committing(wrapper: BaseDatabaseWrapper) -> None:
        points.reach("before commit")
        commit(wrapper)
        points.reach("after commit")

    def sending(session: Session, method: str, path: str, **more: Any) -> Any:
        points.reach(f"before {method}")
        try:
            return send(session, method, path, **more)
        finally:
            points.reach(f"after {method}")

    def writing(execute: Callable[..., Any], sql: str, values: Any, many: bool, context: dict[str, Any]) -> Any:
        alone = not context["connection"].in_atomic_block
        if not alone or not sql.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
            return execute(sql, values, many, context)
        points.reach("before write")
        result = execute(sql, values, many, context)
        points.reach("after write")
        return result

    with (
        mock.patch.object(BaseDatabaseWrapper, "commit", committing),
        mock.patch.object(Session, "send", sending),
        override_settings(PUSH_CONCURRENT_CALLS=1),
        mock.patch("connectors.sync.push.ThreadPoolExecutor", AtOnce),
        mock.patch("connectors.sync.pull.PAGE_ROWS", 2),
        database.execute_wrapper(writing),
    ):
        yield


class AtOnce:
    """A pool that does what it is given before it goes on: one thread, so that points come in one order."""

    def __init__(self, **ignored: Any) -> None:
        pass

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, do: Callable[..., Any], *given: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(do(*given))
        return future


class Clock:
    """The real time and what has been added to it."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def __call__(self) -> datetime:
        from django.utils import timezone

        return timezone.now() + timedelta(seconds=self.offset)


class Hub:
    """One organization with one connection in the database of the job, and the people who work with it.

    The name of a customer tells who it is in the scenario; streets are numbered, so that it can be told which is newer.
    """

    def __init__(self, job: dict[str, Any], tell: Tell) -> None:
        from customers.editing import Actor
        from tests.fake import Running

        self.job = job
        self.tell = tell
        self.scenario = str(job["scenario"])
        self.fake = Running(job["url"], Path(job["file"]))
        self.clock = Clock()
        self.number = 0
        self.staff = Actor(kind="user", name="Staff")

    @property
    def pulls(self) -> bool:
        return self.scenario == "pull"

    def open(self) -> None:
        """What is there before anything can go wrong: three customers in both systems, all of it in agreement."""
        from connectors.models import Connection
        from customers.models import Organization

        self.account = self.fake.account(
            self.job["account"],
            capabilities={**READS, **OFFERS[self.job["kind"]]},
            auth="oauth" if self.scenario == "login" else "",
        )
        self.organization = Organization.objects.create(name="Demo", slug=self.job["account"])
        made = Connection(
            organization=self.organization,
            provider="fake",
            name="system",
            direction=Connection.Direction.PUSH_AND_PULL if self.pulls else Connection.Direction.PUSH,
            create_policy=Connection.CreatePolicy.AUTOMATIC,
            archive_policy=Connection.ArchivePolicy.DELETE,
            base_url=self.account.url,
            options=self.account.options(),
            remote_account_id=f"acct_{self.job['account']}",
            pull_interval=60 if self.pulls else None,
        )
        if self.scenario == "login":
            made.seal_credentials(self.account.credentials())
        made.save()
        self.connection = made
        for name in "ABC":
            self.create(name)
        self.work()

    def again(self) -> None:
        """The same after a restart: what is known is in the database."""
        from connectors.models import Connection
        from customers.models import Organization

        self.account = self.fake.account(self.job["account"])
        self.organization = Organization.objects.get(slug=self.job["account"])
        self.connection = Connection.objects.select_related("organization").get(organization=self.organization)
        self.clock.offset = self.account.settings["time_offset"]

    # What staff do. What has returned was saved, and must never be lost.

    def create(self, name: str) -> None:
        from customers import editing

        values = {"name": name, "address_line1": self.street(), "address_city": f"City {name}"}
        editing.create(organization=self.organization, values=[values], actor=self.staff)
        self.saved(name, values)

    def update(self, name: str) -> None:
        from customers import editing

        values = {"address_line1": self.street()}
        editing.update(organization=self.organization, values={self.customer(name).pk: values}, actor=self.staff)
        self.saved(name, values)

    def archive(self, name: str) -> None:
        from customers import editing

        editing.archive(organization=self.organization, ids=[self.customer(name).pk], actor=self.staff)
        self.tell({"archived": name})

    def merge(self, survivor: str, loser: str) -> None:
        """Once: after a restart the person does what was not saved before."""
        from customers import editing
        from customers.models import Customer

        there = {
            one.name: one for one in Customer.objects.filter(organization=self.organization, name__in=(survivor, loser))
        }
        if len(there) == 2 and there[loser].merged_into_id is None:
            editing.merge(
                organization=self.organization,
                survivor=there[survivor].pk,
                loser=there[loser].pk,
                values={"address_city": there[loser].address_city},
                actor=self.staff,
            )
        self.tell({"merged": loser})

    def street(self) -> str:
        self.number += 1
        return f"Street {self.number}"

    def saved(self, name: str, values: dict[str, str]) -> None:
        self.tell({"saved": name, **values})

    def customer(self, name: str) -> Any:
        from customers.models import Customer

        return Customer.objects.get(organization=self.organization, name=name)

    # What workers do

    def work(self) -> None:
        """What is due, until nothing is."""
        from connectors.worker import pull_slice, push_slice

        if self.pulls:
            self.pass_(61.0)
            pull_slice(self.connection.pk, clock=self.clock)
        for _ in range(20):
            if not push_slice(self.connection.pk, clock=self.clock):
                return
        raise AssertionError("a push finds something to do for ever")

    def pass_(self, seconds: float) -> None:
        self.clock.offset += seconds
        self.account.advance(seconds)

    # Scenarios

    def prepare(self) -> None:
        """What other people do before the points are counted."""
        if self.pulls:
            ids = {one["fields"]["name"]: one["id"] for one in self.account.records()}
            self.account.edit(ids["A"], address_city="Theirs A")
            self.account.edit(ids["B"], address_line1="Theirs B")
            self.account.delete(ids["C"])
            for name in "NOP":
                self.account.create(name=name, address_line1=f"There {name}", address_city=f"City {name}")
        elif self.scenario == "login":
            self.account.revoke("access")

    def run(self) -> None:
        getattr(self, f"_{self.scenario}")()

    def _push(self) -> None:
        self.create("D")
        self.create("E")
        self.update("A")
        self.archive("C")
        self.work()
        self.update("A")
        self.update("D")
        self.work()

    def _pull(self) -> None:
        self.update("A")
        self.update("B")
        self.create("D")
        self.work()
        self.update("N")
        self.work()

    def _login(self) -> None:
        self.update("A")
        self.create("D")
        self.work()
        self.pass_(3500.0)  # the token is about to end
        self.update("A")
        self.work()

    def _merge(self) -> None:
        self.update("A")
        self.update("B")
        self.create("D")
        self.work()
        self.create("E")
        self.merge("A", "B")
        self.merge("C", "D")
        self.merge("A", "E")
        self.work()

    def recover(self) -> None:
        """What goes on by itself, and what a person does who finds the connection without a login."""
        if self.scenario == "merge":
            self.merge("A", "B")
            self.merge("C", "D")
            self.merge("A", "E")
        for number in range(ROUNDS):
            self.pass_(ROUND)
            self.connection.refresh_from_db()
            if self.connection.state == self.connection.State.NEEDS_REAUTH:
                self.reconnect()
            self.work()
            if number and not self.moving():
                return
        raise AssertionError("it never settles")

    def moving(self) -> bool:
        """Whether there is a link that nobody has to see to and that is not clean."""
        from django.db.models import F

        from connectors.models import CustomerLink

        links = CustomerLink.objects.filter(connection=self.connection, deleted_at=None)
        return links.filter(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False).exists()

    def reconnect(self) -> None:
        from connectors import login
        from connectors.providers import PROVIDERS

        self.tell({"reconnected": True})
        provider = PROVIDERS["fake"]
        self.connection.seal_credentials(self.account.credentials())
        self.connection.save(update_fields=["credentials"])
        session = provider.session(self.connection, clock=self.clock)
        account = provider.account_id(session, self.connection)
        login.reconnect(self.connection, session=session, account_id=account, clock=self.clock)

    def describe(self) -> dict[str, Any]:
        """What the hub knows at the end."""
        from connectors.models import Conflict, CustomerLink, PushIntent
        from customers.models import Customer, CustomerChange

        waiting = (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
        links = CustomerLink.objects.filter(connection=self.connection).order_by("pk")
        creates = PushIntent.objects.filter(link__in=links, outcome__in=waiting, kind=PushIntent.Kind.CREATE)
        lost = Counter(creates.values_list("link_id", flat=True))
        versions: dict[Any, list[int]] = {}
        changes = CustomerChange.objects.filter(organization=self.organization)
        for customer, version in changes.values_list("customer_id", "version").order_by("version"):
            versions.setdefault(customer, []).append(version)
        return {
            "customers": [
                {
                    "id": str(one.pk),
                    "name": one.name,
                    "address_line1": one.address_line1,
                    "address_city": one.address_city,
                    "archived": one.archived_at is not None,
                    "merged": one.merged_into_id is not None,
                    "version": one.version,
                    "versions": versions.get(one.pk, []),
                }
                for one in Customer.objects.filter(organization=self.organization).order_by("pk")
            ],
            "links": [
                {
                    "uid": str(one.uid),
                    "customer": str(one.customer_id),
                    "remote_id": one.remote_id,
                    "state": one.state,
                    "error": one.error,
                    "dirty": one.is_dirty,
                    "duplicate": one.is_duplicate,
                    "deleted": one.deleted_at is not None,
                    "held": one.lease_until is not None and one.lease_until > self.clock(),
                    "lost_creates": lost[one.pk],
                }
                for one in links
            ],
            "conflicts": Conflict.objects.filter(connection=self.connection).count(),
        }


# Forks


def live(job: dict[str, Any], tell: Tell) -> None:
    points = Points(job["die_at"], tell)
    with counted(points):
        hub = Hub(job, tell)
        hub.open()
        hub.prepare()
        points.armed = True
        hub.run()
        points.armed = False


def go_on(job: dict[str, Any], tell: Tell) -> None:
    with counted(Points(None, tell)):
        hub = Hub(job, tell)
        hub.again()
        hub.recover()
        tell(hub.describe())


def in_fork(do: Callable[[dict[str, Any], Tell], None], job: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of a fork that did this, and what it told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)

            def tell(what: dict[str, Any]) -> None:
                # At once: nothing that was told may die with the process.
                os.write(writing, json.dumps(what).encode() + b"\n")

            do(job, tell)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as lines:
        told = [json.loads(line) for line in lines]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def main() -> None:
    django.setup()
    from django.db import connection

    importlib.import_module("connectors.worker")  # once, and not in every fork
    connection.settings_dict["OPTIONS"].pop("pool", None)  # its threads would be many for a life of one thread
    from tests.fake import register

    register()
    for line in sys.stdin:
        job = json.loads(line)
        code, told = in_fork({"live": live, "go_on": go_on}[job["do"]], job)
        sys.stdout.write(json.dumps({"code": code, "told": told}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
