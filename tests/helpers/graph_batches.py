"""Batches on CUDA for tests of captured graphs, folded and packed."""

from __future__ import annotations

import torch

import radix_ops
from radix_ops import FoldedBatch

SHARED = [[7] * 3 + [i % 50 for i in range(190)] + [51 + i] * (3 + 40 * i) for i in range(4)]
LIKE_SHARED = [[5] * 3 + [i % 40 for i in range(191)] + [50 + i] * (4 + 39 * i) for i in range(4)]  # of its sizes
NESTED = [*SHARED, SHARED[0][:100], *([*SHARED[1][:150], 9, i] for i in range(4)), SHARED[2], [5] * 300]
ALONE = [[i] * (40 + i) for i in range(6)]


def folded(sequences=SHARED):
    return FoldedBatch.from_sequences(sequences, device="cuda")


def packed(sequences=SHARED):
    ids = torch.tensor([token for s in sequences for token in s]).cuda()
    return radix_ops.pack(ids, torch.tensor([0, *map(len, sequences)]).cumsum(0).cuda())
