"""Each command: what it does, what it says where, and the code it ends with."""

import csv
import io
import json
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import transaction
from django.utils import timezone
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from connectors.guard import close_shared_client
from connectors.management import cli
from connectors.management.commands import serve as serving
from connectors.models import ApiKey, Connection, CustomerLink, PushIntent, SyncRun
from connectors.sync.request import request
from customers import editing
from customers.editing import Actor
from customers.models import Customer, Organization
from customers.privacy import HIDDEN
from tests.customers.test_tabular import CUSTOMERS

ACTOR = Actor(kind="user", name="Tester")
TOTALS = list(SyncRun.TOTALS)


class Result:
    """The code, stdout and stderr of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def totals(self) -> dict[str, int]:
        """The totals of the only connection, without zeros."""
        found = self.objects[0]
        assert sum(found["totals"].values()) == found["planned"]
        assert list(found["totals"]) == TOTALS
        return {name: count for name, count in found["totals"].items() if count}


def run(*arguments: Any) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        call_command(*map(str, arguments), stdout=out, stderr=err)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except CommandError as error:
        code = error.returncode
        err.write(str(error))
    return Result(code, out.getvalue(), err.getvalue())


class FakeLinks:
    """Links over a real socket. What a customer is called tells what becomes of it."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, Any]] = {}
        self.writes = 0
        self.status = 0  # answered to everything, unless 0
        self.later = 0  # so many more writes are asked to wait
        self.on_write: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            if self.status:
                return self.status, {"message": "No."}
            if method == "GET" and (known := self.stored.get(path.rpartition("/")[2])):
                return 200, {"data": known}
            if method == "GET":
                rows = list(self.stored.values())
                return 200, {"data": rows, "page": 1, "limit": 100, "totalPages": 1, "totalResults": len(rows)}
            self.writes += 1
            self.on_write()
            if self.later:
                self.later -= 1
                return 429, {"message": "Busy."}
            if body["name"].startswith("Refused"):
                return 400, {"message": "Name is not nice."}
            id_ = path.rpartition("/")[2] if method == "PUT" else f"cust_{len(self.stored) + 1}"
            self.stored[id_] = {**self.stored.get(id_, {}), **body, "id": id_}
            return (200 if method == "PUT" else 201), {"data": self.stored[id_]}


@pytest.fixture
def links(settings: Any) -> Iterator[FakeLinks]:
    settings.ALLOWED_PRIVATE_NETWORKS = ["127.0.0.0/8"]
    fake = FakeLinks()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            status, answer = fake.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_one  # noqa: N815 # the names that the base class asks for

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    yield fake
    close_shared_client()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def books(connect: Callable[..., Connection], links: FakeLinks) -> Connection:
    return connect(
        "links",
        name="books",
        direction=Connection.Direction.PUSH_AND_PULL,
        base_url=links.url,  # type: ignore[attr-defined]
        credentials={"api_key": "k"},
    )


def some(organization: Organization, *names: str) -> list[Customer]:
    values = [{"name": name, "email": "" if "Nomail" in name else "someone@example.com"} for name in names]
    return editing.create(organization=organization, values=values, actor=ACTOR)


# push_customers


def test_push_sends_everybody_and_adds_up(organization: Organization, books: Connection, links: FakeLinks) -> None:
    some(organization, "Example 1", "Example 2", "Example 3")
    first = run("push_customers", "books", "--json")
    assert (first.code, first.totals) == (0, {"created": 3})
    assert first.objects[-1] == {
        "connections": 1,
        "planned": 3,
        "totals": {**dict.fromkeys(TOTALS, 0), "created": 3},
        "exit_code": 0,
    }
    assert len(links.stored) == 3
    pushed = SyncRun.objects.get(public_id=first.objects[0]["run"])
    assert (pushed.state, pushed.actor_kind, pushed.actor_name) == ("succeeded", "command", "push_customers")
    again = run("push_customers", "books", "--json")
    assert (again.code, again.totals, links.writes) == (0, {"unchanged": 3}, 3)


def test_push_prints_a_table_on_stdout_and_nothing_else(organization: Organization, books: Connection) -> None:
    some(organization, "Example 1", "Nomail 1", "Nomail 2")
    found = run("push_customers", "books")
    assert found.code == 3
    header, row, reason = found.out.splitlines()
    assert header.split() == [*TOTALS, "total"]
    assert row.split() == ["books", "push", "1", "0", "0", "2", "0", "0", "0", "3"]
    assert reason == "refused: 2 x email: Links needs an e-mail address. Enter one, such as name@example.com."
    assert found.err == ""


def test_one_bad_record_never_stops_the_rest(organization: Organization, books: Connection, links: FakeLinks) -> None:
    some(organization, "Refused 1", "Example 1", "Nomail 1", "Example 2")
    found = run("push_customers", "books", "--json")
    assert (found.code, found.totals) == (3, {"created": 2, "refused": 2})
    assert {(p["state"], p["field"], p["count"]) for p in found.objects[0]["problems"]} == {
        ("refused", "email", 1),
        ("refused", "", 1),
    }


def test_a_dry_run_of_push_tells_what_would_be_and_writes_nothing(
    organization: Organization, books: Connection, links: FakeLinks
) -> None:
    known, _ = some(organization, "Example 1", "Example 2")
    run("push_customers", "books")
    editing.update(organization=organization, values={known.pk: {"phone": "+1 202-555-0100"}}, actor=ACTOR)
    some(organization, "Example 3", "Nomail 1")
    writes, runs, linked = links.writes, SyncRun.objects.count(), CustomerLink.objects.count()
    found = run("push_customers", "books", "--dry-run", "--json")
    assert (found.code, found.totals) == (3, {"created": 1, "updated": 1, "unchanged": 1, "refused": 1})
    assert found.objects[0]["samples"] == [
        "would update Example 1: phone '' -> '+1 202-555-0100'",
        "would create Example 3",
    ]
    assert (links.writes, SyncRun.objects.count(), CustomerLink.objects.count()) == (writes, runs, linked)
    assert run("push_customers", "books", "--dry-run").out.startswith("would be")
    done = run("push_customers", "books", "--json")
    assert (done.code, done.totals) == (found.code, found.totals)


def test_a_dry_run_shows_at_most_five_samples_of_a_kind(organization: Organization, books: Connection) -> None:
    some(organization, *(f"Example {n}" for n in range(9)))
    found = run("push_customers", "books", "--dry-run", "--json")
    assert (found.totals, len(found.objects[0]["samples"])) == ({"created": 9}, 5)


def test_push_honours_since_and_limit(organization: Organization, books: Connection, links: FakeLinks) -> None:
    old = some(organization, "Example 1", "Example 2")
    Customer.objects.filter(pk=old[0].pk).update(updated_at=timezone.now() - timedelta(days=3))
    some(organization, "Example 3", "Example 4")
    assert run("push_customers", "books", "--since=1d", "--dry-run", "--json").totals == {"created": 3}
    assert run("push_customers", "books", "--limit=1", "--dry-run", "--json").totals == {"created": 1}
    assert run("push_customers", "books", "--limit=1", "--json").totals == {"created": 1}
    assert len(links.stored) == 1
    rest = run("push_customers", "books", "--since=1d", "--json").totals
    assert rest in ({"created": 3}, {"created": 2, "unchanged": 1})


def test_push_waits_for_a_near_retry(organization: Organization, books: Connection, links: FakeLinks) -> None:
    some(organization, "Example 1")
    links.later = 1
    found = run("push_customers", "books", "--json")
    assert (found.code, found.totals, links.writes) == (0, {"created": 1}, 2)


def test_what_cannot_be_sent_within_the_wait_is_retrying(
    organization: Organization, books: Connection, links: FakeLinks
) -> None:
    some(organization, "Example 1", "Example 2")
    links.later = 100
    found = run("push_customers", "books", "--wait=0", "--json")
    assert (found.code, found.totals) == (3, {"retrying": 2})
    assert "2 are still to be sent" in found.err
    links.later = 0
    assert run("push_customers", "books", "--json").totals == {"created": 2}


def test_a_refused_login_ends_push_with_5_and_says_so(
    organization: Organization, books: Connection, links: FakeLinks
) -> None:
    some(organization, "Example 1", "Example 2")
    links.status = 401
    found = run("push_customers", "books", "--json")
    assert (found.code, found.totals) == (5, {"skipped": 2})
    assert "does not accept the credentials" in found.objects[0]["error"]
    assert "books: " in found.err
    links.status = 0
    assert run("push_customers", "books").code == 5  # somebody has to repair the connection first
    assert links.writes == 0
    assert run("push_customers", "--all").code == 5


def test_credentials_that_cannot_be_opened_end_push_with_5(organization: Organization, books: Connection) -> None:
    some(organization, "Example 1")
    Connection.objects.update(credentials="v1:00000000:AAAA")
    found = run("push_customers", "books")
    assert found.code == 5
    assert "SEALING_KEYS" in found.err
    assert not CustomerLink.objects.exists()


def test_a_stop_lets_what_is_sent_finish_and_counts_the_rest(
    organization: Organization, books: Connection, links: FakeLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectors.sync.push.CLAIM_ROWS", 10)
    some(organization, *(f"Example {n}" for n in range(30)))
    links.on_write = lambda: signal.raise_signal(signal.SIGINT) if links.writes == 1 else None
    found = run("push_customers", "books", "--json")
    assert found.code == 130
    created = found.totals["created"]
    assert 1 <= created <= 10
    assert created == links.writes
    assert found.totals == {"created": created, "skipped": 30 - created}
    assert "Finishing the calls already sent" in found.err
    assert not PushIntent.objects.exclude(outcome__in=("ok", "failed")).exists()
    links.on_write = lambda: None
    rest = run("push_customers", "books", "--json").totals
    assert rest == {"created": 30 - created, "unchanged": created}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_connection_is_tried_and_the_worst_code_wins(
    organization: Organization,
    books: Connection,
    connect: Callable[..., Connection],
    links: FakeLinks,
) -> None:
    some(organization, "Example 1")
    broken = connect(
        "links", name="aaa", account="2", direction="push", base_url="http://127.0.0.1:9/", credentials={"api_key": "k"}
    )
    Connection.objects.filter(pk=broken.pk).update(state="needs_reauth", state_reason="The key has ended.")
    connect("links", name="rests", account="3", direction="push", state=Connection.State.PAUSED)
    connect("commenda", name="inbound")
    found = run("push_customers", "--all", "--json")
    assert found.code == 5
    assert [(o["connection"], o["exit_code"]) for o in found.objects[:-1]] == [("aaa", 5), ("books", 0)]
    assert "rests is paused" in found.err
    assert found.objects[-1]["totals"]["created"] == 1


def test_a_fault_at_one_connection_spares_the_others(
    organization: Organization, books: Connection, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    some(organization, "Example 1")
    connect("links", name="aaa", account="2", direction="push")
    Connection.objects.filter(name="aaa").update(base_url="http://\\")
    found = run("push_customers", "aaa", "books", "--json", "--wait=0")
    assert [o["connection"] for o in found.objects[:-1]] == ["aaa", "books"]
    assert found.objects[1]["totals"]["created"] == 1
    assert found.code == found.objects[0]["exit_code"] == 5


@pytest.mark.parametrize("command", ["push_customers", "pull_customers", "sync_customers"])
def test_wrong_use_is_told_at_once_and_ends_with_2(
    command: str,
    organization: Organization,
    other_organization: Organization,
    books: Connection,
    connect: Callable[..., Connection],
) -> None:
    connect("links", name="books", organization=other_organization, direction="push_and_pull")
    connect("commenda", name="inbound")
    connect("file", name="import", account="import")
    for arguments, words in (
        ([], ["--all"]),
        (["books", "--all"], ["--all"]),
        (["books"], ["demo, other", "--organization"]),
        (["nope", "books", "--organization=demo"], ["'nope'", "Known connections: books, import, inbound"]),
        (["nope", "books"], ["'nope'", "demo, other"]),
        (["books", "--organization=nope"], ["'nope'", "demo, other"]),
        (["inbound"], ["It calls the hub"]),
        (["import"], ["'file'"]),
    ):
        found = run(command, *arguments)
        assert found.code == 2, arguments
        assert all(word in found.err for word in words), found.err
        assert found.out == ""
    with pytest.raises(CommandError, match="neither a time"):
        call_command(command, "books", "--since=yesterday")
    with pytest.raises(CommandError, match="above 0"):
        call_command(command, "books", "--limit=0")


def test_wrong_flags_end_the_process_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    from connectors.management.commands.push_customers import Command

    with pytest.raises(SystemExit) as ended:
        Command().run_from_argv(["manage.py", "push_customers", "--since=yesterday"])
    assert ended.value.code == 2
    assert "neither a time" in capsys.readouterr().err


# pull_customers, sync_customers


def test_pull_takes_over_what_is_there(organization: Organization, books: Connection, links: FakeLinks) -> None:
    links.stored = {f"c{n}": {"id": f"c{n}", "name": f"Example {n}", "email": f"{n}@example.com"} for n in range(3)}
    links.stored["bad"] = {"id": "bad", "name": "Example", "email": "not one"}
    dry = run("pull_customers", "books", "--dry-run", "--json")
    assert (dry.code, dry.totals) == (3, {"created": 3, "refused": 1})
    assert not Customer.objects.exists()
    found = run("pull_customers", "books", "--json")
    assert (found.code, found.totals) == (3, {"created": 3, "refused": 1})
    assert found.objects[0]["problems"][0]["state"] == "refused"
    del links.stored["bad"]
    again = run("pull_customers", "books", "--json")
    assert (again.code, again.totals) == (0, {"unchanged": 3})
    assert Customer.objects.filter(organization=organization).count() == 3
    assert run("pull_customers", "books", "--limit=2", "--json").totals == {"unchanged": 2}


def test_a_pull_that_is_already_running_ends_with_4(organization: Organization, books: Connection) -> None:
    Connection.objects.update(pull_token="somebody", pull_until=timezone.now() + timedelta(minutes=1))
    found = run("pull_customers", "books", "--json")
    assert (found.code, found.objects[0]["exit_code"]) == (4, 4)
    assert "already running" in found.err


@pytest.mark.parametrize(("status", "code"), [(401, 5), (500, 5), (503, 5), (422, 1)])
def test_a_list_that_cannot_be_read_ends_with_an_error(
    organization: Organization, books: Connection, links: FakeLinks, status: int, code: int
) -> None:
    links.status = status
    found = run("pull_customers", "books")
    assert found.code == code
    assert "books: " in found.err


def test_sync_reads_first_and_sends_then(organization: Organization, books: Connection, links: FakeLinks) -> None:
    links.stored = {"c1": {"id": "c1", "name": "There", "email": "there@example.com"}}
    some(organization, "Example 1", "Nomail 1")
    dry = run("sync_customers", "books", "--dry-run")
    assert (dry.code, links.writes) == (3, 0)
    found = run("sync_customers", "books", "--json")
    pulled, pushed, final = found.objects
    assert (pulled["operation"], pulled["totals"]["created"]) == ("pull", 1)
    assert (pushed["operation"], pushed["totals"]["created"], pushed["totals"]["refused"]) == ("push", 1, 1)
    assert pushed["totals"]["unchanged"] == 1  # what was just read is not sent back
    assert final["planned"] == 4
    assert found.code == 3


def test_sync_does_what_a_connection_can(organization: Organization, books: Connection) -> None:
    some(organization, "Example 1")
    Connection.objects.update(direction=Connection.Direction.PUSH)
    assert [o["operation"] for o in run("sync_customers", "books", "--json").objects[:-1]] == ["push"]
    assert run("pull_customers", "books").code == 2
    Connection.objects.update(direction=Connection.Direction.PULL)
    assert [o["operation"] for o in run("sync_customers", "--all", "--json").objects[:-1]] == ["pull"]
    assert run("push_customers", "books").code == 2
    nobody = run("push_customers", "--all")
    assert (nobody.code, nobody.out) == (0, "")


# import_customers


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "customers.csv"
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write


def take_in(path: Path, *arguments: Any) -> Result:
    return run("import_customers", path, "--organization=demo", *arguments)


def test_importing_a_file_twice_changes_nothing(organization: Organization, file: Callable[[str], Path]) -> None:
    path = file("external_id,name,phone,notify_email,custom.tier\n1,A,'+49 30 123,yes,gold\n2,B,,no,\n")
    first = take_in(path, "--json")
    assert (first.code, first.totals) == (0, {"created": 2})
    again = take_in(path, "--json")
    assert (again.code, again.totals) == (0, {"unchanged": 2})
    customer = Customer.objects.get(name="A")
    assert (customer.phone, customer.notify_email, customer.custom_fields) == ("+49 30 123", True, {"tier": "gold"})
    made = Connection.objects.get()
    assert (made.provider, made.name, made.account, made.direction) == ("file", "import", "import", "calls_us")
    kept = SyncRun.objects.get(public_id=first.objects[0]["run"])
    assert (kept.kind, kept.planned, kept.total, kept.state) == ("import", 2, 2, "succeeded")


def test_a_dry_run_of_an_import_stores_nothing(organization: Organization, file: Callable[[str], Path]) -> None:
    path = file("external_id,name,email\n1,A,a@example.com\n2,B,nope\n")
    found = take_in(path, "--dry-run", "--json")
    assert (found.code, found.totals) == (3, {"created": 1, "refused": 1})
    for model in (Customer, Connection, CustomerLink, SyncRun):
        assert not model.objects.exists()
    take_in(path)
    assert take_in(path, "--dry-run", "--json").totals == {"unchanged": 1, "refused": 1}
    assert take_in(path, "--dry-run").out.startswith("would be")


def test_a_wrong_row_is_told_and_spares_the_rest(
    organization: Organization, other_organization: Organization, file: Callable[[str], Path], tmp_path: Path
) -> None:
    [foreign] = editing.create(organization=other_organization, values=[{"name": "Foreign"}], actor=ACTOR)
    [own] = editing.create(organization=organization, values=[{"name": "Own"}], actor=ACTOR)
    lines = [
        "id,external_id,name,email,is_active",
        ",1,Good,good@example.com,",
        f"{foreign.public_id},,Stolen,,",
        "cust_00000000000000000000000000,,Unknown,,",
        ",2,,none@example.com,",
        ",3,Bad mail,nope,",
        ",4,Bad flag,,perhaps",
        f"{own.public_id},99,Own,,",
        f"{own.public_id},,Own renamed,,",
    ]
    found = take_in(file("\n".join(lines)), "--json", f"--errors={tmp_path / 'errors.csv'}")
    assert (found.code, found.totals) == (3, {"created": 1, "updated": 1, "refused": 6})
    errors = list(csv.DictReader(io.StringIO((tmp_path / "errors.csv").read_text())))
    assert sorted((error["row"], error["field"]) for error in errors) == [
        *(("3", "id"), ("4", "id"), ("5", "name"), ("6", "email"), ("7", "is_active"), ("8", "external_id"))
    ]
    assert "demo has no such customer" in errors[0]["message"]
    assert errors[0]["message"] == errors[1]["message"]
    assert "row 6: email: This is not an e-mail address" in found.err
    foreign.refresh_from_db()
    own.refresh_from_db()
    assert (foreign.name, own.name) == ("Foreign", "Own renamed")
    assert len(SyncRun.objects.get().problems) == 6


def test_only_the_first_errors_are_shown(
    organization: Organization, file: Callable[[str], Path], tmp_path: Path
) -> None:
    path = file("name,email\n" + "A,nope\n" * 150)
    found = take_in(path)
    assert found.err.count("not an e-mail address") == 20
    assert "130 more errors; --errors FILE writes all" in found.err
    assert "refused: 150 x email" in found.out
    assert len(SyncRun.objects.get().problems) == 100
    take_in(path, f"--errors={tmp_path / 'all.csv'}")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 151


def test_an_empty_cell_keeps_what_is_known_unless_it_clears(
    organization: Organization, file: Callable[[str], Path]
) -> None:
    take_in(file("external_id,name,email,notify_email,custom.tier,custom.vip\n1,A,a@example.com,yes,gold,json:true\n"))
    path = file("external_id,name,email,notify_email,custom.tier\n1,B,,,\n")
    assert take_in(path, "--json").totals == {"updated": 1}
    customer = Customer.objects.get()
    assert (customer.name, customer.email, customer.notify_email) == ("B", "a@example.com", True)
    assert customer.custom_fields == {"tier": "gold", "vip": True}
    assert take_in(path, "--clear-empty", "--json").totals == {"updated": 1}
    customer.refresh_from_db()
    assert (customer.email, customer.notify_email, customer.custom_fields) == ("", False, {"vip": True})


def test_rows_of_one_key_count_as_one_after_the_other(organization: Organization, file: Callable[[str], Path]) -> None:
    found = take_in(file("external_id,name,custom.a,custom.b\n1,A,x,\n2,B,,\n1,C,,y\n1,C,,\n"), "--json")
    assert found.totals == {"created": 2, "updated": 1, "unchanged": 1}
    assert Customer.objects.get(name="C").custom_fields == {"a": "x", "b": "y"}


def test_rows_without_any_id_are_new_each_time_and_linked_to_nothing(
    organization: Organization, file: Callable[[str], Path]
) -> None:
    path = file("external_id,company\n,A\n,A\n")
    assert take_in(path, "--json").totals == {"created": 2}
    assert take_in(path, "--json").totals == {"created": 2}
    assert not CustomerLink.objects.exists()


def test_a_row_for_a_system_that_the_hub_sends_to_is_an_edit_that_is_still_to_be_sent(
    organization: Organization, books: Connection, file: Callable[[str], Path], links: FakeLinks
) -> None:
    some(organization, "Example 1")
    run("push_customers", "books")
    found = take_in(file("external_id,name\ncust_1,Renamed\ncust_9,Known there\n"), "--connection=books", "--json")
    assert found.totals == {"updated": 1, "created": 1}
    assert {link.remote_id: link.is_dirty for link in CustomerLink.objects.all()} == {"cust_1": True, "cust_9": False}
    run("push_customers", "books")
    assert links.stored["cust_1"]["name"] == "Renamed"


def test_an_id_of_a_merged_customer_leads_to_its_survivor(
    organization: Organization, file: Callable[[str], Path]
) -> None:
    gone, stays = some(organization, "Gone", "Stays")
    Customer.objects.filter(pk=gone.pk).update(merged_into=stays)
    assert take_in(file(f"id,phone\n{gone.public_id},123\n"), "--json").totals == {"updated": 1}
    stays.refresh_from_db()
    assert stays.phone == "123"


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("name,nam\nA,B\n", [], "'nam'"),
        ("email\na@example.com\n", [], "no column name"),
        ("name\nA\n", ["--connection=nope"], "'nope'"),
        ("name\nA\n", ["--errors=/nowhere/at/all.csv"], "cannot be written"),
    ],
)
def test_wrong_use_of_import_ends_with_2(
    organization: Organization, file: Callable[[str], Path], text: str, arguments: list[str], words: str
) -> None:
    found = take_in(file(text), *arguments)
    assert (found.code, found.out) == (2, "")
    assert words in found.err
    assert run("import_customers", "nowhere.csv", "--organization=demo").code == 2
    assert run("import_customers", "nowhere.csv", "--organization=nope").code == 2
    assert not SyncRun.objects.exists()


def test_a_file_that_breaks_off_keeps_the_rows_before_and_ends_with_1(
    organization: Organization, file: Callable[[str], Path]
) -> None:
    found = take_in(file('name\nA\nB\n"C\n'), "--json")
    assert (found.code, found.totals) == (1, {"created": 2})
    assert "line 4" in found.err
    assert SyncRun.objects.get().state == "failed"


def test_import_reads_so_many_rows_and_unknown_columns_can_be_left_out(
    organization: Organization, file: Callable[[str], Path]
) -> None:
    found = take_in(file("name,nam\nA,\nB,\nC,\n"), "--ignore-unknown", "--limit=2", "--json")
    assert found.totals == {"created": 2}
    assert "Left out: nam." in found.err


def test_an_import_costs_the_same_statements_for_every_full_chunk(
    organization: Organization, file: Callable[[str], Path], django_assert_max_num_queries: Any
) -> None:
    path = file("external_id,name\n" + "".join(f"{n},Example {n}\n" for n in range(2000)))
    with django_assert_max_num_queries(60) as queries:
        assert take_in(path, "--json").totals == {"created": 2000}
    before = len(queries)
    with django_assert_max_num_queries(before):
        assert take_in(path, "--json").totals == {"unchanged": 2000}


# export_customers


def test_export_writes_data_to_stdout_and_words_to_stderr(organization: Organization, books: Connection) -> None:
    some(organization, "Example 1")
    run("push_customers", "books")
    some(organization, "Ärger, =1")
    found = run("export_customers", "--organization=demo", "--connection=books")
    rows = list(csv.DictReader(io.StringIO(found.out)))
    assert [(row["name"], row["external_id"]) for row in rows] == [("Example 1", "cust_1"), ("Ärger, =1", "")]
    assert found.err.strip() == "2 customers written."
    assert found.code == 0


def test_export_leaves_out_the_archived_the_merged_and_other_organizations(
    organization: Organization, other_organization: Organization
) -> None:
    stays, archived, merged = some(organization, "Stays", "Archived", "Merged")
    some(other_organization, "Foreign")
    editing.archive(organization=organization, ids=[archived.pk], actor=ACTOR)
    Customer.objects.filter(pk=merged.pk).update(merged_into=stays)

    def names(*arguments: str) -> list[str]:
        out = run("export_customers", "--organization=demo", *arguments).out
        return [row["name"] for row in csv.DictReader(io.StringIO(out))]

    assert names() == ["Stays"]
    assert sorted(names("--include-archived")) == ["Archived", "Stays"]
    assert len(names("--include-archived", "--limit=1")) == 1
    Customer.objects.filter(pk=stays.pk).update(updated_at=timezone.now() - timedelta(days=3))
    assert names("--include-archived", "--since=1d") == ["Archived"]


def test_export_pages_through_everything(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.sync.exporting.PAGE_ROWS", 3)
    some(organization, *(f"Example {n}" for n in range(10)))
    out = run("export_customers", "--organization=demo").out
    assert sorted(row["name"] for row in csv.DictReader(io.StringIO(out))) == [f"Example {n}" for n in range(10)]


def test_export_reports_as_json_beside_a_file(organization: Organization, tmp_path: Path) -> None:
    some(organization, "Example 1")
    for name, kind in (("c.csv", "csv"), ("c.XLSX", "xlsx")):
        found = run("export_customers", "--organization=demo", f"--output={tmp_path / name}", "--json")
        assert (found.code, found.objects[0]["rows"], found.objects[0]["format"]) == (0, 1, kind)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["c.XLSX", "c.csv"]
    raw = run("export_customers", "--organization=demo", "--raw")
    assert "do not open this as a spreadsheet" in raw.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--organization=nope"],
        ["--organization=demo", "--connection=nope"],
        ["--organization=demo", "--json"],
        ["--organization=demo", "--output=/nowhere/at/all.csv"],
        ["--organization=demo", "--format=xlsx"],
    ],
)
def test_wrong_use_of_export_ends_with_2(organization: Organization, arguments: list[str]) -> None:
    found = run("export_customers", *arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err


def test_an_export_that_fails_leaves_no_file(organization: Organization, tmp_path: Path) -> None:
    editing.create(organization=organization, values=[{"name": "A", "custom_fields": {"x": "y" * 40_000}}], actor=ACTOR)
    found = run("export_customers", "--organization=demo", f"--output={tmp_path / 'c.xlsx'}")
    assert found.code == 1
    assert "--format csv" in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["csv", "xlsx"])
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What shows the mask is refused: it may come from an export without the right to personal data.
@given(rows=st.lists(CUSTOMERS.filter(lambda row: HIDDEN not in str(row)), min_size=1, max_size=5))
def test_an_export_brings_back_what_was_lost_since_and_changes_nothing_else(
    organization: Organization, tmp_path: Path, suffix: str, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / f"c.{suffix}"
    with transaction.atomic():
        # A name is needed, and an ill-formed address is not taken a second time.
        values = [{**row, "name": row.get("name") or "Example", "email": "=1@example.com"} for row in rows]
        customers = editing.create(organization=organization, values=values, actor=ACTOR)
        before = list(Customer.objects.order_by("pk").values(*editing.EDITABLE))
        assert run("export_customers", "--organization=demo", f"--output={path}").code == 0
        assert take_in(path, "--json").totals == {"unchanged": len(rows)}
        assert take_in(path, "--clear-empty", "--json").totals == {"unchanged": len(rows)}
        blank = {**dict.fromkeys(editing.TEXTS, ""), **dict.fromkeys(editing.FLAGS, False), "name": "Spoilt"}
        editing.update(
            organization=organization,
            values={customer.pk: {**blank, "custom_fields": {}} for customer in customers},
            actor=ACTOR,
        )
        assert take_in(path, "--json").totals == {"updated": len(rows)}
        assert list(Customer.objects.order_by("pk").values(*editing.EDITABLE)) == before
        transaction.set_rollback(True)


def test_an_ill_formed_address_that_is_stored_may_stay(organization: Organization, tmp_path: Path) -> None:
    [customer] = editing.create(organization=organization, values=[{"name": "A", "email": "nobody"}], actor=ACTOR)
    run("export_customers", "--organization=demo", f"--output={tmp_path / 'c.csv'}")
    assert take_in(tmp_path / "c.csv", "--json").totals == {"unchanged": 1}
    editing.update(organization=organization, values={customer.pk: {"email": ""}}, actor=ACTOR)
    assert take_in(tmp_path / "c.csv", "--json").totals == {"refused": 1}


# create_api_key


def test_a_key_stands_alone_on_stdout_and_works(organization: Organization) -> None:
    found = run("create_api_key", "demo", "--name=shop", "--scope=customers:read", "--expires-in=90")
    key = ApiKey.find(found.out.removesuffix("\n"), now=timezone.now())
    assert key is not None
    assert (key.organization, key.name, key.scopes) == (organization, "shop", ["customers:read"])
    assert key.expires_at is not None
    assert 89 < (key.expires_at - timezone.now()).total_seconds() / 86400 <= 90
    assert found.out.strip() not in found.err
    assert ApiKey.objects.get(pk=key.pk).scopes == ["customers:read"]
    everything = ApiKey.find(run("create_api_key", "demo", "--name=x").out.strip(), now=timezone.now())
    assert everything is not None
    assert everything.scopes == list(ApiKey.SCOPES)


def test_wrong_use_of_create_api_key_ends_with_2(organization: Organization) -> None:
    found = run("create_api_key", "nope", "--name=shop")
    assert (found.code, found.out) == (2, "")
    assert "Known organizations: demo" in found.err
    assert run("create_api_key", "demo", "--name= ").code == 2
    assert run("create_api_key", "no slug", "--name=x", "--create-organization").code == 2
    assert not ApiKey.objects.exists()
    assert run("create_api_key", "fresh", "--name=x", "--create-organization").code == 0
    assert Organization.objects.filter(slug="fresh").exists()


# run_worker, serve


@pytest.mark.django_db(transaction=True)
def test_a_worker_run_once_sends_what_is_due(organization: Organization, books: Connection, links: FakeLinks) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    some(organization, "Example 1", "Example 2")
    request(connection=books, actor=ACTOR)
    found = run("run_worker", "--once", "--threads=2")
    assert (found.code, found.out, len(links.stored)) == (0, "", 2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.django_db(transaction=True)
def test_a_worker_stops_when_asked(organization: Organization, books: Connection, links: FakeLinks) -> None:
    some(organization, "Example 1")
    request(connection=books, actor=ACTOR)
    links.on_write = lambda: signal.raise_signal(signal.SIGTERM)
    found = run("run_worker")
    assert found.code == 0
    assert CustomerLink.objects.get().remote_id == "cust_1"


def test_serve_says_when_the_port_is_taken(links: FakeLinks) -> None:
    taken = links.url.rpartition(":")[2]  # type: ignore[attr-defined]
    found = run("serve", f"--port={taken}")
    assert found.code == 2
    assert f"Port {taken} of 127.0.0.1 cannot be used" in found.err
    assert f"--port {int(taken) + 1}" in found.err


def test_an_address_to_reach_the_server_at() -> None:
    assert serving.url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert serving.url_of("::1", 80) == "http://[::1]:80"


# What they share


def test_the_worst_code_wins() -> None:
    Exit = cli.Exit  # noqa: N806 # a class
    assert cli.worst([]) is Exit.DONE
    assert cli.worst([Exit.ATTENTION, Exit.DONE]) is Exit.ATTENTION
    assert cli.worst([Exit.UNUSABLE, Exit.RUNNING, Exit.ATTENTION]) is Exit.UNUSABLE
    assert cli.worst([Exit.FAILED, Exit.UNUSABLE]) is Exit.FAILED
    assert cli.worst([Exit.FAILED, Exit.STOPPED]) is Exit.STOPPED


def test_a_moment_is_a_time_a_date_or_how_long_ago() -> None:
    now = timezone.now()
    assert abs(now - timedelta(hours=2) - cli.moment("2h")) < timedelta(seconds=5)
    assert cli.moment("2026-01-31").isoformat() == "2026-01-31T00:00:00+00:00"
    assert cli.moment("2026-01-31T12:00:00+02:00").isoformat() == "2026-01-31T12:00:00+02:00"


def test_progress_elsewhere_than_on_a_terminal_is_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    seconds = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: seconds[0])
    with cli.Progress(cli.HubCommand(stderr=err), "books push", 200) as progress:  # type: ignore[arg-type]
        for done in range(25):
            seconds[0] = done
            progress.update(done, {"created": done, "refused": 0})
    assert err.getvalue().splitlines() == ["books push: 5% created 10", "books push: 10% created 20"]


@pytest.mark.parametrize(
    "command", ["push_customers", "pull_customers", "sync_customers", "import_customers", "export_customers", "serve"]
)
def test_help_begins_with_what_it_does_and_examples_and_tells_the_codes(command: str) -> None:
    from django.core.management import load_command_class

    text = load_command_class("connectors", command).create_parser("manage.py", command).format_help()
    assert text.index("examples:") < text.index("options:")
    assert "code" in text
    assert f"manage.py {command}" in text
