"""Cheqpay: its documented endpoints as the hub mirrors them, and its client against that mirror."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.models import ApiKey, Connection, CustomerLink
from connectors.outbound import Session
from connectors.provider import Outgoing
from connectors.providers.cheqpay import Cheqpay
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization
from tests.connectors import loopback

WIRE = Path(__file__).parent.parent / "wire" / "cheqpay"
KEYS = {
    "externalId",
    "firstName",
    "lastName",
    "email",
    "phoneNumber",
    "active",
    "notificationOptions",
    "createdAt",
    "updatedAt",
}
ACTOR = Actor(kind=CustomerChange.Actor.USER, name="staff")
MINIMAL = {"externalId": "CUST-1", "firstName": "Ada"}


def example(name: str) -> Any:
    return json.loads((WIRE / name).read_text())


@pytest.fixture
def merchant(connect: Callable[..., Connection]) -> Connection:
    return connect("cheqpay")


class Caller:
    """A system that speaks Cheqpay to the hub."""

    def __init__(self, key: str, merchant: str = "M-1001") -> None:
        self.headers = {"x-api-key": key, "x-merchant-id": merchant}
        self.client = Client()

    def send(self, body: Any, *, path: str = "/customers/add-update") -> Any:
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        return self.client.post(path, content, content_type="application/json", headers=self.headers)

    def get(self, external_id: str, *, slash: str = "") -> Any:
        return self.client.get(f"/customers/{quote(external_id, safe='')}{slash}", headers=self.headers)


@pytest.fixture
def caller(api_key: str, merchant: Connection) -> Caller:
    return Caller(api_key)


def assert_refused(response: Any, *fields: str) -> None:
    assert response.status_code == 400, response.content
    error = response.json()["error"]
    assert set(error) == set(example("error.response.json")["error"])
    assert error["code"] == "VALIDATION_ERROR"
    assert [detail["field"] for detail in error["details"]] == list(fields)
    assert all(isinstance(detail["message"], str) and detail["message"] for detail in error["details"])
    assert Customer.objects.count() == 0


# The documented examples


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_documented_request_gets_the_documented_answer(caller: Caller, slash: str) -> None:
    response = caller.send(example("add-update.request.json"), path=f"/customers/add-update{slash}")
    assert response.status_code == 200
    answer, documented = response.json(), example("add-update.response.json")
    assert set(answer) == KEYS
    for key, value in documented.items():
        assert type(answer[key]) is type(value)
        if key not in ("createdAt", "updatedAt"):
            assert answer[key] == value
    assert answer["notificationOptions"] == {"notifyEmail": False, "notifyPhone": False}
    assert answer["createdAt"].endswith("Z")
    assert len(answer["createdAt"]) == len("2024-03-20T10:00:00Z")
    assert caller.get("CUST-123").json() == answer
    assert caller.get("CUST-123", slash="/").json() == answer


def test_the_customer_is_stored_with_all_that_was_sent(caller: Caller, merchant: Connection) -> None:
    caller.send(example("add-update.request.json"))
    customer = Customer.objects.get()
    assert (customer.name, customer.first_name, customer.last_name) == ("John Doe", "John", "Doe")
    assert (customer.email, customer.phone, customer.is_active) == ("john.doe@example.com", "+1234567890", True)
    link = CustomerLink.objects.get()
    assert (link.connection, link.remote_id) == (merchant, "CUST-123")
    assert link.remote_data == example("add-update.request.json")
    assert link.base_local["name"] == "John Doe"
    assert CustomerChange.objects.get().actor_kind == CustomerChange.Actor.API_KEY


def test_all_nine_keys_are_answered_when_only_the_required_ones_were_sent(caller: Caller) -> None:
    answer = caller.send(MINIMAL).json()
    assert set(answer) == KEYS
    assert answer | MINIMAL == answer
    assert (answer["lastName"], answer["email"], answer["phoneNumber"]) == (None, None, None)
    assert answer["active"] is True
    assert answer["notificationOptions"] == {"notifyEmail": False, "notifyPhone": False}


# The upsert


def test_a_second_call_changes_the_same_customer_and_leaves_what_it_does_not_name(caller: Caller) -> None:
    first = caller.send(example("add-update.request.json")).json()
    again = caller.send({"externalId": "CUST-123", "firstName": "Jane", "active": False}).json()
    assert again == first | {"firstName": "Jane", "active": False, "updatedAt": again["updatedAt"]}
    customer = Customer.objects.get()
    assert (customer.name, customer.last_name, customer.version) == ("Jane Doe", "Doe", 2)


def test_an_identical_call_makes_no_version(caller: Caller) -> None:
    first = caller.send(example("add-update.request.json")).json()
    assert caller.send(example("add-update.request.json")).json() == first
    assert Customer.objects.get().version == 1


def test_null_empties_what_may_be_empty(caller: Caller) -> None:
    caller.send(example("add-update.request.json"))
    body = {"externalId": "CUST-123", "firstName": "John", "lastName": None, "email": None, "phoneNumber": None}
    answer = caller.send(body).json()
    assert (answer["lastName"], answer["email"], answer["phoneNumber"]) == (None, None, None)
    assert Customer.objects.get().name == "John"


def test_notification_options_given_in_part_are_merged(caller: Caller) -> None:
    caller.send(MINIMAL | {"notificationOptions": {"notifyEmail": True}})
    answer = caller.send(MINIMAL | {"notificationOptions": {"notifyPhone": True}}).json()
    assert answer["notificationOptions"] == {"notifyEmail": True, "notifyPhone": True}
    answer = caller.send(MINIMAL | {"notificationOptions": {"notifyEmail": False}}).json()
    assert answer["notificationOptions"] == {"notifyEmail": False, "notifyPhone": True}
    assert caller.send(MINIMAL | {"notificationOptions": {}}).json()["notificationOptions"]["notifyPhone"] is True


def test_one_name_is_split_and_survives_being_sent_back(caller: Caller, organization: Organization) -> None:
    caller.send(MINIMAL)
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.id: {"name": "Acme Trading Corporation"}}, actor=ACTOR)
    shown = caller.get("CUST-1").json()
    assert (shown["firstName"], shown["lastName"]) == ("Acme Trading", "Corporation")
    # A caller that sends back what it read says nothing new of the name.
    caller.send({key: shown[key] for key in ("externalId", "firstName", "lastName")})
    caller.send({"externalId": "CUST-1", "firstName": "Acme Trading"})
    customer.refresh_from_db()
    assert (customer.name, customer.first_name, customer.version) == ("Acme Trading Corporation", "", 2)
    assert caller.send(MINIMAL).json()["lastName"] == "Corporation"


def test_unknown_keys_are_ignored(caller: Caller) -> None:
    answer = caller.send(MINIMAL | {"createdAt": "1999-01-01T00:00:00Z", "shoeSize": 44}).json()
    assert set(answer) == KEYS
    assert not answer["createdAt"].startswith("1999")
    assert CustomerLink.objects.get().remote_data == MINIMAL


def test_texts_are_stored_trimmed_but_the_external_id_is_kept_to_the_letter(caller: Caller) -> None:
    answer = caller.send({"externalId": " a b ", "firstName": "  Ada "}).json()
    assert (answer["externalId"], answer["firstName"]) == (" a b ", "Ada")
    assert caller.get(" a b ").status_code == 200
    assert caller.get("a b").status_code == 404


@pytest.mark.parametrize(
    "external_id", ["a/b", "a/", "/a", "a b?c#d", "größe-ñ", "100%", "a//b", "…", "A&B=C", "a\nb", "add-update"]
)
def test_an_external_id_of_any_characters_can_be_read_back(caller: Caller, external_id: str) -> None:
    assert caller.send(MINIMAL | {"externalId": external_id}).json()["externalId"] == external_id
    assert caller.get(external_id).json()["externalId"] == external_id
    assert caller.get(external_id, slash="/").json()["externalId"] == external_id


def test_an_id_with_a_slash_at_its_end_is_not_taken_for_the_one_without(caller: Caller) -> None:
    caller.send(MINIMAL | {"externalId": "a", "firstName": "Without"})
    caller.send(MINIMAL | {"externalId": "a/", "firstName": "With"})
    assert caller.get("a/").json()["firstName"] == "With"
    assert caller.get("a").json()["firstName"] == "Without"


def test_a_slash_in_an_id_may_be_sent_as_it_is(caller: Caller) -> None:
    caller.send(MINIMAL | {"externalId": "shop/7"})
    assert caller.client.get("/customers/shop/7", headers=caller.headers).json()["externalId"] == "shop/7"


def test_the_number_of_statements_is_the_same_for_create_and_update(
    caller: Caller, django_assert_max_num_queries: Callable[[int], CaptureQueriesContext]
) -> None:
    caller.send(MINIMAL | {"externalId": "warm"})
    with django_assert_max_num_queries(25):
        caller.send(MINIMAL)
    with django_assert_max_num_queries(25):
        caller.send(MINIMAL | {"firstName": "Grace"})


@pytest.mark.django_db(transaction=True)
def test_parallel_calls_for_one_new_external_id_make_one_customer(caller: Caller, api_key: str) -> None:
    codes: list[int] = []

    def upsert(number: int) -> None:
        for round_ in range(5):
            body = {"externalId": f"CUST-{round_}", "firstName": f"Caller {number}"}
            codes.append(Caller(api_key).send(body).status_code)
        connections.close_all()

    threads = [Thread(target=upsert, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 40
    assert CustomerLink.objects.count() == Customer.objects.count() == 5


# Who may call


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": "KEY"},
        {"x-merchant-id": "M-1001"},
        {"x-api-key": "hub_wrong", "x-merchant-id": "M-1001"},
        {"x-api-key": "KEY", "x-merchant-id": "M-9999"},
        {"x-api-key": "KEY", "x-merchant-id": "  "},
        {"x-api-key": "KEY", "x-merchant-id": "M-\x001001"},
        {"Authorization": "Bearer KEY"},
        {"Authorization": "Basic KEY", "x-merchant-id": "M-1001"},
        {"Authorization": "Bearer hub_wrong", "x-merchant-id": "M-1001"},
    ],
)
@pytest.mark.parametrize("call", ["post", "get"])
def test_without_a_good_key_and_a_known_merchant_the_answer_is_401(
    api_key: str, merchant: Connection, headers: dict[str, str], call: str
) -> None:
    given = {name: value.replace("KEY", api_key) for name, value in headers.items()}
    if call == "post":
        response = Client().post(
            "/customers/add-update", json.dumps(MINIMAL), content_type="application/json", headers=given
        )
    else:
        response = Client().get("/customers/CUST-1", headers=given)
    assert response.status_code == 401
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"code", "message"}
    assert response.json()["error"]["code"] == "UNAUTHORIZED"
    assert response.headers["WWW-Authenticate"]
    assert Customer.objects.count() == 0


def test_the_guides_bearer_key_is_as_good_as_the_header(caller: Caller, api_key: str) -> None:
    caller.headers = {"Authorization": f"Bearer {api_key}", "x-merchant-id": "M-1001"}
    assert caller.send(MINIMAL).status_code == 200
    assert caller.get("CUST-1").status_code == 200


def test_a_merchant_that_the_hub_itself_calls_cannot_be_called_as_one(
    api_key: str, connect: Callable[..., Connection]
) -> None:
    connect("cheqpay", direction=Connection.Direction.PUSH)
    assert Caller(api_key).send(MINIMAL).status_code == 401


def test_a_key_for_reading_may_not_write(organization: Organization, caller: Caller) -> None:
    caller.send(MINIMAL)
    reading = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])[1]
    reader = Caller(reading)
    assert reader.get("CUST-1").status_code == 200
    response = reader.send(MINIMAL)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "FORBIDDEN")


def test_the_merchants_of_another_organization_do_not_exist(
    caller: Caller, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    connect("cheqpay", organization=other_organization, name="theirs", account="M-2002")
    stranger = ApiKey.issue(organization=other_organization, name="stranger")[1]
    caller.send(MINIMAL)
    assert Caller(stranger, "M-1001").get("CUST-1").status_code == 401
    assert Caller(stranger, "M-2002").get("CUST-1").status_code == 404
    assert Caller(stranger, "M-2002").send(MINIMAL).status_code == 200
    assert Customer.objects.count() == 2


def test_one_external_id_is_another_customer_at_another_merchant(
    caller: Caller, api_key: str, connect: Callable[..., Connection]
) -> None:
    connect("cheqpay", name="second", account="M-1002")
    caller.send(MINIMAL)
    second = Caller(api_key, "M-1002")
    assert second.get("CUST-1").status_code == 404
    second.send(MINIMAL | {"firstName": "Grace"})
    assert caller.get("CUST-1").json()["firstName"] == "Ada"


# What is refused


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"externalId": None}, ["externalId"]),
        ({"externalId": ""}, ["externalId"]),
        ({"externalId": 7}, ["externalId"]),
        ({"externalId": "x" * 256}, ["externalId"]),
        ({"externalId": "a\u0007b"}, ["externalId"]),
        ({"firstName": None}, ["firstName"]),
        ({"firstName": "   "}, ["firstName"]),
        ({"firstName": 7}, ["firstName"]),
        ({"firstName": True}, ["firstName"]),
        ({"firstName": ["Ada"]}, ["firstName"]),
        ({"firstName": "x" * 256}, ["firstName"]),
        ({"firstName": "A\u0007"}, ["firstName"]),
        ({"lastName": {}}, ["lastName"]),
        ({"lastName": "x" * 256}, ["lastName"]),
        ({"firstName": "x" * 200, "lastName": "y" * 55}, ["lastName"]),
        ({"email": ""}, ["email"]),
        ({"email": "nobody"}, ["email"]),
        ({"email": 7}, ["email"]),
        ({"email": f"{'x' * 250}@example.com"}, ["email", "email"]),
        ({"phoneNumber": 1234567890}, ["phoneNumber"]),
        ({"phoneNumber": "none"}, ["phoneNumber"]),
        ({"phoneNumber": "1" * 65}, ["phoneNumber"]),
        ({"active": "true"}, ["active"]),
        ({"active": 1}, ["active"]),
        ({"active": None}, ["active"]),
        ({"notificationOptions": True}, ["notificationOptions"]),
        ({"notificationOptions": None}, ["notificationOptions"]),
        ({"notificationOptions": {"notifyEmail": "yes"}}, ["notificationOptions.notifyEmail"]),
        ({"notificationOptions": {"notifyPhone": None}}, ["notificationOptions.notifyPhone"]),
        ({"firstName": None, "email": "nobody"}, ["firstName", "email"]),
    ],
)
def test_a_wrong_value_is_refused_by_its_documented_name(
    caller: Caller, change: dict[str, Any], fields: list[str]
) -> None:
    assert_refused(caller.send(MINIMAL | change), *fields)


def test_a_body_without_the_required_keys_names_both(caller: Caller) -> None:
    assert_refused(caller.send({}), "externalId", "firstName")


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", '"text"', "null", "[[", b"\xff\xfe", json.dumps(MINIMAL | {"lastName": "a\x00b"}), "{" * 99],
)
def test_a_body_that_is_no_object_is_refused(caller: Caller, body: Any) -> None:
    response = caller.send(body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "VALIDATION_ERROR"
    assert Customer.objects.count() == 0


def test_a_body_over_one_megabyte_is_refused(caller: Caller) -> None:
    assert_refused(caller.send(MINIMAL | {"lastName": "x" * 1024 * 1024}))


def test_an_unknown_external_id_is_404_in_the_documented_shape(caller: Caller) -> None:
    response = caller.get("nobody")
    assert response.status_code == 404
    assert response.json() == {"error": {"code": "NOT_FOUND", "message": "Customer not found."}}


def test_a_nul_in_the_address_is_refused(caller: Caller) -> None:
    assert caller.get("a\x00b").status_code == 400


def test_a_method_that_is_not_documented_is_refused_in_the_documented_shape(caller: Caller) -> None:
    for path in ("/customers/add-update", "/customers/CUST-1"):
        response = caller.client.delete(path, headers=caller.headers)
        assert (response.status_code, response.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")


# The client


def session(connection: Connection) -> Session:
    return Cheqpay().session(connection, client=loopback.client())


@pytest.fixture
def outward(
    api_key: str, merchant: Connection, connect: Callable[..., Connection], other_organization: Organization
) -> Connection:
    """A connection of another organization to the hub's own mirror."""
    return connect(
        "cheqpay",
        organization=other_organization,
        account="M-1001",
        direction=Connection.Direction.PUSH,
        base_url="http://testserver",
        credentials={"api_key": api_key},
    )


def make(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[values], actor=ACTOR)[0]


def outgoing(connection: Connection, customer: Customer, *, remote_id: str | None = None, **only: Any) -> Outgoing:
    uid = uuid7()
    document = Cheqpay().document(customer, connection=connection, uid=uid, fields=only.get("fields"))
    return Outgoing(uid=uid, remote_id=remote_id, key=uuid7(), document=json.loads(json.dumps(document)))


def test_what_leaves_through_the_client_arrives_through_the_mirror(
    outward: Connection, organization: Organization, other_organization: Organization
) -> None:
    cheqpay = Cheqpay()
    sent = {
        "name": "Ada Lovelace",
        "first_name": "Ada",
        "last_name": "Lovelace",
        "email": "ada@example.com",
        "phone": "+44 20 7946 0000",
        "is_active": False,
        "notify_email": True,
        "notify_phone": False,
    }
    assert set(sent) == cheqpay.fields
    customer = make(other_organization, **sent)
    out = outgoing(outward, customer)
    record = cheqpay.create(session(outward), outward, out)
    assert record.remote_id == str(out.uid)
    assert record.values == sent
    assert record.created_at is not None
    arrived = Customer.objects.get(organization=organization)
    assert {name: getattr(arrived, name) for name in sent} == sent
    # A repeat of the same create changes nothing.
    assert cheqpay.create(session(outward), outward, out).values == sent
    assert cheqpay.fetch(session(outward), outward, str(out.uid)) == record
    arrived.refresh_from_db()
    assert arrived.version == 1


def test_an_update_carries_only_what_moved(
    outward: Connection, organization: Organization, other_organization: Organization
) -> None:
    cheqpay = Cheqpay()
    customer = make(other_organization, name="Ada King Lovelace", email="ada@example.com")
    created = cheqpay.create(session(outward), outward, outgoing(outward, customer))
    customer = editing.update(
        organization=other_organization,
        values={customer.id: {"name": "Ada King", "email": "", "notify_phone": True}},
        actor=ACTOR,
    )[customer.id].customer
    out = outgoing(outward, customer, remote_id=created.remote_id, fields=frozenset({"name", "email"}))
    assert {**out.document, "externalId": ""} == {
        "externalId": "",
        "firstName": "Ada",
        "lastName": "King",
        "email": None,
    }
    record = cheqpay.update(session(outward), outward, out)
    assert record.remote_id == created.remote_id
    arrived = Customer.objects.get(organization=organization)
    assert (arrived.name, arrived.email, arrived.notify_phone) == ("Ada King", "", False)
    only_email = outgoing(outward, customer, remote_id=created.remote_id, fields=frozenset({"email"}))
    assert set(only_email.document) == {"externalId", "firstName", "email"}
    cheqpay.update(session(outward), outward, only_email)
    arrived.refresh_from_db()
    assert arrived.name == "Ada King"


def test_a_company_name_of_one_word_goes_whole_into_the_first_name(
    outward: Connection, other_organization: Organization
) -> None:
    document = outgoing(outward, make(other_organization, name="Acme")).document
    assert document["firstName"] == "Acme"
    assert "lastName" not in document


def test_parts_that_do_not_make_up_the_name_give_way_to_it(
    outward: Connection, other_organization: Organization
) -> None:
    customer = make(other_organization, name="Augusta Ada King", first_name="Ada", last_name="Lovelace")
    document = outgoing(outward, customer).document
    assert (document["firstName"], document["lastName"]) == ("Augusta Ada", "King")


@pytest.mark.parametrize(("field", "value"), [("email", "nobody"), ("phone", "none")])
def test_what_cheqpay_would_refuse_is_told_before_it_is_sent(
    outward: Connection, other_organization: Organization, field: str, value: str
) -> None:
    customer = make(other_organization, name="Ada", **{field: value})
    with pytest.raises(Rejected) as caught:
        outgoing(outward, customer)
    assert caught.value.field == field
    outgoing(outward, customer, fields=frozenset({"name"}))


def test_a_refusal_names_the_customers_field(outward: Connection, other_organization: Organization) -> None:
    out = outgoing(outward, make(other_organization, name="Ada"))
    bad = Outgoing(uid=out.uid, remote_id=None, key=out.key, document={**out.document, "phoneNumber": "x"})
    with pytest.raises(Rejected) as caught:
        Cheqpay().create(session(outward), outward, bad)
    assert (caught.value.field, caught.value.status, caught.value.code) == ("phone", 400, "VALIDATION_ERROR")
    assert "phone number" in caught.value.message


def test_wrong_credentials_pause_the_connection_and_an_unknown_record_is_gone(outward: Connection) -> None:
    with pytest.raises(Gone):
        Cheqpay().fetch(session(outward), outward, "nobody/at all")
    outward.account = "M-9999"
    with pytest.raises(ConnectionUnusable):
        Cheqpay().fetch(session(outward), outward, "nobody")


def answering(status: int, body: Any) -> Session:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, json=body))
    return Session(base_url="https://cheqpay.example", client=httpx2.Client(transport=transport))


def test_an_answer_that_is_not_understood_never_loses_the_record(
    outward: Connection, other_organization: Organization
) -> None:
    cheqpay = Cheqpay()
    out = outgoing(outward, make(other_organization, name="Ada"))
    with pytest.raises(OutcomeUnknown):
        cheqpay.create(answering(200, {"message": "stored"}), outward, out)
    with pytest.raises(OutcomeUnknown):
        cheqpay.create(answering(502, {}), outward, out)
    with pytest.raises(ConnectionUnusable):
        cheqpay.create(answering(404, {}), outward, out)
    strange = {"externalId": str(out.uid), "firstName": 7}
    record = cheqpay.create(answering(200, strange), outward, out)
    assert (record.remote_id, record.values, record.document) == (str(out.uid), {}, strange)
    with pytest.raises(RetryLater):
        cheqpay.fetch(answering(200, {"externalId": "another"}), outward, "CUST-123")
    with pytest.raises(Rejected):
        cheqpay.fetch(answering(200, strange), outward, str(out.uid))


def test_the_documented_answer_is_read(outward: Connection) -> None:
    record = Cheqpay().fetch(answering(200, example("add-update.response.json")), outward, "CUST-123")
    assert record.values == {
        "name": "John Doe",
        "first_name": "John",
        "last_name": "Doe",
        "email": "john.doe@example.com",
        "phone": "+1234567890",
        "is_active": True,
    }
    assert record.created_at is not None
    assert record.created_at.isoformat() == "2024-03-20T10:00:00+00:00"


def test_the_documented_refusal_is_read(outward: Connection, other_organization: Organization) -> None:
    out = outgoing(outward, make(other_organization, name="Ada"))
    with pytest.raises(Rejected, match="Invalid request parameters") as caught:
        Cheqpay().create(answering(400, example("error.response.json")), outward, out)
    assert (caught.value.message, caught.value.field) == ("Amount must be positive", "")


def test_the_key_is_in_no_text_of_the_session(outward: Connection, api_key: str) -> None:
    assert api_key not in repr(session(outward))
