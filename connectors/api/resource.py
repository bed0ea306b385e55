"""What all of the hub's own endpoints share: scopes, strict bodies and queries, problem documents, versions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar
from uuid import UUID

from rest_framework import exceptions, serializers
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.api import problems
from connectors.api.problems import Refusal
from connectors.inbound.errors import fault_of
from connectors.inbound.mirror import Mirror, reader
from connectors.inbound.quick import Quick
from customers.editing import StaleVersion
from customers.ids import parse_public_id

_ETAG = re.compile(r'(?:W/)?"v(\d{1,9})"')


class Strict(Quick):
    """A body or query of which every name is known: an unknown one is refused, with the name that was likely meant."""

    strict = True

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := [name for name in data if name not in self.fields]):
            raise serializers.ValidationError({name: [_unknown(name, self.fields)] for name in unknown})
        return super().to_internal_value(data)

    usually = to_internal_value


class Nothing(Strict):
    """No name is known here."""


def _unknown(name: str, known: Iterable[str]) -> str:
    [*close] = difflib.get_close_matches(str(name), [*known], n=1)
    return f"There is no field {name}." + (f" Did you mean {close[0]}?" if close else "")


class Resource(Mirror):
    """A viewset of the hub's own endpoints. `scopes` names for each action what the key must be allowed."""

    provider = "links"
    scopes: ClassVar[Mapping[str, str]]

    def scope(self, request: Request) -> str:
        return self.scopes.get(self.action or "", "customers:read")

    def handle_exception(self, exc: Exception) -> Response:
        request_id = getattr(self.request, "request_id", "")
        if isinstance(exc, StaleVersion):
            exc = problems.stale(exc)
        if isinstance(exc, Refusal):
            shown = problems.body(exc.code, exc.detail, request_id=request_id, errors=exc.errors, **exc.more)
            response = Response(shown, status=shown["status"], headers=exc.headers)
        else:
            fault = fault_of(exc)
            shown = problems.of_fault(fault, request_id=request_id)
            response = Response(shown, status=shown["status"], headers=dict(fault.headers))
            if shown["status"] == 401:
                response["WWW-Authenticate"] = self.get_authenticate_header(self.request)
        response.content_type = problems.MEDIA_TYPE
        response.exception = True
        return response

    def read_body(self, serializer: type[Strict]) -> dict[str, Any]:
        """The body as the serializer reads it. Raises ValidationError."""
        data = self.request.data
        if not isinstance(data, dict):
            raise exceptions.ParseError("Send a JSON object.")
        values: dict[str, Any] = reader(serializer).run_validation(data)
        return values

    def read_query(self, serializer: type[Strict]) -> dict[str, Any]:
        """The query string as the serializer reads it; a name given twice is refused. Raises ValidationError."""
        query = self.request.query_params
        if twice := [name for name in query if len(query.getlist(name)) > 1]:
            raise serializers.ValidationError({name: ["Give it once."] for name in twice})
        values: dict[str, Any] = reader(serializer).run_validation(query.dict())
        return values

    def expected_version(self, *, required: bool = True) -> int | None:
        """The version that If-Match names; None when any will do.

        Raises Refusal: 412 for a tag that no version has, 428 when there is none and a strict key requires it.
        """
        given = self.request.headers.get("If-Match", "").strip()
        if not given and required and self.key.strict:
            raise Refusal("version_required", "Send the ETag of the customer that you read as If-Match, or *.")
        if given in ("", "*"):
            return None
        found = _ETAG.fullmatch(given)
        if found is None:
            raise Refusal("version_conflict", f"{given[:40]} is not an ETag of this hub.")
        return int(found[1])


def parse_ids(prefix: str, texts: Collection[str]) -> dict[str, UUID]:
    """The public ids among `texts`, by their text; one that is not an id of this kind is left out."""
    return {text: uid for text in texts if (uid := parse_public_id(prefix, text)) is not None}
