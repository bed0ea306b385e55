"""Archiving tells beforehand what it deletes in other systems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.urls import reverse
from django.utils import timezone

from connectors.models import Connection, CustomerLink
from connectors.providers import PROVIDERS
from customers.models import Organization
from tests.connectors.test_admin import new_customer
from tests.customers.test_customer_admin import EDIT, address, staff

DELETING = sorted(slug for slug, one in PROVIDERS.items() if one.capabilities(Connection(provider=slug)).deletes)


@pytest.mark.parametrize("policy", Connection.ArchivePolicy.values)
def test_the_pages_name_the_systems_that_archiving_deletes_from(
    organization: Organization, connect: Callable[..., Connection], policy: str
) -> None:
    shop = connect(DELETING[0], name="Shop", direction="push", archive_policy=policy)
    gone = connect("links", name="Gone", account="2", direction="push")
    customer, now = new_customer(organization), timezone.now()
    common = {"customer": customer, "needed_version": 1, "pushed_version": 1, "created_at": now, "updated_at": now}
    CustomerLink.objects.create(connection=shop, remote_id="r1", **common)
    asks = CustomerLink.objects.create(connection=gone, remote_id="r2", deleted_at=now, **common)
    client = staff(organization, *EDIT, "connectors.view_customerlink", "connectors.push_customerlink")
    told = policy == Connection.ArchivePolicy.DELETE
    assert ("Archiving deletes the record in Shop." in client.get(address(customer)).content.decode()) == told
    resolve = client.get(reverse("admin:connectors_customerlink_resolve", args=[asks.pk])).content.decode()
    assert "Archive the customer" in resolve
    assert ("Archiving deletes the record in Shop." in resolve) == told


def test_a_system_that_calls_the_hub_is_not_opened_by_the_first_steps(
    organization: Organization, connect: Callable[..., Connection]
) -> None:
    caller = connect("links", name="Caller", direction="calls_us")
    client = staff(organization, "connectors.view_connection", "connectors.change_connection")
    for name in ("direction", "match"):
        page = reverse(f"admin:connectors_connection_{name}", args=[caller.pk])
        assert client.post(page, {"direction": "push", "create_policy": "automatic"}).status_code == 302
    caller.refresh_from_db()
    assert (caller.direction, caller.setup) == ("calls_us", {})
