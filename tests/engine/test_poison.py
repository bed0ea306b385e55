"""Records that nothing can be done about cost little and hold up nobody (R11).

One record in twenty is refused for ever, one in a hundred makes the connector fail, and all travel in batches of 100.
"""

from __future__ import annotations

import logging
from collections import Counter
from random import Random

import pytest

from connectors.models import CustomerLink, Issue
from connectors.states import LinkState
from tests.engine.bench import SEED, System, hub, say, size

OFFERS = {"upsert_external_id": True, "batch": 100, "update_batch": 100}
CALLS_OF_ITS_OWN = 8


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each crash of the connector is logged with its traceback: they are meant here."""
    caplog.set_level(logging.CRITICAL, logger="connectors.sync.push")


def people(number: int) -> list[dict[str, str]]:
    """Exactly so many bad ones, in an order that the seed tells."""
    crashing, refused = number // 100, number // 20
    prefixes = ["CRASH"] * crashing + ["BAD"] * refused + ["Good"] * (number - crashing - refused)
    Random(SEED).shuffle(prefixes)
    return [{"name": f"{prefix} {n}", "address_city": "Utrecht"} for n, prefix in enumerate(prefixes)]


def alone(system: System) -> Counter[str]:
    """By marker, the calls in which only this record was sent."""
    rows = system.judge.rows(
        "SELECT marker, count(*) FROM (SELECT max(marker) AS marker FROM calls WHERE account = ?"
        " GROUP BY request HAVING count(*) = 1) GROUP BY marker",
        [system.account.name],
    )
    return Counter(dict(rows))


def kinds(system: System, links: list[CustomerLink]) -> dict[str, list[CustomerLink]]:
    found: dict[str, list[CustomerLink]] = {"Good": [], "BAD": [], "CRASH": []}
    for link in links:
        found[link.customer.name.split()[0]].append(link)
    return found


def judged(system: System) -> dict[str, list[CustomerLink]]:
    """What must hold after any storm with such records in it."""
    links = kinds(system, list(system.links.select_related("customer")))
    live = system.judge.live()
    for link in links["Good"]:
        [there] = live[str(link.uid)]
        assert there["name"] == link.customer.name
        assert there["address_city"] == link.customer.address_city
        assert not link.is_dirty
    for kind in ("BAD", "CRASH"):
        assert {(link.state, link.next_attempt_at) for link in links[kind]} == {(LinkState.REJECTED, None)}
    assert not any(str(link.uid) in live for link in links["BAD"])
    assert not system.judge.duplicates()
    own = alone(system)
    for kind in ("BAD", "CRASH"):
        assert max(own[str(link.uid)] for link in links[kind]) <= CALLS_OF_ITS_OWN
    return links


@pytest.mark.django_db
def test_every_good_row_arrives_and_a_bad_one_costs_little() -> None:
    with hub() as here:
        number = size(1000, 20_000)
        here.customers(people(number))
        system = here.system(offers=OFFERS)
        system.request()
        system.drain()
        links = judged(system)
        assert {kind: len(some) for kind, some in links.items()} == {
            "Good": number - number // 20 - number // 100,
            "BAD": number // 20,
            "CRASH": number // 100,
        }
        own = alone(system)
        say(
            rows=number,
            good_rows_pushed=f"{len(links['Good'])} of {len(links['Good'])}",
            calls=system.judge.request_count(),
            most_calls_of_its_own_refused=max(own[str(link.uid)] for link in links["BAD"]),
            most_calls_of_its_own_crashing=max(own[str(link.uid)] for link in links["CRASH"]),
            issues=[(issue.kind, issue.count) for issue in system.issues],
        )
        # All crashes are one cause.
        [issue] = system.issues.filter(kind=Issue.Kind.CONNECTOR)
        assert issue.count == len(links["CRASH"])


@pytest.mark.django_db
def test_records_that_turn_bad_later_cost_no_more_and_a_repaired_one_arrives() -> None:
    with hub() as here:
        number = size(600, 20_000)
        customers = here.customers([{"name": f"Good {n}", "address_city": "Utrecht"} for n in range(number)])
        system = here.system(offers=OFFERS)
        system.request()
        system.drain()
        before = alone(system)
        here.edit(
            {
                customer.pk: {**values, "address_city": "Delft"}
                for customer, values in zip(customers, people(number), strict=True)
            }
        )
        system.drain()
        links = kinds(system, list(system.links.select_related("customer")))
        live = system.judge.live()
        assert {live[str(link.uid)][0]["address_city"] for link in links["Good"]} == {"Delft"}
        own = alone(system) - before
        for kind in ("BAD", "CRASH"):
            assert {(link.state, link.next_attempt_at) for link in links[kind]} == {(LinkState.REJECTED, None)}
            assert max(own[str(link.uid)] for link in links[kind]) <= CALLS_OF_ITS_OWN
        assert {issue.kind: issue.count for issue in system.issues} == {
            Issue.Kind.CONNECTOR: len(links["CRASH"]),
            Issue.Kind.REJECTED: len(links["BAD"]),
        }
        say(
            rows=number,
            most_calls_of_its_own_refused=max(own[str(link.uid)] for link in links["BAD"]),
            most_calls_of_its_own_crashing=max(own[str(link.uid)] for link in links["CRASH"]),
        )

        bad = [link for kind in ("BAD", "CRASH") for link in links[kind]]
        here.edit({link.customer_id: {"name": f"Repaired {link.customer_id}"} for link in bad})
        system.drain()
        live = system.judge.live()
        assert {live[str(link.uid)][0]["name"] for link in bad} == {f"Repaired {link.customer_id}" for link in bad}
        assert not system.dirty.exists()
        assert not system.judge.duplicates()


@pytest.mark.django_db
def test_a_repaired_record_is_created() -> None:
    """Where the create itself made the connector fail, its answer is out: the frozen content is repeated until the
    connector can read what comes back, and what was repaired follows.
    """
    with hub() as here:
        number = size(200, 2000)
        here.customers(people(number))
        system = here.system(offers=OFFERS)
        system.request()
        system.drain()
        links = judged(system)

        def repair(some: list[CustomerLink]) -> None:
            here.edit({link.customer_id: {"name": f"Repaired {link.customer_id}"} for link in some})
            system.drain()

        def arrived(some: list[CustomerLink]) -> None:
            live = system.judge.live()
            for link in some:
                assert [row["name"] for row in live[str(link.uid)]] == [f"Repaired {link.customer_id}"]

        repair(links["BAD"])
        arrived(links["BAD"])
        repair(links["CRASH"])
        assert {link.pk for link in system.dirty} == {link.pk for link in links["CRASH"]}
        own = alone(system)
        assert max(own[str(link.uid)] for link in links["CRASH"]) <= CALLS_OF_ITS_OWN

        # The connector is repaired, as far as it can tell, and somebody asks again.
        system.wire.change = lambda body: body.replace(b'"created_at":"CRASH"', b'"created_at":null')
        system.request()
        system.drain()
        arrived(links["CRASH"])
        assert not system.dirty.exists()
        assert not system.judge.duplicates()


@pytest.mark.django_db
def test_refused_records_open_one_issue_per_cause() -> None:
    with hub() as here:
        here.customers(people(200))
        system = here.system(offers=OFFERS)
        system.request()
        system.drain()
        refused = system.links.filter(customer__name__startswith="BAD")
        assert len(set(refused.values_list("fingerprint", flat=True))) == 1
        assert [issue.count for issue in system.issues.exclude(kind=Issue.Kind.CONNECTOR)] == [refused.count()]
