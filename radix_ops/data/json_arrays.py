"""The objects of a JSON array, one after another: the array may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from ..engine.errors import UserError
from .lines import parse_json
from .sources import Row, place
from .streams import BOM, LONGEST_LINE, ByteFile, StreamError

_CHUNK_BYTES = 2**16
_SPACE = re.compile(r"[ \t\n\r]*")
# Finds where a value ends. Its numbers stay text, so that none can be too large; parse_json judges them.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str, strict=True)


def read_array(name: str, file: ByteFile) -> Iterator[Row]:
    """Yield the array's values as rows, those that are no objects with their error. StreamError for other JSON."""
    text = _Text(file)
    if text.next_character() != "[":
        raise StreamError(" is not a JSON array: it does not start with [")
    text.at += 1
    number, ending = 0, text.next_character()
    if ending == "]":
        text.at += 1
    while ending != "]":
        number += 1
        try:
            raw = text.value().encode("utf-8", "surrogatepass")
        except RecursionError as error:
            raise StreamError(f", row {number} holds arrays or objects within too many others") from error
        except ValueError as error:
            raise StreamError(f", row {number} {error}") from error
        fields: dict | UserError
        try:
            fields = parse_json(raw, place(name, "row", number))
        except UserError as error:
            fields = error
        yield Row(number, raw, fields)
        ending = text.next_character()
        if ending not in (",", "]"):
            found = f"{ending!r} stands" if ending else "the file ends"
            raise StreamError(f", row {number} is not JSON: behind it {found} where , or ] must")
        text.at += 1
        if ending == "," and text.next_character() == "]":
            raise StreamError(f", row {number} is not JSON: behind its , a row is missing")
    if text.next_character():
        raise StreamError(f" is not JSON: something stands behind its array of {number:,} rows")


class _Text:
    """The text of a file, of which a window is held; `at` is where it is read from."""

    def __init__(self, file: ByteFile):
        self._stream = file.stream
        if file.head.startswith(BOM):
            self._stream.read(len(BOM))
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._held, self.at, self._is_whole = "", 0, False

    def next_character(self) -> str:
        """Return the next character that is no white space, and go to it; "" at the end of the file."""
        while True:
            match = _SPACE.match(self._held, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self._held):
                return self._held[self.at]
            if not self._read_more():
                return ""

    def value(self) -> str:
        """Return the text of the value that starts here, and go behind it. ValueError where there is none."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._held, self.at)
                # What follows tells that a number does not go on.
                if end < len(self._held) or not self._read_more():
                    found = self._held[self.at : end]
                    self.at = end
                    return found
            except json.JSONDecodeError as error:
                if len(self._held) - self.at > LONGEST_LINE:
                    raise ValueError(
                        f"is not JSON, or longer than {LONGEST_LINE:,} bytes, the most for a row: {error.msg}"
                    ) from error
                if not self._read_more():
                    raise ValueError(f"is not JSON: {error.msg}") from error

    def _read_more(self) -> bool:
        """Read as much as is held, at least a chunk, so that a value that takes several is decoded a few times."""
        if self._is_whole:
            return False
        part = self._stream.read(max(_CHUNK_BYTES, len(self._held) - self.at))
        self._is_whole = not part
        try:
            self._held = self._held[self.at :] + self._decode(part, final=self._is_whole)
        except UnicodeDecodeError as error:
            raise StreamError(f" is not UTF-8: byte 0x{error.object[error.start]:02x} in its array") from error
        self.at = 0
        return True
