"""Results of rerank as a TREC run: qid Q0 docid rank score tag, a line for each ranked document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ..engine.errors import UserError
from .compressed import reading, writing
from .converted import Lines, Writer
from .log import Origin, origin_of

_TAG = b"radix-ops-"


class TrecWriter(Writer):
    """The documents of each query, the best first and ranked from 1, by the ids of both.

    A query without an id has the number of its line, behind the file's name where there are several, and documents
    without ids have their index from 0. The tag is a hash of the run and of the lines.
    """

    def __init__(self, compression: str | None):
        self._compression = compression

    def write(self, lines: Lines, file: BinaryIO) -> None:
        found = hashlib.sha256(lines.key.encode())
        for line in _ranked(lines):
            found.update(line)
        tag = _tag_of(found)
        with writing(file, self._compression) as packed:
            for line in _ranked(lines):
                packed.write(line + tag)

    def holds(self, path: Path, key: str, keys: Iterable[str]) -> bool:
        found, tag = hashlib.sha256(key.encode()), b""
        try:
            with open(path, "rb") as file, reading(file, self._compression) as packed:
                for line in packed:
                    start, space, end = line.rpartition(b" ")
                    found.update(start + space)
                    if end != (tag := tag or end):
                        return False
        except ValueError:
            return False
        return tag == _tag_of(found)

    def may_hold(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file, reading(file, self._compression) as packed:
                lines = list(islice(packed, 1))
        except ValueError:
            return False
        return all(line.rpartition(b" ")[2].startswith(_TAG) for line in lines)


def _tag_of(found) -> bytes:
    return _TAG + found.hexdigest()[:16].encode() + b"\n"


def _ranked(lines: Iterable[dict]) -> Iterator[bytes]:
    """Yield each line up to its tag."""
    for fields in lines:
        query, order = query_id(fields.get("query_id"), origin_of(fields)), fields["order"]
        for rank, (index, name) in enumerate(zip(order, fields.get("ids", order), strict=True), 1):
            yield f"{query} Q0 {name} {rank} {fields['scores'][index]!r} ".encode()


def query_id(given: object, origin: Origin) -> str:
    """Return the id of a query, or what stands for one."""
    return ":".join(map(str, origin.values())) if given is None else str(given)


def read_scores(path: str, compression: str | None) -> dict[str, dict[str, float]]:
    """Return the scores of a run that `TrecWriter` wrote, by the ids of query and document."""
    found: dict[str, dict[str, float]] = {}
    with open(path, "rb") as file, reading(file, compression) as packed:
        for line in packed:
            query, _, document, _, score, _ = line.decode().split()
            found.setdefault(query, {})[document] = float(score)
    return found


class TrecIds:
    """Checks ids of queries and documents: a run can't hold white space in them, and no query twice."""

    def __init__(self):
        self._where: dict[str, str] = {}

    def check(self, where: str, given: object, origin: Origin, documents: Iterable[object]) -> None:
        """UserError for a query or a document that a run can't name; `where` names the record."""
        query = query_id(given, origin)
        what = "the file's name" if given is None else '"query_id"'
        _check_word(query, f"{where}: {what}")
        for index, document in enumerate(documents):
            _check_word(str(document), f'{where}: documents[{index}]: "id"')
        if (first := self._where.setdefault(query, where)) != where:
            raise UserError(f"{where} has the query_id {query!r} of {first}; a TREC run has each query once")


def _check_word(name: str, where: str) -> None:
    if name.split() != [name]:
        raise UserError(f"{where} is {name!r}; an id of a TREC run has no white space in it, and is not empty")
