"""Rows of the hub, recognised by their keys and turned into what the tasks parse.

record = recognised("score", Record("items[0]", {"question": ..., "choices": {"text": ..., "label": ...}, ...}))
record.fields  # {"question": ..., "choices": [...], "gold": 2}, and the row's other keys
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import UserError
from ..inputs import Record
from .questions import QUESTIONS
from .rankings import RANKINGS
from .rows import Shape, is_string
from .texts import OTHER_TEXTS, TEXTS

IDS = ("input_ids", "context_ids", "choices_ids")


def _document(record: Record) -> dict:
    """Return a row of a BEIR corpus with title and text as one text, as BEIR joins them."""
    fields = {key: value for key, value in record.fields.items() if key != "title"}
    return fields | {"text": f"{record.fields['title']} {record.text('text')}".strip()}


@functools.cache
def shapes_of(task: str, text_key: str = "text") -> tuple[Shape, ...]:
    """Return the shapes of rows that a command reads; none where a task reads its own keys alone."""
    own_text = Shape("text", (text_key,), lambda record: record.fields)
    document = Shape("beir", ("_id", "title", "text"), _document, lambda fields: is_string(fields["title"]))
    documents = (document,) if text_key == "text" else ()
    # Where a row has a text, too, that is what the other commands read.
    texts = [replace(shape, also=lambda fields: "text" not in fields) for shape in OTHER_TEXTS if text_key == "text"]
    return {
        "score": QUESTIONS,
        "rerank": RANKINGS,
        "classify": TEXTS,
        "embed": (Shape("ids", ("input_ids",), lambda record: record.fields), own_text, *documents),
        "inspect": (*QUESTIONS, *(shape for shape in RANKINGS if shape.name != "ids"), *documents, *texts),
    }.get(task, ())


def recognised(
    task: str, record: Record, name: str | None = None, named: Collection[str] = (), text_key: str = "text"
) -> Record:
    """Return the record with the keys that `task` parses; one of no shape that is known stays as it is.

    name, named: the shape that it is read as, or some of that shape's keys, where the row's keys alone don't decide.
    UserError for a row that can be read in two ways, and for one that lacks what its shape has.
    """
    shape = _find(shapes_of(task, text_key), record, name, named)
    if shape is None:
        return record
    fields = shape.read(record)
    if shape.name != "ids":
        fields = {key: value for key, value in fields.items() if key not in IDS}
    names = record.label_names
    if "labels" in names and fields.get("gold") is record.fields.get("labels"):
        names = {**names, "gold": names["labels"]}
    return record._replace(fields=fields, label_names=names)


def _find(shapes: Sequence[Shape], record: Record, name: str | None, named: Collection[str]) -> Shape | None:
    if name is not None:
        called = [shape for shape in shapes if shape.name == name]
        found = next((shape for shape in called if shape.has_keys(record.fields)), None)
        if found is None:
            words = " or ".join(shape.words for shape in called)
            has = ", ".join(f'"{key}"' for key in list(record.fields)[:8]) or "no keys"
            raise UserError(f"{record.where} is no row of --shape {name}, which has {words}; it has {has}")
        return found
    fitting = [shape for shape in shapes if shape.has_keys(record.fields) and shape.also(record.fields)]
    fitting = [shape for shape in fitting if not any(set(shape.keys) < set(other.keys) for other in fitting)]
    if len(fitting) > 1:
        fitting = [shape for shape in fitting if not set(named).isdisjoint(shape.keys)] or fitting
    if len(fitting) > 1:
        first, second = fitting[:2]
        both = f"{record.where} can be read by {first.words} ({first.name}) and by {second.words} ({second.name})"
        raise UserError(
            f"{both}; leave out the keys of one",
            f"{both}; --shape {first.name} or --shape {second.name} says which",
        )
    return fitting[0] if fitting else None
