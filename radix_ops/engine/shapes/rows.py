"""The parts that readers of hub rows are made of: a shape, and checks of what a row holds under a key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..inputs import Record, kind_of
from ..prompts import LETTERS

_OF_TASKS = ("gold", "relevance")


@dataclass(frozen=True)
class Shape:
    """Rows with these keys, none of them null. `read` returns the fields that a task parses of such a row."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], dict]
    also: Callable[[dict], bool] = lambda fields: True  # whether a row with the keys looks like it

    def has_keys(self, fields: dict) -> bool:
        return all(fields.get(key) is not None for key in self.keys)

    @property
    def words(self) -> str:
        """The keys, for messages."""
        return " and ".join(f'"{key}"' for key in self.keys)


def is_string(value: object) -> bool:
    return isinstance(value, str)


def is_strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def replaced(record: Record, used: tuple[str, ...], **fields: Any) -> dict:
    """Return `fields` that are not None behind the record's other keys; `used` are those that they were made of.

    What the record itself says of right answers, under the tasks' own keys, goes before what its shape says.
    """
    own = {key: record.fields[key] for key in _OF_TASKS if key in fields and not is_nothing(record.fields.get(key))}
    fields |= own
    others = {key: value for key, value in record.fields.items() if key not in used and key not in fields}
    return others | {key: value for key, value in fields.items() if value is not None}


def columns_of(record: Record, key: str, names: tuple[str, ...]) -> list[list]:
    """Return a list for each name of what stands under `key`: an object of arrays, or an array of objects.

    An array that lacks a name is empty. UserError for anything else, and for arrays of different lengths.
    """
    value, where = record.fields[key], f'{record.where}: "{key}"'
    if isinstance(value, dict):
        found = [value.get(name) for name in names]
        for name, column in zip(names, found, strict=True):
            if column is not None and not isinstance(column, (list, tuple)):
                raise UserError(f"{where}.{name} is {kind_of(column)}; it must be an array")
        lists = [[] if column is None else list(column) for column in found]
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise UserError(f"{where}[{index}] is {kind_of(entry)}; it must be an object")
        for name in names:
            lacks = [index for index, entry in enumerate(value) if entry.get(name) is None]
            if 0 < len(lacks) < len(value):
                raise UserError(f'{where}[{lacks[0]}] has no "{name}", and others have one')
        lists = [[entry[name] for entry in value if entry.get(name) is not None] for name in names]
    else:
        raise UserError(f"{where} is {kind_of(value)}; it must be an object of arrays, or an array of objects")
    sizes = {name: len(column) for name, column in zip(names, lists, strict=True) if column}
    if len(set(sizes.values())) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(f"{where} has {first} of {one} and {second} of {other}; each entry must have both")
    return lists


def gold_of_label(record: Record, key: str, labels: list) -> int | None:
    """Return the index of the label under `key`; None where that is null or empty, as in a test set without answers."""
    given = record.fields.get(key)
    if is_nothing(given):
        return None
    given = given.strip() if isinstance(given, str) else given
    places = [place for place, label in enumerate(labels) if str(label) == str(given)]
    if len(places) != 1:
        known = ", ".join(repr(label) for label in labels[:8])
        raise UserError(f'{record.where}: "{key}" is {given!r}, which must be one of the labels, {known}')
    return places[0]


def gold_of_index(record: Record, key: str, count: int, first: int = 0) -> int | None:
    """Return the index from 0 of a number, or its digits, under `key`, counted from `first` there; None where it is
    null, empty or -1, as in a test set without answers."""
    given = record.fields.get(key)
    if is_nothing(given):
        return None
    number = whole_number(given)
    if number is None and isinstance(given, str) and re.fullmatch(r"-?[0-9]{1,9}", given.strip()):
        number = int(given)
    if number == -1:
        return None
    if number is None or not first <= number < first + count:
        raise UserError(
            f'{record.where}: "{key}" is {given!r}; it must be a whole number from {first} to {first + count - 1}'
        )
    return number - first


def gold_of_answer(record: Record, key: str, choices: list[str]) -> int | None:
    """Return the index of an answer: an index from 0, a letter, or the text of a choice; None where there is none.

    A cell of CSV is a string, so an index may be in digits. UserError where these are the text of another choice.
    """
    given = record.fields.get(key)
    if is_nothing(given) or whole_number(given) is not None:
        return gold_of_index(record, key, len(choices))
    places = set()
    if isinstance(given, str):
        if given == "-1" and given not in choices:
            return None
        places = {place for place, choice in enumerate(choices) if given in (choice, str(place))}
        if given in LETTERS[: len(choices)]:
            places.add(LETTERS.index(given))
    if len(places) != 1:
        message = (
            f'{record.where}: "{key}" is {given!r:.80}, which is {"several" if places else "none"} of the '
            f"{len(choices)} choices; it must be an index from 0, a letter or the text of a choice"
        )
        if not places or not str(given).isdecimal():
            raise UserError(message)
        raise UserError(
            f'{message}; under "gold" a number is an index, and a string a text',
            f"{message}; --column gold={key} takes a number, or digits in CSV, as the index, and a string as the text",
        )
    return places.pop()


def agreed(record: Record, **found: int | None) -> int | None:
    """Return the index that keys of the record say, None where none says one. UserError for two that differ, unless the
    record has a "gold" of its own, which goes before them."""
    said = {key: index for key, index in found.items() if index is not None}
    if len(set(said.values())) > 1 and is_nothing(record.fields.get("gold")):
        words = " and ".join(f'"{key}" is {record.fields[key]!r:.80}' for key in said)
        message = f"{record.where}: {words}, which name different choices as the right one"
        raise UserError(f"{message}; leave out the wrong one", f"{message}; --drop {[*said][-1]} leaves that one out")
    return next(iter(said.values()), None)


def is_nothing(value: object) -> bool:
    """Return whether a value says nothing: null, or a text of white space alone, as an empty cell of a table is."""
    return value is None or (isinstance(value, str) and not value.strip())


def whole_number(value: object) -> int | None:
    """Return a whole number of any library as an int; None for what is none."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return value.__index__()  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return None
