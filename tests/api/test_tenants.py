"""Every address and method, called by those who must learn nothing: no key, a wrong one, and another organization's.

The routes come from the URL resolver. One without a row here fails.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from string import Template
from typing import Any

import pytest
from django.http.response import HttpResponseBase
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from connectors.models import ApiKey, Connection, CustomerLink, SyncRun
from connectors.provider import Record
from connectors.sync.receive import receive
from customers.editing import Actor
from customers.ids import new_public_id
from customers.models import Customer, Organization

ACTOR = Actor(kind="command", name="somebody")
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
U = "/api/v1/unified"
WRITE, READ, PUSH, CONNECTIONS = "customers:write", "customers:read", "customers:push", "connections:read"
PERSON = '{"name": "Ada", "email": "ada@example.com"}'
COMMENDA = '{"corporation_id": "$corporation", "name": "Ada Lovelace", "external_id": "$source"}'
SYNC = '{"company_id": $company, "integration_type": "SHOPIFY", "full_sync": true, "data_models_to_sync": ["X1"]}'
BULK = '{"items": [{"action": "%s", %s, "values": {"name": "Ada"}}]}'


@dataclass(frozen=True)
class Call:
    """One way to call a route; `$names` stand for ids. What another organization is answered is in `foreign`."""

    path: str
    body: str = ""
    foreign: int = 404
    merchant: str = "$merchant"


@dataclass(frozen=True)
class Row:
    scope: str
    calls: tuple[Call, ...]


PUBLIC = {
    "": "/", "livez": "/livez", "readyz": "/readyz", "^api/schema/?$": "/api/schema/", "^api/docs/?$": "/api/docs/",
    "^api/docs/errors/?$": "/api/docs/errors/", "^api/docs/errors/(?P<slug>[a-z-]+)/?$": "/api/docs/errors/not-found/",
    r"^llms\.txt$": "/llms.txt",
}  # fmt: skip
ONE = "(?P<unified_customer_id>[^/]+)"
ROWS: dict[tuple[str, str], Row] = {
    ("^api/v1/unified/customer/?$", "POST"): Row(WRITE, (Call(f"{U}/customer", PERSON, 201),)),
    (f"^api/v1/unified/customer/{ONE}/?$", "GET"): Row(READ, (Call(f"{U}/customer/$customer"),)),
    (f"^api/v1/unified/customer/{ONE}/?$", "PUT"): Row(WRITE, (Call(f"{U}/customer/$customer", PERSON),)),
    (f"^api/v1/unified/customer/{ONE}/?$", "PATCH"): Row(WRITE, (Call(f"{U}/customer/$customer", '{"name": "A"}'),)),
    (f"^api/v1/unified/customer/{ONE}/?$", "DELETE"): Row(WRITE, (Call(f"{U}/customer/$customer"),)),
    (f"^api/v1/unified/customer/{ONE}/restore/?$", "POST"): Row(WRITE, (Call(f"{U}/customer/$customer/restore"),)),
    (f"^api/v1/unified/customer/{ONE}/links/?$", "GET"): Row(READ, (Call(f"{U}/customer/$customer/links"),)),
    (f"^api/v1/unified/customer/{ONE}/push/?$", "POST"): Row(
        PUSH,
        (
            Call(f"{U}/customer/$customer/push", "{}"),
            Call(f"{U}/customer/$own_customer/push", '{"connection_ids": ["$target"]}', 422),
        ),
    ),
    ("^api/v1/unified/operations/(?P<operation_id>[^/]+)/?$", "GET"): Row(PUSH, (Call(f"{U}/operations/$operation"),)),
    ("^api/v1/unified/customers/?$", "GET"): Row(
        READ,
        (
            Call(f"{U}/customers", foreign=200),
            Call(f"{U}/customers?limit=100&page=1&include_archived=true", foreign=200),
            Call(f"{U}/customers?source_id=$source", foreign=200),
            Call(f"{U}/customers?q=$customer", foreign=200),
            Call(f"{U}/customers?email=canary@example.com", foreign=200),
            Call(f"{U}/customers?cursor=", foreign=200),
        ),
    ),
    ("^api/v1/unified/customers/bulk/?$", "POST"): Row(
        WRITE,
        (
            Call(f"{U}/customers/bulk", BULK % ("update", '"id": "$customer"'), 200),
            Call(
                f"{U}/customers/bulk",
                BULK % ("upsert", '"connection_id": "$connection", "source_id": "$source"'),
                200,
            ),
            Call(
                f"{U}/customers/bulk",
                BULK.replace("{", '{"mode": "all_or_nothing", ', 1) % ("update", '"id": "$customer"'),
                422,
            ),
        ),
    ),
    (
        "^api/v1/unified/connections/(?P<connection_id>[^/]+)/customers/(?P<source_id>(?s:.+?))/?$",
        "PUT",
    ): Row(WRITE, (Call(f"{U}/connections/$connection/customers/$source", '{"name": "Ada"}'),)),
    ("^api/v1/unified/connections/?$", "GET"): Row(CONNECTIONS, (Call(f"{U}/connections", foreign=200),)),
    ("^api/v1/unified/connections/(?P<connection_id>[^/]+)/?$", "GET"): Row(
        CONNECTIONS, (Call(f"{U}/connections/$connection"),)
    ),
    ("^api/v1/unified/runs/?$", "GET"): Row(
        CONNECTIONS, (Call(f"{U}/runs", foreign=200), Call(f"{U}/runs?connection_id=$connection"))
    ),
    ("^api/v1/unified/runs/(?P<run_id>[^/]+)/?$", "GET"): Row(CONNECTIONS, (Call(f"{U}/runs/$run"),)),
    ("^api/v1/unified/runs/(?P<run_id>[^/]+)/records/?$", "GET"): Row(CONNECTIONS, (Call(f"{U}/runs/$run/records"),)),
    ("^api/v1/unified/changes/?$", "GET"): Row(
        READ, (Call(f"{U}/changes", foreign=200), Call(f"{U}/changes?expand=customer", foreign=200))
    ),
    ("^(?:api/v1/)?customers/?$", "GET"): Row(
        READ,
        (
            Call("/api/v1/customers?corporation_id=$corporation"),
            Call("/customers?corporation_id=$corporation&extend=shipping_address"),
            Call("/api/v1/customers?corporation_id=$own_corporation&source_platform_ids=$source", foreign=200),
        ),
    ),
    ("^(?:api/v1/)?customers/?$", "POST"): Row(
        WRITE, (Call("/api/v1/customers", COMMENDA), Call("/customers", COMMENDA))
    ),
    ("^api/v1/customers/(?P<customer_id>[^/]+)/?$", "GET"): Row(READ, (Call("/api/v1/customers/$link"),)),
    ("^api/v1/customers/(?P<customer_id>[^/]+)/?$", "POST"): Row(
        WRITE, (Call("/api/v1/customers/$link", '{"name": "Ada Lovelace"}'),)
    ),
    ("^api/v1/customers/(?P<customer_id>[^/]+)/?$", "DELETE"): Row(WRITE, (Call("/api/v1/customers/$link"),)),
    ("^customers/add-update/?$", "POST"): Row(
        WRITE,
        (
            Call("/customers/add-update", '{"externalId": "$source", "firstName": "Ada"}', 401),
            Call("/customers/add-update", '{"externalId": "$source", "firstName": "Ada"}', 200, "$own_merchant"),
        ),
    ),
    ("^customers/add-update/?$", "GET"): Row(READ, (Call("/customers/add-update", foreign=401),)),
    ("^customers/(?P<external_id>(?s:.+))$", "GET"): Row(
        READ,
        (Call("/customers/$source", foreign=401), Call("/customers/$source", merchant="$own_merchant")),
    ),
    ("^v3/ecommerce/customers/?$", "GET"): Row(
        READ,
        (
            Call("/v3/ecommerce/customers?include_deleted_records=true&return_count=true", foreign=200),
            Call("/v3/ecommerce/customers?rootfi_company_id[eq]=$company", foreign=200),
            Call("/v3/ecommerce/customers?platform_id[eq]=$source&select=raw_data", foreign=200),
        ),
    ),
    ("^v3/ecommerce/customers/?$", "POST"): Row(
        WRITE, (Call("/v3/ecommerce/customers", '{"company_id": $company, "data": [{"name": "Ada"}]}'),)
    ),
    ("^v3/core/syncs/?$", "GET"): Row(
        READ,
        (
            Call("/v3/core/syncs", foreign=200),
            Call("/v3/core/syncs?rootfi_company_id=$company", foreign=200),
            Call("/v3/core/syncs?sync_id[eq]=$sync", foreign=200),
        ),
    ),
    ("^v3/core/syncs/?$", "POST"): Row(WRITE, (Call("/v3/core/syncs", SYNC),)),
}
# Lists that are read on from a cursor: the first page, and the name under which the answer has the next.
CURSORS = (
    (f"{U}/customers?limit=1&cursor=$cursor", "next_cursor"),
    (f"{U}/changes?limit=1&cursor=$cursor", "next_cursor"),
    (f"{U}/runs?limit=1&cursor=$cursor", "next_cursor"),
    (f"{U}/connections?limit=1&cursor=$cursor", "next_cursor"),
    ("/api/v1/customers?corporation_id=$corporation&limit=1&cursor=$cursor", "cursor"),
    ("/v3/ecommerce/customers?limit=1&next=$cursor", "next"),
)


def routes() -> Iterator[tuple[str, str]]:
    """Every address and method but the admin's."""

    def walk(patterns: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for pattern in patterns:
            text = prefix + str(pattern.pattern)
            if isinstance(pattern, URLResolver):
                if text != "admin/":
                    yield from walk(pattern.url_patterns, text)
            elif isinstance(pattern, URLPattern):
                # DRF answers HEAD where it answers GET.
                for method in {*getattr(pattern.callback, "actions", ["get"])} - {"head"}:
                    yield text, method.upper()

    seen: set[tuple[str, str]] = set()
    for route in walk(get_resolver().url_patterns, ""):
        if route not in seen:
            seen.add(route)
            yield route


class Tenant:
    """An organization with everything in it; every text of it says `mark`."""

    def __init__(self, organization: Organization, mark: str, number: int) -> None:
        self.organization, self.mark = organization, mark
        accounts = {"commenda": f"corp-{mark}", "cheqpay": f"merchant-{mark}", "rootfi": str(number)}
        connections = {
            provider: Connection.objects.create(
                organization=organization,
                provider=provider,
                name=f"{mark} {provider}",
                account=account,
                direction=Connection.Direction.CALLS_US,
            )
            for provider, account in accounts.items()
        }
        target = Connection.objects.create(
            organization=organization, provider="links", name=f"{mark} links", base_url="https://links.invalid/api/v1"
        )
        for connection in connections.values():
            records = []
            for n in range(3):
                values = {"name": f"Person {mark}", "email": f"{mark}@example.com", "phone": f"+1202555{number}"}
                document = {"name": f"Person {mark}", "note": mark}
                remote_id = f"source-{mark}" if n == 0 else f"source-{mark}-{n}"
                records.append(Record(values=values, document=document, remote_id=remote_id))
            receive(organization=organization, connection=connection, records=records, actor=ACTOR)
        run, sync = (
            SyncRun.objects.create(
                public_id=SyncRun.new_public_id(),
                organization=organization,
                connection=connection,
                kind=kind,
                actor_kind=ACTOR.kind,
                actor_name=f"{mark}-actor",
                error=mark,
            )
            for connection, kind in ((target, SyncRun.Kind.PUSH), (connections["rootfi"], SyncRun.Kind.SYNC))
        )
        self.key = self.issue(list(ApiKey.SCOPES))
        link = CustomerLink.objects.filter(connection=connections["commenda"]).select_related("customer").first()
        assert link is not None
        customer = link.customer
        self.ids = {
            "customer": customer.public_id,
            "link": str(link.uid),
            "source": f"source-{mark}",
            "connection": connections["commenda"].public_id,
            "target": target.public_id,
            "run": run.public_id,
            "sync": sync.public_id,
            "company": str(number),
            "corporation": accounts["commenda"],
            "merchant": accounts["cheqpay"],
        }
        pushed = call(
            Client(), self, "POST", Call("$p", json.dumps({"connection_ids": [target.public_id]})),
            {**self.ids, "p": f"{U}/customer/{customer.public_id}/push"},
        )  # fmt: skip
        self.ids["operation"] = json.loads(body_of(pushed))["data"]["id"]

    def issue(self, scopes: list[str], **fields: Any) -> str:
        return ApiKey.issue(organization=self.organization, name=f"{self.mark} key", scopes=scopes, **fields)[1]

    def secrets(self) -> set[str]:
        """What nobody else may read."""
        links = CustomerLink.objects.filter(connection__organization=self.organization)
        return (
            {self.mark, self.mark.upper()}
            | {customer.public_id for customer in Customer.objects.filter(organization=self.organization)}
            | {str(link.uid) for link in links}
            | {connection.public_id for connection in Connection.objects.filter(organization=self.organization)}
            | {run.public_id for run in SyncRun.objects.filter(organization=self.organization)}
        )


def call(
    client: Client, caller: Tenant | str | None, method: str, one: Call, ids: dict[str, str], **headers: str
) -> HttpResponseBase:
    """The answer to this call with a caller's key, `one` filled in with `ids`."""
    key = caller.key if isinstance(caller, Tenant) else caller
    sent = {"x-merchant-id": Template(one.merchant).substitute(ids), **headers}
    if key is not None:
        sent |= {"Authorization": f"Bearer {key}", "x-api-key": key, "api_key": key}
    path, data = Template(one.path).substitute(ids), Template(one.body).substitute(ids)
    return client.generic(method, path, data, content_type="application/json", headers=sent)


def body_of(answer: HttpResponseBase) -> str:
    return answer.content.decode() if hasattr(answer, "content") else ""


def scrubbed(text: str, ids: dict[str, str]) -> str:
    """A body without what differs between two calls with other ids."""
    for name, value in ids.items():
        if not name.startswith("own_"):
            text = text.replace(value, f"<{name}>")
    text = re.sub(r"(req|cust|evt)_[0-9A-Z]{26}", "<id>", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<uuid>", text)
    return re.sub(r'"(created_at|createdAt|updatedAt|at)":[^,}]+|v?\d+', "<n>", text)


@pytest.fixture
def ours(settings: Any, organization: Organization) -> Tenant:
    settings.API_RATE = 0
    return Tenant(organization, "canary", 4711)


@pytest.fixture
def theirs(ours: Tenant, other_organization: Organization) -> Tenant:
    return Tenant(other_organization, "magpie", 8833)


def unknown(theirs: Tenant) -> dict[str, str]:
    """Ids of the right form that nobody has."""
    return {
        "customer": new_public_id("cust"), "link": "0192f0c1-0000-7000-8000-000000000001", "source": "source-nobody",
        "connection": new_public_id("con"),
        "target": new_public_id("con"), "run": SyncRun.new_public_id(), "sync": SyncRun.new_public_id(),
        "company": "999999", "corporation": "corp-nobody", "merchant": "merchant-nobody",
        "operation": SyncRun.new_public_id(), **own(theirs),
    }  # fmt: skip


def own(tenant: Tenant) -> dict[str, str]:
    return {f"own_{name}": value for name, value in tenant.ids.items()}


def test_every_route_has_a_row() -> None:
    found = set(routes())
    assert {route for route in found if route[0] not in PUBLIC} == set(ROWS)
    assert {path for path, _ in found} >= set(PUBLIC)


@pytest.mark.parametrize("path", PUBLIC.values())
def test_what_is_open_to_all_tells_of_nobody(path: str, ours: Tenant, api: Client) -> None:
    for method in METHODS:
        answer = api.generic(method, path)
        assert answer.status_code in (200, 302, 405), method
        assert not [secret for secret in ours.secrets() if secret in body_of(answer)]


@pytest.mark.parametrize(("route", "row"), ROWS.items(), ids=[f"{method} {path}" for path, method in ROWS])
def test_without_a_usable_key_every_method_is_refused(
    route: tuple[str, str], row: Row, ours: Tenant, api: Client
) -> None:
    revoked, expired = ours.issue([row.scope]), ours.issue([row.scope], expires_at=timezone.now() - timedelta(hours=1))
    ApiKey.objects.filter(hash=ApiKey.hashed(revoked)).update(revoked_at=timezone.now())
    for one in row.calls:
        ids = {**ours.ids, **own(ours)}
        for key in (None, "", "hub_garbage", revoked, expired):
            for method in METHODS:
                answer = call(api, key, method, one, ids)
                assert answer.status_code == 401, (method, key)
                assert_tells_nothing(answer, ours, ids)


@pytest.mark.parametrize(("route", "row"), ROWS.items(), ids=[f"{method} {path}" for path, method in ROWS])
def test_without_the_scope_it_is_forbidden(route: tuple[str, str], row: Row, ours: Tenant, api: Client) -> None:
    key = ours.issue([scope for scope in ApiKey.SCOPES if scope != row.scope])
    for one in row.calls:
        ids = {**ours.ids, **own(ours)}
        answer = call(api, key, route[1], one, ids)
        assert answer.status_code == 403
        assert_tells_nothing(answer, ours, ids)


@pytest.mark.parametrize(("route", "row"), ROWS.items(), ids=[f"{method} {path}" for path, method in ROWS])
def test_another_organizations_ids_are_answered_like_those_of_nobody(
    route: tuple[str, str], row: Row, ours: Tenant, theirs: Tenant, api: Client
) -> None:
    before = state_of(ours)
    for one in row.calls:
        ids, nobodys = {**ours.ids, **own(theirs)}, unknown(theirs)
        answer = call(api, theirs, route[1], one, ids)
        assert answer.status_code == one.foreign, body_of(answer)
        assert_tells_nothing(answer, ours, ids)
        if "$" in (one.path + one.body).replace("$own_", ""):
            like = call(api, theirs, route[1], one, nobodys)
            assert like.status_code == answer.status_code
            assert scrubbed(body_of(like), nobodys) == scrubbed(body_of(answer), ids)
            assert {*like.headers} == {*answer.headers}
    assert state_of(ours) == before
    # The same call with ids of the caller's own goes through: what was refused was not refused for its form.
    for one in row.calls:
        if one.path != "/customers/add-update" or one.body:
            answer = call(api, ours, route[1], one, {**ours.ids, **own(ours)})
            assert answer.status_code in (200, 201, 202, 204, 409), body_of(answer)


@pytest.mark.parametrize(("path", "name"), CURSORS)
def test_another_organizations_cursor_shows_nothing_of_it(
    path: str, name: str, ours: Tenant, theirs: Tenant, api: Client
) -> None:
    first = json.loads(body_of(call(api, ours, "GET", Call(path), {**ours.ids, "cursor": ""})))
    cursor = first.get(name) or first["data"].get(name)
    assert cursor
    answer = call(api, theirs, "GET", Call(path), {**theirs.ids, "cursor": cursor})
    assert answer.status_code in (200, 400, 404, 422)
    assert_tells_nothing(answer, ours, {"cursor": cursor})


def test_another_organizations_idempotency_key_is_another_key(ours: Tenant, theirs: Tenant, api: Client) -> None:
    one = Call(f"{U}/customer", PERSON)
    mine = call(api, ours, "POST", one, ours.ids, **{"Idempotency-Key": "same"})
    other = call(api, theirs, "POST", one, theirs.ids, **{"Idempotency-Key": "same"})
    assert (mine.status_code, other.status_code) == (201, 201)
    assert "Idempotent-Replayed" not in other.headers
    assert json.loads(body_of(mine))["data"]["id"] != json.loads(body_of(other))["data"]["id"]
    assert_tells_nothing(other, ours, {})


def test_an_id_in_use_elsewhere_names_the_callers_own_record(ours: Tenant, theirs: Tenant, api: Client) -> None:
    """Two organizations may give the same account and the same ids to records of their own."""
    Connection.objects.filter(organization=theirs.organization, provider="cheqpay").update(account="merchant-canary")
    one = Call("/customers/add-update", '{"externalId": "source-canary", "firstName": "Ada"}')
    answer = call(api, theirs, "POST", one, ours.ids)
    assert json.loads(body_of(answer))["firstName"] == "Ada"
    assert Customer.objects.filter(organization=ours.organization, name="Ada").count() == 0
    read = call(api, ours, "GET", Call("/customers/source-canary"), ours.ids)
    assert "Ada" not in body_of(read)


def assert_tells_nothing(answer: HttpResponseBase, tenant: Tenant, sent: dict[str, str]) -> None:
    """No id and no value of the tenant is in the answer, but for what the caller sent."""
    text = body_of(answer) + str(dict(answer.headers))
    for value in sorted(sent.values(), key=len, reverse=True):
        text = text.replace(value, "") if value else text
    assert [secret for secret in tenant.secrets() if secret in text] == []


def state_of(tenant: Tenant) -> list[Any]:
    """What a call by others must not have changed."""
    customers = Customer.objects.filter(organization=tenant.organization).order_by("pk")
    links = CustomerLink.objects.filter(connection__organization=tenant.organization).order_by("pk")
    return [*customers.values_list("pk", "version", "name", "archived_at"), *links.values_list("pk", "deleted_at")]
