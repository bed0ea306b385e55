"""U7: looking changes nothing and calls nobody; what has an effect is posted, with the page's own token."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth.models import User
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from customers.models import Organization
from tests.admin import pages, world
from tests.admin.pages import ACTIONS, PAGES
from tests.admin.world import World
from tests.connectors.test_admin import Far

NAMES = sorted(PAGES.keys() & pages.addresses())
# What a link from elsewhere might try on a page that takes it from the address.
TEMPTING = "confirmed=yes&post=yes&_push=1&_save=1&action=push_selected&select_across=1&index=0&reason=x&live=1&read=1"
WRITES = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|TRUNCATE|CREATE|ALTER|DROP)\b", re.IGNORECASE)


@pytest.fixture
def far(settings: Any) -> Iterator[Far]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    running = Far()
    yield running
    running.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that anything in this process connects to. (The drivers of the databases do not go this way.)"""
    made: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, to: Any) -> None:
        made.append(to)
        connect(self, to)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return made


@pytest.fixture
def here(organization: Organization, far: Far) -> World:
    return world.make(organization, url=far.url)


def test_looking_at_every_page_changes_nothing_and_calls_nobody(
    here: World, far: Far, admin_client: Client, calls: list[Any]
) -> None:
    looked = 0
    for name in NAMES:
        address = pages.address(name, here)
        variants = {address, pages.address(name, here, query=True)}
        variants |= {f"{address}?{TEMPTING}&connection={here.books.pk}&{ACTION_CHECKBOX_NAME}={here.customer.pk}"}
        for variant in variants:
            before = dict(world.rows())
            for method in (admin_client.get, admin_client.head):
                with CaptureQueriesContext(
                    database,
                ) as queries:
                    answered = method(variant)
                assert answered.status_code < 500, variant
                written = [q["sql"] for q in queries if WRITES.match(q["sql"]) and "django_session" not in q["sql"]]
                assert written == [], f"{variant} writes"
            assert dict(world.rows()) == before, f"{variant} changed something"
            looked += 1
        assert far.system.ledger == [], f"{name} called another system"
        assert calls == [], f"{name} called {calls}"
    assert looked >= 2 * len(NAMES)


def test_the_watch_sees_what_it_is_to_see(here: World, far: Far, admin_client: Client, calls: list[Any]) -> None:
    before = dict(world.rows())
    admin_client.post(reverse("admin:connectors_connection_test", args=[here.books.pk]))
    assert calls
    assert far.system.ledger
    admin_client.post(reverse("admin:customers_customer_archive", args=[here.customer.pk]))
    assert dict(world.rows()) != before


@pytest.mark.parametrize("name", NAMES)
def test_what_has_an_effect_refuses_to_be_read(name: str, here: World, admin_client: Client) -> None:
    page = PAGES[name]
    address = pages.address(name, here)
    if page.get is None:
        for method in (admin_client.get, admin_client.head, admin_client.put, admin_client.delete):
            assert method(address).status_code == 405, name


@pytest.mark.parametrize("name", NAMES)
def test_a_form_from_elsewhere_is_refused(name: str, here: World) -> None:
    """Without the token, and with a token of another session."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("alex"))
    page = PAGES[name]
    before = dict(world.rows())
    for data in (pages.data(page, here), {**pages.data(page, here), "csrfmiddlewaretoken": "a" * 64}):
        assert client.post(pages.address(name, here), data).status_code == 403, name
    assert dict(world.rows()) == before


@pytest.mark.parametrize(("model", "action"), sorted(ACTIONS))
def test_an_action_neither_follows_a_link_nor_a_form_from_elsewhere(model: str, action: str, here: World) -> None:
    page = ACTIONS[model, action]
    subject = here.objects[page.of]
    address = reverse(f"admin:{subject._meta.app_label}_{model}_changelist")
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("alex"))
    data = {"action": action, ACTION_CHECKBOX_NAME: str(subject.pk), "index": "0", **pages.data(page, here)}
    before = dict(world.rows())
    client.get(address, data)
    assert client.post(address, data).status_code == 403
    assert dict(world.rows()) == before
