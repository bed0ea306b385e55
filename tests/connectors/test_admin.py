"""The screens of connected systems: what a push says, what each right allows, and what never appears on a page."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import httpx2
import pytest
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from connectors.admin.badges import status_column
from connectors.guard import close_shared_client
from connectors.models import ApiKey, Connection, CustomerLink, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.push import push
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.fakes import FakeLinks, lost, status

COMMAND = Actor(kind="command", name="test")
LIST = "/admin/customers/customer/"
SECRET = "remote-key"
LOOK = (
    *("customers.view_customer", "connectors.view_connection", "connectors.view_customerlink"),
    *("connectors.view_syncrun", "connectors.view_apikey"),
)
PUSH = "connectors.push_customerlink"
SECOND = timedelta(seconds=1)


class Far:
    """A Links system on a socket of this machine."""

    def __init__(self) -> None:
        self.system = system = FakeLinks()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                request = httpx2.Request(
                    self.command,
                    f"http://far{self.path}",
                    headers=dict(self.headers.items()),
                    content=self.rfile.read(length),
                )
                try:
                    answer = system.answer(request)
                except httpx2.ReadTimeout:
                    self.close_connection = True
                    return
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                with contextlib.suppress(BrokenPipeError):  # the caller had no time left to wait
                    self.end_headers()
                    self.wfile.write(answer.content)

            do_PUT = do_GET = do_POST  # noqa: N815 # names that http.server prescribes

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 # as above
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        close_shared_client()


@pytest.fixture
def far(settings: Any) -> Iterator[Far]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    running = Far()
    yield running
    running.close()


@pytest.fixture
def books(connect: Callable[..., Connection], far: Far) -> Connection:
    return connect(
        "links",
        name="Books",
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url=far.url,
        credentials={"api_key": SECRET},
    )


@pytest.fixture
def customer(organization: Organization) -> Customer:
    return new_customer(organization)


def new_customer(organization: Organization, **values: Any) -> Customer:
    values = {"name": "Acme Corporation", "email": "contact@acme.com", **values}
    return editing.create(organization=organization, values=[values], actor=COMMAND)[0]


def link(customer: Customer, connection: Connection, **fields: Any) -> CustomerLink:
    now = timezone.now()
    return CustomerLink.objects.create(
        customer=customer, connection=connection, **{"created_at": now, "updated_at": now, **fields}
    )


def staff(organization: Organization | None, *rights: str) -> Client:
    user = User.objects.create_user(f"clerk{User.objects.count()}", password="secret", is_staff=True)
    for right in rights:
        app, codename = right.split(".")
        user.user_permissions.add(Permission.objects.get(content_type__app_label=app, codename=codename))
    if organization:
        organization.members.add(user)
    client = Client()
    client.force_login(user)
    return client


def change(obj: Any, what: str = "change") -> str:
    return reverse(f"admin:{obj._meta.app_label}_{obj._meta.model_name}_{what}", args=[obj.pk])


def told(answer: Any) -> str:
    return " | ".join(str(message) for message in get_messages(answer.wsgi_request))


def press(client: Client, customer: Customer, connection: Connection | None = None) -> str:
    answer = client.post(change(customer, "push"), {"connection": connection.pk} if connection else {})
    assert answer.status_code == 302
    assert answer["Location"] == change(customer)
    return told(answer)


# What a press of the push button says


def test_a_push_creates_then_finds_nothing_to_send_then_updates(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    assert "Sent. Books accepted version 1 as cust_1." in press(admin_client, customer, books)
    assert far.system.records["cust_1"]["email"] == "contact@acme.com"
    assert "Already up to date, nothing was sent to Books." in press(admin_client, customer, books)
    editing.update(organization=customer.organization, values={customer.pk: {"phone": "1"}}, actor=COMMAND)
    page = admin_client.get(change(customer)).content.decode()
    assert "Waiting" in page
    assert "Phone" in page
    assert "Sent. Books accepted version 2" in press(admin_client, customer)
    assert far.system.records["cust_1"]["phone"] == "1"
    assert len(far.system.writes) == 2
    page = admin_client.get(change(customer)).content.decode()
    assert "In sync" in page
    assert "cust_1" in page


def test_a_refusal_is_told_with_field_and_reason_and_shown_with_a_way_to_the_field(
    books: Connection, organization: Organization, far: Far, admin_client: Client
) -> None:
    customer = new_customer(organization, email="")
    said = press(admin_client, customer, books)
    assert "Books: Rejected. Books refuses email: Links needs an e-mail address." in said
    page = admin_client.get(change(customer)).content.decode()
    assert "Rejected in Books" in page
    assert 'href="#id_email"' in page
    assert far.system.writes == []


def test_a_refusal_by_the_system_is_told_in_its_words(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    far.system.fail(lambda request: httpx2.Response(422, json={"message": "<b>No</b> such country"}))
    assert "Books refuses the record: <b>No</b> such country" in press(admin_client, customer, books)
    page = admin_client.get(change(customer)).content.decode()
    assert "<b>No</b>" not in page


def test_a_lost_answer_is_told_as_uncertain(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    far.system.fail(lost, after=True)
    assert "Books: Checking. It is not known whether Books stored it." in press(admin_client, customer, books)
    assert "It is not known" in press(admin_client, customer, books)
    assert len(far.system.writes) == 1


def test_a_wait_is_told_with_its_end(books: Connection, customer: Customer, far: Far, admin_client: Client) -> None:
    far.system.fail(status(429, retry_after="60"))
    assert "Books asked to wait until " in press(admin_client, customer, books)


def test_a_refused_login_is_told_and_stops_the_connection(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    books.seal_credentials({"api_key": "another-key"})
    books.save()
    assert "Books cannot be used: The provider does not accept the credentials." in press(admin_client, customer)
    assert "Books is out of use" in press(admin_client, customer)
    assert len(far.system.ledger) == 1
    assert "Reconnect" in admin_client.get(change(customer)).content.decode()


def test_new_credentials_are_tried_before_the_connection_is_used_again(
    books: Connection, customer: Customer, far: Far, admin_client: Client, django_capture_on_commit_callbacks: Any
) -> None:
    Connection.objects.filter(pk=books.pk).update(state="needs_reauth", state_reason="The key has ended.")
    form = admin_client.get(change(books)).context["adminform"].form
    fields = {name: form.get_initial_for_field(field, name) for name, field in form.fields.items()}
    posted = {name: value for name, value in fields.items() if value not in (None, False)}
    posted = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in posted.items()}

    for key, state in (("wrong-key", "needs_reauth"), ("remote-key", "active")):
        with django_capture_on_commit_callbacks(execute=True):
            answer = admin_client.post(change(books), {**posted, "credential_api_key": key})
        assert answer.status_code == 302, answer.context["adminform"].form.errors
        books.refresh_from_db()
        assert books.state == state
    assert books.ramp == 5, "a few customers first"


def test_rules_of_a_connection_are_checked(books: Connection, far: Far, admin_client: Client) -> None:
    wrong = {
        "pull_cron": ("30 2 30 2 *", "this schedule never comes"),
        "rate": ("0", "how many calls a second"),
        "burst": ("0", "at least 1"),
        "field_policies": ('{"shoe_size": "ask"}', "Unknown: shoe_size"),
    }
    answer = admin_client.post(change(books), {name: value for name, (value, _) in wrong.items()})
    errors = answer.context["adminform"].form.errors
    for name, (_, message) in wrong.items():
        assert message in str(errors[name])


def test_credentials_that_cannot_be_read_are_told(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    Connection.objects.filter(pk=books.pk).update(base_url="http://127.0.0.1:1")
    assert "Books cannot be used: The sealed value was changed, or belongs to another record or host" in press(
        admin_client, customer
    )
    assert far.system.ledger == []


def test_nothing_is_sent_of_an_archived_customer_or_to_a_paused_connection(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    admin_client.post(change(books, "pause"), {"reason": "stocktaking"})
    assert "out of use (Paused: stocktaking" in press(admin_client, customer)
    assert "Paused" in admin_client.get(change(books)).content.decode()
    admin_client.post(change(books, "resume"))
    editing.archive(organization=customer.organization, ids=[customer.pk], actor=COMMAND)
    assert "nothing was sent" in press(admin_client, customer)
    assert b"Push to all" not in admin_client.get(change(customer)).content
    assert far.system.ledger == []


def test_one_press_pushes_to_every_system_that_the_hub_sends_to(
    books: Connection, connect: Callable[..., Connection], customer: Customer, far: Far, admin_client: Client
) -> None:
    second = connect(
        "links", name="Shop", account="2", direction="push", base_url=far.url, credentials={"api_key": SECRET}
    )
    connect("commenda", name="Calls us")
    said = press(admin_client, customer)
    assert "Sent. Books" in said
    assert "Sent. Shop" in said
    assert CustomerLink.objects.filter(customer=customer).count() == 2
    assert second.links.get().remote_id == "cust_2"


def test_save_and_push_saves_first(books: Connection, customer: Customer, far: Far, admin_client: Client) -> None:
    form = {"name": "Acme Inc.", "email": "contact@acme.com", "custom_fields": "{}", "is_active": "on"}
    answer = admin_client.post(change(customer), {**form, "seen_version": 1, "_push": "1"})
    assert (answer.status_code, answer["Location"]) == (307, change(customer, "push"))
    customer.refresh_from_db()
    assert customer.version == 2
    assert far.system.ledger == []


# Many customers


def test_many_are_pushed_after_a_page_that_says_how_many(
    books: Connection, organization: Organization, other_organization: Organization, admin_client: Client
) -> None:
    customers = [new_customer(organization, email=f"{n}@example.com") for n in range(3)]
    stranger = new_customer(other_organization)
    chosen = {"action": "push_selected", "_selected_action": [str(c.pk) for c in [*customers, stranger]]}
    page = admin_client.post(LIST, chosen)
    assert page.status_code == 200
    assert "4 customers are chosen" in page.content.decode()
    assert "3 new there" in page.content.decode()
    assert not SyncRun.objects.exists()
    answer = admin_client.post(LIST, {**chosen, "confirmed": "yes", "connections": [books.pk]})
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert (run.planned, run.connection, run.state) == (3, books, SyncRun.State.QUEUED)
    assert not CustomerLink.objects.filter(customer=stranger).exists()
    assert admin_client.get(change(run)).status_code == 200


def test_the_chosen_connection_must_be_one_of_the_customers_organization(
    books: Connection, other_organization: Organization, admin_client: Client
) -> None:
    stranger = new_customer(other_organization)
    chosen = {"action": "push_selected", "_selected_action": [str(stranger.pk)]}
    admin_client.post(LIST, {**chosen, "confirmed": "yes", "connections": [books.pk]})
    assert not SyncRun.objects.exists()
    assert admin_client.post(change(stranger, "push"), {"connection": books.pk}).status_code == 404
    assert not CustomerLink.objects.exists()


# Rights


def own_urls(customer: Customer, connection: Connection, key: ApiKey) -> list[str]:
    return [
        change(customer, "push"),
        change(customer, "archive"),
        change(customer, "restore"),
        *(change(connection, what) for what in ("test", "pull", "push", "pause", "resume")),
        change(key, "revoke"),
    ]


def test_no_link_presses_a_button(books: Connection, customer: Customer, admin_client: Client, far: Far) -> None:
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    for url in own_urls(customer, books, key):
        assert admin_client.get(url).status_code == 405
        assert admin_client.head(url).status_code == 405
    assert far.system.ledger == []


def test_a_post_without_a_token_presses_no_button(books: Connection, customer: Customer, admin_user: User) -> None:
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    for url in own_urls(customer, books, key):
        assert client.post(url).status_code == 403


def test_who_may_only_look_sees_no_button_and_is_refused(books: Connection, customer: Customer, far: Far) -> None:
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    client = staff(books.organization, *LOOK)
    pages = b"".join(client.get(change(obj)).content for obj in (customer, books, key))
    for url in own_urls(customer, books, key):
        assert f'action="{url}"'.encode() not in pages
        assert client.post(url).status_code == 403
    assert b"push_selected" not in client.get(LIST).content
    action = client.post(LIST, {"action": "push_selected", "_selected_action": [str(customer.pk)]})
    assert action.status_code == 403
    assert client.post(change(books), {"name": "Other"}).status_code == 403
    assert client.get("/admin/connectors/apikey/add/").status_code == 403
    assert far.system.ledger == []


@pytest.mark.parametrize(
    ("right", "page", "url"),
    [
        (PUSH, "customer", "push"),
        (PUSH, "connection", "push"),
        ("connectors.pull_connection", "connection", "pull"),
        ("connectors.change_connection", "connection", "test"),
        ("connectors.change_connection", "connection", "pause"),
        ("connectors.change_apikey", "key", "revoke"),
        ("customers.change_customer", "customer", "archive"),
    ],
)
def test_each_right_brings_its_button(books: Connection, customer: Customer, right: str, page: str, url: str) -> None:
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    obj = {"customer": customer, "connection": books, "key": key}[page]
    client = staff(books.organization, *LOOK, right)
    assert f'action="{change(obj, url)}"' in client.get(change(obj)).content.decode()
    assert client.post(change(obj, url), {"reason": "why"}).status_code in (200, 302)


def test_what_belongs_to_another_organization_does_not_exist(
    books: Connection, customer: Customer, far: Far, other_organization: Organization
) -> None:
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    held = link(customer, books, remote_id="88-102")
    run = SyncRun.objects.create(
        public_id="a" * 16,
        organization=books.organization,
        connection=books,
        kind="push",
        actor_kind="user",
        actor_name="x",
    )
    everything = [*LOOK, PUSH, "connectors.pull_connection", "customers.change_customer"]
    everything += [f"connectors.{verb}_{model}" for verb in ("add", "change") for model in ("connection", "apikey")]
    client = staff(other_organization, *everything)
    for obj in (customer, books, key, held, run):
        assert client.get(change(obj)).status_code == 404
    for url in own_urls(customer, books, key):
        assert client.post(url, {"reason": "why"}).status_code == 404
    for model in ("connection", "apikey", "customerlink", "syncrun"):
        page = client.get(f"/admin/connectors/{model}/")
        assert list(page.context["cl"].result_list) == []
        assert "Books" not in page.content.decode()
    assert list(client.get(LIST, {"q": "88-102"}).context["cl"].result_list) == []
    form = client.get("/admin/connectors/connection/add/").context["adminform"].form
    assert list(form.fields["organization"].queryset) == [other_organization]
    assert far.system.ledger == []


# Finding and reading


def test_a_customer_is_found_by_a_remote_id_and_by_the_mark_of_a_link(
    books: Connection, customer: Customer, organization: Organization
) -> None:
    held = link(customer, books, remote_id="88-102")
    new_customer(organization, name="88-102 Incorporated Elsewhere", email="")
    client = staff(organization, *LOOK)
    for term, hits in (("88-102", 2), (str(held.uid), 1)):
        found = client.get(LIST, {"q": term}).context["cl"].result_list
        assert customer.pk in {c.pk for c in found}
        assert len(found) == hits


def test_lists_are_filtered_by_system_and_state(
    books: Connection, connect: Callable[..., Connection], customer: Customer, organization: Organization
) -> None:
    shop = connect("links", name="Shop", account="2", direction="push")
    other = new_customer(organization, email="")
    link(customer, books, state=LinkState.REJECTED, needed_version=1)
    link(customer, shop, pushed_version=1, needed_version=1)
    client = staff(organization, *LOOK)

    def found(**query: Any) -> set[UUID]:
        return {c.pk for c in client.get(LIST, query).context["cl"].result_list}

    assert found(system=books.pk, state="rejected") == {customer.pk}
    assert found(system=shop.pk, state="rejected") == set()
    assert found(state="in_sync") == {customer.pk}
    assert found(system=shop.pk) == {customer.pk}
    assert found(state="not_linked") == {other.pk}
    assert found(system="x") == set()
    summary = client.get(LIST).content.decode()
    assert "1 Rejected" in summary
    assert "1 In sync" in summary
    assert "Not linked" in summary


def test_the_status_in_the_database_is_the_status_on_the_page(
    connect: Callable[..., Connection], organization: Organization
) -> None:
    now = timezone.now()
    connections = [
        connect("links", name=f"{direction} {state}", account=f"{direction} {state}", direction=direction, state=state)
        for direction in ("push", "calls_us")
        for state in Connection.State.values
    ]
    connections.append(connect("links", name="Slow", account="slow", direction="push", not_before=now + 9 * SECOND))
    link_fields = [
        {
            "state": state,
            "needed_version": needed,
            "lease_until": lease,
            "is_duplicate": duplicate,
            "deleted_at": deleted,
            "conflicts": conflicts,
            "next_attempt_at": due,
        }
        for state in LinkState.values
        for needed in (0, 1)
        for lease in (None, now - timedelta(seconds=9), now + timedelta(seconds=9))
        for duplicate in (False, True)
        for deleted in (None, now)
        for conflicts in ({}, {"phone": {"base": "1", "here": "2", "there": "3"}})
        for due in (None, now)
    ]
    names = [{"name": str(n)} for n in range(len(link_fields))]
    customers = editing.create(organization=organization, values=names, actor=COMMAND)
    CustomerLink.objects.bulk_create(
        CustomerLink(uid=uuid7(), customer=one, connection=connection, created_at=now, updated_at=now, **fields)
        for connection in connections
        for one, fields in zip(customers, link_fields, strict=True)
    )
    rows = CustomerLink.objects.select_related("connection").annotate(shown_state=status_column(now=now))
    assert rows.count() == len(connections) * len(link_fields)
    assert [row for row in rows if row.shown_state != row.status_key(now=now)] == []


def count_queries(client: Client, url: str, query: dict[str, str] | None = None) -> int:
    client.get(url, query)
    with CaptureQueriesContext(database) as queries:
        assert client.get(url, query).status_code == 200
    return len(queries)


def test_pages_cost_the_same_number_of_queries_whatever_they_show(
    connect: Callable[..., Connection], organization: Organization
) -> None:
    client = staff(organization, *LOOK, PUSH, "customers.change_customer", "customers.view_customerchange")
    first = new_customer(organization)
    shop = connect("links", name="Shop", direction="push")
    link(first, shop, needed_version=1, remote_id="a")

    def costs() -> dict[str, int]:
        return {
            "list": count_queries(client, LIST),
            "found": count_queries(client, LIST, {"q": "acme"}),
            "by e-mail": count_queries(client, LIST, {"q": "contact@acme.com"}),
            "in parts": count_queries(client, LIST, {"q": "corp"}),
            "page": count_queries(client, change(first)),
            "links": count_queries(client, "/admin/connectors/customerlink/"),
            "connections": count_queries(client, "/admin/connectors/connection/"),
            "runs": count_queries(client, "/admin/connectors/syncrun/"),
        }

    few = costs()
    more = [connect("links", name=f"Shop {n}", account=str(n), direction="push") for n in range(10)]
    customers = [first, *(new_customer(organization, email=f"contact{n}@acme.com") for n in range(30))]
    for n, connection in enumerate(more):
        for one in customers:
            link(one, connection, needed_version=1, pushed_version=n % 2, remote_id=str(one.pk), base_local={})
        SyncRun.objects.create(
            public_id=f"{n:016}", organization=organization, connection=connection, kind="push", actor_kind="user",
            actor_name="x",
        )  # fmt: skip
    for n in range(30):
        editing.update(organization=organization, values={first.pk: {"phone": str(n)}}, actor=COMMAND)
    assert costs() == few
    assert max(few["list"], few["found"], few["by e-mail"], few["in parts"]) <= 12
    assert few["page"] <= 25


# Connections


def settings_of(organization: Organization, **fields: Any) -> dict[str, Any]:
    return {
        "organization": organization.pk,
        "provider": "links",
        "name": "Books",
        "direction": "push",
        "base_url": "https://127.0.0.1/api",
        "conflict_policy": "hub_wins",
        "create_policy": "by_hand",
        "delete_policy": "unlink",
        "archive_policy": "keep",
        "options": "{}",
        **fields,
    }


ADD = "/admin/connectors/connection/add/"


def test_credentials_go_in_and_never_come_out(organization: Organization, far: Far, admin_client: Client) -> None:
    answer = admin_client.post(ADD, settings_of(organization, base_url=far.url, credential_api_key="first-secret"))
    assert answer.status_code == 302
    made = Connection.objects.get()
    assert made.unseal_credentials() == {"api_key": "first-secret"}
    page = admin_client.get(change(made)).content.decode()
    assert "Set. Leave empty to keep it." in page

    kept = settings_of(organization, base_url=f"{far.url}/other/path", name="Renamed")
    admin_client.post(change(made), kept)
    made.refresh_from_db()
    assert (made.name, made.unseal_credentials()) == ("Renamed", {"api_key": "first-secret"})

    admin_client.post(change(made), {**kept, "credential_api_key": "second-secret"})
    made.refresh_from_db()
    assert made.unseal_credentials() == {"api_key": "second-secret"}

    wrong = admin_client.post(change(made), {**kept, "name": "", "credential_api_key": "third-secret"})
    assert wrong.status_code == 200
    assert "third-secret" not in wrong.content.decode()

    admin_client.post(change(made), {**kept, "clear_credentials": "on"})
    made.refresh_from_db()
    assert made.credentials == ""
    assert "Not set." in admin_client.get(change(made)).content.decode()


def test_a_change_of_host_clears_the_credentials(books: Connection, far: Far, admin_client: Client) -> None:
    moved = settings_of(books.organization, base_url=far.url.replace("127.0.0.1", "localhost"))
    answer = admin_client.post(change(books), moved)
    assert "the credentials were cleared" in told(answer)
    books.refresh_from_db()
    assert books.credentials == ""
    answer = admin_client.post(change(books), {**moved, "base_url": far.url, "credential_api_key": "new-secret"})
    assert told(answer).count("cleared") == 1  # the first answer's message is still unread
    books.refresh_from_db()
    assert books.unseal_credentials() == {"api_key": "new-secret"}


def test_saving_settings_leaves_the_place_of_a_pull_alone(books: Connection, admin_client: Client, far: Far) -> None:
    Connection.objects.filter(pk=books.pk).update(checkpoint={"cursor": "7"}, pull_token="held")
    before = Connection.objects.get(pk=books.pk)
    admin_client.post(change(books), settings_of(books.organization, base_url=far.url, pull_interval=3600))
    after = Connection.objects.get(pk=books.pk)
    assert (after.checkpoint, after.pull_token, after.pull_interval) == ({"cursor": "7"}, "held", 3600)
    assert after.credentials == before.credentials


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"base_url": ""}, "base_url", "enter the address"),
        ({"base_url": "https://169.254.169.254/"}, "base_url", "must not reach"),
        ({"provider": "commenda", "account": " "}, "account", "Commenda needs its corporation_id"),
        ({"provider": "unknown"}, "provider", "not one of the available choices"),
        ({"options": '{"nonsense": true}'}, "options", "Unknown: nonsense."),
        ({"options": "[1]"}, "options", "Give an object"),
        ({"pull_interval": "0"}, "pull_interval", "at least 60"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_their_field(
    organization: Organization, far: Far, admin_client: Client, fields: dict[str, Any], field: str, message: str
) -> None:
    answer = admin_client.post(ADD, settings_of(organization, **{"base_url": far.url, **fields}))
    assert answer.status_code == 200
    assert message in " ".join(answer.context["adminform"].form.errors[field])
    assert not Connection.objects.exists()


def test_two_connections_of_one_name_are_refused_when_the_second_is_renamed(
    books: Connection, connect: Callable[..., Connection], admin_client: Client
) -> None:
    second = connect("links", name="Shop", account="2")
    renamed = settings_of(books.organization, name="Books", account="2", direction="calls_us", base_url="")
    answer = admin_client.post(change(second), renamed)
    assert answer.status_code == 200
    second.refresh_from_db()
    assert second.name == "Shop"


def test_a_connection_is_tested_by_one_read(books: Connection, far: Far, admin_client: Client) -> None:
    page = admin_client.post(change(books, "test")).content.decode()
    assert "Books answers and accepts the login." in page
    assert [entry[0] for entry in far.system.ledger] == ["GET"]
    far.system.fail(status(401))
    assert "does not accept the credentials" in admin_client.post(change(books, "test")).content.decode()
    Connection.objects.filter(pk=books.pk).update(base_url="http://127.0.0.1:1")
    assert "The credentials cannot be read." in admin_client.post(change(books, "test")).content.decode()


def test_a_press_pulls_what_is_there(books: Connection, far: Far, admin_client: Client) -> None:
    far.system.records["cust_9"] = {"id": "cust_9", "name": "Acme Corporation", "email": "contact@acme.com"}
    assert "Read 1 records: 1 created, 0 updated." in told(admin_client.post(change(books, "pull")))
    assert Customer.objects.get().links.get().remote_id == "cust_9"
    run = SyncRun.objects.get()
    assert run.actor_kind == "user"
    far.system.fail(status(401))
    assert "The pull ended early" in told(admin_client.post(change(books, "pull")))


def test_pushing_everything_asks_first_and_is_done_by_the_worker(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    page = admin_client.post(change(books, "push")).content.decode()
    assert "1 customers of Demo" in page
    assert "1 of them are not linked yet" in page
    assert not SyncRun.objects.exists()
    answer = admin_client.post(change(books, "push"), {"confirmed": "yes"})
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert run.planned == 1
    assert far.system.ledger == []


def test_a_connection_with_customers_or_runs_is_not_deleted(
    books: Connection, connect: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    link(customer, books)
    assert admin_client.post(change(books, "delete"), {"post": "yes"}).status_code == 403
    unused = connect("links", name="Unused", account="3")
    assert admin_client.post(change(unused, "delete"), {"post": "yes"}).status_code == 302
    assert list(Connection.objects.all()) == [books]


# Keys


def test_a_key_is_shown_once(organization: Organization, admin_client: Client) -> None:
    form = {"organization": organization.pk, "name": "webshop", "scopes": ["customers:read"]}
    answer = admin_client.post("/admin/connectors/apikey/add/", form)
    secret = answer.context["secret"]
    assert secret in answer.content.decode()
    assert "no-store" in answer["Cache-Control"]
    key = ApiKey.find(secret, now=timezone.now())
    assert key is not None
    assert (key.name, key.scopes, key.organization) == ("webshop", ["customers:read"], organization)
    for url in ("/admin/connectors/apikey/", change(key), "/admin/", "/admin/connectors/apikey/add/"):
        assert secret not in admin_client.get(url).content.decode()
    assert key.hash not in admin_client.get(change(key)).content.decode()
    with database.cursor() as cursor:
        for table in ("django_session", "django_admin_log", "connectors_apikey"):
            cursor.execute(f"SELECT * FROM {table}")
            assert secret not in str(cursor.fetchall())

    admin_client.post(change(key), {"name": "webshop 2", "scopes": ["customers:write"], "hash": "x"})
    key.refresh_from_db()
    assert (key.name, key.scopes) == ("webshop 2", ["customers:read"])
    admin_client.post(change(key, "revoke"), {"confirmed": "yes"})
    assert ApiKey.find(secret, now=timezone.now()) is None
    assert "Revoked" in admin_client.get("/admin/connectors/apikey/").content.decode()


def test_a_key_that_has_already_expired_is_not_issued(organization: Organization, admin_client: Client) -> None:
    form = {"organization": organization.pk, "name": "webshop", "scopes": ["customers:read"]}
    past = {"expires_at_0": "2020-01-01", "expires_at_1": "00:00:00"}
    assert admin_client.post("/admin/connectors/apikey/add/", {**form, **past}).status_code == 200
    assert not ApiKey.objects.exists()


# Runs and links


def test_a_run_tells_its_totals_and_links_to_the_customers(
    books: Connection, organization: Organization, far: Far, admin_client: Client
) -> None:
    good, bad = new_customer(organization), new_customer(organization, email="", name="No address")
    chosen = {"action": "push_selected", "_selected_action": [str(good.pk), str(bad.pk)], "confirmed": "yes"}
    admin_client.post(LIST, {**chosen, "connections": [books.pk]})
    run = SyncRun.objects.get()
    page = admin_client.get(change(run)).context
    assert (page["waiting"], page["sum"]) == (2, 2)
    provider = PROVIDERS["links"]
    push(connection=books, provider=provider, session=provider.session(books))
    answer = admin_client.get(change(run))
    assert answer.context["sum"] == run.planned == 2
    text = answer.content.decode()
    assert "Partly succeeded" in text
    assert change(bad) in text
    assert "No address" in text
    assert admin_client.post(change(run)).status_code == 403


def test_a_link_shows_documents_as_text_and_no_secret(
    books: Connection, customer: Customer, far: Far, admin_client: Client
) -> None:
    press(admin_client, customer, books)
    held = customer.links.get()
    held.remote_data = {"note": "<script>alert(1)</script>"}
    held.save()
    text = admin_client.get(change(held)).content.decode()
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;" in text
    assert "contact@acme.com" in text
    assert PushIntent.objects.get().get_outcome_display() in text
    assert admin_client.post(change(held)).status_code == 403


def test_secrets_are_on_no_page(
    books: Connection, customer: Customer, far: Far, admin_client: Client, organization: Organization
) -> None:
    key, secret = ApiKey.issue(organization=organization, name="shop")
    press(admin_client, customer, books)
    run, held = SyncRun.objects.get(), customer.links.get()
    lists = [f"/admin/connectors/{m}/" for m in ("connection", "apikey", "customerlink", "syncrun")]
    pages = [LIST, "/admin/", "/admin/customers/customerchange/", *lists]
    for url in [*pages, *(change(obj) for obj in (customer, books, key, run, held))]:
        text = admin_client.get(url).content.decode()
        for hidden in (SECRET, books.credentials, secret, key.hash):
            assert hidden not in text


def test_reading_every_page_changes_nothing(
    books: Connection, customer: Customer, far: Far, admin_client: Client, admin_user: User
) -> None:
    press(admin_client, customer, books)
    key = ApiKey.issue(organization=books.organization, name="shop")[0]
    objects = [customer, books, key, SyncRun.objects.get(), customer.links.get(), customer.changes.get()]
    objects += [books.organization, admin_user]
    urls = [change(obj) for obj in objects]
    urls += [reverse(f"admin:{obj._meta.app_label}_{obj._meta.model_name}_changelist") for obj in objects]
    urls += [reverse(f"admin:{m}_add") for m in ("customers_customer", "connectors_connection", "connectors_apikey")]
    sent = len(far.system.ledger)
    with CaptureQueriesContext(database) as queries:
        for url in urls:
            assert admin_client.get(url).status_code == 200
    writes = [q["sql"] for q in queries if q["sql"].split()[0] in ("INSERT", "UPDATE", "DELETE")]
    assert writes == []
    assert len(far.system.ledger) == sent


def test_a_press_ends_when_a_system_answers_slowly(
    books: Connection, customer: Customer, far: Far, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectors.admin.customers.CALL_SECONDS", 0.3)

    def slow(request: httpx2.Request) -> httpx2.Response | None:
        time.sleep(1)
        return None

    far.system.fail(slow)
    started = time.monotonic()
    assert "It is not known whether Books stored it." in press(admin_client, customer, books)
    assert time.monotonic() - started < 0.95
