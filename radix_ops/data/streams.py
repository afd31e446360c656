"""The lines of an input file, be it plain, gzip or a pipe, and the names of files that are none of them.

lines = LineFile("texts.jsonl.gz", skips_blank=True)
starts = [start for number, start, line in lines]  # once, in order
lines.at(starts[7], starts[8])  # then any of them
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

LONGEST_LINE = 64 * 2**20  # bytes
MOST_BLANK = 2**20  # bytes of blank lines in a row
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_HEAD_SIZE = 512
_UTF16, _UTF32 = "text in UTF-16", "text in UTF-32"
_UNPACK = "decompress it first (of compressed files gzip alone is read)"
_CONVERT = "write it as JSON lines first"
# The starts of files of other kinds; the first that fits counts.
_SIGNS = (
    (b"\xff\xfe\0\0", _UTF32),
    (b"\0\0\xfe\xff", _UTF32),
    (b"\xff\xfe", _UTF16),
    (b"\xfe\xff", _UTF16),
    (b"PK\3\4", f"a zip archive; {_UNPACK}"),
    (b"PK\5\6", f"a zip archive; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"compressed by zstd; {_UNPACK}"),
    (b"\xfd7zXZ\0", f"compressed by xz; {_UNPACK}"),
    (b"BZh", f"compressed by bzip2; {_UNPACK}"),
    (b"\x04\x22\x4d\x18", f"compressed by lz4; {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (_GZIP, f"compressed by gzip twice; {_UNPACK}"),
    (b"PAR1", f"a Parquet file; {_CONVERT}"),
    (b"ARROW1", f"an Arrow file; {_CONVERT}"),
    (b"\xff\xff\xff\xff", f"an Arrow stream; {_CONVERT}"),
    (b"FEA1", f"a Feather file; {_CONVERT}"),
    (b"Obj\1", f"an Avro file; {_CONVERT}"),
    (b"\x93NUMPY", f"a NumPy array; {_CONVERT}"),
    (b"\x89HDF", f"an HDF5 file; {_CONVERT}"),
    (b"SQLite format 3\0", f"an SQLite database; {_CONVERT}"),
)


class StreamError(ValueError):
    """A file can't be read as lines; the message goes on where the file's name stands."""


class LineFile:
    """Iterating gives (number from 1, position, line with its newline) of each line in order, once; blank ones may be
    skipped, and a byte order mark of UTF-8 is left out.

    By its position a line can be read again. What can't be read twice, a pipe or gzip, is copied to a temporary file.
    StreamError for a line of more than LONGEST_LINE bytes, more than MOST_BLANK bytes of skipped lines in a row, gzip
    that is damaged or cut off, UTF-16 and UTF-32; OSError where the file can't be read.

    looks_like: what else the file seems to be by its first bytes, for the message where its lines are no good; None
        for text.
    """

    def __init__(self, path: str | os.PathLike, skips_blank: bool):
        self._skips_blank = skips_blank
        self._raw = open(path, "rb")  # noqa: SIM115
        head = self._raw.read(_HEAD_SIZE)
        self._stream: BinaryIO = self._raw  # read in order
        self._kept: BinaryIO = self._raw  # read by position
        if self._raw.seekable():
            self._raw.seek(0)
        else:
            self._stream, self._kept = io.BufferedReader(_Unread(head, self._raw)), _temporary_file()
        if head.startswith(_GZIP):
            unpacked = io.BufferedReader(gzip.GzipFile(fileobj=self._stream), 2**16)
            with _gzip_errors():
                head = unpacked.read(_HEAD_SIZE)
            self._stream, self._kept = io.BufferedReader(_Unread(head, unpacked)), _temporary_file()
        self._is_copied = self._kept is not self._raw
        self.looks_like = _name_of(head)
        mark = self._stream.read(len(_BOM)) if head.startswith(_BOM) else b""
        self.end = 0 if self._is_copied else len(mark)  # the position behind all lines that were read
        self._stamp = self._current_stamp()

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        if self.looks_like in (_UTF16, _UTF32):
            raise StreamError(f" is {self.looks_like}; it must be UTF-8, which iconv makes of it")
        number, num_blank, readline = 0, 0, self._stream.readline
        is_copied, skips_blank = self._is_copied, self._skips_blank
        with _gzip_errors():
            while line := readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise StreamError(f", line {number} is longer than {LONGEST_LINE:,} bytes, the most for a line")
                start, is_blank = self.end, skips_blank and line.isspace()
                if not (is_copied and is_blank):
                    self.end = start + len(line)
                if is_blank:
                    num_blank += len(line)
                    if num_blank > MOST_BLANK:
                        raise StreamError(f", line {number} is behind more than {MOST_BLANK:,} bytes of blank lines")
                    continue
                num_blank = 0
                if is_copied:
                    self._kept.write(line)
                yield number, start, line

    def at(self, start: int, end: int) -> bytes:
        """Return the line at this position, without its newline; `end` is that of the next one or of the file.

        StreamError where the file has changed since it was opened.
        """
        if self._current_stamp() != self._stamp:
            raise StreamError(" was changed while it was being read")
        self._kept.seek(start)
        line = self._kept.read(min(end - start, LONGEST_LINE))
        size = line.find(b"\n")  # blank lines that were skipped may follow
        return line if size < 0 else line[:size]

    @property
    def num_read(self) -> int:
        """How many bytes of the file itself iteration has read; 0 for a pipe."""
        if not self._raw.seekable():
            return 0
        return self._raw.tell() if self._is_copied else self.end

    def _current_stamp(self) -> tuple[int, int] | None:
        if self._is_copied:
            return None
        status = os.fstat(self._raw.fileno())
        return status.st_size, status.st_mtime_ns


class _Unread(io.RawIOBase):
    """A file whose first bytes were read already, from its start."""

    def __init__(self, head: bytes, file: Any):
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._head:
            return self._file.readinto1(buffer)
        part = self._head[: len(buffer)]
        buffer[: len(part)], self._head = part, self._head[len(part) :]
        return len(part)


def _temporary_file() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="radix_ops-")


@contextlib.contextmanager
def _gzip_errors():
    try:
        yield
    except (gzip.BadGzipFile, zlib.error) as error:
        raise StreamError(f" is damaged: of its gzip, {error}") from error
    except EOFError as error:
        raise StreamError(" is cut off: its gzip has no end") from error


def _name_of(head: bytes) -> str | None:
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if (name := next((name for sign, name in _SIGNS if head.startswith(sign)), None)) is not None:
        return name
    # Without a byte order mark: of a first character below 256 all bytes but one are 0.
    if len(head) >= 4 and head[:4].count(0) == 3 and (head[0] or head[3]):
        return _UTF32
    if len(head) >= 2 and head[:2].count(0) == 1:
        return _UTF16
    return None
