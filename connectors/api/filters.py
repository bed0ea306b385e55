"""What the list of customers can be narrowed by, and the cursor that leads through it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import orjson
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.db.models.functions import Coalesce
from rest_framework import serializers

from connectors.api import cursors
from connectors.inbound.fields import Text
from connectors.inbound.totals import FEW
from connectors.models import REMOTE_ID_LENGTH, Connection, CustomerLink
from connectors.providers.links import ListQuery, Part, by_id
from customers.editing import LENGTHS
from customers.ids import parse_public_id
from customers.models import Customer, Organization
from customers.normalize import email_key, name_key, phone_key

# So many customers are read in the order of a list before another index is asked.
STRETCH = 10_000
FILTERS = (
    "email",
    "phone",
    "name",
    "q",
    "updated_since",
    "source_system",
    "source_id",
    "is_active",
    "include_archived",
)


class Moment(serializers.DateTimeField):
    """RFC 3339. A "+" that was not percent-encoded arrives as a blank."""

    def to_internal_value(self, value: Any) -> datetime:
        try:
            moment = datetime.fromisoformat(re.sub(r"(T\S+) (\d\d:\d\d)$", r"\1+\2", str(value)))
            if moment.tzinfo is not None:
                return moment.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise serializers.ValidationError("Give a time with its zone, such as 2026-01-31T08:00:00Z.")


class Expand(serializers.ChoiceField):
    """What an answer may show besides what is documented."""

    def __init__(self) -> None:
        super().__init__(
            choices=["links"], required=False, help_text="`links`: each customer with what every system knows of it."
        )


class Expanding(serializers.Serializer[Any]):
    expand = Expand()


class Filters(ListQuery):
    """What a list can be narrowed by, all of it at once, and the cursor."""

    cursor = serializers.CharField(
        required=False,
        allow_blank=True,
        trim_whitespace=False,
        help_text="Empty for the first page, then the next_cursor of the answer before; with the same filters.",
    )
    email = Text(required=False, max_length=LENGTHS["email"], help_text="The e-mail address, in any case.")
    phone = Text(
        required=False, max_length=LENGTHS["phone"], trim_whitespace=False, help_text="The number, however written."
    )
    name = Text(required=False, max_length=LENGTHS["name"], help_text="How the name begins, in any case.")
    q = Text(
        required=False,
        max_length=LENGTHS["name"],
        trim_whitespace=False,
        help_text="A customer's id, or an e-mail address, a phone number or how a name begins.",
    )
    updated_since = Moment(required=False, help_text="Changed at this time or later.")
    source_system = Text(required=False, max_length=32, help_text="Known to a system that speaks this API.")
    source_id = Text(
        required=False,
        max_length=REMOTE_ID_LENGTH,
        trim_whitespace=False,
        help_text="Known under this id to a system, or to source_system.",
    )
    is_active = serializers.BooleanField(required=False)
    include_archived = serializers.BooleanField(default=False)
    expand = Expand()


def select(
    own: QuerySet[Customer], query: Mapping[str, Any], *, organization: Organization
) -> tuple[QuerySet[Customer], Part]:
    """Those of the organization's customers (`own`, or of these the ones behind a cursor) that the filters leave, and
    how to read them. Raises ValidationError.
    """
    part: Part = by_id
    rows = own.filter(merged_into=None)
    if not query["include_archived"]:
        rows = rows.filter(archived_at=None)
    if "is_active" in query:
        rows = rows.filter(is_active=query["is_active"])
    if "updated_since" in query:
        rows = rows.filter(updated_at__gte=query["updated_since"])
        of_them = Customer.objects.filter(organization=organization, updated_at__gte=query["updated_since"])
        # The list is in another order than this index: of few the ids are read first.
        few = list(of_them.order_by("-updated_at", "-id").values_list("pk", flat=True)[: FEW + 1])
        if len(few) <= FEW:
            rows = rows.filter(pk__in=few)
        else:
            part = partial(scattered, own)
    if "email" in query:
        rows = rows.filter(email_key=_email(query["email"]))
    if "phone" in query:
        key = _phone(query["phone"], organization)
        if not key:
            raise serializers.ValidationError({"phone": ["Give a phone number, such as +1234567890."]})
        rows = rows.filter(phone_key=key)
    if "name" in query:
        key = _name(query["name"])
        if not key:
            raise serializers.ValidationError({"name": ["Give how the name begins."]})
        rows = rows.filter(name_key__startswith=key)
    if "q" in query:
        rows = rows.filter(_meant(query["q"], organization))
    if "source_system" in query or "source_id" in query:
        connections = Connection.objects.filter(organization=organization)
        if "source_system" in query:
            connections = connections.filter(provider=query["source_system"])
        links = CustomerLink.objects.filter(
            connection__in=list(connections.values_list("pk", flat=True)), deleted_at=None
        )
        if "source_id" in query:
            known = links.filter(remote_id=query["source_id"]).values_list("customer_id", flat=True)
            rows = rows.filter(pk__in=list(known))
        else:
            rows = rows.filter(Exists(links.filter(customer=OuterRef("pk"))))
    return rows, part


def scattered(own: QuerySet[Customer], rows: QuerySet[Customer], first: int, number: int) -> QuerySet[Customer]:
    """A `Part` for rows that an index of another order finds: of `own` by id they may be few, or all at the end.

    They are read by id for a stretch. Where that leaves the page short, all that the other index names are sorted.
    """
    edge = list(own.order_by("id").values_list("pk", flat=True)[STRETCH : STRETCH + 1])
    near = rows.filter(pk__lt=edge[0]) if edge else rows
    ids = list(near.order_by("id").values_list("pk", flat=True)[first : first + number])
    if edge and len(ids) < number:
        # Not by the column itself: PostgreSQL would read by id then, because it takes rows to be spread evenly.
        ids = list(rows.order_by(Coalesce("pk", "pk")).values_list("pk", flat=True)[first : first + number])
    return rows.filter(pk__in=ids).order_by("id")


def _meant(text: str, organization: Organization) -> Q:
    """The customer with this id, or else those with this e-mail, this phone or this beginning of a name.

    Each part has an index; the middle of a name is not looked into.
    """
    if (uid := parse_public_id("cust", text.strip())) is not None:
        merged = Customer.objects.filter(organization=organization, pk=uid, merged_into__isnull=False)
        return Q(pk__in=[uid, *merged.values_list("merged_into", flat=True)])
    found = Q(pk__in=[])
    if name := _name(text):
        found |= Q(name_key__startswith=name)
    if email := _email(text):
        found |= Q(email_key=email)
    if phone := _phone(text, organization):
        found |= Q(phone_key=phone)
    return found


def _email(text: str) -> str:
    return email_key(text)[: LENGTHS["email_key"]]


def _name(text: str) -> str:
    return name_key(text)[: LENGTHS["name_key"]]


def _phone(text: str, organization: Organization) -> str:
    # A "+" that was not percent-encoded arrives as a blank.
    text = f"+{text[1:]}" if text.startswith(" ") else text
    return phone_key(text, country=organization.country)[: LENGTHS["phone_key"]]


def write_cursor(last: UUID, query: Mapping[str, str], *, organization: Organization) -> str:
    """The place after this customer, in the list that the filters of this query string leave."""
    return cursors.write(last.bytes, of=_list(query), organization_id=organization.pk)


def read_cursor(cursor: str, query: Mapping[str, str], *, organization: Organization) -> UUID:
    """The customer that `write_cursor` was given. Raises ValidationError, also for a cursor of other filters."""
    place = cursors.read(cursor, of=_list(query), organization_id=organization.pk)
    if len(place) != 16:
        raise serializers.ValidationError({"cursor": ["Send the next_cursor of the answer before."]})
    return UUID(bytes=place)


def _list(query: Mapping[str, str]) -> str:
    return "customers" + orjson.dumps([[name, query.get(name)] for name in FILTERS]).decode()
