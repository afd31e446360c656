"""Input files of the radix-ops command as records. All are checked whole, then read again by index.

records = Records("texts.jsonl", lambda record: record.text("text"))
records[7]  # the text of line 8
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from ..engine.errors import UserError
from ..engine.inputs import Record
from .bad_rows import BadRows
from .delimited import Headless
from .folders import data_files
from .kinds import KINDS, Kind, Reading, open_source
from .numbering import Numbering
from .sources import Row, Source
from .streams import StreamError

T = TypeVar("T")
OnError = Literal["stop", "skip", "record"]
_Path = str | os.PathLike[str]


class Records(Generic[T]):
    """The rows of files, each as `parse` makes it of its Record; by default the Record itself.

    A file is JSONL, a JSON array, text, CSV, TSV, Parquet, Arrow (IPC file or stream), or a .npz of ids; plain, gzip or
    zstd; "-" is standard input. A folder stands for the data files in it, or is one of BEIR (see `BeirSource`).

    Making one reads and parses all files, each once and in order, so that rows that can't be used are a UserError,
    naming file and line or row, before any work. Memory holds 8 bytes a row: a row that is asked for is read and parsed
    again, from the file where that is plain JSONL or text, else from a copy in a temporary file. A byte order mark,
    CRLF and a last line without newline are understood; blank lines of JSONL and CSV are no records. A row has
    LONGEST_LINE bytes at most, a text LONGEST_TEXT.

    Args:
        format: the kind of all files, one of KINDS; by default what the name and the first bytes of each say.
        shape: what a row has to look like, for the message about an empty file.
        on_bytes: called with how much more of the files was checked.
        on_error: what becomes of rows that can't be used. "stop": all are read, then a BadRows lists them. "skip": they
            are no records, and `bad` lists them. "record": they are in `refused`, with the reason.
        drop: columns, or keys, that are left out.
        marks: what else decides the keys of results, such as how `parse` reads a row.
        reserved: keys that no row may have, nor those of `origin`.
        delimiter, header, arrays, numbers, headless, split, candidates: see `Reading`.

    refused: the reason by index, of records that can't be used.
    bad: the rows that were left out or are in `refused`.
    """

    def __init__(
        self,
        path: _Path | Sequence[_Path],
        parse: Callable[[Record], T] | None = None,
        *,
        format: Kind | None = None,
        shape: str = "one JSON object a line",
        on_bytes: Callable[[int], object] | None = None,
        on_error: OnError = "stop",
        drop: Collection[str] = (),
        marks: Sequence[str] = (),
        reserved: Collection[str] = (),
        delimiter: str | None = None,
        header: Sequence[str] | None = None,
        arrays: Collection[str] = (),
        numbers: Collection[str] = (),
        headless: Headless = lambda cells: None,
        split: str | None = None,
        candidates: str | None = None,
    ):
        if format not in (None, *KINDS):
            raise ValueError(f"format must be one of {', '.join(map(repr, KINDS))}, got {format!r}")
        if on_error not in ("stop", "skip", "record"):
            raise ValueError(f"on_error must be 'stop', 'skip' or 'record', got {on_error!r}")
        self.parse, self.on_error = parse, on_error
        self._drop, self._reserved = tuple(drop), tuple(reserved)
        self._marks = json.dumps([*self._drop, *marks]).encode() if drop or marks else b""
        columns = None if header is None else tuple(header)
        reading = Reading(format, delimiter, columns, arrays, numbers, headless, drop, split, candidates)
        given = [path] if isinstance(path, (str, os.PathLike)) else path
        self.paths = data_files([os.fspath(name) for name in given])
        self.refused: dict[int, str] = {}
        self.bad = BadRows()
        self._sources: list[Source] = []
        self._first: list[int] = []  # of each source, among all rows
        self._shown = Numbering(0)  # the rows that are records
        self._num_rows = 0
        for name in self.paths:
            self._read(name, reading, on_bytes)
        self.bad.num_rows = self._num_rows
        if on_error == "stop":
            self.bad.check()
        if not self._num_rows:
            what = "one text a line" if self._sources[-1].is_text else shape
            raise UserError(f"{', '.join(source.name for source in self._sources)} is empty; it must hold {what}")
        self.bad.check_all_are_not(len(self), self.path)

    @property
    def path(self) -> str:
        """The files, as messages name them."""
        more = f" and {len(self._sources) - 1} more" if len(self._sources) > 1 else ""
        return self._sources[0].name + more

    @property
    def is_text(self) -> bool:
        """Whether all files are text."""
        return all(source.is_text for source in self._sources)

    @property
    def has_lines(self) -> bool:
        """Whether all records are lines of their files."""
        return all(source.unit == "line" for source in self._sources)

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, index: int) -> T:
        """Return record `index`, from 0. UserError where the file has changed since it was checked, and for one that is
        in `refused`."""
        if index in self.refused:
            raise UserError(self.refused[index])
        source, row = self._find(index)
        try:
            return self._parsed(source, source.where(row), source.fields(row))
        except StreamError as error:
            raise UserError(f"{source.name}{error}") from error

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def raw(self, index: int) -> bytes:
        """Return the bytes that stand for record `index` and decide the key of its result: a line as it stands in its
        file, without its newline, or a row as JSON."""
        source, row = self._find(index)
        try:
            raw = source.raw(row)
        except StreamError as error:
            raise UserError(f"{source.name}{error}") from error
        return raw + self._marks

    def origin(self, index: int) -> dict[str, Any]:
        """Return where record `index` stands, as a result line opens: {"line": 1} of JSONL and text, {"row": 1} of all
        else, with "file" before it where there are several files."""
        source, row = self._find(index)
        found: dict[str, Any] = {"file": source.name} if len(self._sources) > 1 else {}
        return found | {source.unit: source.numbers[row]}

    def index_of(self, origin: Mapping[str, Any]) -> int | None:
        """Return the record of an origin, which may have other keys besides; None where there is no such record."""
        for source, first in zip(self._sources, self._first, strict=True):
            if len(self._sources) == 1 or origin.get("file") == source.name:
                number = origin.get(source.unit)
                row = source.numbers.index_of(number) if type(number) is int else None
                return None if row is None else self._shown.index_of(first + row)
        return None

    def line_of(self, index: int) -> int:
        """Return the line, or row, of its file that record `index` stands in, counted from 1."""
        source, row = self._find(index)
        return source.numbers[row]

    def refuse(self, reasons: Mapping[int, UserError]) -> None:
        """Take back records that turned out to be of no use, as `on_error` says: with "skip" others move up."""
        for index in sorted(reasons):
            self.bad.add(reasons[index])
        if self.on_error == "stop":
            self.bad.check()
        elif self.on_error == "record":
            self.refused.update((index, error.as_option) for index, error in reasons.items())
        elif reasons:
            kept = Numbering(0)
            for index in range(len(self)):
                if index not in reasons:
                    kept.append(self._shown[index])
            self._shown = kept
            self.bad.check_all_are_not(len(self), self.path)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} lines, asked for index {index}")
        row = self._shown[index]
        number = bisect_right(self._first, row) - 1
        return self._sources[number], row - self._first[number]

    def _read(self, path: str, reading: Reading, on_bytes) -> None:
        """Parse each row of a file."""
        try:
            source = open_source(path, reading)
            self._sources.append(source)
            self._first.append(self._num_rows)
            num_read = 0
            for row in source:
                self._check(source, row)
                if on_bytes:
                    on_bytes(source.num_read - num_read)
                    num_read = source.num_read
            if on_bytes:
                on_bytes(source.num_read - num_read)
        except StreamError as error:
            name = "standard input" if path == "-" else path
            raise UserError(f"{name}{error}") from error
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error

    def _check(self, source: Source, row: Row) -> None:
        """Parse a row; note it as a record, or as a bad one."""
        index, where = self._num_rows, source.where_of(row.number)
        self._num_rows += 1
        try:
            if isinstance(row.fields, UserError):
                raise row.fields
            self._parsed(source, where, row.fields)
        except UserError as error:
            if where not in str(error):  # it is none of the row's
                raise
            self.bad.add(error)
            if self.on_error == "record":
                self.refused[len(self._shown)] = error.as_option
                self._shown.append(index)
            elif self.on_error == "stop" and self.bad.is_full:
                self.bad.num_rows = self._num_rows
                self.bad.check()
        else:
            self._shown.append(index)

    def _parsed(self, source: Source, where: str, fields: dict) -> T:
        fields = {k: v for k, v in fields.items() if k not in self._drop} if self._drop else fields
        record: Any = Record(where, fields, source.label_names)
        if self._reserved:
            several = ("file",) if len(self.paths) > 1 else ()
            record.others((), (*several, source.unit, *self._reserved))
        try:
            return record if self.parse is None else self.parse(record)
        except UserError as error:
            raise source.explained(error) from error
