"""Lists that count, page and sort no further than an index goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from django.contrib.admin.views.main import ORDER_VAR, ChangeList
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString

from customers.admin import rows

# Rows that a list counts and leads to; what lies beyond is reached by filters and search.
COUNTED = 10_000
# As far as a filter is counted and paged through that asks of one row of the list after the other.
COUNTED_SLOWLY = 1000


class MoreThan(int):
    """A number that was not counted to its end: shown as "more than" it."""

    def __str__(self) -> str:
        return f"more than {int(self):,}"


class BoundedPaginator(Paginator):  # type: ignore[type-arg] # none at run time
    """Counts and pages to `bound` rows: neither a count nor a page ever reads a whole table."""

    bound = COUNTED
    among: Sequence[Any] = ()  # ids of which many are hits: if they are enough, no others are asked about

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment] # the admin pages through nothing else
        rows = rows.order_by()
        number = rows.filter(pk__in=self.among).values("pk")[: self.bound + 1].count() if self.among else 0
        if number <= self.bound:
            number = rows.values("pk")[: self.bound + 1].count()
        return MoreThan(self.bound) if number > self.bound else number


class BoundedChangeList(ChangeList):
    """Sorts by what an index can bring in order, and by nothing else."""

    @cached_property
    def headings(self) -> list[dict[str, Any]]:
        return rows.headings(self)

    def rows(self) -> Iterator[SafeString]:
        return rows.rows(self, self.headings)

    def sorted_columns(self) -> int:
        return sum(bool(heading["sortable"] and heading["sorted"]) for heading in self.headings)

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        sortable = set(self.sortable_by or ())
        wanted = self.params.get(ORDER_VAR, "")
        positions = [part.lstrip("-") for part in wanted.split(".")]
        names = [self.list_display[int(p)] for p in positions if p.isdecimal() and int(p) < len(self.list_display)]
        if any(name not in sortable for name in names):
            self.params.pop(ORDER_VAR, None)
        return super().get_ordering(request, queryset)
