"""Names, checks and the fold by the op, which the interfaces for arrays and tensors share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

NAMES = ("input_ids", "position_ids", "cu_seq_lengths")


def multiple_of(pad_multiple_of: SupportsIndex | None) -> int:
    """Return the multiple, 1 for None. Raises TypeError for what is no integer, ValueError for one out of range."""
    try:
        multiple = 1 if pad_multiple_of is None else operator.index(pad_multiple_of)
    except TypeError as error:
        raise TypeError(f"argument 'pad_multiple_of': {error}") from None
    if not 1 <= multiple < 2**31:
        raise ValueError(f"pad_multiple_of must be from 1 to {2**31 - 1}, got {multiple}")
    return multiple


def check_shapes(shapes: Sequence[Sequence[int]]) -> None:
    for name, shape in zip(NAMES, shapes, strict=True):
        if len(shape) != 1:
            raise ValueError(f"{name} must be 1-dimensional, got shape {list(shape)}")
    if shapes[0] != shapes[1]:
        raise ValueError(f"input_ids and position_ids must have same length: {shapes[0][0]} != {shapes[1][0]}")


def fold(
    input_ids: Tensor, position_ids: Tensor, cu_seq_lengths: Tensor, multiple: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold tensors of one dimension. Raises ValueError for malformed cu_seq_lengths; no tokens may have none."""
    if cu_seq_lengths.numel() == 0 and input_ids.numel() == 0:
        cu_seq_lengths = cu_seq_lengths.new_zeros(1)
    try:
        return torch.ops.radix.fold(input_ids, position_ids, cu_seq_lengths, multiple)
    except RuntimeError as error:
        if not str(error).startswith("radix::fold: "):
            raise
        message = str(error).removeprefix("radix::fold: ").replace("cu_seqlens", "cu_seq_lengths")
        raise ValueError(message) from None
