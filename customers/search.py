"""Finding customers by whatever staff have in hand, at a million rows as at ten.

Exact ids come first, then what begins like the term, then what contains it. Every step is one look-up in an index and
ends after `LIMIT` hits; none looks at every row. What contains the term is found by trigrams: on PostgreSQL a GIN index
on `HAYSTACK`, on SQLite an FTS5 table that triggers keep (`prepare`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import reduce
from operator import or_
from typing import Any
from uuid import UUID

from django.db import connections, router, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Case, F, Func, IntegerField, Q, QuerySet, TextField, Value, When
from django.db.models.expressions import RawSQL

from customers.models import Customer, Organization
from customers.normalize import email_key, name_key, phone_key

LIMIT = 500
# SQLite reads all rows that an index names before it looks at the first: so many are tried before all of them.
FIRST = 20_000
# Shorter words have no trigram; they only narrow what longer words find.
TRIGRAM = 3
# As JSON writes a number; other scripts' digits are text to it.
_NUMBER = re.compile(r"[1-9][0-9]*")
_PHONE = re.compile(r"[\d\s()+./-]+")

HAYSTACK = "name_key || ' ' || email_key || ' ' || phone_key"


def beginning(column: str, key: str) -> Q:
    """Rows whose column begins with `key`, as a range: unlike LIKE, every index on the column serves it.

    The columns compare by code point: SQLite's way, and on PostgreSQL the collation "C" that a migration gave them.
    """
    for end in range(len(key), 0, -1):
        following = ord(key[end - 1]) + 1
        if following <= 0x10FFFF:
            upper = key[: end - 1] + chr(0xE000 if 0xD800 <= following <= 0xDFFF else following)
            return Q((f"{column}__gte", key), (f"{column}__lt", upper))
    return Q((f"{column}__gte", key))


def _filled(column: str) -> Q:
    """What the partial index of the column demands; SQLite uses it only where the query says so too."""
    return ~Q((column, ""))


def exactly(term: str, *, countries: Collection[str]) -> Q:
    """Customers with this e-mail address or phone number; `countries` are those whose national numbers are meant."""
    found = Q()
    if "@" in term:
        found |= Q(email_key=email_key(term)) & _filled("email_key")
    if _PHONE.fullmatch(term):
        keys = {key for country in countries or {""} if (key := phone_key(term, country=country))}
        if keys:
            found |= Q(phone_key__in=keys) & _filled("phone_key")
    return found


def custom_value(term: str, *, organizations: Collection[int]) -> Q:
    """Customers with this value in a custom field, such as a tax number: of four characters or more, one a digit."""
    if len(term) < 4 or not any(c.isdigit() for c in term) or not organizations:
        return Q()
    using = router.db_for_read(Customer)
    if connections[using].vendor == "postgresql":
        terms = [json.dumps(text) for text in dict.fromkeys((term, term.upper(), term.lower()))]
        if _NUMBER.fullmatch(term):
            terms.append(term)
        path = " || ".join(f"@ == {text}" for text in terms)
        sql = (
            "SELECT id FROM customers_customer WHERE organization_id = ANY(%s) AND custom_fields <> '{}'::jsonb"
            f" AND custom_fields @? %s::jsonpath LIMIT {LIMIT}"
        )
        return Q(pk__in=RawSQL(sql, [list(organizations), f"$.** ? ({path})"]))
    quoted = json.dumps(term)
    parts = [_phrase(quoted)]
    if _NUMBER.fullmatch(term):
        parts += [_phrase(f": {term},"), _phrase(f": {term}}}")]
    return Q(pk__in=_indexed(f"more : ({' OR '.join(parts)})"))


def containing(term: str, *, personal: bool, among: int | None = None) -> Q | None:
    """Customers that contain every word of the term in name, e-mail or phone; None where it is too short for that.

    On SQLite `among` bounds how many of those the index names are looked at.
    Without `personal`, names alone count: what may not be seen must not be found out letter by letter.
    """
    words = (email_key if "@" in term else name_key)(term).split()
    digits = re.sub(r"\D", "", term).lstrip("0") if _PHONE.fullmatch(term) else ""
    choices = [wanted for wanted in (words, [digits] if len(digits) > TRIGRAM else []) if wanted]
    if not personal:
        choices = choices[:1]
    found = [_having(wanted, personal=personal, among=among) for wanted in choices if max(map(len, wanted)) >= TRIGRAM]
    if not found:
        return None
    return reduce(or_, found)


def _having(words: Sequence[str], *, personal: bool, among: int | None) -> Q:
    where = Q()
    if connections[router.db_for_read(Customer)].vendor == "postgresql":
        for word in words:
            where &= Q(haystack__contains=word)
    else:
        long = " AND ".join(_phrase(word) for word in words if len(word) >= TRIGRAM)
        where &= Q(pk__in=_indexed(f"{'{name contact}' if personal else 'name'} : ({long})", among=among))
        for word in words:
            if len(word) < TRIGRAM:
                where &= Q(haystack__contains=word)
    if not personal:
        for word in words:
            where &= Q(name_key__contains=word)
    return where


def _phrase(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _indexed(match: str, *, among: int | None = None) -> RawSQL:
    sql = (
        "SELECT customer_id FROM customers_searchtext WHERE id IN"
        " (SELECT rowid FROM customers_searchindex WHERE customers_searchindex MATCH %s LIMIT %s)"
    )
    return RawSQL(sql, [match, -1 if among is None else among])


def _haystack() -> Func:
    """`HAYSTACK`, written so that PostgreSQL knows its index in it."""
    return Func(
        F("name_key"),
        F("email_key"),
        F("phone_key"),
        template="(%(expressions)s)",
        arg_joiner=" || ' ' || ",
        output_field=TextField(),
    )


def named(term: str, *, organization: Organization) -> QuerySet[Customer] | None:
    """The organization's customers whose name contains the term; None where it is too short for the index."""
    found = containing(term, personal=False)
    if found is None:
        return None
    rows = Customer.objects.filter(organization=organization, name_key__contains=name_key(term))
    return rows.alias(haystack=_haystack()).filter(found)


def written(text: str, *, organization: Organization) -> QuerySet[Customer] | None:
    """The organization's customers whose name or e-mail may have this text in it, in any case, and others.

    None where the index cannot tell. "i" is not asked for: a dotless one has the same capital and another key.
    """
    if not text.isascii():
        return None
    parts = [part for part in re.split(r"[\si]+", text.lower()) if len(part) >= TRIGRAM]
    if not parts:
        return None
    rows = Customer.objects.filter(organization=organization).alias(haystack=_haystack())
    return rows.filter(_having(parts, personal=True, among=None))


def find(
    rows: QuerySet[Customer],
    term: str,
    *,
    organizations: Collection[int],
    exact: Sequence[QuerySet[Customer, Any]],
    personal: bool,
) -> tuple[QuerySet[Customer], int]:
    """Those of `rows` that the term means, best first, and how many; of each step at most `LIMIT`.

    `exact` are queries for the ids that the term names exactly: where it names any, parts of names are not looked into.
    `organizations` are whose customers `rows` are. Without `personal`, names and exact terms alone find.
    """
    rows = rows.alias(haystack=_haystack())
    own = rows.order_by().filter(organization__in=organizations).values_list("pk", flat=True)
    named: list[UUID] = list(exact[0].union(*exact[1:])[:LIMIT]) if exact else []
    name, email = name_key(term), email_key(term) if personal else ""
    ranks = [Q(pk__in=named)] if named else []
    if name:
        ranks.append(beginning("name_key", name))
    if email:
        ranks.append(beginning("email_key", email) & _filled("email_key"))
    hits: dict[UUID, None] = {}
    if ranks:
        # Not one condition with OR: SQLite would read every row for it.
        first, *others = (own.filter(rank) for rank in ranks)
        hits = dict.fromkeys(first.union(*others, all=True)[:LIMIT])
    for among in (FIRST, None) if connections[router.db_for_read(Customer)].vendor == "sqlite" else (None,):
        if named or len(hits) >= LIMIT or (contains := containing(term, personal=personal, among=among)) is None:
            break
        hits |= dict.fromkeys(own.filter(contains)[:LIMIT])
    if name:
        ranks.append(Q(name_key__contains=f" {name}"))
    ids = list(hits)[:LIMIT]
    order = [When(rank, then=Value(position)) for position, rank in enumerate(ranks)]
    found = rows.filter(pk__in=ids)
    if order:
        best = Case(*order, default=Value(len(order)), output_field=IntegerField())
        found = found.order_by(best, "name_key", "-updated_at", "pk")
    return found, len(ids)


# What the two databases keep for it

_COLUMNS = "customer_id, name, contact, more"
_VALUES = (
    "{row}.id, {row}.name_key, {row}.email_key || ' ' || {row}.phone_key,"
    " CASE {row}.custom_fields WHEN '{{}}' THEN '' ELSE {row}.custom_fields END"
)
_DELETE = "INSERT INTO customers_searchindex (customers_searchindex, rowid, name, contact, more) SELECT 'delete', {old}"
_INSERT = "INSERT INTO customers_searchindex (rowid, name, contact, more) SELECT {new}"
_KEPT = "id, name, contact, more FROM customers_searchtext WHERE customer_id = {row}.id;"
TRIGGERS = {
    "customers_search_added": (
        "AFTER INSERT ON customers_customer BEGIN"
        f" INSERT INTO customers_searchtext ({_COLUMNS}) VALUES ({_VALUES.format(row='new')});"
        f" {_INSERT.format(new=_KEPT.format(row='new'))}"
        " END"
    ),
    "customers_search_removed": (
        "AFTER DELETE ON customers_customer BEGIN"
        f" {_DELETE.format(old=_KEPT.format(row='old'))}"
        " DELETE FROM customers_searchtext WHERE customer_id = old.id;"
        " END"
    ),
    "customers_search_changed": (
        "AFTER UPDATE OF name_key, email_key, phone_key, custom_fields ON customers_customer"
        " WHEN old.name_key <> new.name_key OR old.email_key <> new.email_key OR old.phone_key <> new.phone_key"
        " OR old.custom_fields <> new.custom_fields BEGIN"
        f" {_DELETE.format(old=_KEPT.format(row='old'))}"
        f" UPDATE customers_searchtext SET ({_COLUMNS}) = ({_VALUES.format(row='new')}) WHERE customer_id = old.id;"
        f" {_INSERT.format(new=_KEPT.format(row='new'))}"
        " END"
    ),
}


def prepare(database: BaseDatabaseWrapper) -> None:
    """Have SQLite keep the table that is searched for parts of a name; does nothing when it already does.

    Called after every migrate and not by a migration: whenever Django alters a table of SQLite it makes a new one, and
    the triggers of the old one are gone. The table has ids of its own because the rows of a table without an integer
    key may be renumbered by VACUUM.
    """
    with transaction.atomic(using=database.alias), database.cursor() as cursor:
        cursor.execute("SELECT name FROM sqlite_master WHERE name IN ('customers_customer', 'customers_searchtext')")
        there = {name for (name,) in cursor.fetchall()}
        if "customers_customer" not in there:
            return
        cursor.execute("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'customers_customer'")
        if {name for (name,) in cursor.fetchall()} >= TRIGGERS.keys() and "customers_searchtext" in there:
            return
        cursor.execute("DROP TABLE IF EXISTS customers_searchindex")
        cursor.execute("DROP TABLE IF EXISTS customers_searchtext")
        cursor.execute(
            "CREATE TABLE customers_searchtext (id integer PRIMARY KEY, customer_id char(32) NOT NULL UNIQUE,"
            " name text NOT NULL, contact text NOT NULL, more text NOT NULL)"
        )
        cursor.execute(
            "CREATE VIRTUAL TABLE customers_searchindex USING fts5(name, contact, more, tokenize='trigram',"
            " content='customers_searchtext', content_rowid='id')"
        )
        cursor.execute(
            f"INSERT INTO customers_searchtext ({_COLUMNS}) SELECT {_VALUES.format(row='c')} FROM customers_customer c"
        )
        cursor.execute("INSERT INTO customers_searchindex (customers_searchindex) VALUES ('rebuild')")
        for name, body in TRIGGERS.items():
            cursor.execute(f"DROP TRIGGER IF EXISTS {name}")
            cursor.execute(f"CREATE TRIGGER {name} {body}")
