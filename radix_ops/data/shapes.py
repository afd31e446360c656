"""The way from the rows of a file to the keys that a task parses: named columns, then shapes of the hub.

adapt = adapter("rerank", {"query": "question", "documents": "passages.text"})
adapt(Record("rows.jsonl, line 1", {"question": "...", "passages": [{"text": "..."}]})).fields["documents"]
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ..engine.errors import UserError
from ..engine.inputs import Record, kind_of
from ..engine.shapes.recognition import recognised

Columns = Mapping[str, str]  # the path in a row by the key that a task parses


def adapter(
    task: str, columns: Columns | None = None, shape: str | None = None, text_key: str = "text"
) -> Callable[[Record], Record]:
    """Return a function that gives a record the keys that `task` parses.

    A column's value goes to its key, and its place in the row goes; a row of a shape of the hub becomes what the task
    parses, by the keys that columns name where it can be read in two ways. The function raises UserError for a
    column that a row lacks and for a row that can be read in two ways, of which `shape` names one.
    """

    def adapt(record: Record) -> Record:
        if columns:
            names = {key: record.label_names[path] for key, path in columns.items() if path in record.label_names}
            record = record._replace(fields=_with_columns(record, columns), label_names={**record.label_names, **names})
        return recognised(task, record, shape, tuple(columns or ()), text_key)

    return adapt


def _with_columns(record: Record, columns: Columns) -> dict:
    found = {key: _value_at(record, path) for key, path in columns.items()}
    used = {path if path in record.fields else path.split(".")[0] for path in columns.values()}
    return {key: value for key, value in record.fields.items() if key not in used} | found


def _value_at(record: Record, path: str) -> Any:
    """Return what stands at a path: its dots go into objects, and into those of an array one by one."""
    if path in record.fields:  # a name may hold dots itself
        return record.fields[path]
    return _walk(record.fields, path.split("."), record.where, "")


def _walk(value: Any, names: list[str], where: str, place: str) -> Any:
    if not names:
        return value
    if isinstance(value, (list, tuple)):
        return [_walk(entry, names, where, f"{place}[{index}]") for index, entry in enumerate(value)]
    at = f" in {place}" if place else ""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} has no column {names[0]!r}{at}, which is {kind_of(value)}")
    if names[0] not in value:
        raise UserError(f"{where} has no column {names[0]!r}{at}; it has {_nearest(names[0], list(map(str, value)))}")
    return _walk(value[names[0]], names[1:], where, f"{place}.{names[0]}" if place else names[0])


def _nearest(name: str, known: list[str]) -> str:
    """Return the names in quotes, those that are most like `name` first."""
    near = difflib.get_close_matches(name, known, n=len(known) or 1, cutoff=0.0)
    listed = [repr(one) for one in near[:8]] + (["and more"] if len(near) > 8 else [])
    return ", ".join(listed) or "none"
