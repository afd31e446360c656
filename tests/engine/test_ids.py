"""Records of token ids are scored, embedded and reranked as transformers does them, without a tokenizer."""

import json

import numpy as np
import pytest
import torch

from helpers.language_models import embedding_tokenizer, needs_hf, tiny_model, tiny_tokenizer
from radix_ops.engine import Embedder, Reranker, Scorer, Template, UserError, metrics

needs_hf()
TEXT = "Query: {query}\nDocument: {document}\nRelevant:"
CONTEXT, CHOICES = [0, 17, 30, 41], [[5, 6], [9], [5, 7, 8]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Save a model without a tokenizer."""
    folder = tmp_path_factory.mktemp("no tokenizer")
    model.save_pretrained(folder)
    return folder


def logprobs_of(model, ids):
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [found[place, token].item() for place, token in enumerate(ids[1:])]


def states_of(model, ids):
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()


@pytest.mark.parametrize("lazy", [False, True])
def test_questions_of_ids_need_no_tokenizer(model, folder, lazy):
    row = {"context_ids": CONTEXT, "choices_ids": CHOICES, "id": 7}
    (found,) = Scorer(folder, device="cpu", lazy=lazy).score([row])
    expected = [sum(logprobs_of(model, CONTEXT + choice)[len(CONTEXT) - 1 :]) for choice in CHOICES]
    assert found["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert (found["tokens"], found["best"], found["id"]) == ([2, 1, 3], int(np.argmax(expected)), 7)
    assert "best_per_char" not in found


def test_a_whole_text_of_ids_is_scored_behind_its_first(model, folder):
    ids = [3, 17, 30, 41, 5]
    (found,) = Scorer(folder, device="cpu").score([{"input_ids": ids}])
    assert found["logprob"] == pytest.approx(sum(logprobs_of(model, ids)), abs=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(-found["logprob"] / 4))
    assert found.keys() == {"logprob", "tokens", "perplexity"}
    assert metrics([found])["token_perplexity"] == found["perplexity"]
    whole = [3] + [5 + place % 300 for place in range(200)]
    (windows,) = Scorer(folder, device="cpu", stride=20).score([{"input_ids": whole}])
    text_like = sum(
        sum(logprobs_of(model, whole[max(0, end - 129) : end + 1][-129:])[-size:])
        for end, size in ((128, 128), (148, 20), (168, 20), (188, 20), (200, 12))
    )
    assert windows["logprob"] == pytest.approx(text_like, abs=1e-3)
    assert windows["tokens"] == 200


def test_accuracy_of_ids_counts_no_characters(folder):
    row = {"context_ids": CONTEXT, "choices_ids": CHOICES}
    (found,) = Scorer(folder, device="cpu").score([row | {"gold": 1}])
    assert metrics([found])["accuracy"].keys() == {"sum", "per_token"}
    with pytest.raises(UserError, match="token ids, which are read as they are; letters=True is for texts"):
        Scorer(folder, device="cpu", letters=True, lazy=True).score([row])


def test_ids_give_what_the_tokenizers_texts_give(model):
    tokenizer = tiny_tokenizer(adds_bos=True)
    scorer = Scorer(model, tokenizer)
    text = {"context": "the sea", "choices": [" is", " river"]}
    whole = [tokenizer(text["context"] + choice)["input_ids"] for choice in text["choices"]]
    start = len(tokenizer(text["context"])["input_ids"])
    given = {"context_ids": whole[0][:start], "choices_ids": [ids[start:] for ids in whole]}
    of_text, of_ids, again = scorer.score([text, given, text])
    assert of_text.pop("best_per_char") == of_ids["best"] or len(set(map(len, text["choices"]))) > 1
    assert of_ids == of_text
    assert again["logprobs"] == of_text["logprobs"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_ids_need_no_tokenizer(model, folder, pooling):
    rows = [[3, 17, 30], [3, 17, 41, 5]]
    found = Embedder(folder, device="cpu", pooling=pooling).embed([{"input_ids": ids} for ids in rows])
    for ids, row in zip(rows, found, strict=True):
        states = states_of(model, ids)
        pooled = states[-1] if pooling == "last" else states.mean(0)
        np.testing.assert_allclose(row, (pooled / pooled.norm()).numpy(), atol=1e-5)


def test_padding_that_a_mask_names_is_left_out(model, folder):
    embedder = Embedder(folder, device="cpu")
    padded = [
        {"input_ids": [1, 1, 3, 17, 30], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [3, 17, 30, 1], "attention_mask": [1, 1, 1, 0], "token_type_ids": [0, 0, 0, 0]},
        {"input_ids": np.array([3, 17, 30])},
    ]
    found = embedder.embed(padded)
    state = states_of(model, [3, 17, 30])[-1]
    for row in found:
        np.testing.assert_allclose(row, (state / state.norm()).numpy(), atol=1e-5)


def test_texts_and_ids_keep_their_order(model):
    tokenizer = embedding_tokenizer()
    embedder = Embedder(model, tokenizer)
    texts = ["the sea", "a river", "the river Rhine"]
    given = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    expected = embedder.embed(texts)
    found = embedder.embed([texts[0], given[1], {"text": texts[2]}])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_prompts_of_documents_are_ranked(model, folder):
    template = Template(TEXT, yes=5, no=6)
    prompts = [[3, 17, 30], [3, 17, 41, 5], [3, 9]]
    reranker = Reranker(folder, template=template, device="cpu")
    whole, single = reranker.score([{"input_ids": prompts, "id": 1}, {"input_ids": prompts[0]}])
    with torch.no_grad():
        last = [model(input_ids=torch.tensor([ids])).logits[0, -1].double() for ids in prompts]
    expected = [(logits[5] - logits[6]).sigmoid().item() for logits in last]
    assert whole["scores"] == pytest.approx(expected, abs=1e-5)
    assert (whole["order"], whole["id"]) == (np.argsort(-np.array(expected), kind="stable").tolist(), 1)
    assert single["scores"] == pytest.approx(expected[:1], abs=1e-5)


def test_answers_of_ids_need_ids_in_the_template(folder):
    reranker = Reranker(folder, template=Template(TEXT), device="cpu", lazy=True)
    with pytest.raises(UserError, match="yes is the text 'yes', and the model has no tokenizer .* give its id"):
        reranker.score([{"input_ids": [[3]]}])
    with pytest.raises(UserError, match="the template's no, 340, is no id of the model, which has 340 tokens"):
        Reranker(folder, template=Template(TEXT, 5, 340), device="cpu").score([{"input_ids": [[3]]}])


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (Scorer, {"context_ids": [], "choices_ids": [[1]]}, 'items[0]: "context_ids" holds no tokens'),
        (Scorer, {"context_ids": [1], "choices_ids": [[1], []]}, "choices_ids[1] holds no token to score"),
        (Scorer, {"context_ids": [1], "choices_ids": []}, '"choices_ids" is an empty array'),
        (Scorer, {"context_ids": [1], "choices_ids": [1]}, "choices_ids[0] is a number; it must be an array of token"),
        (Scorer, {"context_ids": [1]}, '"choices_ids" is missing; it must be an array of arrays'),
        (
            Scorer,
            {"context_ids": [1], "choices_ids": [[340]]},
            "choices_ids[0][0] is 340; the model's token ids are from 0 to 339",
        ),
        (Scorer, {"input_ids": [1]}, '"input_ids" holds no token to score'),
        (
            Scorer,
            {"input_ids": [1] * 130},
            "makes 129 tokens of input and the model reads at most 128; stride N scores it in windows",
        ),
        (Embedder, {"input_ids": [1, -1]}, '"input_ids"[1] is -1; the model\'s token ids are from 0 to 339'),
        (Embedder, {"input_ids": [1, True]}, '"input_ids"[1] is not a token id but a boolean'),
        (Embedder, {"input_ids": "1 2"}, '"input_ids" is a string; it must be an array of token ids'),
        (Embedder, {"input_ids": []}, '"input_ids" holds no tokens, so it has no embedding'),
        (Embedder, {"input_ids": np.array([1.0])}, "is an array of 1 dimensions of float64; it must be one of whole"),
        (Embedder, {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "an attention_mask with a hole"),
        (Embedder, {"input_ids": [1, 2], "attention_mask": [1]}, "its attention_mask must hold as many of 0 and 1"),
        (Embedder, {"input_ids": [1, 2], "attention_mask": ["a", [1]]}, "its attention_mask must hold as many of 0"),
        (Embedder, {"input_ids": [1, 2], "attention_mask": 3}, "its attention_mask must hold as many of 0 and 1"),
        (Embedder, {"input_ids": [1, 2], "token_type_ids": np.array([0, 1])}, "token_type_ids other than 0"),
        (Reranker, {"input_ids": [[1], [2]], "attention_mask": [[1]]}, "must hold an array for each of the 2"),
        (
            Reranker,
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            "input_ids[0] has 2 tokens, and its attention_mask",
        ),
        (
            Embedder,
            {"input_ids": [1] * 130},
            "makes 130 tokens of input and the model reads at most 128; ids are never cut",
        ),
        (Reranker, {"input_ids": [[1], []]}, "input_ids[1] holds no tokens"),
    ],
)
def test_ids_that_cannot_be_used_are_named(folder, kind, row, message):
    options = {"template": Template(TEXT, 5, 6)} if kind is Reranker else {}
    engine = kind(folder, device="cpu", lazy=True, **options)
    with pytest.raises(UserError) as error:
        (engine.embed if kind is Embedder else engine.score)([row])
    assert message in str(error.value)
    assert engine._runner is None


def test_texts_need_the_tokenizer(folder):
    with pytest.raises(UserError, match="the tokenizer of .* could not be loaded"):
        Scorer(folder, device="cpu").score([{"context": "a", "choices": [" b"]}])


def test_no_tokenizer_is_loaded_for_ids(model, tmp_path, monkeypatch):
    import transformers

    model.save_pretrained(tmp_path)
    tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **o: pytest.fail("it was loaded"))
    Scorer(tmp_path, device="cpu", lazy=True).score([{"input_ids": [1, 2]}])
    Embedder(tmp_path, device="cpu", lazy=True).embed([{"input_ids": [1, 2]}])


def test_a_prompt_stands_before_texts_alone(model):
    row = {"input_ids": [1, 2]}
    with pytest.raises(UserError, match=r"texts\[0\] holds token ids, and a prompt stands before texts"):
        Embedder(model, embedding_tokenizer(), prompt="the ").embed([row])
    with pytest.raises(UserError, match="put its ids before them"):
        Embedder(model, embedding_tokenizer()).embed([row], prompt="the ")


def test_ids_of_questions_are_no_documents(model):
    reranker = Reranker(model, tiny_tokenizer(adds_bos=True), template=Template(TEXT, 5, 6))
    (found,) = reranker.score([{"query": "q", "documents": ["a", "b"], "context_ids": [1]}])
    assert len(found["scores"]) == 2


def test_the_engine_takes_rows_of_the_hub(model):
    scorer = Scorer(model, tiny_tokenizer(adds_bos=True))
    row = {"passage": "The sea is salty.", "question": "is the sea salty", "answer": True}
    own = {"context": "The sea is salty.\nQuestion: is the sea salty?\nAnswer:", "choices": [" no", " yes"], "gold": 1}
    found, expected = scorer.score([row, own])
    assert found == expected
    reranker = Reranker(model, tiny_tokenizer(adds_bos=True), template=Template(TEXT, 5, 6))
    (ranked,) = reranker.score([{"query": "q", "positive": ["a"], "negative": ["b", "c"]}])
    assert (len(ranked["scores"]), ranked["relevance"]) == (3, [1, 0, 0])
    assert json.dumps(ranked)
