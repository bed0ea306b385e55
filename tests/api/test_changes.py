"""The changes feed: everything once and in order, whoever writes meanwhile, and a restored database is noticed."""

import json
import random
import threading
import time
from base64 import urlsafe_b64decode
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from django.db import DatabaseError, transaction
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.api.changes import ChangeShown, Place
from connectors.models import ApiKey
from connectors.providers.links import WIRE
from customers import bulk, editing
from customers.editing import Actor, CannotMerge, CannotUnmerge
from customers.models import Customer, CustomerChange, Organization

pytestmark = pytest.mark.django_db(transaction=True)

CHANGES = "/api/v1/unified/changes"
ACTOR = Actor(kind="user", name="Tester", request_id="req_of_the_tester")
# A transaction of another database in the cluster delays the feed as well.
PATIENCE = 60.0
only_postgresql = pytest.mark.skipif(
    database.vendor != "postgresql", reason="SQLite lets one transaction write at a time"
)


@pytest.fixture
def get(api: Client, api_key: str) -> Callable[..., Any]:
    def go(query: str = "", key: str = api_key) -> Any:
        while True:
            answer = api.get(f"{CHANGES}{query}", headers={"Authorization": f"Bearer {key}"})
            if answer.status_code != 429:
                return answer
            time.sleep(float(answer["Retry-After"]))

    return go


@pytest.fixture
def read(get: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Read until so many entries have come."""

    def go(number: int, query: str = "", cursor: str = "") -> list[dict[str, Any]]:
        ends, entries = time.monotonic() + PATIENCE, []
        while len(entries) < number and time.monotonic() < ends:
            answer = get(f"?limit=1000&cursor={cursor}{query}").json()
            entries += answer["data"]
            cursor = answer["next_cursor"]
            if len(entries) < number:
                time.sleep(0.05)
        assert len(entries) == number
        return entries

    return go


def add(organization: Organization, number: int = 1) -> list[Customer]:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(number)]
    return editing.create(organization=organization, values=values, actor=ACTOR)


def edit(customer: Customer, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=ACTOR)


def test_each_version_is_an_entry_with_its_kind(organization: Organization, read: Callable[..., Any]) -> None:
    one, other = add(organization, 2)
    edit(one, phone="+4930123456", currency="EUR")
    editing.archive(organization=organization, ids=[one.pk], actor=ACTOR)
    editing.restore(organization=organization, ids=[one.pk], actor=Actor(kind="command", name="cron", message="Again."))
    editing.merge(organization=organization, survivor=one.pk, loser=other.pk, values={}, actor=ACTOR)
    editing.unmerge(organization=organization, loser=other.pk, actor=ACTOR)
    entries = read(9)
    assert all(entry.keys() == ChangeShown().fields.keys() - {"customer"} for entry in entries)
    of_one = [entry for entry in entries if entry["customer_id"] == one.public_id]
    of_other = [entry for entry in entries if entry["customer_id"] == other.public_id]
    assert [entry["type"] for entry in of_one] == ["created", "updated", "archived", "restored", "updated", "updated"]
    assert [entry["type"] for entry in of_other] == ["created", "merged", "unmerged"]
    assert [entry["version"] for entry in of_one] == [1, 2, 3, 4, 5, 6]
    assert [entry["merged_into"] for entry in of_other] == [None, one.public_id, None]
    assert [*of_one[0]["fields"]] == ["name", "email"]
    assert sorted(of_one[1]["fields"]) == ["currency", "phone"]
    assert (of_one[1]["actor"], of_one[1]["request_id"]) == ({"kind": "user", "name": "Tester"}, "req_of_the_tester")
    assert (of_one[3]["message"], of_one[3]["request_id"], of_one[0]["message"]) == ("Again.", None, None)
    assert len({entry["id"] for entry in entries}) == 9
    assert of_one[0]["at"] == one.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_reading_resumes_at_any_cursor_and_there_is_always_one(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    empty = get().json()
    assert (empty["data"], empty["has_more"]) == ([], False)
    for customer in add(organization, 3):
        edit(customer, phone="+4930123456")
    entries = read(6)
    assert read(6, cursor=empty["next_cursor"]) == entries, "one that was given out before the first change"
    for limit in (1, 2, 4, 6):
        cursor, seen = "", []
        while True:
            answer = get(f"?limit={limit}&cursor={cursor}").json()
            seen += answer["data"]
            cursor = answer["next_cursor"]
            assert len(answer["data"]) <= limit
            if limit == 1 and seen != entries:
                assert read(6 - len(seen), cursor=cursor) == entries[len(seen) :]
            if not answer["has_more"]:
                break
        assert seen == entries
        assert get(f"?cursor={cursor}").json() == {"data": [], "next_cursor": cursor, "has_more": False}


def test_the_customer_comes_along_as_it_is_now(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any], api: Client, api_key: str
) -> None:
    one, other = add(organization, 2)
    edit(one, name="Renamed")
    editing.merge(organization=organization, survivor=one.pk, loser=other.pk, values={}, actor=ACTOR)
    entries = read(5, "&expand=customer")
    asked = api.get(f"/api/v1/unified/customer/{one.public_id}", headers={"Authorization": f"Bearer {api_key}"})
    for entry in entries:
        assert entry["customer"] == (asked.json()["data"] if entry["customer_id"] == one.public_id else None)


@pytest.mark.parametrize("expand", ["", "&expand=customer"])
def test_a_page_needs_the_same_statements_whatever_its_size(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any], expand: str
) -> None:
    add(organization, 300)
    read(300)
    counts = []
    for limit in (1, 300):
        with CaptureQueriesContext(database) as queries:
            assert len(get(f"?limit={limit}{expand}").json()["data"]) == limit
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize(
    "query",
    [
        "?cursor=x",
        "?cursor=%C3%BC",
        "?limit=0",
        "?limit=1001",
        "?limit=x",
        "?expand=links",
        "?limt=1",
        "?cursor=a&cursor=b",
    ],
)
def test_a_wrong_query_is_refused_by_name(get: Callable[..., Any], query: str) -> None:
    answer = get(query)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert answer.json()["errors"][0]["pointer"] == "/" + query[1:].split("=")[0]


def test_every_damaged_cursor_is_refused(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    add(organization)
    read(1)
    cursor = get().json()["next_cursor"]
    assert get(f"?cursor={cursor}").status_code == 200
    for position, was in enumerate(cursor):
        for text in (cursor[:position], cursor[:position] + ("A" if was != "A" else "B") + cursor[position + 1 :]):
            # An empty one is the beginning.
            assert get(f"?cursor={text}").status_code == (422 if text else 200), text
    assert len(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))) == 31


def test_an_organization_sees_its_own_changes_only(
    organization: Organization, other_organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    theirs = add(other_organization, 3)
    mine = add(organization, 2)
    _, key = ApiKey.issue(organization=other_organization, name="theirs")
    assert {entry["customer_id"] for entry in read(2)} == {customer.public_id for customer in mine}
    assert {e["customer_id"] for e in get("", key=key).json()["data"]} == {customer.public_id for customer in theirs}
    cursor = get("", key=key).json()["next_cursor"]
    answer = get(f"?cursor={cursor}")
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/cursor")


def test_reading_needs_the_scope(organization: Organization, get: Callable[..., Any]) -> None:
    _, key = ApiKey.issue(organization=organization, name="pusher", scopes=["customers:push"])
    assert get("", key=key).json()["code"] == "forbidden"
    assert get("", key="").json()["code"] == "unauthorized"


# Concurrent writers


def in_thread(work: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        finally:
            database.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@only_postgresql
def test_a_transaction_that_commits_late_leaves_no_gap(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """Its rows have lower ids than those of one that commits before: shown at once, they would hide it."""
    written, commit = threading.Event(), threading.Event()
    slow: list[Customer] = []

    def late() -> None:
        with transaction.atomic():
            slow.extend(add(organization))
            written.set()
            assert commit.wait(PATIENCE)

    thread = in_thread(late)
    try:
        assert written.wait(PATIENCE)
        [quick] = add(organization)
        before = get().json()
        assert before["data"] == []
    finally:
        commit.set()
        thread.join()
    entries = read(2, cursor=before["next_cursor"])
    assert [entry["customer_id"] for entry in entries] == [slow[0].public_id, quick.public_id]


@only_postgresql
def test_the_versions_of_a_customer_keep_their_order(organization: Organization, read: Callable[..., Any]) -> None:
    """A transaction with a lower number may write the later version."""
    first, second = add(organization, 2)
    begun, go_on = threading.Event(), threading.Event()

    def earlier() -> None:
        with transaction.atomic():
            edit(second, phone="+4930123456")
            begun.set()
            assert go_on.wait(PATIENCE)
            edit(first, phone="+4930123457")

    thread = in_thread(earlier)
    try:
        assert begun.wait(PATIENCE)
        edit(first, phone="+4930123458")
    finally:
        go_on.set()
        thread.join()
    versions = [entry["version"] for entry in read(5) if entry["customer_id"] == first.public_id]
    assert versions == [1, 2, 3]
    rows = CustomerChange.objects.filter(customer=first)
    assert rows.get(version=3).tx == rows.get(version=2).tx > CustomerChange.objects.get(customer=second, version=2).tx


class Writer:
    """One of several who create, edit, archive, restore, merge and unmerge, in transactions of random length."""

    def __init__(self, organization: Organization, seed: int, shared: list[UUID]) -> None:
        self.organization = organization
        self.random = random.Random(seed)
        self.shared = shared

    def __call__(self) -> None:
        for _ in range(20):
            made: list[UUID] = []
            try:
                with transaction.atomic():
                    for _ in range(self.random.randint(1, 5)):
                        made += self.step()
                        time.sleep(self.random.choice((0, 0, 0.002, 0.01)))
                    if self.random.random() < 0.1:
                        raise DatabaseError("changed its mind")
            except DatabaseError:
                continue  # or two had locked each other out: the database broke it, and this one gives up
            self.shared += made

    def step(self) -> list[UUID]:
        choose, who = self.random, {"organization": self.organization, "actor": ACTOR}
        customers = Customer.objects.filter(organization=self.organization)
        ids = self.shared[:]
        deed = choose.choice(("create", "edit", "edit", "archive", "restore", "merge", "merge", "unmerge", "load"))
        if deed == "create" or len(ids) < 3:
            values = [{"name": f"Example {choose.random()}"} for _ in range(choose.randint(1, 4))]
            return [customer.pk for customer in editing.create(values=values, **who)]
        if deed == "load" and choose.random() < 0.2:
            values = [{"name": f"Loaded {n}"} for n in range(bulk.COPY_FROM_ROWS)]
            return [customer.pk for customer in editing.create(values=values, **who)][:2]
        one, other = choose.sample(ids, 2)
        with suppress(CannotMerge, CannotUnmerge):
            if deed == "edit":
                chosen = {pk: {"phone": str(choose.random())} for pk in choose.sample(ids, 3)}
                editing.update(values=chosen, **who)
            elif deed == "archive":
                editing.archive(ids=[one], **who)
            elif deed == "restore" and (archived := customers.filter(archived_at__isnull=False).first()):
                editing.restore(ids=[archived.pk], **who)
            elif deed == "merge":
                editing.merge(survivor=one, loser=other, values={}, **who)
            elif deed == "unmerge" and (merged := customers.filter(merged_into__isnull=False).first()):
                editing.unmerge(loser=merged.pk, **who)
        return []


class NaiveClient:
    """Keeps a copy of the customers, and does no more than it is told to: put in place, or take out."""

    def __init__(self, get: Callable[..., Any], seed: int) -> None:
        self.get = get
        self.random = random.Random(seed)
        self.copy: dict[str, Any] = {}
        self.versions: dict[str, list[int]] = defaultdict(list)
        self.cursor = ""
        self.seen = 0

    def poll(self) -> None:
        limit = self.random.choice((1, 3, 20, 1000))
        answer = self.get(f"?expand=customer&limit={limit}&cursor={self.cursor}").json()
        for entry in answer["data"]:
            self.versions[entry["customer_id"]].append(entry["version"])
            self.seen += 1
            if entry["customer"] is None:
                self.copy.pop(entry["customer_id"], None)
            else:
                self.copy[entry["customer_id"]] = entry["customer"]
        self.cursor = answer["next_cursor"]


@pytest.mark.parametrize("seed", range(2))
def test_a_naive_client_ends_with_what_the_hub_has(
    organization: Organization, other_organization: Organization, get: Callable[..., Any], seed: int
) -> None:
    shared: list[UUID] = []
    threads = [in_thread(Writer(organization, seed * 10 + n, shared)) for n in range(4)]
    threads.append(in_thread(Writer(other_organization, seed * 10 + 9, [])))
    client = NaiveClient(get, seed)
    try:
        while any(thread.is_alive() for thread in threads):
            client.poll()
    finally:
        for thread in threads:
            thread.join()
    # Chance may have left a kind out, or ended with nobody merged.
    first, second, third = add(organization, 3)
    editing.archive(organization=organization, ids=[first.pk], actor=ACTOR)
    editing.restore(organization=organization, ids=[first.pk], actor=ACTOR)
    for loser in (second, third):
        editing.merge(organization=organization, survivor=first.pk, loser=loser.pk, values={}, actor=ACTOR)
    editing.unmerge(organization=organization, loser=second.pk, actor=ACTOR)
    total = CustomerChange.objects.filter(organization=organization).count()
    ends = time.monotonic() + PATIENCE
    while client.seen < total and time.monotonic() < ends:
        client.poll()
    assert client.seen == total > 100
    assert all(versions == [*range(1, len(versions) + 1)] for versions in client.versions.values())
    customers = Customer.objects.filter(organization=organization)
    assert client.copy == {
        customer.public_id: WIRE.show(customer, None, origin="http://testserver")
        for customer in customers.filter(merged_into=None)
    }
    types = {entry["type"] for entry in pages(get)}
    assert types >= {"created", "updated", "archived", "restored", "merged", "unmerged"}
    assert customers.filter(merged_into__isnull=False).exists()


def pages(get: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    cursor, more = "", True
    while more:
        answer = get(f"?limit=1000&cursor={cursor}").json()
        yield from answer["data"]
        cursor, more = answer["next_cursor"], answer["has_more"]


# A database that was restored


def expired(answer: Any) -> bool:
    return (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


def test_a_cursor_whose_row_was_lost_is_expired(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """An older backup was restored, and other changes have taken the numbers of the lost ones."""
    [customer] = add(organization)
    edit(customer, phone="+4930123456")
    read(2)
    cursor = get().json()["next_cursor"]
    lost = CustomerChange.objects.get(customer=customer, version=2)
    with database.cursor() as sql:
        sql.execute("DELETE FROM customers_customerchange WHERE id = %s", [lost.pk])
    assert expired(get(f"?cursor={cursor}"))
    [other] = add(organization)
    with database.cursor() as sql:
        sql.execute(
            "UPDATE customers_customerchange SET id = %s, tx = %s WHERE customer_id = %s",
            [lost.pk, lost.tx, other.pk if database.vendor == "postgresql" else other.pk.hex],
        )
    assert expired(get(f"?cursor={cursor}"))
    assert [entry["version"] for entry in read(2)] == [1, 1]


@only_postgresql
def test_a_database_in_another_cluster_starts_the_feed_anew(
    organization: Organization, other_organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """Its transactions may have lower numbers than the rows that it came with."""
    old = add(organization, 3)
    add(other_organization)
    read(3)
    cursor = get().json()["next_cursor"]
    with database.cursor() as sql:
        # Numbers that fall as the ids rise, some of them long past.
        sql.execute(
            "UPDATE customers_customerchange SET tx = CASE WHEN id % 2 = 0 THEN 5 ELSE (1::bigint << 60) - id END"
        )
    new = add(organization, 2)
    edit(old[0], phone="+4930123456")
    assert expired(get(f"?cursor={cursor}"))
    entries = read(6)
    expected = [*(customer.public_id for customer in (*old, *new)), old[0].public_id]
    assert [entry["customer_id"] for entry in entries] == expected
    cursor = get().json()["next_cursor"]
    add(organization)
    assert len(read(1, cursor=cursor)) == 1, "and from there it goes on"


def test_a_cursor_of_another_cluster_is_expired(
    organization: Organization, get: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """Also where the numbers say nothing: the row is there, and what was written since may be numbered below it."""
    add(organization)
    read(1)
    here = Place.read(get().json()["next_cursor"], organization)
    there = Place(tx=here.tx, id=here.id, cluster=b"else", change=here.change)
    assert expired(get(f"?cursor={there.write(organization)}"))
    assert get(f"?cursor={here.write(organization)}").status_code == 200
    assert get(f"?cursor={Place(cluster=b'else').write(organization)}").status_code == 200, "one that has shown nothing"


def test_a_page_is_found_by_the_index(organization: Organization, get: Callable[..., Any]) -> None:
    add(organization, 1500)
    with CaptureQueriesContext(database) as queries:
        get("?limit=2")
        cursor = get("?limit=2").json()["next_cursor"]
        get(f"?limit=2&cursor={cursor}")
    for query in queries.captured_queries:
        if "LIMIT 3" in query["sql"] or "LIMIT 4" in query["sql"]:
            with database.cursor() as sql:
                sql.execute(f"EXPLAIN {'QUERY PLAN ' if database.vendor == 'sqlite' else ''}{query['sql']}")
                plan = json.dumps(sql.fetchall(), default=str)
            assert "change_order" in plan, plan
            assert "TEMP B-TREE" not in plan
            assert "Sort" not in plan
