"""The login of connections that use OAuth 2: renewed ahead of expiry and after a 401, once for all workers.

Credentials with `token_url` and `refresh_token` use the refresh token grant (RFC 6749 section 6), those with
`token_url`, `client_id` and `client_secret` alone the client credentials grant (section 4.4). Other credentials pass
through as they are. Who renews holds a lease on the connection row; the others wait and read again, so that no
transaction is open while the login server is asked. A rotated refresh token is committed before the new access token
is used. Nothing here touches links: their attempts are theirs.

No message quotes the login server's words: such answers like to repeat what was sent.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
from authlib.oauth2.auth import ClientAuth  # type: ignore[import-untyped] # authlib ships no types
from authlib.oauth2.rfc6749.parameters import prepare_token_request  # type: ignore[import-untyped] # the same
from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.views.decorators.debug import sensitive_variables

from connectors.exceptions import ConnectionUnusable, OutcomeUnknown, RetryLater
from connectors.models import Connection, Issue
from connectors.outbound import Answer, Session, raise_for_answer
from connectors.sealing import Secret, UnsealError

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
# What a person enters; `token_endpoint_auth_method` is named as in RFC 7591.
ENTERED = ("token_url", "client_id", "client_secret", "refresh_token", "scope", "token_endpoint_auth_method")
# What the login server gives. Times are seconds since 1970.
GIVEN = ("access_token", "expires_at", "refreshed_at")
LEASE = timedelta(seconds=60)
# A token request and its one repeat end before the lease does.
DEADLINE = 20.0
MAX_BYTES = 256 * 1024
POLL_SECONDS = 0.2
LEAD = 300.0
DISUSE = timedelta(days=1)
CANARY = 5

_ENDED = {
    "invalid_grant": "The login has ended: the login server no longer accepts the refresh token. Connect it again.",
    "invalid_client": "The login server refuses the client id or the client secret.",
    "unauthorized_client": "The login server does not allow this client to log in like this.",
    "unsupported_grant_type": "The login server does not offer this kind of login.",
    "invalid_scope": "The login server refuses the scope.",
}
_USELESS = "The system does not accept a login that was renewed just now."
_TRANSIENT = frozenset({"temporarily_unavailable", "server_error", "slow_down"})


class LoginLost(ConnectionUnusable):
    """Only a person can log in again. It is kept on the connection and as an issue."""


class WrongAccount(ConnectionUnusable):
    """The credentials reach another account than the one that the connection's links belong to."""


def renewable(credentials: Mapping[str, str]) -> bool:
    """Whether an access token can be had for these credentials."""
    if not credentials.get("token_url"):
        return False
    return bool(credentials.get("refresh_token") or (credentials.get("client_id") and credentials.get("client_secret")))


@sensitive_variables()
def merged(kept: Mapping[str, str], entered: Mapping[str, str]) -> dict[str, str]:
    """The credentials after a person entered some of them.

    An access token that was given for others is dropped, and with another host in `token_url` all that was meant for
    the login server: secrets go to the host that they were entered for.
    """
    dropped: set[str] = set()
    if any(entered[name] != kept.get(name) for name in ENTERED if name in entered):
        dropped.update(GIVEN)
    if "token_url" in entered and _origin(entered["token_url"]) != _origin(kept.get("token_url", "")):
        dropped.update(ENTERED)
    return {**{name: value for name, value in kept.items() if name not in dropped}, **entered}


@sensitive_variables()
def fresh(
    connection: Connection,
    *,
    clock: Clock,
    client: httpx2.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """The connection's credentials, with an access token that lasts. Call it outside any transaction.

    Raises UnsealError when they cannot be read, LoginLost when only a person can log in again, RetryLater when the
    login server gives no token now and the one at hand has expired.
    """
    credentials = connection.unseal_credentials()
    if not _due(credentials, clock()):
        return credentials
    try:
        return _renewed(
            connection,
            address=connection.base_url,
            repairing=connection.state == Connection.State.NEEDS_REAUTH,
            due=lambda values: _due(values, clock()),
            clock=clock,
            client=client,
            sleep=sleep,
        )[0]
    except RetryLater:
        if credentials.get("access_token") and _left(credentials, clock()) > 0:
            return credentials
        raise


class Renewal:
    """`Session.renew` of a connection with OAuth credentials: log in anew and give the session its new headers.

    Called after a 401, from any thread. However many call it for one dead token, one of them renews it, unless another
    worker has done so already. False when the login is lost, which is then kept on the connection. Also lost is a login
    whose renewed token is refused before it was ever accepted. Raises RetryLater when the login server gives no token
    now.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        session: Session,
        credentials: Mapping[str, str],
        headers: Callable[[Mapping[str, str]], Mapping[str, str | Secret]],
        clock: Clock,
        client: httpx2.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection = connection
        self._session = session
        self._token = Secret(credentials.get("access_token", ""))
        self._headers = headers
        self._clock = clock
        self._client = client
        self._sleep = sleep
        # As they were when the session was made: the object may be read again while work goes on.
        self._address = connection.base_url
        self._repairing = connection.state == Connection.State.NEEDS_REAUTH
        self._lock = threading.Lock()
        self._tries = 0
        self._renewed = False
        self._asked = False  # the token at hand was given to this renewal, not to another worker's
        self._lost = False
        self._failure: RetryLater | None = None

    @sensitive_variables()
    def __call__(self) -> bool:
        tries = self._tries
        with self._lock:
            if self._lost:
                return False
            if self._renewed and self._session.refused is not self._session.headers:
                return True  # what was refused has been replaced since
            if self._failure is not None and tries != self._tries:
                raise RetryLater(self._failure.message, retry_after=self._failure.retry_after)
            try:
                self._renew()
            except RetryLater as error:
                self._failure = error
                raise
            except (LoginLost, UnsealError) as error:
                self._lost = True
                if isinstance(error, UnsealError):
                    self._lose(str(error))
                return False
            finally:
                self._tries += 1
            self._failure, self._renewed = None, True
            return True

    @sensitive_variables()
    def _renew(self) -> None:
        accepted = self._session.accepted is self._session.headers
        # One that another worker was given may have been used up meanwhile: that is a reason to ask, not to give up.
        if self._asked and not accepted and self._is_mine(self._stored().unseal_credentials()):
            self._lose(_USELESS)
            raise LoginLost(_USELESS)
        credentials, self._asked = _renewed(
            self._connection,
            address=self._address,
            repairing=self._repairing,
            due=lambda values: self._is_mine(values) or _due(values, self._clock()),
            clock=self._clock,
            client=self._client,
            sleep=self._sleep,
        )
        self._token = Secret(credentials.get("access_token", ""))
        # A new mapping, never a changed one: the session tells by identity which headers were refused.
        self._session.headers = dict(self._headers(credentials))

    @sensitive_variables()
    def _is_mine(self, credentials: Mapping[str, str]) -> bool:
        return Secret(credentials.get("access_token", "")) == self._token

    def _stored(self) -> Connection:
        return Connection.objects.get(pk=self._connection.pk)

    def _lose(self, reason: str) -> None:
        row = self._stored()
        _lose(Connection.objects.filter(pk=row.pk, credentials=row.credentials), reason=reason, now=self._clock())


def reconnect(connection: Connection, *, session: Session, account_id: str, clock: Clock) -> None:
    """Use the connection again: a test call with the credentials that it now has told `account_id`.

    `connection` is the object that `session` was made of. The first links after this go out as a small trial. A
    connection that a person paused stays paused. Raises WrongAccount when the links belong to another account: an issue
    says so, the session can no longer call, and the connection waits. Raises RetryLater when the credentials were
    changed since the test.
    """
    wrong = ""
    with transaction.atomic():
        row = Connection.objects.select_for_update().get(pk=connection.pk)
        if row.credentials != connection.credentials:
            raise RetryLater("The credentials were changed while they were tested. Test the connection again.")
        if row.remote_account_id and row.remote_account_id != account_id:
            found = f"account {account_id}" if account_id else "an account that it does not name"
            wrong = (
                f"The login reaches {found}, but the customers of this connection are linked to account "
                f"{row.remote_account_id}. Nothing was changed. Log in to that account, or make a new connection."
            )[:500]
            if row.state == Connection.State.ACTIVE:
                row.state, row.state_reason = Connection.State.NEEDS_REAUTH, wrong
            details = {"expected": row.remote_account_id, "found": account_id}
            _open_issue(row, kind=Issue.Kind.WRONG_ACCOUNT, message=wrong, details=details, now=clock())
        else:
            if row.state != Connection.State.PAUSED:
                row.state, row.state_reason = Connection.State.ACTIVE, ""
            row.remote_account_id, row.ramp = account_id, CANARY
            # What the breaker knew was about the time before.
            row.breaker_calls, row.breaker_until, row.breaker_trips = "", None, 0
            settled = (Issue.Kind.LOGIN, Issue.Kind.WRONG_ACCOUNT)
            Issue.objects.filter(connection=row, kind__in=settled, resolved_at=None).update(resolved_at=clock())
        changed = (
            *("state", "state_reason", "remote_account_id"),
            *("ramp", "breaker_calls", "breaker_until", "breaker_trips"),
        )
        row.save(update_fields=[*changed, "updated_at"])
    for name in changed:
        setattr(connection, name, getattr(row, name))
    if wrong:
        session.base_url, session.headers, session.renew = "", {}, None
        raise WrongAccount(wrong, code="wrong_account")


@sensitive_variables()
def idle(now: datetime) -> list[Connection]:
    """The connections whose refresh token was not used for a day. Ask every hour or so: it unseals all of them."""
    rows = Connection.objects.exclude(credentials="").exclude(direction=Connection.Direction.CALLS_US)
    return [
        connection
        for connection in rows.exclude(state=Connection.State.NEEDS_REAUTH)
        .select_related("organization")
        .order_by("pk")
        if _disused(connection, now)
    ]


@sensitive_variables()
def keep_alive(connection: Connection, clock: Clock, *, client: httpx2.Client | None = None) -> None:
    """Use the refresh token of an idle connection, so that it does not die of disuse.

    Raises LoginLost when only a person can log in again, RetryLater when the login server gives no token now.
    """
    _renewed(
        connection,
        address=connection.base_url,
        repairing=False,
        due=lambda values: _unused(values, clock()),
        clock=clock,
        client=client,
        sleep=time.sleep,
    )


@sensitive_variables()
def _disused(connection: Connection, now: datetime) -> bool:
    try:
        return _unused(connection.unseal_credentials(), now)
    except UnsealError:
        return False  # whoever uses the connection says so


def _unused(credentials: Mapping[str, str], now: datetime) -> bool:
    if not renewable(credentials) or not credentials.get("refresh_token"):
        return False
    used = _seconds(credentials.get("refreshed_at"))
    return used is None or now.timestamp() - used > DISUSE.total_seconds()


def _due(credentials: Mapping[str, str], now: datetime) -> bool:
    """Whether the access token is missing or about to expire. One without a known end is used until it is refused."""
    if not renewable(credentials):
        return False
    if not credentials.get("access_token"):
        return True
    ends, begun = _seconds(credentials.get("expires_at")), _seconds(credentials.get("refreshed_at"))
    if ends is None:
        return False
    lead = LEAD
    if begun is not None and ends > begun:
        # A token that lives for minutes is used for half of that; by the five minutes alone it would never be.
        lead = min(max(LEAD, (ends - begun) / 10), (ends - begun) / 2)
    return ends - now.timestamp() < lead


def _left(credentials: Mapping[str, str], now: datetime) -> float:
    ends = _seconds(credentials.get("expires_at"))
    return math.inf if ends is None else ends - now.timestamp()


def _seconds(value: Any) -> float | None:
    """A number of seconds, from text or a number; None for everything else, NaN and infinity included."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _origin(address: str) -> tuple[str, str]:
    try:
        parts = urlsplit(address)
    except ValueError:
        return "", ""
    return parts.scheme.lower(), parts.netloc.lower()


# One of many


@sensitive_variables()
def _renewed(
    connection: Connection,
    *,
    address: str,
    repairing: bool,
    due: Callable[[Mapping[str, str]], bool],
    clock: Clock,
    client: httpx2.Client | None,
    sleep: Callable[[float], None],
) -> tuple[dict[str, str], bool]:
    """The stored credentials once `due` no longer holds of them, and whether they were renewed here, not by another.

    Only while the connection has its `address`: what it holds now is for that host alone. Unless `repairing`, a login
    that another worker found lost is not tried again.
    """
    token = secrets.token_hex(16)
    for _ in range(math.ceil(LEASE.total_seconds() / POLL_SECONDS) + 1):
        row = Connection.objects.get(pk=connection.pk)
        if row.base_url != address or row.account != connection.account:
            raise RetryLater("The connection was changed meanwhile.")
        if row.state == Connection.State.NEEDS_REAUTH and not repairing:
            raise LoginLost(row.state_reason or "The connection waits for somebody to log in.")
        credentials = row.unseal_credentials()
        if not due(credentials):
            connection.credentials = row.credentials
            return credentials, False
        if not renewable(credentials):
            raise LoginLost("The credentials no longer hold what a login needs.")
        now = clock()
        free = Q(login_until=None) | Q(login_until__lte=now)
        # Taken only for the credentials that were read: nobody has renewed or replaced them in between.
        unchanged = Connection.objects.filter(pk=row.pk, credentials=row.credentials)
        if not unchanged.filter(free, state=row.state).update(login_token=token, login_until=now + LEASE):
            sleep(POLL_SECONDS)
            continue
        try:
            renewed = _ask(credentials, now=now, client=client)
            row.seal_credentials(renewed)
            # By what was read rather than by the lease: an answer that comes late is still the newest refresh token,
            # and what a person has entered meanwhile stays.
            if unchanged.update(credentials=row.credentials):
                connection.credentials = row.credentials
                return renewed, True
        except ConnectionUnusable as error:
            if _lose(unchanged.filter(login_token=token), reason=error.message, now=clock()):
                raise LoginLost(error.message, status=error.status, code=error.code) from error
        finally:
            Connection.objects.filter(pk=row.pk, login_token=token).update(login_token="", login_until=None)
    raise RetryLater("Another worker has been renewing the login for too long.")


def _lose(rows: QuerySet[Connection], *, reason: str, now: datetime) -> bool:
    """Let the connection wait for a person, if `rows` still holds it. One that a person paused only gets the issue."""
    with transaction.atomic():
        row = rows.select_for_update().first()
        if row is None:
            return False
        if row.state != Connection.State.PAUSED:
            row.state, row.state_reason = Connection.State.NEEDS_REAUTH, reason[:500]
            row.save(update_fields=["state", "state_reason", "updated_at"])
        _open_issue(row, kind=Issue.Kind.LOGIN, message=reason, details={}, now=now)
    logger.warning("the login of connection %s is lost: %s", row.pk, reason)
    return True


def _open_issue(row: Connection, *, kind: Issue.Kind, message: str, details: dict[str, str], now: datetime) -> None:
    issue, made = Issue.objects.get_or_create(
        connection=row,
        kind=kind,
        fingerprint="",
        resolved_at=None,
        defaults={
            "organization_id": row.organization_id,
            "message": message[:500],
            "details": details,
            "first_at": now,
            "last_at": now,
        },
    )
    if not made:
        Issue.objects.filter(pk=issue.pk).update(
            message=message[:500], details=details, count=F("count") + 1, last_at=now
        )


# The login server


@sensitive_variables()
def _ask(credentials: Mapping[str, str], *, now: datetime, client: httpx2.Client | None) -> dict[str, str]:
    """The credentials with a new access token. A request whose answer was lost is repeated once, with the same refresh
    token: many login servers allow that, and the others say that the login has ended.
    """
    try:
        return _read(_post(credentials, client), credentials, now)
    except OutcomeUnknown:
        pass
    try:
        return _read(_post(credentials, client), credentials, now)
    except OutcomeUnknown as error:
        raise RetryLater("No usable answer came from the login server.", status=error.status) from error


@sensitive_variables()
def _post(credentials: Mapping[str, str], client: httpx2.Client | None) -> Answer:
    if refresh_token := credentials.get("refresh_token"):
        body = prepare_token_request("refresh_token", refresh_token=refresh_token, scope=credentials.get("scope", ""))
    else:
        body = prepare_token_request("client_credentials", scope=credentials.get("scope", ""))
    secret = credentials.get("client_secret", "")
    method = credentials.get("token_endpoint_auth_method") or ("client_secret_basic" if secret else "none")
    if method not in ClientAuth.DEFAULT_AUTH_METHODS:
        raise ConnectionUnusable("token_endpoint_auth_method must be client_secret_basic, client_secret_post or none.")
    address, _, query = credentials["token_url"].partition("?")
    headers: dict[str, str] = {}
    if credentials.get("client_id"):
        auth = ClientAuth(credentials["client_id"], secret, method)
        try:
            _, headers, body = auth.prepare("POST", address, {}, body)
        except UnicodeEncodeError:
            # `from None`: the error holds what it could not encode.
            raise ConnectionUnusable("The client id or secret has characters that cannot be sent.") from None
    session = Session(
        base_url=address,
        headers={name: Secret(value) for name, value in headers.items()},
        client=client,
        deadline=DEADLINE,
        max_bytes=MAX_BYTES,
    )
    return session.send("POST", "", form=body, params=dict(parse_qsl(query, keep_blank_values=True)))


@sensitive_variables()
def _read(answer: Answer, credentials: Mapping[str, str], now: datetime) -> dict[str, str]:
    body: dict[str, Any] = answer.body if isinstance(answer.body, dict) else {}
    status, code = answer.status, str(body.get("error") or "")
    if code in _TRANSIENT:
        raise RetryLater("The login server asks to try again later.", status=status)
    if status in (408, 425, 429, 503):
        raise_for_answer(answer)
    if status >= 500:
        raise OutcomeUnknown("The login server failed while answering.", status=status)
    if code or not 200 <= status < 300:
        reason = _ENDED.get(code, f"The login server refuses to renew the login, with status {status}.")
        raise ConnectionUnusable(reason, status=status, code=code if code in _ENDED else "")
    access_token = body.get("access_token")
    if not isinstance(access_token, str) or not access_token:
        raise OutcomeUnknown("The login server answered without an access token.", status=status)
    renewed = {name: value for name, value in credentials.items() if name not in GIVEN}
    renewed |= {"access_token": access_token, "refreshed_at": str(int(now.timestamp()))}
    life = _seconds(body.get("expires_in"))
    if life is not None and life > 0:
        renewed["expires_at"] = str(int(now.timestamp() + life))
    rotated = body.get("refresh_token")
    # The client credentials grant needs none: with one, the next renewal would become another kind of login.
    if credentials.get("refresh_token") and isinstance(rotated, str) and rotated:
        renewed["refresh_token"] = rotated
    return renewed
