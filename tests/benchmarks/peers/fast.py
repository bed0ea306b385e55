"""FastAPI with SQLAlchemy's async session over the hub's tables, for uvicorn.

It checks the key and writes the change row; it marks no link.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import MetaData, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from customers.ids import parse_public_id, uuid7

URL = "postgresql+psycopg://" + os.environ["DATABASE_URL"].partition("://")[2]
tables = MetaData()
with create_engine(URL).connect() as reading:
    tables.reflect(reading, only=["customers_customer", "customers_customerchange", "connectors_apikey"])


class Base(DeclarativeBase):
    metadata = tables


class Customer(Base):
    __table__ = tables.tables["customers_customer"]


class Change(Base):
    __table__ = tables.tables["customers_customerchange"]


class ApiKey(Base):
    __table__ = tables.tables["connectors_apikey"]


app = FastAPI()
session_of = async_sessionmaker(create_async_engine(URL, pool_size=16), expire_on_commit=False)
TEXTS = [c.name for c in Customer.__table__.columns if c.type.python_type is str]


class Values(BaseModel):
    name: str = Field("", max_length=255)
    email: str = Field("", max_length=254)
    phone: str = Field("", max_length=64)
    address_line1: str = Field("", max_length=255)
    address_city: str = Field("", max_length=255)
    address_postal_code: str = Field("", max_length=32)
    address_country: str = Field("", max_length=64)


class Shown(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: UUID
    version: int
    name: str
    email: str
    phone: str
    address_line1: str
    address_line2: str
    address_city: str
    address_state: str
    address_postal_code: str
    address_country: str
    shipping_address_line1: str
    shipping_address_line2: str
    shipping_address_city: str
    shipping_address_state: str
    shipping_address_postal_code: str
    shipping_address_country: str
    is_active: bool
    created_at: datetime
    updated_at: datetime


class Answer(BaseModel):
    data: Shown


class Page(BaseModel):
    data: list[Shown]


async def session() -> AsyncIterator[AsyncSession]:
    async with session_of() as one:
        yield one


Session = Annotated[AsyncSession, Depends(session)]


async def key(session: Session, authorization: Annotated[str, Header()] = "") -> Any:
    wanted = hashlib.sha256(authorization.partition(" ")[2].encode()).hexdigest()
    found = (await session.execute(select(ApiKey).where(ApiKey.hash == wanted))).scalar_one_or_none()
    if found is None:
        raise HTTPException(401)
    return found


Key = Annotated[Any, Depends(key)]


def change(key: Any, customer: Any, changes: dict[str, Any], at: datetime) -> Any:
    author = {"actor_kind": "api_key", "actor_id": str(key.id), "actor_name": key.name, "request_id": "", "message": ""}
    about = {"organization_id": key.organization_id, "customer_id": customer.id, "version": customer.version}
    return Change(**about, **author, at=at, changes=changes)


async def find(session: AsyncSession, key: Any, customer_id: str, *, lock: bool = False) -> Any:
    uid = parse_public_id("cust", customer_id)
    found = select(Customer).where(Customer.id == uid, Customer.organization_id == key.organization_id)
    return (await session.execute(found.with_for_update() if lock else found)).scalar_one()


@app.post("/api/v1/unified/customer", status_code=201)
async def create(values: Values, key: Key, session: Session) -> Answer:
    at = datetime.now(UTC)
    given = values.model_dump()
    own = {"id": uuid7(), "organization_id": key.organization_id, "version": 1, "created_at": at, "updated_at": at}
    flags = {"notify_email": False, "notify_phone": False, "is_active": True, "custom_fields": {}}
    keys = {"name_key": given["name"].casefold(), "email_key": given["email"].lower(), "phone_key": given["phone"]}
    customer = Customer(**{**dict.fromkeys(TEXTS, ""), **given, **own, **flags, **keys})
    session.add(customer)
    await session.flush()
    session.add(change(key, customer, {name: [None, value] for name, value in given.items()}, at))
    await session.commit()
    return Answer(data=customer)


@app.patch("/api/v1/unified/customer/{customer_id}")
async def update(customer_id: str, values: Values, key: Key, session: Session) -> Answer:
    at = datetime.now(UTC)
    customer = await find(session, key, customer_id, lock=True)
    given = values.model_dump(exclude_unset=True)
    changes = {name: [getattr(customer, name), value] for name, value in given.items()}
    for name, value in given.items():
        setattr(customer, name, value)
    customer.version += 1
    customer.updated_at = at
    session.add(change(key, customer, changes, at))
    await session.commit()
    return Answer(data=customer)


@app.get("/api/v1/unified/customer/{customer_id}")
async def read(customer_id: str, key: Key, session: Session) -> Answer:
    return Answer(data=await find(session, key, customer_id))


@app.get("/api/v1/unified/customers")
async def list_(key: Key, session: Session) -> Page:
    rows = select(Customer).where(Customer.organization_id == key.organization_id).order_by(Customer.id).limit(100)
    return Page(data=[*(await session.execute(rows)).scalars()])
