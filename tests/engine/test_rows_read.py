"""Our Qwen3's last layer computes the rows alone that a task reads, keys and values apart."""

import numpy as np
import pytest

from helpers.language_models import needs_hf, reranking_tokenizer, tiny_model, tiny_tokenizer
from radix_ops import FoldedBatch
from radix_ops.engine import Embedder, Reranker, Scorer, Template
from radix_ops.engine.runners import Qwen3Runner
from radix_ops.models.qwen3 import Qwen3ForCausalLM

CONTEXT = "Which river flows through Paris and the sea is saltier than the river?"


@pytest.fixture
def model(tmp_path):
    needs_hf()
    tiny_model("Qwen3", max_position_embeddings=256).save_pretrained(tmp_path)
    return Qwen3ForCausalLM.from_pretrained(tmp_path)


def counted(model):
    """Return a dict that fills with how many rows two products of the last layer were given."""
    seen = {"keys": 0, "MLP": 0}
    layer = model.model.layers[-1]

    def count(name, module):
        module.register_forward_hook(lambda _, given, out: seen.update({name: seen[name] + len(out)}))

    count("keys", layer.self_attn.k_proj)
    count("MLP", layer.mlp.down_proj)
    return seen


def test_a_scorer_reads_the_rows_that_predict_choices(model):
    tokenizer, seen = tiny_tokenizer(adds_bos=True), counted(model)
    choices = [" the Seine", " the sea", " the Seine"]
    Scorer(model, tokenizer).score([{"context": CONTEXT, "choices": choices}])
    sequences = [tokenizer(CONTEXT + choice)["input_ids"][:-1] for choice in choices]
    context = len(tokenizer(CONTEXT)["input_ids"])
    predicting = {tuple(ids[:end]) for ids in sequences for end in range(context, len(ids) + 1)}
    assert seen == {"keys": FoldedBatch.from_sequences(sequences).num_rows, "MLP": len(predicting)}


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_an_embedder_reads_the_rows_that_its_pooling_does(model, pooling):
    tokenizer, seen = tiny_tokenizer(adds_bos=True), counted(model)
    texts = [CONTEXT, CONTEXT + " the sea", CONTEXT]
    Embedder(model.model, tokenizer, pooling=pooling).embed(texts)
    batch = FoldedBatch.from_sequences([tokenizer(text)["input_ids"] for text in texts])
    read = {"last": 2, "cls": 1, "mean": batch.num_rows}[pooling]
    assert seen == {"keys": batch.num_rows, "MLP": read}


def test_a_reranker_reads_last_tokens(model):
    tokenizer, seen = reranking_tokenizer(), counted(model)
    template = Template("Query: {query}\nDocument: {document}\nRelevant:", yes=" river", no=7)
    Reranker(model, tokenizer, template=template).rank(CONTEXT, ["the Seine", "the sea", "the Seine"])
    assert seen["MLP"] == 2
    assert seen["keys"] > 20


def test_states_are_those_of_a_call_for_all_tokens(model):
    runner = Qwen3Runner(model, None)
    sequences = [np.arange(5, 40, dtype=np.int32), np.arange(5, 60, dtype=np.int32), np.arange(7, dtype=np.int32)]
    tokens = np.array([90, 3, 38, 3, 88])
    for folded in (True, False):
        with runner.running(folded):
            some, every = runner.states(sequences, tokens), runner.states(sequences)
        assert len(some.rows) == (3 if folded else 4)
        np.testing.assert_allclose(
            some.at(tokens).detach().numpy(), every.at(tokens).detach().numpy(), rtol=1e-4, atol=1e-5
        )
