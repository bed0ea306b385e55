"""The one door in: an API call, a pull and an import all arrive here, in batches; one record is a batch of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any
from uuid import UUID

import orjson
from django.db import IntegrityError, models
from django.db import connection as database
from django.db.models import F, Q

from connectors.models import Conflict, Connection, CustomerLink, PushIntent
from connectors.provider import Record
from connectors.states import LinkState
from connectors.sync import runs
from connectors.sync.clock import database_clock
from connectors.sync.fights import fights
from connectors.sync.merge import Merge, merge, same
from connectors.sync.races import start_over
from customers import bulk, editing, jsontext
from customers.editing import Actor, UnknownCustomer
from customers.ids import uuid7s
from customers.models import Customer, Organization
from customers.prepared import Among, Param, Prepared

CREATED, UPDATED, UNCHANGED = "created", "updated", "unchanged"
# So long a list may go on showing what has been deleted.
TOMBSTONE_LAG = timedelta(minutes=5)
# So long after its hold, or after it was sent, a request and all readings from before it have certainly ended.
DEAD = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Received:
    """What became of one record: `outcome` is created, updated or unchanged. `link` is None without a connection.

    `stale` says that the record was read before the link last moved: nothing of it was kept; it is to be read again.
    """

    outcome: str
    customer: Customer
    link: CustomerLink | None
    merge: Merge | None = None
    stale: bool = False


def receive(
    *,
    organization: Organization,
    connection: Connection | None,
    records: Sequence[Record],
    actor: Actor,
    fields: frozenset[str] | None = None,
    fetched: datetime | None = None,
    normalise: Callable[[str, Any], Any] = lambda name, value: value,
    takes: bool = True,
    at: datetime | None = None,
    locked: Mapping[UUID, Customer] | None = None,
) -> list[Received]:
    """Take records in, all or none, and answer for each in order. The number of statements is constant.

    A record with a known `remote_id` (or with a `link_id` or `customer_id`) changes that customer; any other makes a
    new one. Two records of one key in a batch count as one after the other.

    With `fields` (a pull: the fields that the provider maps) each known record is merged three ways, so that an edit
    made here is not lost; `fetched` is when reading began, `normalise` tells how the system stores a value, and without
    `takes` the customers stay as they are. Without `fields` the caller is the author and what it names is set.

    `locked` hands over customers that the caller has locked in the `start_over` that this call is part of, by the ids
    that were asked for.
    Raises UnknownCustomer for an id that is not this organization's, InvalidCustomer for values no customer may have.
    """
    at = at or database_clock()
    return start_over(
        lambda: _receive(organization, connection, records, actor, fields, fetched, normalise, takes, at, locked or {})
    )


def _receive(
    organization: Organization,
    connection: Connection | None,
    records: Sequence[Record],
    actor: Actor,
    fields: frozenset[str] | None,
    fetched: datetime | None,
    normalise: Callable[[str, Any], Any],
    takes: bool,
    at: datetime,
    locked: Mapping[UUID, Customer],
) -> list[Received]:
    named = _named(connection, records) if connection else {}
    wanted = {customer_id for _, customer_id in named.values()}
    wanted |= {record.customer_id for record in records if record.customer_id}
    customers = {id_: locked[id_] for id_ in wanted} if wanted <= locked.keys() else {}
    if wanted and not customers:
        customers = editing.lock(organization=organization, ids=wanted)
    links: dict[Any, CustomerLink] = {}
    if named:
        # Read only now that the customers are locked: a push may have answered in between.
        fresh = {link.pk: link for link in _LOCKED_LINKS(ids={pk for pk, _ in named.values()})}
        links = {key: fresh[pk] for key, (pk, _) in named.items()}
        if any(link.customer_id not in customers for link in links.values()):
            raise IntegrityError("a link moved to another customer while it was read")

    # Records of one key are folded into one, in order.
    keys = [_key(record, position) for position, record in enumerate(records)]
    folded: dict[Any, Record] = {}
    for key, record in zip(keys, records, strict=True):
        earlier = folded.get(key)
        folded[key] = record if earlier is None else _fold(earlier, record)

    new = {key: record for key, record in folded.items() if key not in links and not record.customer_id}
    stale = {key: link for key, link in links.items() if fields is not None and _is_stale(link, folded[key], fetched)}
    known = {key: record for key, record in folded.items() if key not in new and key not in stale}
    created = editing.create(
        organization=organization, values=[record.values for record in new.values()], actor=actor, at=at
    )
    merges: dict[Any, Merge] = {}
    edits: dict[UUID, Mapping[str, Any]] = {}
    targets: dict[Any, UUID] = {key: link.customer_id for key, link in links.items()}
    targets |= {key: record.customer_id for key, record in known.items() if record.customer_id}
    if fields is not None and connection is not None:
        merges = _merges(connection, links, known, customers, fields, normalise, takes, at)
        _log_conflicts(connection, links, merges, at)
    for key, record in known.items():
        values = merges[key].take if key in merges else record.values
        edits[targets[key]] = {**edits.get(targets[key], {}), **values}
    # A caller that sends a deleted customer again wants it back; a list that still shows it says nothing new.
    revived = [link.customer_id for key, link in links.items() if link.deleted_at and fields is None]
    if revived:
        editing.restore(organization=organization, ids=revived, actor=actor, at=at)
        customers = editing.lock(organization=organization, ids=wanted)
    edited = (
        editing.update(organization=organization, values=edits, actor=actor, at=at, locked=customers) if edits else {}
    )

    results: dict[Any, Received] = {}
    mould = _links_mould(connection, at) if connection and new else None
    fresh_links = _new_links(mould, new.values(), created) if mould else []
    for key, customer, link in zip_longest(new, created, fresh_links):
        results[key] = Received(outcome=CREATED, customer=customer, link=link)
    for key, link in stale.items():
        results[key] = Received(outcome=UNCHANGED, customer=customers[link.customer_id], link=link, stale=True)
    settled: Counter[int] = Counter()
    moved: dict[int, CustomerLink] = {}
    for key, record in known.items():
        link = links.get(key)
        edit = edited[targets[key]]
        if link is not None and connection is not None:
            quiet = connection.calls_us and fields is None and link.run_id is None
            before = _told(link) if quiet else None
            stamp = link.sync_seq, link.synced_at, link.updated_at
            _take(link, record, edit.customer, merges.get(key), fields if connection.pushes else None, at)
            if before is None or _told(link) != before:
                moved[link.pk] = link
            elif link.pk not in moved:
                link.sync_seq, link.synced_at, link.updated_at = stamp
            if link.run_id and not link.is_dirty:
                settled[link.run_id] += 1
                link.run_id = None
        results[key] = Received(
            outcome=UPDATED if edit.changes or (link and link.customer_id in revived) else UNCHANGED,
            customer=edit.customer,
            link=link,
            merge=merges.get(key),
        )
    if mould is not None:
        # Where they come from leads, not a system that new customers are sent to at once.
        if _LINKED(customer=created[0].pk):
            CustomerLink.objects.filter(customer__in=created, is_primary=True).update(is_primary=False)
        if connection is not None and connection.pushes:
            # The customers are there already: they are not to be created by the links that new customers get at once.
            CustomerLink.objects.filter(connection=connection, customer__in=created).delete()
        for values, link, pk in zip(
            mould.given, fresh_links, bulk.numbers(CustomerLink, len(fresh_links)), strict=True
        ):
            values["id"] = link.pk = pk
        mould.insert()
    bulk.update(list(moved.values()), TAKEN)
    for run_id, number in sorted(settled.items()):
        runs.add(run_id=run_id, totals={UNCHANGED: number}, at=at)
    if settled:
        runs.close_done(run_ids=set(settled), at=at)
    for key, result in results.items():
        if key not in new and result.link is not None and connection is not None:
            result.link.customer = result.customer
            result.link.connection = connection
    return [results[key] for key in keys]


def _is_stale(link: CustomerLink, record: Record, fetched: datetime | None) -> bool:
    """Whether the link has moved since the record was read: what it says may be older than what is known."""
    if record.seq is not None:
        return link.sync_seq != record.seq
    if fetched is None:
        return False
    if link.deleted_at is not None and link.deleted_at + TOMBSTONE_LAG >= fetched:
        return True  # a list may go on showing for a while what has been deleted
    return link.synced_at is not None and link.synced_at >= fetched


def _merges(
    connection: Connection,
    links: Mapping[Any, CustomerLink],
    known: Mapping[Any, Record],
    customers: Mapping[UUID, Customer],
    fields: frozenset[str],
    normalise: Callable[[str, Any], Any],
    takes: bool,
    at: datetime,
) -> dict[Any, Merge]:
    """Each known record merged with its customer. What two systems keep overwriting is left to a person."""
    # A look found that a lost one had not been applied; it may have been since.
    late = Q(outcome=PushIntent.Outcome.FAILED, lost__gt=0, hold_until__gt=F("link__synced_at") - DEAD)
    unanswered = PushIntent.objects.filter(
        late | Q(outcome__in=(PushIntent.Outcome.OPEN, PushIntent.Outcome.UNCERTAIN)),
        link__in=[links[key].pk for key in known if key in links],
    )
    read = {link.pk: link.synced_at for link in links.values()}
    sent: dict[int, list[Mapping[str, Any]]] = {}
    columns = ("link_id", "sent_values", "sent_at", "hold_until")
    for link_id, values, sent_at, hold_until in unanswered.order_by("pk").values_list(*columns):
        # What came of a dead request is in the bases once the record was read after its death.
        if (synced_at := read[link_id]) is None or synced_at < (hold_until or sent_at) + DEAD:
            sent.setdefault(link_id, []).append(values)
    merges = {}
    for key, record in known.items():
        if key not in links:
            continue
        link = links[key]
        merges[key] = merge(
            local={name: getattr(customers[link.customer_id], name) for name in fields},
            remote={name: value for name, value in record.values.items() if name in fields},
            base_local=link.base_local,
            base_remote=link.base_remote,
            policy=lambda name: connection.field_policies.get(name, connection.conflict_policy),
            normalise=normalise,
            sent=sent.get(link.pk, ()),
            waiting=link.conflicts,
            takes=takes and not link.is_duplicate,
        )
    taking = {links[key].customer_id: key for key, merged in merges.items() if merged.take}
    for customer_id, names in fights(customers=list(taking), connection=connection, at=at).items():
        merges[taking[customer_id]] = _frozen(merges[taking[customer_id]], names, customers[customer_id])
    return merges


def _log_conflicts(
    connection: Connection, links: Mapping[Any, CustomerLink], merges: Mapping[Any, Merge], at: datetime
) -> None:
    """Keep all three values of every field that moved on both sides."""
    rows = []
    for key, merged in merges.items():
        for name, (base, here, there) in merged.conflicts.items():
            outcome = Conflict.Outcome.SYSTEM if name in merged.take else Conflict.Outcome.HUB
            rows.append(
                Conflict(
                    organization_id=connection.organization_id,
                    connection=connection,
                    link_id=links[key].pk,
                    field=name,
                    base=base,
                    here=here,
                    there=there,
                    outcome=Conflict.Outcome.WAITING if name in merged.waiting else outcome,
                    at=at,
                )
            )
    decided = Q()
    for key, merged in merges.items():
        before = links[key].conflicts.keys()
        # Both sides agree by now, or the newer entry tells what there is to decide.
        if over := (before - merged.waiting.keys()) | (before & merged.conflicts.keys()):
            decided |= Q(link=links[key].pk, field__in=over)
    if decided:
        Conflict.objects.filter(decided, outcome=Conflict.Outcome.WAITING, resolved_at=None).update(resolved_at=at)
    bulk.insert(rows)


def _frozen(merged: Merge, names: Collection[str], customer: Customer) -> Merge:
    """The merge without the fields that two systems fight over: these wait for a person."""
    waiting = dict(merged.waiting)
    conflicts = dict(merged.conflicts)
    for name in merged.take.keys() & set(names):
        here, there = getattr(customer, name), merged.take[name]
        waiting[name] = {"base": here, "here": here, "there": there}
        conflicts[name] = [here, here, there]
    take = {name: value for name, value in merged.take.items() if name not in names}
    base_local = {**merged.base_local, **{name: waiting[name]["here"] for name in waiting if name in names}}
    return replace(merged, take=take, base_local=base_local, waiting=waiting, conflicts=conflicts)


# The columns of a link that an arriving record moves.
TAKEN = (
    "customer",
    "remote_data",
    "base_local",
    "base_remote",
    "conflicts",
    "remote_revision",
    "remote_created_at",
    "sync_seq",
    "pushed_version",
    "needed_version",
    "next_attempt_at",
    "state",
    "error",
    "error_field",
    "attempts",
    "synced_at",
    "deleted_at",
    "run",
    "updated_at",
)


def nothing_new(
    *, connection: Connection, said: Mapping[str, Mapping[str, Any] | None]
) -> tuple[set[str], dict[str, UUID]]:
    """Which of these records, by remote id, `receive` would find unchanged and write nothing for; and whose the other
    known ones are.

    The former say what they said last time, and the customer has not moved since. One query, and nothing is locked. Of
    `custom_fields` each names those that it sets; None is a record that is not asked about. Only for a connection that
    calls the hub: see `_told`.
    """
    ids = bulk.among(said)
    base = "l.base_remote::text" if database.vendor == "postgresql" else "l.base_remote"
    with database.cursor() as cursor:
        cursor.execute(
            "SELECT l.remote_id, l.customer_id, CASE WHEN l.deleted_at IS NULL AND l.run_id IS NULL"
            " AND l.next_attempt_at IS NULL AND l.state = 'open' AND l.error = '' AND l.attempts = 0"
            " AND l.pushed_version = l.needed_version AND l.pushed_version = c.version AND c.merged_into_id IS NULL"
            f" AND l.base_local = l.base_remote THEN {base} END"
            " FROM connectors_customerlink l JOIN customers_customer c ON c.id = l.customer_id"
            f" WHERE l.connection_id = %s AND l.remote_id IN ({ids.sql})",
            [connection.pk, *ids.params],
        )
        found = cursor.fetchall()
    same, owners = set(), {}
    for remote_id, customer_id, base in found:
        values = said[remote_id]
        if base is not None and values is not None and _says(orjson.loads(base), values):
            same.add(remote_id)
        else:
            owners[remote_id] = customer_id if isinstance(customer_id, UUID) else UUID(customer_id)
    return same, owners


def _says(base: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a link's base holds all of these values."""
    if "custom_fields" not in values:
        return values.items() <= base.items()
    fields = base.get("custom_fields", {})
    rest = {name: value for name, value in values.items() if name != "custom_fields"}
    return rest.items() <= base.items() and all(
        name in fields and jsontext.dumps(fields[name]) == jsontext.dumps(value)
        for name, value in values["custom_fields"].items()
    )


def _told(link: CustomerLink) -> tuple[object, ...]:
    """All that a record moves on a link but when it did, as it is stored: to a database 1 and true are not equal.

    Of a system that only calls the hub nobody asks when it last said what it had said before, for the hub never reads
    from it: there a link that was told nothing new is not written.
    """
    documents = (link.remote_data, link.base_local, link.base_remote, link.conflicts)
    return (
        *(jsontext.dumps(document, option=jsontext.SORT_KEYS) for document in documents),
        *(link.customer_id, link.remote_revision, link.remote_created_at, link.deleted_at),
        *(link.pushed_version, link.needed_version, link.next_attempt_at),
        *(link.state, link.error, link.error_field, link.attempts),
    )


def _key(record: Record, position: int) -> Any:
    if record.customer_id:
        return ("customer", record.customer_id)
    if record.link_id:
        return ("link", record.link_id)
    if record.remote_id is not None:
        return ("remote", record.remote_id)
    return ("new", position)


def _fold(earlier: Record, later: Record) -> Record:
    return Record(
        values={**earlier.values, **later.values},
        document={**earlier.document, **later.document},
        remote_id=later.remote_id,
        link_id=later.link_id,
        customer_id=later.customer_id,
        created_at=later.created_at or earlier.created_at,
        revision=later.revision or earlier.revision,
        deleted=later.deleted,
    )


def _named(connection: Connection, records: Sequence[Record]) -> dict[Any, tuple[int, UUID]]:
    """The links that the records name, by record key: their ids and those of their customers."""
    remote_ids = {record.remote_id for record in records if record.remote_id is not None}
    link_ids = {record.link_id for record in records if record.link_id}
    found: dict[Any, tuple[int, UUID]] = {}
    if remote_ids:
        there = _BY_REMOTE_ID(at=connection.pk, ids=remote_ids)
        found |= {("remote", remote_id): (pk, customer_id) for pk, remote_id, customer_id in there}
    if link_ids:
        there = _BY_KEY(at=connection.pk, ids=link_ids)
        found |= {("link", pk): (pk, customer_id) for pk, _, customer_id in there}
        if any(("link", link_id) not in found for link_id in link_ids):
            raise UnknownCustomer([])
    return found


_AT = Param("at", models.BigAutoField())
_NAMED = ("pk", "remote_id", "customer_id")
_BY_REMOTE_ID = Prepared(
    lambda: CustomerLink.objects.filter(Among("remote_id", "ids", models.CharField()), connection_id=_AT).values_list(
        *_NAMED
    )
)
_BY_KEY = Prepared(
    lambda: CustomerLink.objects.filter(Among("id", "ids", models.BigAutoField()), connection_id=_AT).values_list(
        *_NAMED
    )
)
_LINKED = Prepared(
    lambda: CustomerLink.objects.filter(customer_id=Param("customer", models.UUIDField())).values_list("pk")[:1]
)
_LOCKED_LINKS = Prepared(
    lambda: CustomerLink.objects.filter(Among("id", "ids", models.BigAutoField())).order_by("pk").select_for_update()
)


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in values.items()}


def _links_mould(connection: Connection, at: datetime) -> bulk.Mould[CustomerLink]:
    return bulk.Mould(
        CustomerLink, connection=connection, sync_seq=1, is_primary=True, synced_at=at, created_at=at, updated_at=at
    )


def _new_links(
    mould: bulk.Mould[CustomerLink], records: Iterable[Record], customers: Sequence[Customer]
) -> list[CustomerLink]:
    links = []
    for record, customer, uid in zip(records, customers, uuid7s(len(customers)), strict=True):
        base, here = _json(record.values), vars(customer)
        values = {
            "uid": uid,
            "customer_id": customer.pk,
            "remote_id": record.remote_id,
            "remote_data": dict(record.document),
            "base_local": {name: here[name] for name in base},
            "base_remote": base,
            "remote_revision": record.revision,
            "remote_created_at": record.created_at,
            "pushed_version": customer.version,
            "needed_version": customer.version,
        }
        links.append(mould.make(values, customer=customer))
    return links


def _take(
    link: CustomerLink,
    record: Record,
    customer: Customer,
    merged: Merge | None,
    pushed_fields: frozenset[str] | None,
    at: datetime,
) -> None:
    """Move the link to what has just been received. It stays dirty only where the hub sends to this system
    (`pushed_fields`) and the customer still differs from what was last sent.
    """
    was_dirty, was_gone = link.is_dirty, link.deleted_at is not None or link.state == LinkState.REMOTE_DELETED
    link.customer_id = customer.pk
    link.remote_data = {**link.remote_data, **record.document}
    behind = False
    if merged is None:
        link.base_local = {**link.base_local, **{name: getattr(customer, name) for name in record.values}}
        link.base_remote = {**link.base_remote, **_json(record.values)}
    else:
        moved = was_dirty or was_gone or merged.take or merged.conflicts or merged.base_local != link.base_local
        link.base_local, link.base_remote, link.conflicts = merged.base_local, merged.base_remote, merged.waiting
        if pushed_fields and not link.is_duplicate and moved:
            asked = pushed_fields - link.conflicts.keys()
            behind = any(not same(getattr(customer, name), link.base_local.get(name)) for name in asked)
    link.remote_revision = record.revision or link.remote_revision
    link.remote_created_at = record.created_at or link.remote_created_at
    link.sync_seq += 1
    link.synced_at = link.updated_at = at
    link.deleted_at = None
    if not behind:
        link.pushed_version = link.needed_version = customer.version
        link.next_attempt_at = None
        link.state, link.error, link.error_field, link.attempts = LinkState.OPEN, "", "", 0
        return
    link.needed_version = customer.version
    # Also where the customer did not move: a field that had no base, and that the hub wins.
    link.pushed_version = min(link.pushed_version, customer.version - 1)
    if was_gone:
        link.state, link.error, link.error_field, link.next_attempt_at = LinkState.OPEN, "", "", at
    elif link.state == LinkState.OPEN:
        link.next_attempt_at = link.next_attempt_at or at
