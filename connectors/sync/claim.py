"""Taking due links for one worker alone, and giving them back: lease and fence.

A lease is a random token and a time. Whoever answers must still hold the token; an answer that comes after somebody
else took the link over is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from uuid import UUID

from django.db import connection as database
from django.db.models import BigAutoField, DateTimeField, Exists, F, OuterRef, Q, QuerySet, UUIDField

from connectors.models import Connection, CustomerLink
from connectors.states import LinkState
from customers.prepared import Among, Param, Prepared

# A call may take half of this. It is renewed while work goes on.
LEASE = timedelta(seconds=60)


@dataclass(kw_only=True)
class Claim:
    """Links that `token` holds. `died` tells until when a worker that never answered held one of them."""

    token: str
    links: list[CustomerLink]
    died: dict[int, datetime] = field(default_factory=dict)


def due(*, now: datetime | Param) -> Q:
    """Links that wait to be sent and that nobody holds. Of duplicates, those whose create has yet to be found.

    Of a connection whose first steps are not over: what somebody asked for in a run, and what follows of a sending.
    """
    free = Q(lease_until=None) | Q(lease_until__lte=now)
    sent_to = Q(is_duplicate=False) | Q(state=LinkState.UNCERTAIN)
    closed = Connection.objects.filter(opened_at=None).values("pk")
    held = Q(connection__in=closed, run=None, state=LinkState.OPEN, lease_token="")
    return free & sent_to & ~held & Q(pushed_version__lt=F("needed_version"), next_attempt_at__lte=now, deleted_at=None)


def due_connections(*, now: datetime) -> list[Connection]:
    """Connections that may be used now and have links to send, with their organizations."""
    return _DUE(now=now)


def due_connection(pk: int, *, now: datetime) -> Connection | None:
    """The connection with this key, where it is one of `due_connections`."""
    for connection in _ONE_DUE(now=now, connection=pk):
        return connection
    return None


def _due_connections() -> QuerySet[Connection]:
    now = Param("now", DateTimeField())
    # Asked of each connection, so that the first link answers: millions may be due.
    waiting = CustomerLink.objects.filter(due(now=now), connection=OuterRef("pk"))
    return Connection.objects.filter(
        Q(not_before=None) | Q(not_before__lte=now),
        Q(breaker_until=None) | Q(breaker_until__lte=now),
        Exists(waiting),
        direction__in=Connection.PUSHING,
        state=Connection.State.ACTIVE,
    ).select_related("organization")


# Building these queries costs several times what the database needs for them.
_DUE = Prepared(_due_connections)
_ONE_DUE = Prepared(lambda: _due_connections().filter(pk=Param("connection", BigAutoField())))


def claim(
    *,
    connection: Connection,
    now: datetime,
    limit: int,
    customer_ids: Collection[UUID] | None = None,
    token: str = "",
    but: Collection[int] = (),
) -> Claim:
    """Due links under the token, or a fresh one, customers loaded, less those in `but`; the caller stores token and
    time. Call it inside the transaction that writes the intents: lease and intent become visible together.

    A link on which a worker died is claimed alone, so that it takes no others with it when it kills the next one.
    """
    given = {"now": now, "connection": connection.pk, "customers": customer_ids, "but": but}
    links = _first(limit, customer_ids is not None, bool(but))(**given)
    if links and links[0].crashes:
        links = links[:1]
    links = links[:1] + [link for link in links[1:] if not link.crashes]
    held_before = {link.pk: link.lease_until for link in links if link.lease_token}
    token = token or secrets.token_hex(16)
    for link in links:
        link.connection = connection
        link.lease_token = token
        link.lease_until = now + LEASE
    return Claim(token=token, links=links, died={pk: until for pk, until in held_before.items() if until})


# A worker asks for few sizes of claims.
@lru_cache(maxsize=128)
def _first(limit: int, of_some: bool, but_some: bool) -> Prepared[CustomerLink]:
    def build() -> QuerySet[CustomerLink]:
        connection = Param("connection", BigAutoField())
        rows = CustomerLink.objects.filter(due(now=Param("now", DateTimeField())), connection_id=connection)
        if of_some:
            rows = rows.filter(Among("customer_id", "customers", UUIDField()))
        if but_some:
            rows = rows.exclude(Among("id", "but", BigAutoField()))
        # SQLite ignores the row lock: there the IMMEDIATE transaction keeps others out.
        rows = rows.select_for_update(
            skip_locked=database.features.has_select_for_update_skip_locked,
            of=("self",) if database.features.has_select_for_update_of else (),
        )
        return rows.select_related("customer").order_by(F("urgent").desc(), "next_attempt_at", "pk")[:limit]

    return Prepared(build)


def renew(*, token: str, links: Collection[int], now: datetime) -> int:
    """Hold on to those of these links that the token still holds. Returns how many they are."""
    return CustomerLink.objects.filter(pk__in=links, lease_token=token).update(lease_until=now + LEASE)


def held(*, token: str, links: Collection[CustomerLink]) -> dict[int, CustomerLink]:
    """Those of these links that the token still holds, read again and locked. The others were fenced off."""
    rows = CustomerLink.objects.filter(pk__in=[link.pk for link in links], lease_token=token)
    rows = rows.select_for_update().order_by("pk")
    return {link.pk: link for link in rows}
