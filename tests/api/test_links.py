"""What systems know of a customer, and pushing one: with and without waiting for what comes of it."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.api import links as api_links
from connectors.api.links import LinkShown, OperationShown, ResultShown
from connectors.models import ApiKey, Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import STATUSES, LinkState
from connectors.sync.push import push
from connectors.sync.request import request
from customers import editing
from customers.editing import Actor
from customers.ids import new_public_id
from customers.models import Customer, Organization
from tests.connectors.fakes import FakeLinks

ACTOR = Actor(kind="user", name="Tester")
ONE, OPERATIONS = "/api/v1/unified/customer", "/api/v1/unified/operations"


@pytest.fixture
def call(api: Client, api_key: str) -> Callable[..., Any]:
    def go(method: str, path: str, body: Any = None, key: str = api_key, **headers: str) -> Any:
        data = json.dumps(body) if body is not None else b""
        return api.generic(
            method, path, data, content_type="application/json", headers={"Authorization": f"Bearer {key}", **headers}
        )

    return go


@pytest.fixture
def target(connect: Callable[..., Connection]) -> Callable[..., Connection]:
    """Make a connection that the hub pushes to."""

    def make(name: str, **fields: Any) -> Connection:
        return connect(
            "links",
            name=name,
            account=name,
            direction=fields.pop("direction", Connection.Direction.PUSH),
            base_url=f"https://{name}.example.com/api/v1",
            credentials={"api_key": "remote-key"},
            **fields,
        )

    return make


@pytest.fixture
def customer(organization: Organization) -> Customer:
    [made] = editing.create(organization=organization, values=[{"name": "Acme", "email": "a@example.com"}], actor=ACTOR)
    return made


def link(customer: Customer, connection: Connection, **fields: Any) -> CustomerLink:
    defaults: dict[str, Any] = {"created_at": customer.created_at, "updated_at": customer.created_at}
    return CustomerLink.objects.create(customer=customer, connection=connection, **{**defaults, **fields})


def send(connection: Connection, system: FakeLinks) -> None:
    """What a worker does."""
    links = PROVIDERS["links"]
    connection.refresh_from_db()
    push(connection=connection, provider=links, session=links.session(connection, client=system.client()))


# Links


def test_every_link_tells_its_state_and_whose_turn_it_is(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer
) -> None:
    books, shop = target("books"), target("shop")
    link(
        customer,
        books,
        needed_version=1,
        state=LinkState.REJECTED,
        error="Too short.",
        error_field="phone",
    )
    link(customer, shop, needed_version=3, pushed_version=3, remote_id="r-1", is_primary=True, synced_at=timezone.now())
    answer = call("GET", f"{ONE}/{customer.public_id}/links")
    assert answer.status_code == 200
    first, second = answer.json()["data"]
    assert first.keys() == second.keys() == LinkShown().fields.keys()
    assert first["connection"] == {"id": shop.public_id, "name": "shop", "provider": "links"}
    assert (first["state"], first["turn"], first["remote_id"], first["error"]) == ("in_sync", "nobody", "r-1", None)
    assert (first["is_leading"], first["needed_version"], first["pushed_version"]) == (True, 3, 3)
    assert (second["state"], second["word"], second["turn"]) == ("rejected", "Rejected", "you")
    assert second["sentence"] == "books refuses phone: Too short."
    assert second["error"] == {"field": "phone", "message": "Too short."}
    assert {status.turn.replace(" ", "_") for status in STATUSES.values()} == {"nobody", "you", "connection_owner"}


def test_links_need_the_same_statements_however_many(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer
) -> None:
    counts = []
    for number in (1, 12):
        for n in range(number):
            link(customer, target(f"system{number}-{n}"))
        call("GET", f"{ONE}/{customer.public_id}/links")
        with CaptureQueriesContext(database) as queries:
            call("GET", f"{ONE}/{customer.public_id}/links")
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 5


def test_a_customer_and_a_list_show_their_links_when_asked(
    call: Callable[..., Any], target: Callable[..., Connection], organization: Organization, customer: Customer
) -> None:
    [other] = editing.create(organization=organization, values=[{"name": "B"}], actor=ACTOR)
    books, shop = target("books"), target("shop")
    first = link(customer, books, remote_id="r-1", pushed_version=1, needed_version=1, is_primary=True)
    link(customer, shop, needed_version=1, state=LinkState.REJECTED, error="Too short.", error_field="phone")
    alone = call("GET", f"{ONE}/{customer.public_id}/links").json()["data"]
    plain = call("GET", f"{ONE}/{customer.public_id}").json()["data"]
    assert "links" not in plain
    shown = call("GET", f"{ONE}/{customer.public_id}?expand=links")
    assert shown.json()["data"] == {**plain, "links": alone}
    for query in ("expand=links", "expand=links&cursor="):
        with CaptureQueriesContext(database) as queries:
            found = call("GET", f"/api/v1/unified/customers?{query}").json()["data"]
        assert [one["links"] for one in found] == [alone, []]
        assert [one["id"] for one in found] == [customer.public_id, other.public_id]
        assert len(queries) <= 6
    # A link may change while the customer stays as it is: what was read with its links is always sent again.
    CustomerLink.objects.filter(pk=first.pk).update(state=LinkState.CONFLICT, pushed_version=0)
    assert call("GET", f"{ONE}/{customer.public_id}", **{"If-None-Match": shown["ETag"]}).status_code == 304
    again = call("GET", f"{ONE}/{customer.public_id}?expand=links", **{"If-None-Match": shown["ETag"]})
    assert again.status_code == 200
    assert again.json()["data"]["links"][0]["state"] == "conflict"
    assert call("GET", f"{ONE}/{customer.public_id}?expand=all").status_code == 400


def test_an_old_id_leads_to_the_survivors_links(
    call: Callable[..., Any], target: Callable[..., Connection], organization: Organization, customer: Customer
) -> None:
    [other] = editing.create(organization=organization, values=[{"name": "B"}], actor=ACTOR)
    link(other, target("books"), remote_id="r-1", pushed_version=1, needed_version=1)
    editing.merge(organization=organization, survivor=customer.pk, loser=other.pk, values={}, actor=ACTOR)
    old = call("GET", f"{ONE}/{other.public_id}/links").json()
    assert [one["remote_id"] for one in old["data"]] == ["r-1"]
    assert call("GET", f"{ONE}/{customer.public_id}/links").json() == old


@pytest.mark.parametrize(("method", "what"), [("GET", "links"), ("POST", "push")])
def test_a_customer_of_another_organization_is_none(
    call: Callable[..., Any], other_organization: Organization, method: str, what: str
) -> None:
    [theirs] = editing.create(organization=other_organization, values=[{"name": "Theirs"}], actor=ACTOR)
    answers = []
    for id_ in (theirs.public_id, new_public_id("cust"), "nonsense"):
        answer = call(method, f"{ONE}/{id_}/{what}")
        assert answer.status_code == 404
        answers.append({k: v for k, v in answer.json().items() if k != "request_id"})
    assert answers[0] == answers[1] == answers[2]


# Pushing


def test_a_push_is_an_operation_that_can_be_followed(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer
) -> None:
    books, shop = target("books"), target("shop")
    order = {"connection_ids": [books.public_id, shop.public_id, books.public_id]}
    answer = call("POST", f"{ONE}/{customer.public_id}/push", order)
    assert answer.status_code == 202
    begun = answer.json()["data"]
    assert answer["Location"] == f"{OPERATIONS}/{begun['id']}"
    assert (begun["state"], begun["done"], begun["finished_at"]) == ("running", False, None)
    assert begun["customer_id"] == customer.public_id
    assert begun.keys() == OperationShown().fields.keys()
    assert [one["connection_id"] for one in begun["results"]] == [books.public_id, shop.public_id]
    assert all(one.keys() == ResultShown().fields.keys() for one in begun["results"])
    assert {(one["state"], one["outcome"]) for one in begun["results"]} == {("waiting", None)}
    assert all(one.urgent for one in CustomerLink.objects.all())
    assert SyncRun.objects.first().actor_name == "shop"

    send(books, FakeLinks())
    half = call("GET", answer["Location"]).json()["data"]
    assert [one["outcome"] for one in half["results"]] == ["created", None]
    assert (half["done"], half["results"][0]["remote_id"], half["results"][0]["state"]) == (False, "cust_1", "in_sync")

    system = FakeLinks()
    wrong = {"message": "no", "errors": {"phone": ["Too short."]}}
    system.fail(lambda request: httpx2.Response(422, json=wrong))
    send(shop, system)
    done = call("GET", answer["Location"]).json()["data"]
    assert (done["done"], done["state"]) == (True, "partly_succeeded")
    assert done["finished_at"] >= done["created_at"]
    refused = done["results"][1]
    assert (refused["outcome"], refused["state"], refused["remote_id"]) == ("refused", "rejected", None)
    assert refused["error"]["message"]


def test_a_customer_in_sync_has_nothing_to_push(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer
) -> None:
    books = target("books")
    request(connection=books, actor=ACTOR)
    send(books, FakeLinks())
    answer = call("POST", f"{ONE}/{customer.public_id}/push?wait=5")
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert (data["done"], data["state"], data["results"][0]["outcome"]) == (True, "succeeded", "unchanged")
    assert data["results"][0]["sentence"].startswith("Same as in books since ")


def test_where_there_is_nothing_to_push_it_says_so(
    call: Callable[..., Any], connect: Callable[..., Connection], organization: Organization, customer: Customer
) -> None:
    link(customer, connect("cheqpay"), remote_id="A")
    answer = call("POST", f"{ONE}/{customer.public_id}/push", {})
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_push")
    assert "No system that the hub sends to knows Acme" in answer.json()["detail"]
    link(customer, connect("rootfi", direction=Connection.Direction.PUSH))
    editing.archive(organization=organization, ids=[customer.pk], actor=ACTOR)
    answer = call("POST", f"{ONE}/{customer.public_id}/push", {})
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_push")
    assert "archived" in answer.json()["detail"]
    assert not SyncRun.objects.exists()


def test_connections_that_cannot_be_pushed_to_are_named(
    call: Callable[..., Any],
    connect: Callable[..., Connection],
    target: Callable[..., Connection],
    other_organization: Organization,
    customer: Customer,
) -> None:
    theirs = target("theirs", organization=other_organization)
    reads, ours = target("reads", direction=Connection.Direction.PULL), target("ours")
    ids = [theirs.public_id, new_public_id("con"), connect("cheqpay").public_id, reads.public_id, ours.public_id, "x"]
    answer = call("POST", f"{ONE}/{customer.public_id}/push", {"connection_ids": ids})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert {error["pointer"]: error["message"] for error in answer.json()["errors"]} == {
        "/connection_ids/0": "There is no such connection.",
        "/connection_ids/1": "There is no such connection.",
        "/connection_ids/2": "cheqpay calls the hub: nothing is sent to it.",
        "/connection_ids/3": "The hub only reads from reads: nothing is sent to it.",
        "/connection_ids/5": "There is no such connection.",
    }
    assert not SyncRun.objects.exists()


@pytest.mark.parametrize(
    ("query", "body", "pointer"),
    [
        ("?wait=31", {}, "/wait"),
        ("?wait=-1", {}, "/wait"),
        ("?wiat=1", {}, "/wiat"),
        ("", {"connection_id": "x"}, "/connection_id"),
        ("", {"connection_ids": []}, "/connection_ids"),
        ("", {"connection_ids": "x"}, "/connection_ids"),
    ],
)
def test_a_wrong_order_is_refused_by_name(
    call: Callable[..., Any], customer: Customer, query: str, body: Any, pointer: str
) -> None:
    answer = call("POST", f"{ONE}/{customer.public_id}/push{query}", body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


def test_operations_are_ones_own_and_need_the_scope(
    call: Callable[..., Any],
    target: Callable[..., Connection],
    organization: Organization,
    other_organization: Organization,
    customer: Customer,
) -> None:
    books = target("books")
    _, theirs = ApiKey.issue(organization=other_organization, name="theirs")
    _, reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])
    where = call("POST", f"{ONE}/{customer.public_id}/push", {"connection_ids": [books.public_id]})["Location"]
    by_hand = request(connection=books, actor=ACTOR)
    refused = [
        call("GET", where, key=theirs),
        call("GET", f"{OPERATIONS}/x"),
        call("GET", f"{OPERATIONS}/{by_hand.public_id}"),
    ]
    assert {(one.status_code, one.json()["code"]) for one in refused} == {(404, "not_found")}
    assert call("GET", where, key=reader).status_code == 403
    assert call("POST", f"{ONE}/{customer.public_id}/push", {}, key=reader).status_code == 403


def test_an_operation_follows_a_customer_that_was_merged(
    call: Callable[..., Any], target: Callable[..., Connection], organization: Organization, customer: Customer
) -> None:
    books = target("books")
    order = {"connection_ids": [books.public_id]}
    where = call("POST", f"{ONE}/{customer.public_id}/push", order)["Location"]
    [other] = editing.create(organization=organization, values=[{"name": "B", "email": "b@example.com"}], actor=ACTOR)
    editing.merge(organization=organization, survivor=other.pk, loser=customer.pk, values={}, actor=ACTOR)
    send(books, FakeLinks())
    data = call("GET", where).json()["data"]
    assert (data["done"], data["results"][0]["state"], data["results"][0]["remote_id"]) == (True, "in_sync", "cust_1")


# Waiting


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "one-push"}])
def test_waiting_ends_with_the_push(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer, headers: dict[str, str]
) -> None:
    books = target("books")

    def work() -> None:
        try:
            ends = time.monotonic() + 20
            while not CustomerLink.objects.filter(urgent=True).exists() and time.monotonic() < ends:
                time.sleep(0.02)
            send(books, FakeLinks())
        finally:
            database.close()

    worker = threading.Thread(target=work)
    worker.start()
    began = time.monotonic()
    order = {"connection_ids": [books.public_id]}
    answer = call("POST", f"{ONE}/{customer.public_id}/push?wait=25", order, **headers)
    worker.join()
    assert (answer.status_code, answer.json()["data"]["state"]) == (200, "succeeded")
    assert answer["Location"]
    assert time.monotonic() - began < 20
    again = call("GET", f"{answer['Location']}?wait=25")
    assert again.json() == answer.json()


@pytest.mark.django_db(transaction=True)
def test_waiting_ends_when_the_time_is_over_and_keeps_no_connection(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"connection_ids": [target("books").public_id]}
    pauses: list[tuple[float, bool]] = []

    def sleep(seconds: float) -> None:
        pauses.append((seconds, database.connection is None and not database.in_atomic_block))
        wait(seconds)

    wait = time.sleep
    monkeypatch.setattr(time, "sleep", sleep)
    answer = call("POST", f"{ONE}/{customer.public_id}/push?wait=2", order)
    assert (answer.status_code, answer.json()["data"]["done"]) == (202, False)
    assert answer["Retry-After"] == "1"
    assert 3 <= len(pauses) <= 12
    assert all(closed for _, closed in pauses)
    assert sum(seconds for seconds, _ in pauses) == pytest.approx(2, abs=1.5)


@pytest.mark.django_db(transaction=True)
def test_where_too_many_wait_the_answer_comes_at_once(
    call: Callable[..., Any], target: Callable[..., Connection], customer: Customer
) -> None:
    order = {"connection_ids": [target("books").public_id]}
    for _ in range(api_links.MAX_WAITING):
        assert api_links._waiting.acquire(blocking=False)
    try:
        began = time.monotonic()
        answer = call("POST", f"{ONE}/{customer.public_id}/push?wait=30", order)
        assert (answer.status_code, answer.json()["data"]["done"]) == (202, False)
        assert time.monotonic() - began < 10
    finally:
        for _ in range(api_links.MAX_WAITING):
            api_links._waiting.release()
