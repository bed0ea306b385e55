"""A hub to look at, on a fresh machine, with two organizations that send customers to each other over HTTP."""

from __future__ import annotations

import os
import secrets
import sys
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import CommandParser
from django.db import transaction
from django.utils import timezone

from connectors.management.cli import HubCommand, WrongUse, command_actor
from connectors.management.commands.serve import check_port, port, serve, url_of
from connectors.models import ApiKey, Connection
from connectors.provider import Record
from connectors.providers import PROVIDERS
from connectors.sync.receive import receive
from connectors.sync.request import request
from customers.models import Organization

USER = "admin"
# The accounts that the documented examples name.
DEMO_ACCOUNTS = {"commenda": "corp_123", "cheqpay": "M-1001", "rootfi": "1089"}
PARTNER_ACCOUNTS = {"commenda": "corp_partner", "cheqpay": "M-2002", "rootfi": "2089"}
BASE_PATHS = {"links": "/api/v1", "commenda": "/api/v1", "cheqpay": "", "rootfi": "/v3"}
# What the hub's own endpoints do beyond the documents.
OPTIONS = {"commenda": {"upsert_by_external_id": True}, "rootfi": {"update_by_platform_id": True}}
READABLE = ("commenda", "rootfi")

KINDS = ("Bakery", "Bookshop", "Cafe", "Florist", "Garage")
CUSTOMERS = 25

CALLS = """\
# Links
curl -i -X POST {url}/api/v1/unified/customer \\
  -H 'Authorization: Bearer {key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"email": "customer@example.com", "name": "Acme Corp"}}'

# Commenda
curl -i -X POST {url}/api/v1/customers \\
  -H 'Authorization: Bearer {key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"corporation_id": "corp_123", "name": "Acme Corporation", "email": "contact@acme.com", "external_id": "ext_456",
       "shipping_address": {{"line1": "123 Main St", "line2": "Suite 100", "city": "San Francisco", "state": "CA",
                            "postal_code": "94105", "country": "US"}}}}'

# Cheqpay
curl -i -X POST {url}/customers/add-update \\
  -H 'x-api-key: {key}' \\
  -H 'x-merchant-id: M-1001' \\
  -H 'Content-Type: application/json' \\
  -d '{{"externalId": "CUST-123", "firstName": "John", "lastName": "Doe", "email": "john.doe@example.com",
       "phoneNumber": "+1234567890", "active": true,
       "notificationOptions": {{"notifyEmail": false, "notifyPhone": false}}}}'

# RootFi
curl -i -X POST {url}/v3/ecommerce/customers \\
  -H 'api_key: {key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"company_id": 1089, "data": [{{"name": "John Doe", "email": "", "phone": "1234567890",
       "currency_id": "1234567890", "status": "ACTIVE",
       "updated_at": "2024-01-22T05:07:31.465Z", "created_at": "2024-01-22T05:07:31.465Z",
       "address": {{"rootfi_id": 278264, "platform_id": "CONTACTS_1af68894-ea9f-ee11-be36-7c1e520f50bc_ADDRESS",
                   "street": "123 Main Street", "locality": "Main Street", "city": "New York", "state": "New York",
                   "pincode": "123456", "country": "USA"}}}}]}}'
"""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a person needs to look around. `password` is "" where it is no longer the one that was made."""

    password: str
    key: str
    fresh: bool


class Command(HubCommand):
    help = "Set up a hub with examples on this machine, say how to use it, and serve it."
    examples = """\
  manage.py quickstart
  manage.py quickstart --port 8080 --data ~/hub-demo"""
    epilog = """The first run makes the database, a log-in, and two organizations: what is edited in "demo" is sent to
"partner" in the formats of all four APIs, over real HTTP to this same hub. A second run keeps what is there.
The log-in and the key are kept in quickstart.json in the data folder, readable by its owner alone.

exit codes: 0 stopped by the user    1 the server ended by itself    2 wrong use, such as a port that is taken"""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (default %(default)s).")
        parser.add_argument("--port", type=port, default=8000, help="Port to listen on (default %(default)s).")
        parser.add_argument("--data", type=Path, metavar="DIR", help=f"Where to keep it (default {settings.DATA_DIR}).")
        parser.add_argument(
            "--no-serve", action="store_false", dest="serve", help="Set up and print, but do not serve."
        )
        parser.add_argument("--open", action="store_true", dest="open", help="Open the admin in a browser.")
        parser.add_argument("--no-browser", action="store_false", dest="open", help="Open no browser: the default.")

    def handle(self, *args: Any, **options: Any) -> None:
        if settings.PRODUCTION:
            raise WrongUse("The quickstart is for looking around. With PRODUCTION=true use manage.py serve.")
        data = options["data"]
        if data is not None and data.expanduser().resolve() != settings.DATA_DIR:
            # The settings are read by now: only a new process sees another data folder.
            os.execve(
                sys.executable,
                [sys.executable, *sys.argv],
                {**os.environ, "HUB_DATA": str(data.expanduser().resolve())},
            )
        if options["serve"]:
            check_port(options["host"], options["port"])
        url = url_of(options["host"], options["port"])
        call_command("migrate", interactive=False, verbosity=0)
        # For commands in another terminal, which push to this hub's own address, too.
        kept = settings.DATA_DIR / "hub.env"
        if not kept.exists():
            kept.write_text("".join(f"{name}={value}\n" for name, value in reachable(url).items()))
        demo = set_up(url, settings.DATA_DIR / "quickstart.json")

        def tell() -> None:
            self.stdout.write(shown(demo, url, serving=options["serve"]))
            self.stdout.flush()
            if options["open"]:
                webbrowser.open(f"{url}/admin/")

        if not options["serve"]:
            tell()
            return
        self.end(serve(self, host=options["host"], port=options["port"], environment=reachable(url), ready=tell))


def reachable(url: str) -> dict[str, str]:
    """What lets the children, and nobody else, send to this hub's own address."""
    host = urlsplit(url).hostname or ""
    loopback = {"127.0.0.1": "127.0.0.0/8"}.get(host, host)
    return {"ALLOWED_PRIVATE_NETWORKS": ",".join([*settings.ALLOWED_PRIVATE_NETWORKS, loopback])}


@transaction.atomic
def set_up(url: str, notes: Path) -> Demo:
    """Make what is missing, and lead the demo's connections to `url`. Raises WrongUse at a hub that is in real use."""
    kept: dict[str, str] = orjson.loads(notes.read_bytes()) if notes.exists() else {}
    if not kept and Organization.objects.exists():
        raise WrongUse(
            "This database holds organizations that the quickstart did not make, and it leaves them alone."
            " Give it a folder of its own with --data DIR (and unset DATABASE_URL), or start the hub with serve."
        )
    password = _user(kept.get("password", ""))
    demo, fresh = Organization.objects.get_or_create(slug="demo", defaults={"name": "Demo", "country": "US"})
    partner, _ = Organization.objects.get_or_create(slug="partner", defaults={"name": "Partner", "country": "US"})
    key = _key(demo, kept.get("demo_key", ""))
    partner_key = _key(partner, kept.get("partner_key", ""))
    if fresh:
        receive(
            organization=demo,
            connection=None,
            records=[Record(values=example(number)) for number in range(1, CUSTOMERS + 1)],
            actor=command_actor("quickstart"),
        )
    for organization, accounts in ((demo, DEMO_ACCOUNTS), (partner, PARTNER_ACCOUNTS)):
        for provider, account in accounts.items():
            Connection.objects.get_or_create(
                organization=organization,
                provider=provider,
                account=account,
                defaults={"name": f"{provider}-inbound", "direction": Connection.Direction.CALLS_US},
            )
    for provider in PROVIDERS.keys() & BASE_PATHS.keys():
        connection = _lead(demo, provider, url, partner_key)
        if fresh:
            request(connection=connection, actor=command_actor("quickstart"))
    _keep(notes, {"password": password or kept.get("password", ""), "demo_key": key, "partner_key": partner_key})
    return Demo(password=password, key=key, fresh=fresh)


def example(number: int) -> dict[str, Any]:
    """An obviously invented customer. The last has no e-mail address, which Links refuses: something to mend."""
    kind = KINDS[number % len(KINDS)]
    address = {
        "line1": f"{number} Example Street",
        "city": "San Francisco",
        "state": "CA",
        "postal_code": "94105",
        "country": "US",
    }
    return {
        "name": f"Example {kind} {number:02}",
        "email": f"{kind.lower()}{number:02}@example.com" if number < CUSTOMERS else "",
        "phone": f"+1 202-555-{100 + number:04}",
        **{f"address_{part}": value for part, value in address.items()},
        **{f"shipping_address_{part}": value for part, value in address.items()},
        "currency": "USD",
        "notify_email": number % 2 == 0,
    }


def _user(password: str) -> str:
    """The administrator's password: a new one for a new user, the given one if it is still right, else ""."""
    model = get_user_model()
    user = model.objects.filter(username=USER).first()
    if user is not None:
        return password if password and user.check_password(password) else ""
    password = password or secrets.token_urlsafe(9)
    model.objects.create_superuser(USER, "admin@example.com", password)
    return password


def _key(organization: Organization, secret: str) -> str:
    """A usable key of the organization: the given one if it is, else a new one."""
    found = ApiKey.find(secret, now=timezone.now())
    if found is not None and found.organization_id == organization.pk:
        return secret
    return ApiKey.issue(organization=organization, name="quickstart")[1]


def _lead(demo: Organization, provider: str, url: str, key: str) -> Connection:
    """The demo's connection to the partner's account, at the address where the hub is now."""
    pulls = provider in READABLE
    connection, _ = Connection.objects.get_or_create(
        organization=demo,
        provider=provider,
        account=PARTNER_ACCOUNTS.get(provider, ""),
        defaults={
            "name": provider,
            "direction": Connection.Direction.PUSH_AND_PULL if pulls else Connection.Direction.PUSH,
            "create_policy": Connection.CreatePolicy.AUTOMATIC,
            "options": OPTIONS.get(provider, {}),
        },
    )
    connection.base_url = f"{url}{BASE_PATHS[provider]}"
    connection.seal_credentials(dict.fromkeys(PROVIDERS[provider].credentials, key))
    if connection.state == Connection.State.NEEDS_REAUTH:
        # As it does when the hub was started without leave to send to itself.
        connection.state, connection.state_reason = Connection.State.ACTIVE, ""
    connection.save(update_fields=["base_url", "credentials", "state", "state_reason", "updated_at"])
    return connection


def _keep(notes: Path, values: Mapping[str, str]) -> None:
    fresh = notes.with_name(f".{notes.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(orjson.dumps(values))
    fresh.replace(notes)


def shown(demo: Demo, url: str, *, serving: bool) -> str:
    python = os.path.relpath(sys.executable)
    start = f"{python} manage.py quickstart starts it."
    return f"""\
The hub is {"running" if serving else "set up; it will run"} at {url}/

  admin     {url}/admin/
  log-in    {USER}
  password  {demo.password or "the one you chose; manage.py changepassword admin sets another"}
  API key   {demo.key}
  data      {settings.DATA_DIR}

One call in each format, as documented; paste them into another terminal:

{CALLS.format(url=url, key=demo.key)}
Where to look:
  In the admin, edit a customer of Demo and save. Within seconds it is the same in Partner, once for each of the
  four systems that Demo sends to. One customer waits for you: Links needs its e-mail address.
  On the command line, HUB_DATA leads to this hub:
  HUB_DATA={settings.DATA_DIR} {python} manage.py sync_customers commenda --organization demo

{"Ctrl-C stops the hub. The same command starts it again with everything in it." if serving else start}"""
