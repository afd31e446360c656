"""Arguments of other kinds than the engine takes are named in a UserError, and results share nothing with inputs."""

import os

import numpy as np
import pytest
import torch

from helpers.language_models import embedding_tokenizer, needs_hf, reranking_tokenizer, tiny_model, tiny_tokenizer
from radix_ops.engine import Classifier, Embedder, LabelPrompt, Reranker, Scorer, Template, UserError
from radix_ops.engine.templates import find_template

needs_hf()
QUESTION = {"context": "the sea", "choices": [" is", " river"]}
TEXT = "Query: {query}\nDocument: {document}\nRelevant:"


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", vocab_size=400)


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, tiny_tokenizer(adds_bos=True))


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model, embedding_tokenizer())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Scorer, {"layout": np.array(["auto", "trie"])}, "layout must be one of"),
        (Scorer, {"plain": "no"}, "plain must be True or False, got 'no'"),
        (Scorer, {"lazy": None}, "lazy must be True or False, got None"),
        (Scorer, {"trust_remote_code": "yes"}, "trust_remote_code must be True or False, got 'yes'"),
        (Scorer, {"truncate_left": 1}, "truncate_left must be True or False, got 1"),
        (Embedder, {"pooling": np.array(["last", "mean"])}, "pooling must be one of"),
        (Embedder, {"normalize": "no"}, "normalize must be True or False, got 'no'"),
        (Embedder, {"truncate_right": np.array([True, False])}, "truncate_right must be True or False, got array"),
        (Reranker, {"template": 3}, "template must be a name, a file or a Template, got 3"),
        (Reranker, {"template": [1]}, r"template must be a name, a file or a Template, got \[1\]"),
        (Reranker, {"template": True}, "template must be a name, a file or a Template, got True"),
        (Reranker, {"template": Template(TEXT), "truncate_right": "x"}, "truncate_right must be True or False"),
    ],
)
def test_options_of_another_kind_are_named(model, make, options, message):
    with pytest.raises(UserError, match=message):
        make(model, embedding_tokenizer(), **options)


@pytest.mark.parametrize("device", [1.5, ["cpu"], True])
def test_a_device_of_another_kind_is_named(tmp_path, device):
    with pytest.raises(UserError, match="device .* can't be used: it must be cpu or cuda"):
        Scorer(tmp_path, device=device)


@pytest.mark.parametrize("inputs", [np.array(3), np.array("a"), torch.tensor(3)])
def test_arrays_of_no_dimensions_are_no_lists(model, scorer, embedder, inputs):
    with pytest.raises(UserError, match="items is .*; it must be a list, or another iterable, of objects"):
        scorer.score(inputs)
    with pytest.raises(UserError, match="texts is .*; it must be a list, or another iterable, of strings"):
        embedder.embed(inputs)
    with pytest.raises(UserError, match="documents must be a list of strings, got"):
        Reranker(model, reranking_tokenizer(), template=Template(TEXT, 5, 6)).rank("a", inputs)


@pytest.mark.parametrize("name", [["query"], {}, 3])
def test_a_prompts_name_is_a_string(embedder, name):
    with pytest.raises(UserError, match="prompt_name .* is not one of the model's prompts"):
        embedder.embed(["a"], prompt_name=name)


def test_progress_that_cannot_be_called_is_named_before_the_model_runs(scorer, embedder, monkeypatch):
    for engine in (scorer, embedder):
        monkeypatch.setattr(engine.runner, "states", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=r"on_progress must be a function of \(done, total\), or None, got 3"):
        scorer.score([QUESTION], on_progress=3)
    with pytest.raises(UserError, match="on_progress must be a function"):
        embedder.embed(["a"], on_progress=True)


def test_a_window_may_be_an_integer_of_numpy(scorer):
    assert len(list(scorer.stream([QUESTION] * 3, window=np.int64(2)))) == 3


def test_a_streamed_row_keeps_no_window_alive(embedder):
    rows = list(embedder.stream(["a", "b", "c"], window=2))
    assert all(row.flags.owndata for row in rows)
    np.testing.assert_allclose(np.stack(rows), embedder.embed(["a", "b", "c"]), atol=2e-6)


def test_results_share_nothing_with_inputs(scorer):
    tags = ["a"]
    (found,) = scorer.score([{**QUESTION, "tags": tags, "more": {"tags": tags}}])
    assert found["tags"] == ["a"]
    found["tags"].append("b")
    found["more"]["tags"].append("c")
    assert tags == ["a"]
    with open(os.devnull) as file, pytest.raises(UserError, match=r"items\[0\] has a key whose value can't be copied"):
        scorer.score([{**QUESTION, "file": file}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": 3}, '"text" must be a string$'),
        ({"text": None}, '"text" must be a string$'),
        ({"yes": True}, '"yes" must be a string or a token id$'),
        ({"yes": None}, '"yes" must be a string or a token id$'),
        ({"no": 4.0}, '"no" must be a string or a token id$'),
        ({"instruction": 3}, '"instruction" must be a string$'),
        ({"text": TEXT + "\ud800"}, '"text" holds half of a surrogate pair'),
        ({"yes": "\ud800"}, '"yes" holds half of a surrogate pair'),
        ({"text": "{query}"}, "its text must hold {document} once and {query}"),
    ],
)
def test_a_template_of_fields_of_another_kind_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Template(**{"text": TEXT, **fields})


def test_a_templates_ids_may_be_integers_of_numpy():
    assert Template(TEXT, np.int64(4), np.int32(5)) == Template(TEXT, 4, 5)
    assert find_template("qwen3-reranker").instruction is not None


@pytest.mark.parametrize(
    "texts",
    [{"a", "b"}, frozenset("ab"), {"a": 1, "b": 2}.keys(), {1: "a", 2: "b"}.values(), {"a": 1}.items()],
    ids=lambda texts: type(texts).__name__,
)
def test_inputs_without_an_order_of_their_own_are_type_errors(model, scorer, embedder, texts, monkeypatch):
    for engine in (scorer, embedder):
        monkeypatch.setattr(engine.runner, "states", lambda *arguments: pytest.fail("the model ran"))
    reranker = Reranker(model, reranking_tokenizer(), template=Template(TEXT, 5, 6))
    labels = Classifier(model, tiny_tokenizer(True), template=LabelPrompt({"a": 5, "b": 6}, "{{ text }}:"))
    kind = type(texts).__name__
    for name, call in (
        ("texts", embedder.embed),
        ("texts", embedder.find_ranges),
        ("texts", embedder.pairs),
        ("texts", lambda given: list(embedder.stream(given))),
        ("texts", scorer.perplexity),
        ("items", scorer.score),
        ("items", lambda given: list(scorer.stream(given))),
        ("queries", reranker.score),
        ("queries", reranker.evaluate),
        ("documents", lambda given: reranker.rank("a", given)),
        ("items", labels.classify),
    ):
        with pytest.raises(
            TypeError, match=f"^{name} is a {kind}, and results come in the order of their inputs; it must"
        ):
            call(texts)
        with pytest.raises(UserError):
            call(texts)
    monkeypatch.undo()
    assert len(embedder.embed(sorted({"a", "b"}))) == 2
