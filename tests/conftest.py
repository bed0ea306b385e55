"""What most tests start from: an organization, its key, and connections."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.conf import settings
from django.core.cache import cache
from django.db import connection
from django.test import Client

from connectors.guard import close_shared_client
from connectors.models import ApiKey, Connection
from connectors.providers import PROVIDERS
from customers.models import Organization


@pytest.fixture(autouse=True)
def _providers_as_written_down() -> Iterator[None]:
    """Take back what a test adds to the list of providers."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


@pytest.fixture(autouse=True, scope="session")
def _passwords_are_hashed_quickly() -> None:
    """A hash that is slow on purpose takes a quarter of a second of each test with somebody in it."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture(autouse=True)
def _nothing_cached() -> None:
    """The dashboard keeps its counters for a while, by ids that the next test gives out again."""
    cache.clear()


@pytest.fixture
def organization(db: None) -> Organization:
    return Organization.objects.create(name="Demo", slug="demo")


@pytest.fixture
def other_organization(db: None) -> Organization:
    return Organization.objects.create(name="Other", slug="other")


@pytest.fixture
def api_key(organization: Organization) -> str:
    """The secret of a key that may do everything in `organization`."""
    return ApiKey.issue(organization=organization, name="shop")[1]


@pytest.fixture
def connect(organization: Organization) -> Callable[..., Connection]:
    """Make a connection; by default one that calls the hub with the documented account."""
    accounts = {"commenda": "corp_123", "cheqpay": "M-1001", "rootfi": "1089"}

    def make(provider: str, **fields: Any) -> Connection:
        defaults: dict[str, Any] = {
            "organization": organization,
            "provider": provider,
            "name": provider,
            "account": accounts.get(provider, ""),
            "direction": Connection.Direction.CALLS_US,
        }
        credentials = fields.pop("credentials", None)
        made = Connection(**{**defaults, **fields})
        if credentials:
            made.seal_credentials(credentials)
        made.save()
        return made

    return make


@pytest.fixture
def api() -> Client:
    return Client()


@pytest.fixture
def server(transactional_db: None, tmp_path: Path) -> Iterator[str]:
    """The address of the real web server, on the tests' own database. Unlike Django's, it passes `api_key` headers."""
    database = settings.DATABASES["default"]
    name = connection.settings_dict["NAME"]
    url = f"sqlite:///{name}"
    if connection.vendor == "postgresql":
        login = quote(database["USER"]) + (f":{quote(database['PASSWORD'])}" if database["PASSWORD"] else "")
        url = f"postgres://{login}@{database['HOST']}:{database['PORT'] or 5432}/{name}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "DATABASE_URL": url, "LOG_LEVEL": "ERROR"}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1", "--port", str(port)),
                *("--blocking-threads", "8", "--no-ws", "hub.wsgi:application"),
            ],
            env=environment,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/livez", timeout=5):
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)
        close_shared_client()
