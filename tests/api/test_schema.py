"""The OpenAPI document holds against the running application: examples, generated requests, every role.

`HUB_FULL=1` sends at least 50,000 generated requests; without it they are as many as a commit can wait for.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from django.core.management import call_command
from django.db import connection, connections
from django.test import Client
from rest_framework.exceptions import ValidationError
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.transport.wsgi import WSGITransport

from connectors.api import problems, reference
from connectors.api.schema import FILLED
from connectors.inbound.fields import Text
from connectors.models import ApiKey, Connection, CustomerLink, SyncRun
from connectors.provider import Record
from connectors.sync.receive import receive
from customers.editing import Actor
from customers.models import Customer, Organization
from hub.wsgi import application

FULL = os.environ.get("HUB_FULL") == "1"
PARTS = 8
ACTOR = Actor(kind="command", name="test")
ROLES: dict[str, list[str]] = {
    "all": list(ApiKey.SCOPES),
    "read": ["customers:read"],
    "write": ["customers:write"],
    "push": ["customers:push"],
    "none": [],
}
TAGS = ("Links", "Commenda", "Cheqpay", "RootFi", "Customer Hub")
ON, OFF = {"enabled": True}, {"enabled": False}
CHECKS = {
    # Deleting archives: the record stays, to be read and restored.
    "Links": {"use_after_free": OFF},
    "Customer Hub": {"use_after_free": OFF},
    # The guides' Bearer does instead of x-api-key.
    "Cheqpay": {"missing_required_header": OFF},
}
# Rules over several values, or of the database: JSON Schema cannot state them, so what breaks them fits the schema.
BEYOND = (
    b"characters for first and last name together",
    b"characters with line 2",
    b"A customer needs a name.",
    b"at most 20 filters",
    b"of at most 64 bits",
    b"Give a phone number, such as",
)
UNTOUCHED = re.compile(
    r"Invalid component:\s+- query: violates `additionalProperties`"
    r"\s+- header: violates `required` \(was Authorization\)\s*$"
)
METHODS = ("get", "put", "post", "patch", "delete")


@dataclass
class World:
    """One organization with a connection of each kind and customers, and a key of each role."""

    organization: Organization
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)
    target: str = ""

    def headers(self, tag: str, role: str = "all") -> dict[str, str]:
        """The headers that this surface documents."""
        key = self.keys[role]
        match tag:
            case "Cheqpay":
                return {"x-api-key": key, "x-merchant-id": "M-1001"}
            case "RootFi":
                return {"api_key": key}
        return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def world(
    transactional_db: None,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    organization: Organization,
    connect: Callable[..., Connection],
) -> World:
    settings.API_RATE = 0
    send = WSGITransport.send

    def send_here(self: WSGITransport, case: Any, *, session: Any = None, **kwargs: Any) -> Any:
        try:
            return send(self, case, session=session or requests.Session(), **kwargs)
        finally:
            if connection.vendor == "postgresql":
                connections.close_all()  # this thread's goes back to the pool, as it does when a server has answered

    # Without a session, Schemathesis hands options of a connection on to Werkzeug, which has none.
    monkeypatch.setattr(WSGITransport, "send", send_here)

    count = 100
    world = World(organization)
    for role, scopes in ROLES.items():
        world.keys[role] = ApiKey.issue(organization=organization, name=role, scopes=scopes)[1]
    for provider in ("commenda", "cheqpay", "rootfi"):
        records = [
            Record(
                values={"name": f"Person {provider} {n}", "email": f"{provider}{n}@example.com"},
                remote_id=f"{provider}-{n}",
            )
            for n in range(count)
        ]
        receive(organization=organization, connection=connect(provider), records=records, actor=ACTOR)
    target = connect("links", direction=Connection.Direction.PUSH, base_url="https://links.invalid/api/v1")
    links = CustomerLink.objects.filter(connection__organization=organization)
    run = SyncRun.objects.create(
        public_id=SyncRun.new_public_id(),
        organization=organization,
        connection=target,
        kind=SyncRun.Kind.PUSH,
        actor_kind=ACTOR.kind,
        actor_name=ACTOR.name,
    )
    customer = Customer.objects.filter(organization=organization).first()
    assert customer is not None
    pushed = Client().post(
        f"/api/v1/unified/customer/{customer.public_id}/push",
        json.dumps({"connection_ids": [target.public_id]}),
        content_type="application/json",
        headers=world.headers("Customer Hub"),
    )
    assert pushed.status_code == 202, pushed.content
    world.target = target.public_id
    world.ids = {
        "unified_customer_id": [c.public_id for c in Customer.objects.filter(organization=organization)],
        "customer_id": [
            str(uid) for uid in links.filter(connection__provider="commenda").values_list("uid", flat=True)
        ],
        "external_id": [f"cheqpay-{n}" for n in range(count)],
        "source_id": [f"commenda-{n}" for n in range(count)],
        "connection_id": [connection.public_id for connection in Connection.objects.all()],
        "run_id": [run.public_id],
        "operation_id": [pushed.json()["data"]["id"]],
    }
    return world


def document() -> Any:
    return json.loads(reference.document())


def operations(made: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            if method in METHODS:
                yield path, method, operation


def makeable(parameter: str) -> bool:
    """Whether values that fit the parameter's schema will do whatever else is sent.

    A cursor has to come from an answer, a version from a record, a key must not come with another body, and no more
    than 20 filters go together.
    """
    if "[" in parameter:
        return parameter.endswith(("[eq]", "[gte]")) or parameter.startswith("sort[")
    return parameter not in ("wait", "cursor", "next", "prev", "Idempotency-Key", "If-Match", "If-None-Match")


def reachable(made: Any, world: World) -> Any:
    """The document with the accounts that the key reaches as the only ones: generated ones would all be unknown."""
    known = {"corporation_id": ["corp_123"], "company_id": [1089], "connection_id": world.ids["connection_id"]}

    def narrow(node: Any) -> None:
        if isinstance(node, dict):
            properties = node["properties"] if isinstance(node.get("properties"), dict) else {}
            if isinstance(node.get("type"), list) and "format" in node:
                # Of two types beside a format, Schemathesis makes texts without it.
                text = {key: node.pop(key) for key in ("format", "minLength", "maxLength") if key in node}
                node["anyOf"] = [{"type": one, **(text if one == "string" else {})} for one in node.pop("type")]
            if node.get("in") == "query" and "date-time" in json.dumps(node["schema"]):
                moments = ["2024-01-22T05:07:31.465Z", "2031-12-31T23:59:59+01:00"]
                node["schema"] = {"type": "string", "enum": moments + ["null"] * ("anyOf" in node["schema"])}
            for name, values in known.items():
                if "type" in properties.get(name, {}):
                    properties[name]["enum"] = values
            if "connection_ids" in properties:
                properties["connection_ids"]["items"] = {"enum": [world.target]}
            if isinstance(node.get("parameters"), list):
                node["parameters"] = [one for one in node["parameters"] if makeable(one["name"])]
            if node.get("name") == "corporation_id" and node.get("in") == "query":
                node["schema"]["enum"] = ["corp_123"]
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            narrow(inner)

    narrow(made)
    return made


@dataclass
class Outcome:
    cases: int = 0
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    deviations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def report(self) -> str:
        lines = [f"{len(texts)} x {what}\n{texts[0]}" for what, texts in self.deviations.items()]
        return "\n\n".join(lines)


def send_generated(world: World, *, role: str, examples: int, phases: dict[str, Any], seed: int = 1) -> Outcome:
    """What became of requests that were made from the document, valid and not, with a key of this role."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "operations": [
                *(
                    {"include-tag": tag, "headers": world.headers(tag, role), "checks": CHECKS.get(tag, {})}
                    for tag in TAGS
                ),
                # Every item is answered for itself, what is wrong with it too.
                {
                    "include-operation-id": "bulkWriteCustomers",
                    "headers": world.headers("Customer Hub", role),
                    "checks": {
                        **CHECKS["Customer Hub"],
                        "negative_data_rejection": OFF,
                        "positive_data_acceptance": OFF,
                    },
                },
                # Read, it is an id like any other: GET is documented under the address with the id.
                {
                    "include-operation-id": "createOrUpdateCustomer",
                    "headers": world.headers("Cheqpay", role),
                    "checks": {**CHECKS["Cheqpay"], "allow_header_conformance": OFF},
                },
            ],
            "generation": {
                "mode": "all", "max-examples": examples, "allow-x00": False, "no-shrink": True, "database": "none",
            },
            "dictionaries": {name: {"values": ids} for name, ids in world.ids.items()},
            "parameters": {f"path.{name}": {"dictionary": name, "probability": 0.7} for name in world.ids},
            "phases": {"enabled": False, **phases},
        }
    )  # fmt: skip
    schema = schemathesis.openapi.from_dict(reachable(document(), world), config=config)
    schema.app = application
    outcome = Outcome()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError):
            outcome.deviations["error"].append(str(event.info))
        if isinstance(event, events.FatalError):
            raise event.exception
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        for case_id, interaction in recorder.interactions.items():
            outcome.cases += 1
            if interaction.response is not None:
                case = recorder.cases[case_id].value
                outcome.statuses[case.operation.label][interaction.response.status_code] += 1
        for case_id, checks in recorder.checks.items():
            for check in checks:
                if check.status == Status.FAILURE and check.failure_info is not None:
                    failure = check.failure_info.failure
                    answer = recorder.interactions[case_id].response
                    rule = answer is not None and any(text in answer.content for text in BEYOND)
                    if rule and check.name == "positive_data_acceptance":
                        continue
                    # In the body it is read as leniently as in the query: 0 is false.
                    if check.name == "negative_data_rejection" and "in body - run_async" in failure.message:
                        continue
                    # The key that it left out was put back, and Links ignores names in the query that it does not know.
                    if check.name == "negative_data_rejection" and UNTOUCHED.search(failure.message):
                        continue
                    outcome.deviations[f"{check.name} {recorder.cases[case_id].value.operation.label}"].append(
                        f"{failure.title}: {failure.message}\n{check.failure_info.code_sample}\n"
                        f"{answer.status_code if answer else ''} {answer.content[:600] if answer else ''!r}"
                    )
    connections.close_all()
    if connection.vendor == "postgresql":
        connection.close_pool()  # what the threads of the run left open
    return outcome


# Examples


def resolved(made: Any, node: Any) -> Any:
    """The schema with the document's components beside it, so that it can be validated with; it knows every key."""

    def close(inner: Any) -> Any:
        if isinstance(inner, list):
            return [close(one) for one in inner]
        if not isinstance(inner, dict):
            return inner
        inner = {key: close(value) for key, value in inner.items()}
        if isinstance(inner.get("properties"), dict) and inner.get("type") == "object":
            inner.setdefault("additionalProperties", False)
        return inner

    return {**close(node), "components": close(made["components"])}


def examples_of(made: Any) -> Iterator[tuple[str, Any, Any]]:
    for path, method, operation in operations(made):
        contents = [("request", operation.get("requestBody", {}))]
        contents += [(status, answer) for status, answer in operation["responses"].items()]
        for what, holder in contents:
            for content in holder.get("content", {}).values():
                for name, example in content.get("examples", {}).items():
                    yield f"{method} {path} {what} {name}", content["schema"], example["value"]


def test_every_example_fits_its_schema() -> None:
    made = document()
    found = list(examples_of(made))
    assert len(found) > 60
    for name, schema, value in found:
        validator = jsonschema.Draft202012Validator(resolved(made, schema))
        assert [f"{name}: {error.message}" for error in validator.iter_errors(value)] == []


def test_a_wrong_answer_does_not_fit() -> None:
    made = document()
    schema = made["paths"]["/api/v1/unified/customer"]["post"]["responses"]["201"]["content"]["application/json"]
    [example] = schema["examples"].values()
    validator = jsonschema.Draft202012Validator(resolved(made, schema["schema"]))
    wrong = ({"id": 5}, {"id": "12345"}, {"is_active": "yes"}, {"email": None}, {"more": 1}, {"phone": 5})
    for change in wrong:
        assert not validator.is_valid({"data": {**example["value"]["data"], **change}}), change
    for name in example["value"]["data"]:
        assert not validator.is_valid({"data": {k: v for k, v in example["value"]["data"].items() if k != name}}), name


def test_every_documented_request_gives_a_documented_success(world: World) -> None:
    """The request examples as they stand, and a plain call where there is none; answers fit the schema exactly."""
    made, sent = document(), 0
    for path, method, operation in sorted(operations(made), key=lambda one: one[1] == "delete"):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        values = [example["value"] for example in body.get("examples", {}).values()]
        assert values or not body, f"{method} {path} has no example"
        for value in values or [None]:
            address = path
            for name, ids in world.ids.items():
                address = address.replace(f"{{{name}}}", ids[-1])
            text = json.dumps(value) if value is not None else ""
            # Ids of connections in an example are nobody's: those of the same kind here take their place.
            text = re.sub(r"con_[0-9A-Z]{26}", world.target, text)
            text = re.sub(r"cust_[0-9A-Z]{26}", world.ids["unified_customer_id"][0], text)
            query = "?corporation_id=corp_123" if operation["operationId"] == "listCustomers" else ""
            answer = Client().generic(
                method.upper(),
                address + query,
                text,
                content_type="application/json",
                headers=world.headers(operation["tags"][0]),
            )
            assert answer.status_code < 300, (method, path, answer.content)
            documented = operation["responses"][str(answer.status_code)]
            if documented.get("content"):
                schema = resolved(made, documented["content"][answer["Content-Type"]]["schema"])
                found = jsonschema.Draft202012Validator(schema).iter_errors(answer.json())
                assert [f"{method} {path}: {error.message}" for error in found] == []
            for name, header in documented["headers"].items():
                assert name in answer.headers or name.startswith("RateLimit") or not header.get("required"), name
            sent += 1
    assert sent >= len(list(operations(made)))


def test_every_operation_is_described_in_full() -> None:
    made = document()
    identifiers = [operation["operationId"] for _, _, operation in operations(made)]
    assert len(set(identifiers)) == len(identifiers)
    assert {tag["name"] for tag in made["tags"]} == set(TAGS)
    for path, method, operation in operations(made):
        where = f"{method} {path}"
        assert operation["summary"], where
        [tag] = operation["tags"]
        assert tag in TAGS, where
        [scopes] = operation["security"]
        assert all(scope in ApiKey.SCOPES for names in scopes.values() for scope in names), where
        assert {"400", "401", "403", "429", "500"} <= set(operation["responses"]), where
        for status, answer in operation["responses"].items():
            assert answer["description"], where
            if status >= "4":
                media_type = problems.MEDIA_TYPE if tag == "Customer Hub" else "application/json"
                assert list(answer["content"]) == [media_type], (where, status)
    codes = made["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(codes) == set(problems.CODES)


def test_the_document_and_the_hub_mean_the_same_by_blank() -> None:
    for text in [chr(code) for code in (*range(0x3100), 0xFEFF)]:
        accepted = True
        try:
            Text().run_validation(text)
        except ValidationError:
            accepted = False
        assert accepted == bool(re.search(FILLED, text)), ascii(text)


def test_nothing_is_left_to_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("spectacular", validate=True, fail_on_warn=True, format="openapi-json")
    assert "Warning" not in capsys.readouterr().err


# Generated requests


@pytest.mark.parametrize("part", range(4 if connection.vendor == "sqlite" else 1))
def test_generated_requests_find_no_deviation(part: int, world: World) -> None:
    """No 5xx, no undocumented answer, nothing accepted that does not fit, nothing refused that does, no open door.

    A hundred for each operation, in parts with draws of their own, so that several processes share them; a quarter of
    them on PostgreSQL, where the same code answers.
    """
    phases = {"examples": ON, "fuzzing": ON, "stateful": ON}
    outcome = send_generated(world, role="all", examples=25, phases=phases, seed=part)
    assert not outcome.deviations, outcome.report()
    assert outcome.cases > 200
    labels = {f"{method.upper()} {path}" for path, method, _ in operations(document())}
    unreached = [label for label in labels if not any(200 <= status < 300 for status in outcome.statuses[label])]
    assert unreached == []


@pytest.mark.parametrize("role", [role for role in ROLES if role != "all"])
def test_a_role_reaches_what_its_scopes_name_and_no_more(role: str, world: World) -> None:
    outcome = send_generated(world, role=role, examples=200 if FULL else 1, phases={"fuzzing": ON})
    assert not outcome.deviations, outcome.report()
    for path, method, operation in operations(document()):
        answered = outcome.statuses[f"{method.upper()} {path}"]
        [needed] = {scope for scopes in operation["security"] for names in scopes.values() for scope in names}
        if needed not in ROLES[role]:
            assert set(answered) <= {401, 403}, (method, path, answered)
            assert answered[403], (method, path)
        else:
            assert 403 not in answered, (method, path)


@pytest.mark.skipif(not FULL, reason="takes an hour of one core: set HUB_FULL=1")
@pytest.mark.parametrize("part", range(PARTS))
def test_fifty_thousand_generated_requests_find_no_deviation(part: int, world: World) -> None:
    """In parts with draws of their own, so that several processes share them."""
    outcome = send_generated(world, role="all", examples=1, phases={"coverage": ON}, seed=part)
    assert not outcome.deviations, outcome.report()
    total, seed = outcome.cases, 1000 * part
    while total < 50_000 / PARTS:
        seed += 1
        outcome = send_generated(world, role="all", examples=100, phases={"fuzzing": ON, "stateful": ON}, seed=seed)
        assert not outcome.deviations, outcome.report()
        total += outcome.cases
