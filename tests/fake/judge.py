"""Verdicts on a hub, from the fake provider's ledger and records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson

from tests.fake.system import readable

Rows = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
REQUEST = "id, at, method, path, query, marker, key, headers, body, fault, status, wait_until"
WRITE = "id, at, record, marker, kind, before, after, revision, who, request"


class Judge:
    """What has happened at one account so far."""

    def __init__(self, rows: Rows, account: str) -> None:
        self.rows = rows
        self.account = account

    # Records

    def count(self) -> int:
        """Live records."""
        return int(
            self.rows("SELECT count(*) FROM records WHERE account = ? AND deleted IS NULL", [self.account])[0][0]
        )

    def live(self) -> dict[str, list[dict[str, Any]]]:
        """The fields of the live records by marker, oldest first; "" holds those without one."""
        found: dict[str, list[dict[str, Any]]] = {}
        for marker, fields in self.rows(
            "SELECT marker, fields FROM records WHERE account = ? AND deleted IS NULL ORDER BY id", [self.account]
        ):
            found.setdefault(marker or "", []).append(orjson.loads(fields))
        return found

    def duplicates(self) -> dict[str, int]:
        """Markers that more than one live record carries, and how many do."""
        return dict(
            self.rows(
                "SELECT marker, count(*) FROM records WHERE account = ? AND deleted IS NULL AND marker IS NOT NULL"
                " GROUP BY marker HAVING count(*) > 1",
                [self.account],
            )
        )

    def lost(self, markers: Iterable[Any]) -> set[str]:
        """Of these markers, those without a record. One that a person deleted or merged there is not lost."""
        there = self.rows(
            "SELECT DISTINCT marker FROM records WHERE account = ? AND marker IS NOT NULL"
            " AND (deleted IS NULL OR deleted_by = 'human')",
            [self.account],
        )
        return {str(marker) for marker in markers} - {row[0] for row in there}

    # Requests

    def requests(
        self, *, method: str | None = None, path: str = "", fault: str | None = None, status: int | None = None
    ) -> list[dict[str, Any]]:
        """Requests in the order they came; `path` is a part of theirs."""
        where, values = "", []
        for name, value in (("method", method), ("fault", fault), ("status", status)):
            if value is not None:
                where += f" AND {name} = ?"
                values.append(value)
        if path:
            where += " AND instr(path, ?) > 0"
            values.append(path)
        return self._requests(where, values)

    def requests_between(self, start: float, end: float) -> list[dict[str, Any]]:
        """Requests that came from `start` to before `end`, seconds since 1970 on the account's clock."""
        return self._requests(" AND at >= ? AND at < ?", [start, end])

    def request_count(self) -> int:
        return int(self.rows("SELECT count(*) FROM requests WHERE account = ?", [self.account])[0][0])

    def statuses(self) -> Counter[int]:
        """How often each status was answered; 0 where none was."""
        return Counter(
            dict(self.rows("SELECT status, count(*) FROM requests WHERE account = ? GROUP BY status", [self.account]))
        )

    def faults(self) -> Counter[str]:
        """How often each fault struck; "" for none."""
        return Counter(
            dict(self.rows("SELECT fault, count(*) FROM requests WHERE account = ? GROUP BY fault", [self.account]))
        )

    def calls_per_marker(self) -> Counter[str]:
        """How many requests concerned each marker; a batch counts for each of its rows."""
        return Counter(
            dict(self.rows("SELECT marker, count(*) FROM calls WHERE account = ? GROUP BY marker", [self.account]))
        )

    def impatient(self, *, grace: float = 0.0) -> list[dict[str, Any]]:
        """Requests that came while an earlier answer's Retry-After was running.

        `grace` seconds after that answer pass: requests that were already on their way.
        """
        found: list[dict[str, Any]] = []
        told: list[tuple[float, float]] = []  # from, until
        until = 0.0
        for request in self._requests(" ORDER BY at, id", [], ordered=True):
            at = request["at"]
            if at < until:
                told = [wait for wait in told if wait[1] > at]
                if any(begins < at for begins, _ in told):
                    found.append(request)
            if request["wait_until"] is not None:
                told.append((at + grace, request["wait_until"]))
                until = max(until, request["wait_until"])
        return found

    # Writes

    def writes(
        self, record: str | None = None, *, marker: Any = None, who: str | None = None, kind: str | None = None
    ) -> list[dict[str, Any]]:
        """Writes in the order they were applied. Kinds: create, update, same, delete, undelete, merge."""
        where, values = "", []
        if record is not None:
            where += " AND record = ?"
            values.append(int(record.removeprefix("r")))
        for name, value in (("marker", marker), ("who", who), ("kind", kind)):
            if value is not None:
                where += f" AND {name} = ?"
                values.append(str(value))
        return list(self._writes(where, values))

    def writes_after(self, record: str, at: float | None = None) -> list[dict[str, Any]]:
        """Writes to a record after a time; without one, all that followed its creation."""
        return [
            write for write in self.writes(record) if (write["kind"] != "create" if at is None else write["at"] > at)
        ]

    def older_after_newer(self, order: Callable[[dict[str, Any]], Any] | None = None) -> list[dict[str, Any]]:
        """Writes by the hub that put older content over newer.

        Without `order`: the write's request came before that of a write that was applied earlier, and sets a field that
        both name to something else: a late request that was overtaken. `order` tells a write's place from the fields it
        set, None where they do not say; then whatever steps back counts, also content that was sent again.
        """
        found: list[dict[str, Any]] = []
        newest: dict[str, Any] = {}
        # Per record and field: the latest request that set it, and to what.
        latest: dict[tuple[str, str], tuple[int, Any]] = {}
        for write in self._writes(" AND who = 'api' AND kind IN ('create', 'update', 'same')", []):
            record, number = write["record"], write["request"]
            if order is not None:
                place = order(write["after"])
                if place is None:
                    continue
                if record in newest and place < newest[record]:
                    found.append(write)
                else:
                    newest[record] = place
                continue
            overtaken = False
            for name, value in write["after"].items():
                before = latest.get((record, name))
                if before is not None and number < before[0]:
                    overtaken = overtaken or value != before[1]
                else:
                    latest[record, name] = number, value
            if overtaken:
                found.append(write)
        return found

    def human_edits_overwritten(self) -> list[dict[str, Any]]:
        """Writes by the hub to a field whose value was a person's at the provider. Each wants a logged conflict."""
        found: list[dict[str, Any]] = []
        theirs: set[tuple[str, str]] = set()
        for write in self._writes("", []):
            moved = {
                (write["record"], name)
                for name, value in write["after"].items()
                if write["before"].get(name) != value and write["kind"] in ("create", "update")
            }
            if write["who"] == "human":
                theirs |= moved
            else:
                if moved & theirs:
                    found.append(write)
                theirs -= moved
        return found

    def resurrected(self) -> list[dict[str, Any]]:
        """Creates by the hub for a marker whose record a person had deleted or merged there."""
        gone: set[str] = set()
        found: list[dict[str, Any]] = []
        for write in self._writes(" AND kind IN ('create', 'delete', 'merge', 'undelete') AND marker IS NOT NULL", []):
            if write["who"] == "human" and write["kind"] in ("delete", "merge"):
                gone.add(write["marker"])
            elif write["kind"] == "undelete":
                gone.discard(write["marker"])
            elif write["kind"] == "create" and write["who"] == "api" and write["marker"] in gone:
                found.append(write)
        return found

    def _requests(self, where: str, values: Sequence[Any], *, ordered: bool = False) -> list[dict[str, Any]]:
        end = "" if ordered else " ORDER BY id"
        rows = self.rows(f"SELECT {REQUEST} FROM requests WHERE account = ?{where}{end}", [self.account, *values])
        names = REQUEST.split(", ")
        return [readable(dict(zip(names, row, strict=True))) for row in rows]

    def _writes(self, where: str, values: Sequence[Any]) -> Iterator[dict[str, Any]]:
        rows = self.rows(f"SELECT {WRITE} FROM writes WHERE account = ?{where} ORDER BY id", [self.account, *values])
        names = WRITE.split(", ")
        for row in rows:
            yield readable(dict(zip(names, row, strict=True)))
