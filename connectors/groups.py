"""The groups that a hub starts with. Who runs it may change or delete them; a group that is there is left alone."""

from __future__ import annotations

from collections.abc import Mapping

from django.contrib.auth.models import Group, Permission

_VIEWER = (
    "customers.view_customer",
    "customers.view_customerchange",
    "connectors.view_connection",
    "connectors.view_customerlink",
)
_EDITOR = (
    *_VIEWER,
    "customers.add_customer",
    "customers.change_customer",
    "customers.view_personal_data",
)
_OPERATOR = (
    *_EDITOR,
    "customers.import_customer",
    "customers.export_customer",
    "connectors.push_customerlink",
    "connectors.pull_connection",
    "connectors.view_syncrun",
    "connectors.view_issue",
    "connectors.change_issue",
    "connectors.view_conflict",
)
_ADMINISTRATOR = (
    *_OPERATOR,
    "customers.view_reveal",
    *(f"connectors.{verb}_connection" for verb in ("add", "change", "delete")),
    *(f"connectors.{verb}_apikey" for verb in ("view", "add", "change")),
    *(f"auth.{verb}_user" for verb in ("view", "add", "change")),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Viewer": _VIEWER,
    "Editor": _EDITOR,
    "Operator": _OPERATOR,
    "Administrator": _ADMINISTRATOR,
}


def make_groups(*, using: str) -> None:
    """Make those that are missing, with their rights."""
    there = set(Group.objects.using(using).filter(name__in=GROUPS).values_list("name", flat=True))
    if missing := GROUPS.keys() - there:
        rows = Permission.objects.using(using).filter(content_type__app_label__in=("customers", "connectors", "auth"))
        ids = {f"{app}.{name}": pk for pk, app, name in rows.values_list("pk", "content_type__app_label", "codename")}
        if not ids.keys() >= set(_ADMINISTRATOR):
            return  # an earlier state of the tables: their permissions come with a later migrate
        for name in sorted(missing):
            Group.objects.using(using).create(name=name).permissions.set([ids[right] for right in GROUPS[name]])
