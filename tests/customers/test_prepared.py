"""A query whose SQL is built once gives what the queryset gives, each time anew."""

from __future__ import annotations

from uuid import UUID

import pytest
from django.db import IntegrityError, connection, models, transaction
from django.db.models import Value
from django.db.models.functions import Upper
from django.db.transaction import TransactionManagementError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customers import editing
from customers.editing import Actor
from customers.ids import uuid7
from customers.models import Customer, CustomerChange, Organization
from customers.prepared import Among, Param, Prepared, PreparedUpdate

pytestmark = pytest.mark.django_db
OF = Param("organization", models.BigAutoField())
NAMES = ["Ada", "Béla", "Çelik", "d'Arc", 'E"va', "100%", "Ada"]


def named() -> models.QuerySet[Customer]:
    return Customer.objects.filter(Among("name", "names", models.CharField()), organization_id=OF)


OBJECTS = Prepared(lambda: named().select_related("organization").annotate(loud=Upper("name")).order_by("pk"))
TUPLES = Prepared(lambda: named().order_by("pk").values_list("name", "pk", "created_at", "custom_fields"))
BY_ID = Prepared(lambda: Customer.objects.filter(Among("pk", "ids", models.UUIDField())).order_by("pk"))
LOCKED = Prepared(lambda: named().select_for_update())
MOVED = PreparedUpdate(lambda: (CustomerChange.objects.filter(version=Param("version", models.IntegerField())), TO))
TO = {"message": Param("message", models.CharField()), "version": models.F("version") + 1}


@pytest.fixture
def customers(organization: Organization) -> list[Customer]:
    values = [{"name": name, "custom_fields": {"n": [position, None, "ü"]}} for position, name in enumerate(NAMES)]
    return editing.create(organization=organization, values=values, actor=Actor(kind="command", name="test"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from([*NAMES, "nobody", ""]), max_size=5))
def test_it_finds_what_the_queryset_finds(
    customers: list[Customer], organization: Organization, names: list[str]
) -> None:
    asked = {"organization": organization.pk, "names": names}
    rows = Customer.objects.filter(name__in=names, organization=organization).order_by("pk")
    assert TUPLES(**asked) == [*rows.values_list("name", "pk", "created_at", "custom_fields")]
    found = OBJECTS(**asked)
    assert [vars(one) | {"_state": None} for one in found] == [
        vars(one) | {"_state": None} for one in rows.select_related("organization").annotate(loud=Upper("name"))
    ]
    assert all(one.organization == organization and not one._state.adding for one in found)
    assert TUPLES(organization=organization.pk + 1, names=names) == []


def test_ids_are_found_as_both_databases_keep_them(customers: list[Customer]) -> None:
    ids: list[UUID] = [customer.pk for customer in customers[::2]]
    assert [customer.pk for customer in BY_ID(ids=[*ids, uuid7()])] == sorted(ids)
    assert BY_ID(ids=[]) == []


def test_a_lock_is_taken_in_a_transaction_only(customers: list[Customer], organization: Organization) -> None:
    asked = {"organization": organization.pk, "names": ["Ada"]}
    with transaction.atomic():
        assert len(LOCKED(**asked)) == 2


@pytest.mark.django_db(transaction=True)
def test_a_lock_outside_a_transaction_is_a_mistake(organization: Organization) -> None:
    for _ in range(2):
        with transaction.atomic():
            LOCKED(organization=organization.pk, names=["Ada"])
        with pytest.raises(TransactionManagementError):
            LOCKED(organization=organization.pk, names=["Ada"])


def test_an_update_takes_values_and_tells_how_many(customers: list[Customer]) -> None:
    assert MOVED(version=1, message="moved") == len(customers)
    assert MOVED(version=1, message="again") == 0
    assert set(CustomerChange.objects.values_list("version", "message")) == {(2, "moved")}


def test_a_fault_is_told_as_django_tells_it(customers: list[Customer], organization: Organization) -> None:
    def same() -> tuple[models.QuerySet[Customer], dict[str, object]]:
        return Customer.objects.all(), {"id": Param("id", models.UUIDField())}

    with pytest.raises(IntegrityError), transaction.atomic():
        PreparedUpdate(same)(id=customers[0].pk)


@pytest.mark.parametrize(("allowed", "by_key"), [(True, True), (False, True), (True, False)])
def test_the_server_keeps_what_is_looked_up_by_a_key_where_it_may(
    customers: list[Customer],
    organization: Organization,
    monkeypatch: pytest.MonkeyPatch,
    allowed: bool,
    by_key: bool,
) -> None:
    mark = f"kept_{allowed}_{by_key}".lower()
    own = Customer.objects.filter(organization_id=OF, pk=Param("id", models.UUIDField()))
    asked = Prepared(lambda: own.annotate(**{mark: Value(1)}).values_list("name", mark), by_key=by_key)
    if connection.vendor == "postgresql":
        connection.ensure_connection()
        monkeypatch.setattr(connection.connection, "prepare_threshold", 0 if allowed else None)
    for customer in customers:
        assert asked(organization=organization.pk, id=customer.pk) == [(customer.name, 1)]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE %s", [f"%{mark}%"])
            assert cursor.fetchone() == (int(allowed and by_key),)
