"""What holds for every provider in the written-down list."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from connectors import providers
from connectors.models import Connection
from connectors.provider import Provider
from connectors.providers import PROVIDERS
from connectors.sealing import Secret
from customers.editing import EDITABLE
from hub.urls import urlpatterns

FOLDER = Path(providers.__file__).parent
WIRE = Path(__file__).parent.parent / "wire"
every = pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)


def test_the_list_is_complete() -> None:
    modules = {path.stem for path in FOLDER.iterdir() if path.stem not in ("__init__", "__pycache__")}
    ours = {slug for slug, one in PROVIDERS.items() if type(one).__module__.startswith("connectors.")}
    assert modules == ours, "tests may have added theirs"


@every
def test_a_provider_declares_what_the_engine_and_the_screens_ask_for(provider: Provider) -> None:
    assert re.fullmatch(r"[a-z]{2,32}", provider.slug)
    assert provider.label
    assert provider.documentation.startswith("https://")
    assert provider.fields <= set(EDITABLE)
    assert "name" in provider.fields
    assert provider.urls
    capabilities = provider.capabilities(Connection(provider=provider.slug))
    assert 1 <= capabilities.batch <= 500
    headers = provider.headers(account="1", credentials=dict.fromkeys(provider.credentials, "s3cret"))
    assert any(isinstance(value, Secret) for value in headers.values())
    assert "s3cret" not in repr(headers)


@every
def test_a_provider_has_its_logo_and_its_documented_examples(provider: Provider) -> None:
    assert (FOLDER.parent / "static" / "connectors" / f"{provider.slug}.svg").exists()
    assert all(json.loads(path.read_text()) for path in (WIRE / provider.slug).glob("*.json"))
    assert list((WIRE / provider.slug).glob("*.json"))


def routes() -> Iterator[tuple[str, str]]:
    """Every mirrored (method, path), from the route list itself."""
    for provider in PROVIDERS.values():
        for pattern in provider.urls:
            assert pattern in urlpatterns
            path = re.sub(r"\(\?P<[^>]+>[^)]*\)", "some-id", str(pattern.pattern)).replace("/?$", "").strip("^$")
            path = re.sub(r"\(\?:([^)]*)\)\?", r"\1", path)
            for method in pattern.callback.actions:
                yield method.upper(), f"/{path}"


@pytest.mark.django_db
@pytest.mark.parametrize(("method", "path"), list(routes()))
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong", "x-api-key": "wrong", "x-merchant-id": "M-1001", "api_key": "wrong"}],
    ids=["no key", "wrong key"],
)
def test_no_route_answers_without_a_key(method: str, path: str, headers: dict[str, str]) -> None:
    answer = Client().generic(method, path, b"{}", content_type="application/json", headers=headers)
    assert answer.status_code == 401
    body: dict[str, Any] = json.loads(answer.content)
    assert body.keys() & {"message", "error"}
    assert answer["Request-Id"]
