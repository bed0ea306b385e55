"""How the views of all five surfaces are described in OpenAPI. Imported while they load: it knows no provider."""

from __future__ import annotations

import re
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

from drf_spectacular.drainage import get_override
from drf_spectacular.extensions import OpenApiAuthenticationExtension, OpenApiSerializerFieldExtension
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse
from rest_framework import serializers
from rest_framework.request import Request

from connectors.api import problems
from connectors.api.resource import Strict
from connectors.inbound import idempotency
from connectors.inbound.fields import well_formed
from connectors.inbound.mirror import Mirror

OWN = "Customer Hub"
IDEMPOTENCY_KEY = OpenApiParameter(
    idempotency.HEADER,
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    OpenApiParameter.HEADER,
    description="Of requests with the same key and body, one is carried out; the others get its answer. For 24 hours.",
)
Endpoint = tuple[str, str, str, Any]
# JSON Schema counts characters, and the hub refuses some: C0 other than tab and line ends, and DEL.
CONTROL = r"\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f"
# What the hub takes for blank. Not as `\s`: what that means differs from one language to another.
BLANK = r"\t\n\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PLAIN = rf"^[^{CONTROL}]*$"
FILLED = rf"^[^{CONTROL}]*[^{BLANK}{CONTROL}][^{CONTROL}]*$"


class WrongField(serializers.Serializer[Any]):
    pointer = serializers.CharField(help_text="JSON pointer into the body, or `/` and the query parameter's name.")
    code = serializers.CharField()
    message = serializers.CharField(help_text="What to do about it.")


class Problem(serializers.Serializer[Any]):
    """A problem document, RFC 9457. `type` names a page that says what to do."""

    type = serializers.CharField()
    title = serializers.CharField()
    status = serializers.IntegerField(min_value=400, max_value=599)
    code = serializers.ChoiceField(choices=[*problems.CODES])
    detail = serializers.CharField()
    request_id = serializers.CharField()
    retryable = serializers.BooleanField(help_text="Whether the same request can succeed if it is sent again.")
    outcome = serializers.ChoiceField(
        choices=["none", "done", "uncertain"], help_text="Whether the request had an effect."
    )
    errors = WrongField(many=True)  # type: ignore[assignment] # hides Serializer.errors, which is not used here


def addresses(endpoints: list[Endpoint]) -> list[Endpoint]:
    """The hub's API endpoints with readable paths, each under the one address that its documentation names."""
    found: list[Endpoint] = []
    taken: dict[str, Any] = {}
    for _, regex, method, callback in endpoints:
        if not issubclass(callback.cls, Mirror):
            continue
        path = readable(regex)
        # The resolver takes the first pattern that matches and asks no other, whatever the method.
        if taken.setdefault(path, callback) is callback:
            found.append((path, regex, method, callback))
    templates = [
        (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path, method, callback)
        for path, _, method, callback in found
        if "{" in path
    ]
    return [
        one
        for one in found
        if not any(
            path != one[0]
            and method == one[2]
            and callback.cls is one[3].cls
            and callback.actions.get(method.lower()) == one[3].actions.get(method.lower())
            and template.fullmatch(one[0])
            for template, path, method, callback in templates
        )
    ]


def readable(regex: str) -> str:
    """`^api/(?P<id>[^/]+)/?$` as `/api/{id}`."""
    path = re.sub(r"\(\?P<(\w+)>(?:[^()]|\([^()]*\))*\)", r"{\1}", regex)
    path = re.sub(r"\(\?:([^()]*)\)\?", r"\1", path)  # what may be left out is there
    return "/" + path.replace("^", "").replace("$", "").removesuffix("/?").replace("\\", "").strip("/")


class Described(AutoSchema):
    """What an operation says of itself, and what is known of it without its saying so."""

    def provider(self) -> str | None:
        """The provider whose documented operation this is; None for the hub's own. Told by where it is written."""
        assert isinstance(self.view, Mirror)
        module = getattr(self.view, str(self.view.action)).__module__
        return module.split(".")[2] if module.startswith("connectors.providers.") else None

    def get_tags(self) -> list[str]:
        return [self.provider() or OWN]

    def scope(self) -> str:
        assert isinstance(self.view, Mirror)
        return self.view.scope(cast(Request, SimpleNamespace(method=self.method)))

    def get_override_parameters(self) -> list[Any]:
        given: list[Any] = super().get_override_parameters()
        # A list that understands more than its document says names its own query.
        own = getattr(self.view, "list_query", None)
        parameters = [own if own and isinstance(one, type) and issubclass(own, one) else one for one in given]
        if self.method in idempotency.METHODS:
            parameters.append(IDEMPOTENCY_KEY)
        return parameters

    def get_auth(self) -> list[Any]:
        # OpenAPI 3.1 lets every kind of scheme name what the caller must be allowed.
        return [{name: [self.scope()] for name in one} for one in super().get_auth()]

    def get_description(self) -> str:  # type: ignore[override] # as drf-spectacular has it
        text = super().get_description()
        return f"{text}\n\nNeeds the scope `{self.scope()}`.".lstrip()

    def _is_list_view(self, serializer: Any = None) -> bool:
        # An answer is an object everywhere: the serializer that is named is all of it.
        return False

    def _postprocess_serializer_schema(self, schema: Any, serializer: Any, direction: Any) -> Any:
        schema = super()._postprocess_serializer_schema(schema, serializer, direction)
        if isinstance(serializer, Strict) and direction == "request":
            schema["additionalProperties"] = False
        return schema

    def _insert_field_validators(self, field: Any, schema: Any) -> None:
        super()._insert_field_validators(field, schema)
        if isinstance(field, serializers.ListField) and not field.allow_empty:
            schema["minItems"] = max(1, schema.get("minItems", 1))
        # A text that may be blank fits its own pattern too: of the two that drf-spectacular offers, both would match.
        if schema.get("oneOf", [None])[-1] == {"type": "string", "maxLength": 0}:
            inner = schema.pop("oneOf")[0]
            if "format" in inner or "minLength" in inner or inner.get("pattern") not in (None, PLAIN):
                schema["anyOf"] = [inner, {"type": "string", "maxLength": 0}]
            else:
                schema.update(inner)

    def _get_response_bodies(self, direction: Any = "response") -> Any:
        bodies: dict[str, Any] = super()._get_response_bodies(direction)
        if self.provider() is not None:
            # They refuse every request in one shape.
            shape = bodies["401"]["content"]
            words = {429: "Too many requests with this key: wait as long as Retry-After says."}
            if self.method in idempotency.METHODS:
                words[409] = "A request with this Idempotency-Key is still being worked on."
            for status, text in words.items():
                bodies.setdefault(str(status), {"content": shape, "description": text})
        else:
            statuses = {int(status) for status in bodies if status.startswith(("4", "5"))} | self.possible()
            for status in sorted(statuses):
                refused = self._get_response_for_code(problem(status), str(status), [problems.MEDIA_TYPE], direction)
                given = bodies.get(str(status), {})
                bodies[str(status)] = {**refused, **{k: v for k, v in given.items() if k in ("headers", "description")}}
        return bodies

    def possible(self) -> set[int]:
        """The statuses of faults that every operation of its kind can have."""
        found = {400, 401, 403, 429, 500}
        asked = [parameter["name"] for parameter in self._get_parameters() if parameter["in"] == "query"]
        if "{" in self.path or any(name.endswith("_id") for name in asked):
            found.add(404)
        if self.method in idempotency.METHODS:
            found.add(409)
        if self.method != "GET" or asked:
            found.add(422)
        return found


def problem(status: int) -> OpenApiResponse:
    """How a fault of the hub's own endpoints is answered: one example for each code of this status."""
    codes = {code: known for code, known in problems.CODES.items() if known.status == status}
    examples = [
        OpenApiExample(
            code,
            value=problems.body(
                code,
                known.title,
                request_id="req_01JD8B7V3N5R0Q2W4E6T8Y1A3S",
                errors=[(("email",), "invalid", "Give an e-mail address, such as name@example.com.")]
                if code == "validation_failed"
                else [],
            ),
        )
        for code, known in codes.items()
    ]
    words = " ".join(known.title for known in codes.values()) or HTTPStatus(status).phrase
    return OpenApiResponse(Problem, description=words, examples=examples)


class KeyScheme(OpenApiAuthenticationExtension):
    """The header that a key comes in, as each mirrored API documents it."""

    target_class = "connectors.inbound.authentication.BearerKey"
    match_subclasses = True

    @property
    def name(self) -> str:  # type: ignore[override] # each header is a scheme of its own
        return "bearerKey" if self.target.keyword else self.target.header

    def get_security_definition(self, auto_schema: AutoSchema) -> dict[str, str]:
        about = "An API key of the hub."
        if self.target.keyword:
            return {"type": "http", "scheme": self.target.keyword.lower(), "description": about}
        return {"type": "apiKey", "in": "header", "name": self.target.header, "description": about}


class MerchantScheme(OpenApiAuthenticationExtension):
    """Cheqpay wants the key and the merchant, both."""

    target_class = "connectors.providers.cheqpay.MerchantKey"
    priority = 1
    name = ["x-api-key", "x-merchant-id"]

    def get_security_definition(self, auto_schema: AutoSchema) -> list[dict[str, str]]:
        about = ("An API key of the hub.", "The merchant id of a connection of the key's organization.")
        return [
            {"type": "apiKey", "in": "header", "name": name, "description": text}
            for name, text in zip(self.name, about, strict=True)
        ]


class TextSchema(OpenApiSerializerFieldExtension):
    """A text with what its validators demand: `extend_schema_field` on a validator says it in JSON Schema."""

    target_class = "connectors.inbound.fields.Text"
    match_subclasses = True

    def map_serializer_field(self, auto_schema: AutoSchema, direction: Any) -> Any:
        schema: dict[str, Any] = {"type": "string"}
        if direction == "request":
            schema["pattern"] = PLAIN if self.target.allow_blank or not self.target.trim_whitespace else FILLED
            if self.target.trim_whitespace and (least := self.target.min_length or 0) > 1:
                # Blanks around it are not counted.
                seen = f"[^{BLANK}{CONTROL}]"
                schema["pattern"] = rf"^[^{CONTROL}]*{seen}[^{CONTROL}]{{{least - 2},}}{seen}[^{CONTROL}]*$"
            for validator in self.target.validators:
                schema |= get_override(validator, "field", {})
                if validator is well_formed:
                    del schema["pattern"]
                    schema["format"] = "email"
        return schema
