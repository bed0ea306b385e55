"""Fills the hub's tables with customers as they are: people and companies of ten countries, some of them twice.

The same seed makes the same customers. Rows go straight into the tables, by COPY on PostgreSQL: nothing is sent, and
no worker has anything to do but for the few links that wait.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any
from uuid import UUID

from django.db import connection, models, transaction

from connectors.models import Connection, CustomerLink
from customers.models import Customer, CustomerChange, Organization
from customers.normalize import email_key, name_key, phone_key

CHUNK = 10_000
BEGAN = datetime(2024, 1, 1, tzinfo=UTC)
SPAN = timedelta(days=1000)
COMPANIES, COPIES, LOOK_ALIKES, ARCHIVED = 0.12, 0.04, 0.04, 0.01


@dataclass(frozen=True, kw_only=True)
class Place:
    """How people of one country are called, live and telephone. `#` stands for a digit, `%` for one of 1 to 9."""

    country: str
    currency: str
    first: tuple[str, ...]
    last: tuple[str, ...]
    streets: tuple[str, ...]
    cities: tuple[tuple[str, str, str], ...]
    phone: str
    company: tuple[str, ...]
    tax: str
    surname_first: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = (
    Place(
        country="DE",
        currency="EUR",
        first=_words(
            "Anna Jürgen Sabine Lukas Käthe Björn Ulrike Matthias Heike Jörg Lena Felix Marie Tobias Silke Uwe"
        ),
        last=_words(
            "Müller Schmidt Schneider Fischer Weber Meyer Wagner Becker Schäfer Koch Bauer Richter Größmann Öztürk"
        ),
        streets=("Hauptstraße %", "Bahnhofstr. %#", "Am Mühlbach %", "Lindenallee %#a"),
        cities=(
            ("Berlin", "Berlin", "10###"),
            ("München", "Bayern", "80###"),
            ("Köln", "Nordrhein-Westfalen", "50###"),
        ),
        phone="+4930%######",
        company=("{} GmbH", "{} & Söhne KG", "Autohaus {} AG", "Bäckerei {}"),
        tax="DE#########",
    ),
    Place(
        country="US",
        currency="USD",
        first=_words(
            "James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth José Barbara Tyrone Susan Wei"
        ),
        last=_words(
            "Smith Johnson Williams Brown Jones García Miller Davis Rodríguez Martínez Nguyen Lee O'Connor Walker"
        ),
        streets=("%## Main St", "%### Oak Avenue Apt %", "%## 5th Ave", "PO Box %##"),
        cities=(("New York", "NY", "10###"), ("Austin", "TX", "787##"), ("San José", "CA", "951##")),
        phone="+1212%######",
        company=("{} Inc.", "{} Holdings LLC", "{} & Sons", "Blue {} Corp"),
        tax="%#-#######",
    ),
    Place(
        country="GB",
        currency="GBP",
        first=_words(
            "Oliver Amelia Harry Isla Jack Ava Siân Emily Charlie Sophie Rhys Poppy Angus Zara Mohammed Freya"
        ),
        last=_words(
            "Taylor Davies Evans Thomas Roberts Wright Thompson Hughes Patel Khan MacDonald Clarke Ó'Neill Shaw"
        ),
        streets=("% High Street", "%# Station Road", "Flat %, %# Mill Lane", "The Old Vicarage"),
        cities=(("London", "", "SW1A %AA"), ("Leeds", "West Yorkshire", "LS% %AB"), ("Cardiff", "Wales", "CF%# %DD")),
        phone="+4420%#######",
        company=("{} Ltd", "{} & Co", "{} Partners LLP", "The {} Group plc"),
        tax="GB#########",
    ),
    Place(
        country="FR",
        currency="EUR",
        first=_words(
            "Jean Élodie Pierre Chloé François Zoé Étienne Manon Thérèse Hugo Léa Gaël Inès Noël Camille Théo"
        ),
        last=_words(
            "Martin Bernard Dubois Petit Lefèvre Moreau Laurent Roux Garçon Fournier Girard Hébert Nguyễn Benoît"
        ),
        streets=("% rue de la République", "%# avenue Victor-Hugo", "% bis, place du Marché", "%# bd Saint-Michel"),
        cities=(("Paris", "Île-de-France", "750##"), ("Lyon", "Rhône", "690##"), ("Saint-Étienne", "Loire", "420##")),
        phone="+331########",
        company=("{} SARL", "Établissements {} SA", "{} et Fils", "Société {} SAS"),
        tax="FR##########",
    ),
    Place(
        country="ES",
        currency="EUR",
        first=_words(
            "María José Antonio Lucía Íñigo Begoña Álvaro Nuria Jesús Ángela Raúl Rocío Sofía Joaquín Mónica Iván"
        ),
        last=_words(
            "González Fernández López Pérez Gómez Muñoz Ibáñez Núñez Sáenz Echevarría Ruiz Peña Domínguez Vázquez"
        ),
        streets=("Calle Mayor, %", "Avda. de la Constitución %#", "Plaza de España, % 3º B", "C/ Alcalá %##"),
        cities=(("Madrid", "Madrid", "280##"), ("A Coruña", "Galicia", "150##"), ("Málaga", "Andalucía", "290##")),
        phone="+3491%######",
        company=("{} S.L.", "Hermanos {} S.A.", "Talleres {}", "Bodegas {} S.L."),
        tax="ES########%",
    ),
    Place(
        country="IT",
        currency="EUR",
        first=_words(
            "Giulia Marco Niccolò Chiara Alessandro Francesca Luca Sofia Matteo Elisa Davide Martina Pietro Noemi"
        ),
        last=_words(
            "Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci D'Angelo Dell'Acqua Gallo Conti Nicolò Greco"
        ),
        streets=("Via Roma, %", "Corso Garibaldi %#", "Piazza del Duomo, %", "Viale dei Mille %##"),
        cities=(("Milano", "MI", "201##"), ("Roma", "RM", "001##"), ("Forlì", "FC", "471##")),
        phone="+3902%######",
        company=("{} S.r.l.", "Fratelli {} S.p.A.", "Pasticceria {}", "Studio {}"),
        tax="IT###########",
    ),
    Place(
        country="NL",
        currency="EUR",
        first=_words("Daan Sanne Bram Fleur Jan Femke Sem Lotte Pieter Anouk Thijs Maud Joris Noor Willem Roos"),
        last=(
            "de Jong",
            "Jansen",
            "van den Berg",
            "Bakker",
            "van Dijk",
            "Visser",
            "de Boer",
            "Mulder",
            "’t Hart",
            "Smit",
        ),
        streets=("Kerkstraat %", "Dorpsweg %#", "Prinsengracht %##-II", "Stationsplein %"),
        cities=(
            ("Amsterdam", "Noord-Holland", "10## AB"),
            ("Utrecht", "Utrecht", "35## CD"),
            ("Sneek", "Fryslân", "86## XE"),
        ),
        phone="+3120%######",
        company=("{} B.V.", "Gebroeders {} V.O.F.", "{} Transport N.V.", "Bloemen {}"),
        tax="NL#########B0%",
    ),
    Place(
        country="PL",
        currency="PLN",
        first=_words(
            "Łukasz Małgorzata Paweł Agnieszka Michał Zofia Stanisław Bożena Grzegorz Żaneta Wojciech Ewa Jakub Anna"
        ),
        last=_words(
            "Nowak Kowalski Wiśniewski Wójcik Kamiński Lewandowska Zieliński Szymańska Dąbrowski Kozłowska Żak Gołąb"
        ),
        streets=("ul. Główna %", "ul. Mickiewicza %#/%", "al. Jerozolimskie %##", "os. Słoneczne %"),
        cities=(
            ("Warszawa", "mazowieckie", "00-###"),
            ("Łódź", "łódzkie", "90-###"),
            ("Kraków", "małopolskie", "30-###"),
        ),
        phone="+4822%######",
        company=("{} Sp. z o.o.", "{} S.A.", "Zakład {}", "PHU {}"),
        tax="PL##########",
    ),
    Place(
        country="BR",
        currency="BRL",
        first=_words(
            "João Maria Antônio Ana Luís Júlia Tiago Letícia Caio Thaís André Conceição Otávio Bárbara Rafael Inês"
        ),
        last=(
            "da Silva",
            "dos Santos",
            "Oliveira",
            "Souza",
            "Gonçalves",
            "Araújo",
            "Conceição",
            "Magalhães",
            "Assunção",
        ),
        streets=("Rua das Flores, %##", "Av. Paulista, %###", "Travessa São João, %", "Rua 7 de Setembro, %#"),
        cities=(("São Paulo", "SP", "01###-###"), ("Rio de Janeiro", "RJ", "20###-###"), ("Belém", "PA", "66###-###")),
        phone="+5511%#######",
        company=("{} Ltda.", "Irmãos {} S.A.", "Padaria {}", "{} Comércio ME"),
        tax="##.###.###/0001-##",
    ),
    Place(
        country="JP",
        currency="JPY",
        first=_words("太郎 花子 健太 美咲 翔 陽菜 大輔 さくら 拓海 結衣 直樹 愛 誠 恵子 隆 真由美"),
        last=_words("佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤 吉田 山田 佐々木 長谷川"),
        streets=("本町%-%-%#", "中央%丁目%番%号", "桜ヶ丘%-%"),
        cities=(("東京", "東京都", "100-####"), ("大阪", "大阪府", "530-####"), ("札幌", "北海道", "060-####")),
        phone="+813%#######",
        company=("{}株式会社", "株式会社{}商事", "有限会社{}", "{}工業"),
        tax="T#############",
        surname_first=True,
    ),
)
HOSTS = ("example.com", "mail.example.com", "post.example.net", "example.org", "office.example")


def _filled(pattern: str, chance: random.Random) -> str:
    return "".join(
        str(chance.randrange(10)) if c == "#" else str(chance.randrange(1, 10)) if c == "%" else c for c in pattern
    )


def _ascii(text: str) -> str:
    plain = "".join(c for c in name_key(text) if c.isascii() and c.isalnum())
    return plain or "".join(f"{ord(c):x}" for c in text if c.isalnum())


def one(chance: random.Random, number: int) -> dict[str, Any]:
    """The editable fields of a customer that does not exist."""
    place = PLACES[chance.randrange(len(PLACES))]
    first, last = chance.choice(place.first), chance.choice(place.last)
    city, state, code = chance.choice(place.cities)
    values: dict[str, Any] = {
        "phone": _filled(place.phone, chance) if chance.random() < 0.8 else "",
        "address_line1": _filled(chance.choice(place.streets), chance),
        "address_city": city,
        "address_state": state,
        "address_postal_code": _filled(code, chance),
        "address_country": place.country,
        "currency": place.currency,
    }
    host = chance.choice(HOSTS)
    if chance.random() < COMPANIES:
        values["name"] = chance.choice(place.company).format(f"{last} {first[:1]}{number % 997}")
        values["email"] = f"info.{_ascii(last)}{number}@{host}"
        values["custom_fields"] = {"tax_number": _filled(place.tax, chance), "segment": chance.choice("ABC")}
        return values
    middle = f" {chance.choice(place.first)}" if chance.random() < 0.3 and not place.surname_first else ""
    values["first_name"], values["last_name"] = first + middle, last
    values["name"] = f"{last} {first}" if place.surname_first else f"{first}{middle} {last}"
    if chance.random() < 0.9:
        values["email"] = f"{_ascii(first)}.{_ascii(last)}{number if chance.random() < 0.9 else ''}@{host}"
    return values


def copy_of(values: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """The same customer as somebody else typed it."""
    other = dict(values)
    spoil = chance.randrange(4)
    if spoil == 0:
        other["name"] = str(other["name"]).upper()
    elif spoil == 1:
        other["phone"] = ""
    elif spoil == 2 and len(other["name"]) > 4:
        at = chance.randrange(1, len(other["name"]) - 1)
        other["name"] = other["name"][:at] + other["name"][at + 1 :]
    else:
        other["address_line1"] = str(other["address_line1"]).replace("str.", "straße").replace("St", "Street")
    return other


def look_alike(values: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Somebody else of the same household: same address, often the same telephone."""
    other = dict(values)
    place = next(place for place in PLACES if place.country == values["address_country"])
    first = chance.choice(place.first)
    last = str(values.get("last_name") or chance.choice(place.last))
    other |= {"first_name": first, "last_name": last, "name": f"{first} {last}", "custom_fields": {}}
    other["email"] = ""
    return other


def customers(count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(seed)
    recent: list[dict[str, Any]] = []
    for number in range(count):
        roll = chance.random()
        if recent and roll < COPIES:
            values = copy_of(chance.choice(recent), chance)
        elif recent and roll < COPIES + LOOK_ALIKES:
            values = look_alike(chance.choice(recent), chance)
        else:
            values = one(chance, number)
        recent.append(values)
        del recent[:-500]
        yield values


class Table:
    """Takes rows of one model by the columns that differ from its defaults."""

    def __init__(self, model: type[models.Model]) -> None:
        fields = [f for f in model._meta.concrete_fields if not f.has_db_default()]
        self.fields = [f for f in fields if not isinstance(f, models.AutoField)]
        blank = model()
        self.blank = [self._prepared(f, getattr(blank, f.attname)) for f in self.fields]
        self.at = {f.attname: i for i, f in enumerate(self.fields)}
        quote = connection.ops.quote_name
        self.name = quote(model._meta.db_table)
        self.columns = ", ".join(quote(str(f.column)) for f in self.fields)
        self.rows: list[list[Any]] = []

    def _prepared(self, field: models.Field[Any, Any], value: Any) -> Any:
        return value if value is None else field.get_db_prep_save(value, connection)

    def add(self, **values: Any) -> None:
        row = self.blank.copy()
        for name, value in values.items():
            position = self.at[name]
            row[position] = self._prepared(self.fields[position], value)
        self.rows.append(row)

    def write(self) -> None:
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                with cursor.copy(f"COPY {self.name} ({self.columns}) FROM STDIN") as copy:
                    for row in self.rows:
                        copy.write_row(row)
            else:
                marks = ", ".join(["%s"] * len(self.fields))
                cursor.executemany(f"INSERT INTO {self.name} ({self.columns}) VALUES ({marks})", self.rows)
        self.rows.clear()


def customer_id(moment: datetime, chance: random.Random) -> UUID:
    high = int(moment.timestamp() * 1000) << 16 | 0x7000 | chance.getrandbits(12)
    return UUID(int=high << 64 | 0x2 << 62 | chance.getrandbits(62))


SHARES = {"shop": 0.9, "books": 0.5, "mail": 0.2}


def _connections(organization: Organization, names: Iterable[str]) -> dict[str, Connection]:
    return {
        name: Connection.objects.create(
            organization=organization, provider="links", name=name, account=name, direction=Connection.Direction.PUSH
        )
        for name in names
    }


def fill(
    *, count: int, seed: int = 1, slug: str = "people", shares: Mapping[str, float] = MappingProxyType(SHARES)
) -> Organization:
    """Make an organization with this many customers, and connections of these names that know this share of them."""
    organization = Organization.objects.create(name="People", slug=slug, country="DE")
    connections = _connections(organization, shares)
    chance = random.Random(seed + 1)
    tables = Table(Customer), Table(CustomerChange), Table(CustomerLink)
    for number, values in enumerate(customers(count, seed=seed)):
        made = BEGAN + timedelta(seconds=30 * number)
        _customer(tables, organization, connections, shares, values, made, chance, number)
        if (number + 1) % CHUNK == 0 or number + 1 == count:
            with transaction.atomic():
                for table in tables:
                    table.write()
    with connection.cursor() as cursor:
        vacuums = connection.vendor == "postgresql" and not connection.in_atomic_block
        cursor.execute("VACUUM ANALYZE" if vacuums else "ANALYZE")
    return organization


def _customer(
    tables: tuple[Table, Table, Table],
    organization: Organization,
    connections: Mapping[str, Connection],
    shares: Mapping[str, float],
    values: dict[str, Any],
    made: datetime,
    chance: random.Random,
    number: int,
) -> None:
    customers_table, changes, links = tables
    uid = customer_id(made, chance)
    changed = made + timedelta(seconds=chance.randrange(30 * 86_400)) if chance.random() < 0.3 else made
    version = 2 if changed > made else 1
    customers_table.add(
        id=uid,
        organization_id=organization.pk,
        **values,
        name_key=name_key(values["name"])[:255],
        email_key=email_key(values.get("email", "")),
        phone_key=phone_key(values.get("phone", ""), country="DE"),
        address_country_code=values["address_country"],
        version=version,
        created_at=made,
        updated_at=changed,
        archived_at=changed if chance.random() < ARCHIVED else None,
    )
    kinds = (
        "command",
        chance.choice(("connection", "connection", "api_key", "user" if number % 50 == 0 else "api_key")),
    )
    for step, kind in enumerate(kinds[:version], start=1):
        changes.add(
            organization_id=organization.pk,
            customer_id=uid,
            version=step,
            at=changed if step == 2 else made,
            actor_kind=kind,
            actor_name={"command": "import_customers", "user": "A. Clerk", "api_key": "webshop"}.get(kind, "shop"),
            changes={"name": [None if step == 1 else "Old name", values["name"]]},
        )
    for position, (name, share) in enumerate(shares.items()):
        if chance.random() < share:
            _link(links, connections[name], uid, version, changed, chance, number, leading=position == 0)


def _link(
    links: Table,
    there: Connection,
    uid: UUID,
    version: int,
    at: datetime,
    chance: random.Random,
    number: int,
    *,
    leading: bool,
) -> None:
    state: dict[str, Any] = {"pushed_version": version, "synced_at": at}
    if chance.random() < 0.002:
        field = chance.choice(("email", "address_postal_code", ""))
        state = {
            "state": "rejected",
            "error": "is not valid",
            "error_field": field,
            "fingerprint": (field or "other")[:16],
        }
    elif chance.random() < 0.0005:
        state = {
            "state": chance.choice(("uncertain", "conflict", "remote_deleted", "paused")),
            "pushed_version": version,
        }
    elif chance.random() < 0.002:
        state = {"pushed_version": version - 1, "next_attempt_at": at}
    links.add(
        uid=UUID(int=chance.getrandbits(128)),
        customer_id=uid,
        connection_id=there.pk,
        remote_id=f"{there.name}-{number}",
        remote_data={"id": f"{there.name}-{number}"},
        needed_version=version,
        is_primary=leading,
        created_at=at,
        updated_at=at,
        **state,
    )


# A copy of a customer is another one: registered later, with an id and an address of its own, and one in three with a
# name that nobody else has. `%(copy)s` tells the copies apart, `%(later)s` is in milliseconds.
_LATER = "%(later)s * interval '1 millisecond'"
_OTHER_ID = (
    "(lpad(to_hex(('x' || left(translate({0}::text, '-', ''), 12))::bit(48)::bigint + %(later)s), 12, '0')"
    " || substr(translate({0}::text, '-', ''), 13))::uuid"
)
_LETTERS = "translate(left(md5(id::text || %(copy)s), 7), '0123456789', 'ghijklmnop')"
_RARE = "CASE WHEN get_byte(uuid_send(id), 15) % 3 = 0 THEN '-' || {0} ELSE '' END"
_COPIED: Mapping[type[models.Model], Mapping[str, str]] = {
    Customer: {
        "id": _OTHER_ID.format("id"),
        "organization_id": "%(organization)s",
        "name": f"name || {_RARE.format(f'initcap({_LETTERS})')}",
        "name_key": f"name_key || {_RARE.format(_LETTERS)}",
        "email": "replace(email, '@', '.%(copy)s@')",
        "email_key": "replace(email_key, '@', '.%(copy)s@')",
        "phone": "CASE phone WHEN '' THEN '' ELSE left(phone, -3) || lpad('%(copy)s', 3, '0') END",
        "phone_key": "CASE phone_key WHEN '' THEN '' ELSE left(phone_key, -3) || lpad('%(copy)s', 3, '0') END",
        "created_at": f"created_at + {_LATER}",
        "updated_at": f"updated_at + {_LATER}",
    },
    CustomerChange: {
        "organization_id": "%(organization)s",
        "customer_id": _OTHER_ID.format("customer_id"),
        "at": f"at + {_LATER}",
    },
    CustomerLink: {
        "uid": "gen_random_uuid()",
        "customer_id": _OTHER_ID.format("customer_id"),
        "connection_id": "coalesce('%(connections)s'::jsonb ->> connection_id::text, connection_id::text)::bigint",
        "remote_id": "remote_id || '.%(copy)s'",
        "remote_data": "jsonb_build_object('id', remote_id || '.%(copy)s')",
        "synced_at": f"synced_at + {_LATER}",
        "created_at": f"created_at + {_LATER}",
        "updated_at": f"updated_at + {_LATER}",
    },
}


def multiply(organization: Organization, *, times: int) -> None:
    """Have what `fill` made `times` over, on PostgreSQL; three in ten copies belong to three smaller organizations.

    PostgreSQL itself makes the copies, without indexes, which it builds afterwards: some 20,000 customers a second with
    all that belongs to them.
    """
    connections = dict(organization.connections.values_list("name", "pk"))
    owners = [(organization.pk, {pk: pk for pk in connections.values()})]
    for number in range(3):
        other = Organization.objects.create(name=f"Branch {number}", slug=f"branch-{number}", country="DE")
        there = _connections(other, connections)
        owners.append((other.pk, {pk: there[name].pk for name, pk in connections.items()}))
    with connection.cursor() as cursor:
        cursor.execute("SET maintenance_work_mem = '1GB'; SET synchronous_commit = off; SET jit = off")
        with ExitStack() as stack:
            for model in _COPIED:
                _without_indexes(cursor, model._meta.db_table, stack)
            for copy in range(1, times):
                owner, there = owners[max(copy % 10 - 6, 0)]
                known = {
                    "copy": copy,
                    "later": int(SPAN.total_seconds() * 1000 * copy / times),
                    "organization": owner,
                    "connections": json.dumps(there),
                }
                for model in _COPIED:
                    add_copies(cursor, model, source=f"{model._meta.db_table}_first", **known)
        cursor.execute("VACUUM ANALYZE")


def add_copies(cursor: Any, model: type[models.Model], *, source: str, **known: object) -> None:
    """Insert a copy of each row that `source`, a table or a subquery, has."""
    fields = [f for f in model._meta.concrete_fields if not f.has_db_default()]
    names = [str(f.column) for f in fields if not isinstance(f, models.AutoField)]
    values = ", ".join(_COPIED[model].get(name, name) for name in names)
    for key, value in known.items():
        values = values.replace(f"%({key})s", str(value))
    cursor.execute(f"INSERT INTO {model._meta.db_table} ({', '.join(names)}) SELECT {values} FROM {source}")


def _without_indexes(cursor: Any, table: str, stack: ExitStack) -> None:
    """Keep the rows as they are now in `<table>_first`; indexes, keys and triggers come back when `stack` closes."""
    cursor.execute(f"CREATE TEMPORARY TABLE {table}_first AS TABLE {table}")
    stack.callback(cursor.execute, f"DROP TABLE {table}_first")
    cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    stack.callback(cursor.execute, f"ALTER TABLE {table} ENABLE TRIGGER USER")
    cursor.execute(
        "SELECT conrelid::regclass, quote_ident(conname), pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE %s::regclass IN (conrelid, confrelid) AND contype IN ('f', 'p', 'u') ORDER BY contype IN ('p', 'u')",
        [table],
    )
    for of, name, definition in cursor.fetchall():
        cursor.execute(f"ALTER TABLE {of} DROP CONSTRAINT {name}")
        late = " NOT VALID" if definition.startswith("FOREIGN") else ""
        stack.callback(cursor.execute, f"ALTER TABLE {of} ADD CONSTRAINT {name} {definition}{late}")
    cursor.execute("SELECT quote_ident(indexname), indexdef FROM pg_indexes WHERE tablename = %s", [table])
    for name, definition in cursor.fetchall():
        cursor.execute(f"DROP INDEX {name}")
        stack.callback(cursor.execute, definition)
