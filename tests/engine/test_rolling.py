"""Whole texts: windows and log-probabilities, against lm-evaluation-harness and single forwards in float64."""

import math
import random

import numpy as np
import pytest
import torch

from helpers.language_models import TEXT, needs_hf, tiny_model, tiny_tokenizer
from radix_ops.engine import Scorer, UserError, metrics, rolling
from radix_ops.engine.rolling import Text

needs_hf()

TEXTS = [*TEXT, "x", "été \U0001f30a", TEXT[0] + " Is it?", "the river and the sea " * 40, "a\n\nb\tc "]


def windows_of(length: int, max_length: int | None, stride: int | None, adds_prefix=True):
    """Return the windows of a text of `length` tokens, 2, 3, and so on, behind the prefix 0."""

    class Tokenizer:
        bos_token_id, eos_token_id = (0, 1) if adds_prefix else (None, None)

        def __call__(self, texts, add_special_tokens, verbose):
            assert not add_special_tokens
            return {"input_ids": [list(range(2, 2 + length)) for _ in texts]}

        def __hash__(self):
            return 1

    (found,) = rolling.encode([Text("line 1", "", {})], Tokenizer(), max_length, stride)
    return [(context.tolist(), asked.tolist()) for context, asked in found]


def test_windows_are_those_of_lm_evaluation_harness():
    utils = pytest.importorskip("lm_eval.utils", exc_type=ImportError)
    rng = random.Random(0)
    for _ in range(400):
        length, max_length = rng.randint(1, 60), rng.randint(1, 20)
        stride = rng.randint(1, max_length)
        windows = utils.get_rolling_token_windows(list(range(2, 2 + length)), 0, max_length, max_length - stride + 1)
        wanted = [tuple(utils.make_disjoint_window(pair)) for pair in windows]
        assert windows_of(length, max_length, stride) == wanted


def test_a_text_without_a_prefix_token_leaves_its_first_token_out():
    assert windows_of(5, None, None, adds_prefix=False) == [([2], [3, 4, 5, 6])]
    assert windows_of(5, 3, 2, adds_prefix=False) == [([2], [3, 4, 5]), ([3, 4, 5], [6])]
    assert windows_of(1, None, None, adds_prefix=False) == windows_of(0, None, None) == []


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (24, 24), (24, 7), (24, 1)])
def test_log_probabilities_are_those_of_lm_evaluation_harness(kind, max_length, stride):
    harness = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM
    instance = pytest.importorskip("lm_eval.api.instance", exc_type=ImportError).Instance
    texts = TEXTS[:-2] if stride == 1 else TEXTS
    model, tokenizer = tiny_model(kind, max_position_embeddings=512).double(), tiny_tokenizer(adds_bos=True)
    found = Scorer(model, tokenizer, max_length=max_length, stride=stride).perplexity(texts)
    # BOS, which the tokenizer adds, is a context to us; the harness asks for its probability behind another BOS.
    lm = harness(pretrained=model, tokenizer=tokenizer, add_bos_token=False, max_length=max_length)
    if stride in (None, max_length):
        requests = [instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts]
        wanted = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        assert [result["logprob"] for result in found] == pytest.approx(wanted, rel=1e-5)
    for text, result in zip(texts, found, strict=True):
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert result["tokens"] == len(ids) - 1
        assert result["logprob"] == pytest.approx(alone(model, ids, max_length, stride), rel=1e-7)
        assert result["perplexity"] == pytest.approx(math.exp(-result["logprob"] / result["tokens"]))


def alone(model, ids: list[int], max_length: int | None, stride: int | None) -> float:
    """Add up each token's log-probability behind the tokens of its window, one forward each."""
    total, size = 0.0, max_length or len(ids)
    for place in range(1, len(ids)):
        first = 0
        if place > size:
            end = min(size + math.ceil((place - size) / stride) * stride, len(ids) - 1)
            first = end - size
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:place]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[ids[place]].item()
    return total


def test_words_and_bytes_are_counted_as_in_lm_evaluation_harness():
    task = pytest.importorskip("lm_eval.api.task", exc_type=ImportError).PerplexityTask
    for result, text in zip(
        Scorer(tiny_model(max_position_embeddings=512), tiny_tokenizer(True)).perplexity(TEXTS), TEXTS, strict=True
    ):
        assert (result["words"], result["bytes"]) == (task.count_words(text), task.count_bytes(text))


def test_texts_that_share_a_start_are_folded():
    scorer = Scorer(tiny_model(max_position_embeddings=512), tiny_tokenizer(True))
    items = scorer.encode([Text("", text, {}) for text in [TEXT[0] + end for end in (" a", " b", " c")]])
    stats = scorer.execute(items)
    assert stats.rows < stats.tokens / 2


def test_windows_of_one_text_are_not_taken_for_each_others(monkeypatch):
    """With a stride of the model's length, all windows have contexts of one token."""
    model, tokenizer = tiny_model(), tiny_tokenizer(True)
    text = "the river the sea the river the sea"
    (found,) = Scorer(model, tokenizer, max_length=4, stride=4, plain=True).perplexity([text])
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert found["logprob"] == pytest.approx(alone(model, ids, 4, 4), abs=1e-4)


def test_texts_of_no_tokens_to_score_have_no_perplexity():
    tokenizer = tiny_tokenizer(False)
    tokenizer.bos_token = tokenizer.eos_token = None
    for texts in (["the", "", "the sea and the river"], ["", "the"]):
        found = Scorer(tiny_model(), tokenizer).perplexity(texts)
        for text, result in zip(texts, found, strict=True):
            ids = tokenizer(text)["input_ids"]
            assert result["tokens"] == max(0, len(ids) - 1)
            if len(ids) < 2:
                assert (result["logprob"], result["perplexity"]) == (0.0, None)
            else:
                assert result["logprob"] == pytest.approx(alone(tiny_model(), ids, None, None), abs=1e-4)


def test_rows_of_texts_are_scored_with_their_other_keys():
    scorer = Scorer(tiny_model(), tiny_tokenizer(True))
    (found,) = scorer.score([{"text": TEXT[0], "id": 7}])
    (wanted,) = scorer.perplexity([TEXT[0]])
    assert found == {"id": 7, **wanted}
    assert list(scorer.stream([{"text": TEXT[0], "id": 7}])) == [found]
    assert metrics([found])["tokens"] == found["tokens"]


QUESTION = {"context": "the sea", "choices": [" is", " river"]}


@pytest.mark.parametrize(
    ("options", "items", "message"),
    [
        (
            {},
            [{"text": "the sea " * 300}],
            r"items\[0\] has \d+ tokens and the model reads at most 128; stride N scores",
        ),
        ({}, [{"text": "a"}, QUESTION], r"items\[1\] holds a question, and what stands before it texts; score them ap"),
        ({}, [QUESTION, {"text": "a"}], r"items\[1\] holds a text, and what stands before it questions; score them ap"),
        ({}, [{"text": 3}], r'items\[0\]: "text" is a number; it must be a string'),
        ({}, [{"text": "a", "perplexity": 1}], r'items\[0\] has the key "perplexity", which the output uses itself'),
        ({"letters": True}, [{"text": "a"}], r'items\[0\] holds a text; letters=True is for questions with "choices"'),
    ],
)
def test_texts_that_cannot_be_used_are_named(options, items, message):
    with pytest.raises(UserError, match=message):
        Scorer(tiny_model(), tiny_tokenizer(True), **options).score(items)


@pytest.mark.parametrize(
    ("texts", "message"),
    [("the sea", "texts is a string; it must be a list"), (["a", 3], r"texts\[1\] is a number; it must be a string")],
)
def test_perplexity_refuses_what_is_no_text(texts, message):
    with pytest.raises(UserError, match=message):
        Scorer(tiny_model(), tiny_tokenizer(True)).perplexity(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 129}, "max_length 129 is more than the model reads, 128"),
        ({"max_length": 0}, "max_length must be a whole number from 1"),
        ({"stride": 129}, "stride 129 is more than the model reads at a time, 128"),
        ({"stride": 20, "max_length": 10}, "stride 20 is more than the model reads at a time, 10"),
        ({"stride": "x"}, "stride must be a whole number from 1"),
    ],
)
def test_lengths_that_cannot_be_used_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Scorer(tiny_model(), tiny_tokenizer(True), **options)


def test_a_log_probability_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="line 1 got the log-probability nan; try --dtype float32"):
        rolling.result(Text("line 1", "a", {}), [1], np.array([math.nan]))
