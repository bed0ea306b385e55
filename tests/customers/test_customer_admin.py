"""The customer screens: who sees what, what an edit leaves behind, and what happens when two edit at once."""

from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from customers import editing
from customers.editing import EDITABLE, Actor
from customers.models import Customer, CustomerChange, Organization

PERSON = Actor(kind="user", name="Somebody Else")


def create(organization: Organization, **values: Any) -> Customer:
    values = {"name": "Acme Corporation", "email": "contact@acme.com", **values}
    return editing.create(organization=organization, values=[values], actor=PERSON)[0]


def staff(organization: Organization | None, *rights: str, name: str = "clerk") -> Client:
    user = User.objects.create_user(name, password="secret", is_staff=True, first_name="Alex", last_name="Clerk")
    for right in rights:
        app, codename = right.split(".")
        user.user_permissions.add(Permission.objects.get(content_type__app_label=app, codename=codename))
    if organization:
        organization.members.add(user)
    client = Client()
    client.force_login(user)
    return client


EDIT = (
    *("customers.view_customer", "customers.change_customer", "customers.add_customer"),
    "customers.view_personal_data",
)


def address(customer: Customer, what: str = "change") -> str:
    return reverse(f"admin:customers_customer_{what}", args=[customer.pk])


LIST = "/admin/customers/customer/"


def as_form(customer: Customer, **changes: Any) -> dict[str, Any]:
    """What a browser sends for the page of this customer."""
    fields: dict[str, Any] = {name: getattr(customer, name) for name in EDITABLE} | {"custom_fields": "{}"} | changes
    flags = {name: "on" for name, value in fields.items() if value is True}
    texts = {name: value for name, value in fields.items() if not isinstance(value, bool)}
    return {**texts, **flags, "seen_version": customer.version, **changes}


def test_an_edit_makes_a_version_with_its_author_and_message(organization: Organization) -> None:
    customer = create(organization)
    client = staff(organization, *EDIT)
    answer = client.post(
        address(customer),
        as_form(customer, phone="+493012345", message="as on invoice"),
        headers={"Request-Id": "req-12345"},
    )
    assert answer.status_code == 302
    change = CustomerChange.objects.get(customer=customer, version=2)
    assert change.changes == {"phone": ["", "+493012345"]}
    assert (change.actor_kind, change.actor_name) == ("user", "Alex Clerk")
    assert (change.message, change.request_id) == ("as on invoice", "req-12345")
    page = client.get(address(customer)).content.decode()
    assert "as on invoice" in page
    assert "+493012345" in page


def test_a_customer_is_added_in_an_own_organization(
    organization: Organization, other_organization: Organization
) -> None:
    client = staff(organization, *EDIT)
    values = {"name": "Acme Corporation", "is_active": "on", "custom_fields": "{}"}
    refused = client.post(f"{LIST}add/", {**values, "organization": other_organization.pk})
    assert refused.status_code == 200
    assert not Customer.objects.exists()
    answer = client.post(f"{LIST}add/", {**values, "organization": organization.pk, "message": "by phone"})
    assert answer.status_code == 302
    customer = Customer.objects.get()
    assert customer.organization == organization
    assert customer.changes.get().message == "by phone"


def test_first_and_last_name_make_up_the_name(organization: Organization) -> None:
    client = staff(organization, *EDIT)
    parts = {"organization": organization.pk, "first_name": "John", "last_name": "Doe", "custom_fields": "{}"}
    assert client.post(f"{LIST}add/", parts).status_code == 302
    assert Customer.objects.get().name == "John Doe"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("email", "not an address", "Enter a valid e-mail address"),
        ("name", " ", "A customer needs a name."),
        ("phone", "5" * 65, "at most 64"),
        ("custom_fields", "[1]", "Give an object"),
        ("currency", "EUR\x07", "control characters"),
    ],
)
def test_what_cannot_be_stored_is_said_at_its_field(
    organization: Organization, field: str, value: str, message: str
) -> None:
    customer = create(organization)
    client = staff(organization, *EDIT)
    answer = client.post(address(customer), as_form(customer, **{field: value}))
    assert answer.status_code == 200
    assert message in " ".join(answer.context["adminform"].form.errors[field])
    customer.refresh_from_db()
    assert customer.version == 1


def test_a_malformed_address_from_elsewhere_does_not_stop_other_edits(organization: Organization) -> None:
    customer = create(organization, email="not an address")
    client = staff(organization, *EDIT)
    assert client.post(address(customer), as_form(customer, phone="1")).status_code == 302


def test_a_stale_save_stores_nothing_and_keeps_what_both_wrote(organization: Organization) -> None:
    customer = create(organization, phone="1", currency="EUR")
    client = staff(organization, *EDIT)
    opened = as_form(customer, phone="2", address_city="Berlin")
    editing.update(
        organization=organization,
        values={customer.pk: {"phone": "3", "currency": "USD", "is_active": False}},
        actor=PERSON,
    )
    answer = client.post(address(customer), opened)
    assert answer.status_code == 200
    page = answer.content.decode()
    assert "Somebody Else changed this customer after you opened it: version 1 is now 2." in page
    assert "Nothing was saved" in page
    assert [(one["title"], one["sides"][1][2]) for one in answer.context["taken"]] == [
        ("Currency", "‹USD›"),
        ("Active", "no"),
    ]
    customer.refresh_from_db()
    assert (customer.version, customer.phone) == (2, "3")


def test_a_save_that_does_not_tell_its_version_is_refused(organization: Organization) -> None:
    customer = create(organization)
    client = staff(organization, *EDIT)
    answer = client.post(address(customer), as_form(customer, phone="2", seen_version=""))
    assert answer.status_code == 200
    assert "without the version" in answer.content.decode()
    customer.refresh_from_db()
    assert customer.version == 1


@pytest.mark.parametrize(
    "term",
    ["CUST", "UUID", "Contact@ACME.com", "030 12345", "+49 30 12345", "acmé corp", "corporation", "ntact@ac"],
)
def test_a_customer_is_found_by(organization: Organization, term: str) -> None:
    organization.country = "DE"
    organization.save()
    customer = create(organization, phone="+493012345")
    create(organization, name="Example", email="other@example.com")
    client = staff(organization, *EDIT)
    term = {"CUST": customer.public_id, "UUID": str(customer.pk)}.get(term, term)
    found = client.get(LIST, {"q": term}).context["cl"].result_list
    assert [c.pk for c in found] == [customer.pk]


def test_nothing_of_another_organization_is_found_or_opened(
    organization: Organization, other_organization: Organization
) -> None:
    customer = create(other_organization)
    client = staff(organization, *EDIT, "customers.view_customerchange")
    for term in (customer.public_id, customer.email, "acme", ""):
        assert list(client.get(LIST, {"q": term}).context["cl"].result_list) == []
    assert list(client.get(LIST, {"organization": other_organization.pk}).context["cl"].result_list) == []
    assert "Other" not in client.get(LIST).content.decode()
    missing = reverse("admin:customers_customer_change", args=["0190a000-0000-7000-8000-000000000000"])
    assert client.get(missing).status_code == 404
    for what in ("change", "history", "delete"):
        assert client.get(address(customer, what)).status_code in (403, 404)
    assert client.get(address(customer)).status_code == 404
    assert client.post(address(customer), as_form(customer, phone="9")).status_code == 404
    for what in ("archive", "restore"):
        assert client.post(address(customer, what)).status_code == 404
    client.post(LIST, {"action": "archive_selected", "_selected_action": [str(customer.pk)]})
    changes = client.get("/admin/customers/customerchange/").context["cl"].result_list
    assert list(changes) == []
    customer.refresh_from_db()
    assert customer.version == 1


def test_who_may_only_look_changes_nothing(organization: Organization) -> None:
    customer = create(organization)
    client = staff(organization, "customers.view_customer")
    page = client.get(address(customer))
    assert page.status_code == 200
    assert b'name="_save"' not in page.content
    assert b"/archive/" not in page.content
    assert client.post(address(customer), as_form(customer, phone="9")).status_code == 403
    assert client.post(address(customer, "archive")).status_code == 403
    assert client.get(f"{LIST}add/").status_code == 403
    action = client.post(LIST, {"action": "archive_selected", "_selected_action": [str(customer.pk)]})
    assert action.status_code == 403
    customer.refresh_from_db()
    assert customer.version == 1


def test_a_customer_is_archived_and_restored_but_never_deleted(organization: Organization) -> None:
    customer = create(organization)
    client = staff(organization, *EDIT, "customers.delete_customer")
    for what in ("archive", "restore"):
        assert client.get(address(customer, what)).status_code == 405
    assert client.post(address(customer, "archive")).status_code == 302
    customer.refresh_from_db()
    assert customer.archived_at
    assert "Archived on" in client.get(address(customer)).content.decode()
    assert list(client.get(LIST, {"archived": "no"}).context["cl"].result_list) == []
    assert len(client.get(LIST, {"archived": "yes"}).context["cl"].result_list) == 1
    client.post(address(customer, "restore"))
    customer.refresh_from_db()
    assert customer.archived_at is None
    assert client.get(address(customer, "delete")).status_code == 403
    answer = client.post(LIST, {"action": "delete_selected", "_selected_action": [str(customer.pk)], "post": "yes"})
    assert answer.status_code == 302
    assert Customer.objects.filter(pk=customer.pk).exists()


def test_the_history_tells_who_did_what_and_escapes_it(organization: Organization) -> None:
    customer = create(organization, name="<script>alert(1)</script>")
    client = staff(organization, *EDIT, "customers.view_customerchange")
    page = client.get(address(customer)).content.decode()
    assert "<script>alert(1)" not in page
    assert "Somebody Else" in page
    assert "created this customer" in page
    changes = client.get("/admin/customers/customerchange/", {"customer__id__exact": customer.pk})
    assert "<script>alert(1)" not in changes.content.decode()
    assert len(changes.context["cl"].result_list) == 1
    change = customer.changes.get()
    assert client.get(f"/admin/customers/customerchange/{change.pk}/change/").status_code == 200
    assert client.post(f"/admin/customers/customerchange/{change.pk}/change/").status_code == 403


def test_organizations_are_for_superusers(organization: Organization, admin_client: Client) -> None:
    everything = [f"customers.{verb}_organization" for verb in ("view", "add", "change", "delete")]
    clerk = staff(organization, *everything)
    assert clerk.get("/admin/customers/organization/").status_code == 403
    assert admin_client.get("/admin/customers/organization/").status_code == 200
    assert admin_client.get(f"/admin/customers/organization/{organization.pk}/change/").status_code == 200


def test_people_and_groups_have_their_pages(admin_client: Client, admin_user: User) -> None:
    for path in (
        "/admin/", "/admin/auth/user/", "/admin/auth/user/add/", f"/admin/auth/user/{admin_user.pk}/change/",
        f"/admin/auth/user/{admin_user.pk}/password/", "/admin/auth/group/", "/admin/auth/group/add/",
    ):  # fmt: skip
        assert admin_client.get(path).status_code == 200


@pytest.mark.parametrize("value", [r'"\ud800"', r'"\u0000"', "1e400", "12345678901234567890123"])
def test_custom_fields_that_no_database_can_hold_are_refused_on_their_field(
    organization: Organization, value: str
) -> None:
    User.objects.create_superuser("alex", password="secret")
    browser = Client()
    browser.login(username="alex", password="secret")
    answer = browser.post(
        reverse("admin:customers_customer_add"),
        {"organization": organization.pk, "name": "A", "is_active": "on", "custom_fields": f'{{"a": {value}}}'},
    )
    assert answer.status_code == 200
    assert "custom_fields" in answer.context["adminform"].form.errors
    assert not Customer.objects.exists()
