"""The API of radix_mlp.torch."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_ops._integers import as_integers

from . import _fold

__all__ = ["compute_fold_and_scatter_torch"]


def compute_fold_and_scatter_torch(
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seq_lengths: Tensor,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold tensors as `radix_ops.compat.compute_fold_and_scatter` does: integers of one device in, int32 there out.

    CUDA tensors are folded where they are. Ids and positions that int32 does not hold raise ValueError.
    """
    tensors = dict(zip(_fold.NAMES, (input_ids, position_ids, cu_seq_lengths), strict=True))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != input_ids.device:
            devices = f"{tensor.device} and {input_ids.device}"
            raise ValueError(f"{name} must be on the same device as input_ids, got {devices}")
    _fold.check_shapes([tensor.shape for tensor in tensors.values()])
    multiple = _fold.multiple_of(pad_multiple_of)
    given_ids, given_positions, ends = (as_integers(name, tensor) for name, tensor in tensors.items())
    ids, positions, scatter, gather = _fold.fold(given_ids, given_positions, ends, multiple)
    return _narrow("input_ids", ids), _narrow("position_ids", positions), scatter, gather


def _narrow(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int32 or tensor.numel() == 0:
        return tensor.to(torch.int32)
    low, high = (int(bound) for bound in tensor.aminmax())
    limits = torch.iinfo(torch.int32)
    if low < limits.min or high > limits.max:
        raise ValueError(f"{name} must fit int32, the dtype of the output, got values from {low} to {high}")
    return tensor.to(torch.int32)
