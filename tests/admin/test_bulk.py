"""Many customers at once: a page that shows what it comes to, then a run; nothing is sent in the request."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.models import Connection, CustomerLink, SyncRun
from customers import editing
from customers.models import Customer, Organization
from tests.connectors import test_admin
from tests.connectors.test_admin import COMMAND, LIST, Far, change, link, new_customer, staff, told

far, books = test_admin.far, test_admin.books
RIGHTS = (
    *("customers.view_customer", "customers.change_customer", "customers.view_personal_data"),
    *("connectors.push_customerlink", "connectors.view_syncrun", "connectors.view_connection"),
)


def choose(client: Client, action: str, customers: list[Customer], query: str = "", **more: Any) -> Any:
    ids = [str(customer.pk) for customer in customers]
    return client.post(f"{LIST}{query}", {"action": action, "_selected_action": ids, **more})


def test_the_preview_tells_what_will_be_refused_and_shows_examples(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    Connection.objects.update(rate=2.0)
    new = [new_customer(organization, email=f"{n}@example.com") for n in range(7)]
    bad = new_customer(organization, email="", name="No address")
    clean, edited = new_customer(organization), new_customer(organization, name="New name", phone="+4930111")
    link(clean, books, remote_id="1", pushed_version=1, needed_version=1)
    fields = {"name": "Old name", "email": "contact@acme.com", "phone": "+4930111"}
    link(edited, books, remote_id="2", pushed_version=0, needed_version=1, base_local=fields, base_remote=fields)
    client = staff(organization, *RIGHTS)
    page = choose(client, "push_selected", [*new, bad, clean, edited])
    [target] = page.context["targets"]
    assert dict(target.forecast.counts) == {"created": 7, "refused": 1, "unchanged": 1, "updated": 1}
    assert len(target.examples) == 5
    assert target.took == "about 4 s"
    text = page.content.decode()
    assert "Push 10 customers" in text
    assert "Links needs an e-mail address" in text
    assert "0@example.com" in text
    [update] = [
        fields for one in choose(client, "push_selected", [edited]).context["targets"] for _, _, fields in one.examples
    ]
    assert update == [("Name", "‹Old name›", "‹New name›")]
    assert not SyncRun.objects.exists()
    assert far.system.ledger == []
    masked = staff(organization, *(right for right in RIGHTS if "personal" not in right))
    text = choose(masked, "push_selected", [*new, bad]).content.decode()
    assert "0@example.com" not in text
    assert "0•••@example.com" in text


def test_confirming_makes_a_run_with_the_message_and_sends_nothing_itself(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    customers = [new_customer(organization, email=f"{n}@example.com") for n in range(3)]
    client = staff(organization, *RIGHTS)
    more = {"confirmed": "yes", "connections": [books.pk], "message": "for the fair"}
    answer = choose(client, "push_selected", customers, **more)
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert (run.planned, run.request["message"]) == (3, "for the fair")
    assert "for the fair" in client.get(change(run)).content.decode()
    assert far.system.ledger == []


def test_all_that_match_are_pushed_beyond_the_page(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    values = [{"name": f"Acme {n}", "email": f"{n}@example.com"} for n in range(120)]
    customers = editing.create(organization=organization, values=values, actor=COMMAND)
    editing.create(organization=organization, values=[{"name": "Other"}], actor=COMMAND)
    client = staff(organization, *RIGHTS)
    page = choose(client, "push_selected", customers[:50], "?q=acme", select_across="1")
    assert page.context["total"] == 120
    more = {"select_across": "1", "confirmed": "yes", "connections": [books.pk]}
    choose(client, "push_selected", customers[:50], "?q=acme", **more)
    assert SyncRun.objects.get().planned == 120


def test_when_others_are_meant_now_the_page_is_shown_again(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    client = staff(organization, *RIGHTS)
    shown, other = new_customer(organization), new_customer(organization, email="other@example.com")
    seen = choose(client, "push_selected", [shown]).context["seen"]
    more = {"confirmed": "yes", "connections": [books.pk], "seen": seen}
    page = choose(client, "push_selected", [other], **more)
    assert page.status_code == 200
    assert "Not the customers that the page showed are meant now" in page.content.decode()
    assert not SyncRun.objects.exists()
    choose(client, "push_selected", [shown], **more)
    assert SyncRun.objects.get().planned == 1


def test_of_few_a_change_since_the_page_was_shown_shows_it_again(
    books: Connection, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = staff(organization, *RIGHTS)
    customer = new_customer(organization)
    for deed in ("push_selected", "archive_selected"):
        seen = choose(client, deed, [customer]).context["seen"]
        values = {customer.pk: {"name": f"Before {deed}"}}
        editing.update(organization=organization, values=values, actor=COMMAND)
        more = {"confirmed": "yes", "connections": [books.pk], "seen": seen}
        page = choose(client, deed, [customer], **more)
        assert "or they have changed" in page.content.decode()
        assert not SyncRun.objects.exists()
    monkeypatch.setattr("connectors.admin.bulk.SEEN_CLOSELY", 0)
    seen = choose(client, "push_selected", [customer]).context["seen"]
    editing.update(organization=organization, values={customer.pk: {"name": "Last"}}, actor=COMMAND)
    choose(client, "push_selected", [customer], confirmed="yes", connections=[books.pk], seen=seen)
    assert SyncRun.objects.get().planned == 1


def test_too_many_are_for_the_command(
    books: Connection,
    organization: Organization,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("connectors.admin.bulk.MAX_CHOSEN", 1)
    answer = choose(staff(organization, *RIGHTS), "push_selected", [new_customer(organization) for _ in range(2)])
    assert "At most 1 customers at once" in told(answer)


def test_a_new_connection_gets_no_more_than_ten_before_one_was_accepted(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    Connection.objects.update(opened_at=None)
    customers = [new_customer(organization, email=f"{n}@example.com") for n in range(11)]
    client = staff(organization, *RIGHTS)
    more = {"confirmed": "yes", "connections": [books.pk]}
    assert "it is new" in choose(client, "push_selected", customers).content.decode()
    assert "it is new" in told(choose(client, "push_selected", customers, **more))
    assert not SyncRun.objects.exists()
    choose(client, "push_selected", customers[:10], **more)
    assert SyncRun.objects.get().planned == 10
    CustomerLink.objects.filter(customer=customers[0]).update(pushed_version=1, remote_id="1")
    choose(client, "push_selected", customers, **more)
    assert SyncRun.objects.count() == 2


@pytest.mark.parametrize("deed", ["archive", "restore"])
def test_archiving_and_restoring_ask_first_and_leave_a_run(organization: Organization, deed: str) -> None:
    customers = [new_customer(organization, name=f"Customer {n}") for n in range(3)]
    already = customers[:1] if deed == "archive" else customers[1:]
    editing.archive(organization=organization, ids=[customer.pk for customer in already], actor=COMMAND)
    client = staff(organization, *RIGHTS)
    page = choose(client, f"{deed}_selected", customers)
    assert page.context["total"] == 2
    assert "Nothing is done before you confirm" in page.content.decode()
    before = Customer.objects.filter(archived_at=None).count()
    more = {"confirmed": "yes", "message": "tidying up"}
    answer = choose(client, f"{deed}_selected", customers, **more)
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert (run.state, run.updated, run.planned) == ("succeeded", 2, 2)
    assert Customer.objects.filter(archived_at=None).count() - before == (-2 if deed == "archive" else 2)
    assert customers[1].changes.latest("version").message == "tidying up"
    assert client.get(change(run)).status_code == 200


def test_a_check_reads_and_shows_but_sends_and_stores_nothing(
    books: Connection,
    organization: Organization,
    far: Far,
) -> None:
    customer = new_customer(organization)
    known = {"name": "Acme Corporation", "email": "contact@acme.com"}
    far.system.records["r1"] = {"id": "r1", "name": "Acme Corporation", "email": "old@acme.com"}
    link(customer, books, remote_id="r1", pushed_version=1, needed_version=1, base_local=known, base_remote=known)
    new = new_customer(organization, email="new@example.com", name="New one")
    client = staff(organization, *RIGHTS)
    page = choose(client, "check_selected", [customer, new])
    assert page.status_code == 200
    assert far.system.ledger == []
    page = choose(client, "check_selected", [customer, new], confirmed="yes", connection=books.pk)
    text = page.content.decode()
    assert "Changed there" in text
    assert "old@acme.com" in text
    assert "Would be created" in text
    assert "Push these customers…" in text
    fields = page.context["push_fields"]
    again = client.post(
        page.context["push_address"], {name: [v for key, v in fields if key == name] for name, _ in fields}
    )
    assert again.context["total"] == 2
    assert "Nothing is sent before you confirm" in again.content.decode()
    assert far.system.writes == []
    assert not SyncRun.objects.exists()
    assert CustomerLink.objects.count() == 1
    masked = staff(organization, *(right for right in RIGHTS if "personal" not in right))
    text = choose(masked, "check_selected", [customer], confirmed="yes", connection=books.pk).content.decode()
    assert "old@acme.com" not in text


def test_actions_need_their_rights(organization: Organization) -> None:
    customer = new_customer(organization)
    client = staff(organization, "customers.view_customer")
    for action in ("push_selected", "check_selected", "archive_selected", "restore_selected"):
        assert choose(client, action, [customer], confirmed="yes").status_code == 403
    customer.refresh_from_db()
    assert customer.archived_at is None


def test_the_preview_costs_the_same_queries_whatever_is_chosen(
    connect: Callable[..., Connection], organization: Organization
) -> None:
    connect("links", name="Shop", direction="push")
    customers = [new_customer(organization, email=f"{n}@example.com") for n in range(30)]
    client = staff(organization, *RIGHTS)
    choose(client, "push_selected", customers[:1])
    costs = []
    for chosen in (customers[:1], customers):
        with CaptureQueriesContext(database) as queries:
            choose(client, "push_selected", chosen)
        costs.append(len(queries))
    assert costs[0] == costs[1]
