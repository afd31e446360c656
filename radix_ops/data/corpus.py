"""The documents of a BEIR corpus: read once, then any of them again by its number, which its id gives."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..engine.errors import UserError
from ..engine.inputs import Record
from .sources import LineSource
from .streams import ByteFile, StreamError

_DIGEST = 16  # bytes that stand for an id


def line_source(path: Path) -> LineSource:
    """Open a file of JSON lines."""
    return LineSource(str(path), ByteFile(str(path)), is_text=False)


def id_of(record: Record) -> str:
    """Return the "_id" of a row of BEIR, as a string."""
    name = record.fields.get("_id")
    return str(name) if type(name) is int else record.text("_id")


class Corpus:
    """Documents {"id", "title", "text"} by their numbers from 0. Memory holds 32 bytes for each."""

    def __init__(self, path: Path):
        self._source = line_source(path)

    def read(self) -> None:
        """Check all documents. UserError for one that can't be used, and for an id that two have."""
        digests = bytearray()
        with self._errors():
            for row in self._source:
                if isinstance(row.fields, UserError):
                    raise row.fields
                digests += _digest(self._document(row.number, row.fields)["id"])
        if not digests:
            raise UserError(f"{self._source.name} is empty; it must hold a document a line")
        found = np.frombuffer(bytes(digests), f"S{_DIGEST}")
        self._order = np.argsort(found, kind="stable")
        self._sorted = found[self._order]
        same = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(same):
            first, second = self._order[same[0] : same[0] + 2].tolist()
            raise UserError(
                f"{self._source.where(second)} has the id {self[second]['id']!r} of {self._source.where(first)}"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> dict:
        with self._errors():
            return self._document(self._source.numbers[number], self._source.fields(number))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except StreamError as error:
            raise UserError(f"{self._source.name}{error}") from error

    def _document(self, line: int, fields: dict) -> dict:
        record = Record(self._source.where_of(line), fields)
        document = {"id": id_of(record)}
        if fields.get("title"):
            document["title"] = record.text("title")
        return document | {"text": record.text("text")}

    def numbers_of(self, names: list[str]) -> np.ndarray:
        """Return the numbers of the documents with these ids, -1 where there is none."""
        wanted = np.frombuffer(b"".join(map(_digest, names)), f"S{_DIGEST}")
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[places] == wanted, self._order[places], -1)

    @property
    def num_read(self) -> int:
        return self._source.num_read


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest()
