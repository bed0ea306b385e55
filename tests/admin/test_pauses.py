"""Pauses, of connections and of one link: they end when they are to, and what was found meanwhile is not forgotten."""

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from connectors.models import Connection, CustomerLink, Issue, SyncRun
from connectors.sync import deletes
from connectors.sync.claim import due
from connectors.sync.issues import open_issue
from connectors.worker import due_work
from customers import editing
from customers.models import Organization
from tests.connectors import test_admin
from tests.connectors.test_admin import COMMAND, Far, change, link, new_customer, staff, told

far, books = test_admin.far, test_admin.books
HOUR = timedelta(hours=1)


@pytest.fixture
def paused(books: Connection) -> Connection:
    Connection.objects.update(state="paused", state_reason="Stocktaking", paused_until=timezone.now() + HOUR)
    books.refresh_from_db()
    return books


def after_the_pause() -> Connection:
    due_work(now=timezone.now() + 2 * HOUR)
    return Connection.objects.get()


def test_a_pause_ends_at_its_end(paused: Connection) -> None:
    due_work(now=timezone.now())
    assert Connection.objects.get().state == "paused"
    row = after_the_pause()
    assert (row.state, row.state_reason, row.paused_until) == ("active", "", None)


def test_a_stop_after_too_many_deletes_does_not_end_with_the_pause(paused: Connection) -> None:
    deletes.pause(connection=paused)
    row = after_the_pause()
    assert (row.state, row.state_reason) == ("paused", deletes.TOO_MANY)


@pytest.mark.parametrize("kind", [Issue.Kind.WRONG_ACCOUNT, Issue.Kind.LOGIN])
def test_a_login_that_was_lost_during_the_pause_waits_for_a_person(paused: Connection, kind: Issue.Kind) -> None:
    open_issue(connection=paused, kind=kind, message="Another account.", details={}, at=timezone.now())
    row = after_the_pause()
    assert (row.state, row.state_reason, row.paused_until) == ("needs_reauth", "Another account.", None)


def test_resuming_does_not_use_the_wrong_account(
    paused: Connection, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_issue(
        connection=paused, kind=Issue.Kind.WRONG_ACCOUNT, message="Another account.", details={}, at=timezone.now()
    )
    monkeypatch.setattr("connectors.admin.connections.ConnectionAdmin._test", lambda *_: (30, "Still another."))
    admin_client.post(change(paused, "resume"))
    row = Connection.objects.get()
    assert (row.state, row.state_reason) == ("needs_reauth", "Another account.")
    Issue.objects.update(resolved_at=timezone.now())
    Connection.objects.update(state="paused")
    admin_client.post(change(paused, "resume"))
    assert Connection.objects.get().state == "active"


def test_one_link_is_paused_for_a_reason_and_what_changed_meanwhile_goes_out_after(
    books: Connection, organization: Organization, far: Far
) -> None:
    known = {"name": "Acme Corporation", "email": "contact@acme.com"}
    customer = new_customer(organization)
    far.system.records["1"] = {"id": "1", **known}
    made = link(customer, books, remote_id="1", pushed_version=1, needed_version=1, base_local=known, base_remote=known)
    rights = ("connectors.view_customerlink", "connectors.push_customerlink", "customers.view_personal_data")
    client = staff(organization, *rights)
    page = client.get(change(made)).content.decode()
    assert "Pause…" in page
    assert "Say why" in told(client.post(change(made, "pause"), {"reason": " "}))
    client.post(change(made, "pause"), {"reason": "until the stocktaking is over"})
    editing.update(organization=organization, values={customer.pk: {"name": "Acme Ltd"}}, actor=COMMAND)
    later = timezone.now() + HOUR
    due_work(now=later)
    made.refresh_from_db()
    assert (made.state, made.next_attempt_at) == ("paused", None)
    assert not CustomerLink.objects.filter(due(now=later)).exists()
    page = client.get(change(made)).content.decode()
    assert made.error.startswith("until the stocktaking is over (")
    assert f"Paused: {made.error}" in page
    assert "Resume" in page
    assert "settle that first" in told(client.post(change(made, "pause"), {"reason": "again"}))
    assert "is in use again" in told(client.post(change(made, "resume")))
    assert list(CustomerLink.objects.filter(due(now=later))) == [made]
    assert "is not paused" in told(client.post(change(made, "resume")))
    asked = list(SyncRun.objects.order_by("pk").values_list("request__decision", flat=True))
    assert asked == ["pause", "resume"]


def test_what_waits_for_a_decision_is_not_paused(books: Connection, organization: Organization) -> None:
    made = link(new_customer(organization), books, state="rejected", error="no", needed_version=1)
    client = staff(organization, "connectors.view_customerlink", "connectors.push_customerlink")
    assert "Pause…" not in client.get(change(made)).content.decode()
    client.post(change(made, "pause"), {"reason": "why not"})
    made.refresh_from_db()
    assert made.state == "rejected"
