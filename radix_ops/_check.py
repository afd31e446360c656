"""Checks that the ops' Python kernels and fake kernels share; C++ kernels have theirs in csrc/check.h."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)


def check_index_like(op: str, **tensors: Tensor) -> None:
    """Raises RuntimeError unless each tensor is 1-D and int32 or int64, as ids, positions and indices are."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise RuntimeError(f"radix::{op}: {name} must have 1 dimension, got shape {list(tensor.shape)}")
        if tensor.dtype not in INDEX_DTYPES:
            raise RuntimeError(f"radix::{op}: {name} must be int32 or int64, got {tensor.dtype}")
