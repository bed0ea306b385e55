"""Three-way merge of one pulled record: what moved here, what moved there, and who wins where both did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Merge:
    """`take` holds the values that the customer takes over; the bases are the link's next ones.

    `conflicts` is `{field: [base, here, there]}`, whoever won.
    """

    take: dict[str, Any]
    base_local: dict[str, Any]
    base_remote: dict[str, Any]
    conflicts: dict[str, list[Any]] = field(default_factory=dict)


def same(one: Any, other: Any) -> bool:
    """Whether two values say the same: an empty text, a null and nothing are one."""
    return (one if one is not None else "") == (other if other is not None else "")


def merge(
    *,
    local: Mapping[str, Any],
    remote: Mapping[str, Any],
    base_local: Mapping[str, Any],
    base_remote: Mapping[str, Any],
    provider_wins: bool,
) -> Merge:
    """Merge the fields that `remote` names; a field it does not name is unknown, not empty.

    A field without a base has never been agreed on: it counts as changed on both sides unless they are equal.
    """
    take: dict[str, Any] = {}
    conflicts: dict[str, list[Any]] = {}
    next_local, next_remote = dict(base_local), dict(base_remote)
    for name, theirs in remote.items():
        theirs = "" if theirs is None else theirs
        ours = local[name]
        moved_there = name not in base_remote or not same(theirs, base_remote[name])
        moved_here = name not in base_local or not same(ours, base_local[name])
        if not moved_there:
            continue
        next_remote[name] = theirs
        if same(theirs, ours):
            next_local[name] = ours
        elif not moved_here:
            take[name] = next_local[name] = theirs
        else:
            conflicts[name] = [base_local.get(name), ours, theirs]
            if provider_wins:
                take[name] = next_local[name] = theirs
            else:
                # Ours stays and differs from what is there: the base says what is there, so the link is dirty.
                next_local[name] = theirs
    return Merge(take=take, base_local=next_local, base_remote=next_remote, conflicts=conflicts)
