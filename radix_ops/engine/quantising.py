"""Embeddings as numbers of fewer bits: float16, or int8 between the least and the largest number of each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from .errors import UserError

OutputDType: TypeAlias = Literal["float32", "float16", "int8"]
OUTPUT_DTYPES: tuple[OutputDType, ...] = get_args(OutputDType)
Ranges: TypeAlias = npt.NDArray[np.float32]  # [2, dim]: the least number of each column, and the largest


def ranges_of(parts: Iterable[np.ndarray]) -> Ranges:
    """Return the ranges of embeddings, which come in parts [n, dim], one at least."""
    found = None
    for part in parts:
        ends = np.stack([part.min(0), part.max(0)])
        found = ends if found is None else np.stack([np.minimum(found[0], ends[0]), np.maximum(found[1], ends[1])])
    if found is None:
        raise ValueError("ranges are of one part at least")
    return found.astype(np.float32)


def check_ranges(ranges, dim: int, name: str) -> Ranges:
    """Return the ranges as float32. UserError for what is none of embeddings of `dim` numbers; `name` is theirs."""
    found = np.asarray(ranges)
    if found.dtype.kind != "f" or found.shape != (2, dim):
        raise UserError(
            f"{name} must be floats [2, {dim}], the least and the largest number of each column of embeddings, got "
            f"{found.dtype} {list(found.shape)}"
        )
    found = found.astype(np.float32)
    if not np.isfinite(found).all() or (found[0] > found[1]).any():
        raise UserError(f"{name} must be finite, and the first row nowhere above the second")
    return found


def quantised(rows: npt.NDArray[np.float32], ranges: Ranges) -> npt.NDArray[np.int8]:
    """Return embeddings [B, dim] as 256 equal steps of each column's range, as quantize_embeddings of
    sentence-transformers 6 computes them. Numbers outside of the range become its end."""
    starts = ranges[0]
    steps = (ranges[1] - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    return (np.clip(np.floor((rows - starts) / steps), 0, 255) - 128).astype(np.int8)


def converted(
    rows: npt.NDArray[np.float32], dtype: OutputDType, ranges: Ranges | None, where: Callable[[int], str]
) -> np.ndarray:
    """Return finite embeddings [B, dim] in a dtype; int8 needs `ranges`. UserError for a number that float16 can't
    hold; `where(i)` names the input of row i."""
    if dtype == "int8":
        assert ranges is not None
        return quantised(rows, ranges)
    if dtype == "float32":
        return rows
    with np.errstate(over="ignore"):
        found = rows.astype(np.float16)
    wrong = np.flatnonzero(~np.isfinite(found).all(1))
    if len(wrong):
        raise UserError(f"{where(int(wrong[0]))} got an embedding that float16 can't hold; --output-dtype float32 can")
    return found
