"""What Commenda's endpoints answer, for the reference: the shapes that `wire.show` and the viewset make."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema_serializer
from rest_framework import serializers

from connectors.inbound.totals import TOLD
from customers.countries import ALPHA2


@extend_schema_serializer(component_name="CommendaAddress")
class Address(serializers.Serializer[Any]):
    line1 = serializers.CharField(allow_null=True)
    line2 = serializers.CharField(allow_null=True)
    city = serializers.CharField(allow_null=True)
    state = serializers.CharField(allow_null=True)
    postal_code = serializers.CharField(allow_null=True)
    country = serializers.ChoiceField(choices=sorted(ALPHA2), allow_null=True)


@extend_schema_serializer(component_name="CommendaExemptions")
class Exemptions(serializers.Serializer[Any]):
    """The hub keeps no exemption certificates: there are none."""

    total_certificates = serializers.IntegerField()
    total_exempted_states = serializers.IntegerField()
    active_exemptions_count = serializers.IntegerField()
    inactive_exemptions_count = serializers.IntegerField()
    expired_exemptions_count = serializers.IntegerField()
    non_expired_exemptions_count = serializers.IntegerField()
    certificate_types = serializers.ListField(child=serializers.CharField())
    exempted_states = serializers.ListField(child=serializers.CharField())


@extend_schema_serializer(component_name="CommendaListedCustomer")
class Listed(serializers.Serializer[Any]):
    """A customer in a list; the last two keys are there when `extend` names them."""

    id = serializers.CharField()
    corporation_id = serializers.CharField()
    name = serializers.CharField()
    email = serializers.CharField(allow_null=True)
    created_at = serializers.IntegerField(help_text="Seconds since 1970.")
    external_id = serializers.CharField(allow_null=True)
    source_platform = serializers.CharField(allow_null=True)
    source_platform_id = serializers.CharField(allow_null=True)
    business_identification_number = serializers.CharField(allow_null=True)
    shipping_address = Address(allow_null=True, required=False)
    exemption_metadata = Exemptions(required=False)


@extend_schema_serializer(component_name="CommendaCustomer")
class Shown(Listed):
    """A customer."""

    shipping_address = Address(allow_null=True)


@extend_schema_serializer(component_name="CommendaCustomerAnswer")
class CustomerAnswer(Shown):
    """The customer, flat as the prose shows it and under `data` as the generated schema does."""

    data = Shown()  # type: ignore[assignment] # hides Serializer.data, which is not used to describe
    message = serializers.CharField()


@extend_schema_serializer(component_name="CommendaCustomers")
class Customers(serializers.Serializer[Any]):
    customers = Listed(many=True)
    total_customers = serializers.IntegerField(min_value=0, help_text=TOLD)
    cursor = serializers.CharField(allow_null=True)


@extend_schema_serializer(component_name="CommendaCustomerList")
class CustomersAnswer(Customers):
    """The list, flat and under `data`."""

    data = Customers()  # type: ignore[assignment] # as above
    message = serializers.CharField()


@extend_schema_serializer(component_name="CommendaWrongField")
class WrongField(serializers.Serializer[Any]):
    details = serializers.CharField()
    pointer = serializers.CharField(allow_blank=True)


@extend_schema_serializer(component_name="CommendaErrorBody")
class RefusalBody(serializers.Serializer[Any]):
    type = serializers.CharField()
    doc_url = serializers.URLField()
    title = serializers.CharField()
    detail = serializers.CharField()
    status = serializers.IntegerField(min_value=400, max_value=599)
    instance = serializers.CharField()
    Errors = WrongField(many=True)


@extend_schema_serializer(component_name="CommendaError")
class Refusal(serializers.Serializer[Any]):
    error = RefusalBody()


ADDRESS_EXAMPLE = {
    "line1": "123 Main St",
    "line2": "Suite 100",
    "city": "San Francisco",
    "state": "CA",
    "postal_code": "94105",
    "country": "US",
}
CREATION_EXAMPLE = OpenApiExample(
    "A customer",
    value={
        "corporation_id": "corp_123",
        "name": "Acme Corporation",
        "email": "contact@acme.com",
        "external_id": "ext_456",
        "shipping_address": ADDRESS_EXAMPLE,
    },
    request_only=True,
)
CHANGE_EXAMPLE = OpenApiExample(
    "Another name and address",
    value={"name": "Acme Corporation", "shipping_address": ADDRESS_EXAMPLE},
    request_only=True,
)
LISTED_EXAMPLE = {
    "id": "b6d009b0-d174-463f-b030-94643c28e209",
    "corporation_id": "corp_123",
    "name": "Acme Corporation",
    "email": "contact@acme.com",
    "created_at": 1706000000,
    "external_id": "ext_456",
    "source_platform": None,
    "source_platform_id": None,
    "business_identification_number": None,
}
SHOWN_EXAMPLE = {**LISTED_EXAMPLE, "shipping_address": ADDRESS_EXAMPLE}
PAGE_EXAMPLE = {"customers": [LISTED_EXAMPLE], "total_customers": 1, "cursor": None}
PAGE = OpenApiResponse(
    CustomersAnswer,
    description="One page. `cursor` is null on the last.",
    examples=[
        OpenApiExample(
            "A page",
            value={**PAGE_EXAMPLE, "data": PAGE_EXAMPLE, "message": "Successfully fetched customers."},
        )
    ],
)
CUSTOMER_ID = OpenApiParameter(
    "customer_id", str, OpenApiParameter.PATH, description="The `id` of an earlier answer, a UUID."
)
EXTEND = OpenApiParameter(
    "extend",
    {"type": "array", "items": {"type": "string", "enum": ["shipping_address", "exemption_metadata", ""]}},
    explode=False,
    description="More keys to show, with commas between them.",
)
DELETED = {204: OpenApiResponse(description="Deleted.")}
REFUSED = {
    400: OpenApiResponse(
        Refusal,
        description="The request is not valid. Nothing was stored.",
        examples=[
            OpenApiExample(
                "The name is too short",
                value={
                    "error": {
                        "type": "CLIENT_INVALID_REQUEST_BODY",
                        "doc_url": "https://docs.commenda.io/engine/indirect-tax/customers/customers-POST",
                        "title": "Failed to validate the request body",
                        "detail": "name: Ensure this field has at least 3 characters.",
                        "status": 400,
                        "instance": "/api/v1/customers",
                        "Errors": [
                            {"details": "Ensure this field has at least 3 characters.", "pointer": "/name"},
                        ],
                    }
                },
            )
        ],
    ),
    401: OpenApiResponse(Refusal, description="The API key is missing or not valid."),
    403: OpenApiResponse(Refusal, description="The API key lacks the scope."),
    404: OpenApiResponse(Refusal, description="There is no such customer, or no such corporation."),
    500: OpenApiResponse(Refusal, description="Something went wrong in the hub."),
}


def answered(message: str) -> dict[int, OpenApiResponse]:
    """The customer, and the message that comes with it."""
    example = {**SHOWN_EXAMPLE, "data": SHOWN_EXAMPLE, "message": message}
    return {
        200: OpenApiResponse(
            CustomerAnswer, description="The customer.", examples=[OpenApiExample("A customer", value=example)]
        )
    }
