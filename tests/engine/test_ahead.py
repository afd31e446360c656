"""Batches that are folded before the model is free, and those whose salts share no rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from helpers.qwen3_models import VOCABULARY, oracle, run_theirs
from radix_ops.engine.runners import Qwen3Runner, TransformersRunner
from radix_ops.models.qwen3 import Qwen3ForCausalLM

SEQUENCES = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 2, 3, 4], [7], [1, 2, 3, 4, 6]]
SALTS = [b"", b"a", b"", b"a", b"b", b"a"]
ROWS = {(): 7, tuple(SALTS): 4 + 6 + 1}  # of the trie, and of a trie for each salt


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, oracle(folder)


def arrays():
    return [np.array(ids, np.int32) for ids in SEQUENCES]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("salts", ROWS)
@torch.inference_mode()
def test_states_are_those_of_transformers(theirs, folded, salts):
    folder, model = theirs
    runner = Qwen3Runner(Qwen3ForCausalLM.from_pretrained(folder), model.config)
    hidden, _ = run_theirs(model, SEQUENCES)
    with runner.running(folded):
        states = runner.states(runner.ahead(arrays(), salts))
        tokens = np.arange(sum(map(len, SEQUENCES)))
        torch.testing.assert_close(states.at(tokens), hidden, rtol=1e-4, atol=1e-4)
    # Poolings multiply lengths with each other, which int32 does not hold for a text of 50,000 tokens.
    assert states.lengths.dtype == np.int64
    assert states.lengths.tolist() == [len(ids) for ids in SEQUENCES]
    assert runner.rows == (ROWS[salts] if folded else len(tokens))


@torch.inference_mode()
def test_equal_rows_of_one_salt_alone_are_one(theirs):
    folder, model = theirs
    runner = Qwen3Runner(Qwen3ForCausalLM.from_pretrained(folder), model.config)
    with runner.running(True):
        states = runner.states(runner.ahead(arrays(), SALTS), np.array([0, 4, 8, 10]))
    first, second, third, fourth = states.token_rows[[0, 4, 8, 10]].tolist()
    assert first == third
    assert second == fourth != first


@torch.inference_mode()
def test_ids_up_to_the_largest_are_kept_apart_by_salts(theirs):
    folder, model = theirs
    runner = Qwen3Runner(Qwen3ForCausalLM.from_pretrained(folder), model.config)
    sequences = [np.array([VOCABULARY - 1, 0], np.int32)] * 2
    with runner.running(True):
        ahead = runner.ahead(sequences, [b"a", b"b"])
    assert ahead.batch.input_ids.tolist() == [VOCABULARY - 1, 0] * 2
    assert ahead.batch.input_ids.dtype == torch.int32


def test_a_model_of_transformers_folds_by_itself(theirs):
    _, model = theirs
    assert isinstance(model, transformers.PreTrainedModel)
    runner = TransformersRunner(model)
    sequences = arrays()
    assert not runner.keeps_salts
    assert runner.ahead(sequences) is sequences
