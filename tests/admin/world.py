"""A small hub with something of everything that the admin shows, for the tests that visit every page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import Group, User
from django.db import connection as database
from django.utils import timezone

from connectors.models import ApiKey, Conflict, Connection, CustomerLink, Issue, PushIntent, SyncRun
from connectors.states import LinkState
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization, Reveal

ACTOR = Actor(kind="command", name="test")
SECRET = "remote-key"
# Rows of these may differ after a visit: that somebody was there is written down.
VISITS = {"django_session"}
VISIT_COLUMNS = {"last_login"}


@dataclass(kw_only=True)
class World:
    """What the pages are about. `objects` names one object for each model, for the addresses that take an id."""

    organization: Organization
    books: Connection
    customer: Customer
    links: dict[str, CustomerLink]
    runs: dict[str, SyncRun]
    objects: dict[str, Any] = field(default_factory=dict)


def make(organization: Organization, *, url: str = "") -> World:
    """The world of one organization. `url` is the address of a Links system; without one nothing answers."""
    now = timezone.now()
    connections = {
        "books": _connection(organization, "links", "Books", base_url=url or "https://books.example.com"),
        "shop": _connection(organization, "commenda", "Shop", account="corp_1"),
        "pay": _connection(organization, "cheqpay", "Payments", account="M-1", direction="push"),
        "mail": _connection(organization, "rootfi", "Newsletter", account="1089"),
        "desk": _connection(organization, "links", "Desk", account="desk", direction="calls_us"),
        "unused": _connection(organization, "links", "Unused", account="unused", direction="push"),
    }
    Connection.objects.filter(pk=connections["pay"].pk).update(
        state="needs_reauth", state_reason="The provider does not accept the credentials."
    )
    Connection.objects.filter(pk=connections["unused"].pk).update(opened_at=None)
    Connection.objects.filter(pk=connections["mail"].pk).update(state="paused", state_reason="Stocktaking (Alex)")
    books = connections["books"]

    names = ("in_sync", "waiting", "retrying", "rejected", "uncertain", "conflict", "remote_deleted", "paused")
    values = [
        {
            "name": f"Example {name.replace('_', ' ')}",
            "email": f"{name}@example.com",
            "phone": f"+44 20 7946 0{number:03}",
            "address_line1": "1 High Street",
            "address_city": "Springfield",
            "address_country": "GB",
            "custom_fields": {"tax_number": f"GB{number:09}"},
        }
        for number, name in enumerate((*names, "archived", "survivor", "merged"))
    ]
    made = editing.create(organization=organization, values=values, actor=ACTOR)
    customers = dict(zip((*names, "archived", "survivor", "merged"), made, strict=True))
    editing.update(
        organization=organization,
        values={customers["in_sync"].pk: {"phone": "+44 20 7946 0999"}},
        actor=Actor(kind="user", id="1", name="Alex", message="as told by phone", request_id="req-1"),
    )
    editing.archive(organization=organization, ids=[customers["archived"].pk], actor=ACTOR)
    editing.merge(
        organization=organization,
        survivor=customers["survivor"].pk,
        loser=customers["merged"].pk,
        values={},
        actor=ACTOR,
    )

    special: dict[str, dict[str, Any]] = {
        "in_sync": {"pushed_version": 2, "needed_version": 2, "synced_at": now, "remote_id": "in-sync"},
        "waiting": {"next_attempt_at": now},
        "retrying": {"state": LinkState.RETRYING, "next_attempt_at": now + timedelta(hours=1), "error": "HTTP 503"},
        "rejected": {"state": LinkState.REJECTED, "error": "Links needs an e-mail address.", "error_field": "email"},
        "uncertain": {"state": LinkState.UNCERTAIN, "error": "No answer came.", "remote_id": None},
        "conflict": {
            "state": LinkState.CONFLICT,
            "conflicts": {"phone": {"base": "1", "here": "+44 20 7946 0005", "there": "2", "at": now.isoformat()}},
        },
        "remote_deleted": {
            "state": LinkState.REMOTE_DELETED,
            "deleted_at": now,
            "remote_id": None,
            "former_remote_id": "gone",
            "tombstone": {"at": now.isoformat(), "evidence": "a read that found nothing", "by": "system"},
        },
        "paused": {"state": LinkState.PAUSED, "error": "Asked to wait."},
    }
    links = {name: _link(customers[name], books, name, special[name]) for name in names}
    links["duplicate"] = _link(customers["in_sync"], books, "second", {"is_duplicate": True})
    _link(customers["in_sync"], connections["shop"], "in-shop", {"pushed_version": 2, "needed_version": 2})
    _link(customers["in_sync"], connections["pay"], "in-pay", {})
    _link(customers["in_sync"], connections["mail"], "in-mail", {})
    _link(customers["in_sync"], connections["desk"], "in-desk", {})
    for name in ("in_sync", "rejected", "uncertain"):
        outcome = {"in_sync": "ok", "rejected": "failed", "uncertain": "uncertain"}[name]
        PushIntent.objects.create(
            link=links[name],
            kind=PushIntent.Kind.CREATE,
            payload={"name": customers[name].name, "email": customers[name].email},
            sent_values={"name": customers[name].name, "email": customers[name].email},
            version=1,
            outcome=outcome,
            first_sent_at=now,
            sent_at=now,
            answered_at=now if name != "uncertain" else None,
            status={"in_sync": 201, "rejected": 422}.get(name),
            error=links[name].error,
        )
    Conflict.objects.create(
        organization=organization, connection=books, link=links["conflict"], field="phone", base="1",
        here="+44 20 7946 0005", there="2", outcome="waiting", at=now,
    )  # fmt: skip
    conflict = Conflict.objects.create(
        organization=organization, connection=books, link=links["in_sync"], field="email", base="a@example.com",
        here="b@example.com", there="c@example.com", outcome="hub", at=now, resolved_at=now, resolved_by="Alex",
    )  # fmt: skip
    issue = Issue.objects.create(
        organization=organization, connection=books, kind=Issue.Kind.REJECTED, fingerprint="f1",
        message="Links needs an e-mail address.", count=2, first_at=now, last_at=now,
    )  # fmt: skip
    problem = {"customer": str(customers["rejected"].pk), "field": "email", "reason": "Links needs an e-mail address."}
    runs = {
        "done": _run(organization, books, state="partly_succeeded", planned=3, created=2, refused=1, problems=[problem],
                     started_at=now - timedelta(seconds=9), finished_at=now),
        "running": _run(organization, books, state="running", planned=9, created=4, started_at=now),
        "queued": _run(organization, books, kind="pull"),
    }  # fmt: skip
    key, _ = ApiKey.issue(organization=organization, name="webshop")
    colleague = User.objects.create(username=f"colleague-{organization.slug}", is_staff=True)
    organization.members.add(colleague)
    group = Group.objects.create(name=f"Night shift of {organization.name}")
    reveal = Reveal.objects.create(
        organization=organization, customer=customers["in_sync"], at=now, user_id="1", user_name="Alex", reason="a call"
    )
    world = World(organization=organization, books=books, customer=customers["in_sync"], links=links, runs=runs)
    world.objects = {
        "customer": customers["in_sync"],
        "archived": customers["archived"],
        "merged": customers["merged"],
        "customerchange": CustomerChange.objects.filter(customer=customers["in_sync"]).latest("pk"),
        "organization": organization,
        "user": colleague,
        "group": group,
        "connection": books,
        "paused_connection": connections["mail"],
        "ended_connection": connections["pay"],
        "calling_connection": connections["desk"],
        "unused_connection": connections["unused"],
        "new_connection": connections["unused"],
        "uncertain_link": links["uncertain"],
        "paused_link": links["paused"],
        "running_run": runs["running"],
        "apikey": key,
        "reveal": reveal,
        "customerlink": links["in_sync"],
        "syncrun": runs["done"],
        "issue": issue,
        "conflict": conflict,
    }
    return world


def _connection(organization: Organization, provider: str, name: str, **fields: Any) -> Connection:
    fields = {"direction": "push_and_pull", "base_url": "https://api.example.com", **fields}
    made = Connection(organization=organization, provider=provider, name=name, **fields)
    made.seal_credentials({"api_key": SECRET})
    made.save()
    return made


def _link(customer: Customer, connection: Connection, name: str, fields: dict[str, Any]) -> CustomerLink:
    now = timezone.now()
    known = {"name": customer.name, "email": customer.email}
    return CustomerLink.objects.create(
        customer=customer,
        connection=connection,
        **{
            "remote_id": f"{customer.organization.slug}-{name}",
            "remote_data": known,
            "base_local": known,
            "base_remote": known,
            "needed_version": 1,
            "created_at": now,
            "updated_at": now,
            **fields,
        },
    )


def _run(organization: Organization, connection: Connection, *, kind: str = "push", **fields: Any) -> SyncRun:
    return SyncRun.objects.create(
        public_id=SyncRun.new_public_id(), organization=organization, connection=connection, kind=kind,
        actor_kind="user", actor_name="Alex", **fields,
    )  # fmt: skip


def rows() -> Iterator[tuple[str, list[str]]]:
    """Every row of every table as text, but for what a visit leaves."""
    with database.cursor() as cursor:
        for table in sorted(database.introspection.table_names(cursor)):
            if table in VISITS:
                continue
            cursor.execute(f"SELECT * FROM {database.ops.quote_name(table)}")
            columns = [column[0] for column in cursor.description]
            kept = [index for index, column in enumerate(columns) if column not in VISIT_COLUMNS]
            yield table, sorted(repr([row[index] for index in kept]) for row in cursor.fetchall())
