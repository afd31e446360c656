"""The sizes that batches are padded to."""

from __future__ import annotations

import random

import pytest
import torch

import radix_ops
from helpers.batches import NAMED
from helpers.qwen3_models import FILLED
from radix_ops import FoldedBatch
from radix_ops.graphs.buckets import sizes_of


def random_batch(seed, multiple=1):
    numbers = random.Random(seed)
    shared = [numbers.randrange(9) for _ in range(numbers.randrange(1, 400))]
    sequences = [
        [
            *shared[: numbers.randrange(len(shared) + 1)],
            *(numbers.randrange(9) for _ in range(numbers.randrange(1, 90))),
        ]
        for _ in range(numbers.randrange(1, 40))
    ]
    return FoldedBatch.from_sequences(sequences, pad_multiple_of=multiple)


def packed(batch):
    ids = batch.unfold(batch.input_ids)
    return radix_ops.pack(ids, batch.cu_seqlens)


@pytest.mark.parametrize("by_trie", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_batch_fits_its_sizes(by_trie, multiple):
    batches = [FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=multiple) for name in FILLED]
    batches += [random_batch(seed, multiple) for seed in range(60)]
    for batch in [*batches, *map(packed, batches)]:
        sizes = sizes_of(batch, by_trie=by_trie, num_wanted=batch.num_sequences)
        padding = sizes.rows - batch.num_nodes
        assert sizes.rows >= batch.num_rows
        assert sizes.keys >= batch.kv_index.shape[0] + padding
        # Padding is a run of its own.
        assert sizes.ends >= batch.cu_seqlens_q.shape[0] + (padding > 0)
        assert sizes.longest_run >= max(batch.max_seqlen_q, padding)
        assert sizes.longest_sequence >= max(batch.max_seqlen_k, padding)
        assert sizes.wanted >= batch.num_sequences
        # Attention unfolds nothing where there are as many keys as rows.
        assert (sizes.keys == sizes.rows) == (batch.kv_index.shape[0] == batch.num_nodes)


def test_padding_is_few_rows_and_sizes_are_few():
    def rows_of(count):
        batch = FoldedBatch.from_sequences([torch.zeros(count, dtype=torch.int64)])
        return sizes_of(batch, by_trie=True).rows

    counts = range(1, 9000, 7)
    rows = list(map(rows_of, counts))
    assert rows == sorted(rows)
    assert all(row - count < max(64, count / 32 + 1) for row, count in zip(rows, counts, strict=True))
    assert len(set(rows)) <= 32 + 2 * 32 + 8


def test_parts_of_a_buffer_stay_aligned():
    """Kernels read 16 bytes at a time, and copy what does not start at a multiple of them."""
    for seed in range(60):
        sizes = sizes_of(random_batch(seed), by_trie=bool(seed % 2))
        assert sizes.rows * 8 % 16 == sizes.ends * 4 % 16 == 0
