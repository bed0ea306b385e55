"""The sweep finds what lost answers left behind: it links, it reports, and it deletes nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext

from connectors.exceptions import ConnectionUnusable, Rejected, RetryLater
from connectors.guard import close_shared_client
from connectors.models import Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync import sweep as sweeping
from connectors.sync.pull import AlreadyRunning, pull
from connectors.sync.push import push
from connectors.sync.request import request
from connectors.sync.sweep import due_sweeps, sweep, unfit
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.test_commands import run
from tests.fake import in_process, register

ACTOR = Actor(kind="user", name="Anna")
NOTHING = {"lists": True, "fetches": True}  # a lost create can neither be repeated nor looked for
LAGGING = {**NOTHING, "look_up": "lagging"}


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Shop:
    """A connection to an account of the fake provider, with a clock that both go by; on a socket, real time."""

    def __init__(self, organization: Organization, *, socket: bool = False, **capabilities: Any) -> None:
        self.provider = register()
        self.clock = Clock()
        self.fake = in_process(clock=None if socket else self.clock)
        if socket:
            self.fake.start()
        self.socket = socket
        self.organization = organization
        self.account = self.fake.account("shop", capabilities=capabilities)
        self.connection = Connection.objects.create(
            organization=organization,
            provider="fake",
            name="shop",
            direction=Connection.Direction.PUSH,
            base_url=self.account.url,
            options=self.account.options(),
        )

    def close(self) -> None:
        self.fake.close()
        close_shared_client()

    @property
    def engine(self) -> dict[str, Any]:
        session = self.provider.session(self.connection, client=None if self.socket else self.fake.client())
        clock = {} if self.socket else {"clock": self.clock, "sleep": self.clock.advance}
        return {"connection": self.connection, "provider": self.provider, "session": session, **clock}

    def customers(self, number: int = 1, **values: Any) -> list[Customer]:
        rows = [{"name": f"Example {n}", "email": f"{n}@example.com", **values} for n in range(number)]
        return editing.create(organization=self.organization, values=rows, actor=ACTOR)

    def edit(self, customer: Customer, **values: Any) -> None:
        editing.update(organization=self.organization, values={customer.pk: values}, actor=ACTOR)

    def push(self, *customers: Customer) -> SyncRun:
        now = None if self.socket else self.clock()
        asked = request(
            connection=self.connection, actor=ACTOR, customer_ids=[c.pk for c in customers] or None, now=now
        )
        push(**self.engine)
        asked.refresh_from_db()
        return asked

    def due(self) -> None:
        """What an edit made due by real time is due by the clock of this test."""
        CustomerLink.objects.exclude(next_attempt_at=None).update(next_attempt_at=self.clock())

    def lose(self, number: int = 1) -> list[CustomerLink]:
        """Customers whose creates were applied and never answered."""
        made = self.customers(number)
        self.account.script("reset_after", method="POST", times=number)
        self.push(*made)
        return [self.link(customer) for customer in made]

    def link(self, customer: Customer) -> CustomerLink:
        return CustomerLink.objects.get(connection=self.connection, customer=customer)

    def sweep(self, **options: Any) -> SyncRun:
        self.clock.advance(1)
        return sweep(**self.engine, **options)

    def issues(self, kind: str) -> list[Issue]:
        return list(Issue.objects.filter(connection=self.connection, kind=kind, resolved_at=None).order_by("pk"))


@pytest.fixture
def shops(organization: Organization, settings: Any) -> Iterator[Any]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    made: list[Shop] = []

    def make(**given: Any) -> Shop:
        made.append(Shop(organization, **given))
        return made[-1]

    yield make
    for shop in made:
        shop.close()


def totals(swept: SyncRun) -> dict[str, int]:
    assert swept.total == swept.planned
    return {name: getattr(swept, name) for name in SyncRun.TOTALS if getattr(swept, name)}


def test_a_lost_create_is_linked_and_what_is_newer_follows_as_an_update(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    assert (link.state, link.remote_id, link.next_attempt_at) == (LinkState.UNCERTAIN, None, None)
    shop.edit(link.customer, phone="+49 30 5550")
    swept = shop.sweep()
    assert (swept.state, totals(swept)) == ("succeeded", {"created": 1})
    link.refresh_from_db()
    intent = PushIntent.objects.get()
    assert (link.remote_id, link.state, link.pushed_version, link.lease_token) == ("r1", "open", 1, "")
    assert link.base_local == intent.sent_values
    assert (intent.outcome, link.is_dirty) == ("ok", True)
    shop.due()
    push(**shop.engine)
    judge = shop.account.judge()
    assert [(w["kind"], w["after"].get("phone")) for w in judge.writes()] == [
        ("create", None),
        ("update", "+49 30 5550"),
    ]
    assert (judge.count(), shop.link(link.customer).is_dirty) == (1, False)
    assert totals(shop.sweep()) == {"unchanged": 1}


def test_the_run_that_waits_for_the_lost_create_ends(shops: Any) -> None:
    shop = shops(**LAGGING)
    [link] = shop.lose()
    assert link.run is not None
    assert link.run.finished_at is None
    swept = shop.sweep()
    assert totals(swept) == {"created": 1}
    link.run.refresh_from_db()
    assert (link.run.state, link.run.created, link.run.planned) == ("succeeded", 1, 1)
    assert shop.link(link.customer).run is None


def test_a_second_record_is_reported_and_the_linked_one_kept(shops: Any) -> None:
    shop = shops(**NOTHING)
    [customer] = shop.customers()
    shop.push()
    link = shop.link(customer)
    second = shop.account.create(name="Example 0", marker=str(link.uid))
    swept = shop.sweep()
    assert (swept.state, totals(swept)) == ("partly_succeeded", {"unchanged": 1, "uncertain": 1})
    [issue] = shop.issues("duplicate")
    assert issue.details == {"customer": str(customer.pk), "remote_ids": ["r1", second]}
    assert shop.link(customer).remote_id == "r1"
    shop.sweep()
    [again] = shop.issues("duplicate")
    assert (again.pk, again.count) == (issue.pk, 2)
    assert [w["kind"] for w in shop.account.judge().writes(who="api")] == ["create"]
    shop.account.delete(second)
    assert totals(shop.sweep()) == {"unchanged": 1}
    assert shop.issues("duplicate") == []


def test_of_two_unlinked_records_the_older_one_is_linked(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    shop.clock.advance(60)
    second = shop.account.create(name="Example 0", email="0@example.com", marker=str(link.uid))
    swept = shop.sweep()
    assert totals(swept) == {"created": 1, "uncertain": 1}
    assert shop.link(link.customer).remote_id == "r1"
    [issue] = shop.issues("duplicate")
    assert issue.details["remote_ids"] == ["r1", second]
    assert shop.account.judge().count() == 2


def test_records_on_different_pages_make_one_issue_that_names_them_all(shops: Any) -> None:
    shop = shops(**NOTHING)
    [customer] = shop.customers()
    shop.push()
    uid = str(shop.link(customer).uid)
    ids = ["r1"]
    for _ in range(2):
        for n in range(120):
            shop.account.create(name=f"Stranger {n}")
        ids.append(shop.account.create(name="Example 0", marker=uid))
    swept = shop.sweep()
    assert totals(swept) == {"unchanged": 1, "uncertain": 2, "skipped": 240}
    [issue] = shop.issues("duplicate")
    assert issue.details["remote_ids"] == ids


def test_a_marker_of_nobody_is_an_orphan_until_it_is_gone(shops: Any) -> None:
    shop = shops(**NOTHING)
    orphans = [shop.account.create(name=f"Orphan {n}", marker=str(uuid7())) for n in range(2)]
    shop.account.create(name="Stranger")
    shop.account.create(name="Somebody else's key", marker=str(uuid4()))
    swept = shop.sweep()
    assert totals(swept) == {"uncertain": 2, "skipped": 2}
    assert [issue.details["remote_id"] for issue in shop.issues("orphan")] == orphans
    shop.account.delete(orphans[0])
    shop.sweep()
    assert [issue.fingerprint for issue in shop.issues("orphan")] == orphans[1:]


def test_a_record_that_a_pull_took_in_is_nobodys_orphan(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.account.create(name="Made by another hub", email="x@example.com", marker=str(uuid7()))
    pull(**shop.engine)
    assert totals(shop.sweep()) == {"unchanged": 1}
    assert Issue.objects.count() == 0


def test_tombstones_and_former_records_are_no_orphans(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.connection.delete_policy = "recreate"
    shop.connection.save()
    kept, gone = shop.customers(2)
    shop.push()
    uid = shop.link(gone).uid
    CustomerLink.objects.filter(customer=gone).update(deleted_at=shop.clock(), state=LinkState.REMOTE_DELETED)
    shop.account.delete("r1" if shop.link(kept).remote_id == "r1" else "r2")
    shop.edit(kept, name="Renamed")
    shop.due()
    push(**shop.engine)  # answers 404: it is made again
    again = shop.link(kept)
    assert (again.former_remote_id != "", again.remote_id) == (True, "r3")
    shop.account.undelete(again.former_remote_id)
    assert totals(shop.sweep()) == {"unchanged": 3}
    assert Issue.objects.count() == 0
    assert shop.link(gone).uid == uid
    # Long after it was deleted, a list shows it because somebody brought it back.
    shop.clock.advance(3600)
    assert totals(shop.sweep()) == {"unchanged": 2, "uncertain": 1}
    assert len(shop.issues("duplicate")) == 1


def test_a_create_under_way_is_left_to_its_worker(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    CustomerLink.objects.update(lease_token="worker", lease_until=shop.clock() + timedelta(seconds=60))
    assert totals(shop.sweep()) == {"skipped": 1}
    assert shop.link(link.customer).remote_id is None


def test_a_record_of_an_older_create_is_told_by_what_it_says(shops: Any) -> None:
    shop = shops(**NOTHING)
    same, other = shop.lose(2)
    PushIntent.objects.update(outcome="failed")
    CustomerLink.objects.update(state=LinkState.REJECTED)
    shop.account.edit(
        next(r["id"] for r in shop.account.records(marker=str(other.uid))),
        name="Renamed there",
        email="new@example.com",
    )
    assert totals(shop.sweep()) == {"created": 1, "uncertain": 1}
    assert shop.link(same.customer).remote_id is not None
    assert shop.link(other.customer).remote_id is None
    assert len(shop.issues("orphan")) == 1


def test_an_incomplete_sweep_closes_no_issue(shops: Any) -> None:
    shop = shops(**NOTHING)
    orphan = shop.account.create(name="Orphan", marker=str(uuid7()))
    shop.sweep()
    shop.account.delete(orphan)
    for n in range(150):
        shop.account.create(name=f"Stranger {n}")
    answers = iter([False, True, True, True, True])
    stopped = shop.sweep(stop=lambda: next(answers))
    assert (stopped.state, stopped.error) == ("cancelled", sweeping.STOPPED)
    shop.account.script("503", method="GET", skip=1)
    with pytest.raises(RetryLater):
        shop.sweep()
    assert (SyncRun.objects.latest("pk").state, SyncRun.objects.latest("pk").skipped) == ("failed", 100)
    shop.sweep(limit=10)
    shop.sweep(dry_run=True)
    assert len(shop.issues("orphan")) == 1
    shop.sweep()
    assert shop.issues("orphan") == []


def test_records_that_cannot_be_read_may_be_those_of_an_issue(shops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fake import connector

    shop = shops(**NOTHING)
    orphan = shop.account.create(name="Orphan", marker=str(uuid7()))
    shop.sweep()
    read = connector.record

    def unreadable(document: Any) -> Any:
        if document["id"] == orphan:
            raise connector.OutcomeUnknown("It cannot be read.")
        return read(document)

    monkeypatch.setattr(connector, "record", unreadable)
    swept = shop.sweep()
    assert totals(swept) == {"refused": 1}
    assert len(shop.issues("orphan")) == 1


def test_a_dry_run_stores_nothing_but_its_run(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    shop.account.create(name="Orphan", marker=str(uuid7()))
    before = CustomerLink.objects.values().get()
    assert totals(shop.sweep(dry_run=True)) == {"created": 1, "uncertain": 1}
    assert (CustomerLink.objects.values().get(), Issue.objects.count()) == (before, 0)
    assert shop.link(link.customer).remote_id is None


def test_what_is_kept_until_the_end_has_a_bound(shops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "KEPT", 2)
    monkeypatch.setattr(sweeping, "PAGE_ROWS", 2)
    shop = shops(**NOTHING)
    links = shop.lose(7)
    held = []
    original = sweeping._link

    def watched(this: Any, at: datetime) -> None:
        held.append(len(this.unlinked))
        original(this, at)

    monkeypatch.setattr(sweeping, "_link", watched)
    assert totals(shop.sweep()) == {"created": 7}
    assert max(held) <= 3
    assert all(shop.link(link.customer).remote_id for link in links)


def statements(shop: Shop) -> int:
    with CaptureQueriesContext(database) as queries:
        shop.sweep()
    return len(queries)


def test_the_number_of_statements_does_not_grow_with_the_page(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.lose(2)
    doubled = shop.customers(2)
    shop.push(*doubled)
    for customer in doubled:
        shop.account.create(name="Second", marker=str(shop.link(customer).uid))
        shop.account.create(name="Orphan", marker=str(uuid7()))
    few = statements(shop)
    CustomerLink.objects.filter(customer__in=doubled).delete()
    Issue.objects.all().delete()
    shop.lose(30)
    for n in range(50):
        shop.account.create(name=f"Orphan {n}", marker=str(uuid7()))
    assert statements(shop) <= few


def test_a_lost_login_is_told_and_the_run_ends(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.account.script("401", method="GET")
    with pytest.raises(ConnectionUnusable):
        shop.sweep()
    shop.connection.refresh_from_db()
    assert shop.connection.state == "needs_reauth"
    assert SyncRun.objects.get().state == "failed"


def test_one_sweep_of_a_connection_at_a_time(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.sweep()
    SyncRun.objects.update(finished_at=None, state="running", updated_at=shop.clock())
    with pytest.raises(AlreadyRunning, match="sweep of shop"):
        shop.sweep()
    shop.clock.advance(sweeping.SILENCE.total_seconds())
    assert shop.sweep().state == "succeeded"
    assert SyncRun.objects.earliest("pk").error == "The process that ran it ended."


def test_a_sweep_is_due_once_a_day(shops: Any) -> None:
    shop = shops(**NOTHING)

    def due() -> bool:
        with CaptureQueriesContext(database) as queries:
            found = due_sweeps(providers=PROVIDERS, now=shop.clock())
        assert len(queries) == 1
        return [connection.pk for connection in found] == [shop.connection.pk]

    assert not due()  # nothing was ever sent there
    shop.customers()
    shop.push()
    assert due()
    shop.sweep(limit=1)
    shop.sweep(dry_run=True)
    assert due()
    shop.sweep()
    assert not due()
    shop.clock.advance(23 * 3600)
    assert not due()
    shop.clock.advance(3600)
    assert due()
    shop.account.script("503", method="GET")
    with pytest.raises(RetryLater):
        shop.sweep()
    assert not due()
    shop.clock.advance(3600)
    assert due()
    SyncRun.objects.filter(kind="sync").update(finished_at=None, updated_at=shop.clock())
    assert not due()
    shop.clock.advance(3600)
    assert due()
    Connection.objects.update(state=Connection.State.PAUSED)
    assert not due()
    Connection.objects.update(state=Connection.State.ACTIVE, options={"capabilities": {}})
    assert not due()


def test_what_cannot_be_swept_is_told_in_words(shops: Any, connect: Any) -> None:
    shop = shops(fetches=True)
    with pytest.raises(Rejected, match="no way to list"):
        shop.sweep()
    assert not SyncRun.objects.exists()
    for provider, words in (("cheqpay", "no way to list"), ("links", "no room for our marker"), ("commenda", "")):
        connection = connect(provider, direction="push")
        assert words in unfit(connection=connection, provider=PROVIDERS[provider])
    inbound = connect("rootfi", direction="pull")
    assert "Nothing is sent" in unfit(connection=inbound, provider=PROVIDERS["rootfi"])
    found = run("sweep_customers", "links")
    assert (found.code, found.out) == (2, "")
    assert "no room for our marker" in found.err


# sweep_customers


@pytest.mark.django_db(transaction=True)
def test_the_command_links_reports_and_ends_with_3(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    [link] = shop.lose()
    shop.account.create(name="Orphan", marker=str(uuid7()))
    dry = run("sweep_customers", "shop", "--dry-run", "--json")
    assert (dry.code, dry.totals) == (3, {"created": 1, "uncertain": 1})
    found = run("sweep_customers", "shop", "--json")
    assert (found.code, found.totals) == (3, {"created": 1, "uncertain": 1})
    assert found.objects[0]["problems"] == [{"state": "orphan", "field": "", "reason": sweeping.ORPHAN, "count": 1}]
    swept = SyncRun.objects.get(public_id=found.objects[0]["run"])
    assert (swept.actor_kind, swept.actor_name, swept.request["sweep"]) == ("command", "sweep_customers", True)
    assert shop.link(link.customer).remote_id == "r1"
    again = run("sweep_customers", "--all")
    _, row, reason = again.out.splitlines()
    assert row.split() == ["shop", "sweep", "0", "0", "1", "0", "0", "1", "0", "2"]
    assert reason == f"orphan: 1 x {sweeping.ORPHAN}"
    shop.account.delete("r2")
    assert run("sweep_customers", "shop").code == 0
    assert run("sweep_customers", "shop", "--since=1d").code == 2
    assert run("sweep_customers").code == 2
    SyncRun.objects.filter(kind="sync").update(finished_at=None)
    assert run("sweep_customers", "shop").code == 4
    SyncRun.objects.filter(kind="sync").delete()
    shop.account.script("401", method="GET")
    assert run("sweep_customers", "shop").code == 5


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("command", "method"), [("sweep_customers", "page"), ("check_customers", "page"), ("retry_customers", "update")]
)
def test_a_stop_ends_each_command_with_130(
    shops: Any, monkeypatch: pytest.MonkeyPatch, command: str, method: str
) -> None:
    shop = shops(socket=True, **NOTHING)
    monkeypatch.setattr("connectors.sync.push.CLAIM_ROWS", 10)
    made = shop.customers(30)
    shop.push()
    for customer in made:
        shop.edit(customer, name="Renamed")
    CustomerLink.objects.update(state=LinkState.REJECTED, next_attempt_at=None)
    for n in range(200):
        shop.account.create(name=f"Stranger {n}")
    called = threading.Lock()
    original = getattr(type(shop.provider), method)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if called.acquire(blocking=False):
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(type(shop.provider), method, interrupted)
    found = run(command, "shop", "--json")
    assert (found.code, sum(found.totals.values())) == (130, found.objects[0]["planned"])
    assert 0 < found.objects[0]["planned"] < 230
    if command == "sweep_customers":
        assert SyncRun.objects.latest("pk").state == "cancelled"
