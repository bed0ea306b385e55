"""How the connected systems are, and that nothing they are logged in with is shown."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.api.connections import ISSUES_SHOWN, ConnectionShown, HealthShown
from connectors.models import ApiKey, Connection, CustomerLink, Issue
from connectors.states import LinkState
from customers import editing
from customers.editing import Actor
from customers.ids import new_public_id
from customers.models import Organization

ACTOR = Actor(kind="user", name="Tester")
CONNECTIONS = "/api/v1/unified/connections"


@pytest.fixture
def get(api: Client, api_key: str) -> Callable[..., Any]:
    def go(path: str = "", key: str = api_key) -> Any:
        return api.get(f"{CONNECTIONS}{path}", headers={"Authorization": f"Bearer {key}"})

    return go


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    return connect(
        "cheqpay",
        name="books",
        direction=Connection.Direction.PUSH,
        base_url="https://user:canary-url@books.example.com",
        credentials={"api_key": "canary-key"},
        options={"canary-option": True},
        checkpoint={"cursor": "canary-checkpoint"},
    )


def issue(connection: Connection, **fields: Any) -> Issue:
    now = timezone.now()
    defaults: dict[str, Any] = {"kind": "rejected", "message": "Refused.", "first_at": now, "last_at": now}
    return Issue.objects.create(organization=connection.organization, connection=connection, **{**defaults, **fields})


def test_a_connection_shows_its_health_and_no_secret(get: Callable[..., Any], books: Connection) -> None:
    answer = get(f"/{books.public_id}")
    data = answer.json()["data"]
    assert data.keys() == ConnectionShown().fields.keys()
    assert data["health"].keys() == HealthShown().fields.keys()
    assert (data["id"], data["name"], data["provider"], data["account"]) == (
        books.public_id,
        "books",
        "cheqpay",
        "M-1001",
    )
    assert (data["state"], data["state_reason"], data["direction"]) == ("active", None, "push")
    assert data["health"]["breaker"] == {"open": False, "until": None}
    assert data["health"]["open_issues"] == []
    for text in (answer.content, get().content):
        assert b"canary" not in text
        assert books.credentials.encode() not in text
    assert get().json() == {"data": [data], "next_cursor": None}


def test_trouble_is_shown_with_its_reason(get: Callable[..., Any], books: Connection) -> None:
    later = timezone.now() + timedelta(minutes=5)
    Connection.objects.update(
        state="needs_reauth",
        state_reason="The key was refused.",
        not_before=later,
        breaker_until=later,
        breaker_trips=2,
        last_success_at=timezone.now(),
    )
    issue(books, kind="login", message="Log in again.", count=7)
    issue(books, fingerprint="past", resolved_at=timezone.now())
    data = get(f"/{books.public_id}").json()["data"]
    health = data["health"]
    shown = later.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (data["state"], data["state_reason"]) == ("needs_reauth", "The key was refused.")
    assert (health["waiting_until"], health["breaker"]) == (shown, {"open": True, "until": shown})
    assert health["last_success_at"]
    assert health["open_issue_count"] == 1
    assert [(one["kind"], one["message"], one["count"]) for one in health["open_issues"]] == [
        ("login", "Log in again.", 7)
    ]
    Connection.objects.update(not_before=timezone.now() - timedelta(seconds=1))
    assert get(f"/{books.public_id}").json()["data"]["health"]["waiting_until"] is None


def test_of_many_issues_the_newest_are_shown(get: Callable[..., Any], books: Connection) -> None:
    for n in range(ISSUES_SHOWN + 5):
        issue(books, fingerprint=str(n), last_at=timezone.now() + timedelta(seconds=n))
    health = get().json()["data"][0]["health"]
    assert health["open_issue_count"] == ISSUES_SHOWN + 5
    times = [one["last_at"] for one in health["open_issues"]]
    assert (len(times), times) == (ISSUES_SHOWN, sorted(times, reverse=True))


def test_the_backlog_counts_each_customer_once_by_what_it_waits_for(
    get: Callable[..., Any], books: Connection, organization: Organization
) -> None:
    now = timezone.now()
    past, later = now - timedelta(minutes=1), now + timedelta(minutes=10)
    states: list[dict[str, Any]] = [
        {"next_attempt_at": past},
        {"next_attempt_at": past},
        {"next_attempt_at": later},
        {"next_attempt_at": past, "state": LinkState.RETRYING},
        {"next_attempt_at": later, "state": LinkState.UNCERTAIN},
        {"state": LinkState.UNCERTAIN},
        {"state": LinkState.REJECTED},
        {"state": LinkState.CONFLICT, "pushed_version": 1},
        {"pushed_version": 1},
        {"next_attempt_at": past, "is_duplicate": True},
        {"next_attempt_at": past, "deleted_at": past},
    ]
    customers = editing.create(organization=organization, values=[{"name": "A"}] * len(states), actor=ACTOR)
    for customer, fields in zip(customers, states, strict=True):
        CustomerLink.objects.create(
            customer=customer, connection=books, needed_version=1, created_at=now, updated_at=now, **fields
        )
    assert get().json()["data"][0]["health"]["backlog"] == {
        "due": 2,
        "waiting": 1,
        "retrying": 1,
        "checking": 1,
        "parked": {"rejected": 1, "uncertain": 1, "conflict": 1, "remote_deleted": 0, "paused": 0},
    }


def test_the_list_has_pages_and_constant_statements(
    get: Callable[..., Any], connect: Callable[..., Connection]
) -> None:
    made = [connect("links", name=f"c{n}", account=f"c{n}") for n in range(9)]
    for one in made:
        issue(one)
    first = get("?limit=4").json()
    with CaptureQueriesContext(database) as one:
        get("?limit=1")
    with CaptureQueriesContext(database) as queries:
        second = get(f"?limit=4&cursor={first['next_cursor']}").json()
    assert len(queries) == len(one) <= 5
    third = get(f"?limit=4&cursor={second['next_cursor']}").json()
    ids = [row["id"] for page in (first, second, third) for row in page["data"]]
    assert ids == [row.public_id for row in made]
    assert third["next_cursor"] is None


def test_connections_are_ones_own_and_need_the_scope(
    get: Callable[..., Any], books: Connection, organization: Organization, other_organization: Organization
) -> None:
    _, theirs = ApiKey.issue(organization=other_organization, name="theirs")
    _, reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])
    assert get(key=theirs).json() == {"data": [], "next_cursor": None}
    bodies = []
    for id_, key in ((books.public_id, theirs), (new_public_id("con"), theirs), ("x", theirs)):
        answer = get(f"/{id_}", key=key)
        assert answer.status_code == 404
        bodies.append({k: v for k, v in answer.json().items() if k != "request_id"})
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["detail"] == "There is no such connection."
    assert get(key=reader).status_code == get(f"/{books.public_id}", key=reader).status_code == 403


@pytest.mark.parametrize("query", ["?cursor=x", "?limit=0", "?limit=201", "?lmit=1"])
def test_a_wrong_query_is_refused_by_name(get: Callable[..., Any], query: str) -> None:
    answer = get(query)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/" + query[1:].split("=")[0]
