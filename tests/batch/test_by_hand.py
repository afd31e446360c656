"""Batches that nobody folded, with tables that do not fit: attention refuses what it reads of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from radix_ops import FoldedBatch, attention

# What each layout reads of a batch, forward and backward.
READ = {
    "compact": ("kv_index", "kv_indptr", "kv_members", "cu_seqlens_q", "cu_seqlens_k"),
    "trie": ("kv_index", "cu_seqlens_q", "cu_seqlens_k"),
    "unfold": ("unfold_index", "unfold_indptr", "unfold_members", "fold_index", "cu_seqlens"),
}
SPOILT = {
    "2^62 more": lambda table: table + 2**62,
    "2^63 less": lambda table: table - 2**63,
    "2^32 more, the same as int32": lambda table: table + 2**32,
    "one entry short": lambda table: table[:-1],
    "empty": lambda table: table[:0],
    "of floats": lambda table: table.float(),
    "of two dimensions": lambda table: table[None],
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize(("layout", "field"), [(layout, field) for layout, fields in READ.items() for field in fields])
def test_a_table_that_does_not_fit_is_refused(layout, field, spoilt):
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4], [1, 5], [6]], pad_multiple_of=4)
    q, k, v = (torch.randn(batch.num_rows, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    wrong = SPOILT[spoilt](getattr(batch, field).long())

    def run():
        attention(q, k, v, dataclasses.replace(batch, **{field: wrong}), layout=layout).sum().backward()

    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run()
