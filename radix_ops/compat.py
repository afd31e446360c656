"""The API of the radix-mlp package (arXiv 2601.15013), so that `import radix_ops.compat as radix_mlp` works."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor

from . import __version__ as __version__

__all__ = ["compute_fold_and_scatter", "compute_fold_and_scatter_torch"]

_NAMES = ("input_ids", "position_ids", "cu_seq_lengths")


def compute_fold_and_scatter(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    cu_seq_lengths: np.ndarray,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Folds packed sequences given as uint32 arrays.

    Args:
        input_ids, position_ids: [N] uint32.
        cu_seq_lengths: [B + 1] uint32, 0 and then the end of each sequence.
        pad_multiple_of: rounds the number of rows up to a multiple of it; None: no padding.
        bound_checks: with False, an empty cu_seq_lengths with no tokens is accepted. Everything else is checked
            whatever it says, and nothing is read out of bounds.

    Returns compact_input_ids, compact_position_ids, scatter_indices [N] (token -> row) and fold_gather (row -> the
    token where it first occurs), all uint32. Raises TypeError for another type or dtype, ValueError for shapes, for a
    pad_multiple_of below 1 and for malformed cu_seq_lengths.
    """
    arrays = (input_ids, position_ids, cu_seq_lengths)
    for name, array in zip(_NAMES, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint32:
            raise TypeError(f"{name} must be a NumPy array of uint32, got {_type_name(array)}")
    # int64 holds every uint32, where int32 would turn large values negative.
    tensors = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    folded = _fold(tensors, pad_multiple_of, bound_checks)
    return tuple(tensor.numpy().astype(np.uint32) for tensor in folded)


def compute_fold_and_scatter_torch(
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seq_lengths: Tensor,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compute_fold_and_scatter` for tensors: int32 or int64 on one device in, int32 on that device out.

    CUDA tensors are folded where they are. Ids and positions that int32 does not hold raise ValueError.
    """
    tensors = [input_ids, position_ids, cu_seq_lengths]
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {_type_name(tensor)}")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name} is on {tensor.device}, but input_ids is on {input_ids.device}")
    ids, positions, *maps = _fold(tensors, pad_multiple_of, bound_checks)
    return _narrow("input_ids", ids), _narrow("position_ids", positions), *maps


def _fold(tensors: list[Tensor], pad_multiple_of: int | None, bound_checks: bool | None) -> tuple[Tensor, ...]:
    pad_multiple_of = 1 if pad_multiple_of is None else operator.index(pad_multiple_of)
    if not 1 <= pad_multiple_of < 2**31:
        raise ValueError(f"pad_multiple_of must be from 1 to {2**31 - 1}, got {pad_multiple_of}")
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got shape {list(tensor.shape)}")
    input_ids, position_ids, cu_seqlens = tensors
    if bound_checks is not None and not bound_checks and cu_seqlens.numel() == 0 and input_ids.numel() == 0:
        cu_seqlens = cu_seqlens.new_zeros(1)
    try:
        return torch.ops.radix.fold(input_ids, position_ids, cu_seqlens, pad_multiple_of)
    except RuntimeError as error:
        if not str(error).startswith("radix::fold: "):
            raise
        message = str(error).removeprefix("radix::fold: ").replace("cu_seqlens", "cu_seq_lengths")
        raise ValueError(message) from None


def _narrow(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int32 or tensor.numel() == 0:
        return tensor.to(torch.int32)
    low, high = (int(bound) for bound in tensor.aminmax())
    limits = torch.iinfo(torch.int32)
    if low < limits.min or high > limits.max:
        raise ValueError(f"{name} must fit int32, the dtype of the output, got values from {low} to {high}")
    return tensor.to(torch.int32)


def _type_name(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {value.dtype}" if hasattr(value, "dtype") else kind
