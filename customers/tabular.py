"""CSV and XLSX rows to customers' values and back; neither direction holds more than one row.

A text that a spreadsheet would take for a formula is written with an apostrophe before it, and exactly that apostrophe
is taken away on reading: what is exported and imported again is the same. Values under `custom.<name>` that are no
plain text are written as `json:` and their JSON, so that reading guesses nothing.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import IO, Any
from uuid import UUID
from xml.etree.ElementTree import ParseError

import openpyxl
import orjson
from openpyxl.cell import WriteOnlyCell
from openpyxl.utils.exceptions import InvalidFileException
from openpyxl.worksheet._read_only import ReadOnlyWorksheet

from customers.editing import EDITABLE, FLAGS, TEXTS, problems
from customers.ids import parse_public_id
from customers.models import Customer
from customers.normalize import has_control_characters

FORMATS = ("csv", "xlsx")
FIELDS = tuple(name for name in EDITABLE if name != "custom_fields")
EXTERNAL_ID_LENGTH = 255
CUSTOM = "custom."
JSON = "json:"

# What a hostile file may make of the reader: a zip that unpacks to more than this is refused unread.
MAX_UNPACKED_BYTES = 1024**3
MAX_SHARED_TEXT_BYTES = 200 * 1024**2
MAX_COLUMNS = 1000
XLSX_CELL_LENGTH = 32_767

_ADDRESS_WORDS: Mapping[str, Sequence[str]] = {
    "line1": ("address", "street", "streetaddress", "line1", "address1"),
    "line2": ("line2", "address2"),
    "city": ("city", "town"),
    "state": ("state", "province", "region"),
    "postal_code": ("postalcode", "postcode", "zip", "zipcode"),
    "country": ("country", "countrycode"),
}
# Other spellings of a column, in letters and digits alone.
_ALIASES = {
    **{word: f"address_{part}" for part, words in _ADDRESS_WORDS.items() for word in words},
    **{f"address{word}": f"address_{part}" for part, words in _ADDRESS_WORDS.items() for word in words},
    **{f"billing{word}": f"address_{part}" for part, words in _ADDRESS_WORDS.items() for word in words},
    **{
        f"{start}{word}": f"shipping_address_{part}"
        for start in ("shipping", "shippingaddress")
        for part, words in _ADDRESS_WORDS.items()
        for word in words
    },
    "mail": "email",
    "emailaddress": "email",
    "phonenumber": "phone",
    "telephone": "phone",
    "tel": "phone",
    "mobile": "phone",
    "company": "name",
    "companyname": "name",
    "customer": "name",
    "customername": "name",
    "displayname": "name",
    "fullname": "name",
    "givenname": "first_name",
    "forename": "first_name",
    "lastname": "last_name",
    "surname": "last_name",
    "familyname": "last_name",
    "active": "is_active",
    "notifybyemail": "notify_email",
    "notifybyphone": "notify_phone",
    "remoteid": "external_id",
}
_COLUMNS = {re.sub(r"\W|_", "", name): name for name in ("id", "external_id", *FIELDS)}

_TRUE = {"true", "yes", "y", "1"}
_FALSE = {"false", "no", "n", "0"}
_FORMULA = re.compile("'*[=+\\-@\t\r\x00]")
_PROTECTED = re.compile("'+[=+\\-@\t\r\x00]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_TEXTS = frozenset(TEXTS)
NO_COLUMN = "A cell has no column. Quote a cell that holds the separator, or name its column."
# Characters that XML cannot hold, and texts that would read as such an escape.
_XML_ESCAPED = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
_XML_ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")


# Longer cells than csv's own 131,072 characters: a customer's custom fields may fill a whole API call.
csv.field_size_limit(1024 * 1024)
# What reading a file that is no XLSX, or a damaged one, raises.
NOT_XLSX = (zipfile.BadZipFile, zlib.error, InvalidFileException, ParseError, KeyError, ValueError, EOFError)


@dataclass(frozen=True)
class _Wrong:
    """A cell whose formula failed: `shown` is #N/A, #REF! and the like."""

    shown: str


Cell = str | _Wrong


class UnreadableTable(Exception):
    """The file as a whole cannot be read. The message names the remedy."""


class UnknownColumns(UnreadableTable):
    """The header names columns that are not known; `columns` are their names."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        super().__init__(
            f"Unknown columns: {', '.join(map(repr, columns))}. Known are id, external_id, {', '.join(FIELDS)} and"
            " custom.<name>. --ignore-unknown leaves the others out."
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a row cannot be taken: `row` counts as a spreadsheet does, the header being row 1."""

    row: int
    field: str
    message: str


@dataclass(kw_only=True, slots=True)
class Row:
    """One row of a file. `values` and `custom` hold the filled cells only; `empty` names the other columns."""

    number: int
    values: Mapping[str, Any]
    custom: Mapping[str, Any] = field(default_factory=dict)
    customer_id: UUID | None = None
    external_id: str | None = None
    empty: frozenset[str] = frozenset()
    problems: Sequence[Problem] = ()


# A row as it stands in the file, by its number.
Line = tuple[int, list[Cell]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Makes rows of the lines of one file: its columns, None for one that is left out and "" for one without a name.

    With `raw`, an apostrophe before a formula is part of the text.
    """

    columns: Sequence[str | None]
    raw: bool

    def row(self, line: Line) -> Row:
        number, cells = line
        return _row(number, cells, self.columns, raw=self.raw)

    def named(self, line: Line) -> tuple[UUID | None, str]:
        """The customer's id and the external id that a line's row will have."""
        id_ = self._text(line, "id")
        return parse_public_id("cust", id_) if id_ else None, self._text(line, "external_id")

    def _text(self, line: Line, column: str) -> str:
        if column not in self.columns or (place := self.columns.index(column)) >= len(line[1]):
            return ""
        cell = line[1][place]
        return "" if isinstance(cell, _Wrong) else _bare(cell, raw=self.raw).strip()


@dataclass(frozen=True, kw_only=True)
class Table:
    """An open file: the columns it has, those left out, and its lines, to be read once, as they are or as `rows`.

    `done` tells how far reading has come, in bytes of `size`; both are 0 where that is not known.
    """

    columns: Sequence[str]
    ignored: Sequence[str]
    lines: Iterator[Line]
    reader: Reader
    size: int = 0
    done: Callable[[], int] = lambda: 0

    @property
    def rows(self) -> Iterator[Row]:
        return map(self.reader.row, self.lines)


@contextmanager
def open_table(path: Path, *, ignore_unknown: bool = False, raw: bool = False) -> Iterator[Table]:
    """Open a CSV or, by its name, XLSX file. Raises UnreadableTable, also while its rows are read."""
    try:
        binary = path.open("rb")
    except FileNotFoundError:
        raise UnreadableTable(f"There is no file {path}.") from None
    except OSError as error:
        raise UnreadableTable(f"{path} cannot be read: {error.strerror}.") from error
    opened = _xlsx_lines if path.suffix.lower() == ".xlsx" else _csv_lines
    with binary, opened(path, binary) as (lines, done):
        header = next(lines, None)
        if header is None:
            raise UnreadableTable(f"{path} is empty. Its first row must name the columns.")
        names = [cell.shown if isinstance(cell, _Wrong) else cell for cell in header]
        columns, ignored = _header(names, ignore_unknown=ignore_unknown)
        yield Table(
            columns=[column for column in columns if column],
            ignored=ignored,
            lines=(line for line in enumerate(lines, start=2) if any(line[1])),
            reader=Reader(columns=columns, raw=raw),
            size=path.stat().st_size if done else 0,
            done=done or (lambda: 0),
        )


@contextmanager
def _csv_lines(path: Path, binary: IO[bytes]) -> Iterator[tuple[Iterator[list[Cell]], Callable[[], int]]]:
    start = binary.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UnreadableTable(f"{path} is UTF-16. Save it as CSV in UTF-8.")
    if start.startswith(b"PK\x03\x04"):
        raise UnreadableTable(f"{path} is not CSV. A spreadsheet needs a name that ends in .xlsx.")
    binary.seek(0)
    first = start.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip("\r\n").splitlines()
    # Bytes that are not UTF-8 become surrogates, so that they spoil their own row alone.
    with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        # Strict: a quotation mark that is never closed would otherwise swallow the rest of the file.
        reader = csv.reader(text, delimiter=_delimiter(first[0] if first else ""), strict=True)
        yield _csv_cells(reader), binary.tell


def _delimiter(header: str) -> str:
    """The separator that the header has most of, quoted texts aside."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max((",", ";", "\t"), key=bare.count)


def _csv_cells(reader: Any) -> Iterator[list[Cell]]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UnreadableTable(
                f"The file cannot be read at line {reader.line_num}: {error}. Check the quotation marks there."
            ) from error


@contextmanager
def _xlsx_lines(path: Path, binary: IO[bytes]) -> Iterator[tuple[Iterator[list[Cell]], None]]:
    try:
        with zipfile.ZipFile(binary) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if sum(sizes.values()) > MAX_UNPACKED_BYTES or sizes.get("xl/sharedStrings.xml", 0) > MAX_SHARED_TEXT_BYTES:
            raise UnreadableTable(f"{path} unpacks to too much. Save it as CSV.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and extensions that are of no use here
            book = openpyxl.load_workbook(binary, read_only=True, data_only=True, keep_links=False)
    except NOT_XLSX as error:
        raise UnreadableTable(f"{path} is not an XLSX file.") from error
    try:
        sheet = book.active
        if not isinstance(sheet, ReadOnlyWorksheet):
            raise UnreadableTable(f"{path} has no sheet with rows.")
        # What the file says of its own extent is often wrong.
        sheet.reset_dimensions()
        yield _xlsx_cells(sheet), None
    finally:
        book.close()


def _xlsx_cells(sheet: ReadOnlyWorksheet) -> Iterator[list[Cell]]:
    rows: Iterator[Any] = sheet.iter_rows()  # type: ignore[misc] # the stubs give it to Worksheet alone
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except NOT_XLSX as error:
            raise UnreadableTable(f"The file is damaged after row {number}.") from error
        number += 1
        yield [_Wrong(str(cell.value)) if cell.data_type == "e" else _text(cell.value) for cell in row]


def _header(names: Sequence[str], *, ignore_unknown: bool) -> tuple[list[str | None], list[str]]:
    """The column of each cell: None for one that is left out, "" for one without a name. Raises UnreadableTable."""
    if len(names) > MAX_COLUMNS:
        raise UnreadableTable(f"The file has {len(names)} columns; at most {MAX_COLUMNS} are read.")
    columns = [(column_named(name) or None) if name.strip() else "" for name in names]
    unknown = [name.strip() for name, column in zip(names, columns, strict=True) if column is None]
    if unknown and not ignore_unknown:
        raise UnknownColumns(unknown)
    named = [column for column in columns if column]
    if twice := sorted({column for column in named if named.count(column) > 1}):
        raise UnreadableTable(f"More than one column means {', '.join(twice)}. Keep one of each.")
    if not {"name", "first_name", "id"} & set(named):
        raise UnreadableTable("There is no column name (nor first_name). Every customer needs a name.")
    return columns, unknown


def column_named(text: str) -> str:
    """The column that a header means, however it is spelled; "" for an unknown one."""
    text = text.lstrip()
    if text[: len(CUSTOM)].casefold() == CUSTOM:
        return CUSTOM + text[len(CUSTOM) :]
    word = re.sub(r"\W|_", "", text.casefold())
    return _COLUMNS.get(word) or _ALIASES.get(word, "")


def _text(value: Any) -> str:
    """A spreadsheet's cell as text: what it keeps as number, date or truth is written out."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _XML_ESCAPE.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value)


def _bare(cell: str, *, raw: bool) -> str:
    """The cell's text without the apostrophe that keeps a spreadsheet from calculating it."""
    return cell[1:] if cell[:1] == "'" and not raw and _PROTECTED.match(cell) else cell


def _row(number: int, cells: Sequence[Cell], columns: Sequence[str | None], *, raw: bool) -> Row:
    values: dict[str, Any] = {}
    others: dict[str, str] = {}
    empty = []
    wrong: dict[str, str] = {}
    for column, cell in zip(columns, cells, strict=False):
        if not cell:
            if column:
                empty.append(column)
        elif column in _TEXTS and type(cell) is str and cell[0] != "'" and cell.isprintable() and not cell.isspace():
            values[column] = cell  # as nearly all are
        elif not column:
            if column is not None:
                wrong[""] = NO_COLUMN
        elif isinstance(cell, _Wrong):
            wrong[column] = f"The cell shows the spreadsheet error {cell.shown}."
        else:
            text = _bare(cell, raw=raw) if cell[0] == "'" else cell
            if text.isspace() or not text:
                empty.append(column)
            elif not text.isprintable() and _NOT_UTF8.search(text):
                wrong[column] = "The cell is not UTF-8. Save the file as CSV in UTF-8."
            elif column in _TEXTS:
                values[column] = text
            else:
                others[column] = text
    if len(cells) < len(columns):
        empty += filter(None, columns[len(cells) :])
    elif any(cells[len(columns) :]):
        wrong[""] = NO_COLUMN
    found = problems(values, creating=False) if values else {}
    wrong |= {name: " ".join(messages) for name, messages in found.items()}
    custom: dict[str, Any] = {}
    customer_id = external_id = None
    for column, text in others.items():
        if column in FLAGS:
            word = text.strip().casefold()
            if word not in _TRUE | _FALSE:
                wrong[column] = "Write true or false."
            values[column] = word in _TRUE
        elif column.startswith(CUSTOM):
            try:
                custom[column.removeprefix(CUSTOM)] = _read_custom(text)
            except ValueError as error:
                wrong[column] = str(error)
        elif column == "id":
            customer_id = parse_public_id("cust", text.strip())
            if customer_id is None:
                wrong["id"] = "This is no customer's id (cust_…). An id of another system belongs in external_id."
        else:
            external_id = text.strip()
            if len(external_id) > EXTERNAL_ID_LENGTH or has_control_characters(external_id):
                wrong["external_id"] = f"Use at most {EXTERNAL_ID_LENGTH} characters, without control characters."
    return Row(
        number=number,
        values=values,
        custom=custom,
        customer_id=customer_id,
        external_id=external_id,
        empty=frozenset(empty),
        problems=[Problem(row=number, field=name, message=message) for name, message in wrong.items()] if wrong else (),
    )


def _read_custom(text: str) -> Any:
    if not text.startswith(JSON):
        if has_control_characters(text):
            raise ValueError("Remove the control characters.")
        return text
    try:
        value = orjson.loads(text.removeprefix(JSON))
    except orjson.JSONDecodeError:
        raise ValueError("What follows json: is not valid JSON.") from None
    if "\\u0000" in text:
        raise ValueError("Remove the NUL character.")
    return value


def _show_custom(value: Any) -> str:
    """The cell of a custom value: plain text as it is, everything else as JSON."""
    plain = isinstance(value, str) and value.strip() and not value.startswith(JSON)
    if plain and not has_control_characters(value):
        return str(value)
    return JSON + orjson.dumps(value).decode()


def protect(text: str) -> str:
    """The text with an apostrophe where a spreadsheet would calculate it."""
    return f"'{text}" if _FORMULA.match(text) else text


def columns_for(*, custom: Iterable[str], external_id: bool) -> list[str]:
    """The header of an export."""
    return ["id", *(["external_id"] if external_id else []), *FIELDS, *(CUSTOM + name for name in custom)]


def cells_of(customer: Customer, columns: Sequence[str], *, external_id: str = "", raw: bool = False) -> list[str]:
    """One customer as a row under these columns."""
    cells = []
    for column in columns:
        if column == "id":
            text = customer.public_id
        elif column == "external_id":
            text = external_id
        elif column.startswith(CUSTOM):
            name = column.removeprefix(CUSTOM)
            text = _show_custom(customer.custom_fields[name]) if name in customer.custom_fields else ""
        else:
            value = getattr(customer, column)
            text = value if isinstance(value, str) else str(value).lower()
        cells.append(text if raw else protect(text))
    return cells


class CsvWriter:
    """Rows as RFC 4180 to a text file opened with newline=""."""

    def __init__(self, file: Any) -> None:
        self._writer = csv.writer(file)

    def write(self, cells: Sequence[str]) -> None:
        self._writer.writerow(cells)

    def close(self) -> None:
        """Nothing is held back."""

    def discard(self) -> None:
        """Nothing is held back."""


class _HandedOn:
    """A file that keeps nothing: what is written is the answer."""

    def write(self, text: str) -> str:
        return text


def csv_lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows as CSV, each as soon as it is there: for an answer that is streamed."""
    writer = csv.writer(_HandedOn())
    for cells in rows:
        yield str(writer.writerow(cells))


class XlsxWriter:
    """Rows as texts of one sheet, kept in a temporary file until `close` packs them into `file`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._book = openpyxl.Workbook(write_only=True)
        self._sheet = self._book.create_sheet("Customers")

    def write(self, cells: Sequence[str]) -> None:
        """Raises ValueError for a text longer than a cell may be."""
        self._sheet.append([self._cell(text) for text in cells])

    def _cell(self, text: str) -> Any:
        if not text:
            return None
        text = _XML_ESCAPED.sub(lambda match: f"_x{ord(match[0]):04X}_", text)
        if len(text) > XLSX_CELL_LENGTH:
            raise ValueError(f"A text is longer than the {XLSX_CELL_LENGTH} characters of a cell. Use --format csv.")
        if text[0] not in "=#":
            return text
        # openpyxl would make a formula or an error of it.
        cell = WriteOnlyCell(self._sheet, text)
        cell.data_type = "s"
        return cell

    def close(self) -> None:
        self._book.save(self._file)

    def discard(self) -> None:
        """Give up what was written."""
        self._sheet.close()
