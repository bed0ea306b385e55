"""R21: every address and action of the admin, for everybody: as `pages.PAGES` and `pages.ACTIONS` say, no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth.models import Permission, User
from django.db import transaction
from django.test import Client
from django.urls import reverse

from customers.models import Customer, Organization
from tests.admin import pages, world
from tests.admin.pages import ACTIONS, EVERYBODY, NOBODY, PAGES, SUPERUSERS, Page, allowed
from tests.admin.world import World

APPS = ("customers", "connectors", "auth")
NAMES = sorted(pages.addresses() | PAGES.keys())
ACTED = sorted(pages.actions() | ACTIONS.keys())


class Person:
    """Somebody on staff whose rights can be changed between two requests."""

    def __init__(self, organization: Organization | None, name: str = "clerk") -> None:
        self.user = User.objects.create(username=name, is_staff=True)
        if organization:
            organization.members.add(self.user)
        self.client = Client()
        self.client.force_login(self.user)

    def with_rights(self, rights: frozenset[str], *, superuser: bool = False) -> Client:
        self.user.user_permissions.set([PERMISSIONS[right] for right in rights])
        if self.user.is_superuser != superuser:
            User.objects.filter(pk=self.user.pk).update(is_superuser=superuser)
            self.user.is_superuser = superuser
        return self.client


PERMISSIONS: dict[str, int] = {}


@pytest.fixture
def here(organization: Organization, settings: Any) -> World:
    settings.ALLOWED_PRIVATE_NETWORKS = []  # whatever is posted, nothing is reached
    rows = Permission.objects.filter(content_type__app_label__in=APPS).select_related("content_type")
    PERMISSIONS.clear()
    PERMISSIONS.update({f"{row.content_type.app_label}.{row.codename}": row.pk for row in rows})
    return world.make(organization, url="http://127.0.0.1:9")


def roles() -> Iterator[tuple[str, frozenset[str], bool]]:
    """Name, rights, superuser: no right, each single one, all that only show, all, and a superuser."""
    every = frozenset(PERMISSIONS)
    yield "staff without rights", frozenset(), False
    for right in sorted(every):
        yield f"only {right}", frozenset({right}), False
    yield "view-only", frozenset(right for right in every if ".view_" in right), False
    yield "every right", every, False
    yield "superuser", frozenset(), True


@contextmanager
def undone() -> Iterator[None]:
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


def row(name: str) -> Page:
    if name not in PAGES:
        pytest.fail(
            f"/admin/ has the address {name!r} but tests/admin/pages.py does not say who may use it. Add a row to "
            "PAGES: Page(get=…, post=…, of=…); for a button Page(post=…, of=…)."
        )
    if name not in pages.addresses():
        pytest.fail(f"{name!r} is in PAGES of tests/admin/pages.py, but the admin has no such address any more.")
    return PAGES[name]


def judge(page: Page, role: str, method: str, answered: Any, *, may: bool, statuses: tuple[int, ...]) -> str:
    """What is wrong with the answer, or nothing."""
    expected = statuses if may else (page.refused,)
    if answered.status_code in expected:
        return ""
    place = answered.get("Location", "")
    return f"{role}: {method} answered {answered.status_code} {place} instead of {expected}"


@pytest.mark.parametrize("name", NAMES)
def test_every_address_answers_each_role_as_the_list_says(name: str, here: World) -> None:
    page = row(name)
    address = pages.address(name, here)
    person = Person(here.organization)
    wrong = []
    for role, rights, superuser in roles():
        client = person.with_rights(rights, superuser=superuser)
        with undone():
            got = client.get(address)
        if page.get is None:
            if got.status_code != 405:
                wrong.append(f"{role}: GET {name} answered {got.status_code}: a side effect must refuse it with 405")
        else:
            may = allowed(page.get, rights=rights, superuser=superuser)
            wrong.append(judge(page, role, "GET", got, may=may, statuses=(page.status,)))
        if page.post is not None and name != "logout":
            may = allowed(page.post, rights=rights, superuser=superuser)
            with undone():
                posted = client.post(address, pages.data(page, here))
            wrong.append(judge(page, role, "POST", posted, may=may, statuses=(200, 302)))
    assert [told for told in wrong if told] == []


@pytest.mark.parametrize("name", NAMES)
def test_nobody_gets_anywhere_without_logging_in(name: str, here: World) -> None:
    page = row(name)
    address = pages.address(name, here)
    plain = User.objects.create(username="customer-portal")
    known = Client()
    known.force_login(plain)  # a person of the site who is not on staff
    for client in (Client(), known):
        for method, need in (("get", page.get), ("post", page.post)):
            if need is None or need == EVERYBODY:
                continue
            answered = getattr(client, method)(address, pages.data(page, here) if method == "post" else {})
            assert answered.status_code == 302, f"{method} {name}: {answered.status_code}"
            assert answered["Location"].startswith("/admin/login/") or name == "logout", answered["Location"]


@pytest.mark.parametrize("name", [name for name in NAMES if name in PAGES and PAGES[name].of])
def test_another_organizations_ids_answer_like_unknown_ones(
    name: str, here: World, other_organization: Organization
) -> None:
    page = row(name)
    address = pages.address(name, here)
    foreign = Person(other_organization, "foreigner")
    memberless = Person(None, "memberless")
    for person in (foreign, memberless):
        client = person.with_rights(frozenset(PERMISSIONS))
        for method, need in (("get", page.get), ("post", page.post)):
            if need is None:
                continue
            with undone():
                answered = getattr(client, method)(address, pages.data(page, here) if method == "post" else {})
            if page.shared:
                continue
            expected = (403, 404) if need == NOBODY else (404,)
            assert answered.status_code in expected, f"{method} {name}: {answered.status_code}"


def test_lists_show_other_organizations_nothing(here: World, other_organization: Organization) -> None:
    client = Person(other_organization, "foreigner").with_rights(frozenset(PERMISSIONS))
    canaries = ("@example.com", "Example in sync", "Books", "Stocktaking", "webshop", "colleague-demo")
    for name in NAMES:
        page = PAGES.get(name)
        if page is None or page.of or page.shared or page.get in (None, NOBODY, SUPERUSERS):
            continue
        shown = client.get(pages.address(name, here))
        body = b"".join(shown.streaming_content if shown.streaming else [shown.content]).decode()  # type: ignore[attr-defined]
        for canary in canaries:
            assert canary not in body, f"{name} shows {canary!r} of another organization"


def action_row(model: str, action: str) -> Page:
    if (model, action) not in ACTIONS:
        pytest.fail(
            f"The list of {model} offers the action {action!r} but tests/admin/pages.py does not say who may use it. "
            "Add a row to ACTIONS."
        )
    if (model, action) not in pages.actions():
        pytest.fail(f"{(model, action)} is in ACTIONS of tests/admin/pages.py, but no list offers it any more.")
    return ACTIONS[model, action]


@pytest.mark.parametrize(("model", "action"), ACTED)
def test_every_action_answers_each_role_as_the_list_says(model: str, action: str, here: World) -> None:
    page = action_row(model, action)
    subject = here.objects[page.of]
    address = reverse(f"admin:{subject._meta.app_label}_{model}_changelist")
    see, need = pages.LISTS[model], page.post
    assert see is not None
    assert need is not None
    data = {"action": action, ACTION_CHECKBOX_NAME: str(subject.pk), "index": "0", **pages.data(page, here)}
    person = Person(here.organization)
    wrong = []
    for role, rights, superuser in roles():
        client = person.with_rights(rights, superuser=superuser)
        with undone():
            before = dict(world.rows())
            answered = client.post(address, data)
            after = dict(world.rows())
        may = allowed(see, rights=rights, superuser=superuser) and allowed(need, rights=rights, superuser=superuser)
        if not may:
            # Django leaves an unknown choice of action at the list: nothing happened then, either.
            statuses = (403,) if action != "delete_selected" else (403, 302, 200)
            if answered.status_code not in statuses:
                wrong.append(f"{role}: {action} answered {answered.status_code}")
            if before != after:
                wrong.append(f"{role}: {action} changed something without the right")
        elif answered.status_code not in (200, 302):
            wrong.append(f"{role}: {action} answered {answered.status_code}")
    assert wrong == []


@pytest.mark.parametrize(("model", "action"), ACTED)
def test_no_action_reaches_into_another_organization(
    model: str, action: str, here: World, other_organization: Organization
) -> None:
    page = action_row(model, action)
    if page.shared:
        return
    subject = here.objects[page.of]
    client = Person(other_organization, "foreigner").with_rights(frozenset(PERMISSIONS))
    across = "0" if action == "delete_selected" else "1"  # all that this person sees: themselves among the people
    before = dict(world.rows())
    data = {
        "action": action,
        ACTION_CHECKBOX_NAME: str(subject.pk),
        "index": "0",
        "select_across": across,
        **pages.data(page, here),
    }
    answered = client.post(reverse(f"admin:{subject._meta.app_label}_{model}_changelist"), data)
    assert answered.status_code in (200, 302)
    assert dict(world.rows()) == before


def test_the_list_names_what_there_is() -> None:
    assert pages.addresses() - PAGES.keys() == set()
    assert pages.actions() - ACTIONS.keys() == set()


def test_a_row_says_what_it_means() -> None:
    need = "a.see & a.push | a.all"
    assert allowed(need, rights=frozenset({"a.see", "a.push"}))
    assert allowed(need, rights=frozenset({"a.all"}))
    assert not allowed(need, rights=frozenset({"a.see"}))
    assert not allowed(NOBODY, rights=frozenset(), superuser=True)
    assert Customer._meta.default_permissions
