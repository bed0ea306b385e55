"""Fields that changed on both sides: three values side by side, who and when, and a decision for each field."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.models import Conflict, Connection, CustomerLink, Issue, SyncRun
from connectors.sync.issues import open_issue
from connectors.sync.pull import pull
from connectors.sync.push import push
from customers.models import CustomerChange, Organization
from tests.connectors.test_admin import change, staff, told
from tests.connectors.test_sweep import NOTHING, Shop, shops

__all__ = ["shops"]  # a fixture
URL = "/admin/connectors/customerlink/conflicts/"
LOOK = ("connectors.view_customerlink", "customers.view_customer")
PUSH, EDIT, SEE = "connectors.push_customerlink", "customers.change_customer", "customers.view_personal_data"


@pytest.fixture
def shop(shops: Any) -> Shop:
    made: Shop = shops(**NOTHING)
    made.connection.direction, made.connection.conflict_policy = "push_and_pull", "ask"
    made.connection.save()
    return made


def in_conflict(shop: Shop, number: int = 1) -> list[CustomerLink]:
    """Customers whose phone and name changed on both sides."""
    made = shop.customers(number, phone="1")
    shop.push(*made)
    shop.clock.advance(600)
    for customer in made:
        shop.edit(customer, phone="22")
        shop.edit(customer, name=f"Here {customer.name}")
        shop.account.edit(shop.link(customer).remote_id or "", phone="333", name=f"There {customer.name}")
    pull(**shop.engine)
    links = [shop.link(customer) for customer in made]
    assert [sorted(link.conflicts) for link in links] == [["name", "phone"]] * number
    return links


def choices(client: Client, sides: dict[str, str], **more: str) -> dict[str, str]:
    """The form as a person sends it who chose these sides by field, in every row."""
    form = dict(more)
    for row in client.get(URL).context["rows"]:
        form[f"seen-{row.key}"] = row.token
        form[f"side-{row.key}"] = sides.get(row.field, "")
    return form


def test_three_values_who_changed_them_and_when(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    answer = client.get(URL)
    name, phone = answer.context["rows"]
    assert (phone.base, phone.here, phone.there, phone.who) == ("‹1›", "‹22›", "‹333›", "Anna")
    assert phone.changed_at == CustomerChange.objects.get(version=2).at
    assert name.changed_at == CustomerChange.objects.get(version=3).at
    assert phone.noticed_at == Conflict.objects.get(field="phone").at
    assert phone.suggested == ""
    Connection.objects.update(field_policies={"phone": "provider_wins"}, conflict_policy="hub_wins")
    name, phone = client.get(URL).context["rows"]
    assert (name.suggested, phone.suggested) == ("here", "there")
    assert change(link.customer) in answer.content.decode()


def test_each_field_is_decided_by_itself(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    said = told(client.post(URL, choices(client, {"phone": "here"})))
    assert said == "1 of 1 fields are decided."
    link.refresh_from_db()
    assert list(link.conflicts) == ["name"]
    log = Conflict.objects.get(field="phone")
    assert (log.resolved_by, log.resolved_at is not None) == ("clerk0", True)
    shop.due()
    push(**shop.engine)
    assert shop.account.records()[0]["fields"]["phone"] == "22"
    assert shop.account.records()[0]["fields"]["name"] == "There Example 0"
    told(client.post(URL, choices(client, {"name": "there"})))
    link.refresh_from_db()
    link.customer.refresh_from_db()
    assert (link.conflicts, link.customer.name) == ({}, "There Example 0")
    assert CustomerChange.objects.latest("pk").actor_name == "clerk0"
    assert "No field waits for a decision." in client.get(URL).content.decode()


def test_another_value_is_an_edit_that_is_sent(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    form = choices(client, {"phone": "other"}, **{f"other-{link.pk}-phone": " 4444 "})
    assert told(client.post(URL, form)) == "1 of 1 fields are decided."
    link.refresh_from_db()
    link.customer.refresh_from_db()
    assert (list(link.conflicts), link.customer.phone) == (["name"], "4444")
    shop.due()
    push(**shop.engine)
    assert shop.account.records()[0]["fields"]["phone"] == "4444"


def test_a_value_that_the_hub_cannot_store_changes_nothing(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    form = choices(client, {"name": "other", "phone": "here"}, **{f"other-{link.pk}-name": ""})
    said = told(client.post(URL, form))
    assert "Nothing was changed there." in said
    assert "1 of 2 fields are decided." in said
    link.refresh_from_db()
    link.customer.refresh_from_db()
    assert (list(link.conflicts), link.customer.name) == (["name"], "Here Example 0")


def test_what_changed_since_the_page_was_made_is_not_decided(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE)
    form = choices(client, {"phone": "there"})
    shop.edit(link.customer, phone="555")
    said = told(client.post(URL, form))
    assert "has changed since this page was made" in said
    link.refresh_from_db()
    link.customer.refresh_from_db()
    assert (sorted(link.conflicts), link.customer.phone) == (["name", "phone"], "555")
    # Sent twice, the second comes to nothing.
    form = choices(client, {"phone": "here"})
    client.post(URL, form)
    assert "not in conflict" in told(client.post(URL, form))


def test_the_hub_for_all_shown_is_first_shown(shop: Shop) -> None:
    links = in_conflict(shop, 3)
    client = staff(shop.organization, *LOOK, PUSH)
    suggested = client.get(URL, {"field": "phone", "suggest": "here"})
    text = suggested.content.decode()
    assert text.count('value="here" checked') == 3
    assert "Nothing is decided before you press" in text
    assert SyncRun.objects.filter(request__decision="keep_here").count() == 0
    said = told(client.post(f"{URL}?field=phone&suggest=here", choices(client, {"phone": "here"})))
    assert said == "3 of 3 fields are decided."
    for link in links:
        link.refresh_from_db()
        assert list(link.conflicts) == ["name"]


def test_filters_by_system_and_field(shop: Shop) -> None:
    in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH)

    def found(**query: Any) -> list[str]:
        return [row.field for row in client.get(URL, query).context["rows"]]

    assert found() == ["name", "phone"]
    assert found(field="phone") == ["phone"]
    assert found(field="email") == []
    assert found(connection=shop.connection.pk) == ["name", "phone"]
    assert found(connection=0) == []
    assert found(field="nonsense", connection="x", suggest="both", after="?") == []


def test_values_are_masked_without_the_right(shop: Shop) -> None:
    in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, "connectors.view_conflict")
    text = client.get(URL).content.decode()
    assert "‹22›" not in text
    assert "‹333›" not in text
    log = client.get(change(Conflict.objects.get(field="phone"))).content.decode()
    assert "333" not in log
    assert "‹•••›" in log


def test_rights_and_other_organizations(shop: Shop, other_organization: Organization) -> None:
    [link] = in_conflict(shop)
    chooser = staff(shop.organization, *LOOK, PUSH)
    form = choices(chooser, {"phone": "here"})
    taking = choices(chooser, {"phone": "there"})
    assert staff(shop.organization, PUSH).get(URL).status_code == 403
    assert staff(shop.organization, *LOOK).post(URL, form).status_code == 403
    assert chooser.post(URL, taking).status_code == 403
    assert staff(other_organization, *LOOK, PUSH).post(URL, form).status_code == 404
    assert staff(other_organization, *LOOK, PUSH).get(URL).context["rows"] == []
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = chooser.cookies
    assert strict.post(URL, form).status_code == 403
    text = staff(shop.organization, *LOOK).get(URL).content.decode()
    assert "Save decisions" not in text
    assert "side-" not in text
    link.refresh_from_db()
    assert sorted(link.conflicts) == ["name", "phone"]
    assert "No side was chosen" in told(chooser.post(URL, choices(chooser, {})))


def test_the_page_costs_the_same_whatever_it_shows(shop: Shop) -> None:
    client = staff(shop.organization, *LOOK, PUSH)

    def cost() -> int:
        client.get(URL)
        with CaptureQueriesContext(database) as queries:
            assert client.get(URL).status_code == 200
        return len(queries)

    in_conflict(shop)
    few = cost()
    in_conflict(shop, 6)
    assert cost() == few <= 12


def test_the_log_tells_who_decided_and_cannot_be_changed(shop: Shop) -> None:
    [link] = in_conflict(shop)
    client = staff(shop.organization, *LOOK, PUSH, EDIT, SEE, "connectors.view_conflict")
    client.post(URL, choices(client, {"phone": "here"}))
    text = client.get("/admin/connectors/conflict/").content.decode()
    assert "clerk0" in text
    assert "Decided" in text
    assert "Waits for a person" in text
    waiting = Conflict.objects.get(field="name")
    assert change(link, "resolve") in client.get(change(waiting)).content.decode()
    assert client.post(change(waiting), {"outcome": "hub"}).status_code == 403
    assert staff(None, "connectors.view_conflict").get(change(waiting)).status_code == 404
    filtered = client.get("/admin/connectors/conflict/", {"field": "phone"}).context["cl"].result_list
    assert [row.field for row in filtered] == ["phone"]


# Issues


def an_issue(shop: Shop, kind: str = "fight", **more: Any) -> Issue:
    open_issue(connection=shop.connection, kind=kind, message="They fight.", at=shop.clock(), **more)
    return Issue.objects.get(kind=kind, resolved_at=None)


def test_an_issue_is_seen_to_by_who_may_and_opens_again(shop: Shop) -> None:
    issue = an_issue(shop)
    url = change(issue, "seen")
    client = staff(shop.organization, "connectors.view_issue", "connectors.change_issue")
    assert "They fight." in client.get("/admin/connectors/issue/").content.decode()
    assert "Seen to" in client.get(change(issue)).content.decode()
    assert client.get(url).status_code == 405
    assert staff(shop.organization, "connectors.view_issue").post(url).status_code == 403
    assert staff(None, "connectors.view_issue", "connectors.change_issue").post(url).status_code == 404
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = client.cookies
    assert strict.post(url).status_code == 403
    issue.refresh_from_db()
    assert issue.resolved_at is None
    assert "1 seen to." in told(client.post(url))
    issue.refresh_from_db()
    assert issue.resolved_at is not None
    assert "seen to before" in told(client.post(url))
    assert an_issue(shop).pk != issue.pk
    assert client.get("/admin/connectors/issue/", {"open": "yes"}).context["cl"].result_count == 1


def test_many_issues_are_seen_to_at_once(shop: Shop) -> None:
    issues = [an_issue(shop), an_issue(shop, "orphan")]
    form = {"action": "see_to_selected", "_selected_action": [issue.pk for issue in issues], "index": 0}
    looking = staff(shop.organization, "connectors.view_issue")
    assert looking.post("/admin/connectors/issue/", form).status_code == 403
    client = staff(shop.organization, "connectors.view_issue", "connectors.change_issue")
    assert "2 seen to." in told(client.post("/admin/connectors/issue/", form))


def test_an_issue_quotes_no_system_to_who_may_not_see_personal_data(shop: Shop) -> None:
    open_issue(
        connection=shop.connection, kind="rejected", message="email: jane@example.com is taken.",
        details={"field": "email", "customer": "x"}, at=shop.clock(),
    )  # fmt: skip
    issue = Issue.objects.get()
    client = staff(shop.organization, "connectors.view_issue")
    for url in ("/admin/connectors/issue/", change(issue)):
        assert "jane@" not in client.get(url).content.decode()
    seeing = staff(shop.organization, "connectors.view_issue", SEE)
    assert "jane@example.com is taken." in seeing.get(change(issue)).content.decode()
