"""How many SQL statements each mirrored endpoint needs: fixed, so that a growth is seen.

Transaction control counts too. A first call sets the key's last use and is not counted.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection as database
from django.test import Client
from django.test.utils import CaptureQueriesContext

from connectors.models import Connection, CustomerLink
from customers.models import Customer

ROOTFI = "/v3/ecommerce/customers"
CHEQPAY = {"externalId": "A", "firstName": "John"}
LINKS = {"name": "Acme", "email": "a@example.com"}
COMMENDA = {"name": "Acme", "corporation_id": "corp_123"}


def batch(size: int) -> dict[str, Any]:
    return {"company_id": 1089, "data": [{"name": f"Example {n}", "email": ""} for n in range(size)]}


@pytest.fixture
def count(api: Client, api_key: str, connect: Callable[..., Connection]) -> Callable[[str, str, Any], int]:
    for provider in ("commenda", "cheqpay", "rootfi"):
        connect(provider)
    headers = {
        "Authorization": f"Bearer {api_key}",
        "x-api-key": api_key,
        "x-merchant-id": "M-1001",
        "api_key": api_key,
    }

    def send(method: str, path: str, body: Any) -> int:
        data = json.dumps(body) if body is not None else ""
        with CaptureQueriesContext(database) as queries:
            answer = api.generic(method, path, data, content_type="application/json", headers=headers)
        assert answer.status_code < 300, answer.content
        return len(queries)

    send("POST", "/customers/add-update", CHEQPAY)
    send("POST", "/api/v1/customers", COMMENDA)
    return send


@pytest.mark.parametrize(
    ("method", "path", "body", "most"),
    [
        ("POST", "/api/v1/unified/customer", LINKS, 7),
        ("PUT", "/api/v1/unified/customer/{customer}", LINKS, 9),
        ("GET", "/api/v1/unified/customer/{customer}", None, 2),
        ("GET", "/api/v1/unified/customers", None, 3),
        ("POST", "/api/v1/customers", COMMENDA, 12),
        ("GET", "/api/v1/customers?corporation_id=corp_123", None, 5),
        ("GET", "/api/v1/customers/{link}", None, 2),
        ("POST", "/api/v1/customers/{link}", {"name": "Renamed"}, 15),
        # One of them asks which systems are to delete the record as well.
        ("DELETE", "/api/v1/customers/{link}", None, 11),
        ("POST", "/customers/add-update", {**CHEQPAY, "externalId": "new"}, 14),
        ("POST", "/customers/add-update", {**CHEQPAY, "firstName": "Jane"}, 15),
        ("GET", "/customers/A", None, 3),
        ("POST", ROOTFI, batch(1), 14),
        ("POST", ROOTFI, batch(500), 14),
        ("GET", ROOTFI, None, 3),
        ("GET", "/v3/core/syncs", None, 3),
    ],
)
def test_an_endpoint_needs_at_most_so_many_statements(
    count: Callable[[str, str, Any], int], method: str, path: str, body: Any, most: int
) -> None:
    link = CustomerLink.objects.get(connection__provider="commenda")
    needed = count(method, path.format(customer=Customer.objects.first().public_id, link=link.uid), body)
    assert needed <= most
