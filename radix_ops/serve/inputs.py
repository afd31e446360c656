"""The inputs of requests: texts, token ids and pairs, counted and told apart before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ..engine.inputs import kind_of
from .shapes import Unusable

_MOST_SHOWN = 60  # characters
_ID: dict[str, Any] = {"type": "integer", "minimum": 0}
_IDS: dict[str, Any] = {"type": "array", "items": _ID, "minItems": 1}
_STRING: dict[str, Any] = {"type": "string"}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


# Checked below: by one look at each, and in words.
Texts = Annotated[Any, WithJsonSchema({"anyOf": [_STRING, _IDS, _array({"anyOf": [_STRING, _IDS]})]})]
Strings = Annotated[Any, WithJsonSchema({"anyOf": [_STRING, _array(_STRING)]})]
ListOfStrings = Annotated[Any, WithJsonSchema(_array(_STRING))]
Ids = Annotated[Any, WithJsonSchema(_IDS)]
ListsOfIds = Annotated[Any, WithJsonSchema({"anyOf": [_IDS, _array(_IDS)]})]
TextsOrPairs = Annotated[
    Any,
    WithJsonSchema({"anyOf": [_STRING, _array({"anyOf": [_STRING, {**_array(_STRING), "maxItems": 2}]})]}),
]
Documents = Annotated[
    Any,
    WithJsonSchema(
        _array({"anyOf": [_STRING, {"type": "object", "properties": {"text": _STRING}, "required": ["text"]}]})
    ),
]
Salt = Annotated[str | None, Field(max_length=256)]


class Fields(BaseModel):
    """The fields of a body; a number is no string and no boolean."""

    model_config = ConfigDict(strict=True)


class Inputs(NamedTuple):
    """Inputs of a request with their names in errors; `is_one` where the field holds one, and no list of them."""

    values: list[Any]
    names: list[str]
    is_one: bool


def texts(value: Any, name: str, most: int) -> Inputs:
    """Return the texts, or token ids, of a field: one, or a list of them. Unusable for anything else."""
    if isinstance(value, str) or _is_ids(value):
        return Inputs([value], [name], True)
    found = listed(value, name, most, "a string, token ids, or a list of those")
    for place, each in zip(found.names, found.values, strict=True):
        if not isinstance(each, (str, list)):
            raise _wrong(place, each, "a string or an array of token ids")
    return found


def strings(value: Any, name: str, most: int, takes_one: bool = False) -> Inputs:
    """Return the strings of a field. Unusable for anything else."""
    if takes_one and isinstance(value, str):
        return Inputs([value], [name], True)
    found = listed(value, name, most, "a string or an array of strings" if takes_one else "an array of strings")
    for place, each in zip(found.names, found.values, strict=True):
        if not isinstance(each, str):
            raise _wrong(place, each, "a string")
    return found


def texts_or_pairs(value: Any, name: str, most: int) -> Inputs:
    """Return rows {"text": ..., "text_pair": ...} of a field as TEI reads it: a string, a pair of them, or a batch of
    arrays of one or two."""
    if isinstance(value, str):
        return Inputs([{"text": value}], [name], True)
    found = listed(value, name, most, "a string, a pair of strings, or an array of arrays of one or two")
    if isinstance(found.values[0], str):
        return Inputs([_row(found.values, name)], [name], True)
    return Inputs(
        [_row(each, place) for place, each in zip(found.names, found.values, strict=True)], found.names, False
    )


def _row(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, list) or not 1 <= len(value) <= 2 or not all(isinstance(text, str) for text in value):
        raise _wrong(name, value, "an array of one string or two")
    return dict(zip(("text", "text_pair"), value, strict=False))


def listed(value: Any, name: str, most: int, what: str) -> Inputs:
    """Return the entries of an array. Unusable for one that is empty or longer than `most`, and for anything else."""
    if not isinstance(value, list):
        raise _wrong(name, value, what)
    if not value:
        raise Unusable("empty", f"{name} is an empty array; it must hold at least one input", name)
    if len(value) > most:
        raise Unusable(
            "too_many", f"{name} has {len(value):,} inputs, and the most are {most:,}; send them in parts", name
        )
    return Inputs(value, [f"{name}[{index}]" for index in range(len(value))], False)


def ids(value: Any, name: str, vocab_size: int) -> list[int]:
    """Return the token ids of an array. Unusable for anything else, and for ids that the model doesn't have."""
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise _wrong(name, value, "an array of token ids")
    wrong = next((token for token in value if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise Unusable("invalid", f"{name} holds {wrong}; the model's token ids are from 0 to {vocab_size - 1}", name)
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (int, float))


def shown(value: Any) -> str:
    """Return a value as errors show it: its kind where it is long, and no more than the start of a string."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}..."
    return kind_of(value) if isinstance(value, (dict, list)) else f"{json.dumps(value):.{_MOST_SHOWN}}"


def _wrong(name: str, value: Any, what: str) -> Unusable:
    found = "an array of something else" if isinstance(value, list) and "array" in what else kind_of(value)
    return Unusable("invalid", f"{name} is {found}; it must be {what}", name.partition("[")[0])


def one_or_all(values: Sequence[Any], is_one: bool) -> Any:
    """Return the value of the one input, or a list of those of all."""
    return values[0] if is_one else list(values)
