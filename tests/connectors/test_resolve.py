"""What a person decides about a link that waits: each decision does what it says, once, and tells who made it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from connectors.models import Conflict, CustomerLink, PushIntent, SyncRun
from connectors.states import LinkState
from connectors.sync import deletes
from connectors.sync.pull import pull
from connectors.sync.push import push
from connectors.sync.resolve import (
    WrongState,
    create_again,
    keep_field,
    keep_waiting,
    likely,
    recreate,
    release,
    this_is_it,
    unlink,
)
from customers import editing
from customers.models import CustomerChange
from tests.connectors.test_commands import run
from tests.connectors.test_sweep import ACTOR, LAGGING, NOTHING, Shop, shops

__all__ = ["shops"]  # a fixture
BOTH = {**NOTHING, "conditional": True}


def outcome(decided: SyncRun) -> tuple[str, dict[str, int]]:
    decided.refresh_from_db()
    assert (decided.actor_kind, decided.actor_name, decided.total) == ("user", "Anna", decided.planned)
    return decided.state, {name: getattr(decided, name) for name in SyncRun.TOTALS if getattr(decided, name)}


def refuses(words: str, do: Callable[..., Any], link: CustomerLink, **more: Any) -> None:
    """Refused in words, and nothing has moved."""
    before = CustomerLink.objects.filter(pk=link.pk).values().get(), SyncRun.objects.count()
    with pytest.raises(WrongState, match=words):
        do(link=link, actor=ACTOR, **more)
    assert (CustomerLink.objects.filter(pk=link.pk).values().get(), SyncRun.objects.count()) == before


def synced(shop: Shop, **values: Any) -> CustomerLink:
    [customer] = shop.customers(1, **values)
    shop.push(customer)
    return shop.link(customer)


def in_conflict(shop: Shop) -> CustomerLink:
    """Both sides changed the phone; a person is asked."""
    shop.connection.direction, shop.connection.conflict_policy = "push_and_pull", "ask"
    shop.connection.save()
    link = synced(shop, phone="1")
    shop.clock.advance(600)
    shop.edit(link.customer, phone="22")
    shop.account.edit(link.remote_id or "", phone="333")
    pull(**shop.engine)
    link.refresh_from_db()
    assert link.conflicts["phone"] == {"base": "1", "here": "22", "there": "333"}
    return link


# A create whose answer was lost


def test_create_again_waits_until_the_lost_request_is_dead(shops: Any) -> None:
    shop = shops(**NOTHING)
    [customer] = shop.customers()
    shop.account.script("lost", method="POST")
    shop.push()
    link = shop.link(customer)
    first = PushIntent.objects.get()
    decided = create_again(link=link, actor=ACTOR, at=shop.clock())
    assert (decided.kind, decided.state, decided.request["decision"]) == ("push", "queued", "create_again")
    link.refresh_from_db()
    assert (link.state, link.epoch, link.next_attempt_at) == ("open", 2, first.hold_until)
    first.refresh_from_db()
    assert (first.outcome, first.error) == ("failed", "Anna had it created again.")
    shop.edit(customer, name="Edited")
    assert shop.link(customer).hold_until == first.hold_until
    shop.due()
    push(**shop.engine)
    assert shop.account.judge().count() == 0
    shop.clock.advance(200)
    shop.due()
    push(**shop.engine)
    assert shop.account.judge().count() == 1
    assert outcome(decided) == ("succeeded", {"created": 1})
    assert PushIntent.objects.latest("pk").epoch == 2


def test_this_is_it_links_the_record_as_if_it_had_answered(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    shop.edit(link.customer, phone="22")
    decided = this_is_it(link=link, remote_id=" r1 ", provider=shop.provider, actor=ACTOR, at=shop.clock())
    assert outcome(decided) == ("succeeded", {"created": 1})
    link.refresh_from_db()
    sent = PushIntent.objects.get().sent_values
    assert (link.remote_id, link.state, link.pushed_version, link.base_local) == ("r1", "open", 1, sent)
    assert (link.lease_token, link.is_dirty) == ("", True)
    shop.due()
    push(**shop.engine)
    assert [w["kind"] for w in shop.account.judge().writes()] == ["create", "update"]
    refuses("linked to record r1 .* by now", this_is_it, link, remote_id="r1", provider=shop.provider)


def test_a_record_of_somebody_else_is_refused(shops: Any) -> None:
    shop = shops(**NOTHING)
    other = synced(shop, name="Other")
    [link] = shop.lose()
    refuses("linked to Other", this_is_it, link, remote_id=other.remote_id, provider=shop.provider)
    refuses("Give the record's id", this_is_it, link, remote_id=" ", provider=shop.provider)
    refuses("Give the record's id", this_is_it, link, remote_id="x" * 256, provider=shop.provider)


def test_keep_waiting_tells_who_decided_and_changes_nothing(shops: Any) -> None:
    shop = shops(**NOTHING)
    [link] = shop.lose()
    decided = keep_waiting(link=link, actor=ACTOR, at=shop.clock())
    assert outcome(decided) == ("succeeded", {"skipped": 1})
    link.refresh_from_db()
    assert (link.state, link.next_attempt_at, PushIntent.objects.get().outcome) == ("uncertain", None, "uncertain")


def test_decisions_about_a_lost_create_need_one(shops: Any) -> None:
    shop = shops(**NOTHING)
    [customer] = shop.customers(1, name="BAD name")
    shop.push()
    link = shop.link(customer)
    for decide, more in (
        (create_again, {}),
        (keep_waiting, {}),
        (this_is_it, {"remote_id": "r", "provider": shop.provider}),
    ):
        refuses("No answer about BAD name", decide, link, **more)
    [lost] = shop.lose()
    lost.lease_until = shop.clock() + timedelta(minutes=1)
    lost.save()
    refuses("being sent", create_again, lost, at=shop.clock())
    lost.lease_until = None
    lost.save()
    editing.archive(organization=shop.organization, ids=[lost.customer_id], actor=ACTOR)
    refuses("archived", create_again, lost, at=shop.clock())


def test_nothing_is_created_again_while_it_is_looked_for(shops: Any) -> None:
    shop = shops(**LAGGING)
    [link] = shop.lose()
    refuses("still being looked for", create_again, link, at=shop.clock())


def test_likely_records_are_alike_unlinked_and_of_that_time(shops: Any) -> None:
    shop = shops(**NOTHING)
    shop.account.create(name="Example 0", email="0@example.com")  # long before
    shop.clock.advance(3600)
    [link] = shop.lose()
    mine = {"name": "Example 0", "address_postal_code": ""}
    byname = shop.account.create(**mine)
    bymail = shop.account.create(name="Somebody", email="0@EXAMPLE.com")
    shop.account.create(name="Example 0", address_postal_code="10115")
    shop.account.create(name="Somebody", email="1@example.com")
    taken = shop.account.create(name="Example 0", email="0@example.com")
    shop.clock.advance(3600)
    shop.account.create(name="Example 0", email="0@example.com")  # long after
    [other] = shop.customers(1, name="Other", email="o@example.com")
    shop.push(other)
    CustomerLink.objects.filter(customer=other).update(remote_id=taken)
    found, complete = likely(link=link, provider=shop.provider, session=shop.engine["session"], clock=shop.clock)
    assert complete
    assert {one.record.remote_id: one.why for one in found} == {
        "r2": "The same e-mail address.",
        byname: "The same name; neither has a postal code.",
        bymail: "The same e-mail address.",
    }


def test_likely_says_when_it_has_not_seen_the_end(shops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.sync.resolve.LIKELY_PAGES", 2)
    shop = shops(**NOTHING)
    [link] = shop.lose()
    for n in range(250):
        shop.account.create(name=f"Stranger {n}")
    session = shop.engine["session"]
    found, complete = likely(link=link, provider=shop.provider, session=session, clock=shop.clock)
    assert ([one.record.remote_id for one in found], complete) == (["r1"], False)


# A field that was changed on both sides


def test_ours_goes_out(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = in_conflict(shop)
    decided = keep_field(link=link, field="phone", side="here", actor=ACTOR, at=shop.clock())
    link.refresh_from_db()
    assert (link.conflicts, link.base_local["phone"], link.is_dirty) == ({}, "333", True)
    waiting = Conflict.objects.get(outcome="waiting")
    assert (waiting.resolved_by, waiting.resolved_at is not None) == ("Anna", True)
    push(**shop.engine)
    assert outcome(decided) == ("succeeded", {"updated": 1})
    assert shop.account.records()[0]["fields"]["phone"] == "22"
    assert not shop.link(link.customer).is_dirty


def test_theirs_is_taken_over(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = in_conflict(shop)
    decided = keep_field(link=link, field="phone", side="there", actor=ACTOR, at=shop.clock())
    assert outcome(decided) == ("succeeded", {"updated": 1})
    link.customer.refresh_from_db()
    change = CustomerChange.objects.latest("pk")
    assert (link.customer.phone, change.actor_name, change.changes["phone"]) == ("333", "Anna", ["22", "333"])
    before = len(shop.account.judge().writes())
    shop.due()
    push(**shop.engine)
    assert len(shop.account.judge().writes()) == before
    link.refresh_from_db()
    assert (link.conflicts, link.is_dirty) == ({}, False)
    pull(**shop.engine)
    assert CustomerChange.objects.latest("pk") == change


def test_a_field_in_conflict_is_decided_once(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = in_conflict(shop)
    refuses("name of Example 0 is not in conflict", keep_field, link, field="name", side="here", at=shop.clock())
    with pytest.raises(ValueError, match="side"):
        keep_field(link=link, field="phone", side="left", actor=ACTOR)
    CustomerLink.objects.filter(pk=link.pk).update(conflicts={"phone": {"base": "1", "here": "2", "there": "x" * 99}})
    refuses("cannot be taken over. Use at most", keep_field, link, field="phone", side="there", at=shop.clock())
    keep_field(link=link, field="phone", side="here", actor=ACTOR, at=shop.clock())
    refuses("not in conflict", keep_field, link, field="phone", side="here", at=shop.clock())


def test_ours_is_not_sent_to_a_system_that_is_only_read(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = in_conflict(shop)
    shop.connection.direction = "pull"
    shop.connection.save()
    link.refresh_from_db()
    CustomerLink.objects.update(needed_version=2, pushed_version=2)
    decided = keep_field(link=link, field="phone", side="here", actor=ACTOR, at=shop.clock())
    assert outcome(decided) == ("succeeded", {"updated": 1})
    assert not shop.link(link.customer).is_dirty


# A record that was deleted there


def gone(shop: Shop) -> CustomerLink:
    link = synced(shop)
    shop.account.delete(link.remote_id or "")
    deletes.bury(link, evidence="Test.", at=shop.clock())
    link.save()
    return link


def test_recreate_creates_a_new_record_and_keeps_the_old_id(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = gone(shop)
    decided = recreate(link=link, actor=ACTOR, at=shop.clock())
    link.refresh_from_db()
    assert (link.former_remote_id, link.remote_id, link.epoch, link.deleted_at) == ("r1", None, 2, None)
    push(**shop.engine)
    assert outcome(decided) == ("succeeded", {"created": 1})
    assert shop.link(link.customer).remote_id == "r2"
    refuses("not known to be deleted", recreate, link)
    refuses("not known to be deleted", unlink, link)


def test_unlink_keeps_the_tombstone_and_asks_no_more(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = gone(shop)
    assert outcome(unlink(link=link, actor=ACTOR, at=shop.clock())) == ("succeeded", {"updated": 1})
    link.refresh_from_db()
    assert (link.is_active, link.tombstone["unlinked"]["by"], link.deleted_at is not None) == (False, "Anna", True)
    assert link.remote_id == "r1"
    recreate(link=link, actor=ACTOR, at=shop.clock())
    link.refresh_from_db()
    assert link.is_active


def test_an_archived_customer_is_not_made_again(shops: Any) -> None:
    shop = shops(**NOTHING)
    link = gone(shop)
    editing.archive(organization=shop.organization, ids=[link.customer_id], actor=ACTOR)
    refuses("archived", recreate, link, at=shop.clock())


# What was refused, or kept failing


def refused(shop: Shop, number: int) -> None:
    made = shop.customers(number)
    shop.push(*made)
    for n, customer in enumerate(made):
        shop.edit(customer, name=f"Renamed {n}")
    CustomerLink.objects.update(
        state=LinkState.REJECTED, next_attempt_at=None, attempts=9, crashes=3, error="No.", fingerprint="x"
    )


def test_release_makes_due_and_follows_to_the_outcome(shops: Any) -> None:
    shop = shops(**NOTHING)
    refused(shop, 3)
    kept, *_ = CustomerLink.objects.order_by("pk")
    CustomerLink.objects.filter(pk=kept.pk).update(state=LinkState.UNCERTAIN)
    decided = release(connection=shop.connection, links=CustomerLink.objects.all(), actor=ACTOR, at=shop.clock())
    assert (decided.planned, decided.state) == (2, "queued")
    assert set(CustomerLink.objects.exclude(pk=kept.pk).values_list("state", "attempts", "crashes", "fingerprint")) == {
        ("open", 0, 0, "")
    }
    push(**shop.engine)
    assert outcome(decided) == ("succeeded", {"updated": 2})
    with pytest.raises(WrongState, match="Nothing of shop was refused"):
        release(connection=shop.connection, links=CustomerLink.objects.all(), actor=ACTOR, at=shop.clock())


# retry_customers


@pytest.mark.django_db(transaction=True)
def test_the_command_lists_what_waits_by_reason(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    refused(shop, 8)
    ids = list(CustomerLink.objects.order_by("pk").values_list("pk", flat=True))
    CustomerLink.objects.filter(pk__in=ids[:2]).update(state=LinkState.CONFLICT, error="It moves.")
    CustomerLink.objects.filter(pk=ids[2]).update(error="Another.", error_field="email")
    before = list(CustomerLink.objects.values())
    found = run("retry_customers", "shop", "--list", "--json")
    assert (found.code, found.totals) == (3, {"refused": 6, "uncertain": 2})
    assert {(p["state"], p["field"], p["reason"], p["count"]) for p in found.objects[0]["problems"]} == {
        ("rejected", "", "No.", 5),
        ("rejected", "email", "Another.", 1),
        ("conflict", "", "It moves.", 2),
    }
    assert all(sample.count("cust_") <= 5 for sample in found.objects[0]["samples"])
    assert found.objects[0]["samples"][0].count("cust_") == 5
    assert run("retry_customers", "shop", "--list", "--reason=moves", "--json").totals == {"uncertain": 2}
    assert run("retry_customers", "shop", "--list", "--state=rejected", "--json").totals == {"refused": 6}
    assert run("retry_customers", "shop", "--list", "--limit=1", "--json").totals == {"uncertain": 1}
    assert list(CustomerLink.objects.values()) == before
    assert len(run("retry_customers", "shop", "--list").out.splitlines()) == 2 + 3 + 3


@pytest.mark.django_db(transaction=True)
def test_the_command_tries_again_what_was_refused(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    refused(shop, 3)
    dry = run("retry_customers", "shop", "--dry-run", "--json")
    assert (dry.code, dry.totals) == (0, {"updated": 3})
    assert not CustomerLink.objects.filter(state="open").exists()
    one = CustomerLink.objects.earliest("pk")
    left = SyncRun.objects.earliest("pk")
    left.problems = [{"customer": str(one.customer_id), "state": "refused", "field": "", "reason": "No."}]
    left.save()
    assert run("retry_customers", "shop", "--run", left.public_id, "--json").totals == {"updated": 1}
    found = run("retry_customers", "shop", "--json")
    assert (found.code, found.totals) == (0, {"updated": 2})
    decided = SyncRun.objects.get(public_id=found.objects[0]["run"])
    assert (decided.actor_name, decided.request) == ("retry_customers", {"decision": "release"})
    assert {record["fields"]["name"] for record in shop.account.records()} == {"Renamed 0", "Renamed 1", "Renamed 2"}
    nothing = run("retry_customers", "--all", "--json")
    assert (nothing.code, nothing.totals) == (0, {})
    for wrong in (["--run=nope"], ["--state=lost"], []):
        assert run("retry_customers", *wrong, *(["shop"] if wrong else [])).code != 0


@pytest.mark.django_db(transaction=True)
def test_the_command_makes_no_second_record_unless_told(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    shop.lose(2)
    held = run("retry_customers", "shop", "--state=uncertain")
    assert held.code == 2
    assert "may make a second record" in held.err
    assert run("retry_customers", "shop", "--json").totals == {}
    PushIntent.objects.update(hold_until=None)
    assert run("retry_customers", "shop", "--state=uncertain", "--yes", "--json").totals == {"created": 2}
    assert len(shop.account.judge().duplicates()) == 2


@pytest.mark.django_db(transaction=True)
def test_the_command_recreates_what_is_gone_only_when_told(shops: Any) -> None:
    shop = shops(socket=True, **NOTHING)
    link = gone(shop)
    listed = run("retry_customers", "shop", "--list", "--json")
    assert (listed.totals, listed.objects[0]["problems"][0]["state"]) == ({"refused": 1}, "remote_deleted")
    assert run("retry_customers", "shop", "--state=gone").code == 2
    dry = run("retry_customers", "shop", "--state=gone", "--dry-run", "--json")
    assert dry.totals == {"created": 1}
    unlink(link=link, actor=ACTOR)
    assert run("retry_customers", "shop", "--list", "--json").totals == {}
    CustomerLink.objects.update(tombstone={"remote_id": "r1"})
    assert run("retry_customers", "shop", "--state=gone", "--yes", "--json").totals == {"created": 1}
    assert shop.link(link.customer).remote_id == "r2"
