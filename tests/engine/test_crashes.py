"""A process may die at any point of its work, and nothing is lost, doubled or forgotten (R5).

Each point before and after a commit and a request is tried: see tests/engine/crash.py. What the provider's ledger says
decides. Normally every eighth point is tried, beginning with one that the seed draws; `HUB_FULL=1` tries all of them,
`HUB_SEED=7` repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.conf import settings as django_settings
from django.db import connection as database

from connectors.models import Connection
from connectors.sync.pull import pull
from connectors.sync.push import push
from customers import editing
from customers.editing import Actor
from customers.models import Organization
from tests.engine.crash import KILLED, OFFERS, SCENARIOS
from tests.fake import Running, in_process, register, running
from tests.fake.judge import Judge

FULL = bool(os.environ.get("HUB_FULL"))
SEED = int(os.environ.get("HUB_SEED") or random.SystemRandom().randrange(10_000))
EVERY = 1 if FULL else 8
FIELDS = ("name", "address_line1", "address_city")


def database_url() -> str:
    login = database.settings_dict
    if database.vendor != "postgresql":
        return f"sqlite:///{login['NAME']}"
    user = quote(login["USER"]) + (f":{quote(login['PASSWORD'])}" if login["PASSWORD"] else "")
    return f"postgres://{user}@{login['HOST']}:{login['PORT'] or 5432}/{login['NAME']}"


class Hubs:
    """Hubs that live until a point, each with an organization and an account of its own."""

    def __init__(self, fake: Running, folder: Path) -> None:
        self.fake = fake
        self.ledger = fake.rows()
        self.accounts = 0
        self.errors = folder / "hubs.log"
        environment = {
            **os.environ,
            "DATABASE_URL": database_url(),
            "DJANGO_SETTINGS_MODULE": "hub.settings",
            "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
            "PUSH_DEBOUNCE_SECONDS": "0",
            "LOG_LEVEL": "ERROR",
        }
        with self.errors.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.crash"],
                cwd=django_settings.BASE_DIR,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def run(self, scenario: str, kind: str, die_at: int | None) -> Life:
        """One life and what came after it."""
        self.accounts += 1
        job = {
            "scenario": scenario,
            "kind": kind,
            "die_at": die_at,
            "account": f"a{self.accounts}",
            "url": self.fake.url,
            "file": str(self.fake.file),
        }
        code, told = self._ask({**job, "do": "live"})
        assert code == (KILLED if die_at else 0), self.errors.read_text()
        code, after = self._ask({**job, "do": "go_on"})
        assert code == 0, self.errors.read_text()
        account = self.fake.account(str(job["account"]))
        self.fake.control(account.name, "flush")
        return Life(told, after, account.records(), Judge(self.ledger, account.name), kind)

    def _ask(self, job: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        return answer["code"], answer["told"]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class Life:
    """What a hub told before and after its death, and what the provider says of it."""

    def __init__(
        self,
        told: Sequence[dict[str, Any]],
        after: Sequence[dict[str, Any]],
        records: Sequence[dict[str, Any]],
        judge: Judge,
        kind: str,
    ) -> None:
        self.points = [one["name"] for one in told if "point" in one]
        self.told = [*told, *after[:-1]]
        self.hub = after[-1]
        self.kind = kind
        self.judge = judge
        self.records = {one["id"]: one for one in records}
        self.customers = {one["id"]: one for one in self.hub["customers"]}
        self.named = {one["name"]: one for one in self.hub["customers"]}

    def check(self) -> None:
        """Every promise that does not depend on the scenario."""
        self.nothing_is_there_twice()
        self.nothing_that_was_saved_is_lost()
        self.every_link_is_clean_or_parked()
        self.both_sides_say_the_same()
        assert self.judge.older_after_newer() == []
        assert self.judge.resurrected() == []
        for one in self.customers.values():
            assert one["versions"] == list(range(1, one["version"] + 1)), "versions without their one change"

    def nothing_is_there_twice(self) -> None:
        assert self.judge.duplicates() == {}
        live = [one for one in self.records.values() if one["deleted"] is None]
        names = Counter(one["fields"]["name"] for one in live)
        assert max(names.values()) == 1, names
        assert len(self.named) == len(self.customers), "a customer is in the hub twice"
        ours = {link["uid"] for link in self.hub["links"]}
        known = {link["remote_id"] for link in self.hub["links"]}
        for one in live:
            assert one["marker"] in ours or one["id"] in known, f"an orphan: {one}"

    def nothing_that_was_saved_is_lost(self) -> None:
        for told in self.told:
            if "saved" in told:
                customer = self.named[told["saved"]]
                if not customer["merged"] and customer["address_line1"].startswith("Street"):
                    assert number(customer) >= number(told), f"lost: {told} became {customer}"
            elif "archived" in told:
                assert self.named[told["archived"]]["archived"]
            elif "merged" in told and told["merged"] in self.named:
                assert self.named[told["merged"]]["merged"]

    def every_link_is_clean_or_parked(self) -> None:
        for link in self.hub["links"]:
            assert not link["held"], f"held by nobody: {link}"
            if link["state"] == "uncertain":
                # Nobody can tell whether it is there, and it was sent no second time.
                assert self.kind == "nothing", f"parked: {link}"
                assert link["lost_creates"] == 1
                sent = [one for one in self.judge.requests(method="POST") if one["marker"] == link["uid"]]
                assert len([one for one in sent if one["status"] != 401]) <= 1
            elif link["deleted"]:
                assert link["remote_id"] not in self.records or self.records[link["remote_id"]]["deleted"] is not None
            else:
                assert link["state"] == "open", f"parked: {link}"
                assert not link["dirty"], f"left behind: {link}"
                assert not link["lost_creates"], f"a lost create was forgotten: {link}"
        linked = {link["customer"] for link in self.hub["links"]}
        assert self.customers.keys() - linked <= {one["id"] for one in self.customers.values() if one["merged"]}

    def both_sides_say_the_same(self) -> None:
        for link in self.hub["links"]:
            customer = self.customers[link["customer"]]
            if link["duplicate"] or link["deleted"] or link["state"] == "uncertain":
                continue
            record = self.records[link["remote_id"]]
            assert record["deleted"] is None, f"linked to what is gone: {link}"
            if customer["archived"]:
                raise AssertionError(f"archived and still there: {link}")
            for name in FIELDS:
                assert record["fields"][name] == customer[name], f"{name}: {record['fields']} is not {customer}"


def number(values: dict[str, Any]) -> int:
    return int(values["address_line1"].split()[1])


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, django_db_setup: None, django_db_blocker: Any) -> Iterator[Hubs]:
    folder = tmp_path_factory.mktemp("crashes")
    with django_db_blocker.unblock(), running(folder) as fake:
        made = Hubs(fake, folder)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("kind", OFFERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_hub_that_dies_at_any_point_goes_on_as_if_it_had_not(scenario: str, kind: str, hubs: Hubs) -> None:
    begun = time.monotonic()
    sys.stdout.write(f"HUB_SEED={SEED}\n")
    whole = hubs.run(scenario, kind, None)
    whole.check()
    # It dies once without harm: the scenario does what its name says.
    passed = whole.points
    first = random.Random(f"{SEED} {scenario} {kind}").randrange(EVERY)
    tried = range(1 + first, len(passed) + 1, EVERY)
    for point in tried:
        life = hubs.run(scenario, kind, point)
        assert life.points == passed[:point], "the points come in another order than when they were counted"
        try:
            life.check()
            SPECIAL.get(scenario, lambda life, passed: None)(life, passed)
        except AssertionError as error:
            error.add_note(f"died at point {point} of {len(passed)}, {passed[point - 1]}")
            raise
    reached = f"{len(tried)} of {len(passed)} points"
    places = len(set(passed))
    taken = time.monotonic() - begun
    sys.stdout.write(f"R5 {scenario} {kind} {database.vendor}: {reached} in {places} places, {taken:.1f} s\n")


def pulled(life: Life, passed: Sequence[str]) -> None:
    """What people did there is here, and what was done on both sides is known as one conflict."""
    assert life.named["A"]["address_city"] == "Theirs A"
    for name in "NOP":
        assert name in life.named
    # B was edited there before; without an edit here that was saved, theirs is taken.
    saved = any(one.get("saved") == "B" and one["address_line1"] != "Street 2" for one in life.told)
    if saved:
        assert life.named["B"]["address_line1"].startswith("Street")
        assert life.hub["conflicts"] == 1
    [gone] = [link for link in life.hub["links"] if link["customer"] == life.named["C"]["id"]]
    assert gone["deleted"]


def logged_in(life: Life, passed: Sequence[str]) -> None:
    """A person has to log in again only where the answer to a refresh died with the process."""
    point = len(life.points)
    died_between = any("POST connectors/login.py" in one for one in passed[max(0, point - 2) : point])
    if any("reconnected" in one for one in life.told):
        assert died_between
    refreshes = life.judge.requests(path="/token", status=200)
    assert len(refreshes) <= 3


SPECIAL = {"pull": pulled, "login": logged_in}


@pytest.mark.django_db
def test_what_was_once_sent_is_not_ours_for_ever(organization: Organization) -> None:
    """The answer to an update is lost, and a pull finds what it did. Months later a person there enters the same value
    again: that is an edit, although nobody ever closed the intent.
    """
    provider = register()
    time_ = [datetime.now(UTC)]

    def clock() -> datetime:
        time_[0] += timedelta(milliseconds=1)
        return time_[0]

    with in_process(clock=lambda: time_[0]) as fake:
        account = fake.account("a", capabilities={"lists": True, "incremental": True})
        connection = Connection.objects.create(
            organization=organization,
            provider="fake",
            name="system",
            direction=Connection.Direction.PUSH_AND_PULL,
            create_policy=Connection.CreatePolicy.AUTOMATIC,
            base_url=account.url,
            options=account.options(),
        )
        session = provider.session(connection, client=fake.client())
        known: dict[str, Any] = {"connection": connection, "provider": provider, "session": session, "clock": clock}
        staff = Actor(kind="user", name="Staff")
        [customer] = editing.create(
            organization=organization, values=[{"name": "A", "address_city": "Old"}], actor=staff, at=clock()
        )

        def there(city: str) -> str:
            time_[0] += timedelta(hours=2)
            if city:
                account.edit(account.records()[0]["id"], address_city=city)
            pull(**known)
            customer.refresh_from_db()
            return str(customer.address_city)

        push(**known)
        editing.update(organization=organization, values={customer.pk: {"address_city": "Ours"}}, actor=staff)
        time_[0] += timedelta(minutes=1)
        account.script("reset_after", method="PATCH")
        push(**known)
        assert there("") == "Ours"
        assert there("Theirs") == "Theirs"
        assert there("Ours") == "Ours"
