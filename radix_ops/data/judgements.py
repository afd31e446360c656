"""Files of retrieval beside documents and queries: judgements (qrels) of TREC and BEIR, and runs of a first stage."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from ..engine.errors import UserError
from .corpus import Corpus

_LINES_AT_ONCE = 100_000


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Return the relevance by the ids of query and document: of a file with three columns and a header, as BEIR has it,
    or with the four of TREC (query, iteration, document, relevance)."""
    found: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        parts = line.split("\t") if line.count("\t") == 2 else line.split()
        if len(parts) not in (3, 4):
            raise UserError(
                f"{path}, line {number} has {len(parts)} columns; judgements have query-id, corpus-id and score, or "
                "the four columns of TREC"
            )
        query, document, score = parts[0], parts[-2], parts[-1].strip()
        if number == 1 and score == "score":
            continue
        try:
            relevance = int(score)
        except ValueError as error:
            raise UserError(f"{path}, line {number} has the score {score!r}; it must be a whole number") from error
        before = found.setdefault(query, {}).setdefault(document, relevance)
        if before != relevance:
            raise UserError(
                f"{path}, line {number} gives the document {document!r} of the query {query!r} the score {relevance}, "
                f"and a line before it {before}"
            )
    if not found:
        raise UserError(f"{path} holds no judgements")
    return found


def read_run(path: str, corpus: Corpus) -> dict[str, array]:
    """Return the numbers of each query's documents in a run file in TREC format, in the file's order."""
    found: dict[str, array] = {}
    queries, names, lines = list[str](), list[str](), array("q")  # of lines that are looked up together

    def take() -> None:
        numbers = corpus.numbers_of(names).tolist() if names else []
        for query, name, line, number in zip(queries, names, lines, numbers, strict=True):
            if number < 0:
                raise UserError(f"{path}, line {line} names the document {name!r}, which the corpus doesn't have")
            found.setdefault(query, array("q")).append(number)
        del queries[:], names[:], lines[:]

    for line, text in _lines(path):
        parts = text.split()
        if len(parts) != 6:
            raise UserError(
                f"{path}, line {line} has {len(parts)} columns; a run file in TREC format has six: query, Q0, "
                "document, rank, score and the run's name"
            )
        queries.append(parts[0])
        names.append(parts[2])
        lines.append(line)
        if len(names) == _LINES_AT_ONCE:
            take()
    take()
    for query, numbers in found.items():
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{path} names a document twice for the query {query!r}")
    return found


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
