"""API keys: what they may, until when, and that a revoked one ends at once."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from django.test import Client
from django.utils import timezone

from connectors.models import ApiKey, Connection
from customers.models import Customer, Organization
from tests.connectors.test_admin import staff
from tests.connectors.test_commands import run

KEYS = "/admin/connectors/apikey/"
LIST, ONE = "/api/v1/unified/customers", "/api/v1/unified/customer"


@pytest.fixture
def issue(organization: Organization) -> Callable[..., tuple[ApiKey, str]]:
    return lambda name="shop", **more: ApiKey.issue(organization=organization, name=name, **more)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_revoked_key_is_refused_by_the_next_request(server: str, issue: Callable[..., Any], client: Client) -> None:
    key, secret = issue(rate=0)
    with httpx2.Client(base_url=server, timeout=60, headers=bearer(secret)) as caller:
        assert [caller.get(LIST).status_code for _ in range(10)] == [200] * 10
        admin = staff(key.organization, "connectors.change_apikey", "connectors.view_apikey")
        assert admin.post(f"{KEYS}{key.pk}/revoke/", {"confirmed": "yes"}).status_code == 302
        assert [caller.get(LIST).status_code for _ in range(10)] == [401] * 10


def test_a_key_ends_when_it_expires(issue: Callable[..., Any], api: Client) -> None:
    key, secret = issue(expires_at=timezone.now() + timedelta(hours=1))
    assert api.get(LIST, headers=bearer(secret)).status_code == 200
    ApiKey.objects.filter(pk=key.pk).update(expires_at=timezone.now())
    assert api.get(LIST, headers=bearer(secret)).status_code == 401


def test_a_key_may_do_what_its_scopes_name(issue: Callable[..., Any], api: Client) -> None:
    body = {"name": "Ada", "email": "a@example.com"}
    for scopes, read, write in ((["customers:read"], 200, 403), (["customers:write"], 403, 201), ([], 403, 403)):
        _, secret = issue(scopes=scopes)
        assert api.get(LIST, headers=bearer(secret)).status_code == read
        answer = api.post(ONE, body, content_type="application/json", headers=bearer(secret))
        assert answer.status_code == write


def test_a_strict_key_refuses_what_cannot_be_repeated_safely(issue: Callable[..., Any], api: Client) -> None:
    _, secret = issue(strict=True)
    body = {"name": "Ada", "email": "a@example.com"}

    def send(method: str, path: str, body: Any = None, **headers: str) -> Any:
        data = json.dumps(body) if body is not None else b""
        return api.generic(method, path, data, content_type="application/json", headers={**bearer(secret), **headers})

    refused = send("POST", ONE, body)
    assert (refused.status_code, [*refused.json()]) == (400, ["message", "errors"])
    assert "Idempotency-Key" in refused.json()["message"]
    # Another mirrored API, in its own shape.
    other = send("POST", "/v3/ecommerce/customers", {}, api_key=secret)
    assert (other.status_code, "Idempotency-Key" in other.content.decode()) == (400, True)
    assert not Customer.objects.exists()
    made = send("POST", ONE, body, **{"Idempotency-Key": "1"})
    assert made.status_code == 201
    address = f"{ONE}/{made.json()['data']['id']}"
    for method, change in (("PUT", body), ("PATCH", {"phone": "1"}), ("DELETE", None)):
        assert send(method, address, change).status_code == 428
        assert send(method, address, change, **{"If-Match": '"v9"'}).status_code == 412
    assert Customer.objects.get().version == 1
    assert send("PATCH", address, {"phone": "1"}, **{"If-Match": made["ETag"]}).status_code == 200
    assert send("PUT", address, {**body, "phone": "2"}, **{"If-Match": "*"}).status_code == 200
    update = {"action": "update", "id": made.json()["data"]["id"], "values": {"phone": "3"}}
    items = [update, {"action": "create", "values": {"name": "B"}}]
    bulk = send("POST", "/api/v1/unified/customers/bulk", {"items": items}, **{"Idempotency-Key": "2"}).json()["data"]
    assert [item["status"] for item in bulk["items"]] == ["failed", "created"]
    assert bulk["items"][0]["error"]["code"] == "version_required"
    items = [{**update, "if_match": "v3"}]
    bulk = send("POST", "/api/v1/unified/customers/bulk", {"items": items}, **{"Idempotency-Key": "3"}).json()["data"]
    assert bulk["items"][0]["status"] == "updated"
    assert send("DELETE", address, **{"If-Match": '"v4"'}).status_code == 204
    assert send("POST", f"{address}/restore", **{"Idempotency-Key": "4"}).status_code == 200


def test_a_stored_scope_that_is_no_longer_offered_does_no_harm(
    issue: Callable[..., Any], api: Client, admin_client: Client
) -> None:
    key, secret = issue(scopes=["customers:read", "connections:write"])
    assert api.get(LIST, headers=bearer(secret)).status_code == 200
    page = admin_client.get(f"{KEYS}{key.pk}/change/").content.decode()
    assert "connections:write" in page
    answer = admin_client.post(f"{KEYS}{key.pk}/change/", {"name": "renamed", "rate": ""})
    assert answer.status_code == 302
    key.refresh_from_db()
    assert (key.name, key.scopes) == ("renamed", ["customers:read", "connections:write"])


@pytest.mark.parametrize("scopes", [["connections:write"], ["customers:read", "everything"], []])
def test_a_key_is_issued_with_known_scopes_only(
    organization: Organization, admin_client: Client, scopes: list[str]
) -> None:
    form = {"organization": organization.pk, "name": "shop", "scopes": scopes}
    assert admin_client.post(f"{KEYS}add/", form).status_code == 200
    if scopes:
        assert run("create_api_key", "demo", "--name=x", *(f"--scope={scope}" for scope in scopes)).code != 0
    assert not ApiKey.objects.exists()


def test_the_command_sets_scopes_once_and_the_rate(organization: Organization) -> None:
    assert run("create_api_key", "demo", "--name=x", *2 * ["--scope=customers:read"], "--rate=2.5").code == 0
    key = ApiKey.objects.get()
    assert (key.scopes, key.rate) == (["customers:read"], 2.5)
    for rate in ("-1", "nan", "inf", "many"):
        assert run("create_api_key", "demo", "--name=y", f"--rate={rate}").code != 0
    assert run("create_api_key", "demo", "--name=z").code == 0
    assert ApiKey.objects.get(name="z").rate is None


def test_the_list_tells_and_filters_states(issue: Callable[..., Any], admin_client: Client) -> None:
    past = timezone.now() - timedelta(minutes=1)
    issue("fresh one")
    issue("good one", expires_at=timezone.now() + timedelta(days=1))
    issue("old one", expires_at=past)
    key, _ = issue("bad one", expires_at=past)
    ApiKey.objects.filter(pk=key.pk).update(revoked_at=past)

    def names(state: str) -> set[str]:
        found = admin_client.get(KEYS, {"state": state} if state else {}).context["cl"].result_list
        return {key.name for key in found}

    assert names("") == {"fresh one", "good one", "old one", "bad one"}
    assert names("active") == {"fresh one", "good one"}
    assert names("expired") == {"old one"}
    assert names("revoked") == {"bad one"}
    text = admin_client.get(KEYS).content.decode()
    for label in ("Active", "Expired", "Revoked", "never"):
        assert label in text


def test_chosen_keys_are_revoked_once_that_is_confirmed(
    issue: Callable[..., Any], admin_client: Client, other_organization: Organization
) -> None:
    one, two, kept = (issue(name)[0] for name in ("one", "two", "kept"))
    chosen = {"action": "revoke_selected", "_selected_action": [str(one.pk), str(two.pk)]}
    asked = admin_client.post(KEYS, chosen)
    assert asked.status_code == 200
    assert "kept" not in asked.content.decode()
    assert not ApiKey.objects.exclude(revoked_at=None).exists()
    assert admin_client.post(KEYS, {**chosen, "confirmed": "yes"}).status_code == 302
    assert set(ApiKey.objects.exclude(revoked_at=None)) == {one, two}
    # What is revoked stays revoked since then.
    one.refresh_from_db()
    admin_client.post(KEYS, {**chosen, "confirmed": "yes"})
    assert ApiKey.objects.get(pk=one.pk).revoked_at == one.revoked_at

    stranger = staff(other_organization, "connectors.change_apikey", "connectors.view_apikey")
    stranger.post(KEYS, {"action": "revoke_selected", "_selected_action": [str(kept.pk)], "confirmed": "yes"})
    looker = staff(kept.organization, "connectors.view_apikey")
    refused = looker.post(KEYS, {"action": "revoke_selected", "_selected_action": [str(kept.pk)], "confirmed": "yes"})
    assert refused.status_code == 403
    assert ApiKey.objects.get(pk=kept.pk).revoked_at is None


def test_the_button_asks_before_it_revokes(issue: Callable[..., Any], admin_client: Client) -> None:
    key, _ = issue()
    asked = admin_client.post(f"{KEYS}{key.pk}/revoke/")
    assert "cannot be undone" in asked.content.decode()
    key.refresh_from_db()
    assert key.revoked_at is None
    assert admin_client.post(f"{KEYS}{key.pk}/revoke/", {"confirmed": "yes"}).status_code == 302
    key.refresh_from_db()
    assert key.revoked_at is not None
    assert "/revoke/" not in admin_client.get(f"{KEYS}{key.pk}/change/").content.decode()


@pytest.mark.parametrize(("given", "stored"), [("", None), ("0", 0.0), ("2.5", 2.5)])
def test_the_rate_is_changed_in_the_admin(
    issue: Callable[..., Any], admin_client: Client, given: str, stored: float | None
) -> None:
    key, _ = issue(rate=9)
    assert admin_client.post(f"{KEYS}{key.pk}/change/", {"name": "shop", "rate": given}).status_code == 302
    key.refresh_from_db()
    assert key.rate == stored


@pytest.mark.parametrize("given", ["-1", "nan", "inf", "fast"])
def test_a_rate_that_is_none_is_refused(issue: Callable[..., Any], admin_client: Client, given: str) -> None:
    key, _ = issue(rate=9)
    assert admin_client.post(f"{KEYS}{key.pk}/change/", {"name": "shop", "rate": given}).status_code == 200
    key.refresh_from_db()
    assert key.rate == 9


def test_another_organizations_connection_is_beyond_a_key(
    issue: Callable[..., Any], api: Client, connect: Callable[..., Connection], other_organization: Organization
) -> None:
    connect("commenda", organization=other_organization)
    _, secret = issue()
    answer = api.get("/api/v1/customers?corporation_id=corp_123", headers=bearer(secret))
    assert answer.status_code == 404
