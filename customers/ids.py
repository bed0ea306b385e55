"""Ids: UUID version 7 in the database, `cust_` and 26 Crockford base-32 characters outside."""

import secrets
import time
from uuid import UUID

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
VALUE_OF = {character: value for value, character in enumerate(ALPHABET)} | {
    character.lower(): value for value, character in enumerate(ALPHABET)
}


def uuid7() -> UUID:
    """RFC 9562: 48 bits of Unix milliseconds, then 74 random bits; ids made later sort later."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def public_id(prefix: str, uid: UUID) -> str:
    number = uid.int
    return f"{prefix}_" + "".join(ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


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
