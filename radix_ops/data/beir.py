"""BEIR folders: corpus, queries and the judgements of a split, as rows of queries with their candidates.

source = BeirSource("scifact", split="test", candidates="bm25.trec")
rows = [row for row in source]
rows[0].fields  # {"query_id": ..., "query": ..., "documents": [{"id": ..., "title": ..., "text": ...}, ...]}
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.inputs import Record
from .corpus import Corpus, id_of, line_source
from .judgements import read_qrels, read_run
from .lines import dump_json
from .sources import Row, Source

MOST_DOCUMENTS = 1000  # of a query, unless candidates name them
_CORPUS, _QUERIES, _DEFAULT_SPLIT = "corpus.jsonl", "queries.jsonl", "test"
_ENDINGS = ("", ".gz", ".zst")


def is_beir(path: str | Path) -> bool:
    """Return whether a path is a folder with the files of BEIR."""
    return bool(_file(path, _CORPUS) and _file(path, _QUERIES))


def _file(folder: str | Path, name: str) -> Path | None:
    return next((path for ending in _ENDINGS if (path := Path(folder) / f"{name}{ending}").is_file()), None)


def judgements_of(folder: str, split: str | None) -> dict[str, dict[str, int]]:
    """Return the relevance by the ids of query and document; empty for a folder that has no judgements."""
    path = _qrels(folder, split)
    return {} if path is None else read_qrels(path)


def _qrels(folder: str, split: str | None) -> Path | None:
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


class BeirSource(Source):
    """The judged queries of a BEIR folder, each with its candidates as documents; a row has its line of the queries.

    Documents stay in their file: memory holds 32 bytes for each, and 8 for each candidate of a query.

    split: names a file of judgements, qrels/SPLIT.tsv; by default test, or the only one there is. Queries that it does
        not judge are left out; a folder without judgements has all its queries.
    candidates: a run file in TREC format, whose documents are the candidates of its queries; by default a query gets
        the whole corpus, and more than MOST_DOCUMENTS are refused.
    """

    unit = "line"

    def __init__(self, folder: str, split: str | None = None, candidates: str | None = None):
        corpus, queries = _file(folder, _CORPUS), _file(folder, _QUERIES)
        assert corpus is not None
        assert queries is not None
        super().__init__(str(queries))
        self._folder, self._run = folder, candidates
        self._qrels = _qrels(folder, split)
        self._queries, self._corpus = line_source(queries), Corpus(corpus)
        self._lines = array("q")  # of each row, among those of the queries
        self._candidates: dict[str, array] | None = None

    def __iter__(self) -> Iterator[Row]:
        judged = None if self._qrels is None else read_qrels(self._qrels)
        self._corpus.read()
        if self._run is not None:
            self._candidates = read_run(self._run, self._corpus)
        elif len(self._corpus) > MOST_DOCUMENTS:
            count = f"{len(judged):,} judged queries" if judged is not None else "the queries"
            raise UserError(
                f"{self._folder}: each of {count} would get all {len(self._corpus):,} documents of the corpus, and the "
                f"most are {MOST_DOCUMENTS:,}; --candidates names a run file of a first stage, in TREC format"
            )
        yield from self._rows(judged)

    def _rows(self, judged: dict | None) -> Iterator[Row]:
        seen: set[str] = set()
        has_candidates, has_bad = self._candidates is None, False
        for line, row in enumerate(self._queries):
            try:
                name, query = self._query(row.number, row.fields)
                if name in seen:
                    raise UserError(f"{self.where_of(row.number)} has the id {name!r} of a query before it")
            except UserError as error:
                fields: Any = error
                has_bad = True
            else:
                seen.add(name)
                if judged is not None and name not in judged:
                    continue
                has_candidates |= self._candidates is not None and name in self._candidates
                fields = self._with_documents(name, query)
            self._lines.append(line)
            self.numbers.append(row.number)
            yield Row(row.number, row.raw if isinstance(fields, UserError) else dump_json(fields), fields)
        # A query that can't be used may be the one that is missing.
        if judged is not None and not has_bad and (missing := judged.keys() - seen):
            raise UserError(f"{self._qrels} judges the query {min(missing)!r}, which {self.name} doesn't have")
        if not has_candidates and len(self):
            raise UserError(f"{self._run} names no document for any of the {len(self):,} queries")

    def _query(self, number: int, fields: dict | UserError) -> tuple[str, dict]:
        if isinstance(fields, UserError):
            raise fields
        record = Record(self.where_of(number), fields)
        name = id_of(record)
        others = {key: value for key, value in fields.items() if key not in ("_id", "text", "metadata")}
        return name, {"query_id": name, "query": record.text("text"), **others}

    def _with_documents(self, name: str, query: dict) -> dict:
        numbers = range(len(self._corpus)) if self._candidates is None else self._candidates.get(name, ())
        return query | {"documents": [self._corpus[number] for number in numbers]}

    def fields(self, index: int) -> dict:
        return self._with_documents(*self._query(self.numbers[index], self._queries.fields(self._lines[index])))

    def raw(self, index: int) -> bytes:
        try:
            return dump_json(self.fields(index))
        except UserError:  # a query that can't be used
            return self._queries.raw(self._lines[index])

    @property
    def num_read(self) -> int:
        return self._corpus.num_read + self._queries.num_read
