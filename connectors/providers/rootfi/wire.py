"""A customer in RootFi's words, read and written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from drf_spectacular.utils import extend_schema_serializer
from rest_framework import serializers

from connectors.inbound import fields
from connectors.inbound.quick import Quick
from connectors.models import CustomerLink
from connectors.provider import Record
from customers import editing, jsontext
from customers.models import Customer

ACTIVE, ARCHIVED, UNKNOWN = STATUSES = ("ACTIVE", "ARCHIVED", "UNKNOWN")
TEXTS = {"name": "name", "email": "email", "phone": "phone", "currency_id": "currency"}
PARTS = {
    "street": "address_line1",
    "locality": "address_line2",
    "city": "address_city",
    "state": "address_state",
    "pincode": "address_postal_code",
    "country": "address_country",
}
# The hub's name of a field to its path in RootFi's document.
PATHS: dict[str, tuple[str, ...]] = {
    **{hub: (wire,) for wire, hub in TEXTS.items()},
    **{hub: ("address", wire) for wire, hub in PARTS.items()},
    "is_active": ("status",),
}
FIELDS = frozenset(PATHS)
MAX_ID = 2**63 - 1
NUMBERED = re.compile(r"_[0-9]+$")


def timestamp(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def unique_id(platform_id: str) -> str:
    """The platform's own id in the one that RootFi composes of it: `123456` in `123456_1`."""
    return NUMBERED.sub("", platform_id) or platform_id


def updated(link: CustomerLink) -> datetime:
    return max(link.updated_at, link.customer.updated_at)


def data_hash(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(jsontext.dumps(document, option=jsontext.SORT_KEYS)).hexdigest()


class Text(fields.Text):
    """A text that may be absent, of any length: what a customer may have is judged by `customers.editing`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"required": False, "allow_null": True, "allow_blank": True, **options})


@extend_schema_serializer(component_name="RootFiAddress")
class Address(Quick):
    rootfi_id = fields.Whole(required=False, allow_null=True, min_value=0, max_value=MAX_ID)
    platform_id = Text(max_length=255)
    street = Text()
    locality = Text()
    city = Text()
    state = Text()
    pincode = Text()
    country = Text()


@extend_schema_serializer(component_name="RootFiCustomer")
class Wire(Quick):
    """The writable keys of one customer. Any others are ignored: the documented answer has several more."""

    platform_id = Text(max_length=255)
    name = fields.Text()
    email = Text()
    phone = Text()
    currency_id = Text()
    status = serializers.ChoiceField(choices=STATUSES, required=False, allow_null=True)
    created_at = serializers.DateTimeField(required=False, allow_null=True, default_timezone=UTC)
    updated_at = serializers.DateTimeField(required=False, allow_null=True, default_timezone=UTC)
    address = Address(required=False, allow_null=True)

    def read(self, document: Any) -> Record:
        """Document -> Record, its `remote_id` the platform_id. Raises ValidationError by RootFi's names."""
        if isinstance(document, dict) and document.get("name") is None:
            document = {key: value for key, value in document.items() if key != "name"}
        given: dict[str, Any] = self.run_validation(document)
        values = {hub: given[wire] or "" for wire, hub in TEXTS.items() if wire in given}
        if "address" in given:
            parts = given["address"]
            if parts is None:
                parts = dict.fromkeys(PARTS)
            values |= {hub: parts[wire] or "" for wire, hub in PARTS.items() if wire in parts}
        if given.get("status"):
            values["is_active"] = given["status"] != ARCHIVED
        if found := editing.problems(values, creating=True):
            raise serializers.ValidationError(_by_path(found))
        kept = dict(document)
        # Their null says nothing; every other null is an echo that the next answer owes.
        for name in ("status", "created_at", "updated_at", "platform_id"):
            if not given.get(name):
                kept.pop(name, None)
        for name in ("created_at", "updated_at"):
            if name in kept:
                kept[name] = timestamp(given[name])
        return Record(
            values=editing.Checked(values),
            document=kept,
            remote_id=given.get("platform_id") or None,
            created_at=given.get("created_at"),
        )

    def show(self, link: CustomerLink, *, company_id: int) -> dict[str, Any]:
        """Link (its customer loaded) -> the documented keys."""
        customer, raw = link.customer, link.remote_data
        created_at = timestamp(link.remote_created_at or link.created_at)
        return {
            "rootfi_id": link.pk,
            "rootfi_deleted_at": timestamp(link.deleted_at or customer.archived_at),
            "rootfi_created_at": timestamp(link.created_at),
            "rootfi_updated_at": timestamp(updated(link)),
            "rootfi_company_id": company_id,
            "platform_id": link.remote_id,
            "platform_unique_id": link.remote_id and unique_id(link.remote_id),
            "name": customer.name,
            "email": customer.email or _nothing(raw, "email"),
            "phone": customer.phone or _nothing(raw, "phone"),
            "currency_id": customer.currency or _nothing(raw, "currency_id"),
            "status": self.status_of(customer, raw),
            "updated_at": raw.get("updated_at") or timestamp(link.created_at),
            "created_at": created_at,
            "address": self.address_of(customer, link),
        }

    def status_of(self, customer: Customer, raw: Mapping[str, Any]) -> str:
        if not customer.is_active:
            return ARCHIVED
        return UNKNOWN if raw.get("status") == UNKNOWN else ACTIVE

    def address_of(self, customer: Customer, link: CustomerLink) -> dict[str, Any] | None:
        if not any(getattr(customer, hub) for hub in PARTS.values()):
            return None
        sent = link.remote_data.get("address")
        raw: Mapping[str, Any] = sent if isinstance(sent, dict) else {}
        given = raw.get("rootfi_id")
        return {
            "rootfi_id": link.pk if given is None else int(given),
            "platform_id": raw.get("platform_id") or f"CONTACTS_{link.uid}_ADDRESS",
            **{wire: getattr(customer, hub) or _nothing(raw, wire) for wire, hub in PARTS.items()},
        }


WIRE = Wire()


def write(customer: Customer, *, fields: frozenset[str] | None) -> dict[str, Any]:
    """The item that creates this customer, or with `fields` the one that changes those. It has a name."""
    item: dict[str, Any] = {"name": customer.name}
    for wire, hub in TEXTS.items():
        if fields is None or hub in fields:
            item[wire] = getattr(customer, hub)
    if fields is None or "is_active" in fields:
        item["status"] = ACTIVE if customer.is_active else ARCHIVED
    parts = {wire: getattr(customer, hub) for wire, hub in PARTS.items()}
    # Whole, because the document does not say whether an address is merged or replaced.
    if any(parts.values()) if fields is None else fields & set(PARTS.values()):
        item["address"] = parts
    return item


def _nothing(raw: Mapping[str, Any], name: str) -> str | None:
    """How an empty text is shown: null to those who sent null or nothing, "" to the others."""
    return None if raw.get(name) is None else ""


def _by_path(found: Mapping[str, list[str]]) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for name, messages in found.items():
        *outer, last = PATHS[name]
        place = errors
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = messages
    return errors
