"""A hub that dies, or stops for a while, at a numbered point of one request: a process of its own.

    python -m tests.api.mortal          reads jobs, a line of JSON each, and answers each with a line

Django is set up once; a job is a fork that makes one request and tells what came of it. Points are before and after
every statement and every commit. The product knows nothing of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

KILLED = 137


def database_url() -> str:
    """The tests' own database, for another process."""
    from django.conf import settings
    from django.db import connection

    database, name = settings.DATABASES["default"], connection.settings_dict["NAME"]
    if connection.vendor != "postgresql":
        return f"sqlite:///{name}"
    login = quote(database["USER"]) + (f":{quote(database['PASSWORD'])}" if database["PASSWORD"] else "")
    return f"postgres://{login}@{database['HOST']}:{database['PORT'] or 5432}/{name}"


class Mortal:
    """The process, from the tests' side."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "DATABASE_URL": database_url(), "LOG_LEVEL": "CRITICAL"}
        environment["DJANGO_SETTINGS_MODULE"] = "hub.settings"
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)

    def tell(self, **job: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """{"status", "body", "headers"}, {"died"}, or {"paused"}: any further line lets it go on."""
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told


@contextmanager
def counted(reach: Callable[[str], None]) -> Iterator[None]:
    from unittest import mock

    from django.db import connection
    from django.db.backends.base.base import BaseDatabaseWrapper

    commit = BaseDatabaseWrapper.commit

    def committing(wrapper: BaseDatabaseWrapper) -> None:
        reach("before COMMIT")
        commit(wrapper)
        reach("after COMMIT")

    def executing(execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        reach(f"before {sql}")
        result = execute(sql, params, many, context)
        reach(f"after {sql}")
        return result

    with mock.patch.object(BaseDatabaseWrapper, "commit", committing), connection.execute_wrapper(executing):
        yield


def carry_out(job: dict[str, Any], told: IO[str], heard: IO[str]) -> None:
    """`die_at`: the number of a point; `pause_at`: how the name of a point begins."""
    from django.db import connection
    from django.test import Client

    passed = 0
    pause_at = job.get("pause_at")

    def say(**what: Any) -> None:
        told.write(json.dumps(what) + "\n")
        told.flush()

    def reach(point: str) -> None:
        nonlocal passed, pause_at
        passed += 1
        if passed == job.get("die_at"):
            say(died=point)
            os._exit(KILLED)
        if pause_at and point.startswith(pause_at):
            pause_at = None
            say(paused=point)
            heard.readline()

    with counted(reach):
        answer = Client().generic(
            "POST", job["path"], job["body"], content_type="application/json", headers=job["headers"]
        )
    say(status=answer.status_code, body=answer.content.decode(), headers=dict(answer.items()))
    connection.close()
    if pool := getattr(connection, "pool", None):
        pool.close()
    os._exit(0)


def main() -> None:
    import django
    from django.test.utils import setup_test_environment

    django.setup()
    setup_test_environment()
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            carry_out(json.loads(line), sys.stdout, sys.stdin)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
