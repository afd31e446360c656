"""One line of JSON, or of text, as the fields of a record, and back."""

from __future__ import annotations

import json
import math
from typing import Any

from ..engine.errors import UserError
from ..engine.inputs import kind_of

_DEEPEST = 200  # arrays and objects within each other: what can be read must be written, too, from a deeper stack


def parse_text(raw: bytes, where: str) -> dict:
    return {"text": decode(raw.removesuffix(b"\r"), where)}


def parse_json(raw: bytes, where: str) -> dict:
    """Return the object of a line. UserError for anything else, for a key that stands twice, a number that isn't finite
    and objects that are too deep."""
    text = decode(raw, where)
    try:
        fields = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {str(error).partition('; use sys.')[0]}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {kind_of(fields)}; it must hold an object")
    if len(raw) > 2 * _DEEPEST and _may_be_deep(raw):
        _check_depth(fields, where)
    return fields


def dump_json(fields: dict) -> bytes:
    """Return a line that `parse_json` reads as these fields. TypeError or ValueError where JSON can't hold them."""
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(fields).encode()


def decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise UserError(f"{where} is not UTF-8: {what}; save it as UTF-8") from error


def _may_be_deep(raw: bytes) -> bool:
    """Return False where there are too few brackets; where they are rare, `find` is 50 times as fast as `count`."""
    for sign in (b"[", b"{"):
        found = -1
        for _ in range(_DEEPEST // 2 + 1):
            if (found := raw.find(sign, found + 1)) < 0:
                break
        else:
            return True
    return False


def _check_depth(fields: dict, where: str) -> None:
    level: list[Any] = [fields]
    for _ in range(_DEEPEST):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, (dict, list))]
    if level:
        raise UserError(f"{where} holds arrays or objects within more than {_DEEPEST} others")


class TwiceError(ValueError):
    """An object of JSON has a key twice."""


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON. TwiceError for a key that stands twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise TwiceError(f"the key {name!r} stands twice")
            seen.add(name)
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
