"""Errors of the hub's own endpoints: RFC 9457 problem details, each with a code of this list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from connectors.inbound.errors import Fault
from customers.editing import StaleVersion

MEDIA_TYPE = "application/problem+json"
PAGE = "/api/docs/errors/"  # followed by the code with hyphens: what `type` names, and a page that says more


@dataclass(frozen=True, kw_only=True)
class Code:
    """One way a request can fail. `outcome`: whether it may have had an effect; `remedy` is for the documentation."""

    status: int
    title: str
    remedy: str
    retryable: bool = False
    outcome: str = "none"  # none, done, uncertain


CODES: Mapping[str, Code] = {
    "malformed_request": Code(
        status=400,
        title="The request cannot be read.",
        remedy="Send valid JSON of at most 1 MB, and an address as documented.",
    ),
    "unauthorized": Code(
        status=401,
        title="The API key is missing or not valid.",
        remedy="Send a key that is neither revoked nor expired as `Authorization: Bearer <key>`.",
    ),
    "forbidden": Code(
        status=403,
        title="The API key may not do this.",
        remedy="Use a key with the scope that the answer names.",
    ),
    "not_found": Code(
        status=404,
        title="There is no such record.",
        remedy="Check the id. A record of another organization answers like one that does not exist.",
    ),
    "method_not_allowed": Code(
        status=405, title="This address does not take this method.", remedy="Use a method that `Allow` names."
    ),
    "validation_failed": Code(
        status=422,
        title="Nothing was saved.",
        remedy="Correct each field that `errors` points to. Send it with a new Idempotency-Key.",
    ),
    "version_conflict": Code(
        status=412,
        title="Somebody else changed the customer since you read it.",
        remedy="Read it again, bring your change into what is there now, and send it with the new ETag.",
    ),
    "idempotency_in_progress": Code(
        status=409,
        title="A request with this Idempotency-Key is still being worked on.",
        remedy="Wait as long as `Retry-After` says and send the same request with the same key.",
        retryable=True,
        outcome="uncertain",
    ),
    "idempotency_key_reused": Code(
        status=422,
        title="This Idempotency-Key belongs to another request.",
        remedy="A key is for one request and its repetitions. Use a new key for another body.",
    ),
    "idempotency_key_invalid": Code(
        status=400,
        title="The Idempotency-Key cannot be used.",
        remedy="Send 1 to 255 printable ASCII characters, a UUID for example.",
    ),
    "idempotency_key_missing": Code(
        status=400,
        title="This API key is strict, and the request has no Idempotency-Key.",
        remedy="Send an `Idempotency-Key` header with every POST: a new UUID for each thing that is to happen once.",
    ),
    "version_required": Code(
        status=428,
        title="This API key is strict, and the request does not say which version it changes.",
        remedy="Send the ETag that you read as `If-Match`, or `*` for whichever it is; in a bulk item as `if_match`.",
    ),
    "conflict": Code(
        status=409,
        title="The request does not fit what is there.",
        remedy="The detail says what stands in the way.",
    ),
    "nothing_to_push": Code(
        status=409,
        title="There is nothing to push.",
        remedy="The detail says why. Restore the customer, or name the connections that are to have it.",
    ),
    "cursor_expired": Code(
        status=410,
        title="This cursor leads nowhere any more.",
        remedy="Start over: read the changes from the beginning, without a cursor, into an empty copy.",
    ),
    "rate_limited": Code(
        status=429,
        title="Too many requests with this key.",
        remedy="Wait as long as `Retry-After` says.",
        retryable=True,
    ),
    "internal": Code(
        status=500,
        title="Something went wrong in the hub.",
        remedy="Send the same request again with the same Idempotency-Key: nothing was kept of the failed one. "
        "If it goes on, quote the `request_id`.",
        retryable=True,
    ),
}
_BY_KIND = {
    "invalid": "validation_failed",
    "malformed": "malformed_request",
    "unauthorized": "unauthorized",
    "forbidden": "forbidden",
    "not_found": "not_found",
    "method": "method_not_allowed",
    "failed": "internal",
    "throttled": "rate_limited",
    "in_progress": "idempotency_in_progress",
    "key_reused": "idempotency_key_reused",
    "key_invalid": "idempotency_key_invalid",
    "key_missing": "idempotency_key_missing",
}


class Refusal(Exception):
    """A request that is refused for a reason of CODES. `errors` are (path, code, message)."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Iterable[tuple[tuple[str | int, ...], str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})
        self.more = more
        super().__init__(f"{code}: {detail}")


def stale(error: StaleVersion) -> Refusal:
    """The 412 for customers that have moved on; it carries the version that is current."""
    [customer, *_] = error.customers
    return Refusal(
        "version_conflict",
        f"{customer.public_id} is at version {customer.version} now.",
        headers={"ETag": etag(customer.version)},
        current_version=customer.version,
    )


def etag(version: int) -> str:
    """A strong entity tag: the customer's version (RFC 9110, 8.8.3)."""
    return f'"v{version}"'


def pointer(path: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901) into the body, or the name of the query parameter."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def body(
    code: str,
    detail: str,
    *,
    request_id: str,
    errors: Iterable[tuple[tuple[str | int, ...], str, str]] = (),
    **more: Any,
) -> dict[str, Any]:
    """The problem document. `errors` are (path, code, message)."""
    known = CODES[code]
    return {
        "type": f"{PAGE}{code.replace('_', '-')}",
        "title": known.title,
        "status": known.status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
        "retryable": known.retryable,
        "outcome": known.outcome,
        "errors": [{"pointer": pointer(path), "code": kind, "message": message} for path, kind, message in errors],
        **more,
    }


def of_fault(fault: Fault, *, request_id: str) -> dict[str, Any]:
    """The problem document of a fault that every endpoint can have."""
    code = _BY_KIND[fault.kind]
    count = len(fault.fields)
    detail = fault.message
    if fault.kind == "invalid" and count:
        detail = "1 field needs attention." if count == 1 else f"{count} fields need attention."
    errors = [(path, "required" if path in fault.missing else "invalid", text) for path, text in fault.fields]
    return body(code, detail, request_id=request_id, errors=errors)
