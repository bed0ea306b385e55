"""Pictures of the admin, from a hub of its own with examples: `python -m tests.screenshots.make [FOLDER]`.

All go to the folder (data/screenshots); those that the README shows also go beside this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
README = ("customer", "push_preview")
LARGEST = 200_000  # bytes: the pictures are kept with the source


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture. `path` may name ids that `dress` tells."""

    name: str
    path: str
    size: tuple[int, int] = (1280, 860)
    dark: bool = False
    # What is scrolled to, where the top of the page is not what the picture is about.
    at: str = ""


SHOTS = (
    Shot(name="dashboard", path="/admin/"),
    Shot(name="customers", path="/admin/customers/customer/?organization={demo}"),
    Shot(name="customer", path="/admin/customers/customer/{rejected}/change/"),
    Shot(name="push_preview", path="/admin/customers/customer/{edited}/preview/?connection={preview}"),
    Shot(name="connection", path="/admin/connectors/connection/{connection}/change/"),
    Shot(name="needs_you", path="/admin/connectors/customerlink/needs-you/"),
    Shot(name="needs_you_dark", path="/admin/connectors/customerlink/needs-you/", dark=True),
    Shot(name="phone", path="/admin/customers/customer/{rejected}/change/", size=(360, 740)),
)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        # The settings are needed to start; the hub of this machine is not.
        os.environ |= {"HUB_DATA": place, "DJANGO_SETTINGS_MODULE": "hub.settings"}
        django.setup()
        from tests.test_quickstart import environment, free_port, quickstart

        data = Path(place) / "data"
        with quickstart(data, free_port(), Path(place) / "log") as hub:
            told = subprocess.run(
                [
                    sys.executable,
                    "manage.py",
                    "shell",
                    "-v0",
                    "-c",
                    "from tests.screenshots import dress; dress.main()",
                ],
                cwd=ROOT,
                env=environment(HUB_DATA=str(data)),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            password = json.loads((data / "quickstart.json").read_text())["password"]
            take(f"http://127.0.0.1:{hub.port}", password, json.loads(told.stdout), folder)


def take(url: str, password: str, ids: dict[str, Any], folder: Path) -> None:
    from tests.browser import person as people

    folder.mkdir(parents=True, exist_ok=True)
    try:
        looking = people.Person(people.browser(scripts=True), mode=people.LIGHT, url=url)
        looking.open("/admin/login/?next=/livez").fill("#id_username", "admin").fill("#id_password", password)
        looking.click("button[type=submit]")
        for shot in SHOTS:
            looking.resize(shot.size)
            looking.colours(dark=shot.dark)
            looking.open(shot.path.format(**ids))
            looking.repaint(dark=shot.dark)
            if shot.at:
                looking.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", shot.at)
            picture = folder / f"{shot.name}.png"
            looking.driver.save_screenshot(str(picture))
            if shot.name in README:
                shutil.copy(picture, FOLDER)
            size = picture.stat().st_size
            sys.stdout.write(f"{picture} {size // 1000} kB{' TOO LARGE' if size > LARGEST else ''}\n")
    finally:
        people.quit_all()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "data" / "screenshots")
