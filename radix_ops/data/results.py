"""Result lines of a run: where they go, in which order, and how an interrupted run continues where it stopped."""

from __future__ import annotations

import array
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..engine.errors import UserError
from .output import beside, open_helper, put_in_place, stands_at

_TORN_START = b'{"line": '
_REPLACE = "--overwrite replaces it"


def check_first_line(path: str) -> None:
    """UserError for a file whose first line is no run's result. Keys, once known, tell whether it is this run's."""
    with open(path, "rb") as file:
        # A file of another kind may be one huge line.
        start = file.read(len(_TORN_START))
        line = start + file.readline() if start == _TORN_START else start
        is_torn = not line.endswith(b"\n")
        if not _may_be_torn(line) or not (is_torn or _fields_of(line)):
            raise UserError(f"--output {path} exists and holds no results; {_REPLACE}")


def check_part(path: str | Path) -> None:
    """UserError for a PATH.part that no run left which was stopped while it put its lines in order."""
    part = beside(path, ".part")
    if os.path.lexists(part):
        with open_helper(part) as file:
            if not _may_be_torn(file.read(len(_TORN_START))):
                raise UserError(f"{part} exists and is of no run; remove it, or name another --output")


def _may_be_torn(line: bytes) -> bool:
    """Return whether a line that breaks off may be a result's; a crash of the machine may leave zeros for its end."""
    line = line.rstrip(b"\0")
    return line.startswith(_TORN_START[: len(line)])


def _fields_of(line: bytes) -> dict | None:
    """Return the object of a complete line, None unless it has what every result has."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # JSON with integers of too many digits is a ValueError, too
        return None
    return fields if isinstance(fields, dict) and fields.keys() >= {"line", "key"} else None


class ResultFile:
    """JSON lines in a file. Each is appended as its item finishes, so that a kill loses the current batch at most.

    `key_of(i)` identifies the result of item i, and `index_of(line)` is the item of an input line, None where it holds
    none; by default line i + 1 holds item i. Lines that an earlier run left are kept if their keys fit, a torn last
    line is dropped. Memory holds a byte an item and 16 a line.
    """

    def __init__(
        self,
        path: str,
        num_items: int,
        key_of: Callable[[int], str],
        overwrite: bool,
        index_of: Callable[[int], int | None] = lambda line: line - 1,
    ):
        self.path, self._part = beside(path, ""), beside(path, ".part")
        self.key_of = key_of
        self._index_of = index_of
        self.done = np.zeros(num_items, bool)
        self._items = array.array("q")  # of each line
        self._ends = array.array("q")  # of each line, in bytes
        keeps = self.path.is_file() and not overwrite
        check_part(path)
        self._file = open(self.path, "r+b" if keeps else "w+b")  # noqa: SIM115
        try:
            self._keep_finished_lines()
        except BaseException:
            self._file.close()
            raise

    def _keep_finished_lines(self) -> None:
        for line in self._file:
            if not line.endswith(b"\n"):
                if not _may_be_torn(line):
                    raise UserError(f"{self.path} ends in a line that is no result; {_REPLACE}")
                break
            index = self._item_of(line)
            if self.done[index]:
                raise UserError(f"{self.path} holds a result twice; {_REPLACE}")
            self._note(index, len(line))
        self._file.seek(self._size)
        self._file.truncate()

    def _item_of(self, line: bytes) -> int:
        fields = _fields_of(line)
        if fields is not None and isinstance(fields["line"], int):
            index = self._index_of(fields["line"])
            if index is not None and 0 <= index < len(self.done) and self.key_of(index) == fields["key"]:
                return index
        raise UserError(
            f"{self.path}, line {len(self._ends) + 1} is no result of this input, model, dtype and mode; {_REPLACE}"
        )

    @property
    def _size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _note(self, index: int, size: int) -> None:
        self._items.append(index)
        self._ends.append(self._size + size)
        self.done[index] = True

    def add(self, index: int, fields: dict) -> None:
        """Add the result of item `index`, with its key."""
        line = json.dumps({**fields, "key": self.key_of(index)}).encode() + b"\n"
        self._file.write(line)
        self._note(index, len(line))

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Close the file, its lines in the input's order; a kill leaves either the old file or the sorted one.

        Where the file was removed meanwhile it is written anew; UserError where another one took its place.
        """
        self.flush()
        items, ends = np.frombuffer(self._items, np.int64), np.frombuffer(self._ends, np.int64)
        is_there = stands_at(self._file, self.path)
        if is_there and (np.diff(items) >= 0).all():
            os.fsync(self._file.fileno())
            self._part.unlink(missing_ok=True)
        else:
            starts = np.concatenate([[0], ends[:-1]])
            with open_helper(self._part, os.O_CREAT | os.O_TRUNC) as ordered:
                for i in np.argsort(items):
                    self._file.seek(starts[i])
                    ordered.write(self._file.read(ends[i] - starts[i]))
                os.fchmod(ordered.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
                if not is_there and os.path.lexists(self.path):
                    raise UserError(f"{self.path} was replaced while the run wrote to it; its results are {self._part}")
                put_in_place(ordered, self._part, self.path)
        self._file.close()


class ResultStream:
    """JSON lines on standard output in the input's order: a line waits in a temporary file for those before it."""

    def __init__(self, num_items: int, key_of: Callable[[int], str]):
        self.key_of = key_of
        self.done = np.zeros(num_items, bool)
        self._waiting = tempfile.TemporaryFile(prefix="radix_ops-")  # noqa: SIM115
        self._starts, self._sizes = np.zeros(num_items, np.int64), np.zeros(num_items, np.int64)
        self._next = 0

    def add(self, index: int, fields: dict) -> None:
        """Add the result of item `index`, with its key."""
        line = json.dumps({**fields, "key": self.key_of(index)})
        self.done[index] = True
        if index == self._next:
            print(line)
            self._next += 1
            return
        self._starts[index] = self._waiting.seek(0, 2)
        self._sizes[index] = self._waiting.write(line.encode())

    def flush(self) -> None:
        """Print the lines that have waited for those before them."""
        while self._next < len(self.done) and self.done[self._next]:
            self._waiting.seek(self._starts[self._next])
            print(self._waiting.read(self._sizes[self._next]).decode())
            self._next += 1
        sys.stdout.flush()

    def finish(self) -> None:
        self.flush()
        self._waiting.close()


def key_of_parts(base, *parts: bytes | memoryview) -> str:
    """Return 16 hex digits of `base`, a hash object, and of the parts, whose borders count."""
    found = base.copy()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]
