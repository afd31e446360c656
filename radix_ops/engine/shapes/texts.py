"""Rows of the hub with a text, or a pair of texts, to label: each becomes `text`, perhaps with `text_pair`, beside what
says which label is right."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UserError
from ..inputs import Record
from .rows import Shape, is_nothing, replaced


def _one(key: str) -> Callable[[Record], dict]:
    """Return a reader of rows with a text under this key."""
    return lambda record: _labelled(record, replaced(record, (key,), text=record.text(key)))


def _pair(first: str, second: str) -> Callable[[Record], dict]:
    """Return a reader of rows with a pair of texts under these keys."""

    def read(record: Record) -> dict:
        texts = {"text": record.text(first), "text_pair": record.text(second)}
        return _labelled(record, replaced(record, (first, second), **texts))

    return read


def _as_it_is(record: Record) -> dict:
    return _labelled(record, record.fields)


def _labelled(record: Record, fields: dict) -> dict:
    """Return the fields with "labels", a name that results use themselves, as "gold": the right label, or labels."""
    if "labels" not in fields:
        return fields
    others = {key: value for key, value in fields.items() if key != "labels"}
    if not is_nothing(fields.get("gold")):
        return others
    if not is_nothing(fields.get("label")):
        raise UserError(
            f'{record.where} has "label" and "labels", and each may say which label is right; leave out one',
            f'{record.where} has "label" and "labels", and each may say which label is right; --column gold=label or '
            "--column gold=labels says which",
        )
    return others | {"gold": fields["labels"]}


_PAIRS = {
    "sentences": ("sentence1", "sentence2"),
    "nli": ("premise", "hypothesis"),
    "text-a-b": ("text_a", "text_b"),
    "text-1-2": ("text1", "text2"),
    "questions": ("question1", "question2"),
    "qnli": ("question", "sentence"),
}
OTHER_TEXTS = (
    Shape("sentence", ("sentence",), _one("sentence")),
    *(Shape(name, keys, _pair(*keys)) for name, keys in _PAIRS.items()),
)
TEXTS = (
    Shape("ids", ("input_ids",), _as_it_is),
    Shape("text", ("text",), _as_it_is, lambda fields: "input_ids" not in fields),
    *OTHER_TEXTS,
)
