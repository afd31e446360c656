"""The routes of an Embedder against sentence-transformers on the same folder, and against transformers."""

import base64

import numpy as np
import pytest
import torch

from helpers import sentence_models
from helpers.sentence_models import Normalize, texts
from helpers.serving import served
from radix_ops.engine import Embedder

PROMPTS = {"query": "w1 w2 w3 ", "document": ""}
TEXTS = texts(12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    made = sentence_models.encoder(
        sentence_models.save(path / "base"), "mean", Normalize(), prompts=PROMPTS, default_prompt_name="query"
    )
    made.save_pretrained(str(path / "st"))
    return str(path / "st")


@pytest.fixture(scope="module")
def library(folder):
    return sentence_models.sentence_transformers.SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def client(folder):
    with served(Embedder(folder, device="cpu", lazy=True), names=("mine", "also")) as client:
        yield client


def close(found, expected):
    np.testing.assert_allclose(np.array(found, np.float32), expected, rtol=0, atol=2e-6)


def test_embeddings_are_those_of_sentence_transformers(client, library):
    expected = library.encode(TEXTS)
    close(client.ask("/embed", inputs=TEXTS), expected)
    found = client.ask("/v1/embeddings", input=TEXTS, model="also")
    close([entry["embedding"] for entry in found["data"]], expected)
    assert [entry["index"] for entry in found["data"]] == list(range(len(TEXTS)))
    assert (found["object"], found["model"]) == ("list", "mine")
    close([entry["data"] for entry in client.ask("/pooling", input=TEXTS)["data"]], expected)
    close(client.ask("/", inputs=TEXTS), expected)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_that_of_its_name(client, library, name):
    close(client.ask("/embed", inputs=TEXTS, prompt_name=name), library.encode(TEXTS, prompt_name=name))


def test_one_text_is_no_list_in_openais_shape_and_a_list_in_teis(client, library):
    expected = library.encode(TEXTS[:1])
    close(client.ask("/embed", inputs=TEXTS[0]), expected)
    close(client.ask("/v1/embeddings", input=TEXTS[0])["data"][0]["embedding"], expected[0])


def test_base64_holds_the_floats(client):
    floats = client.ask("/v1/embeddings", input=TEXTS)
    packed = client.ask("/v1/embeddings", input=TEXTS, encoding_format="base64")
    for one, other in zip(floats["data"], packed["data"], strict=True):
        found = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert found.tolist() == np.array(one["embedding"], np.float32).tolist()


def test_token_ids_are_read_as_they_are(client, library):
    ids = [library.tokenizer(PROMPTS["query"] + text)["input_ids"] for text in TEXTS]
    expected = library.encode(TEXTS)
    for given in (ids, [ids[0], TEXTS[1]]):
        found = client.ask("/v1/embeddings", input=given)
        close([entry["embedding"] for entry in found["data"]], expected[: len(given)])
        assert found["usage"] == {"prompt_tokens": sum(map(len, ids[: len(given)]))} | {
            "total_tokens": sum(map(len, ids[: len(given)]))
        }
    close(client.ask("/embed", inputs=ids[0]), expected[:1])


def test_dimensions_are_cut_before_the_normalisation(client, folder):
    cut = sentence_models.sentence_transformers.SentenceTransformer(folder, device="cpu", truncate_dim=8)
    expected = cut.encode(TEXTS, normalize_embeddings=True)
    found = client.ask("/v1/embeddings", input=TEXTS, dimensions=8)
    close([entry["embedding"] for entry in found["data"]], expected)
    refused = client.post("/v1/embeddings", {"input": TEXTS, "dimensions": 33})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "dimensions must be from 1 to 32, got 33"


def test_embeddings_without_normalisation_are_the_means_of_all_states(client, library):
    rows = client.ask("/embed_all", inputs=TEXTS)
    means = client.ask("/embed", inputs=TEXTS, normalize=False)
    model = library[0].model
    for text, states, mean in zip(TEXTS, rows, means, strict=True):
        inputs = library.tokenizer(PROMPTS["query"] + text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0]
        np.testing.assert_allclose(np.array(states), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.array(mean), expected.mean(0), rtol=0, atol=1e-5)


def test_similarities_are_those_of_sentence_transformers(client, library):
    expected = library.similarity(library.encode(TEXTS[:1]), library.encode(TEXTS[1:]))[0]
    body = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    close(client.ask("/similarity", inputs=body), expected)
    close(client.ask("/", inputs=body), expected)
    found = client.ask("/score", text_1=TEXTS[0], text_2=TEXTS[1:])
    close([entry["score"] for entry in found["data"]], expected)


def test_texts_that_are_too_long_are_refused_or_cut_and_counted(client, library):
    long = " ".join(TEXTS * 3)
    refused = client.post("/embed", {"inputs": [TEXTS[0], long]})
    assert refused.status_code == 413
    assert refused.json()["error_type"] == "Validation"
    assert refused.json()["error"].startswith("inputs[1] has ")
    assert '"truncate": true' in refused.json()["error"]
    nested = client.post("/v1/embeddings", {"input": [TEXTS[0], long]})
    assert nested.status_code == 400
    assert nested.json()["error"]["code"] == "context_length_exceeded"
    for path, body in [
        ("/embed", {"inputs": [TEXTS[0], long, long]}),
        ("/v1/embeddings", {"input": [TEXTS[0], long, long]}),
    ]:
        found = client.post(path, body | {"truncate": True})
        assert found.status_code == 200
        assert found.headers["x-truncated"] == "2"
    close(client.ask("/embed", inputs=[long], truncate=True), library.encode([long]))
    left = client.post("/embed", {"inputs": long, "truncate": True, "truncation_direction": "Left"})
    assert left.status_code == 422


def test_headers_say_what_a_request_took(client, library):
    found = client.post("/embed", {"inputs": TEXTS})
    counts = [len(library.tokenizer(PROMPTS["query"] + text)["input_ids"]) for text in TEXTS]
    assert int(found.headers["x-compute-tokens"]) == sum(counts)
    assert int(found.headers["x-compute-characters"]) == sum(map(len, TEXTS))
    # The rows are those of the request's own trie.
    ids = [library.tokenizer(PROMPTS["query"] + text)["input_ids"] for text in TEXTS]
    prefixes = {tuple(each[: end + 1]) for each in ids for end in range(len(each))}
    assert int(found.headers["x-compute-rows"]) == len(prefixes)
    for name in ("total", "tokenization", "queue", "inference"):
        assert 0 <= float(found.headers[f"x-{name}-time"]) < 60_000


def test_prompts_that_the_model_lacks_are_named_as_teis_clients_read_it(client):
    found = client.post("/embed", {"inputs": "w1", "prompt_name": "x"})
    assert (found.status_code, found.json()["error_type"]) == (422, "Tokenizer")
    assert found.json()["error"].endswith('Available prompts: ["query", "document"]')


def test_tokens_are_those_of_the_tokenizer(client, library):
    found = client.ask("/tokenize", inputs=["w1 w2", "w3 <e>"])
    assert [[token["id"] for token in each] for each in found] == [
        library.tokenizer(text)["input_ids"] for text in ("w1 w2", "w3 <e>")
    ]
    assert found[0][1] == {"id": library.tokenizer.convert_tokens_to_ids("w2"), "text": "w2", "special": False} | {
        "start": 3, "stop": 5,
    }  # fmt: skip
    assert found[0][-1]["special"]
    bare = client.ask("/tokenize", inputs="w1", add_special_tokens=False, prompt_name="query")
    assert [token["text"] for token in bare[0]] == ["w1", "w2", "w3", "w1"]
    ids = library.tokenizer("w1 w2")["input_ids"]
    assert client.ask("/decode", ids=ids) == [library.tokenizer.decode(ids, skip_special_tokens=True)]
    assert client.ask("/decode", ids=[ids], skip_special_tokens=False) == [library.tokenizer.decode(ids)]


def test_info_is_what_teis_clients_read(client):
    found = client.get("/info").json()
    assert found["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (found["model_id"], found["model_dtype"], found["max_input_length"]) == ("mine", "float32", 120)


def test_salts_part_requests_and_change_no_number(client, library):
    found = [client.ask("/embed", inputs=TEXTS, cache_salt=salt) for salt in ("a", "b", None)]
    for rows in found:
        close(rows, library.encode(TEXTS))
