"""The token sequences of records, with those records refused that no engine can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine.errors import UserError
from ..engine.items import Items
from .bad_rows import MOST_READ
from .records import Records

_RECORDS_AT_ONCE = 1024


def encode_records(
    records: Records, encode: Callable[[list], Items], on_progress: Callable[[int], object] | None = None
) -> Any:
    """Return the sequences of all records, those of record i as item i; `encode` makes them of some records.

    Records that `encode` refuses, such as texts that are too long for the model, are refused as `records.on_error`
    says: a UserError names them, or they are no records any more, or they are items of no sequences, as those in
    `records.refused` are. An error that does not name a record is none of a record's, and is raised.

    on_progress: called with how many more records were read.
    """
    items: Items | None = None
    num_before = 0  # items of no sequences before the first that has some
    reasons: dict[int, UserError] = {}
    for first in range(0, len(records), _RECORDS_AT_ONCE):
        indices = range(first, min(first + _RECORDS_AT_ONCE, len(records)))
        parsed = {index: records[index] for index in indices if index not in records.refused}
        part, places, errors = _encoded(parsed, encode)
        reasons |= errors
        for index in indices:
            if index in places:
                if items is None:
                    items = _of_no_sequences(type(part), num_before)
                items.append(part[places[index]])
            elif records.on_error == "record" and items is not None:
                items.append([])
            elif records.on_error == "record":
                num_before += 1
        if on_progress:
            on_progress(len(indices))
        if records.on_error == "stop" and len(reasons) >= MOST_READ:
            break
    records.refuse(reasons)
    return _of_no_sequences(Items, num_before) if items is None else items


def _of_no_sequences(kind: type[Items], count: int) -> Items:
    items = kind()
    for _ in range(count):
        items.append([])
    return items


def _encoded(parsed: dict[int, Any], encode) -> tuple[Any, dict[int, int], dict[int, UserError]]:
    """Return the sequences of records, the item by index of each that could be encoded, and errors of the others."""
    if not parsed:
        return None, {}, {}
    try:
        return encode(list(parsed.values())), {index: item for item, index in enumerate(parsed)}, {}
    except UserError:
        errors = {}
        for index, record in parsed.items():
            try:
                encode([record])
            except UserError as error:
                if getattr(record, "where", "") not in str(error):
                    raise
                errors[index] = error
    fine = {index: record for index, record in parsed.items() if index not in errors}
    return (*_encoded(fine, encode)[:2], errors)
