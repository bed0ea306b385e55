"""JSON in and out. Apart from the viewsets, because DRF imports its default renderer while it loads."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import orjson
from django.conf import settings
from rest_framework import exceptions
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request

from customers import jsontext

MAX_DEPTH = 32


class JSONRenderer(BaseRenderer):
    media_type = "application/json"
    format = "json"
    charset = None

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None) -> bytes:
        return b"" if data is None else jsontext.dumps(data)


class JSONParser(BaseParser):
    """RFC 8259 JSON, no larger than the upload limit, no deeper than MAX_DEPTH, without NUL characters."""

    media_type = "application/json"

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        length = stream.META.get("CONTENT_LENGTH") or "0"
        if not length.isdigit() or int(length) > limit:
            raise TooLarge
        body = stream.read(limit + 1)
        if len(body) > limit:
            raise TooLarge
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise exceptions.ParseError(f"The body is not valid JSON: {error}.") from None
        _check(data, contains_nul=b"\\u0000" in body)
        return data


class AlwaysJSON(BaseContentNegotiation):
    """Whatever a client says that it sends or accepts, it is JSON: curl's `-d` labels a body as a form."""

    def select_parser(self, request: Any, parsers: Any) -> Any:
        return parsers[0]

    def select_renderer(self, request: Any, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


def measure(request: Request) -> None:
    """Give a body that came without a length its length: in chunks, as HTTP/1.1 allows, or as any body of HTTP/2.

    Without one, Django and DRF take the body for empty. Reads no more than the upload limit and one byte.
    """
    if request.META.get("CONTENT_LENGTH"):
        return
    # Only a server that ends its input by itself says so; reading on from any other would wait for ever.
    given = request.META["wsgi.input"] if request.META.get("wsgi.input_terminated") else request._request
    body = given.read(settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1)
    request.META["CONTENT_LENGTH"] = str(len(body))
    request._request._stream = BytesIO(body)
    request._request._read_started = False  # type: ignore[attr-defined] # Django's mark that this body is gone


class TooLarge(exceptions.ParseError):
    default_detail = "The body is larger than 1 MB. Send fewer records in one call."


def _check(data: Any, *, contains_nul: bool, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise exceptions.ParseError(f"The body is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(data, dict):
        for key, value in data.items():
            if contains_nul and "\x00" in key:
                raise exceptions.ParseError("Remove the NUL character from the names in the body.")
            if isinstance(value, dict | list) or contains_nul:
                _check(value, contains_nul=contains_nul, depth=depth + 1)
    elif isinstance(data, list):
        for value in data:
            _check(value, contains_nul=contains_nul, depth=depth + 1)
    elif contains_nul and isinstance(data, str) and "\x00" in data:
        raise exceptions.ParseError("Remove the NUL character from the texts in the body.")
