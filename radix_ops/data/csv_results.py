"""Results as CSV and TSV: a column for each key, nested values as JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .compressed import reading, writing
from .converted import Lines, Writer, are_equal


class CsvWriter(Writer):
    """A row for each result behind a header of all keys, in the order in which results bring them, "key" the last.

    A string stands as it is, null and a key that the result lacks are empty, any other value is JSON. Cells are quoted
    where they need it, by RFC 4180, and lines end in a newline alone.
    """

    def __init__(self, delimiter: str, compression: str | None):
        self._delimiter, self._compression = delimiter, compression

    def write(self, lines: Lines, file: BinaryIO) -> None:
        names = columns(lines)
        with writing(file, self._compression) as packed, as_text(packed) as text:
            rows = csv.writer(_Newlines(text), delimiter=self._delimiter, lineterminator="\r\n")
            rows.writerow(names)
            for fields in lines:
                rows.writerow([_cell(fields.get(name)) for name in names])

    def holds(self, path: Path, key: str, keys: Iterable[str]) -> bool:
        try:
            with self._rows(path) as rows:
                header = next(rows, [])
                found = (row[-1] if len(row) == len(header) else None for row in rows)
                return header[-1:] == ["key"] and are_equal(found, keys)
        except (ValueError, csv.Error):
            return False

    def may_hold(self, path: Path) -> bool:
        try:
            with self._rows(path) as rows:
                header = next(rows, [])
        except (ValueError, csv.Error):
            return False
        return header[-1:] == ["key"] and header[0] in ("line", "row", "file")

    @contextlib.contextmanager
    def _rows(self, path: Path) -> Iterator[Iterator[list[str]]]:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            with open(path, "rb") as file, reading(file, self._compression) as packed, as_text(packed) as text:
                yield csv.reader(text, delimiter=self._delimiter, strict=True)
        finally:
            csv.field_size_limit(limit)


class _Newlines:
    """Ends rows with a newline alone. csv quotes a cell for the characters of its line ends, and one may have a CR."""

    def __init__(self, text: io.TextIOWrapper):
        self._text = text

    def write(self, row: str) -> None:
        self._text.write(row.removesuffix("\r\n") + "\n")


@contextlib.contextmanager
def as_text(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """Give the file as one of UTF-8, in which half of a surrogate pair is written as JSON escapes it."""
    text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
    try:
        yield text
    finally:
        text.detach()


def columns(lines: Lines) -> list[str]:
    """Return the keys of all results in the order in which they come, "key" the last."""
    names: dict[str, None] = {}
    for fields in lines:
        names.update(dict.fromkeys(fields))
        lines.check_width(len(names))
    names.pop("key", None)
    return [*names, "key"]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
