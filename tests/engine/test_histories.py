"""Any order of edits, calls, lost answers, deaths and pulls ends with everybody knowing the same (R6).

A Hypothesis state machine drives the real engine against the fake provider, in one thread: what a worker does between
two looks at the network is one step, so that every interleaving of them can be tried. Each rule that the engine rests
on is switched off in turn, and the machine must then find a history that breaks a promise.

`HUB_FULL=1` runs 20,000 histories of 50 steps for each setting, `HUB_HISTORIES=1000x40` so many of so many.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from django.db import transaction
from django.db.models import F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from connectors.exceptions import OutcomeUnknown
from connectors.models import Conflict, Connection, CustomerLink, PushIntent
from connectors.outbound import Session
from connectors.sync import merge as merging
from connectors.sync import plan as planning
from connectors.sync import pull as pulling
from connectors.sync import push as pushing
from connectors.sync import receive as receiving
from connectors.sync import settle as settling
from connectors.sync.pull import pull
from connectors.sync.push import push
from connectors.sync.request import request
from connectors.sync.settle import settle
from connectors.sync.steps import Sending, Slice
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization
from tests.fake import in_process, register
from tests.fake.connector import CONNECTORS
from tests.fake.server import FakeProvider

STAFF = Actor(kind="user", name="Staff")
FIELDS = ("address_line1", "address_city")
# A call ends by its deadline; a request that was not answered may be applied until the provider's time is over.
DEADLINE, LIFE = timedelta(seconds=25), timedelta(seconds=120)
ROUNDS = 12
OFFERS: Mapping[str, Any] = {
    "lists": True,
    "fetches": True,
    "incremental": True,
    "shows_deleted": "flag",
    "deletes": True,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the two systems are like, and who edits. `off` names the rule that is switched off."""

    name: str
    offers: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ("same", "same")  # one for each system
    customers: int = 2
    direction: str = Connection.Direction.PUSH_AND_PULL
    people_there: bool = False
    creates: bool = False  # begin without links: creates are part of the history
    deletes: bool = False
    merges: bool = False
    off: str = ""


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


@dataclass
class Flying:
    """A call that has been planned by a worker. Dead: its worker will never keep the answer."""

    where: int
    sending: Sending
    token: str
    since: datetime
    begun: bool = False
    dead: bool = False


@dataclass
class Fetched:
    where: int
    records: Sequence[Any]
    at: datetime


class Histories(RuleBasedStateMachine):
    setting: Setting
    fake: FakeProvider
    clock: Clock
    names = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.undo = self.stack.enter_context(transaction.atomic())
        self.stack.callback(transaction.set_rollback, True)
        self.stack.enter_context(switched_off(self.setting.off))
        self.values = itertools.count()
        number = next(Histories.names)
        self.organization = Organization.objects.create(name="Demo", slug=f"demo-{number}")
        self.accounts = []
        self.connections: list[Connection] = []
        for where, format_ in enumerate(self.setting.formats):
            account = self.fake.account(
                f"a{number}-{where}", capabilities={**OFFERS, **self.setting.offers}, normaliser=format_
            )
            self.accounts.append(account)
            self.connections.append(
                Connection.objects.create(
                    organization=self.organization,
                    provider="fake" if format_ == "same" else f"fake_{format_}",
                    name=f"system {where}",
                    account=str(where),
                    direction=self.setting.direction,
                    delete_policy=Connection.DeletePolicy.RECREATE,
                    base_url=account.url,
                    options=account.options(),
                )
            )
        self.parts = [
            Slice(
                connection=connection,
                provider=next(one for one in CONNECTORS if one.slug == connection.provider),
                clock=self.clock,
                rng=Random(1),
                sleep=lambda seconds: None,
            )
            for connection in self.connections
        ]
        self.customers = editing.create(
            organization=self.organization,
            values=[
                {"name": f"Customer {n}", "address_line1": "x", "address_city": "x"}
                for n in range(self.setting.customers)
            ],
            actor=STAFF,
            at=self.clock(),
        )
        for connection in self.connections:
            request(connection=connection, actor=STAFF, now=self.clock())
            if not self.setting.creates:
                self.push(connection)
        self.flying: list[Flying] = []
        self.fetched: list[Fetched] = []
        self.staff: dict[tuple[int, str], str] = {}
        self.people: dict[tuple[int, int, str], str] = {}
        self.merged = False

    # What can happen

    @rule(who=st.integers(0, 1), name=st.sampled_from(FIELDS))
    def staff_edit(self, who: int, name: str) -> None:
        value = f"v{next(self.values)}"
        who %= len(self.customers)
        customer = self.customers[who]
        editing.update(
            organization=self.organization, values={customer.pk: {name: value}}, actor=STAFF, at=self.clock()
        )
        CustomerLink.objects.filter(connection__in=self.connections, next_attempt_at__isnull=False).update(
            next_attempt_at=self.clock()
        )
        if self.merged:
            who = 0
        self.staff[who, name] = value
        self.people = {key: v for key, v in self.people.items() if (key[1], key[2]) != (who, name)}

    @precondition(lambda self: self.setting.people_there)
    @rule(where=st.integers(0, 1), who=st.integers(0, 1), name=st.sampled_from(FIELDS))
    def edit_there(self, where: int, who: int, name: str) -> None:
        where, who = where % len(self.connections), who % len(self.customers)
        record = self.record(where, who)
        if record is None:
            return
        value = self.stored(where, f"r{next(self.values)}")
        self.accounts[where].edit(record, **{name: value})
        self.people[where, 0 if self.merged else who, name] = value

    @precondition(lambda self: self.setting.deletes)
    @rule(where=st.integers(0, 1), who=st.integers(0, 1))
    def delete_there(self, where: int, who: int) -> None:
        where, who = where % len(self.connections), who % len(self.customers)
        record = self.record(where, who)
        if record is not None:
            self.accounts[where].delete(record)

    @precondition(lambda self: self.setting.merges)
    @rule()
    def merge_or_unmerge(self) -> None:
        survivor, loser = self.customers
        if self.merged:
            editing.unmerge(organization=self.organization, loser=loser.pk, actor=STAFF, at=self.clock())
        else:
            editing.merge(
                organization=self.organization,
                survivor=survivor.pk,
                loser=loser.pk,
                values={},
                actor=STAFF,
                at=self.clock(),
            )
        self.merged = not self.merged
        # Whose edit a value was is no longer told from the field alone.
        self.staff.clear()
        self.people.clear()

    @rule(where=st.integers(0, 1))
    def begin(self, where: int) -> None:
        where %= len(self.connections)
        part = self.parts[where]
        token, sendings, settled = pushing.prepare(part, rows=10)
        settle(part, token=token, settled=settled)
        self.fly(where, token, sendings)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 9), kept=st.booleans())
    def deliver(self, which: int, kept: bool) -> None:
        one = self.flying.pop(which % len(self.flying))
        self.arrive(one, kept=kept)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 9))
    def lose(self, which: int) -> None:
        """The worker's time is up; the request may still arrive."""
        one = self.flying[which % len(self.flying)]
        if not one.dead:
            self.keep_lost(one)

    @precondition(lambda self: any(not one.dead for one in self.flying))
    @rule()
    def kill(self) -> None:
        for one in self.flying:
            one.dead = True

    @rule(seconds=st.sampled_from([1, 20, 40, 100, 200]), arrives=st.booleans())
    def wait(self, seconds: int, arrives: bool) -> None:
        for one in list(self.flying):
            if not one.dead and self.clock.now + timedelta(seconds=seconds) - one.since > DEADLINE:
                self.keep_lost(one)
            # A little early: between two waits, too, some time goes by.
            if self.clock.now + timedelta(seconds=seconds + 1) - one.since > DEADLINE + LIFE:
                self.flying.remove(one)
                if arrives:
                    self.arrive(one, kept=False)
        self.clock.now += timedelta(seconds=seconds)

    @rule(where=st.integers(0, 1))
    def fetch(self, where: int) -> None:
        where %= len(self.connections)
        part, at = self.parts[where], self.clock()
        page = part.provider.page(self.session(where), part.connection, cursor=None, since=None)
        self.fetched.append(Fetched(where, page.records, at))

    @precondition(lambda self: self.fetched)
    @rule(which=st.integers(0, 9))
    def apply(self, which: int) -> None:
        one = self.fetched.pop(which % len(self.fetched))
        part = self.parts[one.where]
        this = pulling.Reading(
            connection=part.connection,
            provider=part.provider,
            session=self.session(one.where),
            author=Actor(kind="connection", id=str(part.connection.pk), name=part.connection.name),
            clock=self.clock,
            sleep=lambda seconds: None,
            rng=Random(1),
            stop=lambda: False,
            dry_run=False,
        )
        dirty = self.dirty()
        with transaction.atomic():
            pulling.take_page(this, list(one.records), one.at, self.clock())
        for link in CustomerLink.objects.filter(pk__in=self.dirty() - dirty).select_related("customer"):
            new = [name for name in FIELDS if getattr(link.customer, name) != link.base_local.get(name)]
            assert new, f"what {link} said is to be sent back to it"

    # What must hold

    @invariant()
    def the_hub_does_not_step_back(self) -> None:
        if self.setting.people_there or self.setting.merges:
            return
        values = self.values_here()
        for (who, name), value in self.staff.items():
            now = values[self.customers[who].pk][name]
            assert now == value, f"the hub stepped back: {name} was {value} and is {now}"
        conflicts = Conflict.objects.filter(connection__in=self.connections)
        assert not conflicts.exists(), f"a conflict with ourselves: {conflicts.first()}"

    @invariant()
    def no_system_steps_back(self) -> None:
        if self.setting.people_there or self.setting.merges:
            return
        for where, account in enumerate(self.accounts):
            newest: dict[tuple[str, str], int] = {}
            for write in account.writes():
                for name in write["after"].keys() & set(FIELDS):
                    number = int(write["after"][name][1:] or -1)
                    key = (write["record"], name)
                    assert number >= newest.get(key, -1), f"system {where} stepped back: {name} is v{number} again"
                    newest[key] = number

    @invariant()
    def nobody_is_there_twice(self) -> None:
        if self.setting.off in ("", "frozen"):
            for where in range(len(self.accounts)):
                markers = [row["marker"] for row in self.accounts[where].records() if row["deleted"] is None]
                assert len(markers) == len(set(markers)), f"two records of one customer in system {where}"

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.stack.close()

    def end(self) -> None:
        while self.flying:  # the latest first: what was lost long ago arrives last
            self.arrive(self.flying.pop(), kept=True)
        self.clock.now += timedelta(seconds=400)
        for _ in range(ROUNDS):
            before = self.written()
            for where, connection in enumerate(self.connections):
                pull(
                    connection=connection,
                    provider=self.parts[where].provider,
                    session=self.session(where),
                    clock=self.clock,
                    sleep=lambda seconds: None,
                )
                self.look_at_suspects(connection)
                self.push(connection)
            self.clock.now += timedelta(seconds=400)
            if not self.dirty() and self.written() == before:
                break
        else:
            raise AssertionError("it never settles")
        self.everybody_knows_the_same()
        self.no_edit_was_lost()

    def look_at_suspects(self, connection: Connection) -> None:
        """A record on which workers died again and again waits for somebody, who asks for it once more."""
        suspects = CustomerLink.objects.filter(connection=connection, crashes__gte=settling.CRASHES)
        if parked := [*suspects.filter(next_attempt_at=None).values_list("customer", flat=True)]:
            request(connection=connection, actor=STAFF, customer_ids=parked, now=self.clock())

    def everybody_knows_the_same(self) -> None:
        for link in self.links():
            assert link.state == "open", f"parked: {link.state} {link.error}"
            if link.is_duplicate or link.customer.merged_into_id:
                continue
            where = self.connections.index(link.connection)
            [record] = [one for one in self.accounts[where].records() if one["id"] == link.remote_id]
            for name in FIELDS:
                mine, theirs = self.stored(where, getattr(link.customer, name)), record["fields"][name]
                assert mine == theirs, f"system {where} says {name} is {theirs}, the hub {mine}"

    def no_edit_was_lost(self) -> None:
        if self.setting.merges:
            return
        people = {(who, name) for _, who, name in self.people}
        values = self.values_here()
        for (who, name), value in self.staff.items():
            now = values[self.customers[who].pk][name]
            if (who, name) not in people:
                assert now == value, f"a staff edit was lost: {name} was {value} and is {now}"
        conflicts = Conflict.objects.filter(connection__in=self.connections)
        seen = {one.there for one in conflicts} | {one.here for one in conflicts}
        for changes in CustomerChange.objects.filter(organization=self.organization).values_list("changes", flat=True):
            seen |= {pair[1] for pair in changes.values() if isinstance(pair[1], str)}
        for (_, who, name), value in self.people.items():
            if self.setting.deletes:
                continue
            assert value in seen, f"an edit there was swallowed: {name} was {value} for {who}"

    # How it is done

    def session(self, where: int) -> Session:
        connection = self.connections[where]
        return self.parts[where].provider.session(connection, client=self.fake.client())

    def push(self, connection: Connection) -> None:
        where = self.connections.index(connection)
        push(
            connection=connection,
            provider=self.parts[where].provider,
            session=self.session(where),
            clock=self.clock,
            rng=Random(1),
            sleep=lambda seconds: None,
        )

    def fly(self, where: int, token: str, sendings: Sequence[Sending]) -> None:
        for one in sendings:
            one.ends = self.clock.now + DEADLINE
        self.flying += [Flying(where, one, token, self.clock.now) for one in sendings]

    def arrive(self, one: Flying, *, kept: bool) -> None:
        """The request reaches the system; with `kept`, the answer reaches the worker."""
        if one.dead and not one.sending.writes:
            return
        answer = one.sending.answer
        batch = pushing._Batch(sendings=[one.sending])
        pushing._call(self.parts[one.where], self.session(one.where), batch)
        if kept and not one.dead:
            self.fly(one.where, one.token, pushing._keep(self.parts[one.where], one.token, [one.sending]))
        elif not one.dead:
            one.sending.answer = answer
            self.keep_lost(one)

    def keep_lost(self, one: Flying) -> None:
        one.dead = True
        late = replace(one.sending, answer=OutcomeUnknown("No answer came."))
        follow = pushing._keep(self.parts[one.where], one.token, [late])
        self.fly(one.where, one.token, follow)

    def links(self) -> list[CustomerLink]:
        rows = CustomerLink.objects.filter(connection__in=self.connections).select_related("customer", "connection")
        return list(rows.order_by("pk"))

    def dirty(self) -> set[int]:
        dirty = CustomerLink.objects.filter(connection__in=self.connections, pushed_version__lt=F("needed_version"))
        return set(dirty.values_list("pk", flat=True))

    def values_here(self) -> dict[UUID, dict[str, str]]:
        rows = Customer.objects.filter(organization=self.organization).values("pk", *FIELDS)
        return {row.pop("pk"): row for row in rows}

    def record(self, where: int, who: int) -> str | None:
        link = CustomerLink.objects.filter(
            connection=self.connections[where], customer=self.customers[who], is_duplicate=False
        ).first()
        known = {one["id"] for one in self.accounts[where].records() if one["deleted"] is None}
        return link.remote_id if link is not None and link.remote_id in known else None

    def stored(self, where: int, value: str) -> str:
        return str(self.parts[where].provider.normalise("address_line1", value))

    def written(self) -> int:
        return sum(len(account.writes()) for account in self.accounts)


# The rules, each with a way to switch it off


@contextmanager
def switched_off(rule: str) -> Iterator[None]:
    """The engine without one of its rules."""
    accepted, plan, merge, take = settling._accepted, planning.plan, receiving.merge, receiving._take

    def version_now(link: CustomerLink, intent: PushIntent, record: Any, now: datetime) -> None:
        intent.version = Customer.objects.get(pk=link.customer_id).version
        accepted(link, intent, record, now)

    def one_base(link: CustomerLink, intent: PushIntent, record: Any, now: datetime) -> None:
        accepted(link, intent, record, now)
        link.base_remote = {**link.base_remote, **intent.sent_values}

    def many_in_flight(link: CustomerLink, lost: PushIntent | None, **known: Any) -> Any:
        if lost is not None and lost.kind == PushIntent.Kind.UPDATE:
            lost.outcome, lost = PushIntent.Outcome.FAILED, None
        return plan(link, lost, **known)

    def never_ours(**known: Any) -> merging.Merge:
        return merge(**{**known, "sent": ()})

    def echoing(link: CustomerLink, *rest: Any) -> None:
        take(link, *rest)
        link.pushed_version = min(link.pushed_version, link.needed_version - 1)
        link.next_attempt_at = rest[-1]

    everything: Callable[..., Any] = lambda link, customer, fields: {name: getattr(customer, name) for name in fields}  # noqa: E731 # as short as the rule it replaces
    patches: dict[str, list[tuple[Any, str, Any]]] = {
        "": [],
        "read_version": [(settling, "_accepted", version_now)],
        "two_bases": [(settling, "_accepted", one_base)],
        "stale_guard": [(receiving, "_is_stale", lambda *known: False)],
        "changed_fields": [(planning, "changed_values", everything)],
        "one_in_flight": [(pushing, "plan", many_in_flight), (settling, "plan", many_in_flight)],
        "own_intent": [(receiving, "merge", never_ours)],
        "echo": [(receiving, "_take", echoing)],
    }
    with ExitStack() as stack:
        for module, name, instead in patches[rule]:
            stack.enter_context(mock.patch.object(module, name, instead))
        yield


def run(setting: Setting, fake: FakeProvider, clock: Clock, *, histories: int, steps: int, seed: int = 0) -> None:
    machine = type("Machine", (Histories,), {"setting": setting, "fake": fake, "clock": clock})
    run_state_machine_as_test(  # type: ignore[no-untyped-call] # hypothesis leaves it untyped
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=not os.environ.get("HUB_HISTORIES"),
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate]
            if setting.off or os.environ.get("HUB_NOSHRINK")
            else [Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )


def size() -> tuple[int, int]:
    histories, _, steps = os.environ.get(
        "HUB_HISTORIES", "20000x50" if os.environ.get("HUB_FULL") else "36x30"
    ).partition("x")
    return int(histories), int(steps)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeProvider]:
    register()
    with in_process(clock=lambda: clock.now) as provider:
        yield provider


SETTINGS = [
    Setting(name="edits on both sides, conditional updates", offers={"conditional": True}, people_there=True),
    Setting(name="staff only, no conditions"),
    Setting(name="two formats, conditional updates", offers={"conditional": True}, formats=("upper", "lower")),
    Setting(name="two formats, no conditions", formats=("upper", "lower")),
    Setting(name="creates by upsert", offers={"upsert_external_id": True}, creates=True),
    Setting(name="creates by key", offers={"create_key": True, "look_up": "strong"}, creates=True),
    Setting(name="creates found by marker", offers={"look_up": "strong"}, creates=True),
    Setting(
        name="deletes there",
        offers={"conditional": True, "look_up": "strong"},
        deletes=True,
        people_there=True,
        creates=True,
    ),
    Setting(name="merges", offers={"conditional": True, "look_up": "strong"}, merges=True, creates=True),
]


@pytest.mark.django_db
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_history_converges(setting: Setting, fake: FakeProvider, clock: Clock) -> None:
    histories, steps = size()
    run(setting, fake, clock, histories=histories, steps=steps)


# One customer in one system: the history that breaks a promise is then not rare among all that there are.
BREAKS = {
    "read_version": Setting(name="", customers=1, formats=("same",), offers={"conditional": True}),
    "two_bases": Setting(name="", customers=1, formats=("upper",)),
    "stale_guard": Setting(name="", customers=1, formats=("same",), offers={"conditional": True}),
    "changed_fields": Setting(name="", customers=1, formats=("same",), people_there=True),
    "one_in_flight": Setting(name="", customers=1, formats=("same",), direction=Connection.Direction.PUSH),
    "own_intent": Setting(name="", customers=1, formats=("same",)),
    "echo": Setting(name="", customers=1, formats=("same",), offers={"conditional": True}),
}


@pytest.mark.django_db
@pytest.mark.parametrize("rule", BREAKS)
def test_without_the_rule_a_history_breaks_a_promise(rule: str, fake: FakeProvider, clock: Clock) -> None:
    with pytest.raises(AssertionError):
        run(replace(BREAKS[rule], off=rule), fake, clock, histories=3000, steps=45 if rule == "one_in_flight" else 30)
