"""The only way out over HTTP.

`Session.send` sends one request once and either returns an `Answer` (any status but a redirect) or raises one of
`connectors.exceptions`; `Session.request` also raises, by `raise_for_answer`, what a status other than 2xx means.

The address guard sits where the socket is opened: the host is resolved once, every address is judged,
and the connection goes to a judged address, so a name that resolves differently a moment later gains
nothing. TLS still verifies the name. Nothing of bodies or headers is logged.
"""

from __future__ import annotations

import atexit
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import httpcore2
import httpx2
import orjson
from django.conf import settings

from connectors.exceptions import (
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
)
from connectors.sealing import Secret

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
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
WRITE_PIECE = 16 * 1024

_BAD_HEADER = "A header, perhaps the key, has characters that cannot be sent."
# Line breaks and tabs stay in data (addresses have them), not in one-line messages.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
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
    """One provider's address and credentials. Keeps no state between requests, not even cookies.

    `client` is for tests (WSGITransport, MockTransport): the address guard and the deadline on sockets
    belong to the shared client that is used without one.
    """

    base_url: str
    headers: Mapping[str, str | Secret] = field(default_factory=dict, repr=False)
    client: httpx2.Client | None = field(default=None, repr=False)
    deadline: float = 30.0  # seconds for one request as a whole, from connecting to the last byte
    max_bytes: int = MAX_BYTES  # of the body, counted after decompression
    request_id: str = ""

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
    ) -> Answer:
        """Send once, never repeat, follow no redirect.

        `path` is appended to `base_url`; parts of it that are data must be quoted by the caller.
        Raises RetryLater when nothing was sent (or the method is GET), OutcomeUnknown when something
        was sent and no usable answer came, ConnectionUnusable when the address or configuration is
        at fault, Rejected when `path` would lead elsewhere.
        """
        method = method.upper()
        url = _parse(_join(self.base_url, path))
        client = self.client or _shared_client()
        started = time.monotonic()
        token = _call.set(_Call(url.scheme, started + self.deadline))
        try:
            answer = self._exchange(client, method, url, json, params, headers or {}, started)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
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
            _call.reset(token)
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
        params: Mapping[str, Any] | None,
        extra: Mapping[str, str | Secret],
        started: float,
    ) -> Answer:
        # gzip alone: its decoder works in bounded pieces.
        headers = {"User-Agent": "customer-hub", "Accept": "application/json", "Accept-Encoding": "gzip"}
        content = None
        if json is not None:
            content = orjson.dumps(json)
            headers["Content-Type"] = "application/json"
        if self.request_id:
            headers["Request-Id"] = self.request_id
        merged = httpx2.Headers(headers)
        for name, value in {**self.headers, **extra}.items():
            plain = value.reveal() if isinstance(value, Secret) else value
            if not plain.isascii():  # a key pasted with a typographic dash, say
                raise ConnectionUnusable(_BAD_HEADER)
            merged[name] = plain
        request = client.build_request(
            method,
            url,
            params=dict(params) if params else None,
            headers=merged,
            content=content,
            timeout=httpx2.Timeout(self.deadline, connect=min(CONNECT_TIMEOUT, self.deadline)),
        )
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            raw = self._read(response)
        finally:
            response.close()
        ok = 200 <= response.status_code < 300
        if not ok:
            raw = _without_secrets(raw, {**self.headers, **extra})
        answered = {name.lower(): value for name, value in response.headers.items()}
        return Answer(
            method=method,
            status=response.status_code,
            headers=answered,
            body=_parse_body(raw, response.status_code) if ok else _parse_error_body(raw),
            text=_CONTROL.sub("", raw[: 4 * TEXT_LENGTH].decode(errors="replace"))[:TEXT_LENGTH],
            elapsed=time.monotonic() - started,
            request_id=_line(answered.get("request-id") or answered.get("x-request-id") or "", 100),
        )

    def _read(self, response: httpx2.Response) -> bytes:
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            raise _BodyError("the answer has an encoding that was not asked for.", response.status_code)
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > self.max_bytes:
                raise _BodyError("the answer is too large.", response.status_code)
            if time.monotonic() > _call.get().ends:
                raise httpx2.ReadTimeout("deadline")
        return bytes(body)


def raise_for_answer(answer: Answer) -> None:
    """Return for 2xx; otherwise raise what the status means for the record or the connection."""
    status = answer.status
    if 200 <= status < 300:
        return
    if status in (401, 403):
        # Without the provider's words: such answers like to quote the key.
        raise _refused(ConnectionUnusable, answer, "The provider does not accept the credentials.")
    if status in (404, 410):
        raise _refused(Gone, answer, "The provider does not have this record.")
    if status in (408, 425, 429, 503):
        error = _refused(RetryLater, answer, "The provider asks to try again later.")
        error.retry_after = _retry_after(answer.headers)
        raise error
    if 400 <= status < 500:
        words = _provider_message(answer.body) or _line(answer.text, MESSAGE_LENGTH)
        raise _refused(Rejected, answer, words or "The provider refused the record without a reason.")
    kind: type[ConnectorError] = RetryLater if answer.method == "GET" else OutcomeUnknown
    raise _refused(kind, answer, "The provider failed while answering.")


def check_url(url: str) -> None:
    """Raise ConnectionUnusable unless requests to `url` would be let out. Resolves the host; for forms."""
    parsed = _parse(url)
    port = _port(parsed)
    try:
        addresses = _resolve(parsed.host, port)
    except httpcore2.ConnectError as error:
        raise ConnectionUnusable(f"The host name {parsed.host} cannot be found.") from error
    _check_target(parsed.scheme, port, addresses)


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


def _parse(text: str) -> httpx2.URL:
    """The URL as the client itself reads it: a second parser could see another host."""
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ConnectionUnusable("The address is not a valid URL.") from error
    if url.scheme not in ("http", "https") or not url.host or "\\" in text:
        raise ConnectionUnusable("The address must be a full URL beginning with https://.")
    if url.port == 0:
        # httpcore2 reads 0 as the default port, so that is not what would be judged.
        raise ConnectionUnusable("The address has no valid port.")
    if url.userinfo:
        raise ConnectionUnusable("The address must not contain a user name or password.")
    return url


def _port(url: httpx2.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


def _resolve(host: str, port: int) -> list[IPAddress]:
    """Every address of `host`; httpcore2.ConnectError if there is none.

    The system resolver cannot be interrupted: its own timeout (resolv.conf) may exceed the deadline.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore2.ConnectError(str(error)) from error
    except (ValueError, OverflowError) as error:  # a label too long, NUL, a port beyond 65535
        raise ConnectionUnusable("The address is not a valid URL.") from error
    addresses = dict.fromkeys(_plain(ipaddress.ip_address(entry[4][0])) for entry in found)
    if not addresses:
        raise httpcore2.ConnectError("no address")
    return list(addresses)


def _plain(address: IPAddress) -> IPAddress:
    """::ffff:10.0.0.1 is 10.0.0.1 on the wire, so it is judged as that."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _check_target(scheme: str, port: int, addresses: Iterable[IPAddress]) -> None:
    """Raise ConnectionUnusable unless every address, and the scheme and port, may be reached."""
    allowed: list[IPNetwork] = [ipaddress.ip_network(text, strict=False) for text in settings.ALLOWED_PRIVATE_NETWORKS]
    outside = [address for address in addresses if not any(address in network for network in allowed)]
    if not all(_is_public(address) for address in outside):
        raise ConnectionUnusable(
            "The address leads into a network that the hub must not reach. "
            "If that is intended, the operator lists the network in ALLOWED_PRIVATE_NETWORKS."
        )
    if outside and scheme != "https" and not settings.ALLOW_HTTP_TARGETS:
        raise ConnectionUnusable("The address must begin with https://.")
    if outside and port != 443 and port not in settings.ALLOWED_TARGET_PORTS:
        raise ConnectionUnusable(f"Port {port} is not among ALLOWED_TARGET_PORTS.")


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# What `is_global` lets pass although it is special, tunnels elsewhere, or did in older Pythons.
_SPECIAL: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # metadata and agent endpoint inside Azure
        "2001::/23",  # protocol assignments, Teredo, ORCHID
        "2002::/16",  # 6to4: carries any IPv4 address
        "3fff::/20",  # documentation
    )
)


def _is_public(address: IPAddress) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        # Leaves out ::/96, fec0::/10, 64:ff9b:1::/48, multicast and whatever is assigned later.
        if address not in _GLOBAL_UNICAST:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _SPECIAL)
    )


# Sockets


class _Call(NamedTuple):
    scheme: str
    ends: float  # on the monotonic clock


# Read by the backend below, which httpcore2 calls in the requesting thread. Unset, that fails: nothing
# leaves except through Session.request.
_call: ContextVar[_Call] = ContextVar("outbound_call")


def _left(timeout: float | None, too_late: type[Exception]) -> float:
    left = _call.get().ends - time.monotonic()
    if left <= 0:
        raise too_late("deadline")
    return left if timeout is None else min(timeout, left)


class _TimedStream(httpcore2.NetworkStream):
    """Timeouts per read do not end a drip of single bytes; this holds each to the call's deadline."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces, because the stream below restarts the timeout for each send of a long buffer.
        for start in range(0, len(buffer), WRITE_PIECE):
            piece = buffer[start : start + WRITE_PIECE]
            self._stream.write(piece, _left(timeout, httpcore2.WriteTimeout))

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            left = _left(timeout, httpcore2.ConnectTimeout)
        except httpcore2.ConnectTimeout:
            self.close()
            raise
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _GuardedBackend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = _resolve(host, port)
        _check_target(_call.get().scheme, port, addresses)
        failure: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            left = _left(timeout, httpcore2.ConnectTimeout)
            try:
                return _TimedStream(super().connect_tcp(str(address), port, left, local_address, socket_options))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        raise ConnectionUnusable("The address must be a full URL beginning with https://.")


_shared: httpx2.Client | None = None
_shared_lock = threading.Lock()


def _shared_client() -> httpx2.Client:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = _build_client()
        return _shared


def close_shared_client() -> None:
    """Close the idle connections of this process; the next request opens its own."""
    global _shared
    with _shared_lock:
        if _shared is not None:
            _shared.close()
            _shared = None


def _forget_shared_client() -> None:
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


atexit.register(close_shared_client)
# A forked process must not talk on its parent's connections.
os.register_at_fork(after_in_child=_forget_shared_client)


def _build_client() -> httpx2.Client:
    # At DEBUG and INFO these write headers and full addresses, with customers' data in the query.
    for name in ("httpcore2", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    context = httpx2.create_ssl_context(trust_env=False)
    transport = httpx2.HTTPTransport(verify=context, trust_env=False)
    # httpx2 has no parameter for the network backend. tests/connectors/test_outbound.py fails without it.
    transport._pool = httpcore2.ConnectionPool(
        ssl_context=context,
        max_connections=100,
        max_keepalive_connections=20,
        keepalive_expiry=5.0,
        network_backend=_GuardedBackend(),
    )
    return httpx2.Client(
        transport=transport,
        trust_env=False,
        # The client is shared by all connections: a cookie set for one must not travel with another.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


# Answers


def _parse_body(raw: bytes, status: int) -> Any:
    """The JSON of a success; nothing at all is None. _BodyError if it is not plain JSON."""
    if not raw.strip():
        return None
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_ITEMS:
        raise _BodyError("the answer has too many values.", status)
    try:
        return _clean(orjson.loads(raw), MAX_DEPTH)
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


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
