"""What most tests start from: an organization, its key, and connections."""

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client

from connectors.models import ApiKey, Connection
from customers.models import Organization


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
        connection = Connection(**{**defaults, **fields})
        if credentials:
            connection.seal_credentials(credentials)
        connection.save()
        return connection

    return make


@pytest.fixture
def api() -> Client:
    return Client()
