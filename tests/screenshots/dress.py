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

THERE = "shop@example.com"


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

    Connection.objects.filter(pk=commenda.pk).update(state="paused", state_reason="Stocktaking (Sam)")
    for number in (4, 9):
        parked, before = one(number), one(number).email
        email = f"office{number:02}@example.com"
        editing.update(organization=demo, values={parked.pk: {"email": email}}, actor=sam)
        changed = {"email": {"base": before, "here": email, "there": THERE, "at": now.isoformat()}}
        Conflict.objects.create(
            organization=demo, connection=commenda, link=link(number, commenda, state="conflict", conflicts=changed),
            field="email", base=before, here=email, there=THERE, outcome="waiting", at=now - timedelta(minutes=number),
        )  # fmt: skip
    link(7, links, state="uncertain", error="No answer came in time.", needed_version=2)
    edited = one(3)
    values = {"email": "orders@example.com", "shipping_address_line1": "30 Example Street"}
    editing.update(organization=demo, values={edited.pk: values}, actor=sam)
    time.sleep(4)  # the worker sends what it may
    link(3, commenda)
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
