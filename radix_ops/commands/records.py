"""Input files of the radix-ops command: JSONL, or one text a line. A file is checked whole, then read again by line.

records = Records("texts.jsonl", lambda record: record.text("text"))
records[7]  # the text of line 8
"""

from __future__ import annotations

import array
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import numpy as np

T = TypeVar("T")
FORMATS = ("jsonl", "text")
_BOM = b"\xef\xbb\xbf"


class UserError(ValueError):
    """What the user gave can't be used; the message is one plain sentence for them."""


@dataclass(frozen=True)
class Record:
    """One input line."""

    line: int  # counted from 1
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


class Records(Generic[T]):
    """The lines of a file, each as `parse` makes it of its Record; by default the Record itself.

    Making one reads and parses the whole file, so that a line that can't be used is a UserError, naming file and line,
    before any work. Memory holds 8 bytes a line: a line that is asked for is read and parsed again. A byte order mark,
    CRLF and a last line without newline are understood. A pipe is copied to a temporary file first.

    Args:
        format: "text" for one text a line, an empty line being an empty text, or "jsonl" for one JSON object a line.
            By default text where the path ends in .txt.
        shape: what a line has to look like, for the message about an empty file.
        on_bytes: called with the size of each line that was checked.
    """

    def __init__(
        self,
        path: str | Path,
        parse: Callable[[Record], T] | None = None,
        *,
        format: str | None = None,
        shape: str = "one JSON object a line",
        on_bytes: Callable[[int], object] | None = None,
    ):
        if format not in (None, *FORMATS):
            raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
        self.path = str(path)
        self.format = format or ("text" if self.path.endswith(".txt") else "jsonl")
        self.parse = parse
        try:
            self._file = _seekable(open(path, "rb"))  # noqa: SIM115
            self._stamp = self._current_stamp()
            self._starts = self._check(on_bytes)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error
        if not len(self):
            raise UserError(f"{path} is empty; it must hold {'one text a line' if self.format == 'text' else shape}")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> T:
        """Line index + 1. UserError where the file has changed since it was checked."""
        return self._parsed(self.raw(index), index)

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def raw(self, index: int) -> bytes:
        """Line index + 1 as it stands in the file, without its newline."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} lines, asked for index {index}")
        if self._current_stamp() != self._stamp:
            raise UserError(f"{self.path} was changed while it was being read")
        start, end = (int(self._starts[i]) for i in (index, index + 1))
        self._file.seek(start)
        return self._file.read(end - start).removesuffix(b"\n")

    def _check(self, on_bytes) -> np.ndarray:
        """Parses each line; returns where lines start, int64 [lines + 1]."""
        start = len(_BOM) if self._file.read(len(_BOM)) == _BOM else 0
        self._file.seek(start)
        starts = array.array("q", [start])
        for index, raw in enumerate(self._file):
            self._parsed(raw.removesuffix(b"\n"), index)
            starts.append(starts[-1] + len(raw))
            if on_bytes:
                on_bytes(len(raw))
        return np.frombuffer(starts, np.int64)

    def _parsed(self, raw: bytes, index: int) -> T:
        where = f"{self.path}, line {index + 1}"
        fields = _parse_text(raw, where) if self.format == "text" else _parse(raw, where)
        record = Record(index + 1, where, fields)
        return record if self.parse is None else self.parse(record)

    def _current_stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _seekable(file: BinaryIO) -> BinaryIO:
    if file.seekable():
        return file
    copied = tempfile.TemporaryFile(prefix="radix_ops-")  # noqa: SIM115
    with file:
        shutil.copyfileobj(file, copied, 2**20)
    copied.flush()
    copied.seek(0)
    return copied


def _parse_text(raw: bytes, where: str) -> dict:
    return {"text": _decode(raw.removesuffix(b"\r"), where)}


def _parse(raw: bytes, where: str) -> dict:
    if not raw.strip():
        raise UserError(f"{where} is blank; each line must hold one JSON object")
    text = _decode(raw, where)
    try:
        fields = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} holds {kind_of(fields)}; it must hold an object")
    return fields


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def kind_of(value) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def check_text(text, where: str) -> str:
    """The text. UserError unless it is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UserError(f"{where} is {kind_of(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which no tokenizer can read") from error
    return text
