"""What `connectors.outbound` and `connectors.guard` promise, shown against real sockets that misbehave."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import ipaddress
import logging
import socket
import ssl
import struct
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from connectors import guard
from connectors.exceptions import (
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
)
from connectors.guard import check_url
from connectors.outbound import Answer, Session, raise_for_answer, redact
from connectors.sealing import Secret


@pytest.fixture(autouse=True)
def strict(settings):
    settings.ALLOWED_PRIVATE_NETWORKS = []
    settings.ALLOW_HTTP_TARGETS = False
    settings.ALLOWED_TARGET_PORTS = [443, 8443]
    yield
    guard.close_shared_client()


@pytest.fixture
def local(settings):
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]


def receive_request(connection):
    """One whole request, as bytes; b'' when the other side has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def serve(behave, tls=None):
    """A server on 127.0.0.1 that receives a request and calls behave(connection, request). Yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def handle(connection):
        with contextlib.suppress(OSError), connection:
            connection.settimeout(10)
            secured = tls.wrap_socket(connection, server_side=True) if tls else connection
            with secured:
                while request := receive_request(secured):
                    if behave(secured, request) is not KEEP:
                        return

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=handle, args=[listener.accept()[0]]))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        guard.close_shared_client()  # ends the handlers that wait for another request
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [acceptor, *threads]:
            thread.join(10)


KEEP = object()


def answer_bytes(body=b"{}", status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def says(data):
    return lambda connection, request: connection.sendall(data)


def drip(data, start=b"", pause=0.05):
    def behave(connection, request):
        connection.sendall(start)
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return behave


def reset(connection, request):
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"half":')
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


LOST = [("GET", RetryLater), ("POST", OutcomeUnknown), ("DELETE", OutcomeUnknown)]


# What is sent, what comes back


@pytest.mark.usefixtures("local")
def test_a_request_arrives_as_described_and_its_answer_is_parsed():
    seen = []

    def behave(connection, request):
        seen.append(request)
        connection.sendall(
            answer_bytes(b'{"na\\u0000me": "A\\u0000nn\\u001b\\nE", "n": [1, null]}', "201 Created", "X-Request-Id: r9")
        )

    with serve(behave) as base:
        session = Session(base_url=f"{base}/api/v1", headers={"Authorization": Secret("Bearer k")}, request_id="req-1")
        answer = session.send("post", "/unified/customer", json={"a": 1}, params={"q": "x y"}, headers={"X-A": "1"})
    head, _, body = seen[0].partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] in (
        "post /api/v1/unified/customer?q=x+y http/1.1",
        "post /api/v1/unified/customer?q=x%20y http/1.1",
    )
    assert body == b'{"a":1}'
    for expected in (
        "authorization: bearer k",
        "request-id: req-1",
        "user-agent: customer-hub",
        "accept: application/json",
        "content-type: application/json",
        "x-a: 1",
    ):
        assert expected in lines
    assert answer.status == 201
    assert answer.body == {"name": "Ann\nE", "n": [1, None]}
    assert answer.request_id == "r9"
    assert answer.method == "POST"
    assert answer.headers["x-request-id"] == "r9"
    assert 0 < answer.elapsed < 5
    assert "\x00" not in answer.text
    raise_for_answer(answer)


@pytest.mark.usefixtures("local")
def test_connections_are_kept_but_cookies_are_not():
    seen, connections = [], set()

    def behave(connection, request):
        seen.append(request.lower())
        connections.add(connection)
        connection.sendall(answer_bytes(b"[]", "200 OK", "Set-Cookie: a=1; Path=/"))
        return KEEP

    with serve(behave) as base:
        for _ in range(3):
            Session(base_url=base).send("GET", "x")
    assert len(seen) == 3
    assert len(connections) == 1
    assert not any(b"cookie:" in request for request in seen)


@pytest.mark.usefixtures("local")
def test_nothing_is_logged_and_no_proxy_of_the_environment_is_used(monkeypatch, caplog):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serve(says(answer_bytes())) as base, caplog.at_level(logging.INFO):
        Session(base_url=base).send("GET", "x", params={"email": "a@b.c"})
    assert caplog.records == []


def test_a_client_can_be_injected():
    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/json")])
        return [orjson.dumps({"path": environ["PATH_INFO"]})]

    with httpx2.Client(transport=httpx2.WSGITransport(app=app)) as client:
        answer = Session(base_url="http://h:1/api/v1", client=client).send("GET", "/unified/customer")
    assert answer.body == {"path": "/api/v1/unified/customer"}
    with httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(204))) as client:
        assert Session(base_url="http://h", client=client).send("DELETE", "x").body is None


@pytest.mark.parametrize("path", ["a/../../admin", "a/%2e%2e/b", "..", "a/./b", "a?b=c", "a#b", "a\\b", "a b", "a\nb"])
def test_a_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(Rejected):
        Session(base_url="https://h/api").send("GET", path)


def side_by_side(session, number):
    with ThreadPoolExecutor(number) as pool:
        return [answer.status for answer in pool.map(lambda n: session.send("POST", f"x{n}"), range(number))]


@pytest.mark.usefixtures("local")
def test_calls_side_by_side_have_a_connection_each_and_few_are_kept(monkeypatch, settings):
    monkeypatch.setattr(guard, "KEPT_CONNECTIONS", 3)
    settings.PUSH_CONCURRENT_CALLS = 1
    lock, served, together = threading.Lock(), Counter(), threading.Barrier(8)

    def behave(connection, request):
        with lock:
            served[connection.getpeername()] += 1
        if b" /x" in request:
            together.wait(10)
        connection.sendall(answer_bytes(b"{}"))
        return KEEP

    with serve(behave) as base:
        session = Session(base_url=base)
        assert side_by_side(session, 8) == [200] * 8
        assert len(served) == 8
        pool = guard.shared_client()._only._pool
        assert len(pool._places) == sum(map(len, pool._of_place.values())) == 3
        for _ in range(5):
            session.send("POST", "again")
        assert len(served) == 8
        assert max(served.values()) == 6  # the one that was used last is used again
        guard.close_shared_client()
        assert (pool._places, pool._of_place) == ({}, {})


@pytest.mark.usefixtures("local")
def test_a_connection_in_use_is_not_kept_once_its_client_is_closed():
    begun, goes_on = threading.Event(), threading.Event()

    def behave(connection, request):
        begun.set()
        goes_on.wait(10)
        connection.sendall(answer_bytes(b"{}"))
        return KEEP

    with serve(behave) as base, ThreadPoolExecutor(1) as thread:
        answered = thread.submit(Session(base_url=base).send, "POST", "x")
        assert begun.wait(10)
        pool = guard.shared_client()._only._pool
        guard.close_shared_client()
        goes_on.set()
        assert answered.result(10).status == 200
        assert pool._places == {}


@pytest.mark.usefixtures("local")
def test_a_connection_that_the_system_closed_is_not_used_again():
    seen = []

    def behave(connection, request):
        seen.append(request.split(b" ", 2)[1])
        connection.sendall(answer_bytes(b"{}"))

    with serve(behave) as base:
        for n in range(4):
            assert Session(base_url=base).send("POST", f"x{n}").status == 200
            time.sleep(0.05)  # that it was closed takes a moment to arrive
    assert seen == [b"/x0", b"/x1", b"/x2", b"/x3"]


@pytest.mark.usefixtures("local")
def test_a_connection_that_was_idle_for_too_long_is_not_used_again(monkeypatch):
    monkeypatch.setattr(guard, "KEPT_SECONDS", 0.1)
    opened = []

    def behave(connection, request):
        opened.append(connection.getpeername())
        connection.sendall(answer_bytes(b"{}"))
        return KEEP

    with serve(behave) as one, serve(behave) as other:
        for base in (one, one, other):
            Session(base_url=base).send("POST", "x")
        assert len(set(opened)) == 2
        time.sleep(0.2)
        Session(base_url=other).send("POST", "x")
        assert len(set(opened)) == 3
        # Those that nobody asked for went, too.
        assert len(guard.shared_client()._only._pool._places) == 1


@pytest.mark.parametrize("value", ["k\r\nX-Evil: 1", "schlüssel-geheim"])
@pytest.mark.usefixtures("local")
def test_a_key_that_is_no_header_value_stops_the_connection_without_showing_it(value):
    with serve(says(answer_bytes())) as base, pytest.raises(ConnectionUnusable) as caught:
        Session(base_url=base, headers={"Api_Key": Secret(value)}).send("POST", "x", json={})
    shown = "".join(traceback.format_exception(caught.value))
    assert "X-Evil" not in shown
    assert "geheim" not in shown


# Providers that misbehave


@pytest.mark.parametrize("status", ["301 M", "302 F", "307 T", "308 P"])
@pytest.mark.usefixtures("local")
def test_a_redirect_is_not_followed(status):
    seen = []

    def behave(connection, request):
        seen.append(request)
        connection.sendall(answer_bytes(b"", status, "Location: /elsewhere"))
        return KEEP

    with serve(behave) as base, pytest.raises(ConnectionUnusable, match="redirects"):
        Session(base_url=base).send("GET", "x")
    assert len(seen) == 1


@pytest.mark.parametrize(("method", "expected"), LOST)
@pytest.mark.parametrize(
    "behave",
    [
        drip(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200),
        drip(b'"' + b"a" * 200, b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n"),
        drip(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n{"),
        lambda connection, request: time.sleep(1.2),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, pause=0.01),
    ],
    ids=["headers", "body", "stalled-then-closed", "silence", "informational"],
)
@pytest.mark.usefixtures("local")
def test_the_deadline_ends_a_drip(behave, method, expected):
    with serve(behave) as base:
        started = time.monotonic()
        with pytest.raises(expected):
            Session(base_url=base, deadline=0.5).send(method, "x")
        assert time.monotonic() - started < 1.0


@pytest.mark.usefixtures("local")
def test_the_deadline_ends_a_slow_receiver():
    done = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def receive_slowly():
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            while not done.wait(0.02):
                connection.recv(2048)

    thread = threading.Thread(target=receive_slowly)
    thread.start()
    started = time.monotonic()
    with listener, pytest.raises(OutcomeUnknown):
        Session(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=0.7).send(
            "POST", "x", json="a" * 20_000_000
        )
    assert time.monotonic() - started < 1.7
    done.set()
    thread.join()


NESTED = b"[" * 65 + b"]" * 65
BAD_ANSWERS = {
    "reset": reset,
    "closed-at-once": lambda connection, request: None,
    "no-http": says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "truncated": says(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"a": 1}'),
    "truncated-without-length": says(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"a": '),
    "html": says(answer_bytes(b"<html>Welcome</html>")),
    "half-json": says(answer_bytes(b'{"a": ')),
    "nan": says(answer_bytes(b'{"a": NaN}')),
    "not-utf8": says(answer_bytes(b'"\xff"')),
    "deep": says(answer_bytes(NESTED)),
    "very-deep": says(answer_bytes(b"[" * 100_000)),
    "many-values": says(answer_bytes(b"[" + b"[]," * 600_000 + b"[]]")),
    "oversize": says(answer_bytes(b'"' + b"a" * 10 * 1024 * 1024 + b'"')),
    "gzip-bomb": says(
        answer_bytes(gzip.compress(b'"' + b"a" * 200_000_000 + b'"'), "200 OK", "Content-Encoding: gzip")
    ),
    "no-gzip": says(answer_bytes(b"{}", "200 OK", "Content-Encoding: gzip")),
    "unasked-encoding": says(answer_bytes(b"{}", "200 OK", "Content-Encoding: gzip, gzip")),
    "huge-header": says(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
}


@pytest.mark.parametrize(("method", "expected"), LOST[:2])
@pytest.mark.parametrize("behave", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
@pytest.mark.usefixtures("local")
def test_an_unusable_answer_leaves_the_outcome_unknown_unless_nothing_can_have_changed(behave, method, expected):
    with serve(behave) as base, pytest.raises(expected):
        Session(base_url=base, deadline=10).send(method, "x")


@pytest.mark.usefixtures("local")
def test_limits_admit_what_is_just_within_them():
    body = b"[" * 64 + b"]" * 64
    with serve(says(answer_bytes(body))) as base:
        session = Session(base_url=base, max_bytes=len(body))
        assert session.send("GET", "x").text == body.decode()
    with serve(says(answer_bytes(gzip.compress(b"[1]"), "200 OK", "Content-Encoding: gzip"))) as base:
        assert Session(base_url=base).send("GET", "x").body == [1]


@pytest.mark.usefixtures("local")
def test_a_request_that_was_never_sent_is_tried_again():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RetryLater) as refused:
        Session(base_url=f"http://127.0.0.1:{port}").send("POST", "x", json={})
    with serve(lambda connection, request: None) as base, pytest.raises(RetryLater) as answered:
        Session(base_url=base).send("GET", "x")
    assert str(refused.value) == str(answered.value), "the text must not tell which port is open"


def test_a_name_that_does_not_resolve_is_tried_again_but_no_use_in_a_form(monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(RetryLater):
        Session(base_url="https://api.example").send("POST", "x")
    with pytest.raises(ConnectionUnusable):
        check_url("https://api.example")


# TLS


def certificate(name, folder):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "pair.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, path


@pytest.mark.usefixtures("local")
def test_tls_verifies_the_name_although_the_connection_goes_to_an_address(monkeypatch, tmp_path):
    tls, path = certificate("api.example", tmp_path)
    trusting = ssl.create_default_context(cafile=path)
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        return real("127.0.0.1" if host.endswith(".example") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with serve(says(answer_bytes(b"[1]")), tls) as base:
        with pytest.raises(ConnectionUnusable, match="certificate"):
            Session(base_url=base.replace("127.0.0.1", "api.example")).send("POST", "x")
        guard.close_shared_client()
        monkeypatch.setattr(httpx2, "create_ssl_context", lambda **_: trusting)
        assert Session(base_url=base.replace("127.0.0.1", "api.example")).send("POST", "x").body == [1]
        with pytest.raises(ConnectionUnusable, match="certificate"):
            Session(base_url=base.replace("127.0.0.1", "other.example")).send("POST", "x")
    guard.close_shared_client()


@pytest.mark.usefixtures("local")
def test_a_handshake_that_fails_or_drips_is_tried_again():
    def garble(connection):
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def stall(connection):
        time.sleep(1.2)

    for behave in (garble, stall):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def run(listener=listener, behave=behave):
                with contextlib.suppress(OSError), listener.accept()[0] as connection:
                    behave(connection)
                    connection.recv(65536)

            thread = threading.Thread(target=run)
            thread.start()
            started = time.monotonic()
            with pytest.raises(RetryLater):
                Session(base_url=f"https://127.0.0.1:{listener.getsockname()[1]}", deadline=0.5).send("POST", "x")
            assert time.monotonic() - started < 1.5
            thread.join()


# The address guard

HOSTS = """
    127.0.0.1 127.1 127.0.1 127.255.255.254 0 0.0.0.0 0.1.2.3 2130706433 0x7f000001 0x7f.1 017700000001
    0177.0.0.1 0x7f.0x0.0x0.0x1 127.0.0.1. localhost localhost. LOCALHOST app.localhost loop.example
    10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 0xc0a80001 3232235521 192.168.1
    169.254.169.254 169.254.169.253 0xa9fea9fe 2852039166 169.254.43518 metadata.google.internal
    100.64.0.1 100.100.100.200 168.63.129.16 192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1
    198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    [::1] [::] [0:0:0:0:0:0:0:1] [::127.0.0.1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:10.0.0.1]
    [::ffff:169.254.169.254] [::ffff:0:127.0.0.1] [64:ff9b::127.0.0.1] [64:ff9b::a9fe:a9fe]
    [64:ff9b::10.0.0.1] [64:ff9b:1::1] [2002:7f00:1::] [2002:a9fe:a9fe::1] [2001::1]
    [2001:0:7f00:1::] [2001:20::1] [2001:db8::1] [3fff::1] [5f00::1] [100::1] [fe80::1] [fec0::1]
    [fc00::1] [fd00:ec2::254] [fd12:3456::1] [ff02::1] [ff0e::1] [::ffff:0.0.0.0]
    ①②⑦.⓪.⓪.① mixed.example six.example mapped.example
"""
BLOCKED = [
    *(f"https://{host}/" for host in HOSTS.split()),
    "http://ok.example/",
    "http://ok.example:443/",
    "https://ok.example:80/",
    "https://ok.example:22/",
    "https://ok.example:0/",
    "https://ok.example:65535/",
    "https://ok.example:99999/",
    "https://ok.example:-1/",
    "https://user:pass@ok.example/",
    "https://user@ok.example/",
    "https://ok.example@127.0.0.1/",
    "https://127.0.0.1:443@127.0.0.1/",
    "https://ok.example\\@127.0.0.1/",
    "https://127.0.0.1\\.ok.example/",
    "https://127.0.0.1:443/",
    "http://127.0.0.1:8443/",
    "https:///path",
    "https://",
    "//ok.example/",
    "ok.example",
    "",
    "ftp://ok.example/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "unix:/run/docker.sock",
    "javascript:alert(1)",
    "https://[::1%25lo]/",
    "https://[fe80::1%25eth0]/",
    "https://ok.example\x00.evil/",
    "https://ok.exa\r\nmple/",
    "https://" + "a" * 300 + ".example/",
]

NAMES = {
    "ok.example": ["93.184.216.34"],
    "loop.example": ["127.0.0.1"],
    "mixed.example": ["93.184.216.34", "10.0.0.1"],
    "six.example": ["2606:2800:220:1::1", "::1"],
    "mapped.example": ["93.184.216.34", "::ffff:169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
    "app.localhost": ["127.0.0.1"],
    "nat64.example": ["64:ff9b::93.184.216.34"],
    "two.example": ["93.184.216.34", "2606:2800:220:1::1"],
}


@pytest.fixture
def reached(monkeypatch):
    """The judge: every address that any socket tried to reach. None is let through."""
    attempts = []

    def connect(sock, address):
        attempts.append(address)
        raise ConnectionRefusedError

    real = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        found = []
        for address in NAMES.get(host, [host]):
            # Names that are not in the table stay inside this machine.
            flags = 0 if host.lower().startswith("localhost") else socket.AI_NUMERICHOST
            found += real(address, port, type=socket.SOCK_STREAM, flags=flags)
        return found

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return attempts


@pytest.mark.parametrize("url", BLOCKED)
def test_a_blocked_address_is_never_reached(url, reached):
    with pytest.raises(ConnectionUnusable) as refused:
        check_url(url)
    for method in ("GET", "POST"):
        with pytest.raises((ConnectionUnusable, RetryLater)):
            Session(base_url=url).send(method, "x")
    assert reached == []
    found = ("127.0.0.1", "169.254", "10.0.0", "::1")
    assert not any(address in str(refused.value) for address in found if address not in url)


def test_the_corpus_is_not_small():
    assert len(set(BLOCKED)) >= 60


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("https://ok.example/", [("93.184.216.34", 443)]),
        ("https://ok.example:8443/", [("93.184.216.34", 8443)]),
        ("https://nat64.example/", [("64:ff9b::5db8:d822", 443, 0, 0)]),
        ("https://two.example/", [("93.184.216.34", 443), ("2606:2800:220:1::1", 443, 0, 0)]),
    ],
)
def test_a_public_address_is_reached_at_what_was_judged(url, addresses, reached):
    check_url(url)
    assert reached == []
    with pytest.raises(RetryLater):
        Session(base_url=url).send("GET", "x")
    assert reached == addresses


def test_a_name_that_changes_after_the_check_is_judged_again(reached, monkeypatch):
    monkeypatch.setitem(NAMES, "turn.example", ["93.184.216.34"])
    check_url("https://turn.example")
    monkeypatch.setitem(NAMES, "turn.example", ["127.0.0.1"])
    with pytest.raises(ConnectionUnusable):
        Session(base_url="https://turn.example").send("GET", "x")
    assert reached == []


def test_a_name_is_resolved_once_per_connection(reached, monkeypatch):
    asked = []
    judged = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        asked.append(host)
        return judged(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(RetryLater):
        Session(base_url="https://ok.example").send("GET", "x")
    assert asked.count("ok.example") == 1


def test_settings_open_exactly_what_they_name(settings, reached):
    settings.ALLOW_HTTP_TARGETS = True
    check_url("http://ok.example:443/")
    with pytest.raises(ConnectionUnusable, match="Port 80"):
        check_url("http://ok.example/")
    with pytest.raises(ConnectionUnusable):
        check_url("http://127.0.0.1:443/")
    settings.ALLOW_HTTP_TARGETS = False
    settings.ALLOWED_PRIVATE_NETWORKS = ["10.0.0.0/30", "fd00::/64"]
    for url in (
        "http://10.0.0.1:8080/",
        "https://10.0.0.3/",
        "http://[::ffff:10.0.0.1]:81/",
        "http://[fd00::1]/",
    ):
        check_url(url)
    check_url("https://mixed.example/")
    for url in (
        "http://10.0.0.4/",
        "http://[fd00:0:0:1::1]/",
        "http://mixed.example/",
        "https://mixed.example:81/",
    ):
        with pytest.raises(ConnectionUnusable):
            check_url(url)
    assert reached == []


def test_a_base_address_has_no_query():
    with pytest.raises(ConnectionUnusable, match=r"\?"):
        Session(base_url="https://h/?a=").send("GET", "x")


def test_the_client_serves_nobody_but_a_session():
    with guard._build_client() as client, pytest.raises(LookupError):
        client.get("https://127.0.0.1/")


# What an answer means


def answer(status, body=None, method="POST", text="", **headers):
    return Answer(
        method=method,
        status=status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        body=body,
        text=text,
        elapsed=0.1,
        request_id="r1",
    )


@pytest.mark.parametrize(
    ("status", "method", "expected"),
    [
        *((status, "POST", ConnectionUnusable) for status in (401, 403)),
        *((status, "GET", Gone) for status in (404, 410)),
        *((status, "POST", RetryLater) for status in (425, 429)),
        *((status, "GET", RetryLater) for status in (408, 425, 429, 503)),
        *((status, "POST", OutcomeUnknown) for status in (408, 500, 502, 503, 504, 520)),
        *((status, "GET", RetryLater) for status in (500, 502, 504, 520)),
        *((status, "PATCH", Rejected) for status in (400, 402, 405, 409, 413, 422, 451)),
    ],
)
def test_a_status_says_what_to_do_next(status, method, expected):
    with pytest.raises(ConnectorError) as caught:
        raise_for_answer(answer(status, method=method))
    assert type(caught.value) is expected
    assert caught.value.status == status
    assert caught.value.remote_request_id == "r1"
    assert caught.value.message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "120"}, 120),
        ({"retry_after": "0"}, 0),
        ({"retry_after": "9" * 5000}, 86400),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:29:00 GMT"}, 0),
        ({"retry_after": "Wed, 21 Oct 2099 07:28:00 GMT"}, 86400),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 -0000"}, 0),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "-5"}, None),
        ({"retry_after": "²"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read(headers, seconds):
    for status in (429, 503):
        with pytest.raises(ConnectorError) as caught:
            raise_for_answer(answer(status, **headers))
        if status == 503 and seconds is None:
            assert isinstance(caught.value, OutcomeUnknown), "a proxy may say so of a write that was applied"
        else:
            assert isinstance(caught.value, RetryLater)
            assert caught.value.retry_after == seconds


@pytest.mark.usefixtures("local")
def test_retry_after_is_read_from_the_wire():
    data = answer_bytes(
        b"busy",
        "429 Too Many",
        "Retry-After: Wed, 21 Oct 2015 07:28:07 GMT",
        "Date: Wed, 21 Oct 2015 07:28:00 GMT",
    )
    with serve(says(data)) as base:
        late = Session(base_url=base).send("POST", "x")
    assert late.body is None
    assert late.text == "busy"
    with pytest.raises(RetryLater) as caught:
        raise_for_answer(late)
    assert caught.value.retry_after == 7


# What is left of a rate limit


DATE = {"date": "Wed, 21 Oct 2015 07:28:00 GMT"}
EPOCH = 1445412480  # the same moment


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit_remaining": "0", "ratelimit_reset": "30"}, 30),
        ({"ratelimit_remaining": "1", "ratelimit_reset": "30"}, None),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "30"}, 30),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": str(EPOCH + 45), **DATE}, 45),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": f"{EPOCH + 45}.5", **DATE}, 45.5),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": f"{EPOCH + 45}000", **DATE}, 45),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": str(EPOCH - 45), **DATE}, None),
        ({"x_rate_limit_remaining": "0", "x_rate_limit_reset": "7"}, 7),
        ({"ratelimit": '"default";r=0;t=30'}, 30),
        ({"ratelimit": '"default";r=50;t=30'}, None),
        ({"ratelimit": '"burst";r=0;t=5, "daily, per key";r=0;t=4000, "hourly";r=7;t=9000'}, 4000),
        ({"ratelimit": '"default"; r=0 ; t=30'}, 30),
        ({"ratelimit": "limit=100, remaining=0, reset=12"}, 12),
        ({"ratelimit": "limit=100, remaining=10, reset=12"}, None),
        ({"ratelimit_remaining": "0, 8", "ratelimit_reset": "3, 900"}, 3),
        ({"ratelimit": '"a";r=0;t=5', "x_ratelimit_remaining": "0", "x_ratelimit_reset": "60"}, 60),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "9" * 15}, 86400),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "9" * 5000}, None),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "0"}, None),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "-5"}, None),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": "soon"}, None),
        ({"x_ratelimit_remaining": "0"}, None),
        ({"x_ratelimit_remaining": "-1", "x_ratelimit_reset": "30"}, None),
        ({"x_ratelimit_reset": "30"}, None),
        ({"ratelimit": '"""'}, None),
        ({"ratelimit": "0"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [200, 404, 429, 500])
def test_an_exhausted_rate_limit_is_remembered_until_it_is_asked_for(headers, seconds, status):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, headers=named, json={}))
    with httpx2.Client(transport=transport) as client:
        session = Session(base_url="http://h", client=client)
        assert session.take_exhausted() is None
        session.send("GET", "x")
    found = session.take_exhausted()
    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=0.5))
    assert session.take_exhausted() is None


def test_the_longest_wait_of_several_answers_counts_and_grows_shorter_with_time(monkeypatch):
    resets = iter(["50", "100", "20", "5"])

    def answers(request):
        return httpx2.Response(200, headers={"RateLimit-Remaining": "0", "RateLimit-Reset": next(resets)}, json={})

    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with httpx2.Client(transport=httpx2.MockTransport(answers)) as client:
        session = Session(base_url="http://h", client=client)
        for _ in range(3):
            session.send("GET", "x")
            clock[0] += 10
        assert session.take_exhausted() == 80  # 100 seconds from the second answer on
        session.send("GET", "x")
        clock[0] += 5
        assert session.take_exhausted() is None


@pytest.mark.usefixtures("local")
def test_an_unusable_answer_still_tells_what_is_left():
    with serve(says(answer_bytes(b"<html>", "200 OK", 'RateLimit: "default";r=0;t=30'))) as base:
        session = Session(base_url=base)
        with pytest.raises(OutcomeUnknown):
            session.send("POST", "x")
    assert session.take_exhausted() == pytest.approx(30, abs=1)


def test_a_request_ends_within_the_time_that_a_worker_has_to_stop():
    assert Session(base_url="https://h").deadline == 25.0


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"message": "No\x00 \n such   plan"}, "No such plan", ""),
        ({"error": {"message": "Bad email", "code": "E1"}}, "Bad email", "E1"),
        ({"error": "invalid_grant", "error_description": "Expired"}, "Expired", "invalid_grant"),
        ({"detail": ["One", "Two"]}, "One", ""),
        ({"errors": [{"detail": "Third"}], "code": 42}, "Third", "42"),
        ({"message": "a" * 5000}, "a" * 300, ""),
        ({"message": {"deep": 1}}, "the text", ""),
        (None, "the text", ""),
    ],
)
def test_a_refusal_carries_the_providers_words(body, message, code):
    with pytest.raises(Rejected) as caught:
        raise_for_answer(answer(422, body, text="the text"))
    assert (caught.value.message, caught.value.code) == (message, code)
    assert str(caught.value) == message


@pytest.mark.usefixtures("local")
def test_a_provider_that_quotes_the_key_does_not_get_it_into_the_message():
    with serve(says(answer_bytes(b'{"message": "Invalid key sk_live_123456"}', "400 Bad Request"))) as base:
        bad = Session(base_url=base, headers={"Authorization": Secret("Bearer sk_live_123456")}).send("POST", "x")
    with pytest.raises(Rejected, match=r"^Invalid key \*\*\*$"):
        raise_for_answer(bad)
    assert "sk_live" not in bad.text


def test_redaction_goes_by_name_and_type():
    names = [
        "Authorization",
        "api_key",
        "Api-Key",
        "X-API-KEY",
        "Cookie",
        "set-cookie",
        "X-Auth",
        "client_secret",
    ]
    assert set(redact(dict.fromkeys(names, "v")).values()) == {"***"}
    plain = {"Content-Type": "a", "Request-Id": "b", "Idempotency-Key": "c"}
    assert redact(plain) == plain
    assert redact({"X-Plain": Secret("v")}) == {"X-Plain": "***"}
    assert "sk_live" not in repr(Session(base_url="https://h", headers={"a": "sk_live"}))


def test_every_special_network_of_ipv4_and_ipv6_is_blocked():
    """Beyond the corpus: first and last address of each registered special-purpose block."""
    blocks = """
        0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
        192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
        240.0.0.0/4 ::/127 ::ffff:0:0/104 64:ff9b::/104 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32
        2002::/16 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8"""
    for block in map(ipaddress.ip_network, blocks.split()):
        for address in (block[0], block[1], block[-1]):
            assert not guard._is_public(guard._plain(address)), address
    for address in ("1.1.1.1", "8.8.8.8", "2606:4700::1", "2a00:1450:4001::1", "64:ff9b::808:808"):
        assert guard._is_public(ipaddress.ip_address(address))
