"""What one request can make a server hold: neither its input nor its answer takes memory before it is admitted."""

import tracemalloc

import pytest

from helpers import sentence_models
from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer
from helpers.serving import served
from radix_ops.engine import Embedder, Reranker, Scorer
from radix_ops.serve.limits import QueueLimits

LONG = "w1 " * 300_000


@pytest.fixture(scope="module")
def scorer():
    needs_hf()
    return tiny_model(max_position_embeddings=256), tiny_tokenizer(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    needs_hf()
    return sentence_models.save(tmp_path_factory.mktemp("cross"), head="ForSequenceClassification")


@pytest.fixture
def ranker(folder):
    with served(Reranker(folder, device="cpu")) as client:
        yield client


@pytest.fixture
def small(scorer):
    """A server whose queue takes 40 tokens."""
    with served(Scorer(*scorer), queue=QueueLimits(max_tokens=40)) as client:
        yield client


def held(client, path, body):
    """Return the answer to a request, and how many times its length its largest allocations take."""
    tracemalloc.start()
    try:
        found = client.post(path, body)
        return found, tracemalloc.get_traced_memory()[1] / len(found.request.content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": LONG, "texts": ["w2"] * 500}),
        ("/v2/rerank", {"query": LONG, "documents": ["w2"] * 500}),
        ("/score", {"text_1": LONG, "text_2": ["w2"] * 500}),
    ],
)
def test_a_long_query_is_not_joined_with_its_documents(ranker, path, body):
    found, times = held(ranker, path, body)
    assert found.status_code == 413
    assert times < 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/choices", {"items": {"context": LONG, "choices": [" a"] * 500}}),
        ("/v1/score", {"query": LONG, "items": [" a"] * 500, "label_token_ids": [1]}),
    ],
)
def test_a_long_context_is_not_joined_with_its_choices(small, path, body):
    found, times = held(small, path, body)
    assert found.status_code == 413
    assert times < 20


@pytest.mark.parametrize("wrong", [-1, "1", True, None, 1.5, 10**6, [1], 2**70])
def test_labels_that_are_wrong_are_told_of_once(small, wrong):
    body = {"query": "a", "items": ["b"], "label_token_ids": [wrong] * 100_000}
    found, times = held(small, "/v1/score", body)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "label_token_ids"
    assert len(found.content) < 500
    assert times < 40


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a " * 200, "max_tokens": 0, "echo": True}),
        ("/v1/score", {"query": "a " * 200, "items": ["b"], "label_token_ids": [1]}),
        ("/tokenize", {"inputs": "a " * 200}),
        ("/decode", {"ids": [1] * 100}),
    ],
)
def test_texts_are_admitted_before_they_are_tokenised(small, monkeypatch, path, body):
    tokenizer = type(small.app.state.server.engine.tokenizer)
    monkeypatch.setattr(tokenizer, "__call__", lambda *_, **__: pytest.fail("tokenised"))
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: pytest.fail("decoded"))
    assert small.post(path, body).status_code == 413


def test_answers_are_bounded_before_they_are_computed(scorer):
    ids = list(range(1, 9))
    with served(Scorer(*scorer), max_numbers=16 * 8 * 3) as client:
        metrics = client.app.state.server.metrics
        ask = {"prompt": ids, "max_tokens": 0, "echo": True}
        assert client.post("/v1/completions", {**ask, "logprobs": 2}).status_code == 200
        labels = {"query": ids, "items": [ids] * 24, "label_token_ids": [1] * 16}
        assert client.post("/v1/score", labels).status_code == 200
        before = metrics.registry.get_sample_value("radix_batch_seconds_count")
        found = client.post("/v1/completions", {**ask, "logprobs": 3})
        assert found.status_code == 413
        assert "512 numbers and the most are 384" in found.json()["error"]["message"]
        found = client.post("/v1/score", {**labels, "label_token_ids": [1] * 17})
        assert found.status_code == 413
        assert "408 numbers" in found.json()["error"]["message"]
        assert metrics.registry.get_sample_value("radix_batch_seconds_count") == before


def test_hidden_states_are_bounded_before_they_are_computed(tmp_path):
    needs_hf()
    model = sentence_models.encoder(sentence_models.save(tmp_path / "base"), "mean")
    model.save_pretrained(str(tmp_path / "st"))
    count = len(model.tokenizer("w1 w2")["input_ids"])
    width = len(model.encode("w1"))
    with served(Embedder(str(tmp_path / "st"), device="cpu"), max_numbers=2 * count * width) as client:
        assert client.post("/embed_all", {"inputs": ["w1 w2"] * 2}).status_code == 200
        assert client.post("/embed_all", {"inputs": ["w1 w2"] * 3}).status_code == 413
        assert client.post("/pooling", {"input": ["w1 w2"] * 3, "task": "token_embed"}).status_code == 413
        assert client.post("/pooling", {"input": ["w1 w2"] * 3}).status_code == 200
