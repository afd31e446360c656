"""Rows of numbers that are found out of order: a .npy file that an interrupted run continues, and a scratch matrix."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from .records import UserError

_SIDE_SUFFIX = ".rows"


def is_matrix(path: str) -> bool:
    """Whether embeddings go to this file as a matrix."""
    return path.lower().endswith(".npy")


def side_of(path: str) -> str:
    """The file that tells of an interrupted run, beside what `path` may be a link to."""
    return os.path.realpath(path) + _SIDE_SUFFIX


def check_incomplete(path: str) -> None:
    """UserError for a file that no interrupted run has a side file for."""
    if os.path.exists(path) and not os.path.exists(side_of(path)):
        raise UserError(f"--output {path} exists and is complete; --overwrite replaces it")


def scratch_matrix(shape: tuple[int, int]) -> np.ndarray:
    """float32, in a temporary file that goes with the array."""
    file = tempfile.TemporaryFile(prefix="radix_ops-")  # noqa: SIM115
    _reserve(file, 4 * shape[0] * shape[1])
    return np.memmap(file, np.float32, "r+", shape=shape)


class MatrixFile:
    """A float32 matrix as a .npy file, made row by row in any order.

    Until it is complete, the rows stand in PATH.part and a side file, PATH.rows, says which of them are done: a line of
    JSON with the shape and `key`, which identifies the run, then one byte a row. A run that was killed leaves both, and
    the same run continues with them. `finish` puts the matrix in its place and removes the side file.
    """

    def __init__(self, path: str, shape: tuple[int, int], key: str, overwrite: bool):
        self.path = Path(path).resolve()  # not a link to it, which would be replaced
        self._part, self._side = self.path.with_name(self.path.name + ".part"), Path(side_of(path))
        self._header = json.dumps({"rows": shape[0], "columns": shape[1], "key": key}).encode() + b"\n"
        if overwrite or not self._side.exists():
            if not overwrite:
                check_incomplete(path)
                if self._part.exists():
                    raise UserError(f"{self._part} exists and is of no run; --overwrite replaces it")
            self._start(shape)
        self._check_side()
        self.done = np.memmap(self._side, bool, "r+", offset=len(self._header), shape=shape[:1])
        # Where a kill came just before the side file would have gone, the matrix is in its place.
        is_placed = self.done.all() and not self._part.exists()
        source = self.path if is_placed else self._part
        try:
            self.rows = np.load(source, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source} is not what the interrupted run left beside {self._side}; --overwrite starts anew"
            ) from error

    def _start(self, shape: tuple[int, int]) -> None:
        self._side.unlink(missing_ok=True)
        with open(self._part, "wb") as file:
            header = {"descr": npy.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)
            _reserve(file, file.tell() + 4 * shape[0] * shape[1])
        # The side file says that the other is whole, so it comes last and at once.
        temporary = self._side.with_name(self._side.name + ".tmp")
        temporary.write_bytes(self._header + bytes(shape[0]))
        os.replace(temporary, self._side)

    def _check_side(self) -> None:
        with open(self._side, "rb") as file:
            header = file.read(len(self._header))
        if header != self._header:
            raise UserError(f"{self._side} is of another input, model, dtype, mode or option; --overwrite starts anew")

    def write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        self.rows[indices] = rows
        self.done[indices] = True

    def finish(self) -> None:
        self.rows.flush()
        if self._part.exists():
            os.replace(self._part, self.path)
        self._side.unlink()


def _reserve(file, size: int) -> None:
    """Makes the file so long. A full disk is an OSError here, where a mapped file would kill the process later."""
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        # Neither every system nor every file system can.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        file.truncate(size)
