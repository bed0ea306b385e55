"""What a change of a customer means for its links: a few statements, whatever the number of links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import connection as database
from django.db import models
from django.db.models import Case, F, OuterRef, Q, Subquery, Value, When

from connectors.models import Connection, CustomerLink
from connectors.states import WAITING, LinkState
from customers import bulk
from customers.editing import Actor, Changed
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization
from customers.prepared import Among, Param, Prepared, PreparedUpdate


def mark_dirty(
    *,
    organization: Organization,
    changes: Sequence[Changed],
    actor: Actor,
    at: datetime,
    mapped: Mapping[str, frozenset[str]],
) -> None:
    """Raise `needed_version` on the links whose system maps a field that moved. `mapped` is each provider's fields.

    Where records of archived customers are deleted, archiving and restoring count as such a field. A rejected link is
    released: its record is another one now. An uncertain or conflicting one keeps waiting. None becomes due before a
    lost request to it must be dead.
    """
    moved = {change.customer_id: change.fields for change in changes if not change.created}
    archived = {id_ for id_, fields in moved.items() if "archived_at" in fields}
    providers = {slug for slug, mapped_fields in mapped.items() if any(mapped_fields & f for f in moved.values())}
    if providers or archived:
        concerned = [
            pk
            for pk, id_, slug, deletes in _LOCKED(customers=moved, providers=providers, archived=archived)
            # Several customers may have moved in different fields.
            if mapped.get(slug, frozenset()) & moved[id_] or (deletes and id_ in archived)
        ]
        if concerned:
            _RAISE(ids=concerned, when=at + timedelta(seconds=settings.PUSH_DEBOUNCE_SECONDS), at=at)
    if created := [change for change in changes if change.created]:
        _link_new(organization, created, actor, at)


def _locked() -> models.QuerySet[CustomerLink, tuple[Any, ...]]:
    deletes = Q(remote_id__isnull=False, connection__archive_policy=Connection.ArchivePolicy.DELETE)
    answer = models.ExpressionWrapper(deletes, models.BooleanField())
    rows = CustomerLink.objects.filter(
        Q(Among("connection__provider", "providers", models.CharField()))
        | (deletes & Q(Among("customer_id", "archived", models.UUIDField()))),
        Among("customer_id", "customers", models.UUIDField()),
        connection__direction__in=Connection.PUSHING,
        is_duplicate=False,
        deleted_at=None,
    )
    of = ("self",) if database.features.has_select_for_update_of else ()
    # In the order in which a push locks them, so that the two never wait for each other in a circle.
    return rows.order_by("pk").select_for_update(of=of).values_list("pk", "customer_id", "connection__provider", answer)


def _raised() -> tuple[models.QuerySet[CustomerLink], Mapping[str, Any]]:
    version = Customer.objects.filter(pk=OuterRef("customer_id")).values("version")
    waits = Q(state__in=WAITING)
    when = Param("when", models.DateTimeField())
    return CustomerLink.objects.filter(Among("id", "ids", models.BigAutoField())), {
        "needed_version": Subquery(version),
        "next_attempt_at": Case(
            When(waits, then=F("next_attempt_at")), When(hold_until__gt=when, then=F("hold_until")), default=when
        ),
        "state": Case(When(waits, then=F("state")), default=Value(LinkState.OPEN.value)),
        "attempts": Case(When(waits, then=F("attempts")), default=Value(0)),
        "failing_since": Case(When(waits, then=F("failing_since")), default=None),
        "fingerprint": Case(When(waits, then=F("fingerprint")), default=Value("")),
        "crashes": Case(When(waits, then=F("crashes")), default=Value(0)),
        "updated_at": Param("at", models.DateTimeField()),
    }


_LOCKED = Prepared(_locked)
_RAISE = PreparedUpdate(_raised)
_SENT_AT_ONCE = Prepared(
    lambda: Connection.objects.filter(
        organization_id=Param("organization", models.BigAutoField()),
        direction__in=Connection.PUSHING,
        create_policy=Connection.CreatePolicy.AUTOMATIC,
        opened_at__isnull=False,
    ).values_list("pk")
)


def _link_new(organization: Organization, created: Sequence[Changed], actor: Actor, at: datetime) -> None:
    """Give new customers a link in each connection that sends them at once, but not back to where they came from."""
    connections = [pk for (pk,) in _SENT_AT_ONCE(organization=organization.pk)]
    if actor.kind == CustomerChange.Actor.CONNECTION:
        connections = [pk for pk in connections if str(pk) != actor.id]
    bulk.insert(
        [
            CustomerLink(
                uid=uuid7(),
                customer_id=change.customer_id,
                connection_id=connection,
                needed_version=change.version,
                is_primary=position == 0,
                next_attempt_at=at,
                created_at=at,
                updated_at=at,
            )
            for position, connection in enumerate(connections)
            for change in created
        ]
    )
