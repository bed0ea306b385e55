"""Browsers that are kept for all tests of a worker, and a system on the far side of the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User

from connectors.guard import close_shared_client
from connectors.models import Connection
from connectors.worker import batch_slice, push_slice, queued_batches
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.browser import person as people
from tests.browser.person import MODES, Mode, Person
from tests.connectors.test_admin import Far


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not people.CHROMIUM or not people.DRIVER:
        for item in items:
            if "tests/browser/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=people.MISSING))


@pytest.fixture(scope="session", autouse=True)
def _browsers_end() -> Iterator[None]:
    yield
    people.quit_all()


@pytest.fixture(params=MODES, ids=str)
def mode(request: pytest.FixtureRequest) -> Mode:
    chosen: Mode = request.param
    return chosen


@pytest.fixture
def visitor(mode: Mode, live_server: Any) -> Iterator[Person]:
    """Somebody who has not logged in."""
    driver = people.browser(scripts=mode.scripts)
    driver.delete_all_cookies()
    yield Person(driver, mode=mode, url=live_server.url)
    driver.get("about:blank")  # nothing of this page asks the next test's server for anything
    close_shared_client()


@pytest.fixture
def alex(db: None) -> User:
    return User.objects.create_superuser("alex", password="secret")


@pytest.fixture
def person(visitor: Person, alex: User) -> Person:
    """Alex, who has logged in."""
    return visitor.logged_in(alex)


@pytest.fixture
def far(settings: Any) -> Iterator[Far]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    running = Far()
    yield running
    running.close()


@pytest.fixture
def books(transactional_db: None, connect: Callable[..., Connection], far: Far) -> Connection:
    """A system that the hub sends to and reads from."""
    return connect(
        "links",
        name="Books",
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url=far.url,
        credentials={"api_key": "remote-key"},
    )


@pytest.fixture
def acme(transactional_db: None, organization: Organization) -> Customer:
    return customer(organization, name="Acme Corporation", email="contact@acme.com")


def customer(organization: Organization, **values: Any) -> Customer:
    return editing.create(organization=organization, values=[values], actor=Actor(kind="command", name="test"))[0]


def work() -> None:
    """What a worker does when it is free."""
    for run in list(queued_batches()):
        batch_slice(run.pk)
    for connection in Connection.objects.filter(direction__in=Connection.PUSHING):
        push_slice(connection.pk)
