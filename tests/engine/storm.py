"""The processes of a push storm: worker, command and web server, each with the fake provider among its providers.

    python -m tests.engine.storm --factor 10 work
    python -m tests.engine.storm --factor 10 command push_customers shop

They work on the database that DATABASE_URL names. The factor divides every time that the engine waits for, so that what
takes minutes in real use takes seconds here; their proportions stay. What the provider says on the wire (Retry-After)
is in real seconds.
"""

from __future__ import annotations

import argparse
import functools
import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import django


def set_up(*, factor: float = 1.0, claim_rows: int | None = None) -> None:
    """Django on the database of the environment, the fake provider known, and all waiting times shortened."""
    django.setup()
    # Imported here: the models need Django to be set up.
    from connectors import outbound, worker
    from connectors.sync import claim, limits, plan, push, settle
    from tests.fake import register

    register()
    times: dict[Any, tuple[str, ...]] = {
        claim: ("LEASE",),
        limits: ("PROBE", "FIRST_OPEN", "LONGEST_OPEN", "SUCCESS_EVERY"),
        plan: ("SECOND_LOOK",),
        push: ("LEASE", "NAP", "LOOK", "LONG", "TOGETHER"),
        settle: ("SECOND_LOOK", "RETRY_BASE", "RETRY_CAP", "POISON_TIME", "POISON_HOURLY"),
        worker: ("IDLE_SECONDS", "REST", "REST_CAP", "CALL_SECONDS", "SLICE"),
    }
    for module, names in times.items():
        for name in names:
            setattr(module, name, getattr(module, name) / factor)
    # A default is read when its function is made.
    outbound.Session.__init__.__kwdefaults__["deadline"] /= factor  # type: ignore[index] # its fields are keyword-only
    if claim_rows is not None:
        push.CLAIM_ROWS = claim_rows


def work(*, threads: int) -> None:
    """Run a worker until SIGTERM, as the command `run_worker` does."""
    from connectors import worker

    carried = worker.Worker(threads=threads, idle=worker.IDLE_SECONDS)
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def stop(number: int, frame: FrameType | None) -> None:
        told.put(True)

    signal.signal(signal.SIGTERM, stop)
    stopper = threading.Thread(
        target=worker.stop_in_time,
        args=(told,),
        kwargs={"stop": carried.stop.set, "under_way": lambda: tuple(carried.busy), "code": 1},
        daemon=True,
    )
    stopper.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    carried.run()
    told.put(False)
    stopper.join()


@functools.cache
def _web() -> Callable[..., Any]:
    set_up()
    from hub.wsgi import application as hub

    return hub


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """The hub's web server, for granian."""
    return _web()(environ, start_response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--claim-rows", type=int)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("what", choices=("work", "command"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    set_up(factor=chosen.factor, claim_rows=chosen.claim_rows)
    if chosen.what == "work":
        work(threads=chosen.threads)
        return
    from django.core.management import execute_from_command_line

    execute_from_command_line(["manage.py", *chosen.arguments])


if __name__ == "__main__":
    main()
