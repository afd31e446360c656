"""An int8 matrix of embeddings, each number a step of its column's range, as sentence-transformers quantises."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ..engine.errors import UserError
from ..engine.quantising import quantised, ranges_of
from .matrix import MatrixFile, header_of
from .output import beside, companion, open_helper, put_in_place

_NUMBERS_AT_ONCE = 2**22


class QuantisedMatrixFile:
    """A matrix of int8 as a .npy file, made row by row in any order, and its columns' ranges in a file beside it.

    The numbers are those of sentence-transformers' quantize_embeddings with the embeddings' own ranges, a column that
    holds one number alone being -128. Ranges are known when all rows are: until then the run makes the float32 matrix
    PATH.float32, a `MatrixFile`, and `finish` makes the others of it. STEM.ranges.npy holds the least and the largest
    number of each column, float32 [2, columns]; (number + 128) * (largest - least) / 255 + least is about what was
    there.
    """

    def __init__(self, path: str, shape: tuple[int, int], key: str, overwrite: bool):
        self.path, self._part, self._work = (beside(path, suffix) for suffix in ("", ".part", ".float32"))
        self.ranges_path = companion(path, ".ranges.npy")
        self._shape, self._header = shape, header_of(shape, key, "int8")
        self._rows: MatrixFile | None = None
        self.is_finished = False
        if overwrite or is_begun(self._work):
            self._rows = MatrixFile(self._work, shape, key, overwrite)
            self.done = self._rows.done
            return
        if self.path.exists():
            self._check_finished()
            self.done, self.is_finished = np.ones(shape[0], bool), True
            return
        if os.path.lexists(self._part):
            raise UserError(f"{self._part} exists and is of no run; --overwrite replaces it")
        self._rows = MatrixFile(self._work, shape, key, False)
        self.done = self._rows.done

    def _check_finished(self) -> None:
        with open(self.path, "rb") as file:
            is_ours = file.read(len(self._header)) == self._header
            if not is_ours or os.fstat(file.fileno()).st_size != len(self._header) + self._shape[0] * self._shape[1]:
                raise UserError(f"--output {self.path} exists and is complete; --overwrite replaces it")

    def write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        assert self._rows is not None
        self._rows.write(indices, rows)
        self.done = self._rows.done

    def finish(self) -> None:
        """Put ranges and matrix in their places, and remove the files beside them."""
        if self._rows is None:
            return
        self._rows.finish()
        rows = self._rows.rows
        at_once = max(1, _NUMBERS_AT_ONCE // self._shape[1])
        blocks = [slice(first, first + at_once) for first in range(0, self._shape[0], at_once)]
        ranges = ranges_of(rows[block] for block in blocks)
        with open_helper(self._part, os.O_CREAT | os.O_TRUNC) as file:
            npy.write_array(file, ranges, (1, 0))
            put_in_place(file, self._part, self.ranges_path)
        with open_helper(self._part, os.O_CREAT | os.O_TRUNC) as file:
            file.write(self._header)
            for block in blocks:
                file.write(quantised(rows[block], ranges).tobytes())
            put_in_place(file, self._part, self.path)
        self._work.unlink()


def check_count(output: str, count: int) -> None:
    """UserError for too few rows to take ranges from."""
    if count < 2:
        raise UserError(
            f"--output {output}: int8 takes the range of each column from all texts, and there is one alone"
        )


def check_ranges_path(output: str, overwrite: bool) -> None:
    """UserError where something else than ranges stands in their place."""
    path = companion(output, ".ranges.npy")
    if os.path.lexists(path) and not overwrite and not _are_ranges(path):
        raise UserError(f"{path} exists, and the ranges of {output} go there; --overwrite replaces it")


def _are_ranges(path: Path) -> bool:
    with open_helper(path) as file:
        try:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
        except ValueError:
            return False
    return len(shape) == 2 and shape[0] == 2 and dtype == np.float32


def is_begun(work: Path) -> bool:
    """Return whether a run left a matrix, finished or not, at `work`."""
    return any(os.path.lexists(beside(work, suffix)) for suffix in ("", ".part", ".rows"))
