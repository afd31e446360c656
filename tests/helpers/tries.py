"""Long sequences, the order and the ancestors of their rows, and dense attention, for tests of the trie layout."""

from __future__ import annotations

import torch

LONG = [[*range(900), i] for i in range(3)] + [[*range(300), 5, *range(400)], list(range(650)), [*range(300), 5]]
# Run r + 1 leaves run r at its last token: the deepest tree of runs.
NESTED_RUNS = [[*range(i), 1000 + i] for i in range(200)]
APART = [[*([100 + i] * 60), *range(i * 3)] for i in range(8)]
# Query heads, key/value heads, head_dim of keys and of values, sliding window, scale.
SHAPES = [
    (4, 2, 16, 16, 0, 0.3),
    (7, 1, 24, 16, 0, -0.2),  # a group that does not divide the block, a factor below 0
    (4, 4, 16, 40, 20, 0.3),
    (6, 2, 64, 64, 5, 0.0),
    (40, 1, 16, 8, 0, 0.25),  # a group that takes several blocks
    (4, 2, 16, 16, 1, 0.3),
]


def order_of(batch):
    return torch.ops.radix.trie_order(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_rows)


def ancestors_of(batch):
    """Return bool [num_rows, num_rows]: whether the row of the first index sees that of the second."""
    sees = torch.zeros(batch.num_rows, batch.num_rows, dtype=torch.bool)
    for rows in batch.unfold_index.cpu().long().split(batch.lengths.tolist()):
        sees[rows[:, None], rows] = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    return sees


def dense(q, k, v, sees, scale):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def strided(x):
    """Return the same values as a view of [heads, rows, 1 + size] without the first column."""
    return torch.cat([x[..., :1], x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 1:]
