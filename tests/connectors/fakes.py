"""A system on the far side of the wire that speaks Links' format, remembers what it stored, and can misbehave."""

import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx2

Fault = Callable[[httpx2.Request], httpx2.Response | None]


class FakeLinks:
    """Records by id, a ledger of every request, and faults that are used up one per request.

    A fault that returns a response answers instead of the system; one that returns None lets it answer; one that raises
    loses the answer. `after=True` applies the request first.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.ledger: list[tuple[str, str, Any]] = []
        self.faults: list[tuple[Fault, bool]] = []
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.answer))

    def fail(self, fault: Fault, *, after: bool = False, times: int = 1) -> None:
        self.faults += [(fault, after)] * times

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        with self.lock:
            body = json.loads(request.content) if request.content else None
            self.ledger.append((request.method, request.url.path, body))
            fault, after = self.faults.pop(0) if self.faults else (None, False)
            if fault is not None and not after and (response := fault(request)) is not None:
                return response
            response = self._apply(request, body)
            if fault is not None and after and (instead := fault(request)) is not None:
                return instead
            return response

    def _apply(self, request: httpx2.Request, body: Any) -> httpx2.Response:
        if request.headers.get("authorization") != "Bearer remote-key":
            return httpx2.Response(401, json={"message": "no"})
        last = request.url.path.rsplit("/", 1)[-1]
        if request.method == "POST":
            id_ = f"cust_{next(self.numbers)}"
            self.records[id_] = {"id": id_, **body}
            return httpx2.Response(201, json={"data": self.records[id_]})
        if last == "customers":
            page, limit = int(request.url.params["page"]), int(request.url.params["limit"])
            rows = list(self.records.values())
            shown = rows[(page - 1) * limit : page * limit]
            return httpx2.Response(
                200,
                json={
                    "data": shown,
                    "page": page,
                    "limit": limit,
                    "totalPages": -(-len(rows) // limit),
                    "totalResults": len(rows),
                },
            )
        if last not in self.records:
            return httpx2.Response(404, json={"message": "unknown"})
        if request.method == "PUT":
            self.records[last] |= body
        return httpx2.Response(200, json={"data": self.records[last]})

    @property
    def writes(self) -> list[tuple[str, str, Any]]:
        return [entry for entry in self.ledger if entry[0] != "GET"]


def lost(request: httpx2.Request) -> httpx2.Response | None:
    raise httpx2.ReadTimeout("no answer", request=request)


def status(code: int, **headers: str) -> Fault:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: httpx2.Response(code, json={"message": f"status {code}"}, headers=names)
