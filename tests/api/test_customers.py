"""Customers at Links' addresses: versions, filters, cursors, and the operations that the hub adds."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest
from django.db import connection as database
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.api import cursors
from connectors.api.filters import FILTERS
from connectors.models import ApiKey, Connection, CustomerLink
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization

ACTOR = Actor(kind="user", name="Tester")
UNIFIED = "/api/v1/unified"
ONE, MANY = f"{UNIFIED}/customer", f"{UNIFIED}/customers"
Call = Callable[..., Any]


@pytest.fixture
def call(api: Client, api_key: str) -> Call:
    def go(method: str, path: str, body: Any = None, key: str = api_key, **headers: str) -> Any:
        data = json.dumps(body) if body is not None else ""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return api.generic(
            method, path, data, content_type="application/json", headers={"Authorization": f"Bearer {key}", **headers}
        )

    return go


@pytest.fixture
def ada(organization: Organization) -> Customer:
    values = {"name": "Ada Lovelace", "email": "ada@example.com", "phone": "+4930123456"}
    return editing.create(organization=organization, values=[values], actor=ACTOR)[0]


def make(organization: Organization, *values: dict[str, Any], at: datetime | None = None) -> list[Customer]:
    return editing.create(organization=organization, values=values, actor=ACTOR, at=at)


def link(customer: Customer, connection: Connection, remote_id: str, **fields: Any) -> CustomerLink:
    now = timezone.now()
    return CustomerLink.objects.create(
        customer=customer, connection=connection, remote_id=remote_id, created_at=now, updated_at=now, **fields
    )


def problem(answer: Any, status: int, code: str, *pointers: str) -> dict[str, Any]:
    assert (answer.status_code, answer["Content-Type"]) == (status, "application/problem+json"), answer.content
    body: dict[str, Any] = answer.json()
    assert (body["code"], [error["pointer"] for error in body["errors"]]) == (code, list(pointers))
    return body


def refused_by_links(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.content
    body: dict[str, Any] = answer.json()
    assert body.keys() == {"message", "errors"}
    return body


# The list


@pytest.fixture
def people(organization: Organization) -> list[Customer]:
    [old] = make(
        organization, {"name": "Alan Turing", "email": "alan@example.com"}, at=datetime(2020, 1, 1, tzinfo=UTC)
    )
    return [
        old,
        *make(
            organization,
            {"name": "Ada Lovelace", "email": "Ada@Example.com", "phone": "030 / 12 34 56"},
            {"name": "Ádám Kovács", "phone": "+4930123456", "is_active": False},
            {"name": "Grace Hopper", "email": "grace@example.com"},
        ),
    ]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", "Alan Ada Ádám Grace"),
        ("email=ADA@example.com", "Ada"),
        ("email=nobody@example.com", ""),
        ("phone=%2B49 30 123456", "Ada Ádám"),
        ("phone=+4930123456", "Ada Ádám"),
        ("phone=030-123456", "Ada Ádám"),
        ("name=ad", "Ada Ádám"),
        ("name=ADA LOVE", "Ada"),
        ("name=love", ""),
        ("name=a%25", ""),
        ("q=ada@example.COM", "Ada"),
        ("q=030/123456", "Ada Ádám"),
        ("q=al", "Alan"),
        ("q=lovelace", ""),
        ("q=%CC%81", ""),
        ("updated_since=2021-01-01T00:00:00Z", "Ada Ádám Grace"),
        ("updated_since=2019-12-31T23:00:00-01:00", "Alan Ada Ádám Grace"),
        ("updated_since=2020-01-01T02:00:00+02:00", "Alan Ada Ádám Grace"),
        ("updated_since=2020-01-01T02:00:01%2B02:00", "Ada Ádám Grace"),
        ("is_active=false", "Ádám"),
        ("is_active=true&phone=030123456", "Ada"),
        ("name=ad&email=ada@example.com&is_active=true&updated_since=2021-01-01T00:00:00Z", "Ada"),
        ("name=ad&email=grace@example.com", ""),
        ("unknown=1", "Alan Ada Ádám Grace"),
    ],
)
@pytest.mark.parametrize("cursor", ["", "cursor=&"])
def test_filters_narrow_the_list_together(
    call: Call, organization: Organization, people: list[Customer], query: str, names: str, cursor: str
) -> None:
    Organization.objects.update(country="DE")
    organization.country = "DE"
    editing.update(organization=organization, values={people[1].pk: {"phone": "030/123456"}}, actor=ACTOR)
    answer = call("GET", f"{MANY}?{cursor}{query}")
    assert answer.status_code == 200, answer.content
    assert [row["name"].split()[0] for row in answer.json()["data"]] == names.split()
    if not cursor:
        assert answer.json()["totalResults"] == len(names.split())


@pytest.mark.parametrize(
    "query",
    [
        "email=",
        "phone=none",
        "name=",
        "name=%CC%81",
        "q=",
        "q=a%07b",
        "updated_since=yesterday",
        "updated_since=2020-01-01T00:00:00",
        "updated_since=0001-01-01T00:00:00%2B14:00",
        "is_active=perhaps",
        "source_id=" + "x" * 256,
    ],
)
def test_a_filter_that_cannot_be_understood_is_refused_by_name(call: Call, query: str) -> None:
    body = refused_by_links(call("GET", f"{MANY}?{query}"), 400)
    assert list(body["errors"]) == [query.partition("=")[0]]


def test_customers_are_found_by_what_any_system_calls_them(
    call: Call,
    people: list[Customer],
    connect: Callable[..., Connection],
    other_organization: Organization,
) -> None:
    alan, ada, adam, _ = people
    shop, books = connect("cheqpay"), connect("rootfi")
    link(alan, shop, "A", is_primary=True)
    link(alan, books, "1", is_primary=False)
    link(ada, books, "A", is_primary=True)
    link(adam, books, "2", deleted_at=timezone.now())
    [foreign] = make(other_organization, {"name": "Foreign"})
    link(foreign, connect("cheqpay", organization=other_organization), "A")

    def found(query: str) -> list[str]:
        return [row["name"].split()[0] for row in call("GET", f"{MANY}?{query}").json()["data"]]

    assert found("source_system=cheqpay") == ["Alan"]
    assert found("source_system=rootfi") == ["Alan", "Ada"], "the leading link is not the only one that counts"
    assert found("source_id=A") == ["Alan", "Ada"]
    assert found("source_system=rootfi&source_id=A") == ["Ada"]
    assert found("source_id=2") == [], "what was deleted there is known there no more"
    assert found("source_system=commenda") == found("source_id=a") == []


def test_archived_customers_are_listed_on_demand_and_merged_ones_never(
    call: Call, organization: Organization, people: list[Customer]
) -> None:
    _, ada, adam, grace = people
    editing.archive(organization=organization, ids=[grace.pk], actor=ACTOR)
    editing.merge(organization=organization, survivor=ada.pk, loser=adam.pk, values={}, actor=ACTOR)

    def found(query: str) -> list[str]:
        return [row["name"].split()[0] for row in call("GET", f"{MANY}?{query}").json()["data"]]

    assert found("") == ["Alan", "Ada"]
    assert call("GET", MANY).json()["totalResults"] == 2
    assert found("include_archived=true") == ["Alan", "Ada", "Grace"]
    assert found(f"q={grace.public_id}") == []
    assert found(f"q={grace.public_id}&include_archived=1") == ["Grace"]
    assert found(f"q={adam.public_id}") == found(f"q={ada.public_id}") == ["Ada"]


def test_the_id_of_another_organization_finds_nothing(
    call: Call, people: list[Customer], other_organization: Organization
) -> None:
    [foreign] = make(other_organization, {"name": "Ada Foreign", "email": "ada@example.com"})
    assert call("GET", f"{MANY}?q={foreign.public_id}").json()["data"] == []
    assert [row["name"] for row in call("GET", f"{MANY}?q=ada@example.com").json()["data"]] == ["Ada Lovelace"]


def test_the_answer_without_a_cursor_has_the_documented_keys_only(call: Call, people: list[Customer]) -> None:
    keys = ["data", "page", "limit", "totalPages", "totalResults"]
    assert list(call("GET", MANY).json()) == list(call("GET", f"{MANY}?q=ada&limit=2").json()) == keys


def pages(call: Call, query: str) -> Iterator[list[str]]:
    cursor: str | None = ""
    while cursor is not None:
        body = call("GET", f"{MANY}?{query}&cursor={cursor}").json()
        yield [row["id"] for row in body["data"]]
        cursor = body["next_cursor"]


def test_a_cursor_leads_through_all_pages_at_the_same_cost(call: Call, organization: Organization) -> None:
    ids = [customer.public_id for customer in make(organization, *({"name": f"Example {n}"} for n in range(21)))]
    call("GET", MANY)
    counts, read = [], []
    steps = pages(call, "limit=7&name=example")
    while True:
        with CaptureQueriesContext(database) as queries:
            page = next(steps, None)
        if page is None:
            break
        read += page
        counts.append(len(queries))
        assert not any("COUNT(" in query["sql"] or "OFFSET" in query["sql"] for query in queries)
    assert read == ids
    assert counts == [2, 2, 2]
    body = call("GET", f"{MANY}?cursor=&limit=21").json()
    assert {name: body[name] for name in body if name != "data"} == {
        "page": None,
        "limit": 21,
        "totalPages": None,
        "totalResults": None,
        "next_cursor": None,
    }


def test_a_cursor_belongs_to_its_list(call: Call, organization: Organization, other_organization: Organization) -> None:
    make(organization, *({"name": f"Example {n}"} for n in range(3)))
    make(other_organization, *({"name": f"Example {n}"} for n in range(3)))
    cursor = call("GET", f"{MANY}?cursor=&limit=1&name=ex").json()["next_cursor"]
    assert len(call("GET", f"{MANY}?cursor={cursor}&limit=2&name=ex").json()["data"]) == 2
    _, secret = ApiKey.issue(organization=other_organization, name="theirs")
    changed = [cursor[:n] + ("A" if cursor[n] != "A" else "B") + cursor[n + 1 :] for n in range(len(cursor))]
    for wrong in (*changed, cursor[:-1], cursor + "A", cursor + "=", "garbled", "%00", "é", " ", "A" * 2000):
        body = refused_by_links(call("GET", f"{MANY}?cursor={wrong}&name=ex"), 400)
        assert wrong == "%00" or "next_cursor" in body["errors"]["cursor"][0]
    of = "customers" + json.dumps([[name, "ex" if name == "name" else None] for name in FILTERS], separators=(",", ":"))
    short = cursors.write(b"short", of=of, organization_id=organization.pk)
    refused_by_links(call("GET", f"{MANY}?cursor={short}&name=ex"), 400)
    refused_by_links(call("GET", f"{MANY}?cursor={cursor}&name=exa"), 400)
    refused_by_links(call("GET", f"{MANY}?cursor={cursor}"), 400)
    refused_by_links(call("GET", f"{MANY}?cursor={cursor}&name=ex", key=secret), 400)
    assert list(refused_by_links(call("GET", f"{MANY}?cursor=&page=2"), 400)["errors"]) == ["page"]


@pytest.mark.django_db(transaction=True)
def test_pages_neither_skip_nor_repeat_while_others_write(
    call: Call, organization: Organization, connect: Callable[..., Connection]
) -> None:
    staying = {c.public_id for c in make(organization, *({"name": f"Staying {n}"} for n in range(120)))}
    leaving = make(organization, *({"name": f"Leaving {n}"} for n in range(60)))
    staying |= {c.public_id for c in make(organization, *({"name": f"Staying {n}"} for n in range(120)))}
    ids = list(Customer.objects.filter(name__startswith="Staying").values_list("pk", flat=True))
    done, failures = threading.Event(), []

    def work(write: Callable[[int], object]) -> None:
        try:
            turn = 0
            while not done.is_set() and turn < 60:
                write(turn)
                turn += 1
        except Exception as error:
            failures.append(error)
        finally:
            connections.close_all()

    def edit(turn: int) -> None:
        values = {id_: {"phone": f"+49301234{turn:02}"} for id_ in ids[turn::60]}
        editing.update(organization=organization, values=values, actor=ACTOR)

    writers = [
        threading.Thread(target=work, args=(write,))
        for write in (
            edit,
            lambda turn: make(organization, {"name": f"New {turn}"}),
            lambda turn: editing.archive(organization=organization, ids=[leaving[turn].pk], actor=ACTOR),
        )
    ]
    for writer in writers:
        writer.start()
    try:
        for _ in range(3):
            read = [id_ for page in pages(call, "limit=7") for id_ in page]
            assert len(read) == len(set(read))
            assert staying <= set(read)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert failures == []
    assert Customer.objects.filter(name__startswith="New").exists()


# Versions on what Links documents


def test_every_documented_answer_has_the_version(call: Call, organization: Organization) -> None:
    created = call("POST", ONE, {"name": "Ada", "email": "ada@example.com"})
    path = f"{ONE}/{created.json()['data']['id']}"
    assert created["ETag"] == call("GET", path)["ETag"] == '"v1"'
    changed = call("PUT", path, {"name": "Ada L", "email": "ada@example.com"})
    assert changed["ETag"] == call("GET", path)["ETag"] == '"v2"'
    assert call("PUT", path, {"name": "Ada L", "email": "ada@example.com"})["ETag"] == '"v2"'


@pytest.mark.parametrize("tag", ['"v1"', 'W/"v1"', '"v7", "v1"', "*"])
def test_what_is_known_is_not_sent_again(call: Call, ada: Customer, tag: str) -> None:
    answer = call("GET", f"{ONE}/{ada.public_id}", If_None_Match=tag)
    assert (answer.status_code, answer.content, answer["ETag"]) == (304, b"", '"v1"')
    editing.update(organization=ada.organization, values={ada.pk: {"phone": ""}}, actor=ACTOR)
    answer = call("GET", f"{ONE}/{ada.public_id}", If_None_Match=tag)
    assert (answer.status_code, answer["ETag"]) == ((304, '"v2"') if tag == "*" else (200, '"v2"'))
    assert call("GET", f"{ONE}/{uuid7()}", If_None_Match=tag).status_code == 404


def test_a_documented_update_of_another_version_is_refused_in_links_shape(call: Call, ada: Customer) -> None:
    path, body = f"{ONE}/{ada.public_id}", {"name": "Changed", "email": "ada@example.com"}
    for tag in ('"v2"', '"v0"', "v1", "garbled", '"v1", "v2"'):
        answer = call("PUT", path, body, If_Match=tag)
        assert refused_by_links(answer, 412)["message"]
        assert "ETag" not in answer or answer["ETag"] == '"v1"'
    assert Customer.objects.get().name == "Ada Lovelace"
    assert call("PUT", path, body, If_Match='"v1"')["ETag"] == '"v2"'
    assert call("PUT", path, {**body, "name": "Again"}, If_Match="*")["ETag"] == '"v3"'
    refused_by_links(call("PUT", f"{ONE}/cust_12345", body, If_Match='"v1"'), 404)
    refused_by_links(call("PUT", path, {"name": "x"}, If_Match='"v3"'), 400)
    assert Customer.objects.get().version == 3


# PATCH


CHANGES: dict[str, Any] = {
    **{name: f"new {name}" for name in editing.TEXTS},
    "email": "new@example.com",
    "phone": "+4930999",
    "currency": "EUR",
    "notify_email": True,
    "notify_phone": True,
    "is_active": False,
    "custom_fields": {"tier": "gold", "tags": ["a", {"b": None}]},
}


@pytest.mark.parametrize("field", editing.EDITABLE)
def test_any_editable_field_can_be_patched_alone(call: Call, ada: Customer, field: str) -> None:
    answer = call("PATCH", f"{ONE}/{ada.public_id}", {field: CHANGES[field]})
    assert (answer.status_code, answer["ETag"]) == (200, '"v2"'), answer.content
    data = answer.json()["data"]
    assert data == call("GET", f"{ONE}/{ada.public_id}").json()["data"]
    if field in data:
        assert data[field] == CHANGES[field]
    stored = Customer.objects.get()
    assert getattr(stored, field) == CHANGES[field]
    change = CustomerChange.objects.get(version=2)
    assert (change.actor_kind, change.actor_name, field in change.changes) == ("api_key", "shop", True)


def test_null_empties_and_custom_fields_are_changed_by_name(call: Call, ada: Customer) -> None:
    path = f"{ONE}/{ada.public_id}"
    assert call("PATCH", path, {"email": None, "phone": "", "custom_fields": {"a": 1, "b": 2}}).status_code == 200
    stored = Customer.objects.get()
    assert (stored.email, stored.phone, stored.custom_fields) == ("", "", {"a": 1, "b": 2})
    assert call("PATCH", path, {"custom_fields": {"b": None, "c": [], "d": None}})["ETag"] == '"v3"'
    assert Customer.objects.get().custom_fields == {"a": 1, "c": []}
    assert call("PATCH", path, {"custom_fields": {"a": 1}})["ETag"] == '"v3"', "no change makes no version"
    assert call("PATCH", path, {})["ETag"] == '"v3"'


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"emial": "a@example.com"}, ["/emial"]),
        ({"name": "A", "version": 3}, ["/version"]),
        ({"email": "nonsense"}, ["/email"]),
        ({"email": 5, "phone": ["1"]}, ["/email", "/phone"]),
        ({"name": None}, ["/name"]),
        ({"name": " "}, ["/name"]),
        ({"name": "x" * 256}, ["/name"]),
        ({"is_active": None}, ["/is_active"]),
        ({"is_active": "true"}, ["/is_active"]),
        ({"custom_fields": None}, ["/custom_fields"]),
        ({"custom_fields": []}, ["/custom_fields"]),
        ({"custom_fields": {"a": 2**63}}, ["/custom_fields"]),
        ({"phone": "a\u0007"}, ["/phone"]),
    ],
)
def test_wrong_fields_are_pointed_to_and_nothing_is_stored(
    call: Call, ada: Customer, body: dict[str, Any], pointers: list[str]
) -> None:
    shown = problem(call("PATCH", f"{ONE}/{ada.public_id}", body), 422, "validation_failed", *pointers)
    assert all(error["message"] for error in shown["errors"])
    if "emial" in body:
        assert shown["errors"][0]["message"] == "There is no field emial. Did you mean email?"
    assert Customer.objects.get().version == 1


@pytest.mark.parametrize("body", ["", "[]", "{", '"text"', "\x00"])
def test_a_body_that_is_no_object_is_refused(call: Call, api: Client, api_key: str, ada: Customer, body: str) -> None:
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = api.generic("PATCH", f"{ONE}/{ada.public_id}", body, content_type="application/json", headers=headers)
    if body:
        problem(answer, 400, "malformed_request")
    else:
        assert answer["ETag"] == '"v1"'


def test_a_patch_of_another_version_is_refused_with_the_current_one(call: Call, ada: Customer) -> None:
    path = f"{ONE}/{ada.public_id}"
    answer = call("PATCH", path, {"name": "Other"}, If_Match='"v2"')
    assert problem(answer, 412, "version_conflict")["current_version"] == 1
    assert answer["ETag"] == '"v1"'
    problem(call("PATCH", path, {"name": "Other"}, If_Match="garbled"), 412, "version_conflict")
    assert Customer.objects.get().name == "Ada Lovelace"
    assert call("PATCH", path, {"name": "Other"}, If_Match='"v1"')["ETag"] == '"v2"'
    assert call("PATCH", path, {"name": "Again"}, If_Match="*")["ETag"] == '"v3"'


def test_an_unknown_query_name_is_refused_where_the_hub_documents(call: Call, ada: Customer) -> None:
    for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/restore")):
        answer = call(method, f"{ONE}/{ada.public_id}{path}?dry_run=1", {})
        problem(answer, 422, "validation_failed", "/dry_run")
    problem(call("POST", f"{ONE}/{ada.public_id}/restore", {"name": "x"}), 422, "validation_failed", "/name")
    assert Customer.objects.get().version == 1


@pytest.mark.parametrize(("method", "suffix"), [("PATCH", ""), ("DELETE", ""), ("POST", "/restore"), ("PUT", "upsert")])
def test_what_is_not_there_and_what_is_not_yours_answer_alike(
    call: Call,
    other_organization: Organization,
    connect: Callable[..., Connection],
    method: str,
    suffix: str,
) -> None:
    theirs = connect("cheqpay", organization=other_organization)
    [foreign] = make(other_organization, {"name": "Secret"})
    bodies = set()
    for id_ in (foreign.public_id, str(foreign.pk), "cust_12345", "cust_" + "0" * 26, str(uuid7())):
        path = f"{ONE}/{id_}{suffix}"
        if suffix == "upsert":
            path = f"{UNIFIED}/connections/{theirs.public_id if id_ == foreign.public_id else id_}/customers/A"
        answer = call(method, path, {"name": "x"} if method in ("PATCH", "PUT") else None)
        bodies.add(json.dumps({**problem(answer, 404, "not_found"), "request_id": ""}))
    assert len(bodies) == 1
    assert (Customer.objects.get().name, Customer.objects.get().version) == ("Secret", 1)


def test_the_id_of_a_merged_customer_changes_its_survivor(call: Call, ada: Customer) -> None:
    [loser] = make(ada.organization, {"name": "Ada L"})
    editing.merge(organization=ada.organization, survivor=ada.pk, loser=loser.pk, values={}, actor=ACTOR)
    answer = call("PATCH", f"{ONE}/{loser.public_id}", {"phone": "+4930777"}, If_Match='"v2"')
    assert (answer.json()["data"]["id"], answer["ETag"]) == (ada.public_id, '"v3"')
    assert call("DELETE", f"{ONE}/{loser.public_id}")["ETag"] == '"v4"'
    assert Customer.objects.get(pk=ada.pk).archived_at is not None


# DELETE and restore


def test_a_delete_archives_once_and_a_restore_brings_back(call: Call, ada: Customer) -> None:
    path = f"{ONE}/{ada.public_id}"
    problem(call("DELETE", path, If_Match='"v2"'), 412, "version_conflict")
    assert Customer.objects.get().archived_at is None
    for tag in ('"v1"', '"v1"', ""):
        answer = call("DELETE", path, **({"If_Match": tag} if tag else {}))
        assert (answer.status_code, answer.content, answer["ETag"]) == (204, b"", '"v2"')
    assert Customer.objects.get().archived_at is not None
    problem(call("POST", f"{path}/restore", If_Match='"v1"'), 412, "version_conflict")
    for _ in range(2):
        answer = call("POST", f"{path}/restore", If_Match='"v2"')
        assert (answer.status_code, answer["ETag"]) == (200, '"v3"')
        assert answer.json()["data"] == call("GET", path).json()["data"]
    assert Customer.objects.get().archived_at is None


def test_an_added_operation_needs_its_scope_and_answers_its_own_errors(
    call: Call, organization: Organization, ada: Customer, connect: Callable[..., Connection]
) -> None:
    _, reader = ApiKey.issue(organization=organization, name="reader", scopes=["customers:read"])
    by_source = f"{UNIFIED}/connections/{connect('cheqpay').public_id}/customers/A"
    for method, path in (
        ("PATCH", f"{ONE}/{ada.public_id}"),
        ("DELETE", f"{ONE}/{ada.public_id}"),
        ("POST", f"{ONE}/{ada.public_id}/restore"),
        ("PUT", by_source),
    ):
        problem(call(method, path, {"name": "x"}, key=reader), 403, "forbidden")
        problem(call(method, path, {"name": "x"}, key="wrong"), 401, "unauthorized")
    problem(call("GET", f"{ONE}/{ada.public_id}/restore"), 405, "method_not_allowed")
    problem(call("PATCH", by_source), 405, "method_not_allowed")
    refused_by_links(call("POST", f"{ONE}/{ada.public_id}"), 405)
    assert Customer.objects.get().version == 1


# Upsert by source id


def test_an_upsert_creates_then_changes_then_leaves(call: Call, connect: Callable[..., Connection]) -> None:
    path = f"{UNIFIED}/connections/{connect('cheqpay').public_id}/customers/A-1"
    created = call("PUT", path, {"first_name": "Ada", "last_name": "Lovelace", "custom_fields": {"a": 1}})
    assert (created.status_code, created["ETag"]) == (201, '"v1"')
    data = created.json()["data"]
    assert (data["name"], data["source_system"], data["source_id"]) == ("Ada Lovelace", "cheqpay", "A-1")
    assert call("GET", f"{ONE}/{data['id']}").json()["data"] == data
    changed = call("PUT", f"{path}/", {"phone": "+4930123456", "custom_fields": {"b": 2}}, If_Match='"v1"')
    assert (changed.status_code, changed["ETag"], changed.json()["data"]["id"]) == (200, '"v2"', data["id"])
    again = call("PUT", path, {"phone": "+4930123456"})
    assert (again.status_code, again["ETag"]) == (200, '"v2"')
    stored = Customer.objects.get()
    assert (stored.name, stored.phone, stored.custom_fields) == ("Ada Lovelace", "+4930123456", {"a": 1, "b": 2})
    problem(call("PUT", path, {"phone": ""}, If_Match='"v1"'), 412, "version_conflict")
    problem(call("PUT", f"{path}-new", {"name": "New"}, If_Match='"v1"'), 412, "version_conflict")
    assert Customer.objects.count() == 1


def test_an_upsert_of_a_new_one_needs_a_name(call: Call, connect: Callable[..., Connection]) -> None:
    path = f"{UNIFIED}/connections/{connect('cheqpay').public_id}/customers/A"
    shown = problem(call("PUT", path, {"email": "a@example.com"}), 422, "validation_failed", "/name")
    assert shown["errors"][0]["code"] == "required"
    problem(call("PUT", path, {"name": "A", "id": "B"}), 422, "validation_failed", "/id")
    problem(call("PUT", path.replace("/A", "/" + "A" * 256), {"name": "A"}), 422, "validation_failed", "/source_id")
    problem(call("PUT", path.replace("/A", "/A%07"), {"name": "A"}), 422, "validation_failed", "/source_id")
    assert not Customer.objects.exists()


@pytest.mark.parametrize("source_id", ["a/b", "a b", "ä?#%", "a//b", "customers", ".."])
def test_any_source_id_can_be_in_the_address(call: Call, connect: Callable[..., Connection], source_id: str) -> None:
    path = f"{UNIFIED}/connections/{connect('cheqpay').public_id}/customers/{quote(source_id, safe='')}"
    assert call("PUT", path, {"name": "A"}).status_code == 201
    assert CustomerLink.objects.get().remote_id == source_id
    assert call("PUT", path, {"name": "A"}).status_code == 200


def test_what_was_deleted_there_comes_back_with_an_upsert(
    call: Call, organization: Organization, connect: Callable[..., Connection], ada: Customer
) -> None:
    shop = connect("cheqpay")
    link(ada, shop, "A", is_primary=True, deleted_at=timezone.now())
    editing.archive(organization=organization, ids=[ada.pk], actor=ACTOR)
    answer = call("PUT", f"{UNIFIED}/connections/{shop.public_id}/customers/A", {"phone": "+4930777"})
    assert (answer.status_code, answer.json()["data"]["id"]) == (200, ada.public_id)
    stored = Customer.objects.get()
    assert (stored.phone, stored.archived_at) == ("+4930777", None)
    assert CustomerLink.objects.get().deleted_at is None
    assert answer["ETag"] == f'"v{stored.version}"'


def test_an_upsert_where_the_hub_sends_is_still_to_be_sent(
    call: Call, organization: Organization, connect: Callable[..., Connection]
) -> None:
    automatic = Connection.CreatePolicy.AUTOMATIC
    books = connect("links", direction=Connection.Direction.PUSH_AND_PULL, create_policy=automatic)
    other = connect("links", name="other", account="2", direction="push", create_policy=automatic)
    path = f"{UNIFIED}/connections/{books.public_id}/customers/B-1"
    assert call("PUT", path, {"name": "Ada", "email": "ada@example.com"}).status_code == 201
    mine, theirs = CustomerLink.objects.get(connection=books), CustomerLink.objects.get(connection=other)
    assert (mine.remote_id, mine.is_dirty, mine.is_primary) == ("B-1", False, True), "it came from there"
    assert (theirs.remote_id, theirs.is_dirty) == (None, True)
    change = CustomerChange.objects.get()
    assert "shop" in change.message
    customer = Customer.objects.get()
    editing.update(organization=organization, values={customer.pk: {"name": "Ada L"}}, actor=ACTOR)
    assert call("PUT", path, {"phone": "+4930777"}).status_code == 200
    mine.refresh_from_db()
    assert (mine.is_dirty, mine.needed_version) == (True, 3), "neither edit is taken for sent"
    assert CustomerChange.objects.get(version=3).actor_kind == "api_key"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("direction", [Connection.Direction.CALLS_US, Connection.Direction.PUSH_AND_PULL])
def test_parallel_upserts_of_one_new_id_make_one_customer(
    call: Call, connect: Callable[..., Connection], direction: Connection.Direction
) -> None:
    shop = connect("cheqpay", direction=direction)
    statuses: list[int] = []

    def upsert(number: int) -> None:
        for turn in range(4):
            path = f"{UNIFIED}/connections/{shop.public_id}/customers/A-{turn}"
            statuses.append(call("PUT", path, {"name": f"Caller {number}", "currency": f"{number}"}).status_code)
        connections.close_all()

    threads = [threading.Thread(target=upsert, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 28 + [201] * 4
    assert CustomerLink.objects.count() == Customer.objects.count() == 4
    assert set(Customer.objects.values_list("version", flat=True)) == {8}


# Statements


def test_statements_do_not_grow_with_the_links_of_a_customer(
    call: Call, ada: Customer, connect: Callable[..., Connection]
) -> None:
    calls: list[tuple[str, str, Any]] = [
        ("PATCH", f"{ONE}/{ada.public_id}", {"phone": ""}),
        ("DELETE", f"{ONE}/{ada.public_id}", None),
        ("POST", f"{ONE}/{ada.public_id}/restore", None),
    ]

    def count() -> list[int]:
        counts = []
        for method, path, body in calls:
            with CaptureQueriesContext(database) as queries:
                assert call(method, path, body).status_code < 300
            counts.append(len(queries))
        return counts

    link(ada, connect("links", direction="push"), "0", is_primary=True)
    call("GET", MANY)
    few = count()
    for number in range(1, 12):
        link(ada, connect("links", name=f"n{number}", account=f"{number}", direction="push"), f"{number}")
    call("PATCH", f"{ONE}/{ada.public_id}", {"phone": "+4930123456"})
    assert count() == few
    assert max(few) <= 16
