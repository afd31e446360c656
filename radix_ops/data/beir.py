"""BEIR folders: a corpus, queries, and the judgements of a split, read as queries with their candidates.

records = BeirRecords("scifact", engine.parse, split="test", candidates="bm25.trec")
records.judgements  # {query id: {document id: relevance}}
"""

from __future__ import annotations

import csv
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic

import numpy as np

from ..engine.errors import UserError
from ..engine.inputs import Record
from .records import Records, T

MOST_DOCUMENTS = 1000  # of a query, unless candidates name them
_ENDINGS = ("", ".gz", ".zst")
_DIGEST = 16  # bytes that stand for a document's id
_DEFAULT_SPLIT = "test"


def is_beir(path: str | Path) -> bool:
    """Return whether a path is a folder with the files of BEIR."""
    return bool(_file(path, "corpus.jsonl") and _file(path, "queries.jsonl"))


def _file(folder: str | Path, name: str) -> Path | None:
    return next((path for ending in _ENDINGS if (path := Path(folder) / f"{name}{ending}").is_file()), None)


class BeirRecords(Generic[T]):
    """The judged queries of a BEIR folder, each with its candidates as documents; has the interface of `Records`.

    Documents stay in their file: memory holds 32 bytes for each, and 8 for each candidate of a query.

    Args:
        split: names a file of judgements, qrels/SPLIT.tsv; by default test, or the only one there is. Queries without
            judgements are left out; a folder without any has all its queries.
        candidates: a run file in TREC format, whose documents are the candidates of its queries; by default a query
            gets the whole corpus, and more than MOST_DOCUMENTS are refused.
        on_bytes: called with how much more of the files was checked.

    UserError for files that can't be used, by name and line.
    """

    unit = "line"

    def __init__(
        self,
        path: str | Path,
        parse: Callable[[Record], T] | None = None,
        *,
        split: str | None = None,
        candidates: str | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ):
        self.path, self.parse, self.format = str(path), parse, "beir"
        found = _qrels(path, split)
        self.judgements = {} if found is None else _read_qrels(found)
        self._digests = bytearray()
        self._is_indexed = False
        self._corpus = Records(_existing(path, "corpus.jsonl"), self._document, format="jsonl", on_bytes=on_bytes)
        self._is_indexed = True
        self._index = _Index(self._digests, self._corpus)
        self._queries = Records(_existing(path, "queries.jsonl"), _query, format="jsonl", on_bytes=on_bytes)
        self._chosen = array("q")  # of the queries, those that are asked
        self._ids: dict[str, int] = {}  # their places here
        self._choose(found)
        self._candidates = None if candidates is None else _read_run(candidates, self._ids, self._index)
        if candidates is None and len(self._corpus) > MOST_DOCUMENTS:
            raise UserError(
                f"{path}: each of {len(self):,} queries would get all {len(self._corpus):,} documents of the corpus, "
                f"and the most are {MOST_DOCUMENTS:,}; --candidates names a run file of a first stage, in TREC format"
            )
        for _ in self:  # which checks each record
            pass

    def _document(self, record: Record) -> dict:
        name = _id_of(record)
        document = {"id": name, "text": record.text("text")}
        if record.fields.get("title"):
            document["title"] = record.text("title")
        if not self._is_indexed:
            self._digests += _digest(name)
        return document

    def _choose(self, qrels: Path | None) -> None:
        for index, (name, _) in enumerate(self._queries):
            if name in self._ids:
                raise UserError(f"{self._where(index)} has the id {name!r} of a query before it")
            if qrels is None or name in self.judgements:
                self._ids[name] = len(self._chosen)
                self._chosen.append(index)
        missing = self.judgements.keys() - self._ids.keys()
        if missing:
            raise UserError(f"{qrels} judges the query {min(missing)!r}, which {self._queries.path} doesn't have")

    def _where(self, index: int) -> str:
        return f"{self._queries.path}, query {index + 1}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> T:
        """Return record `index`, from 0."""
        record: Any = self._record(index)
        return record if self.parse is None else self.parse(record)

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def _record(self, index: int) -> Record:
        place = self._chosen[index]
        _, record = self._queries[place]
        documents = range(len(self._corpus)) if self._candidates is None else self._candidates[index]
        return Record(record.where, record.fields | {"documents": [self._corpus[number] for number in documents]})

    def raw(self, index: int) -> bytes:
        """Return bytes that stand for the query with its documents, and decide the key of its result."""
        return json.dumps(self._record(index).fields, ensure_ascii=False).encode()

    def origin(self, index: int) -> dict:
        """Return the fields that open a result: where the query stands in its file."""
        return self._queries.origin(self._chosen[index])

    def index_of(self, origin: dict) -> int | None:
        """Return the record that a result with these fields is of; None where there is none."""
        place = self._queries.index_of(origin)
        index = None if place is None else int(np.searchsorted(self._chosen, place))
        return index if index is not None and index < len(self) and self._chosen[index] == place else None


class _Index:
    """The numbers of documents by their ids, of which digests stand in memory."""

    def __init__(self, digests: bytearray, corpus: Records):
        found = np.frombuffer(bytes(digests), f"S{_DIGEST}")
        self._order = np.argsort(found, kind="stable")
        self._sorted = found[self._order]
        same = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(same):
            first, second = sorted(self._order[same[0] : same[0] + 2].tolist())
            raise UserError(
                f"{corpus.path}: documents {first + 1} and {second + 1} have one id, {corpus[second]['id']!r}"
            )

    def numbers_of(self, names: list[str]) -> np.ndarray:
        """Return the documents' numbers, -1 for an id that is none of theirs."""
        wanted = np.frombuffer(b"".join(map(_digest, names)), f"S{_DIGEST}")
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[places] == wanted, self._order[places], -1)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest()


def _id_of(record: Record) -> str:
    name = record.fields.get("_id")
    return str(name) if type(name) is int else record.text("_id")


def _query(record: Record) -> tuple[str, Record]:
    name = _id_of(record)
    others = {key: value for key, value in record.fields.items() if key not in ("_id", "text", "metadata")}
    return name, Record(record.where, {"query_id": name, "query": record.text("text"), **others})


def _existing(folder: str | Path, name: str) -> Path:
    path = _file(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name}, which a BEIR folder holds")
    return path


def _qrels(folder: str | Path, split: str | None) -> Path | None:
    """Return the file of a split's judgements; None for a folder that has none."""
    known = sorted(path.name.removesuffix(".tsv") for path in Path(folder, "qrels").glob("*.tsv"))
    if split is None:
        if not known:
            return None
        if _DEFAULT_SPLIT not in known and len(known) > 1:
            raise UserError(f"{folder} has the judgements {', '.join(known)}; --split must say which of them count")
        split = _DEFAULT_SPLIT if _DEFAULT_SPLIT in known else known[0]
    if split not in known:
        raise UserError(
            f"{folder} has no judgements qrels/{split}.tsv for --split; it has {', '.join(known) or 'none'}"
        )
    return Path(folder, "qrels", f"{split}.tsv")


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Return the relevance by query and document of a .tsv file with a header, as BEIR has it, or of one in TREC's four
    columns."""
    found: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(path), 1):
        parts = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))
        if number == 1 and parts[0] in ("query-id", "query_id", "qid"):
            continue
        if len(parts) != 3:
            raise UserError(
                f"{path}, line {number} has {len(parts)} columns; it must have query-id, corpus-id and score"
            )
        query, document, score = parts
        try:
            found.setdefault(query, {})[document] = int(score)
        except ValueError as error:
            raise UserError(f"{path}, line {number} has the score {score!r}; it must be a whole number") from error
    if not found:
        raise UserError(f"{path} holds no judgements")
    return found


def _read_run(path: str, places: dict[str, int], index: _Index) -> list[array]:
    """Return for each query the numbers of its documents in a run file in TREC format, in the file's order."""
    found = [array("q") for _ in places]
    queries, names, numbers = array("q"), list[str](), array("q")  # of lines that are looked up together

    def take() -> None:
        for place, name, number, line in zip(queries, names, index.numbers_of(names).tolist(), numbers, strict=True):
            if number < 0:
                raise UserError(f"{path}, line {line} names the document {name!r}, which the corpus doesn't have")
            found[place].append(number)
        del queries[:], names[:], numbers[:]

    for line_number, line in enumerate(_lines(Path(path)), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 6:
            raise UserError(
                f"{path}, line {line_number} has {len(parts)} columns; a run file in TREC format has six: query, Q0, "
                "document, rank, score and a name"
            )
        if parts[0] in places:
            queries.append(places[parts[0]])
            names.append(parts[2])
            numbers.append(line_number)
            if len(names) == 100_000:
                take()
    if names:
        take()
    if not any(map(len, found)):
        raise UserError(f"{path} names no document for any of the {len(places):,} queries")
    for name, place in places.items():
        if len(set(found[place])) < len(found[place]):
            raise UserError(f"{path} names a document twice for the query {name!r}")
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
