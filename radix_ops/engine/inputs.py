"""One input of a task: its fields and the checks of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import NamedTuple

from .errors import UserError

LONGEST_TEXT = 8 * 2**20  # bytes of UTF-8: a tokenizer takes about a second for each 2**20


class Record(NamedTuple):
    """The fields of one input, which need not be right."""

    where: str  # names the input in messages: file and line, or an argument and its index
    fields: dict  # as JSON has them
    # By a field of whole numbers that stand for labels: the labels' names, where the data set has them.
    label_names: Mapping[str, Sequence[str]] = MappingProxyType({})

    def text(self, key: str) -> str:
        """Return the string under `key`. UserError where there is none, or one that no tokenizer can read."""
        return check_text(self.field(key, "a string"), f'{self.where}: "{key}"')

    def texts(self, key: str) -> list[str]:
        """Return the array of strings under `key`, which must hold at least one; they may be empty."""
        texts = self.field(key, "an array of strings")
        if not isinstance(texts, list):
            raise UserError(f'{self.where}: "{key}" is {kind_of(texts)}; it must be an array of strings')
        if not texts:
            raise UserError(f'{self.where}: "{key}" is an empty array; it must hold at least one string')
        for index, text in enumerate(texts):
            check_text(text, f"{self.where}: {key}[{index}]")
        return texts

    def others(self, used: tuple[str, ...], reserved: tuple[str, ...]) -> dict:
        """Return the fields but for `used`, to be copied to the output. UserError for one that the output uses."""
        others = {key: value for key, value in self.fields.items() if key not in used}
        clash = next((key for key in reserved if key in others), None)
        if clash is not None:
            raise UserError(f'{self.where} has the key "{clash}", which the output uses itself; rename it')
        return others

    def field(self, key: str, kind: str):
        """Return the value under `key`. UserError where there is none; `kind` says what it must be."""
        if key not in self.fields:
            has = ", ".join(f'"{name}"' for name in list(self.fields)[:8]) or "no keys"
            raise UserError(f'{self.where} has no "{key}" ({kind}); it has {has}')
        return self.fields[key]


def kind_of(value) -> str:
    """Name the kind of a JSON value in words, and of any other its type."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value)) or ("a number" if isinstance(value, Real) else f"a {type(value).__name__}")


def check_text(text, where: str) -> str:
    """Return the text. UserError unless it is a string that UTF-8 can hold, of LONGEST_TEXT bytes at most."""
    if not isinstance(text, str):
        raise UserError(f"{where} is {kind_of(text)}; it must be a string")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which no tokenizer can read") from error
    if size > LONGEST_TEXT:
        raise UserError(f"{where} is a text of {size:,} bytes, and the most are {LONGEST_TEXT:,}; split it")
    return text
