"""The pages about the API: the OpenAPI document, its reader, a page for every error code, and a text for tools.

Open to everybody, the same for everybody, and without a file from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import orjson
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.urls import re_path
from django.views.decorators.cache import cache_control
from django.views.decorators.http import condition, require_safe
from drf_spectacular.generators import SchemaGenerator

from connectors.api.problems import CODES
from connectors.api.schema import OWN
from connectors.providers import PROVIDERS

# Swagger UI writes styles into its elements and shows its icons from data addresses.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# What a caller meets, and what to do then.
WHAT_TO_DO = (
    (
        "No answer, a time-out, 502, 503 or 504",
        "Send the same request again with the same Idempotency-Key. Wait longer each time.",
    ),
    ("409 idempotency_in_progress", "Wait as long as Retry-After says, then send it again with the same key."),
    ("422 idempotency_key_reused", "The key belongs to another body: correct your program and use a new key."),
    ("428", "The key is strict: read the record, and send your change with its ETag as If-Match."),
    ("412", "Read the record again, bring your change into it, and send that with the new ETag."),
    ("429", "Wait as long as Retry-After says."),
    ("Any other 4xx", "Correct the request and send it with a new key."),
    ("500", "Send the same request again with the same key: nothing was kept of the failed one."),
    ("An outcome that is uncertain", "Do not create the record again. Ask for its state until it is settled."),
)
HEADERS = {
    "RequestId": {
        "description": "Names this request in the hub's records. Quote it when something is unclear.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{8,64}$"},
    },
    "RateLimitLimit": {
        "description": "The most requests that this key may make at once. Not there for a key without a limit.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "RateLimitRemaining": {"description": "What is left of it.", "schema": {"type": "integer", "minimum": 0}},
    "RateLimitReset": {
        "description": "Seconds until all of it is there again.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "RetryAfter": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}},
}
_cached = cache_control(public=True, max_age=300)


def finish(result: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A postprocessing hook: what every answer carries, and the five surfaces in order."""
    result["components"]["headers"] = HEADERS
    _unmark(result)
    labels = {provider.slug: provider.label for provider in PROVIDERS.values()}
    for operations in result["paths"].values():
        for operation in operations.values():
            operation["tags"] = [labels.get(tag, tag) for tag in operation["tags"]]
            for status, answer in operation["responses"].items():
                names = ["Request-Id"]
                if status != "401":
                    names += ["RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"]
                if status in ("409", "429"):
                    names.append("Retry-After")
                headers = answer.setdefault("headers", {})
                for name in names:
                    headers[name] = {"$ref": f"#/components/headers/{name.replace('-', '')}"}
                answer["description"] = answer.get("description") or "Done."
    result["tags"] = [
        {
            "name": provider.label,
            "description": f"{provider.label}'s documented operations.",
            "externalDocs": {"url": provider.documentation},
        }
        for provider in PROVIDERS.values()
    ] + [{"name": OWN, "description": "What goes beyond the documented operations. Errors are problem documents."}]
    return result


def _unmark(node: Any) -> None:
    """Take out the marks by which drf-spectacular would make components of enumerations."""
    if isinstance(node, dict):
        node.pop("x-spec-enum-id", None)
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _unmark(inner)


@cache
def document() -> bytes:
    """The OpenAPI document as JSON; made once, because it changes only with the code."""
    made: Mapping[str, Any] = SchemaGenerator().get_schema(request=None, public=True)
    return orjson.dumps(made)


def _policed(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    @require_safe
    def policed(request: HttpRequest, **kwargs: str) -> HttpResponseBase:
        response = view(request, **kwargs)
        response["Content-Security-Policy"] = POLICY
        return response

    return policed


@cache
def _etag() -> str:
    return f'"{hashlib.sha256(document()).hexdigest()[:32]}"'


@require_safe
@_cached
@condition(etag_func=lambda request: _etag())
def openapi(request: HttpRequest) -> HttpResponseBase:
    return HttpResponse(document(), content_type="application/json")


@_policed
def reader(request: HttpRequest) -> HttpResponseBase:
    return render(request, "connectors/reference/reader.html")


@_policed
def errors(request: HttpRequest) -> HttpResponseBase:
    codes = [(code, slug(code), known) for code, known in CODES.items()]
    return render(request, "connectors/reference/errors.html", {"codes": codes, "what_to_do": WHAT_TO_DO})


@_policed
def error(request: HttpRequest, slug: str) -> HttpResponseBase:
    code = slug.replace("-", "_")
    if "_" in slug or code not in CODES:
        raise Http404
    return render(request, "connectors/reference/error.html", {"code": code, "known": CODES[code]})


@require_safe
@_cached
def llms(request: HttpRequest) -> HttpResponseBase:
    operations: dict[str, list[tuple[str, str, str]]] = {}
    made: Mapping[str, Any] = orjson.loads(document())
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            operations.setdefault(operation["tags"][0], []).append((method.upper(), path, operation.get("summary", "")))
    surfaces = [(tag["name"], tag["description"], operations.get(tag["name"], [])) for tag in made["tags"]]
    root = request.build_absolute_uri("/").rstrip("/")
    return render(
        request,
        "connectors/reference/llms.txt",
        {"surfaces": surfaces, "root": root},
        content_type="text/plain; charset=utf-8",
    )


def slug(code: str) -> str:
    return code.replace("_", "-")


urls = (
    re_path(r"^api/schema/?$", openapi, name="openapi"),
    re_path(r"^api/docs/?$", reader, name="reference"),
    re_path(r"^api/docs/errors/?$", errors, name="error_codes"),
    re_path(r"^api/docs/errors/(?P<slug>[a-z-]+)/?$", error, name="error_code"),
    re_path(r"^llms\.txt$", llms),
)
