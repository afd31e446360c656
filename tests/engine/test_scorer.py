"""Scorer, and all that engines have in common, against transformers one sequence at a time."""

import threading

import pytest
import torch

from helpers.commands import QUESTIONS
from helpers.language_models import (
    checked_scores,
    needs_hf,
    tiny_model,
    tiny_tokenizer,
    transformers,
)
from radix_ops.engine import OutOfMemory, Scorer, UserError, _engine, scoring
from radix_ops.engine.runners import Qwen3Runner
from radix_ops.models.qwen3 import Qwen3ForCausalLM

QUESTION = {"context": "the sea", "choices": [" is", " river"]}


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def kind(request):
    needs_hf()
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    tiny_model(kind, max_position_embeddings=256).save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(folder, device="cpu")


def check(results, kind, questions=QUESTIONS):
    model, tokenizer = tiny_model(kind, max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    assert len(results) == len(questions)
    for found, extra in checked_scores(results, questions, model, tokenizer):
        assert set(found) == {*extra, "logprobs", "tokens", "greedy", "best", "best_per_char"}
        assert {k: found[k] for k in extra} == extra


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"token_budget": 50}, {"layout": "unfold"}])
def test_scores_are_those_of_one_sequence_at_a_time(folder, kind, options):
    check(Scorer(folder, device="cpu", **options).score(QUESTIONS), kind)


def test_a_loaded_model_stays_as_it_was(kind):
    model, tokenizer = tiny_model(kind, max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    before, names = model.config.to_dict(), {name: vars(module).keys() for name, module in model.named_modules()}
    check(Scorer(model, tokenizer).score(QUESTIONS), kind)
    assert model.config.to_dict() == before
    assert {name: vars(module).keys() for name, module in model.named_modules()} == names


def test_our_own_model_is_taken_as_it_is(tmp_path):
    tiny_model("Qwen3", max_position_embeddings=256).save_pretrained(tmp_path)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    scorer = Scorer(model, tiny_tokenizer(adds_bos=True))
    assert isinstance(scorer.runner, Qwen3Runner)
    assert scorer.model is model
    check(scorer.score(QUESTIONS), "Qwen3")


def test_results_come_in_order_and_window_by_window(scorer, kind):
    asked = []

    def questions():
        for number, question in enumerate(QUESTIONS * 3):
            asked.append(number)
            yield question

    stream = scorer.stream(questions(), window=3)
    results = [next(stream)]
    assert asked == [0, 1, 2]
    check([*results, *stream], kind, QUESTIONS * 3)
    check(scorer.score(question for question in QUESTIONS * 3), kind, QUESTIONS * 3)
    assert list(scorer.stream([])) == scorer.score([]) == []


def test_progress_tells_of_all_tokens(scorer):
    found = []
    scorer.score(QUESTIONS, on_progress=lambda done, total: found.append((done, total)))
    items = scorer.encode([scoring.Item("", q["context"], q["choices"], {}) for q in QUESTIONS])
    assert found[-1] == (items.lengths.sum(), items.lengths.sum())
    assert [done for done, _ in found] == sorted(done for done, _ in found)


def test_threads_share_one_scorer(scorer, kind):
    results = [None] * 4

    def score(number):
        results[number] = scorer.score(QUESTIONS * (number + 1))

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in enumerate(results):
        check(found, kind, QUESTIONS * (number + 1))


def test_a_batch_of_several_askers_gives_each_its_own(scorer, kind):
    """In a server, items that were encoded one by one meet in one batch."""
    items = [scorer.parse(_engine.Record(f"request {n}", question)) for n, question in enumerate(QUESTIONS)]
    together = scoring.Choices()
    for item in items:
        together.extend(scorer.encode([item]))
    collector, results = _engine.Collector(together.ends), {}

    def on_batch(indices, found):
        for index, numbers in collector.add(indices, found):
            results[index] = scorer.result(items[index], together[index], *numbers)

    stats = scorer.execute(together, on_batch)
    assert stats.batches == 1
    check([results[index] for index in range(len(items))], kind)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"context": "a"}, "items is an object; it must be a list, or another iterable, of objects like"),
        ("abc", "items is a string; it must be a list"),
        (3, "items is a number; it must be a list"),
        ([QUESTION, "b"], r"items\[1\] is a string; it must be an object like"),
        ([QUESTION, {"context": "a"}], r'items\[1\] has no "choices" \(an array of strings\); it has "context"'),
        ([{"context": 3, "choices": ["b"]}], r'items\[0\]: "context" is a number; it must be a string'),
        ([{"context": torch, "choices": ["b"]}], r'items\[0\]: "context" is a module; it must be a string'),
        ([QUESTION, {"context": "a", "choices": ()}], r'items\[1\]: "choices" is an empty array'),
        ([QUESTION, {"context": "a", "choices": ("b", "")}], r"items\[1\]: choices\[1\] is an empty string"),
        ([{**QUESTION, "best": 1}], r'items\[0\] has the key "best", which the output uses itself'),
        (
            [QUESTION, {"context": "the sea " * 300, "choices": ["b"]}],
            r"items\[1\]: choices\[0\] needs \d+ tokens .* at most 256; truncate_left=True drops tokens from the start",
        ),
    ],
)
def test_items_that_cannot_be_used_are_named_before_the_model_runs(scorer, monkeypatch, items, message):
    monkeypatch.setattr(scorer.runner, "states", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        scorer.score(items)
    with pytest.raises(UserError, match=message):
        list(scorer.stream(items))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/no/such"}, "model /no/such does not exist"),
        ({"model": 3}, "the model is a int; it must be a model of transformers or of radix_ops.models, or the name"),
        ({"model": torch.nn.Linear(1, 1), "tokenizer": object()}, "the model is a Linear; it must be a model of tra"),
        ({"model": torch.nn.Linear(1, 1)}, "a loaded model needs its tokenizer beside it: tokenizer=..."),
        ({"device": "tpu"}, "device 'tpu' can't be used: it must be cpu or cuda"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, or None, got 'int8'"),
        ({"layout": "flat"}, "layout must be one of 'auto', 'compact', 'trie', 'unfold', got 'flat'"),
        ({"token_budget": 0}, "token_budget must be a whole number from 1 to 2147483647, or None, got 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        Scorer(**{"model": folder, **arguments})


@pytest.mark.parametrize("window", [0, 1.5, True, None])
def test_a_window_is_a_whole_number(scorer, window):
    with pytest.raises(UserError, match="window must be a whole number from 1, got"):
        list(scorer.stream(QUESTIONS, window=window))


def test_models_that_cannot_score_are_refused():
    tokenizer = tiny_tokenizer(adds_bos=True)
    with pytest.raises(UserError, match=r"the LlamaForCausalLM is in training mode; model.eval\(\) takes it out"):
        Scorer(tiny_model().train(), tokenizer)
    with pytest.raises(UserError, match="LlamaModel has no output head; Scorer needs one"):
        Scorer(tiny_model().model, tokenizer)
    with pytest.raises(UserError, match=r"a loaded model has its device and dtype; model.to\(...\) changes them"):
        Scorer(tiny_model(), tokenizer, dtype="float32")
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=340, hidden_size=32, n_layer=1, n_head=2))
    scorer = Scorer(bloom.eval(), tokenizer)
    with pytest.raises(UserError, match=r"(?i)bloom.*plain=True runs without folding"):
        scorer.score([QUESTION])
    plain = Scorer(bloom, tokenizer, plain=True)
    assert plain.score([QUESTION])[0]["best"] in (0, 1)


def test_a_lazy_scorer_checks_items_before_it_loads_weights(folder, kind, monkeypatch):
    scorer = Scorer(folder, device="cpu", lazy=True)
    with monkeypatch.context() as patch:
        patch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
        with pytest.raises(UserError, match="items"):
            scorer.score([{"context": "a"}])
    check(scorer.score(QUESTIONS), kind)


def test_batches_that_do_not_fit_run_in_halves_with_a_warning_in_the_log(folder, kind, monkeypatch, caplog):
    scorer = Scorer(folder, device="cpu")
    states, sizes = scorer.runner.states, []

    def small_states(sequences, *tokens):
        sizes.append(len(sequences))
        if len(sequences) > 3:
            raise torch.OutOfMemoryError("too much")
        return states(sequences, *tokens)

    monkeypatch.setattr(scorer.runner, "states", small_states)
    check(scorer.score(QUESTIONS), kind)
    assert max(sizes) > 3
    assert "out of memory: going on with batches of half the size" in caplog.text

    def none(sequences, *tokens):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(scorer.runner, "states", none)
    with pytest.raises(OutOfMemory, match="one sequence alone does not fit"):
        scorer.score(QUESTIONS)


def test_sequences_that_are_all_alike_run_in_fewer_at_a_time(kind, folder, monkeypatch):
    """They have one row together, of which there is no half."""
    scorer = Scorer(folder, device="cpu", token_budget=1)
    states, sizes = scorer.runner.states, []

    def small_states(sequences, *tokens):
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(sequences))
        return states(sequences, *tokens)

    monkeypatch.setattr(scorer.runner, "states", small_states)
    results = scorer.score([{"context": "", "choices": ["the", "a", "s"]}] * 3)
    assert sizes == [1] * 9
    assert results == [results[0]] * 3
