"""Where a process begins that a command has started to help it."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection as Pipe
from typing import Any

import django
from django.utils.module_loading import import_string


def begin(work: str, pipe: Pipe[Any, Any], database: str) -> None:
    """Do `work`, a function's dotted path, with this pipe and a connection of its own to this database.

    It stops when the command closes the pipe: a Ctrl-C reaches every process of a terminal, and is the command's to
    answer.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Models can be imported only once this has run, and so can whatever imports them.
    django.setup()
    connection = import_string("django.db.connection")
    connection.settings_dict["NAME"] = database
    do = import_string(work)
    do(pipe)
    connection.close()
