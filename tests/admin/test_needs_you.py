"""The queue of what waits for a person: complete, oldest first, only what this person may act on, and cheap."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.admin.needs import KINDS, kind_of, waiting
from connectors.models import Connection, CustomerLink, Issue, SyncRun
from connectors.states import STATUSES
from customers import editing
from customers.forms import label
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.test_admin import COMMAND, change, new_customer, staff, told

URL = "/admin/connectors/customerlink/needs-you/"
AGAIN = "/admin/connectors/customerlink/push-again/"
LOOK = ("connectors.view_customerlink", "customers.view_customer")
PUSH, EDIT, SEE = "connectors.push_customerlink", "customers.change_customer", "customers.view_personal_data"
CONFLICT = {"phone": {"base": "1", "here": "2", "there": "3"}}
STATES: dict[str, dict[str, Any]] = {
    "rejected": {"state": "rejected", "error": "Too short.", "error_field": "phone", "fingerprint": "f1"},
    "conflict": {"conflicts": CONFLICT, "pushed_version": 1},
    "uncertain": {"state": "uncertain"},
    "remote_deleted": {"state": "remote_deleted", "deleted_at": timezone.now(), "tombstone": {"by": "system"}},
    "duplicate": {"is_duplicate": True},
}


@pytest.fixture
def shop(connect: Callable[..., Connection]) -> Connection:
    return connect("links", name="Shop", account="1", direction="push")


def put(
    connection: Connection, kind: str, *, days: float = 1, customer: Customer | None = None, **fields: Any
) -> CustomerLink:
    """A link that waits so, for so many days."""
    if customer is None:
        customer = new_customer(connection.organization, name=f"{kind} {CustomerLink.objects.count()}", email="")
    at = timezone.now() - timedelta(days=days)
    values = {"needed_version": 1, "remote_id": str(uuid7()), **STATES.get(kind, {}), **fields}
    if kind == "uncertain":
        values["remote_id"] = None
    return CustomerLink.objects.create(
        customer=customer, connection=connection, created_at=at, **{"updated_at": at, **values}
    )


def shown(client: Client, **query: Any) -> list[tuple[str, str]]:
    """Kind and customer of each row of the list."""
    answer = client.get(URL, query)
    assert answer.status_code == 200
    return [(row.kind, row.link.customer.name) for row in answer.context["rows"]]


def test_everything_that_waits_is_listed_oldest_first_and_nothing_else(
    shop: Connection, organization: Organization
) -> None:
    for days, kind in enumerate(KINDS, 1):
        put(shop, kind, days=days)
    archived = new_customer(organization, name="Archived")
    put(shop, "remote_deleted", customer=archived)
    editing.archive(organization=organization, ids=[archived.pk], actor=COMMAND)
    put(shop, "in_sync", pushed_version=1)
    put(shop, "waiting", next_attempt_at=timezone.now())
    put(shop, "uncertain", next_attempt_at=timezone.now(), customer=new_customer(organization, name="Looked for"))
    put(shop, "duplicate", is_active=False, customer=new_customer(organization, name="Kept"))
    put(
        shop, "remote_deleted", tombstone={"unlinked": {"by": "Anna"}}, customer=new_customer(organization, name="Left")
    )
    client = staff(organization, *LOOK, PUSH)
    assert [kind for kind, _ in shown(client)] == list(reversed(KINDS))
    page = client.get(URL).content.decode()
    for kind in KINDS:
        assert STATUSES[kind].word in page
        assert [found for found, _ in shown(client, kind=kind)] == [kind]
    assert "Shop refuses phone: Too short." in page
    assert "Changed on both sides: phone." in page
    assert "None" not in page
    for name in ("Looked for", "Kept", "Left", "Archived"):
        assert name not in page
    # What the database says is what the page of a link says.
    found = {link.pk: link.kind for link in waiting([shop])}
    rows = CustomerLink.objects.select_related("customer", "connection")
    assert {link.pk: kind_of(link) for link in rows if kind_of(link)} == found


def test_filters_by_system_and_cause_and_pages_by_key(
    shop: Connection, organization: Organization, connect: Callable[..., Connection]
) -> None:
    other = connect("links", name="Books", account="2", direction="push")
    put(other, "rejected", fingerprint="f2", error="Unknown country.")
    names = [{"name": f"Example {n:03}"} for n in range(120)]
    at = timezone.now() - timedelta(days=2)
    CustomerLink.objects.bulk_create(
        CustomerLink(
            uid=uuid7(), customer=customer, connection=shop, created_at=at, needed_version=1, **STATES["rejected"],
            updated_at=at + timedelta(seconds=n // 3),
        )
        for n, customer in enumerate(editing.create(organization=organization, values=names, actor=COMMAND))
    )  # fmt: skip
    client = staff(organization, *LOOK, PUSH, SEE)
    assert shown(client, connection=other.pk) == [("rejected", "rejected 0")]
    assert shown(client, cause="f2") == [("rejected", "rejected 0")]
    assert shown(client, connection="x") == []
    assert shown(client, after="nonsense|1") == shown(client)
    seen, query = [], ""
    while True:
        answer = client.get(URL + query)
        seen += [row.link.customer.name for row in answer.context["rows"]]
        if not (query := answer.context["next"]):
            break
    assert seen == [*(f"Example {n:03}" for n in range(120)), "rejected 0"]
    reasons = client.get(URL).context["reasons"]
    assert [(r.connection.name, r.cause, r.number) for r in reasons] == [("Shop", "f1", 120), ("Books", "f2", 1)]
    assert "Shop refuses Phone: Too short." in reasons[0].words


@pytest.mark.parametrize(
    ("rights", "kinds"),
    [
        ((*LOOK,), []),
        ((*LOOK, EDIT), ["rejected"]),
        ((*LOOK, PUSH), [*KINDS]),
        (("connectors.change_connection",), ["reconnect"]),
        (("connectors.change_issue",), ["issue"]),
        ((PUSH,), None),
        ((), None),
    ],
)
def test_each_sees_what_may_be_acted_on(
    shop: Connection, organization: Organization, rights: tuple[str, ...], kinds: list[str] | None
) -> None:
    for kind in KINDS:
        put(shop, kind)
    Connection.objects.update(state="needs_reauth", state_reason="The key was withdrawn.")
    now = timezone.now()
    for kind in ("fight", "login", "rejected"):
        Issue.objects.create(
            organization=organization, connection=shop, kind=kind, message=f"About {kind}.", first_at=now, last_at=now
        )
    client = staff(organization, *rights)
    answer = client.get(URL)
    if kinds is None:
        assert answer.status_code == 403
        return
    assert [kind for kind, *_ in answer.context["kinds"]] == kinds
    assert {row.kind for row in answer.context["rows"]} == set(kinds) & set(KINDS)
    page = answer.content.decode()
    assert ("The key was withdrawn." in page) == ("reconnect" in kinds)
    # What is listed as links or as a login is not told twice.
    assert ("About fight." in page) == ("issue" in kinds)
    assert "About login." not in page
    assert "About rejected." not in page
    assert (PUSH in rights) == ("Push again" in page)
    if not kinds:
        assert "nothing here that you may act on" in page


def test_another_organization_is_neither_shown_nor_counted_nor_acted_on(
    shop: Connection, organization: Organization, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    theirs = connect("links", name="Theirs", account="9", direction="push", organization=other_organization)
    put(theirs, "rejected", error="Secret words.")
    client = staff(organization, *LOOK, PUSH, "connectors.change_connection", "connectors.change_issue")
    page = client.get(URL).content.decode()
    assert "Theirs" not in page
    assert "Secret words" not in page
    assert [number for _, _, number, *_ in client.get(URL).context["kinds"]] == [0] * 7
    assert client.post(AGAIN, {"connection": theirs.pk, "cause": "f1", "confirmed": "yes"}).status_code == 404
    assert CustomerLink.objects.get().state == "rejected"


def test_what_a_system_said_is_masked_for_who_may_not_see_personal_data(
    shop: Connection, organization: Organization
) -> None:
    customer = new_customer(organization, email="jane@example.com")
    put(shop, "rejected", customer=customer, error="Jane@Example.com is taken.", error_field="email")
    blind, seeing = staff(organization, *LOOK, PUSH), staff(organization, *LOOK, PUSH, SEE)
    page = blind.get(URL).content.decode()
    assert "ane@" not in page.lower()
    assert "••• is taken." in page
    assert f"Shop refuses {label('email')}." in page
    assert "Jane@Example.com is taken." in seeing.get(URL).content.decode()
    preview = blind.post(AGAIN, {"connection": shop.pk, "cause": "f1"}).content.decode()
    assert "ane@" not in preview.lower()


def test_pushing_again_first_tells_and_then_does(shop: Connection, organization: Organization) -> None:
    mine = [put(shop, "rejected") for _ in range(3)]
    put(shop, "rejected", fingerprint="f2")
    client = staff(organization, *LOOK, PUSH, "connectors.view_syncrun")
    form = {"connection": shop.pk, "cause": "f1"}
    preview = client.post(AGAIN, form)
    assert "Push 3 again" in preview.content.decode()
    assert "Too short." in preview.content.decode()
    assert not SyncRun.objects.exists()
    answer = client.post(AGAIN, {**form, "confirmed": "yes"})
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert (run.planned, run.request["decision"], run.actor_name) == (3, "release", "clerk0")
    assert "3 customers are sent to Shop again" in told(answer)
    assert set(CustomerLink.objects.filter(state="open").values_list("pk", flat=True)) == {link.pk for link in mine}
    assert "was refused" in told(client.post(AGAIN, {**form, "confirmed": "yes"}))
    assert SyncRun.objects.count() == 1


def test_side_effects_need_post_csrf_and_the_right(shop: Connection, organization: Organization) -> None:
    link = put(shop, "rejected")
    form = {"connection": shop.pk, "cause": "f1", "confirmed": "yes"}
    client = staff(organization, *LOOK, PUSH)
    assert client.get(AGAIN, form).status_code == 405
    assert client.post(URL, form).status_code == 405
    assert staff(organization, *LOOK, EDIT).post(AGAIN, form).status_code == 403
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = client.cookies
    assert strict.post(AGAIN, form).status_code == 403
    assert Client().post(AGAIN, form).status_code == 302
    link.refresh_from_db()
    assert link.state == "rejected"


def test_a_row_leads_to_what_settles_it(shop: Connection, organization: Organization) -> None:
    link = put(shop, "rejected")
    page = staff(organization, *LOOK, PUSH, EDIT).get(URL).content.decode()
    assert f'{change(link.customer)}#id_phone"' in page
    assert f'action="{change(link, "resolve")}"' in page
    assert f'{change(link, "resolve")}?next={URL.replace("/", "%2F")}"' in page
    page = staff(organization, *LOOK, PUSH).get(URL).content.decode()
    assert "#id_phone" not in page


def test_the_page_costs_the_same_whatever_it_shows(
    shop: Connection, organization: Organization, connect: Callable[..., Connection]
) -> None:
    client = staff(organization, *LOOK, PUSH, "connectors.change_connection", "connectors.change_issue")

    def cost() -> int:
        client.get(URL)
        with CaptureQueriesContext(database) as queries:
            assert client.get(URL).status_code == 200
        return len(queries)

    put(shop, "rejected")
    few = cost()
    for n in range(5):
        more = connect("links", name=f"Shop {n}", account=f"x{n}", direction="push")
        for kind in KINDS:
            put(more, kind)
    assert cost() == few <= 14


def test_the_index_is_used(shop: Connection) -> None:
    """Few that wait among many that do not are found without reading the many."""
    rows = waiting([shop]).order_by("updated_at", "pk")[:51]
    plan = rows.explain()
    if database.vendor == "postgresql":
        with database.cursor() as cursor:
            cursor.execute("SET LOCAL enable_seqscan = off")
        plan = rows.explain()
    assert "link_needs_you" in plan
