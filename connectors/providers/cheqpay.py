"""Cheqpay, a merchant's customers.

Documentation: https://docs.cheqpay.mx/api-reference/customer/create-or-update-a-customer (and
get-customer-by-external-id). A record's only id is the caller's own `externalId`: the link's `remote_id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

from django.db import transaction
from django.urls import re_path
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    extend_schema_field,
    extend_schema_serializer,
)
from rest_framework import serializers
from rest_framework.exceptions import NotAuthenticated, NotFound
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.inbound.authentication import BearerKey
from connectors.inbound.errors import Fault, dotted
from connectors.inbound.fields import Flag, Text, well_formed
from connectors.inbound.mirror import Mirror
from connectors.models import Connection, CustomerLink
from connectors.outbound import Session, raise_for_answer
from connectors.provider import Capabilities, Outgoing, Provider, Record, uuid_of
from connectors.sealing import Secret
from connectors.sync.receive import receive
from customers import editing
from customers.models import Customer
from customers.normalize import is_email, join_name, phone_key, split_name

# Dotted wire names and the customer's fields.
FIELD_OF = {
    "firstName": "first_name",
    "lastName": "last_name",
    "email": "email",
    "phoneNumber": "phone",
    "active": "is_active",
    "notificationOptions": "notify_email",
    "notificationOptions.notifyEmail": "notify_email",
    "notificationOptions.notifyPhone": "notify_phone",
}
NAMES = frozenset({"name", "first_name", "last_name"})
NOTICES = frozenset({"notify_email", "notify_phone"})
CODES = {
    400: "VALIDATION_ERROR",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    # Its 409 is a DUPLICATE, which this is not; of its 429 no code is published.
    409: "REQUEST_IN_PROGRESS",
    429: "TOO_MANY_REQUESTS",
}


def timestamp(moment: datetime) -> str:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def moment_of(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else None


def parts_of(customer: Customer) -> tuple[str, str]:
    """First and last name. The name is canonical: parts that do not make it up give way to a split of it."""
    first, last = customer.first_name, customer.last_name
    return (first, last) if first and join_name(first, last) == customer.name else split_name(customer.name)


@extend_schema_field({"pattern": "[0-9]"})
def dialable(text: str) -> None:
    if not phone_key(text):
        raise serializers.ValidationError("Give a phone number with country code, such as +1234567890.")


@extend_schema_serializer(component_name="CheqpayNotificationOptions")
class Notices(serializers.Serializer[Any]):
    notifyEmail = Flag(required=False)  # noqa: N815 # the wire name
    notifyPhone = Flag(required=False)  # noqa: N815 # the wire name


@extend_schema_serializer(component_name="CheqpayCustomer")
class Wire(serializers.Serializer[Any]):
    """The body of add-update. A key that is absent leaves what is stored; null empties it."""

    externalId = Text(max_length=255, trim_whitespace=False)  # noqa: N815 # the wire name
    firstName = Text(max_length=255)  # noqa: N815 # the wire name
    lastName = Text(max_length=255, required=False, allow_null=True, allow_blank=True)  # noqa: N815 # the wire name
    email = Text(max_length=254, required=False, allow_null=True, validators=[well_formed])
    phoneNumber = Text(  # noqa: N815 # the wire name
        max_length=64, required=False, allow_null=True, validators=[dialable]
    )
    active = Flag(required=False)
    notificationOptions = Notices(required=False)  # noqa: N815 # the wire name

    def show(self, customer: Customer, link: CustomerLink) -> dict[str, Any]:
        """The nine documented keys; null for what is not set."""
        first, last = parts_of(customer)
        return {
            "externalId": link.remote_id,
            "firstName": first,
            "lastName": last or None,
            "email": customer.email or None,
            "phoneNumber": customer.phone or None,
            "active": customer.is_active,
            "notificationOptions": {
                "notifyEmail": customer.notify_email,
                "notifyPhone": customer.notify_phone,
            },
            "createdAt": timestamp(link.remote_created_at or link.created_at),
            "updatedAt": timestamp(customer.updated_at),
        }


class Answered(Wire):
    """What Cheqpay answers: its own customers may hold what it would refuse from a caller."""

    email = Text(max_length=254, required=False, allow_null=True, allow_blank=True)
    phoneNumber = Text(  # noqa: N815 # the wire name
        max_length=64, required=False, allow_null=True, allow_blank=True
    )
    notificationOptions = Notices(required=False, allow_null=True)  # noqa: N815 # the wire name


def fields_of(given: Mapping[str, Any], *, before: Customer | None) -> dict[str, Any]:
    """What a validated document names, as the customer's fields; a missing last name is the stored one.

    Raises ValidationError when the two names together are too long.
    """
    first, last = given["firstName"], given.get("lastName") or ""
    if before is not None and "lastName" not in given:
        last = parts_of(before)[1]
    if before is not None and (first, last) == parts_of(before):
        # The same name again, perhaps only split for this format: what the hub has stays.
        values: dict[str, Any] = {name: getattr(before, name) for name in NAMES}
    else:
        values = {"name": join_name(first, last), "first_name": first, "last_name": last}
        if len(values["name"]) > editing.LENGTHS["name"]:
            culprit = "lastName" if given.get("lastName") else "firstName"
            too_long = f"Use at most {editing.LENGTHS['name']} characters for first and last name together."
            raise serializers.ValidationError({culprit: [too_long]})
    for wire in ("email", "phoneNumber"):
        if wire in given:
            values[FIELD_OF[wire]] = given[wire] or ""
    if "active" in given:
        values["is_active"] = given["active"]
    for wire, flag in (given.get("notificationOptions") or {}).items():
        values[FIELD_OF[f"notificationOptions.{wire}"]] = flag
    return values


WIRE = Wire()
ANSWERED = Answered()


@extend_schema_serializer(component_name="CheqpayNotificationsShown")
class NoticesShown(serializers.Serializer[Any]):
    notifyEmail = serializers.BooleanField()  # noqa: N815 # the wire name
    notifyPhone = serializers.BooleanField()  # noqa: N815 # the wire name


@extend_schema_serializer(component_name="CheqpayCustomer")
class Shown(serializers.Serializer[Any]):
    """A customer of a merchant."""

    externalId = serializers.CharField()  # noqa: N815 # the wire name
    firstName = serializers.CharField()  # noqa: N815 # the wire name
    lastName = serializers.CharField(allow_null=True)  # noqa: N815 # the wire name
    email = serializers.CharField(allow_null=True)
    phoneNumber = serializers.CharField(allow_null=True)  # noqa: N815 # the wire name
    active = serializers.BooleanField()
    notificationOptions = NoticesShown()  # noqa: N815 # the wire name
    createdAt = serializers.DateTimeField()  # noqa: N815 # the wire name
    updatedAt = serializers.DateTimeField()  # noqa: N815 # the wire name


@extend_schema_serializer(component_name="CheqpayErrorDetail")
class WrongField(serializers.Serializer[Any]):
    field = serializers.CharField()
    message = serializers.CharField()


@extend_schema_serializer(component_name="CheqpayErrorBody")
class RefusalBody(serializers.Serializer[Any]):
    code = serializers.ChoiceField(choices=[*CODES.values(), "INTERNAL_ERROR"])
    message = serializers.CharField()
    details = WrongField(many=True, required=False, help_text="Only where the request is not valid.")


@extend_schema_serializer(component_name="CheqpayError")
class Refusal(serializers.Serializer[Any]):
    error = RefusalBody()


GIVEN_EXAMPLE = {
    "externalId": "CUST-123",
    "firstName": "John",
    "lastName": "Doe",
    "email": "john.doe@example.com",
    "phoneNumber": "+1234567890",
    "active": True,
    "notificationOptions": {"notifyEmail": False, "notifyPhone": False},
}
ONE = OpenApiResponse(
    Shown,
    description="The customer.",
    examples=[
        OpenApiExample(
            "A customer",
            value={**GIVEN_EXAMPLE, "createdAt": "2024-03-20T10:00:00Z", "updatedAt": "2024-03-20T10:00:00Z"},
        )
    ],
)
REFUSED = {
    400: OpenApiResponse(
        Refusal,
        description="The request is not valid. Nothing was stored.",
        examples=[
            OpenApiExample(
                "A field is missing",
                value={
                    "error": {
                        "code": "VALIDATION_ERROR",
                        "message": "Invalid request parameters",
                        "details": [{"field": "firstName", "message": "This field is required."}],
                    }
                },
            )
        ],
    ),
    401: OpenApiResponse(Refusal, description="The API key or the merchant id is missing or not valid."),
    403: OpenApiResponse(Refusal, description="The API key lacks the scope."),
    500: OpenApiResponse(Refusal, description="Something went wrong in the hub."),
}


class MerchantKey(BearerKey):
    """`x-api-key: <key>`; the guides' `Authorization: Bearer <key>` where that is absent."""

    header = "x-api-key"
    keyword = ""

    def secret(self, request: Request) -> str:
        return super().secret(request) or BearerKey().secret(request)


class Customers(Mirror):
    provider = "cheqpay"
    authentication_classes = [MerchantKey]
    telling_headers = (*Mirror.telling_headers, "x-merchant-id")
    merchant: Connection

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        account = request.headers.get("x-merchant-id", "").strip()
        if not account:
            raise NotAuthenticated("Send the merchant id in the x-merchant-id header.")
        merchant = None if "\x00" in account else self.find_connection(account)
        if merchant is None:
            raise NotAuthenticated("The merchant in the x-merchant-id header is not known to this API key.")
        self.merchant = merchant

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        error: dict[str, Any] = {"code": CODES.get(fault.status, "INTERNAL_ERROR"), "message": fault.message}
        if fault.status == 400:
            if fault.fields:
                error["message"] = "Invalid request parameters"
            error["details"] = [{"field": dotted(path), "message": text} for path, text in fault.fields]
        return {"error": error}

    @extend_schema(
        operation_id="createOrUpdateCustomer",
        summary="Create or change a customer",
        description="A field that is left out stays as it is; null empties it.",
        request=Wire,
        responses={200: ONE, **REFUSED},
        examples=[OpenApiExample("A customer", value=GIVEN_EXAMPLE, request_only=True)],
    )
    def add_update(self, request: Request) -> Response:
        body: Any = request.data
        given = WIRE.run_validation(body)
        with transaction.atomic():
            # Locked, because what is absent from the body is completed from what is stored.
            before = self.locked(given["externalId"])
            [received] = receive(
                organization=self.organization,
                connection=self.merchant,
                records=[
                    Record(
                        values=fields_of(given, before=before),
                        document={name: value for name, value in body.items() if name in WIRE.fields},
                        remote_id=given["externalId"],
                    )
                ],
                actor=self.actor,
            )
        assert received.link is not None  # a connection was given
        return Response(WIRE.show(received.customer, received.link))

    def locked(self, external_id: str) -> Customer | None:
        links = CustomerLink.objects.filter(connection=self.merchant, remote_id=external_id)
        customer_id = links.values_list("customer_id", flat=True).first()
        if customer_id is None:
            return None
        return editing.lock(organization=self.organization, ids=[customer_id])[customer_id]

    @extend_schema(
        operation_id="getCustomerByExternalId",
        summary="Read a customer",
        parameters=[
            OpenApiParameter(
                "external_id", str, OpenApiParameter.PATH, description="The `externalId` of the merchant's system."
            )
        ],
        request=None,
        responses={200: ONE, **REFUSED, 404: OpenApiResponse(Refusal, description="There is no such customer.")},
    )
    def retrieve(self, request: Request, external_id: str = "add-update") -> Response:
        # An id may itself end in a slash; only when there is none such is the last slash part of the address.
        wanted = (external_id, external_id.removesuffix("/"))
        links = CustomerLink.objects.filter(connection=self.merchant, remote_id__in=wanted, deleted_at=None)
        found = {link.remote_id: link for link in links.select_related("customer")}
        for remote_id in wanted:
            if link := found.get(remote_id):
                return Response(WIRE.show(link.customer, link))
        raise NotFound


class Cheqpay(Provider):
    slug = "cheqpay"
    label = "Cheqpay"
    documentation = "https://docs.cheqpay.mx/api-reference/customer/create-or-update-a-customer"
    base_url = "https://prod.cheqpay.mx"
    account_label = "merchant id"
    fields = frozenset({*NAMES, "email", "phone", "is_active", *NOTICES})
    urls: ClassVar = (
        # Read, it is an external id like any other.
        re_path(r"^customers/add-update/?$", Customers.as_view({"post": "add_update", "get": "retrieve"})),
        re_path(r"^customers/(?P<external_id>(?s:.+))$", Customers.as_view({"get": "retrieve"})),
    )

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"x-api-key": Secret(credentials.get("api_key", "")), "x-merchant-id": account}

    def marker(self, document: Mapping[str, Any]) -> UUID | None:
        return uuid_of(document.get("externalId"))

    def capabilities(self, connection: Connection) -> Capabilities:
        return Capabilities(upsert_external_id=True, fetches=True)

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        first, last = parts_of(customer)
        # The first name is demanded every time.
        sent: dict[str, Any] = {"externalId": str(uid), "firstName": first}
        if fields & NAMES if fields is not None else last:
            sent["lastName"] = last or None
        if "email" in fields if fields is not None else customer.email:
            if customer.email and not is_email(customer.email):
                raise Rejected(
                    "Cheqpay takes only a well-formed e-mail address."
                    " Correct it, as in name@example.com, or remove it.",
                    field="email",
                    code="invalid",
                )
            sent["email"] = customer.email or None
        if "phone" in fields if fields is not None else customer.phone:
            if customer.phone and not phone_key(customer.phone):
                raise Rejected(
                    "Cheqpay takes only a phone number. Correct it, as in +1234567890, or remove it.",
                    field="phone",
                    code="invalid",
                )
            sent["phoneNumber"] = customer.phone or None
        if fields is None or "is_active" in fields:
            sent["active"] = customer.is_active
        if fields is None or fields & NOTICES:
            sent["notificationOptions"] = {
                "notifyEmail": customer.notify_email,
                "notifyPhone": customer.notify_phone,
            }
        return sent

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        return self.add_update(session, outgoing.document)

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        # A record that was not created from here has an id of its own.
        return self.add_update(session, {**outgoing.document, "externalId": outgoing.remote_id})

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        document = session.request("GET", f"/customers/{quote(remote_id, safe='')}").body
        if not isinstance(document, dict) or document.get("externalId") != remote_id:
            raise RetryLater("Cheqpay answered without the customer that was asked for.")
        try:
            return self.record(document)
        except serializers.ValidationError as error:
            raise Rejected(f"Cheqpay's record {remote_id} cannot be read: {error.detail}", code="unreadable") from None

    def add_update(self, session: Session, document: Mapping[str, Any]) -> Record:
        answer = session.send("POST", "/customers/add-update", json=document)
        try:
            raise_for_answer(answer)
        except Gone as error:
            raise ConnectionUnusable(
                "There is no Cheqpay API at this address. Check the base address.", status=error.status
            ) from None
        except Rejected as error:
            error.field, error.message = explained(answer.body, error.message)
            raise
        stored = answer.body
        if not isinstance(stored, dict) or stored.get("externalId") != document["externalId"]:
            raise OutcomeUnknown("Cheqpay answered without the customer that was sent.", status=answer.status)
        try:
            return self.record(stored)
        except serializers.ValidationError:
            # It is stored, however strange the answer: its values are unknown, its id is not.
            return Record(values={}, document=stored, remote_id=stored["externalId"])

    def record(self, document: Mapping[str, Any]) -> Record:
        """Raises ValidationError when the hub cannot hold what the document says."""
        return Record(
            values=fields_of(ANSWERED.run_validation(document), before=None),
            document=document,
            remote_id=document["externalId"],
            created_at=moment_of(document.get("createdAt")),
        )


def explained(body: Any, message: str) -> tuple[str, str]:
    """The customer field that a refusal names, "" if none, and its words."""
    error = body.get("error") if isinstance(body, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    named = [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []
    words = "; ".join(d["message"] for d in named if isinstance(d.get("message"), str))
    fields = (FIELD_OF.get(str(d.get("field")), "") for d in named)
    return next(filter(None, fields), ""), words[:300] or message
