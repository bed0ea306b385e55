"""The rows of a list as the theme writes them. What is the same in every row is made once for the page.

The theme itself makes headings, classes and boxes to tick anew for each row: most of what a list cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.contrib.admin.templatetags.admin_urls import add_preserved_filters
from django.contrib.admin.utils import lookup_field
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import ObjectDoesNotExist
from django.db import models
from django.utils.html import conditional_escape, format_html
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext

from customers import theme

TICK = "action_checkbox"
LINK = '<a href="{}" class="{}" {}>{}</a>'


@dataclass(frozen=True, kw_only=True)
class Column:
    name: Any
    opening: str
    closing: str
    shown: Callable[[Any], str]


def headings(changes: ChangeList) -> list[dict[str, Any]]:
    return list(theme.result_headers(changes))


def rows(changes: ChangeList, headings: list[dict[str, Any]]) -> Iterator[SafeString]:
    """The cells of each row of the page."""
    columns = list(_columns(changes, [heading["text"] for heading in headings]))
    for result in changes.result_list:
        yield mark_safe("".join(f"{one.opening}{one.shown(result)}{one.closing}" for one in columns))


def _columns(changes: ChangeList, titles: list[Any]) -> Iterator[Column]:
    links = changes.list_display_links
    headed = False  # the first column that leads to the object is the heading of its row
    for position, (name, title) in enumerate(zip(changes.list_display, titles, strict=True)):
        linked = links is not None and (name in links or (not links and not headed))
        tag = "th" if linked and not headed else "td"
        headed = headed or linked
        label = title if linked or position else gettext("Select record")
        shown = _ticks(changes) if name == TICK else _values(changes, name)
        yield Column(
            name=name,
            opening=format_html('<{} class="{}" data-label="{}">', tag, _classes(changes, name), label),
            closing=f"</{tag}>",
            shown=_links(changes, shown) if linked else shown,
        )


def _classes(changes: ChangeList, name: Any) -> str:
    if name == TICK:
        return " ".join(theme.CHECKBOX_CLASSES)
    classes = [f"field-{name.__name__ if callable(name) else name}", *theme.ROW_CLASSES]
    field = next((one for one in changes.lookup_opts.fields if one.name == name), None)
    if isinstance(field, models.DateField | models.TimeField | models.ForeignKey):
        classes.append("nowrap")
    return " ".join(classes)


def _values(changes: ChangeList, name: Any) -> Callable[[Any], str]:
    admin = changes.model_admin
    empty = admin.get_empty_value_display()

    def shown(result: Any) -> str:
        try:
            field, attribute, value = lookup_field(name, result, admin)
        except ObjectDoesNotExist:
            return conditional_escape(empty)
        if field is None or field.auto_created:
            nothing = getattr(attribute, "empty_value_display", empty)
            told = theme.display_for_value(value, nothing, getattr(attribute, "boolean", False))
        elif isinstance(field.remote_field, models.ManyToOneRel):
            told = empty if (other := getattr(result, field.name)) is None else other
        else:
            told = theme.display_for_field(value, field, empty)
        return conditional_escape(told)

    return shown


def _links(changes: ChangeList, text: Callable[[Any], str]) -> Callable[[Any], str]:
    classes = " ".join(theme.LINK_CLASSES)
    kept: dict[str, Any] = {"preserved_filters": changes.preserved_filters, "opts": changes.opts}
    key = changes.to_field or changes.pk_attname

    def shown(result: Any) -> str:
        address = add_preserved_filters(kept, changes.url_for_result(result))
        opener = ""
        if changes.is_popup:
            opener = format_html(' data-popup-opener="{}"', result.serializable_value(key))
        return format_html(LINK, address, classes, opener, text(result))

    return shown


def _ticks(changes: ChangeList) -> Callable[[Any], str]:
    """The box of each row, from that of the first: they differ in the id alone."""
    made: list[tuple[str, str]] = []

    def shown(result: Any) -> str:
        value = format_html('value="{}"', result.pk)
        if not made:
            made.append((value, conditional_escape(changes.model_admin.action_checkbox(result))))
        first, box = made[0]
        return box.replace(first, value)

    return shown
