"""Every command that the README shows works as it stands.

Those that install (`pip`, `python3 -m venv`) and the test command itself are run by `.ci/run` in a fresh clone.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.screenshots.make import LARGEST
from tests.screenshots.make import README as PICTURES
from tests.test_quickstart import environment, free_port, quickstart

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
MANAGE = "uv run manage.py "
INSTALLING = (
    "pip install uv",
    "python3 -m venv .venv",
    ".venv/bin/pip install --require-hashes -r requirements.lock",
    ".venv/bin/python manage.py quickstart",
    "uv run --group dev pytest",
)


def test_every_command_is_run_by_somebody() -> None:
    others = [c for c in COMMANDS if not c.startswith(("curl ", MANAGE)) and c not in INSTALLING]
    assert others == []
    assert set(INSTALLING) <= set(COMMANDS)


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"`((?:connectors|customers|hub|tests|\.ci)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name


def test_its_pictures_are_small_and_made_by_the_command() -> None:
    shown = re.findall(r"!\[[^\]]+\]\((tests/screenshots/(\w+)\.png)\)", README)
    assert {name for _, name in shown} == set(PICTURES)
    for path, _ in shown:
        assert (ROOT / path).stat().st_size < LARGEST


def test_every_setting_it_names_is_one() -> None:
    settings = (ROOT / "hub" / "settings.py").read_text()
    for name in re.findall(r"^([A-Z_]{5,})=", README, re.MULTILINE) + re.findall(r"`([A-Z]{3,}_[A-Z_]+)`", README):
        assert f'"{name}"' in settings or name == "HUB_KEY", name


@pytest.mark.skipif(not shutil.which("curl"), reason="the shown calls need curl")
def test_the_shown_calls_and_commands_work(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "customers.csv").write_text("external_id,name,email\nX-1,Example Company,x@example.com\n")
    with quickstart(data, free_port(), tmp_path / "log") as hub:
        calls = [c for c in COMMANDS if c.startswith("curl ")]
        assert len(calls) == 6
        for call in calls:
            answer = subprocess.run(
                ["bash", "-c", call.replace("127.0.0.1:8000", f"127.0.0.1:{hub.port}") + " -sS --fail-with-body"],
                env={**os.environ, "HUB_KEY": hub.key},
                capture_output=True,
                text=True,
                check=False,
            )
            assert answer.returncode == 0, answer.stderr + answer.stdout
        for command in [c for c in COMMANDS if c.startswith(MANAGE) and "quickstart" not in c]:
            arguments = shlex.split(command.removeprefix(MANAGE))
            done = subprocess.run(
                [sys.executable, str(ROOT / "manage.py"), *arguments],
                cwd=tmp_path,
                env=environment(HUB_DATA=str(data)),
                capture_output=True,
                text=True,
                check=False,
            )
            # 3: what Links refuses (a customer without an e-mail address) needs attention, as it should.
            assert done.returncode in (0, 3), command + done.stderr + done.stdout
            assert "Traceback" not in done.stderr
