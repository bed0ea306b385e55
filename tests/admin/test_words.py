"""Every state is told in the same words on every screen, by the API and by the commands, and never without words."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from connectors.models import ApiKey, Conflict, Connection, CustomerLink, SyncRun
from connectors.states import HEALTH, PARKED, RUN_STATUSES, STATUSES, LinkState, health_sentence
from customers.models import Organization
from tests.admin.test_needs_you import KINDS, STATES, put
from tests.connectors.test_admin import change, new_customer, staff
from tests.connectors.test_commands import run

SOON, AGO = timezone.now() + timedelta(hours=1), timezone.now() - timedelta(minutes=5)
# What makes a link of a connection be in each state.
LINKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in_sync": ({}, {"pushed_version": 1, "synced_at": AGO}),
    "waiting": ({}, {"next_attempt_at": AGO}),
    "sending": ({}, {"next_attempt_at": AGO, "lease_until": SOON}),
    "rate_limited": ({"not_before": SOON}, {"next_attempt_at": AGO}),
    "retrying": ({}, {"state": "retrying", "next_attempt_at": SOON, "error": "Busy."}),
    "rejected": ({}, STATES["rejected"]),
    "checking": ({}, {"state": "uncertain", "remote_id": None, "next_attempt_at": SOON}),
    "uncertain": ({}, {"state": "uncertain", "remote_id": None}),
    "conflict": ({}, STATES["conflict"]),
    "remote_deleted": ({}, STATES["remote_deleted"]),
    "duplicate": ({}, STATES["duplicate"]),
    "paused": ({"state": "paused", "state_reason": "Stocktaking (Anna)"}, {"next_attempt_at": AGO}),
    "reconnect": ({"state": "needs_reauth", "state_reason": "The key was withdrawn."}, {"next_attempt_at": AGO}),
    "calls_us": ({"direction": "calls_us"}, {"pushed_version": 1}),
}
NOT_WORDS = re.compile(r"\bNone\b|Traceback|\{[a-z_]+\}")


def text_of(answer: Any) -> str:
    """What a person reads of a page: neither its head nor its mark-up nor its scripts."""
    body = answer.content.decode().partition("<body")[2]
    body = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", body, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def unescaped(text: str) -> str:
    return text.replace("&#x27;", "'").replace("&quot;", '"').replace("&amp;", "&")


@pytest.fixture
def made(connect: Callable[..., Connection], organization: Organization) -> Callable[[str], CustomerLink]:
    def make(key: str) -> CustomerLink:
        on_connection, on_link = LINKS[key]
        shop = connect("links", name="Shop", account="1", **{"direction": "push", **on_connection})
        link = put(shop, key, customer=new_customer(organization), **on_link)
        for field in link.conflicts:
            Conflict.objects.create(
                organization=organization,
                connection=shop,
                link=link,
                field=field,
                outcome=Conflict.Outcome.WAITING,
                at=link.updated_at,
            )
        return link

    return make


def test_every_state_is_tried() -> None:
    assert LINKS.keys() == STATUSES.keys() - {"not_linked"}


def test_the_columns_labels_are_the_same_words() -> None:
    assert {state: RUN_STATUSES[state].word for state in SyncRun.State.values} == dict(SyncRun.State.choices)
    assert {LinkState(state): STATUSES[state].word for state in PARKED} == {
        state: state.label for state in map(LinkState, PARKED)
    }
    health = {"active": "healthy", "paused": "paused", "needs_reauth": "needs_login"}
    assert {state: HEALTH[key].word for state, key in health.items()} == dict(Connection.State.choices)


@pytest.mark.parametrize("key", LINKS)
def test_a_state_is_told_in_its_words_wherever_it_is_told(
    key: str, made: Callable[[str], CustomerLink], organization: Organization, admin_client: Client
) -> None:
    link = made(key)
    now = timezone.now()
    status = STATUSES[key]
    assert link.status_key(now=now) == key
    sentence = link.sentence(now=now)
    assert sentence
    assert not NOT_WORDS.search(sentence)
    pages = {
        "list of customers": reverse("admin:customers_customer_changelist"),
        "customer": change(link.customer),
        "link": change(link),
        "list of links": reverse("admin:connectors_customerlink_changelist"),
        "resolve": change(link, "resolve"),
    }
    if key in KINDS:
        pages["needs you"] = reverse("admin:connectors_customerlink_needs_you")
    if key in (*KINDS, "reconnect"):
        pages["dashboard"] = reverse("admin:index")
    for name, address in pages.items():
        text = unescaped(text_of(admin_client.get(address)))
        assert status.word in text, name
        assert status.icon in text, name
        assert not NOT_WORDS.search(text), (name, NOT_WORDS.search(text))
        if name in ("customer", "link", "resolve", "needs you"):
            assert sentence in text, name
    secret = ApiKey.issue(organization=organization, name="shop")[1]
    headers = {"Authorization": f"Bearer {secret}"}
    [told] = Client().get(f"/api/v1/unified/customer/{link.customer.public_id}/links", headers=headers).json()["data"]
    assert (told["state"], told["word"], told["sentence"]) == (key, status.word, sentence)
    assert told["turn"] == status.turn.replace(" ", "_")
    found = admin_client.get(pages["list of links"], {"shown_state": key}).context["cl"].result_list
    assert [row.pk for row in found] == [link.pk]


@pytest.mark.parametrize("key", ["rejected", "conflict", "uncertain", "remote_deleted"])
def test_the_command_tells_the_same_words(key: str, made: Callable[[str], CustomerLink]) -> None:
    link = made(key)
    if key == "conflict":
        CustomerLink.objects.update(state="conflict", pushed_version=0, conflicts={})
    listed = run("retry_customers", "Shop", "--list")
    line = next(line for line in listed.out.splitlines() if link.customer.public_id in line)
    assert line.startswith(f"{STATUSES[key].word}: ")
    assert not NOT_WORDS.search(listed.out)
    assert run("retry_customers", "Shop", "--list", "--json").objects[0]["problems"][0]["state"] == key


@pytest.mark.parametrize("state", SyncRun.State.values)
def test_a_run_is_told_in_its_words(
    state: str, connect: Callable[..., Connection], organization: Organization, admin_client: Client
) -> None:
    shop = connect("links", name="Shop", account="1", direction="push")
    one = SyncRun.objects.create(
        public_id="a" * 16, organization=organization, connection=shop, kind="push", state=state, actor_kind="user",
        actor_name="Anna", started_at=AGO,
    )  # fmt: skip
    addresses = [change(one), reverse("admin:connectors_syncrun_changelist")]
    if state in ("queued", "running"):
        addresses.append(reverse("admin:index"))
    for address in addresses:
        text = text_of(admin_client.get(address))
        assert RUN_STATUSES[state].word in text
        assert RUN_STATUSES[state].icon in text
        assert not NOT_WORDS.search(text)


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("healthy", {}),
        ("degraded", {}),
        ("rate_limited", {"not_before": SOON}),
        ("failing", {"breaker_trips": 1, "breaker_until": SOON}),
        ("needs_login", {"state": "needs_reauth", "state_reason": "Withdrawn."}),
        ("paused", {"state": "paused", "state_reason": "Stocktaking"}),
        ("calls_us", {"direction": "calls_us"}),
    ],
)
def test_a_connection_is_told_in_its_words(
    key: str, fields: dict[str, Any], connect: Callable[..., Connection], organization: Organization
) -> None:
    shop = connect("links", name="Shop", account="1", **{"direction": "push", **fields})
    if key == "degraded":
        put(shop, "rejected")
    text = text_of(staff(organization, "connectors.view_connection").get(reverse("admin:index")))
    assert HEALTH[key].word in text
    assert HEALTH[key].icon in text
    assert not NOT_WORDS.search(text)
    sentence = health_sentence(shop, parked=int(key == "degraded"), now=timezone.now())
    assert sentence
    assert not NOT_WORDS.search(sentence)
