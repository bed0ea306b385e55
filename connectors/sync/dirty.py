"""What a change of a customer means for its links: a few statements, whatever the number of links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection as database
from django.db.models import Case, F, OuterRef, Q, Subquery, Value, When

from connectors.models import Connection, CustomerLink
from connectors.states import WAITING, LinkState
from customers import bulk
from customers.editing import Actor, Changed
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization


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
    concerned = Q()
    groups: dict[tuple[str, ...], list[object]] = {}
    archived = []
    for change in changes:
        if change.created:
            continue
        if "archived_at" in change.fields:
            archived.append(change.customer_id)
        providers = tuple(sorted(slug for slug, fields in mapped.items() if fields & change.fields))
        if providers:
            groups.setdefault(providers, []).append(change.customer_id)
    for providers, ids in groups.items():
        concerned |= Q(connection__provider__in=providers, customer_id__in=ids)
    if archived:
        concerned |= Q(
            customer_id__in=archived,
            remote_id__isnull=False,
            connection__archive_policy=Connection.ArchivePolicy.DELETE,
        )
    if concerned:
        version = Customer.objects.filter(pk=OuterRef("customer_id")).values("version")
        rows = CustomerLink.objects.filter(
            concerned, connection__direction__in=Connection.PUSHING, is_duplicate=False, deleted_at=None
        )
        # Locked in the order in which a push locks them, so that the two never wait for each other in a circle.
        of = ("self",) if database.features.has_select_for_update_of else ()
        locked = list(rows.order_by("pk").select_for_update(of=of).values_list("pk", flat=True))
        when = at + timedelta(seconds=settings.PUSH_DEBOUNCE_SECONDS)
        waits = Q(state__in=WAITING)
        CustomerLink.objects.filter(pk__in=locked).update(
            needed_version=Subquery(version),
            next_attempt_at=Case(
                When(waits, then=F("next_attempt_at")),
                When(hold_until__gt=when, then=F("hold_until")),
                default=Value(when),
            ),
            state=Case(When(waits, then=F("state")), default=Value(LinkState.OPEN.value)),
            attempts=Case(When(waits, then=F("attempts")), default=Value(0)),
            failing_since=Case(When(waits, then=F("failing_since")), default=None),
            fingerprint=Case(When(waits, then=F("fingerprint")), default=Value("")),
            crashes=Case(When(waits, then=F("crashes")), default=Value(0)),
            updated_at=at,
        )
    if created := [change for change in changes if change.created]:
        _link_new(organization, created, actor, at)


def _link_new(organization: Organization, created: Sequence[Changed], actor: Actor, at: datetime) -> None:
    """Give new customers a link in each connection that sends them at once, but not back to where they came from."""
    connections = Connection.objects.filter(
        organization=organization,
        direction__in=Connection.PUSHING,
        create_policy=Connection.CreatePolicy.AUTOMATIC,
        opened_at__isnull=False,
    )
    if actor.kind == CustomerChange.Actor.CONNECTION:
        connections = connections.exclude(pk=actor.id)
    bulk.insert(
        [
            CustomerLink(
                uid=uuid7(),
                customer_id=change.customer_id,
                connection=connection,
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
