"""Commenda, called by the hub."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

from django.urls import re_path
from rest_framework import serializers

from connectors.exceptions import ConnectionUnusable, Gone, OutcomeUnknown, Rejected, RetryLater
from connectors.models import Connection
from connectors.outbound import Session, raise_for_answer
from connectors.provider import ALWAYS, Capabilities, Outgoing, Page, Provider, Record, uuid_of
from connectors.providers.commenda.api import Customers
from connectors.providers.commenda.wire import ANSWERED, DOCUMENTATION, PARTS, SHIPPING, SPELLINGS, fields_of
from connectors.sealing import Secret
from customers.models import Customer
from customers.normalize import is_email

COLLECTION = "/customers"
FIELD_OF = {
    "/name": "name",
    "/email": "email",
    "/shipping_address": "shipping_address_line1",
    **{f"/shipping_address/{part}": f"shipping_address_{part}" for part in PARTS},
    **{f"/shipping_address/{key}": f"shipping_address_{part}" for key, part in SPELLINGS.items()},
}


class Commenda(Provider):
    slug = "commenda"
    label = "Commenda"
    documentation = DOCUMENTATION
    base_url = "https://transaction-tax.api.in.commenda.io/api/v1"
    account_label = "corporation_id"
    options: ClassVar = {
        "upsert_by_external_id": (
            "A create whose external_id is known there changes that customer instead of making a second one."
            " Commenda does not document this; the hub's own Commenda endpoints do it."
        )
    }
    fields = frozenset({"name", "email", *SHIPPING})
    required: ClassVar = {"name": ALWAYS, "shipping_address_country": SHIPPING - {"shipping_address_country"}}
    urls: ClassVar = (
        re_path(r"^(?:api/v1/)?customers/?$", Customers.as_view({"get": "list", "post": "create"})),
        re_path(
            r"^api/v1/customers/(?P<customer_id>[^/]+)/?$",
            Customers.as_view({"get": "retrieve", "post": "update", "delete": "destroy"}),
        ),
    )

    def headers(self, *, account: str, credentials: Mapping[str, str]) -> dict[str, str | Secret]:
        return {"Authorization": Secret(f"Bearer {credentials.get('api_key', '')}")}

    def marker(self, document: Mapping[str, Any]) -> UUID | None:
        return uuid_of(document.get("external_id"))

    def capabilities(self, connection: Connection) -> Capabilities:
        return Capabilities(
            upsert_external_id=connection.options.get("upsert_by_external_id") is True,
            lists=True,
            fetches=True,
            deletes=True,
        )

    def document(
        self, customer: Customer, *, connection: Connection, uid: UUID, fields: frozenset[str] | None
    ) -> dict[str, Any]:
        sent: dict[str, Any] = {}
        if fields is None:
            sent = {"corporation_id": connection.account, "external_id": str(uid)}
        if fields is None or "name" in fields:
            if len(customer.name) < 3:
                raise Rejected(
                    "Commenda needs a name of at least three characters. Enter a longer one.",
                    field="name",
                    code="min_length",
                )
            sent["name"] = customer.name
        if "email" in fields if fields is not None else customer.email:
            if customer.email and not is_email(customer.email):
                raise Rejected(
                    "Commenda takes only a well-formed e-mail address."
                    " Correct it, as in name@example.com, or remove it.",
                    field="email",
                    code="invalid",
                )
            sent["email"] = customer.email or None
        parts = {part: getattr(customer, f"shipping_address_{part}") for part in PARTS}
        filled = {part: text for part, text in parts.items() if text}
        if fields & SHIPPING if fields is not None else filled:
            sent["shipping_address"] = None
            if filled:
                code = customer.shipping_address_country_code
                if not code:
                    raise Rejected(
                        "Commenda needs the country of a shipping address. Enter its name or two-letter code,"
                        " such as US.",
                        field="shipping_address_country",
                        code="invalid" if parts["country"] else "required",
                    )
                # Named even if they are empty now, should Commenda keep what an address does not name.
                moved = {part: None for part in PARTS if f"shipping_address_{part}" in (fields or ())}
                sent["shipping_address"] = {**moved, **filled, "country": code}
        return sent

    def create(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        document = customer_in(send(session, "POST", COLLECTION, json=outgoing.document))
        if document is None:
            raise OutcomeUnknown("Commenda answered without the customer's id.")
        return self.stored(document)

    def update(self, session: Session, connection: Connection, outgoing: Outgoing) -> Record:
        remote_id = outgoing.remote_id or ""
        document = customer_in(send(session, "POST", item(remote_id), json=outgoing.document))
        # The prose shows a message alone.
        return self.fetch(session, connection, remote_id) if document is None else self.stored(document)

    def fetch(self, session: Session, connection: Connection, remote_id: str) -> Record:
        document = customer_in(send(session, "GET", item(remote_id)))
        if document is None:
            raise RetryLater("Commenda answered without the customer's id.")
        return self.record(document)

    def delete(self, session: Session, connection: Connection, remote_id: str) -> None:
        """Delete the record there. Raises Gone when it is not there, ConnectorError otherwise."""
        send(session, "DELETE", item(remote_id))

    def page(
        self,
        session: Session,
        connection: Connection,
        *,
        cursor: str | None,
        since: datetime | None,
        limit: int = 100,
    ) -> Page:
        params = {
            "corporation_id": connection.account,
            "limit": min(limit, 100),
            "extend": "shipping_address",
            **({"cursor": cursor} if cursor else {}),
        }
        body = send(session, "GET", COLLECTION, params=params)
        listed = body.get("data") if isinstance(body, dict) and isinstance(body.get("data"), dict) else body
        if not isinstance(listed, dict) or not isinstance(listed.get("customers"), list):
            raise RetryLater("Commenda answered a list without customers.")
        records: list[Record | Rejected] = []
        for entry in listed["customers"]:
            document = customer_in(entry)
            if document is None:
                records.append(Rejected("Commenda listed a customer without an id.", code="unreadable"))
                continue
            try:
                records.append(self.record(document))
            except Rejected as error:
                records.append(error)
        following = listed.get("cursor")
        if following and (not isinstance(following, str) or following == cursor):
            raise RetryLater("Commenda answered a cursor that leads nowhere.")
        return Page(records=records, next=following or None)

    def record(self, document: Mapping[str, Any]) -> Record:
        """Raises Rejected when the hub cannot hold what the document says."""
        try:
            values = fields_of(ANSWERED.run_validation(document))
        except serializers.ValidationError as error:
            raise Rejected(
                f"Commenda's record {document['id']} cannot be read: {error.detail}", code="unreadable"
            ) from None
        seconds = document.get("created_at")
        dated = isinstance(seconds, int) and 0 < seconds < 2**36
        return Record(
            values=values,
            document=document,
            remote_id=document["id"],
            created_at=datetime.fromtimestamp(int(seconds or 0), UTC) if dated else None,
        )

    def stored(self, document: Mapping[str, Any]) -> Record:
        """What a write answered. It is stored, however strange the answer: the id is known if nothing else."""
        try:
            return self.record(document)
        except Rejected:
            return Record(values={}, document=document, remote_id=document["id"])


def item(remote_id: str) -> str:
    return f"{COLLECTION}/{quote(remote_id, safe='')}"


def customer_in(body: Any) -> dict[str, Any] | None:
    """The customer in an envelope or flat; None where there is none with an id."""
    for document in (body.get("data"), body) if isinstance(body, dict) else ():
        uid = document.get("id") if isinstance(document, dict) else None
        if isinstance(uid, str) and 0 < len(uid) <= 255:
            return document
    return None


def send(session: Session, method: str, path: str, *, json: Any = None, params: Mapping[str, Any] | None = None) -> Any:
    """The body of the answer. Raises ConnectorError, with the customer field and the words of a refusal."""
    answer = session.send(method, path, json=json, params=params)
    try:
        raise_for_answer(answer)
    except Gone as error:
        if path == COLLECTION:
            raise ConnectionUnusable(
                "Commenda does not know this corporation, or its API is not at this address. Check both.",
                status=error.status,
                code=error.code,
            ) from None
        raise
    except Rejected as error:
        error.field, error.message = explained(answer.body, error.message)
        raise
    return answer.body


def explained(body: Any, message: str) -> tuple[str, str]:
    """The customer field that a refusal points at, "" if none, and its words."""
    error = body.get("error") if isinstance(body, dict) else None
    errors = error.get("Errors") if isinstance(error, dict) else None
    named = [e for e in errors if isinstance(e, dict)] if isinstance(errors, list) else []
    words = "; ".join(e["details"] for e in named if isinstance(e.get("details"), str))
    fields = (FIELD_OF.get(str(e.get("pointer")), "") for e in named)
    return next(filter(None, fields), ""), words[:300] or message
