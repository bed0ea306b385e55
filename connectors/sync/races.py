"""Two transactions that get in each other's way: the loser starts over."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from django.db import IntegrityError, OperationalError, transaction

TRIES = 4
T = TypeVar("T")


_under_way: ContextVar[bool] = ContextVar("under_way", default=False)


def start_over(do: Callable[[], T]) -> T:
    """Run `do` in a transaction; again when a unique key was taken meanwhile or the database broke a deadlock.

    Within another `start_over` it runs once: that one runs again, and a savepoint would only cost.
    """
    if _under_way.get():
        with transaction.atomic(savepoint=False):
            return do()
    outer = _under_way.set(True)
    try:
        for _ in range(TRIES - 1):
            try:
                with transaction.atomic():
                    return do()
            except (IntegrityError, OperationalError):
                continue
        with transaction.atomic():
            return do()
    finally:
        _under_way.reset(outer)
