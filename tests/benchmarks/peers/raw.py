"""The floor: a WSGI application without a framework that sends the hub's own statements through the plain driver.

It checks the key, keeps the change row and the link, and answers what the hub answers. It validates nothing, normalises
nothing and knows one way through each request.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import django
import orjson
import psycopg

django.setup()

from connectors.models import CustomerLink, SyncRun  # noqa: E402 # models need django.setup()
from customers.ids import parse_public_id, public_id, uuid7  # noqa: E402 # as above
from customers.models import Customer, CustomerChange  # noqa: E402 # as above

URL = os.environ["DATABASE_URL"]
POSTGRESQL = URL.startswith("postgres")
LOCK = " FOR UPDATE" if POSTGRESQL else ""
SHOWN = [
    *("name", "email", "phone", "is_active"),
    *(f"address_{part}" for part in ("line1", "line2", "city", "country", "state", "postal_code")),
    *(f"shipping_address_{part}" for part in ("line1", "line2", "city", "country", "state", "postal_code")),
]
LINK = ["remote_id", "remote_data", "remote_created_at", "created_at", "pushed_version", "needed_version", "deleted_at"]
READ = (
    f"SELECT c.id, c.version, {', '.join(f'c.{name}' for name in SHOWN)}, {', '.join(f'l.{name}' for name in LINK)},"
    " n.provider, n.uid FROM {rows} c LEFT JOIN connectors_customerlink l ON l.customer_id = c.id AND l.is_primary"
    " LEFT JOIN connectors_connection n ON n.id = l.connection_id"
)
ONE = READ.format(rows="customers_customer") + " WHERE c.organization_id = %s AND c.id = %s"
PAGE = (
    READ.format(
        rows="(SELECT * FROM customers_customer WHERE organization_id = %s AND id > %s AND archived_at IS NULL"
        " AND merged_into_id IS NULL ORDER BY id LIMIT 101)"
    )
    + " ORDER BY c.id"
)
KEY = (
    "SELECT k.id, k.organization_id, k.scopes, k.expires_at, k.revoked_at, k.name, o.country, now()"
    " FROM connectors_apikey k JOIN customers_organization o ON o.id = k.organization_id WHERE k.hash = %s"
)
Answer = tuple[str, Any]


def blank(model: Any) -> dict[str, Any]:
    """A row's columns with what the model gives them by itself."""
    new = model()
    return {
        f.column: {} if isinstance(value := getattr(new, f.attname), dict) else value
        for f in model._meta.concrete_fields
        if not f.has_db_default() and f.column != "id"
    } | ({"id": None} if model is Customer else {})


CUSTOMER, CHANGE, LINKED, RUN = blank(Customer), blank(CustomerChange), blank(CustomerLink), blank(SyncRun)
here = threading.local()


def plain(value: Any) -> Any:
    """A value as the driver takes it."""
    if isinstance(value, dict | list):
        return orjson.dumps(value).decode()
    if not POSTGRESQL and isinstance(value, UUID):
        return value.hex
    if not POSTGRESQL and isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(" ")
    return value


class Database:
    """One connection of this thread."""

    def __init__(self) -> None:
        if POSTGRESQL:
            self.connection: Any = psycopg.connect(URL, autocommit=True)
        else:
            self.connection = sqlite3.connect(URL.removeprefix("sqlite:///"), isolation_level=None, timeout=20)
            self.connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")

    def run(self, sql: str, *values: Any) -> Any:
        sql = sql if POSTGRESQL else sql.replace("%s", "?").replace("now()", "datetime()")
        return self.connection.execute(sql, [plain(value) for value in values])

    def insert(self, table: str, row: dict[str, Any], *, returning: str = "") -> Any:
        marks = ", ".join(["%s"] * len(row))
        sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})"
        return self.run(sql + (f" RETURNING {returning}" if returning else ""), *row.values())

    def insert_all(self, table: str, rows: Sequence[dict[str, Any]], *, returning: str = "") -> list[Any]:
        names = ", ".join(rows[0])
        if POSTGRESQL:
            sql = f"INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, %s::json)"
            sql += f" RETURNING {returning}" if returning else ""
            done = self.connection.execute(sql, [orjson.dumps(rows).decode()])
            return list(done.fetchall()) if returning else []
        marks = ", ".join(["?"] * len(rows[0]))
        prepared = [[plain(value) for value in row.values()] for row in rows]
        self.connection.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", prepared)
        return []


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if not hasattr(here, "database"):
        here.database = Database()
    database: Database = here.database
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    secret = environ.get("HTTP_AUTHORIZATION", "").partition(" ")[2] or environ.get("HTTP_API_KEY", "")
    key = database.run(KEY, hashlib.sha256(secret.encode()).hexdigest()).fetchone()
    if key is None:
        start_response("401 Unauthorized", [("Content-Length", "0")])
        return [b""]
    body = orjson.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))) if method != "GET" else None
    for verb, pattern, view in VIEWS:
        if verb == method and (found := pattern.fullmatch(path)):
            given = (database, key, body, environ["QUERY_STRING"], *found.groups())
            try:
                status, answer = view(*given)
            except (psycopg.IntegrityError, sqlite3.IntegrityError):
                # Another has just made a customer of this id: now it is known.
                database.run("ROLLBACK")
                status, answer = view(*given)
            data = orjson.dumps(answer)
            start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
            return [data]
    start_response("404 Not Found", [("Content-Length", "0")])
    return [b""]


def shown(row: Sequence[Any]) -> dict[str, Any]:
    uid, provider = row[0], row[-2]
    link = dict(zip(LINK, row[2 + len(SHOWN) :], strict=False)) if provider else {}
    made = link.get("remote_created_at") or link.get("created_at")
    return {
        "id": public_id("cust", UUID(uid) if isinstance(uid, str) else uid),
        "source_system": provider,
        "source_system_img_url": provider and f"http://localhost/static/connectors/{provider}.svg",
        "source_id": link.get("remote_id"),
        "external_system_provider_id": provider,
        "external_system_config_id": provider and str(row[-1]),
        "external_system_data": link.get("remote_data"),
        "supporting_data_definition_id": provider and f"{provider}.customer",
        **{name: value or ("" if name == "email" else None) for name, value in zip(SHOWN, row[2:], strict=False)},
        "is_primary": True,
        "local_was_deleted": False,
        "local_was_updated": bool(link) and link["pushed_version"] < link["needed_version"],
        "source_data_created_at": made if isinstance(made, str | None) else f"{made:%Y-%m-%dT%H:%M:%SZ}",
    }


def read(database: Database, organization: int, uid: UUID) -> Any:
    return {"data": shown(database.run(ONE, organization, uid).fetchone())}


def customer_row(key: Sequence[Any], body: dict[str, Any], at: datetime) -> dict[str, Any]:
    name, email, phone = body["name"], body.get("email") or "", body.get("phone") or ""
    made = {"id": uuid7(), "organization_id": key[1], "created_at": at, "updated_at": at}
    keys = {"name_key": name.casefold(), "email_key": email.lower(), "phone_key": phone}
    return {**CUSTOMER, **body, **made, **keys}


def change_row(key: Sequence[Any], uid: UUID, version: int, changes: dict[str, Any], at: datetime) -> dict[str, Any]:
    author = {"actor_kind": "api_key", "actor_id": str(key[0]), "actor_name": key[5], "request_id": "req_1"}
    row = {**CHANGE, "organization_id": key[1], "customer_id": uid, "version": version, "at": at, **author}
    return {**row, "changes": changes, **({} if POSTGRESQL else {"tx": 0})}


def link_row(uid: UUID, connection: int, remote_id: str, body: dict[str, Any], at: datetime) -> dict[str, Any]:
    row = {**LINKED, "uid": uuid7(), "customer_id": uid, "connection_id": connection, "remote_id": remote_id}
    row |= {"pushed_version": 1, "needed_version": 1, "is_primary": True, "sync_seq": 1, "synced_at": at}
    return {**row, "base_local": body, "base_remote": body, "created_at": at, "updated_at": at}


def begin(database: Database) -> None:
    database.run("BEGIN" if POSTGRESQL else "BEGIN IMMEDIATE")


AUTOMATIC = (
    "SELECT id FROM connectors_connection WHERE organization_id = %s AND create_policy = 'automatic'"
    " AND direction IN ('push', 'push_and_pull') AND opened_at IS NOT NULL"
)


def create(database: Database, key: Sequence[Any], body: Any, query: str) -> Answer:
    at = datetime.now(UTC)
    row = customer_row(key, body, at)
    begin(database)
    database.insert("customers_customer", row)
    changes = {name: [None, value] for name, value in body.items()}
    database.insert("customers_customerchange", change_row(key, row["id"], 1, changes, at))
    database.run(AUTOMATIC, key[1]).fetchall()
    database.run("COMMIT")
    return "201 Created", read(database, key[1], row["id"])


def change(database: Database, key: Sequence[Any], uid: UUID, body: dict[str, Any], at: datetime) -> int:
    """Write the next version of a customer, within a transaction; returns its number."""
    names = ", ".join(["version", *body])
    lock = f"SELECT {names} FROM customers_customer WHERE organization_id = %s AND id = %s{LOCK}"
    version, *before = database.run(lock, key[1], uid).fetchone()
    moved = {**body, **({"phone_key": body["phone"]} if "phone" in body else {})}
    sets = ", ".join(f"{name} = %s" for name in moved)
    update = f"UPDATE customers_customer SET version = %s, updated_at = %s, {sets} WHERE id = %s"
    database.run(update, version + 1, at, *moved.values(), uid)
    changes = {name: [old, new] for (name, new), old in zip(body.items(), before, strict=True)}
    database.insert("customers_customerchange", change_row(key, uid, version + 1, changes, at))
    return int(version) + 1


def patch(database: Database, key: Sequence[Any], body: Any, query: str, customer_id: str) -> Answer:
    uid, at = parse_public_id("cust", customer_id), datetime.now(UTC)
    assert uid is not None
    begin(database)
    version = change(database, key, uid, body, at)
    database.run(
        "UPDATE connectors_customerlink SET needed_version = %s, next_attempt_at = %s, updated_at = %s"
        " WHERE customer_id = %s AND NOT is_duplicate AND deleted_at IS NULL AND connection_id IN"
        " (SELECT id FROM connectors_connection WHERE organization_id = %s AND direction IN ('push', 'push_and_pull'))",
        *(version, at, at, uid, key[1]),
    )
    database.run("COMMIT")
    return "200 OK", read(database, key[1], uid)


def retrieve(database: Database, key: Sequence[Any], body: Any, query: str, customer_id: str) -> Answer:
    uid = parse_public_id("cust", customer_id)
    assert uid is not None
    return "200 OK", read(database, key[1], uid)


def upsert(database: Database, key: Sequence[Any], body: Any, query: str, connection_id: str, source_id: str) -> Answer:
    at = datetime.now(UTC)
    known = "SELECT id FROM connectors_connection WHERE organization_id = %s AND uid = %s"
    connection = database.run(known, key[1], parse_public_id("con", connection_id)).fetchone()[0]
    begin(database)
    owner = f"SELECT id, customer_id FROM connectors_customerlink WHERE connection_id = %s AND remote_id = %s{LOCK}"
    link = database.run(owner, connection, source_id).fetchone()
    if link is None:
        row = customer_row(key, body, at)
        uid = row["id"]
        database.insert("customers_customer", row)
        changes = {name: [None, value] for name, value in body.items()}
        database.insert("customers_customerchange", change_row(key, uid, 1, changes, at))
        database.run(AUTOMATIC, key[1]).fetchall()
        database.insert("connectors_customerlink", link_row(uid, connection, source_id, body, at), returning="id")
    else:
        uid = link[1] if POSTGRESQL else UUID(link[1])
        version = change(database, key, uid, body, at)
        database.run(
            "UPDATE connectors_customerlink SET base_local = %s, base_remote = %s, sync_seq = sync_seq + 1,"
            " pushed_version = %s, needed_version = %s, synced_at = %s, updated_at = %s WHERE id = %s",
            *(body, body, version, version, at, at, link[0]),
        )
    database.run("COMMIT")
    return ("200 OK" if link else "201 Created"), read(database, key[1], uid)


def bulk(database: Database, key: Sequence[Any], body: Any, query: str) -> Answer:
    at = datetime.now(UTC)
    bodies = [item["values"] for item in body["items"]]
    rows = [customer_row(key, values, at) for values in bodies]
    changes = [
        change_row(key, row["id"], 1, {name: [None, value] for name, value in values.items()}, at)
        for row, values in zip(rows, bodies, strict=True)
    ]
    begin(database)
    database.insert_all("customers_customer", rows)
    database.insert_all("customers_customerchange", changes)
    database.run(AUTOMATIC, key[1]).fetchall()
    database.run("COMMIT")
    items = [
        {"index": i, "status": "created", "id": public_id("cust", row["id"]), "etag": "v1", "error": None}
        for i, row in enumerate(rows)
    ]
    return "200 OK", {"data": {"succeeded": len(items), "failed": 0, "items": items}}


def rootfi(database: Database, key: Sequence[Any], body: Any, query: str) -> Answer:
    at = datetime.now(UTC)
    known = "SELECT id FROM connectors_connection WHERE organization_id = %s AND provider = 'rootfi' AND account = %s"
    connection = database.run(known, key[1], str(body["company_id"])).fetchone()[0]
    bodies = [{name: value for name, value in item.items() if name != "platform_id"} for item in body["data"]]
    rows = [customer_row(key, values, at) for values in bodies]
    changes = [
        change_row(key, row["id"], 1, {name: [None, value] for name, value in values.items()}, at)
        for row, values in zip(rows, bodies, strict=True)
    ]
    links = [
        link_row(row["id"], connection, item["platform_id"], values, at)
        for row, item, values in zip(rows, body["data"], bodies, strict=True)
    ]
    begin(database)
    ids = [item["platform_id"] for item in body["data"]]
    marks = "= ANY(%s)" if POSTGRESQL else f"IN ({', '.join(['%s'] * len(ids))})"
    database.connection.execute(
        f"SELECT id, remote_id, customer_id FROM connectors_customerlink WHERE remote_id {marks}".replace(
            "%s", "%s" if POSTGRESQL else "?"
        ),
        [ids] if POSTGRESQL else ids,
    ).fetchall()
    database.insert_all("customers_customer", rows)
    database.insert_all("customers_customerchange", changes)
    database.run(AUTOMATIC, key[1]).fetchall()
    made = database.insert_all("connectors_customerlink", links, returning="id")
    run = {**RUN, "public_id": uuid7().hex[-16:], "organization_id": key[1], "connection_id": connection}
    run |= {"kind": "receive", "created_at": at, "updated_at": at, "planned": len(rows), "created": len(rows)}
    database.insert("connectors_syncrun", run)
    database.run("COMMIT")
    data = [
        {**item, "rootfi_id": pk[0], "rootfi_company_id": body["company_id"], "rootfi_created_at": at, "address": None}
        for item, pk in zip(body["data"], made or [[0]] * len(rows), strict=True)
    ]
    return "200 OK", {"data": data, "sync_id": run["public_id"]}


def listed(database: Database, key: Sequence[Any], body: Any, query: str) -> Answer:
    cursor = re.search(r"cursor=([^&]*)", query)
    text = cursor[1] if cursor else ""
    after = UUID(bytes=base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:16]) if text else UUID(int=0)
    rows = database.run(PAGE, key[1], after).fetchall()
    return "200 OK", {"data": [shown(row) for row in rows[:100]], "page": None, "limit": 100, "next_cursor": ""}


VIEWS = [
    ("POST", re.compile(r"/api/v1/unified/customer"), create),
    ("PATCH", re.compile(r"/api/v1/unified/customer/([^/]+)"), patch),
    ("GET", re.compile(r"/api/v1/unified/customer/([^/]+)"), retrieve),
    ("PUT", re.compile(r"/api/v1/unified/connections/([^/]+)/customers/(.+)"), upsert),
    ("POST", re.compile(r"/api/v1/unified/customers/bulk"), bulk),
    ("POST", re.compile(r"/v3/ecommerce/customers"), rootfi),
    ("GET", re.compile(r"/api/v1/unified/customers"), listed),
]
