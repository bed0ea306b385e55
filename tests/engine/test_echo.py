"""What the hub sent and reads again is no news, however a system formats it (R13).

Two systems, one of which stores everything in capitals and one in small letters, are pushed to and pulled from. Only
where two systems really overwrite each other's words does the hub give way, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db.models import Sum

from connectors.models import Conflict, Connection, Issue
from connectors.sync.fights import ROUNDS
from customers.models import Customer, CustomerChange
from tests.engine.bench import Hub, System, hub, say, size

PULLS = 10
OFFERS: dict[str, Any] = {"lists": True, "fetches": True, "incremental": True}
WAYS: dict[str, dict[str, Any]] = {
    "answers show what was stored": {"conditional": True},
    "without conditions": {},
    "answers show nothing": {"conditional": True, "echoes": False},
    "nothing is shown and nothing can be fetched": {"echoes": False, "fetches": False},
    "complete lists": {"conditional": True, "incremental": False, "shows_deleted": "scan"},
    "in batches": {"upsert_external_id": True, "batch": 100, "update_batch": 100, "echoes": False},
}
FORMATS: dict[str, Callable[[str], str]] = {"upper": str.upper, "lower": str.lower}


def both(here: Hub, **offers: Any) -> list[System]:
    return [
        here.system(name, offers={**OFFERS, **offers}, normaliser=name, direction=Connection.Direction.PUSH_AND_PULL)
        for name in FORMATS
    ]


def versions() -> int:
    return int(Customer.objects.aggregate(Sum("version"))["version__sum"])


def writes(systems: list[System]) -> int:
    """Writes that any system has applied, those that changed nothing there included."""
    return sum(len(system.judge.writes()) for system in systems)


@pytest.mark.django_db
@pytest.mark.parametrize("way", WAYS)
def test_pulling_what_was_pushed_makes_no_version_and_no_push(way: str) -> None:
    with hub() as here:
        number = size(100, 2500)
        customers = here.customers(
            [
                {
                    "name": f"Ann de Vries {n}",
                    "email": f"Ann.{n}@Example.com",
                    "phone": f"+31 6 {10_000_000 + n}",
                    "address_line1": f"Lange Voorhout {n}",
                    "address_city": "Den Haag",
                    "address_postal_code": "2514 ea",
                }
                for n in range(number)
            ]
        )
        systems = both(here, **WAYS[way])
        for system in systems:
            system.request()
            system.drain()
        here.edit(
            {
                one.pk: {"address_city": "'s-Hertogenbosch", "address_line1": f"Markt {one.pk.hex[-4:]}"}
                for one in customers
            }
        )
        for system in systems:
            system.drain()
            stored = system.judge.live()
            assert len(stored) == number
            assert {row["address_city"] for [row] in stored.values()} == {
                FORMATS[system.account.name]("'s-Hertogenbosch")
            }
        known, written = versions(), writes(systems)
        assert known == 2 * number
        assert written == 4 * number
        for again in range(PULLS):
            for system in systems:
                # Every other one from the beginning, as after a mistake.
                run = system.pull(since=here.clock.now.replace(year=2000) if again % 2 else None)
                assert run.error == ""
                assert run.created == run.refused == run.updated == 0
            for system in systems:
                assert system.push().total() == 0
        say(
            way=way,
            pushes=written,
            pulls=2 * PULLS,
            versions=versions() - known,
            pushes_caused=writes(systems) - written,
        )
        assert versions() == known
        assert writes(systems) == written
        assert not Conflict.objects.exists()
        assert not any(system.dirty.exists() or system.issues.exists() for system in systems)


@pytest.mark.django_db
def test_a_pull_that_finds_a_lost_push_makes_no_version() -> None:
    with hub() as here:
        number = size(100, 2500)
        customers = here.customers([{"name": f"Ann {n}", "address_city": "Den Haag"} for n in range(number)])
        systems = both(here, conditional=True, upsert_external_id=True)
        for system in systems:
            system.request()
            system.account.set(faults={"reset_after": 0.2}, fault_methods=["PUT", "PATCH"])
            system.push()
        here.edit({one.pk: {"address_city": "Gouda"} for one in customers})
        for system in systems:
            system.push()
        known = versions()
        for _ in range(3):
            for system in systems:
                system.pull()
        assert Customer.objects.count() == number
        assert versions() == known
        for system in systems:
            system.account.set(faults={})
            system.drain()
            system.pull()
        assert versions() == known
        assert not Conflict.objects.exists()
        for system in systems:
            assert not system.judge.duplicates()
            changed = [write for write in system.judge.writes() if write["kind"] == "update"]
            # Each value was brought there once; what was repeated changed nothing.
            assert len({write["record"] for write in changed}) == len(changed)


def rewritten(system: System) -> int:
    """People there, or a rule of theirs, bring each city into their own form. Returns how many they changed."""
    changed = 0
    for record in system.account.records():
        city = record["fields"]["address_city"]
        if city != FORMATS[system.account.name](city):
            system.account.edit(record["id"], address_city=FORMATS[system.account.name](city))
            changed += 1
    return changed


def by_systems(field: str) -> int:
    changes = CustomerChange.objects.filter(actor_kind=CustomerChange.Actor.CONNECTION).values_list(
        "changes", flat=True
    )
    return sum(field in change for change in changes)


def fighting(here: Hub) -> list[System]:
    """Two systems that store what they are sent, and where somebody then writes it in another way."""
    systems = [
        here.system(name, offers={**OFFERS, "conditional": True}, direction=Connection.Direction.PUSH_AND_PULL)
        for name in FORMATS
    ]
    [customer] = here.customers([{"name": "Ann", "address_city": "Den Haag"}])
    for system in systems:
        system.request()
        system.drain()
    here.edit({customer.pk: {"address_city": "Delft"}})
    return systems


def one_round(systems: list[System]) -> None:
    for system in systems:
        system.drain()
        rewritten(system)
        system.pull()


@pytest.mark.django_db
def test_two_systems_that_overwrite_each_other_are_stopped() -> None:
    with hub() as here:
        systems = fighting(here)
        rounds = 0
        while not Issue.objects.exists():
            one_round(systems)
            rounds += 1
            assert rounds < 20, "nobody noticed the fight"
        fought = by_systems("address_city")
        say(rounds=rounds, versions_before_it_was_stopped=fought)
        assert fought <= ROUNDS
        version, written = Customer.objects.get().version, writes(systems)
        for _ in range(5):
            one_round(systems)
        # At most the other side is brought to what the hub now says; then it is quiet.
        assert Customer.objects.get().version == version
        assert writes(systems) <= written + 2
        [issue] = Issue.objects.all()
        assert issue.kind == Issue.Kind.FIGHT
        assert issue.details["fields"] == ["address_city"]
        assert all(system.connection.name in issue.message for system in systems)
        [frozen] = [system for system in systems if "address_city" in system.links.get().conflicts]
        assert issue.connection == frozen.connection

        # Other fields of the customer go on.
        here.edit({Customer.objects.get().pk: {"address_line1": "Markt 1"}})
        for system in systems:
            system.drain()
            [record] = system.account.records()
            assert record["fields"]["address_line1"] == "Markt 1"


@pytest.mark.django_db
def test_a_frozen_field_stays_frozen_until_a_person_decides() -> None:
    with hub() as here:
        systems = fighting(here)
        while not Issue.objects.exists():
            one_round(systems)
        [frozen] = [system for system in systems if "address_city" in system.links.get().conflicts]
        [record] = frozen.account.records()
        here_says, before = Customer.objects.get().address_city, len(frozen.judge.writes(who="api"))
        frozen.account.edit(record["id"], address_city="Somewhere else")
        frozen.pull()
        frozen.drain()
        assert Customer.objects.get().address_city == here_says
        assert len(frozen.judge.writes(who="api")) == before, "the hub overwrote a field that waits for a person"
        waiting = frozen.links.get().conflicts
        assert waiting["address_city"]["there"] == "Somewhere else"
