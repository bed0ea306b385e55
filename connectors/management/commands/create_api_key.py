"""Make a key that a system calls the hub with."""

from __future__ import annotations

import argparse
import math
from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.core.validators import validate_slug
from django.utils import timezone

from connectors.management.cli import HubCommand, WrongUse, find_organization, positive
from connectors.models import ApiKey
from customers.models import Organization


def rate(text: str) -> float:
    """An argument type: a number of requests per second, or 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if number < 0 or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests per second, nor 0.")
    return number


class Command(HubCommand):
    help = "Make an API key and print it, alone, on stdout. It is stored as a hash and never shown again."
    examples = """\
  manage.py create_api_key demo --name shop
  manage.py create_api_key demo --name reports --scope customers:read --expires-in 90
  KEY=$(manage.py create_api_key shop --name till --create-organization)"""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("organization", help="The organization's slug.")
        parser.add_argument("--name", required=True, help="Who uses the key. Shown in the change history.")
        parser.add_argument(
            "--scope",
            action="append",
            dest="scopes",
            choices=ApiKey.SCOPES,
            help="What the key may do; repeat for more. Without it: everything.",
        )
        parser.add_argument("--expires-in", type=positive, metavar="DAYS", help="Without it the key does not expire.")
        parser.add_argument(
            "--rate",
            type=rate,
            metavar="CALLS",
            help="Requests per second; 0 for no limit. Without it: as the hub is set.",
        )
        parser.add_argument(
            "--strict",
            action="store_true",
            help="Refuse a POST without Idempotency-Key and a change without If-Match.",
        )
        parser.add_argument("--create-organization", action="store_true", help="Make the organization if need be.")

    def handle(self, *args: Any, **options: Any) -> None:
        slug = options["organization"]
        if not options["name"].strip() or len(options["name"]) > 100:
            raise WrongUse("Give the key a --name of 1 to 100 characters.")
        if options["create_organization"]:
            try:
                validate_slug(slug)
            except ValidationError as error:
                raise WrongUse("An organization is named by letters, digits, - and _.") from error
            organization, _ = Organization.objects.get_or_create(slug=slug, defaults={"name": slug})
        else:
            organization = find_organization(slug)
        days = options["expires_in"]
        key, secret = ApiKey.issue(
            organization=organization,
            name=options["name"].strip(),
            scopes=options["scopes"] and list(dict.fromkeys(options["scopes"])),
            rate=options["rate"],
            strict=options["strict"],
            expires_at=timezone.now() + timedelta(days=days) if days else None,
        )
        self.stdout.write(secret)
        until = f"until {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else "without end"
        self.say(
            f"Key {key.name!r} of {organization.slug}, valid {until}, scopes {', '.join(key.scopes)}."
            " Keep it now: it is not shown again."
        )
