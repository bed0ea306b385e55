"""RootFi, called by the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from django.urls import re_path
from rest_framework import serializers

from connectors.exceptions import (
    ConnectionUnusable,
    ConnectorError,
    Gone,
    OutcomeUnknown,
    Rejected,
    RetryLater,
)
from connectors.models import Connection, SyncRun
from connectors.outbound import Session
from connectors.provider import Capabilities, Outgoing, Page, Provider, Record, uuid_of
from connectors.providers.rootfi import api
from connectors.providers.rootfi.wire import FIELDS, PATHS, STATUSES, WIRE, timestamp, write
from connectors.sealing import Secret
from customers.models import Customer

BATCH = 100
UPDATES, SINGLY = "update_by_platform_id", "one_at_a_time"
HUB_NAMES = {".".join(path): name for name, path in PATHS.items()}
NAMED = re.compile(r"field: (?:data\[\d+\]\.)?([a-z_]+(?:\.[a-z_]+)?)")


class RootFi(Provider):
    slug = "rootfi"
    label = "RootFi"
    documentation = "https://docs.integrationlabs.co/api-reference/v3/ecommerce/customers/overview"
    base_url = "https://api.rootfi.dev/v3"
    account_label = "company_id"
    fields = FIELDS
    options: ClassVar = {
        UPDATES: "This account takes a customer whose platform_id it knows as a change of that customer. "
        "RootFi does not document any way to change one.",
        SINGLY: "This account takes one customer in a call, as RootFi's guide on writing says it may.",
    }
    urls: ClassVar = (
        re_path(r"^v3/ecommerce/customers/?$", api.Customers.as_view({"get": "list", "post": "create"})),
        re_path(r"^v3/core/syncs/?$", api.Syncs.as_view({"get": "list", "post": "create"})),
    )

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"api_key": Secret(credentials.get("api_key", ""))}

    def marker(self, document: Mapping[str, Any]) -> UUID | None:
        return uuid_of(str(document.get("platform_id") or "").removesuffix("_1"))

    def capabilities(self, connection: Connection) -> Capabilities:
        updates = _option(connection, UPDATES)
        size = 1 if _option(connection, SINGLY) else BATCH
        return Capabilities(
            upsert_external_id=updates,
            updates=updates,
            lists=True,
            fetches=True,
            incremental=True,
            shows_deleted="flag",
            batch=size,
            update_batch=size,
        )

    def run_queued(self, run: SyncRun) -> None:
        api.run_queued(run)

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        item = write(customer, fields=fields)
        if fields is None and _option(connection, UPDATES):
            item["platform_id"] = _platform_id(uid)
        return item

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        return _only(self.create_many(session, connection, [outgoing]))

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        return _only(self.update_many(session, connection, [outgoing]))

    def create_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        return self.send(session, connection, [dict(outgoing.document) for outgoing in batch])

    def update_many(
        self, session: Session, connection: Connection, batch: Sequence[Outgoing]
    ) -> list[Record | ConnectorError]:
        if not _option(connection, UPDATES):
            message = (
                "RootFi documents no way to change a customer. If this account changes one whose platform_id "
                f"it knows, set the connection's option {UPDATES}."
            )
            return [Rejected(message, code="unsupported") for _ in batch]
        items = [
            {**one.document, "platform_id": one.remote_data.get("platform_id") or _platform_id(one.uid)}
            for one in batch
        ]
        answers = self.send(session, connection, items)
        for position, (outgoing, answer) in enumerate(zip(batch, answers, strict=True)):
            if isinstance(answer, Record) and answer.remote_id != outgoing.remote_id:
                answers[position] = Rejected(
                    f"RootFi made a new record {answer.remote_id} and did not change {outgoing.remote_id}. "
                    f"Turn the connection's option {UPDATES} off and delete that record there.",
                    code="unsupported",
                )
        return answers

    def send(
        self, session: Session, connection: Connection, items: Sequence[Mapping[str, Any]]
    ) -> list[Record | ConnectorError]:
        """One call, one answer per item. RootFi answers in the order of the items, so position tells which is whose."""
        try:
            body = self.call(
                session, "POST", json={"company_id": _company(connection), "data": [dict(item) for item in items]}
            )
        except Rejected as error:
            if len(items) == 1:
                error.field = HUB_NAMES.get(_named(error.message), error.field)
            raise
        shown = body.get("data") if isinstance(body, dict) else None
        if not isinstance(shown, list) or len(shown) != len(items):
            raise OutcomeUnknown(f"RootFi did not answer with the {len(items)} records that were sent.")
        answers: list[Record | ConnectorError] = []
        for document in shown:
            try:
                answers.append(self.record(document))
            except Rejected:
                # It is stored there, in words that the hub cannot read: only its id is known.
                answers.append(Record(values={}, document=document, remote_id=str(document["rootfi_id"])))
            except OutcomeUnknown as error:
                answers.append(error)
        return answers

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        query = {"rootfi_company_id[eq]": _company(connection), "rootfi_id[eq]": remote_id, "limit": 1}
        shown = _data(self.call(session, "GET", params=query))
        if not shown:
            raise Gone("RootFi does not have this record.")
        record = self.record(shown[0])
        if record.remote_id != remote_id:
            raise RetryLater("RootFi answered with another record than the one asked for.")
        if record.deleted:
            raise Gone("RootFi shows this record as deleted.")
        return record

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        query: dict[str, Any] = {
            "rootfi_company_id[eq]": _company(connection),
            "include_deleted_records": "true",
            "limit": limit,
        }
        if since is not None:
            query["rootfi_updated_at[gte]"] = timestamp(since)
        if cursor is not None:
            query["next"] = cursor
        body = self.call(session, "GET", params=query)
        records: list[Record | Rejected] = []
        for document in _data(body):
            try:
                records.append(self.record(document))
            except (Rejected, OutcomeUnknown) as error:
                records.append(Rejected(error.message, code="unreadable"))
        following = body.get("next") or None
        if following is not None and (following == cursor or not isinstance(following, str)):
            raise RetryLater("RootFi answered with a next page that leads nowhere.")
        return Page(records=records, next=following)

    def call(self, session: Session, method: str, **request: Any) -> Any:
        """One call of the only address; the body of its answer. Raises ConnectorError."""
        try:
            body = session.request(method, "/ecommerce/customers", **request).body
        except Gone as error:
            # No record is named in the address: what is not there is the company or the address itself.
            raise ConnectionUnusable(
                "RootFi knows no such company_id, or the address of the connection is wrong.", status=error.status
            ) from error
        return body

    def record(self, document: Any) -> Record:
        """One record of an answer -> Record."""
        number = document.get("rootfi_id") if isinstance(document, dict) else None
        if type(number) is not int:
            raise OutcomeUnknown("RootFi answered without the customer's rootfi_id.")
        readable = document if document.get("status") in STATUSES else {**document, "status": None}
        try:
            record = WIRE.read(readable)
        except serializers.ValidationError as error:
            raise Rejected(
                f"RootFi's record {number} cannot be read: see {', '.join(map(str, error.detail))}.",
                code="unreadable",
            ) from None
        return replace(
            record,
            document=document,
            remote_id=str(number),
            deleted=document.get("rootfi_deleted_at") is not None,
        )


def _option(connection: Connection, name: str) -> bool:
    return connection.options.get(name) is True


def _platform_id(uid: UUID) -> str:
    return f"{uid.hex}_1"


def _company(connection: Connection) -> int:
    try:
        return int(connection.account)
    except ValueError:
        raise ConnectionUnusable("The connection's account must be RootFi's company_id, a whole number.") from None


def _data(body: Any) -> list[Any]:
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list):
        raise RetryLater("RootFi answered a list without data.")
    return data


def _named(message: str) -> str:
    found = NAMED.search(message)
    return found.group(1) if found else ""


def _only(answers: Sequence[Record | ConnectorError]) -> Record:
    [answer] = answers
    if isinstance(answer, ConnectorError):
        raise answer
    return answer
