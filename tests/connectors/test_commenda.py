"""Commenda: its documented endpoints as the hub mirrors them, and its client against that mirror."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode
from uuid import UUID, uuid4

import httpx2
import pytest
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.models import ApiKey, Connection, CustomerLink
from connectors.outbound import Session
from connectors.provider import Outgoing, Record
from connectors.providers.commenda import Commenda
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization
from tests.connectors import loopback

WIRE = Path(__file__).parent.parent / "wire" / "commenda"
BASE = "/api/v1/customers"
LISTED = {
    "id",
    "corporation_id",
    "name",
    "email",
    "created_at",
    "external_id",
    "source_platform",
    "source_platform_id",
    "business_identification_number",
}
STORED = LISTED | {"shipping_address"}
FETCHED = STORED | {"exemption_metadata"}
ACTOR = Actor(kind=CustomerChange.Actor.USER, name="staff")
MINIMAL = {"corporation_id": "corp_123", "name": "Acme Corporation"}


def example(name: str) -> Any:
    return json.loads((WIRE / name).read_text())


@pytest.fixture
def corporation(connect: Callable[..., Connection]) -> Connection:
    return connect("commenda")


class Caller:
    """A system that speaks Commenda to the hub."""

    def __init__(self, key: str) -> None:
        self.headers = {"Authorization": f"Bearer {key}"}
        self.client = Client()

    def send(self, body: Any, path: str = BASE) -> Any:
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        return self.client.post(path, content, content_type="application/json", headers=self.headers)

    def create(self, **change: Any) -> dict[str, Any]:
        response = self.send(MINIMAL | change)
        assert response.status_code == 200, response.content
        created: dict[str, Any] = response.json()["data"]
        return created

    def update(self, customer: dict[str, Any], **change: Any) -> Any:
        return self.send(change, f"{BASE}/{customer['id']}")

    def get(self, customer: dict[str, Any] | str) -> Any:
        uid = customer if isinstance(customer, str) else customer["id"]
        return self.client.get(f"{BASE}/{uid}", headers=self.headers)

    def delete(self, customer: dict[str, Any]) -> Any:
        return self.client.delete(f"{BASE}/{customer['id']}", headers=self.headers)

    def list(self, *, path: str = BASE, **query: Any) -> Any:
        given = {name: value for name, value in ({"corporation_id": "corp_123"} | query).items() if value is not None}
        return self.client.get(f"{path}?{urlencode(given)}", headers=self.headers)

    def names(self, **query: Any) -> list[str]:
        response = self.list(**query)
        assert response.status_code == 200, response.content
        return [customer["name"] for customer in response.json()["customers"]]


@pytest.fixture
def caller(api_key: str, corporation: Connection) -> Caller:
    return Caller(api_key)


def assert_error(response: Any, status: int, *pointers: str, kind: str = "CLIENT_INVALID_REQUEST_BODY") -> None:
    assert response.status_code == status, response.content
    assert set(response.json()) == {"error"}
    error, documented = response.json()["error"], example("error.response.json")["error"]
    assert set(error) == set(documented)
    assert all(type(error[key]) is type(value) for key, value in documented.items())
    assert (error["type"], error["status"]) == (kind, status)
    assert error["instance"] == response.wsgi_request.path
    assert error["doc_url"].startswith("https://")
    assert [entry["pointer"] for entry in error["Errors"]] == list(pointers)
    assert all(set(entry) == {"details", "pointer"} and entry["details"] for entry in error["Errors"])


# The documented examples


@pytest.mark.parametrize("path", [BASE, f"{BASE}/", "/customers", "/customers/"])
def test_the_documented_request_gets_the_documented_answer_in_both_shapes(caller: Caller, path: str) -> None:
    before = int(time.time())
    request = example("create.request.json")
    response = caller.send(request, path)
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == STORED | {"data", "message"}
    assert {key: answer[key] for key in STORED} == answer["data"]
    assert answer["message"] == example("create.response.envelope.json")["message"]
    flat = example("create.response.flat.json")
    envelope = example("create.response.envelope.json")["data"]
    assert all(type(answer[key]) is type(value) for key, value in (envelope | flat).items())
    assert all(answer[key] == flat[key] for key in flat if key not in ("id", "created_at"))
    assert str(UUID(answer["id"])) == answer["id"]
    assert before <= answer["created_at"] <= int(time.time())
    assert answer["external_id"] == "ext_456"
    assert answer["shipping_address"] == request["shipping_address"]
    assert (answer["source_platform"], answer["source_platform_id"]) == (None, None)
    link = CustomerLink.objects.select_related("customer").get()
    assert (str(link.uid), link.remote_id, link.remote_data) == (answer["id"], "ext_456", request)
    assert link.customer.shipping_address_country_code == "US"


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_customer_is_fetched_with_the_certificates_that_the_hub_does_not_keep(caller: Caller, slash: str) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    answer = caller.client.get(f"{BASE}/{created['id']}{slash}", headers=caller.headers).json()
    assert set(answer) == FETCHED | {"data", "message"}
    assert {key: answer[key] for key in FETCHED} == answer["data"]
    assert answer["data"] | created == answer["data"]
    assert answer["message"] == "Successfully fetched customer."
    assert answer["exemption_metadata"] == {
        "total_certificates": 0,
        "total_exempted_states": 0,
        "active_exemptions_count": 0,
        "inactive_exemptions_count": 0,
        "expired_exemptions_count": 0,
        "non_expired_exemptions_count": 0,
        "certificate_types": [],
        "exempted_states": [],
    }


def test_what_is_not_set_is_null(caller: Caller) -> None:
    created = caller.create()
    unset = STORED - {"id", "corporation_id", "name", "created_at"}
    assert {key for key, value in created.items() if value is None} == unset


def test_the_schemas_address_spelling_is_understood(caller: Caller) -> None:
    address = example("create.response.envelope.json")["data"]["shipping_address"]
    assert caller.create(shipping_address=address)["shipping_address"] == {
        "line1": "1776 Main St",
        "line2": "Apt. #123, <string>",
        "city": "Santa Monica",
        "state": "CA",
        "postal_code": "90401",
        "country": "US",
    }


@pytest.mark.parametrize(
    "address",
    [
        {"country": "DE"},
        {"line1": "Hauptstr. 1", "line2": None, "city": "", "country": "DE"},
        {"address_line_3": "c/o", "country": "GB", "unknown": {"deep": 1}},
    ],
)
def test_an_address_may_be_given_in_part(caller: Caller, address: dict[str, Any]) -> None:
    shown = caller.create(shipping_address=address)["shipping_address"]
    assert list(shown) == ["line1", "line2", "city", "state", "postal_code", "country"]
    assert shown["country"] == address["country"]
    assert shown["line2"] == address.get("address_line_3")
    assert shown["city"] is None


# Create


def test_a_known_external_id_changes_that_customer(caller: Caller) -> None:
    first = caller.create(external_id="ext_1", email="a@example.com")
    response = caller.send(MINIMAL | {"external_id": "ext_1", "name": "Acme Ltd"})
    assert response.json()["message"] == "Successfully updated customer."
    assert response.json()["data"] == first | {"name": "Acme Ltd"}
    assert Customer.objects.get().version == 2


@pytest.mark.parametrize("given", [{}, {"external_id": None}])
def test_without_an_external_id_every_create_is_a_new_customer(caller: Caller, given: dict[str, Any]) -> None:
    first, second = caller.create(**given), caller.create(**given)
    assert first["id"] != second["id"]
    assert first["external_id"] is None
    assert Customer.objects.count() == 2


def test_an_external_id_is_another_customer_in_another_corporation(
    caller: Caller, connect: Callable[..., Connection]
) -> None:
    connect("commenda", name="second", account="corp_2")
    first = caller.create(external_id="ext_1")
    second = caller.create(external_id="ext_1", corporation_id="corp_2")
    assert first["id"] != second["id"]
    assert caller.get(second).json()["corporation_id"] == "corp_2"
    assert caller.list(corporation_id="corp_2").json()["total_customers"] == 1


def test_an_unknown_corporation_is_404(caller: Caller, connect: Callable[..., Connection]) -> None:
    connect("commenda", name="out", account="corp_out", direction=Connection.Direction.PUSH)
    connect("cheqpay", account="corp_other_provider")
    for account in ("corp_9", "corp_out", "corp_other_provider", " corp_123"):
        refused = caller.send(MINIMAL | {"corporation_id": account})
        assert_error(refused, 404, kind="CLIENT_RESOURCE_NOT_FOUND")
        assert "corporation" in refused.json()["error"]["detail"]
        assert_error(caller.list(corporation_id=account), 404, kind="CLIENT_RESOURCE_NOT_FOUND")
    assert Customer.objects.count() == 0


def test_the_business_identification_number_is_kept_beside_other_custom_fields(
    caller: Caller, organization: Organization
) -> None:
    number = "business_identification_number"
    created = caller.create(external_id="ext_1", **{number: "DE123456789"})
    assert created[number] == "DE123456789"
    customer = Customer.objects.get()
    assert customer.custom_fields == {number: "DE123456789"}
    editing.update(
        organization=organization,
        values={customer.id: {"custom_fields": {**customer.custom_fields, "tier": "gold"}}},
        actor=ACTOR,
    )
    assert caller.update(created, name="Acme Ltd").json()[number] == "DE123456789"
    assert caller.update(created, **{number: "DE987654321"}).json()[number] == "DE987654321"
    assert caller.create(external_id="ext_1", **{number: "DE111111111"})[number] == "DE111111111"
    customer.refresh_from_db()
    assert customer.custom_fields == {number: "DE111111111", "tier": "gold"}
    assert caller.update(created, **{number: None}).json()[number] is None
    customer.refresh_from_db()
    assert customer.custom_fields == {"tier": "gold"}


def test_unknown_keys_are_ignored(caller: Caller) -> None:
    created = caller.create(id="mine", created_at=1, source_platform="XERO", shoe_size=44)
    assert set(created) == STORED
    assert created["id"] != "mine"
    assert created["source_platform"] is None
    assert CustomerLink.objects.get().remote_data == MINIMAL


# Update


def test_an_update_changes_what_it_names_and_leaves_the_rest(caller: Caller) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    response = caller.update(created, name="Acme Ltd", corporation_id="corp_9", external_id="ext_9")
    assert response.status_code == 200
    answer = response.json()
    assert answer["message"] == "Successfully updated customer."
    assert answer["data"] == created | {"name": "Acme Ltd"}
    assert {key: answer[key] for key in STORED} == answer["data"]
    assert caller.update(created).json()["data"] == answer["data"]
    assert Customer.objects.get().version == 2


def test_null_empties_email_and_address(caller: Caller) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    answer = caller.update(created, email=None, shipping_address=None).json()
    assert (answer["email"], answer["shipping_address"]) == (None, None)


def test_an_address_is_replaced_as_a_whole(caller: Caller) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    answer = caller.update(created, shipping_address={"city": "Berlin", "country": "DE"}).json()
    assert answer["shipping_address"] == {
        "line1": None,
        "line2": None,
        "city": "Berlin",
        "state": None,
        "postal_code": None,
        "country": "DE",
    }


# What is refused


WRONG = [
    ({"name": None}, ["/name"]),
    ({"name": ""}, ["/name"]),
    ({"name": "Li"}, ["/name"]),
    ({"name": "  Li  "}, ["/name"]),
    ({"name": "Li\u0301"}, ["/name"]),
    ({"name": "x" * 256}, ["/name"]),
    ({"name": 12345}, ["/name"]),
    ({"name": ["Acme"]}, ["/name"]),
    ({"name": "Ac\u0007me"}, ["/name"]),
    ({"email": ""}, ["/email"]),
    ({"email": "nobody"}, ["/email"]),
    ({"email": 7}, ["/email"]),
    ({"shipping_address": "here"}, ["/shipping_address"]),
    ({"shipping_address": []}, ["/shipping_address"]),
    ({"shipping_address": {}}, ["/shipping_address/country"]),
    ({"shipping_address": {"line1": "1 Main St"}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": None}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": ""}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": "USA"}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": "us"}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": "XX"}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": 1}}, ["/shipping_address/country"]),
    ({"shipping_address": {"country": "US", "line1": "x" * 256}}, ["/shipping_address/line1"]),
    ({"shipping_address": {"country": "US", "address_line_1": 5}}, ["/shipping_address/address_line_1"]),
    ({"shipping_address": {"country": "US", "postal_code": "9" * 33}}, ["/shipping_address/postal_code"]),
    (
        {"shipping_address": {"country": "US", "line2": "x" * 200, "address_line_3": "y" * 54}},
        ["/shipping_address/address_line_3"],
    ),
    ({"business_identification_number": 5}, ["/business_identification_number"]),
    ({"business_identification_number": "9" * 256}, ["/business_identification_number"]),
    ({"name": "Li", "email": "nobody"}, ["/name", "/email"]),
]


@pytest.mark.parametrize(("change", "pointers"), WRONG)
def test_a_wrong_value_is_pointed_at(caller: Caller, change: dict[str, Any], pointers: list[str]) -> None:
    created = caller.create()
    assert_error(caller.send(MINIMAL | change), 400, *pointers)
    assert_error(caller.update(created, **change), 400, *pointers)
    assert Customer.objects.get().version == 1


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({"corporation_id": None}, ["/corporation_id"]),
        ({"corporation_id": ""}, ["/corporation_id"]),
        ({"corporation_id": 123}, ["/corporation_id"]),
        ({"external_id": ""}, ["/external_id"]),
        ({"external_id": 456}, ["/external_id"]),
        ({"external_id": "x" * 256}, ["/external_id"]),
    ],
)
def test_a_wrong_id_is_pointed_at(caller: Caller, change: dict[str, Any], pointers: list[str]) -> None:
    assert_error(caller.send(MINIMAL | change), 400, *pointers)
    assert Customer.objects.count() == 0


def test_a_create_without_the_required_keys_points_at_both(caller: Caller) -> None:
    response = caller.send({})
    assert_error(response, 400, "/name", "/corporation_id")


@pytest.mark.parametrize(
    "body",
    ["{", b"\xff\xfe", json.dumps(MINIMAL | {"email": "a\x00@example.com"}), "[" * 99],
)
def test_a_body_that_is_no_json_is_refused(caller: Caller, body: Any) -> None:
    created = caller.create()
    assert_error(caller.send(body), 400)
    assert_error(caller.send(body, f"{BASE}/{created['id']}"), 400)


@pytest.mark.parametrize("body", ["[]", '"text"', "null", "7"])
def test_a_body_that_is_no_object_is_pointed_at_as_a_whole(caller: Caller, body: str) -> None:
    created = caller.create()
    assert_error(caller.send(body), 400, "")
    assert_error(caller.send(body, f"{BASE}/{created['id']}"), 400, "")


def test_a_body_over_one_megabyte_is_refused(caller: Caller) -> None:
    assert_error(caller.send(MINIMAL | {"email": "x" * 1024 * 1024}), 400)


@pytest.mark.django_db(transaction=True)
def test_a_body_in_chunks_is_read_like_any_other(caller: Caller, server: str) -> None:
    customer = caller.create()

    def send(*parts: bytes) -> tuple[int, Any]:
        wire = HTTPConnection(server.removeprefix("http://"), timeout=30)
        try:
            wire.request("POST", f"{BASE}/{customer['id']}", iter(parts), caller.headers, encode_chunked=True)
            answer = wire.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            wire.close()

    status, body = send(b'{"name":', b' "In Pieces"}')
    assert (status, body["data"]["name"]) == (200, "In Pieces")
    status, body = send(b" " * (1024 * 1024), b" ")
    assert (status, body["error"]["type"]) == (400, "CLIENT_INVALID_REQUEST_BODY")
    assert "larger than 1 MB" in body["error"]["detail"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer hub_wrong"}, {"x-api-key": "KEY"}])
def test_without_a_good_token_every_endpoint_is_401(caller: Caller, api_key: str, headers: dict[str, str]) -> None:
    created = caller.create()
    caller.headers = {name: value.replace("KEY", api_key) for name, value in headers.items()}
    for response in (
        caller.send(MINIMAL),
        caller.list(),
        caller.list(path="/customers"),
        caller.get(created),
        caller.update(created, name="Acme Ltd"),
        caller.delete(created),
    ):
        assert_error(response, 401, kind="CLIENT_UNAUTHORIZED")
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_for_reading_may_not_write(caller: Caller, organization: Organization) -> None:
    created = caller.create()
    reader = Caller(ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])[1])
    assert reader.get(created).status_code == 200
    for response in (reader.send(MINIMAL), reader.update(created, name="Acme Ltd"), reader.delete(created)):
        assert_error(response, 403, kind="CLIENT_FORBIDDEN")


def test_what_belongs_to_another_organization_does_not_exist(
    caller: Caller, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    connect("commenda", organization=other_organization, name="theirs", account="corp_2")
    created = caller.create()
    stranger = Caller(ApiKey.issue(organization=other_organization, name="stranger")[1])
    for response in (
        stranger.get(created),
        stranger.update(created, name="Mine now"),
        stranger.delete(created),
        stranger.send(MINIMAL),
        stranger.list(),
    ):
        assert_error(response, 404, kind="CLIENT_RESOURCE_NOT_FOUND")
    assert stranger.list(corporation_id="corp_2").json()["customers"] == []
    assert caller.get(created).json()["name"] == "Acme Corporation"


def test_ids_that_are_not_of_this_api_are_404(caller: Caller, connect: Callable[..., Connection]) -> None:
    outward = connect("commenda", name="out", account="corp_out", direction=Connection.Direction.PUSH)
    now = timezone.now()
    pushed = CustomerLink.objects.create(
        customer=Customer.objects.get(pk=link_of(caller.create()).customer_id),
        connection=outward,
        created_at=now,
        updated_at=now,
    )
    for uid in (str(uuid4()), str(pushed.uid), "cust_789", "1", "ü"):
        assert_error(caller.get(uid), 404, kind="CLIENT_RESOURCE_NOT_FOUND")
        assert_error(caller.update({"id": uid}, name="Acme Ltd"), 404, kind="CLIENT_RESOURCE_NOT_FOUND")
        assert_error(caller.delete({"id": uid}), 404, kind="CLIENT_RESOURCE_NOT_FOUND")


def test_methods_that_are_not_documented_are_refused_in_the_documented_shape(caller: Caller) -> None:
    created = caller.create()
    for path in (BASE, f"{BASE}/{created['id']}"):
        response = caller.client.put(path, "{}", content_type="application/json", headers=caller.headers)
        assert_error(response, 405, kind="CLIENT_METHOD_NOT_ALLOWED")


# Delete


def link_of(customer: dict[str, Any]) -> CustomerLink:
    return CustomerLink.objects.select_related("customer").get(uid=customer["id"])


def test_a_deleted_customer_is_gone_for_the_caller_and_archived_in_the_hub(caller: Caller) -> None:
    created, other = caller.create(external_id="ext_1"), caller.create(name="Other")
    response = caller.delete(created)
    assert (response.status_code, response.content) == (204, b"")
    for again in (caller.get(created), caller.update(created, name="Acme Ltd"), caller.delete(created)):
        assert_error(again, 404, kind="CLIENT_RESOURCE_NOT_FOUND")
    listed = caller.list().json()
    assert ([c["id"] for c in listed["customers"]], listed["total_customers"]) == ([other["id"]], 1)
    link = link_of(created)
    assert link.deleted_at is not None
    assert link.customer.archived_at is not None
    assert link.customer.name == "Acme Corporation"


def test_a_create_with_the_external_id_of_a_deleted_customer_brings_it_back(caller: Caller) -> None:
    created = caller.create(external_id="ext_1", email="a@example.com")
    caller.delete(created)
    revived = caller.create(external_id="ext_1", name="Acme Again")
    assert revived == created | {"name": "Acme Again"}
    assert caller.get(created).status_code == 200
    assert caller.names() == ["Acme Again"]
    assert link_of(created).customer.archived_at is None


@pytest.mark.django_db(transaction=True)
def test_parallel_creates_and_deletes_of_one_external_id_leave_one_customer(caller: Caller, api_key: str) -> None:
    codes: list[int] = []

    def work(number: int) -> None:
        mine = Caller(api_key)
        for _ in range(5):
            created = mine.create(external_id="ext_1", name=f"Caller {number}", business_identification_number="1")
            codes.append(mine.delete(created).status_code if number % 2 else mine.get(created).status_code)
        connections.close_all()

    threads = [Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 30
    assert set(codes) <= {200, 204, 404}
    assert CustomerLink.objects.count() == Customer.objects.count() == 1


# List


def test_a_list_answers_in_both_shapes_without_what_was_not_asked_for(caller: Caller) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    for path in (BASE, f"{BASE}/", "/customers", "/customers/"):
        answer = caller.list(path=path).json()
        assert set(answer) == {"customers", "total_customers", "cursor", "data", "message"}
        assert answer["data"] == {key: answer[key] for key in ("customers", "total_customers", "cursor")}
        assert answer["message"] == "Successfully fetched customers."
        assert (answer["total_customers"], answer["cursor"]) == (1, None)
        assert answer["customers"] == [{key: created[key] for key in LISTED}]


def test_a_list_is_extended_by_what_is_asked_for(caller: Caller) -> None:
    created = caller.send(example("create.request.json")).json()["data"]
    [shown] = caller.list(extend="shipping_address").json()["customers"]
    assert shown == created
    [shown] = caller.list(extend="exemption_metadata, shipping_address").json()["customers"]
    assert shown == caller.get(created).json()["data"]


def test_an_empty_corporation_has_an_empty_list(caller: Caller) -> None:
    listed = {"customers": [], "total_customers": 0, "cursor": None}
    assert caller.list().json()["data"] == listed


def test_pages_follow_each_other_by_cursor_and_miss_nobody(caller: Caller) -> None:
    ids = [caller.create(name=f"Customer {number:02}")["id"] for number in range(12)]
    first = caller.list().json()
    assert len(first["customers"]) == 10
    assert first["total_customers"] == 12
    caller.delete({"id": ids[9]})  # the one that the cursor stands on
    second = caller.list(cursor=first["cursor"]).json()
    assert [c["id"] for c in first["customers"] + second["customers"]] == ids
    assert second["cursor"] is None
    seen, cursor = [], ""
    while cursor is not None:
        page = caller.list(limit=4, cursor=cursor).json()
        seen += [c["id"] for c in page["customers"]]
        cursor = page["cursor"]
    assert seen == ids[:9] + ids[10:]


def encoded(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("query", "pointers"),
    [
        ({"corporation_id": None}, ["/corporation_id"]),
        ({"corporation_id": ""}, ["/corporation_id"]),
        ({"limit": 0}, ["/limit"]),
        ({"limit": 101}, ["/limit"]),
        ({"limit": "ten"}, ["/limit"]),
        ({"limit": ""}, ["/limit"]),
        ({"search_term": "x" * 60_000}, ["/search_term"]),
        ({"cursor": "x"}, ["/cursor"]),
        ({"cursor": "ünïcode"}, ["/cursor"]),
        ({"cursor": encoded("-1")}, ["/cursor"]),
        ({"cursor": encoded("0")}, ["/cursor"]),
        ({"cursor": encoded("1") + "=="}, ["/cursor"]),
        ({"cursor": encoded("٣")}, ["/cursor"]),
        ({"cursor": encoded("9" * 19)}, ["/cursor"]),
        ({"cursor": encoded("1' OR 1=1")}, ["/cursor"]),
        ({"extend": "orders"}, ["/extend"]),
        ({"exemption_jurisdiction": "California"}, ["/exemption_jurisdiction"]),
        ({"expiration_status": "SOON"}, ["/expiration_status"]),
        ({"exemption_status": "EXPIRED"}, ["/exemption_status"]),
        ({"has_exemption": "maybe"}, ["/has_exemption"]),
    ],
)
def test_a_wrong_query_is_pointed_at(caller: Caller, query: dict[str, Any], pointers: list[str]) -> None:
    assert_error(caller.list(**query), 400, *pointers, kind="CLIENT_INVALID_REQUEST_QUERY")


@pytest.mark.parametrize("name", ["corporation_id", "name", "search_term", "cursor", "source_platforms"])
def test_a_nul_in_the_query_is_refused(caller: Caller, name: str) -> None:
    assert_error(caller.list(**{name: "a\x00b"}), 400, kind="CLIENT_INVALID_REQUEST_QUERY")


def test_a_list_is_limited_by_exact_name_or_by_a_part_of_it(caller: Caller) -> None:
    for name in ("Acme", "ACME", "Acme Corporation", "Zoë 100%", "Émile_x"):
        caller.create(name=name)
    assert caller.names(name="Acme") == ["Acme"]
    assert caller.names(name="acme") == []
    assert caller.names(name=" Acme ") == ["Acme"]
    assert caller.names(search_term="ACM") == ["Acme", "ACME", "Acme Corporation"]
    assert caller.names(search_term="corp", name="Acme Corporation") == ["Acme Corporation"]
    assert caller.names(search_term="0%") == ["Zoë 100%"]
    assert caller.names(search_term="e_") == ["Émile_x"]
    assert caller.names(search_term="emile") == ["Émile_x"]
    assert caller.names(search_term="%") == ["Zoë 100%"]
    assert len(caller.names(search_term="", name="", extend="", source_platforms="", cursor="")) == 5
    assert caller.list(search_term="acm", limit=1).json()["total_customers"] == 3


def test_the_source_is_the_customers_leading_link_elsewhere(caller: Caller, connect: Callable[..., Connection]) -> None:
    rootfi = connect("rootfi", name="shop")
    synced, own = caller.create(name="Synced"), caller.create(name="Own")
    link = link_of(synced)
    CustomerLink.objects.filter(pk=link.pk).update(is_primary=False)
    now = timezone.now()
    leading = CustomerLink.objects.create(
        customer=link.customer,
        connection=rootfi,
        remote_id="shop-7",
        is_primary=True,
        created_at=now,
        updated_at=now,
    )
    source = {"source_platform": "rootfi", "source_platform_id": "shop-7"}
    assert caller.get(synced).json() | source == caller.get(synced).json()
    assert caller.update(synced, name="Synced again").json() | source == caller.update(synced).json()
    first, second = caller.list().json()["customers"]
    assert first | source == first
    assert (second["id"], second["source_platform"]) == (own["id"], None)
    assert caller.names(source_platforms="xero,rootfi") == ["Synced again"]
    assert caller.names(source_platforms="xero") == []
    assert caller.names(source_platforms="commenda") == []
    assert caller.names(source_platform_ids="shop-6, shop-7") == ["Synced again"]
    assert caller.names(source_platform_ids="shop-7", source_platforms="xero") == []
    CustomerLink.objects.filter(pk=leading.pk).update(deleted_at=now)
    assert caller.names(source_platforms="rootfi") == []
    assert caller.get(synced).json()["source_platform"] is None


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"has_exemption": "true"}, 0),
        ({"has_exemption": "false"}, 1),
        ({"certificate_types": "RESALE,GOVERNMENT"}, 0),
        ({"exemption_jurisdiction": "US_CA"}, 0),
        ({"expiration_status": "ACTIVE"}, 0),
        ({"exemption_status": "INACTIVE"}, 0),
    ],
)
def test_no_customer_has_an_exemption(caller: Caller, query: dict[str, str], count: int) -> None:
    caller.create()
    answer = caller.list(**query).json()
    assert (len(answer["customers"]), answer["total_customers"]) == (count, count)


def test_a_customer_archived_in_the_hub_is_not_listed_but_still_answered(
    caller: Caller, organization: Organization
) -> None:
    created = caller.create()
    editing.archive(organization=organization, ids=[link_of(created).customer_id], actor=ACTOR)
    assert caller.names() == []
    assert caller.get(created).status_code == 200


def test_the_number_of_statements_does_not_grow_with_the_page(
    caller: Caller,
    connect: Callable[..., Connection],
    django_assert_num_queries: Callable[[int], CaptureQueriesContext],
) -> None:
    caller.create()
    # The key, the corporation, the page, the leading links.
    with django_assert_num_queries(4):
        caller.list()
    for _ in range(20):
        caller.create()
    # A page that does not show all is followed by the count.
    with django_assert_num_queries(5):
        caller.list(limit=20, extend="shipping_address,exemption_metadata")


# The client


def session(connection: Connection) -> Session:
    return Commenda().session(connection, client=loopback.client())


@pytest.fixture
def outward(
    api_key: str, corporation: Connection, connect: Callable[..., Connection], other_organization: Organization
) -> Connection:
    """A connection of another organization to the hub's own mirror."""
    return connect(
        "commenda",
        organization=other_organization,
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url="http://testserver/api/v1",
        credentials={"api_key": api_key},
    )


def make(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[values], actor=ACTOR)[0]


def outgoing(
    connection: Connection,
    customer: Customer,
    *,
    remote_id: str | None = None,
    fields: frozenset[str] | None = None,
) -> Outgoing:
    uid = uuid7()
    document = Commenda().document(customer, connection=connection, uid=uid, fields=fields)
    return Outgoing(uid=uid, remote_id=remote_id, key=uuid7(), document=json.loads(json.dumps(document)))


SENT = {
    "name": "Acme Corporation",
    "email": "contact@acme.com",
    "shipping_address_line1": "123 Main St",
    "shipping_address_line2": "Suite 100",
    "shipping_address_city": "San Francisco",
    "shipping_address_state": "CA",
    "shipping_address_postal_code": "94105",
    "shipping_address_country": "US",
}


def test_what_leaves_through_the_client_arrives_through_the_mirror(
    outward: Connection, organization: Organization, other_organization: Organization
) -> None:
    commenda = Commenda()
    assert set(SENT) == commenda.fields
    customer = make(other_organization, **SENT | {"shipping_address_country": "United States"})
    out = outgoing(outward, customer)
    record = commenda.create(session(outward), outward, out)
    assert record.values == SENT
    arrived = CustomerLink.objects.select_related("customer").get(connection__organization=organization)
    assert record.remote_id == str(arrived.uid)
    assert arrived.remote_id == str(out.uid)
    assert record.created_at == arrived.created_at.replace(microsecond=0)
    assert {name: getattr(arrived.customer, name) for name in SENT} == SENT
    assert commenda.create(session(outward), outward, out).remote_id == record.remote_id
    assert commenda.fetch(session(outward), outward, str(arrived.uid)).values == SENT
    arrived.customer.refresh_from_db()
    assert arrived.customer.version == 1


def test_an_update_carries_only_what_moved_and_the_address_as_a_whole(
    outward: Connection, organization: Organization, other_organization: Organization
) -> None:
    commenda = Commenda()
    customer = make(other_organization, **SENT)
    created = commenda.create(session(outward), outward, outgoing(outward, customer))
    values = {"name": "Acme Ltd", "email": "", "shipping_address_line2": "", "shipping_address_city": "Oakland"}
    customer = editing.update(organization=other_organization, values={customer.id: values}, actor=ACTOR)[
        customer.id
    ].customer
    moved = frozenset({"shipping_address_line2", "shipping_address_city", "email"})
    out = outgoing(outward, customer, remote_id=created.remote_id, fields=moved)
    assert out.document == {
        "email": None,
        "shipping_address": {
            "line1": "123 Main St",
            "line2": None,
            "city": "Oakland",
            "state": "CA",
            "postal_code": "94105",
            "country": "US",
        },
    }
    record = commenda.update(session(outward), outward, out)
    assert record.values == SENT | values | {"name": "Acme Corporation"}
    arrived = Customer.objects.get(organization=organization)
    assert {name: getattr(arrived, name) for name in SENT} == record.values
    empty = {name: "" for name in SENT if name.startswith("shipping")}
    customer = editing.update(organization=other_organization, values={customer.id: empty}, actor=ACTOR)[
        customer.id
    ].customer
    out = outgoing(outward, customer, remote_id=created.remote_id, fields=frozenset(empty))
    assert out.document == {"shipping_address": None}
    assert commenda.update(session(outward), outward, out).values.items() >= empty.items()


def test_every_page_of_the_mirror_is_pulled(
    outward: Connection, organization: Organization, corporation: Connection, api_key: str
) -> None:
    commenda, caller = Commenda(), Caller(api_key)
    created = [caller.create(name=f"Customer {number}") for number in range(5)]
    caller.update(created[0], shipping_address=example("create.request.json")["shipping_address"])
    records: list[Any] = []
    cursor: str | None = None
    while True:
        page = commenda.page(session(outward), outward, cursor=cursor, since=None, limit=2)
        records += page.records
        cursor = page.next
        if cursor is None:
            break
    assert [record.remote_id for record in records] == [customer["id"] for customer in created]
    assert records[0].values["shipping_address_city"] == "San Francisco"
    assert records[1].values["shipping_address_city"] == ""


def test_a_record_is_deleted_there_once(outward: Connection, other_organization: Organization) -> None:
    commenda = Commenda()
    created = commenda.create(session(outward), outward, outgoing(outward, make(other_organization, **SENT)))
    assert created.remote_id is not None
    commenda.delete(session(outward), outward, created.remote_id)
    for call in (commenda.delete, commenda.fetch):
        with pytest.raises(Gone):
            call(session(outward), outward, created.remote_id)


def test_the_bare_minimum_is_sent_for_a_customer_with_a_name_only(
    outward: Connection, other_organization: Organization
) -> None:
    out = outgoing(outward, make(other_organization, name="Acme"))
    assert out.document == {"corporation_id": "corp_123", "external_id": str(out.uid), "name": "Acme"}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "Li"}, "name"),
        ({"email": "nobody"}, "email"),
        ({"shipping_address_city": "Berlin"}, "shipping_address_country"),
        ({"shipping_address_country": "Ruritania"}, "shipping_address_country"),
    ],
)
def test_what_commenda_would_refuse_is_told_before_it_is_sent(
    outward: Connection, other_organization: Organization, values: dict[str, str], field: str
) -> None:
    customer = make(other_organization, **{"name": "Acme"} | values)
    with pytest.raises(Rejected) as caught:
        outgoing(outward, customer)
    assert caught.value.field == field
    others = Commenda().fields - {field} - set(values)
    outgoing(outward, customer, fields=frozenset(n for n in others if not n.startswith("shipping")))


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"name": "Li"}, "name"),
        ({"shipping_address": {"country": "USA"}}, "shipping_address_country"),
        ({"shipping_address": {"country": "US", "address_line_2": 5}}, "shipping_address_line2"),
    ],
)
def test_a_refusal_names_the_customers_field(
    outward: Connection, other_organization: Organization, document: dict[str, Any], field: str
) -> None:
    out = outgoing(outward, make(other_organization, name="Acme"))
    bad = Outgoing(uid=out.uid, remote_id=None, key=out.key, document={**out.document, **document})
    with pytest.raises(Rejected) as caught:
        Commenda().create(session(outward), outward, bad)
    assert (caught.value.field, caught.value.code) == (field, "CLIENT_INVALID_REQUEST_BODY")


def test_an_unknown_corporation_pauses_the_connection_instead_of_parking_the_customer(
    outward: Connection, other_organization: Organization
) -> None:
    outward.account = "corp_9"
    with pytest.raises(ConnectionUnusable):
        Commenda().create(session(outward), outward, outgoing(outward, make(other_organization, name="Acme")))
    with pytest.raises(ConnectionUnusable):
        Commenda().page(session(outward), outward, cursor=None, since=None)


def answering(*bodies: Any, status: int = 200) -> Session:
    left = list(bodies)
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, json=left.pop(0)))
    return Session(base_url="https://commenda.example/api/v1", client=httpx2.Client(transport=transport))


def test_either_half_of_the_document_is_read(outward: Connection, other_organization: Organization) -> None:
    commenda = Commenda()
    out = outgoing(outward, make(other_organization, name="Acme"))
    flat = commenda.create(answering(example("create.response.flat.json")), outward, out)
    assert flat.remote_id == "cust_789"
    assert flat.values == {"name": "Acme Corporation", "email": "contact@acme.com"}
    assert flat.created_at is not None
    assert flat.created_at.timestamp() == 1706000000
    envelope = commenda.create(answering(example("create.response.envelope.json")), outward, out)
    assert envelope.remote_id == "b6d009b0-d174-463f-b030-94643c28e209"
    assert envelope.values["shipping_address_line2"] == "Apt. #123, <string>"
    assert envelope.document == example("create.response.envelope.json")["data"]
    listed = {"customers": [example("create.response.flat.json"), {"name": "Nobody"}, {"id": "x", "name": ""}]}
    for body in (listed, {"data": listed | {"cursor": None}, "message": "Successfully fetched customers."}):
        page = commenda.page(answering(body), outward, cursor=None, since=None)
        assert [type(record) for record in page.records] == [Record, Rejected, Rejected]
        assert page.next is None


def test_an_update_that_answers_a_message_alone_is_read_back(
    outward: Connection, other_organization: Organization
) -> None:
    out = outgoing(outward, make(other_organization, name="Acme"), remote_id="cust_789", fields=frozenset({"name"}))
    there = answering({"message": "Customer updated successfully"}, example("create.response.flat.json"))
    assert Commenda().update(there, outward, out).values["name"] == "Acme Corporation"


def test_an_answer_that_is_not_understood_never_loses_the_record(
    outward: Connection, other_organization: Organization
) -> None:
    commenda = Commenda()
    out = outgoing(outward, make(other_organization, name="Acme"))
    for body in ({"message": "Successfully created customer."}, [], None, {"data": {"id": 7}}):
        with pytest.raises(OutcomeUnknown):
            commenda.create(answering(body), outward, out)
    with pytest.raises(OutcomeUnknown):
        commenda.create(answering({}, status=502), outward, out)
    record = commenda.create(answering({"id": "cust_1", "name": "x" * 300, "created_at": "soon"}), outward, out)
    assert (record.remote_id, record.values) == ("cust_1", {})
    with pytest.raises(RetryLater):
        commenda.fetch(answering({"message": "here"}), outward, "cust_1")
    with pytest.raises(Rejected):
        commenda.fetch(answering({"id": "cust_1", "name": 7}), outward, "cust_1")
    for body in ({}, [], {"customers": [], "cursor": "again"}, {"customers": [], "cursor": 7}):
        with pytest.raises(RetryLater):
            commenda.page(answering(body), outward, cursor="again", since=None)


def test_an_option_says_that_a_repeated_create_is_harmless(outward: Connection) -> None:
    assert Commenda().capabilities(outward).upsert_external_id is False
    outward.options = {"upsert_by_external_id": True}
    assert set(outward.options) == set(Commenda().options)
    assert Commenda().capabilities(outward).upsert_external_id is True


def test_the_key_is_in_no_text_of_the_session(outward: Connection, api_key: str) -> None:
    assert api_key not in repr(session(outward))
