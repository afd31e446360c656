"""Padded batches: rows that are real have the results that they had."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import radix_ops
from helpers.batches import NAMED
from helpers.qwen3_models import FILLED, VOCABULARY, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.graphs.buckets import sizes_of
from radix_ops.graphs.inputs import StaticInputs
from radix_ops.models.qwen3 import Qwen3ForCausalLM

LONG = [[7, 8] * 40 + [i] * (20 + i) for i in range(5)]
BATCHES = {name: NAMED[name] for name in FILLED} | {"long": LONG, "longer": [*LONG, [3] * 150]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    return oracle(folder), Qwen3ForCausalLM.from_pretrained(folder)


def packed(sequences):
    ids = torch.tensor([token for s in sequences for token in s])
    return radix_ops.pack(ids, torch.tensor([0, *map(len, sequences)]).cumsum(0))


def without_filler(batch):
    """Attention of runs on the CPU takes no keys behind the last run, as flash attention does."""
    end = int(batch.cu_seqlens_k[-1])
    return dataclasses.replace(batch, kv_index=batch.kv_index[:end], kv_members=batch.kv_members[:end])


@pytest.mark.parametrize("layout", ["auto", "compact", "trie"])
@pytest.mark.parametrize("fold", [FoldedBatch.from_sequences, packed])
def test_a_padded_batch_gives_what_transformers_does(models, layout, fold):
    """One set of buffers takes batch after batch, so that nothing of the one before may show."""
    theirs, ours = models
    buffers = {}
    for name, sequences in [*BATCHES.items(), *reversed(BATCHES.items())]:
        batch = fold(sequences)
        with torch.no_grad():
            want, _ = run_theirs(theirs, sequences)
            sizes = sizes_of(batch, by_trie=layout == "trie")
            inputs = buffers.setdefault(sizes, StaticInputs(sizes, torch.device("cpu")))
            inputs.fill(batch)
            hidden = ours.model(without_filler(inputs.batch), layout)[: batch.num_rows]
        torch.testing.assert_close(batch.unfold(hidden), want, rtol=1e-4, atol=1e-5, msg=name)
    assert len(buffers) < len(BATCHES)


def test_rows_wanted_are_padded_too():
    batch = FoldedBatch.from_sequences(LONG)
    inputs = StaticInputs(sizes_of(batch, by_trie=True, num_wanted=5), torch.device("cpu"))
    inputs.fill(batch, batch.last_rows)
    assert inputs.rows().tolist()[:5] == batch.last_rows.tolist()
    assert set(inputs.rows().tolist()[5:]) == {0}


def test_rows_of_the_padding_are_out_of_range():
    """Without it there are none."""
    batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=7)
    inputs = StaticInputs(sizes_of(batch, by_trie=True, num_wanted=4), torch.device("cpu"))
    inputs.fill(batch, torch.tensor([batch.num_rows - 1, batch.num_rows, 2**40, -3]))
    assert inputs.batch.num_rows > batch.num_rows
    assert inputs.rows().tolist()[:4] == [batch.num_rows - 1, -1, -1, -3]


def test_integers_of_other_widths_keep_their_values():
    ids = torch.tensor([5, 6, 5, 6, 7], dtype=torch.int32)
    batch = radix_ops.fold(ids, torch.tensor([0, 2, 5]))
    inputs = StaticInputs(sizes_of(batch, by_trie=True), torch.device("cpu"))
    inputs.fill(batch)
    assert inputs.batch.input_ids.tolist()[:3] == [5, 6, 7]
    assert inputs.batch.position_ids.tolist()[:3] == [0, 1, 2]


def test_padding_brings_in_no_token_that_a_batch_does_not_hold(models):
    """What an embedding holds for other tokens, NaN perhaps, could spread."""
    batch = FoldedBatch.from_sequences(LONG)
    inputs = StaticInputs(sizes_of(batch, by_trie=True), torch.device("cpu"))
    inputs.fill(FoldedBatch.from_sequences([[VOCABULARY - 1] * 50, *LONG[:2]]))
    inputs.fill(batch)
    assert set(inputs.batch.input_ids.tolist()) == set(batch.input_ids.tolist())
    assert inputs.batch.position_ids.max() == batch.position_ids.max()
