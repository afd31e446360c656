"""Causal attention over compact rows, behind one function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import ATTENTION_DTYPES
from .batch import FoldedBatch

LAYOUTS = ("auto", "compact", "unfold")


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
        q: [num_rows, H, D], float32, float64, bfloat16 or float16, on the CPU.
        k, v: [num_rows, H_kv, D] and [num_rows, H_kv, D_v] of the same dtype; H is a multiple of H_kv (grouped-query
            attention: head h of q reads head h * H_kv // H of k and v).
        batch: the batch that the rows belong to.
        scale: factor of the scores, 1 / sqrt(D) by default.
        sliding_window: each token sees itself and at most sliding_window - 1 tokens before it; None: all of them.
        layout: how it is computed, not what. "compact" (what "auto" takes) leaves q as it is and unfolds the keys and
            values of the sequences that add rows, so that each row's attention is computed once. "unfold" unfolds q,
            k and v, attends all packed tokens and folds the output, as RadixMLP does (arXiv 2601.15013): for
            comparison.

    Returns [num_rows, H, D_v]; padding rows are exactly zero, and so are their gradients. Differentiable once.
    Raises ValueError for shapes, devices and values, TypeError for dtypes.
    """
    _check(q, k, v, batch, sliding_window, layout)
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    window = sliding_window or 0
    if layout == "unfold":
        packed = [batch.unfold(x) for x in (q, k, v)]
        out = torch.ops.radix.varlen_attention(*packed, batch.cu_seqlens, batch.cu_seqlens, scale, window)
        return _zero_padding_rows(batch.fold(out), batch)
    inverse = (batch.kv_index, batch.kv_indptr, batch.kv_members)
    keys, values = torch.ops.radix.gather_kv.csr(k, v, *inverse)
    return torch.ops.radix.varlen_attention(q, keys, values, batch.cu_seqlens_q, batch.cu_seqlens_k, scale, window)


def _zero_padding_rows(rows: Tensor, batch: FoldedBatch) -> Tensor:
    is_padding = torch.arange(batch.num_rows, device=rows.device) >= batch.num_nodes
    return rows.masked_fill(is_padding[:, None, None], 0)


def _check(q: Tensor, k: Tensor, v: Tensor, batch: FoldedBatch, sliding_window: int | None, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
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
        if x.device.type != "cpu" or batch.fold_index.device.type != "cpu":
            raise ValueError(
                f"attention runs on the CPU; {name} is on {x.device} and the batch on {batch.fold_index.device}"
            )
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q must have at least one head and a head_dim of at least 1, got {list(q.shape)}")
    if q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q [rows, H, D], k [rows, H_kv, D] and v [rows, H_kv, D_v] must agree in D and H_kv, and H be a multiple "
            f"of H_kv, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
