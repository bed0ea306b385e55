"""Customers from and to files in the admin: the preview stores nothing, the worker takes in, the download is safe."""

import csv
import io
from datetime import timedelta
from typing import Any

import openpyxl
import pytest
from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.utils import timezone

from connectors.models import Connection, ImportFile, SyncRun
from connectors.sync import importing
from connectors.worker import batch_slice, close_dead_runs, due_work
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization
from tests.connectors.test_admin import LIST, change, link, new_customer, staff

IMPORT = "/admin/customers/customer/import/"
EXPORT = "/admin/customers/customer/export/csv/"
SEE = "customers.view_personal_data"
RIGHTS = ("customers.view_customer", "customers.import_customer", "customers.export_customer", SEE)


def upload(client: Client, organization: Organization, text: str, name: str = "new.csv", **more: Any) -> Any:
    file = SimpleUploadedFile(name, text.encode())
    return client.post(IMPORT, {"organization": organization.pk, "file": file, **more})


def confirm_url() -> str:
    return f"{IMPORT}{ImportFile.objects.get().uid}/"


def table_of(answer: Any) -> list[list[str]]:
    return list(csv.reader(io.StringIO(b"".join(answer.streaming_content).decode())))


def test_a_file_is_shown_first_and_taken_in_by_the_worker_after(organization: Organization) -> None:
    known = new_customer(organization, phone="+49301234567")
    client = staff(organization, *RIGHTS, "connectors.view_syncrun")
    text = (
        "id,name,email,phone\n"
        f"{known.public_id},Acme Corporation,contact@acme.com,+49309999999\n"
        ",Jane Doe,jane@doe.example,\n,No good,not an address,\n"
        f"{known.public_id},,,\n"
    )
    page = upload(client, organization, text)
    assert page.status_code == 200
    preview = page.context["preview"]
    assert (preview.number, dict(preview.totals)) == (4, {"created": 1, "updated": 1, "unchanged": 1, "refused": 1})
    assert [(problem.row, problem.field) for problem in preview.problems] == [(4, "email")]
    assert "‹+49301234567› → ‹+49309999999›" in page.content.decode()
    # Nothing was stored but the file.
    assert list(Customer.objects.all()) == [known]
    assert CustomerChange.objects.count() == 1
    assert not SyncRun.objects.exists()

    answer = client.post(confirm_url(), {"confirmed": "yes", "message": "from the fair"})
    run = SyncRun.objects.get()
    assert answer["Location"] == change(run)
    assert (run.state, run.planned, run.request["message"]) == ("queued", 4, "from the fair")
    assert Customer.objects.count() == 1
    again = client.post(confirm_url(), {"confirmed": "yes"})
    assert again["Location"] == change(run)

    [due] = due_work(now=timezone.now())
    assert (due.kind, due.pk) == ("batch", run.pk)
    assert batch_slice(run.pk) == 1
    run.refresh_from_db()
    assert (run.created, run.updated, run.unchanged, run.refused, run.total) == (1, 1, 1, 1, run.planned)
    assert run.state == SyncRun.State.PARTLY
    assert not ImportFile.objects.exists()
    jane = Customer.objects.get(email="jane@doe.example")
    assert jane.changes.get().message == "from the fair"
    assert jane.changes.get().actor_kind == "user"
    text = client.get(change(run)).content.decode()
    assert "This is not an e-mail address" in text
    assert batch_slice(run.pk) is None


def test_each_chunk_is_taken_in_once_whoever_dies(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "CHUNK_ROWS", 2)
    client = staff(organization, *RIGHTS)
    upload(client, organization, "name\n" + "".join(f"Customer {n}\n" for n in range(5)))
    client.post(confirm_url(), {"confirmed": "yes"})
    run = SyncRun.objects.get()
    importing.carry_out(run, stop=iter([False, True]).__next__)
    assert Customer.objects.count() == 2
    run.refresh_from_db()
    assert (run.state, run.created, run.request["row"]) == ("running", 2, 3)
    SyncRun.objects.update(updated_at=timezone.now() - timedelta(hours=2))
    assert close_dead_runs(timezone.now()) == 0  # its file is still there: it goes on
    stale = SyncRun.objects.get()
    batch_slice(run.pk)
    assert Customer.objects.count() == 5
    importing.carry_out(stale)  # the worker that was thought dead comes back
    assert Customer.objects.count() == 5
    run.refresh_from_db()
    assert (run.state, run.created, run.planned) == ("succeeded", 5, 5)


def test_a_cancelled_import_takes_no_more_rows(organization: Organization) -> None:
    client = staff(organization, *RIGHTS, "connectors.view_syncrun")
    upload(client, organization, "name\nJane Doe\n")
    client.post(confirm_url(), {"confirmed": "yes"})
    run = SyncRun.objects.get()
    client.post(change(run, "cancel"))
    run.refresh_from_db()
    assert (run.state, run.skipped, run.planned) == ("cancelled", 1, 1)
    assert batch_slice(run.pk) is None
    assert not Customer.objects.exists()


def test_external_ids_change_the_same_customer_the_second_time(organization: Organization) -> None:
    client = staff(organization, *RIGHTS)
    for name in ("Jane", "Jane Doe"):
        upload(client, organization, f"external_id,name\n7,{name}\n")
        client.post(confirm_url(), {"confirmed": "yes"})
        batch_slice(SyncRun.objects.latest("pk").pk)
    assert Customer.objects.get().name == "Jane Doe"


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("", "empty.csv", "The submitted file is empty."),
        ("nonsense\n1\n", "odd.csv", "Unknown columns: &#x27;nonsense&#x27;"),
        ('name\n"open\n', "quotes.csv", "Check the quotation marks"),
        ("PK\x03\x04", "broken.xlsx", "is not an XLSX file"),
        ("name\nJane\n", "program.exe", "ends in .csv or .xlsx"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_and_cannot_be_confirmed(
    organization: Organization, text: str, name: str, told: str
) -> None:
    client = staff(organization, *RIGHTS)
    page = upload(client, organization, text, name)
    assert page.status_code == 200
    assert told in page.content.decode()
    assert "/tmp" not in page.content.decode()
    for file in ImportFile.objects.all():
        client.post(f"{IMPORT}{file.uid}/", {"confirmed": "yes"})
    assert not SyncRun.objects.exists()


def test_too_much_is_refused(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    client = staff(organization, *RIGHTS)
    monkeypatch.setattr(importing, "MAX_FILE_ROWS", 3)
    page = upload(client, organization, "name\na\nb\nc\nd\n")
    assert "more than 3 rows" in page.content.decode()
    assert client.post(confirm_url(), {"confirmed": "yes"}).status_code == 200
    assert not SyncRun.objects.exists()
    monkeypatch.setattr("connectors.admin.tables.MAX_FILE_BYTES", 5)
    assert "larger than 10 MB" in upload(client, organization, "name\nJane\n").content.decode()


def test_a_file_is_its_uploaders_alone_and_forgotten_after_a_day(
    organization: Organization, other_organization: Organization
) -> None:
    client = staff(organization, *RIGHTS)
    upload(client, organization, "name\nJane\n")
    assert staff(organization, *RIGHTS).get(confirm_url()).status_code == 404
    assert staff(None, *RIGHTS).post(confirm_url(), {"confirmed": "yes"}).status_code == 404
    assert "not one of the available choices" in upload(client, other_organization, "name\nX\n").content.decode()
    assert client.get(confirm_url()).status_code == 200
    assert importing.forget_files(timezone.now()) == 0
    assert importing.forget_files(timezone.now() + timedelta(days=1, seconds=1)) == 1
    upload(client, organization, "name\nJane\n")
    upload(client, organization, "name\nJohn\n")
    assert ImportFile.objects.count() == 1
    client.post(confirm_url(), {"discard": "yes"})
    assert not ImportFile.objects.exists()


def test_personal_values_are_masked_in_the_preview(organization: Organization) -> None:
    client = staff(organization, "customers.view_customer", "customers.import_customer")
    page = upload(client, organization, "name,email\nJane,jane@doe.example\n").content.decode()
    assert "j•••@doe.example" in page
    assert "jane@doe.example" not in page


def test_import_and_export_need_their_rights_and_no_get_imports(organization: Organization) -> None:
    client = staff(organization, "customers.view_customer")
    assert client.get(IMPORT).status_code == client.get(EXPORT).status_code == 403
    assert upload(client, organization, "name\nJane\n").status_code == 403
    page = client.get(LIST).content.decode()
    assert IMPORT not in page
    assert EXPORT not in page
    able = staff(organization, *RIGHTS)
    page = able.get(LIST, {"q": "acme"}).content.decode()
    assert IMPORT in page
    assert f"{EXPORT}?q=acme" in page
    assert able.get(IMPORT).status_code == 200
    assert able.post(EXPORT).status_code == 405
    upload(able, organization, "name\nJane\n")
    able.get(confirm_url(), {"confirmed": "yes"})
    assert not SyncRun.objects.exists()
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.latest("pk"))
    assert strict.post(confirm_url(), {"confirmed": "yes"}).status_code == 403


def test_the_download_is_what_the_list_shows_in_safe_cells(
    organization: Organization, other_organization: Organization, connect: Any
) -> None:
    shop = connect("links", name="Shop", direction="push")
    jane = new_customer(organization, name="=Jane", email="jane@doe.example", phone="+49301234567")
    link(jane, shop, remote_id="88")
    acme = new_customer(organization, custom_fields={"tier": "gold", "points": 3})
    new_customer(other_organization, name="Stranger")
    old = new_customer(organization, name="Old", email="old@example.com")
    editing.archive(organization=organization, ids=[old.pk], actor=Actor(kind="command", name="t"))
    client = staff(organization, *RIGHTS)
    header, *rows = table_of(client.get(EXPORT, {"archived": "no"}))
    assert header[:2] == ["id", "name"]
    assert header[-2:] == ["custom.points", "custom.tier"]
    assert {row[0] for row in rows} == {jane.public_id, acme.public_id}
    cells = dict(zip(header, next(row for row in rows if row[0] == jane.public_id), strict=True))
    assert (cells["name"], cells["phone"]) == ("'=Jane", "'+49301234567")
    [_, only] = table_of(client.get(EXPORT, {"q": "contact@acme.com"}))
    assert only[0] == acme.public_id
    header, row = table_of(client.get(EXPORT, {"system": shop.pk}))
    assert header[1] == "external_id"
    assert row[:2] == [jane.public_id, "88"]
    book = client.get("/admin/customers/customer/export/xlsx/", {"archived": "no"})
    sheet = openpyxl.load_workbook(io.BytesIO(b"".join(book.streaming_content))).active
    assert sheet is not None
    assert sheet.max_row == 3
    assert client.get("/admin/customers/customer/export/pdf/").status_code == 404


def test_what_was_downloaded_comes_back_unchanged_unless_it_was_masked(organization: Organization) -> None:
    new_customer(organization, phone="+49301234567", custom_fields={"tier": "gold"}, address_line1="1 Main Street")
    client = staff(organization, *RIGHTS)
    text = b"".join(client.get(EXPORT).streaming_content).decode()
    assert dict(upload(client, organization, text).context["preview"].totals) == {"unchanged": 1}

    masked = staff(organization, *(right for right in RIGHTS if right != SEE))
    text = b"".join(masked.get(EXPORT).streaming_content).decode()
    for hidden in ("contact@acme.com", "301234567", "Main Street", "gold"):
        assert hidden not in text
    assert "Acme Corporation" in text
    preview = upload(masked, organization, text).context["preview"]
    assert dict(preview.totals) == {"refused": 1}
    assert "masked" in preview.problems[0].message


def test_a_download_costs_the_same_queries_for_any_page(
    organization: Organization, django_assert_max_num_queries: Any
) -> None:
    for number in range(30):
        new_customer(organization, email=f"{number}@example.com")
    client = staff(organization, *RIGHTS)
    with django_assert_max_num_queries(16):
        assert len(table_of(client.get(EXPORT))) == 31


def test_an_import_connection_shows_its_page(organization: Organization, admin_client: Client) -> None:
    importing.file_connection(organization, create=True)
    assert admin_client.get(change(Connection.objects.get())).status_code == 200
