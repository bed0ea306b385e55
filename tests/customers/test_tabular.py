"""What is written to a file and read again is the same; what cannot be read is told by row and field."""

import datetime
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from customers import tabular
from customers.editing import FLAGS, LENGTHS, TEXTS
from customers.ids import uuid7
from customers.models import Customer
from customers.normalize import clean_text
from customers.tabular import Row, UnreadableTable, column_named, open_table

NASTY = st.sampled_from(
    [
        *("=1+1", "'=1+1", "''@x", "+49 30 123", "-1", "@home", "a\tb", "a,b;c", 'say "x"', "l1\nl2", "l1\r\nl2", "'"),
        *("#N/A", "true", "1.10", "01234", "1e5", "ＡＢ", "\u2028", "\ufeffx", "json:1", "_x000D_", "\uffff"),
    ]
)
# The hub stores no NUL.
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
TEXT = (st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | NASTY).map(clean_text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(ANY) | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CUSTOMERS = st.fixed_dictionaries(
    {},
    optional={
        **{name: TEXT.map(lambda text, cut=LENGTHS[name]: clean_text(text[:cut])) for name in TEXTS},
        **{name: st.booleans() for name in FLAGS},
        "custom_fields": st.dictionaries(st.text(ANY, max_size=5), JSON, max_size=3),
    },
)


def write(path: Path, customers: Sequence[Customer], *, raw: bool = False) -> None:
    names = sorted({name for customer in customers for name in customer.custom_fields})
    columns = tabular.columns_for(custom=names, external_id=False)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as text:
            _write(tabular.CsvWriter(text), customers, columns, raw)
    else:
        with path.open("wb") as file:
            _write(tabular.XlsxWriter(file), customers, columns, raw)


def _write(
    writer: tabular.CsvWriter | tabular.XlsxWriter, customers: Sequence[Customer], columns: list[str], raw: bool
) -> None:
    writer.write(columns)
    for customer in customers:
        writer.write(tabular.cells_of(customer, columns, raw=raw))
    writer.close()


def read(path: Path, **options: Any) -> list[Row]:
    with open_table(path, **options) as table:
        return list(table.rows)


def csv_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "customers.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
@pytest.mark.parametrize("raw", [False, True])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(CUSTOMERS, min_size=1, max_size=4))
@example(rows=[{"phone": "+1 202-555-0100", "name": "'=x", "custom_fields": {"_x000D_": "a\rb\x01", "": ""}}])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, raw: bool, rows: list[Mapping[str, Any]]) -> None:
    customers = [Customer(id=uuid7(), **row) for row in rows]
    path = tmp_path / f"customers{suffix}"
    write(path, customers, raw=raw)
    found = read(path, raw=raw)
    assert [row.customer_id for row in found] == [customer.id for customer in customers]
    for row, customer in zip(found, customers, strict=True):
        # A name that is empty is no problem of the file's: it says nothing.
        assert not row.problems
        filled = {name: getattr(customer, name) for name in (*TEXTS, *FLAGS)}
        assert row.values == {name: value for name, value in filled.items() if value != ""}
        assert row.custom == customer.custom_fields


def test_no_cell_of_a_protected_file_is_calculated(tmp_path: Path) -> None:
    customer = Customer(
        id=uuid7(),
        name="=HYPERLINK(1)",
        email="@home",
        phone="+49 30 123",
        address_line1="-2",
        custom_fields={"x": "\t=1", "y": "\r=1"},
    )
    for suffix in (".csv", ".xlsx"):
        write(tmp_path / f"c{suffix}", [customer])
    text = (tmp_path / "c.csv").read_bytes().decode()
    assert "'=HYPERLINK(1),,,'@home,'+49 30 123,'-2" in text
    cells = [cell.value for row in openpyxl.load_workbook(tmp_path / "c.xlsx").active for cell in row]
    assert not [cell for cell in cells if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_exactly_one_apostrophe_is_taken_away(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "name,phone\n'=1,'+49 30\n''=1,+49 30\n'n Example,'\n")
    assert [(row.values["name"], row.values["phone"]) for row in read(path)] == [
        ("=1", "+49 30"),
        ("'=1", "+49 30"),
        ("'n Example", "'"),
    ]
    assert read(path, raw=True)[0].values["name"] == "'=1"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_separator_mark_and_line_ends_are_found_out(tmp_path: Path, separator: str, start: str, line_end: str) -> None:
    lines = ['"Name","E-Mail"', '"A, B; C","a@example.com"']
    text = line_end.join(line.replace('","', f'"{separator}"') for line in lines)
    assert [row.values for row in read(csv_file(tmp_path, start + text))] == [
        {"name": "A, B; C", "email": "a@example.com"}
    ]


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("E-Mail", "email"),
        (" First Name ", "first_name"),
        ("zip", "address_postal_code"),
        ("Postal Code", "address_postal_code"),
        ("addressPostalCode", "address_postal_code"),
        ("Shipping ZIP", "shipping_address_postal_code"),
        ("SHIPPING_ADDRESS_LINE1", "shipping_address_line1"),
        ("Company", "name"),
        ("External-ID", "external_id"),
        ("Custom.Tier ", "custom.Tier "),
        ("version", ""),
        ("_", ""),
    ],
)
def test_a_header_may_be_spelled_as_people_do(header: str, column: str) -> None:
    assert column_named(header) == column


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,nam\nA,B\n", "Unknown columns: 'nam'"),
        ("email\na@example.com\n", "no column name"),
        ("name,company\nA,B\n", "More than one column means name"),
        ("", "is empty"),
        ("name\nA\n".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04rest", "ends in .xlsx"),
        (",".join(["name"] * 1001), "at most 1000"),
        ('name\n"A\nB\n', "line 3"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UnreadableTable, match=message):
        read(csv_file(tmp_path, text))


def test_unknown_columns_can_be_left_out(tmp_path: Path) -> None:
    with open_table(csv_file(tmp_path, "name,nam,email\nA,B,c\n"), ignore_unknown=True) as table:
        assert table.columns == ["name", "email"]
        assert table.ignored == ["nam"]
        assert [row.values for row in table.rows] == [{"name": "A", "email": "c"}]


@pytest.mark.parametrize(
    ("cells", "field", "message"),
    [
        ({"id": "cust_1"}, "id", "no customer's id"),
        ({"external_id": "x" * 256}, "external_id", "at most 255"),
        ({"name": "x" * 256}, "name", "at most 255"),
        ({"name": "a\x01b"}, "name", "control characters"),
        ({"is_active": "perhaps"}, "is_active", "true or false"),
        ({"custom.a": "json:{"}, "custom.a", "not valid JSON"),
        ({"custom.a": 'json:"\\u0000"'}, "custom.a", "NUL"),
        ({"custom.a": "a\x00"}, "custom.a", "control characters"),
        ({"name": "M\udcfcller"}, "name", "not UTF-8"),
    ],
)
def test_a_wrong_cell_is_told_by_row_and_field(tmp_path: Path, cells: dict[str, str], field: str, message: str) -> None:
    row = {"name": "Example", **cells}
    text = (
        ",".join(row)
        + "\n"
        + "Good"
        + "," * (len(row) - 1)
        + "\n"
        + ",".join(f'"{c.replace(chr(34), chr(34) * 2)}"' for c in row.values())
    )
    good, bad = read(csv_file(tmp_path, text.encode(errors="surrogateescape")))
    assert not good.problems
    [problem] = bad.problems
    assert (problem.row, problem.field) == (3, field)
    assert message in problem.message


def test_a_cell_without_a_column_is_told(tmp_path: Path) -> None:
    wrong, right, short = read(csv_file(tmp_path, "name,email,\nA,a@example.com,x\nB,,\nC\n"))
    assert "no column" in wrong.problems[0].message
    assert not right.problems
    assert short.empty == {"email"}


def test_blank_lines_count_as_rows_of_the_sheet_only(tmp_path: Path) -> None:
    assert [row.number for row in read(csv_file(tmp_path, "name\nA\n\n\nB\n"))] == [2, 5]


def test_numbers_dates_truths_and_errors_of_a_spreadsheet(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["name", "external_id", "is_active", "custom.since", "custom.rate", "phone"])
    sheet.append(["A", 1089.0, True, datetime.datetime(2026, 1, 31), 1.5, 12025550100])
    sheet.append(["#N/A", 2, False, None, None, None])
    book.save(tmp_path / "c.xlsx")
    good, bad = read(tmp_path / "c.xlsx")
    assert good.external_id == "1089"
    assert good.values == {"name": "A", "is_active": True, "phone": "12025550100"}
    assert good.custom == {"since": "2026-01-31", "rate": "1.5"}
    assert "#N/A" in bad.problems[0].message


def test_no_formula_is_evaluated(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["name", "email"])
    book.active.append(["A", '="a"&"@example.com"'])
    book.save(tmp_path / "c.xlsx")
    assert [row.values for row in read(tmp_path / "c.xlsx")] == [{"name": "A"}]


def test_what_is_no_spreadsheet_or_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.xlsx"
    path.write_bytes(b"name\nA\n")
    with pytest.raises(UnreadableTable, match="not an XLSX"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"")
    with pytest.raises(UnreadableTable, match="not an XLSX"):
        read(path)
    write(path, [Customer(id=uuid7(), name="A")])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableTable, match="not an XLSX"):
        read(path)
    path.write_bytes(whole)
    monkeypatch.setattr(tabular, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(UnreadableTable, match="too much"):
        read(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UnreadableTable, match=path.name):
            read(path)


def test_a_text_too_long_for_a_cell_is_not_cut() -> None:
    writer = tabular.XlsxWriter(io.BytesIO())
    with pytest.raises(ValueError, match="--format csv"):
        writer.write(["x" * 32_768])
    writer.close()


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "name\n" + "Example\n" * 200_000)
    with open_table(path) as table:
        next(table.rows)
        assert 0 < table.done() < table.size / 10
