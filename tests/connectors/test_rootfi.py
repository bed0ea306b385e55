"""RootFi's documented endpoints, as a client written after its documentation uses them."""

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.inbound import totals
from connectors.models import ApiKey, Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.providers.rootfi import api as rootfi
from connectors.providers.rootfi import looks
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization

WIRE = Path(__file__).parent.parent / "wire" / "rootfi"
CUSTOMERS = "/v3/ecommerce/customers"
SYNCS = "/v3/core/syncs"
STAFF = Actor(kind="user", name="staff")
Call = Callable[..., Any]


def example(name: str) -> Any:
    return json.loads((WIRE / f"{name}.json").read_text())


@pytest.fixture
def company(connect: Callable[..., Connection]) -> Connection:
    return connect("rootfi")


@pytest.fixture
def post(api: Client, api_key: str, company: Connection) -> Call:
    def call(data: Any, *, path: str = CUSTOMERS, company_id: Any = 1089, key: str = api_key, **body: Any) -> Any:
        return api.post(
            path,
            {"company_id": company_id, "data": data, **body},
            content_type="application/json",
            headers={"api_key": key},
        )

    return call


@pytest.fixture
def get(api: Client, api_key: str, company: Connection) -> Call:
    def call(path: str = CUSTOMERS, key: str = api_key, **query: Any) -> Any:
        return api.get(
            path,
            {name.replace("__", "[", 1) + "]" if "__" in name else name: value for name, value in query.items()},
            headers={"api_key": key},
        )

    return call


@pytest.fixture
def three(post: Call) -> list[dict[str, Any]]:
    """Ada, Bob and Cyd, in this order."""
    answer = post(
        [
            {
                "name": "Ada",
                "email": "ada@example.com",
                "phone": "1",
                "currency_id": "EUR",
                "platform_id": "70_1",
                "created_at": "2020-01-01T00:00:00.000Z",
                "updated_at": "2021-01-01T00:00:00.000Z",
            },
            {"name": "Bob", "status": "ARCHIVED", "platform_id": "70_2"},
            {"name": "Cyd", "status": "UNKNOWN", "platform_id": "plain"},
        ]
    )
    assert answer.status_code == 200
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def names(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.content
    return [record["name"] for record in answer.json()["data"]]


def error(answer: Any, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.content
    assert set(answer.json()) == {"error"}
    found: dict[str, str] = answer.json()["error"]
    assert set(found) == {"code", "message", "platform_error"}
    assert all(isinstance(text, str) for text in found.values())
    return found


def refused(answer: Any, code: str, start: str) -> None:
    found = error(answer, 400)
    assert (found["code"], found["message"][: len(start)]) == (code, start)


# Creating


def test_the_documented_example_is_answered_with_the_documented_keys_and_types(post: Call) -> None:
    answer = post(example("create.request")["data"])
    documented = example("create.response")
    assert answer.status_code == 200
    assert set(answer.json()) == set(documented)
    assert isinstance(answer.json()["sync_id"], str)
    [record] = answer.json()["data"]
    [shown] = documented["data"]
    assert list(record) == list(shown)
    assert {k: type(v) for k, v in record.items()} == {k: type(v) for k, v in shown.items()}
    sent = example("create.request")["data"][0]
    assert {name: record[name] for name in sent} == sent
    assert record["rootfi_company_id"] == 1089
    assert record["platform_id"] == f"{record['platform_unique_id']}_1"
    for name in ("rootfi_created_at", "rootfi_updated_at"):
        assert datetime.strptime(record[name], "%Y-%m-%dT%H:%M:%S.%fZ")
        assert len(record[name]) == len("2024-01-22T05:07:31.465Z")


def test_what_was_sent_is_in_the_golden_record(post: Call, company: Connection) -> None:
    answer = post(example("create.request")["data"])
    customer = Customer.objects.get()
    assert (customer.name, customer.email, customer.email_key) == ("John Doe", "", "")
    assert (customer.address_line1, customer.address_line2) == ("123 Main Street", "Main Street")
    assert (customer.address_postal_code, customer.address_country) == ("123456", "USA")
    assert (customer.address_country_code, customer.currency) == ("US", "1234567890")
    link = CustomerLink.objects.get()
    assert link.connection == company
    assert link.pk == answer.json()["data"][0]["rootfi_id"]
    assert link.remote_created_at == datetime(2024, 1, 22, 5, 7, 31, 465000, tzinfo=UTC)
    change = CustomerChange.objects.get()
    assert (change.actor_kind, change.actor_name) == ("api_key", "shop")


def test_a_repeated_create_without_platform_id_is_another_record(post: Call) -> None:
    first, second = (post([{"name": "Ada"}]).json()["data"][0] for _ in range(2))
    assert first["rootfi_id"] != second["rootfi_id"]
    assert first["platform_id"] != second["platform_id"]


@pytest.mark.parametrize("email", ["", None, "not an address", "ada@example.com"])
def test_an_email_is_echoed_exactly(post: Call, get: Call, email: str | None) -> None:
    assert post([{"name": "Ada", "email": email}]).json()["data"][0]["email"] == email
    assert get().json()["data"][0]["email"] == email
    assert Customer.objects.get().email == (email or "")


def test_an_email_that_staff_remove_is_shown_as_empty(post: Call, get: Call, organization: Organization) -> None:
    post([{"name": "Ada", "email": "ada@example.com"}])
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"email": ""}}, actor=STAFF)
    assert get().json()["data"][0]["email"] == ""


def test_only_a_name_is_needed(post: Call) -> None:
    before = timezone.now() - timedelta(seconds=1)
    record = post([{"name": "Ada"}]).json()["data"][0]
    assert record["status"] == "ACTIVE"
    assert record["address"] is None
    assert record["email"] is None
    assert record["created_at"] == record["updated_at"] == record["rootfi_created_at"]
    assert datetime.fromisoformat(record["created_at"]) >= before
    assert record["rootfi_deleted_at"] is None


@pytest.mark.parametrize("status", ["ACTIVE", "ARCHIVED", "UNKNOWN"])
def test_every_status_is_kept_and_echoed(post: Call, get: Call, status: str) -> None:
    assert post([{"name": "Ada", "status": status}]).json()["data"][0]["status"] == status
    assert get().json()["data"][0]["status"] == status
    assert Customer.objects.get().is_active is (status != "ARCHIVED")


def test_what_staff_do_to_a_customer_of_unknown_status_shows(post: Call, get: Call, organization: Organization) -> None:
    post([{"name": "Ada", "status": "UNKNOWN"}])
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"is_active": False}}, actor=STAFF)
    assert get().json()["data"][0]["status"] == "ARCHIVED"
    assert names(get(status__eq="ARCHIVED")) == ["Ada"]


@pytest.mark.parametrize("address", [None, {}, {"street": "", "city": None}, {"rootfi_id": 5}])
def test_an_address_without_parts_is_null(post: Call, address: Any) -> None:
    assert post([{"name": "Ada", "address": address}]).json()["data"][0]["address"] is None


def test_an_address_gets_ids_of_its_own(post: Call) -> None:
    record = post([{"name": "Ada", "address": {"city": "Bonn", "state": ""}}]).json()["data"][0]
    link = CustomerLink.objects.get()
    assert record["address"] == {
        "rootfi_id": record["rootfi_id"],
        "platform_id": f"CONTACTS_{link.uid}_ADDRESS",
        "street": None,
        "locality": None,
        "city": "Bonn",
        "state": "",
        "pincode": None,
        "country": None,
    }


def test_times_in_another_zone_are_answered_in_utc(post: Call) -> None:
    record = post([{"name": "Ada", "created_at": "2024-01-22T07:07:31+02:00", "updated_at": None}]).json()["data"][0]
    assert record["created_at"] == "2024-01-22T05:07:31.000Z"
    assert record["updated_at"] == record["rootfi_created_at"]


def test_a_batch_is_answered_in_its_order(post: Call) -> None:
    sent = [f"Customer {number}" for number in range(20)]
    assert names(post([{"name": name} for name in sent])) == sent


def test_a_batch_costs_the_same_statements_whatever_its_size(post: Call) -> None:
    post([{"name": "warm"}])

    def cost(items: list[dict[str, Any]]) -> int:
        with CaptureQueriesContext(
            database,
        ) as queries:
            assert post(items).status_code == 200
        return len(queries)

    few = [{"name": f"A {n}", "platform_id": f"a{n}", "address": {"city": "Bonn"}} for n in range(2)]
    many = [{"name": f"B {n}", "platform_id": f"b{n}", "address": {"city": "Bonn"}} for n in range(500)]
    assert cost(few) == cost(many)
    changed_few = [{**item, "name": item["name"] + "!"} for item in few]
    changed_many = [{**item, "name": item["name"] + "!"} for item in many]
    assert cost(changed_few) == cost(changed_many)
    assert CustomerLink.objects.count() == 503


def test_every_call_is_one_run_with_totals_that_add_up(post: Call, organization: Organization) -> None:
    post([{"name": "Ada", "platform_id": "1"}, {"name": "Bob", "platform_id": "2"}])
    sync_id = post(
        [{"name": "Ada", "platform_id": "1"}, {"name": "Bobby", "platform_id": "2"}, {"name": "Cyd"}]
    ).json()["sync_id"]
    run = SyncRun.objects.get(public_id=sync_id)
    assert (run.kind, run.state, run.organization) == ("receive", "succeeded", organization)
    assert (run.created, run.updated, run.unchanged, run.planned, run.total) == (1, 1, 1, 3, 3)
    assert (run.actor_kind, run.actor_name) == ("api_key", "shop")
    assert run.started_at
    assert run.finished_at
    assert SyncRun.objects.count() == 2


# Changing by platform_id


def test_a_known_platform_id_changes_its_record(post: Call) -> None:
    item = example("create.request")["data"][0]
    first = post([{**item, "platform_id": "123456_1", "email": "a@example.com"}]).json()["data"][0]
    assert (first["platform_id"], first["platform_unique_id"]) == ("123456_1", "123456")
    second = post([{"platform_id": "123456_1", "name": "Jane Doe"}]).json()["data"][0]
    assert {k for k in first if first[k] != second[k]} <= {"name", "rootfi_updated_at"}
    assert second["name"] == "Jane Doe"
    assert Customer.objects.count() == CustomerLink.objects.count() == 1


def test_what_a_change_names_is_changed_and_null_clears(post: Call) -> None:
    item = {**example("create.request")["data"][0], "platform_id": "7"}
    first = post([item]).json()["data"][0]
    second = post(
        [
            {
                "platform_id": "7",
                "name": "John Doe",
                "phone": None,
                "status": "ARCHIVED",
                "address": {"city": "Bonn"},
            }
        ]
    ).json()["data"][0]
    assert (second["phone"], second["status"]) == (None, "ARCHIVED")
    assert second["address"] == {**first["address"], "city": "Bonn"}
    third = post([{"platform_id": "7", "name": "John Doe", "address": None}]).json()["data"][0]
    assert third["address"] is None
    assert Customer.objects.get().address_city == ""


def test_two_items_of_one_platform_id_count_one_after_the_other(post: Call) -> None:
    records = post(
        [
            {"platform_id": "7", "name": "Ada", "address": {"city": "Bonn", "rootfi_id": 9}},
            {"platform_id": "7", "name": "Bea", "address": {"street": "Ring 1"}},
        ]
    ).json()["data"]
    assert records[0] == records[1]
    assert records[0]["name"] == "Bea"
    assert (records[0]["address"]["city"], records[0]["address"]["rootfi_id"]) == ("Bonn", 9)


def test_a_platform_id_belongs_to_its_company(post: Call, connect: Callable[..., Connection]) -> None:
    connect("rootfi", name="second", account="1090")
    first = post([{"platform_id": "7", "name": "Ada"}]).json()["data"][0]
    second = post([{"platform_id": "7", "name": "Bob"}], company_id=1090).json()["data"][0]
    assert first["rootfi_id"] != second["rootfi_id"]
    assert second["rootfi_company_id"] == 1090


# Asynchronously


@pytest.mark.parametrize("where", ["query", "body"])
def test_an_asynchronous_batch_is_answered_at_once_and_carried_out_later(post: Call, get: Call, where: str) -> None:
    items = [{"name": "Ada", "platform_id": "7"}, {"name": "Bob"}]
    answer = post(items, path=f"{CUSTOMERS}?run_async=true") if where == "query" else post(items, run_async=True)
    assert answer.status_code == 200
    assert answer.json()["data"] == []
    run = SyncRun.objects.get(public_id=answer.json()["sync_id"])
    assert (run.state, run.planned, Customer.objects.count()) == ("queued", 2, 0)
    [shown] = get(SYNCS, sync_id__eq=run.public_id).json()["data"]
    assert (shown["status"], shown["pending_count"], shown["success_count"]) == ("PENDING", 2, 0)

    PROVIDERS["rootfi"].run_queued(run)

    run = SyncRun.objects.get()
    assert (run.state, run.created, run.total) == ("succeeded", 2, 2)
    assert run.request == {}
    assert names(get()) == ["Ada", "Bob"]
    [shown] = get(SYNCS, sync_id__eq=run.public_id).json()["data"]
    assert (shown["status"], shown["pending_count"], shown["success_count"]) == ("SUCCESS", 0, 2)
    assert {change.actor_name for change in CustomerChange.objects.all()} == {"shop"}


def test_a_batch_is_carried_out_once(post: Call) -> None:
    sync_id = post([{"name": "Ada"}], run_async=True).json()["sync_id"]
    stale = SyncRun.objects.get(public_id=sync_id)
    PROVIDERS["rootfi"].run_queued(SyncRun.objects.get())
    PROVIDERS["rootfi"].run_queued(stale)
    assert Customer.objects.count() == 1
    assert SyncRun.objects.get().created == 1


def test_a_bad_asynchronous_batch_is_refused_at_once(post: Call) -> None:
    refused(
        post([{"name": "Ada"}, {"name": "Bob", "status": "GONE"}], path=f"{CUSTOMERS}?run_async=true"),
        "invalid-params",
        "Invalid field: data[1].status. ",
    )
    assert not SyncRun.objects.exists()


def test_a_batch_that_the_rules_no_longer_allow_fails_whole(post: Call, get: Call) -> None:
    sync_id = post([{"name": "Ada"}], run_async=True).json()["sync_id"]
    run = SyncRun.objects.get(public_id=sync_id)
    run.request = {"data": [{"name": ""}]}
    run.save()
    PROVIDERS["rootfi"].run_queued(run)
    run = SyncRun.objects.get()
    assert (run.state, run.refused, run.total) == ("failed", 1, run.planned)
    assert not Customer.objects.exists()
    [shown] = get(SYNCS).json()["data"]
    assert (shown["status"], shown["failed_count"]) == ("FAILED", 1)


# Refusing


@pytest.mark.parametrize(
    ("body", "code", "start"),
    [
        ({"data": [{"name": "Ada"}]}, "missing-params", "Missing required field: company_id."),
        (
            {"company_id": None, "data": [{"name": "A"}]},
            "missing-params",
            "Missing required field: company_id.",
        ),
        ({"company_id": "x", "data": [{"name": "Ada"}]}, "invalid-params", "Invalid field: company_id. "),
        ({"company_id": True, "data": [{"name": "Ada"}]}, "invalid-params", "Invalid field: company_id. "),
        ({"company_id": 10**30, "data": [{"name": "Ada"}]}, "invalid-params", "Invalid field: company_id. "),
        ({"company_id": 1089}, "missing-params", "Missing required field: data."),
        ({"company_id": 1089, "data": []}, "missing-params", "Missing required field: data."),
        ({"company_id": 1089, "data": {"name": "Ada"}}, "invalid-params", "Invalid field: data. "),
        ({"company_id": 1089, "data": ["Ada"]}, "invalid-params", "Invalid field: data[0]. "),
        (
            {"company_id": 1089, "data": [{"name": "A"}], "run_async": "maybe"},
            "invalid-params",
            "Invalid field: run_async. ",
        ),
        ([], "invalid-params", "Invalid field: body. "),
    ],
)
def test_a_wrong_body_is_refused_by_name(
    api: Client, api_key: str, company: Connection, body: Any, code: str, start: str
) -> None:
    answer = api.post(CUSTOMERS, body, content_type="application/json", headers={"api_key": api_key})
    refused(answer, code, start)


@pytest.mark.parametrize(
    ("item", "code", "start"),
    [
        ({}, "missing-params", "Missing required field: data[1].name."),
        ({"name": None}, "missing-params", "Missing required field: data[1].name."),
        ({"name": "  "}, "invalid-params", "Invalid field: data[1].name. "),
        ({"name": "x" * 256}, "invalid-params", "Invalid field: data[1].name. Use at most 255 characters."),
        ({"name": "A\u0007"}, "invalid-params", "Invalid field: data[1].name. "),
        ({"name": "A", "email": "x" * 255}, "invalid-params", "Invalid field: data[1].email. "),
        ({"name": "A", "email": {}}, "invalid-params", "Invalid field: data[1].email. "),
        ({"name": "A", "phone": "1" * 65}, "invalid-params", "Invalid field: data[1].phone. "),
        ({"name": "A", "currency_id": "1" * 65}, "invalid-params", "Invalid field: data[1].currency_id. "),
        ({"name": "A", "status": "GONE"}, "invalid-params", "Invalid field: data[1].status. "),
        ({"name": "A", "status": []}, "invalid-params", "Invalid field: data[1].status. "),
        ({"name": "A", "created_at": "soon"}, "invalid-params", "Invalid field: data[1].created_at. "),
        ({"name": "A", "updated_at": 5}, "invalid-params", "Invalid field: data[1].updated_at. "),
        ({"name": "A", "platform_id": "x" * 256}, "invalid-params", "Invalid field: data[1].platform_id. "),
        ({"name": "A", "address": "Bonn"}, "invalid-params", "Invalid field: data[1].address. "),
        (
            {"name": "A", "address": {"rootfi_id": "x"}},
            "invalid-params",
            "Invalid field: data[1].address.rootfi_id. ",
        ),
        (
            {"name": "A", "address": {"pincode": "1" * 33}},
            "invalid-params",
            "Invalid field: data[1].address.pincode. ",
        ),
        (
            {"name": "A", "address": {"country": 5.0, "city": []}},
            "invalid-params",
            "Invalid field: data[1].address.city. ",
        ),
    ],
)
def test_one_bad_item_is_named_and_nothing_is_stored(post: Call, item: Any, code: str, start: str) -> None:
    refused(post([{"name": "Ada"}, item, {"name": "Cyd"}]), code, start)
    assert not Customer.objects.exists()
    assert not SyncRun.objects.exists()


def test_a_batch_has_at_most_five_hundred_items(post: Call) -> None:
    refused(post([{"name": "Ada"}] * 501), "invalid-params", "Invalid field: data. Send at most 500 ")


def test_a_nul_is_refused(post: Call, get: Call) -> None:
    refused(post([{"name": "A\x00da"}]), "invalid-params", "Invalid field: body. ")
    refused(get(name__eq="\x00"), "invalid-params", "Invalid field: body. ")


def test_a_body_over_a_megabyte_is_refused(post: Call) -> None:
    refused(post([{"name": "Ada", "note": "x" * 1024 * 1024}]), "invalid-params", "Invalid field: body. ")


def test_a_body_that_is_no_json_is_refused(api: Client, api_key: str) -> None:
    answer = api.post(CUSTOMERS, "{", content_type="application/json", headers={"api_key": api_key})
    refused(answer, "invalid-params", "Invalid field: body. ")


def test_unknown_keys_are_ignored(post: Call) -> None:
    record = post([{"name": "Ada", "rootfi_id": 5, "rootfi_company_id": 7, "hobby": "chess"}]).json()["data"][0]
    assert record["rootfi_company_id"] == 1089
    assert record["rootfi_id"] == CustomerLink.objects.get().pk


@pytest.mark.parametrize("headers", [{}, {"api_key": ""}, {"api_key": "  "}, {"api_key": "wrong"}, {"x-api-key": "K"}])
def test_a_missing_blank_or_unknown_key_is_401(api: Client, company: Connection, headers: dict[str, str]) -> None:
    assert error(api.get(CUSTOMERS, headers=headers), 401)["code"] == "operation-denied"
    assert error(api.post(SYNCS, headers=headers), 401)["message"].startswith("Operation Denied: ")


def test_the_key_may_be_spelt_with_a_hyphen(api: Client, company: Connection, api_key: str) -> None:
    assert api.get(CUSTOMERS, headers={"api-key": api_key}).status_code == 200


def test_a_company_that_the_key_does_not_reach_is_404(
    post: Call, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    connect("rootfi", name="theirs", account="1", organization=other_organization)
    connect("rootfi", name="pushed to", account="2", direction=Connection.Direction.PUSH)
    connect("links", name="another provider", account="3")
    answers = [error(post([{"name": "Ada"}], company_id=company_id), 404) for company_id in (1, 2, 3, 4)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["code"] == "operation-denied"
    assert not Customer.objects.exists()


def test_another_organization_sees_and_changes_nothing(
    post: Call, get: Call, three: Any, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    connect("rootfi", name="theirs", organization=other_organization)
    theirs = ApiKey.issue(organization=other_organization, name="theirs")[1]
    assert names(get(key=theirs)) == []
    assert get(SYNCS, key=theirs).json()["data"] == []
    assert post([{"name": "Eve", "platform_id": "70_1"}], key=theirs).json()["data"][0]["name"] == "Eve"
    assert names(get()) == ["Ada", "Bob", "Cyd"]
    assert names(get(key=theirs, rootfi_id__eq=three[0]["rootfi_id"])) == []


def test_a_key_that_may_only_read_cannot_write(
    post: Call, get: Call, organization: Organization, company: Connection
) -> None:
    reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])[1]
    assert error(post([{"name": "Ada"}], key=reader), 403)["code"] == "operation-denied"
    assert get(key=reader).status_code == 200


def test_other_methods_are_405(api: Client, api_key: str, company: Connection) -> None:
    for path in (CUSTOMERS, SYNCS):
        assert error(api.put(path, headers={"api_key": api_key}), 405)["code"] == "operation-denied"


def test_a_trailing_slash_changes_nothing(post: Call, get: Call) -> None:
    assert post([{"name": "Ada"}], path=f"{CUSTOMERS}/").status_code == 200
    assert names(get(f"{CUSTOMERS}/")) == ["Ada"]
    assert get(f"{SYNCS}/").status_code == 200


# Listing


def test_the_list_shows_what_creating_answered(get: Call, three: list[dict[str, Any]]) -> None:
    assert get().json() == {"data": three, "prev": None, "next": None, "total_count": None}


def test_pages_neither_skip_nor_repeat_in_either_direction(post: Call, get: Call) -> None:
    post([{"name": f"{number:02}"} for number in range(11)])
    everything = [f"{number:02}" for number in range(11)]
    for sort in (
        {},
        {"sort__rootfi_created_at": "DESC"},
        {"sort__rootfi_updated_at": "ASC"},
        {"sort__rootfi_id": "DESC"},
    ):
        expected = everything[::-1] if "DESC" in sort.values() else everything
        forward, cursor, last = [], None, None
        for _ in range(4):
            answer = get(limit=3, **sort, **({"next": cursor} if cursor else {}))
            forward += names(answer)
            assert (answer.json()["prev"] is None) == (cursor is None)
            cursor, last = answer.json()["next"], answer.json()
        assert cursor is None
        assert forward == expected
        assert last is not None
        backward, cursor = [record["name"] for record in last["data"]], last["prev"]
        while cursor:
            answer = get(limit=3, prev=cursor, **sort)
            assert answer.json()["next"]
            backward = names(answer) + backward
            cursor = answer.json()["prev"]
        assert backward == expected


def test_pages_survive_records_that_share_a_time(post: Call, get: Call, organization: Organization) -> None:
    post([{"name": f"{number}"} for number in range(6)])
    changed = Customer.objects.get(name="1")
    editing.update(organization=organization, values={changed.pk: {"phone": "5"}}, actor=STAFF)
    seen, cursor = [], None
    for _ in range(6):
        answer = get(limit=1, sort__rootfi_updated_at="DESC", **({"next": cursor} if cursor else {}))
        seen += names(answer)
        cursor = answer.json()["next"]
    assert cursor is None
    assert seen == ["1", "5", "4", "3", "2", "0"]


def test_a_cursor_is_the_documented_one(get: Call, three: list[dict[str, Any]]) -> None:
    cursor = get(limit=1).json()["next"]
    assert json.loads(base64.b64decode(cursor)) == {"rootfi_id": three[0]["rootfi_id"]}
    assert names(get(next=cursor.rstrip("="))) == ["Bob", "Cyd"]


def test_cursors_work_together_with_filters(post: Call, get: Call) -> None:
    post([{"name": f"{number}", "currency_id": "EUR" if number % 2 else "USD"} for number in range(8)])
    first = get(limit=2, currency_id__eq="EUR")
    second = get(limit=2, currency_id__eq="EUR", next=first.json()["next"])
    assert (names(first), names(second), second.json()["next"]) == (["1", "3"], ["5", "7"], None)
    assert names(get(limit=2, currency_id__eq="EUR", prev=second.json()["prev"])) == ["1", "3"]


@pytest.mark.parametrize(
    "cursor",
    [
        "%",
        "x",
        "bnVsbA==",
        "W10=",
        "e30=",
        "eyJyb290ZmlfaWQiOiJ4In0=",
        "é",
        base64.b64encode(b'{"rootfi_id":true}').decode(),
        base64.b64encode(b'{"rootfi_id":99999999999999999999}').decode(),
        base64.b64encode(b'{"rootfi_id":-1}').decode(),
        base64.b64encode(b'{"rootfi_created_at":"2024-01-01","rootfi_id":1}').decode(),
    ],
)
def test_a_cursor_that_is_none_is_refused(get: Call, three: Any, cursor: str) -> None:
    for name in ("next", "prev"):
        refused(get(**{name: cursor}), "invalid-params", f"Invalid field: {name}. ")
        refused(get(SYNCS, **{name: cursor}), "invalid-params", f"Invalid field: {name}. ")
    refused(get(next=cursor, sort__rootfi_created_at="ASC"), "invalid-params", "Invalid field: next. ")


def test_the_cursor_of_another_sort_is_refused(get: Call, three: Any) -> None:
    cursor = get(limit=1, sort__rootfi_created_at="ASC").json()["next"]
    refused(get(next=cursor), "invalid-params", "Invalid field: next. ")
    refused(
        get(next=cursor, prev=cursor, sort__rootfi_created_at="ASC"),
        "invalid-params",
        "Invalid field: prev. ",
    )


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"name__eq": "Ada"}, ["Ada"]),
        ({"name__eq": "ada"}, []),
        ({"name__neq": "Ada"}, ["Bob", "Cyd"]),
        ({"name__in": "Ada,Cyd"}, ["Ada", "Cyd"]),
        ({"name__contains": "O"}, ["Bob"]),
        ({"name__contains": "%"}, []),
        ({"email__eq": "ada@example.com"}, ["Ada"]),
        ({"email__eq": ""}, ["Bob", "Cyd"]),
        ({"email__contains": "example"}, ["Ada"]),
        ({"phone__eq": "1"}, ["Ada"]),
        ({"currency_id__in": "USD,EUR"}, ["Ada"]),
        ({"status__eq": "ACTIVE"}, ["Ada"]),
        ({"status__eq": "ARCHIVED"}, ["Bob"]),
        ({"status__eq": "UNKNOWN"}, ["Cyd"]),
        ({"status__neq": "UNKNOWN"}, ["Ada", "Bob"]),
        ({"status__in": "ACTIVE,UNKNOWN"}, ["Ada", "Cyd"]),
        ({"platform_id__eq": "70_1"}, ["Ada"]),
        ({"platform_id__contains": "70_"}, ["Ada", "Bob"]),
        ({"platform_unique_id__eq": "70"}, ["Ada", "Bob"]),
        ({"platform_unique_id__eq": "70_1"}, []),
        ({"platform_unique_id__eq": "pla.n"}, []),
        ({"platform_unique_id__in": "plain,x"}, ["Cyd"]),
        ({"platform_unique_id__neq": "70"}, ["Cyd"]),
        ({"created_at__eq": "2020-01-01T00:00:00Z"}, ["Ada"]),
        ({"created_at__gt": "2020-01-01T00:00:00Z"}, ["Bob", "Cyd"]),
        ({"created_at__lte": "2020-01-01T01:00:00+01:00"}, ["Ada"]),
        ({"updated_at__eq": "2021-01-01T00:00:00Z"}, ["Ada"]),
        ({"updated_at__in": "2021-01-01T00:00:00Z,2022-01-01T00:00:00Z"}, ["Ada"]),
        ({"updated_at__neq": "2021-01-01T00:00:00Z"}, ["Bob", "Cyd"]),
        ({"updated_at__lt": "2021-01-01T00:00:00.001Z"}, ["Ada"]),
        ({"updated_at__gte": "2021-01-01T00:00:00.001Z"}, ["Bob", "Cyd"]),
        ({"rootfi_company_id__eq": "1089"}, ["Ada", "Bob", "Cyd"]),
        ({"rootfi_company_id__neq": "1089"}, []),
        ({"rootfi_company_id__in": "1,1089"}, ["Ada", "Bob", "Cyd"]),
        ({"rootfi_company_id__gte": "1089", "name__eq": "Bob"}, ["Bob"]),
        ({"rootfi_company_id": "7"}, []),
        ({"rootfi_deleted_at__eq": "null"}, ["Ada", "Bob", "Cyd"]),
        ({"rootfi_updated_at__gte": "2020-01-01T00:00:00Z"}, ["Ada", "Bob", "Cyd"]),
        ({"rootfi_updated_at__lt": "2020-01-01T00:00:00Z"}, []),
        ({"rootfi_id__gt": "0", "status__eq": "UNKNOWN"}, ["Cyd"]),
        ({"rootfi_id__gt": "999999999999999999"}, []),
        ({"expand": "orders,nothing", "limit": "", "next": "", "prev": "null"}, ["Ada", "Bob", "Cyd"]),
        ({"unheard_of": "1"}, ["Ada", "Bob", "Cyd"]),
    ],
)
def test_a_list_is_filtered(get: Call, three: Any, query: dict[str, str], found: list[str]) -> None:
    assert names(get(**query)) == found


def test_a_time_as_answered_finds_its_record(get: Call, three: list[dict[str, Any]]) -> None:
    for name in ("rootfi_created_at", "rootfi_updated_at", "created_at", "updated_at"):
        moment = three[2][name]
        assert "Cyd" in names(get(**{f"{name}__eq": moment}))
        assert "Cyd" in names(get(**{f"{name}__gte": moment}))
        assert "Cyd" in names(get(**{f"{name}__lte": moment}))
        assert "Cyd" not in names(get(**{f"{name}__gt": moment}))
        assert "Cyd" not in names(get(**{f"{name}__lt": moment}))
        assert "Cyd" not in names(get(**{f"{name}__neq": moment}))
    identity = three[1]["rootfi_id"]
    assert names(get(rootfi_id__eq=identity)) == ["Bob"]
    assert names(get(rootfi_id__in=f"{identity}, {three[2]['rootfi_id']}")) == ["Bob", "Cyd"]


def test_an_edit_made_here_shows_as_updated(get: Call, three: list[dict[str, Any]], organization: Organization) -> None:
    at = timezone.now() + timedelta(hours=1)
    customer = Customer.objects.get(name="Bob")
    editing.update(organization=organization, values={customer.pk: {"phone": "5"}}, actor=STAFF, at=at)
    answer = get(rootfi_updated_at__gte=(at - timedelta(minutes=1)).isoformat())
    assert names(answer) == ["Bob"]
    assert answer.json()["data"][0]["updated_at"] == three[1]["updated_at"]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("hobby[eq]", "chess"),
        ("name[like]", "A"),
        ("name[gt]", "A"),
        ("name[]", "A"),
        ("name[contains]", "x" * 60_000),
        ("rootfi_id[contains]", "1"),
        ("rootfi_id[eq]", "one"),
        ("rootfi_id[eq]", "-1"),
        ("rootfi_id[eq]", "9" * 30),
        ("rootfi_company_id[eq]", "x"),
        ("rootfi_company_id[in]", "1,x"),
        ("status[eq]", "GONE"),
        ("created_at[eq]", "soon"),
        ("created_at[lt]", "9999-12-31T23:59:59.9999Z"),
        ("rootfi_deleted_at[gt]", "null"),
        ("updated_at[eq]", "null"),
        ("rootfi_id[in]", ",".join(map(str, range(101)))),
        ("sort[name]", "ASC"),
        ("sort[rootfi_id]", "UP"),
        ("limit", "0"),
        ("limit", "501"),
        ("limit", "many"),
        ("select", "password"),
        ("return_count", "perhaps"),
        ("include_deleted_records", "perhaps"),
    ],
)
def test_a_wrong_query_is_refused_by_name(
    api: Client, api_key: str, company: Connection, parameter: str, value: str
) -> None:
    answer = api.get(CUSTOMERS, {parameter: value}, headers={"api_key": api_key})
    refused(answer, "invalid-params", f"Invalid field: {parameter}. ")


def test_a_list_takes_a_bounded_number_of_filters(api: Client, api_key: str, company: Connection) -> None:
    answer = api.get(CUSTOMERS, {"name[neq]": list("abcdefghijklmnopqrstuvwxyz")}, headers={"api_key": api_key})
    refused(answer, "invalid-params", "Invalid field: name. Use at most 20 filters.")


def test_the_largest_filters_are_answered(get: Call, three: Any) -> None:
    many = ",".join(["70", *(f"x({n}" for n in range(99))])
    moments = ",".join(f"2020-01-01T00:00:00.{n:03}Z" for n in range(100))
    query = {
        "platform_unique_id__in": many,
        "created_at__in": moments,
        "updated_at__neq": "2000-01-01T00:00:00Z",
    }
    assert names(get(**query)) == ["Ada"]


def test_deleted_records_are_shown_when_asked_for(get: Call, three: Any, organization: Organization) -> None:
    archived = Customer.objects.get(name="Ada")
    editing.archive(organization=organization, ids=[archived.pk], actor=STAFF)
    CustomerLink.objects.filter(customer__name="Bob").update(deleted_at=timezone.now())
    assert names(get()) == ["Cyd"]
    answer = get(include_deleted_records="true")
    assert [(r["name"], r["rootfi_deleted_at"] is None) for r in answer.json()["data"]] == [
        ("Ada", False),
        ("Bob", False),
        ("Cyd", True),
    ]
    assert names(get(include_deleted_records="true", rootfi_deleted_at__neq="null")) == ["Ada", "Bob"]


def test_raw_data_and_its_hash_come_when_selected(get: Call, post: Call) -> None:
    sent = {"name": "Ada", "hobby": "chess", "address": {"city": "Bonn"}}
    post([sent])
    [record] = get(select="raw_data,data_hash").json()["data"]
    assert record["raw_data"] == sent
    canonical = orjson.dumps(sent, option=orjson.OPT_SORT_KEYS)
    assert record["data_hash"] == hashlib.sha256(canonical).hexdigest()
    [record] = get(select="data_hash").json()["data"]
    assert "raw_data" not in record


def test_the_total_is_counted_only_when_asked_for(get: Call, three: Any) -> None:
    assert get(limit=1, return_count="true").json()["total_count"] == 3
    assert get(limit=1, return_count="true", name__neq="Ada").json()["total_count"] == 2
    with CaptureQueriesContext(database) as queries:
        assert get(limit=1).json()["total_count"] is None
    assert not any("COUNT(" in query["sql"] for query in queries)


def test_a_list_costs_the_same_statements_whatever_its_size(post: Call, get: Call) -> None:
    post([{"name": "Ada"}, {"name": "Bob"}])
    get()
    with CaptureQueriesContext(database) as few:
        assert len(names(get())) == 2
    post([{"name": f"{n}"} for n in range(300)])
    with CaptureQueriesContext(database) as many:
        assert len(names(get(limit=500))) == 302
    assert len(few) == len(many) == 3


def test_the_list_spans_the_companies_of_the_organization(
    post: Call, get: Call, three: Any, connect: Callable[..., Connection]
) -> None:
    connect("rootfi", name="second", account="1090")
    connect("rootfi", name="no number", account="shop")
    post([{"name": "Dan"}], company_id=1090)
    assert names(get()) == ["Ada", "Bob", "Cyd", "Dan"]
    assert names(get(rootfi_company_id__eq="1090")) == ["Dan"]
    assert names(get(rootfi_company_id__lt="1090", limit=1)) == ["Ada"]


LATER = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def scattered(post: Call, company: Connection, organization: Organization) -> list[str]:
    """Records whose times are in another order than their ids, some of them at one moment."""
    post([{"name": f"{n:02}", "currency_id": "EUR" if n % 7 == 0 else "USD"} for n in range(18)])
    links = list(CustomerLink.objects.order_by("pk"))
    for n, link in enumerate(links):
        link.created_at = LATER + timedelta(hours=n * 7 % 5)
        link.remote_created_at = None if n % 3 else LATER + timedelta(hours=n)
        link.updated_at = LATER + timedelta(hours=n * 11 % 4)
        link.save()
    for n in range(18):
        id_, at = links[n].customer_id, LATER + timedelta(hours=n * 13 % 6)
        editing.update(organization=organization, values={id_: {"phone": f"{n}"}}, actor=STAFF, at=at)
    return [f"{n:02}" for n in range(18)]


@pytest.mark.parametrize("sort", ["rootfi_id", "rootfi_created_at", "rootfi_updated_at"])
@pytest.mark.parametrize("direction", ["ASC", "DESC"])
def test_a_list_read_in_small_looks_is_the_same_list(
    get: Call, scattered: list[str], monkeypatch: pytest.MonkeyPatch, sort: str, direction: str
) -> None:
    queries = (
        {},
        {"name__contains": "2"},
        {"name__contains": "none"},
        {"currency_id__eq": "EUR"},
        {"created_at__gte": "2030-01-01T03:00:00Z"},
        {"created_at__lt": "2030-01-01T02:00:00Z"},
        {"rootfi_created_at__gt": "2030-01-01T01:00:00Z", "currency_id__eq": "USD"},
        {"rootfi_updated_at__gte": "2030-01-01T04:00:00Z"},
        {"rootfi_updated_at__lte": "2030-01-01T03:00:00Z", "name__contains": "1"},
        {"rootfi_updated_at__in": "2030-01-01T03:00:00Z,2030-01-01T05:00:00Z"},
    )
    ordered: dict[str, Any] = {f"sort__{sort}": direction, "limit": 4}
    whole = [names(get(**{**ordered, **query, "limit": 500})) for query in queries]
    monkeypatch.setattr(looks, "ROWS", 4)
    monkeypatch.setattr(looks, "CHANGED", 3)
    monkeypatch.setattr(rootfi, "FEW", 2)

    def walk(query: dict[str, str], way: str, cursor: str | None) -> tuple[list[str], list[Any]]:
        read: list[str] = []
        answers = []
        for _ in range(40):
            answers.append(get(**ordered, **query, **({way: cursor} if cursor else {})))
            read = read + names(answers[-1]) if way == "next" else names(answers[-1]) + read
            cursor = answers[-1].json()[way]
            if cursor is None:
                return read, answers
        raise AssertionError("no end")

    for query, expected in zip(queries, whole, strict=True):
        read, answers = walk(query, "next", None)
        assert read == expected, query
        if back := answers[-1].json()["prev"]:
            read, _ = walk(query, "prev", back)
            assert read == expected[: len(expected) - len(names(answers[-1]))], query


def test_the_total_of_what_no_index_finds_is_told_from_a_part(
    get: Call, scattered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(totals, "LOOKED_AT", 10)
    monkeypatch.setattr(looks, "ROWS", 4)
    total = get(return_count="true", currency_id__eq="EUR").json()["total_count"]
    assert total == 3 if database.vendor == "sqlite" else total >= 2


# Syncs


SYNC = {
    "company_id": 1089,
    "integration_type": "XERO",
    "full_sync": True,
    "data_models_to_sync": ["ECOMMERCE_CUSTOMERS"],
}


@pytest.fixture
def sync(api: Client, api_key: str, company: Connection) -> Call:
    def call(**changes: Any) -> Any:
        body = {name: value for name, value in {**SYNC, **changes}.items() if value is not ...}
        return api.post(SYNCS, body, content_type="application/json", headers={"api_key": api_key})

    return call


def test_a_sync_has_the_documented_keys_and_is_done_at_once(sync: Call, three: Any) -> None:
    answer = sync()
    assert answer.status_code == 200
    shown = answer.json()["data"]
    run = SyncRun.objects.get(kind="sync")
    assert list(answer.json()) == ["data"]
    assert shown == {
        "rootfi_id": run.pk,
        "rootfi_company_id": 1089,
        "rootfi_created_at": shown["rootfi_created_at"],
        "rootfi_updated_at": shown["rootfi_updated_at"],
        "start_time": shown["start_time"],
        "end_time": shown["end_time"],
        "integration_type": "XERO",
        "full_sync": True,
        "sync_type": "MANUAL",
        "config_mode": "READ",
        "sync_data_models": ["ECOMMERCE_CUSTOMERS"],
        "sync_id": run.public_id,
        "total_count": 3,
        "success_count": 3,
        "failed_count": 0,
        "running_count": 0,
        "pending_count": 0,
        "status": "SUCCESS",
    }
    assert all(shown[name].endswith("Z") for name in ("rootfi_created_at", "start_time", "end_time"))
    assert run.total == run.planned


def test_a_sync_counts_what_is_live(sync: Call, three: Any, organization: Organization) -> None:
    CustomerLink.objects.filter(customer__name="Bob").update(deleted_at=timezone.now())
    editing.archive(organization=organization, ids=[Customer.objects.get(name="Ada").pk], actor=STAFF)
    assert sync().json()["data"]["total_count"] == 1


@pytest.mark.parametrize("name", list(SYNC))
def test_every_key_of_a_sync_is_required(sync: Call, name: str) -> None:
    refused(sync(**{name: ...}), "missing-params", f"Missing required field: {name}.")
    refused(sync(**{name: None}), "missing-params", f"Missing required field: {name}.")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"integration_type": "xero"}, "integration_type"),
        ({"integration_type": "X" * 41}, "integration_type"),
        ({"full_sync": "perhaps"}, "full_sync"),
        ({"data_models_to_sync": ["customers"]}, "data_models_to_sync[0]"),
        ({"data_models_to_sync": "ECOMMERCE_CUSTOMERS"}, "data_models_to_sync"),
    ],
)
def test_a_wrong_sync_is_refused_by_name(sync: Call, changes: Any, named: str) -> None:
    refused(sync(**changes), "invalid-params", f"Invalid field: {named}. ")
    refused(sync(data_models_to_sync=[]), "missing-params", "Missing required field: data_models_to_sync.")


@pytest.mark.parametrize(
    "kind",
    ["SHOPIFY", "BIG_COMMERCE", "STRIPE", "HUBSPOT", "SALESFORCE", "XERO", "QUICKBOOKS", "ROOTFI_SANDBOX"],
)
def test_the_documented_integration_types_are_accepted(sync: Call, kind: str) -> None:
    assert sync(integration_type=kind).json()["data"]["integration_type"] == kind


def test_a_sync_of_a_company_out_of_reach_is_404(sync: Call) -> None:
    assert error(sync(company_id=7), 404)["code"] == "operation-denied"


def test_runs_are_listed_newest_first_over_pages_that_are_whole_addresses(
    sync: Call, get: Call, post: Call, api: Client, api_key: str
) -> None:
    ids = [sync().json()["data"]["sync_id"] for _ in range(3)]
    ids.append(post([{"name": "Ada"}]).json()["sync_id"])
    first = get(SYNCS, limit=3, rootfi_company_id="1089").json()
    assert [run["sync_id"] for run in first["data"]] == ids[::-1][:3]
    assert [run["config_mode"] for run in first["data"]] == ["CREATE", "READ", "READ"]
    assert first["prev"] is None
    assert first["next"].startswith(f"http://testserver{SYNCS}?")
    second = api.get(first["next"].removeprefix("http://testserver"), headers={"api_key": api_key}).json()
    assert [run["sync_id"] for run in second["data"]] == ids[:1]
    assert second["next"] is None
    assert get(SYNCS, limit=3, next=first["next"]).json()["data"] == second["data"]
    back = api.get(second["prev"].removeprefix("http://testserver"), headers={"api_key": api_key}).json()
    assert back["data"] == first["data"]
    assert get(SYNCS, rootfi_company_id="7").json() == {"data": [], "prev": None, "next": None}


def test_other_runs_of_the_hub_are_not_shown(
    get: Call, company: Connection, organization: Organization, connect: Callable[..., Connection]
) -> None:
    elsewhere = connect("links")
    for number, (kind, connection) in enumerate([("push", company), ("receive", elsewhere), ("import", None)]):
        SyncRun.objects.create(
            public_id=f"run{number}", organization=organization, connection=connection, kind=kind,
            actor_kind="command", actor_name="x",
        )  # fmt: skip
    assert get(SYNCS).json()["data"] == []


def test_a_wrong_query_of_runs_is_refused_by_name(get: Call) -> None:
    refused(get(SYNCS, name__eq="Ada"), "invalid-params", "Invalid field: name[eq]. ")
    refused(get(SYNCS, sort__rootfi_id="ASC"), "invalid-params", "Invalid field: sort[rootfi_id]. ")
    for next_ in ("http://[", "https://example.com/", "https://example.com/?next=x"):
        refused(get(SYNCS, next=next_), "invalid-params", "Invalid field: next. ")
