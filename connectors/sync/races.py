"""Two transactions that get in each other's way: the loser starts over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from django.db import IntegrityError, OperationalError, transaction

TRIES = 4
T = TypeVar("T")


def start_over(do: Callable[[], T]) -> T:
    """Run `do` in a transaction; again when a unique key was taken meanwhile or the database broke a deadlock."""
    for _ in range(TRIES - 1):
        try:
            with transaction.atomic():
                return do()
        except (IntegrityError, OperationalError):
            continue
    with transaction.atomic():
        return do()
