"""Customers from a file, out in all four formats over real sockets, and back: nothing lost, nothing twice.

`HUB_ROUND_TRIP=10000 pytest tests/test_round_trip.py -s` runs it in the size that the design names.
"""

import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from connectors.models import ApiKey, Connection, CustomerLink, SyncRun
from connectors.providers import PROVIDERS
from connectors.sync.pull import pull
from connectors.sync.push import push
from connectors.sync.request import request
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization

SIZE = int(os.environ.get("HUB_ROUND_TRIP", "60"))
ACTOR = Actor(kind="command", name="test")
PATHS = {"links": "/api/v1", "commenda": "/api/v1", "cheqpay": "", "rootfi": "/v3"}
ACCOUNTS = {"links": "", "commenda": "corp_partner", "cheqpay": "M-2002", "rootfi": "2089"}
OPTIONS = {"commenda": {"upsert_by_external_id": True}, "rootfi": {"update_by_platform_id": True}}


def write_file(path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                *("external_id", "name", "email", "phone", "address_line1", "address_city", "address_country"),
                *("shipping_address_line1", "shipping_address_city", "shipping_address_country"),
            ]
        )
        for n in range(SIZE):
            rows.writerow(
                [
                    *(f"X-{n}", f"Example Company {n}", f"{n}@example.com", f"+4930{n:06}"),
                    *(f"{n} Main St", "Berlin", "DE", f"{n} Side St", "Paris", "FR"),
                ]
            )


@pytest.mark.django_db(transaction=True)
def test_import_push_in_four_formats_and_pull_back(
    organization: Organization,
    other_organization: Organization,
    connect: Callable[..., Connection],
    server: str,
    settings: Any,
    tmp_path: Path,
) -> None:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    key = ApiKey.issue(organization=other_organization, name="demo")[1]
    write_file(tmp_path / "customers.csv")

    def timed(what: str, do: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = do()
        sys.stdout.write(f"{what}: {SIZE} in {time.monotonic() - began:.1f} s\n")
        return result

    for _ in range(2):
        timed("import", lambda: call_command("import_customers", str(tmp_path / "customers.csv"), organization="demo"))
    ours = Customer.objects.filter(organization=organization)
    theirs = Customer.objects.filter(organization=other_organization)
    assert ours.count() == SIZE
    assert CustomerChange.objects.count() == SIZE, "the second import changed nothing"

    connections: dict[str, Connection] = {}
    for slug, provider in PROVIDERS.items():
        account = ACCOUNTS[slug]
        if account:
            connect(slug, organization=other_organization, name=f"{slug} in", account=account)
        connections[slug] = connect(
            slug,
            name=f"{slug} out",
            account=account,
            direction=Connection.Direction.PUSH_AND_PULL,
            base_url=f"{server}{PATHS[slug]}",
            options=OPTIONS.get(slug, {}),
            credentials={"api_key": key},
        )
        chosen = connections[slug]
        run = request(connection=chosen, actor=ACTOR)
        session = provider.session(chosen)
        timed(f"push {slug}", lambda c=chosen, p=provider, s=session: push(connection=c, provider=p, session=s))
        run.refresh_from_db()
        assert (run.state, run.planned, run.created) == (SyncRun.State.SUCCEEDED, SIZE, SIZE), run.problems
        assert push(connection=chosen, provider=provider, session=session) == {}

    assert theirs.count() == 4 * SIZE
    emails = set(ours.values_list("email", flat=True))
    for slug, chosen in connections.items():
        links = CustomerLink.objects.filter(connection=chosen)
        assert links.values("remote_id").distinct().count() == links.exclude(remote_id=None).count() == SIZE
        if slug != "links":
            there = theirs.filter(links__connection__provider=slug)
            assert there.count() == SIZE
            assert set(there.values_list("email", flat=True)) == emails

    before = {c.pk: c.version for c in ours}
    for slug in ("commenda", "rootfi"):  # Links' list shows every customer there is; Cheqpay documents none
        chosen, provider = connections[slug], PROVIDERS[slug]
        session = provider.session(chosen)
        run = timed(f"pull {slug}", lambda c=chosen, p=provider, s=session: pull(connection=c, provider=p, session=s))
        assert (run.state, run.planned, run.unchanged) == (SyncRun.State.SUCCEEDED, SIZE, SIZE), run.problems
    assert {c.pk: c.version for c in ours.all()} == before
    waiting = CustomerLink.objects.filter(connection__organization=organization, next_attempt_at__isnull=False)
    assert not waiting.exists()
