"""The page of a connection: health, queue with reasons, abilities, mapping, the test step by step, pausing."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from connectors.admin import filters, overview
from connectors.models import Connection, CustomerLink, Issue, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync import issues
from connectors.worker import due_work
from customers.models import Organization
from tests.connectors import test_admin
from tests.connectors.fakes import status
from tests.connectors.test_admin import Far, change, link, new_customer, settings_of, staff, told

far, books = test_admin.far, test_admin.books
LOOK = (
    *("connectors.view_connection", "connectors.view_customerlink", "connectors.view_syncrun"),
    *("connectors.view_issue", "customers.view_customer"),
)
CHANGE = "connectors.change_connection"


def page_of(client: Client, connection: Connection, **query: str) -> str:
    answer = client.get(change(connection), query)
    assert answer.status_code == 200
    return str(answer.content.decode())


def test_the_page_tells_health_queue_and_reasons(books: Connection, organization: Organization, far: Far) -> None:
    rejected = {"state": LinkState.REJECTED, "needed_version": 1, "error_field": "email"}
    for _ in range(3):
        link(new_customer(organization), books, **rejected, fingerprint="a", error="E-mail required")
    link(new_customer(organization), books, **rejected, fingerprint="b", error="Name too long")
    waiting = link(new_customer(organization), books, needed_version=1)
    CustomerLink.objects.filter(pk=waiting.pk).update(next_attempt_at=timezone.now() - timedelta(hours=2))
    issues.open_issue(
        connection=books, kind=Issue.Kind.FIGHT, message="Two systems overwrite phone.", at=timezone.now()
    )
    client = staff(organization, *LOOK)
    text = page_of(client, books)
    assert "Degraded" in text
    assert "4 customers wait for a person" in text
    assert text.index("E-mail required") < text.index("Name too long")
    assert "Two systems overwrite phone." in text
    [first, second] = client.get(change(books)).context["queue"].reasons
    assert (first.count, second.count) == (3, 1)
    rows = client.get(first.url)
    assert rows.context["cl"].result_count == 3
    for waits in client.get(change(books)).context["queue"].counts:
        assert client.get(waits.url).context["cl"].result_count == waits.count


def test_what_somebody_has_settled_does_not_make_a_connection_degraded(
    books: Connection, organization: Organization
) -> None:
    shape = {"remote_id": "r1", "deleted_at": timezone.now(), "state": LinkState.REMOTE_DELETED, "needed_version": 1}
    gone = link(new_customer(organization), books, **shape)
    client = staff(organization, *LOOK)
    listed = reverse("admin:connectors_connection_changelist")
    assert "Degraded" in page_of(client, books)
    assert "Degraded" in client.get(listed).content.decode()
    CustomerLink.objects.filter(pk=gone.pk).update(tombstone={"unlinked": "2026-11-21"})
    assert "Degraded" not in page_of(client, books)
    assert "Degraded" not in client.get(listed).content.decode()


def test_a_large_queue_is_counted_as_far_as_an_index_goes(
    books: Connection, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "COUNTED", 2)
    for _ in range(3):
        link(new_customer(organization), books, state=LinkState.REJECTED, needed_version=1)
    link(new_customer(organization), books)
    found = overview.queue(books, clear=True, now=timezone.now())
    assert [(one.key, one.shown) for one in found.counts if one.key != "in_sync"] == [("rejected", "more than 2")]


def test_the_page_costs_the_same_queries_whatever_waits(books: Connection, organization: Organization) -> None:
    client = staff(organization, *LOOK, CHANGE, "connectors.push_customerlink", "connectors.pull_connection")
    new_customer(organization)

    def cost() -> int:
        client.get(change(books))
        with CaptureQueriesContext(database) as queries:
            client.get(change(books))
        return len(queries)

    link(new_customer(organization), books, state=LinkState.REJECTED, needed_version=1, fingerprint="one", error="x")
    few = cost()
    for n in range(40):
        link(
            new_customer(organization), books, state=LinkState.REJECTED, needed_version=1, fingerprint=str(n), error="x"
        )
        SyncRun.objects.create(
            public_id=f"{n:016}", organization=organization, connection=books, kind="push", actor_kind="user",
            actor_name="x",
        )  # fmt: skip
    assert cost() == few <= 20


@pytest.mark.parametrize("slug", sorted(PROVIDERS))
def test_every_connector_tells_its_abilities_and_its_mapping(
    connect: Callable[..., Connection], organization: Organization, slug: str
) -> None:
    made = connect(slug, direction="push", base_url="https://there.example")
    customer = new_customer(organization, phone="+442079460958", first_name="Jane", last_name="Doe")
    provider = PROVIDERS[slug]
    names = {ability.name for ability in overview.abilities(provider, made)}
    assert {"Create", "Read all", "Delete", "Batches"} <= names
    found = overview.mapping(provider, made, example=customer, clear=True)
    assert {row.field for row in found.rows} == provider.fields
    by_field = {row.field: row for row in found.rows}
    assert by_field["email"].places != "–"
    assert "contact@acme.com" in by_field["email"].example
    hidden = overview.mapping(provider, made, example=customer, clear=False)
    assert "contact@acme.com" not in str(hidden)
    assert "2079460958" not in str(hidden)


def test_the_mapping_says_what_is_needed_and_what_would_be_refused(
    books: Connection, organization: Organization
) -> None:
    bad = new_customer(organization, email="", name="No address")
    found = overview.mapping(PROVIDERS["links"], books, example=bad, clear=True)
    needed = {row.field for row in found.rows if row.needed}
    assert "email" in needed
    assert "phone" not in needed
    assert "No address would be refused" in found.refused
    client = staff(organization, *LOOK)
    assert "No address would be refused" in page_of(client, books, example=bad.public_id)
    assert "There is no such customer." in page_of(client, books, example="cust_unknown")


def test_another_organizations_customer_is_no_example(
    books: Connection, organization: Organization, other_organization: Organization
) -> None:
    stranger = new_customer(other_organization, name="Stranger")
    text = page_of(staff(organization, *LOOK), books, example=stranger.public_id)
    assert "Stranger" not in text
    assert "There is no such customer." in text


def test_values_of_the_example_need_the_right(books: Connection, organization: Organization) -> None:
    new_customer(organization)
    assert "contact@acme.com" not in page_of(staff(organization, *LOOK), books)
    assert "contact@acme.com" in page_of(staff(organization, *LOOK, "customers.view_personal_data"), books)
    # Who may not see customers sees none.
    assert "Acme Corporation" not in page_of(staff(organization, "connectors.view_connection"), books)


# Testing


def steps_of(client: Client, connection: Connection) -> dict[str, bool | None]:
    return {step.name: step.good for step in client.post(change(connection, "test")).context["tested"].steps}


def test_the_test_tells_step_by_step_and_writes_nothing_there(
    books: Connection, organization: Organization, far: Far
) -> None:
    client = staff(organization, *LOOK, CHANGE)
    assert steps_of(client, books) == {
        "Address": True, "Login": True, "Account": None, "Read": True, "Rights": None, "Clock": True, "Limits": None,
    }  # fmt: skip
    assert far.system.writes == []
    far.system.fail(status(401))
    assert steps_of(client, books) == {"Address": True, "Login": False, "Clock": True, "Limits": None}
    far.system.fail(status(503, X_RateLimit_Remaining="7"))
    answer = client.post(change(books, "test"))
    assert "x-ratelimit-remaining: 7" in answer.content.decode()
    assert not answer.context["tested"].good
    Connection.objects.update(base_url="https://169.254.169.254/")
    assert steps_of(client, books) == {"Address": False}


def test_a_clock_that_is_off_is_told(books: Connection, organization: Organization, far: Far, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "http.server.BaseHTTPRequestHandler.date_time_string", lambda *args: "Mon, 02 Jan 2023 10:00:00 GMT"
    )
    assert steps_of(staff(organization, *LOOK, CHANGE), books)["Clock"] is False


def test_check_all_reads_and_sends_nothing(books: Connection, organization: Organization, far: Far) -> None:
    new_customer(organization)
    far.system.records["r1"] = {"id": "r1", "name": "Nobody's", "email": "x@example.com"}
    client = staff(organization, *LOOK, "connectors.push_customerlink")
    text = client.post(change(books, "check")).content.decode()
    assert "Would be created" in text
    assert "Not linked there" in text
    assert far.system.writes == []
    assert not SyncRun.objects.exists()
    far.system.fail(status(401))
    assert "cannot be read now" in client.post(change(books, "check")).content.decode()
    assert client.get(change(books, "check")).status_code == 405
    assert staff(organization, *LOOK).post(change(books, "check")).status_code == 403


# Pausing


def test_a_pause_has_a_reason_and_may_have_an_end(books: Connection, organization: Organization, far: Far) -> None:
    client = staff(organization, *LOOK, CHANGE)
    answer = client.post(change(books, "pause"), {"reason": "they move", "until": "2020-01-01T10:00"})
    assert "a time to come" in told(answer)
    assert Connection.objects.get().state == "active"
    ends = timezone.now() + timedelta(hours=1)
    client.post(change(books, "pause"), {"reason": "they move", "until": f"{ends:%Y-%m-%dT%H:%M}"})
    books.refresh_from_db()
    assert books.state == "paused"
    assert "The pause ends on" in page_of(client, books)
    due_work(now=ends - timedelta(minutes=2))
    assert Connection.objects.get().state == "paused"
    due_work(now=ends + timedelta(minutes=2))
    books.refresh_from_db()
    assert (books.state, books.state_reason, books.paused_until) == ("active", "", None)
    client.post(change(books, "pause"), {"reason": "again"})
    due_work(now=ends + timedelta(days=400))
    assert Connection.objects.get().state == "paused"
    client.post(change(books, "resume"))
    assert Connection.objects.get().state == "active"


def test_who_entered_the_credentials_and_when_is_told_but_never_what(
    books: Connection, organization: Organization, far: Far, admin_client: Client
) -> None:
    entered = settings_of(organization, base_url=far.url, credential_api_key="brand-new-secret")
    assert admin_client.post(change(books), entered).status_code == 302
    text = page_of(admin_client, books)
    assert "admin entered it on" in text
    assert "brand-new-secret" not in text
