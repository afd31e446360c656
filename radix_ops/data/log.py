"""JSON lines of results that a run appends in any order, and that the same run finds again when it continues."""

from __future__ import annotations

import array
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..engine.errors import UserError
from .output import beside, open_helper

Origin = dict[str, Any]  # the fields that say where in the input a result's record stands; a line opens with them
REPLACE = "--overwrite replaces it"
_STARTS = tuple(f'{{"{key}": '.encode() for key in ("line", "row", "file"))
LONGEST_START = max(map(len, _STARTS))
# The key of a line under way ends in a checksum of what stands before it, which goes when the file is finished.
_SEAL = re.compile(rb'(, "key": "[^"\\]*):([0-9a-f]{8})"\}\n\Z')


def check_first_line(path: str | Path, remedy: str = REPLACE, name: str = "--output ") -> None:
    """UserError for a file whose first line is no run's result. Keys, once known, tell whether it is this run's."""
    with open(path, "rb") as file:
        # A file of another kind may be one huge line.
        start = file.read(LONGEST_START)
        line = start + file.readline() if start.startswith(_STARTS) and b"\n" not in start else start
        is_torn = not line.endswith(b"\n")
        if not may_be_torn(line) or not (is_torn or fields_of(line)):
            raise UserError(f"{name}{path} exists and holds no results; {remedy}")


def check_part(path: str | Path) -> None:
    """UserError for a PATH.part that no run left which was stopped while it put its lines in order."""
    part = beside(path, ".part")
    if os.path.lexists(part):
        with open_helper(part) as file:
            if not may_be_torn(file.read(LONGEST_START)):
                raise UserError(f"{part} exists and is of no run; remove it, or name another --output")


def may_be_torn(line: bytes) -> bool:
    """Return whether a line that breaks off may be a result's; a crash of the machine may leave zeros for its end."""
    line = line.rstrip(b"\0")
    return any(line.startswith(start[: len(line)]) for start in _STARTS)


def fields_of(line: bytes) -> dict | None:
    """Return the object of a complete line, None unless it has what every result has."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # JSON with integers of too many digits is a ValueError, too
        return None
    return fields if isinstance(fields, dict) and "key" in fields and origin_of(fields) else None


def origin_of(fields: dict) -> Origin:
    """Return the fields that a result opens with: perhaps "file", then "line" or "row". Empty where it has none."""
    names = list(fields)
    of_file = names[:1] if names[:1] == ["file"] else []
    place = names[len(of_file) : len(of_file) + 1]
    if place not in (["line"], ["row"]) or type(fields[place[0]]) is not int:
        return {}
    return {name: fields[name] for name in (*of_file, *place)}


def line_of_item(origin: Origin) -> int | None:
    """Return the item of a line where line i + 1 holds item i."""
    return origin["line"] - 1 if "line" in origin else None


def sealed(fields: dict, key: str) -> bytes:
    """Return the line of a result under way."""
    text = json.dumps(fields).removesuffix("}").encode()
    return text + f', "key": "{key}:{zlib.crc32(text):08x}"}}\n'.encode()


def unsealed(line: bytes) -> tuple[bytes, bool]:
    """Return the line as a finished file has it, and whether it is as it was written; a line of a finished file says
    nothing of that."""
    seal = _SEAL.search(line)
    if seal is None:
        return line, True
    return line[: seal.end(1)] + b'"}\n', zlib.crc32(line[: seal.start()]) == int(seal[2], 16)


class ResultLog:
    """Lines that are appended to an open file. Memory holds a byte an item and 16 a line.

    `key_of(i)` identifies the result of item i, and `item_of(origin)` is the item of a record, None where there is
    none. Lines that an earlier run left are kept if their keys fit, a torn last line is dropped. UserError for one that
    was changed.
    """

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        num_items: int,
        key_of: Callable[[int], str],
        item_of: Callable[[Origin], int | None],
    ):
        self.file, self.path, self.key_of = file, path, key_of
        self._item_of = item_of
        self.done = np.zeros(num_items, bool)
        self._items = array.array("q")  # of each line
        self._ends = array.array("q")  # of each line, in bytes
        self._has_seals = False
        try:
            self._keep_finished_lines()
        except BaseException:
            file.close()
            raise

    def _keep_finished_lines(self) -> None:
        for line in self.file:
            if not line.endswith(b"\n"):
                if not may_be_torn(line):
                    raise UserError(f"{self.path} ends in a line that is no result; {REPLACE}")
                break
            index = self._index_of(line)
            if self.done[index]:
                raise UserError(f"{self.path} holds a result twice; {REPLACE}")
            self._note(index, len(line))
        self.file.seek(self._size)
        self.file.truncate()

    def _index_of(self, line: bytes) -> int:
        where = f"{self.path}, line {len(self._ends) + 1}"
        plain, is_whole = unsealed(line)
        fields = fields_of(plain)
        if fields is not None:
            index = self._item_of(origin_of(fields))
            if index is not None and 0 <= index < len(self.done) and self.key_of(index) == fields["key"]:
                if not is_whole:
                    raise UserError(
                        f"{where} was changed since the run wrote it: without that line the same command computes its "
                        "result again, and --overwrite starts anew"
                    )
                self._has_seals |= plain is not line
                return index
        raise UserError(f"{where} is no result of this input, model, dtype and mode; {REPLACE}")

    @property
    def _size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _note(self, index: int, size: int) -> None:
        self._items.append(index)
        self._ends.append(self._size + size)
        self.done[index] = True

    def add(self, index: int, fields: dict) -> None:
        """Add the result of item `index`, with its key."""
        line = sealed(fields, self.key_of(index))
        self.file.write(line)
        self._has_seals = True
        self._note(index, len(line))

    def flush(self) -> None:
        self.file.flush()

    @property
    def is_as_finished(self) -> bool:
        """Whether the lines stand as a finished file has them: in the input's order, and none under way."""
        return not self._has_seals and bool((np.diff(np.frombuffer(self._items, np.int64)) >= 0).all())

    def in_order(self) -> Iterator[bytes]:
        """Yield the lines as a finished file has them, each with its newline."""
        items, ends = np.frombuffer(self._items, np.int64), np.frombuffer(self._ends, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        for line in np.argsort(items):
            self.file.seek(starts[line])
            yield unsealed(self.file.read(ends[line] - starts[line]))[0]
