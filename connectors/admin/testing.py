"""Testing a connection, step by step: reads only, in ten seconds, and says of each step what it found."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from django.contrib import messages
from django.utils import timezone

from connectors import login
from connectors.exceptions import ConnectionUnusable, ConnectorError, Gone, Rejected
from connectors.guard import check_url
from connectors.models import Connection
from connectors.outbound import Session
from connectors.provider import Provider
from connectors.providers import PROVIDERS
from connectors.sealing import UnsealError
from customers.ids import uuid7

TEST_SECONDS = 10.0
# A clock that is further off makes signatures and waiting times go wrong.
CLOCK_SECONDS = 60.0
LIMIT_HEADERS = ("ratelimit", "x-ratelimit", "x-rate-limit", "retry-after")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was tried. `good` is None where it could not be told."""

    name: str
    good: bool | None
    told: str
    advice: str = ""

    @property
    def icon(self) -> str:
        return {True: "✓", False: "✕", None: "–"}[self.good]

    @property
    def word(self) -> str:
        return {True: "Good", False: "Failed", None: "Not known"}[self.good]

    @property
    def tone(self) -> str:
        return {True: "success", False: "danger", None: "base"}[self.good]


@dataclass(kw_only=True)
class Tested:
    """What came of a test: the steps, and all of it in one sentence."""

    steps: list[Step] = field(default_factory=list)
    good: bool = False
    level: int = messages.ERROR
    text: str = ""
    account: str = ""

    def add(self, name: str, good: bool | None, told: str, advice: str = "") -> None:
        self.steps.append(Step(name=name, good=good, told=told, advice=advice))


class _TimedOut(Exception):
    """The ten seconds are over."""


def test(connection: Connection) -> Tested:
    """Log in, ask whose account it is, read once. A connection that waits for a login is used again if all is well."""
    found = Tested()
    if connection.calls_us:
        found.level = messages.INFO
        found.text = f"{connection} calls the hub: there is nothing to test until its calls arrive."
        return found
    provider = PROVIDERS[connection.provider]
    ends = time.monotonic() + TEST_SECONDS
    try:
        check_url(connection.base_url)
    except ConnectionUnusable as error:
        found.add("Address", False, error.message, "Correct the address under Address and login.")
        found.text = f"{connection} cannot be used now: {error.message}"
        return found
    found.add("Address", True, f"{connection.base_url} may be called.")
    try:
        session = provider.session(connection)
    except UnsealError as error:
        found.add("Login", False, f"The credentials cannot be read. {error}", "Enter the credentials again.")
        found.text = f"The credentials cannot be read. {error}"
        return found
    except ConnectorError as error:
        found.add("Login", False, error.message, "Enter new credentials, or try again in a minute.")
        found.text = f"{connection} cannot be used now: {error.message}"
        return found
    _calls(found, connection, provider, session, ends)
    _headers(found, session)
    return found


def _calls(found: Tested, connection: Connection, provider: Provider, session: Session, ends: float) -> None:
    names_account = type(provider).account_id is not Provider.account_id
    offers = provider.capabilities(connection)
    began = time.monotonic()
    try:
        if names_account:
            _hurry(session, ends)
            found.account = provider.account_id(session, connection)
        told = _read(provider, session, connection, ends)
        if connection.state == Connection.State.NEEDS_REAUTH:
            if not names_account:
                _hurry(session, ends)
                found.account = provider.account_id(session, connection)
            login.reconnect(connection, session=session, account_id=found.account, clock=timezone.now)
            told = f"{told} It is used again, with a few customers first."
    except Rejected as error:
        found.add("Login", True, "It accepts the login.")
        found.add("Read", False, error.message, "Check the account and what the login may see.")
        found.level, found.text = messages.WARNING, f"{connection} answers, with: {error.message}"
        return
    except _TimedOut:
        found.add("Answer", False, "It took longer than ten seconds.", "Try again; if it stays slow, ask the provider.")
        found.text = f"{connection} answers too slowly: it took longer than ten seconds."
        return
    except ConnectorError as error:
        found.text = f"{connection} cannot be used now: {error.message}"
        if error.status in (401, 403):
            found.add("Login", False, error.message, "Enter new credentials under Address and login.")
        elif error.code == "wrong_account":
            found.add("Login", True, "It accepts the login.")
            found.add("Account", False, error.message, "Log in to the account that the customers are linked to.")
        else:
            found.add("Answer", False, error.message, "Check the address; if it is right, try again later.")
        return
    took = f"{(time.monotonic() - began) * 1000:.0f} ms"
    found.good, found.level, found.text = True, messages.SUCCESS, told
    if not offers.lists and not offers.fetches and not names_account:
        found.add("Login", None, "Credentials are there. Whether they work shows with the first customer.")
        found.add("Read", None, told)
    else:
        found.add("Login", True, f"It accepts the login ({took}).")
        _account(found, connection, provider)
        if offers.lists or offers.fetches:
            found.add("Read", True, told)
    found.add(
        "Rights", None, "The login may read." if offers.lists or offers.fetches else "Nothing was read.",
        "Whether it may write shows with the first customers: nothing is written for a test.",
    )  # fmt: skip


def _account(found: Tested, connection: Connection, provider: Provider) -> None:
    if found.account:
        known = connection.remote_account_id
        if known and known != found.account:
            told = f"The login reaches {found.account}, but the customers are linked to {known}."
            found.add("Account", False, told, "Log in to that account, or make a new connection.")
            found.good, found.level, found.text = False, messages.ERROR, told
        else:
            found.add("Account", True, f"It is account {found.account}.", "Make sure that this is the one you mean.")
    else:
        found.add("Account", None, f"{provider.label} does not name the account that a login reaches.")


def _read(provider: Provider, session: Session, connection: Connection, ends: float) -> str:
    offers = provider.capabilities(connection)
    if not offers.lists and not offers.fetches:
        return f"{provider.label} documents nothing to read: push one customer to see."
    _hurry(session, ends)
    if offers.lists:
        page = provider.page(session, connection, cursor=None, since=None, limit=1)
        first = "It has customers." if page.records else "It has no customers yet."
        return f"{connection} answers and accepts the login. {first}"
    with suppress(Gone):
        provider.fetch(session, connection, str(uuid7()))
    return f"{connection} answers and accepts the login."


def _hurry(session: Session, ends: float) -> None:
    left = ends - time.monotonic()
    if left <= 0:
        raise _TimedOut
    session.deadline = min(session.deadline, left)


def _headers(found: Tested, session: Session) -> None:
    if not session.heard:
        return
    try:
        theirs: datetime | None = parsedate_to_datetime(session.heard.get("date", ""))
    except ValueError:
        theirs = None
    if theirs is None:
        found.add("Clock", None, "It does not tell its time.")
    else:
        theirs = theirs if theirs.tzinfo else theirs.replace(tzinfo=UTC)
        off = (timezone.now() - theirs).total_seconds()
        good = abs(off) < CLOCK_SECONDS
        side = "ahead" if off > 0 else "behind"
        told = "Its clock and the hub's agree." if abs(off) < 2 else f"The hub's clock is {abs(off):.0f} s {side}."
        found.add("Clock", good, told, "" if good else "Set the clock of the machine that is wrong.")
    limits = {name: value for name, value in session.heard.items() if name.startswith(LIMIT_HEADERS)}
    if limits:
        found.add("Limits", True, ", ".join(f"{name}: {value[:60]}" for name, value in sorted(limits.items())))
    else:
        advice = "If its documentation names a limit, set calls per second."
        found.add("Limits", None, "Its answers name no limit.", advice)
