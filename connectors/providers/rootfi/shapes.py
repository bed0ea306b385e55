"""What RootFi's endpoints answer and which filters they take, for the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema_serializer
from rest_framework import serializers

from connectors.inbound import fields
from connectors.inbound.totals import TOLD
from connectors.providers.rootfi.listing import Choice, Field, KeptTime, Number, Time
from connectors.providers.rootfi.wire import MAX_ID, STATUSES, Wire


@extend_schema_serializer(component_name="RootFiBatch")
class Batch(serializers.Serializer[Any]):
    """Customers of one company."""

    company_id = fields.Whole(min_value=0, max_value=MAX_ID)
    data = serializers.ListField(  # type: ignore[assignment] # hides Serializer.data, which is not used to describe
        child=Wire(), min_length=1, max_length=500
    )
    run_async = serializers.BooleanField(
        required=False, allow_null=True, help_text="Answer at once; the `sync_id` tells later what became of it."
    )


@extend_schema_serializer(component_name="RootFiAddress")
class Address(serializers.Serializer[Any]):
    rootfi_id = serializers.IntegerField(min_value=0, max_value=MAX_ID)
    platform_id = serializers.CharField()
    street = serializers.CharField(allow_null=True)
    locality = serializers.CharField(allow_null=True)
    city = serializers.CharField(allow_null=True)
    state = serializers.CharField(allow_null=True)
    pincode = serializers.CharField(allow_null=True)
    country = serializers.CharField(allow_null=True)


@extend_schema_serializer(component_name="RootFiCustomer")
class Shown(serializers.Serializer[Any]):
    """A customer of a company."""

    rootfi_id = serializers.IntegerField(min_value=1, max_value=MAX_ID)
    rootfi_deleted_at = serializers.DateTimeField(allow_null=True)
    rootfi_created_at = serializers.DateTimeField()
    rootfi_updated_at = serializers.DateTimeField()
    rootfi_company_id = serializers.IntegerField(min_value=0, max_value=MAX_ID)
    platform_id = serializers.CharField(allow_null=True)
    platform_unique_id = serializers.CharField(allow_null=True)
    name = serializers.CharField()
    email = serializers.CharField(allow_null=True)
    phone = serializers.CharField(allow_null=True)
    currency_id = serializers.CharField(allow_null=True)
    status = serializers.ChoiceField(choices=STATUSES)
    updated_at = serializers.DateTimeField()
    created_at = serializers.DateTimeField()
    address = Address(allow_null=True)


@extend_schema_serializer(component_name="RootFiListedCustomer")
class Listed(Shown):
    """A customer in a list; the last two keys are there when `select` names them."""

    raw_data = serializers.DictField(required=False)
    data_hash = serializers.CharField(required=False)


@extend_schema_serializer(component_name="RootFiBatchAnswer")
class BatchAnswer(serializers.Serializer[Any]):
    data = Shown(many=True)  # type: ignore[assignment] # as above
    sync_id = serializers.CharField()


@extend_schema_serializer(component_name="RootFiCustomerList")
class CustomerList(serializers.Serializer[Any]):
    data = Listed(many=True)  # type: ignore[assignment] # as above
    prev = serializers.CharField(allow_null=True)
    next = serializers.CharField(allow_null=True)
    total_count = serializers.IntegerField(allow_null=True, min_value=0, help_text=f"With `return_count=true`. {TOLD}")


@extend_schema_serializer(component_name="RootFiSync")
class Sync(serializers.Serializer[Any]):
    rootfi_id = serializers.IntegerField(min_value=1, max_value=MAX_ID)
    rootfi_company_id = serializers.IntegerField(min_value=0, max_value=MAX_ID)
    rootfi_created_at = serializers.DateTimeField()
    rootfi_updated_at = serializers.DateTimeField()
    start_time = serializers.DateTimeField(allow_null=True)
    end_time = serializers.DateTimeField(allow_null=True)
    integration_type = serializers.CharField()
    full_sync = serializers.BooleanField()
    sync_type = serializers.ChoiceField(choices=["MANUAL"])
    config_mode = serializers.ChoiceField(choices=["CREATE", "READ"])
    sync_data_models = serializers.ListField(child=serializers.CharField())
    sync_id = serializers.CharField()
    total_count = serializers.IntegerField(min_value=0)
    success_count = serializers.IntegerField(min_value=0)
    failed_count = serializers.IntegerField(min_value=0)
    running_count = serializers.IntegerField(min_value=0)
    pending_count = serializers.IntegerField(min_value=0)
    status = serializers.ChoiceField(choices=["PENDING", "RUNNING", "SUCCESS", "PARTIAL", "FAILED"])


@extend_schema_serializer(component_name="RootFiSyncAnswer")
class SyncAnswer(serializers.Serializer[Any]):
    data = Sync()  # type: ignore[assignment] # as above


@extend_schema_serializer(component_name="RootFiSyncList")
class SyncList(serializers.Serializer[Any]):
    data = Sync(many=True)  # type: ignore[assignment] # as above
    prev = serializers.URLField(allow_null=True)
    next = serializers.URLField(allow_null=True)


@extend_schema_serializer(component_name="RootFiErrorBody")
class RefusalBody(serializers.Serializer[Any]):
    code = serializers.ChoiceField(choices=["missing-params", "invalid-params", "operation-denied", "unknown-error"])
    message = serializers.CharField()
    platform_error = serializers.CharField(allow_blank=True)


@extend_schema_serializer(component_name="RootFiError")
class Refusal(serializers.Serializer[Any]):
    error = RefusalBody()


CUSTOMER_EXAMPLE = {
    "name": "John Doe",
    "email": "",
    "phone": "1234567890",
    "currency_id": "1234567890",
    "status": "ACTIVE",
    "updated_at": "2024-01-22T05:07:31.465Z",
    "created_at": "2024-01-22T05:07:31.465Z",
    "address": {
        "rootfi_id": 278264,
        "platform_id": "CONTACTS_1af68894-ea9f-ee11-be36-7c1e520f50bc_ADDRESS",
        "street": "123 Main Street",
        "locality": "Main Street",
        "city": "New York",
        "state": "New York",
        "pincode": "123456",
        "country": "USA",
    },
}
SHOWN_EXAMPLE = {
    "rootfi_id": 157,
    "rootfi_deleted_at": None,
    "rootfi_created_at": "2024-01-22T05:07:31.465Z",
    "rootfi_updated_at": "2024-01-22T05:07:31.000Z",
    "rootfi_company_id": 1089,
    "platform_id": "123456_1",
    "platform_unique_id": "123456",
    **CUSTOMER_EXAMPLE,
}
SYNC_EXAMPLE = {
    "rootfi_id": 12,
    "rootfi_company_id": 1089,
    "rootfi_created_at": "2024-01-22T05:07:31.465Z",
    "rootfi_updated_at": "2024-01-22T05:07:31.465Z",
    "start_time": "2024-01-22T05:07:31.465Z",
    "end_time": "2024-01-22T05:07:31.465Z",
    "integration_type": "SHOPIFY",
    "full_sync": True,
    "sync_type": "MANUAL",
    "config_mode": "READ",
    "sync_data_models": ["ECOMMERCE_CUSTOMERS"],
    "sync_id": "1234567890",
    "total_count": 1,
    "success_count": 1,
    "failed_count": 0,
    "running_count": 0,
    "pending_count": 0,
    "status": "SUCCESS",
}
BATCH_EXAMPLE = OpenApiExample(
    "One customer", value={"company_id": 1089, "data": [CUSTOMER_EXAMPLE]}, request_only=True
)
ORDER_EXAMPLE = OpenApiExample(
    "A full sync",
    value={
        "company_id": 1089,
        "integration_type": "SHOPIFY",
        "full_sync": True,
        "data_models_to_sync": ["ECOMMERCE_CUSTOMERS"],
    },
    request_only=True,
)
STORED = OpenApiResponse(
    BatchAnswer,
    description="The customers in the order in which they were sent; none yet with `run_async`.",
    examples=[OpenApiExample("One customer", value={"data": [SHOWN_EXAMPLE], "sync_id": "1234567890"})],
)
CUSTOMERS = OpenApiResponse(
    CustomerList,
    description="One page.",
    examples=[
        OpenApiExample("A page", value={"data": [SHOWN_EXAMPLE], "prev": None, "next": None, "total_count": None})
    ],
)
ORDERED = OpenApiResponse(
    SyncAnswer, description="The sync.", examples=[OpenApiExample("A sync", value={"data": SYNC_EXAMPLE})]
)
SYNCS = OpenApiResponse(
    SyncList,
    description="One page, newest first. `prev` and `next` are addresses.",
    examples=[OpenApiExample("A page", value={"data": [SYNC_EXAMPLE], "prev": None, "next": None})],
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
                        "code": "missing-params",
                        "message": "Missing required field: data[0].name.",
                        "platform_error": "",
                    }
                },
            )
        ],
    ),
    401: OpenApiResponse(Refusal, description="The API key is missing or not valid."),
    403: OpenApiResponse(Refusal, description="The API key lacks the scope."),
    500: OpenApiResponse(Refusal, description="Something went wrong in the hub."),
}
UNKNOWN = {404: OpenApiResponse(Refusal, description="The API key reaches no company with this company_id.")}


def query(
    fields: Mapping[str, Field], *, sortable: Sequence[str] = (), names: Sequence[str] = ()
) -> list[OpenApiParameter]:
    """The parameters of a list with these fields; `names` are those that only some lists have."""
    options: dict[str, tuple[dict[str, Any], str]] = {
        "limit": ({"type": "integer", "minimum": 1, "maximum": 500, "default": 100}, "At most so many."),
        "next": ({"type": "string"}, "The `next` of an earlier answer."),
        "prev": ({"type": "string"}, "The `prev` of an earlier answer."),
        "select": (
            {"type": "array", "items": {"type": "string", "enum": ["raw_data", "data_hash", ""]}},
            "More keys to show, with commas between them.",
        ),
        "include_deleted_records": ({"type": "boolean", "default": False}, "Show deleted ones, too."),
        "return_count": ({"type": "boolean", "default": False}, "Count all that fit, as `total_count`."),
    }
    # As the document has it, null is as good as nothing; of a text or a list it is a word like any other.
    null = {"type": "string", "enum": ["null", ""]}
    options |= {
        name: ({"anyOf": [schema, null]}, text)
        for name, (schema, text) in options.items()
        if schema["type"] in ("integer", "boolean")
    }
    return [
        *(
            OpenApiParameter(name, schema, explode=False if schema.get("type") == "array" else None, description=text)
            for name, (schema, text) in options.items()
            if name in ("limit", "next", "prev", *names)
        ),
        *(
            OpenApiParameter(
                f"{name}[{operator}]",
                values_of(field) if operator == "in" else value_of(field, operator),
                description="Values with commas between them." if operator == "in" else "",
            )
            for name, field in fields.items()
            for operator in field.operators
        ),
        *(OpenApiParameter(f"sort[{name}]", {"type": "string", "enum": ["ASC", "DESC"]}) for name in sortable),
    ]


def values_of(field: Field) -> dict[str, Any]:
    """What a filter on the field by several values takes: a text with commas in it."""
    match field:
        case Number():
            return {"type": "string", "pattern": "^ *[0-9]{1,18} *(, *[0-9]{1,18} *)*$"}
        case Choice():
            one = "|".join(field.choices)
            return {"type": "string", "pattern": f"^ *({one}) *(, *({one}) *)*$"}
    return {"type": "string"}


def value_of(field: Field, operator: str) -> dict[str, Any]:
    """What a filter on the field compares with."""
    match field:
        case Number():
            return {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
        case Time():
            moment = {"type": "string", "format": "date-time"}
            if isinstance(field, KeptTime):
                return moment
            return {"anyOf": [moment, {"type": "string", "enum": ["null"]}]} if operator in ("eq", "neq") else moment
        case Choice():
            return {"type": "string", "enum": list(field.choices)}
    return {"type": "string"}
