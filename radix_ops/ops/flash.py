"""CUDA kernels of radix::flash_attention: varlen flash attention, in bfloat16 and float16.

They are those of `torch.nn.attention.varlen.varlen_attn`, of the flash attention that
`torch.nn.attention.activate_flash_attention_impl` chose, or of a package (`flash_packages`); rows behind the last run
are zeros. Causal masks are aligned at the end of keys.

These kernels take cu_seqlens_q, cu_seqlens_k and the largest lengths at their word, and so do these ops: ends that
fall, or lie past the rows of q or of k, lead outside the tensors, as they do in `varlen_attn`, and a largest length
that is too small leaves rows out. To look at the values would take several launches in every layer, or a wait for the
host. `radix::fold_plan` makes sound ones; whoever takes a batch from elsewhere must trust it, or use layout "trie",
whose kernels no table leads outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_gradient, check_index_like, check_qkv, check_saved, check_storages
from .flash_calls import Runs
from .flash_packages import calls_for

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Return whether these kernels, and those of `trie_triton`, compute attention of q and v."""
    return (
        q.is_cuda and q.dtype in DTYPES and max(q.shape[2], v.shape[2]) <= MAX_HEAD_DIM and _is_recent(q.device.index)
    )


def _is_recent(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: that takes as long as torch itself.
_is_recent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def flash_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, num_queries, max_seqlen_q, max_seqlen_k, scale, sliding_window=0
):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, num_queries, max_seqlen_q, max_seqlen_k, sliding_window)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    padded = _pad_heads(q, k, v)
    runs = _runs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, sliding_window)
    out, logsumexp = calls_for("forward", padded[0], padded[1], runs).forward(*padded, runs)
    _clear(out, num_queries)
    return _cut(out, v.shape[2]), logsumexp


def flash_attention_backward(
    grad_out,
    q,
    k,
    v,
    out,
    logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    num_queries,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    sliding_window=0,
):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, num_queries, max_seqlen_q, max_seqlen_k, sliding_window)
    check_gradient("flash_attention", grad_out, q, v)
    check_saved("flash_attention", q, v, out, logsumexp)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    padded = _pad_heads(q, k, v)
    size = padded[0].shape[2]
    saved = *padded, _pad(out, size).contiguous(), logsumexp
    runs = _runs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, sliding_window)
    backward = calls_for("backward", padded[0], padded[1], runs).backward
    grad_q, grad_k, grad_v = backward(_aligned(_pad(grad_out, size).contiguous()), *saved, runs)
    _clear(grad_q, num_queries)
    return _cut(grad_q, q.shape[2]), _cut(grad_k, k.shape[2]), _cut(grad_v, v.shape[2])


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, num_queries, max_seqlen_q, max_seqlen_k, sliding_window) -> None:
    check_qkv("flash_attention", q, k, v, sliding_window)
    check_index_like("flash_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_storages("flash_attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if q.dtype not in DTYPES:
        raise RuntimeError(f"radix::flash_attention: q, k and v must be bfloat16 or float16, got {q.dtype}")
    if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
        raise RuntimeError(
            f"radix::flash_attention: head_dim must be at most {MAX_HEAD_DIM}, got {max(q.shape[2], v.shape[2])}"
        )
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] == 0:
        raise RuntimeError(
            "radix::flash_attention: cu_seqlens_q and cu_seqlens_k must be equally long and hold at least a 0, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]} entries"
        )
    if not 0 <= num_queries <= q.shape[0]:
        raise RuntimeError(
            f"radix::flash_attention: num_queries must be from 0 to the {q.shape[0]} rows of q, got {num_queries}"
        )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not 0 <= length < 2**31:
            raise RuntimeError(f"radix::flash_attention: {name} must be from 0 to 2^31 - 1, got {length}")


def _clear(rows: Tensor, first: int) -> None:
    """Write zeros to the rows from `first` on; to write to none takes the host as long as to write to many."""
    if first < rows.shape[0]:
        rows[first:] = 0


def _runs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int) -> Runs:
    # With max_seqlen_q 1 torch's kernel would take q for one row a run, with no padding rows behind.
    ends_q, ends_k = (x.int().contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    return Runs(ends_q, ends_k, max(max_seqlen_q, 2), max_seqlen_k, scale, window)


def _pad_heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Pad all three to one head_dim, a multiple of 8; zeros change neither scores nor the values that count."""
    size = -(-max(q.shape[2], v.shape[2]) // 8) * 8
    return [_aligned(_pad(x, size)) for x in (q, k, v)]


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy where the kernel's reads of 16 bytes would not fit its strides or its address."""
    fits = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _pad(x: Tensor, size: int) -> Tensor:
    return x if x.shape[2] == size else F.pad(x, (0, size - x.shape[2]))


def _cut(x: Tensor, size: int) -> Tensor:
    return x if x.shape[2] == size else x[:, :, :size].contiguous()
