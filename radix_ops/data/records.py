"""Input files of the radix-ops command: JSONL, or one text a line. A file is checked whole, then read again by line.

records = Records("texts.jsonl", lambda record: record.text("text"))
records[7]  # the text of line 8
"""

from __future__ import annotations

import array
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..engine.errors import UserError
from ..engine.inputs import Record, kind_of
from .streams import LineFile, StreamError

T = TypeVar("T")
FORMATS = ("jsonl", "text")
_DEEPEST = 200  # arrays and objects within each other: what can be read must be written, too, from a deeper stack


class Records(Generic[T]):
    """The lines of a file, each as `parse` makes it of its Record; by default the Record itself.

    Making one reads and parses the whole file, so that a line that can't be used is a UserError, naming file and line,
    before any work. Memory holds 8 bytes a line: a line that is asked for is read and parsed again. A byte order mark,
    CRLF and a last line without newline are understood; blank lines of JSONL are no records. gzip is read, whatever
    the file's name; it and a pipe are copied to a temporary file. A line has LONGEST_LINE bytes at most, a text
    LONGEST_TEXT.

    Args:
        format: "text" for one text a line, an empty line being an empty text, or "jsonl" for one JSON object a line.
            By default text where the path ends in .txt or .txt.gz.
        shape: what a line has to look like, for the message about an empty file.
        on_bytes: called with how much more of the file was checked.
    """

    def __init__(
        self,
        path: str | Path,
        parse: Callable[[Record], T] | None = None,
        *,
        format: str | None = None,
        shape: str = "one JSON object a line",
        on_bytes: Callable[[int], object] | None = None,
    ):
        if format not in (None, *FORMATS):
            raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
        self.path = str(path)
        self.format = format or ("text" if self.path.removesuffix(".gz").endswith(".txt") else "jsonl")
        self.parse = parse
        self._starts = array.array("q")  # of each record
        # Where blank lines stand before a record: its index, and how many lines are blank up to it.
        self._behind_blanks, self._num_blank = array.array("q"), array.array("q")
        try:
            self._lines = LineFile(path, skips_blank=self.format == "jsonl")
            self._check(on_bytes)
        except StreamError as error:
            raise UserError(f"{path}{error}") from error
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error
        if not len(self):
            raise UserError(f"{path} is empty; it must hold {'one text a line' if self.format == 'text' else shape}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> T:
        """Return record `index`, from 0. UserError where the file has changed since it was checked."""
        return self._parsed(self.raw(index), self.line_of(index))

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def raw(self, index: int) -> bytes:
        """Return the line of record `index` as it stands in the file, without its newline."""
        self._check_index(index)
        end = self._starts[index + 1] if index + 1 < len(self) else self._lines.end
        try:
            return self._lines.at(self._starts[index], end)
        except StreamError as error:
            raise UserError(f"{self.path}{error}") from error

    def line_of(self, index: int) -> int:
        """Return the line of the file that record `index` stands in, counted from 1."""
        self._check_index(index)
        before = bisect_right(self._behind_blanks, index)
        return index + 1 + (self._num_blank[before - 1] if before else 0)

    def index_of(self, line: int) -> int | None:
        """Return the record that stands in this line; None where none does."""
        index = bisect_left(range(len(self)), line, key=self.line_of)
        return index if index < len(self) and self.line_of(index) == line else None

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} lines, asked for index {index}")

    def _check(self, on_bytes) -> None:
        """Parse each line and note where records start."""
        num_blank = num_read = 0
        for index, (line, start, raw) in enumerate(self._lines):
            try:
                self._parsed(raw.removesuffix(b"\n"), line)
            except UserError as error:
                if self._lines.looks_like is None:
                    raise
                raise UserError(f"{self.path} is {self._lines.looks_like}") from error
            if line - 1 - index > num_blank:
                num_blank = line - 1 - index
                self._behind_blanks.append(index)
                self._num_blank.append(num_blank)
            self._starts.append(start)
            if on_bytes:
                on_bytes(self._lines.num_read - num_read)
                num_read = self._lines.num_read
        if on_bytes:
            on_bytes(self._lines.num_read - num_read)

    def _parsed(self, raw: bytes, line: int) -> T:
        where = f"{self.path}, line {line}"
        fields = _parse_text(raw, where) if self.format == "text" else _parse(raw, where)
        record: Any = Record(where, fields)
        return record if self.parse is None else self.parse(record)


def _parse_text(raw: bytes, where: str) -> dict:
    return {"text": _decode(raw.removesuffix(b"\r"), where)}


def _parse(raw: bytes, where: str) -> dict:
    text = _decode(raw, where)
    try:
        fields = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {str(error).partition('; use sys.')[0]}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {kind_of(fields)}; it must hold an object")
    if len(raw) > 2 * _DEEPEST and _may_be_deep(raw):
        _check_depth(fields, where)
    return fields


def _may_be_deep(raw: bytes) -> bool:
    """Return False where there are too few brackets; where they are rare, `find` is 50 times as fast as `count`."""
    for sign in (b"[", b"{"):
        found = -1
        for _ in range(_DEEPEST // 2 + 1):
            if (found := raw.find(sign, found + 1)) < 0:
                break
        else:
            return True
    return False


def _check_depth(fields: dict, where: str) -> None:
    level: list[Any] = [fields]
    for _ in range(_DEEPEST):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, (dict, list))]
    if level:
        raise UserError(f"{where} holds arrays or objects within more than {_DEEPEST} others")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r} stands twice")
            seen.add(name)
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
