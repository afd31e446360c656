"""Result lines of a run: where they go, in which order, and how an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from ..engine.errors import UserError
from .log import Origin, ResultLog, check_part, line_of_item
from .output import beside, open_helper, put_in_place, stands_at


class ResultFile:
    """JSON lines in a file. Each is appended as its item finishes, so that a kill loses the current batch at most.

    `key_of(i)` identifies the result of item i, and `item_of` is the item of the fields that a line opens with, None
    where it has none; see `ResultLog`, which keeps the lines that an earlier run left.
    """

    def __init__(
        self,
        path: str,
        num_items: int,
        key_of: Callable[[int], str],
        overwrite: bool,
        item_of: Callable[[Origin], int | None] = line_of_item,
    ):
        self.path, self._part = beside(path, ""), beside(path, ".part")
        keeps = self.path.is_file() and not overwrite
        check_part(path)
        file = open(self.path, "r+b" if keeps else "w+b")  # noqa: SIM115
        self._log = ResultLog(file, self.path, num_items, key_of, item_of)
        self.done, self.add, self.flush = self._log.done, self._log.add, self._log.flush
        self.is_finished = bool(self.done.all()) and self._log.is_as_finished

    def finish(self) -> None:
        """Close the file, its lines in the input's order; a kill leaves either the old file or the sorted one.

        Where the file was removed meanwhile it is written anew; UserError where another one took its place.
        """
        self.flush()
        file = self._log.file
        is_there = stands_at(file, self.path)
        if is_there and self._log.is_as_finished:
            os.fsync(file.fileno())
            self._part.unlink(missing_ok=True)
        else:
            with open_helper(self._part, os.O_CREAT | os.O_TRUNC) as ordered:
                ordered.writelines(self._log.in_order())
                os.fchmod(ordered.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
                if not is_there and os.path.lexists(self.path):
                    raise UserError(f"{self.path} was replaced while the run wrote to it; its results are {self._part}")
                put_in_place(ordered, self._part, self.path)
        file.close()


class ResultStream:
    """JSON lines on standard output in the input's order: a line waits in a temporary file for those before it."""

    is_finished = False

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
