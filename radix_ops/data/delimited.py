"""The rows of CSV and TSV, by Python's csv: cells are strings under the names that the first row gives them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..engine.errors import UserError
from .lines import TwiceError, decode, dump_json, parse_json, unique_keys
from .sources import Row, place
from .streams import LONGEST_LINE, ByteFile, LineFile, StreamError

Values = Mapping[str, tuple[type, ...]]
Headless = Callable[[Sequence[str]], Sequence[str] | None]  # the columns' names where a first row is no header
_OTHER_DELIMITERS = ",;\t|"
_NO_HEADER = "the first row gives the columns' names, unless --header does"
# What goes behind errors of tasks, by what they hold.
HINTS = {
    "it must be an array": 'a cell may hold it as JSON, such as ["yes", "no"]',
    " has no ": _NO_HEADER,
    "a line may have": _NO_HEADER,
}


def read_delimited(
    name: str,
    file: ByteFile,
    delimiter: str,
    header: list[str] | None,
    values: Values,
    headless: Headless = lambda cells: None,
) -> Iterator[Row]:
    """Yield the rows. One with too few or too many cells, or a quote out of place, has its error.

    header: the columns' names, where no first row gives them.
    values: what cells of a column may hold as JSON, in place of a string.
    headless: knows by its cells a first row that is no header, though nothing says so.
    """
    text = _Text(name, file)
    # The limit is the whole process's; it may grow, since _Text bounds what a row takes.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    columns, number = header, 0
    while True:
        text.start_row("header" if columns is None else f"row {number + 1}")
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, UserError) as error:
            found = error if isinstance(error, UserError) else UserError(f"{name}, {text.row} can't be read: {error}")
            if text.is_whole:
                raise StreamError(f", {text.row}: {error}: does it leave a quote open?") from error
            if columns is None:
                raise StreamError(str(found).removeprefix(name)) from error
            number += 1
            yield Row(number, text.taken, found)
            continue
        if not cells or (len(cells) == 1 and not cells[0].strip() and len(columns or ()) != 1):  # a blank line
            continue
        if columns is None and (known := headless(cells)) is not None:
            columns = list(known)
        elif columns is None:
            columns = _checked(cells, delimiter)
            continue
        number += 1
        yield _row(number, place(name, "row", number), columns, cells, values, text)


def _row(number: int, where: str, columns: list[str], cells: list[str], values: Values, text: _Text) -> Row:
    try:
        if len(cells) != len(columns):
            raise UserError(f"{where} has {len(cells)} cells and the header has {len(columns)}")
        fields: dict = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
        nested = {name: _value(fields[name], values[name], where, name) for name in fields if name in values}
        raw = dump_json(fields | nested)
        return Row(number, raw, parse_json(raw, where) if nested else fields)
    except UserError as error:
        return Row(number, text.taken, error)


def _checked(columns: list[str], delimiter: str) -> list[str]:
    for index, column in enumerate(columns):
        if not column and (index or len(columns) == 1):  # a first one holds rows' numbers, which have no name
            raise StreamError(f", header: column {index + 1} has no name")
        if columns.index(column) < index:
            raise StreamError(f", header: two columns have the name {column!r}")
    if len(columns) == 1:
        other = next((sign for sign in _OTHER_DELIMITERS if sign != delimiter and sign in columns[0]), None)
        if other is not None:
            raise StreamError(
                f", header, is one column, {columns[0]!r}: --delimiter {other!r} reads it as several, and --header "
                "names a column whose file has no header"
            )
    return columns


def _value(cell: str, types: tuple[type, ...], where: str, column: str) -> object:
    """Return the value of one of these types that a cell holds as JSON, else the cell."""
    try:
        value = json.loads(cell, parse_constant=float, object_pairs_hook=unique_keys)
        json.dumps(value, allow_nan=False)
    except TwiceError as error:
        raise UserError(f'{where}: "{column}" holds JSON that can\'t be used: {error}') from error
    except (ValueError, RecursionError):
        return cell
    return value if type(value) in types else cell


class _Text:
    """The lines of a file as text. StreamError for one that is not UTF-8, and for a row of too many bytes."""

    def __init__(self, name: str, file: ByteFile):
        self._name, self._looks_like = name, file.looks_like
        self._lines = iter(LineFile(file, skips_blank=False, keeps=False))
        self.is_whole = False  # whether all were read
        self.start_row("header")

    def start_row(self, row: str) -> None:
        self.row, self._parts, self._size = row, list[bytes](), 0

    @property
    def taken(self) -> bytes:
        """The bytes of the row so far."""
        return b"".join(self._parts)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            _, _, line = next(self._lines)
        except StopIteration:
            self.is_whole = True
            raise
        self._parts.append(line)
        self._size += len(line)
        if self._size > LONGEST_LINE:
            raise StreamError(
                f", {self.row} is longer than {LONGEST_LINE:,} bytes, the most for a row: does it leave a quote open?"
            )
        try:
            return decode(line, f"{self._name}, {self.row}")
        except UserError as error:
            if self._looks_like:
                raise StreamError(f" {self._looks_like}") from error
            raise
