"""Results in a format that is made at the end of the run, of JSON lines that the run appends until then."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..engine.errors import UserError
from .log import REPLACE, Origin, ResultLog, check_first_line
from .output import beside, open_helper, put_in_place, stands_at

_MOST_COLUMNS = 10_000
_BYTES_AT_ONCE, _LINES_AT_ONCE = 32 * 2**20, 2**16  # of lines as objects in memory


class Lines:
    """The objects of all results in the input's order. Iterating reads them, as often as it is asked for.

    key: what identifies them all.
    """

    def __init__(self, log: ResultLog, key: str):
        self._log, self.key = log, key

    def raw(self) -> Iterator[bytes]:
        """Yield the results as lines of JSON."""
        return self._log.in_order()

    def __iter__(self) -> Iterator[dict]:
        return map(json.loads, self.raw())

    def check_width(self, num_columns: int) -> None:
        """UserError for more columns than a table may have."""
        if num_columns > _MOST_COLUMNS:
            raise UserError(
                f"the rows have more than {_MOST_COLUMNS:,} different keys, the most columns of a table; "
                f"{self._log.path} holds the results as JSON lines"
            )

    def parts(self) -> Iterator[list[dict]]:
        """Yield the objects in lists that memory holds."""
        part: list[dict] = []
        size = 0
        for line in self.raw():
            part.append(json.loads(line))
            size += len(line)
            if size >= _BYTES_AT_ONCE or len(part) == _LINES_AT_ONCE:
                yield part
                part, size = [], 0
        if part:
            yield part


class Writer(ABC):
    """A format that results are converted to."""

    @abstractmethod
    def write(self, lines: Lines, file: BinaryIO) -> None:
        """Write all results to a file, which is empty."""

    @abstractmethod
    def holds(self, path: Path, key: str, keys: Iterable[str]) -> bool:
        """Return whether the file is what `write` made of results with these keys, and `key` for all."""

    @abstractmethod
    def may_hold(self, path: Path) -> bool:
        """Return whether the file may be what `write` made, by a look at its start."""


class ConvertedFile:
    """Results in one of the formats, by way of PATH.lines.

    That file has JSON lines, each appended as its item finishes, so that a kill loses the current batch at most, and
    the same run continues behind them. `finish` makes PATH.part of them, puts it into its place, at once and whole, and
    removes the lines. The arguments are those of `ResultFile`, and the format's writer.
    """

    def __init__(
        self,
        path: str,
        num_items: int,
        key_of: Callable[[int], str],
        overwrite: bool,
        item_of: Callable[[Origin], int | None],
        writer: Writer,
    ):
        self.path, self._part, self._lines = (beside(path, suffix) for suffix in ("", ".part", ".lines"))
        self._writer, self._key_of = writer, key_of
        check_unfinished(path)
        self._log: ResultLog | None = None
        if overwrite:
            self._part.unlink(missing_ok=True)
            self._lines.unlink(missing_ok=True)
        elif not self._lines.exists() and is_filled(self.path):
            keys = map(key_of, range(num_items))
            if not writer.holds(self.path, self._key(num_items), keys):
                raise UserError(
                    f"--output {self.path} holds no results of this input, model, dtype and mode, or they were "
                    f"changed; {REPLACE}"
                )
            self.done, self.is_finished = np.ones(num_items, bool), True
            return
        self.is_finished = False
        self._log = ResultLog(open_helper(self._lines, os.O_CREAT), self._lines, num_items, key_of, item_of)
        self.done = self._log.done

    def _key(self, num_items: int) -> str:
        found = hashlib.sha256()
        for item in range(num_items):
            found.update(self._key_of(item).encode())
        return found.hexdigest()[:16]

    def add(self, index: int, fields: dict) -> None:
        """Add the result of item `index`, with its key."""
        assert self._log is not None
        self._log.add(index, fields)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def finish(self) -> None:
        """Make the file of all results."""
        if self._log is None:
            return
        self.flush()
        if os.path.lexists(self._lines) and not stands_at(self._log.file, self._lines):
            raise UserError(f"{self._lines} was replaced by another file while the run wrote to it")
        with self._log.file, open_helper(self._part, os.O_CREAT | os.O_TRUNC) as file:
            self._writer.write(Lines(self._log, self._key(len(self.done))), file)
            put_in_place(file, self._part, self.path)
        self._lines.unlink(missing_ok=True)


def are_equal(found: Iterable[object], keys: Iterable[str]) -> bool:
    """Return whether a file's keys are these, in this order."""
    return all(one == other for one, other in zip_longest(found, keys, fillvalue=...))


def is_filled(path: Path) -> bool:
    """Return whether there is a file of some bytes."""
    return path.exists() and path.stat().st_size > 0


def check_unfinished(path: str | Path) -> None:
    """UserError for PATH.lines and PATH.part that no run left."""
    lines, part = beside(path, ".lines"), beside(path, ".part")
    if os.path.lexists(lines):
        with open_helper(lines):
            check_first_line(lines, "remove it, or name another --output", name="")
    if os.path.lexists(part):
        with open_helper(part):
            pass
        if not os.path.lexists(lines):
            raise UserError(f"{part} exists and is of no run; remove it, or name another --output")
