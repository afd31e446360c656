"""Files of relevance judgements: TREC's qrels, and the tables of BEIR."""

from __future__ import annotations

from ..engine.errors import UserError
from ..engine.inputs import Record
from .records import Records

_HEADER = ["query-id", "corpus-id", "score"]
_SHAPES = "lines of \"query 0 document relevance\", TREC's, or a table of query-id, corpus-id and score by tabs, BEIR's"


def read_qrels(path: str) -> dict[str, dict[str, int]]:
    """Return the relevance of documents by the ids of query and document.

    A line holds four columns, query, iteration, document and relevance, or where the first line is BEIR's header three,
    between tabs. UserError, naming file and line, for anything else and for a document that is judged twice otherwise.
    """
    found: dict[str, dict[str, int]] = {}
    is_table: bool | None = None

    def add(record: Record) -> None:
        nonlocal is_table
        line = record.fields["text"].strip("\r\n")
        columns = [column.strip() for column in line.split("\t")] if is_table is not False and "\t" in line else []
        if is_table is None and line.strip():
            is_table = columns == _HEADER
            if is_table:
                return
        if not line.strip():
            return
        if not is_table:
            columns = line.split()
        if len(columns) != (3 if is_table else 4) or not all(columns):
            raise UserError(f"{record.where} holds {line[:80]!r}; relevance judgements are {_SHAPES}")
        query, document, relevance = columns[0], columns[-2], _whole(columns[-1], record.where)
        if found.setdefault(query, {}).setdefault(document, relevance) != relevance:
            raise UserError(
                f"{record.where}: the document {document!r} of the query {query!r} has the relevance {relevance}, and "
                f"{found[query][document]} before"
            )

    Records(path, add, format="text", shape=_SHAPES)
    if not found:
        raise UserError(f"{path} holds no judgement; it must have {_SHAPES}")
    return found


def _whole(text: str, where: str) -> int:
    try:
        number = float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{where}: the relevance {text!r} must be a whole number")
