"""`Idempotency-Key`: a request that may be sent again, and is carried out once.

The reservation of a key is committed before anything else happens; the answer is kept in the transaction of the effect.
So a key without an answer has had no effect, and one with an answer has had it. Whoever finds a reservation whose
process must be dead takes it over by changing its token; a process that is alive after all finds another's token when
it comes to keep its answer, and its effect is rolled back.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, ClassVar

from django.conf import settings
from django.db import DatabaseError, transaction
from django.db.models.functions import Now
from django.http import HttpResponse
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response

from connectors.inbound.bodies import TooLarge
from connectors.models import ApiKey, IdempotencyKey

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
METHODS = ("POST", "PATCH")
# How long a key is known, and how long a request may be under way before it counts as dead.
LIFE = timedelta(hours=24)
DEAD_AFTER = timedelta(seconds=60)
RETRY_AFTER = 1
# These may be answered otherwise in a moment, or once the caller's rights have been seen to.
PASSING = (401, 403, 409, 429)
TRIES = 3
_KEY = re.compile(r"[\x20-\x7e]{1,255}")


class KeyFault(exceptions.APIException):
    """What is wrong with a key. `kind` is that of the Fault. APIs whose document knows no 422 answer 400."""

    status_code = 400
    kind: ClassVar[str]


class KeyInvalid(KeyFault):
    kind = "key_invalid"
    default_detail = f"The {HEADER} header cannot be used: send 1 to 255 printable ASCII characters."


class KeyMissing(KeyFault):
    kind = "key_missing"
    default_detail = f"This API key is strict: send an {HEADER} header, a UUID for example, with every POST."


class KeyReused(KeyFault):
    kind = "key_reused"
    default_detail = f"The {HEADER} header names another request: send a new key with another body or address."


class KeyInProgress(KeyFault):
    kind = "in_progress"
    status_code = 409
    default_detail = f"A request with this {HEADER} is still being worked on: send it again in a moment."


def key_of(request: Request, *, api_key: ApiKey) -> str | None:
    """The key of a request that changes something; None when there is none. Raises KeyInvalid, KeyMissing."""
    given: str | None = request.headers.get(HEADER)
    if given is None and request.method == "POST" and api_key.strict:
        raise KeyMissing
    if given is None or request.method not in METHODS:
        return None
    given = given.strip()
    if not _KEY.fullmatch(given):
        raise KeyInvalid
    return given


def once(
    *,
    request: Request,
    key: str,
    api_key: ApiKey,
    telling: Collection[str],
    act: Callable[[], Response],
    refuse: Callable[[Exception], Response],
) -> HttpResponse:
    """What `act` answers, or has answered before to this request. `telling` are the headers that make it another one.

    What `act` changes lasts only together with its answer. An exception is answered by `refuse`; of a 5xx and of what
    is PASSING nothing is kept, not the key either. Raises KeyReused, KeyInProgress.
    """
    held = _reserve(request=request, key=key, api_key=api_key, fingerprint=_fingerprint(request, telling))
    if held.status is not None:
        return _again(held)
    try:
        with transaction.atomic(durable=True):
            response = act()
            if _lasts(response):
                _keep(held, response)
            else:
                transaction.set_rollback(True)
    except KeyInProgress:
        raise
    except Exception as error:
        response = refuse(error)
        if _lasts(response):
            _keep(held, response)
    if not _lasts(response):
        _give_back(held)
    return response


def _lasts(response: Response) -> bool:
    return response.status_code < 500 and response.status_code not in PASSING


def _reserve(*, request: Request, key: str, api_key: ApiKey, fingerprint: str) -> IdempotencyKey:
    """The caller's own reservation, or the answered one. All times are the database's."""
    match = request.resolver_match
    route = f"{request.method} {match.route if match else request.path}"[:255]
    rows = IdempotencyKey.objects.filter(api_key=api_key, route=route, key=key)
    token = secrets.token_hex(16)
    fresh: dict[str, Any] = {
        "fingerprint": fingerprint,
        "token": token,
        "created_at": Now(),
        "reserved_at": Now(),
        "status": None,
        "headers": {},
        "body": b"",
    }
    for _ in range(TRIES):
        mine = IdempotencyKey(organization=api_key.organization, api_key=api_key, route=route, key=key, **fresh)
        IdempotencyKey.objects.bulk_create([mine], ignore_conflicts=True)
        held = rows.annotate(asked_at=Now()).first()
        if held is None:
            continue  # its owner has given it back in between
        if held.token == token:
            return held
        unmoved = rows.filter(pk=held.pk, token=held.token)
        if held.created_at <= held.asked_at - LIFE:
            if not unmoved.update(**fresh):
                continue
            held.token, held.status = token, None
            return held
        if held.fingerprint != fingerprint:
            raise KeyReused
        if held.status is not None:
            return held
        if held.reserved_at > held.asked_at - DEAD_AFTER:
            raise KeyInProgress
        if unmoved.filter(status=None).update(token=token, reserved_at=Now()):
            held.token = token
            return held
    raise KeyInProgress


def _keep(held: IdempotencyKey, response: Response) -> None:
    """Answer the reservation. Raises KeyInProgress when it is another's by now."""
    response.render()
    own = IdempotencyKey.objects.filter(pk=held.pk, token=held.token, status=None)
    answer = {"status": response.status_code, "headers": dict(response.items()), "body": response.content}
    if not own.update(**answer):
        raise KeyInProgress


def _give_back(held: IdempotencyKey) -> None:
    try:
        IdempotencyKey.objects.filter(pk=held.pk, token=held.token, status=None).delete()
    except DatabaseError:
        logger.exception("an idempotency key is held until it can be taken over")


def _again(held: IdempotencyKey) -> HttpResponse:
    response = HttpResponse(bytes(held.body), status=held.status, headers=held.headers)
    if "Content-Type" not in held.headers:
        del response["Content-Type"]
    response[REPLAYED] = "true"
    return response


def _fingerprint(request: Request, telling: Collection[str]) -> str:
    """What the request asks for: its address with the query, its telling headers, and its body as it came."""
    digest = hashlib.sha256()
    for part in (request.get_full_path(), *(request.headers.get(name, "") for name in telling)):
        text = part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:%s" % (len(text), text))
    digest.update(_body(request))
    return digest.hexdigest()


def _body(request: Request) -> bytes:
    """The body as it came; the parser can still read it. Raises TooLarge."""
    length = request.META.get("CONTENT_LENGTH") or "0"
    if not length.isdigit() or int(length) > settings.DATA_UPLOAD_MAX_MEMORY_SIZE:
        raise TooLarge
    given = request._request
    body = given.body
    given._read_started = False  # type: ignore[attr-defined] # Django's mark that this body is gone
    return body
