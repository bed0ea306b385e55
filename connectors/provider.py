"""What a provider declares and must supply.

A provider must supply `slug`, `label`, `fields`, `urls`, `headers`, `document`, `create` and `update`. Everything else
has a working default: batches loop over single calls, and what a document does not offer says so in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from django.urls import URLPattern
from django.utils import timezone

from connectors import login
from connectors.exceptions import ConnectorError, Rejected
from connectors.models import Connection, SyncRun
from connectors.outbound import Session
from connectors.sealing import Secret
from customers.models import Customer

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Record:
    """One customer as a system describes it: what arrives by API call, pull or answer, read into the hub's fields.

    `values` holds only what the document names: an absent field is unknown, not empty. At most one of `customer_id`,
    `link_id` and `remote_id` says which record is meant; none of them means a new one. `seq` is the link's `sync_seq`
    when a record began to be read, where that is known.
    """

    values: Mapping[str, Any]
    document: Mapping[str, Any] = field(default_factory=dict)
    remote_id: str | None = None
    link_id: int | None = None
    customer_id: UUID | None = None
    created_at: datetime | None = None
    revision: str = ""
    deleted: bool = False
    seq: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """One customer on its way out. `document` is frozen: a repeat sends the same.

    `remote_id` is None for a create. `uid` is the link's: the marker that a create carries where the format has room
    for one. `key` is the idempotency key of this create or update. `remote_data` is the document last seen there.
    """

    uid: UUID
    remote_id: str | None
    key: UUID
    document: Mapping[str, Any]
    remote_data: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of a provider's list, `next` None on the last. A record that cannot be read is the error that says why."""

    records: Sequence[Record | Rejected]
    next: str | None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a provider's document offers. What is not declared counts as absent.

    How a create whose answer was lost can be settled, best first:
    upsert_external_id  a create carries our id, and repeating it changes nothing
    create_key          a create takes `Outgoing.key`; a repeat within `key_life` seconds has no second effect
    unique_keys         a second create is refused with AlreadyExists, which names the record
    look_up             a record can be found by our marker: "strong" at once, "lagging" after `look_up_lag` seconds

    conditional         an update carries `Outgoing.revision` and is refused with StaleRevision when it is not current
    echoes              an answer to a write shows the record as stored
    updates             a record can be changed
    lists, fetches      records can be read, all or one
    incremental         the list can be limited to what changed since a time
    deletes             there is a delete call
    shows_deleted       "flag" when lists mark deleted records, "scan" when a complete list leaves them out, else ""
    batch               how many records one create takes; 1 where there is no batch call
    update_batch        the same for updates
    max_request_life    seconds after which a timed-out request can no longer be applied
    """

    upsert_external_id: bool = False
    create_key: bool = False
    key_life: float = 24 * 3600.0
    unique_keys: bool = False
    look_up: str = ""
    look_up_lag: float = 90.0
    conditional: bool = False
    echoes: bool = True
    updates: bool = True
    lists: bool = False
    fetches: bool = False
    incremental: bool = False
    deletes: bool = False
    shows_deleted: str = ""
    batch: int = 1
    update_batch: int = 1
    max_request_life: float = 120.0

    @property
    def rows_independent(self) -> bool:
        """Whether a create of several records can be repeated without asking which of them arrived."""
        return self.upsert_external_id or self.create_key


# In `Provider.required`: demanded whatever else is filled.
ALWAYS: frozenset[str] = frozenset()


class Provider:
    """One API that many systems speak, in both directions.

    slug          the key in `Connection.provider` and in commands
    label         the name shown to staff
    documentation the address of the API's documentation
    fields        the customer fields that its format carries
    required      the customer fields that its document demands: always, or only when one of the named fields is filled
    account_label what `Connection.account` is called there; "" where the credentials alone tell the account
    credentials   the names of the credentials, in the order a form asks for them
    options       names of the switches it understands in `Connection.options`, each with its explanation
    base_url      an example of a base address, shown in forms
    urls          the endpoints of the hub that mirror this API
    """

    slug: ClassVar[str]
    label: ClassVar[str]
    documentation: ClassVar[str] = ""
    fields: ClassVar[frozenset[str]]
    required: ClassVar[Mapping[str, frozenset[str]]] = {"name": ALWAYS}
    account_label: ClassVar[str] = ""
    credentials: ClassVar[Sequence[str]] = ("api_key",)
    options: ClassVar[Mapping[str, str]] = {}
    base_url: ClassVar[str] = ""
    urls: ClassVar[Sequence[URLPattern]] = ()

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        """The authentication headers of a call."""
        raise NotImplementedError

    def capabilities(self, connection: Connection) -> Capabilities:
        """What this account offers; its options may widen what the document promises."""
        return Capabilities()

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        """The body that creates this customer there, or with `fields` the one that changes those.

        Raises Rejected with the field and the reason when the document demands what the customer does not have.
        """
        raise NotImplementedError

    def missing(self, customer: Customer) -> list[str]:
        """The demanded fields that are empty: without them `document` refuses the customer."""
        return [
            name
            for name, others in self.required.items()
            if not getattr(customer, name) and (not others or any(getattr(customer, other) for other in others))
        ]

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        """Create the record and return it as the provider stored it, with its `remote_id`. Raises ConnectorError."""
        raise NotImplementedError

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        """Change the record and return it as the provider stored it. Raises ConnectorError."""
        raise NotImplementedError

    def create_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        """One answer per record, in order; a provider with a batch call overrides this.

        Raises ConnectorError for the call as a whole: a refusal that names no record is Rejected, and the engine halves
        the batch. Which answer is whose is told by a correlation id, or by position where the document promises it.
        """
        return each(batch, lambda outgoing: self.create(session, connection, outgoing))

    def update_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        """As `create_many`."""
        return each(batch, lambda outgoing: self.update(session, connection, outgoing))

    def delete(self, session: Session, connection: Connection, remote_id: str) -> None:
        """Delete the record there. Raises Gone when it is not there."""
        raise Rejected(f"{self.label} documents no way to delete a customer.", code="unsupported")

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        """The record as it is there now. Raises Gone when it is not there."""
        raise Rejected(f"{self.label} documents no way to read one customer.", code="unsupported")

    def look_up(self, session: Session, connection: Connection, uid: UUID) -> list[Record]:
        """The records there that carry this link's marker, oldest first. Only with the capability `look_up`."""
        raise Rejected(f"{self.label} documents no way to find a customer by our id.", code="unsupported")

    def marker(self, document: Mapping[str, Any]) -> UUID | None:
        """The link's uid that a record there carries as its marker; None when it carries none of ours."""
        return None

    def normalise(self, name: str, value: Any) -> Any:
        """A field's value as the provider would store it: an upper-cased postal code, say."""
        return value

    def account_id(self, session: Session, connection: Connection) -> str:
        """Which account the credentials reach, as the provider names it; "" where it does not say.

        Makes a call that any working credential may make, so that it also tells a lost login from a missing record.
        """
        if self.capabilities(connection).lists:
            self.page(session, connection, cursor=None, since=None, limit=1)
        return ""

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        """One page of the account's customers; `cursor` is the `next` of the page before."""
        raise Rejected(f"{self.label} documents no way to list customers.", code="unsupported")

    def run_queued(self, run: SyncRun) -> None:
        """Carry out an API batch that was accepted to be worked on later. Only a provider that queues has any."""
        raise Rejected(f"{self.label} queues no batches.", code="unsupported")

    def session(
        self,
        connection: Connection,
        *,
        request_id: str = "",
        client: Any = None,
        clock: Callable[[], datetime] = timezone.now,
    ) -> Session:
        """An authenticated way to this account. Call it outside any transaction: it may have to log in anew.

        Raises sealing.UnsealError when its credentials cannot be read, login.LoginLost when only a person can log in
        again, RetryLater when the login server gives no token now.
        """

        def headers(credentials: Mapping[str, str]) -> dict[str, str | Secret]:
            return self.headers(account=connection.account, credentials=credentials)

        credentials = login.fresh(connection, clock=clock, client=client)
        session = Session(
            base_url=connection.base_url, headers=headers(credentials), client=client, request_id=request_id
        )
        if login.renewable(credentials):
            session.renew = login.Renewal(
                connection=connection,
                session=session,
                credentials=credentials,
                headers=headers,
                clock=clock,
                client=client,
            )
        return session


def each(batch: Sequence[Outgoing], send: Callable[[Outgoing], Record]) -> list[Record | ConnectorError]:
    """Send one by one; one record's error never stops the rest."""
    answers: list[Record | ConnectorError] = []
    for outgoing in batch:
        try:
            answers.append(send(outgoing))
        except ConnectorError as error:
            answers.append(error)
    return answers


def uuid_of(text: Any) -> UUID | None:
    """The UUID that a text is, in either spelling; None when it is none."""
    try:
        return UUID(text) if isinstance(text, str) else None
    except ValueError:
        return None
