"""Production refuses to start with what is only safe on a laptop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAFE = {
    "PRODUCTION": "true",
    "SECRET_KEY": "0123456789abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "SEALING_KEYS": "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=",
    "ALLOWED_HOSTS": "hub.example.com",
    "DATABASE_URL": "postgres://hub@127.0.0.1/hub",
}


def start(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    return subprocess.run(
        [sys.executable, "manage.py", "check", *arguments],
        cwd=ROOT,
        env={**clean, "HUB_DATA": str(tmp_path / "data"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_laptop_needs_no_settings_and_keeps_its_own_keys(tmp_path: Path) -> None:
    assert start(tmp_path).returncode == 0
    keys = {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert keys.keys() == {"secret_key", "sealing_key"}
    assert all((tmp_path / "data" / name).stat().st_mode & 0o077 == 0 for name in keys)
    assert start(tmp_path).returncode == 0
    assert keys == {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}


def test_production_with_safe_settings_passes_the_deployment_checks(tmp_path: Path) -> None:
    result = start(tmp_path, "--deploy", "--fail-level", "WARNING", **SAFE)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "data").exists(), "production makes up no keys"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SECRET_KEY": ""}, "SECRET_KEY"),
        ({"SECRET_KEY": "short"}, "SECRET_KEY"),
        ({"SEALING_KEYS": ""}, "SEALING_KEYS"),
        ({"ALLOWED_HOSTS": ""}, "ALLOWED_HOSTS"),
        ({"ALLOWED_HOSTS": "*"}, "ALLOWED_HOSTS"),
        ({"DEBUG": "true"}, "DEBUG"),
    ],
)
def test_production_refuses_unsafe_settings_by_name(tmp_path: Path, change: dict[str, str], named: str) -> None:
    result = start(tmp_path, **{**SAFE, **change})
    assert result.returncode != 0
    assert named in result.stderr


def test_serving_other_hosts_is_production(tmp_path: Path) -> None:
    result = start(tmp_path, ALLOWED_HOSTS="hub.example.com")
    assert result.returncode != 0
    assert "PRODUCTION" in result.stderr
