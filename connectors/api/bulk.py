"""The endpoint that writes many customers in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from drf_spectacular.utils import OpenApiExample, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import problems
from connectors.api.problems import Refusal
from connectors.api.resource import Nothing, Resource, Strict, parse_ids
from connectors.api.writing import (
    CREATE,
    FAILED,
    UPDATE,
    UPSERT,
    Item,
    Outcome,
    Path,
    Values,
    invalid,
    unknown_customer,
    write,
)
from connectors.inbound.errors import fault_of
from connectors.inbound.fields import Text
from connectors.models import REMOTE_ID_LENGTH, Connection
from connectors.sync.receive import CREATED, UNCHANGED, UPDATED
from customers.ids import parse_public_id

MAX_ITEMS = 500
PER_ITEM, ALL_OR_NOTHING = "per_item", "all_or_nothing"


class BulkItem(Strict):
    """Which customer, and what of it to set. A new one has no id; a source_id makes it known to that connection."""

    action = serializers.ChoiceField([CREATE, UPDATE, UPSERT])
    id = Text(required=False, allow_null=True, help_text="The customer's id, to update it.")
    connection_id = Text(required=False, allow_null=True, help_text="The connection that has the source_id.")
    source_id = Text(required=False, allow_null=True, max_length=REMOTE_ID_LENGTH, trim_whitespace=False)
    if_match = serializers.RegexField(
        r'^(?:(?:W/)?"v[0-9]{1,9}"|v[0-9]{1,9}|\*)$',
        required=False,
        allow_null=True,
        error_messages={"invalid": "Send the etag as you read it, such as v3."},
    )
    values = Values()

    def validate(self, given: dict[str, Any]) -> dict[str, Any]:
        has_id = given.get("id") is not None
        named = [name for name in ("connection_id", "source_id") if given.get(name) is not None]
        if len(named) == 1:
            missing = "source_id" if named == ["connection_id"] else "connection_id"
            raise serializers.ValidationError({missing: ["connection_id and source_id go together."]})
        if given["action"] == UPDATE:
            if has_id == bool(named):
                raise serializers.ValidationError({"id": ["Send either id, or connection_id and source_id."]})
        elif has_id:
            raise serializers.ValidationError({"id": ["The hub gives the id. Send update to change this customer."]})
        elif given["action"] == UPSERT and not named:
            raise serializers.ValidationError({"source_id": ["Send connection_id and source_id."]})
        elif given["action"] == CREATE and given.get("if_match"):
            raise serializers.ValidationError({"if_match": ["A new customer has no version yet."]})
        return given


class BulkBody(Strict):
    mode = serializers.ChoiceField([PER_ITEM, ALL_OR_NOTHING], default=PER_ITEM)
    items = serializers.ListField(
        max_length=MAX_ITEMS, error_messages={"max_length": f"Send at most {MAX_ITEMS} items in one call."}
    )


ITEM = BulkItem()


class BulkBodyShown(BulkBody):
    items = serializers.ListField(child=BulkItem(), max_length=MAX_ITEMS)


class ItemErrorShown(serializers.Serializer[Any]):
    code = serializers.ChoiceField(
        ["validation_failed", "not_found", "conflict", "version_conflict", "version_required"]
    )
    message = serializers.CharField()
    errors = serializers.ListField(  # type: ignore[assignment] # hides Serializer.errors, which describing never uses
        child=serializers.DictField(child=serializers.CharField()), help_text="pointer, code and message of each."
    )


class ItemShown(serializers.Serializer[Any]):
    index = serializers.IntegerField(help_text="The item's place in the request.")
    status = serializers.ChoiceField([CREATED, UPDATED, UNCHANGED, FAILED])
    id = serializers.CharField(allow_null=True)
    etag = serializers.CharField(allow_null=True, help_text="The version that is stored, for if_match.")
    error = ItemErrorShown(allow_null=True)


class BulkShown(serializers.Serializer[Any]):
    succeeded = serializers.IntegerField()
    failed = serializers.IntegerField()
    items = ItemShown(many=True)


class BulkAnswer(serializers.Serializer[Any]):
    data = BulkShown()  # type: ignore[assignment] # hides Serializer.data, as above


class Bulk(Resource):
    scopes = {"create": "customers:write"}

    @extend_schema(
        operation_id="bulkWriteCustomers",
        summary="Create, change or upsert up to 500 customers",
        description="With `per_item` each item that can be stored is, and the answer tells of each. With "
        "`all_or_nothing` one that cannot keeps all out, and the answer is a problem that points to each such item. "
        "A customer may be in one item only.",
        request=BulkBodyShown,
        responses={200: BulkAnswer},
        examples=[
            OpenApiExample(
                "One of each",
                value={
                    "mode": "per_item",
                    "items": [
                        {"action": "create", "values": {"name": "Ada Lovelace", "email": "ada@example.com"}},
                        {
                            "action": "update",
                            "id": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                            "if_match": "v3",
                            "values": {"phone": "+4930123456"},
                        },
                        {
                            "action": "upsert",
                            "connection_id": "con_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                            "source_id": "sf_98765",
                            "values": {"name": "Acme Corp"},
                        },
                    ],
                },
                request_only=True,
            ),
            OpenApiExample(
                "One failed",
                value={
                    "data": {
                        "succeeded": 1,
                        "failed": 1,
                        "items": [
                            {
                                "index": 0,
                                "status": "created",
                                "id": "cust_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                                "etag": "v1",
                                "error": None,
                            },
                            {
                                "index": 1,
                                "status": "failed",
                                "id": None,
                                "etag": None,
                                "error": {
                                    "code": "validation_failed",
                                    "message": "1 field needs attention.",
                                    "errors": [
                                        {
                                            "pointer": "/items/1/values/email",
                                            "code": "invalid",
                                            "message": "Give an e-mail address, such as name@example.com.",
                                        }
                                    ],
                                },
                            },
                        ],
                    }
                },
                response_only=True,
            ),
        ],
    )
    def create(self, request: Request) -> Response:
        self.read_query(Nothing)
        body = self.read_body(BulkBody)
        whole = body["mode"] == ALL_OR_NOTHING
        items = self.read_items(body["items"])
        outcomes = write(organization=self.organization, items=items, actor=self.actor, whole=whole)
        failed = [(position, outcome.refusal) for position, outcome in enumerate(outcomes) if outcome.refusal]
        if whole and failed:
            raise Refusal(
                "validation_failed",
                f"{len(failed)} of {len(items)} items cannot be stored.",
                errors=[
                    error
                    for position, refusal in failed
                    for error in refusal.errors or [(("items", position), refusal.code, refusal.detail)]
                ],
            )
        shown = [_shown(position, outcome) for position, outcome in enumerate(outcomes)]
        return Response({"data": {"succeeded": len(shown) - len(failed), "failed": len(failed), "items": shown}})

    def read_items(self, items: Sequence[Any]) -> list[Item | Refusal]:
        """Each item as it is to be written, or why it cannot be read."""
        read: list[dict[str, Any] | Refusal] = []
        for position, item in enumerate(items):
            try:
                read.append(ITEM.run_validation(item))
            except serializers.ValidationError as error:
                fault = fault_of(error)
                read.append(
                    invalid(
                        (("items", position, *path), "required" if path in fault.missing else "invalid", text)
                        for path, text in fault.fields
                    )
                )
        named = {text for given in read if isinstance(given, dict) and (text := given.get("connection_id"))}
        uids = parse_ids("con", named)
        found = {one.uid: one for one in self.connections(uids.values())} if uids else {}
        connections = {text: found[uid] for text, uid in uids.items() if uid in found}
        return [
            given
            if isinstance(given, Refusal)
            else _item(given, ("items", position), connections, strict=self.key.strict)
            for position, given in enumerate(read)
        ]

    def connections(self, uids: Iterable[UUID]) -> QuerySet[Connection]:
        return Connection.objects.filter(organization=self.organization, uid__in=uids)


def _item(given: Mapping[str, Any], at: Path, connections: Mapping[str, Connection], *, strict: bool) -> Item | Refusal:
    if strict and given["action"] == UPDATE and not given.get("if_match"):
        missing = "Send the etag that you read, or *."
        return Refusal("version_required", missing, errors=[((*at, "if_match"), "version_required", missing)])
    connection = connections.get(given.get("connection_id") or "")
    if given.get("connection_id") and connection is None:
        unknown = "There is no such connection."
        return Refusal("not_found", unknown, errors=[((*at, "connection_id"), "not_found", unknown)])
    uid = parse_public_id("cust", given["id"]) if given.get("id") is not None else None
    if given.get("id") is not None and uid is None:
        return unknown_customer((*at, "id"))
    version = re.search(r"\d+", given.get("if_match") or "")
    return Item(
        action=given["action"],
        values=given["values"],
        customer_id=uid,
        connection=connection,
        source_id=given.get("source_id"),
        expected=int(version[0]) if version else None,
        at=at,
        values_at=(*at, "values"),
    )


def _shown(position: int, outcome: Outcome) -> dict[str, Any]:
    customer, refusal = outcome.customer, outcome.refusal
    error = None
    if refusal is not None:
        error = {
            "code": refusal.code,
            "message": refusal.detail,
            "errors": [
                {"pointer": problems.pointer(path), "code": code, "message": message}
                for path, code, message in refusal.errors
            ],
        }
    return {
        "index": position,
        "status": outcome.status,
        "id": customer.public_id if customer else None,
        "etag": f"v{customer.version}" if customer else None,
        "error": error,
    }
