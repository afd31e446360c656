"""Sentences with a blank are scored as lm-evaluation-harness scores WinoGrande: one continuation, several contexts."""

import pytest

from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer
from radix_ops.engine import Scorer, UserError, metrics

needs_hf()
SENTENCE = "the Seine is not the river Rhine because _ flows through Paris"
ROW = {"sentence": SENTENCE, "option1": "the Seine", "option2": "the river Thames", "answer": "1", "id": 7}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, tiny_tokenizer(adds_bos=True))


def test_winogrande_is_scored_as_by_the_harness(model, scorer):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    utils = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande", exc_type=ImportError)
    from lm_eval.api.instance import Instance

    harness = lm_eval.HFLM(pretrained=model, tokenizer=tiny_tokenizer(adds_bos=True), device="cpu", backend="causal")
    target = " " + utils.doc_to_target(ROW)
    requests = [
        Instance("loglikelihood", ROW, (context, target), number)
        for number, context in enumerate(utils.doc_to_choice(ROW))
    ]
    expected = harness.loglikelihood(requests)
    (found,) = scorer.score([ROW])
    assert found["logprobs"] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert found["greedy"] == [greedy for _, greedy in expected]
    assert (found["gold"], found["id"]) == (0, 7)
    assert "best_per_char" not in found
    assert metrics([found])["accuracy"]["sum"]["correct"] == (found["best"] == 0)


def test_blanks_stand_among_questions_in_their_order(scorer):
    question = {"context": "the sea", "choices": [" is", " river"]}
    alone = [scorer.score([row])[0] for row in (question, ROW, question)]
    together = scorer.score([question, ROW, question])
    for one, other in zip(alone, together, strict=True):
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5)
        assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"contexts": ["a"], "continuation": ""}, '"continuation" is an empty string'),
        ({"contexts": [], "continuation": "b"}, '"contexts" is an empty array'),
        ({"contexts": ["a", 3], "continuation": "b"}, r"contexts\[1\] is a number"),
        ({"contexts": ["a", "b " * 200], "continuation": "b"}, r"items\[0\]: contexts\[1\]: choices\[0\] needs"),
    ],
)
def test_blanks_that_cannot_be_used_are_named(scorer, row, message):
    with pytest.raises(UserError, match=message):
        scorer.score([row])


def test_a_blank_has_no_letters(model):
    with pytest.raises(UserError, match='holds contexts of a continuation; letters=True is for "choices"'):
        Scorer(model, tiny_tokenizer(adds_bos=True), letters=True).score([ROW])
