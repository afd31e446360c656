"""Causal attention over compact rows, behind one function: three layouts, on the CPU and on CUDA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _flash, _trie
from ._check import ATTENTION_DTYPES, MAX_WINDOW
from .batch import FoldedBatch

LAYOUTS = ("auto", "compact", "trie", "unfold")
_REPEATS_FOR_TRIE = 6


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: FoldedBatch,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    layout: str = "auto",
) -> Tensor:
    """Each row attends to the rows on its path from the start of its sequence.

    Args:
        q: [num_rows, H, D], float32, float64, bfloat16 or float16.
        k, v: [num_rows, H_kv, D] and [num_rows, H_kv, D_v] of the same dtype and device; H is a multiple of H_kv
            (grouped-query attention: head h of q reads head h * H_kv // H of k and v).
        batch: the batch that the rows belong to, on the same device.
        scale: factor of the scores, 1 / sqrt(D) by default.
        sliding_window: each token sees itself and at most sliding_window - 1 tokens before it; None: all of them.
        layout: how it is computed, not what.
            "compact" leaves q as it is and unfolds the keys and values of the sequences that add rows, so that each
            row's attention is computed once. Where nothing is shared, nothing is unfolded.
            "trie" unfolds nothing and attends to the rows as they stand: the least memory, and the most to gain where
            long prefixes are shared. On CUDA it compiles FlexAttention, which takes seconds, on the first call of a
            kind: dtype, shape and strides of heads, scale, with a window or without, with gradients or without, fewer
            than 128 rows or more.
            "unfold" unfolds q, k and v, attends all packed tokens and folds the output, as RadixMLP does (arXiv
            2601.15013): for comparison.
            "auto" takes "trie" on the CPU where unfolding would repeat keys 6 times or more on average, and "compact"
            otherwise; in compiled code it takes "compact" always, so that one graph serves all batches.

    On CUDA in bfloat16 and float16, compute capability 8.0 or more, torch's kernels do it (flash attention, and
    FlexAttention for "trie"), and nothing waits for the host. All else is correct and, on CUDA, slow: a loop on the
    host over the runs. Values that are not finite stay in the sequences they come from on the CPU; on CUDA they may
    spread to rows before them in the same sequence, as in any flash attention, and from there to other sequences.

    Returns [num_rows, H, D_v]; padding rows are exactly zero, and so are their gradients. Differentiable once; the
    backward may need the result as it was returned, so don't change it in place.
    Raises ValueError for shapes, devices and values, TypeError for dtypes.
    """
    _check(q, k, v, batch, sliding_window)
    plan = plan_attention(batch, layout, q.dtype, (sliding_window,))
    return attend(q, k, v, batch, plan, scale, sliding_window)


class AttentionPlan(NamedTuple):
    """What the attention of every layer of a forward needs beside its batch, made once."""

    layout: str  # no longer "auto"; "packed" for "compact" where the keys of every sequence stand as they are needed
    order: tuple[Tensor, Tensor, Tensor] | None  # of radix::trie_order, for "trie"
    blocks: dict[int, tuple[Tensor, Tensor]] | None  # of radix::trie_blocks by window (0: none), where Flex runs


def plan_attention(batch: FoldedBatch, layout: str, dtype: torch.dtype, windows: Iterable[int | None]) -> AttentionPlan:
    """The plan for layers with the given sliding windows; nothing waits for the host.

    Raises ValueError for a layout that there is not.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if layout == "auto":
        layout = _auto(batch)
    if layout != "trie":
        # Rows of runs that share nothing need no unfolding. Compiled code has one graph for all batches instead.
        if layout == "compact" and not torch.compiler.is_compiling() and batch.kv_index.shape[0] == batch.num_nodes:
            layout = "packed"
        return AttentionPlan(layout, None, None)
    runs = batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index
    order = tuple(torch.ops.radix.trie_order(*runs, batch.kv_indptr, batch.kv_members))
    blocks = None
    if _has_half_kernels(batch.kv_index.device, dtype):
        blocks = {
            window: tuple(torch.ops.radix.trie_blocks(*order, *runs, window))
            for window in {window or 0 for window in windows}
        }
    return AttentionPlan(layout, order, blocks)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: FoldedBatch,
    plan: AttentionPlan,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """`attention` by a plan, with arguments that are known to be right."""
    window = sliding_window or 0
    factor = 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    if plan.layout == "trie":
        if plan.blocks is None:
            return torch.ops.radix.trie_attention(q, k, v, *plan.order, batch.cu_seqlens_q, factor, window)[0]
        enter, leave, depth = plan.order
        oldest = depth - (min(window, MAX_WINDOW) - 1) if window else None
        # The kernel multiplies what a mask hides by 0, which leaves of padding's values those that are not finite.
        q, k, v = (_zero_padding_rows(x, batch) for x in (q, k, v))
        out = _trie.flex(q, k, v, enter, leave, *plan.blocks[window], depth, oldest, factor)
        return _zero_padding_rows(out, batch)
    if plan.layout == "unfold":
        packed = [batch.unfold(x) for x in (q, k, v)]
        ends, longest = batch.cu_seqlens, batch.max_seqlen_k
        out = _varlen(*packed, ends, ends, batch.num_tokens, longest, longest, factor, window)
        return _zero_padding_rows(batch.fold(out), batch)
    if plan.layout == "packed":
        keys, values = k[: batch.num_nodes], v[: batch.num_nodes]
    else:
        keys, values = torch.ops.radix.gather_kv.csr(k, v, batch.kv_index, batch.kv_indptr, batch.kv_members)
    ends = batch.cu_seqlens_q, batch.cu_seqlens_k
    return _varlen(q, keys, values, *ends, batch.num_nodes, batch.max_seqlen_q, batch.max_seqlen_k, factor, window)


def _varlen(q, k, v, ends_q, ends_k, num_queries, max_seqlen_q, max_seqlen_k, scale, window) -> Tensor:
    if _has_half_kernels(q.device, q.dtype) and max(q.shape[2], v.shape[2]) <= _flash.MAX_HEAD_DIM:
        lengths = num_queries, max_seqlen_q, max_seqlen_k
        return torch.ops.radix.flash_attention(q, k, v, ends_q, ends_k, *lengths, scale, window)[0]
    return torch.ops.radix.varlen_attention(q, k, v, ends_q, ends_k, scale, window)


def _has_half_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in _flash.DTYPES and _flash.runs_on(device.index)


def _auto(batch: FoldedBatch) -> str:
    """From 6 times on, "trie" was 0.96 to 5 times as fast as "compact" on a 2-core CPU, and below it often slower."""
    if torch.compiler.is_compiling() or batch.kv_index.is_cuda:
        return "compact"
    return "trie" if batch.kv_index.shape[0] >= _REPEATS_FOR_TRIE * max(batch.num_nodes, 1) else "compact"


def _zero_padding_rows(rows: Tensor, batch: FoldedBatch) -> Tensor:
    if not torch.compiler.is_compiling() and batch.num_rows == batch.num_nodes:
        return rows
    is_padding = torch.arange(batch.num_rows, device=rows.device) >= batch.num_nodes
    return rows.masked_fill(is_padding[:, None, None], 0)


def _check(q: Tensor, k: Tensor, v: Tensor, batch: FoldedBatch, sliding_window: int | None) -> None:
    if not isinstance(batch, FoldedBatch):
        raise TypeError(f"batch must be a FoldedBatch, got {type(batch).__name__}")
    if sliding_window is not None and (isinstance(sliding_window, bool) or not isinstance(sliding_window, int)):
        raise TypeError(f"sliding_window must be an int or None, got {type(sliding_window).__name__}")
    if sliding_window is not None and not 1 <= sliding_window < 2**63:
        raise ValueError(f"sliding_window must be at least 1, or None for no window, got {sliding_window}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[0] != batch.num_rows:
            raise ValueError(
                f"{name} must have shape [num_rows={batch.num_rows}, heads, head_dim], got {list(x.shape)}"
            )
        if x.dtype not in ATTENTION_DTYPES or x.dtype != q.dtype:
            raise TypeError(
                "q, k and v must be of one dtype, float32, float64, bfloat16 or float16, "
                f"got {q.dtype} for q and {x.dtype} for {name}"
            )
        if x.device != batch.fold_index.device:
            raise ValueError(f"{name} is on {x.device}, but the batch is on {batch.fold_index.device}")
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q must have at least one head and a head_dim of at least 1, got {list(q.shape)}")
    if q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q [rows, H, D], k [rows, H_kv, D] and v [rows, H_kv, D_v] must agree in D and H_kv, and H be a multiple "
            f"of H_kv, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
