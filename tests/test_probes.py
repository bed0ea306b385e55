"""What load balancers and lost visitors are answered."""

import pytest
from django.db import connection
from django.test import Client


def test_live_asks_nothing_of_the_database() -> None:
    assert Client().get("/livez").json() == {"status": "live"}


@pytest.mark.django_db
def test_ready_needs_every_migration() -> None:
    assert Client().get("/readyz").json() == {"status": "ready"}
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM django_migrations WHERE app = 'connectors'")
    answer = Client().get("/readyz")
    assert answer.status_code == 503
    assert "migrate" in answer.json()["reason"]


def test_the_front_door_leads_to_the_admin() -> None:
    assert Client().get("/")["Location"] == "/admin/"


def test_an_address_that_is_none_answers_json_with_a_request_id() -> None:
    answer = Client().get("/nowhere", headers={"Request-Id": "my-own-request-1"})
    assert (answer.status_code, answer["Request-Id"]) == (404, "my-own-request-1")
    assert "message" in answer.json()
    assert Client().get("/nowhere", headers={"Request-Id": "bad id\n"})["Request-Id"].startswith("req_")
