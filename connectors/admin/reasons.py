"""Why records are refused, counted by cause, in words that this reader may see."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Count, Max, QuerySet

from connectors.models import CustomerLink
from customers.privacy import redacted


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Links that were refused alike. `field` and `text` are those of the newest of them."""

    fingerprint: str
    field: str
    text: str
    number: int


def causes(links: QuerySet[CustomerLink], *, clear: bool, most: int) -> list[Cause]:
    """The most frequent causes, in two queries. Without the right (`clear`), the text hides what is personal of the
    customer whom it was said of: to hide that, the customer must be known.
    """
    rows = links.order_by().values("fingerprint").annotate(number=Count("pk"), newest=Max("pk"))
    found = list(rows.order_by("-number", "fingerprint")[:most])
    examples = CustomerLink.objects.select_related("customer").only("error", "error_field", "customer")
    by_pk = examples.in_bulk([row["newest"] for row in found])
    return [
        Cause(
            fingerprint=row["fingerprint"],
            field=link.error_field,
            text=link.error if clear else redacted(link.error, vars(link.customer)),
            number=row["number"],
        )
        for row in found
        if (link := by_pk.get(row["newest"])) is not None
    ]
