"""Lists answer whatever their address holds: a link may be cut off, mistyped, or name what is gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.auth.models import User
from django.urls import reverse

from connectors.models import Connection
from customers.models import Organization
from tests.connectors.test_admin import new_customer
from tests.customers.test_customer_admin import LIST, staff

LOOK = (
    *(
        "customers.view_customer",
        "customers.view_customerchange",
        "customers.view_reveal",
        "customers.export_customer",
        "connectors.push_customerlink",
    ),
    *(f"connectors.view_{name}" for name in ("connection", "customerlink", "syncrun", "issue", "conflict", "apikey")),
)
LISTS = (
    *("customers_customer", "customers_customerchange", "customers_reveal", "connectors_connection"),
    *("connectors_customerlink", "connectors_syncrun", "connectors_issue", "connectors_conflict", "connectors_apikey"),
)


@pytest.mark.parametrize(
    "query",
    [
        *("organization=abc", "organization=99999999999999999999999", "connection=abc"),
        *("connection=99999999999999999999999", "updated=9999-12-31T23:59:59-23:59", "updated=0001-01-01"),
        *(
            "country=%00",
            "q=%00",
            "field=%00",
            "cause=%00&kind=rejected",
            "q=a%00@b",
            "actor_kind=%00",
            "system=abc",
            "customer__id__exact=abc",
            "p=abc",
        ),
    ],
)
def test_a_list_answers_whatever_its_address_holds(
    organization: Organization, other_organization: Organization, connect: Callable[..., Connection], query: str
) -> None:
    shop = connect("links", name="Shop", direction="push")
    new_customer(organization)
    client = staff(organization, *LOOK)
    other_organization.members.add(User.objects.get(username="clerk"))
    steps = reverse("admin:connectors_connection_first_steps", args=[shop.pk])
    pages = [reverse(f"admin:{name}_changelist") for name in LISTS]
    for page in (*pages, f"{LIST}export/csv/", reverse("admin:connectors_customerlink_needs_you"), steps):
        answer = client.get(f"{page}?{query}")
        if answer.streaming:
            b"".join(answer.streaming_content)
        assert answer.status_code in (200, 302, 400), page


def test_a_list_filtered_by_what_is_not_offered_is_empty(
    organization: Organization, other_organization: Organization, connect: Callable[..., Connection]
) -> None:
    shop = connect("links", name="Shop", direction="push")
    new_customer(organization)
    client = staff(organization, *LOOK)
    other_organization.members.add(User.objects.get(username="clerk"))
    for query, number in ((f"organization={organization.pk}", 1), ("organization=0", 0), ("", 1)):
        assert client.get(f"{LIST}?{query}").context["cl"].result_count == number
    page = reverse("admin:connectors_connection_changelist")
    assert client.get(f"{page}?organization={shop.organization_id}").context["cl"].result_count == 1
