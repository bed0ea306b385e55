"""The first steps of a new connection: nothing goes by itself, a few customers go first, never all."""

from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from connectors.models import Connection, CustomerLink, SyncRun
from connectors.worker import due_work, retry_rejected
from customers import editing
from customers.models import Organization
from tests.connectors import test_admin
from tests.connectors.fakes import status
from tests.connectors.test_admin import ADD, COMMAND, Far, change, link, new_customer, settings_of, staff, told

far, books = test_admin.far, test_admin.books
RIGHTS = (
    *("connectors.view_connection", "connectors.add_connection", "connectors.change_connection"),
    *("connectors.push_customerlink", "connectors.pull_connection", "customers.view_customer"),
    "connectors.view_syncrun",
)


@pytest.fixture
def clerk(organization: Organization) -> Client:
    return staff(organization, *RIGHTS)


@pytest.fixture
def new(books: Connection) -> Connection:
    Connection.objects.update(opened_at=None)
    books.refresh_from_db()
    return books


def steps(client: Client, connection: Connection) -> dict[str, str]:
    answer = client.get(change(connection, "first_steps"))
    assert answer.status_code == 200
    return dict(answer.context["step"])


def push_all(client: Client, connection: Connection, **more: str) -> Any:
    return client.post(change(connection, "push"), {"confirmed": "yes", **more})


def test_the_whole_way_from_a_new_connection_to_an_open_one(
    organization: Organization, far: Far, clerk: Client
) -> None:
    customers = [new_customer(organization, name=f"Customer {n}", email=f"{n}@example.com") for n in range(12)]
    far.system.records["r1"] = {"id": "r1", "name": "Somebody", "email": "0@example.com"}
    far.system.records["r2"] = {"id": "r2", "name": "Unknown", "email": "u@example.com"}
    given = settings_of(
        organization, base_url=far.url, credential_api_key="remote-key", create_policy="automatic", pull_interval="60",
        direction="push_and_pull",
    )  # fmt: skip
    answer = clerk.post(ADD, given)
    made = Connection.objects.get()
    assert answer["Location"] == change(made, "first_steps")
    assert made.opened_at is None
    assert steps(clerk, made) == {
        "login": "now", "direction": "later", "match": "later", "canary": "later", "open": "later",
    }  # fmt: skip

    # Nothing goes out or comes in by itself.
    new_customer(organization, name="Made meanwhile", email="m@example.com")
    assert not CustomerLink.objects.exists()
    assert due_work(now=timezone.now()) == []
    assert "have not gone out yet" in told(push_all(clerk, made)) or not SyncRun.objects.exists()
    assert not SyncRun.objects.exists()

    clerk.post(change(made, "test"))
    assert steps(clerk, made)["login"] == "done"
    clerk.post(change(made, "direction"), {"direction": "push_and_pull", "create_policy": "automatic"})
    clerk.post(change(made, "match"))
    match = clerk.get(change(made, "first_steps")).context["match"]
    assert match["counts"] == {"email": 1, "nobody": 1, "unreadable": 0}
    assert (match["customers"], match["complete"]) == (13, True)
    assert far.system.writes == []
    assert steps(clerk, made)["canary"] == "now"

    answer = clerk.post(change(made, "open"))
    assert "stays closed" in told(answer)
    eleven = {"customers": [str(customer.pk) for customer in customers[:11]]}
    assert "Choose 1 to 10 customers" in told(clerk.post(change(made, "canary"), eleven))
    assert far.system.writes == []
    answer = clerk.post(change(made, "canary"), {"customers": [str(customer.pk) for customer in customers[1:4]]})
    assert "3 of 3 customers were accepted" in told(answer)
    assert len(far.system.writes) == 3
    assert len(clerk.get(change(made, "first_steps")).context["sent"]) == 3
    assert steps(clerk, made)["canary"] == "done"

    clerk.post(change(made, "open"))
    made.refresh_from_db()
    assert made.opened_at is not None
    assert [due.kind for due in due_work(now=timezone.now())] == ["pull"]
    new_customer(organization, name="Made after", email="a@example.com")
    assert CustomerLink.objects.count() == 4
    assert push_all(clerk, made).status_code == 302
    assert SyncRun.objects.latest("pk").planned == 14


def test_pushing_all_is_refused_until_a_customer_was_accepted_or_the_name_is_typed(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    customer = new_customer(organization)
    page = clerk.post(change(new, "push")).content.decode()
    assert "all customers are not sent before a few have gone through" in page
    for typed in ("", "books", "Books "):
        answer = push_all(clerk, new, typed_name=typed.rstrip() if typed != "Books " else "Shop")
        assert answer.status_code == 200
        assert not SyncRun.objects.exists()
    held = link(customer, new, state="rejected", needed_version=1)
    assert push_all(clerk, new).status_code == 200
    CustomerLink.objects.filter(pk=held.pk).update(state="open", pushed_version=1, remote_id="r1")
    assert push_all(clerk, new).status_code == 302
    assert SyncRun.objects.count() == 1
    new.refresh_from_db()
    assert new.opened_at is not None


def test_typing_the_name_goes_without_a_canary(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    new_customer(organization)
    assert push_all(clerk, new, typed_name="Books").status_code == 302
    assert SyncRun.objects.get().planned == 1
    Connection.objects.update(opened_at=None)
    clerk.post(change(new, "open"), {"typed_name": "Books"})
    assert Connection.objects.get().opened_at is not None


def test_a_canary_that_fails_opens_nothing(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    customer = new_customer(organization)
    far.system.fail(status(422))
    answer = clerk.post(change(new, "canary"), {"customers": [str(customer.pk)]})
    assert "0 of 1 customers were accepted" in told(answer)
    assert "Rejected" in clerk.get(change(new, "first_steps")).content.decode()
    assert "stays closed" in told(clerk.post(change(new, "open")))
    assert clerk.post(change(new, "push"), {"confirmed": "yes"}).status_code == 200


def test_only_own_customers_that_the_connector_takes_are_offered(
    new: Connection, organization: Organization, other_organization: Organization, far: Far, clerk: Client
) -> None:
    good, bad = new_customer(organization), new_customer(organization, name="No address", email="")
    stranger = new_customer(other_organization, name="Stranger")
    page = clerk.get(change(new, "first_steps"))
    assert [customer for customer, _, _ in page.context["offered"]] == [good]
    assert "contact@acme.com" not in page.content.decode()
    found = clerk.get(change(new, "first_steps"), {"q": "no addr"})
    [(customer, _, refused)] = found.context["offered"]
    assert customer == bad
    assert "Links needs an e-mail address" in refused
    answer = clerk.post(change(new, "canary"), {"customers": [str(stranger.pk), "nonsense"]})
    assert "Choose 1 to 10 customers" in told(answer)
    assert far.system.writes == []


def test_a_connection_that_only_reads_reads_a_few_first(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    Connection.objects.update(direction="pull", pull_interval=60)
    for n in range(15):
        far.system.records[f"r{n}"] = {"id": f"r{n}", "name": f"Customer {n}", "email": f"{n}@example.com"}
    assert due_work(now=timezone.now()) == []
    assert "Read 10 records" in told(clerk.post(change(new, "canary")))
    assert CustomerLink.objects.count() == 10
    later = timezone.now() + timezone.timedelta(minutes=5)
    assert due_work(now=later) == []
    clerk.post(change(new, "open"))
    assert [due.kind for due in due_work(now=later)] == ["pull"]


def test_the_steps_need_their_rights_and_no_get_takes_one(
    new: Connection, organization: Organization, other_organization: Organization, far: Far, clerk: Client
) -> None:
    looker = staff(organization, "connectors.view_connection")
    stranger = staff(other_organization, *RIGHTS)
    page = looker.get(change(new, "first_steps")).content.decode()
    for name in ("direction", "match", "canary", "open"):
        assert clerk.get(change(new, name)).status_code == 405
        assert looker.post(change(new, name)).status_code == 403
        assert f'action="{change(new, name)}"' not in page
        assert stranger.post(change(new, name)).status_code == 404
    assert stranger.get(change(new, "first_steps")).status_code == 404
    assert clerk.post(change(new, "first_steps")).status_code == 405
    assert far.system.ledger == []
    assert Connection.objects.get().setup == {}


def test_a_connection_that_begins_to_be_sent_to_takes_its_first_steps(
    organization: Organization, far: Far, connect: Any, admin_client: Client
) -> None:
    made = connect("links", name="Books")
    assert made.opened_at is not None
    given = settings_of(organization, base_url=far.url, direction="push")
    admin_client.post(change(made), given)
    made.refresh_from_db()
    assert made.opened_at is None


def test_changes_of_the_first_customers_wait_until_the_connection_is_open(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    sent, refused = new_customer(organization), new_customer(organization, email="", name="No address")
    clerk.post(change(new, "canary"), {"customers": [str(sent.pk), str(refused.pk)]})
    assert len(far.system.writes) == 1
    later = timezone.now() + timedelta(days=2)
    for customer in (sent, refused):
        editing.update(
            organization=organization, values={customer.pk: {"name": "Edited", "email": "e@e.com"}}, actor=COMMAND
        )
    assert due_work(now=later) == []
    CustomerLink.objects.filter(customer=refused).update(state="rejected", next_attempt_at=None)
    assert retry_rejected(later) == 0

    clerk.post(change(new, "canary"), {"customers": [str(sent.pk)]})
    assert len(far.system.writes) == 2, "what somebody asks for goes out"
    editing.update(organization=organization, values={sent.pk: {"name": "Once more"}}, actor=COMMAND)
    assert due_work(now=later) == []
    clerk.post(change(new, "open"))
    assert [due.kind for due in due_work(now=later)] == ["push"]


def test_what_follows_of_sending_a_first_customer_goes_on_by_itself(
    new: Connection, organization: Organization, far: Far, clerk: Client
) -> None:
    customer = new_customer(organization)
    clerk.post(change(new, "canary"), {"customers": [str(customer.pk)]})
    editing.update(organization=organization, values={customer.pk: {"name": "Edited"}}, actor=COMMAND)
    far.system.fail(status(503))
    clerk.post(change(new, "canary"), {"customers": [str(customer.pk)]})
    assert CustomerLink.objects.get().state == "retrying"
    assert [due.kind for due in due_work(now=timezone.now() + timedelta(hours=1))] == ["push"]
