"""What a list does not show is not believed to be deleted when it is too much of it (R14).

A changed filter at a provider, a lost permission and an interrupted list all look like deletes.
"""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from connectors.exceptions import ConnectionUnusable, ConnectorError
from connectors.models import Connection, CustomerLink, Issue
from connectors.states import LinkState
from connectors.sync.deletes import FEW, SHARE
from customers.models import Customer
from tests.engine.bench import Hub, System, hub, say, size

NUMBER = size(500, 50_000)
FEW_OF_THEM = 3
OFFERS: dict[str, Any] = {
    "upsert_external_id": True,
    "batch": 100,
    "update_batch": 100,
    "lists": True,
    "fetches": True,
}
Policy = Connection.DeletePolicy


def linked(here: Hub, *, shows_deleted: str = "scan", number: int = NUMBER, **fields: Any) -> System:
    """A system that has been pulled once, so that every link is known from a complete list."""
    here.customers([{"name": f"Ann {n}", "address_city": "Delft"} for n in range(number)])
    fields = {"direction": Connection.Direction.PUSH_AND_PULL, **fields}
    system = here.system(offers={**OFFERS, "shows_deleted": shows_deleted}, **fields)
    system.request()
    system.drain()
    system.pull()
    assert live(system) == number
    return system


def live(system: System) -> int:
    return system.links.filter(deleted_at=None, remote_id__isnull=False).count()


def untouched(system: System, number: int) -> None:
    assert live(system) == number
    assert set(system.links.values_list("state", flat=True)) == {LinkState.OPEN}
    assert not Customer.objects.exclude(archived_at=None).exists()
    assert not [write for write in system.judge.writes() if write["kind"] == "delete" and write["who"] == "api"]


def delete_there(system: System, number: int, *, first: int = 0) -> list[str]:
    ids = list(system.links.order_by("pk").values_list("remote_id", flat=True)[first : first + number])
    for remote_id in ids:
        assert remote_id
        system.account.delete(remote_id)
    return [remote_id or "" for remote_id in ids]


@pytest.mark.django_db
@pytest.mark.parametrize("policy", Policy.values)
def test_a_filter_that_hides_a_third_unlinks_nobody(policy: str) -> None:
    number = NUMBER if policy == Policy.UNLINK else min(NUMBER, 500)
    with hub() as here:
        system = linked(here, number=number, delete_policy=policy)
        calls = system.judge.request_count()
        hidden = system.account.hide(0.3)
        for repeated in range(1, 4):
            system.pull()
            untouched(system, number)
            [issue] = system.issues
            assert (issue.kind, issue.count, issue.resolved_at) == (Issue.Kind.MASS_DELETE, repeated, None)
            assert issue.details["deleted"] == hidden
            system.drain()
        assert {request["method"] for request in system.judge.requests()[calls:]} == {"GET"}
        say(policy=policy, links=number, hidden=hidden, unlinked=number - live(system), issues=system.issues.count())

        # The filter is put right: everybody is known, and nothing is sent.
        system.account.show()
        system.pull()
        untouched(system, number)
        assert system.push().total() == 0


@pytest.mark.django_db
@pytest.mark.parametrize("shows_deleted", ["scan", "flag"])
@pytest.mark.parametrize("policy", Policy.values)
def test_a_few_deletes_are_believed(policy: str, shows_deleted: str) -> None:
    with hub() as here:
        system = linked(here, number=500, delete_policy=policy, shows_deleted=shows_deleted)
        gone = delete_there(system, FEW_OF_THEM)
        written = len(system.judge.writes())
        system.pull()
        system.drain()
        system.pull()
        assert not system.issues.exists()
        assert live(system) == 500 - (0 if policy == Policy.RECREATE else FEW_OF_THEM)
        archived = Customer.objects.exclude(archived_at=None).count()
        assert archived == (FEW_OF_THEM if policy == Policy.ARCHIVE else 0)
        assert Customer.objects.count() == 500
        made = system.judge.writes()[written:]
        if policy == Policy.RECREATE:
            assert [write["kind"] for write in made] == ["create"] * FEW_OF_THEM
            assert set(system.links.exclude(former_remote_id="").values_list("former_remote_id", flat=True)) == set(
                gone
            )
            assert not system.judge.duplicates()
            assert system.judge.count() == 500
        else:
            assert made == []
            buried = system.links.exclude(deleted_at=None)
            assert {link.tombstone["remote_id"] for link in buried} == set(gone)
            assert {link.state for link in buried} == {LinkState.REMOTE_DELETED}
            # Nobody brings them back: not an edit, and not a push of everything.
            here.edit({link.customer_id: {"address_city": "Gouda"} for link in buried})
            system.request()
            system.drain()
            assert system.judge.count() == 500 - FEW_OF_THEM


@pytest.mark.django_db
@pytest.mark.parametrize("shows_deleted", ["scan", "flag"])
def test_many_deletes_are_not_believed_however_they_are_shown(shows_deleted: str) -> None:
    with hub() as here:
        system = linked(here, number=500, shows_deleted=shows_deleted)
        delete_there(system, 150)
        for repeated in (1, 2, 3):
            system.pull()
            untouched(system, 500)
            [issue] = system.issues
            assert (issue.kind, issue.count) == (Issue.Kind.MASS_DELETE, repeated)


@pytest.mark.django_db
def test_many_deletes_in_small_portions_are_stopped_as_well() -> None:
    """A filter that closes slowly: what was believed within a day counts."""
    with hub() as here:
        system = linked(here, number=500)
        most = max(FEW, SHARE * 500)
        for portion in range(10):
            delete_there(system, 10, first=10 * portion)
            system.pull()
        unlinked = 500 - live(system)
        say(deleted_there=100, unlinked=unlinked)
        assert 0 < unlinked <= most
        [issue] = system.issues
        assert issue.kind == Issue.Kind.MASS_DELETE


@pytest.mark.django_db
def test_a_list_that_was_not_read_to_its_end_says_nothing() -> None:
    with hub() as here:
        system = linked(here, number=500)
        gone = delete_there(system, FEW_OF_THEM)

        # Interrupted after two pages, and the rest fails.
        looked = iter([False, False, False, True, True, True, True, True])
        system.pull(stop=lambda: next(looked, True))
        assert system.connection.checkpoint.get("cursor")
        untouched(system, 500)
        system.account.script("503", method="GET", path="/customers")
        with pytest.raises(ConnectorError):
            system.pull()
        untouched(system, 500)
        assert not system.issues.exists()

        # Read to its end, it says who is gone, and only them.
        system.connection.refresh_from_db()
        here.clock.sleep(3600)
        system.pull()
        buried = system.links.exclude(deleted_at=None)
        assert {link.tombstone["remote_id"] for link in buried} == set(gone)


@pytest.mark.django_db
@pytest.mark.parametrize("without", ["id", "marker and id"])
def test_a_list_with_a_record_that_cannot_be_read_says_nothing(without: str) -> None:
    """Whose record it is cannot be told: it may be that of any link that the list seems to leave out."""
    with hub() as here:
        system = linked(here, number=500)
        unreadable = system.links.order_by("pk")[250]

        def garbled(body: bytes) -> bytes:
            document = orjson.loads(body) if body else {}
            for row in document.get("data", ()) if isinstance(document, dict) else ():
                if row["id"] == unreadable.remote_id:
                    row["id"] = None
                    if without != "id":
                        row["marker"] = None
            return orjson.dumps(document)

        system.wire.change = garbled
        run = system.pull()
        assert run.refused == 1
        untouched(system, 500)
        system.wire.change = lambda body: body
        system.pull()
        untouched(system, 500)


@pytest.mark.django_db
def test_a_record_that_moves_between_two_pages_is_asked_for_before_it_is_buried() -> None:
    with hub() as here:
        system = linked(here, number=500)
        [gone] = delete_there(system, 1, first=100)
        moved = set(system.links.order_by("pk").values_list("remote_id", flat=True)[200:203])

        def drifting(body: bytes) -> bytes:
            document = orjson.loads(body) if body else {}
            if isinstance(document.get("data"), list):
                document["data"] = [row for row in document["data"] if row["id"] not in moved]
            return orjson.dumps(document)

        system.wire.change = drifting
        calls = system.judge.request_count()
        system.pull()
        [buried] = system.links.exclude(deleted_at=None)
        assert buried.remote_id == gone
        asked = [request for request in system.judge.requests()[calls:] if any(i in request["path"] for i in moved)]
        assert len(asked) == len(moved)


@pytest.mark.django_db
def test_an_account_that_shows_nothing_any_more_has_deleted_nothing() -> None:
    """The login was narrowed: everything answers 404, the account itself as well."""
    with hub() as here:
        system = linked(here, number=500, direction=Connection.Direction.PUSH)
        here.edit({pk: {"address_city": "Gouda"} for pk in Customer.objects.values_list("pk", flat=True)})
        system.account.set(faults={"404_all": 1.0})
        with pytest.raises(ConnectionUnusable):
            system.push()
        untouched(system, 500)
        assert not system.links.filter(attempts__gt=0).exists()
        [issue] = system.issues
        assert issue.kind == Issue.Kind.LOGIN
        system.connection.refresh_from_db()
        assert system.connection.state == Connection.State.NEEDS_REAUTH
        assert system.push().total() == 0

        system.account.set(faults={})
        Connection.objects.update(state=Connection.State.ACTIVE)
        system.drain()
        assert not system.dirty.exists()
        assert {row["address_city"] for [row] in system.judge.live().values()} == {"Gouda"}


@pytest.mark.django_db
def test_records_that_answer_404_are_believed_up_to_what_is_plausible() -> None:
    """The account answers, its customers do not: a narrower permission looks like that."""
    with hub() as here:
        customers = here.customers([{"name": f"Ann {n}", "address_city": "Delft"} for n in range(500)])
        system = here.system(offers={"look_up": "strong"})
        system.request()
        system.drain()
        system.account.script("404_all", times=10_000, method="PATCH")
        here.edit({one.pk: {"address_city": "Gouda"} for one in customers})
        system.push()
        buried = CustomerLink.objects.exclude(deleted_at=None).count()
        say(answered_404=500, unlinked=buried)
        assert buried <= max(FEW, SHARE * 500)
        [issue] = system.issues
        assert issue.kind == Issue.Kind.MASS_DELETE
        system.connection.refresh_from_db()
        assert system.connection.state == Connection.State.PAUSED
