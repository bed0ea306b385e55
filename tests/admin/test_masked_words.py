"""What systems and people wrote in their own words, as those see it who may not see personal data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from connectors.admin import checking
from connectors.models import Connection, CustomerLink, Issue, SyncRun
from connectors.sync.check import Check, Finding, Sample
from customers import editing, privacy
from customers.editing import Actor
from customers.models import Customer, Organization
from tests.admin.test_privacy import COMMAND, LOOK, address, jane, leaks  # noqa: F401 # jane is a fixture
from tests.customers.test_customer_admin import LIST, staff

WORK = (
    *(*LOOK, "connectors.push_customerlink", "connectors.pull_connection", "connectors.view_issue"),
    *("connectors.view_conflict", "connectors.change_issue", "customers.change_customer"),
)
OLD = "jane.doe@old.example"


@pytest.fixture
def shop(connect: Callable[..., Connection]) -> Connection:
    return connect("links", name="Shop", direction="push")


@pytest.fixture
def link(jane: Customer, shop: Connection) -> CustomerLink:  # noqa: F811 # the fixture
    """Jane is refused in words that quote her, among them an address that she had when it was sent."""
    now = timezone.now()
    return CustomerLink.objects.create(
        customer=jane,
        connection=shop,
        state="rejected",
        error=f"{OLD} at {jane.address_line1} in Hiddenburg is not valid, nor are +49301234567 and DE123456789",
        error_field="email",
        fingerprint="f1",
        needed_version=2,
        created_at=now,
        updated_at=now,
    )


def change(kind: str, pk: object) -> str:
    return reverse(f"admin:connectors_{kind}_change", args=[pk])


def told(client: Client, page: str, *, post: dict[str, str] | None = None) -> list[str]:
    answer = client.get(page) if post is None else client.post(page, post)
    assert answer.status_code == 200, page
    return [*leaks(answer.content), *([OLD] if OLD in answer.content.decode() else [])]


@pytest.fixture
def pages(link: CustomerLink, shop: Connection) -> dict[str, str]:
    now = timezone.now()
    Issue.objects.create(
        organization=shop.organization, connection=shop, kind=Issue.Kind.REJECTED, fingerprint="f1",
        message=link.error, first_at=now, last_at=now,
    )  # fmt: skip
    run = SyncRun.objects.create(
        public_id="b" * 16, organization=shop.organization, connection=shop, kind="push", actor_kind="user",
        actor_name="x", refused=5, planned=5, started_at=now, state="failed",
        error=f"It stopped: {OLD} and +49301234567",
    )  # fmt: skip
    CustomerLink.objects.filter(pk=link.pk).update(updated_at=timezone.now())
    return {
        "first steps": reverse("admin:connectors_connection_first_steps", args=[shop.pk]),
        "connection": change("connection", shop.pk),
        "run": change("syncrun", run.pk),
        "runs": reverse("admin:connectors_syncrun_changelist"),
        "needs you": reverse("admin:connectors_customerlink_needs_you"),
        "resolve": reverse("admin:connectors_customerlink_resolve", args=[link.pk]),
        "link": change("customerlink", link.pk),
        "links": reverse("admin:connectors_customerlink_changelist"),
        "rejected": f"{LIST}?system={shop.pk}&state=rejected",
        "customer": reverse("admin:customers_customer_change", args=[link.customer_id]),
        "compare": reverse("admin:customers_customer_preview", args=[link.customer_id]),
        "dashboard": reverse("admin:index"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *(
            "first steps",
            "connection",
            "run",
            "runs",
            "rejected",
            "needs you",
            "resolve",
            "link",
            "links",
            "customer",
            "compare",
            "dashboard",
        ),
    ],
)
def test_no_page_repeats_what_a_refusal_quotes(organization: Organization, pages: dict[str, str], name: str) -> None:
    assert told(staff(organization, *WORK), pages[name]) == []


def test_what_people_wrote_is_told_without_what_is_personal(organization: Organization, jane: Customer) -> None:  # noqa: F811
    editing.note(customer=jane, text=f"Asked us to call +49 301 234567, lives in {jane.address_line1}", actor=COMMAND)
    said = Actor(kind="user", name="Anna", message=f"was {OLD}")
    editing.update(organization=organization, values={jane.pk: {"name": "Jane Roe"}}, actor=said)
    viewer, everyone = staff(organization, *LOOK), staff(organization, *LOOK, privacy.SEE, name="everyone")
    changes = reverse("admin:customers_customerchange_changelist")
    one = reverse("admin:customers_customerchange_change", args=[jane.changes.latest("version").pk])
    for page in (address(jane), changes, one):
        assert told(viewer, page) == []
        assert OLD in told(everyone, page)
    assert "Asked us to call" in viewer.get(address(jane)).content.decode()


def test_what_a_check_found_is_told_without_what_is_personal(jane: Customer) -> None:  # noqa: F811
    found = Check()
    words = f"{OLD} of {jane.address_line1} is not valid."
    found.add(Finding.REFUSED, Sample(customer=jane, reason=words))
    found.refusals["email", f"{OLD} is not valid."] += 2
    [blind], [seeing] = checking.rows(found, clear=False), checking.rows(found, clear=True)
    assert (blind.samples[0][3], seeing.samples[0][3]) == ("••• of ••• is not valid.", words)
    assert checking.refusals(found, clear=False) == [("••• is not valid.", 2)]


def test_no_page_before_pushing_again_repeats_it(organization: Organization, link: CustomerLink) -> None:
    again = reverse("admin:connectors_customerlink_push_again")
    worker = staff(organization, *WORK)
    assert told(worker, again, post={"connection": str(link.connection_id), "cause": "f1"}) == []
