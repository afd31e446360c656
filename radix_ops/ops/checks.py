"""Checks that the ops' Python kernels and fake kernels share; C++ kernels have theirs in csrc/check.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)
# No sequence is longer, so a larger sliding window is this one, which fits the int32 of depths and kernels.
MAX_WINDOW = 2**31 - 1
ATTENTION_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_index_like(op: str, device: torch.device, **tensors: Tensor) -> None:
    """Raise RuntimeError unless each tensor is 1-D, int32 or int64, as ids and indices are, and on `device`."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise RuntimeError(f"radix::{op}: {name} must have 1 dimension, got shape {list(tensor.shape)}")
        if tensor.dtype not in INDEX_DTYPES:
            raise RuntimeError(f"radix::{op}: {name} must be int32 or int64, got {tensor.dtype}")
    check_devices(op, device, **tensors)


def check_devices(op: str, device: torch.device, **tensors: Tensor) -> None:
    """Raise RuntimeError unless each tensor is on `device`."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(
                f"radix::{op}: {name} is on {tensor.device} and others on {device}; all tensors must be on one device"
            )


def check_storages(op: str, **tensors: Tensor) -> None:
    """Raise RuntimeError unless each tensor's storage holds what its sizes and strides claim.

    A storage may have been resized below its tensors, as FSDP does with parameters that it has put away, and kernels of
    torch's read past its end. For kernels alone: a fake tensor has no storage.
    """
    for name, tensor in tensors.items():
        held = tensor.untyped_storage().nbytes()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        claimed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
        if claimed > held:
            raise RuntimeError(
                f"radix::{op}: {name} claims {claimed} bytes of a storage that holds {held}; it was resized, "
                "or its data is not allocated"
            )


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, sliding_window: int) -> None:
    """Raise RuntimeError unless q [rows, H, D], k [keys, H_kv, D] and v [keys, H_kv, D_v] can attend."""

    def fail(message: str):
        raise RuntimeError(f"radix::{op}: {message}")

    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            fail(f"{name} must have shape [rows, heads, head_dim], got {list(tensor.shape)}")
        if tensor.dtype not in ATTENTION_DTYPES:
            fail(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            fail(f"q, k and v must have one dtype, got {q.dtype} for q and {tensor.dtype} for {name}")
    check_devices(op, q.device, k=k, v=v)
    check_storages(op, q=q, k=k, v=v)
    if k.shape[:2] != v.shape[:2]:
        fail(f"k and v must have equal rows and heads, got {list(k.shape)} and {list(v.shape)}")
    if k.shape[2] != q.shape[2]:
        fail(f"q and k must have one head_dim, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] == 0 or q.shape[2] == 0:
        fail(f"q must have at least one head and a head_dim of at least 1, got {list(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        fail(f"the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v")
    if sliding_window < 0:
        fail(f"sliding_window must be at least 0 (0: none), got {sliding_window}")


def check_gradient(op: str, grad_out: Tensor, q: Tensor, v: Tensor) -> None:
    """Raise RuntimeError unless grad_out is a gradient of attention: [rows, H, D_v], of q's dtype and device."""
    shape = [*q.shape[:2], v.shape[2]]
    if list(grad_out.shape) != shape or grad_out.dtype != q.dtype:
        raise RuntimeError(
            f"radix::{op}: grad_out must be {q.dtype} of shape {shape}, got {grad_out.dtype} of {list(grad_out.shape)}"
        )
    check_devices(op, q.device, grad_out=grad_out)
    check_storages(op, grad_out=grad_out)


def check_saved(op: str, q: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> None:
    """Raise RuntimeError unless out and logsumexp are what the forward of attention returned for q and v."""
    sums_dtype = torch.promote_types(q.dtype, torch.float32)
    shape, sums_shape = [*q.shape[:2], v.shape[2]], [q.shape[1], q.shape[0]]
    for name, x, dtype, sizes in (("out", out, q.dtype, shape), ("logsumexp", logsumexp, sums_dtype, sums_shape)):
        if list(x.shape) != sizes or x.dtype != dtype:
            raise RuntimeError(
                f"radix::{op}: {name} must be {dtype} of shape {sizes}, got {x.dtype} of {list(x.shape)}"
            )
    check_devices(op, q.device, out=out, logsumexp=logsumexp)
    check_storages(op, out=out, logsumexp=logsumexp)


def is_finite(*tensors: Tensor) -> bool:
    """Return False where a value is not finite, and where a sum is too large for its type, which costs time alone."""
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) for x in tensors)
