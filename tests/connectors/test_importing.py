"""Rows that arrive many at a time come to what they come to one by one, whatever is among them; what says nothing new
is not written.
"""

import csv
import itertools
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.db import connection as database
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from connectors.models import Connection, CustomerLink
from connectors.sync import importing
from connectors.sync.importing import Import
from connectors.sync.receive import nothing_new
from customers import bulk, editing, tabular
from customers.editing import EDITABLE, Actor
from customers.ids import new_public_id, public_id
from customers.models import Customer, CustomerChange, Organization
from customers.tabular import Row

ACTOR = Actor(kind="command", name="import")
COLUMNS = ("id", "external_id", "name", "first_name", "email", "phone", "is_active", "custom.x")
NUMBERS = itertools.count()
# `id` is a letter for the customer that has this external id by then.
ROWS = st.fixed_dictionaries(
    {"name": st.sampled_from(["Ann", "Ben", " Zoë ", "Zoe\u0308", "", "a\\b\tc", "x" * 300, "nul\x01"])},
    optional={
        "external_id": st.sampled_from(["A", "B", "C", "D"]),
        "id": st.sampled_from(["A", "B", "unknown", "broken"]),
        "first_name": st.sampled_from(["Ann", "", "É"]),
        "email": st.sampled_from(["a@example.com", "A@example.com ", "nothing", "a•••@example.com"]),
        "phone": st.sampled_from(["030 123456", "'+49 30 123456", "•••"]),
        "is_active": st.sampled_from(["yes", "no", "maybe"]),
        "custom.x": st.sampled_from(["1", "json:1", "json:true", "json:[1,", ""]),
    },
)
STEPS = st.lists(
    st.lists(ROWS, min_size=1, max_size=6) | st.sampled_from(["edit A", "archive B", "delete C"]),
    min_size=1,
    max_size=5,
)


class Side:
    """One organization that takes the same steps in its own way."""

    def __init__(self, folder: Path, *, clear_empty: bool, at_once: bool) -> None:
        number = next(NUMBERS)
        self.path = folder / f"{number}.csv"
        self.organization = Organization.objects.create(name="O", slug=f"o-{number}", country="DE")
        self.shop = Connection.objects.create(
            organization=self.organization, provider="links", name="shop", direction=Connection.Direction.CALLS_US
        )
        self.work = Import(organization=self.organization, connection=self.shop, actor=ACTOR, clear_empty=clear_empty)
        self.at_once = at_once
        self.told: list[Any] = []

    def owner(self, letter: str) -> UUID | None:
        links = CustomerLink.objects.filter(connection=self.shop, remote_id=letter)
        return links.values_list("customer_id", flat=True).first()

    def rows(self, step: list[dict[str, str]]) -> list[Row]:
        with self.path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for row in step:
                lines.writerow([self.cell(name, row.get(name, "")) for name in COLUMNS])
        with tabular.open_table(self.path) as table:
            return list(table.rows)

    def cell(self, name: str, text: str) -> str:
        if name != "id" or text in ("", "broken"):
            return text
        found = self.owner(text)
        return public_id("cust", found) if found else new_public_id("cust")

    def take(self, step: Any) -> None:
        if isinstance(step, str):
            found = self.owner(step[-1])
            if step.startswith("edit") and found:
                editing.update(organization=self.organization, values={found: {"phone": "1"}}, actor=ACTOR)
            elif step.startswith("archive") and found:
                editing.archive(organization=self.organization, ids=[found], actor=ACTOR)
            elif step.startswith("delete"):
                CustomerLink.objects.filter(connection=self.shop, remote_id=step[-1]).update(
                    deleted_at=datetime(2026, 1, 1, tzinfo=UTC)
                )
            return
        rows = self.rows(step)
        parts = [rows] if self.at_once else [[row] for row in rows]
        totals: Counter[str] = Counter()
        problems = []
        for part in parts:
            counted, found = self.work.take(part)
            totals += counted
            problems += [(one.row, one.field, one.message.replace(self.organization.slug, "o")) for one in found]
        self.told.append((dict(totals), sorted(problems)))

    def state(self) -> dict[str, Any]:
        """All that is stored but for times and keys; customers without a link are alike only as a whole."""
        customers = Customer.objects.filter(organization=self.organization)
        links = {link.customer_id: link for link in CustomerLink.objects.filter(connection=self.shop)}
        columns = (*EDITABLE, "name_key", "email_key", "phone_key", "version")
        shown = []
        for customer in customers:
            link = links.get(customer.pk)
            changes = CustomerChange.objects.filter(customer=customer).order_by("version")
            # The moment of archiving is another one on each side.
            told = [
                (
                    version,
                    {name: pair != [None, None] if name == "archived_at" else pair for name, pair in moved.items()},
                    by,
                )
                for version, moved, by in changes.values_list("version", "changes", "actor_name")
            ]
            names = ("remote_id", "base_local", "base_remote", "pushed_version", "needed_version", "sync_seq", "state")
            shown.append(
                {
                    **{name: getattr(customer, name) for name in columns},
                    "archived": customer.archived_at is not None,
                    "changes": told,
                    "link": link and {name: getattr(link, name) for name in names} | {"gone": link.deleted_at},
                }
            )
        return {"told": self.told, "customers": sorted(shown, key=repr)}


def _only_whose(*, connection: Connection, said: Any) -> tuple[set[str], dict[str, UUID]]:
    return nothing_new(connection=connection, said=dict.fromkeys(said))


@pytest.mark.django_db
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, clear_empty=st.booleans())
@example(
    steps=[
        [{"name": "Ann", "external_id": "A"}],
        [{"name": "Ann", "external_id": "A", "phone": "1"}, {"name": "Ben", "id": "A"}],
    ],
    clear_empty=False,
)
@example(steps=[[{"name": "Ann", "external_id": "A", "custom.x": "json:1"}]] * 2, clear_empty=False)
@example(
    steps=[[{"name": "Ann", "external_id": "A", "custom.x": text}] for text in ("json:1", "json:true")],
    clear_empty=False,
)
@example(
    steps=[[{"name": "Ann", "external_id": "A"}], "edit A", [{"name": "Ann", "external_id": "A"}]], clear_empty=True
)
@example(steps=[[{"name": "Ann", "external_id": "B"}], "archive B"], clear_empty=False)
@example(
    steps=[[{"name": "Ann", "external_id": "C"}], "delete C", [{"name": "Ann", "external_id": "C"}]], clear_empty=True
)
def test_many_rows_come_to_what_they_come_to_one_by_one(tmp_path: Path, steps: list[Any], clear_empty: bool) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bulk, "COPY_FROM_ROWS", 2)
        many = Side(tmp_path, clear_empty=clear_empty, at_once=True)
        for step in steps:
            many.take(step)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importing, "nothing_new", _only_whose)
        single = Side(tmp_path, clear_empty=clear_empty, at_once=False)
        for step in steps:
            single.take(step)
    assert many.state() == single.state()


@pytest.mark.django_db
def test_rows_that_say_nothing_new_are_not_written_and_cost_one_query(tmp_path: Path) -> None:
    side = Side(tmp_path, clear_empty=False, at_once=True)
    rows = [{"name": f"Customer {n}", "external_id": f"{n}", "email": f"{n}@example.com"} for n in range(300)]
    side.take(rows)
    before = list(CustomerLink.objects.order_by("pk").values())
    table = side.rows(rows)
    with CaptureQueriesContext(database) as queries:
        totals, problems = side.work.take(table)
    assert (dict(totals), problems) == ({"unchanged": 300}, [])
    assert len(queries) == 1
    assert list(CustomerLink.objects.order_by("pk").values()) == before


@pytest.mark.django_db
def test_the_number_of_statements_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    counted = []
    for size in (2, 250):
        side = Side(tmp_path, clear_empty=False, at_once=True)
        rows = [{"name": f"Customer {n}", "external_id": f"{n}"} for n in range(size)]
        with CaptureQueriesContext(database) as queries:
            side.take(rows)
            side.take([row | {"phone": "1"} for row in rows])
        counted.append(len(queries))
    # COPY, which many rows take on PostgreSQL, is not among those that are captured.
    assert counted[1] <= counted[0]
