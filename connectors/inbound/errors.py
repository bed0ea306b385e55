"""Every way a request can fail, before it takes a provider's shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.http import Http404
from rest_framework import exceptions

from connectors.inbound.bodies import TooLarge
from connectors.inbound.idempotency import RETRY_AFTER, KeyFault, KeyInProgress
from customers.editing import InvalidCustomer, UnknownCustomer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What went wrong with a request, before it takes a provider's shape.

    kind    invalid, malformed, unauthorized, forbidden, not_found, method, throttled, key_invalid, key_missing,
            key_reused, in_progress, failed
    fields  (path, message) pairs; a path is a tuple of names and positions into the body or the query
    missing the paths among them whose fault is that a required value is absent
    headers what the answer says besides
    """

    status: int
    kind: str
    message: str
    fields: list[tuple[tuple[str | int, ...], str]] = field(default_factory=list)
    missing: frozenset[tuple[str | int, ...]] = frozenset()
    headers: Mapping[str, str] = field(default_factory=dict)


def fault_of(error: Exception) -> Fault:
    """Every way a request can fail, as a Fault. What is unknown becomes a 500 that reveals nothing."""
    match error:
        case exceptions.ValidationError():
            details = list(_flat(error.get_full_details()))
            return Fault(
                status=400,
                kind="invalid",
                message="; ".join(f"{dotted(path)}: {text}" if path else text for path, text, _ in details),
                fields=[(path, text) for path, text, _ in details],
                missing=frozenset(path for path, _, code in details if code == "required"),
            )
        case InvalidCustomer():
            fields = [
                ((position, name), text)
                for position, errors in error.errors.items()
                for name, texts in errors.items()
                for text in texts
            ]
            return Fault(
                status=400,
                kind="invalid",
                message="; ".join(f"{path[-1]}: {text}" for path, text in fields),
                fields=list(fields),
            )
        case exceptions.ParseError() | RequestDataTooBig():
            detail = getattr(error, "detail", TooLarge.default_detail)
            return Fault(status=400, kind="malformed", message=str(detail))
        case SuspiciousOperation():
            return Fault(status=400, kind="malformed", message="The address of the request is not valid.")
        case exceptions.NotAuthenticated() | exceptions.AuthenticationFailed():
            return Fault(status=401, kind="unauthorized", message=str(error.detail))
        case exceptions.PermissionDenied():
            return Fault(status=403, kind="forbidden", message=str(error.detail))
        case exceptions.NotFound() | Http404() | UnknownCustomer():
            return Fault(status=404, kind="not_found", message="Customer not found.")
        case exceptions.Throttled():
            seconds = max(1, math.ceil(getattr(error, "wait", None) or 0))
            return Fault(
                status=429,
                kind="throttled",
                message=f"This API key makes too many requests. Wait {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )
        case KeyFault():
            return Fault(
                status=error.status_code,
                kind=error.kind,
                message=str(error.detail),
                headers={"Retry-After": str(RETRY_AFTER)} if isinstance(error, KeyInProgress) else {},
            )
        case exceptions.APIException():
            return Fault(status=error.status_code, kind="method", message=str(error.detail))
    logger.exception("an API request failed", exc_info=error)
    return Fault(
        status=500,
        kind="failed",
        message="Something went wrong in the hub. Quote the Request-Id header of this answer.",
    )


def _flat(details: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    if isinstance(details, dict) and isinstance(details.get("message"), str) and "code" in details:
        yield path, details["message"], details["code"]
    elif isinstance(details, dict):
        for name, inner in details.items():
            yield from _flat(inner, path if name == "non_field_errors" else (*path, name))
    else:
        for position, inner in enumerate(details):
            is_message = isinstance(inner, dict) and isinstance(inner.get("message"), str) and "code" in inner
            yield from _flat(inner, path if is_message else (*path, position))


def dotted(path: tuple[str | int, ...]) -> str:
    """`("data", 1, "name")` as `data[1].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
