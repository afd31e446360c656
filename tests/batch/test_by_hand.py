"""Batches that nobody folded, with tables or numbers that do not fit, are refused by whatever reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from radix_ops import FoldedBatch, attention

# The tables of a batch that each layout reads, forward and backward.
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


CUT = "max_seqlen_k must be at least the longest sequence"
ENDS = "cu_seqlens must start at 0, not decrease and end at the number of packed tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seqlen_k": 1}, CUT),
        ({"max_seqlen_k": 0}, CUT),
        ({"max_seqlen_k": -1}, CUT),
        ({"cu_seqlens": torch.tensor([0, 3, 6, 8])}, ENDS),
        ({"cu_seqlens": torch.tensor([0, 3, 6, 8, 10])}, ENDS),
        ({"cu_seqlens": torch.tensor([0, 6, 3, 8, 9])}, ENDS),
        ({"cu_seqlens": torch.tensor([1, 3, 6, 8, 10])}, ENDS),
        ({"cu_seqlens": torch.tensor([-1, 2, 5, 7, 8])}, ENDS),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_token_is_cut_from_a_padded_batch(changes, message, side):
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4], [1, 5], [6]])
    spoilt = dataclasses.replace(batch, **changes)
    with pytest.raises(RuntimeError, match=f"^{message}: this batch was altered by hand"):
        spoilt.to_padded(batch.input_ids, side)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_seqlen": 1}, "min_seqlen must be 0 where a sequence is empty"),
        ({"min_seqlen": -1}, "min_seqlen must be 0 where a sequence is empty"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 2]), "min_seqlen": 1}, ENDS),
        ({"cu_seqlens": torch.tensor([-1, 1, 1, 2]), "min_seqlen": 1}, ENDS),
    ],
)
def test_no_sequence_takes_the_last_row_of_another(changes, message):
    batch = FoldedBatch.from_sequences([[1, 2], [], [1]])
    with pytest.raises(RuntimeError, match=f"^{message}: this batch was altered by hand"):
        _ = dataclasses.replace(batch, **changes).last_rows


@pytest.mark.parametrize("num_nodes", [-1, 0, 4, 6, 8, 1000])
@pytest.mark.parametrize("pad_multiple_of", [1, 4])
@pytest.mark.parametrize("layout", ["auto", "compact", "trie", "unfold"])
def test_no_row_is_taken_for_padding(layout, pad_multiple_of, num_nodes):
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4], [1]], pad_multiple_of=pad_multiple_of)
    assert batch.num_nodes == 4
    if num_nodes == batch.num_nodes:
        changes = {"cu_seqlens_q": torch.zeros_like(batch.cu_seqlens_q)}
    else:
        changes = {"num_nodes": num_nodes}
    q, k, v = (torch.randn(batch.num_rows, heads, 8) for heads in (4, 2, 2))
    with pytest.raises(
        RuntimeError, match=r"num_nodes must be where cu_seqlens_q ends: this batch was altered by hand"
    ):
        attention(q, k, v, dataclasses.replace(batch, **changes), layout=layout)


def test_a_wider_padded_batch_may_be_asked_for():
    batch = FoldedBatch.from_sequences([[1, 2], [3]])
    assert dataclasses.replace(batch, max_seqlen_k=4).to_padded(batch.input_ids).tolist() == [
        [1, 2, 0, 0],
        [3, 0, 0, 0],
    ]


def test_compiled_code_cuts_no_token_and_takes_no_other_row():
    torch.compiler.reset()
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4, 5], []])
    to_padded = torch.compile(lambda batch, x: batch.to_padded(x), fullgraph=True, dynamic=True)
    assert to_padded(batch, batch.input_ids).tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [0] * 4]
    with pytest.raises(RuntimeError, match="max_seqlen_k must be"):
        to_padded(dataclasses.replace(batch, max_seqlen_k=3), batch.input_ids)
    last_rows = torch.compile(lambda batch: batch.last_rows, fullgraph=True, dynamic=True)
    with pytest.raises(RuntimeError, match="min_seqlen must be"):
        last_rows(dataclasses.replace(batch, min_seqlen=3))
