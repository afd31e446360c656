"""Batches padded as a graph pads them, against the fold of one more sequence."""

from __future__ import annotations

import pytest
import torch

from helpers.batches import NAMED
from radix_ops import FoldedBatch
from radix_ops.graphs.padding import padded_to


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("pad_multiple_of", [1, 8])
def test_padding_nodes_are_a_run_of_their_own(name, pad_multiple_of):
    """What attention reads is that of the fold of one more sequence, which shares nothing."""
    sequences = NAMED[name]
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=pad_multiple_of)
    if batch.num_nodes == 0:
        return
    for num_rows in (batch.num_rows, batch.num_rows + 1, batch.num_rows + 300):
        padding = num_rows - batch.num_nodes
        padded = padded_to(batch, num_rows)
        want = FoldedBatch.from_sequences([*sequences, *([[10**6] * padding] if padding else [])])
        for field in ("run_sequences", "cu_seqlens_q", "cu_seqlens_k", "kv_index", "kv_indptr", "kv_members"):
            assert torch.equal(getattr(padded, field), getattr(want, field)), field
        for field in ("num_rows", "num_nodes", "max_seqlen_q", "max_seqlen_k"):
            assert getattr(padded, field) == getattr(want, field), field
        assert torch.equal(padded.unfold(padded.input_ids), batch.unfold(batch.input_ids))
        assert padded.input_ids[batch.num_nodes :].eq(batch.input_ids[0]).all()
