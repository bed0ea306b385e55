"""Two people edit one customer: nobody's work is lost, and nothing is stored before somebody has chosen."""

import html
import json
import re
from typing import Any

import pytest
from django.test import Client

from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.customers.test_customer_admin import EDIT, PERSON, address, as_form, create, staff

SEE = "customers.view_personal_data"


@pytest.fixture
def customer(organization: Organization) -> Customer:
    return create(
        organization, phone="1", currency="EUR", address_city="Berlin", custom_fields={"color": "red", "size": 1}
    )


@pytest.fixture
def client(organization: Organization) -> Client:
    return staff(organization, *EDIT, SEE)


def they(customer: Customer, *, name: str = "Somebody Else", **values: Any) -> None:
    actor = Actor(kind="user", name=name)
    editing.update(organization=customer.organization, values={customer.pk: values}, actor=actor)


def opened(customer: Customer, **changes: Any) -> dict[str, Any]:
    values = {"custom_fields": json.dumps(customer.custom_fields), **changes}
    return as_form(customer, **values)


def form_of(answer: Any) -> dict[str, Any]:
    """What a browser would send of the page on which to choose, before anything is chosen."""
    text = answer.content.decode()
    form = next(form for form in re.findall(r"(?s)<form.*?</form>", text) if "opened_version" in form)
    sent: dict[str, Any] = {}
    for tag in re.findall(r"<input[^>]*>", form):
        found = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        if found["type"] == "radio" and " checked" not in tag:
            continue
        sent.setdefault(html.unescape(found["name"]), []).append(html.unescape(found.get("value", "")))
    return {**sent, "_save": "1"}


def choose(client: Client, customer: Customer, answer: Any, **choices: str) -> Any:
    chosen = {f"choice-{name}": choice for name, choice in choices.items()}
    return client.post(address(customer), {**form_of(answer), **chosen})


def stored(customer: Customer) -> Customer:
    customer.refresh_from_db()
    return customer


def titles(answer: Any, which: str) -> list[str]:
    return [one["title"] for one in answer.context[which]]


def test_what_each_changed_alone_is_in_and_what_both_changed_is_asked(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2", address_city="Bonn", message="moved")
    they(customer, phone="3", currency="USD", is_active=False)
    answer = client.post(address(customer), mine)
    assert answer.status_code == 200
    assert titles(answer, "clashes") == ["Phone"]
    assert [value for _, _, value in answer.context["clashes"][0]["sides"]] == ["‹1›", "‹3›", "‹2›"]
    assert titles(answer, "taken") == ["Currency", "Active"]
    assert titles(answer, "kept") == ["Address city"]
    page = answer.content.decode()
    assert "Somebody Else changed this customer after you opened it: version 1 is now 2." in page
    assert 'type="radio"' in page
    assert stored(customer).version == 2

    assert choose(client, customer, answer, phone="yours").status_code == 302
    now = stored(customer)
    assert (now.version, now.phone, now.currency, now.is_active, now.address_city) == (3, "2", "USD", False, "Bonn")
    assert now.custom_fields == {"color": "red", "size": 1}
    assert now.changes.latest("version").message == "moved"


@pytest.mark.parametrize(("choice", "phone"), [("yours", "2"), ("theirs", "3"), ("original", "1")])
def test_each_choice_is_stored(client: Client, customer: Customer, choice: str, phone: str) -> None:
    mine = opened(customer, phone="2", address_city="Bonn")
    they(customer, phone="3")
    answer = choose(client, customer, client.post(address(customer), mine), phone=choice)
    assert answer.status_code == 302
    assert (stored(customer).phone, stored(customer).address_city) == (phone, "Bonn")


def test_nothing_is_saved_until_everything_is_chosen(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2", address_city="Bonn")
    they(customer, phone="3", address_city="Kiel")
    answer = choose(client, customer, client.post(address(customer), mine), phone="theirs")
    assert answer.status_code == 200
    assert "Choose a value for:" in answer.content.decode()
    clashes = {one["title"]: (one["chosen"], one["missing"]) for one in answer.context["clashes"]}
    assert clashes == {"Phone": ("theirs", False), "Address city": ("", True)}
    assert stored(customer).version == 2
    wrong = choose(client, customer, answer, address_city="everything")
    assert wrong.status_code == 200
    assert choose(client, customer, answer, address_city="yours").status_code == 302
    assert (stored(customer).phone, stored(customer).address_city) == ("3", "Bonn")


def test_a_third_change_is_caught_again(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2")
    they(customer, phone="3")
    first = client.post(address(customer), mine)
    they(customer, name="A Third", phone="4", currency="USD")
    second = choose(client, customer, first, phone="yours")
    assert second.status_code == 200
    assert [value for _, _, value in second.context["clashes"][0]["sides"]] == ["‹3›", "‹4›", "‹2›"]
    assert "A Third" in second.content.decode()
    assert titles(second, "taken") == ["Currency"]
    assert stored(customer).version == 3
    assert choose(client, customer, second, phone="yours").status_code == 302
    assert (stored(customer).phone, stored(customer).currency) == ("2", "USD")


def test_a_third_change_of_what_was_taken_over_comes_in_by_itself(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2", address_city="Bonn")
    they(customer, phone="3")
    first = client.post(address(customer), mine)
    they(customer, phone="4")
    second = choose(client, customer, first, phone="theirs")
    assert second.status_code == 200
    assert (titles(second, "clashes"), titles(second, "taken")) == ([], ["Phone"])
    assert choose(client, customer, second).status_code == 302
    assert (stored(customer).phone, stored(customer).address_city) == ("4", "Bonn")


def test_a_third_change_while_a_choice_is_missing(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2")
    they(customer, phone="3")
    first = client.post(address(customer), mine)
    they(customer, phone="4")
    second = choose(client, customer, first)
    assert [value for _, _, value in second.context["clashes"][0]["sides"]] == ["‹1›", "‹4›", "‹2›"]
    assert choose(client, customer, second, phone="theirs").status_code == 302
    assert stored(customer).phone == "4"


def test_custom_fields_are_resolved_one_by_one(client: Client, customer: Customer) -> None:
    ours = {"color": "blue", "size": 1, "mine": ["new"]}
    mine = opened(customer, custom_fields=json.dumps(ours))
    they(customer, custom_fields={"color": "green", "theirs": {"deep": "<b>"}})
    answer = client.post(address(customer), mine)
    assert titles(answer, "clashes") == ["color"]
    assert titles(answer, "taken") == ["theirs", "size"]
    assert titles(answer, "kept") == ["mine"]
    assert "<b>" not in answer.content.decode().split("opened_version")[1]
    done = choose(client, customer, answer, **{"custom_fields:color": "theirs"})
    assert done.status_code == 302
    assert stored(customer).custom_fields == {"color": "green", "theirs": {"deep": "<b>"}, "mine": ["new"]}


def test_a_custom_field_that_one_removed_and_the_other_changed(client: Client, customer: Customer) -> None:
    for choice, left in (("theirs", {"size": 1}), ("yours", {"color": "blue", "size": 1})):
        they(customer, custom_fields={"color": "red", "size": 1})
        stored(customer)
        mine = opened(customer, custom_fields='{"color": "blue", "size": 1}')
        they(customer, custom_fields={"size": 1})
        answer = client.post(address(customer), mine)
        assert [value for _, _, value in answer.context["clashes"][0]["sides"]] == ["‹red›", "‹empty›", "‹blue›"]
        assert choose(client, customer, answer, **{"custom_fields:color": choice}).status_code == 302
        assert stored(customer).custom_fields == left


def test_long_texts_and_awkward_characters_survive(client: Client, customer: Customer) -> None:
    awkward = "“q” & 'x' <i> " + "ä" * 200
    mine = opened(customer, phone="2", address_line1=awkward, address_line2="")
    they(customer, phone="3", address_line2="floor 3")
    answer = client.post(address(customer), mine)
    assert choose(client, customer, answer, phone="theirs").status_code == 302
    assert (stored(customer).address_line1, stored(customer).address_line2) == (awkward, "floor 3")


def test_the_same_change_by_both_asks_nothing(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="3", address_city="Bonn")
    they(customer, phone="3")
    answer = client.post(address(customer), mine)
    assert titles(answer, "clashes") == []
    assert "Nobody changed what you changed" in answer.content.decode()
    assert choose(client, customer, answer).status_code == 302
    assert stored(customer).address_city == "Bonn"


def test_a_mistake_is_told_first_and_loses_nothing(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2", email="no address")
    they(customer, phone="3")
    answer = client.post(address(customer), mine)
    form = answer.context["adminform"].form
    assert "email" in form.errors
    assert (form["phone"].value(), int(form["seen_version"].value())) == ("2", 1)
    again = client.post(address(customer), {**mine, "email": "good@example.com"})
    assert titles(again, "clashes") == ["Phone"]
    assert titles(again, "kept") == ["E-mail"]


def test_the_button_that_was_pressed_is_kept(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2", _continue="1")
    they(customer, currency="USD")
    answer = client.post(address(customer), mine)
    done = choose(client, customer, answer)
    assert done["Location"].endswith(address(customer))


def test_archiving_meanwhile_is_told(client: Client, customer: Customer) -> None:
    mine = opened(customer, phone="2")
    editing.archive(organization=customer.organization, ids=[customer.pk], actor=PERSON)
    answer = client.post(address(customer), mine)
    assert "Somebody Else moved the customer into or out of the archive." in answer.content.decode()
    assert choose(client, customer, answer).status_code == 302
    assert stored(customer).phone == "2"
    assert stored(customer).archived_at


@pytest.mark.parametrize("version", ["", "99", "-1", "x"])
def test_a_version_that_no_page_showed_stores_nothing(client: Client, customer: Customer, version: str) -> None:
    they(customer, phone="3")
    answer = client.post(address(customer), opened(customer, phone="2", seen_version=version))
    assert answer.status_code == 200
    assert stored(customer).phone == "3"


def test_choices_that_nobody_asked_for_change_nothing_else(client: Client, customer: Customer) -> None:
    extra = {
        "decide": ["organization", "version", "pk", "archived_at", "custom_fields:"],
        "choice-organization": "theirs",
        "choice-version": "original",
        "choice-pk": "theirs",
        "choice-archived_at": "theirs",
        "choice-custom_fields:": "theirs",
        "opened_version": "0",
    }
    answer = client.post(address(customer), {**opened(customer, phone="2"), **extra})
    assert answer.status_code == 302
    assert (stored(customer).phone, stored(customer).custom_fields) == ("2", {"color": "red", "size": 1})


def test_what_they_changed_is_masked_for_who_may_not_see_it(organization: Organization, customer: Customer) -> None:
    rights = [right for right in EDIT if right != "customers.view_personal_data"]
    blind = staff(organization, *rights, name="blind")
    mine = opened(customer, phone="2", currency="USD")
    they(customer, phone="+493055501", currency="GBP")
    answer = blind.post(address(customer), mine)
    shown = answer.content.decode().split("opened_version")[1]
    assert "+493055501" not in shown
    assert "USD" in shown
