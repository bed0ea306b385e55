"""The first page: the right numbers, of one's own organizations alone, from few statements, and who sends."""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.admin.dashboard import KEPT_SECONDS, Figures, age, figures, nobody_sends
from connectors.admin.needs import KINDS
from connectors.models import Connection, Heartbeat, SyncRun
from connectors.states import HEALTH, STATUSES
from connectors.sync import heartbeat
from connectors.worker import Worker
from customers import editing
from customers.models import Organization
from tests.admin.test_needs_you import put
from tests.connectors.test_admin import COMMAND, new_customer, staff
from tests.connectors.test_celery import BROKER

URL = "/admin/"
RIGHTS = (
    *("customers.view_customer", "customers.view_customerchange", "connectors.view_customerlink"),
    *("connectors.push_customerlink", "connectors.view_connection", "connectors.view_syncrun"),
)


@pytest.fixture
def shop(connect: Callable[..., Connection]) -> Connection:
    return connect("links", name="Shop", account="1", direction="push")


def ran(connection: Connection, *, at: datetime | None = None, kind: str = "push", **totals: int) -> SyncRun:
    run = SyncRun.objects.create(
        public_id=SyncRun.new_public_id(),
        organization=connection.organization,
        connection=connection,
        kind=kind,
        actor_kind="user",
        actor_name="Anna",
        state="succeeded",
        **totals,
    )
    SyncRun.objects.filter(pk=run.pk).update(created_at=at or timezone.now())
    return run


def board(client: Client) -> dict[str, Any]:
    answer = client.get(URL)
    assert answer.status_code == 200
    text = answer.content.decode()
    assert "None" not in text
    return {
        "text": text,
        **{name: answer.context.get(name) for name in ("needs", "days", "systems", "late", "needs_total")},
    }


def counters(organization: Organization) -> Figures:
    cache.clear()
    return figures([organization.pk])


def test_an_empty_hub_says_so(organization: Organization) -> None:
    shown = board(staff(organization, *RIGHTS))
    assert shown["needs_total"] == 0
    for words in (
        "No system is connected yet.",
        "Nothing is running.",
        "No worker has been seen",
        "Nothing has changed",
    ):
        assert words in shown["text"]


def test_what_needs_the_person_by_kind_and_age(shop: Connection, organization: Organization) -> None:
    for days, kind in enumerate(KINDS, 1):
        put(shop, kind, days=days)
        put(shop, kind, days=days / 100)
    shown = board(staff(organization, *RIGHTS))
    assert [(need.number, need.oldest) for need in shown["needs"]] == [(2, f"oldest {n} d") for n in range(1, 6)]
    assert shown["needs_total"] == 10
    assert HEALTH["degraded"].word in shown["text"]
    for kind in KINDS:
        assert STATUSES[kind].word in shown["text"]
        assert f"/admin/connectors/customerlink/needs-you/?kind={kind}" in shown["text"]


def test_pushes_and_errors_are_those_of_the_push_runs_of_each_day(shop: Connection, organization: Organization) -> None:
    now = timezone.now()
    ran(shop, created=3, updated=4, refused=2, unchanged=50, skipped=9)
    ran(shop, at=now - timedelta(days=3), updated=5, uncertain=1, retrying=1)
    ran(shop, at=now - timedelta(days=14), created=1000)
    ran(shop, kind="pull", created=1000)
    shown = board(staff(organization, *RIGHTS))
    days = {day.day: (day.pushed, day.errors) for day in shown["days"]}
    assert len(days) == 14
    assert days.pop(now.date()) == (7, 2)
    assert days.pop((now - timedelta(days=3)).date()) == (5, 2)
    assert set(days.values()) == {(0, 0)}
    [system] = shown["systems"]
    assert (system.pushed, system.errors) == (7, 2)
    assert "12 pushes and 4 errors in all; at most 9 on one day" in shown["text"]
    assert "<details><summary>As a table</summary>" in shown["text"]
    highest = max(shown["days"], key=lambda day: day.pushed)
    assert highest.y_errors + highest.height_errors == highest.y_pushed


def test_the_backlog_of_each_system(
    shop: Connection, organization: Organization, connect: Callable[..., Connection]
) -> None:
    now = timezone.now()
    put(shop, "waiting", next_attempt_at=now - timedelta(minutes=5))
    put(shop, "waiting", next_attempt_at=now + timedelta(minutes=5))
    put(shop, "waiting", next_attempt_at=now - timedelta(minutes=9), lease_until=now + timedelta(minutes=1))
    put(shop, "in_sync", pushed_version=1)
    put(shop, "rejected")
    connect("links", name="Idle", account="2", direction="push")
    idle, busy = board(staff(organization, *RIGHTS))["systems"]
    assert (busy.backlog, busy.share, busy.parked, busy.waiting) == (3, 100, 1, "first due 5 min ago")
    assert (idle.backlog, idle.share, idle.parked, idle.waiting) == (0, 0, 0, "")


def test_only_ones_own_organizations_count(
    shop: Connection, organization: Organization, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    theirs = connect("links", name="Theirs", account="9", direction="push", organization=other_organization)
    for kind in KINDS:
        put(theirs, kind)
    put(theirs, "waiting", next_attempt_at=timezone.now() - timedelta(hours=2))
    ran(theirs, created=77)
    SyncRun.objects.update(state="running")
    # The other's numbers are counted first, and kept: they must not be taken for these.
    elsewhere = board(staff(other_organization, *RIGHTS))
    assert (elsewhere["needs_total"], elsewhere["days"][-1].pushed, elsewhere["late"]) == (5, 77, 1)
    mine = board(staff(organization, *RIGHTS))
    assert (mine["needs_total"], mine["days"][-1].pushed, mine["late"]) == (0, 0, 0)
    assert [system.connection.name for system in mine["systems"]] == ["Shop"]
    assert "Theirs" not in mine["text"]
    assert "rejected 0" not in mine["text"]
    nobody = board(staff(None, *RIGHTS))
    assert (nobody["needs_total"], nobody["systems"]) == (0, [])
    # Who works for both sees both, and what is kept for one of them is not what is kept for both.
    both = staff(organization, *RIGHTS)
    other_organization.members.add(int(both.session["_auth_user_id"]))
    assert board(both)["needs_total"] == 5


@pytest.mark.parametrize(
    ("right", "there"),
    [
        ("connectors.view_connection", ["Pushes and errors per day", "Workers", "Systems</h2>"]),
        ("connectors.view_syncrun", ["Running now"]),
        ("customers.view_customerchange", ["Recent changes"]),
        ("connectors.change_issue", ["Needs you:"]),
    ],
)
def test_each_part_needs_its_right(shop: Connection, organization: Organization, right: str, there: list[str]) -> None:
    text = board(staff(organization, right))["text"]
    every = ["Pushes and errors per day", "Workers", "Systems</h2>", "Running now", "Recent changes", "Needs you:"]
    assert [words for words in every if words in text] == [words for words in every if words in there]
    assert [words for words in every if words in board(staff(organization))["text"]] == []


def test_the_counters_take_eight_statements_and_are_kept_for_a_while(
    shop: Connection, organization: Organization, connect: Callable[..., Connection]
) -> None:
    for n in range(6):
        more = connect("links", name=f"Shop {n}", account=f"x{n}", direction="push")
        ran(more, created=1)
        for kind in KINDS:
            put(more, kind)
    cache.clear()
    with CaptureQueriesContext(database) as queries:
        first = figures([organization.pk])
    assert len(queries) <= 8
    put(shop, "rejected")
    with CaptureQueriesContext(database) as queries:
        assert figures([organization.pk]).needs == first.needs
    assert len(queries) == 0
    assert KEPT_SECONDS <= 30
    client = staff(organization, *RIGHTS)
    board(client)
    with CaptureQueriesContext(database) as queries:
        board(client)
    assert len(queries) <= 10


def test_recent_changes_name_fields_but_no_values(organization: Organization) -> None:
    customer = new_customer(organization)
    editing.update(organization=organization, values={customer.pk: {"phone": "+49 30 5550"}}, actor=COMMAND)
    text = board(staff(organization, *RIGHTS))["text"]
    assert "<strong>test</strong> changed Phone" in text
    assert "5550" not in text


def test_the_rest_of_the_admin_stays_within_reach(organization: Organization, admin_client: Client) -> None:
    text = board(admin_client)["text"]
    for page in ("auth/user", "auth/group", "customers/organization", "connectors/apikey", "connectors/issue"):
        assert f'href="/admin/{page}/"' in text
    seen = board(staff(organization, "customers.view_customer"))["text"]
    assert 'href="/admin/customers/customer/"' in seen
    assert 'href="/admin/auth/user/"' not in seen
    assert 'href="/admin/connectors/customerlink/needs-you/"' not in seen


# Who sends


def late(shop: Connection, **fields: Any) -> int:
    return nobody_sends(counters(shop.organization), now=timezone.now())


def test_nothing_being_sent_is_told_only_where_something_waits_and_nobody_looks(
    shop: Connection, organization: Organization
) -> None:
    assert late(shop) == 0
    link = put(shop, "waiting", next_attempt_at=timezone.now() - timedelta(minutes=2))
    assert late(shop) == 1
    client = staff(organization, *RIGHTS)
    assert "Changes are saved but nothing is being sent." in board(client)["text"]
    for state in ("paused", "needs_reauth"):
        Connection.objects.update(state=state)
        assert late(shop) == 0
    Connection.objects.update(state="active", not_before=timezone.now() + timedelta(hours=1))
    assert late(shop) == 0
    Connection.objects.update(not_before=None)
    now = timezone.now()
    heartbeat.beat(name="host/1", kind="run_worker", at=now - timedelta(seconds=61))
    assert late(shop) == 1
    heartbeat.beat(name="host/1", kind="run_worker", at=now)
    assert late(shop) == 0
    cache.clear()
    text = board(client)["text"]
    assert "nothing is being sent" not in text
    assert "host/1" in text
    Heartbeat.objects.all().delete()
    link.next_attempt_at = now - timedelta(seconds=30)
    link.save()
    assert late(shop) == 0


def test_a_process_has_one_row_and_old_ones_are_forgotten(db: None) -> None:
    now = timezone.now()
    heartbeat.beat(name="host/1", kind="celery", at=now - timedelta(days=2))
    heartbeat.beat(name="host/2", kind="celery", at=now)
    heartbeat.beat(name="host/2", kind="celery", at=now + timedelta(seconds=1))
    assert Heartbeat.objects.get(name="host/2").seen_at == now + timedelta(seconds=1)
    assert heartbeat.forget(now) == 1
    heartbeat.gone(name="host/2")
    assert not Heartbeat.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_worker_is_seen_while_it_runs_and_not_afterwards() -> None:
    worker = Worker(threads=1, idle=0.05)
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            failed.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(200):
            if Heartbeat.objects.filter(name=heartbeat.process_name(), kind="run_worker").exists():
                break
            worker.stop.wait(0.05)
        else:
            raise AssertionError("the worker was never seen")
    finally:
        worker.stop.set()
        thread.join(timeout=30)
    assert failed.empty()
    assert not Heartbeat.objects.exists()


def test_ages_in_words() -> None:
    spans = {5: "5 s", 60: "1 min", 7199: "1 h", 86_400: "1 d", 10**6: "11 d", -5: "0 s"}
    assert {seconds: age(timedelta(seconds=seconds)) for seconds in spans} == spans


def test_celery_is_seen_when_one_of_its_workers_looks(db: None, settings: Any) -> None:
    pytest.importorskip("celery")
    settings.CELERY_BROKER_URL = BROKER  # it is not asked: nothing is due
    module = importlib.import_module("connectors.celery")
    module._next_look = 0.0
    module.look()
    assert list(Heartbeat.objects.values_list("name", "kind")) == [(heartbeat.process_name(), "celery")]
