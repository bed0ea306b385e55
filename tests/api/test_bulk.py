"""Many customers in one call: each for itself or all together, by the same path as one."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.models import ApiKey, Connection, CustomerLink
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization

ACTOR = Actor(kind="user", name="Tester")
UNIFIED = "/api/v1/unified"
BULK = f"{UNIFIED}/customers/bulk"
Send = Callable[..., Any]


@pytest.fixture
def send(api: Client, api_key: str) -> Send:
    def go(body: Any, *, key: str = api_key, method: str = "POST", path: str = BULK) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return api.generic(method, path, json.dumps(body), content_type="application/json", headers=headers)

    return go


@pytest.fixture
def ada(organization: Organization) -> Customer:
    values = {"name": "Ada Lovelace", "email": "ada@example.com"}
    return editing.create(organization=organization, values=[values], actor=ACTOR)[0]


def item(action: str, values: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"action": action, "values": {} if values is None else values, **more}


def rows(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.content
    data = answer.json()["data"]
    items: list[dict[str, Any]] = data["items"]
    assert [row["index"] for row in items] == list(range(len(items)))
    failed = sum(row["status"] == "failed" for row in items)
    assert (data["failed"], data["succeeded"]) == (failed, len(items) - failed)
    for row in items:
        assert row.keys() == {"index", "status", "id", "etag", "error"}
        assert (row["error"] is not None) == (row["status"] == "failed")
    return items


def failure(row: dict[str, Any]) -> tuple[str, list[str]]:
    assert row["status"] == "failed", row
    return row["error"]["code"], [error["pointer"] for error in row["error"]["errors"]]


def test_each_item_has_its_own_outcome(
    send: Send, organization: Organization, connect: Callable[..., Connection], ada: Customer
) -> None:
    shop = connect("cheqpay").public_id
    first = rows(
        send(
            {
                "items": [
                    item("create", {"name": "Grace", "custom_fields": {"a": 1, "b": None}}),
                    item("update", {"phone": "+4930123456"}, id=ada.public_id, if_match="v1"),
                    item("upsert", {"name": "Alan"}, connection_id=shop, source_id="A"),
                    item("create", {"name": "Edsger"}, connection_id=shop, source_id="B"),
                    item("create", {"name": "X", "email": "nonsense"}),
                ]
            }
        )
    )
    assert [row["status"] for row in first] == ["created", "updated", "created", "created", "failed"]
    assert [row["etag"] for row in first] == ["v1", "v2", "v1", "v1", None]
    assert first[1]["id"] == ada.public_id
    assert failure(first[4]) == ("validation_failed", ["/items/4/values/email"])
    assert Customer.objects.get(name="Grace").custom_fields == {"a": 1}
    second = rows(
        send(
            {
                "mode": "per_item",
                "items": [
                    item("update", {"name": "Grace Hopper"}, id=first[0]["id"], if_match='"v1"'),
                    item("update", {"phone": "+4930123456"}, id=ada.public_id, if_match="*"),
                    item("upsert", {"currency": "EUR"}, connection_id=shop, source_id="A", if_match="v1"),
                    item("update", {"currency": "EUR"}, connection_id=shop, source_id="B"),
                    item("create", {"name": "Twice"}, connection_id=shop, source_id="A"),
                ],
            }
        )
    )
    assert [row["status"] for row in second] == ["updated", "unchanged", "updated", "updated", "failed"]
    assert [row["id"] for row in second[:4]] == [row["id"] for row in first[:4]]
    assert [row["etag"] for row in second[:4]] == ["v2"] * 4
    assert failure(second[4]) == ("conflict", ["/items/4/source_id"])
    assert (second[4]["id"], second[4]["etag"]) == (first[2]["id"], "v2"), "the one that stood in the way"
    assert Customer.objects.count() == 4
    assert CustomerChange.objects.filter(actor_name="shop").count() == 7


def test_one_that_cannot_be_stored_keeps_all_out(send: Send, connect: Callable[..., Connection], ada: Customer) -> None:
    shop = connect("cheqpay").public_id
    items = [
        item("create", {"name": "Grace"}),
        item("update", {"name": "Changed"}, id=ada.public_id, if_match="v1"),
        item("upsert", {"name": "Alan"}, connection_id=shop, source_id="A"),
    ]
    wrong = [
        item("create", {"email": "nonsense", "phone": 5, "nmae": "X"}),
        item("create", {"email": "a@example.com"}),
        item("update", {"name": "X"}, id="cust_" + "0" * 26),
        item("update", {"name": "X"}, id=ada.public_id, if_match="v1"),
        item("update", {"name": "X"}, connection_id=shop, source_id="nobody"),
        "text",
    ]
    answer = send({"mode": "all_or_nothing", "items": [*items, *wrong]})
    assert (answer.status_code, answer["Content-Type"]) == (422, "application/problem+json")
    body = answer.json()
    assert (body["code"], body["detail"]) == ("validation_failed", "6 of 9 items cannot be stored.")
    assert [(error["pointer"], error["code"]) for error in body["errors"]] == [
        ("/items/3/values/nmae", "invalid"),
        ("/items/4/values/name", "required"),
        ("/items/5/id", "not_found"),
        ("/items/6", "repeated"),
        ("/items/7/source_id", "not_found"),
        ("/items/8", "invalid"),
    ]
    assert Customer.objects.get().version == 1
    assert not CustomerLink.objects.exists()
    stale = send({"mode": "all_or_nothing", "items": [items[0], {**items[1], "if_match": "v9"}]}).json()
    assert [(error["pointer"], error["code"]) for error in stale["errors"]] == [("/items/1", "version_conflict")]
    assert Customer.objects.count() == 1
    assert [row["status"] for row in rows(send({"mode": "all_or_nothing", "items": items}))] == [
        "created",
        "updated",
        "created",
    ]
    assert Customer.objects.count() == 3


def test_a_stale_item_fails_alone_and_shows_what_is_current(send: Send, ada: Customer) -> None:
    [row, other] = rows(
        send({"items": [item("update", {"name": "X"}, id=ada.public_id, if_match="v2"), item("create", {"name": "Y"})]})
    )
    assert failure(row) == ("version_conflict", [])
    assert (row["id"], row["etag"]) == (ada.public_id, "v1")
    assert other["status"] == "created"
    ada.refresh_from_db()
    assert ada.name == "Ada Lovelace"


def test_a_customer_is_written_by_its_first_item_only(
    send: Send, organization: Organization, connect: Callable[..., Connection], ada: Customer
) -> None:
    shop = connect("cheqpay").public_id
    [old] = editing.create(organization=organization, values=[{"name": "Ada L"}], actor=ACTOR)
    editing.merge(organization=organization, survivor=ada.pk, loser=old.pk, values={}, actor=ACTOR)
    answer = rows(
        send(
            {
                "items": [
                    item("update", {"currency": "1"}, id=ada.public_id),
                    item("update", {"currency": "2"}, id=old.public_id),
                    item("upsert", {"name": "New", "currency": "3"}, connection_id=shop, source_id="A"),
                    item("upsert", {"name": "New", "currency": "4"}, connection_id=shop, source_id="A"),
                    item("create", {"name": "Same"}),
                    item("create", {"name": "Same"}),
                ]
            }
        )
    )
    assert [row["status"] for row in answer] == ["updated", "failed", "created", "failed", "created", "created"]
    assert [failure(answer[n]) for n in (1, 3)] == [("conflict", ["/items/1"]), ("conflict", ["/items/3"])]
    assert "Item 0" in answer[1]["error"]["message"]
    assert sorted(Customer.objects.exclude(currency="").values_list("currency", flat=True)) == ["1", "3"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"action": "delete"}, "action"),
        ({"action": None}, "action"),
        ({"values": None}, "values"),
        ({"values": []}, "values"),
        ({"extra": 1}, "extra"),
        ({"id": None}, "id"),
        ({"connection_id": "CONNECTION"}, "source_id"),
        ({"source_id": "A"}, "connection_id"),
        ({"connection_id": "CONNECTION", "source_id": "A"}, "id"),
        ({"action": "upsert"}, "id"),
        ({"action": "upsert", "id": None}, "source_id"),
        ({"action": "create"}, "id"),
        ({"action": "create", "id": None, "if_match": "v1"}, "if_match"),
        ({"if_match": "1"}, "if_match"),
        ({"if_match": 1.5}, "if_match"),
        ({"if_match": '"v1'}, "if_match"),
        ({"id": None, "connection_id": "CONNECTION", "source_id": "x" * 256}, "source_id"),
        ({"id": None, "connection_id": "CONNECTION", "source_id": "a\u0007"}, "source_id"),
    ],
)
def test_an_item_that_makes_no_sense_is_pointed_to(
    send: Send, connect: Callable[..., Connection], ada: Customer, change: dict[str, Any], pointer: str
) -> None:
    shop = connect("cheqpay").public_id
    one = {**item("update", {"name": "X"}, id=ada.public_id), **change}
    one = {name: shop if value == "CONNECTION" else value for name, value in one.items()}
    [good, row] = rows(send({"items": [item("create", {"name": "Good"}), one]}))
    assert good["status"] == "created"
    assert failure(row) == ("validation_failed", [f"/items/1/{pointer}"])
    assert Customer.objects.get(pk=ada.pk).version == 1


@pytest.mark.parametrize(
    ("body", "code", "pointers"),
    [
        ([], "malformed_request", []),
        ({}, "validation_failed", ["/items"]),
        ({"items": {}}, "validation_failed", ["/items"]),
        ({"items": [], "mode": "some"}, "validation_failed", ["/mode"]),
        ({"items": [], "moed": "per_item"}, "validation_failed", ["/moed"]),
        ({"items": [{}] * 501}, "validation_failed", ["/items"]),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_whole(
    send: Send, organization: Organization, body: Any, code: str, pointers: list[str]
) -> None:
    answer = send(body)
    assert answer["Content-Type"] == "application/problem+json"
    assert (answer.json()["code"], [error["pointer"] for error in answer.json()["errors"]]) == (code, pointers)


def test_what_belongs_to_another_organization_is_not_there(
    send: Send, organization: Organization, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    theirs = connect("cheqpay", organization=other_organization)
    mine = connect("rootfi")
    [foreign] = editing.create(organization=other_organization, values=[{"name": "Secret"}], actor=ACTOR)
    answer = rows(
        send(
            {
                "items": [
                    item("update", {"name": "X"}, id=foreign.public_id),
                    item("update", {"name": "X"}, id="cust_" + "0" * 26),
                    item("update", {"name": "X"}, id="cust_12345"),
                    item("upsert", {"name": "X"}, connection_id=theirs.public_id, source_id="A"),
                    item("upsert", {"name": "X"}, connection_id="con_" + "0" * 26, source_id="B"),
                    item("create", {"name": "X"}, connection_id="con_1", source_id="C"),
                    item("upsert", {"name": "Mine"}, connection_id=mine.public_id, source_id="A"),
                ]
            }
        )
    )
    assert [failure(row)[0] for row in answer[:6]] == ["not_found"] * 6
    assert [row["id"] for row in answer[:6]] == [None] * 6
    assert (
        len({row["error"]["message"] for row in answer[:3]}) == len({r["error"]["message"] for r in answer[3:6]}) == 1
    )
    assert answer[6]["status"] == "created"
    assert sorted(Customer.objects.values_list("name", flat=True)) == ["Mine", "Secret"]


def test_writing_many_needs_the_scope_to_write(send: Send, organization: Organization) -> None:
    _, reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])
    assert send({"items": [item("create", {"name": "X"})]}, key=reader).status_code == 403
    assert send({"items": []}, method="GET").json()["code"] == "method_not_allowed"
    assert send({"items": []}, path=f"{BULK}?x=1").json()["errors"][0]["pointer"] == "/x"
    assert rows(send({"items": []})) == []
    assert not Customer.objects.exists()


def test_one_customer_alone_and_in_a_batch_are_written_alike(send: Send, connect: Callable[..., Connection]) -> None:
    shop = connect("cheqpay").public_id
    values = {"first_name": "Ada", "last_name": "L", "email": "ada@example.com", "custom_fields": {"a": 1}}
    change = {"last_name": "Lovelace", "phone": None, "custom_fields": {"a": None, "b": 2}}
    alone = send(values, method="PUT", path=f"{UNIFIED}/connections/{shop}/customers/alone").json()["data"]["id"]
    send(change, method="PATCH", path=f"{UNIFIED}/customer/{alone}")
    [row] = rows(send({"items": [item("upsert", values, connection_id=shop, source_id="batch")]}))
    rows(send({"items": [item("update", change, id=row["id"])]}))
    one, other = Customer.objects.order_by("id")
    for name in (*editing.EDITABLE, "version", "name_key", "email_key", "phone_key"):
        assert getattr(one, name) == getattr(other, name), name
    columns = ("version", "actor_kind", "actor_id", "actor_name", "message", "changes")
    assert [*one.changes.order_by("version").values(*columns)] == [*other.changes.order_by("version").values(*columns)]
    links = CustomerLink.objects.order_by("pk")
    assert len({(link.base_local["email"], link.pushed_version, link.is_dirty) for link in links}) == 1


def test_statements_do_not_grow_with_the_items(
    send: Send, organization: Organization, connect: Callable[..., Connection]
) -> None:
    shop = connect("cheqpay").public_id
    connect("links", direction="push", create_policy="automatic")
    known = editing.create(organization=organization, values=[{"name": f"Known {n}"} for n in range(167)], actor=ACTOR)

    def count(turn: int, size: int) -> int:
        body = {
            "items": [
                one
                for n in range(size)
                for one in (
                    item("create", {"name": f"New {n}"}),
                    item("update", {"phone": f"+4930{turn}{n:04}"}, id=known[n].public_id),
                    item("upsert", {"name": f"Shop {n}", "phone": f"{turn}"}, connection_id=shop, source_id=f"{n}"),
                )
            ][:500]
        }
        with CaptureQueriesContext(database) as queries:
            outcomes = rows(send(body))
        assert not [row for row in outcomes if row["status"] not in ("created", "updated")]
        return len(queries)

    count(0, 1)
    assert count(1, 1) == count(2, 1)
    count(3, 167)
    few, many = count(4, 1), count(5, 167)
    assert few == many <= 40


@pytest.mark.django_db(transaction=True)
def test_parallel_creates_of_one_source_id_make_one_customer(
    send: Send, organization: Organization, connect: Callable[..., Connection]
) -> None:
    shop = connect("cheqpay").public_id
    outcomes: list[str] = []

    def create(number: int) -> None:
        for turn in range(4):
            body = {
                "items": [
                    item("create", {"name": f"Caller {number}"}, connection_id=shop, source_id=f"A-{turn}"),
                    item("create", {"name": "Plain"}),
                ]
            }
            outcomes.append(rows(send(body))[0]["status"])
        connections.close_all()

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created"] * 4 + ["failed"] * 28
    assert CustomerLink.objects.count() == 4
    assert set(Customer.objects.filter(links__isnull=False).values_list("version", flat=True)) == {1}
    assert Customer.objects.filter(name="Plain").count() == 32
