"""The page on which one link is settled: what is known, what each way means, and that only a POST decides."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.states import STATUSES
from customers import editing
from customers.models import Customer, MergeRecord
from tests.connectors.test_admin import change, staff, told
from tests.connectors.test_resolve import gone, in_conflict, refused, synced
from tests.connectors.test_sweep import ACTOR, NOTHING, Shop, shops

__all__ = ["shops"]  # a fixture
LOOK = ("connectors.view_customerlink", "customers.view_customer")
PUSH, EDIT, SEE = "connectors.push_customerlink", "customers.change_customer", "customers.view_personal_data"


@pytest.fixture
def shop(shops: Any) -> Shop:
    made: Shop = shops(**NOTHING)
    return made


def resolve_url(link: CustomerLink) -> str:
    return change(link, "resolve")


def page(client: Client, link: CustomerLink) -> str:
    answer = client.get(resolve_url(link))
    assert answer.status_code == 200
    text: str = answer.content.decode()
    assert "None" not in text
    return text


def decide(client: Client, link: CustomerLink, decision: str, **more: str) -> str:
    answer = client.post(resolve_url(link), {"decision": decision, **more})
    assert answer.status_code == 302
    return told(answer)


def test_an_uncertain_create_shows_what_was_sent_and_the_three_ways(shop: Shop) -> None:
    [link] = shop.lose()
    client = staff(shop.organization, *LOOK, PUSH, SEE)
    text = page(client, link)
    lost = PushIntent.objects.get()
    assert STATUSES["uncertain"].word in text
    assert "0@example.com" in text
    assert json.dumps(lost.payload["name"]) in text.replace("&quot;", '"')
    assert str(lost.key) in text
    for words in ("This is it", "Create again", "Keep waiting", "Search there now"):
        assert words in text
    text = page(staff(shop.organization, *LOOK), link)
    assert "Create again" not in text
    assert "It waits for somebody who may push customers." in text


def test_without_the_right_nothing_personal_is_on_the_page(shop: Shop) -> None:
    [link] = shop.lose()
    client = staff(shop.organization, *LOOK, PUSH)
    text = page(client, link)
    assert "0@example.com" not in text
    assert "0•••@example.com" in text
    assert "shown to those who may see personal data" in text


def test_what_a_paused_system_waits_for_is_told_without_what_it_quotes(shop: Shop) -> None:
    [link] = shop.lose()
    Connection.objects.update(state="paused", state_reason="They asked about 0@example.com.")
    assert "They asked about 0@example.com." in page(staff(shop.organization, *LOOK, PUSH, SEE), link)
    text = page(staff(shop.organization, *LOOK, PUSH), link)
    assert "They asked about" in text
    assert "0@example.com" not in text


@pytest.mark.django_db(transaction=True)
def test_a_search_shows_likely_records_beside_what_was_sent_and_one_is_chosen(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    [link] = shop.lose()
    client = staff(shop.organization, *LOOK, PUSH, SEE)
    before = CustomerLink.objects.values().get(), SyncRun.objects.count(), len(shop.account.judge().requests())
    client.get(resolve_url(link))
    assert len(shop.account.judge().requests()) == before[2]
    answer = client.post(resolve_url(link), {"decision": "search"})
    text = answer.content.decode()
    assert "1 record may be it." in text
    assert "The same e-mail address." in text
    assert "Record <code>r1</code>" in text
    assert (CustomerLink.objects.values().get(), SyncRun.objects.count()) == before[:2]
    blind = staff(shop.organization, *LOOK, PUSH).post(resolve_url(link), {"decision": "search"}).content.decode()
    assert "0@example.com" not in blind
    said = decide(client, link, "this_is_it", remote_id="r9")
    assert "shop has no record r9." in said
    assert "is linked to the record" in decide(client, link, "this_is_it", remote_id="r1")
    link.refresh_from_db()
    assert (link.remote_id, link.state, link.base_remote["name"]) == ("r1", "open", "Example 0")
    assert SyncRun.objects.latest("pk").actor_name == "clerk0"


def test_a_system_that_does_not_answer_is_told_and_nothing_moves(shop: Shop) -> None:
    [link] = shop.lose()
    Connection.objects.update(base_url="http://127.0.0.1:9/")
    client = staff(shop.organization, *LOOK, PUSH)
    assert "could not be searched" in decide(client, link, "search")
    assert "Nothing was changed." in decide(client, link, "this_is_it", remote_id="r1")
    link.refresh_from_db()
    assert link.state == "uncertain"


def test_create_again_and_keep_waiting(shop: Shop) -> None:
    first, second = shop.lose(2)
    client = staff(shop.organization, *LOOK, PUSH)
    assert "Nothing was changed. A pull" in decide(client, second, "keep_waiting")
    assert "created in shop again" in decide(client, first, "create_again")
    first.refresh_from_db()
    second.refresh_from_db()
    assert (first.state, first.epoch, second.state) == ("open", 2, "uncertain")
    again = decide(client, first, "create_again")
    assert "is missing. Nothing was changed." in again


def test_a_create_that_is_still_looked_for_is_not_made_again(shop: Shop) -> None:
    [link] = shop.lose()
    CustomerLink.objects.update(next_attempt_at=shop.clock())
    client = staff(shop.organization, *LOOK, PUSH)
    text = page(client, link)
    assert "still looking for it by itself" in text
    assert 'value="create_again"' not in text
    assert "still being looked for" in decide(client, link, "create_again")


@pytest.mark.parametrize(
    ("decision", "after", "words"),
    [
        ("recreate", ("open", None, True), "is created in shop again"),
        ("unlink", ("remote_deleted", "r1", False), "stays deleted in shop"),
        ("archive", ("remote_deleted", "r1", True), "is in the archive"),
    ],
)
def test_what_is_gone_is_made_again_left_or_archived(
    shop: Shop, decision: str, after: tuple[str, str | None, bool], words: str
) -> None:
    link = gone(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT)
    text = page(client, link)
    for way in ("Recreate", "Unlink", "Archive the customer", "Test."):
        assert way in text
    assert words in decide(client, link, decision)
    link.refresh_from_db()
    assert (link.state, link.remote_id, link.is_active) == after
    assert bool(Customer.objects.get().archived_at) == (decision == "archive")
    assert "waits for a decision" in page(client, link)


def test_archiving_needs_the_right_to_change_customers(shop: Shop) -> None:
    link = gone(shop)
    client = staff(shop.organization, *LOOK, PUSH)
    assert "Archive the customer" not in page(client, link)
    assert client.post(resolve_url(link), {"decision": "archive"}).status_code == 403
    assert Customer.objects.get().archived_at is None


def test_a_duplicate_names_the_record_that_is_sent_to_and_may_be_kept(shop: Shop) -> None:
    one, other = synced(shop, name="Acme"), synced(shop, name="Acme Ltd")
    editing.merge(
        organization=shop.organization, survivor=one.customer_id, loser=other.customer_id, values={}, actor=ACTOR
    )
    assert MergeRecord.objects.exists()
    other.refresh_from_db()
    assert other.is_duplicate
    client = staff(shop.organization, *LOOK, PUSH)
    text = page(client, other)
    assert f"{change(one)}" in text
    assert f"{change(other)}" in text
    assert "r1" in text
    assert "Acme Ltd" in text
    assert "Both records stay" in decide(client, other, "keep_both")
    other.refresh_from_db()
    assert (other.is_duplicate, other.is_active) == (True, False)
    assert SyncRun.objects.latest("pk").request["decision"] == "keep_both"
    assert "sent to" in decide(client, one, "keep_both")


def test_a_rejected_one_leads_to_the_field_and_is_pushed_again(shop: Shop) -> None:
    refused(shop, 1)
    CustomerLink.objects.update(error_field="phone", error="Too short.")
    link = CustomerLink.objects.select_related("customer").get()
    text = page(staff(shop.organization, *LOOK, PUSH, EDIT), link)
    assert f"{change(link.customer)}#id_phone" in text
    assert "Too short." in text
    client = staff(shop.organization, *LOOK, PUSH)
    assert "is sent to shop again" in decide(client, link, "release")
    link.refresh_from_db()
    assert (link.state, link.attempts) == ("open", 0)
    assert "Nothing of shop was refused" in decide(client, link, "release")


def test_fields_in_conflict_are_settled_here_too(shop: Shop) -> None:
    link = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    text = page(client, link)
    for value in ("‹1›", "‹22›", "‹333›"):
        assert value in text
    token = client.get(resolve_url(link)).context["rows"][0].token
    key = f"{link.pk}-phone"
    assert "1 of 1 fields are decided" in decide(
        client, link, "fields", **{f"side-{key}": "there", f"seen-{key}": token}
    )
    link.refresh_from_db()
    assert (link.conflicts, Customer.objects.get().phone) == ({}, "333")


def test_afterwards_one_is_where_one_came_from_but_nowhere_else(shop: Shop) -> None:
    refused(shop, 4)
    client = staff(shop.organization, *LOOK, PUSH)
    queue = "/admin/connectors/customerlink/needs-you/?kind=rejected"
    ends = {queue: queue, "https://elsewhere.example/": "", "//elsewhere.example/admin/": "", "/api/": ""}
    for link, (wanted, leads) in zip(CustomerLink.objects.order_by("pk"), ends.items(), strict=True):
        answer = client.post(resolve_url(link), {"decision": "release", "next": wanted})
        assert answer["Location"] == (leads or change(link.customer))


def test_only_a_post_with_right_and_token_decides(shop: Shop) -> None:
    link = gone(shop)
    before = CustomerLink.objects.values().get(), SyncRun.objects.count()
    url = resolve_url(link)
    client = staff(shop.organization, *LOOK, PUSH)
    assert client.get(url, {"decision": "unlink"}).status_code == 200
    assert client.put(url, {"decision": "unlink"}).status_code == 405
    assert client.post(url, {"decision": "forget"}).status_code == 400
    assert staff(shop.organization, *LOOK).post(url, {"decision": "unlink"}).status_code == 403
    assert staff(shop.organization, PUSH).get(url).status_code == 403
    assert staff(None, *LOOK, PUSH).get(url).status_code == 404
    assert staff(None, *LOOK, PUSH).post(url, {"decision": "unlink"}).status_code == 404
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = client.cookies
    assert strict.post(url, {"decision": "unlink"}).status_code == 403
    assert (CustomerLink.objects.values().get(), SyncRun.objects.count()) == before


def test_looking_writes_nothing(shop: Shop) -> None:
    [link] = shop.lose()
    client = staff(shop.organization, *LOOK, PUSH)
    with CaptureQueriesContext(database) as queries:
        client.get(resolve_url(link))
    writing = [q["sql"] for q in queries if not q["sql"].lstrip().upper().startswith(("SELECT", "BEGIN", "COMMIT"))]
    assert [sql for sql in writing if "SAVEPOINT" not in sql] == []
    assert len(queries) <= 16
