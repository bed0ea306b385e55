"""Runs: filtered, paged, and with totals that add up."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.api.runs import RecordShown, RunShown
from connectors.models import ApiKey, Connection, SyncRun
from connectors.sync import runs
from customers import editing
from customers.editing import Actor
from customers.models import Organization

ACTOR = Actor(kind="user", name="Tester", request_id="req_of_the_tester")
RUNS = "/api/v1/unified/runs"


@pytest.fixture
def get(api: Client, api_key: str) -> Callable[..., Any]:
    def go(path: str = "", key: str = api_key) -> Any:
        return api.get(f"{RUNS}{path}", headers={"Authorization": f"Bearer {key}"})

    return go


@pytest.fixture
def run(organization: Organization) -> Callable[..., SyncRun]:
    def make(kind: str = "push", connection: Connection | None = None, **fields: Any) -> SyncRun:
        options = {"organization": organization, "actor": ACTOR, "at": timezone.now(), **fields}
        return runs.start(kind=kind, connection=connection, **options)

    return make


def test_a_run_has_totals_that_add_up(
    get: Callable[..., Any], run: Callable[..., SyncRun], connect: Callable[..., Connection]
) -> None:
    books = connect("links", name="books")
    made = run(connection=books, planned=10)
    runs.add(run_id=made.pk, totals={"created": 3, "refused": 2}, at=timezone.now())
    data = get(f"/{made.public_id}").json()["data"]
    assert data.keys() == RunShown().fields.keys()
    assert data["connection"] == {"id": books.public_id, "name": "books", "provider": "links"}
    assert (data["actor"], data["request_id"]) == ({"kind": "user", "name": "Tester"}, "req_of_the_tester")
    assert (data["state"], data["planned"], data["open"]) == ("running", 10, 5)
    assert [*data["totals"]] == [*SyncRun.TOTALS]
    assert sum(data["totals"].values()) + data["open"] == data["planned"]
    runs.finish(run=made, at=timezone.now())
    data = get(f"/{made.public_id}").json()["data"]
    assert (data["state"], data["open"], data["totals"]["skipped"]) == ("partly_succeeded", 0, 5)
    assert data["finished_at"] is not None

    pull = run(kind="pull", connection=books)
    runs.add(run_id=pull.pk, totals={"updated": 4}, at=timezone.now())
    data = get(f"/{pull.public_id}").json()["data"]
    assert (data["planned"], data["open"], data["totals"]["updated"]) == (4, 0, 4), "it learns as it goes"


def test_runs_are_listed_newest_first_and_filtered(
    get: Callable[..., Any], run: Callable[..., SyncRun], connect: Callable[..., Connection]
) -> None:
    books = connect("links", name="books")
    made = [run(), run(kind="pull", connection=books), run(connection=books, state="queued"), run(kind="import")]
    ids = [one.public_id for one in made]

    def listed(query: str) -> list[str]:
        return [one["id"] for one in get(query).json()["data"]]

    assert listed("") == ids[::-1]
    assert listed("?kind=push") == [ids[2], ids[0]]
    assert listed("?state=queued") == [ids[2]]
    assert listed(f"?connection_id={books.public_id}") == [ids[2], ids[1]]
    assert listed(f"?connection_id={books.public_id}&kind=pull&state=running") == [ids[1]]
    assert get("?connection_id=x").status_code == 404


def test_pages_neither_skip_nor_repeat_while_runs_begin(
    get: Callable[..., Any], run: Callable[..., SyncRun], connect: Callable[..., Connection]
) -> None:
    books = connect("links", name="books")
    before = [run(connection=books).public_id for _ in range(7)]
    cursor, seen = "", []
    while cursor is not None:
        answer = get(f"?limit=3&cursor={cursor}").json()
        seen += [one["id"] for one in answer["data"]]
        cursor = answer["next_cursor"]
        run(connection=books)
    assert seen == before[::-1]
    counts = []
    for limit in (1, 10):
        with CaptureQueriesContext(database) as queries:
            assert len(get(f"?limit={limit}").json()["data"]) == limit
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 3


def test_the_records_that_need_somebody(
    get: Callable[..., Any], run: Callable[..., SyncRun], organization: Organization
) -> None:
    [customer] = editing.create(organization=organization, values=[{"name": "Acme"}], actor=ACTOR)
    made = run(planned=3)
    problems = [
        {"customer": str(customer.pk), "state": "refused", "field": "email", "reason": "Too long."},
        {"state": "orphan", "remote_id": "r-1", "field": "", "reason": "Nobody's."},
        {"row": 7, "state": "refused", "field": "name", "reason": "A customer needs a name."},
    ]
    runs.add(run_id=made.pk, totals={"refused": 2, "uncertain": 1}, problems=problems, at=timezone.now())
    answer = get(f"/{made.public_id}/records").json()
    assert all(one.keys() == RecordShown().fields.keys() for one in answer["data"])
    assert [(one["customer_id"], one["remote_id"], one["row"]) for one in answer["data"]] == [
        (customer.public_id, None, None),
        (None, "r-1", None),
        (None, None, 7),
    ]
    assert [(one["outcome"], one["field"], one["message"]) for one in answer["data"]] == [
        ("refused", "email", "Too long."),
        ("orphan", None, "Nobody's."),
        ("refused", "name", "A customer needs a name."),
    ]
    assert (answer["need_attention"], answer["complete"]) == (3, True)
    runs.add(run_id=made.pk, totals={"refused": 200}, problems=problems[:1] * 200, at=timezone.now())
    answer = get(f"/{made.public_id}/records").json()
    assert (len(answer["data"]), answer["need_attention"], answer["complete"]) == (100, 203, False)


def test_runs_are_ones_own_and_need_the_scope(
    get: Callable[..., Any],
    run: Callable[..., SyncRun],
    connect: Callable[..., Connection],
    organization: Organization,
    other_organization: Organization,
) -> None:
    books = connect("links", name="books")
    made = run(connection=books)
    _, theirs = ApiKey.issue(organization=other_organization, name="theirs")
    _, reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])
    cursor = run().public_id and get("?limit=1").json()["next_cursor"]
    assert get(key=theirs).json() == {"data": [], "next_cursor": None}
    assert get(f"?cursor={cursor}", key=theirs).status_code == 422
    for path in (f"/{made.public_id}", f"/{made.public_id}/records", f"?connection_id={books.public_id}", "/x"):
        answer = get(path, key=theirs)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert get(path, key=reader).status_code == 403


@pytest.mark.parametrize("query", ["?kind=x", "?state=x", "?limit=0", "?cursor=x", "?connection=x"])
def test_a_wrong_query_is_refused_by_name(get: Callable[..., Any], query: str) -> None:
    answer = get(query)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/" + query[1:].split("=")[0]
