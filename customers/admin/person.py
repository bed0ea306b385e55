"""The person behind a request: as the author of a change, and by the organizations that they work with."""

from __future__ import annotations

from django.http import HttpRequest

from customers.editing import Actor
from customers.models import CustomerChange, Organization


def actor_of(request: HttpRequest, *, message: str = "") -> Actor:
    """The person behind the request, as the author of a change."""
    user = request.user
    return Actor(
        kind=CustomerChange.Actor.USER,
        id=str(user.pk),
        name=(user.get_full_name() or user.get_username()) if user.is_authenticated else "",
        request_id=getattr(request, "request_id", ""),
        message=message,
    )


def organizations(request: HttpRequest) -> list[Organization]:
    """The organizations that this person may work with, read once per request."""
    found: list[Organization] | None = getattr(request, "own_organizations", None)
    if found is None:
        found = list(Organization.objects.of(request.user))
        request.own_organizations = found  # type: ignore[attr-defined] # kept where it belongs: on this request
    return found
