"""Three-way merge of one record: what moved here, what moved there, and who wins where both did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HUB_WINS, PROVIDER_WINS, ASK = "hub_wins", "provider_wins", "ask"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """`take` holds the values that the customer takes over; the bases are the link's next ones.

    `conflicts` is `{field: [base, here, there]}`, whoever won. `waiting` are the link's next parked fields.
    """

    take: dict[str, Any]
    base_local: dict[str, Any]
    base_remote: dict[str, Any]
    conflicts: dict[str, list[Any]] = field(default_factory=dict)
    waiting: dict[str, Any] = field(default_factory=dict)


def same(one: Any, other: Any) -> bool:
    """Whether two values say the same: an empty text, a null and nothing are one."""
    return (one if one is not None else "") == (other if other is not None else "")


def merge(
    *,
    local: Mapping[str, Any],
    remote: Mapping[str, Any],
    base_local: Mapping[str, Any],
    base_remote: Mapping[str, Any],
    policy: Callable[[str], str],
    normalise: Callable[[str, Any], Any] = lambda name, value: value,
    sent: Sequence[Mapping[str, Any]] = (),
    waiting: Mapping[str, Any] | None = None,
    takes: bool = True,
) -> Merge:
    """Merge the fields that `remote` names; a field it does not name is unknown, not empty.

    A field without a base has never been agreed on: it counts as changed on both sides unless they are equal. `sent`
    are the values of pushes whose answer is still out or was lost: what equals them is ours, not somebody's edit.
    What waits for a person (`waiting`) goes on waiting while the sides differ, whatever the policy says by now.
    `normalise` says how the provider stores a value. Without `takes` the hub is told of edits there, but keeps its own.
    """
    take: dict[str, Any] = {}
    conflicts: dict[str, list[Any]] = {}
    parked = dict(waiting or {})
    next_local, next_remote = dict(base_local), dict(base_remote)
    for name, theirs in remote.items():
        theirs = "" if theirs is None else theirs
        ours = local[name]
        agreed = same(theirs, ours) or same(theirs, normalise(name, ours))
        if agreed:
            parked.pop(name, None)
        if name in base_remote and same(theirs, base_remote[name]):
            if agreed:
                next_local[name] = ours
            continue
        if (mine := _own(name, theirs, sent, normalise)) is not None:
            next_local[name], next_remote[name] = mine[0], theirs
            continue
        moved_here = name not in base_local or not same(ours, base_local[name])
        next_remote[name] = theirs
        if agreed:
            next_local[name] = ours
        elif not moved_here and name not in parked:
            if takes:
                take[name] = next_local[name] = theirs
        else:
            conflicts[name] = [base_local.get(name), ours, theirs]
            wins = ASK if name in parked else policy(name)
            if wins == ASK:
                parked[name] = {"base": base_local.get(name), "here": ours, "there": theirs}
            elif wins == PROVIDER_WINS and takes:
                take[name] = next_local[name] = theirs
            else:
                # Ours stays and differs from what is there: the base says what is there, so the link is dirty.
                next_local[name] = theirs
    return Merge(take=take, base_local=next_local, base_remote=next_remote, conflicts=conflicts, waiting=parked)


def _own(
    name: str, theirs: Any, sent: Sequence[Mapping[str, Any]], normalise: Callable[[str, Any], Any]
) -> tuple[Any] | None:
    """What an unanswered push of ours sent, if it is what is there now."""
    for values in reversed(sent):
        if name in values and (same(theirs, values[name]) or same(theirs, normalise(name, values[name]))):
            return (values[name],)
    return None
