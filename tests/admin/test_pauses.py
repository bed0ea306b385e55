"""Pauses: they end when they are to, and what was found meanwhile is not forgotten."""

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from connectors.models import Connection, Issue
from connectors.sync import deletes
from connectors.sync.issues import open_issue
from connectors.worker import due_work
from tests.connectors import test_admin
from tests.connectors.test_admin import change

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
