"""Send and read what is due until told to stop."""

from __future__ import annotations

import os
import queue
import signal
import threading
from types import FrameType
from typing import Any

from django.core.management.base import CommandParser

from connectors.management.cli import Exit, HubCommand, positive
from connectors.worker import Worker, stop_in_time


class Command(HubCommand):
    help = "Send and read what is due. Run as many of these, on as many hosts, as there is work."
    examples = """\
  manage.py run_worker --threads 8
  manage.py run_worker --once        what is due now, then end"""
    epilog = """SIGTERM and Ctrl-C let the calls under way finish and then end the worker with exit code 0, after 30
seconds at the latest; the second ends it at once. With --once the code after Ctrl-C is 130: there may be work left."""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--threads", type=positive, default=4, metavar="N", help="Connections served side by side.")
        parser.add_argument("--once", action="store_true", help="End when nothing is due.")

    def handle(self, *args: Any, **options: Any) -> None:
        worker = Worker(threads=options["threads"])
        asked: list[int] = []
        told: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def stop(number: int, frame: FrameType | None) -> None:
            if asked:
                # The threads of the pool would hold up an ordinary exit until their calls end.
                os._exit(128 + number)
            asked.append(number)
            told.put(True)

        stopper = threading.Thread(
            target=stop_in_time,
            args=(told,),
            kwargs={
                "stop": worker.stop.set,
                "under_way": lambda: tuple(worker.busy),
                "code": int(Exit.STOPPED if options["once"] else Exit.DONE),
            },
            name="stopper",
            daemon=True,
        )
        stopper.start()
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        if not options["once"]:
            self.say(f"The worker runs with {options['threads']} threads. Ctrl-C stops it.")
        try:
            worker.run(once=options["once"])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            told.put(False)
            stopper.join()
        if options["once"] and asked:
            self.end(Exit.STOPPED)
