"""A client that a stock generator makes of the served document writes and lists customers at a real server."""

import importlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connectors.models import Connection
from customers.models import Customer, Organization

CONFIG = {"package_name_override": "generated_hub_client", "post_hooks": [], "literal_enums": True}


@pytest.fixture
def generated(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Modules of the client that was generated from what the server serves."""
    with urllib.request.urlopen(f"{server}/api/schema/", timeout=60) as answer:
        (tmp_path / "openapi.json").write_bytes(answer.read())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning"),
            *("--path", "openapi.json", "--config", "config.json", "--output-path", "generated_hub_client"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("generated_hub_client")]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"generated_hub_client{name}")


def test_a_generated_client_creates_changes_and_lists(
    generated: Callable[[str], Any],
    server: str,
    api_key: str,
    organization: Organization,
    connect: Callable[..., Connection],
) -> None:
    connect("commenda")
    models = generated(".models")
    with generated("").AuthenticatedClient(base_url=server, token=api_key) as client:
        create = generated(".api.links.create_unified_customer")
        made = create.sync(client=client, body=models.LinksCustomerRequest(email="ada@example.com", name="Ada"))
        assert isinstance(made, models.LinksCustomerAnswer)
        assert made.data.email == "ada@example.com"

        change = generated(".api.links.update_unified_customer")
        changed = change.sync(
            made.data.id,
            client=client,
            body=models.LinksCustomerRequest(email="ada@example.com", name="Ada Lovelace", phone="+4930123456"),
        )
        assert changed.data.phone == "+4930123456"

        refused = create.sync_detailed(client=client, body=models.LinksCustomerRequest(email="ada", name="Ada"))
        assert refused.status_code == 400
        assert isinstance(refused.parsed, models.LinksError)

        listed = generated(".api.links.get_paginated_unified_customer_lists").sync(client=client, limit=5)
        assert [customer.name for customer in listed.data] == ["Ada Lovelace"]

        answer = generated(".api.commenda.create_customer").sync(
            client=client, body=models.CommendaCustomerRequest(corporation_id="corp_123", name="Grace Hopper")
        )
        assert answer.data.name == "Grace Hopper"
        found = generated(".api.commenda.list_customers").sync(client=client, corporation_id="corp_123")
        assert found.total_customers == 1

        # PostgreSQL tells of what was committed once all earlier transactions of its cluster have ended.
        until = time.monotonic() + 30
        while len((own := generated(".api.customer_hub.list_changes").sync(client=client)).data) < 3:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert [change.type_ for change in own.data] == ["created", "updated", "created"]
    assert Customer.objects.filter(organization=organization).count() == 2
