"""Commenda's customer, read and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from drf_spectacular.utils import extend_schema_field, extend_schema_serializer
from rest_framework import serializers

from connectors.inbound.fields import Text, well_formed
from connectors.models import CustomerLink
from customers.countries import ALPHA2
from customers.models import Customer

DOCUMENTATION = "https://docs.commenda.io/engine/indirect-tax/customers/customers-POST"
PARTS = ("line1", "line2", "city", "state", "postal_code", "country")
SHIPPING = frozenset(f"shipping_address_{part}" for part in PARTS)
# The spelling of the generated schema, beside the one of the prose.
SPELLINGS = {"address_line_1": "line1", "address_line_2": "line2", "address_line_3": "line2"}
NUMBER = "business_identification_number"
EXEMPTIONS = {
    "total_certificates": 0,
    "total_exempted_states": 0,
    "active_exemptions_count": 0,
    "inactive_exemptions_count": 0,
    "expired_exemptions_count": 0,
    "non_expired_exemptions_count": 0,
    "certificate_types": [],
    "exempted_states": [],
}


@extend_schema_field({"enum": sorted(ALPHA2)})
def alpha2(text: str) -> None:
    if text not in ALPHA2:
        raise serializers.ValidationError("Give the country as its ISO 3166-1 alpha-2 code, such as US.")


class Address(serializers.Serializer[Any]):
    """A shipping address in either spelling, as Commenda answers it."""

    line1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    line2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_1 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_2 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    address_line_3 = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    city = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    state = Text(max_length=255, required=False, allow_null=True, allow_blank=True)
    postal_code = Text(max_length=32, required=False, allow_null=True, allow_blank=True)
    country = Text(max_length=64, required=False, allow_null=True, allow_blank=True)

    def validate(self, attrs: dict[str, Any]) -> dict[str, str]:
        """The six parts; an address is read as a whole, so what it does not name is empty."""
        second = attrs.get("line2") or attrs.get("address_line_2") or ""
        third = attrs.get("address_line_3") or ""
        parts = {
            **{part: attrs.get(part) or "" for part in PARTS},
            "line1": attrs.get("line1") or attrs.get("address_line_1") or "",
            "line2": f"{second}, {third}" if second and third else second or third,
        }
        if len(parts["line2"]) > 255:
            raise serializers.ValidationError({"address_line_3": ["Use at most 255 characters with line 2."]})
        return parts


@extend_schema_serializer(component_name="CommendaAddress")
class GivenAddress(Address):
    """A shipping address in either spelling."""

    country = Text(validators=[alpha2])


class Answered(serializers.Serializer[Any]):
    """What Commenda answers: customers synced from elsewhere may hold what it would refuse from a caller."""

    name = Text(max_length=255)
    email = Text(max_length=254, required=False, allow_null=True, allow_blank=True)
    shipping_address = Address(required=False, allow_null=True)


@extend_schema_serializer(component_name="CommendaCustomerChange")
class Change(serializers.Serializer[Any]):
    """The body of an update. A key that is absent leaves what is stored; null empties it."""

    name = Text(min_length=3, max_length=255, required=False)
    email = Text(max_length=254, required=False, allow_null=True, validators=[well_formed])
    shipping_address = GivenAddress(required=False, allow_null=True)
    business_identification_number = Text(max_length=255, required=False, allow_null=True, allow_blank=True)


@extend_schema_serializer(component_name="CommendaCustomer")
class Creation(Change):
    """The body of a create."""

    name = Text(min_length=3, max_length=255)
    corporation_id = Text(trim_whitespace=False)
    external_id = Text(max_length=255, required=False, allow_null=True, trim_whitespace=False)


ANSWERED, CHANGE, CREATION = Answered(), Change(), Creation()


def documented(document: Any, serializer: serializers.Serializer[Any]) -> dict[str, Any]:
    """The document without the keys that Commenda does not have."""
    return {name: value for name, value in document.items() if name in serializer.fields}


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a validated document names, as the customer's fields."""
    values: dict[str, Any] = {}
    if "name" in given:
        values["name"] = given["name"]
    if "email" in given:
        values["email"] = given["email"] or ""
    if "shipping_address" in given:
        address = given["shipping_address"] or {}
        values |= {f"shipping_address_{part}": address.get(part, "") for part in PARTS}
    return values


def address_of(customer: Customer) -> dict[str, str | None] | None:
    """The documented address; null when the customer has none. The country is its code or null."""
    parts = {part: getattr(customer, f"shipping_address_{part}") or None for part in PARTS}
    if not any(parts.values()):
        return None
    return parts | {"country": customer.shipping_address_country_code or None}


def show(link: CustomerLink, leading: CustomerLink | None, *, extend: Collection[str]) -> dict[str, Any]:
    """Link (customer and connection loaded) and the customer's leading link -> the documented object."""
    customer = link.customer
    source = leading if leading and leading.connection_id != link.connection_id else None
    number = customer.custom_fields.get(NUMBER)
    shown: dict[str, Any] = {
        "id": str(link.uid),
        "corporation_id": link.connection.account,
        "name": customer.name,
        "email": customer.email or None,
        "created_at": int(link.created_at.timestamp()),
        "external_id": link.remote_id,
        "source_platform": source.connection.provider if source else None,
        "source_platform_id": source.remote_id if source else None,
        NUMBER: number if isinstance(number, str) else None,
    }
    if "shipping_address" in extend:
        shown["shipping_address"] = address_of(customer)
    if "exemption_metadata" in extend:
        shown["exemption_metadata"] = EXEMPTIONS
    return shown
