"""Idempotency keys: one effect each, whatever becomes of requests, processes and answers.

`HUB_FULL=1` takes 20,000 keys through the server instead of 500.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx2
import pytest
from django.db import connection as database
from django.db.models import F
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import re_path
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api.problems import Refusal
from connectors.api.resource import Resource
from connectors.inbound.idempotency import DEAD_AFTER, LIFE
from connectors.models import ApiKey, Connection, IdempotencyKey
from connectors.worker import HOUSEKEEPING, forget_answers
from customers import editing
from customers.models import Customer, CustomerChange, Organization
from hub import urls as hub_urls
from tests.api.mortal import Mortal

FULL = bool(os.environ.get("HUB_FULL"))
LINKS, COMMENDA, ROOTFI = "/api/v1/unified/customer", "/api/v1/customers", "/v3/ecommerce/customers"
OWN = "/api/v1/unified/probe"

# What an action of the own endpoint below does; a test puts it in.
deeds: dict[str, Callable[["Probe"], Response]] = {}


class Probe(Resource):
    """An endpoint of the hub's own that makes a customer and then does what the test says."""

    scopes: ClassVar = {"create": "customers:write", "change": "customers:write"}

    def create(self, request: Request) -> Response:
        [made] = editing.create(
            organization=self.organization, values=[{"name": request.data["name"]}], actor=self.actor
        )
        if deed := deeds.get("create"):
            return deed(self)
        headers = {"ETag": '"v1"', "Location": f"{LINKS}/{made.public_id}"}
        return Response({"data": {"id": made.public_id}}, status=201, headers=headers)

    def change(self, request: Request, name: str) -> Response:
        return self.create(request)


urlpatterns = [
    *hub_urls.urlpatterns,
    re_path(r"^api/v1/unified/probe$", Probe.as_view({"post": "create", "get": "create", "put": "create"})),
    re_path(r"^api/v1/unified/probe/(?P<name>[^/]+)$", Probe.as_view({"patch": "change", "post": "change"})),
]
pytestmark = pytest.mark.urls(__name__)
Send = Callable[..., Any]
BODIES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "own": (OWN, lambda name: {"name": name}),
    "links": (LINKS, lambda name: {"name": name, "email": "a@example.com"}),
    "commenda": (COMMENDA, lambda name: {"name": name, "corporation_id": "corp_123"}),
    "cheqpay": ("/customers/add-update", lambda name: {"externalId": name, "firstName": name}),
    "rootfi": (ROOTFI, lambda name: {"company_id": 1089, "data": [{"name": name}]}),
}


def credentials(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}", "x-api-key": secret, "api_key": secret, "x-merchant-id": "M-1001"}


@pytest.fixture(autouse=True)
def _no_deeds() -> None:
    deeds.clear()


@pytest.fixture
def secret(organization: Organization) -> str:
    """The secret of a key that may do everything, as often as it likes."""
    return ApiKey.issue(organization=organization, name="shop", rate=0)[1]


@pytest.fixture
def send(api: Client, secret: str, connect: Callable[..., Connection]) -> Send:
    for provider in ("commenda", "cheqpay", "rootfi"):
        connect(provider)

    def go(path: str, body: Any, key: str | None = None, *, method: str = "POST", **headers: str) -> Any:
        sent = body if isinstance(body, bytes) else json.dumps(body)
        given = credentials(headers.pop("secret", secret)) | headers
        if key is not None:
            given["Idempotency-Key"] = key
        api.raise_request_exception = False
        return api.generic(method, path, sent, content_type="application/json", headers=given)

    return go


def message_of(answer: Any) -> str:
    """The words of an error in any of the five shapes."""
    body = answer.json()
    error = body.get("error", body)
    return str(error.get("detail") or error["message"])


def passing_headers(answer: Any) -> dict[str, str]:
    own = ("Request-Id", "Idempotent-Replayed", "Server", "Date", "Content-Length")
    return {name: value for name, value in answer.headers.items() if name not in own and "RateLimit" not in name}


# The rules


@pytest.mark.parametrize("surface", BODIES)
def test_a_repeated_request_is_answered_as_before_and_has_no_second_effect(send: Send, surface: str) -> None:
    path, body = BODIES[surface]
    first = send(path, body("Ada"), "key-1")
    assert first.status_code in (200, 201)
    assert "Idempotent-Replayed" not in first.headers
    again = send(path, body("Ada"), "key-1")
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert passing_headers(again) == passing_headers(first)
    assert again["Request-Id"] != first["Request-Id"]
    assert CustomerChange.objects.count() == 1
    assert send(path, body("Ada"), "key-2").status_code in (200, 201)


def test_etag_and_location_are_answered_again(send: Send) -> None:
    first, again = send(OWN, {"name": "Ada"}, "k"), send(OWN, {"name": "Ada"}, "k")
    assert again["ETag"] == first["ETag"] == '"v1"'
    assert again["Location"] == first["Location"]


@pytest.mark.parametrize("surface", BODIES)
def test_another_body_is_refused_in_the_callers_format(send: Send, surface: str) -> None:
    path, body = BODIES[surface]
    send(path, body("Ada"), "key-1")
    refused = send(path, body("Grace"), "key-1")
    assert refused.status_code == (422 if surface == "own" else 400)
    assert "Idempotency-Key" in message_of(refused)
    assert Customer.objects.count() == 1
    if surface == "own":
        assert refused.json()["code"] == "idempotency_key_reused"
    # The refusal has not taken the place of the answer.
    assert send(path, body("Ada"), "key-1").headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize("surface", BODIES)
def test_a_request_under_way_is_answered_409_and_retry_after(send: Send, surface: str) -> None:
    path, body = BODIES[surface]
    send(path, body("Ada"), "key-1")
    IdempotencyKey.objects.update(status=None, headers={}, body=b"")
    busy = send(path, body("Ada"), "key-1")
    assert (busy.status_code, busy["Retry-After"]) == (409, "1")
    assert "still being worked on" in message_of(busy)
    assert CustomerChange.objects.count() == 1
    IdempotencyKey.objects.update(reserved_at=F("reserved_at") - DEAD_AFTER)
    assert send(path, body("Ada"), "key-1").status_code in (200, 201)
    assert send(path, body("Ada"), "key-1").headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize("surface", BODIES)
@pytest.mark.parametrize("key", ["", "   ", "x" * 256, "schlüssel", "tab\there", "nul\x00"])
def test_a_key_that_cannot_be_used_is_refused_by_name(send: Send, surface: str, key: str) -> None:
    path, body = BODIES[surface]
    refused = send(path, body("Ada"), key)
    assert refused.status_code == 400
    assert "Idempotency-Key" in message_of(refused)
    assert not Customer.objects.exists()
    assert not IdempotencyKey.objects.exists()
    if surface == "own":
        assert refused.json()["code"] == "idempotency_key_invalid"


def test_the_longest_key_and_every_printable_character_are_taken(send: Send) -> None:
    for key in ("x" * 255, "".join(map(chr, range(0x21, 0x7F)))):
        assert send(OWN, {"name": "Ada"}, key).status_code == 201
        assert send(OWN, {"name": "Ada"}, key).headers["Idempotent-Replayed"] == "true"


def test_another_address_or_version_is_another_request(send: Send) -> None:
    assert send(f"{OWN}/1", {"name": "Ada"}, "k", method="PATCH", **{"If-Match": '"v1"'}).status_code == 201
    assert send(f"{OWN}/2", {"name": "Ada"}, "k", method="PATCH", **{"If-Match": '"v1"'}).status_code == 422
    assert send(f"{OWN}/1", {"name": "Ada"}, "k", method="PATCH", **{"If-Match": '"v2"'}).status_code == 422
    assert send(f"{OWN}/1?x=1", {"name": "Ada"}, "k", method="PATCH", **{"If-Match": '"v1"'}).status_code == 422
    same = send(f"{OWN}/1", {"name": "Ada"}, "k", method="PATCH", **{"If-Match": '"v1"'})
    assert same.headers["Idempotent-Replayed"] == "true"
    # A key belongs to a method and a route.
    assert send(f"{OWN}/1", {"name": "Ada"}, "k").status_code == 201
    assert Customer.objects.count() == 2


def test_the_merchant_of_cheqpay_is_part_of_the_request(send: Send, connect: Callable[..., Connection]) -> None:
    connect("cheqpay", name="other", account="M-2")
    path, body = BODIES["cheqpay"]
    assert send(path, body("A"), "k").status_code == 200
    assert send(path, body("A"), "k", **{"x-merchant-id": "M-2"}).status_code == 400
    assert Customer.objects.count() == 1


def test_a_key_is_known_to_its_api_key_only(
    send: Send, organization: Organization, other_organization: Organization
) -> None:
    first = send(OWN, {"name": "Ada"}, "k")
    for owner in (organization, other_organization):
        other = ApiKey.issue(organization=owner, name="other")[1]
        answer = send(OWN, {"name": "Ada"}, "k", secret=other)
        assert answer.status_code == 201
        assert answer.json() != first.json()
        assert "Idempotent-Replayed" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("key", ["k", ""])
def test_other_methods_ignore_the_header(send: Send, method: str, key: str) -> None:
    for _ in range(2):
        assert send(OWN, {"name": "Ada"}, key, method=method).status_code in (201, 400)
    assert not IdempotencyKey.objects.exists()


def test_a_refusal_is_kept_unless_it_may_pass(send: Send, organization: Organization) -> None:
    first = send(LINKS, {"name": "Ada"}, "invalid")
    assert first.status_code == 400
    again = send(LINKS, {"name": "Ada"}, "invalid")
    assert (again.status_code, again.content) == (400, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"

    broken = send(OWN, b"{", "broken")
    again = send(OWN, b"{", "broken")
    assert broken.status_code == 400
    assert (again.content, again["Content-Type"]) == (broken.content, "application/problem+json")
    assert again.headers["Idempotent-Replayed"] == "true"

    key, weak = ApiKey.issue(organization=organization, name="weak", scopes=["customers:read"])
    assert send(OWN, {"name": "Ada"}, "scope", secret=weak).status_code == 403
    key.scopes = ["customers:write"]
    key.save()
    assert send(OWN, {"name": "Ada"}, "scope", secret=weak).status_code == 201

    _, slow = ApiKey.issue(organization=organization, name="slow", rate=0.5)
    assert send(OWN, {"name": "A"}, "first", secret=slow).status_code == 201
    assert send(OWN, {"name": "B"}, "second", secret=slow).status_code == 429
    ApiKey.objects.filter(name="slow").update(rate=0)
    assert send(OWN, {"name": "B"}, "second", secret=slow).status_code == 201

    assert send(OWN, {"name": "Ada"}, "no", secret="unknown").status_code == 401
    assert not IdempotencyKey.objects.filter(key="no").exists()


def failing(view: Probe) -> Response:
    raise RuntimeError("the disk is full")


def conflicting(view: Probe) -> Response:
    raise Refusal("conflict", "Not now.")


@pytest.mark.parametrize(
    ("deed", "status"),
    [
        (failing, 500),
        (conflicting, 409),
        (lambda view: Response({"data": None}, status=503), 503),
        (lambda view: Response({"data": None}, status=409), 409),
        (lambda view: Response({"data": object()}, status=201), 500),
    ],
)
def test_nothing_is_kept_of_what_failed_and_the_same_key_may_try_again(
    send: Send, deed: Callable[[Probe], Response], status: int
) -> None:
    deeds["create"] = deed
    for _ in range(2):
        assert send(OWN, {"name": "Ada"}, "k").status_code == status
        assert not Customer.objects.exists()
        assert not IdempotencyKey.objects.exists()
    deeds.clear()
    assert send(OWN, {"name": "Ada"}, "k").status_code == 201
    assert Customer.objects.count() == 1


def test_an_answer_without_a_body_is_kept_as_such(send: Send) -> None:
    deeds["create"] = lambda view: Response(status=204)
    for _ in range(2):
        answer = send(OWN, {"name": "Ada"}, "k")
        assert (answer.status_code, answer.content) == (204, b"")
        assert "Content-Type" not in answer.headers
    assert Customer.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_an_action_that_waits_does_so_when_its_effect_is_committed(send: Send) -> None:
    def wait(view: Probe) -> Response:
        def waited() -> Response:
            assert not database.in_atomic_block
            assert IdempotencyKey.objects.get().status == 202
            return Response({"data": "finished"})

        view.afterwards = waited
        return Response({"data": "accepted"}, status=202)

    deeds["create"] = wait
    assert send(OWN, {"name": "Ada"}, "k").json() == {"data": "finished"}
    assert send(OWN, {"name": "Ada"}, "k").json() == {"data": "accepted"}
    assert Customer.objects.count() == 1
    for status, answer in ((202, "late"), (503, "early")):

        def deed(view: Probe, status: int = status) -> Response:
            view.afterwards = lambda: Response("late")
            return Response("early", status=status)

        deeds["create"] = deed
        for key in (None, str(status)):
            assert send(OWN, {"name": "Ada"}, key).json() == answer


def test_a_key_lives_for_a_day(send: Send) -> None:
    first = send(OWN, {"name": "Ada"}, "k")
    IdempotencyKey.objects.update(created_at=F("created_at") - LIFE + timedelta(minutes=1))
    assert send(OWN, {"name": "Ada"}, "k").content == first.content
    IdempotencyKey.objects.update(created_at=F("created_at") - timedelta(minutes=1))
    fresh = send(OWN, {"name": "Grace"}, "k")
    assert fresh.status_code == 201
    assert "Idempotent-Replayed" not in fresh.headers
    assert send(OWN, {"name": "Grace"}, "k").content == fresh.content
    assert send(OWN, {"name": "Ada"}, "k").status_code == 422
    assert Customer.objects.count() == 2


def test_housekeeping_forgets_what_is_over(send: Send) -> None:
    assert forget_answers in HOUSEKEEPING
    for key in ("old", "new"):
        send(OWN, {"name": "Ada"}, key)
    IdempotencyKey.objects.filter(key="old").update(created_at=timezone.now() - LIFE - timedelta(seconds=1))
    assert forget_answers(timezone.now()) == 1
    assert IdempotencyKey.objects.get().key == "new"


def test_what_a_key_costs(send: Send) -> None:
    def statements(key: str | None, name: str) -> int:
        with CaptureQueriesContext(database) as queries:
            assert send(LINKS, {"name": name, "email": "a@example.com"}, key).status_code == 201
        return len(queries)

    statements(None, "warm")
    without = statements(None, "a")
    assert statements(None, "b") == without
    # Reserve: BEGIN, INSERT, COMMIT, SELECT. Then a transaction around the action's own, and the answer.
    assert statements("k", "c") <= without + 7
    # Who it is, the reservation that is not made, and the answer.
    assert statements("k", "c") <= 5


def test_a_body_at_the_limit_is_compared_and_one_beyond_it_refused(send: Send, settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    filled = json.dumps({"name": "Ada", "pad": ""}).replace('""', '"' + "x" * 970 + '"')
    body = filled.encode().ljust(1000)
    assert send(OWN, body, "k").status_code == 201
    assert send(OWN, body, "k").headers["Idempotent-Replayed"] == "true"
    assert send(OWN, body[:-1], "k").status_code == 422
    assert send(OWN, body + b" ", "big").status_code == 400
    assert not IdempotencyKey.objects.filter(key="big").exists()


def test_no_log_tells_a_secret_or_a_body(send: Send, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    deeds["create"] = failing
    send(OWN, {"name": "canary-body"}, "canary-key")
    deeds.clear()
    for name in ("canary-body", "canary-body", "canary-other"):
        send(OWN, {"name": name}, "canary-key")
    assert "the disk is full" in caplog.text
    for hidden in (secret, "canary"):
        assert hidden not in caplog.text


# Processes that die


@pytest.mark.django_db(transaction=True)
def test_a_process_that_dies_at_any_point_leaves_one_effect_and_an_answer(send: Send, secret: str) -> None:
    seen: Counter[str] = Counter()
    with Mortal() as mortal:
        for point in range(1, 200):
            key, body = f"key-{point}", {"name": f"Customer {point}", "email": "a@example.com"}
            headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": key}
            mortal.tell(path=LINKS, headers=headers, body=json.dumps(body), die_at=point)
            told = mortal.hear()
            if "died" not in told:
                break
            answer = send(LINKS, body, key)
            if answer.status_code == 409:
                assert not Customer.objects.filter(name=body["name"]).exists(), told
                seen["taken over"] += 1
                IdempotencyKey.objects.filter(key=key).update(reserved_at=F("reserved_at") - DEAD_AFTER)
                answer = send(LINKS, body, key)
                assert "Idempotent-Replayed" not in answer.headers
            else:
                seen["answered" if "Idempotent-Replayed" in answer.headers else "never reserved"] += 1
            assert answer.status_code == 201, told
            customer = Customer.objects.get(name=body["name"])
            assert answer.json()["data"]["id"] == customer.public_id
            assert customer.changes.count() == 1
            assert send(LINKS, body, key).content == answer.content
    assert told["status"] == 201
    assert set(seen) == {"taken over", "answered", "never reserved"}, seen


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("pause_at", ["after SELECT", "before UPDATE"])
def test_a_process_that_was_taken_over_cannot_commit_its_effect(send: Send, secret: str, pause_at: str) -> None:
    if pause_at == "before UPDATE" and database.vendor == "sqlite":
        pytest.skip("SQLite lets nobody else write while a transaction is open, so nobody can take over")
    body = {"name": "Ada", "email": "a@example.com"}
    headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "k"}
    with Mortal() as mortal:
        mortal.tell(
            path=LINKS, headers=headers, body=json.dumps(body), pause_at=f'{pause_at} "connectors_idempotencykey"'
        )
        assert "paused" in mortal.hear()
        assert send(LINKS, body, "k").status_code == 409
        IdempotencyKey.objects.update(reserved_at=F("reserved_at") - DEAD_AFTER)
        answer = send(LINKS, body, "k")
        assert answer.status_code == 201
        mortal.tell()
        late = mortal.hear()
    assert late["status"] == 409, late
    assert late["headers"]["Retry-After"] == "1", late
    assert Customer.objects.get().public_id == answer.json()["data"]["id"]
    assert send(LINKS, body, "k").content == answer.content


# The running server


def test_thirty_two_threads_with_one_key_have_one_effect(
    server: str, secret: str, connect: Callable[..., Connection]
) -> None:
    for provider in ("commenda", "cheqpay", "rootfi"):
        connect(provider)
    statuses: Counter[int] = Counter()
    with httpx2.Client(base_url=server, timeout=120) as client, ThreadPoolExecutor(32) as threads:
        for round_ in range(3):
            for surface, (path, body) in BODIES.items():
                if surface == "own":
                    continue
                name = f"{surface} {round_}"
                headers = {**credentials(secret), "Idempotency-Key": name}
                post = partial(client.post, path, json=body(name), headers=headers)
                answers = [future.result() for future in [threads.submit(post) for _ in range(32)]]
                statuses.update(answer.status_code for answer in answers)
                done = [a for a in answers if a.status_code < 300]
                assert {a.status_code for a in answers} - {409} == {done[0].status_code}
                assert len({a.content for a in done}) == 1
                assert sum("Idempotent-Replayed" not in a.headers for a in done) == 1
                assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 409)
                assert Customer.objects.filter(name=name).count() == 1
    assert Customer.objects.count() == CustomerChange.objects.count() == 12
    assert set(statuses) <= {200, 201, 409}


def test_many_keys_have_one_effect_each(server: str, secret: str, connect: Callable[..., Connection]) -> None:
    connect("commenda")
    connect("rootfi")
    number = 20_000 if FULL else 500
    statuses: Counter[int] = Counter()
    surfaces = ("links", "commenda", "rootfi")
    gate = threading.Lock()

    def post(client: httpx2.Client, place: int, name: str) -> httpx2.Response:
        path, body = BODIES[surfaces[place % 3]]
        while True:
            headers = {**credentials(secret), "Idempotency-Key": f"key {place}"}
            answer = client.post(path, json=body(name), headers=headers)
            with gate:
                statuses[answer.status_code] += 1
            if answer.status_code != 409:
                return answer
            time.sleep(0.02)

    with httpx2.Client(base_url=server, timeout=120) as client, ThreadPoolExecutor(32) as threads:
        # Every key twice at about the same time, and with another body once it is known.
        first = [threads.submit(post, client, place // 2, f"Customer {place // 2}") for place in range(2 * number)]
        answers = [future.result() for future in first]
        other = [threads.submit(post, client, place, "Another") for place in range(number)]
        refused = Counter(future.result().status_code for future in other)
    for one, two in zip(answers[::2], answers[1::2], strict=True):
        assert one.status_code in (200, 201)
        assert (one.status_code, one.content) == (two.status_code, two.content)
        assert ("Idempotent-Replayed" in one.headers) != ("Idempotent-Replayed" in two.headers)
    assert refused == {400: number}
    assert Customer.objects.count() == CustomerChange.objects.count() == number
    assert IdempotencyKey.objects.exclude(status=None).count() == number
    assert set(statuses) <= {200, 201, 400, 409}


def test_a_body_in_chunks_is_compared_like_any_other(server: str, secret: str) -> None:
    sent = json.dumps({"name": "Ada", "email": "a@example.com"}).encode()
    answers = []
    for chunked in (True, True, False):
        line = HTTPConnection(urlsplit(server).netloc, timeout=30)
        headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "k", "Content-Type": "application/json"}
        line.request("POST", LINKS, iter([sent[:9], sent[9:]]) if chunked else sent, headers, encode_chunked=chunked)
        answer = line.getresponse()
        answers.append((answer.status, answer.headers["Idempotent-Replayed"], answer.read()))
        line.close()
    assert [a[:2] for a in answers] == [(201, None), (201, "true"), (201, "true")]
    assert len({a[2] for a in answers}) == 1
