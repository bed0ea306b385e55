"""Who sees personal data, who may reveal it, what each ready-made group can do, and whom an administrator manages."""

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from connectors.groups import GROUPS, make_groups
from connectors.models import Connection, CustomerLink, PushIntent, SyncRun
from customers import editing, privacy
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization, Reveal
from tests.customers.test_customer_admin import LIST, address, as_form, staff

COMMAND = Actor(kind="command", name="test")
LOOK = (
    *("customers.view_customer", "customers.view_customerchange", "connectors.view_customerlink"),
    *("connectors.view_syncrun", "connectors.view_connection"),
)
EDIT = ("customers.change_customer", "customers.add_customer")
REVEAL = privacy.REVEAL
SECRETS = ("jane.doe", "+49301234567", "Secret Street", "10115", "Hiddenburg", "DE123456789")


@pytest.fixture
def jane(organization: Organization) -> Customer:
    values = {
        "name": "Jane Doe",
        "email": "jane.doe@example.com",
        "phone": "+49301234567",
        "address_line1": "Secret Street 1",
        "address_postal_code": "10115",
        "shipping_address_city": "Hiddenburg",
        "address_country": "DE",
        "custom_fields": {"vat": "DE123456789"},
    }
    [customer] = editing.create(organization=organization, values=[{**values, "phone": "1"}], actor=COMMAND)
    editing.update(organization=organization, values={customer.pk: {"phone": values["phone"]}}, actor=COMMAND)
    customer.refresh_from_db()
    return customer


def leaks(page: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret in page.decode()]


@pytest.fixture
def pages(jane: Customer, connect: Callable[..., Connection]) -> list[str]:
    """Every page of the admin on which something personal of Jane would stand."""
    now = timezone.now()
    shop = connect("links", name="Shop", direction="push")
    document = {"email": jane.email, "street": jane.address_line1}
    link = CustomerLink.objects.create(
        customer=jane,
        connection=shop,
        remote_data=document,
        state="rejected",
        error=f"{jane.email} at {jane.address_line1} is not valid, nor is +49 301 234567",
        needed_version=1,
        created_at=now,
        updated_at=now,
    )
    PushIntent.objects.create(
        link=link, kind="create", payload=document, sent_values={}, version=1, first_sent_at=now, sent_at=now,
        outcome="failed", error=f"no such address: {jane.email}",
    )  # fmt: skip
    run = SyncRun.objects.create(
        public_id="a" * 16, organization=jane.organization, connection=shop, kind="push", actor_kind="user",
        actor_name="x", refused=1, problems=[{"customer": str(jane.pk), "field": "email", "reason": link.error}],
    )  # fmt: skip
    change = jane.changes.latest("version")
    return [
        LIST,
        f"{LIST}?q=jane",
        reverse("admin:customers_customerchange_changelist"),
        reverse("admin:customers_customerchange_change", args=[change.pk]),
        reverse("admin:connectors_customerlink_changelist"),
        reverse("admin:connectors_customerlink_change", args=[link.pk]),
        reverse("admin:connectors_syncrun_change", args=[run.pk]),
    ]


def test_personal_data_is_masked_on_every_page_without_the_right(
    organization: Organization, jane: Customer, pages: list[str]
) -> None:
    everyone = staff(organization, *LOOK, privacy.SEE, name="everyone")
    viewer = staff(organization, *LOOK, name="viewer")
    for page in pages:
        assert leaks(everyone.get(page).content), page
        answer = viewer.get(page)
        assert answer.status_code == 200
        assert leaks(answer.content) == [], page
    for client in (viewer, staff(organization, *LOOK, *EDIT, name="editor")):
        answer = client.get(address(jane))
        assert leaks(answer.content) == []
        assert b"j\xe2\x80\xa2\xe2\x80\xa2\xe2\x80\xa2@example.com" in answer.content


def test_a_masked_value_is_never_saved(organization: Organization, jane: Customer) -> None:
    client = staff(organization, *LOOK, *EDIT)
    form = client.get(address(jane)).context["adminform"].form
    assert not privacy.PERSONAL & form.fields.keys()
    before = {name: getattr(jane, name) for name in privacy.PERSONAL}
    forged = as_form(jane, name="Jane Roe", email="j•••@example.com", phone="", custom_fields="{}")
    assert client.post(address(jane), forged).status_code == 302
    jane.refresh_from_db()
    assert jane.name == "Jane Roe"
    assert {name: getattr(jane, name) for name in privacy.PERSONAL} == before


def test_a_stale_save_tells_nothing_personal(organization: Organization, jane: Customer) -> None:
    client = staff(organization, *LOOK, *EDIT)
    opened = as_form(jane, name="Jane Roe")
    editing.update(organization=organization, values={jane.pk: {"email": "jane.doe@example.net"}}, actor=COMMAND)
    answer = client.post(address(jane), opened)
    assert answer.status_code == 200
    assert leaks(answer.content) == []


def test_a_new_customer_may_be_given_personal_data(organization: Organization) -> None:
    client = staff(organization, *LOOK, *EDIT)
    values = {"organization": organization.pk, "name": "A", "email": "a@example.com", "custom_fields": "{}"}
    assert client.post(f"{LIST}add/", values).status_code == 302
    assert Customer.objects.get().email == "a@example.com"


def test_a_reveal_shows_the_page_once_and_is_written_down(organization: Organization, jane: Customer) -> None:
    client = staff(organization, *LOOK, *EDIT, REVEAL)
    reveal = address(jane, "reveal")
    assert f'action="{reveal}"' in client.get(address(jane)).content.decode()
    assert client.get(reveal).status_code == 405
    assert not Reveal.objects.exists()
    answer = client.post(reveal, {"reason": "customer on the phone"}, headers={"Request-Id": "req-54321"})
    assert answer.status_code == 200
    assert len(leaks(answer.content)) == len(SECRETS)
    assert "no-store" in answer["Cache-Control"]
    assert f'action="{address(jane)}"' in answer.content.decode(), "the form is saved where it always is"
    assert not privacy.PERSONAL & answer.context["adminform"].form.fields.keys()
    kept = Reveal.objects.get()
    assert (kept.customer, kept.user_name, kept.reason) == (jane, "Alex Clerk", "customer on the phone")
    assert kept.request_id == "req-54321"
    again = client.get(address(jane))
    assert leaks(again.content) == []
    assert "looked at the personal data" in again.content.decode()
    assert "customer on the phone" in again.content.decode()
    jane.refresh_from_db()
    assert jane.version == 2


def test_a_reveal_needs_its_right_and_the_own_organization(
    organization: Organization, other_organization: Organization, jane: Customer
) -> None:
    reveal = address(jane, "reveal")
    viewer = staff(organization, *LOOK, name="viewer")
    assert b"/reveal/" not in viewer.get(address(jane)).content
    assert viewer.post(reveal).status_code == 403
    assert staff(organization, REVEAL, name="nobody").post(reveal).status_code == 403
    assert staff(other_organization, *LOOK, REVEAL, name="stranger").post(reveal).status_code == 404
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.get(username="viewer"))
    assert strict.post(reveal).status_code == 403
    assert not Reveal.objects.exists()


def test_the_list_of_reveals_is_read_only_and_needs_its_right(organization: Organization, jane: Customer) -> None:
    staff(organization, *LOOK, REVEAL, name="curious").post(address(jane, "reveal"), {"reason": "because"})
    url = reverse("admin:customers_reveal_changelist")
    assert staff(organization, *LOOK, name="viewer").get(url).status_code == 403
    auditor = staff(organization, "customers.view_reveal", name="auditor")
    assert "because" in auditor.get(url).content.decode()
    one = reverse("admin:customers_reveal_change", args=[Reveal.objects.get().pk])
    assert auditor.get(one).status_code == 200
    assert auditor.post(one, {"reason": "x"}).status_code == 403


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("email", "jane@example.com", "j•••@example.com"),
        ("phone", "+493012345", "••• 45"),
        ("phone", "12345", "•••"),
        ("email", "", ""),
        ("custom_fields", {}, {}),
        ("custom_fields", {"a": 1}, "•••"),
        ("name", "Jane", "Jane"),
        ("address_country", "DE", "DE"),
    ],
)
def test_the_mask(name: str, value: Any, shown: Any) -> None:
    assert privacy.masked(name, value) == shown


def test_a_sentence_is_shown_without_what_it_quotes() -> None:
    told = privacy.redacted(
        'The "email" <jane@example.com> and +49 (30) 123-45 67 of Secret Street are wrong (code 422).',
        {"address_line1": "secret street", "name": "The"},
    )
    assert told == 'The "email" <•••> and ••• of ••• are wrong (code 422).'


# Groups


def in_group(organization: Organization, name: str) -> Client:
    user = User.objects.create_user(name.lower(), password="secret", is_staff=True)
    user.groups.add(Group.objects.get(name=name))
    organization.members.add(user)
    client = Client()
    client.force_login(user)
    return client


@pytest.mark.parametrize("name", GROUPS)
def test_a_ready_made_group_has_exactly_its_rights(db: None, name: str) -> None:
    rights = Group.objects.get(name=name).permissions.values_list("content_type__app_label", "codename")
    assert {f"{app}.{codename}" for app, codename in rights} == set(GROUPS[name])


def test_a_changed_group_is_left_alone_and_a_missing_one_made(db: None) -> None:
    editor = Group.objects.get(name="Editor")
    editor.permissions.set(Permission.objects.filter(codename="view_customer"))
    Group.objects.get(name="Viewer").delete()
    make_groups(using="default")
    assert [right.codename for right in editor.permissions.all()] == ["view_customer"]
    assert Group.objects.get(name="Viewer").permissions.count() == len(GROUPS["Viewer"])


def test_each_group_can_do_its_work_and_no_more(
    organization: Organization, jane: Customer, connect: Callable[..., Connection]
) -> None:
    shop = connect("links", name="Shop", direction="push")
    connection_page = reverse("admin:connectors_connection_change", args=[shop.pk])
    reached = {}
    for name in GROUPS:
        client = in_group(organization, name)
        page = client.get(address(jane))
        reached[name] = {
            "look": page.status_code == 200,
            "see": leaks(page.content) != [],
            "edit": b'name="_save"' in page.content,
            "archive": client.post(address(jane, "restore")).status_code == 302,
            "push": client.post(address(jane, "push"), {"connection": "0"}).status_code == 404,
            "runs": client.get(reverse("admin:connectors_syncrun_changelist")).status_code == 200,
            "connections": b'name="_save"' in client.get(connection_page).content,
            "keys": client.get(reverse("admin:connectors_apikey_changelist")).status_code == 200,
            "people": client.get(reverse("admin:auth_user_changelist")).status_code == 200,
            "reveals": client.get(reverse("admin:customers_reveal_changelist")).status_code == 200,
        }
    assert {name: {what for what, can in does.items() if can} for name, does in reached.items()} == {
        "Viewer": {"look"},
        "Editor": {"look", "see", "edit", "archive"},
        "Operator": {"look", "see", "edit", "archive", "push", "runs"},
        "Administrator": {
            *("look", "see", "edit", "archive", "push", "runs", "connections", "keys", "people", "reveals"),
        },
    }


def test_an_administrator_manages_the_own_people_and_gives_no_more_than_the_own_rights(
    organization: Organization, other_organization: Organization, admin_user: User
) -> None:
    admin_client = in_group(organization, "Administrator")
    people = {
        "colleague": (organization,),
        "stranger": (other_organization,),
        "both": (organization, other_organization),
    }
    made = {}
    for name, of in people.items():
        made[name] = User.objects.create_user(name, password="secret", is_staff=True)
        for one in of:
            one.members.add(made[name])
    organization.members.add(admin_user)
    powerful = User.objects.create_user("powerful", password="secret", is_staff=True)
    powerful.user_permissions.add(Permission.objects.get(codename="delete_customer"))
    organization.members.add(powerful)
    stronger = Group.objects.create(name="Stronger")
    stronger.permissions.add(Permission.objects.get(codename="delete_customer"))

    def page(user: User, what: str = "change") -> str:
        return reverse(f"admin:auth_user_{what}", args=[user.pk])

    for hidden in (made["stranger"], made["both"], admin_user):
        assert admin_client.get(page(hidden)).status_code in (302, 404)
    password = {"usable_password": "true", "password1": "another-secret-1", "password2": "another-secret-1"}
    for user in (made["stranger"], admin_user, powerful):
        admin_client.post(reverse("admin:auth_user_password_change", args=[user.pk]), password)
        before = user.password
        user.refresh_from_db()
        assert user.password == before
    assert b'name="_save"' not in admin_client.get(page(powerful)).content
    colleague = made["colleague"]
    viewer = Group.objects.get(name="Viewer")
    form = {"username": "colleague", "is_active": "on", "is_staff": "on", "is_superuser": "on"}
    form |= {"date_joined_0": "2026-01-01", "date_joined_1": "00:00:00"}
    refused = admin_client.post(page(colleague), {**form, "groups": [stronger.pk]})
    assert refused.status_code == 200
    assert "groups" in refused.context["adminform"].form.errors
    assert admin_client.post(page(colleague), {**form, "groups": [viewer.pk]}).status_code == 302
    colleague.refresh_from_db()
    assert not colleague.is_superuser
    assert list(colleague.groups.all()) == [viewer]
    new = {"username": "fresh", **password}
    assert admin_client.post("/admin/auth/user/add/", new).status_code == 302
    assert list(organization.members.filter(username="fresh").values_list("is_superuser", flat=True)) == [False]


def test_who_is_out_of_use_keeps_the_rights_that_nobody_weaker_may_take_over(organization: Organization) -> None:
    powerful = User.objects.create_user("powerful", password="secret", is_staff=True, is_active=False)
    powerful.user_permissions.add(Permission.objects.get(codename="delete_customer"))
    plain = User.objects.create_user("plain", password="secret", is_staff=True, is_active=False)
    organization.members.add(powerful, plain)
    client = in_group(organization, "Administrator")
    Group.objects.get(name="Administrator").permissions.add(Permission.objects.get(codename="delete_user"))
    password = {"usable_password": "true", "password1": "another-secret-1", "password2": "another-secret-1"}
    for user, changed in ((powerful, False), (plain, True)):
        client.post(reverse("admin:auth_user_password_change", args=[user.pk]), password)
        before = user.password
        user.refresh_from_db()
        assert (user.password != before) == changed
        page = client.get(reverse("admin:auth_user_change", args=[user.pk])).content
        assert (b'name="_save"' in page) == changed
        client.post(reverse("admin:auth_user_delete", args=[user.pk]), {"post": "yes"})
        assert User.objects.filter(pk=user.pk).exists() != changed


def test_groups_are_given_no_right_that_the_person_lacks(organization: Organization) -> None:
    held = ("auth.view_group", "auth.add_group", "auth.change_group", "auth.delete_group", "customers.view_customer")
    client = staff(organization, *held)
    own = Group.objects.create(name="Own")
    User.objects.get(username="clerk").groups.add(own)
    stronger = Group.objects.create(name="Stronger")
    look, erase = (Permission.objects.get(codename=name) for name in ("view_customer", "delete_customer"))
    stronger.permissions.add(erase)

    def page(group: Group) -> str:
        return reverse("admin:auth_group_change", args=[group.pk])

    refused = client.post(page(own), {"name": "Own", "permissions": [look.pk, erase.pk]})
    assert "permissions" in refused.context["adminform"].form.errors
    refused = client.post("/admin/auth/group/add/", {"name": "New", "permissions": [erase.pk]})
    assert "permissions" in refused.context["adminform"].form.errors
    assert client.post(page(own), {"name": "Own", "permissions": [look.pk]}).status_code == 302
    assert list(own.permissions.all()) == [look]
    assert b'name="_save"' not in client.get(page(stronger)).content
    assert client.post(page(stronger), {"name": "Weak"}).status_code == 403
    assert client.post(reverse("admin:auth_group_delete", args=[stronger.pk]), {"post": "yes"}).status_code == 403
    many = {"action": "delete_selected", "_selected_action": [own.pk, stronger.pk], "post": "yes"}
    client.post("/admin/auth/group/", many)
    assert set(Group.objects.filter(name__in=["Own", "Stronger"])) == {own, stronger}
    assert list(stronger.permissions.all()) == [erase]


def test_reveals_and_changes_stay_apart(organization: Organization, jane: Customer) -> None:
    staff(organization, *LOOK, REVEAL).post(address(jane, "reveal"))
    assert CustomerChange.objects.filter(customer=jane).count() == 2
