"""The hub's connector to the fake provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

from connectors.exceptions import (
    AlreadyExists,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
    StaleRevision,
)
from connectors.models import Connection
from connectors.outbound import Answer, Session, raise_for_answer
from connectors.provider import Capabilities, Outgoing, Page, Provider, Record
from connectors.sealing import Secret
from customers.models import Customer
from tests.fake.system import NORMALISERS

TEXTS = ("name", "email", "phone", "address_line1", "address_city", "address_postal_code")
FLAGS = ("notify_email",)


class Fake(Provider):
    """Speaks the fake provider's dialect with the capabilities that the connection's options declare.

    `normaliser` is how this connector says that values are stored. `Provider.normalise` is not told of which connection
    it is asked, so a connection to an account that reformats takes the connector with that normaliser (`fake_upper`).
    """

    slug = "fake"
    label = "Fake"
    fields = frozenset({*TEXTS, *FLAGS})
    credentials = ("access_token", "token_url", "refresh_token")
    options: ClassVar = {
        "capabilities": "What the account offers, as connectors.provider.Capabilities.",
        "normaliser": "How it stores texts: same, upper, lower, trim.",
    }
    base_url = "https://fake.example.com/a/main"
    urls: ClassVar = ()

    def __init__(self, normaliser: str = "same") -> None:
        self.normaliser = normaliser
        if normaliser != "same":
            self.slug = f"fake_{normaliser}"

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        token = credentials.get("access_token")
        return {"Authorization": Secret(f"Bearer {token}")} if token else {}

    def capabilities(self, connection: Connection) -> Capabilities:
        return Capabilities(**connection.options.get("capabilities", {}))

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        sent: dict[str, Any] = {"marker": str(uid)}
        for name in (*TEXTS, *FLAGS):
            value = getattr(customer, name)
            if name in fields if fields is not None else value not in ("", None):
                sent[name] = value
        return sent

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        offers = self.capabilities(connection)
        if offers.upsert_external_id:
            answer = session.send("PUT", f"/customers/by-external/{outgoing.uid}", json=outgoing.document)
        else:
            key = {"Idempotency-Key": str(outgoing.key)} if offers.create_key else {}
            answer = session.send("POST", "/customers", json=outgoing.document, headers=key)
        return self._written(answer)

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        match: dict[str, str | Secret] = {}
        if self.capabilities(connection).conditional and outgoing.revision:
            match["If-Match"] = outgoing.revision
        path = f"/customers/{quote(outgoing.remote_id or '', safe='')}"
        return self._written(
            session.send("PATCH", path, json=outgoing.document, headers=match), remote_id=outgoing.remote_id
        )

    def create_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        offers = self.capabilities(connection)
        if offers.batch == 1:
            return super().create_many(session, connection, batch)
        rows = [
            {**one.document, "marker": str(one.uid), **({"key": str(one.key)} if offers.create_key else {})}
            for one in batch
        ]
        body = {"rows": rows, "upsert": True} if offers.upsert_external_id else {"rows": rows}
        return self._each(session, "/customers/batch", body, batch)

    def update_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        offers = self.capabilities(connection)
        if offers.update_batch == 1:
            return super().update_many(session, connection, batch)
        rows = [
            {
                **one.document,
                "marker": str(one.uid),
                "id": one.remote_id,
                **({"revision": one.revision} if offers.conditional and one.revision else {}),
            }
            for one in batch
        ]
        return self._each(session, "/customers/update_batch", {"rows": rows}, batch)

    def delete(self, session: Session, connection: Connection, remote_id: str) -> None:
        session.request("DELETE", f"/customers/{quote(remote_id, safe='')}")

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        return record(session.request("GET", f"/customers/{quote(remote_id, safe='')}").body)

    def look_up(self, session: Session, connection: Connection, uid: UUID) -> list[Record]:
        body = session.request("GET", "/customers", params={"marker": str(uid)}).body
        return sorted(map(record, _data(body)), key=lambda one: (one.created_at, len(one.remote_id), one.remote_id))

    def marker(self, document: Mapping[str, Any]) -> UUID | None:
        try:
            return UUID(document.get("marker"))
        except (ValueError, TypeError, AttributeError):
            return None

    def normalise(self, name: str, value: Any) -> Any:
        return NORMALISERS[self.normaliser](value) if isinstance(value, str) else value

    def account_id(self, session: Session, connection: Connection) -> str:
        body = session.request("GET", "/account").body
        if not isinstance(body, dict) or not isinstance(body.get("id"), str):
            raise RetryLater("The provider did not say which account this is.")
        return body["id"]

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        query: dict[str, Any] = {"limit": limit}
        if cursor is not None:
            query["cursor"] = cursor
        if since is not None:
            query["since"] = since.isoformat()
        body = session.request("GET", "/customers", params=query).body
        records: list[Record | Rejected] = []
        for document in _data(body):
            try:
                records.append(record(document))
            except OutcomeUnknown as error:
                records.append(Rejected(error.message, code="unreadable"))
        following = body.get("next")
        return Page(records=records, next=following if isinstance(following, str) else None)

    def _written(self, answer: Answer, *, remote_id: str | None = None) -> Record:
        replayed = answer.headers.get("idempotent-replayed") == "true"
        if not 200 <= answer.status < 300:
            _raise(answer.status, answer.body, replayed=replayed)
            raise_for_answer(answer)
        if answer.status == 204:
            return Record(values={}, remote_id=remote_id, revision=answer.headers.get("etag", ""))
        return record(answer.body)

    def _each(
        self, session: Session, path: str, body: Mapping[str, Any], batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        """Send a batch; each answer is found by its marker, wherever it stands."""
        answer = session.request("POST", path, json=body)
        rows = answer.body.get("rows") if isinstance(answer.body, dict) else None
        if not isinstance(rows, list):
            raise OutcomeUnknown("The provider answered a batch without rows.", status=answer.status)
        by_marker = {row.get("marker"): row for row in rows if isinstance(row, dict)}
        return [self._row(by_marker.get(str(one.uid)), one) for one in batch]

    def _row(self, row: Mapping[str, Any] | None, sent: Outgoing) -> Record | ConnectorError:
        if row is None:
            return OutcomeUnknown("The provider's answer does not name this record.")
        status = row.get("status")
        try:
            if not isinstance(status, int):
                raise OutcomeUnknown("The provider's answer says nothing of this record.")
            if 200 <= status < 300:
                made = record(row.get("record"))
                if sent.remote_id and made.remote_id != sent.remote_id:
                    raise OutcomeUnknown("The provider answered with another record.", status=status)
                return made
            _raise(status, row, replayed=row.get("replayed") is True)
            headers = {"retry-after": str(row["retry_after"])} if "retry_after" in row else {}
            raise_for_answer(
                Answer(method="POST", status=status, headers=headers, body=dict(row), text="", elapsed=0.0)
            )
        except ConnectorError as error:
            return error
        return OutcomeUnknown("The provider's answer says nothing of this record.", status=status)


def record(document: Any) -> Record:
    """A record as the provider shows it. A time that is none is a fault that this connector does not expect."""
    if not isinstance(document, dict) or not isinstance(document.get("id"), str) or not document["id"]:
        raise OutcomeUnknown("The provider answered without the record's id.")
    created = document.get("created_at")
    return Record(
        values={name: document[name] for name in (*TEXTS, *FLAGS) if name in document},
        document=document,
        remote_id=document["id"],
        created_at=datetime.fromisoformat(created) if created is not None else None,
        revision=document.get("revision") or "",
        deleted=document.get("deleted") is True,
    )


def _raise(status: int, body: Any, *, replayed: bool) -> None:
    """What only this dialect says; the rest is `raise_for_answer`'s."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    message, named = str(error.get("message") or "The provider refused the record."), str(error.get("field") or "")
    if status >= 500 and replayed:
        lost = OutcomeUnknown("The provider repeats an earlier failure.", status=status)
        lost.replayed = True
        raise lost
    if status == 409 and error.get("code") == "already_exists":
        raise AlreadyExists(message, remote_id=str(error.get("existing_id") or ""), field=named, status=status)
    if status == 412:
        raise StaleRevision(message, status=status)
    if status == 404 and error.get("merged_into"):
        raise Gone(f"The record was merged into {error['merged_into']}.", status=status, code="merged")
    if status in (400, 409, 422):
        raise Rejected(message, field=named, status=status, code=str(error.get("code") or ""))


def _data(body: Any) -> list[Any]:
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list):
        raise RetryLater("The provider answered a list without data.")
    return data


CONNECTORS = tuple(Fake(name) for name in NORMALISERS)
