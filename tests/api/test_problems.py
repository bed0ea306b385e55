"""Every code of the list is provoked, and its document is the one that is documented."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from connectors.api.problems import CODES
from connectors.models import ApiKey, Connection, IdempotencyKey
from customers import editing
from customers.editing import Actor, customers_changed
from customers.models import Customer, CustomerChange, Organization

U = "/api/v1/unified"
Call = Callable[..., Any]


@pytest.fixture
def call(organization: Organization, api_key: str) -> Call:
    client = Client(raise_request_exception=False)

    def go(method: str, path: str, body: Any = None, *, key: str = api_key, **headers: str) -> Any:
        return client.generic(
            method,
            f"{U}{path}",
            body if isinstance(body, str) else json.dumps(body) if body is not None else "",
            content_type="application/json",
            headers={"Authorization": f"Bearer {key}", **headers},
        )

    return go


@pytest.fixture
def ada(organization: Organization) -> Customer:
    return editing.create(organization=organization, values=[{"name": "Ada"}], actor=Actor(kind="user", name="Jo"))[0]


@pytest.fixture
def broken(db: None) -> Iterator[None]:
    """Something that hears of every change fails."""

    def fail(**known: Any) -> None:
        raise RuntimeError("secret: the disk is full")

    customers_changed.connect(fail)
    yield
    customers_changed.disconnect(fail)


def with_scopes(organization: Organization, *scopes: str, **more: Any) -> str:
    key, secret = ApiKey.issue(organization=organization, name="other", scopes=list(scopes))
    ApiKey.objects.filter(pk=key.pk).update(**more)
    return secret


def malformed(call: Call, ada: Customer) -> Any:
    return call("PATCH", f"/customer/{ada.public_id}", "{")


def unauthorized(call: Call, ada: Customer) -> Any:
    return call("GET", "/changes", key="hub_unknown")


def forbidden(call: Call, ada: Customer) -> Any:
    return call("DELETE", f"/customer/{ada.public_id}", key=with_scopes(ada.organization, "customers:read"))


def not_found(call: Call, ada: Customer) -> Any:
    return call("PATCH", "/customer/cust_00000000000000000000000000", {"name": "x"})


def method(call: Call, ada: Customer) -> Any:
    return call("POST", "/changes", {})


def invalid(call: Call, ada: Customer) -> Any:
    return call("PATCH", f"/customer/{ada.public_id}", {"emial": "ada@example.com"})


def stale(call: Call, ada: Customer) -> Any:
    return call("PATCH", f"/customer/{ada.public_id}", {"phone": "+4930123456"}, **{"If-Match": '"v7"'})


def in_progress(call: Call, ada: Customer) -> Any:
    again = lambda: call("PATCH", f"/customer/{ada.public_id}", {"phone": "1"}, **{"Idempotency-Key": "k"})  # noqa: E731 # twice
    assert again().status_code == 200
    # As it is between the reservation and the answer.
    IdempotencyKey.objects.update(status=None, reserved_at=timezone.now() + timedelta(seconds=5))
    return again()


def reused(call: Call, ada: Customer) -> Any:
    for phone in ("1", "2"):
        answer = call("PATCH", f"/customer/{ada.public_id}", {"phone": phone}, **{"Idempotency-Key": "k"})
    return answer


def key_invalid(call: Call, ada: Customer) -> Any:
    return call("PATCH", f"/customer/{ada.public_id}", {"phone": "1"}, **{"Idempotency-Key": "k" * 256})


def strict_key(organization: Organization) -> str:
    return ApiKey.issue(organization=organization, name="strict", strict=True)[1]


def key_missing(call: Call, ada: Customer) -> Any:
    return call("POST", f"/customer/{ada.public_id}/push", {}, key=strict_key(ada.organization))


def version_required(call: Call, ada: Customer) -> Any:
    return call("PATCH", f"/customer/{ada.public_id}", {"phone": "1"}, key=strict_key(ada.organization))


def nothing_to_push(call: Call, ada: Customer) -> Any:
    return call("POST", f"/customer/{ada.public_id}/push", {})


def rate_limited(call: Call, ada: Customer) -> Any:
    key = with_scopes(ada.organization, "customers:read", rate=0.5)
    assert call("GET", "/changes", key=key).status_code == 200
    return call("GET", "/changes", key=key)


def cursor_expired(call: Call, ada: Customer) -> Any:
    editing.archive(organization=ada.organization, ids=[ada.pk], actor=Actor(kind="user", name="Jo"))
    # PostgreSQL tells once all earlier transactions of its cluster have ended.
    until = time.monotonic() + 60
    while not (page := call("GET", "/changes?limit=1").json())["data"]:
        assert time.monotonic() < until
        time.sleep(0.1)
    CustomerChange.objects.filter(version=1).delete()
    return call("GET", f"/changes?cursor={page['next_cursor']}")


PROVOKED = {
    "malformed_request": malformed,
    "unauthorized": unauthorized,
    "forbidden": forbidden,
    "not_found": not_found,
    "method_not_allowed": method,
    "validation_failed": invalid,
    "version_conflict": stale,
    "idempotency_in_progress": in_progress,
    "idempotency_key_reused": reused,
    "idempotency_key_invalid": key_invalid,
    "idempotency_key_missing": key_missing,
    "version_required": version_required,
    "nothing_to_push": nothing_to_push,
    "rate_limited": rate_limited,
    "cursor_expired": cursor_expired,
}
ELSEWHERE = {"internal", "conflict"}


def test_every_code_is_provoked() -> None:
    assert {*PROVOKED} | ELSEWHERE == {*CODES}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("code", PROVOKED)
def test_a_problem_says_what_is_documented(code: str, call: Call, ada: Customer) -> None:
    answer = PROVOKED[code](call, ada)
    problem, known = answer.json(), CODES[code]
    assert problem["code"] == code
    assert (answer.status_code, problem["status"]) == (known.status, known.status)
    assert answer["Content-Type"] == "application/problem+json"
    assert problem["type"] == f"/api/docs/errors/{code.replace('_', '-')}"
    assert (problem["title"], problem["retryable"], problem["outcome"]) == (known.title, known.retryable, known.outcome)
    assert problem["request_id"] == answer["Request-Id"]
    assert problem["detail"]
    if known.status in (409, 429) and known.retryable:
        assert int(answer["Retry-After"]) >= 1


@pytest.mark.django_db(transaction=True)
def test_a_failure_of_the_hub_shows_nothing_of_it(call: Call, ada: Customer, broken: None) -> None:
    answer = call("DELETE", f"/customer/{ada.public_id}")
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["retryable"]) == (500, "internal", True)
    assert "secret" not in answer.content.decode()
    assert Customer.objects.get().archived_at is None


@pytest.mark.django_db(transaction=True)
def test_what_does_not_fit_what_is_there_is_a_conflict(call: Call, connect: Callable[..., Connection]) -> None:
    named = {"connection_id": connect("commenda").public_id, "source_id": "s1", "values": {"name": "Ada"}}
    for _ in range(2):
        answer = call("POST", "/customers/bulk", {"items": [{"action": "create", **named}]})
    [item] = answer.json()["data"]["items"]
    assert (item["status"], item["error"]["code"]) == ("failed", "conflict")
