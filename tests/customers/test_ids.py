"""Ids sort by their making, inside and outside."""

from uuid import UUID

import pytest

from customers.ids import parse_public_id, public_id, uuid7


def test_ids_are_version_7_and_sort_in_the_order_of_their_making() -> None:
    made = [uuid7() for _ in range(5000)]
    assert made == sorted(made)
    assert len(set(made)) == 5000
    assert {(uid.version, uid.variant) for uid in made} == {(7, "specified in RFC 4122")}
    shown = [public_id("cust", uid) for uid in made]
    assert shown == sorted(shown)


def test_the_time_in_an_id_is_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    future = 4_000_000_000_000
    monkeypatch.setattr("customers.ids.time.time_ns", lambda: future * 1_000_000)
    monkeypatch.setattr("customers.ids._last", 0)
    assert uuid7().int >> 80 == future


def test_a_public_id_reads_back_in_any_case() -> None:
    uid = uuid7()
    assert parse_public_id("cust", public_id("cust", uid)) == uid
    assert parse_public_id("cust", "cust_" + public_id("cust", uid)[5:].lower()) == uid
    assert parse_public_id("cust", str(uid)) == uid


@pytest.mark.parametrize(
    "text",
    ["", "cust_", "cust_12345", "cust_" + "U" * 26, "cust_" + "Z" * 26, "run_" + "0" * 26, "x", "\x00", "é" * 31],
)
def test_what_is_no_id_is_none(text: str) -> None:
    assert parse_public_id("cust", text) is None


def test_the_smallest_and_largest_id_fit() -> None:
    for uid in (UUID(int=0), UUID(int=2**128 - 1)):
        assert parse_public_id("cust", public_id("cust", uid)) == uid
