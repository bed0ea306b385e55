"""The Links mirror as documented, and the client against it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.exceptions import Gone, Rejected
from connectors.inbound import totals
from connectors.models import Connection, CustomerLink
from connectors.provider import Outgoing
from connectors.providers import PROVIDERS
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, Organization
from hub.wsgi import application

WIRE = Path(__file__).parent.parent / "wire" / "links"
ACTOR = Actor(kind="user", name="Tester")
ONE, MANY = "/api/v1/unified/customer", "/api/v1/unified/customers"


def example(name: str) -> Any:
    return json.loads((WIRE / f"{name}.json").read_text())


@pytest.fixture
def call(api: Client, api_key: str) -> Callable[..., Any]:
    def go(method: str, path: str, body: Any = None, key: str = api_key, **headers: str) -> Any:
        data = body if isinstance(body, bytes | str) else json.dumps(body) if body is not None else b""
        return api.generic(
            method, path, data, content_type="application/json", headers={"Authorization": f"Bearer {key}", **headers}
        )

    return go


def same_types(documented: Any, answered: Any) -> None:
    assert answered.keys() == documented.keys()
    for key, value in documented.items():
        assert answered[key] is None or type(answered[key]) is type(value), key


def test_the_documented_create_is_answered_with_every_documented_key(call: Callable[..., Any]) -> None:
    answer = call("POST", ONE, example("create.request"))
    assert answer.status_code == 201
    data = answer.json()["data"]
    same_types(example("create.response")["data"], data)
    assert (data["email"], data["name"]) == ("customer@example.com", "Acme Corp")
    assert data["id"].startswith("cust_")
    assert (data["source_system"], data["is_active"], data["local_was_deleted"]) == (None, True, False)
    assert answer["Request-Id"].startswith("req_")


def test_the_documented_update_changes_what_it_names_and_null_clears(call: Callable[..., Any]) -> None:
    full = {**example("create.response")["data"], "phone": "+123456789"}
    id_ = call("POST", ONE, full).json()["data"]["id"]
    assert id_ != full["id"], "read-only keys are ignored"
    answer = call("PUT", f"{ONE}/{id_}", example("update.request"))
    assert answer.status_code == 200
    data = answer.json()["data"]
    same_types(example("update.response")["data"], data)
    assert (data["phone"], data["address_country"]) == ("+123456789", "USA")
    data = call("PUT", f"{ONE}/{id_}/", {**example("update.request"), "phone": None}).json()["data"]
    assert (data["phone"], data["address_country"]) == (None, "USA")
    assert call("GET", f"{ONE}/{id_}").json()["data"] == data


def test_a_round_trip_of_the_whole_answer_is_accepted(call: Callable[..., Any]) -> None:
    data = call("POST", ONE, example("create.request")).json()["data"]
    answer = call("PUT", f"{ONE}/{data['id']}", data)
    assert answer.status_code == 200
    assert answer.json()["data"] == data


def test_the_source_is_the_leading_link(
    call: Callable[..., Any], organization: Organization, connect: Callable[..., Connection]
) -> None:
    [customer] = editing.create(
        organization=organization, values=[{"name": "Acme", "email": "a@example.com"}], actor=ACTOR
    )
    shop = connect("cheqpay", direction=Connection.Direction.PUSH)
    CustomerLink.objects.create(
        customer=customer,
        connection=shop,
        remote_id="sf_98765",
        remote_data={"custom_field": "value"},
        is_primary=True,
        pushed_version=1,
        needed_version=2,
        created_at=customer.created_at,
        updated_at=customer.created_at,
    )
    data = call("GET", f"{ONE}/{customer.public_id}").json()["data"]
    for key, value in example("create.response")["data"].items():
        if key.startswith(("source_", "external_", "supporting_")):
            assert type(data[key]) is type(value), key
    assert (data["source_system"], data["source_id"]) == ("cheqpay", "sf_98765")
    assert data["external_system_config_id"] == shop.public_id
    assert data["external_system_data"] == {"custom_field": "value"}
    assert data["local_was_updated"] is True
    path = data["source_system_img_url"].removeprefix("http://testserver")
    logo = Client().get(path)
    assert b"".join(logo).startswith(b"<svg")
    logo.close()


def test_a_create_answers_what_a_read_answers_next(
    call: Callable[..., Any], connect: Callable[..., Connection]
) -> None:
    connect("links", direction=Connection.Direction.PUSH, create_policy=Connection.CreatePolicy.AUTOMATIC)
    data = call("POST", ONE, example("create.request")).json()["data"]
    assert (data["source_system"], data["local_was_updated"]) == ("links", True)
    assert call("GET", f"{ONE}/{data['id']}").json()["data"] == data


def test_whoever_reads_on_until_the_last_page_reads_all(
    call: Callable[..., Any], organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the total is estimated, and wrongly: nothing was analysed since the customers came."""
    monkeypatch.setattr(totals, "COUNTED", 3)
    editing.create(organization=organization, values=[{"name": f"C {n}"} for n in range(25)], actor=ACTOR)
    read, page, last = [], 1, 1
    while page <= last:
        answer = call("GET", f"{MANY}?page={page}&limit=10").json()
        read += [one["id"] for one in answer["data"]]
        page, last = page + 1, answer["totalPages"]
    assert len(set(read)) == len(read) == 25
    assert answer["totalResults"] == 25


def test_the_list_has_pages_and_totals(call: Callable[..., Any], organization: Organization) -> None:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(25)]
    editing.create(organization=organization, values=values, actor=ACTOR)
    first = call("GET", MANY).json()
    assert first.keys() == example("list.response").keys()
    assert (first["page"], first["limit"], first["totalPages"], first["totalResults"]) == (1, 10, 3, 25)
    assert len(first["data"]) == 10
    seen = [row["id"] for page in (1, 2, 3) for row in call("GET", f"{MANY}/?page={page}&limit=10").json()["data"]]
    assert len(set(seen)) == 25
    past = call("GET", f"{MANY}?page=9")
    assert (past.status_code, past.json()["data"]) == (200, [])


@pytest.mark.parametrize("query", ["page=0", "page=-1", "page=x", "limit=0", "limit=101", "limit=1.5", "page=%00"])
def test_a_wrong_page_is_refused(call: Callable[..., Any], query: str) -> None:
    answer = call("GET", f"{MANY}?{query}")
    assert answer.status_code == 400
    assert answer.json().keys() == {"message", "errors"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"email": None}, "email"),
        ({"name": None}, "name"),
        ({"email": "not-an-address"}, "email"),
        ({"email": 5}, "email"),
        ({"name": ["a"]}, "name"),
        ({"name": 5}, "name"),
        ({"phone": True}, "phone"),
        ({"name": "x" * 256}, "name"),
        ({"phone": "1" * 65}, "phone"),
        ({"address_city": {"a": 1}}, "address_city"),
    ],
)
def test_wrong_values_are_refused_by_name_and_nothing_is_stored(
    call: Callable[..., Any], change: dict[str, Any], field: str
) -> None:
    answer = call("POST", ONE, {**example("create.request"), **change})
    assert answer.status_code == 400
    assert list(answer.json()["errors"]) == [field]
    assert not Customer.objects.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"email": "a@example.com", "name": "a\\u0000b"}',
        b'{"email": "a@example.com", "name": "A", "other": "a\\u0000b"}',
        b'{"email": "a@example.com", "name": NaN}',
        b"\xff\xfe",
        b'{"name": "' + b"x" * 1_100_000 + b'"}',
        b"[" * 5000 + b"]" * 5000,
    ],
)
def test_a_malformed_body_is_refused_in_the_same_shape(call: Callable[..., Any], body: bytes) -> None:
    answer = call("POST", ONE, body)
    assert answer.status_code == 400
    assert answer.json().keys() == {"message", "errors"}
    assert not Customer.objects.exists()


def test_a_host_that_is_not_ours_is_refused_before_anything_is_stored(call: Callable[..., Any]) -> None:
    answer = call("POST", ONE, example("create.request"), Host="other.example")
    assert (answer.status_code, answer.json().keys()) == (400, {"message", "errors"})
    assert not Customer.objects.exists()


def test_a_missing_or_wrong_key_is_401(call: Callable[..., Any], api: Client, api_key: str) -> None:
    assert api.get(MANY).status_code == 401
    for key in ("", "wrong", api_key[:-1], "\x00"):
        answer = call("GET", MANY, key=key)
        assert answer.status_code == 401
        assert answer.json().keys() == {"message", "errors"}
        assert answer["WWW-Authenticate"] == "Bearer"


def test_an_unknown_and_a_foreign_id_are_the_same_404(
    call: Callable[..., Any], other_organization: Organization
) -> None:
    [foreign] = editing.create(organization=other_organization, values=[{"name": "Secret"}], actor=ACTOR)
    answers = [
        call(method, f"{ONE}/{id_}", example("update.request") if method == "PUT" else None)
        for method in ("GET", "PUT")
        for id_ in (foreign.public_id, "cust_12345", "cust_" + "0" * 26, str(foreign.pk), "x%00y")
    ]
    assert {answer.status_code for answer in answers} <= {404, 400}
    assert len({answer.content for answer in answers if answer.status_code == 404}) == 1
    assert Customer.objects.get().name == "Secret"


def test_the_id_of_a_merged_customer_answers_with_its_survivor(
    call: Callable[..., Any], organization: Organization
) -> None:
    survivor, merged = editing.create(
        organization=organization,
        values=[{"name": "Survivor", "email": "a@example.com"}, {"name": "Merged"}],
        actor=ACTOR,
    )
    Customer.objects.filter(pk=merged.pk).update(merged_into=survivor)
    assert call("GET", f"{ONE}/{merged.public_id}").json()["data"]["id"] == survivor.public_id


def test_a_method_that_is_not_documented_is_405_in_the_same_shape(call: Callable[..., Any]) -> None:
    answer = call("POST", MANY, {})
    assert (answer.status_code, answer.json().keys()) == (405, {"message", "errors"})


def test_statements_per_request_do_not_grow_with_the_page(call: Callable[..., Any], organization: Organization) -> None:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(60)]
    editing.create(organization=organization, values=values, actor=ACTOR)
    call("GET", MANY)
    counts = []
    for limit in (2, 50):
        with CaptureQueriesContext(database) as queries:
            call("GET", f"{MANY}?limit={limit}")
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 4


@pytest.fixture
def loop(transactional_db: None, api_key: str, connect: Callable[..., Connection]) -> tuple[Connection, Any]:
    """The client, pointed at the hub's own mirror without a network between."""
    connection = connect(
        "links",
        direction=Connection.Direction.PUSH,
        base_url="http://testserver/api/v1",
        credentials={"api_key": api_key},
    )
    client = httpx2.Client(transport=httpx2.WSGITransport(app=application))
    return connection, PROVIDERS["links"].session(connection, client=client)


def test_what_the_client_sends_arrives_as_it_left(
    loop: tuple[Connection, Any], organization: Organization, other_organization: Organization
) -> None:
    connection, session = loop
    links = PROVIDERS["links"]
    values = {name: f"some {name}" for name in sorted(links.fields) if name not in ("email", "phone")}
    values |= {"email": "a@example.com", "phone": "+4930123456", "address_postal_code": "0123"}
    values |= {"shipping_address_postal_code": "4567"}
    [left] = editing.create(organization=other_organization, values=[values], actor=ACTOR)
    document = links.document(left, connection=connection, uid=uuid7(), fields=None)
    record = links.create(session, connection, Outgoing(uid=uuid7(), remote_id=None, key=uuid7(), document=document))
    arrived = Customer.objects.get(organization=organization)
    assert {name: getattr(arrived, name) for name in links.fields} == {
        name: getattr(left, name) for name in links.fields
    }
    assert record.remote_id == arrived.public_id
    assert {**record.values} == {name: getattr(left, name) for name in links.fields}

    left.phone, left.address_line2 = "", "changed"
    document = links.document(left, connection=connection, uid=uuid7(), fields=frozenset({"phone", "address_line2"}))
    assert document.keys() == {"email", "name", "phone", "address_line2"}
    links.update(session, connection, Outgoing(uid=uuid7(), remote_id=record.remote_id, key=uuid7(), document=document))
    arrived.refresh_from_db()
    assert (arrived.phone, arrived.address_line2, arrived.address_city) == ("", "changed", "some address_city")

    assert links.fetch(session, connection, arrived.public_id).values["phone"] == ""
    page = links.page(session, connection, cursor=None, since=None)
    assert ([r.remote_id for r in page.records if not isinstance(r, Rejected)], page.next) == (
        [arrived.public_id],
        None,
    )
    with pytest.raises(Gone):
        links.fetch(session, connection, "cust_" + "0" * 26)


@pytest.mark.parametrize("email", ["", "not-an-address"])
def test_a_customer_without_an_address_is_refused_before_sending(
    loop: tuple[Connection, Any], other_organization: Organization, email: str
) -> None:
    [customer] = editing.create(organization=other_organization, values=[{"name": "A", "email": email}], actor=ACTOR)
    with pytest.raises(Rejected) as caught:
        PROVIDERS["links"].document(customer, connection=loop[0], uid=uuid7(), fields=None)
    assert caught.value.field == "email"


def test_an_unexpected_failure_reveals_nothing_but_its_request_id(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("django.db.models.query.QuerySet.count", fail)
    answer = call("GET", MANY)
    assert answer.status_code == 500
    assert answer.json().keys() == {"message", "errors"}
    assert "secret" not in answer.content.decode()
    assert answer["Request-Id"].startswith("req_")
