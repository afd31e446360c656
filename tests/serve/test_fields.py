"""Fields of requests: one of the wrong type is told of in the request's own words, and none is left out in silence."""

import pytest

from helpers import sentence_models
from helpers.language_models import needs_hf, tiny_classifier, tiny_model, tiny_tokenizer
from helpers.serving import Client, fastapi, served
from radix_ops.engine import Classifier, Embedder, Reranker, Scorer

QUESTION = {"context": "Which river", "choices": [" a", " b"]}
ECHO = {"max_tokens": 0, "echo": True}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A client of a server of each task."""
    needs_hf()
    folder = tmp_path_factory.mktemp("models")
    base = sentence_models.save(folder / "base")
    sentence_models.encoder(base, "mean").save_pretrained(str(folder / "embed"))
    cross = sentence_models.save(folder / "rerank", head="ForSequenceClassification")
    tokenizer = tiny_tokenizer(True)
    tokenizer.pad_token = "</s>"
    engines = {
        "embed": Embedder(str(folder / "embed"), device="cpu"),
        "rerank": Reranker(cross, device="cpu"),
        "classify": Classifier(tiny_classifier(), tokenizer),
        "score": Scorer(tiny_model(max_position_embeddings=256), tokenizer),
    }
    with (
        served(engines["embed"]) as embed,
        served(engines["rerank"]) as rerank,
        served(engines["classify"]) as classify,
        served(engines["score"]) as score,
    ):
        yield {"embed": embed, "rerank": rerank, "classify": classify, "score": score}


SALTED = [
    ("embed", "/v1/embeddings", {"input": "w1"}),
    ("embed", "/embed", {"inputs": "w1"}),
    ("embed", "/embed_all", {"inputs": "w1"}),
    ("embed", "/similarity", {"inputs": {"source_sentence": "w1", "sentences": ["w2"]}}),
    ("embed", "/pooling", {"input": "w1"}),
    ("embed", "/score", {"text_1": "w1", "text_2": "w2"}),
    ("embed", "/", {"inputs": "w1"}),
    ("embed", "/", {"inputs": "w1", "parameters": {}}),
    ("embed", "/", {"inputs": {"source_sentence": "w1", "sentences": ["w2"]}}),
    ("rerank", "/rerank", {"query": "w1", "texts": ["w2"]}),
    ("rerank", "/v1/rerank", {"query": "w1", "documents": ["w2"]}),
    ("rerank", "/v2/rerank", {"query": "w1", "documents": ["w2"]}),
    ("rerank", "/score", {"text_1": "w1", "text_2": "w2"}),
    ("rerank", "/", {"query": "w1", "texts": ["w2"]}),
    ("classify", "/predict", {"inputs": "w1"}),
    ("classify", "/classify", {"input": "w1"}),
    ("classify", "/pooling", {"input": "w1"}),
    ("classify", "/", {"inputs": "w1"}),
    ("classify", "/", {"inputs": "w1", "parameters": {}}),
    ("score", "/choices", {"items": QUESTION}),
    ("score", "/v1/completions", {"prompt": "w1", **ECHO}),
    ("score", "/v1/score", {"query": "w1", "items": ["w2"], "label_token_ids": [1]}),
    ("score", "/", {"items": QUESTION}),
]


@pytest.mark.parametrize(("task", "path", "body"), SALTED)
def test_the_salt_of_every_request_reaches_the_batcher(clients, monkeypatch, task, path, body):
    batcher = clients[task].app.state.server.batcher
    ask, salts = batcher.ask, []
    monkeypatch.setattr(batcher, "ask", lambda *args, **options: salts.append(options["salt"]) or ask(*args, **options))
    clients[task].ask(path, **body, cache_salt="a customer's")
    assert salts == ["a customer's"]


@pytest.mark.parametrize(("place", "other"), [("cache_salt", "truncate"), ("truncate", "cache_salt")])
def test_parameters_of_similarity_add_to_the_bodys_fields(clients, monkeypatch, place, other):
    server = clients["embed"].app.state.server
    values, calls = {"cache_salt": "mine", "truncate": True}, []
    call = server.call
    monkeypatch.setattr(server, "call", lambda *args: calls.append(args[1:]) or call(*args))
    pair = {"source_sentence": "w1", "sentences": ["w2"]}
    clients["embed"].ask("/similarity", inputs=pair, parameters={place: values[place]}, **{other: values[other]})
    assert calls == [(True, "mine")]


@pytest.mark.parametrize(
    ("task", "path", "body", "said"),
    [
        (
            "embed",
            "/v1/embeddings",
            {"input": "a", "dimensions": True},
            "dimensions is true; it must be a whole number",
        ),
        ("embed", "/v1/embeddings", {"input": "a", "dimensions": "4"}, "dimensions is '4'; it must be a whole number"),
        ("embed", "/v1/embeddings", {"input": "a", "truncate": 1}, "truncate is 1; it must be true or false"),
        ("embed", "/v1/embeddings", {"input": "a", "cache_salt": 5}, "cache_salt is 5; it must be a string"),
        ("embed", "/v1/embeddings", {"input": "a", "model": "x" * 900}, "is not served here"),
        ("embed", "/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format is 'int8'"),
        ("embed", "/v1/embeddings", {"input": [1, -1]}, "input[1] is -1; the model's token ids are from 0"),
        ("embed", "/v1/embeddings", {"input": [[1], [10**6]]}, "input[1][0] is 1000000; the model's token ids are"),
        ("embed", "/v1/embeddings", {"input": [[]]}, "input[0] holds no tokens"),
        ("embed", "/v1/embeddings", [], "the body is an array; it must be an object"),
        (
            "embed",
            "/pooling",
            {"input": "a", "task": "token_embed", "dimensions": 2},
            "dimensions and normalize are of",
        ),
        ("embed", "/similarity", {"inputs": "a"}, "inputs is 'a'; it must be an object"),
        ("embed", "/embed", {"inputs": "a", "normalize": None}, "normalize is null; it must be true or false"),
        ("rerank", "/v2/rerank", {"query": "a", "documents": ["b"], "top_n": "2"}, "top_n is '2'; it must be a whole"),
        ("rerank", "/v2/rerank", {"query": "a", "documents": ["b"], "rank_fields": [1]}, "rank_fields is [1]"),
        ("rerank", "/rerank", {"query": ["a"], "texts": ["b"]}, "query is an array; it must be a string"),
        ("classify", "/classify", {"input": [1, 10**6]}, "input[1] is 1000000"),
        ("score", "/v1/completions", {"prompt": "a", **ECHO, "logprobs": True}, "logprobs is true; it must be a whole"),
        ("score", "/v1/completions", {"prompt": "a", **ECHO, "prompt_logprobs": 1}, "prompt_logprobs is 1"),
        ("score", "/v1/completions", {"prompt": "a", **ECHO, "truncate_prompt_tokens": 1}, "truncate_prompt_tokens is"),
        (
            "score",
            "/v1/score",
            {"query": "a", "items": ["b"], "label_token_ids": [True]},
            "label_token_ids is an array",
        ),
    ],
)
def test_fields_of_the_wrong_kind_are_named_with_their_values(clients, task, path, body, said):
    found = clients[task].post(path, body)
    assert found.status_code in (400, 404, 422)
    content = found.json()
    inner = content.get("error", content)
    message = inner if isinstance(inner, str) else inner["message"]
    assert said in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("rerank", "/rerank", {"query": "a", "texts": ["b"], "instruction": "c"}),
        ("score", "/choices", {"items": {"text": "a " * 900}}),
        ("score", "/choices", {"items": {"context": "a " * 900, "choices": ["b"]}}),
    ],
)
def test_errors_name_no_option_of_a_command(clients, task, path, body):
    found = clients[task].post(path, body)
    assert found.status_code in (413, 422)
    assert "--" not in found.json()["error"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/pooling"])
@pytest.mark.parametrize("dimensions", [0, -1, 10**4])
def test_dimensions_are_checked_before_anything_is_computed(clients, path, dimensions):
    registry = clients["embed"].app.state.server.metrics.registry
    before = registry.get_sample_value("radix_batch_seconds_count")
    body = {"inputs" if path == "/embed" else "input": "w1", "dimensions": dimensions}
    found = clients["embed"].post(path, body)
    assert found.status_code in (400, 422)
    assert f"got {dimensions}" in found.text
    assert registry.get_sample_value("radix_batch_seconds_count") == before


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/info", "/v1/models"])
def test_head_is_get_without_a_body(clients, path):
    get, head = (clients["embed"].call(method, path) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_encoded_bodies_are_refused_by_name(clients):
    found = clients["embed"].post("/embed", {"inputs": "w1"}, headers={"Content-Encoding": "gzip"})
    assert found.status_code == 415
    assert "Content-Encoding is 'gzip'" in found.json()["error"]


def test_a_path_with_a_slash_too_many_is_not_redirected(clients):
    found = clients["embed"].post("/v1/embeddings/", {"input": "w1"}, headers={"Host": "elsewhere"})
    assert found.status_code == 404
    assert "/v1/embeddings/" in found.json()["error"]["message"]


def test_a_mounted_server_has_the_shapes_of_its_own_paths(clients):
    host = fastapi.FastAPI()
    host.mount("/v1/models", clients["embed"].app)
    found = Client(host).post("/v1/models/nothing", {})
    assert (found.status_code, set(found.json())) == (404, {"error", "error_type"})
    assert Client(host).ask("/v1/models/embed", inputs="w1") == clients["embed"].ask("/embed", inputs="w1")
