"""The customer's page: what each system has, what is needed, what happened, and linking to a record that is there."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ValidationError
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from connectors.models import Conflict, Connection, CustomerLink, PushIntent, SyncRun, check_record_url
from connectors.provider import Record
from connectors.providers import PROVIDERS
from connectors.sync import deletes
from connectors.sync.receive import receive
from connectors.sync.resolve import HERE, THERE, WrongState, joined, keep_field, link_existing
from customers import editing
from customers.editing import Actor, StaleVersion
from customers.models import Customer, Note, Organization
from customers.timeline import Cursor
from tests.admin.test_compare import Wire, press, preview, system, wire
from tests.connectors.test_admin import change, link, new_customer, staff, told
from tests.customers.test_customer_admin import EDIT, as_form

__all__ = ["system", "wire"]  # fixtures
ANNA = Actor(kind="user", name="Anna")
SEE = "customers.view_personal_data"
PUSH = "connectors.push_customerlink"


@pytest.fixture
def customer(organization: Organization) -> Customer:
    return new_customer(organization, phone="+493012345", address_city="Berlin")


def page(client: Client, customer: Customer, **query: str) -> Any:
    answer = client.get(change(customer), query)
    assert answer.status_code == 200
    return answer


def edit(customer: Customer, actor: Actor = ANNA, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=actor)
    customer.refresh_from_db()


def intent(held: CustomerLink, **fields: Any) -> PushIntent:
    now = timezone.now()
    values = {"kind": "update", "payload": {}, "sent_values": {}, "version": 1, "first_sent_at": now, "sent_at": now}
    return PushIntent.objects.create(link=held, **{**values, **fields})


def sentences(answer: Any) -> list[str]:
    return [f"{entry.author} {entry.deed}" for entry in answer.context["timeline"]]


# The page


@pytest.mark.parametrize("number", [1, 12])
def test_the_page_costs_the_same_whatever_the_number_of_links(
    system: Callable[..., Connection], customer: Customer, organization: Organization, number: int
) -> None:
    for n in range(number):
        made = system("links", name=f"System {n}", account=str(n), record_url="https://app.example.com/{remote_id}")
        held = link(
            customer,
            made,
            remote_id=f"r{n}",
            state="rejected",
            error="No",
            error_field="email",
            base_remote={"phone": "1"},
            needed_version=1,
        )
        intent(held, outcome="failed", error="No", status=422)
        Conflict.objects.create(
            organization=organization, connection=made, link=held, field="phone", outcome="hub", at=timezone.now()
        )
    edit(customer, phone="+4930999")
    editing.note(customer=customer, text="A note.", actor=ANNA)
    everything = Permission.objects.filter(content_type__app_label__in=("customers", "connectors"))
    clerk = User.objects.create_user("clerk", is_staff=True)
    clerk.user_permissions.set(everything)
    organization.members.add(clerk)
    client = Client()
    client.force_login(clerk)
    page(client, customer)
    with CaptureQueriesContext(database) as queries:
        page(client, customer)
    assert len(queries) <= 25, [q["sql"][:120] for q in queries]


def test_every_part_is_there_without_scripts(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    system("links")
    text = page(admin_client, customer).content.decode()
    for part in ("overview", "addresses", "systems", "timeline", "raw"):
        assert f'href="#{part}"' in text
        assert len(re.findall(f'id="{part}"', text)) == 1
    assert text.count("<h1") == 1


def test_a_record_is_opened_there_by_its_address(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    made = system("links", record_url="https://app.example.com/c/{remote_id}?x=1")
    link(customer, made, remote_id="a/b c")
    assert 'href="https://app.example.com/c/a%2Fb%20c?x=1"' in page(admin_client, customer).content.decode()
    assert made.record_address("") == made.record_address(None) == ""


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert({remote_id})",
        "https://example.com/",
        "https://{remote_id}.example.com/",
        "https:///{remote_id}",
        "ftp://example.com/{remote_id}",
        "https://user@example.com/{remote_id}",
        "https://example.com/ {remote_id}",
        "https://[/{remote_id}",
        "{remote_id}",
    ],
)
def test_an_address_of_records_must_be_a_web_address_that_names_the_id(address: str) -> None:
    with pytest.raises(ValidationError):
        check_record_url(address)


def test_the_address_of_records_is_part_of_the_connection_form(
    system: Callable[..., Connection], admin_client: Client
) -> None:
    made = system("links")
    answer = admin_client.post(change(made), {"record_url": "javascript:{remote_id}"})
    assert "Enter a web address" in str(answer.context["adminform"].form.errors["record_url"])
    check_record_url("https://app.example.com/customers/{remote_id}")


def test_a_rejection_leads_to_its_field_and_quotes_what_was_answered(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    made = system("links", name="Books")
    held = link(customer, made, state="rejected", error="No such phone", error_field="phone", needed_version=1)
    intent(held, outcome="failed", status=422, remote_request_id="req-8f3", answered_at=timezone.now())
    text = page(admin_client, customer).content.decode()
    banner = text[text.index("Rejected in Books") :][:2500]
    assert 'href="#id_phone"' in banner
    assert "No such phone" in banner
    assert "HTTP 422, request req-8f3" in banner
    assert 'aria-label="Push again to Books"' in banner


def test_what_a_system_has_and_what_it_needs_stand_beside_the_fields(
    system: Callable[..., Connection], organization: Organization, wire: Wire, admin_client: Client
) -> None:
    customer = new_customer(organization, name="Acme GmbH", email="", phone="22", address_city="Bonn")
    books = system("links", name="Books")
    system("commenda", name="Tax")
    link(
        customer,
        books,
        remote_id="r1",
        base_local={"name": "Acme GmbH", "phone": "1", "address_city": "Bonn"},
        base_remote={"name": "ACME GMBH", "phone": "1", "address_city": "Bonn"},
        needed_version=2,
        pushed_version=1,
    )
    fields = page(admin_client, customer).context["adminform"].form.fields
    assert "Books: ‹ACME GMBH› (Books writes it so)" in fields["name"].help_text
    assert "Books: ‹1› (the hub&#x27;s value waits to be sent)" in fields["phone"].help_text
    assert "Books:" not in fields["address_city"].help_text
    assert "Needed by Books: the customer is not sent there while this is empty." in fields["email"].help_text
    assert "Needed" not in fields["name"].help_text
    assert "Needed" not in fields["shipping_address_country"].help_text
    edit(customer, shipping_address_city="Kiel", email="a@example.com")
    fields = page(admin_client, customer).context["adminform"].form.fields
    assert "⚠ Needed by Tax" in fields["shipping_address_country"].help_text
    assert "Needed by Books." in fields["email"].help_text
    assert wire.sent == []


def test_what_is_needed_is_said_before_a_customer_is_made(
    system: Callable[..., Connection], organization: Organization, other_organization: Organization
) -> None:
    system("links", name="Books")
    Connection.objects.create(organization=other_organization, provider="links", name="Foreign", direction="push")
    form = staff(organization, *EDIT).get("/admin/customers/customer/add/").context["adminform"].form
    assert "Needed by Books" in form.fields["email"].help_text
    assert "Foreign" not in form.fields["email"].help_text


def test_what_a_system_says_is_no_markup(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    made = system("links", name="<i>Books")
    held = link(customer, made, remote_id="r1", base_remote={"phone": "<script>x"}, state="rejected", error="<b>no")
    intent(held, outcome="failed", error="<b>no", remote_request_id="<b>")
    editing.note(customer=customer, text="<b>note", actor=ANNA)
    text = page(admin_client, customer).content.decode()
    for markup in ("<i>Books", "<script>x", "<b>no"):
        assert markup not in text


def test_personal_data_is_masked_for_who_may_not_see_it(
    system: Callable[..., Connection], customer: Customer, organization: Organization
) -> None:
    made = system("links", name="Books")
    held = link(
        customer,
        made,
        remote_id="r1",
        base_remote={"phone": "+498955501", "address_city": "Munich"},
        state="rejected",
        error="contact@acme.com is taken",
        error_field="email",
        needed_version=1,
    )
    intent(held, outcome="failed", error="contact@acme.com is taken")
    Conflict.objects.create(
        organization=organization,
        connection=made,
        link=held,
        field="phone",
        base="+494055502",
        here="+494055503",
        there="+494055504",
        outcome="waiting",
        at=timezone.now(),
    )
    edit(customer, phone="+493055505")
    CustomerLink.objects.update(state="rejected")
    rights = ("customers.view_customer", "connectors.view_customerlink", PUSH)
    text = page(staff(organization, *rights), customer).content.decode()
    # The form itself has rules of its own.
    before, _, rest = text.partition('id="overview"')
    shown = before + rest[rest.index('id="timeline"') :]
    for hidden in ("+498955501", "Munich", "contact@acme.com", "+4940555", "+493055505", "Berlin"):
        assert hidden not in shown
    assert "••• is taken" in shown
    text = page(staff(organization, *rights, SEE), customer).content.decode()
    for open_ in ("+498955501", "Munich", "contact@acme.com is taken", "+494055504"):
        assert open_ in text


@pytest.mark.parametrize(("state", "offered"), [("uncertain", True), ("in_sync", False)])
def test_resolve_is_offered_where_somebody_has_to_decide(
    system: Callable[..., Connection], customer: Customer, admin_client: Client, state: str, offered: bool
) -> None:
    held = link(customer, system("links", name="Books"), state=state, needed_version=1)
    text = page(admin_client, customer).content.decode()
    assert ("Resolve in Books" in text) is offered
    assert (reverse("admin:connectors_customerlink_resolve", args=[held.pk]) in text) is offered


# The timeline


def test_the_timeline_tells_what_people_and_systems_did(
    system: Callable[..., Connection], customer: Customer, organization: Organization, wire: Wire, admin_client: Client
) -> None:
    books = system("links", name="Books", direction="push_and_pull")
    press(admin_client, preview(admin_client, customer, books))
    edit(customer, Actor(kind="user", name="Anna", message="as told", request_id="req-77"), phone="+4930111")
    held = customer.links.get()
    by_books = Actor(kind="connection", id=str(books.pk), name="Books")
    editing.update(organization=organization, values={customer.pk: {"address_city": "Bonn"}}, actor=by_books)
    intent(held, version=3, outcome="failed", error="No such town", status=422, remote_request_id="r-5c1")
    intent(held, version=3, outcome="failed", error="No such town", status=422)
    intent(held, version=4, outcome="uncertain")
    editing.note(customer=customer, text="Called, nobody there.", actor=ANNA)
    editing.archive(organization=organization, ids=[customer.pk], actor=ANNA)
    editing.restore(organization=organization, ids=[customer.pk], actor=ANNA)
    answer = page(admin_client, customer)
    assert sentences(answer) == [
        "Anna restored this customer",
        "Anna archived this customer",
        "Anna noted",
        "Books has not said whether it stored the change of version 4",
        "Books refused the change of version 3",
        "Books changed",
        "Anna changed",
        "Books accepted the new record of version 1 as r-7",
        "test created this customer:",
    ]
    text = answer.content.decode()
    for told_ in ("“as told”", "req-77", "“No such town”", "2 tries", "HTTP 422", "taken into the hub as version 3"):
        assert told_ in text
    assert "Called, nobody there." in text
    people = page(admin_client, customer, timeline="people")
    assert {entry.author for entry in people.context["timeline"]} == {"Anna"}
    systems = page(admin_client, customer, timeline="systems")
    assert {entry.author for entry in systems.context["timeline"]} == {"Books", "test"}


def test_a_merge_is_one_entry_on_each_side(
    customer: Customer, organization: Organization, admin_client: Client
) -> None:
    other = new_customer(organization, name="Acme Ltd")
    editing.note(customer=other, text="Of the other one.", actor=ANNA)
    editing.merge(organization=organization, survivor=customer.pk, loser=other.pk, values={}, actor=ANNA)
    told_ = sentences(page(admin_client, customer))
    assert told_[0] == "Anna merged Acme Ltd into this customer"
    assert "Anna noted" in told_
    assert sentences(page(admin_client, other))[0] == "Anna merged this customer into Acme Corporation"
    editing.unmerge(organization=organization, loser=other.pk, actor=ANNA)
    assert sentences(page(admin_client, customer))[0] == "Anna undid the merge with Acme Ltd"
    assert "Anna noted" not in sentences(page(admin_client, customer))


def test_a_conflict_and_its_decision_are_told(
    system: Callable[..., Connection], customer: Customer, organization: Organization, admin_client: Client
) -> None:
    books = system("links", name="Books", direction="push_and_pull", conflict_policy="ask")
    for side, number in ((HERE, "+4930222"), (THERE, "+4930444")):
        CustomerLink.objects.all().delete()
        held = link(customer, books, remote_id="r1", pushed_version=1, needed_version=1)
        held.base_local = held.base_remote = {"phone": customer.phone}
        held.save()
        edit(customer, phone=number)
        receive(
            organization=organization,
            connection=books,
            records=[Record(values={"phone": "+4930333"}, remote_id="r1")],
            actor=Actor(kind="connection", name="Books"),
            fields=frozenset({"phone"}),
        )
        told_ = sentences(page(admin_client, customer))
        assert "Books and the hub both changed Phone" in told_[0]
        assert told_[0].endswith("it waits for a person")
        held.refresh_from_db()
        keep_field(link=held, field="phone", side=side, actor=ANNA, at=timezone.now() + timedelta(seconds=1))
        told_ = sentences(page(admin_client, customer))
        expected = (
            "Anna decided that Phone stays ‹+4930222›, not ‹+4930333› as in Books" if side == HERE else "Anna changed"
        )
        assert told_[0] == expected
        assert len([one for one in told_ if "decided that" in one]) <= 1


def test_older_entries_are_on_further_pages_without_gaps_or_repeats(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    held = link(customer, system("links", name="Books"), remote_id="r1")
    at = datetime(2026, 5, 1, tzinfo=UTC)
    for n in range(30):
        moment = at + timedelta(minutes=n // 7)  # several of each source at one moment
        editing.update(
            organization=customer.organization, values={customer.pk: {"phone": str(n)}}, actor=ANNA, at=moment
        )
        editing.note(customer=customer, text=f"note {n}", actor=ANNA, at=moment)
        intent(held, version=n, outcome="ok", sent_at=moment)
    seen: list[tuple[int, int]] = []
    query: dict[str, str] = {}
    pages = 0
    while pages < 10:
        pages += 1
        answer = page(admin_client, customer, **query)
        entries = [(entry.rank, entry.pk) for entry in answer.context["timeline"]]
        assert len(entries) <= 20
        seen += entries
        if answer.context["timeline_older"] is None:
            break
        query = {"before": str(answer.context["timeline_older"])}
    assert pages == 5
    assert len(seen) == len(set(seen)) == 91


@pytest.mark.parametrize("text", ["", "x", "1.2", "1.2.3.4", "-1.1.1", f"{'9' * 18}.1.1", "²..", "1.١.1"])
def test_an_address_that_no_page_gave_out_shows_the_newest(customer: Customer, admin_client: Client, text: str) -> None:
    assert Cursor.parse(text) is None
    assert len(page(admin_client, customer, before=text, timeline="x").context["timeline"]) == 1


def test_a_note_needs_its_right_and_changes_nothing_else(
    customer: Customer, organization: Organization, other_organization: Organization
) -> None:
    writer = staff(organization, "customers.view_customer", "customers.add_note")
    address = change(customer, "note")
    assert writer.get(address).status_code == 405
    assert writer.post(address, {"text": "  Called.\nNobody there.  "}).status_code == 302
    note = Note.objects.get()
    assert (note.text, note.customer, note.author_name) == ("Called.\nNobody there.", customer, "clerk0")
    for wrong in ("", "  ", "x" * 2001, "\x07"):
        assert "at most 2000 characters" in told(writer.post(address, {"text": wrong}))
    customer.refresh_from_db()
    assert (Note.objects.count(), customer.version) == (1, 1)
    assert staff(organization, "customers.view_customer").post(address, {"text": "x"}).status_code == 403
    stranger = staff(other_organization, "customers.view_customer", "customers.add_note")
    assert stranger.post(address, {"text": "x"}).status_code == 404
    assert b"/note/" not in page(staff(organization, "customers.view_customer"), customer).content


def test_a_refused_save_compares_systems_with_what_is_stored(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    link(customer, system("links"), remote_id="r1", base_remote={"phone": "+493012345"})
    answer = admin_client.post(change(customer), as_form(customer, phone="5", email="wrong"))
    assert answer.status_code == 200
    assert "Links:" not in answer.context["adminform"].form.fields["phone"].help_text


# Linking to a record that is there


def at_links(**values: Any) -> Record:
    values = {"name": "ACME", "email": "contact@acme.com", "phone": "", "address_city": "Bonn", **values}
    return Record(values=values, document={"id": "r-7"}, remote_id="r-7", revision="1")


def join(customer: Customer, connection: Connection, side: str, **more: Any) -> SyncRun:
    more = {"record": at_links(), **more}
    return link_existing(
        customer=customer, connection=connection, provider=PROVIDERS["links"], side=side, actor=ANNA, **more
    )


def test_take_theirs_changes_the_hub_and_sends_what_they_lack(
    system: Callable[..., Connection], customer: Customer
) -> None:
    books = system("links", name="Books")
    run = join(customer, books, THERE)
    customer.refresh_from_db()
    assert (customer.name, customer.address_city, customer.phone) == ("ACME", "Bonn", "+493012345")
    last = customer.changes.latest("version")
    assert (last.version, last.actor_name, last.message) == (2, "Anna", "Linked to r-7 in Books.")
    held = customer.links.get()
    assert (held.remote_id, held.is_primary, held.is_dirty, held.run) == ("r-7", True, True, run)
    assert held.base_local["name"] == held.base_remote["name"] == "ACME"
    assert (held.base_local["phone"], run.request["decision"]) == ("", "link_existing")


def test_send_ours_leaves_the_hub_and_sends_the_differences_alone(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    books = system("links", name="Books")
    run = join(customer, books, HERE)
    customer.refresh_from_db()
    assert customer.version == 1
    wire.records["links"] = {"id": "r-7"}
    page_ = preview(admin_client, customer, books)
    assert {one.title for one in page_.context["systems"][0].lines if one.sends} == {"Name", "Phone", "Address city"}
    press(admin_client, page_)
    assert wire.writes[0]["method"] == "PUT"
    assert wire.writes[0]["url"].endswith("/unified/customer/r-7")
    run.refresh_from_db()
    assert run.finished_at


def test_an_equal_record_is_linked_and_nothing_is_sent(system: Callable[..., Connection], customer: Customer) -> None:
    books = system("links", name="Books")
    same = {"name": customer.name, "phone": customer.phone, "address_city": "Berlin"}
    run = join(customer, books, HERE, record=at_links(**same))
    assert (run.state, run.updated) == ("succeeded", 1)
    held = customer.links.get()
    assert (held.is_dirty, held.next_attempt_at, held.pushed_version) == (False, None, 1)


def test_nothing_is_sent_where_the_hub_only_reads(system: Callable[..., Connection], customer: Customer) -> None:
    books = system("links", name="Books", direction="pull")
    run = join(customer, books, HERE)
    assert run.state == "succeeded"
    assert not customer.links.get().is_dirty


def test_an_address_comes_from_one_side_as_a_whole(organization: Organization) -> None:
    customer = new_customer(organization, phone="", address_line1="1 Main St", address_city="Berlin")
    rows = {
        row.name: (row.keeps[HERE], row.keeps[THERE])
        for row in joined(
            customer=customer,
            record=Record(values={"phone": "5", "address_line1": "", "address_city": "Bonn"}, remote_id="r"),
            provider=PROVIDERS["links"],
        )
    }
    assert rows == {"phone": ("5", "5"), "address_line1": ("1 Main St", ""), "address_city": ("Berlin", "Bonn")}


def test_a_waiting_link_is_used_and_a_tombstone_revived(system: Callable[..., Connection], customer: Customer) -> None:
    books, shop = system("links", name="Books"), system("links", name="Shop", account="2")
    waiting = link(customer, books, needed_version=1, next_attempt_at=timezone.now())
    join(customer, books, HERE)
    waiting.refresh_from_db()
    assert (waiting.remote_id, CustomerLink.objects.count()) == ("r-7", 1)
    gone = link(customer, shop, remote_id="r-1", pushed_version=1, needed_version=1)
    deletes.bury(gone, evidence="test", at=timezone.now())
    gone.save()
    join(customer, shop, HERE)
    gone.refresh_from_db()
    assert (gone.remote_id, gone.former_remote_id, gone.deleted_at) == ("r-7", "r-1", None)


def test_what_cannot_be_linked_is_refused_and_changes_nothing(
    system: Callable[..., Connection], customer: Customer, organization: Organization
) -> None:
    books = system("links", name="Books")

    def refuses(words: str, **more: Any) -> None:
        before = list(CustomerLink.objects.order_by("pk").values()), SyncRun.objects.count()
        with pytest.raises(WrongState, match=words):
            join(customer, books, THERE, **more)
        customer.refresh_from_db()
        assert (list(CustomerLink.objects.order_by("pk").values()), SyncRun.objects.count()) == before
        assert customer.name == "Acme Corporation"

    refuses("at most 255", record=Record(values={}, remote_id="x" * 256))
    refuses("is deleted in Books", record=Record(values={}, remote_id="r-7", deleted=True))
    refuses("cannot be taken over", record=at_links(name="", phone="5" * 65))
    other = new_customer(organization, name="Beta Ltd")
    taken = link(other, books, remote_id="r-7")
    refuses(f"linked to Beta Ltd .{other.public_id}")
    taken.delete()
    held = link(customer, books, remote_id="r-1")
    refuses("linked to record r-1")
    CustomerLink.objects.filter(pk=held.pk).update(remote_id=None, lease_until=timezone.now() + timedelta(minutes=1))
    refuses("is being sent")
    CustomerLink.objects.filter(pk=held.pk).update(lease_until=None, state="uncertain")
    intent(held, kind="create", outcome="uncertain")
    refuses("answer to a create")
    PushIntent.objects.all().delete()
    with pytest.raises(StaleVersion):
        join(customer, books, THERE, expected=7)
    editing.archive(organization=organization, ids=[customer.pk], actor=ANNA)
    with pytest.raises(WrongState, match="archived or merged"):
        join(customer, books, HERE)
    with pytest.raises(ValueError, match="a side is"):
        join(customer, books, "both")


def link_form(client: Client, customer: Customer, books: Connection, **more: Any) -> Any:
    return client.post(change(customer, "link_read"), {"connection": books.pk, "remote_id": "r-7", **more})


def chosen(answer: Any, **more: Any) -> dict[str, Any]:
    found = answer.context["found"]
    customer = answer.context["customer"]
    fields = {"connection": found["connection"].pk, "remote_id": "r-7", "shown": found["digest"]}
    return {**fields, "version": customer.version, **more}


def test_a_person_links_a_record_after_seeing_both(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    books = system("links", name="Books")
    wire.records["links"] = {"id": "r-7", "name": "ACME", "email": "contact@acme.com", "phone": "+4930999"}
    assert "Link…" in page(admin_client, customer).content.decode()
    start = admin_client.get(change(customer, "link"), {"connection": books.pk})
    assert f'value="{books.pk}" selected' in start.content.decode()
    assert wire.sent == []
    answer = link_form(admin_client, customer, books)
    assert [one["method"] for one in wire.sent] == ["GET"]
    rows = {row.title: (row.here, row.there, row.with_theirs, row.with_ours) for row in answer.context["found"]["rows"]}
    assert rows["Phone"] == ("‹+493012345›", "‹+4930999›", "‹+4930999›", "‹+493012345›")
    assert not CustomerLink.objects.exists()
    nothing = admin_client.post(change(customer, "link_save"), chosen(answer))
    assert "Choose whose values are kept." in nothing.content.decode()
    assert not CustomerLink.objects.exists()
    done = admin_client.post(change(customer, "link_save"), chosen(answer, side="there"))
    assert done["Location"] == f"{change(customer, 'preview')}?connection={books.pk}"
    customer.refresh_from_db()
    assert (customer.phone, customer.links.get().remote_id) == ("+4930999", "r-7")
    assert wire.writes == []
    assert "Link…" not in page(admin_client, customer).content.decode()


def test_what_changed_since_it_was_shown_is_shown_again(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    books = system("links", name="Books")
    wire.records["links"] = {"id": "r-7", "name": "ACME", "email": "contact@acme.com"}
    answer = link_form(admin_client, customer, books)
    wire.records["links"]["name"] = "ACME Inc."
    again = admin_client.post(change(customer, "link_save"), chosen(answer, side="there"))
    assert "Something changed since you looked." in again.content.decode()
    edit(customer, phone="+4930999")
    third = admin_client.post(change(customer, "link_save"), chosen(again, side="there", version=1))
    assert "Something changed since you looked." in third.content.decode()
    assert not CustomerLink.objects.exists()
    assert admin_client.post(change(customer, "link_save"), chosen(third, side="there")).status_code == 302


def test_why_a_record_cannot_be_linked_is_said_on_the_page(
    system: Callable[..., Connection], customer: Customer, organization: Organization, wire: Wire, admin_client: Client
) -> None:
    books = system("links", name="Books")
    other = new_customer(organization, name="Beta Ltd")
    link(other, books, remote_id="r-7")
    text = link_form(admin_client, customer, books).content.decode()
    assert f"Record r-7 is linked to Beta Ltd ({other.public_id})." in text
    assert wire.sent == []
    assert "has no record r-8" in link_form(admin_client, customer, books, remote_id="r-8").content.decode()
    assert "at most 255" in link_form(admin_client, customer, books, remote_id=" ").content.decode()
    for wrong in ("", "x", "99999"):
        assert "Choose a system" in link_form(admin_client, customer, books, connection=wrong).content.decode()


def test_linking_needs_its_rights(
    system: Callable[..., Connection],
    customer: Customer,
    organization: Organization,
    other_organization: Organization,
    wire: Wire,
) -> None:
    books = system("links", name="Books")
    wire.records["links"] = {"id": "r-7", "name": "ACME", "email": "contact@acme.com", "phone": "+4930999"}
    viewer = staff(organization, "customers.view_customer")
    stranger = staff(other_organization, "customers.view_customer", PUSH)
    pusher = staff(organization, "customers.view_customer", PUSH)
    for what in ("link_read", "link_save"):
        assert viewer.post(change(customer, what)).status_code == 403
        assert stranger.post(change(customer, what)).status_code == 404
        assert pusher.get(change(customer, what)).status_code == 405
    assert [viewer.get(change(customer, "link")).status_code, stranger.get(change(customer, "link")).status_code] == [
        403,
        404,
    ]
    assert wire.sent == []
    answer = link_form(pusher, customer, books)
    text = answer.content.decode()
    assert "Take theirs" not in text
    assert "+4930999" not in text
    assert "contact@acme.com" not in text
    assert pusher.post(change(customer, "link_save"), chosen(answer, side="there")).status_code == 403
    assert pusher.post(change(customer, "link_save"), chosen(answer, side="here")).status_code == 302


def test_what_archiving_deletes_elsewhere_is_said_beforehand(
    connect: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    far = connect("commenda", name="Far", account="c2", direction="push", archive_policy="delete")
    kept = connect("commenda", name="Kept", account="c3", direction="push")
    held = link(customer, far, remote_id="r1", pushed_version=1, needed_version=1)
    link(customer, kept, remote_id="r2", pushed_version=1, needed_version=1)
    words = "Archiving deletes the record in Far."
    assert words in page(admin_client, customer).content.decode()
    gone = link(
        customer, connect("commenda", name="Gone", account="c4", direction="push"), remote_id="r3",
        state="remote_deleted", deleted_at=timezone.now(),
    )  # fmt: skip
    assert words in admin_client.get(change(gone, "resolve")).content.decode()
    CustomerLink.objects.filter(pk=held.pk).update(deleted_at=timezone.now())
    assert "Archiving deletes" not in page(admin_client, customer).content.decode()
    assert "Archiving deletes" not in admin_client.get(change(gone, "resolve")).content.decode()
