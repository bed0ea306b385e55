#!/usr/bin/env python
"""The one command line of the hub: `manage.py help` lists what it can do."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError:
        print(
            "Django is not installed for this Python. Either of these starts the hub:\n"
            "  pip install uv && uv run manage.py quickstart\n"
            "  python3 -m venv .venv && .venv/bin/pip install --require-hashes -r requirements.lock"
            " && .venv/bin/python manage.py quickstart",
            file=sys.stderr,
        )
        sys.exit(1)
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
