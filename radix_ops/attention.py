"""Causal attention over compact rows, behind one function: three layouts, on the CPU and on CUDA."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _flash, _trie
from ._check import ATTENTION_DTYPES
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
            long prefixes are shared.
            "unfold" unfolds q, k and v, attends all packed tokens and folds the output, as RadixMLP does (arXiv
            2601.15013): for comparison.
            "auto" takes "trie" on CUDA where our kernels run, unless nothing is shared, and on the CPU where unfolding
            would repeat keys 6 times or more on average; otherwise "compact". In compiled code it does not look at the
            batch, so that one graph serves all: "trie" where our kernels run, "compact" elsewhere.

    On CUDA in bfloat16 and float16, compute capability 8.0 or more, head_dim up to 256, kernels do it (torch's flash
    attention, and ours for "trie", in Triton, which are compiled in a second or two on the first call of a kind: dtype,
    heads, with a window or without), and nothing waits for the host. All else is correct and, on CUDA, slow: a loop on
    the host over the runs. Values that are not finite stay in the sequences they come from on the CPU; on CUDA they
    may spread to rows before them in the same sequence, as in any flash attention, and to other sequences.

    Returns [num_rows, H, D_v]; padding rows are exactly zero, and so are their gradients. Differentiable once; the
    backward may need the result as it was returned, so don't change it in place.
    Raises ValueError for shapes, devices and values, TypeError for dtypes.
    """
    check_attention(q, k, v, batch, sliding_window)
    return attend(q, k, v, batch, plan_attention(batch, layout), scale, sliding_window)


class AttentionPlan(NamedTuple):
    """What the attention of every layer of a forward needs beside its batch, made once."""

    layout: str  # no longer "auto"; "packed" for "compact" where the keys of every sequence stand as they are needed
    order: tuple[Tensor, ...] | None  # of radix::trie_order, for "trie"
    needs_kernels: bool = False  # "trie" where its CUDA kernels run, "compact" otherwise
    has_padding: bool = False  # whether num_rows > num_nodes; known for "packed"


def plan_attention(batch: FoldedBatch, layout: str) -> AttentionPlan:
    """The plan for all layers; nothing waits for the host.

    Raises ValueError for a layout that there is not.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    is_compiling = torch.compiler.is_compiling()
    is_choice = layout == "auto"
    if is_choice:
        layout = _auto(batch)
    # Rows of runs that share nothing need no unfolding. Compiled code has one graph for all batches instead.
    if (is_choice or layout == "compact") and not is_compiling and batch.kv_index.shape[0] == batch.num_nodes:
        layout = "packed"
    if layout != "trie":
        return AttentionPlan(layout, None, has_padding=layout == "packed" and batch.num_rows > batch.num_nodes)
    runs = batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index
    order = tuple(torch.ops.radix.trie_order(*runs, batch.num_rows))
    return AttentionPlan(layout, order, needs_kernels=is_choice and batch.kv_index.is_cuda)


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
    if plan.layout == "trie" and (not plan.needs_kernels or _trie.has_kernels(q, v)):
        tables = *plan.order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes
        return torch.ops.radix.trie_attention(q, k, v, *tables, factor, window)[0]
    if plan.layout == "unfold":
        packed = [batch.unfold(x) for x in (q, k, v)]
        ends, longest = batch.cu_seqlens, batch.max_seqlen_k
        out = _varlen(*packed, ends, ends, batch.num_tokens, longest, longest, factor, window)
        return _zero_padding_rows(batch.fold(out), batch)
    # Inductor must see no relation of num_rows and num_nodes, of which it then loses one: neither comparison nor cut.
    if plan.layout == "packed" and not (plan.has_padding and torch.compiler.is_compiling()):
        keys, values = (x[: batch.num_nodes] if plan.has_padding else x for x in (k, v))
    else:
        keys, values = torch.ops.radix.gather_kv.csr(k, v, batch.kv_index, batch.kv_indptr, batch.kv_members)
    ends = batch.cu_seqlens_q, batch.cu_seqlens_k
    return _varlen(q, keys, values, *ends, batch.num_nodes, batch.max_seqlen_q, batch.max_seqlen_k, factor, window)


def _varlen(q, k, v, ends_q, ends_k, num_queries, max_seqlen_q, max_seqlen_k, scale, window) -> Tensor:
    if _flash.has_kernels(q, v):
        lengths = num_queries, max_seqlen_q, max_seqlen_k
        return torch.ops.radix.flash_attention(q, k, v, ends_q, ends_k, *lengths, scale, window)[0]
    return torch.ops.radix.varlen_attention(q, k, v, ends_q, ends_k, scale, window)


def _auto(batch: FoldedBatch) -> str:
    """On an H200 "trie" was 1.0 to 1.3 times as fast as "compact" in whole models, and 0.96 to 1.26 in training.

    On a 2-core CPU it was 0.96 to 5 times as fast from 6 repeats on, and below them often slower.
    """
    if batch.kv_index.is_cuda:
        return "trie"
    repeats = not torch.compiler.is_compiling() and batch.kv_index.shape[0] >= _REPEATS_FOR_TRIE * batch.num_nodes
    return "trie" if repeats else "compact"


def _zero_padding_rows(rows: Tensor, batch: FoldedBatch) -> Tensor:
    if not torch.compiler.is_compiling() and batch.num_rows == batch.num_nodes:
        return rows
    is_padding = torch.arange(batch.num_rows, device=rows.device) >= batch.num_nodes
    return rows.masked_fill(is_padding[:, None, None], 0)


def check_attention(q: Tensor, k: Tensor, v: Tensor, batch: FoldedBatch, sliding_window: int | None) -> None:
    """Raises what `attention` does for arguments that are wrong."""
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
