"""The rows of one file: read in order once, then any of them again by its index.

source = LineSource("texts.jsonl", ByteFile("texts.jsonl"), is_text=False)
rows = [row for row in source]
source.fields(7)  # of the eighth again
"""

from __future__ import annotations

import array
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..engine.errors import UserError
from .lines import parse_json, parse_text
from .numbering import Numbering
from .streams import LONGEST_LINE, ByteFile, LineFile, StreamError, temporary_file


class Row(NamedTuple):
    """A row as it is read: its number from 1, the bytes that stand for it, and its fields or why there are none."""

    number: int
    raw: bytes
    fields: dict | UserError


class Source(ABC):
    """The rows of one file. Iterating reads it, once; then `raw` and `fields` give any row again.

    Iterating yields a row that can't be used with its error. StreamError where the rest of the file can't be read.

    name: the file in messages.
    unit: what a row is called, "line" or "row".
    is_text: whether a row is a line of text, and no object.
    label_names: the names of labels by columns of their indices, once a row was read.
    """

    unit = "row"
    is_text = False

    def __init__(self, name: str):
        self.name = name
        self.numbers = Numbering(1)
        self.label_names: Mapping[str, Sequence[str]] = {}

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """Yield the rows, which get their indices by that."""

    @abstractmethod
    def raw(self, index: int) -> bytes:
        """Return the bytes that stand for a row, and decide the key of its result."""

    def fields(self, index: int) -> dict:
        """Return the fields of a row that could be used."""
        return parse_json(self.raw(index), self.where(index))

    def explained(self, error: UserError) -> UserError:
        """Return the error of a task that can't use a row, perhaps with what such files can do about it."""
        return error

    @property
    def num_read(self) -> int:
        """How many bytes of the file were read."""
        return 0

    def where(self, index: int) -> str:
        """Return how messages name a row."""
        return self.where_of(self.numbers[index])

    def where_of(self, number: int) -> str:
        return place(self.name, self.unit, number)

    def __len__(self) -> int:
        return len(self.numbers)


def place(name: str, unit: str, number: int) -> str:
    """Return how messages name a row."""
    return f"{name}, {unit} {number}"


class LineSource(Source):
    """The lines of JSONL, or of text; memory holds 8 bytes a line."""

    unit = "line"

    def __init__(self, name: str, file: ByteFile, is_text: bool, guess: str | None = None):
        """`guess` is what the file may be where its first line is no JSON, as what goes on behind its name."""
        super().__init__(name)
        self.is_text = is_text
        self._lines = LineFile(file, skips_blank=not is_text)
        self._parse = parse_text if is_text else parse_json
        self._guess = guess
        self._starts = array.array("q")

    def __iter__(self) -> Iterator[Row]:
        for number, start, line in self._lines:
            raw = line.removesuffix(b"\n")
            fields: dict | UserError
            try:
                fields = self._parse(raw, place(self.name, self.unit, number))
            except UserError as error:
                guess = self._lines.bytes.looks_like
                if not self._starts and "is not JSON" in str(error):
                    guess = guess or self._guess
                if guess is not None:
                    raise StreamError(f" {guess}") from error
                fields = error
            self._starts.append(start)
            self.numbers.append(number)
            yield Row(number, raw, fields)

    def raw(self, index: int) -> bytes:
        end = self._starts[index + 1] if index + 1 < len(self) else self._lines.end
        return self._lines.at(self._starts[index], end)

    def fields(self, index: int) -> dict:
        return self._parse(self.raw(index), self.where(index))

    @property
    def num_read(self) -> int:
        return self._lines.num_read


class CopiedSource(Source):
    """The rows that a reader makes of a file; each is copied to a temporary file as JSON, so that the file is read
    once and in order. Memory holds 8 bytes a row."""

    def __init__(
        self,
        name: str,
        file: ByteFile,
        rows: Iterable[Row],
        hints: Mapping[str, str] | None = None,
        label_names: Mapping[str, Sequence[str]] | None = None,
    ):
        """`hints` go behind errors of a task that hold their keys; reading rows fills `label_names`."""
        super().__init__(name)
        self.label_names = {} if label_names is None else label_names
        self._file, self._rows, self._hints = file, rows, hints or {}
        self._copy = temporary_file()
        self._ends = array.array("q")

    def __iter__(self) -> Iterator[Row]:
        size = 0
        with self._file.errors():
            for row in self._rows:
                if len(row.raw) > LONGEST_LINE:
                    raise StreamError(f", row {row.number} is longer than {LONGEST_LINE:,} bytes, the most for a row")
                size += self._copy.write(row.raw)
                self._ends.append(size)
                self.numbers.append(row.number)
                yield row
        self._file.check_unchanged()

    def raw(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        self._copy.seek(start)
        return self._copy.read(self._ends[index] - start)

    def explained(self, error: UserError) -> UserError:
        hint = next((hint for part, hint in self._hints.items() if part in str(error)), None)
        return error if hint is None else UserError(f"{error}; {hint}", f"{error.as_option}; {hint}")

    @property
    def num_read(self) -> int:
        return self._file.num_read
