"""Whatever comes back of a batch, every row of it ends right (R12).

Answers lose rows, stand in another order, do not come at all, or refuse the batch without naming the row.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from connectors.states import LinkState
from tests.engine.bench import FULL, Hub, System, hub, say, size

ROWS = 50
OFFERS: dict[str, dict[str, Any]] = {
    "upsert": {"upsert_external_id": True},
    "key": {"create_key": True},
}
FAULTS = {"missing_rows": 0.15, "shuffled_rows": 0.15, "reset_after": 0.1, "reset_before": 0.05, "500_after": 0.05}
BAD_IN = 4  # batches for each bad row


def small_batches(here: Hub, offers: dict[str, Any]) -> System:
    return here.system(offers={"batch": ROWS, "update_batch": ROWS, "look_up": "strong", **offers})


def everything_is_right(system: System, *, field: str) -> None:
    """Every good row is there once and says what the hub says; every bad one is parked with its own reason."""
    live = system.judge.live()
    assert "" not in live
    for link in system.links.select_related("customer"):
        if link.customer.name.startswith("BAD"):
            assert (link.state, link.next_attempt_at) == (LinkState.REJECTED, None)
            assert link.error in ("This name is not allowed.", "The batch was refused.")
            assert all(not row["name"].startswith("BAD") for row in live.get(str(link.uid), []))
            continue
        [row] = live[str(link.uid)]
        assert row["name"] == link.customer.name
        assert row[field] == getattr(link.customer, field)
        assert (link.state, link.is_dirty) == (LinkState.OPEN, False)
    assert not system.judge.older_after_newer()


@pytest.mark.django_db
@pytest.mark.parametrize("way", OFFERS)
def test_every_row_of_every_batch_ends_right(way: str) -> None:
    batches = size(30, 1000)
    with hub() as here:
        number = batches * ROWS // 2
        spread = ROWS * BAD_IN
        customers = here.customers(
            [{"name": f"{'BAD' if n % spread == 7 else 'Good'} {n}", "address_city": "Delft"} for n in range(number)]
        )
        system = small_batches(here, OFFERS[way])
        # A refusal that names no row strikes where there is a bad one, and only there.
        system.account.set(faults={**FAULTS, "unnamed_400": 0.5})
        system.request()
        system.drain()
        system.account.set(faults={})
        system.drain()
        everything_is_right(system, field="address_city")
        created = sum(request["path"].endswith("/batch") for request in system.judge.requests(method="POST"))

        system.account.set(faults={**FAULTS, "unnamed_400": 0.5})
        here.edit({one.pk: {"address_city": f"Gouda {n}"} for n, one in enumerate(customers)})
        system.drain()
        system.account.set(faults={})
        system.drain()
        everything_is_right(system, field="address_city")
        faults = system.judge.faults()
        for fault in (*FAULTS, "unnamed_400"):
            assert faults[fault], f"{fault} never struck"
        sent = sum(request["path"].endswith("batch") for request in system.judge.requests(method="POST"))
        say(way=way, rows=number, batches_of_creates=created, batches_of_updates=sent - created, faults=dict(faults))


@pytest.mark.django_db
@pytest.mark.parametrize("number", [2, 3, 50, 100])
def test_what_it_costs_to_find_the_row_that_nobody_names(number: int) -> None:
    """Half of a refused batch is sent, then half of the half in which the bad row must be, and at last the row alone:
    ⌈log₂ n⌉ + 1 calls between the one that was refused and the one that brings what had to wait.
    """
    deep = math.ceil(math.log2(number))
    finding, extra = [], []
    for place in range(number) if FULL else sorted({0, 1, number // 3, number // 2, number - 2, number - 1}):
        with hub(f"demo-{place}") as here:
            here.customers([{"name": f"{'BAD' if n == place else 'Good'} {n}"} for n in range(number)])
            system = here.system(offers={"upsert_external_id": True, "batch": number, "update_batch": number})
            system.account.set(faults={"unnamed_400": 1.0})
            system.request()
            system.drain()
            everything_is_right(system, field="name")
            statuses = [request["status"] for request in system.judge.requests()]
            assert statuses[0] == 400
            finding.append(max(n for n, status in enumerate(statuses) if status in (400, 422)))
            extra.append(len(statuses) - 1)
    say(rows=number, rule=deep + 1, calls_until_it_is_found=max(finding), calls_beside_the_first=max(extra))
    assert max(finding) <= deep + 1
    assert max(extra) <= deep + 2
