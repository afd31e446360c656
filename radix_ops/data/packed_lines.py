"""Results as compressed JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from .compressed import reading, writing
from .converted import Lines, Writer, are_equal
from .log import fields_of


class PackedLinesWriter(Writer):
    """The lines that an uncompressed file would have."""

    def __init__(self, compression: str):
        self._compression = compression

    def write(self, lines: Lines, file: BinaryIO) -> None:
        with writing(file, self._compression) as packed:
            for line in lines.raw():
                packed.write(line)

    def holds(self, path: Path, key: str, keys: Iterable[str]) -> bool:
        try:
            with open(path, "rb") as file, reading(file, self._compression) as packed:
                found = ((fields_of(line) or {}).get("key") for line in packed)
                return are_equal(found, keys)
        except ValueError:
            return False

    def may_hold(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file, reading(file, self._compression) as packed:
                return all(fields_of(line) for line in islice(packed, 1))
        except ValueError:
            return False
