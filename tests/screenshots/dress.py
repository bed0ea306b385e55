"""Puts into the quickstart's own examples what real use leaves: a few things to see to. Tells the ids as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db.models import F
from django.utils import timezone

from connectors.models import Conflict, Connection, CustomerLink
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization

THERE = "+1 202-555-0199"


def main() -> None:
    demo = Organization.objects.get(slug="demo")
    pushed = CustomerLink.objects.filter(connection__organization=demo, connection__direction__in=Connection.PUSHING)
    _until(lambda: not pushed.filter(pushed_version__lt=F("needed_version"), next_attempt_at__isnull=False).exists())
    now = timezone.now()
    links = Connection.objects.get(organization=demo, name="links")
    commenda = Connection.objects.get(organization=demo, name="commenda")
    sam = Actor(kind="user", id="2", name="Sam", message="as on the invoice")

    def one(number: int) -> Customer:
        return Customer.objects.get(organization=demo, name__endswith=f" {number:02}")

    def link(number: int, connection: Connection, **fields: Any) -> CustomerLink:
        found = CustomerLink.objects.get(connection=connection, customer=one(number), is_duplicate=False)
        CustomerLink.objects.filter(pk=found.pk).update(next_attempt_at=None, **fields)
        return found

    for number in (4, 9):
        phone = f"+1 202-555-{200 + number:04}"
        parked = link(
            number, commenda, state="conflict",
            conflicts={"phone": {"base": one(number).phone, "here": phone, "there": THERE, "at": now.isoformat()}},
        )  # fmt: skip
        editing.update(organization=demo, values={parked.customer_id: {"phone": phone}}, actor=sam)
        CustomerLink.objects.filter(pk=parked.pk).update(next_attempt_at=None)
        Conflict.objects.create(
            organization=demo, connection=commenda, link=parked, field="phone", base=one(number).phone,
            here=phone, there=THERE, outcome="waiting", at=now - timedelta(minutes=7 * number),
        )  # fmt: skip
    link(7, links, state="uncertain", error="No answer came in time.", needed_version=2)
    edited = one(3)
    Connection.objects.filter(pk=commenda.pk).update(state="paused", state_reason="Stocktaking (Sam)")
    changed = {"phone": "+1 202-555-0177", "address_line1": "30 Example Street"}
    editing.update(organization=demo, values={edited.pk: changed}, actor=sam)
    time.sleep(4)  # the worker sends what it may
    CustomerLink.objects.filter(customer=edited, connection=commenda).update(next_attempt_at=None)
    Connection.objects.filter(pk=commenda.pk).update(state="active", state_reason="")
    told = {
        "demo": demo.pk,
        "rejected": str(one(25).pk),
        "edited": str(edited.pk),
        "connection": links.pk,
        "preview": commenda.pk,
    }
    sys.stdout.write(json.dumps(told))


def _until(there: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not there():
        assert time.monotonic() < ends, "The examples are not sent in time."
        time.sleep(0.2)
