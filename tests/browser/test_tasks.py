"""The most common tasks, each as a person does it: in light, in dark on a phone, and without scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.contrib.auth.models import User

from connectors.models import ApiKey, Connection
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.browser.conftest import customer, work
from tests.browser.person import Person
from tests.connectors.fakes import lost
from tests.connectors.test_admin import Far

pytestmark = pytest.mark.django_db(transaction=True)
CUSTOMERS = "/admin/customers/customer/"
SAM = Actor(kind="user", id="2", name="Sam")


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
    editing.update(organization=acme.organization, values={acme.pk: {"phone": "222", "last_name": "Doe"}}, actor=SAM)
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
    person: Person, acme: Customer, books: Connection, far: Far
) -> None:
    customer(acme.organization, name="Another Company", email="")
    person.open(CUSTOMERS)
    for box in person.driver.find_elements("css selector", "#result_list tbody input[name=_selected_action]"):
        person.to(box).click()
    person.choose("select[name=action]", "Push to connected systems…").click("button[name=index]")
    person.reads("Books", "1 created", "1 refused", "Nothing is sent before you confirm").judged()
    assert far.system.ledger == []
    person.press("Push 2 customers").reads("Queued").judged()
    work()
    person.open(urlsplit(person.driver.current_url).path).reads("Partly succeeded", "Links needs an e-mail address")
    person.judged()
    assert [record["email"] for record in far.system.records.values()] == ["contact@acme.com"]


def test_find_the_record_of_a_create_whose_answer_was_lost(
    person: Person, acme: Customer, books: Connection, far: Far
) -> None:
    far.system.fail(lost, after=True)
    person.open(page_of(acme)).press("Push to Books").reads("Checking")
    acme.links.update(next_attempt_at=None)  # as it is once the hub has looked in vain
    person.open("/admin/").press("Open the queue").reads("Acme Corporation", "Checking").judged()
    person.press("Resolve Acme Corporation in Books").reads("A create whose answer never came", "contact@acme.com")
    person.press("Search there now").reads("1 record may be it").judged()
    person.press("This is it: cust_1").reads("is linked to the record in Books")
    assert acme.links.get().remote_id == "cust_1"
    assert len(far.system.records) == 1


def test_decide_a_field_that_changed_on_both_sides(person: Person, acme: Customer, books: Connection, far: Far) -> None:
    Connection.objects.filter(pk=books.pk).update(conflict_policy="ask")
    person.open(page_of(acme)).press("Push to Books").reads("In sync")
    far.system.records["cust_1"]["phone"] = "111"
    editing.update(organization=acme.organization, values={acme.pk: {"phone": "222"}}, actor=SAM)
    person.open(page_of(books)).press("Pull now")
    person.open("/admin/").press("Open the queue").press("Resolve Acme Corporation in Books")
    person.reads("Changed on both sides", "111", "222").judged().tick("input[type=radio][value=there]")
    person.press("Save decisions")
    acme.refresh_from_db()
    assert acme.phone == "111"
    assert not acme.links.get().conflicts


def test_connect_a_system_step_by_step(person: Person, acme: Customer, alex: User, far: Far) -> None:
    far.system.records["cust_9"] = {"id": "cust_9", "name": "Example", "email": "contact@acme.com"}
    person.open("/admin/connectors/connection/add/").choose("#id_provider", "Links").fill("#id_name", "Books")
    if person.driver.find_element("id", "id_organization").tag_name == "select":
        person.choose("#id_organization", "Demo")
    person.choose("#id_direction", "The hub sends to it and reads from it").fill("#id_base_url", far.url)
    person.fill("#id_credential_api_key", "remote-key").press("Save").reads("First steps with Books").judged()
    assert far.system.ledger == []
    person.press("Test connection").judged()
    books = Connection.objects.get(name="Books")
    steps = f"/admin/connectors/connection/{books.pk}/first-steps/"
    person.open(steps).reads("The test was good").press("Use this").press("Compare")
    person.reads("A customer has the same e-mail address", "1 records were read").judged()
    assert far.system.writes == []
    acme_box = person.driver.find_element("css selector", f"input[name=customers][value='{acme.pk}']")
    person.to(acme_box).click()
    person.press("Send these now").reads("Acme Corporation", "In sync", "cust_1").judged()
    person.press("Open the connection").reads("Books is open", "Healthy")
    books.refresh_from_db()
    assert books.opened_at
    assert len(far.system.writes) == 1


def test_import_a_file_after_looking_at_what_it_would_do(person: Person, acme: Customer, tmp_path: Path) -> None:
    file = tmp_path / "customers.csv"
    file.write_text(
        f"id,name,email\n{acme.public_id},Acme Corporation,new@acme.com\n,Example,not an address\n,Shop,s@example.com\n"
    )
    person.open(CUSTOMERS).press("Import…").judged()
    person.driver.find_element("css selector", "input[type=file]").send_keys(str(file))
    person.press("Upload").reads("Would create", "‹contact@acme.com› → ‹new@acme.com›").judged()
    assert Customer.objects.count() == 1
    person.press("Import 3 rows").reads("Queued").judged()
    work()
    person.open(urlsplit(person.driver.current_url).path).judged()
    acme.refresh_from_db()
    assert acme.email == "new@acme.com"
    assert Customer.objects.filter(name="Shop").exists()


def test_export_what_the_list_shows(person: Person, acme: Customer, tmp_path: Path) -> None:
    customer(acme.organization, name="Another Company", email="hello@example.com")
    place = {"behavior": "allow", "downloadPath": str(tmp_path)}
    person.driver.execute_cdp_cmd("Browser.setDownloadBehavior", place)
    person.open(f"{CUSTOMERS}?q=acme").named("Export CSV").click()
    person.wait(lambda: (tmp_path / "customers.csv").exists() and (tmp_path / "customers.csv").stat().st_size)
    exported = (tmp_path / "customers.csv").read_text(encoding="utf-8-sig")
    assert "contact@acme.com" in exported
    assert "Another Company" not in exported


def test_pause_and_resume_a_connection(person: Person, books: Connection) -> None:
    person.open(page_of(books))
    person.named("Pause…").click()
    person.fill("#pause-reason", "Stocktaking").press("Pause").reads("Paused", "Stocktaking")
    books.refresh_from_db()
    assert books.state == Connection.State.PAUSED
    person.press("Resume").reads("Healthy")
    books.refresh_from_db()
    assert books.state == Connection.State.ACTIVE


def test_what_needs_somebody_is_found_from_the_first_page(
    person: Person, organization: Organization, books: Connection, far: Far
) -> None:
    nameless = customer(organization, name="Acme Corporation", email="")
    person.open(page_of(nameless)).press("Push to Books").reads("Rejected")
    person.open("/admin/").reads("Needs you: 1").press("Open the queue").reads("Links needs an e-mail address").judged()
    person.press("Go to E-mail of Acme Corporation").fill("#id_email", "contact@acme.com").click("button[name=_push]")
    person.reads("In sync").open("/admin/connectors/customerlink/needs-you/").reads("No customer waits for you.")


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
