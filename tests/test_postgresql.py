"""A connection that the server has ended is replaced before anybody meets it."""

from __future__ import annotations

import psycopg
import pytest
from django.db import connection

from hub.postgresql.base import stands

pytestmark = pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no server")


@pytest.mark.django_db(transaction=True)
def test_connections_that_the_server_has_ended_are_replaced() -> None:
    connection.close()
    held = [connection.pool.getconn() for _ in range(3)]
    ended = [one.info.backend_pid for one in held]
    for one in held:
        connection.pool.putconn(one)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s::int[]) AS pid WHERE pid <> pg_backend_pid()",
            [ended],
        )
    connection.close()
    for _ in range(4):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)
        connection.close()


@pytest.mark.django_db(transaction=True)
def test_a_connection_stands_until_the_server_ends_it() -> None:
    connection.ensure_connection()
    assert stands(connection.connection)
    info = connection.connection.info
    with psycopg.connect(info.dsn, password=info.password or None) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [info.backend_pid])
    assert not stands(connection.connection)
    connection.close()
    connection.ensure_connection()
    assert stands(connection.connection)
