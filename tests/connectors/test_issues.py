"""One open issue per connection, kind and cause, however often and from wherever it is reported."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Barrier, Thread

import pytest
from django.db import connection as database
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext

from connectors.models import Connection, Issue
from connectors.sync.issues import Trouble, open_issue, open_issues, resolve

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
LOGIN, POISON = Issue.Kind.LOGIN, Issue.Kind.POISON


@pytest.fixture
def books(connect: Callable[..., Connection]) -> Connection:
    return connect("links")


def test_the_second_time_is_counted_on_the_first(books: Connection) -> None:
    assert open_issue(connection=books, kind=LOGIN, message="Ended.", at=NOW)
    assert not open_issue(connection=books, kind=LOGIN, message="Ended again.", details={"status": 401}, at=LATER)
    issue = Issue.objects.get()
    assert (issue.connection, issue.organization, issue.kind) == (books, books.organization, LOGIN)
    assert (issue.message, issue.details, issue.count) == ("Ended again.", {"status": 401}, 2)
    assert (issue.first_at, issue.last_at, issue.resolved_at) == (NOW, LATER, None)
    assert not open_issue(connection=books, kind=LOGIN, message="Late news.", at=NOW)
    assert Issue.objects.get().last_at == LATER


def test_each_connection_kind_and_cause_has_its_own(books: Connection, connect: Callable[..., Connection]) -> None:
    other = connect("links", name="other", account="2")
    for chosen in (books, other):
        for kind in (LOGIN, POISON):
            for fingerprint in ("", "a", "b"):
                assert open_issue(connection=chosen, kind=kind, fingerprint=fingerprint, message="x", at=NOW)
    assert Issue.objects.count() == 12


def test_a_resolved_issue_is_opened_anew(books: Connection) -> None:
    open_issue(connection=books, kind=LOGIN, message="Ended.", at=NOW)
    assert resolve(connection=books, kind=LOGIN, at=LATER) == 1
    assert resolve(connection=books, kind=LOGIN, at=LATER) == 0
    assert open_issue(connection=books, kind=LOGIN, message="Ended.", at=LATER)
    assert sorted(Issue.objects.values_list("count", "resolved_at"), key=str) == [(1, None), (1, LATER)]


def test_one_cause_or_all_of_a_kind_are_resolved(books: Connection, connect: Callable[..., Connection]) -> None:
    other = connect("links", name="other", account="2")
    for fingerprint in ("a", "b", "c"):
        open_issue(connection=books, kind=POISON, fingerprint=fingerprint, message="x", at=NOW)
        open_issue(connection=other, kind=POISON, fingerprint=fingerprint, message="x", at=NOW)
    open_issue(connection=books, kind=LOGIN, message="x", at=NOW)
    assert resolve(connection=books, kind=POISON, fingerprint="b", at=LATER) == 1
    assert resolve(connection=books, kind=POISON, fingerprint="", at=LATER) == 0
    assert resolve(connection=books, kind=POISON, at=LATER) == 2
    assert Issue.objects.filter(resolved_at=None).count() == 4


def test_long_texts_are_cut_and_long_causes_stay_apart(books: Connection) -> None:
    for end in ("a", "b"):
        open_issue(connection=books, kind=POISON, fingerprint="x" * 300 + end, message="é" * 600, at=NOW)
    assert sorted(len(issue.message) for issue in Issue.objects.all()) == [500, 500]
    assert not open_issue(connection=books, kind=POISON, fingerprint="x" * 300 + "a", message="", at=NOW)
    assert resolve(connection=books, kind=POISON, fingerprint="x" * 300 + "a", at=NOW) == 1


def troubles(*fingerprints: str) -> list[Trouble]:
    return [Trouble(kind=POISON, fingerprint=name, message=f"m {name}", details={"n": name}) for name in fingerprints]


def test_a_batch_counts_what_it_repeats(books: Connection) -> None:
    open_issue(connection=books, kind=POISON, fingerprint="a", message="old", at=NOW)
    # The same fingerprint of another kind is another cause.
    open_issue(connection=books, kind=LOGIN, fingerprint="b", message="old", at=NOW)
    batch = [*troubles("b", "a", "b"), Trouble(kind=LOGIN, message="c")]
    assert open_issues(connection=books, troubles=batch, at=LATER) == 2
    found = {(i.kind, i.fingerprint): (i.count, i.message, i.last_at) for i in Issue.objects.all()}
    assert found == {
        (POISON, "a"): (2, "m a", LATER),
        (POISON, "b"): (2, "m b", LATER),
        (LOGIN, "b"): (1, "old", NOW),
        (LOGIN, ""): (1, "c", LATER),
    }
    assert open_issues(connection=books, troubles=[], at=LATER) == 0


def test_the_number_of_statements_is_the_same_for_any_number(books: Connection) -> None:
    def count(*fingerprints: str) -> int:
        with CaptureQueriesContext(database) as queries:
            open_issues(connection=books, troubles=troubles(*fingerprints), at=NOW)
        return len(queries)

    names = [f"{number:03}" for number in range(150)]
    count("one")
    few = count("one", "two")
    many = count(*names, "one")
    assert few == many
    assert count(*names) <= few
    assert Issue.objects.count() == 152


@pytest.mark.django_db(transaction=True)
def test_workers_that_report_at_once_share_one_issue(connect: Callable[..., Connection]) -> None:
    chosen = connect("links")
    start = Barrier(8)
    opened: list[int] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        names = ["a", "b", "c"] if number % 2 else ["c", "b", "a"]
        try:
            start.wait(30)
            for _ in range(5):
                with transaction.atomic():  # as the engine does: with the links that it is about
                    opened.append(open_issues(connection=chosen, troubles=troubles(*names), at=NOW))
        except BaseException as error:
            failures.append(error)
        finally:
            connections.close_all()

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(opened) == 3
    assert sorted(Issue.objects.values_list("fingerprint", "count")) == [("a", 40), ("b", 40), ("c", 40)]
