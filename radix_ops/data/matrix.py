"""Rows of numbers that are found out of order: a .npy file that an interrupted run continues, and a scratch matrix."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy

from ..engine.errors import UserError
from .output import beside, open_helper, put_in_place

_ALIGNMENT, _KEY_BITS = 64, 64
_MAGIC = npy.magic(1, 0)


def check_incomplete(path: str) -> None:
    """UserError for a file that no run made, finished or not. The key, once known, tells whether it is this run's."""
    under_way = any(beside(path, suffix).exists() for suffix in (".rows", ".float32", ".float32.rows"))
    if not os.path.exists(path) or under_way:
        return
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC) + 2)
        header = file.read(int.from_bytes(start[-2:], "little")) if start.startswith(_MAGIC) else b""
    if b"\t" not in header[-1 - _KEY_BITS :]:
        raise UserError(f"--output {path} exists and is complete; --overwrite replaces it")


def scratch_matrix(shape: tuple[int, int]) -> np.ndarray:
    """Return a float32 matrix in a temporary file that goes with the array."""
    file = tempfile.TemporaryFile(prefix="radix_ops-")  # noqa: SIM115
    _reserve(file, 4 * shape[0] * shape[1])
    return np.memmap(file, np.float32, "r+", shape=shape)


class MatrixFile:
    """A matrix of float32 or float16 as a .npy file, made row by row in any order.

    Until it is complete, the rows stand in PATH.part and a side file, PATH.rows, says which of them are done: a line of
    JSON with the shape and `key`, which identifies the run, then a checksum of each row, 0 for one that is not done. A
    run that was killed leaves both, and the same run continues with them: a row that does not fit its checksum, as
    after a crash of the machine, is not done. `finish` puts the matrix in its place and removes the side file. The
    header of the matrix tells of the key, so that the same run knows that it is done.
    """

    rows: Any  # the mapped array

    def __init__(self, path: str | Path, shape: tuple[int, int], key: str, overwrite: bool, dtype: str = "float32"):
        self.path, self._part, self._side = (beside(path, suffix) for suffix in ("", ".part", ".rows"))
        self._dtype, self._shape = np.dtype(dtype), shape
        fields = {"rows": shape[0], "columns": shape[1], "key": key, "dtype": dtype}
        if dtype == "float32":
            del fields["dtype"]
        self._side_header = json.dumps(fields).encode() + b"\n"
        self._header = header_of(shape, key, dtype)
        self._size = len(self._header) + self._dtype.itemsize * shape[0] * shape[1]
        if overwrite or not self._side.exists():
            if not overwrite and self.path.exists():
                self._open_finished()
                return
            if not (overwrite or self._is_of_a_start()):
                raise UserError(f"{self._part} exists and is of no run; --overwrite replaces it")
            self._start()
        self._marks = marks = self._open_marks()
        # A kill just before the side file would have gone leaves the matrix in its place.
        self._is_placed = bool(marks.all()) and not os.path.lexists(self._part)
        source = self.path if self._is_placed else self._part
        self.rows = None
        if os.path.lexists(source):
            self._file = open_helper(source)
            self.rows = self._map_if_ours(self._file)
        if self.rows is not None:
            self.done = (marks != 0) & (marks == _checksums(self.rows, marks != 0))
        if self.rows is None or (self._is_placed and not self.done.all()):
            raise UserError(
                f"{source} is not what the interrupted run left beside {self._side}; --overwrite starts anew"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the matrix is in its place."""
        return self._is_placed

    def _open_finished(self) -> None:
        with open(self.path, "rb") as file:
            self.rows = self._map_if_ours(file, "r")
        if self.rows is None:
            raise UserError(f"--output {self.path} exists and is complete; --overwrite replaces it")
        self._is_placed, self.done = True, np.ones(self._shape[0], bool)

    def _map_if_ours(self, file: BinaryIO, mode: Literal["r", "r+"] = "r+") -> np.ndarray | None:
        """Return the rows of the file; None unless its header and its size are those of this run."""
        if file.read(len(self._header)) != self._header or os.fstat(file.fileno()).st_size != self._size:
            return None
        return np.memmap(file, self._dtype, mode, len(self._header), self._shape)

    def _is_of_a_start(self) -> bool:
        """Return whether .part, if it is there, is what this run left when it stopped before its side file stood."""
        if not os.path.lexists(self._part):
            return True
        with open_helper(self._part) as file:
            return self._header.startswith(file.read(len(self._header)).rstrip(b"\0"))

    def _start(self) -> None:
        self._side.unlink(missing_ok=True)
        try:
            with open_helper(self._part, os.O_CREAT | os.O_TRUNC) as file:
                file.write(self._header)
                _reserve(file, self._size)
                os.fsync(file.fileno())
        except OSError:
            self._part.unlink(missing_ok=True)
            raise
        # The side file says that the other is whole, so it comes last and at once.
        temporary = beside(self.path, ".rows.tmp")
        with open_helper(temporary, os.O_CREAT | os.O_TRUNC) as file:
            file.write(self._side_header + bytes(4 * self._shape[0]))
            file.flush()
            put_in_place(file, temporary, self._side)

    def _open_marks(self) -> np.ndarray:
        with open_helper(self._side) as file:
            if file.read(len(self._side_header)) != self._side_header:
                raise UserError(
                    f"{self._side} is of another input, model, dtype, mode or option; --overwrite starts anew"
                )
            if os.fstat(file.fileno()).st_size != len(self._side_header) + 4 * self._shape[0]:
                raise UserError(f"{self._side} is not as the interrupted run left it; --overwrite starts anew")
            return np.asarray(np.memmap(file, np.uint32, "r+", len(self._side_header), self._shape[:1]))

    def write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        """Set the rows `indices`. UserError for a finite number that is too large for the dtype."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, self._dtype)
        wrong = np.argwhere(np.isinf(stored) & np.isfinite(rows))
        if len(wrong):
            row, column = wrong[0]
            raise UserError(
                f"row {indices[row]} of the matrix would hold {rows[row, column]:.6g}, which is too large for "
                f"{self._dtype}; take float32, or normalise embeddings"
            )
        self.rows[indices] = stored
        self._marks[indices] = _checksums(stored)
        self.done[indices] = True

    def finish(self) -> None:
        """Put the matrix in its place, and remove the files beside it."""
        if not self._is_placed:
            self.rows.flush()
            put_in_place(self._file, self._part, self.path)
        elif self._is_of_a_start():
            self._part.unlink(missing_ok=True)
            beside(self.path, ".rows.tmp").unlink(missing_ok=True)
        self._side.unlink(missing_ok=True)


def header_of(shape: tuple[int, int], key: str, dtype: str = "float32") -> bytes:
    """Return the header of a .npy file. White space at its end spells 64 bits of the key, a tab for each that is 1."""
    descr = npy.dtype_to_descr(np.dtype(dtype))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    bits = int.from_bytes(hashlib.sha256(key.encode()).digest()[: _KEY_BITS // 8], "little")
    spelled = f"{bits:0{_KEY_BITS}b}".replace("0", " ").replace("1", "\t") + "\n"
    padding = -(len(_MAGIC) + 2 + len(text) + len(spelled)) % _ALIGNMENT
    text += " " * padding + spelled
    return _MAGIC + len(text).to_bytes(2, "little") + text.encode()


def _checksums(rows: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
    """Return a CRC-32, never 0, of each row or of the chosen ones, and 0 for others: uint32 [len(rows)]."""
    found, rows = np.zeros(len(rows), np.uint32), np.asarray(rows)  # a memory map is slow to index
    for index in range(len(rows)) if chosen is None else np.flatnonzero(chosen).tolist():
        found[index] = zlib.crc32(rows[index]) or 1
    return found


def _reserve(file, size: int) -> None:
    """Make the file so long. A full disk is an OSError here, where a mapped file would kill the process later."""
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        # Some systems and some file systems can't.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        file.truncate(size)
