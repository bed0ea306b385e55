"""When a connection is pulled next, also where clocks are set forward and back; and whose clock that is."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connection as database
from django.db import transaction
from django.utils import timezone
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from connectors.models import Connection
from connectors.sync import clock
from connectors.sync.clock import database_clock
from connectors.sync.schedule import next_pull, problems_of_cron

# Skipped hours, repeated half hours and two hours at once, days that begin at one, a half-hour offset.
ZONES = (
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Antarctica/Troll",
    "Asia/Beirut",
    "America/Santiago",
    "Asia/Kolkata",
)


def scheduled(cron: str = "", interval: int | None = None) -> Connection:
    return Connection(pk=1, pull_cron=cron, pull_interval=interval)


def times(cron: str, after: datetime, number: int) -> list[datetime]:
    found = []
    for _ in range(number):
        following = next_pull(scheduled(cron), after=after)
        assert following is not None
        after = following
        found.append(after)
    return found


def test_the_schedule_comes_before_the_interval() -> None:
    now = datetime(2026, 11, 20, 12, 0, 30, tzinfo=UTC)
    assert next_pull(scheduled(), after=now) is None
    assert next_pull(scheduled(interval=90), after=now) == now + timedelta(seconds=90)
    assert next_pull(scheduled("30 2 * * 0", 90), after=now) == datetime(2026, 11, 22, 2, 30, tzinfo=UTC)


def test_a_time_that_has_just_come_is_not_the_next() -> None:
    at = datetime(2026, 11, 22, 2, 30, tzinfo=UTC)
    assert next_pull(scheduled("30 2 * * 0"), after=at) == at + timedelta(days=7)
    assert next_pull(scheduled("30 2 * * 0"), after=at - timedelta(microseconds=1)) == at


@pytest.mark.parametrize("cron", ["* * * * * *", "@daily", "nonsense", "61 * * * *"])
def test_a_schedule_that_cannot_be_read_counts_as_none(cron: str, caplog: pytest.LogCaptureFixture) -> None:
    now = timezone.now()
    assert next_pull(scheduled(cron), after=now) is None
    assert next_pull(scheduled(cron, 60), after=now) == now + timedelta(seconds=60)
    assert "cannot be read" in caplog.text


def test_a_schedule_is_read_on_the_clocks_of_the_place(settings: Any) -> None:
    settings.TIME_ZONE = "Europe/Berlin"
    spring = times("30 2 * * *", datetime(2026, 3, 27, 12, tzinfo=UTC), 3)
    # 02:30 does not exist on the 29th: it comes when the clocks have been set forward.
    assert [f"{at:%d %H:%M}" for at in spring] == ["28 01:30", "29 01:00", "30 00:30"]
    autumn = times("30 2 * * *", datetime(2026, 10, 24, 12, tzinfo=UTC), 2)
    # 02:30 comes twice on the 25th: the second does not count.
    assert [f"{at:%d %H:%M}" for at in autumn] == ["25 00:30", "26 01:30"]
    between = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)
    assert times("30 2 * * *", between, 1) == [datetime(2026, 10, 26, 1, 30, tzinfo=UTC)]


def test_a_schedule_with_an_open_hour_goes_by_the_time_that_passes(settings: Any) -> None:
    settings.TIME_ZONE = "Europe/Berlin"
    for begin in (datetime(2026, 3, 28, 23, tzinfo=UTC), datetime(2026, 10, 24, 22, tzinfo=UTC)):
        found = times("*/20 * * * *", begin, 18)
        assert found == [begin + timedelta(minutes=20 * n) for n in range(1, 19)]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("cron", ["0 0 * * *", "15 1 * * *", "30 2 * * *", "59 23 * * *"])
def test_a_daily_schedule_comes_once_a_day(settings: Any, zone: str, cron: str) -> None:
    settings.TIME_ZONE = zone
    begin = datetime(2026, 1, 1, 12, tzinfo=UTC)
    days = Counter(at.astimezone(ZoneInfo(zone)).date() for at in times(cron, begin, 400))
    first: date = min(days)
    assert days == Counter(first + timedelta(days=n) for n in range(400))


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    zone=st.sampled_from(ZONES),
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    after=st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2034, 1, 1), timezones=st.just(UTC)),
)
def test_the_next_time_shows_the_hour_asked_for_or_ends_a_skipped_one(
    settings: Any, zone: str, minute: int, hour: int, after: datetime
) -> None:
    settings.TIME_ZONE = zone
    [at] = times(f"{minute} {hour} * * *", after, 1)
    shown = at.astimezone(ZoneInfo(zone))
    assert after < at <= after + timedelta(hours=49)
    before = (at - timedelta(minutes=1)).astimezone(ZoneInfo(zone))
    skipped = shown.utcoffset() != before.utcoffset()
    assert (shown.hour, shown.minute) == (hour, minute) or skipped


@pytest.mark.parametrize("cron", ["30 2 * * 0", "*/5 * * * *", "* * * * *", "0 0 29 2 *", "0 9-17 * * mon-fri"])
def test_what_can_be_used_has_no_problem(cron: str) -> None:
    assert problems_of_cron(cron) == ""


@pytest.mark.parametrize(
    ("cron", "remedy"),
    [
        ("", "Write five parts"),
        ("@daily", "Write five parts"),
        ("0 2 * *", "Write five parts"),
        ("* * * * * *", "Leave out the seconds"),
        ("0 0 1 1 * 0 2020", "Leave out the seconds"),
        ("0 0 30 2 *", "Choose days that there are"),
        ("0 0 31 2,4,6 *", "Choose days that there are"),
        ("H 2 * * *", "Write out when"),
        ("R(0-30) 2 * * *", "Write out when"),
        ("61 2 * * *", "write five parts"),
        ("*/0 * * * *", "write five parts"),
        ("2 Uhr jeden Tag !", "write five parts"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said_with_the_remedy(cron: str, remedy: str) -> None:
    sentence = problems_of_cron(cron)
    assert remedy in sentence
    assert sentence.endswith(".")


@hypothesis_settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="0123456789*/,-#?LlWHhRr @abcdejnmonfri\x00٣ ", max_size=40))
def test_whatever_is_typed_is_either_usable_or_explained(text: str) -> None:
    problem = problems_of_cron(text)
    following = next_pull(scheduled(text), after=timezone.now())
    assert bool(problem) == (following is None)


# The database's clock


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_reading", None)


@pytest.mark.django_db
def test_the_clock_is_right_and_never_in_a_hurry() -> None:
    before = timezone.now()
    assert abs(database_clock() - before) < timedelta(seconds=1)
    assert database_clock().tzinfo is not None


postgresql = pytest.mark.skipif(database.vendor != "postgresql", reason="SQLite has no clock but the machine's")


@postgresql
@pytest.mark.django_db
def test_the_database_is_asked_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Callable[..., Any]
) -> None:
    passed = [0.0]
    shifted = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], time=lambda: time.time() + passed[0])
    monkeypatch.setattr(clock, "time", shifted)
    with django_assert_num_queries(1):
        first = database_clock()
        passed[0] = 59.0
        assert timedelta(seconds=58) < database_clock() - first < timedelta(seconds=62)
    passed[0] = 61.0
    with django_assert_num_queries(1):
        database_clock()


@postgresql
@pytest.mark.django_db
def test_the_machines_own_clock_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Callable[..., Any]
) -> None:
    right = timezone.now()
    database_clock()
    # Set back by an hour: whether the machine slept as well is not known, so the database is asked again.
    shifted = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() - 3600)
    monkeypatch.setattr(clock, "time", shifted)
    with django_assert_num_queries(1):
        assert abs(database_clock() - right) < timedelta(seconds=2)
        assert abs(database_clock() - right) < timedelta(seconds=2)


@postgresql
@pytest.mark.django_db
def test_a_failed_transaction_does_not_stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    known = database_clock()
    monkeypatch.setattr(clock, "ASK_EVERY", 0.0)
    with transaction.atomic():
        transaction.set_rollback(True)
        assert timedelta(0) <= database_clock() - known < timedelta(seconds=1)


@postgresql
@pytest.mark.django_db(transaction=True)
def test_threads_that_only_ask_for_the_time_keep_no_connection() -> None:
    kept: list[object] = []

    def ask() -> None:
        database_clock()
        kept.append(database.connection)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [None] * 8
