"""Rows of the hub with a query and texts for it: each becomes the query with its `documents` and their `relevance`."""

from __future__ import annotations

from ..errors import UserError
from ..inputs import Record, kind_of
from .rows import Shape, columns_of, replaced

_IDS = ("id", "_id", "docid", "doc_id")


def _msmarco(record: Record) -> dict:
    """Return a row of MS MARCO (v1.1, v2.1): an object of arrays as on the hub, or objects as in Microsoft's files."""
    texts, selected = columns_of(record, "passages", ("passage_text", "is_selected"))
    return replaced(record, ("passages",), documents=texts, relevance=selected or None)


def _pairs(positive: str, negative: str):
    """Return a reader of rows with relevant texts under one key and others under another: arrays, or one text each."""

    def read(record: Record) -> dict:
        relevant, others = (_documents(record, key) for key in (positive, negative))
        return replaced(
            record,
            (positive, negative),
            documents=relevant + others,
            relevance=[1] * len(relevant) + [0] * len(others),
        )

    return read


def _documents(record: Record, key: str) -> list:
    value = record.fields.get(key)
    if value is None:
        return []
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise UserError(f'{record.where}: "{key}" is {kind_of(value)}; it must be an array of texts, or one text')
    return [_document(entry) for entry in value]


def _document(entry):
    """Return a document of a row: a text, or an object whose id is called `id`."""
    if not isinstance(entry, dict):
        return entry
    found = next((entry[name] for name in _IDS if entry.get(name) is not None), None)
    kept = {name: entry[name] for name in ("title", "text") if entry.get(name) is not None}
    return kept if found is None else {"id": found, **kept}


def _own(record: Record) -> dict:
    documents = record.fields["documents"]
    if not isinstance(documents, (list, tuple)) or not any(isinstance(entry, dict) for entry in documents):
        return record.fields
    return record.fields | {"documents": [_document(entry) for entry in documents]}


def _holds_passages(fields: dict) -> bool:
    passages = fields["passages"]
    entries = [passages] if isinstance(passages, dict) else passages
    return isinstance(entries, (list, tuple)) and all(isinstance(e, dict) and "passage_text" in e for e in entries)


RANKINGS = (
    Shape("ids", ("input_ids",), lambda record: record.fields),
    Shape("documents", ("query", "documents"), _own),
    Shape("msmarco", ("query", "passages"), _msmarco, _holds_passages),
    Shape("mteb", ("query", "positive", "negative"), _pairs("positive", "negative")),
    Shape("bge", ("query", "pos", "neg"), _pairs("pos", "neg")),
    Shape(
        "tevatron",
        ("query", "positive_passages", "negative_passages"),
        _pairs("positive_passages", "negative_passages"),
    ),
)
