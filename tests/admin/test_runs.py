"""Runs: totals that add up, reasons, trying again what was refused, ending one early, and errors as a file."""

import csv
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from connectors.admin import runs as pages
from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.cancel import NotCancellable, cancel
from connectors.sync.claim import claim
from connectors.sync.push import push
from connectors.sync.request import request as request_push
from customers import editing
from customers.models import Customer, Organization
from tests.connectors.fakes import FakeLinks, lost, status
from tests.connectors.test_admin import COMMAND, change, link, new_customer, staff, told

LOOK = ("customers.view_customer", "connectors.view_syncrun", "connectors.view_connection")
PUSH = "connectors.push_customerlink"


@pytest.fixture
def far() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    return connect(
        "links", name="Books", direction="push", base_url="https://books.example",
        credentials={"api_key": "remote-key"},
    )  # fmt: skip


def send(connection: Connection, far: FakeLinks, **more: Any) -> None:
    provider = PROVIDERS["links"]
    session = provider.session(connection, client=far.client())
    push(connection=connection, provider=provider, session=session, **more)


def many(organization: Organization, number: int, *, bad: int = 0) -> list[Customer]:
    good = [{"name": f"Customer {n}", "email": f"c{n}@example.com"} for n in range(number - bad)]
    values = [*good, *({"name": f"No address {n}"} for n in range(bad))]
    return editing.create(organization=organization, values=values, actor=COMMAND)


def shown_sum(client: Client, run: SyncRun) -> tuple[int, int]:
    context = client.get(change(run)).context
    return sum(number for _, number in context["totals"]) + context["waiting"], context["original"].planned


@pytest.mark.parametrize("seed", range(5))
def test_totals_add_up_to_what_was_planned_whatever_happens(
    books: Connection, organization: Organization, far: FakeLinks, seed: int
) -> None:
    rng = random.Random(seed)
    client = staff(organization, *LOOK, PUSH)
    customers = many(organization, 60, bad=rng.randrange(10))
    for customer in rng.sample(customers, 8):
        state = rng.choice([LinkState.OPEN, LinkState.UNCERTAIN, LinkState.REJECTED, LinkState.CONFLICT])
        clean = rng.random() < 0.3
        gone = timezone.now() if rng.random() < 0.2 else None
        link(
            customer, books, state=state, needed_version=1, pushed_version=int(clean), deleted_at=gone,
            remote_id=str(customer.pk) if clean else None,
        )  # fmt: skip
    for _ in range(30):
        far.fail(rng.choice([status(400), status(422), status(503), status(429, retry_after="1"), lost]))
        far.faults += [(lambda request: None, False)] * rng.randrange(3)
    rng.shuffle(far.faults)
    run = request_push(connection=books, actor=COMMAND)
    for _ in range(4):
        together, planned = shown_sum(client, run)
        assert together == planned
        Connection.objects.update(not_before=None, breaker_until=None)
        CustomerLink.objects.filter(next_attempt_at__isnull=False).update(next_attempt_at=timezone.now())
        send(books, far, limit=20)
    if rng.random() < 0.5 and SyncRun.objects.get(pk=run.pk).finished_at is None:
        cancel(run=run, actor=COMMAND)
    together, planned = shown_sum(client, run)
    assert together == planned
    run.refresh_from_db()
    if run.finished_at:
        assert run.total == run.planned


def test_reasons_come_first_with_their_counts(books: Connection, organization: Organization, far: FakeLinks) -> None:
    many(organization, 130, bad=120)
    run = request_push(connection=books, actor=COMMAND)
    send(books, far)
    run.refresh_from_db()
    assert (run.created, run.refused, len(run.problems)) == (10, 120, 100)
    page = staff(organization, *LOOK).get(change(run))
    [group] = page.context["groups"]
    assert (group.count, group.field) == (120, "E-mail")
    assert "Links needs an e-mail address" in group.reason
    assert page.context["groups_complete"]
    text = page.content.decode()
    assert text.index("By reason") < text.index("One by one")


def test_only_what_this_run_was_refused_is_tried_again(
    books: Connection, organization: Organization, far: FakeLinks
) -> None:
    other = new_customer(organization, email="", name="Refused before")
    link(other, books, state=LinkState.REJECTED, needed_version=1)
    CustomerLink.objects.update(updated_at=timezone.now() - timezone.timedelta(days=1))
    ids = [customer.pk for customer in many(organization, 6, bad=3)]
    run = request_push(connection=books, actor=COMMAND, customer_ids=ids)
    send(books, far)
    client = staff(organization, *LOOK, PUSH)
    assert "Retry the refused" in client.get(change(run)).content.decode()
    answer = client.post(change(run, "retry"))
    again = SyncRun.objects.exclude(pk=run.pk).get()
    assert answer["Location"] == change(again)
    assert (again.planned, again.state) == (3, "queued")
    assert set(again.links.values_list("customer__name", flat=True)) == {f"No address {n}" for n in range(3)}
    assert CustomerLink.objects.get(customer=other).state == LinkState.REJECTED
    answer = client.post(change(run, "retry"))
    assert "Nothing of this run is refused any more" in told(answer)


def test_all_that_was_refused_is_tried_again_also_beyond_the_first_hundred(
    books: Connection, organization: Organization, far: FakeLinks
) -> None:
    many(organization, 120, bad=120)
    run = request_push(connection=books, actor=COMMAND)
    send(books, far)
    staff(organization, *LOOK, PUSH).post(change(run, "retry"))
    assert SyncRun.objects.latest("pk").planned == 120


def test_a_cancelled_push_leaves_what_was_sent_and_takes_back_what_was_not(
    books: Connection, organization: Organization, far: FakeLinks, connect: Callable[..., Connection]
) -> None:
    customers = many(organization, 10)
    edited = customers[9]
    link(edited, books, remote_id="r1", pushed_version=1, needed_version=2, base_local={"name": "Before"})
    run = request_push(connection=books, actor=COMMAND)
    later = timezone.now() + timezone.timedelta(hours=1)
    CustomerLink.objects.filter(customer=edited).update(next_attempt_at=later)
    send(books, far, limit=4)
    other = connect("links", name="Shop", account="2", direction="push")
    second = request_push(connection=other, actor=COMMAND)
    # One is being sent by another worker just now.
    held = claim(connection=books, now=timezone.now(), limit=1).links[0]
    held.save()
    client = staff(organization, *LOOK, PUSH)
    answer = client.post(change(run, "cancel"))
    assert "1 are being sent right now" in told(answer)
    run.refresh_from_db()
    done = run.created + run.updated
    assert (run.state, done, run.total, run.finished_at) == ("cancelled", 4, 9, None)
    left = CustomerLink.objects.filter(connection=books)
    assert left.exclude(remote_id=None).filter(customer=edited).exists()
    assert left.filter(pk=held.pk).exists()
    unsent = left.filter(remote_id=None).exclude(pk=held.pk)
    assert not unsent.exists()
    # The customers are still led by a link, and the other run goes on.
    for customer in customers:
        assert customer.links.filter(is_primary=True).count() == 1
    assert second.links.count() == 10
    assert not PushIntent.objects.filter(link__in=unsent).exists()
    CustomerLink.objects.filter(pk=held.pk).update(lease_until=None, lease_token="")
    send(books, far)
    run.refresh_from_db()
    assert (run.state, run.total, run.planned) == ("cancelled", 10, 10)
    assert run.finished_at is not None
    with pytest.raises(NotCancellable):
        cancel(run=run, actor=COMMAND)


def test_a_pull_says_that_it_cannot_be_cancelled(books: Connection, organization: Organization) -> None:
    run = SyncRun.objects.create(
        public_id="a" * 16, organization=organization, connection=books, kind="pull", state="running",
        actor_kind="user", actor_name="x",
    )  # fmt: skip
    client = staff(organization, *LOOK, PUSH)
    assert "Cancel the run" not in client.get(change(run)).content.decode()
    assert "pause the connection instead" in told(client.post(change(run, "cancel")))


def test_errors_are_a_file_of_safe_cells_for_who_may_export(
    books: Connection, organization: Organization, far: FakeLinks
) -> None:
    many(organization, 110, bad=110)
    new_customer(organization, email="", name="=1+1")
    run = request_push(connection=books, actor=COMMAND)
    send(books, far)
    assert staff(organization, *LOOK).get(change(run, "errors")).status_code == 403
    client = staff(organization, *LOOK, "customers.export_customer")
    assert "Download errors" in client.get(change(run)).content.decode()
    answer = client.get(change(run, "errors"))
    header, *rows = csv.reader(io.StringIO(b"".join(answer.streaming_content).decode()))
    assert header == ["customer_id", "customer", "remote_id", "row", "state", "field", "reason"]
    assert len(rows) == 111
    assert len({row[0] for row in rows}) == 111
    assert any(row[1] == "'=1+1" for row in rows)
    assert client.post(change(run, "errors")).status_code == 405


def test_a_run_under_way_refreshes_itself_with_and_without_scripts(
    books: Connection, organization: Organization, far: FakeLinks
) -> None:
    many(organization, 2)
    run = request_push(connection=books, actor=COMMAND)
    client = staff(organization, *LOOK)
    text = client.get(change(run)).content.decode()
    assert '<noscript><meta http-equiv="refresh"' in text
    assert "connectors/run.js" in text
    assert ">Refresh</a>" in text
    send(books, far)
    text = client.get(change(run)).content.decode()
    assert 'http-equiv="refresh"' not in text
    assert "connectors/run.js" not in text


def test_buttons_need_their_rights_a_post_and_their_own_organization(
    books: Connection, organization: Organization, other_organization: Organization, far: FakeLinks
) -> None:
    many(organization, 3, bad=1)
    run = request_push(connection=books, actor=COMMAND)
    send(books, far)
    looker, stranger = staff(organization, *LOOK), staff(other_organization, *LOOK, PUSH, "customers.export_customer")
    able = staff(organization, *LOOK, PUSH)
    for name in ("retry", "cancel"):
        assert able.get(change(run, name)).status_code == 405
        assert looker.post(change(run, name)).status_code == 403
        assert f'action="{change(run, name)}"' not in looker.get(change(run)).content.decode()
        assert stranger.post(change(run, name)).status_code == 404
    assert stranger.get(change(run, "errors")).status_code == 404
    assert SyncRun.objects.count() == 1


def test_a_run_costs_the_same_queries_whatever_it_shows(
    books: Connection, organization: Organization, far: FakeLinks, django_assert_max_num_queries: Any
) -> None:
    many(organization, 150, bad=120)
    run = request_push(connection=books, actor=COMMAND)
    send(books, far)
    client = staff(organization, *LOOK, PUSH, "customers.export_customer")
    with django_assert_max_num_queries(12):
        client.get(change(run))


def test_the_groups_of_an_import_count_its_rows(organization: Organization) -> None:
    problems = [{"row": n, "state": "refused", "field": "email", "reason": "No address."} for n in range(3)]
    run = SyncRun(organization=organization, kind="import", refused=3, planned=3, problems=problems)
    [group], complete = pages.groups_of(run, clear=True)
    assert (group.count, complete, group.shown[1]) == (3, True, "Refused")


def test_a_push_that_was_asked_for_twice_can_be_cancelled(
    books: Connection, organization: Organization, far: FakeLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectors.sync.cancel.ROWS", 2)
    known, *_ = many(organization, 6)
    request_push(connection=books, actor=COMMAND, customer_ids=[known.pk])
    send(books, far)
    editing.update(organization=organization, values={known.pk: {"name": "Changed"}}, actor=COMMAND)
    first = request_push(connection=books, actor=COMMAND)
    run = request_push(connection=books, actor=COMMAND)
    cancel(run=run, actor=COMMAND)
    for one in (first, run):
        one.refresh_from_db()
        assert (one.skipped, one.total) == (6, one.planned)
    CustomerLink.objects.filter(next_attempt_at__isnull=False).update(next_attempt_at=timezone.now())
    send(books, far)
    assert [record["name"] for record in far.records.values()] == ["Changed"], "what is known there is kept up to date"
