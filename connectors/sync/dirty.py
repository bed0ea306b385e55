"""What a change of a customer means for its links: a few statements, whatever the number of links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

from django.conf import settings
from django.db import connection as database
from django.db.models import Case, F, OuterRef, Q, Subquery, Value, When
from django.utils import timezone

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
    mapped: Mapping[str, frozenset[str]],
) -> None:
    """Raise `needed_version` on the links whose system maps a field that moved. `mapped` is each provider's fields.

    A rejected link is released: its record is another one now. An uncertain or conflicting one keeps waiting.
    """
    now = timezone.now()
    concerned = Q()
    groups: dict[tuple[str, ...], list[object]] = {}
    for change in changes:
        if change.created:
            continue
        providers = tuple(sorted(slug for slug, fields in mapped.items() if fields & change.fields))
        if providers:
            groups.setdefault(providers, []).append(change.customer_id)
    for providers, ids in groups.items():
        concerned |= Q(connection__provider__in=providers, customer_id__in=ids)
    if groups:
        version = Customer.objects.filter(pk=OuterRef("customer_id")).values("version")
        rows = CustomerLink.objects.filter(
            concerned, connection__direction__in=Connection.PUSHING, is_duplicate=False, deleted_at=None
        )
        # Locked in the order in which a push locks them, so that the two never wait for each other in a circle.
        of = ("self",) if database.features.has_select_for_update_of else ()
        locked = list(rows.order_by("pk").select_for_update(of=of).values_list("pk", flat=True))
        CustomerLink.objects.filter(pk__in=locked).update(
            needed_version=Subquery(version),
            next_attempt_at=Case(
                When(state__in=WAITING, then=F("next_attempt_at")),
                default=Value(now + timedelta(seconds=settings.PUSH_DEBOUNCE_SECONDS)),
            ),
            state=Case(When(state__in=WAITING, then=F("state")), default=Value(LinkState.OPEN.value)),
            attempts=0,
            updated_at=now,
        )
    if created := [change for change in changes if change.created]:
        _link_new(organization, created, actor)


def _link_new(organization: Organization, created: Sequence[Changed], actor: Actor) -> None:
    """Give new customers a link in each connection that sends them at once, but not back to where they came from."""
    connections = Connection.objects.filter(
        organization=organization,
        direction__in=Connection.PUSHING,
        create_policy=Connection.CreatePolicy.AUTOMATIC,
    )
    if actor.kind == CustomerChange.Actor.CONNECTION:
        connections = connections.exclude(pk=actor.id)
    now = timezone.now()
    bulk.insert(
        [
            CustomerLink(
                uid=uuid7(),
                customer_id=change.customer_id,
                connection=connection,
                needed_version=change.version,
                is_primary=position == 0,
                next_attempt_at=now,
                created_at=now,
                updated_at=now,
            )
            for position, connection in enumerate(connections)
            for change in created
        ]
    )
