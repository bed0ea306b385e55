"""Taking due links for one worker alone, and giving them back: lease and fence.

A lease is a random token and a time. Whoever answers must still hold the token; an answer that comes after somebody
else took the link over is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from datetime import datetime, timedelta
from uuid import UUID

from django.db import connection as database
from django.db.models import F, Q, QuerySet

from connectors.models import Connection, CustomerLink

# A call may take half of this. What has not begun by then is given back.
LEASE = timedelta(seconds=70)


def due(*, now: datetime) -> Q:
    """Links that wait to be sent and that nobody holds."""
    free = Q(lease_until=None) | Q(lease_until__lte=now)
    return free & Q(
        pushed_version__lt=F("needed_version"), next_attempt_at__lte=now, is_duplicate=False, deleted_at=None
    )


def due_connections(*, now: datetime) -> QuerySet[Connection]:
    """Connections that may be used now and have links to send."""
    waiting = CustomerLink.objects.filter(due(now=now)).values("connection_id").distinct()
    return Connection.objects.filter(
        Q(not_before=None) | Q(not_before__lte=now),
        pk__in=waiting,
        direction__in=Connection.PUSHING,
        state=Connection.State.ACTIVE,
    ).select_related("organization")


def claim(
    *, connection: Connection, now: datetime, limit: int, customer_ids: Collection[UUID] | None = None
) -> tuple[str, list[CustomerLink]]:
    """A fresh token and the due links it now holds, customers loaded. Call it inside the transaction that writes the
    intents: lease and intent become visible together.
    """
    rows = CustomerLink.objects.filter(due(now=now), connection=connection)
    if customer_ids is not None:
        rows = rows.filter(customer_id__in=customer_ids)
    # SQLite ignores the row lock: there the IMMEDIATE transaction keeps others out.
    rows = rows.select_for_update(
        skip_locked=database.features.has_select_for_update_skip_locked,
        of=("self",) if database.features.has_select_for_update_of else (),
    )
    links = list(rows.select_related("customer").order_by("next_attempt_at", "pk")[:limit])
    token = secrets.token_hex(16)
    for link in links:
        link.connection = connection
        link.lease_token = token
        link.lease_until = now + LEASE
    return token, links


def held(*, token: str, links: Collection[CustomerLink]) -> dict[int, CustomerLink]:
    """Those of these links that the token still holds, read again and locked. The others were fenced off."""
    rows = CustomerLink.objects.filter(pk__in=[link.pk for link in links], lease_token=token)
    rows = rows.select_for_update().order_by("pk")
    return {link.pk: link for link in rows}
