"""What a push would do is shown beforehand: nothing is called or written, and what is shown is what is then sent."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from django.contrib.auth.models import User
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.admin.compare import WORDS, mark_of, uid_of_mark
from connectors.exceptions import Rejected
from connectors.models import Connection, CustomerLink
from connectors.outbound import rehearse
from connectors.provider import Capabilities
from connectors.providers import PROVIDERS
from connectors.sync.preview import Will
from customers import editing
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.test_admin import COMMAND, change, link, new_customer, staff, told

SECRET = "remote-key"
CUSTOMER = {
    "name": "Jane Doe",
    "first_name": "Jane",
    "last_name": "Doe",
    "email": "jane@example.com",
    "phone": "+493012345",
    "address_line1": "1 Main St",
    "address_city": "Berlin",
    "shipping_address_city": "Hamburg",
    "shipping_address_country": "DE",
    "currency": "EUR",
}
OPTIONS = {"rootfi": {"update_by_platform_id": True}}
NAMES = ("links", "commenda", "cheqpay", "rootfi")


class Wire:
    """The four systems behind one client: keeps what it is sent and answers as each would."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.client = httpx2.Client(transport=httpx2.MockTransport(self.answer))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        self.sent.append({"method": request.method, "url": str(request.url), "body": body})
        assert SECRET in str(request.headers.raw)
        provider = request.url.host.split(".")[0]
        if request.method == "GET":
            document = self.records.get(provider)
            if document is None:
                return httpx2.Response(404, json={})
            return httpx2.Response(200, json={"data": [document]} if provider == "rootfi" else self.wrapped(provider))
        item = body["data"][0] if provider == "rootfi" else body
        known = {"links": "id", "commenda": "id", "cheqpay": "externalId", "rootfi": "rootfi_id"}[provider]
        own = item.get("externalId") if provider == "cheqpay" else 7 if provider == "rootfi" else "r-7"
        self.records[provider] = {**self.records.get(provider, {}), **item, known: own}
        if provider == "rootfi":
            return httpx2.Response(200, json={"data": [self.records[provider]]})
        return httpx2.Response(200, json=self.wrapped(provider))

    def wrapped(self, provider: str) -> Any:
        document = self.records[provider]
        return document if provider == "cheqpay" else {"data": document}

    @property
    def writes(self) -> list[dict[str, Any]]:
        return [one for one in self.sent if one["method"] != "GET"]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    made = Wire()
    monkeypatch.setattr("connectors.outbound.shared_client", lambda: made.client)
    yield made
    made.client.close()


@pytest.fixture
def system(connect: Callable[..., Connection]) -> Callable[..., Connection]:
    def make(provider: str, **fields: Any) -> Connection:
        defaults = {
            "name": provider.title(),
            "direction": Connection.Direction.PUSH,
            "base_url": f"https://{provider}.example.com/api",
            "credentials": {"api_key": SECRET},
            "options": OPTIONS.get(provider, {}),
        }
        return connect(provider, **{**defaults, **fields})

    return make


@pytest.fixture
def customer(organization: Organization) -> Customer:
    return new_customer(organization, **CUSTOMER)


def edit(customer: Customer, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=COMMAND)
    customer.refresh_from_db()


def preview(client: Client, customer: Customer, connection: Connection | None = None) -> Any:
    """The page. Opening it must write nothing."""
    with CaptureQueriesContext(database) as queries:
        answer = client.get(change(customer, "preview"), {"connection": connection.pk} if connection else {})
    assert answer.status_code == 200
    assert [q["sql"] for q in queries if q["sql"].split()[0] in ("INSERT", "UPDATE", "DELETE")] == []
    return answer


def shown(answer: Any) -> list[dict[str, Any]]:
    """The requests on the page, as the page has them."""
    return [
        {"method": request.method, "url": request.url, "body": json.loads(body) if body else None}
        for request, _, body in answer.context["systems"][0].requests
    ]


def press(client: Client, answer: Any) -> Any:
    """Send the form of the page that pushes."""
    text = answer.content.decode()
    [form] = [form for form in re.findall(r"(?s)<form.*?</form>", text) if 'value="preview"' in form]
    fields = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form))
    return client.post(re.findall(r'action="([^"]+)"', form)[0], fields)


def line(answer: Any, title: str) -> Any:
    [found] = [one for one in answer.context["systems"][0].lines if one.title == title]
    return found


@pytest.mark.parametrize("provider", NAMES)
def test_the_request_shown_is_the_one_then_sent(
    provider: str, system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system(provider)
    page = preview(admin_client, customer, connection)
    create = shown(page)
    assert len(create) == 1
    assert wire.sent == []
    assert not CustomerLink.objects.exists()
    answer = press(admin_client, page)
    assert answer["Location"] == f"{change(customer, 'preview')}?connection={connection.pk}"
    assert "Sent." in told(answer)
    assert wire.sent == create

    edit(customer, phone="+4940999", email="new@example.com", address_city="Bremen", shipping_address_city="Kiel")
    wire.sent.clear()
    page = preview(admin_client, customer, connection)
    update = shown(page)
    assert wire.sent == []
    assert update != create
    assert "Sent." in told(press(admin_client, page))
    assert wire.sent == update
    assert "up to date" in preview(admin_client, customer, connection).content.decode()


@pytest.mark.parametrize("provider", NAMES)
def test_the_request_shown_holds_no_secret(
    provider: str, system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system(provider)
    page = preview(admin_client, customer, connection)
    text = page.content.decode()
    [(_, headers, _)] = page.context["systems"][0].requests
    assert "***" in headers
    assert SECRET not in text
    assert connection.credentials not in text


def test_a_record_is_read_first_where_the_hub_reads_from_the_system(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links", direction=Connection.Direction.PUSH_AND_PULL)
    press(admin_client, preview(admin_client, customer, connection))
    edit(customer, phone="+4940999")
    wire.sent.clear()
    page = preview(admin_client, customer, connection)
    requests = shown(page)
    assert [one["method"] for one in requests] == ["GET", "PUT"]
    assert "if nothing has changed there" in page.content.decode()
    press(admin_client, page)
    assert wire.sent == requests


def test_each_field_says_what_happens_to_it(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("commenda")
    press(admin_client, preview(admin_client, customer, connection))
    held = customer.links.get()
    held.base_remote = {**held.base_remote, "name": "JANE DOE"}
    held.save()
    edit(customer, email="new@example.com")
    page = preview(admin_client, customer, connection)
    said = {one.title: (one.icon, one.there) for one in page.context["systems"][0].lines}
    assert said["E-mail"] == ("→", "‹jane@example.com›")
    assert said["Name"] == ("=", "‹JANE DOE›")
    assert "Commenda writes it so" in line(page, "Name").words
    assert line(page, "E-mail").sent_as == 'email "new@example.com"'
    assert "Phone" in page.context["systems"][0].unmapped
    assert "Push 1 change to Commenda" in page.content.decode()


def test_how_a_field_is_named_there_is_shown(
    system: Callable[..., Connection], customer: Customer, admin_client: Client
) -> None:
    said = {}
    for provider in ("cheqpay", "rootfi"):
        page = preview(admin_client, customer, system(provider))
        said |= {f"{provider} {one.title}": one.sent_as for one in page.context["systems"][0].lines if one.sends}
    assert said["cheqpay Name"] == 'firstName "Jane", lastName "Doe"'
    assert said["cheqpay First name"] == 'firstName "Jane"'
    assert said["cheqpay Notify by phone"] == "notificationOptions.notifyPhone false"
    assert said["rootfi Address line 1"] == 'address.street "1 Main St"'
    assert said["rootfi Active"] == 'status "ACTIVE"'
    assert "rootfi Address line 2" not in said


def test_a_conflict_waits_and_the_rest_is_sent(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    press(admin_client, preview(admin_client, customer, connection))
    CustomerLink.objects.update(conflicts={"phone": {"base": "1", "here": "2", "there": "333"}})
    edit(customer, phone="22", address_city="Bremen")
    page = preview(admin_client, customer, connection)
    assert line(page, "Phone").icon == "⇄"
    assert line(page, "Phone").there == "‹333›"
    assert "phone" not in shown(page)[0]["body"]
    assert shown(page)[0]["body"]["address_city"] == "Bremen"


def test_a_refusal_is_told_before_anything_is_sent(
    system: Callable[..., Connection], organization: Organization, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    customer = new_customer(organization, email="")
    page = preview(admin_client, customer, connection)
    text = page.content.decode()
    assert "It would be refused before it is sent: Links needs an e-mail address." in text
    assert f"{change(customer)}#id_email" in text
    assert "Create in" not in text
    assert shown(page) == []


def test_why_nothing_is_sent_is_said(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    held = link(customer, connection, remote_id="r-7", state="uncertain", needed_version=2, pushed_version=1)
    assert "Decide that first" in preview(admin_client, customer, connection).content.decode()
    Connection.objects.update(state="paused", state_reason="stocktaking")
    assert "Links is out of use: stocktaking" in preview(admin_client, customer, connection).content.decode()
    Connection.objects.update(state="active")
    CustomerLink.objects.filter(pk=held.pk).update(state="open")
    editing.archive(organization=customer.organization, ids=[customer.pk], actor=COMMAND)
    page = preview(admin_client, customer, connection)
    assert "archived or merged" in page.content.decode()
    assert shown(page) == []


def test_a_push_of_what_has_changed_since_is_not_sent(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    page = preview(admin_client, customer, connection)
    edit(customer, phone="+4940999")
    assert "has changed since you looked: nothing was sent" in told(press(admin_client, page))
    assert wire.sent == []
    press(admin_client, preview(admin_client, customer, connection))
    assert len(wire.sent) == 1


def test_read_it_now_reads_and_shows_what_is_there(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links", direction=Connection.Direction.PUSH_AND_PULL)
    press(admin_client, preview(admin_client, customer, connection))
    wire.records["links"] |= {"phone": "+49405551", "address_city": "Bonn"}
    edit(customer, phone="+4940999")
    wire.sent.clear()
    before = CustomerLink.objects.values().get()
    address = change(customer, "read")
    assert admin_client.get(address).status_code == 405
    page = admin_client.post(address, {"connection": connection.pk})
    assert [one["method"] for one in wire.sent] == ["GET"]
    assert CustomerLink.objects.values().get() == before
    assert page.context["systems"][0].made.live
    assert line(page, "Phone").there == "‹+49405551›"
    assert line(page, "Phone").words == "is sent over what was changed there"
    assert line(page, "Address city").words.startswith("is taken into the hub")
    assert [one["method"] for one in shown(page)] == ["PUT"]
    wire.sent.clear()
    requests = shown(page)
    press(admin_client, page)
    assert wire.writes == requests
    customer.refresh_from_db()
    assert customer.address_city == "Bonn"


def test_where_the_hub_does_not_read_an_edit_there_stays_or_is_overwritten(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    press(admin_client, preview(admin_client, customer, connection))
    wire.records["links"] |= {"phone": "+49405551", "address_city": "Bonn"}
    edit(customer, phone="+4940999")
    page = admin_client.post(change(customer, "read"), {"connection": connection.pk})
    assert line(page, "Address city").words.startswith("stays as it is there")
    assert line(page, "Phone").words == "is sent over what was changed there"


def test_what_cannot_be_read_is_told(
    system: Callable[..., Connection],
    customer: Customer,
    wire: Wire,
    admin_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = system("links")
    link(customer, connection, remote_id="r-9", needed_version=2, pushed_version=1)
    page = admin_client.post(change(customer, "read"), {"connection": connection.pk})
    assert "has no record r-9" in page.content.decode()
    monkeypatch.setattr(type(PROVIDERS["links"]), "capabilities", lambda self, connection: Capabilities())
    page = preview(admin_client, customer, connection)
    assert "documents no way to read one customer" in page.content.decode()
    assert line(page, "Phone").there == "not known"
    assert "Read it now" not in page.content.decode()


def test_all_systems_are_on_one_page_in_a_constant_number_of_queries(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    system("links")
    with CaptureQueriesContext(database) as one:
        admin_client.get(change(customer, "preview"))
    for number, provider in enumerate((*NAMES[1:], "links", "links", "links"), 2):
        made = system(provider, name=f"System {number}", account=str(number))
        link(customer, made, remote_id=f"r{number}", needed_version=1)
    with CaptureQueriesContext(database) as many:
        page = admin_client.get(change(customer, "preview"))
    assert len(page.context["systems"]) == 7
    assert len(many) <= len(one) + 1
    assert wire.sent == []


def test_one_press_pushes_to_all_that_are_shown(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_client: Client
) -> None:
    for provider in NAMES:
        system(provider)
    page = preview(admin_client, customer)
    requests = [
        {"method": request.method, "url": request.url, "body": json.loads(body)}
        for one in page.context["systems"]
        for request, _, body in one.requests
    ]
    marks = {f"mark-{one.connection.pk}": one.mark for one in page.context["systems"]}
    assert "Push to 4 systems" in page.content.decode()
    admin_client.post(change(customer, "push"), {"back": "preview", "version": customer.version, **marks})
    assert sorted(wire.sent, key=str) == sorted(requests, key=str)


def test_a_mark_is_good_for_its_customer_and_system_alone(
    system: Callable[..., Connection], customer: Customer, organization: Organization
) -> None:
    one, other, uid = system("links"), system("cheqpay"), uuid7()
    mark = mark_of(customer, one, uid)
    assert uid_of_mark(mark, customer, one) == uid
    assert uid_of_mark(mark, customer, other) is None
    assert uid_of_mark(mark, new_customer(organization), one) is None
    for wrong in ("", "x", f"{mark}x", "a:b:c"):
        assert uid_of_mark(wrong, customer, one) is None


def test_a_mark_that_somebody_has_is_not_used_again(
    system: Callable[..., Connection], customer: Customer, organization: Organization, wire: Wire, admin_client: Client
) -> None:
    connection = system("links")
    page = preview(admin_client, customer, connection)
    mark = page.context["systems"][0].mark
    taken = uid_of_mark(mark, customer, connection)
    link(new_customer(organization), connection, uid=taken)
    press(admin_client, page)
    assert customer.links.get().uid != taken


# Rights


def test_who_may_see_and_press(
    system: Callable[..., Connection], customer: Customer, other_organization: Organization, wire: Wire
) -> None:
    connection = system("links")
    organization = customer.organization
    pages = (change(customer, "preview"), change(customer, "read"))
    viewer = staff(organization, "customers.view_customer")
    assert [viewer.get(pages[0]).status_code, viewer.post(pages[1]).status_code] == [403, 403]
    looker = staff(organization, "customers.view_customer", "connectors.view_customerlink")
    page = looker.get(pages[0])
    assert page.status_code == 200
    assert b"<form" not in page.content.split(b"</h1>")[1]
    assert looker.post(pages[1]).status_code == 403
    pusher = staff(organization, "customers.view_customer", "connectors.push_customerlink")
    assert pusher.post(pages[1], {"connection": connection.pk}).status_code == 200
    stranger = staff(other_organization, "customers.view_customer", "connectors.push_customerlink")
    assert [stranger.get(pages[0]).status_code, stranger.post(pages[1]).status_code] == [404, 404]
    foreign = Connection.objects.create(organization=other_organization, provider="links", name="Foreign")
    for chosen in (foreign.pk, "x", "9" * 30):
        assert pusher.get(pages[0], {"connection": chosen}).status_code == 404
    assert wire.sent == []


def test_personal_data_is_hidden_from_those_who_may_not_see_it(
    system: Callable[..., Connection], customer: Customer, wire: Wire
) -> None:
    system("links")
    rights = ("customers.view_customer", "connectors.push_customerlink")
    page = staff(customer.organization, *rights).get(change(customer, "preview"))
    text = page.content.decode()
    for hidden in ("jane@example.com", "+493012345", "1 Main St", "Berlin"):
        assert hidden not in text
    assert "You need the right to see personal data to see the body." in text
    assert "j•••@example.com" in text
    allowed = staff(customer.organization, *rights, "customers.view_personal_data")
    assert "jane@example.com" in allowed.get(change(customer, "preview")).content.decode()


def test_a_press_without_a_token_reads_nothing(
    system: Callable[..., Connection], customer: Customer, wire: Wire, admin_user: User
) -> None:
    system("links")
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    assert client.post(change(customer, "read")).status_code == 403
    client = Client()
    client.force_login(admin_user)
    assert client.post(change(customer, "preview")).status_code == 405
    assert wire.sent == []


# What the page stands on


def test_a_rehearsal_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something went out")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("connectors.outbound.shared_client", refuse)
    made = rehearse(
        base_url="https://far.example.com/v1",
        headers={"Authorization": "Bearer x", "X-Account": "7"},
        do=lambda session: session.request("PATCH", "/customers/1", json={"name": "Ä"}),
    )
    assert made is not None
    assert (made.method, made.url, made.body) == ("PATCH", "https://far.example.com/v1/customers/1", {"name": "Ä"})
    assert made.headers["authorization"] == "***"
    assert made.headers["x-account"] == "7"
    assert rehearse(base_url="https://far.example.com", headers={}, do=lambda session: None) is None


@pytest.mark.parametrize("provider", NAMES)
def test_what_a_provider_says_it_needs_is_what_its_document_refuses(
    provider: str, system: Callable[..., Connection], organization: Organization
) -> None:
    """Every combination of the fields that any provider demands, filled and empty."""
    connection, api = system(provider), PROVIDERS[provider]
    assert set(api.required) <= api.fields
    for email in ("", "jane@example.com"):
        for city in ("", "Berlin"):
            for country in ("", "DE"):
                values = {"email": email, "shipping_address_city": city, "shipping_address_country": country}
                customer = new_customer(organization, **values)
                refused: list[tuple[str, str]] = []
                try:
                    api.document(customer, connection=connection, uid=uuid7(), fields=None)
                except Rejected as error:
                    refused = [(error.field, error.code)]
                assert bool(refused) == bool(api.missing(customer))
                assert set(refused) <= {(name, "required") for name in api.missing(customer)}


def test_the_words_cover_everything_that_can_happen() -> None:
    assert set(WORDS) == set(Will)
