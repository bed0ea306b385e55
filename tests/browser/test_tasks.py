"""The most common tasks, each as a person does it: in light, in dark on a phone, and without scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User

from connectors.models import ApiKey, Connection
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.browser.conftest import customer
from tests.browser.person import Person
from tests.connectors.test_admin import Far

pytestmark = pytest.mark.django_db(transaction=True)
CUSTOMERS = "/admin/customers/customer/"


def page_of(found: Any) -> str:
    return f"/admin/{found._meta.app_label}/{found._meta.model_name}/{found.pk}/change/"


def test_log_in_and_find_a_customer_by_e_mail(visitor: Person, alex: User, acme: Customer) -> None:
    customer(acme.organization, name="Another Company", email="hello@example.com")
    visitor.open("/admin/").fill("#id_username", "alex").fill("#id_password", "secret").click("button[type=submit]")
    visitor.open(CUSTOMERS).fill("#searchbar", "contact@acme.com").submit("#searchbar")
    visitor.reads("Acme Corporation")
    assert "Another Company" not in visitor.text()
    visitor.press("Acme Corporation", within="#result_list").reads("version 1")


def test_edit_and_save_with_a_message(person: Person, acme: Customer) -> None:
    person.open(page_of(acme)).fill("#id_phone", "+44 20 7946 0958").fill("#id_message", "as told by phone")
    person.click("button[name=_continue]").reads("as told by phone", "alex")
    acme.refresh_from_db()
    assert (acme.phone, acme.version) == ("+44 20 7946 0958", 2)


def test_save_and_push_and_see_the_result(person: Person, acme: Customer, books: Connection, far: Far) -> None:
    person.open(page_of(acme)).reads("Not linked").fill("#id_phone", "1234567")
    person.click("button[name=_push]").reads("Sent. Books accepted version 2 as cust_1.", "In sync")
    assert far.system.records["cust_1"]["phone"] == "1234567"


def test_a_rejection_leads_to_the_field_and_is_mended_there(
    person: Person, organization: Organization, books: Connection, far: Far
) -> None:
    nameless = customer(organization, name="Acme Corporation", email="")
    person.open(page_of(nameless)).press("Push to Books").reads("Rejected in Books", "Links needs an e-mail address")
    person.driver.find_element("link text", "Go to the field").click()
    assert person.driver.current_url.endswith("#id_email")
    person.fill("#id_email", "contact@acme.com").click("button[name=_push]")
    person.reads("Sent. Books accepted version 2", "In sync")
    assert far.system.records["cust_1"]["email"] == "contact@acme.com"


def test_look_at_a_push_before_it_is_sent(person: Person, acme: Customer, books: Connection, far: Far) -> None:
    person.open(page_of(acme)).press("Compare with Books")
    person.reads("contact@acme.com", "POST", "/unified/customer").judged()
    assert "remote-key" not in person.driver.page_source
    assert far.system.ledger == []
    person.press("Create in Books").reads("Sent. Books accepted version 1 as cust_1.").judged()
    far.system.records["cust_1"]["phone"] = "1234567"
    person.press("Read it now").reads("The values there were read just now", "1234567").judged()
    assert len(far.system.writes) == 1


def test_a_save_over_somebody_elses_is_decided_field_by_field(person: Person, acme: Customer) -> None:
    person.open(page_of(acme)).fill("#id_phone", "111").fill("#id_first_name", "Jo")
    sam = Actor(kind="user", id="2", name="Sam")
    editing.update(organization=acme.organization, values={acme.pk: {"phone": "222", "last_name": "Doe"}}, actor=sam)
    person.click("button[name=_continue]").reads("Nothing was saved, and nothing is lost", "Sam", "222", "111").judged()
    person.tick("input[name=choice-phone][value=yours]").click("button[name=_save]")
    acme.refresh_from_db()
    assert (acme.phone, acme.first_name, acme.last_name) == ("111", "Jo", "Doe")


def test_link_a_customer_to_the_record_that_is_there(
    person: Person, acme: Customer, books: Connection, far: Far
) -> None:
    far.system.records["cust_9"] = {"id": "cust_9", "name": "Acme Corp.", "email": "contact@acme.com"}
    person.open(page_of(acme)).press("Link to a record in Books").fill("#link-id", "cust_9").press("Read it there")
    person.reads("Acme Corp.", "Whose values are kept").judged().tick("input[name=side][value=here]").press("Link")
    person.reads("is linked to record cust_9 in Books")
    assert acme.links.get().remote_id == "cust_9"


def test_push_many_at_once_after_looking_at_what_it_comes_down_to(
    person: Person, acme: Customer, books: Connection
) -> None:
    customer(acme.organization, name="Another Company", email="hello@example.com")
    person.open(CUSTOMERS)
    for box in person.driver.find_elements("css selector", "#result_list tbody input[name=_selected_action]"):
        box.click()
    person.choose("select[name=action]", "Push to connected systems…").click("button[name=index]")
    person.reads("Books", "Nothing is sent before you confirm").press("Push")
    person.reads("Queued")


def test_pause_and_resume_a_connection(person: Person, books: Connection) -> None:
    person.open(page_of(books)).fill("#pause-reason", "Stocktaking").press("Pause").reads("Paused", "Stocktaking")
    books.refresh_from_db()
    assert books.state == Connection.State.PAUSED
    person.press("Resume").reads("Healthy")
    books.refresh_from_db()
    assert books.state == Connection.State.ACTIVE


def test_a_push_that_the_hubs_own_endpoints_take(
    person: Person,
    live_server: Any,
    settings: Any,
    acme: Customer,
    other_organization: Organization,
    connect: Callable[..., Connection],
) -> None:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    key = ApiKey.issue(organization=other_organization, name="demo")[1]
    connect(
        "links",
        name="Partner",
        direction=Connection.Direction.PUSH,
        base_url=f"{live_server.url}/api/v1",
        credentials={"api_key": key},
    )
    person.open(page_of(acme)).press("Push to Partner").reads("Sent. Partner accepted version 1")
    arrived = Customer.objects.get(organization=other_organization)
    assert (arrived.name, arrived.email) == ("Acme Corporation", "contact@acme.com")
    assert acme.links.get().remote_id == arrived.public_id
    person.press("Push to Partner").reads("Already up to date, nothing was sent to Partner.")
