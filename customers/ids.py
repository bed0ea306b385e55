"""Ids: UUID version 7 in the database, `cust_` and 26 Crockford base-32 characters outside."""

import secrets
import threading
import time
from uuid import UUID

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
VALUE_OF = {character: value for value, character in enumerate(ALPHABET)} | {
    character.lower(): value for value, character in enumerate(ALPHABET)
}
# Two characters at a time: a list shows hundreds of ids.
_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]
_SHIFTS = range(120, -1, -10)

_LOW = (1 << 62) - 1
_lock = threading.Lock()
_last = 0


def uuid7() -> UUID:
    """RFC 9562: 48 bits of Unix milliseconds, then 74 random bits. Ids of one process sort as they were made."""
    [made] = uuid7s(1)
    return made


def uuid7s(count: int) -> list[UUID]:
    """So many of them, in order; the second and later ones are each up to 32 random bits further."""
    global _last
    milliseconds = time.time_ns() // 1_000_000
    steps = memoryview(secrets.token_bytes(4 * count)).cast("I")
    made = []
    with _lock:
        last = max((milliseconds << 74 | secrets.randbits(74)) - steps[0] - 1, _last) if count else _last
        for step in steps:
            last += step + 1
            made.append(last)
        _last = last
    return [
        UUID(int=number >> 74 << 80 | 0x7 << 76 | (number >> 62 & 0xFFF) << 64 | 0x2 << 62 | number & _LOW)
        for number in made
    ]


def public_id(prefix: str, uid: UUID) -> str:
    number = uid.int
    return f"{prefix}_" + "".join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS])


def new_public_id(prefix: str) -> str:
    return public_id(prefix, uuid7())


def parse_public_id(prefix: str, text: str) -> UUID | None:
    """The UUID in `text`, or None when it is not an id of this kind. A bare UUID is understood too."""
    if text.startswith(f"{prefix}_"):
        digits = text[len(prefix) + 1 :]
        if len(digits) != 26 or any(character not in VALUE_OF for character in digits):
            return None
        number = 0
        for character in digits:
            number = number << 5 | VALUE_OF[character]
        return UUID(int=number) if number < 1 << 128 else None
    try:
        return UUID(text)
    except ValueError:
        return None
