"""The fake provider does what its switches say, and the connector reads its answers rightly.

A judge that is wrong would pass an engine that is wrong: whatever the engine's tests lean on is shown here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from connectors.exceptions import (
    AlreadyExists,
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
    StaleRevision,
)
from connectors.guard import close_shared_client
from connectors.models import Connection
from connectors.outbound import Session
from connectors.provider import Capabilities, Outgoing, Record
from connectors.providers import PROVIDERS
from customers.editing import EDITABLE
from customers.models import Customer
from tests.fake import in_process, register, running
from tests.fake.connector import CONNECTORS, Fake
from tests.fake.control import Account
from tests.fake.server import FakeProvider
from tests.fake.system import BATCHES, CAPABILITIES, FAULTS, Refused

CONNECTOR = Fake()
EVERYTHING = {
    "lists": True,
    "fetches": True,
    "incremental": True,
    "deletes": True,
    "shows_deleted": "flag",
    "look_up": "strong",
}


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeProvider]:
    with in_process(clock=clock) as provider:
        yield provider


class Hub:
    """One connection to one account, as the engine would use it."""

    def __init__(self, account: Account, *, client: httpx2.Client | None = None, deadline: float = 5.0) -> None:
        self.account = account
        self.client = client
        self.deadline = deadline
        self.credentials: dict[str, str] = {}

    @property
    def connection(self) -> Connection:
        made = Connection(provider="fake", base_url=self.account.url, options=self.account.options())
        made.seal_credentials(self.credentials)
        return made

    @property
    def session(self) -> Session:
        session = CONNECTOR.session(self.connection, client=self.client)
        session.deadline = self.deadline
        return session

    def create(self, uid: UUID | None = None, *, key: UUID | None = None, **values: Any) -> Record:
        return CONNECTOR.create(self.session, self.connection, outgoing(uid, key=key, **values))

    def create_many(self, batch: list[Outgoing]) -> list[Record | ConnectorError]:
        return CONNECTOR.create_many(self.session, self.connection, batch)

    def update(self, record: Record, *, revision: str | None = None, **values: Any) -> Record:
        sent = Outgoing(
            uid=UUID(record.document["marker"]),
            remote_id=record.remote_id,
            key=uuid4(),
            document={"marker": record.document["marker"], **values},
            revision=record.revision if revision is None else revision,
        )
        return CONNECTOR.update(self.session, self.connection, sent)

    def fetch(self, record: Record | str) -> Record:
        remote_id = record if isinstance(record, str) else record.remote_id or ""
        return CONNECTOR.fetch(self.session, self.connection, remote_id)

    def look_up(self, uid: UUID) -> list[str | None]:
        return [one.remote_id for one in CONNECTOR.look_up(self.session, self.connection, uid)]

    def listed(self, *, since: datetime | None = None, limit: int = 2) -> list[Record]:
        found: list[Record] = []
        cursor = None
        while True:
            page = CONNECTOR.page(self.session, self.connection, cursor=cursor, since=since, limit=limit)
            found += [one for one in page.records if isinstance(one, Record)]
            if (cursor := page.next) is None:
                return found


@pytest.fixture
def open_account(fake: FakeProvider) -> Callable[..., Hub]:
    def make(name: str = "shop", **settings: Any) -> Hub:
        return Hub(fake.account(name, **settings), client=fake.client())

    return make


def outgoing(
    uid: UUID | None = None, *, key: UUID | None = None, remote_id: str | None = None, **values: Any
) -> Outgoing:
    uid = uid or uuid4()
    document = {"marker": str(uid), "name": "Ann", **values}
    return Outgoing(uid=uid, remote_id=remote_id, key=key or uuid4(), document=document)


# What the account offers


def test_the_capabilities_are_those_of_the_engine() -> None:
    assert {one.name: one.default for one in fields(Capabilities)} == dict(CAPABILITIES)


def test_an_undeclared_capability_is_absent(open_account: Callable[..., Hub]) -> None:
    hub = open_account()
    made = hub.create()
    for attempt in (
        lambda: hub.fetch(made),
        lambda: hub.listed(),
        lambda: hub.look_up(uuid4()),
        lambda: CONNECTOR.delete(hub.session, hub.connection, made.remote_id or ""),
    ):
        with pytest.raises(Rejected):
            attempt()
    with pytest.raises(Refused, match="no such capability"):
        hub.account.set(capabilities={"telepathy": True})


def test_what_is_written_can_be_read(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities=EVERYTHING)
    uid = uuid4()
    made = hub.create(uid, email="ann@example.com", notify_email=True)
    assert made.values == {"name": "Ann", "email": "ann@example.com", "notify_email": True}
    assert made.created_at == clock.now
    assert CONNECTOR.marker(made.document) == uid
    changed = hub.update(made, phone="+1 555")
    assert changed.values == {**made.values, "phone": "+1 555"}
    assert hub.fetch(made).values == changed.values
    assert hub.look_up(uid) == [made.remote_id]
    CONNECTOR.delete(hub.session, hub.connection, made.remote_id or "")
    with pytest.raises(Gone):
        hub.fetch(made)
    with pytest.raises(Gone):
        hub.update(made, phone="+2")
    assert [write["kind"] for write in hub.account.writes()] == ["create", "update", "delete"]


def test_a_key_has_one_effect_while_it_lives(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities={"create_key": True, "key_life": 60.0})
    uid, key = uuid4(), uuid4()
    first = hub.create(uid, key=key)
    assert hub.create(uid, key=key).remote_id == first.remote_id
    with pytest.raises(Rejected) as refused:
        hub.create(uid, key=key, name="Bob")
    assert refused.value.code == "key_reused"
    assert hub.account.judge().count() == 1
    clock.pass_(61)
    assert hub.create(uid, key=key).remote_id != first.remote_id
    assert hub.account.judge().duplicates() == {str(uid): 2}


def test_without_the_capability_a_key_is_ignored(open_account: Callable[..., Hub], fake: FakeProvider) -> None:
    hub = open_account()
    for _ in range(2):
        answer = hub.session.request("POST", "/customers", json={"name": "Ann"}, headers={"Idempotency-Key": "k" * 8})
        assert "idempotent-replayed" not in answer.headers
    assert hub.account.judge().count() == 2


@pytest.mark.parametrize(("fault", "stored"), [("stored_500", 0), ("500_after", 1)])
def test_a_failure_while_applying_is_stored_and_replayed(
    open_account: Callable[..., Hub], fault: str, stored: int
) -> None:
    hub = open_account(capabilities={"create_key": True})
    uid, key = uuid4(), uuid4()
    hub.account.script(fault)
    with pytest.raises(OutcomeUnknown) as lost:
        hub.create(uid, key=key)
    assert not lost.value.replayed
    with pytest.raises(OutcomeUnknown) as lost:
        hub.create(uid, key=key)
    assert lost.value.replayed
    assert hub.account.judge().count() == stored


@pytest.mark.parametrize("fault", ["500", "502", "502_after", "503_after", "reset_after"])
def test_a_failure_on_the_way_is_not_stored(open_account: Callable[..., Hub], fault: str) -> None:
    hub = open_account(capabilities={"create_key": True})
    uid, key = uuid4(), uuid4()
    hub.account.script(fault)
    with pytest.raises(ConnectorError):
        hub.create(uid, key=key)
    assert hub.create(uid, key=key).remote_id
    assert hub.account.judge().count() == 1


def test_an_upsert_repeats_without_effect(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"upsert_external_id": True, "conditional": True})
    uid = uuid4()
    first = hub.create(uid)
    again = hub.create(uid)
    assert (again.remote_id, again.revision) == (first.remote_id, first.revision)
    other = hub.create(uid, name="Bob")
    assert other.remote_id == first.remote_id
    assert other.values["name"] == "Bob"
    assert [write["kind"] for write in hub.account.writes()] == ["create", "same", "update"]
    hub.account.create(marker=str(uid), name="Twin")
    with pytest.raises(Rejected) as refused:
        hub.create(uid)
    assert refused.value.code == "several_matches"


def test_a_unique_key_names_the_record_that_has_it(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"unique_keys": True})
    first = hub.create(email="ann@example.com")
    with pytest.raises(AlreadyExists) as refused:
        hub.create(email=" ANN@example.com")
    assert (refused.value.remote_id, refused.value.field) == (first.remote_id, "email")
    second = hub.create(email="bob@example.com")
    with pytest.raises(AlreadyExists):
        hub.update(second, email="ann@example.com")
    hub.create(email="")
    hub.create(email="")
    hub.account.delete(first.remote_id or "")
    assert hub.update(second, email="ann@example.com").values["email"] == "ann@example.com"


def test_a_conditional_update_is_refused_when_somebody_wrote(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"conditional": True, "fetches": True})
    made = hub.create()
    hub.account.edit(made.remote_id or "", name="Human")
    with pytest.raises(StaleRevision):
        hub.update(made, name="Hub")
    current = hub.fetch(made)
    assert current.values["name"] == "Human"
    assert hub.update(current, name="Hub").revision != current.revision
    assert len(hub.account.judge().human_edits_overwritten()) == 1
    # Without the capability nothing is compared.
    hub.account.set(capabilities={})
    hub.account.edit(made.remote_id or "", name="Human")
    assert hub.update(made, revision=made.revision, name="Hub").values["name"] == "Hub"


def test_a_silent_provider_says_only_the_id(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"echoes": False, "conditional": True, "fetches": True})
    made = hub.create()
    assert made.remote_id == "r1"
    assert made.values == {}
    assert made.revision
    sent = Outgoing(uid=uuid4(), remote_id="r1", key=uuid4(), document={"phone": "+1"}, revision=made.revision)
    changed = CONNECTOR.update(hub.session, hub.connection, sent)
    assert (changed.remote_id, changed.values) == ("r1", {})
    assert changed.revision == hub.fetch("r1").revision != made.revision


@pytest.mark.parametrize(
    ("normaliser", "stored"),
    [("same", " Ann Lee "), ("upper", " ANN LEE "), ("lower", " ann lee "), ("trim", "Ann Lee")],
)
def test_values_are_stored_in_the_providers_own_form(
    open_account: Callable[..., Hub], normaliser: str, stored: str
) -> None:
    hub = open_account(normaliser=normaliser)
    assert hub.create(name=" Ann Lee ", notify_email=False).values == {"name": stored, "notify_email": False}
    [connector] = [one for one in CONNECTORS if one.normaliser == normaliser]
    assert connector.normalise("name", " Ann Lee ") == stored
    assert connector.normalise("notify_email", False) is False


def test_a_bad_record_is_refused_with_its_field(open_account: Callable[..., Hub]) -> None:
    hub = open_account()
    with pytest.raises(Rejected) as refused:
        hub.create(name="BAD Ann")
    assert (refused.value.field, refused.value.status) == ("name", 422)
    made = hub.create()
    with pytest.raises(Rejected):
        hub.update(made, name="BAD Ann")


def test_a_crashing_record_is_stored_and_its_answer_unexpected(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={**EVERYTHING, "batch": 10})
    with pytest.raises(ValueError, match="isoformat"):
        hub.create(name="CRASH Ann")
    with pytest.raises(ValueError, match="isoformat"):
        hub.create_many([outgoing(), outgoing(name="CRASH Bob")])
    assert [one.values["name"] for one in hub.listed()] == ["CRASH Ann", "Ann", "CRASH Bob"]


# Looking up, lists, people


def test_a_lagging_search_finds_a_record_later(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities={"look_up": "lagging"}, index_lag=30.0)
    uid = uuid4()
    made = hub.create(uid)
    assert hub.look_up(uid) == []
    clock.pass_(30)
    assert hub.look_up(uid) == [made.remote_id]
    hub.account.set(index_outage=1.0)
    late = hub.create(uid)
    clock.pass_(3599)
    assert hub.look_up(uid) == [made.remote_id]
    clock.pass_(1)
    assert hub.look_up(uid) == [made.remote_id, late.remote_id]


def test_lists_are_complete_and_incremental(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities=EVERYTHING)
    made = [hub.create(name=f"Ann {number}") for number in range(5)]
    assert [one.remote_id for one in hub.listed()] == [one.remote_id for one in made]
    clock.pass_(10)
    since = clock.now
    hub.update(made[3], phone="+1")
    hub.account.delete(made[1].remote_id or "")
    hub.account.edit(made[0].remote_id or "", phone="+2")
    changed = hub.listed(since=since, limit=1)
    assert {one.remote_id: one.deleted for one in changed} == {"r1": False, "r2": True, "r4": False}
    hub.account.set(capabilities={**EVERYTHING, "shows_deleted": "scan"})
    assert [one.remote_id for one in hub.listed()] == ["r1", "r3", "r4", "r5"]


def test_pages_drift_where_they_are_cut_by_position(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities=EVERYTHING, page_drift=True)
    for _ in range(4):
        clock.pass_(1)
        hub.create()
    first = CONNECTOR.page(hub.session, hub.connection, cursor=None, since=None, limit=2)
    clock.pass_(1)
    hub.create()
    second = CONNECTOR.page(hub.session, hub.connection, cursor=first.next, since=None, limit=2)
    assert [one.remote_id for one in first.records if isinstance(one, Record)] == ["r4", "r3"]
    assert [one.remote_id for one in second.records if isinstance(one, Record)] == ["r3", "r2"]


def test_people_edit_delete_merge_and_hide(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities=EVERYTHING)
    one, two, three = (hub.create(name=name, email=f"{name}@example.com") for name in ("ann", "bob", "cid"))
    hub.account.edit(two.remote_id or "", phone="+2")
    hub.account.merge(winner=one.remote_id or "", loser=two.remote_id or "")
    assert hub.fetch(one).values == {"name": "ann", "email": "ann@example.com", "phone": "+2"}
    with pytest.raises(Gone) as gone:
        hub.fetch(two)
    assert gone.value.code == "merged"
    shown = {record.remote_id: record for record in hub.listed()}
    assert shown[two.remote_id].deleted
    assert shown[two.remote_id].document["merged_into"] == one.remote_id
    hub.account.delete(three.remote_id or "")
    assert hub.account.judge().lost([three.document["marker"], "never-sent"]) == {"never-sent"}
    hub.account.undelete(three.remote_id or "")
    assert hub.fetch(three).values == three.values
    assert hub.account.hide(0.5) == 1
    hidden = {"r1", "r3"} - {record.remote_id for record in hub.listed()}
    assert len(hidden) == 1
    hub.fetch(hidden.pop())
    hub.account.show()
    assert len(hub.listed()) == 3
    assert {write["who"] for write in hub.account.writes() if write["kind"] != "create"} == {"human"}


def test_the_account_says_who_it_is(open_account: Callable[..., Hub]) -> None:
    hub = open_account()
    assert CONNECTOR.account_id(hub.session, hub.connection) == "acct_shop"
    hub.account.set(account_id="another")
    assert CONNECTOR.account_id(hub.session, hub.connection) == "another"
    with pytest.raises(Gone):
        Hub(open_account("other").account, client=hub.client).session.request("GET", "/nothing")


def test_a_refresh_token_is_good_for_one_use(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(auth="oauth", token_life=600.0, capabilities=EVERYTHING)
    with pytest.raises(ConnectionUnusable):
        hub.create()
    pair = hub.account.credentials()
    hub.credentials = {"access_token": pair["access_token"]}
    hub.create()
    clock.pass_(600)
    with pytest.raises(ConnectionUnusable):
        hub.create()

    def refresh(token: str) -> httpx2.Response:
        form = {"grant_type": "refresh_token", "refresh_token": token}
        assert hub.client is not None
        return hub.client.post(pair["token_url"], data=form)

    renewed = refresh(pair["refresh_token"])
    assert renewed.status_code == 200
    assert renewed.json()["expires_in"] == 600
    assert refresh(pair["refresh_token"]).json()["error"] == "invalid_grant"
    hub.credentials = {"access_token": renewed.json()["access_token"]}
    hub.create()
    # The answer to a refresh is lost: the old token is dead and nobody knows the new one.
    hub.account.script("reset_after", path="/token")
    with pytest.raises(httpx2.ReadError):
        refresh(renewed.json()["refresh_token"])
    assert refresh(renewed.json()["refresh_token"]).status_code == 400
    hub.account.revoke()
    with pytest.raises(ConnectionUnusable):
        hub.create()
    hub.account.set(auth="fixed-token")
    hub.credentials = {"access_token": "fixed-token"}
    hub.create()
    assert hub.account.judge().count() == 3


# Batches


def test_a_batch_answers_row_by_row(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"batch": 10, "create_key": True, "unique_keys": True})
    taken = hub.create(email="ann@example.com")
    batch = [outgoing(), outgoing(name="BAD"), outgoing(email="ann@example.com"), outgoing()]
    first, bad, exists, last = hub.create_many(batch)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(bad, Rejected)
    assert bad.field == "name"
    assert isinstance(exists, AlreadyExists)
    assert exists.remote_id == taken.remote_id
    assert [first.document["marker"], last.document["marker"]] == [str(batch[0].uid), str(batch[3].uid)]
    again = hub.create_many([batch[3], batch[0]])
    assert [isinstance(one, Record) and one.remote_id for one in again] == [last.remote_id, first.remote_id]
    judge = hub.account.judge()
    assert judge.count() == 3
    assert judge.calls_per_marker()[str(batch[0].uid)] == 2
    with pytest.raises(Rejected, match="at most 10"):
        hub.create_many([outgoing() for _ in range(11)])


def test_a_batch_can_upsert_and_update(open_account: Callable[..., Hub]) -> None:
    hub = open_account(
        capabilities={"batch": 10, "update_batch": 10, "upsert_external_id": True, "conditional": True, "fetches": True}
    )
    batch = [outgoing(name=name) for name in ("Ann", "Bob", "Cid")]
    made = [one for one in hub.create_many(batch) if isinstance(one, Record)]
    assert [one.remote_id for one in hub.create_many(batch) if isinstance(one, Record)] == ["r1", "r2", "r3"]
    hub.account.edit("r1", phone="+1")
    hub.account.delete("r3")
    answers = CONNECTOR.update_many(
        hub.session,
        hub.connection,
        [
            Outgoing(
                uid=sent.uid, remote_id=one.remote_id, key=uuid4(), document={"phone": "+9"}, revision=one.revision
            )
            for sent, one in zip(batch, made, strict=True)
        ],
    )
    assert isinstance(answers[0], StaleRevision)
    assert isinstance(answers[1], Record)
    assert isinstance(answers[2], Gone)
    assert [hub.fetch(one).values["phone"] for one in ("r1", "r2")] == ["+1", "+9"]


def test_batch_faults(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"batch": 10, "create_key": True})
    batch = [outgoing() for _ in range(6)]
    hub.account.script("missing_rows")
    answers = hub.create_many(batch)
    assert [type(one) for one in answers].count(OutcomeUnknown) == 3
    assert hub.account.judge().count() == 6
    hub.account.script("shuffled_rows", times=3)
    orders = set()
    for _ in range(3):
        rows = [{**one.document, "key": str(one.key)} for one in batch]
        shown = hub.session.request("POST", "/customers/batch", json={"rows": rows}).body["rows"]
        orders.add(tuple(row["marker"] for row in shown))
    assert orders != {tuple(str(one.uid) for one in batch)}
    hub.account.script("shuffled_rows")
    again = hub.create_many(batch)
    assert [isinstance(one, Record) and one.document["marker"] for one in again] == [str(one.uid) for one in batch]
    hub.account.set(faults={"unnamed_400": 1.0})
    with pytest.raises(Rejected) as refused:
        hub.create_many([outgoing(), outgoing(name="BAD")])
    assert refused.value.field == ""
    assert all(isinstance(one, Record) for one in hub.create_many([outgoing(), outgoing()]))
    hub.create()
    assert hub.account.judge().count() == 9


@pytest.mark.parametrize(("fault", "stored"), [("stored_500", 0), ("500_after", 2)])
def test_a_batch_keeps_failures_by_row(open_account: Callable[..., Hub], fault: str, stored: int) -> None:
    hub = open_account(capabilities={"batch": 10, "create_key": True})
    batch = [outgoing(), outgoing()]
    hub.account.script(fault)
    with pytest.raises(OutcomeUnknown):
        hub.create_many(batch)
    answers = hub.create_many([*batch, outgoing()])
    assert [isinstance(one, OutcomeUnknown) and one.replayed for one in answers] == [True, True, False]
    assert isinstance(answers[2], Record)
    assert hub.account.judge().count() == stored + 1


# Faults

# What a create without key, upsert or anything meets; how many records there are then; the status in the ledger.
MET: dict[str, tuple[type[ConnectorError] | None, int, int]] = {
    "429": (RetryLater, 0, 429),
    "429_date": (RetryLater, 0, 429),
    "429_skewed": (RetryLater, 0, 429),
    "429_absurd": (RetryLater, 0, 429),
    "429_missing": (RetryLater, 0, 429),
    "401": (ConnectionUnusable, 0, 401),
    "404_all": (Gone, 0, 404),
    "redirect": (ConnectionUnusable, 0, 302),
    "500": (OutcomeUnknown, 0, 500),
    "502": (OutcomeUnknown, 0, 502),
    "503": (OutcomeUnknown, 0, 503),
    "500_after": (OutcomeUnknown, 1, 500),
    "502_after": (OutcomeUnknown, 1, 502),
    "503_after": (OutcomeUnknown, 1, 503),
    "stored_500": (OutcomeUnknown, 0, 500),
    "hang": (OutcomeUnknown, 0, 0),
    "hang_after": (OutcomeUnknown, 1, 0),
    "reset_before": (OutcomeUnknown, 0, 0),
    "reset_after": (OutcomeUnknown, 1, 0),
    "lost": (OutcomeUnknown, 0, 0),
    "late": (OutcomeUnknown, 0, 0),
    "drip": (OutcomeUnknown, 1, 201),
    "half_body": (OutcomeUnknown, 1, 201),
    "wrong_json": (OutcomeUnknown, 1, 200),
    "gzip_bomb": (OutcomeUnknown, 1, 200),
    "duplicate": (None, 2, 201),
}


def meet(hub: Hub, fault: str) -> None:
    error, stored, status = MET[fault]
    hub.account.script(fault)
    if error is None:
        hub.create()
    else:
        with pytest.raises(ConnectorError) as met:
            hub.create()
        assert type(met.value) is error
    judge = hub.account.judge()
    assert judge.count() == stored
    [request] = judge.requests()
    assert (request["fault"], request["status"], request["method"]) == (fault, status, "POST")
    hub.create()
    assert hub.account.judge().count() == stored + 1


@pytest.mark.parametrize("fault", sorted(MET))
def test_each_fault_does_what_it_says(open_account: Callable[..., Hub], fault: str) -> None:
    meet(open_account(), fault)


def test_no_fault_is_untested() -> None:
    assert {*MET, *BATCHES} == FAULTS


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        ("429", 7.0),
        ("429_date", 8.0),
        ("429_skewed", 7.0),
        ("429_absurd", 86400.0),
        ("429_missing", None),
        ("503", 7.0),
    ],
)
def test_the_ways_to_say_later(open_account: Callable[..., Hub], fault: str, seconds: float | None) -> None:
    hub = open_account()
    hub.account.script(fault, retry_after=7)
    with pytest.raises(RetryLater) as later:
        hub.create()
    assert later.value.retry_after == seconds  # the date is in whole seconds and the clock between two


def test_a_late_request_is_applied_when_its_time_comes(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities=EVERYTHING)
    made = hub.create(phone="v0")
    hub.account.script("late", delay=100)
    with pytest.raises(OutcomeUnknown):
        hub.update(made, phone="v1")
    hub.update(made, phone="v2")
    clock.pass_(99)
    assert hub.fetch(made).values["phone"] == "v2"
    assert hub.account.waiting() == 1
    clock.pass_(1)
    assert hub.fetch(made).values["phone"] == "v1"
    assert hub.account.waiting() == 0
    judge = hub.account.judge()
    [wrong] = judge.older_after_newer()
    assert (wrong["after"]["phone"], wrong["at"]) == ("v1", clock.now.timestamp())
    assert [write["id"] for write in judge.older_after_newer(lambda sent: sent.get("phone"))] == [wrong["id"]]


def test_a_late_request_is_never_later_than_it_may_be(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"conditional": True, "max_request_life": 60.0}, late_max=60.0)
    made = hub.create()
    for _ in range(20):
        hub.account.script("late", method="POST")
        with pytest.raises(OutcomeUnknown):
            hub.create()
    hub.account.script("late")
    with pytest.raises(OutcomeUnknown):
        hub.update(made, phone="v1")
    hub.update(made, phone="v2")
    hub.account.advance(60)
    assert hub.account.waiting() == 0
    judge = hub.account.judge()
    assert judge.count() == 21
    # The late update was made for a revision that is no more.
    assert [write["after"]["phone"] for write in judge.writes(made.remote_id, kind="update")] == ["v2"]
    assert judge.older_after_newer() == []


def test_a_repeated_delivery_meets_key_and_condition(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities={"create_key": True, "conditional": True})
    hub.account.script("duplicate", times=2)
    made = hub.create()
    assert hub.account.judge().duplicates() == {}
    with pytest.raises(StaleRevision):
        hub.update(made, phone="+1")
    assert hub.account.records()[0]["fields"]["phone"] == "+1"


def test_a_script_waits_for_its_request(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities=EVERYTHING)
    hub.account.script("401", method="POST", skip=2, times=2)
    hub.account.script("500", method="PATCH", path="/customers/r1")
    made = [hub.create(), hub.create()]
    for _ in range(2):
        hub.fetch(made[0])
        with pytest.raises(ConnectionUnusable):
            hub.create()
    hub.create()
    hub.update(made[1], phone="+1")
    with pytest.raises(OutcomeUnknown):
        hub.update(made[0], phone="+1")
    with pytest.raises(Refused, match="no such fault"):
        hub.account.script("earthquake")


def test_chance_is_seeded_and_measured(fake: FakeProvider) -> None:
    def histories(seed: int) -> list[str]:
        account = fake.account(f"s{seed}", faults={"500": 0.2, "lost": 0.1}, fault_methods=["POST"], seed=seed)
        hub = Hub(account, client=fake.client())
        start = account.judge().request_count()
        for _ in range(300):
            with contextlib.suppress(OutcomeUnknown):
                hub.session.request("POST", "/customers", json={"name": "Ann"})
        return [request["fault"] for request in account.judge().requests()[start:]]

    one = histories(1)
    assert 40 <= one.count("500") <= 80
    assert 15 <= one.count("lost") <= 45
    assert one != histories(2)
    with in_process() as second:
        account = second.account("s1", faults={"500": 0.2, "lost": 0.1}, seed=1)
        with second.client() as client:
            for _ in range(300):
                with contextlib.suppress(httpx2.ReadError):
                    client.post(f"{account.url}/customers", json={"name": "Ann"})
        assert [request["fault"] for request in account.judge().requests()] == one


def test_lost_permission_looks_like_an_empty_account(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities=EVERYTHING)
    made = hub.create()
    hub.account.set(faults={"404_all": 1.0})
    with pytest.raises(Gone):
        hub.fetch(made)
    with pytest.raises(Gone):
        CONNECTOR.account_id(hub.session, hub.connection)
    hub.account.set(faults={})
    assert hub.fetch(made).values == made.values


def test_the_rate_limit_counts_and_tells(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(rate=2.0, burst=3)
    answer = hub.session.send("POST", "/customers", json={"name": "Ann"})
    assert (answer.headers["ratelimit-remaining"], answer.headers["ratelimit-reset"]) == ("2", "1")
    hub.create()
    hub.create()
    with pytest.raises(RetryLater) as later:
        hub.create()
    assert later.value.retry_after == 1
    with pytest.raises(RetryLater):
        hub.create()
    judge = hub.account.judge()
    assert judge.faults()["rate_limit"] == 2
    assert [request["status"] for request in judge.impatient(grace=-0.1)] == [429]
    clock.pass_(1)
    hub.create()
    hub.create()
    with pytest.raises(RetryLater):
        hub.create()


# The judge


def test_the_judge_counts_waiting_and_requests(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account()
    hub.account.script("429", retry_after=10)
    started = clock.now.timestamp()
    for seconds in (0.5, 5, 6):
        with contextlib.suppress(RetryLater):
            hub.create()
        clock.pass_(seconds)
    hub.create()
    judge = hub.account.judge()
    assert [request["at"] - started for request in judge.impatient()] == [0.5, 5.5]
    assert [request["at"] - started for request in judge.impatient(grace=1)] == [5.5]
    assert len(judge.requests_between(started, started + 5.5)) == 2
    assert judge.statuses() == {429: 1, 201: 3}
    assert judge.request_count() == 4


def test_the_judge_sees_duplicates_losses_and_resurrections(open_account: Callable[..., Hub]) -> None:
    hub = open_account(capabilities=EVERYTHING)
    one, two, three = uuid4(), uuid4(), uuid4()
    first = hub.create(one)
    hub.create(one)
    second = hub.create(two)
    judge = hub.account.judge()
    assert judge.duplicates() == {str(one): 2}
    assert judge.lost([one, two, three]) == {str(three)}
    hub.account.delete(second.remote_id or "")
    assert judge.lost([two]) == set()
    hub.create(two)
    assert [write["marker"] for write in judge.resurrected()] == [str(two)]
    CONNECTOR.delete(hub.session, hub.connection, first.remote_id or "")
    assert judge.duplicates() == {}
    hub.create(three)
    CONNECTOR.delete(hub.session, hub.connection, hub.look_up(three)[0] or "")
    assert judge.lost([three]) == {str(three)}
    assert [write["kind"] for write in judge.writes_after(first.remote_id or "")] == ["delete"]
    assert judge.calls_per_marker()[str(two)] == 2
    assert set(judge.live()) == {str(one), str(two)}


def test_the_ledger_holds_what_was_sent_and_what_it_did(open_account: Callable[..., Hub], clock: Clock) -> None:
    hub = open_account(capabilities={"create_key": True, "conditional": True})
    uid, key = uuid4(), uuid4()
    made = hub.create(uid, key=key)
    hub.update(made, phone="+1")
    create, update = hub.account.ledger()
    assert (create["method"], create["path"], create["status"]) == ("POST", "/a/shop/customers", 201)
    assert (create["marker"], create["key"], create["at"]) == (str(uid), str(key), clock.now.timestamp())
    assert (update["path"], update["marker"]) == ("/a/shop/customers/r1", str(uid))
    assert update["headers"]["if-match"] == made.revision
    written = hub.account.writes()[1]
    assert (written["record"], written["kind"], written["revision"], written["who"]) == ("r1", "update", 2, "api")
    assert (written["before"]["phone"], written["after"]["phone"]) == (None, "+1")
    assert written["request"] == update["id"]


# The connector


def test_the_connector_writes_the_fields_it_names(open_account: Callable[..., Hub]) -> None:
    assert set(EDITABLE) >= Fake.fields
    hub, uid = open_account(), uuid4()
    customer = Customer(name="Ann", email="ann@example.com", notify_email=False)
    whole = CONNECTOR.document(customer, connection=hub.connection, uid=uid, fields=None)
    assert whole == {"marker": str(uid), "name": "Ann", "email": "ann@example.com", "notify_email": False}
    part = CONNECTOR.document(customer, connection=hub.connection, uid=uid, fields=frozenset({"phone"}))
    assert part == {"marker": str(uid), "phone": ""}
    assert CONNECTOR.marker({"marker": "not ours"}) is None
    assert CONNECTOR.marker({}) is None


def test_registering_twice_is_registering_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(PROVIDERS)
    try:
        assert register() is register() is PROVIDERS["fake"]
        assert PROVIDERS["fake_upper"].normalise("name", "Ann") == "ANN"
        assert len(PROVIDERS) == len(before.keys() | {one.slug for one in CONNECTORS})
    finally:
        for slug in PROVIDERS.keys() - before.keys():
            del PROVIDERS[slug]


# Over a socket


@pytest.fixture
def local(settings: Any) -> Iterator[None]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    yield
    close_shared_client()


@pytest.fixture
def listening(local: None) -> Iterator[FakeProvider]:
    with in_process() as provider:
        provider.start()
        yield provider


@pytest.mark.parametrize("fault", ["429", "hang", "drip", "half_body", "reset_after", "late", "gzip_bomb", "redirect"])
def test_faults_over_a_socket(listening: FakeProvider, fault: str) -> None:
    meet(Hub(listening.account(), deadline=0.4), fault)


def test_waiting_answers_hold_up_nobody(listening: FakeProvider) -> None:
    slow = Hub(listening.account("slow", latency=0.5))
    quick = Hub(listening.account("quick"))
    stuck = Hub(listening.account("stuck"), deadline=1.0)
    stuck.account.script("hang")
    started = time.monotonic()
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(slow.create) for _ in range(8)]
        hanging = pool.submit(stuck.create)
        time.sleep(0.05)
        for _ in range(20):
            quick.create()
        quick_took = time.monotonic() - started
        assert all(one.result().remote_id for one in waiting)
        slow_took = time.monotonic() - started
        assert isinstance(hanging.exception(), OutcomeUnknown)
    assert quick_took < 0.45
    assert 0.5 <= slow_took < 1.5
    assert stuck.create().remote_id


def test_many_callers_at_once(listening: FakeProvider) -> None:
    account = listening.account(capabilities={"create_key": True})
    hub = Hub(account)
    uids = [uuid4() for _ in range(200)]

    def twice(uid: UUID) -> None:
        key = uuid4()
        assert hub.create(uid, key=key).remote_id == hub.create(uid, key=key).remote_id

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(twice, uids))
    judge = account.judge()
    assert judge.lost(uids) == set()
    assert judge.duplicates() == {}
    assert set(judge.calls_per_marker().values()) == {2}
    assert threading.active_count() < 50


def test_as_a_process_it_keeps_its_state(tmp_path: Path, local: None) -> None:
    with running(tmp_path) as fake:
        account = fake.account("shop", capabilities={**EVERYTHING, "create_key": True}, auth="oauth")
        hub = Hub(account)
        hub.credentials = {"access_token": account.login()["access_token"]}
        uid, key = uuid4(), uuid4()
        made = hub.create(uid, key=key)
        account.script("hang", method="GET")
        hub.deadline = 0.3
        with pytest.raises(RetryLater):
            hub.fetch(made)
        account.edit(made.remote_id or "", phone="+1")
        account.advance(30)
        assert account.judge().statuses() == {201: 1, 0: 1}
        assert [write["who"] for write in account.judge().writes()] == ["api", "human"]
        with pytest.raises(Refused, match="no such setting"):
            account.set(colour="blue")
    with running(tmp_path) as fake:
        hub.account = account = fake.account("shop")
        assert account.settings["time_offset"] == 30
        assert hub.fetch(made).values["phone"] == "+1"
        assert hub.create(uid, key=key).remote_id == made.remote_id
        judge = account.judge()
        assert judge.count() == 1
        assert len(account.ledger()) == judge.request_count() == 4
