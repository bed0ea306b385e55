"""JSON texts of values that a database may have kept: quickly, and also where they hold very large numbers."""

from __future__ import annotations

import json
from typing import Any

import orjson

SORT_KEYS, INDENT = orjson.OPT_SORT_KEYS, orjson.OPT_INDENT_2


def dumps(value: Any, *, option: int = 0) -> bytes:
    """UTF-8 JSON. PostgreSQL gives 1e23 back as an integer, which orjson refuses beyond 64 bits and json does not."""
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError:
        return json.dumps(
            value,
            default=lambda one: orjson.loads(orjson.dumps(one)),  # times and UUIDs; what is no JSON stays an error
            ensure_ascii=False,
            separators=(",", ":"),
            sort_keys=bool(option & SORT_KEYS),
            indent=2 if option & INDENT else None,
        ).encode()
