"""Files of results that are compressed as they are written."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from .libraries import pyarrow


@contextlib.contextmanager
def writing(file: BinaryIO, compression: str | None) -> Iterator[BinaryIO]:
    """Give what compresses into the open file, which stays open; the same bytes give the same file."""
    if compression is None:
        yield file
    elif compression == "gzip":
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield cast(BinaryIO, packed)
    else:
        arrow = pyarrow("a .zst file")
        with arrow.CompressedOutputStream(arrow.PythonFile(KeptOpen(file), "w"), "zstd") as packed:
            yield packed


@contextlib.contextmanager
def reading(file: BinaryIO, compression: str | None) -> Iterator[BinaryIO]:
    """Give what the open file holds. Damaged is a ValueError."""
    try:
        if compression is None:
            yield file
        elif compression == "gzip":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        else:
            arrow = pyarrow("a .zst file")
            yield io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd"))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error


class KeptOpen:
    """A file that pyarrow does not close."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.write, self.flush, self.tell = file.write, file.flush, file.tell

    def close(self) -> None:
        pass
