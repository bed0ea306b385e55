"""Links of customers that are merged and unmerged: whose they are, which leads, and what the engine makes of it."""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from connectors.providers import PROVIDERS
from connectors.states import LinkState
from connectors.sync.claim import due
from connectors.sync.push import push
from connectors.sync.request import request
from customers import editing
from customers.editing import EDITABLE, Actor, StaleVersion
from customers.ids import uuid7
from customers.models import Customer, Organization
from tests.connectors.fakes import FakeLinks
from tests.connectors.test_cheqpay import Caller

ACTOR = Actor(kind="user", name="Tester")
Connect = Callable[..., Connection]


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **amount: float) -> None:
        self.now += timedelta(**amount)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def system() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def books(connect: Connect) -> Connection:
    return pushing(connect, "books")


@pytest.fixture
def send(books: Connection, system: FakeLinks, clock: Clock) -> Callable[..., Counter[str]]:
    """Push what is due to the fake system."""
    links = PROVIDERS["links"]

    def go(**options: Any) -> Counter[str]:
        books.refresh_from_db()
        session = links.session(books, client=system.client())
        return push(connection=books, provider=links, session=session, clock=clock, **options)

    return go


def pushing(connect: Connect, name: str, **fields: Any) -> Connection:
    return connect(
        "links",
        name=name,
        account=name,
        direction=Connection.Direction.PUSH,
        base_url=f"https://{name}.example.com/api/v1",
        credentials={"api_key": "remote-key"},
        **fields,
    )


def make(organization: Organization, name: str, **values: Any) -> Customer:
    row = {"name": name, "email": f"{name.lower()}@example.com", "phone": "+1234567890", **values}
    return editing.create(organization=organization, values=[row], actor=ACTOR)[0]


def edit(customer: Customer, **values: Any) -> None:
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=ACTOR)


def merge(survivor: Customer, loser: Customer, expected: Any = None, **values: Any) -> None:
    editing.merge(
        organization=survivor.organization,
        survivor=survivor.pk,
        loser=loser.pk,
        values=values,
        actor=ACTOR,
        expected=expected,
    )


def unmerge(loser: Customer) -> None:
    editing.unmerge(organization=loser.organization, loser=loser.pk, actor=ACTOR)


# What a link may be when its customer is merged

NONE, GONE, WANTED, UNCERTAIN, CREATING, LINKED, DIRTY, UPDATING = (
    "no link",
    "remote-deleted",
    "never sent",
    "uncertain create",
    "create in flight",
    "linked",
    "linked and dirty",
    "update in flight",
)
KINDS = (NONE, GONE, WANTED, UNCERTAIN, CREATING, LINKED, DIRTY, UPDATING)
UNRESOLVED = (UNCERTAIN, CREATING)
# Who leads where both have a link: what knows more of the record there.
RANK = {GONE: 0, WANTED: 1, UNCERTAIN: 2, CREATING: 2, LINKED: 3, DIRTY: 3, UPDATING: 3}


def put(customer: Customer, connection: Connection, kind: str, *, leading: bool = True) -> CustomerLink | None:
    """A link of this kind, as the engine would have left it."""
    if kind == NONE:
        return None
    now = timezone.now()
    link = CustomerLink(
        uid=uuid7(),
        customer=customer,
        connection=connection,
        is_primary=leading,
        needed_version=customer.version,
        next_attempt_at=now,
        created_at=now,
        updated_at=now,
    )
    values = {"name": customer.name, "email": customer.email, "phone": customer.phone}
    if kind in (GONE, LINKED, DIRTY, UPDATING):
        link.remote_id = f"r-{link.uid}"
        link.base_local = link.base_remote = values
    if kind in (LINKED, GONE):
        link.pushed_version, link.next_attempt_at = customer.version, None
    if kind == GONE:
        link.deleted_at, link.state = now, LinkState.REMOTE_DELETED
    if kind == UNCERTAIN:
        link.state, link.next_attempt_at = LinkState.UNCERTAIN, None
    if kind in (CREATING, UPDATING):
        link.lease_token, link.lease_until = "held", now + timedelta(seconds=50)
    link.save()
    if kind in (*UNRESOLVED, UPDATING):
        PushIntent.objects.create(
            link=link,
            kind=PushIntent.Kind.UPDATE if kind == UPDATING else PushIntent.Kind.CREATE,
            outcome=PushIntent.Outcome.UNCERTAIN if kind == UNCERTAIN else PushIntent.Outcome.OPEN,
            payload=values,
            sent_values=values,
            version=customer.version,
            first_sent_at=now,
            sent_at=now,
        )
    return link


def roles(*customers: Customer) -> dict[Any, Any]:
    """Owner and role of every link of these customers."""
    names = ("uid", "customer", "original_customer", "connection", "remote_id", "is_primary", "is_duplicate", "epoch")
    rows = CustomerLink.objects.filter(customer__in=customers)
    return {row[0]: row[1:] for row in rows.values_list(*names)}


def contents(*customers: Customer) -> list[Any]:
    names = ("id", *EDITABLE, "name_key", "email_key", "phone_key", "archived_at", "merged_into", "created_at")
    return list(Customer.objects.filter(pk__in=[c.pk for c in customers]).order_by("pk").values_list(*names))


def check_merged(survivor: Customer, loser: Customer, kinds: dict[Customer, str], before: list[CustomerLink]) -> None:
    links = list(CustomerLink.objects.filter(customer__in=(survivor, loser)))
    assert {link.customer_id for link in links} <= {survivor.pk}, "every link is the survivor's"
    assert all(not link.lease_token and link.lease_until is None for link in links), "late answers are fenced"
    for connection_id in {link.connection_id for link in before}:
        leads = [link for link in links if link.connection_id == connection_id and not link.is_duplicate]
        assert len(leads) == 1, "one link of a connection leads"
    after = {link.uid: link for link in links}
    for old in before:
        if old.remote_id:
            assert CustomerLink.objects.filter(connection=old.connection, remote_id=old.remote_id).count() == 1
            new = after[old.uid]
            assert (new.remote_id, new.deleted_at, new.base_local, new.base_remote) == (
                old.remote_id,
                old.deleted_at,
                old.base_local,
                old.base_remote,
            ), "no record there is lost"
    ready = set(
        CustomerLink.objects.filter(due(now=timezone.now() + timedelta(seconds=5))).values_list("uid", flat=True)
    )
    for old in before:
        for intent in old.intents.all():  # an intent of a deleted link would be gone
            assert intent.outcome in (PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)
    mine, theirs = kinds[survivor], kinds[loser]
    found = {old.customer_id: after.get(old.uid) for old in before if old.connection.name == "books"}
    here, there = found.get(survivor.pk), found.get(loser.pk)
    if there is not None:
        assert there.original_customer_id == loser.pk
    if NONE in (mine, theirs):
        lead, other = here or there, None
    elif RANK[mine] >= RANK[theirs]:
        lead, other = here, there
        weaker = theirs
    else:
        lead, other = there, here
        weaker = mine
    if lead is not None:
        assert not lead.is_duplicate
        kind = mine if lead is here else theirs
        # The merge changes a field that nobody maps: the survivor's own link has nothing new to say, a moved one is
        # compared.
        waited = next(old.is_dirty and old.next_attempt_at is not None for old in before if old.uid == lead.uid)
        assert (lead.uid in ready) == (kind != GONE and (lead is there or waited))
        assert (lead.deleted_at is not None) == (kind == GONE)
        if lead is there and kind != GONE:
            assert (lead.pushed_version, lead.needed_version) == (0, survivor.version)
    [leading] = [link for link in links if link.is_primary]
    if mine == NONE:
        assert leading.original_customer_id is None, "the survivor's leading link goes on leading"
    else:
        assert lead is not None
        assert leading.uid == lead.uid, "or what took its place does"
    if NONE not in (mine, theirs):
        if weaker == WANTED:
            assert other is None, "a row that was never sent is not kept beside a better one"
        else:
            assert other is not None
            assert other.is_duplicate
            assert (other.uid in ready) == (weaker in UNRESOLVED), "a duplicate is only ever looked for"
            assert other.state == LinkState.UNCERTAIN or weaker not in UNRESOLVED
    for link in links:
        for intent in link.intents.all():
            assert intent.version == (0 if link.original_customer_id else 1), "an answer proves nothing of the survivor"


@pytest.mark.parametrize("mine", KINDS)
def test_the_merge_matrix(organization: Organization, connect: Connect, mine: str) -> None:
    books, shop = pushing(connect, "books"), pushing(connect, "shop")
    for theirs, turned, edited in product(KINDS, (False, True), ("nobody", "survivor", "loser")):
        combination = f"A {mine}, B {theirs}, {'B <- A' if turned else 'A <- B'}, edited before: {edited}"
        try:
            _one_combination(organization, books, shop, mine, theirs, turned, edited)
        except Exception as error:
            raise AssertionError(combination) from error


def _one_combination(
    organization: Organization, books: Connection, shop: Connection, mine: str, theirs: str, turned: bool, edited: str
) -> None:
    a = make(organization, "Anna", custom_fields={"a": [1, {"b": None}]}, notify_email=True)
    b = make(organization, "Bert", currency="EUR", address_country="Germany")
    kinds = {a: mine, b: theirs}
    for one in (a, b):
        put(one, books, kinds[one])
        put(one, shop, LINKED, leading=kinds[one] == NONE)
    survivor, loser = (b, a) if turned else (a, b)
    seen = {a.pk: 1, b.pk: 1}
    if edited != "nobody":
        edit({"survivor": survivor, "loser": loser}[edited], address_city="Berlin")
        with pytest.raises(StaleVersion):
            merge(survivor, loser, expected=seen, currency="USD")
    owned, stored = roles(a, b), contents(a, b)
    before = list(CustomerLink.objects.filter(customer__in=(a, b)).select_related("connection"))
    intents = PushIntent.objects.filter(link__in=before).count()
    merge(survivor, loser, currency="USD")
    survivor.refresh_from_db()
    check_merged(survivor, loser, kinds, before)
    assert PushIntent.objects.filter(link__customer=survivor).count() == intents
    assert editing.lock(organization=organization, ids=[loser.pk])[loser.pk] == survivor
    unmerge(loser)
    assert contents(a, b) == stored
    assert roles(a, b) == owned
    assert not CustomerLink.objects.filter(customer__in=(a, b)).exclude(lease_token="").exists()
    assert PushIntent.objects.filter(link__in=before).count() == intents
    live = CustomerLink.objects.filter(customer=loser, deleted_at=None, pushed_version=0).values_list("uid", flat=True)
    assert set(live) == {link.uid for link in before if link.customer_id == loser.pk and link.deleted_at is None}


# The rows of the table, in words


def lead(customer: Customer, connection: Connection) -> CustomerLink:
    return CustomerLink.objects.get(customer=customer, connection=connection, is_duplicate=False)


@pytest.fixture
def pair(organization: Organization) -> tuple[Customer, Customer]:
    return make(organization, "Anna"), make(organization, "Bert")


def test_only_the_loser_linked_its_link_leads_and_keeps_its_bases(
    books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    link = put(b, books, LINKED)
    merge(a, b)
    moved = CustomerLink.objects.get()
    assert link is not None
    assert (moved.pk, moved.customer, moved.original_customer, moved.is_duplicate) == (link.pk, a, b, False)
    assert (moved.is_primary, moved.remote_id, moved.base_local) == (True, link.remote_id, link.base_local)
    assert moved.is_dirty
    assert moved.next_attempt_at is not None


def test_a_run_that_waits_for_a_link_that_is_dropped_or_silenced_ends(
    books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    put(a, books, LINKED)
    run = request(connection=books, actor=ACTOR, customer_ids=[b.pk])
    merge(a, b)
    run.refresh_from_db()
    assert (run.state, run.planned, run.skipped) == (SyncRun.State.SUCCEEDED, 1, 1)
    assert CustomerLink.objects.count() == 1
    other = make(a.organization, "Carl")
    put(other, books, DIRTY)
    again = request(connection=books, actor=ACTOR, customer_ids=[other.pk])
    merge(a, other)
    again.refresh_from_db()
    assert (again.state, again.skipped) == (SyncRun.State.SUCCEEDED, 1)


def test_a_run_follows_a_link_that_moves_and_leads(
    books: Connection, pair: tuple[Customer, Customer], send: Callable[..., Counter[str]], clock: Clock
) -> None:
    a, b = pair
    run = request(connection=books, actor=ACTOR, customer_ids=[b.pk])
    merge(a, b)
    clock.pass_(seconds=5)
    assert send() == {"created": 1}
    run.refresh_from_db()
    assert (run.state, run.created) == (SyncRun.State.SUCCEEDED, 1)


def test_a_row_that_was_recreated_after_a_delete_keeps_guarding_its_old_id(
    books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    empty = put(a, books, WANTED)
    assert empty is not None
    CustomerLink.objects.filter(pk=empty.pk).update(former_remote_id="old")
    put(b, books, LINKED)
    owned = roles(a, b)
    merge(a, b)
    kept = CustomerLink.objects.get(pk=empty.pk)
    assert (kept.is_duplicate, kept.former_remote_id, kept.next_attempt_at) == (True, "old", None)
    unmerge(b)
    assert roles(a, b) == owned


def test_a_link_that_a_person_paused_stays_paused(books: Connection, pair: tuple[Customer, Customer]) -> None:
    a, b = pair
    link = put(b, books, LINKED)
    assert link is not None
    CustomerLink.objects.filter(pk=link.pk).update(state=LinkState.PAUSED)
    merge(a, b, phone="+49301")
    link.refresh_from_db()
    assert (link.state, link.next_attempt_at, link.is_dirty) == (LinkState.PAUSED, None, True)


def test_newer_content_of_a_moved_link_waits_for_its_hold(books: Connection, pair: tuple[Customer, Customer]) -> None:
    a, b = pair
    link = put(b, books, LINKED)
    hold = timezone.now() + timedelta(minutes=2)
    assert link is not None
    CustomerLink.objects.filter(pk=link.pk).update(hold_until=hold)
    for values in ({}, {"phone": "+49301"}):
        merge(a, b, **values)
        link.refresh_from_db()
        assert link.next_attempt_at == hold
        unmerge(b)
        link.refresh_from_db()
        assert link.next_attempt_at == hold


def test_a_connection_that_calls_us_has_nothing_to_send(connect: Connect, pair: tuple[Customer, Customer]) -> None:
    cheqpay = connect("cheqpay")
    a, b = pair
    put(b, cheqpay, LINKED)
    merge(a, b, phone="+49301")
    link = CustomerLink.objects.get()
    assert (link.customer, link.is_dirty, link.next_attempt_at, link.pushed_version) == (a, False, None, 2)


def test_merges_on_merges_give_each_its_own_links_back(
    organization: Organization, books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    c, d = make(organization, "Carl"), make(organization, "Dora")
    for one in (a, b, c, d):
        put(one, books, LINKED)
    start = roles(a, b, c, d)
    merge(b, c)
    middle = roles(a, b, c, d)
    merge(a, b)
    assert CustomerLink.objects.filter(customer=a, is_duplicate=True).count() == 2
    assert set(CustomerLink.objects.values_list("original_customer", flat=True)) == {None, b.pk, c.pk}
    merge(a, d)
    unmerge(d)
    unmerge(b)
    assert roles(a, b, c, d) == middle
    unmerge(c)
    assert roles(a, b, c, d) == start


def test_unmerging_out_of_turn_leaves_no_customer_without_its_link(
    organization: Organization, books: Connection, pair: tuple[Customer, Customer]
) -> None:
    """A had none: B's link leads, C's is a duplicate. When B leaves, C's leads, and goes with C in the end."""
    a, b = pair
    c = make(organization, "Carl")
    put(a, books, WANTED)
    put(b, books, LINKED)
    put(c, books, LINKED)
    start = roles(b, c)
    merge(a, b)
    merge(a, c)
    unmerge(b)
    assert lead(a, books).original_customer == c
    assert lead(b, books).original_customer is None
    unmerge(c)
    assert roles(b, c) == start


def test_what_a_person_made_lead_since_stays_where_it_stays(
    organization: Organization, books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    mine, theirs = put(a, books, LINKED), put(b, books, LINKED)
    assert mine is not None
    assert theirs is not None
    merge(a, b)
    CustomerLink.objects.filter(pk=mine.pk).update(is_duplicate=True)
    CustomerLink.objects.filter(pk=theirs.pk).update(is_duplicate=False)
    unmerge(b)
    assert lead(a, books).pk == mine.pk
    assert lead(b, books).pk == theirs.pk
    assert lead(a, books).is_dirty, "it missed what was sent to the other one"


def test_a_second_record_that_a_person_made_lead_since_goes_on_leading(
    organization: Organization, books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    first = put(a, books, LINKED)
    assert first is not None
    CustomerLink.objects.filter(pk=first.pk).update(is_duplicate=True, is_primary=False)
    second = put(a, books, LINKED)
    assert second is not None
    put(b, books, LINKED)
    merge(a, b)
    CustomerLink.objects.filter(pk=second.pk).update(is_duplicate=True)
    CustomerLink.objects.filter(pk=first.pk).update(is_duplicate=False)
    unmerge(b)
    assert lead(a, books).pk == first.pk


def test_a_create_that_was_resolved_meanwhile_goes_with_its_link(
    books: Connection, pair: tuple[Customer, Customer]
) -> None:
    a, b = pair
    put(a, books, LINKED)
    link = put(b, books, UNCERTAIN)
    merge(a, b)
    assert link is not None
    PushIntent.objects.update(outcome=PushIntent.Outcome.OK)
    CustomerLink.objects.filter(pk=link.pk).update(
        remote_id="found", state=LinkState.OPEN, pushed_version=0, next_attempt_at=None
    )
    unmerge(b)
    back = lead(b, books)
    assert (back.pk, back.remote_id, back.state, back.is_dirty) == (link.pk, "found", LinkState.OPEN, True)


def test_the_number_of_statements_does_not_grow_with_the_links(organization: Organization, connect: Connect) -> None:
    counts = []
    connections = [pushing(connect, f"system-{number}") for number in range(16)]
    kinds = [(LINKED, LINKED), (WANTED, LINKED), (NONE, DIRTY), (UNCERTAIN, LINKED)]
    for some in (connections[:4], connections):
        a, b = make(organization, "Anna"), make(organization, "Bert")
        for number, connection in enumerate(some):
            for customer, kind in zip((a, b), kinds[number % 4], strict=True):
                put(customer, connection, kind, leading=False)
        with CaptureQueriesContext(database) as merging:
            merge(a, b, phone="+49301")
        with CaptureQueriesContext(database) as unmerging:
            unmerge(b)
        counts.append((len(merging), len(unmerging)))
    assert counts[0] == counts[1]
    assert max(counts[0]) <= 25


# With the engine and with callers


def test_after_a_merge_only_real_differences_are_sent(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    a = make(organization, "Acme", email="acme@example.com")
    b = make(organization, "Acme", email="acme@example.com", phone="+4930555")
    request(connection=books, actor=ACTOR, customer_ids=[b.pk], now=clock())
    assert send() == {"created": 1}
    merge(a, b)
    clock.pass_(seconds=5)
    assert send() == {"updated": 1}
    assert [call[:2] for call in system.writes] == [
        ("POST", "/api/v1/unified/customer"),
        ("PUT", "/api/v1/unified/customer/cust_1"),
    ]
    assert system.records["cust_1"]["phone"] == "+1234567890"
    unmerge(b)
    clock.pass_(seconds=5)
    assert send() == {"updated": 1}
    assert system.records["cust_1"]["phone"] == "+4930555"
    merge(b, a)
    clock.pass_(seconds=5)
    assert send() == {}, "the survivor's own link has nothing new to say"
    assert not CustomerLink.objects.get().is_dirty


def test_a_duplicate_is_not_written_to(
    books: Connection, organization: Organization, system: FakeLinks, clock: Clock, send: Callable[..., Counter[str]]
) -> None:
    a, b = make(organization, "Anna"), make(organization, "Bert")
    request(connection=books, actor=ACTOR, now=clock())
    assert send() == {"created": 2}
    kept = dict(system.records[CustomerLink.objects.get(customer=b).remote_id or ""])
    merge(a, b, phone="+49301")
    edit(b, name="Renamed")
    clock.pass_(seconds=5)
    assert send() == {"updated": 1}
    assert system.records[kept["id"]] == kept
    unmerge(b)
    clock.pass_(seconds=5)
    send()
    assert not CustomerLink.objects.filter(is_duplicate=True).exists()
    assert system.records[kept["id"]] == kept
    assert len(system.records) == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("survives", ["the one in flight", "the other"])
def test_a_create_that_is_under_way_during_a_merge_ends_as_the_duplicate(
    transactional_db: None,
    books: Connection,
    organization: Organization,
    system: FakeLinks,
    clock: Clock,
    send: Callable[..., Counter[str]],
    survives: str,
) -> None:
    a, b = make(organization, "Anna"), make(organization, "Bert")
    request(connection=books, actor=ACTOR, customer_ids=[a.pk], now=clock())
    send()
    request(connection=books, actor=ACTOR, customer_ids=[b.pk], now=clock())
    survivor, loser = (a, b) if survives == "the other" else (b, a)

    def merge_meanwhile(_: Any) -> None:
        merge(survivor, loser)
        database.close()

    system.fail(merge_meanwhile, after=True)
    send(limit=1)
    for _ in range(4):
        clock.pass_(minutes=10)
        send()
    links = CustomerLink.objects.filter(customer=survivor)
    assert {(link.remote_id, link.is_duplicate) for link in links} == {("cust_1", False), ("cust_2", True)}
    assert len(system.records) == 2, "nothing was created twice"
    assert system.records["cust_1"]["name"] == survivor.name
    assert not PushIntent.objects.exclude(outcome=PushIntent.Outcome.OK).filter(kind="create").exists()
    unmerge(loser)
    assert lead(a, books).remote_id == "cust_1"
    assert lead(b, books).remote_id == "cust_2"
    clock.pass_(minutes=10)
    send()
    assert [system.records[id_]["name"] for id_ in ("cust_1", "cust_2")] == ["Anna", "Bert"]


def test_a_caller_reaches_the_survivor_by_both_ids(api_key: str, connect: Connect, organization: Organization) -> None:
    connect("cheqpay")
    caller = Caller(api_key)
    for id_, name in (("CUST-1", "Ada"), ("CUST-2", "Ida")):
        assert caller.send({"externalId": id_, "firstName": name}).status_code == 200
    ada, ida = Customer.objects.order_by("name")
    merge(ada, ida)
    answer = caller.send({"externalId": "CUST-2", "firstName": "Ada", "phoneNumber": "+4930555123"})
    assert answer.status_code == 200, answer.content
    ada.refresh_from_db()
    ida.refresh_from_db()
    assert (ada.phone, ida.phone, ida.merged_into) == ("+4930555123", "", ada)
    for id_ in ("CUST-1", "CUST-2"):
        shown = caller.get(id_).json()
        shown = shown.get("data", shown)
        assert (shown["externalId"], shown["firstName"], shown["phoneNumber"]) == (id_, "Ada", "+4930555123")
    assert Customer.objects.count() == 2
    assert CustomerLink.objects.filter(customer=ada).count() == 2
    unmerge(ida)
    assert caller.get("CUST-2").json().get("data", caller.get("CUST-2").json())["firstName"] == "Ida"


# What a change means for links


def test_a_provider_that_is_added_later_has_its_links_marked(
    connect: Connect, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        fields = frozenset({"currency"})

    monkeypatch.setitem(PROVIDERS, "other", Other())  # type: ignore[arg-type] # only its fields are asked for
    customer = make(organization, "Anna")
    link = put(customer, pushing(connect, "books"), LINKED)
    assert link is not None
    Connection.objects.update(provider="other")
    edit(customer, phone="+49301")
    link.refresh_from_db()
    assert not link.is_dirty
    edit(customer, currency="EUR")
    link.refresh_from_db()
    assert link.is_dirty


@pytest.mark.parametrize(
    ("policy", "kind", "becomes_due"),
    [
        ("delete", LINKED, True),
        ("delete", WANTED, False),
        ("delete", GONE, False),
        ("keep", LINKED, False),
    ],
)
def test_archiving_concerns_the_records_that_are_to_be_deleted(
    connect: Connect, organization: Organization, policy: str, kind: str, becomes_due: bool
) -> None:
    customer = make(organization, "Anna")
    link = put(customer, pushing(connect, "books", archive_policy=policy), kind)
    assert link is not None
    editing.archive(organization=organization, ids=[customer.pk], actor=ACTOR)
    link.refresh_from_db()
    assert link.needed_version == (2 if becomes_due else 1)
    ready = CustomerLink.objects.filter(due(now=timezone.now() + timedelta(seconds=5)), needed_version=2)
    assert ready.exists() == becomes_due


def test_new_content_releases_a_link_but_not_one_that_waits(books: Connection, organization: Organization) -> None:
    customer = make(organization, "Anna")
    link = put(customer, books, DIRTY)
    assert link is not None
    failing = {
        "attempts": 7,
        "failing_since": timezone.now(),
        "fingerprint": "abc",
        "crashes": 2,
        "next_attempt_at": timezone.now() + timedelta(hours=1),
    }
    names = ("state", *failing)

    def columns() -> tuple[Any, ...]:
        return CustomerLink.objects.values_list(*names).get()

    for number, state in enumerate((LinkState.UNCERTAIN, LinkState.CONFLICT, LinkState.PAUSED)):
        CustomerLink.objects.update(state=state, **failing)
        before = columns()
        edit(customer, phone=f"+4930{number}")
        assert columns() == before
        assert CustomerLink.objects.get().needed_version == number + 2
    for number, state in enumerate((LinkState.REJECTED, LinkState.RETRYING)):
        CustomerLink.objects.update(state=state, **failing)
        edit(customer, phone=f"+4940{number}")
        assert columns()[:-1] == (LinkState.OPEN, 0, None, "", 0)
        assert columns()[-1] <= timezone.now() + timedelta(seconds=5)


def test_new_content_never_goes_before_a_lost_request_is_dead(books: Connection, organization: Organization) -> None:
    customer = make(organization, "Anna")
    put(customer, books, LINKED)
    hold = timezone.now() + timedelta(minutes=2)
    CustomerLink.objects.update(hold_until=hold)
    edit(customer, phone="+49301")
    assert CustomerLink.objects.get().next_attempt_at == hold
    CustomerLink.objects.update(hold_until=timezone.now() - timedelta(minutes=2))
    edit(customer, phone="+49302")
    assert timezone.now() < (CustomerLink.objects.get().next_attempt_at or hold) < hold
