"""The ops, written plainly: slow, on any device, for tests and for readers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["fold", "gather", "scatter_add", "varlen_attention"]


def fold(
    input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, pad_multiple_of: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold as radix::fold, a token at a time: a row is a (parent row, token, position)."""
    rows: dict[tuple[int, int, int], int] = {}
    ids, positions, unfold_index, fold_index = input_ids.tolist(), position_ids.tolist(), [], []
    ends = cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        parent = -1
        for i in range(start, end):
            node = (parent, ids[i], positions[i])
            if node not in rows:
                rows[node] = len(rows)
                fold_index.append(i)
            parent = rows[node]
            unfold_index.append(parent)
    padding = -len(rows) % pad_multiple_of

    def compact(values: list[int], like: Tensor) -> Tensor:
        return torch.tensor([values[i] for i in fold_index] + [0] * padding, dtype=like.dtype, device=like.device)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=input_ids.device)

    return (
        compact(ids, input_ids),
        compact(positions, position_ids),
        index(unfold_index),
        index(fold_index + [0] * padding),
    )


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather as radix::gather, a row at a time."""
    return torch.stack([x[i] for i in index.tolist()]) if len(index) else x[:0]


def scatter_add(src: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Add up as radix::scatter_add, summed in float64 (int64 for integers) and rounded once."""
    wide = torch.float64 if src.is_floating_point() else torch.int64
    out = torch.zeros(num_rows, *src.shape[1:], dtype=wide, device=src.device)
    for i, row in enumerate(index.tolist()):
        out[row] += src[i].to(wide)
    return out.to(src.dtype)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Attend as radix::varlen_attention, a query and a head at a time."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    group = q.shape[1] // k.shape[1]
    for r in range(len(ends_q) - 1):
        for row in range(ends_q[r], ends_q[r + 1]):
            last = ends_k[r + 1] - (ends_q[r + 1] - row)
            first = max(ends_k[r], last - sliding_window + 1) if sliding_window else ends_k[r]
            for head in range(q.shape[1]):
                keys, values = (x[first : last + 1, head // group] for x in (k, v))
                out[row, head] = (keys @ q[row, head] * scale).softmax(0) @ values
    return out
