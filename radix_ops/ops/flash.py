"""CUDA kernels of radix::flash_attention: torch's varlen flash attention, in bfloat16 and float16.

They are those of `torch.nn.attention.varlen.varlen_attn`, or of the flash attention that
`torch.nn.attention.activate_flash_attention_impl` chose; rows behind the last run are zeros. Causal masks are aligned
at the end of keys.

Torch's kernels take cu_seqlens_q, cu_seqlens_k and the largest lengths at their word, and so do these ops: ends that
fall, or lie past the rows of q or of k, lead outside the tensors, as they do in `varlen_attn`, and a largest length
that is too small leaves rows out. To look at the values would take several launches in every layer, or a wait for the
host. `radix::fold_plan` makes sound ones; whoever takes a batch from elsewhere must trust it, or use layout "trie",
whose kernels no table leads outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import MAX_WINDOW, check_gradient, check_index_like, check_qkv, check_saved, check_storages

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
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *_pad_heads(q, k, v),
        cu_seqlens_q.int(),
        cu_seqlens_k.int(),
        *_lengths(max_seqlen_q, max_seqlen_k),
        0.0,
        sliding_window == 0,
        False,
        scale=scale,
        **_window(sliding_window),
    )
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
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout, which is off
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        _aligned(_pad(grad_out, size).contiguous()),
        *padded,
        _pad(out, size).contiguous(),
        logsumexp,
        cu_seqlens_q.int(),
        cu_seqlens_k.int(),
        *_lengths(max_seqlen_q, max_seqlen_k),
        0.0,
        sliding_window == 0,
        unused,
        unused,
        scale=scale,
        **_window(sliding_window),
    )
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


def _lengths(max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, int]:
    # With max_seqlen_q 1 the kernel would take q for one row a run, with no padding rows behind.
    return max(max_seqlen_q, 2), max_seqlen_k


def _window(sliding_window: int) -> dict[str, int]:
    if not sliding_window:
        return {}
    return {"window_size_left": min(sliding_window, MAX_WINDOW) - 1, "window_size_right": 0}


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
