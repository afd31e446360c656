"""Which kernel runs each op of torch.ops.radix where, beside those that csrc registers."""

from __future__ import annotations

import functools

import torch

from . import flash, trie, varlen

_ALL_OPS = (
    "fold",
    "fold_plan",
    "fold_plan_front",
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
    "lexicographic_order",
    "common_prefix_lengths",
    "cut_batches",
)

_library = torch.library.Library("radix", "IMPL")


def _apart_from_autocast(kernel):
    """The kernel in its arguments' dtypes, where autocast would cast its products: a backward pass may run under it."""

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
):
    for _key in _keys:
        _library.impl(_name, _apart_from_autocast(getattr(_module, _name)), _key)
for _name in ("flash_attention", "flash_attention_backward"):
    _library.impl(_name, getattr(flash, _name), "CUDA")


def _no_cuda_kernel(name: str):
    def kernel(*args):
        raise RuntimeError(
            f"radix::{name}: a tensor is on a CUDA device, and this build of radix_ops has no CUDA kernel for the op; "
            "move the tensors to the CPU, or build from source where nvcc is found"
        )

    return kernel


def _on_cuda_only(name: str):
    def kernel(*args):
        raise RuntimeError(f"radix::{name}: tensors must be on a CUDA device; radix::varlen_attention takes others")

    return kernel


def _on_cpu_only(name: str):
    def kernel(*args):
        raise RuntimeError(f"radix::{name}: tensors must be on the CPU; batches are planned there")

    return kernel


for _name in ("flash_attention", "flash_attention_backward"):
    _library.impl(_name, _on_cuda_only(_name), "CPU")
for _name in ("lexicographic_order", "common_prefix_lengths", "cut_batches"):
    _library.impl(_name, _on_cpu_only(_name), "CUDA")
for _op in _ALL_OPS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"radix::{_op}", "CUDA"):
        _library.impl(_op, _no_cuda_kernel(_op), "CUDA")
