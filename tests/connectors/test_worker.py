"""The worker finds what is due in the database and needs nothing else to be told."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from connectors.guard import close_shared_client
from connectors.models import ApiKey, Connection, CustomerLink
from connectors.sync.request import request
from connectors.worker import Worker
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization

ACTOR = Actor(kind="user", name="Tester")


@pytest.fixture
def partner(
    transactional_db: None,
    other_organization: Organization,
    connect: Callable[..., Connection],
    live_server: object,
    settings: Any,
) -> Connection:
    """A connection that reaches another organization of the same hub over a real socket."""
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8", "::1/128"]
    key = ApiKey.issue(organization=other_organization, name="demo")[1]
    return connect(
        "links",
        name="partner",
        direction=Connection.Direction.PUSH,
        base_url=f"{live_server}/api/v1",
        credentials={"api_key": key},
    )


def work() -> None:
    try:
        Worker(threads=2).run(once=True)
    finally:
        close_shared_client()


@pytest.mark.django_db(transaction=True)
def test_what_is_due_is_sent_and_arrives(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    values = [{"name": f"Example {n}", "email": f"{n}@example.com"} for n in range(20)]
    customers = editing.create(organization=organization, values=values, actor=ACTOR)
    request(connection=partner, actor=ACTOR)
    work()
    arrived = Customer.objects.filter(organization=other_organization)
    assert sorted(arrived.values_list("email", flat=True)) == sorted(c.email for c in customers)
    assert not [link for link in CustomerLink.objects.all() if link.is_dirty]

    editing.update(organization=organization, values={customers[0].pk: {"phone": "+4930123456"}}, actor=ACTOR)
    CustomerLink.objects.update(next_attempt_at=timezone.now() - timedelta(seconds=1))
    work()
    assert arrived.get(email=customers[0].email).phone == "+4930123456"


@pytest.mark.django_db(transaction=True)
def test_a_paused_connection_sends_nothing(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    request(connection=partner, actor=ACTOR)
    Connection.objects.update(state=Connection.State.PAUSED)
    work()
    assert not Customer.objects.filter(organization=other_organization).exists()


@pytest.mark.django_db(transaction=True)
def test_new_customers_of_an_automatic_connection_need_no_request(
    partner: Connection, organization: Organization, other_organization: Organization
) -> None:
    Connection.objects.update(create_policy=Connection.CreatePolicy.AUTOMATIC)
    editing.create(organization=organization, values=[{"name": "A", "email": "a@example.com"}], actor=ACTOR)
    work()
    assert Customer.objects.get(organization=other_organization).email == "a@example.com"


@pytest.mark.django_db(transaction=True)
def test_a_worker_stops_when_told(transactional_db: None) -> None:
    worker = Worker(threads=1, idle=0.05)
    thread = threading.Thread(target=worker.run)
    thread.start()
    worker.stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
