"""Checks that the ops' Python kernels and fake kernels share; C++ kernels have theirs in csrc/check.h."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)
ATTENTION_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_index_like(op: str, device: torch.device, **tensors: Tensor) -> None:
    """Raises RuntimeError unless each tensor is 1-D, int32 or int64, as ids and indices are, and on `device`."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise RuntimeError(f"radix::{op}: {name} must have 1 dimension, got shape {list(tensor.shape)}")
        if tensor.dtype not in INDEX_DTYPES:
            raise RuntimeError(f"radix::{op}: {name} must be int32 or int64, got {tensor.dtype}")
    check_devices(op, device, **tensors)


def check_devices(op: str, device: torch.device, **tensors: Tensor) -> None:
    """Raises RuntimeError unless each tensor is on `device`."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(
                f"radix::{op}: {name} is on {tensor.device} and others on {device}; all tensors must be on one device"
            )
