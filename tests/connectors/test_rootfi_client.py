"""RootFi's client, talking to the hub's own mirror of RootFi or to a server that misbehaves."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.models import ApiKey, Connection, CustomerLink
from connectors.provider import Outgoing, Record
from connectors.providers import PROVIDERS
from connectors.providers.rootfi.wire import FIELDS
from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.loopback import Loopback
from tests.connectors.test_rootfi import example

ROOTFI = PROVIDERS["rootfi"]
STAFF = Actor(kind="user", name="staff")
FULL = {
    "name": "John Doe",
    "email": "john@example.com",
    "phone": "1234567890",
    "currency": "EUR",
    "is_active": True,
    "address_line1": "123 Main Street",
    "address_line2": "Main Street",
    "address_city": "New York",
    "address_state": "New York",
    "address_postal_code": "123456",
    "address_country": "USA",
}


@pytest.fixture
def there(other_organization: Organization, connect: Callable[..., Connection]) -> Connection:
    """The account that the hub pushes to: another organization in the same hub."""
    return connect("rootfi", name="there", organization=other_organization)


@pytest.fixture
def here(organization: Organization, there: Connection, connect: Callable[..., Connection]) -> Connection:
    return connect(
        "rootfi",
        name="here",
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url="http://testserver/v3",
        credentials={"api_key": ApiKey.issue(organization=there.organization, name="hub")[1]},
    )


class Wire(Loopback):
    """The mirror, with a ledger of what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[Any] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            self.bodies.append(json.loads(request.read()))
        return super().handle_request(request)


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def session(here: Connection, wire: Wire) -> Any:
    return ROOTFI.session(here, client=httpx2.Client(transport=wire))


@pytest.fixture
def customer(organization: Organization) -> Callable[..., Customer]:
    def make(**values: Any) -> Customer:
        [made] = editing.create(organization=organization, values=[values], actor=STAFF)
        return made

    return make


def outgoing(customer: Customer, connection: Connection, **fields: Any) -> Outgoing:
    uid, named = fields.pop("uid", None) or uuid7(), fields.pop("named", None)
    document = ROOTFI.document(customer, connection=connection, uid=uid, fields=named)
    return Outgoing(**{"uid": uid, "remote_id": None, "key": uuid7(), "document": document, **fields})


def answering(here: Connection, *answers: Any) -> tuple[Any, list[Any]]:
    """A session with a server that gives these answers, and the ledger of bodies it was sent."""
    left, ledger = list(answers), []

    def answer(request: httpx2.Request) -> httpx2.Response:
        ledger.append(json.loads(request.content) if request.content else dict(request.url.params))
        given = left.pop(0)
        if isinstance(given, Exception):
            raise given
        status, body = given
        return httpx2.Response(status, json=body)

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    return ROOTFI.session(here, client=client), ledger


def values_of(customer: Customer) -> dict[str, Any]:
    return {name: getattr(customer, name) for name in FIELDS}


def refusal(message: str) -> tuple[int, Any]:
    return 400, {"error": {"code": "invalid-params", "message": message, "platform_error": ""}}


# What leaves equals what arrives


@pytest.mark.parametrize(
    "values",
    [
        FULL,
        {"name": "Ada"},
        {"name": "Ada", "is_active": False},
        {"name": "Zoë Ünal 王", "email": "not an address", "address_country": "Côte d’Ivoire"},
        {"name": "Ada", "address_city": "Bonn"},
        {name: "x" * editing.LENGTHS[name] for name in FIELDS if name in editing.LENGTHS},
    ],
)
def test_what_leaves_equals_what_arrives(
    here: Connection, there: Connection, session: Any, customer: Any, values: dict[str, Any]
) -> None:
    ours = customer(**values)
    record = ROOTFI.create(session, here, outgoing(ours, here))
    theirs = Customer.objects.get(organization=there.organization)
    assert values_of(theirs) == values_of(ours)
    assert record.remote_id == str(CustomerLink.objects.get(connection=there).pk)
    assert {name: record.values[name] for name in FIELDS} == values_of(ours)
    fetched = ROOTFI.fetch(session, here, record.remote_id)
    assert fetched.values == record.values
    assert not fetched.deleted


def test_the_document_is_the_documented_one(here: Connection, customer: Any) -> None:
    assert outgoing(customer(**FULL), here).document == {
        "name": "John Doe",
        "email": "john@example.com",
        "phone": "1234567890",
        "currency_id": "EUR",
        "status": "ACTIVE",
        "address": {
            "street": "123 Main Street",
            "locality": "Main Street",
            "city": "New York",
            "state": "New York",
            "pincode": "123456",
            "country": "USA",
        },
    }


def test_an_update_names_what_changed_and_the_name(here: Connection, customer: Any) -> None:
    sent = outgoing(customer(**FULL), here, named=frozenset({"email", "address_city"})).document
    assert set(sent) == {"name", "email", "address"}
    assert set(sent["address"]) == {"street", "locality", "city", "state", "pincode", "country"}


# Batches


def test_a_batch_goes_in_one_call_and_is_answered_by_position(
    here: Connection, there: Connection, session: Any, wire: Wire, customer: Any
) -> None:
    batch = [outgoing(customer(name=f"Customer {number}"), here) for number in range(100)]
    answers = ROOTFI.create_many(session, here, batch)
    assert len(wire.bodies) == 1
    assert wire.bodies[0]["company_id"] == 1089
    assert [answer.values["name"] for answer in answers] == [f"Customer {number}" for number in range(100)]
    assert len({answer.remote_id for answer in answers}) == 100


def test_a_refused_batch_names_no_record(
    here: Connection, there: Connection, session: Any, wire: Wire, customer: Any
) -> None:
    batch = [outgoing(customer(name=f"Customer {number}"), here) for number in range(4)]
    batch[2].document["status"] = "GONE"
    with pytest.raises(Rejected, match=r"data\[2\]\.status"):
        ROOTFI.create_many(session, here, batch)
    assert not Customer.objects.filter(organization=there.organization).exists()


def test_an_account_that_takes_one_at_a_time_is_sent_one_at_a_time(
    here: Connection, session: Any, wire: Wire, customer: Any
) -> None:
    here.options = {"one_at_a_time": True}
    assert ROOTFI.capabilities(here).batch == 1
    ROOTFI.create(session, here, outgoing(customer(name="Ada"), here))
    assert [len(body["data"]) for body in wire.bodies] == [1]


def test_another_number_of_records_than_sent_leaves_all_unknown(here: Connection, customer: Any) -> None:
    shown = {"rootfi_id": 1, "name": "Ada"}
    for body in ({"data": [shown], "sync_id": "x"}, {"data": [], "sync_id": "x"}, {}, [shown], {"data": None}):
        session, ledger = answering(here, (200, body))
        with pytest.raises(OutcomeUnknown):
            ROOTFI.create_many(session, here, [outgoing(customer(name="Ada"), here) for _ in range(2)])
        assert len(ledger) == 1


def test_a_record_that_cannot_be_read_is_created_all_the_same(here: Connection, customer: Any) -> None:
    session, _ = answering(
        here, (200, {"data": [{"rootfi_id": 1, "name": "x" * 999}, {"name": "Bob"}, {"rootfi_id": 3, "name": "Cyd"}]})
    )
    answers = ROOTFI.create_many(session, here, [outgoing(customer(name="Ada"), here) for _ in range(3)])
    assert (answers[0].remote_id, answers[0].values) == ("1", {})
    assert isinstance(answers[1], OutcomeUnknown)
    assert answers[2].remote_id == "3"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((429, {}), RetryLater),
        ((503, {}), OutcomeUnknown),
        ((401, {}), ConnectionUnusable),
        ((404, {}), ConnectionUnusable),
        ((500, {}), OutcomeUnknown),
        (httpx2.ConnectError("refused"), RetryLater),
    ],
)
def test_what_concerns_the_account_is_raised_for_the_whole_call(
    here: Connection, customer: Any, answer: Any, kind: type[Exception]
) -> None:
    session, ledger = answering(here, answer)
    with pytest.raises(kind):
        ROOTFI.create_many(session, here, [outgoing(customer(name="Ada"), here) for _ in range(4)])
    assert len(ledger) == 1


def test_a_refused_single_create_names_the_hubs_field(here: Connection, customer: Any) -> None:
    for message, field in (
        ("Invalid field: data[0].address.pincode. Use at most 32 characters.", "address_postal_code"),
        ("Missing required field: name.", "name"),
        ("Operation Denied: the platform is closed.", ""),
    ):
        session, _ = answering(here, refusal(message))
        with pytest.raises(Rejected) as raised:
            ROOTFI.create(session, here, outgoing(customer(name="Ada"), here))
        assert (raised.value.message, raised.value.field) == (message, field)


def test_a_company_unknown_there_stops_the_connection(here: Connection, session: Any, customer: Any) -> None:
    for account in ("7", "shop"):
        here.account = account
        with pytest.raises(ConnectionUnusable):
            ROOTFI.create(session, here, outgoing(customer(name="Ada"), here))


def test_the_key_travels_in_the_documented_header_and_is_never_printed(here: Connection) -> None:
    headers = ROOTFI.headers(account="1089", credentials={"api_key": "top-secret"})
    assert list(headers) == ["api_key"]
    assert headers["api_key"].reveal() == "top-secret"
    assert "top-secret" not in repr(headers)
    sent = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers)
        return httpx2.Response(200, json={"data": []})

    session = ROOTFI.session(here, client=httpx2.Client(transport=httpx2.MockTransport(answer)))
    assert ROOTFI.page(session, here, cursor=None, since=None).records == []
    assert sent[0]["api_key"].startswith("hub_")


# Changing


def test_without_the_option_an_update_is_refused_in_words(here: Connection, customer: Any) -> None:
    assert ROOTFI.capabilities(here).updates is False
    assert ROOTFI.capabilities(here).upsert_external_id is False
    session, ledger = answering(here)
    change = outgoing(customer(name="Ada"), here, remote_id="1", named=frozenset({"email"}))
    with pytest.raises(Rejected, match="update_by_platform_id") as raised:
        ROOTFI.update(session, here, change)
    assert raised.value.code == "unsupported"
    assert ledger == []


def test_with_the_option_a_create_repeats_safely_and_an_update_changes(
    here: Connection, there: Connection, session: Any, customer: Any, organization: Organization
) -> None:
    here.options = {"update_by_platform_id": True}
    assert ROOTFI.capabilities(here).updates
    assert ROOTFI.capabilities(here).upsert_external_id
    ours = customer(**FULL)
    sent = outgoing(ours, here)
    first = ROOTFI.create(session, here, sent)
    assert first.document["platform_id"] == f"{sent.uid.hex}_1"
    assert ROOTFI.create(session, here, sent).remote_id == first.remote_id

    named = {"email": "", "address_city": "Bonn", "is_active": False}
    editing.update(organization=organization, values={ours.pk: named}, actor=STAFF)
    ours.refresh_from_db()
    change = outgoing(ours, here, uid=sent.uid, remote_id=first.remote_id, named=frozenset(named))
    assert ROOTFI.update(session, here, change).values["address_city"] == "Bonn"
    theirs = Customer.objects.get(organization=there.organization)
    assert values_of(theirs) == values_of(ours)


def test_a_pulled_record_is_changed_by_the_platform_id_that_it_came_with(
    here: Connection, there: Connection, session: Any, customer: Any
) -> None:
    here.options = {"update_by_platform_id": True}
    ours = customer(name="Ada")
    here.options = {}
    created = ROOTFI.create(session, here, outgoing(ours, here))
    here.options = {"update_by_platform_id": True}
    ours.name = "Bea"
    change = outgoing(ours, here, remote_id=created.remote_id, remote_data=created.document, named=frozenset({"name"}))
    [answer] = ROOTFI.update_many(session, here, [change])
    assert answer.remote_id == created.remote_id
    assert Customer.objects.get(organization=there.organization).name == "Bea"


def test_an_update_that_made_another_record_is_not_taken_for_one(here: Connection, session: Any, customer: Any) -> None:
    here.options = {"update_by_platform_id": True}
    change = outgoing(customer(name="Ada"), here, remote_id="999999", named=frozenset({"name"}))
    with pytest.raises(Rejected, match="made a new record"):
        ROOTFI.update(session, here, change)


# Reading


def test_pages_are_read_to_the_end(here: Connection, there: Connection, session: Any, customer: Any) -> None:
    ROOTFI.create_many(session, here, [outgoing(customer(name=f"{number}"), here) for number in range(7)])
    seen, cursor = [], None
    while True:
        page = ROOTFI.page(session, here, cursor=cursor, since=None, limit=3)
        seen += [record.values["name"] for record in page.records]
        cursor = page.next
        if cursor is None:
            break
    assert seen == [f"{number}" for number in range(7)]


def test_a_page_since_a_time_holds_what_changed_and_what_is_gone(
    here: Connection, there: Connection, session: Any, customer: Any
) -> None:
    ROOTFI.create_many(session, here, [outgoing(customer(name=name), here) for name in ("Ada", "Bob", "Cyd")])
    later = CustomerLink.objects.latest("pk").updated_at + timedelta(hours=1)
    bob, cyd = (Customer.objects.get(organization=there.organization, name=name) for name in ("Bob", "Cyd"))
    editing.update(organization=there.organization, values={bob.pk: {"email": "b@x"}}, actor=STAFF, at=later)
    editing.archive(organization=there.organization, ids=[cyd.pk], actor=STAFF, at=later)
    page = ROOTFI.page(session, here, cursor=None, since=later)
    assert [(record.values["name"], record.deleted) for record in page.records] == [("Bob", False), ("Cyd", True)]
    assert page.next is None


def test_a_record_that_is_not_there_is_gone(here: Connection, there: Connection, session: Any, customer: Any) -> None:
    with pytest.raises(Gone):
        ROOTFI.fetch(session, here, "999999")
    record = ROOTFI.create(session, here, outgoing(customer(name="Ada"), here))
    theirs = Customer.objects.get(organization=there.organization)
    editing.archive(organization=there.organization, ids=[theirs.pk], actor=STAFF)
    with pytest.raises(Gone):
        ROOTFI.fetch(session, here, record.remote_id)


def test_a_server_that_ignores_the_filter_proves_nothing(here: Connection) -> None:
    session, _ = answering(here, (200, {"data": [{"rootfi_id": 5, "name": "Ada"}], "next": None}))
    with pytest.raises(RetryLater):
        ROOTFI.fetch(session, here, "6")


def test_the_documented_record_is_read(here: Connection) -> None:
    session, ledger = answering(here, (200, {**example("create.response"), "next": "abc"}))
    page = ROOTFI.page(session, here, cursor="xyz", since=None)
    assert ledger == [
        {"rootfi_company_id[eq]": "1089", "include_deleted_records": "true", "limit": "100", "next": "xyz"}
    ]
    [record] = page.records
    assert (record.remote_id, page.next, record.deleted) == ("157", "abc", False)
    assert record.values == {
        "name": "John Doe",
        "email": "",
        "phone": "1234567890",
        "currency": "1234567890",
        "is_active": True,
        "address_line1": "123 Main Street",
        "address_line2": "Main Street",
        "address_city": "New York",
        "address_state": "New York",
        "address_postal_code": "123456",
        "address_country": "USA",
    }
    assert record.created_at.isoformat() == "2024-01-22T05:07:31.465000+00:00"


def test_a_record_that_cannot_be_read_spares_its_neighbours(here: Connection) -> None:
    shown = [
        {"rootfi_id": 1, "name": None},
        {"rootfi_id": 2, "name": "Bob", "status": "ODD", "address": None},
        {"name": "Cyd"},
        "Dan",
    ]
    session, _ = answering(here, (200, {"data": shown}))
    records = ROOTFI.page(session, here, cursor=None, since=None).records
    assert [type(record) for record in records] == [Rejected, Record, Rejected, Rejected]
    assert records[1].values == {"name": "Bob", **dict.fromkeys(FIELDS & set(records[1].values) - {"name"}, "")}
    assert "is_active" not in records[1].values


@pytest.mark.parametrize("body", [None, [], {"data": 5}, {"data": [], "next": "same"}, {"data": [], "next": 5}])
def test_an_unusable_page_is_asked_for_again_later(here: Connection, body: Any) -> None:
    session, _ = answering(here, (200, body))
    with pytest.raises(RetryLater):
        ROOTFI.page(session, here, cursor="same", since=None)
