"""Places in a list that clients hand back: opaque, of one list of one organization, and garbled ones are told apart."""

from __future__ import annotations

import binascii
import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode

from rest_framework import serializers

CHECK = 6  # bytes


def write(place: bytes, *, of: str, organization_id: int) -> str:
    """A cursor of the list `of` that organization."""
    return urlsafe_b64encode(place + _check(place, of, organization_id)).decode().rstrip("=")


def read(cursor: str, *, of: str, organization_id: int) -> bytes:
    """The place that `write` was given. Raises ValidationError for a text that is no cursor of this list."""
    try:
        raw = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    place = raw[:-CHECK]
    # Written again, because base64 reads more texts than it writes.
    if not place or write(place, of=of, organization_id=organization_id) != cursor:
        raise serializers.ValidationError({"cursor": ["This is no cursor of this list. Send next_cursor as it came."]})
    return place


def _check(place: bytes, of: str, organization_id: int) -> bytes:
    return hashlib.sha256(b"%s/%d/%s" % (of.encode(), organization_id, place)).digest()[:CHECK]


def write_key(key: int, *, of: str, organization_id: int) -> str:
    """The place after the row with this primary key."""
    return write(key.to_bytes(8, "big"), of=of, organization_id=organization_id)


def read_key(cursor: str, *, of: str, organization_id: int) -> int:
    return int.from_bytes(read(cursor, of=of, organization_id=organization_id), "big")
