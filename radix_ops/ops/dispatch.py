"""Registers the Python kernels of torch.ops.radix, and errors for devices on which an op has none."""

from __future__ import annotations

import functools

import torch

from . import flash, trie, trie_rows, varlen

_ALL_OPS = (
    "fold",
    "fold_plan",
    "fold_batch",
    "unpad",
    "gather",
    "gather.csr",
    "gather_kv",
    "gather_kv.csr",
    "scatter_add",
    "scatter_add.csr",
    "scatter_add_kv",
    "scatter_add_kv.csr",
    "varlen_attention",
    "varlen_attention_backward",
    "flash_attention",
    "flash_attention_backward",
    "trie_order",
    "trie_attention",
    "trie_attention_backward",
    "trie_attention_rows",
    "trie_attention_sm90",
    "trie_attention_backward_sm90",
    "lexicographic_order",
    "common_prefix_lengths",
    "cut_batches",
)

_library = torch.library.Library("radix", "IMPL")


def _apart_from_autocast(kernel):
    """Keep a kernel in its arguments' dtypes: a backward pass may run under autocast, which would cast its products."""

    @functools.wraps(kernel)
    def run(first, *others):
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(first, *others)
        with torch.autocast(device, enabled=False):
            return kernel(first, *others)

    return run


for _module, _name, _keys in (
    (varlen, "varlen_attention", ("CPU", "CUDA")),
    (varlen, "varlen_attention_backward", ("CPU", "CUDA")),
    (trie, "trie_attention", ("CUDA",)),
    (trie, "trie_attention_backward", ("CUDA",)),
    (trie_rows, "trie_attention_rows", ("CUDA",)),
):
    for _key in _keys:
        _library.impl(_name, _apart_from_autocast(getattr(_module, _name)), _key)
for _name in ("flash_attention", "flash_attention_backward"):
    _library.impl(_name, getattr(flash, _name), "CUDA")


# (op, dispatch key) -> why the op refuses tensors there.
REFUSALS: dict[tuple[str, str], str] = {}
_ON_CUDA_ONLY = "tensors must be on a CUDA device; radix::varlen_attention takes others"
_ON_HOPPER_ONLY = "tensors must be on a GPU of compute capability 9.0; radix::trie_attention takes others"
_ON_CPU_ONLY = "tensors must be on the CPU; batches are planned there"
_BUILT_WITHOUT = (
    "a tensor is on a CUDA device, and this build of radix_ops has no CUDA kernel for the op; "
    "move the tensors to the CPU, or build from source where nvcc is found"
)


def _refuse(name: str, key: str, reason: str) -> None:
    def kernel(*arguments):
        raise RuntimeError(f"radix::{name}: {reason}")

    REFUSALS[f"radix::{name}", key] = reason
    _library.impl(name, kernel, key)


for _name in ("flash_attention", "flash_attention_backward"):
    _refuse(_name, "CPU", _ON_CUDA_ONLY)
for _name in ("trie_attention_sm90", "trie_attention_backward_sm90"):
    _refuse(_name, "CPU", _ON_HOPPER_ONLY)
for _name in ("lexicographic_order", "common_prefix_lengths", "cut_batches"):
    _refuse(_name, "CUDA", _ON_CPU_ONLY)
for _name in _ALL_OPS:
    _op, _, _overload = _name.partition(".")
    if not getattr(getattr(torch.ops.radix, _op), _overload or "default").has_kernel_for_dispatch_key("CUDA"):
        _refuse(_name, "CUDA", _BUILT_WITHOUT)
