"""Which addresses may be reached, and the sockets that hold to it and to a call's deadline.

The guard sits where the socket is opened: the host is resolved once, every address is judged, and the connection goes
to a judged address, so a name that resolves differently a moment later gains nothing. TLS still verifies the name.
"""

from __future__ import annotations

import atexit
import ipaddress
import itertools
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import httpcore2
import httpx2
from django.conf import settings

from connectors.exceptions import ConnectionUnusable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
WRITE_PIECE = 16 * 1024
# Idle connections of this process, to all systems together, and the seconds that each is kept.
KEPT_CONNECTIONS, KEPT_SECONDS = 20, 5.0


def check_url(url: str) -> None:
    """Raise ConnectionUnusable unless requests to `url` would be let out. Resolves the host; for forms."""
    parsed = parse_url(url)
    port = _port(parsed)
    try:
        addresses = _resolve(parsed.host, port)
    except httpcore2.ConnectError as error:
        raise ConnectionUnusable(f"The host name {parsed.host} cannot be found.") from error
    _check_target(parsed.scheme, port, addresses)


@lru_cache(maxsize=1024)
def parse_url(text: str) -> httpx2.URL:
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


class Call(NamedTuple):
    scheme: str
    ends: float  # on the monotonic clock


# Read by the backend below, which httpcore2 calls in the requesting thread. Unset, that fails: nothing
# leaves except through Session.send.
call: ContextVar[Call] = ContextVar("outbound_call")


def _left(timeout: float | None, too_late: type[Exception]) -> float:
    left = call.get().ends - time.monotonic()
    if left <= 0:
        raise too_late("deadline")
    return left if timeout is None else min(timeout, left)


class _TimedStream(httpcore2.NetworkStream):
    """Timeouts per read do not end a drip of single bytes; this holds each to the call's deadline.

    A small request's head waits for its body, so that both leave in one packet.
    """

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._kept = b""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._kept:
            # As the library does it: an answer may be there although not all could be sent.
            with suppress(httpcore2.WriteError):
                self._send(timeout)
        return self._stream.read(max_bytes, _left(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._kept += buffer
        if len(self._kept) >= WRITE_PIECE:
            self._send(timeout)

    def _send(self, timeout: float | None) -> None:
        buffer, self._kept = self._kept, b""
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
        _check_target(call.get().scheme, port, addresses)
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


Place = tuple[bytes, bytes, int]


class _Connections(httpcore2.ConnectionPool):
    """The library's connections, with one call on each at a time. An idle one is kept for the next call to its place.

    The library itself goes through all its connections, under one lock, whenever a call begins or ends: with fifty
    calls under way that took longer than the calls. Here nothing grows with their number. How many there are at once is
    bounded by the threads that call.
    """

    def __init__(self, context: ssl.SSLContext, *, kept: int) -> None:
        super().__init__(ssl_context=context, keepalive_expiry=KEPT_SECONDS, network_backend=_GuardedBackend())
        self._most = kept
        self._lock = threading.Lock()
        # Idle ones: those of a place, and all of them, each in the order in which they became idle.
        self._of_place: dict[Place, dict[httpcore2.ConnectionInterface, None]] = {}
        self._places: dict[httpcore2.ConnectionInterface, Place] = {}

    def handle_request(self, request: httpcore2.Request) -> httpcore2.Response:
        origin = request.url.origin
        place = (origin.scheme, origin.host, origin.port)
        connection = self._take(place) or self.create_connection(origin)
        # Whatever goes wrong, the library has closed the connection by then, and the call is not repeated on another.
        response = connection.handle_request(request)
        response.stream = _Body(response.stream, done=lambda: self._keep(place, connection))
        return response

    def close(self) -> None:
        with self._lock:
            self._most = -1  # nor is what is under way kept when it is over
            idle, self._places, self._of_place = list(self._places), {}, {}
        for connection in idle:
            connection.close()

    def _take(self, place: Place) -> httpcore2.ConnectionInterface | None:
        """The connection that became idle last, if the system has not closed it."""
        while True:
            with self._lock:
                if place not in self._of_place:
                    return None
                connection = next(reversed(self._of_place[place]))
                self._forget(connection)
            if not connection.has_expired():
                return connection
            connection.close()

    def _keep(self, place: Place, connection: httpcore2.ConnectionInterface) -> None:
        """Keep a connection whose call is over, unless it was closed; those that have been idle for too long go."""
        over: list[httpcore2.ConnectionInterface] = []
        with self._lock:
            if connection.is_idle():
                self._places[connection] = place
                self._of_place.setdefault(place, {})[connection] = None
            for oldest in list(itertools.islice(self._places, 2)):
                if len(self._places) <= self._most and not oldest.has_expired():
                    break
                self._forget(oldest)
                over.append(oldest)
        for one in over:
            one.close()

    def _forget(self, connection: httpcore2.ConnectionInterface) -> None:
        place = self._places.pop(connection)
        del self._of_place[place][connection]
        if not self._of_place[place]:
            del self._of_place[place]


class _Body:
    """The body of an answer. Once it is closed, which may happen again, its connection is free."""

    def __init__(self, stream: Any, *, done: Callable[[], None]) -> None:
        self._stream = stream
        self._done: Callable[[], None] | None = done

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._stream.close()
            done()


class _Client(httpx2.Client):
    """Sends a request as it is and hands on the answer: nothing is kept between requests, not even cookies."""

    def __init__(self, transport: httpx2.BaseTransport) -> None:
        super().__init__(transport=transport, trust_env=False)
        self._only = transport

    def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        return self._only.handle_request(request)


_shared: httpx2.Client | None = None
_shared_lock = threading.Lock()


def shared_client() -> httpx2.Client:
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
    # httpx2 has no parameter for these. tests/connectors/test_outbound.py fails without them.
    transport._pool = _Connections(context, kept=max(KEPT_CONNECTIONS, settings.PUSH_CONCURRENT_CALLS))
    return _Client(transport)
