"""How a list is read where no index finds what its filters keep, or has its order: some thousand rows at a time.

One request then costs as much as it looks at, however many rows the company has. A page may hold fewer than it could.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from django.db.models import F, Q, QuerySet

from connectors.models import CustomerLink
from connectors.providers.rootfi.listing import Listing, Look, Looks
from connectors.providers.rootfi.wire import MAX_ID
from customers.models import Customer, Organization

# Rows that are looked at together; of what changed last fewer, because their ids are read first.
ROWS, CHANGED = 10_000, 2000


def in_index(listing: Listing, connections: Collection[int], *, made: Collection[Q] = ()) -> Looks:
    """Looks along the index that has the order: by id, or by the time of creation and id.

    Of the conditions `made` one holds for every row that is wanted, and another index finds the rows for which it
    holds. In the order of ids these may begin far behind, as what was made last does: a second look goes there.
    """
    links = CustomerLink.objects.filter(connection__in=connections)
    looked, begun = 0, Q()
    links = links.alias(shown_rootfi_id=F("pk"), shown_rootfi_created_at=F("created_at"))
    columns = [{"rootfi_id": "pk", "rootfi_created_at": "created_at"}[name] for name, _ in listing.order]

    def begin() -> Q:
        # Not by the column itself: PostgreSQL would read by id then, because it takes rows to be spread evenly.
        order = (F("pk") + 0).asc() if listing.ascending else (F("pk") + 0).desc()
        firsts = [pk for part in made for pk in links.filter(part).order_by(order).values_list("pk", flat=True)[:1]]
        if not firsts:
            return Q(pk__in=())
        return Q(pk__gte=min(firsts)) if listing.ascending else Q(pk__lte=max(firsts))

    def look(place: Mapping[str, Any] | None) -> Look:
        nonlocal looked, begun, links
        looked += 1
        if looked == 2 and made:
            begun = begin()
            links = links.filter(begun)
        rows = links if place is None else links.filter(listing.side(place, after=True))
        for last in listing.ordered(rows).values_list(*columns)[ROWS - 1 : ROWS]:
            return Look(only=begun, until={name: value for (name, _), value in zip(listing.order, last, strict=True)})
        return Look(only=begun)

    return look


def by_change(listing: Listing, connections: Collection[int], *, organization: Organization, when: Q) -> Looks:
    """Looks in the order of `rootfi_updated_at`, the later one of two tables' moments, for which `when` holds.

    Both are read in their order from the place on. Whatever comes next changed last in one of them, so up to where the
    shorter of the two readings ended all that there is has been seen.
    """
    links = CustomerLink.objects.filter(connection__in=connections)
    customers = Customer.objects.filter(organization=organization)
    mark, nearest, step = ("", min, "gt") if listing.ascending else ("-", max, "lt")
    # Before, or behind, the ids of all links.
    first = 0 if listing.ascending else MAX_ID
    last = MAX_ID - first

    def look(place: Mapping[str, Any] | None) -> Look:
        own, theirs = links.filter(when), customers.filter(when)
        if place is not None:
            at, pk = place["rootfi_updated_at"], place["rootfi_id"]
            beyond = Q(**{f"updated_at__{step}": at}) | Q(**{"updated_at": at, f"pk__{step}": pk})
            own = own.filter(beyond, **{f"updated_at__{step}e": at})
            # Behind the last id of a moment nothing of that moment is left.
            theirs = theirs.filter(**{f"updated_at__{step}{'' if pk == last else 'e'}": at})
        found = list(own.order_by(f"{mark}updated_at", f"{mark}pk").values_list("pk", "updated_at")[:CHANGED])
        changed = list(theirs.order_by(f"{mark}updated_at", f"{mark}id").values_list("pk", "updated_at")[:CHANGED])
        ends: list[datetime] = [rows[-1][1] for rows in (found, changed) if len(rows) == CHANGED]
        ids = {pk for pk, _ in found}
        if not ends:
            ids.update(_of(links, changed).values_list("pk", flat=True))
            return Look(only=Q(pk__in=ids))
        end = nearest(ends)
        if place is None or end != place["rootfi_updated_at"]:
            ids.update(_of(links, changed).values_list("pk", flat=True))
            return Look(only=Q(pk__in=ids), until={"rootfi_updated_at": end, "rootfi_id": first})
        # More than that changed at one moment: those are read by their ids.
        same = links.filter(customer__organization=organization, customer__updated_at=end, **{f"pk__{step}": pk})
        tied = list(same.order_by(f"{mark}pk").values_list("pk", flat=True)[:CHANGED])
        ids.update(tied)
        upto = [rows[-1] for rows in ([pk for pk, at in found if at == end], tied) if len(rows) == CHANGED]
        return Look(
            only=Q(pk__in=ids),
            until={"rootfi_updated_at": end, "rootfi_id": nearest(upto) if upto else last},
        )

    return look


def _of(links: QuerySet[CustomerLink], changed: Collection[tuple[Any, datetime]]) -> QuerySet[CustomerLink]:
    return links.filter(customer__in=[pk for pk, _ in changed])
