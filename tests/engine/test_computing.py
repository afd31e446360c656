"""What a server asks of engines beside their own calls: kinds of computation, and texts that are cut."""

import numpy as np
import pytest
import torch

from helpers.language_models import embedding_tokenizer, needs_hf, tiny_classifier, tiny_model, tiny_tokenizer
from radix_ops.engine import Classifier, Embedder, Scorer
from radix_ops.engine.computing import computings, embeddings
from radix_ops.engine.errors import TooLong
from radix_ops.engine.inputs import Record

LONG = "the river and the sea " * 80
CHOICES = {"context": LONG, "choices": [" yes"]}


@pytest.fixture(scope="module", params=["embed", "classify", "score"])
def engine(request):
    needs_hf()
    if request.param == "embed":
        return Embedder(tiny_model("Qwen3").model, embedding_tokenizer())
    if request.param == "classify":
        return Classifier(tiny_classifier(), embedding_tokenizer())
    return Scorer(tiny_model(), tiny_tokenizer(False))


def test_an_engine_that_cuts_is_a_twin(engine):
    items = [engine.parse(Record("x", CHOICES if engine.task == "score" else {"text": LONG}))]
    with pytest.raises(TooLong, match=r"^x"):
        engine.encode(items)
    cutting = engine.cutting()
    assert cutting.runner is engine.runner
    most = engine.config.max_position_embeddings
    assert cutting.encode(items).lengths.tolist() == [most]
    with pytest.raises(TooLong):
        engine.encode(items)


def test_poolings_come_in_any_order_and_become_embeddings():
    needs_hf()
    engine = Embedder(tiny_model("Qwen3").model, embedding_tokenizer(), pooling="mean", dim=8)
    texts = ["a river", "the sea", "a river and the sea"]
    sequences = [np.array(engine.tokenizer(text)["input_ids"], np.int32) for text in texts]
    with torch.inference_mode(), engine.runner.running(True):
        found = np.array(computings(engine)["pooled"](sequences[::-1], [0, 0, 0]))[::-1]
    np.testing.assert_allclose(embeddings(engine, found), engine.embed(texts), rtol=0, atol=2e-6)
    for sequence, row in zip(sequences, found, strict=True):
        with torch.no_grad():
            states = engine.model(torch.from_numpy(sequence[None].astype(np.int64))).last_hidden_state[0]
        np.testing.assert_allclose(row, states.mean(0), rtol=0, atol=1e-5)


def test_the_next_tokens_and_all_log_probabilities_are_those_of_transformers():
    needs_hf()
    model = tiny_model()
    engine = Scorer(model, tiny_tokenizer(False))
    sequences = [np.array(ids, np.int32) for ids in ([5, 6, 7], [5, 6, 9, 11], [200], [5, 6, 7])]
    wanted = [np.array(tokens) for tokens in ([3], [4, 8], [9, 1, 2], [3, 3])]
    kinds = computings(engine)
    with torch.inference_mode(), engine.runner.running(True):
        following = kinds["next"](sequences, wanted)
        read = kinds["logprobs"](sequences, [1, 2, 3, 2])
    for ids, tokens, found, logprobs, count in zip(sequences, wanted, following, read, (1, 2, 3, 2), strict=True):
        with torch.no_grad():
            every = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].double().log_softmax(-1)
        np.testing.assert_allclose(found, every[-1, tokens], rtol=0, atol=1e-4)
        np.testing.assert_allclose(logprobs.logprobs, every[np.arange(len(ids) - 1), ids[1:]], rtol=0, atol=1e-4)
        best = every.topk(count)
        np.testing.assert_allclose(logprobs.their_logprobs, best.values, rtol=0, atol=1e-4)
        assert logprobs.likeliest.tolist() == best.indices.tolist()


@pytest.mark.parametrize("plain", [False, True])
def test_the_head_reads_what_sequences_share_once(plain):
    needs_hf()
    model = tiny_model()
    engine = Scorer(model, tiny_tokenizer(False))
    sequences = [np.array(ids, np.int32) for ids in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 3], [6, 6])]
    read = []
    model.lm_head.register_forward_hook(lambda module, given, made: read.append(given[0].shape[0]))
    with torch.inference_mode(), engine.runner.running(not plain):
        computings(engine)["logprobs"](sequences, [1] * 4)
    prefixes = {tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))}
    assert sum(read) == len(prefixes)
