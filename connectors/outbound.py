"""The only way out over HTTP.

`Session.send` sends one request once and either returns an `Answer` (any status but a redirect) or raises one of
`connectors.exceptions`; `Session.request` also raises, by `raise_for_answer`, what a status other than 2xx means.

Which addresses may be reached is `connectors.guard`'s to say. Nothing of bodies or headers is logged.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx2
import orjson

from connectors.exceptions import (
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
)
from connectors.guard import Call, call, parse_url, shared_client
from connectors.sealing import Secret
from customers import jsontext

E = TypeVar("E", bound=ConnectorError)

MAX_BYTES = 10 * 1024 * 1024
MAX_DEPTH = 64  # orjson itself stops at 1024
# Every JSON value costs some 60 bytes of Python object, so ten megabytes of "[[],[],[]…" would cost
# hundreds. Counted as separators before parsing.
MAX_ITEMS = 500_000
MAX_RETRY_AFTER = 24 * 3600.0
CONNECT_TIMEOUT = 10.0
TEXT_LENGTH = 2000
MESSAGE_LENGTH = 300

_BAD_HEADER = "A header, perhaps the key, has characters that cannot be sent."
# Bytes of JSON without these, and with few brackets, hold no control character and no depth: most are such.
_SUSPECT = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f\\]|\xc2[\x80-\x9f]")
# Line breaks and tabs stay in data (addresses have them), not in one-line messages.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OF_THE_CLIENT = ("host", "connection", "content-length", "accept-encoding", "user-agent")
_SENSITIVE = re.compile(r"auth|api-?key|cookie|token|secret|password|credential|signature|session")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the provider said. `request_id` is the provider's own, from its headers; often empty."""

    method: str
    status: int
    headers: Mapping[str, str] = field(repr=False)  # names in lower case
    body: Any = field(repr=False)  # parsed JSON, or None
    text: str = field(repr=False)  # the beginning of the body, for people
    elapsed: float
    request_id: str = ""


@dataclass(kw_only=True)
class Session:
    """One provider's address and credentials. Keeps nothing between requests, not even cookies, but `exhausted`: when
    the account may be called again, if an answer said that nothing is left of its rate limit.

    `client` is for tests (WSGITransport, MockTransport): the address guard and the deadline on sockets
    belong to the shared client that is used without one.
    """

    base_url: str
    headers: Mapping[str, str | Secret] = field(default_factory=dict, repr=False)
    client: httpx2.Client | None = field(default=None, repr=False)
    deadline: float = 25.0  # seconds for one request as a whole, from connecting to the last byte
    max_bytes: int = MAX_BYTES  # of the body, counted after decompression
    request_id: str = ""
    renew: Callable[[], bool] | None = field(default=None, repr=False)  # log in anew; False when that is lost
    # Which of the headers that were set here got an answer 401, and which another one: `renew` replaces them whole.
    refused: Mapping[str, str | Secret] | None = field(default=None, init=False, repr=False)
    accepted: Mapping[str, str | Secret] | None = field(default=None, init=False, repr=False)
    exhausted: float | None = field(default=None, init=False, repr=False)  # by the monotonic clock
    heard: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)  # headers of the last answer
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def take_exhausted(self) -> float | None:
        """Seconds until the rate limit's window starts anew, if answers since the last time said that nothing is left.

        The longest of several; None when it has started meanwhile.
        """
        with self._lock:
            ends, self.exhausted = self.exhausted, None
        left = 0.0 if ends is None else ends - time.monotonic()
        return left if left > 0 else None

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | Secret] | None = None,
    ) -> Answer:
        """`send`, and raise what a status other than 2xx means (see `raise_for_answer`)."""
        answer = self.send(method, path, json=json, params=params, headers=headers)
        raise_for_answer(answer)
        return answer

    def send(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | Secret] | None = None,
        form: str | None = None,
    ) -> Answer:
        """Send once, never repeat, follow no redirect.

        `form` is a body of URL-encoded fields, in place of `json`.
        `path` is appended to `base_url`; parts of it that are data must be quoted by the caller.
        Raises RetryLater when nothing was sent (or the method is GET), OutcomeUnknown when something
        was sent and no usable answer came, ConnectionUnusable when the address or configuration is
        at fault, Rejected when `path` would lead elsewhere.
        """
        method = method.upper()
        url = parse_url(_join(self.base_url, path))
        client = self.client or shared_client()
        started = time.monotonic()
        token = call.set(Call(url.scheme, started + self.deadline))
        try:
            answer = self._exchange(client, method, url, json, form, params, headers or {}, started)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if _certificate_refused(error):
                raise ConnectionUnusable(f"The TLS certificate of {url.host} is not valid.") from error
            raise RetryLater(_no_answer(url)) from error
        except httpx2.LocalProtocolError:
            # `from None`: the error quotes the header, which may be the key.
            raise ConnectionUnusable(_BAD_HEADER) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise _lost(method, _no_answer(url)) from error
        except _BodyError as error:
            raise _lost(method, f"{url.host}: {error}", status=error.status) from error
        finally:
            call.reset(token)
        if 300 <= answer.status < 400:
            raise ConnectionUnusable(
                f"The address of {url.host} redirects elsewhere. Enter the final address.",
                status=answer.status,
                remote_request_id=answer.request_id,
            )
        return answer

    def _exchange(
        self,
        client: httpx2.Client,
        method: str,
        url: httpx2.URL,
        json: Any,
        form: str | None,
        params: Mapping[str, Any] | None,
        extra: Mapping[str, str | Secret],
        started: float,
    ) -> Answer:
        # gzip alone: its decoder works in bounded pieces.
        headers = {"User-Agent": "customer-hub", "Accept": "application/json", "Accept-Encoding": "gzip"}
        content = None
        if json is not None:
            content = jsontext.dumps(json)
            headers["Content-Type"] = "application/json"
        elif form is not None:
            content = form.encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        if self.request_id:
            headers["Request-Id"] = self.request_id
        merged = {name.lower(): (name, value) for name, value in headers.items()}
        own = self.headers  # read once: another thread may replace them while this request is under way
        sent = {**own, **extra}
        for name, value in sent.items():
            plain = value.reveal() if isinstance(value, Secret) else value
            if not plain.isascii():  # a key pasted with a typographic dash, say
                raise ConnectionUnusable(_BAD_HEADER)
            merged[name.lower()] = (name, plain)
        timeout = httpx2.Timeout(self.deadline, connect=min(CONNECT_TIMEOUT, self.deadline))
        request = httpx2.Request(
            method,
            url,
            params=dict(params) if params else None,
            headers=list(merged.values()),
            content=content,
            extensions={"timeout": timeout.as_dict()},
        )
        response = client.send(request, stream=True, follow_redirects=False)
        self.heard = answered = {name.lower(): value for name, value in response.headers.items()}
        try:
            # Before the body: it may turn out to be unusable, and this holds all the same.
            self._note_limit(answered)
            raw = self._read(response)
        finally:
            response.close()
        ok = 200 <= response.status_code < 300
        if own is self.headers and response.status_code == 401:
            self.refused = own
        elif own is self.headers and response.status_code != 403 and response.status_code < 500:
            self.accepted = own
        if not ok:
            raw = _without_secrets(raw, sent)
        return Answer(
            method=method,
            status=response.status_code,
            headers=answered,
            body=_parse_body(raw, response.status_code) if ok else _parse_error_body(raw),
            text=_CONTROL.sub("", raw[: 4 * TEXT_LENGTH].decode(errors="replace"))[:TEXT_LENGTH],
            elapsed=time.monotonic() - started,
            request_id=_line(answered.get("request-id") or answered.get("x-request-id") or "", 100),
        )

    def _note_limit(self, headers: Mapping[str, str]) -> None:
        seconds = _exhausted(headers)
        if seconds is not None:
            ends = time.monotonic() + seconds
            with self._lock:
                self.exhausted = max(self.exhausted or ends, ends)

    def _read(self, response: httpx2.Response) -> bytes:
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            raise _BodyError("the answer has an encoding that was not asked for.", response.status_code)
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > self.max_bytes:
                raise _BodyError("the answer is too large.", response.status_code)
            if time.monotonic() > call.get().ends:
                raise httpx2.ReadTimeout("deadline")
        return bytes(body)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it would be sent. The values of credentials are `***`."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: Any = field(repr=False)  # the JSON, or None


class _Rehearsed(Exception):
    """The first request has been seen; what made it goes no further."""


class _Stage(httpx2.BaseTransport):
    def __init__(self) -> None:
        self.seen: httpx2.Request | None = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.seen = request
        raise _Rehearsed


def rehearse(*, base_url: str, headers: Mapping[str, str | Secret], do: Callable[[Session], object]) -> Request | None:
    """The first request that `do` makes with the session it is given; None if it makes none.

    Nothing is sent and no name is resolved. Raises ConnectorError as sending would, before anything is sent.
    """
    stage = _Stage()
    with httpx2.Client(transport=stage) as client, suppress(_Rehearsed):
        do(Session(base_url=base_url, headers=headers, client=client))
    if stage.seen is None:
        return None
    content = stage.seen.read()
    return Request(
        method=stage.seen.method,
        url=str(stage.seen.url),
        headers=redact({name: value for name, value in stage.seen.headers.items() if name not in _OF_THE_CLIENT}),
        body=orjson.loads(content) if content else None,
    )


def raise_for_answer(answer: Answer) -> None:
    """Return for 2xx; otherwise raise what the status means for the record or the connection.

    A 408 or 503 that does not say when to come back may come from a proxy behind which the write was applied.
    """
    status = answer.status
    if 200 <= status < 300:
        return
    if status in (401, 403):
        # Without the provider's words: such answers like to quote the key.
        raise _refused(ConnectionUnusable, answer, "The provider does not accept the credentials.")
    if status in (404, 410):
        raise _refused(Gone, answer, "The provider does not have this record.")
    wait = _retry_after(answer.headers)
    if status in (425, 429) or (status in (408, 503) and (wait is not None or answer.method == "GET")):
        error = _refused(RetryLater, answer, "The provider asks to try again later.")
        error.retry_after = wait
        raise error
    if 400 <= status < 500 and status != 408:
        words = _provider_message(answer.body) or _line(answer.text, MESSAGE_LENGTH)
        raise _refused(Rejected, answer, words or "The provider refused the record without a reason.")
    kind: type[ConnectorError] = RetryLater if answer.method == "GET" else OutcomeUnknown
    raise _refused(kind, answer, "The provider failed while answering.")


def redact(headers: Mapping[str, str | Secret]) -> dict[str, str]:
    """The headers with the values of credential-like names, and every Secret, as '***'."""
    return {
        name: "***" if isinstance(value, Secret) or _SENSITIVE.search(name.lower().replace("_", "-")) else value
        for name, value in headers.items()
    }


class _BodyError(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _no_answer(url: httpx2.URL) -> str:
    # One text for refused, timed out and reset, so that it does not tell which ports are open.
    return f"No usable answer came from {url.host}."


def _lost(method: str, message: str, *, status: int | None = None) -> ConnectorError:
    kind: type[ConnectorError] = RetryLater if method == "GET" else OutcomeUnknown
    return kind(message, status=status)


def _certificate_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


# Addresses


def _join(base: str, path: str) -> str:
    if "?" in base or "#" in base:
        raise ConnectionUnusable("The address must not contain '?' or '#'.")
    # Dots are looked for after unquoting because many servers unquote before they resolve them.
    if re.search(r"[?#\\\s]", path) or {".", ".."} & set(unquote(path).replace("\\", "/").split("/")):
        raise Rejected("An identifier of this record cannot be part of an address.")
    return f"{base.rstrip('/')}/{path.lstrip('/')}" if path else base


def _parse_body(raw: bytes, status: int) -> Any:
    """The JSON of a success; nothing at all is None. _BodyError if it is not plain JSON."""
    if not raw.strip():
        return None
    brackets = raw.count(b"[") + raw.count(b"{")
    if raw.count(b",") + brackets > MAX_ITEMS:
        raise _BodyError("the answer has too many values.", status)
    try:
        body = orjson.loads(raw)
        return body if brackets <= MAX_DEPTH and not _SUSPECT.search(raw) else _clean(body, MAX_DEPTH)
    except orjson.JSONDecodeError as error:
        raise _BodyError("the answer is not JSON.", status) from error
    except RecursionError as error:
        raise _BodyError("the answer is nested too deeply.", status) from error


def _parse_error_body(raw: bytes) -> Any:
    """The JSON of a refusal, or None: error pages are often HTML, and the status says enough."""
    try:
        return _parse_body(raw, 0)
    except _BodyError:
        return None


def _clean(value: Any, depth: int) -> Any:
    """`value` without control characters in its strings. RecursionError below `depth` levels."""
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise RecursionError
        if isinstance(value, list):
            return [_clean(item, depth - 1) for item in value]
        return {_CONTROL.sub("", key): _clean(item, depth - 1) for key, item in value.items()}
    return value


def _without_secrets(raw: bytes, headers: Mapping[str, str | Secret]) -> bytes:
    """An error body without our own credentials: 'Invalid key sk_…' ends in messages that staff read."""
    for value in headers.values():
        if isinstance(value, Secret) and value:
            key = value.reveal().split()[-1:]  # without "Bearer"
            if key and len(key[0]) >= 8:
                raw = raw.replace(key[0].encode(), b"***")
    return raw


def _refused(kind: type[E], answer: Answer, message: str) -> E:
    return kind(
        message,
        status=answer.status,
        code=_provider_code(answer.body),
        remote_request_id=answer.request_id,
    )


def _line(text: str, length: int) -> str:
    return " ".join(_CONTROL.sub("", text).split())[:length]


def _provider_message(body: Any) -> str:
    """The first readable sentence where APIs usually put it, or ''."""
    if isinstance(body, str):
        return _line(body, MESSAGE_LENGTH)
    if isinstance(body, list):
        return next(filter(None, map(_provider_message, body)), "")
    if isinstance(body, dict):
        for name in ("message", "error_description", "detail", "error", "errors", "title", "reason"):
            if found := _provider_message(body.get(name)):
                return found
    return ""


def _provider_code(body: Any) -> str:
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    for place in (error if isinstance(error, dict) else {}, body):
        for name in ("code", "error_code", "type"):
            if isinstance(place.get(name), (str, int)):
                return _line(str(place[name]), 100)
    return _line(error, 100) if isinstance(error, str) and " " not in error else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait. A date is read against the answer's own Date: the clocks may differ."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), MAX_RETRY_AFTER)
    until = _http_date(text)
    if until is None:
        return None
    now = _http_date(headers.get("date", "")) or datetime.now(UTC)
    return min(max((until - now).total_seconds(), 0.0), MAX_RETRY_AFTER)


# Drafts and customs of rate-limit headers. A policy in the structured form is `"name";r=0;t=30`; an earlier draft wrote
# `limit=100, remaining=0, reset=30`.
_LIMITS = ("ratelimit", "x-ratelimit", "x-rate-limit")
_POLICY = re.compile(r'(?:"[^"]*"|[^",])+')
_PARAMETER = re.compile(r"\b(r|t|remaining|reset)\s*=\s*(\d+)")
_NUMBER = re.compile(r"\d{1,15}(\.\d{1,9})?", re.ASCII)
# Reset is the seconds until then or the time itself: no window is thirty years long.
_EPOCH, _EPOCH_MILLISECONDS = 1e9, 1e11


def _exhausted(headers: Mapping[str, str]) -> float | None:
    """Seconds until calls may be made again, if a header says that none is left; the longest of several."""
    pairs: list[tuple[str, str]] = []
    for name in _LIMITS:
        remaining, resets = (headers.get(f"{name}-{part}", "").split(",") for part in ("remaining", "reset"))
        pairs += zip(remaining, resets, strict=False)
    structured = headers.get("ratelimit", "")
    for policy in [structured] if "remaining" in structured else _POLICY.findall(structured):
        found: dict[str, str] = dict(_PARAMETER.findall(policy))
        pairs.append((found.get("r", found.get("remaining", "")), found.get("t", found.get("reset", ""))))
    waits = [_until_reset(reset.strip(), headers) for remaining, reset in pairs if _number(remaining.strip()) == 0]
    return max((seconds for seconds in waits if seconds), default=None)


def _until_reset(text: str, headers: Mapping[str, str]) -> float | None:
    """Seconds until a reset. A time is read against the answer's own Date: the clocks may differ."""
    moment = _number(text)
    if moment is not None and moment >= _EPOCH:
        now = _http_date(headers.get("date", "")) or datetime.now(UTC)
        moment = max(0.0, (moment / 1000 if moment >= _EPOCH_MILLISECONDS else moment) - now.timestamp())
    return None if moment is None else min(moment, MAX_RETRY_AFTER)


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
