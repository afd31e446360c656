"""The bytes of an input file, be it plain, gzip, zstd or a pipe, its lines, and the names of files of other kinds.

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

from .libraries import pyarrow

STANDARD_INPUT = "-"
LONGEST_LINE = 64 * 2**20  # bytes
MOST_BLANK = 2**20  # bytes of blank lines in a row
BOM = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = tuple(bytes([0x50 + index]) + b"\x2a\x4d\x18" for index in range(16))  # a frame that pzstd writes first
_HEAD_SIZE = 512
_UTF16, _UTF32 = "is text in UTF-16", "is text in UTF-32"
_UNPACK = "decompress it first (of compressed files gzip and zstd are read)"
_CONVERT = "write it as JSON lines first"
_OFFICE = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/")  # a workbook's first entry, after 30 bytes of zip
# The starts of files of other kinds; the first that fits counts.
_SIGNS = (
    (b"\xff\xfe\0\0", _UTF32),
    (b"\0\0\xfe\xff", _UTF32),
    (b"\xff\xfe", _UTF16),
    (b"\xfe\xff", _UTF16),
    (b"PK\3\4", f"is a zip archive; {_UNPACK}"),
    (b"PK\5\6", f"is a zip archive; {_UNPACK}"),
    (_ZSTD, f"is compressed twice, by zstd inside; {_UNPACK}"),
    (b"\xfd7zXZ\0", f"is compressed by xz; {_UNPACK}"),
    (b"BZh", f"is compressed by bzip2; {_UNPACK}"),
    (b"\x04\x22\x4d\x18", f"is compressed by lz4; {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive; {_UNPACK}"),
    (_GZIP, f"is compressed by gzip twice; {_UNPACK}"),
    (b"PAR1", "looks like Parquet: name it .parquet, or read it with --format parquet"),
    (b"ARROW1", "looks like Arrow: name it .arrow, or read it with --format arrow"),
    (b"\xff\xff\xff\xff", "looks like an Arrow stream: name it .arrow, or read it with --format arrow"),
    (b"FEA1", f"is a Feather file of version 1; {_CONVERT}"),
    (b"Obj\1", f"is an Avro file; {_CONVERT}"),
    (b"ORC", f"is an ORC file; {_CONVERT}"),
    (b"%PDF-", f"is a PDF; {_CONVERT}"),
    (b"\x93NUMPY", f"is a NumPy array; {_CONVERT}"),
    (b"\x89HDF", f"is an HDF5 file; {_CONVERT}"),
    (b"SQLite format 3\0", f"is an SQLite database; {_CONVERT}"),
)


class StreamError(ValueError):
    """A file can't be read; the message goes on where the file's name stands."""


class ByteFile:
    """The bytes of a file from its start, unpacked, to be read once in order.

    StreamError for gzip and zstd that are damaged or cut off, of whichever `errors()` is held while `stream` is read;
    OSError where the file can't be read.

    stream: reads the bytes.
    head: the first of them, which `stream` gives, too.
    is_plain: whether `stream` is the file itself, which can be sought.
    looks_like: what else than text the file seems to be by its first bytes, as what goes on behind its name; None for
        text.
    """

    def __init__(self, path: str | os.PathLike):
        is_standard = os.fspath(path) == STANDARD_INPUT
        self.raw: Any = open(0 if is_standard else path, "rb", closefd=not is_standard)  # noqa: SIM115
        self.stream: BinaryIO = self.raw
        self._packing = ""
        self._seeks = not is_standard and self.raw.seekable()
        head = self.raw.read(_HEAD_SIZE)
        self._piped = _Unread(head, self.raw)
        if self._seeks:
            self.raw.seek(0)
        else:
            self.stream = io.BufferedReader(self._piped)
        if head.startswith(_GZIP):
            self._packing = "gzip"
            head = self._unpack(io.BufferedReader(gzip.GzipFile(fileobj=self.stream), 2**16))
        elif head.startswith((_ZSTD, *_ZSTD_SKIPPED)):
            self._packing = "zstd"
            found = pyarrow(f"{path} is compressed by zstd, whose reader")
            native = found.CompressedInputStream(found.PythonFile(self.stream, "r"), "zstd")
            head = self._unpack(io.BufferedReader(_Native(native), 2**16))
        self.head = head
        self.looks_like = _name_of(head)
        self._stamp = self._current_stamp()

    def _unpack(self, unpacked: io.BufferedReader) -> bytes:
        with self.errors():
            head = unpacked.read(_HEAD_SIZE)
        self.stream = io.BufferedReader(_Unread(head, unpacked))
        return head

    @property
    def is_plain(self) -> bool:
        return self.stream is self.raw

    @property
    def is_packed(self) -> bool:
        return bool(self._packing)

    @property
    def packed_size(self) -> int:
        """How many bytes of the file or the pipe were read."""
        return self.raw.tell() if self._seeks else self._piped.size

    @property
    def num_read(self) -> int:
        """How many bytes of the file itself were read; 0 for a pipe."""
        return self.raw.tell() if self._seeks else 0

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise a StreamError for what is wrong with the packing."""
        try:
            yield
        except (gzip.BadGzipFile, zlib.error) as error:
            raise StreamError(f" is damaged: of its gzip, {error}") from error
        except EOFError as error:
            raise StreamError(f" is cut off: its {self._packing or 'text'} has no end") from error
        except _NativeError as error:
            if "Truncated" in str(error):
                raise StreamError(" is cut off: its zstd has no end") from error
            raise StreamError(f" is damaged: of its zstd, {error}") from error

    def check_unchanged(self) -> None:
        """StreamError where the file has changed since it was opened."""
        if self._current_stamp() != self._stamp:
            raise StreamError(" was changed while it was being read")

    def check_is_utf8(self) -> None:
        """StreamError for UTF-16 and UTF-32."""
        if self.looks_like in (_UTF16, _UTF32):
            raise StreamError(f" {self.looks_like}; it must be UTF-8, which iconv makes of it")

    def _current_stamp(self) -> tuple[int, int] | None:
        if not self._seeks:
            return None
        status = os.fstat(self.raw.fileno())
        return status.st_size, status.st_mtime_ns


class LineFile:
    """Iterating gives (number from 1, position, line with its newline) of each line in order, once; blank ones may be
    skipped, and a byte order mark of UTF-8 is left out.

    By its position a line can be read again. What can't be read twice, a pipe or a packed file, is copied to a
    temporary file. StreamError for a line of more than LONGEST_LINE bytes, more than MOST_BLANK bytes of skipped lines
    in a row, packing that is damaged or cut off, UTF-16 and UTF-32; OSError where the file can't be read.
    """

    def __init__(self, path: str | os.PathLike | ByteFile, skips_blank: bool, keeps: bool = True):
        """`keeps` says whether lines are to be read again."""
        self.bytes = path if isinstance(path, ByteFile) else ByteFile(path)
        self._skips_blank = skips_blank
        self._is_copied = keeps and not self.bytes.is_plain
        self._kept: BinaryIO = temporary_file() if self._is_copied else self.bytes.stream  # read by position
        mark = self.bytes.stream.read(len(BOM)) if self.bytes.head.startswith(BOM) else b""
        self.end = 0 if self._is_copied else len(mark)  # the position behind all lines that were read

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        self.bytes.check_is_utf8()
        number, num_blank, readline = 0, 0, self.bytes.stream.readline
        is_copied, skips_blank = self._is_copied, self._skips_blank
        with self.bytes.errors():
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
        if not self._is_copied:
            self.bytes.check_unchanged()
        self._kept.seek(start)
        line = self._kept.read(min(end - start, LONGEST_LINE))
        size = line.find(b"\n")  # blank lines that were skipped may follow
        return line if size < 0 else line[:size]

    @property
    def num_read(self) -> int:
        """How many bytes of the file itself iteration has read; 0 for a pipe."""
        return self.bytes.num_read if self._is_copied else self.end


class _Unread(io.RawIOBase):
    """A file whose first bytes were read already, from its start."""

    def __init__(self, head: bytes, file: Any):
        self._head, self._file = head, file
        self.size = len(head)  # of what was read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._head:
            size = self._file.readinto1(buffer)
            self.size += size
            return size
        part = self._head[: len(buffer)]
        buffer[: len(part)], self._head = part, self._head[len(part) :]
        return len(part)


class _NativeError(Exception):
    """An error of a stream of pyarrow, told apart from those of the system."""


class _Native(io.RawIOBase):
    """A stream of pyarrow as a file of Python."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            part = self._file.read(len(buffer))
        except OSError as error:
            if error.errno is not None:
                raise
            raise _NativeError(str(error)) from error
        buffer[: len(part)] = part
        return len(part)


def temporary_file() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="radix_ops-")


def _name_of(head: bytes) -> str | None:
    if head[257:262] == b"ustar":
        return f"is a tar archive; {_UNPACK}"
    if head.startswith(b"PK\3\4") and head[30:].startswith(_OFFICE):
        return "is a file of Excel or its kin; save the sheet as CSV first"
    if (name := next((name for sign, name in _SIGNS if head.startswith(sign)), None)) is not None:
        return name
    # Without a byte order mark: of a first character below 256 all bytes but one are 0.
    if len(head) >= 4 and head[:4].count(0) == 3 and (head[0] or head[3]):
        return _UTF32
    if len(head) >= 2 and head[:2].count(0) == 1:
        return _UTF16
    return None
