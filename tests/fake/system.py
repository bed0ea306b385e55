"""What the fake provider is without its sockets: accounts, their records and faults, and a ledger of all that happened.

`System.handle` takes one request and says what is answered and how, so that a socket server and a transport in the same
process serve alike. Imports nothing of the hub: it runs as a process of its own.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import heapq
import itertools
import math
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson

# The names and the defaults of connectors.provider.Capabilities; test_fake.py compares them.
CAPABILITIES: Mapping[str, Any] = {
    "upsert_external_id": False,
    "create_key": False,
    "key_life": 24 * 3600.0,
    "unique_keys": False,
    "look_up": "",
    "look_up_lag": 90.0,
    "conditional": False,
    "echoes": True,
    "updates": True,
    "lists": False,
    "fetches": False,
    "incremental": False,
    "deletes": False,
    "shows_deleted": "",
    "batch": 1,
    "update_batch": 1,
    "max_request_life": 120.0,
}
NORMALISERS: Mapping[str, Callable[[str], str]] = {
    "same": lambda text: text,
    "upper": str.upper,
    "lower": str.lower,
    "trim": str.strip,
}
REFUSALS = ("429", "429_date", "429_skewed", "429_absurd", "429_missing", "401", "404_all", "redirect")
FAILURES = ("500", "502", "503", "500_after", "502_after", "503_after", "stored_500")
SILENCES = ("hang", "hang_after", "reset_before", "reset_after", "lost", "late")
BODIES = ("drip", "half_body", "wrong_json", "gzip_bomb")
BATCHES = ("missing_rows", "shuffled_rows", "unnamed_400")
FAULTS = frozenset({*REFUSALS, *FAILURES, *SILENCES, *BODIES, *BATCHES, "duplicate"})

OUTAGE = 3600.0  # seconds for which a record that met an index outage is not found
LEDGER_ROWS = 500
PAGE_MAX = 1000
NOT_FIELDS = frozenset({"id", "marker", "key", "revision", "created_at", "updated_at", "deleted", "merged_into"})
HEADERS_KEPT = ("authorization", "if-match", "idempotency-key", "request-id", "user-agent")

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, settings TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL, marker TEXT, email TEXT, fields TEXT NOT NULL,
    revision INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, found REAL NOT NULL,
    hidden INTEGER NOT NULL DEFAULT 0, deleted REAL, deleted_by TEXT, merged_into INTEGER
);
CREATE INDEX IF NOT EXISTS records_marker ON records (account, marker);
CREATE INDEX IF NOT EXISTS records_email ON records (account, email);
CREATE INDEX IF NOT EXISTS records_updated ON records (account, updated, id);
CREATE TABLE IF NOT EXISTS keys (
    account TEXT NOT NULL, key TEXT NOT NULL, at REAL NOT NULL, digest TEXT NOT NULL, status INTEGER NOT NULL,
    answer BLOB NOT NULL, PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tokens (
    account TEXT NOT NULL, token TEXT NOT NULL, kind TEXT NOT NULL, expires REAL, dead INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (account, token)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, account TEXT NOT NULL, at REAL NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL,
    query TEXT NOT NULL, marker TEXT, key TEXT, headers TEXT NOT NULL, body TEXT NOT NULL, fault TEXT NOT NULL,
    status INTEGER NOT NULL, wait_until REAL
);
CREATE INDEX IF NOT EXISTS requests_at ON requests (account, at);
CREATE TABLE IF NOT EXISTS calls (account TEXT NOT NULL, marker TEXT NOT NULL, request INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS calls_marker ON calls (account, marker);
CREATE TABLE IF NOT EXISTS writes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL, at REAL NOT NULL, record INTEGER NOT NULL, marker TEXT,
    kind TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, revision INTEGER NOT NULL, who TEXT NOT NULL,
    request INTEGER
);
CREATE INDEX IF NOT EXISTS writes_record ON writes (account, record);
"""


@dataclass(kw_only=True, slots=True)
class Request:
    """One HTTP request; `target` is path and query as they came, header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What is answered, after `delay` seconds. `wire` says what goes wrong on the way: "" for nothing, "hang" for no
    answer, "reset" for a broken connection, "drip" for a byte each `pause` seconds, "half_body".
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    wire: str = ""
    pause: float = 1.0
    wait: float | None = None  # seconds for which the caller is told to stay away


@dataclass(kw_only=True)
class Settings:
    """One account's switches, all of them changed by `PUT /control/{account}`.

    capabilities   as connectors.provider.Capabilities; given ones replace all, what is not named is its default
    normaliser     how texts are stored: same, upper, lower, trim
    index_lag      seconds before a new record is found by its marker, where `look_up` is "lagging"
    index_outage   the share of new records that are not found for an hour
    page_drift     lists are cut by position, newest change first, so that pages shift under a reader
    auth           "" lets everybody in, "oauth" wants a living access token, anything else is the token
    token_life     seconds that an access token lives
    rate, burst    requests per second, and how many may follow at once (one second's worth)
    latency        seconds before each answer
    retry_after    seconds in a 429's Retry-After
    late_max       seconds within which a late request is applied
    faults         {fault: probability per request}; fault_methods limits them, empty for all
    time_offset    seconds that this account's clock is ahead
    """

    capabilities: dict[str, Any] = field(default_factory=dict)
    account_id: str = ""
    normaliser: str = "same"
    index_lag: float = 0.0
    index_outage: float = 0.0
    page_drift: bool = False
    auth: str = ""
    token_life: float = 3600.0
    rate: float | None = None
    burst: int | None = None
    latency: float = 0.0
    retry_after: float = 1.0
    late_max: float = 120.0
    faults: dict[str, float] = field(default_factory=dict)
    fault_methods: list[str] = field(default_factory=list)
    seed: int = 1
    time_offset: float = 0.0

    def check(self) -> None:
        if unknown := set(self.capabilities) - set(CAPABILITIES):
            raise Refused(400, "unknown", f"no such capability: {sorted(unknown)}")
        if unknown := set(self.faults) - FAULTS:
            raise Refused(400, "unknown", f"no such fault: {sorted(unknown)}")
        if sum(self.faults.values()) > 1.000001:
            raise Refused(400, "invalid", "the probabilities of the faults add up to more than 1")
        if self.normaliser not in NORMALISERS:
            raise Refused(400, "unknown", f"no such normaliser: {self.normaliser}")


@dataclass(kw_only=True)
class Fault:
    """A fault that is to come: from the script, which it leaves after `times` requests, or drawn for one request.

    `method` and `path` (a part of the path) say which requests it is for; `skip` of those pass it first.
    """

    fault: str
    method: str = ""
    path: str = ""
    times: int = 1
    skip: int = 0
    retry_after: float | None = None  # of a 429 or 503
    delay: float | None = None  # of a late request
    pause: float = 1.0  # of a drip

    def matches(self, call: Call) -> bool:
        return (not self.method or self.method == call.method) and self.path in call.path


@dataclass(kw_only=True, slots=True)
class Call:
    """One request on its way through an account."""

    account: AccountState
    method: str
    path: str
    parts: list[str]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    data: Any
    at: float
    number: int

    @property
    def is_batch(self) -> bool:
        return len(self.parts) == 4 and self.parts[3] in ("batch", "update_batch")

    @property
    def is_create(self) -> bool:
        return self.method == "POST" and self.parts[2] == "customers" and self.parts[3:] in ([], ["batch"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.data.get("rows") if isinstance(self.data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Refused(400, "invalid", "The body must have rows.")
        return rows


class AccountState:
    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.script: list[Fault] = []
        self.late: list[tuple[float, int, Call]] = []
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        # A change of the faults alone goes on with the same sequence of draws.
        if not hasattr(self, "settings") or self.settings.seed != settings.seed:
            self.faults_rng = random.Random(f"faults {settings.seed} {self.name}")
            self.rng = random.Random(f"other {settings.seed} {self.name}")
        new_rate = not hasattr(self, "settings") or (self.settings.rate, self.settings.burst) != (
            settings.rate,
            settings.burst,
        )
        self.settings = settings
        self.capabilities = {**CAPABILITIES, **settings.capabilities}
        self.normalise = NORMALISERS[settings.normaliser]
        self.burst = settings.burst or max(1, round(settings.rate or 1))
        if new_rate:
            self.tokens, self.filled_at = float(self.burst), None  # the bucket starts full


class Refused(Exception):
    """A request, or a control, that is answered with an error and changes nothing."""

    def __init__(self, status: int, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"code": code, "message": message, **details}


CONTROLS = frozenset(
    {
        *("script", "create", "edit", "delete", "undelete", "merge", "hide", "show", "login", "revoke"),
        *("advance", "waiting", "flush", "ledger", "writes", "records"),
    }
)


class System:
    """Accounts by name behind one lock and one SQLite connection; `file` None keeps all of it in memory."""

    def __init__(self, file: str | None = None, *, clock: Callable[[], datetime] | None = None) -> None:
        self.file = file
        self.time: Callable[[], float] = time.time if clock is None else lambda: clock().timestamp()
        self.lock = threading.RLock()
        self.db = sqlite3.connect(file or ":memory:", check_same_thread=False, isolation_level=None)
        if file is not None:
            self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=OFF")
        self.db.executescript(SCHEMA)
        self.accounts: dict[str, AccountState] = {
            name: AccountState(name, Settings(**orjson.loads(text)))
            for name, text in self.db.execute("SELECT name, settings FROM accounts")
        }
        first = self.db.execute("SELECT coalesce(max(id), 0) + 1 FROM requests").fetchone()[0]
        self.numbers = itertools.count(first)
        self.new_requests: list[tuple[Any, ...]] = []
        self.new_calls: list[tuple[str, str, int]] = []
        self.new_writes: list[tuple[Any, ...]] = []

    def close(self) -> None:
        with self.lock:
            self.flush()
            self.db.close()

    def flush(self) -> None:
        """Write the ledger's last rows and commit: another connection to the file then sees everything."""
        with self.lock:
            if self.new_requests or self.new_writes:
                self._begin()
                self.db.executemany("INSERT INTO requests VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", self.new_requests)
                self.db.executemany("INSERT INTO calls VALUES (?,?,?)", self.new_calls)
                self.db.executemany(
                    "INSERT INTO writes (account, at, record, marker, kind, before, after, revision, who, request)"
                    " VALUES (?,?,?,?,?,?,?,?,?,?)",
                    self.new_writes,
                )
                self.new_requests, self.new_calls, self.new_writes = [], [], []
            if self.db.in_transaction:
                self.db.execute("COMMIT")

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of the records and of the whole ledger."""
        with self.lock:
            self.flush()
            return self.db.execute(sql, values).fetchall()

    def handle(self, request: Request) -> Answer:
        path, _, query = request.target.partition("?")
        parts = [unquote(part) for part in path.strip("/").split("/")] if "%" in path else path.strip("/").split("/")
        named = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
        with self.lock:
            try:
                if parts[0] == "control" and len(parts) in (2, 3):
                    return self._control(request, parts, named)
                if parts[0] == "a" and len(parts) >= 3 and (account := self.accounts.get(parts[1])):
                    return self._serve(account, request, path, parts, named)
            except Refused as refused:
                return _json(refused.status, {"error": refused.error})
        return _json(404, {"error": {"code": "unknown_address", "message": "There is nothing at this address."}})

    # One request

    def _now(self, account: AccountState) -> float:
        return self.time() + account.settings.time_offset

    def _begin(self) -> None:
        if not self.db.in_transaction:
            self.db.execute("BEGIN IMMEDIATE")

    def _write(self, sql: str, values: Sequence[Any]) -> sqlite3.Cursor:
        self._begin()
        return self.db.execute(sql, values)

    def _serve(
        self, account: AccountState, request: Request, path: str, parts: list[str], query: dict[str, str]
    ) -> Answer:
        now = self._now(account)
        self._work_late(account, now)
        call = Call(
            account=account,
            method=request.method,
            path=path,
            parts=parts,
            query=query,
            headers=request.headers,
            body=request.body,
            data=_body(request),
            at=now,
            number=next(self.numbers),
        )
        markers = self._markers(call)
        fault = Fault(fault="rate_limit") if not self._within_rate(account, now) else self._draw(call)
        answer = self._answer(call, fault)
        answer.delay += account.settings.latency
        answer.headers.setdefault("Date", _date(now))
        if account.settings.rate:
            full = (account.burst - account.tokens) / account.settings.rate
            answer.headers["RateLimit-Limit"] = str(account.burst)
            answer.headers["RateLimit-Remaining"] = str(int(account.tokens))
            answer.headers["RateLimit-Reset"] = str(math.ceil(full))
        self.new_calls += [(account.name, marker, call.number) for marker in markers]
        kept = {name: request.headers[name] for name in HEADERS_KEPT if name in request.headers}
        self.new_requests.append(
            (
                call.number,
                account.name,
                now,
                call.method,
                path,
                orjson.dumps(query).decode(),
                markers[0] if len(markers) == 1 else None,
                request.headers.get("idempotency-key"),
                orjson.dumps(kept).decode(),
                request.body.decode(errors="replace"),
                fault.fault if fault else "",
                0 if answer.wire in ("hang", "reset") else answer.status,
                None if answer.wait is None else now + answer.wait,
            )
        )
        if len(self.new_requests) >= LEDGER_ROWS:
            self.flush()
        return answer

    def _markers(self, call: Call) -> list[str]:
        """Whose request it is: the markers that it carries, or that of the record in its address."""
        if call.parts[2] != "customers":
            return []
        if call.is_batch:
            rows = call.data.get("rows") if isinstance(call.data, dict) else None
            found = [row.get("marker") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        elif len(call.parts) == 5:
            found = [call.parts[4]]
        elif len(call.parts) == 4:
            row = self.db.execute("SELECT marker FROM records WHERE id = ?", [_number(call.parts[3])]).fetchone()
            found = [row[0]] if row else []
        elif call.method == "POST":
            found = [call.data.get("marker")] if isinstance(call.data, dict) else []
        else:
            found = [call.query.get("marker")]
        return [marker for marker in found if isinstance(marker, str) and marker]

    def _within_rate(self, account: AccountState, now: float) -> bool:
        rate = account.settings.rate
        if not rate:
            return True
        passed = max(0.0, now - account.filled_at) if account.filled_at is not None else 0.0
        account.tokens = min(float(account.burst), account.tokens + passed * rate)
        account.filled_at = now
        if account.tokens < 1:
            return False
        account.tokens -= 1
        return True

    def _draw(self, call: Call) -> Fault | None:
        """The fault for this request: the first of the script that it matches, else by chance."""
        account = call.account
        for one in account.script:
            if one.matches(call) and not (one.fault in BATCHES and not call.is_batch):
                if one.skip:
                    one.skip -= 1
                    return None
                if one.fault == "unnamed_400" and not self._has_bad_row(call):
                    return None
                one.times -= 1
                if not one.times:
                    account.script.remove(one)
                return one
        settings = account.settings
        if not settings.faults or call.parts[2] == "token":
            return None
        if settings.fault_methods and call.method not in settings.fault_methods:
            return None
        drawn = account.faults_rng.random()
        for name, probability in settings.faults.items():
            drawn -= probability
            if drawn < 0:
                if name in BATCHES and not call.is_batch:
                    return None
                if name == "unnamed_400" and not self._has_bad_row(call):
                    return None
                return Fault(fault=name)
        return None

    def _has_bad_row(self, call: Call) -> bool:
        rows = call.data.get("rows") if isinstance(call.data, dict) else None
        return isinstance(rows, list) and any(isinstance(row, dict) and _is_bad(row) for row in rows)

    def _answer(self, call: Call, fault: Fault | None) -> Answer:
        if fault is None:
            return self._apply(call)
        name = fault.fault
        if name == "rate_limit":
            missing = 1 - call.account.tokens
            return self._too_many(call, "429", math.ceil(missing / (call.account.settings.rate or 1)))
        if name.startswith("429"):
            return self._too_many(call, name, fault.retry_after)
        if name in ("500", "502", "503"):
            return _failure(int(name), fault.retry_after)
        if name == "401":
            return _refusal(401, "unauthorized", "The credentials are not valid.")
        if name == "404_all":
            return _refusal(404, "not_found", "There is no such record.")
        if name == "unnamed_400":
            return _refusal(400, "invalid", "The batch was refused.")
        if name == "redirect":
            return Answer(status=302, headers={"Location": "https://elsewhere.example.com" + call.path})
        if name == "hang":
            return Answer(status=0, wire="hang")
        if name in ("reset_before", "lost"):
            return Answer(status=0, wire="reset")
        if name == "late":
            settings = call.account.settings
            delay = call.account.rng.uniform(0, settings.late_max) if fault.delay is None else fault.delay
            heapq.heappush(call.account.late, (call.at + delay, call.number, call))
            return Answer(status=0, wire="reset")
        if name == "duplicate":
            self._apply(call)
            return self._apply(call)
        if name in ("stored_500", "500_after"):
            return self._apply(call, failing=name)
        return self._garbled(call, fault, self._apply(call))

    def _garbled(self, call: Call, fault: Fault, answer: Answer) -> Answer:
        """The request was applied; what comes of its answer."""
        name = fault.fault
        if name in ("502_after", "503_after"):
            return _failure(int(name[:3]), fault.retry_after)
        if name == "hang_after":
            return replace(answer, wire="hang")
        if name == "reset_after":
            return replace(answer, wire="reset")
        if name == "half_body":
            return replace(answer, wire="half_body" if len(answer.body) > 1 else "reset")
        if name == "drip":
            return replace(answer, wire="drip", pause=fault.pause, body=answer.body or b"{}")
        if name == "wrong_json":
            return Answer(status=200, body=b'{"id": "r1", "name": ', headers={"Content-Type": "application/json"})
        if name == "gzip_bomb":
            packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            return Answer(status=200, body=_bomb(), headers=packed)
        if answer.status != 200:
            return answer
        rows = orjson.loads(answer.body)["rows"]
        if name == "missing_rows":
            kept = sorted(call.account.rng.sample(range(len(rows)), len(rows) // 2))
            rows = [rows[position] for position in kept]
        else:
            call.account.rng.shuffle(rows)
        return replace(answer, body=orjson.dumps({"rows": rows}))

    def _too_many(self, call: Call, style: str, seconds: float | None) -> Answer:
        wait = math.ceil(call.account.settings.retry_after if seconds is None else seconds)
        answer = _refusal(429, "rate_limited", "Too many requests.")
        if style == "429":
            answer.headers["Retry-After"] = str(wait)
        elif style == "429_date":
            answer.headers["Retry-After"] = _date(math.ceil(call.at) + wait)
        elif style == "429_skewed":
            # A provider whose clock is a day behind: only its own Date says how long that is.
            behind = call.at - 86400
            answer.headers |= {"Date": _date(behind), "Retry-After": _date(math.floor(behind) + wait)}
        elif style == "429_absurd":
            answer.headers["Retry-After"] = "9999999999"
        if style in ("429", "429_date", "429_skewed"):
            answer.wait = float(wait)
        return answer

    def _work_late(self, account: AccountState, now: float) -> None:
        while account.late and account.late[0][0] <= now:
            due, _, call = heapq.heappop(account.late)
            call.at = due
            self._apply(call)

    # What the API does

    def _apply(self, call: Call, *, failing: str = "") -> Answer:
        try:
            if call.parts[2] == "token":
                answer = self._token(call)
            else:
                self._authenticate(call)
                if failing == "stored_500" and not call.is_create:
                    return _failure(500)
                answer = self._route(call, failing)
        except Refused as refused:
            return _json(refused.status, {"error": refused.error})
        return _failure(500) if failing and answer.status < 400 else answer

    def _authenticate(self, call: Call) -> None:
        auth = call.account.settings.auth
        if not auth:
            return
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        if auth != "oauth":
            if given != auth:
                raise Refused(401, "unauthorized", "The token is not valid.")
            return
        row = self.db.execute(
            "SELECT expires, dead FROM tokens WHERE account = ? AND token = ? AND kind = 'access'",
            [call.account.name, given],
        ).fetchone()
        if row is None or row[1] or row[0] <= call.at:
            raise Refused(401, "token_expired" if row else "unauthorized", "The token is not valid.")

    def _route(self, call: Call, failing: str) -> Answer:
        method, parts, can = call.method, call.parts, call.account.capabilities
        if parts[2:] == ["account"] and method == "GET":
            return _json(200, {"id": call.account.settings.account_id})
        if parts[2] != "customers" or len(parts) > 5:
            raise Refused(404, "unknown_address", "There is nothing at this address.")
        rest = parts[3:]
        if not rest and method == "POST":
            return self._create_one(call, failing)
        if not rest and method == "GET":
            return self._look_up(call) if "marker" in call.query else self._list(call)
        if rest == ["batch"] and method == "POST" and can["batch"] > 1:
            return self._create_many(call, failing)
        if rest == ["update_batch"] and method == "POST" and can["update_batch"] > 1 and can["updates"]:
            return self._update_many(call)
        if len(rest) == 2 and rest[0] == "by-external" and method == "PUT" and can["upsert_external_id"]:
            status, document = self._create(call, _object(call.data), marker=rest[1], upsert=True)
            return self._written(call, status, document)
        if len(rest) == 1 and rest[0] not in ("batch", "update_batch"):
            if method == "GET" and can["fetches"]:
                row = self._record(call.account, rest[0])
                document = self._shown(call.account, row)
                return self._written(call, 200, document, reading=True)
            if method == "PATCH" and can["updates"]:
                match = call.headers.get("if-match")
                document = self._update(call, rest[0], _object(call.data), match=match)
                return self._written(call, 200, document)
            if method == "DELETE" and can["deletes"]:
                row = self._record(call.account, rest[0])
                self._remove(call.account, row, at=call.at, who="api", request=call.number)
                return Answer(status=204)
        raise Refused(405, "unsupported", f"{method} is not supported here.")

    def _written(self, call: Call, status: int, document: dict[str, Any], *, reading: bool = False) -> Answer:
        """The answer to a write: the record as stored, or where answers show none only what a create must say."""
        headers = {"ETag": document["revision"]} if "revision" in document else {}
        if reading or call.account.capabilities["echoes"]:
            return _json(status, document, headers)
        if status == 201:
            return _json(201, _brief(document), headers)
        return Answer(status=204, headers=headers)

    def _create_one(self, call: Call, failing: str) -> Answer:
        values = _object(call.data)
        status, document, replayed = self._keyed(
            call,
            call.headers.get("idempotency-key"),
            call.body,
            failing,
            lambda: self._create(call, values, marker=values.get("marker")),
        )
        answer = _json(status, document) if status >= 500 else self._written(call, status, document)
        if replayed:
            answer.headers["Idempotent-Replayed"] = "true"
        return answer

    def _create_many(self, call: Call, failing: str) -> Answer:
        rows = self._batch(call, "batch")
        upsert = call.data.get("upsert") is True
        if upsert and not call.account.capabilities["upsert_external_id"]:
            raise Refused(400, "unsupported", "There is no external id here.")

        def write(row: dict[str, Any]) -> tuple[int, dict[str, Any], bool]:
            content = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)

            def create() -> tuple[int, dict[str, Any]]:
                return self._create(call, row, marker=row.get("marker"), upsert=upsert)

            return self._keyed(call, row.get("key"), content, failing, create)

        return self._rows(call, rows, write)

    def _update_many(self, call: Call) -> Answer:
        def write(row: dict[str, Any]) -> tuple[int, dict[str, Any], bool]:
            return 200, self._update(call, str(row.get("id")), row, match=row.get("revision")), False

        return self._rows(call, self._batch(call, "update_batch"), write)

    def _batch(self, call: Call, name: str) -> list[dict[str, Any]]:
        rows = call.rows
        if len(rows) > call.account.capabilities[name]:
            raise Refused(400, "too_many_rows", f"Send at most {call.account.capabilities[name]} rows.")
        return rows

    def _rows(
        self,
        call: Call,
        rows: Sequence[dict[str, Any]],
        write: Callable[[dict[str, Any]], tuple[int, dict[str, Any], bool]],
    ) -> Answer:
        """One result per row, each with the row's marker; a row that is refused does not stop the others."""
        results: list[dict[str, Any]] = []
        for row in rows:
            result: dict[str, Any] = {"marker": row.get("marker")}
            try:
                status, document, replayed = write(row)
            except Refused as refused:
                result |= {"status": refused.status, "error": refused.error}
            else:
                result["status"] = status
                if status >= 500:
                    result |= document
                elif call.account.capabilities["echoes"]:
                    result["record"] = document
                else:
                    result["record"] = _brief(document)
                if replayed:
                    result["replayed"] = True
            results.append(result)
        return _json(200, {"rows": results})

    def _keyed(
        self,
        call: Call,
        key: Any,
        content: bytes,
        failing: str,
        write: Callable[[], tuple[int, dict[str, Any]]],
    ) -> tuple[int, dict[str, Any], bool]:
        """Write once per idempotency key; a repeat is given the first answer, also where that was a failure.

        A refusal is not kept, so that the same key may bring corrected content.
        """
        account = call.account
        keyed = bool(key) and account.capabilities["create_key"]
        digest = hashlib.sha1(content, usedforsecurity=False).hexdigest() if keyed else ""
        if keyed:
            row = self.db.execute(
                "SELECT at, digest, status, answer FROM keys WHERE account = ? AND key = ?", [account.name, key]
            ).fetchone()
            if row and call.at - row[0] < account.capabilities["key_life"]:
                if row[1] != digest:
                    raise Refused(422, "key_reused", "This idempotency key was used with another body.")
                return row[2], orjson.loads(row[3]), True
        status, document = 500, _FAILED
        if failing != "stored_500":
            done, written = write()
            if failing != "500_after":
                status, document = done, written
        if keyed:
            self._write(
                "INSERT OR REPLACE INTO keys VALUES (?,?,?,?,?,?)",
                [account.name, key, call.at, digest, status, orjson.dumps(document)],
            )
        return status, document, False

    def _create(
        self, call: Call, values: Mapping[str, Any], *, marker: Any, upsert: bool = False
    ) -> tuple[int, dict[str, Any]]:
        account = call.account
        if marker is not None and not isinstance(marker, str):
            raise Refused(422, "invalid", "The marker must be a text.", field="marker")
        cleaned = self._cleaned(account, values)
        if upsert:
            found = self.db.execute(
                "SELECT id FROM records WHERE account = ? AND marker = ? AND deleted IS NULL ORDER BY id",
                [account.name, marker],
            ).fetchall()
            if len(found) > 1:
                ids = [_shown_id(row[0]) for row in found]
                raise Refused(409, "several_matches", "Several records have this external id.", ids=ids)
            if found:
                return 200, self._update(call, _shown_id(found[0][0]), values, match=None)
        if not cleaned.get("name"):
            raise Refused(422, "required", "Give a name.", field="name")
        self._check_unique(account, cleaned.get("email"), 0)
        row = self._insert(account, cleaned, marker, at=call.at, who="api", request=call.number)
        return 201, _poisoned(self._shown(account, row))

    def _update(self, call: Call, shown_id: str, values: Mapping[str, Any], *, match: str | None) -> dict[str, Any]:
        account = call.account
        row = self._record(account, shown_id)
        if account.capabilities["conditional"] and match is not None and match != _revision(row):
            raise Refused(412, "stale", "The record was changed since.", current=_revision(row))
        cleaned = self._cleaned(account, values)
        if "name" in cleaned and not cleaned["name"]:
            raise Refused(422, "required", "Give a name.", field="name")
        if "email" in cleaned:
            self._check_unique(account, cleaned["email"], row["id"])
        marker = values.get("marker") if isinstance(values.get("marker"), str) else None
        row = self._change(account, row, cleaned, marker=marker, at=call.at, who="api", request=call.number)
        return _poisoned(self._shown(account, row))

    def _look_up(self, call: Call) -> Answer:
        if not call.account.capabilities["look_up"]:
            raise Refused(400, "unsupported", "Records cannot be found by a marker.")
        rows = self._select(
            "account = ? AND marker = ? AND deleted IS NULL AND found <= ? ORDER BY id",
            [call.account.name, call.query["marker"], call.at],
        )
        return _json(200, {"data": [self._shown(call.account, row) for row in rows], "next": None})

    def _list(self, call: Call) -> Answer:
        account, can = call.account, call.account.capabilities
        if not can["lists"]:
            raise Refused(405, "unsupported", "There is no list here.")
        try:
            limit = min(max(int(call.query.get("limit", 100)), 1), PAGE_MAX)
            since = _moment(call.query["since"]) if "since" in call.query and can["incremental"] else None
            cursor = [float(part) for part in call.query["cursor"].split("_")] if "cursor" in call.query else None
        except ValueError:
            raise Refused(400, "invalid", "The page cannot be read from these parameters.") from None
        where, values = "account = ? AND hidden = 0", [account.name]
        if can["shows_deleted"] != "flag":
            where += " AND deleted IS NULL"
        if since is not None:
            where += " AND updated >= ?"
            values.append(since)
        if account.settings.page_drift:
            start = int(cursor[0]) if cursor else 0
            rows = self._select(f"{where} ORDER BY updated DESC, id DESC LIMIT ? OFFSET ?", [*values, limit + 1, start])
            following = str(start + limit)
        elif since is not None:
            if cursor:
                where += " AND (updated, id) > (?, ?)"
                values += [cursor[0], int(cursor[-1])]
            rows = self._select(f"{where} ORDER BY updated, id LIMIT ?", [*values, limit + 1])
            following = f"{rows[limit - 1]['updated']!r}_{rows[limit - 1]['id']}" if len(rows) > limit else ""
        else:
            if cursor:
                where += " AND id > ?"
                values.append(int(cursor[-1]))
            rows = self._select(f"{where} ORDER BY id LIMIT ?", [*values, limit + 1])
            following = str(rows[limit - 1]["id"]) if len(rows) > limit else ""
        shown = [self._shown(account, row) for row in rows[:limit]]
        return _json(200, {"data": shown, "next": following if len(rows) > limit else None})

    def _token(self, call: Call) -> Answer:
        """OAuth 2's refresh_token grant; a refresh token is good for one use."""
        given = call.data
        if not isinstance(given, dict) or given.get("grant_type") != "refresh_token":
            return _json(400, {"error": "unsupported_grant_type"})
        account = call.account
        row = self.db.execute(
            "SELECT dead FROM tokens WHERE account = ? AND token = ? AND kind = 'refresh'",
            [account.name, given.get("refresh_token")],
        ).fetchone()
        if row is None or row[0]:
            return _json(400, {"error": "invalid_grant", "error_description": "The refresh token is not valid."})
        self._write(
            "UPDATE tokens SET dead = 1 WHERE account = ? AND token = ?", [account.name, given["refresh_token"]]
        )
        return _json(200, self._tokens(account, call.at))

    def _tokens(self, account: AccountState, at: float) -> dict[str, Any]:
        pair = {kind: f"{kind}-{account.name}-{secrets.token_hex(8)}" for kind in ("access", "refresh")}
        life = account.settings.token_life
        for kind, token in pair.items():
            expires = at + life if kind == "access" else None
            self._write("INSERT INTO tokens VALUES (?,?,?,?,0)", [account.name, token, kind, expires])
        return {
            "access_token": pair["access"],
            "refresh_token": pair["refresh"],
            "token_type": "Bearer",
            "expires_in": int(life),
        }

    # Records

    def _select(self, where: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        cursor = self.db.execute(f"SELECT * FROM records WHERE {where}", values)
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        for row in rows:
            row["fields"] = orjson.loads(row["fields"])
        return rows

    def _record(self, account: AccountState, shown_id: str, *, deleted: bool = False) -> dict[str, Any]:
        rows = self._select("account = ? AND id = ?", [account.name, _number(shown_id)])
        if not rows:
            raise Refused(404, "not_found", "There is no such record.")
        if rows[0]["deleted"] is not None and not deleted:
            into = rows[0]["merged_into"]
            merged = {"merged_into": _shown_id(into)} if into else {}
            raise Refused(404, "merged" if into else "not_found", "There is no such record.", **merged)
        return rows[0]

    def _shown(self, account: AccountState, row: Mapping[str, Any]) -> dict[str, Any]:
        document = {
            "id": _shown_id(row["id"]),
            "marker": row["marker"],
            **row["fields"],
            "created_at": _iso(row["created"]),
            "updated_at": _iso(row["updated"]),
        }
        if account.capabilities["conditional"]:
            document["revision"] = _revision(row)
        if row["deleted"] is not None:
            document["deleted"] = True
            if row["merged_into"]:
                document["merged_into"] = _shown_id(row["merged_into"])
        return document

    def _cleaned(self, account: AccountState, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as they are stored. Raises Refused for a record that is meant to be bad."""
        if _is_bad(values):
            raise Refused(422, "invalid", "This name is not allowed.", field="name")
        return {
            name: account.normalise(value) if isinstance(value, str) else "" if value is None else value
            for name, value in values.items()
            if name not in NOT_FIELDS
        }

    def _check_unique(self, account: AccountState, email: Any, own: int) -> None:
        if not account.capabilities["unique_keys"] or not (key := _email_key(email)):
            return
        row = self.db.execute(
            "SELECT id FROM records WHERE account = ? AND email = ? AND deleted IS NULL AND id != ?",
            [account.name, key, own],
        ).fetchone()
        if row:
            raise Refused(
                409, "already_exists", "A record has this e-mail.", field="email", existing_id=_shown_id(row[0])
            )

    def _insert(
        self,
        account: AccountState,
        values: dict[str, Any],
        marker: str | None,
        *,
        at: float,
        who: str,
        request: int | None = None,
    ) -> dict[str, Any]:
        settings = account.settings
        found = at
        if account.capabilities["look_up"] == "lagging":
            outage = settings.index_outage and account.rng.random() < settings.index_outage
            found += OUTAGE if outage else settings.index_lag
        number = self._write(
            "INSERT INTO records (account, marker, email, fields, revision, created, updated, found)"
            " VALUES (?,?,?,?,1,?,?,?)",
            [account.name, marker, _email_key(values.get("email")), _text(values), at, at, found],
        ).lastrowid
        row: dict[str, Any] = {
            "id": number,
            "marker": marker,
            "fields": values,
            "revision": 1,
            "created": at,
            "updated": at,
            "deleted": None,
            "merged_into": None,
        }
        self._keep(account, row, "create", {}, values, at, who, request)
        return row

    def _change(
        self,
        account: AccountState,
        row: dict[str, Any],
        values: dict[str, Any],
        *,
        at: float,
        who: str,
        marker: str | None = None,
        request: int | None = None,
    ) -> dict[str, Any]:
        """A write that changes nothing is in the ledger as "same" and makes no revision."""
        before = {name: row["fields"].get(name) for name in values}
        if before == values and marker in (None, row["marker"]):
            self._keep(account, row, "same", before, values, at, who, request)
            return row
        row = {
            **row,
            "fields": {**row["fields"], **values},
            "revision": row["revision"] + 1,
            "updated": at,
            "marker": marker or row["marker"],
        }
        self._write(
            "UPDATE records SET fields = ?, email = ?, revision = ?, updated = ?, marker = ? WHERE id = ?",
            [
                _text(row["fields"]),
                _email_key(row["fields"].get("email")),
                row["revision"],
                at,
                row["marker"],
                row["id"],
            ],
        )
        self._keep(account, row, "update", before, values, at, who, request)
        return row

    def _remove(
        self,
        account: AccountState,
        row: dict[str, Any],
        *,
        at: float,
        who: str,
        into: int | None = None,
        request: int | None = None,
    ) -> None:
        row["revision"] += 1
        self._write(
            "UPDATE records SET deleted = ?, deleted_by = ?, merged_into = ?, updated = ?, revision = ? WHERE id = ?",
            [at, who, into, at, row["revision"], row["id"]],
        )
        after = {"merged_into": _shown_id(into)} if into else {}
        self._keep(account, row, "merge" if into else "delete", row["fields"], after, at, who, request)

    def _keep(
        self,
        account: AccountState,
        row: Mapping[str, Any],
        kind: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        at: float,
        who: str,
        request: int | None,
    ) -> None:
        self.new_writes.append(
            (
                account.name,
                at,
                row["id"],
                row["marker"],
                kind,
                _text(before),
                _text(after),
                row["revision"],
                who,
                request,
            )
        )

    # What a test does to it

    def configure(self, name: str, **changes: Any) -> dict[str, Any]:
        """Make an account, or change the settings that are named. Returns all of its settings."""
        with self.lock:
            if unknown := set(changes) - {one.name for one in fields(Settings)}:
                raise Refused(400, "unknown", f"no such setting: {sorted(unknown)}")
            account = self.accounts.get(name)
            settings = replace(account.settings if account else Settings(account_id=f"acct_{name}"), **changes)
            settings.check()
            if account is None:
                self.accounts[name] = account = AccountState(name, settings)
            else:
                account.apply(settings)
            self._write("INSERT OR REPLACE INTO accounts VALUES (?, ?)", [name, _text(asdict(settings))])
            return asdict(settings)

    def control(self, name: str, verb: str, **given: Any) -> Any:
        """Do as a test asks, by one of CONTROLS. Raises Refused."""
        if verb not in CONTROLS:
            raise Refused(404, "unknown", f"no such control: {verb}")
        with self.lock:
            account = self.accounts.get(name)
            if account is None:
                raise Refused(404, "unknown", f"no such account: {name}")
            now = self._now(account)
            self._work_late(account, now)
            try:
                return getattr(self, f"_control_{verb}")(account, now, **given)
            except TypeError as error:
                raise Refused(400, "invalid", str(error)) from error

    def _control(self, request: Request, parts: Sequence[str], query: dict[str, str]) -> Answer:
        name = parts[1]
        given = _body(request)
        if not isinstance(given, dict):
            given = {}
        if len(parts) == 3:
            return _json(200, self.control(name, parts[2], **query, **given))
        if request.method == "PUT":
            return _json(200, self.configure(name, **given))
        if name in self.accounts:
            return _json(200, asdict(self.accounts[name].settings))
        raise Refused(404, "unknown", f"no such account: {name}")

    def _control_script(self, account: AccountState, now: float, faults: Sequence[Mapping[str, Any]]) -> int:
        """Append to the script. Returns how many faults are still to come."""
        made = [Fault(**one) for one in faults]
        if unknown := {one.fault for one in made} - FAULTS:
            raise Refused(400, "unknown", f"no such fault: {sorted(unknown)}")
        account.script += made
        return len(account.script)

    def _control_create(
        self, account: AccountState, now: float, fields: dict[str, Any], marker: str | None = None
    ) -> str:
        return _shown_id(self._insert(account, self._cleaned(account, fields), marker, at=now, who="human")["id"])

    def _control_edit(self, account: AccountState, now: float, record: str, fields: dict[str, Any]) -> None:
        row = self._record(account, record)
        self._change(account, row, self._cleaned(account, fields), at=now, who="human")

    def _control_delete(self, account: AccountState, now: float, record: str) -> None:
        self._remove(account, self._record(account, record), at=now, who="human")

    def _control_undelete(self, account: AccountState, now: float, record: str) -> None:
        row = self._record(account, record, deleted=True)
        row["revision"] += 1
        self._write(
            "UPDATE records SET deleted = NULL, deleted_by = NULL, merged_into = NULL, updated = ?, revision = ?"
            " WHERE id = ?",
            [now, row["revision"], row["id"]],
        )
        self._keep(account, row, "undelete", {}, row["fields"], now, "human", None)

    def _control_merge(self, account: AccountState, now: float, winner: str, loser: str) -> None:
        """The loser is deleted and names the winner, which takes over what it did not have itself."""
        kept, gone = self._record(account, winner), self._record(account, loser)
        self._remove(account, gone, at=now, who="human", into=kept["id"])
        taken = {name: value for name, value in gone["fields"].items() if not kept["fields"].get(name)}
        if taken:
            self._change(account, kept, taken, at=now, who="human")

    def _control_hide(self, account: AccountState, now: float, share: float) -> int:
        """Leave this share of the records out of lists, as a changed filter does. Returns how many."""
        numbers = self.db.execute(
            "SELECT id FROM records WHERE account = ? AND deleted IS NULL AND hidden = 0 ORDER BY id", [account.name]
        ).fetchall()
        chosen = account.rng.sample(numbers, round(len(numbers) * float(share)))
        self._begin()
        self.db.executemany("UPDATE records SET hidden = 1 WHERE id = ?", chosen)
        return len(chosen)

    def _control_show(self, account: AccountState, now: float) -> None:
        self._write("UPDATE records SET hidden = 0 WHERE account = ?", [account.name])

    def _control_login(self, account: AccountState, now: float) -> dict[str, Any]:
        """A person logs in: a new pair of tokens."""
        return self._tokens(account, now)

    def _control_revoke(self, account: AccountState, now: float, kind: str = "") -> None:
        """Kill all tokens, or those of one kind: "access", "refresh"."""
        self._write("UPDATE tokens SET dead = 1 WHERE account = ? AND (? = '' OR kind = ?)", [account.name, kind, kind])

    def _control_advance(self, account: AccountState, now: float, seconds: float) -> None:
        self.configure(account.name, time_offset=account.settings.time_offset + float(seconds))
        self._work_late(account, self._now(account))

    def _control_waiting(self, account: AccountState, now: float) -> int:
        """How many late requests are still to be applied."""
        return len(account.late)

    def _control_flush(self, account: AccountState, now: float) -> None:
        self.flush()

    def _control_ledger(
        self, account: AccountState, now: float, after: int = 0, limit: int = 1000
    ) -> list[dict[str, Any]]:
        return self._kept("requests", account, int(after), int(limit))

    def _control_writes(
        self, account: AccountState, now: float, after: int = 0, limit: int = 1000
    ) -> list[dict[str, Any]]:
        return self._kept("writes", account, int(after), int(limit))

    def _kept(self, table: str, account: AccountState, after: int, limit: int) -> list[dict[str, Any]]:
        self.flush()
        cursor = self.db.execute(
            f"SELECT * FROM {table} WHERE account = ? AND id > ? ORDER BY id LIMIT ?", [account.name, after, limit]
        )
        names = [column[0] for column in cursor.description]
        return [readable(dict(zip(names, row, strict=True))) for row in cursor]

    def _control_records(
        self, account: AccountState, now: float, marker: str | None = None, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Records as they are stored, the deleted among them."""
        where, values = "account = ?", [account.name]
        if marker is not None:
            where, values = where + " AND marker = ?", [*values, str(marker)]
        rows = self._select(f"{where} ORDER BY id LIMIT ?", [*values, int(limit)])
        return [{**row, "id": _shown_id(row["id"]), "hidden": bool(row["hidden"])} for row in rows]


def readable(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the ledger with its JSON read and its record named as the API names it."""
    for name in ("query", "headers", "before", "after"):
        if name in row:
            row[name] = orjson.loads(row[name])
    if "record" in row:
        row["record"] = _shown_id(row["record"])
    return row


_FAILED: Mapping[str, Any] = {"error": {"code": "internal", "message": "Something went wrong."}}


def _json(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status=status, body=orjson.dumps(document), headers={"Content-Type": "application/json", **(headers or {})}
    )


def _refusal(status: int, code: str, message: str) -> Answer:
    return _json(status, {"error": {"code": code, "message": message}})


def _failure(status: int, retry_after: float | None = None) -> Answer:
    if status == 500:
        return _json(500, _FAILED)
    answer = Answer(
        status=status, body=b"<html>The gateway has a problem.</html>", headers={"Content-Type": "text/html"}
    )
    if retry_after is not None:
        answer.headers["Retry-After"] = str(math.ceil(retry_after))
        answer.wait = float(math.ceil(retry_after))
    return answer


def _body(request: Request) -> Any:
    """JSON or a form; None for nothing and for what is neither."""
    if not request.body:
        return None
    if "x-www-form-urlencoded" in request.headers.get("content-type", ""):
        return dict(parse_qsl(request.body.decode(errors="replace"), keep_blank_values=True))
    try:
        return orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return None


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Refused(400, "invalid", "The body must be a JSON object.")
    return data


def _is_bad(values: Mapping[str, Any]) -> bool:
    return str(values.get("name") or "").startswith("BAD")


def _poisoned(document: dict[str, Any]) -> dict[str, Any]:
    """The answer to a write of a record named CRASH has a time that is none: the test's connector falls over it."""
    if str(document.get("name") or "").upper().startswith("CRASH"):
        return {**document, "created_at": "CRASH"}
    return document


def _brief(document: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "revision", *(["created_at"] if document["created_at"] == "CRASH" else []))
    return {name: document[name] for name in names if name in document}


def _email_key(value: Any) -> str | None:
    return value.strip().casefold() or None if isinstance(value, str) else None


def _text(value: Any) -> str:
    return orjson.dumps(value).decode()


def _number(shown_id: str) -> int:
    digits = shown_id.removeprefix("r")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else 0


def _shown_id(number: int) -> str:
    return f"r{number}"


def _revision(row: Mapping[str, Any]) -> str:
    return f'"v{row["revision"]}"'


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()


def _moment(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _date(moment: float) -> str:
    return _whole_date(int(moment))


@functools.lru_cache(maxsize=64)
def _whole_date(moment: int) -> str:
    return formatdate(moment, usegmt=True)


@functools.cache
def _bomb() -> bytes:
    """Thirty megabytes of JSON in thirty kilobytes."""
    return gzip.compress(b'{"name": "' + b" " * 30_000_000 + b'"}')
