"""One input of a task: its fields and the checks of its texts."""

from __future__ import annotations

from typing import NamedTuple

from .errors import UserError

LONGEST_TEXT = 8 * 2**20  # bytes of UTF-8: a tokenizer takes about a second for each 2**20


class Record(NamedTuple):
    """One input line."""

    line: int  # of the file, counted from 1
    where: str  # file and line, for messages
    fields: dict  # the JSON object; of a text file {"text": the line}

    def text(self, key: str) -> str:
        """The string under `key`. UserError where there is none, or one that no tokenizer can read."""
        return check_text(self._field(key, "a string"), f'{self.where}: "{key}"')

    def texts(self, key: str) -> list[str]:
        """The array of strings under `key`, which must hold one at least; they may be empty."""
        texts = self._field(key, "an array of strings")
        if not isinstance(texts, list):
            raise UserError(f'{self.where}: "{key}" is {kind_of(texts)}; it must be an array of strings')
        if not texts:
            raise UserError(f'{self.where}: "{key}" is an empty array; it must hold at least one string')
        for index, text in enumerate(texts):
            check_text(text, f"{self.where}: {key}[{index}]")
        return texts

    def others(self, used: tuple[str, ...], reserved: tuple[str, ...]) -> dict:
        """The fields but for `used`, to be copied to the output. UserError for one that the output uses itself."""
        others = {key: value for key, value in self.fields.items() if key not in used}
        clash = next((key for key in reserved if key in others), None)
        if clash is not None:
            raise UserError(f'{self.where} has the key "{clash}", which the output uses itself; rename it')
        return others

    def _field(self, key: str, kind: str):
        if key not in self.fields:
            has = ", ".join(f'"{name}"' for name in list(self.fields)[:8]) or "no keys"
            raise UserError(f'{self.where} has no "{key}" ({kind}); it has {has}')
        return self.fields[key]


def kind_of(value) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def check_text(text, where: str) -> str:
    """The text. UserError unless it is a string that UTF-8 can hold, of LONGEST_TEXT bytes at most."""
    if not isinstance(text, str):
        raise UserError(f"{where} is {kind_of(text)}; it must be a string")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which no tokenizer can read") from error
    if size > LONGEST_TEXT:
        raise UserError(f"{where} is a text of {size:,} bytes, and the most are {LONGEST_TEXT:,}; split it")
    return text
