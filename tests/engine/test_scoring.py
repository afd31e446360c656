"""Scoring: reading, tokenising, planning, and log-probabilities against transformers one sequence at a time."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.batches import trie_size
from helpers.language_models import (
    Sequence,
    checked_scores,
    needs_hf,
    oracle,
    sequences_of,
    tiny_model,
    tiny_tokenizer,
)
from radix_ops.data.records import Records, UserError
from radix_ops.engine import Scorer, scoring
from radix_ops.engine.batches import Pass, plan_batches
from radix_ops.engine.runners import TransformersRunner
from radix_ops.plan.budget import Budget

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def choices_of(sequences: list[Sequence]) -> scoring.Choices:
    choices = scoring.Choices()
    for item in sorted({s.item for s in sequences}):
        choices.append([(s.context, s.continuation) for s in sequences if s.item == item])
    return choices


def run(model, sequences: list[Sequence], budget: int, folded: bool, **options):
    """Return all scores as (log-probabilities, greedy flags), and the run's counts."""
    choices, runner = choices_of(sequences), TransformersRunner(model)
    logprobs, greedy = np.full(len(sequences), np.nan), np.zeros(len(sequences), bool)

    def on_batch(indices, found):
        logprobs[indices], greedy[indices] = found

    stats = scoring.score(runner, choices, Budget(budget), folded, on_batch, **options)
    return logprobs, greedy, stats


def random_sequences(seed: int, num_items: int, vocab: int = 340) -> list[Sequence]:
    """Return items in three groups of one prefix each, with two to five choices of one to six tokens."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(2, vocab, size).astype(np.int32) for size in (5, 17, 40)]
    sequences = []
    for item in range(num_items):
        own = rng.integers(2, vocab, rng.integers(1, 12)).astype(np.int32)
        context = np.concatenate([prefixes[rng.integers(3)], own])
        head = rng.integers(2, vocab, 2).astype(np.int32)
        for choice in range(rng.integers(2, 6)):
            tail = rng.integers(2, vocab, rng.integers(1, 5)).astype(np.int32)
            sequences.append(Sequence(item, context, np.concatenate([head[: choice % 3], tail])))
    return sequences


def items_of(*pairs) -> list[scoring.Item]:
    return [scoring.Item(f"q.jsonl, line {n}", c, list(choices), {}) for n, (c, choices) in enumerate(pairs, 1)]


def read_items(path) -> list[scoring.Item]:
    return list(Records(path, scoring.parse_item, shape=scoring.SHAPE))


GOOD = b'{"context": "a", "choices": ["b"]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'context': 1}", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"context": "a", "choices": ["b"], "score": NaN}', "line 2 is not JSON: NaN is not"),
        (b'{"context": "a", "choices": ["b"], "score": [-1e999]}', "line 2 is not JSON: -1e999 is not a finite"),
        (b"[1]", "line 2 holds an array; it must hold an object"),
        (b"null", "line 2 holds null"),
        (b'{"choices": ["b"]}', 'line 2 has no "context"'),
        (b'{"context": "a"}', 'line 2 has no "choices"'),
        (b'{"context": 3, "choices": ["b"]}', 'line 2: "context" is a number; it must be a string'),
        (b'{"context": "a", "choices": "b"}', 'line 2: "choices" is a string; it must be an array'),
        (b'{"context": "a", "choices": []}', 'line 2: "choices" is an empty array'),
        (b'{"context": "a", "choices": ["b", null]}', r"line 2: choices\[1\] is null; it must be a string"),
        (b'{"context": "a", "choices": ["b", ""]}', r"line 2: choices\[1\] is an empty string"),
        (b'{"context": "\\ud800", "choices": ["b"]}', 'line 2: "context" holds half of a surrogate pair'),
        (b'{"context": "a", "choices": ["b"], "best": 1}', 'line 2 has the key "best"'),
        (b'{"context": "\xff", "choices": ["b"]}', "line 2 is not UTF-8: byte 0xff at column 14"),
    ],
)
def test_read_items_names_file_line_and_fault(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError, match=f"questions.jsonl, {message}"):
        read_items(path)


def test_read_items_refuses_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"absent.jsonl can't be read: No such file"):
        read_items(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="holds no data file"):
        read_items(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty.jsonl is empty"):
        read_items(tmp_path / "empty.jsonl")


def test_read_items_takes_what_editors_write(tmp_path):
    path = tmp_path / "q.jsonl"
    second = '{"context": "\u2028\u00e9", "choices": ["x", "y"], "id": {"a": 1}, "gold": 1}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + second)
    first, other = read_items(path)
    assert (first.where, first.context, first.choices, first.extra) == (f"{path}, line 1", "a", ["b"], {})
    assert (other.where, other.context, other.choices) == (f"{path}, line 2", "\u2028\u00e9", ["x", "y"])
    assert other.extra == {"id": {"a": 1}, "gold": 1}


PAIRS = [
    ("Question: Which river?", [" the Seine", " the Rhine", "the sea"]),
    ("Question: Which river? ", ["the Seine", " the Rhine"]),
    ("Answer:\n\n \t", ["yes", "no, maybe"]),
    ("the riv", ["er flows", "e", "\u00e9t\u00e9"]),
    ("", ["yes", " no", "<s>yes"]),
    ("<s>Question", [": yes", "s"]),
    ("<s> ", ["yes"]),
]


def encoded_ids(choices):
    return [(s.context.tolist(), s.continuation.tolist()) for s in sequences_of(choices)]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_encode_equals_lm_evaluation_harness(adds_bos):
    harness = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM
    tokenizer = tiny_tokenizer(adds_bos)
    lm = object.__new__(harness)
    lm.tokenizer, lm.backend, lm.enable_thinking = tokenizer, "causal", False
    lm.add_bos_token = lm.custom_prefix_token_id = None
    lm._loglikelihood_tokens = lambda requests, disable_tqdm: [(context, rest) for _, context, rest in requests]
    rng = random.Random(0)
    pieces = ["Question", ": ", " ", "\n", "river", " the", "Se", "ine", "<s>", "</s>", "\u00e9", ".", "  "]
    made = [
        ("".join(rng.choices(pieces, k=rng.randint(1, 6))), ["".join(rng.choices(pieces, k=rng.randint(1, 4)))])
        for _ in range(1000)
    ]
    # The harness stops at a context of white space alone where no BOS is added, and at a choice of no tokens.
    pairs = PAIRS + [(c, choices) for c, choices in made if c.strip() and len(tokenizer(choices[0])["input_ids"]) > 1]
    requests = [SimpleNamespace(args=(context, choice)) for context, choices in pairs for choice in choices]
    expected = lm.loglikelihood(requests, disable_tqdm=True)
    keep = [bool(rest) for _, rest in expected]
    assert sum(keep) > 800
    kept = [(r.args[0], [r.args[1]]) for r, k in zip(requests, keep, strict=True) if k]
    assert encoded_ids(scoring.encode(items_of(*kept), tokenizer)) == [e for e in expected if e[1]]


def test_encode_splits_as_written_down():
    tokenizer = tiny_tokenizer(adds_bos=True)

    def split(context, choice):
        ((pair,),) = scoring.encode(items_of((context, [choice])), tokenizer)
        return [tokenizer.convert_ids_to_tokens(part.tolist()) for part in pair]

    # Expected values are lm-evaluation-harness 0.4.13's, printed once.
    assert split("the sea ", "or") == [["<s>", "th", "e", "\u0120sea"], ["\u0120", "or"]]
    assert split("the s", "ea river") == [["<s>", "th", "e", "\u0120s"], ["\u0120river"]]
    assert split("", "the") == [["<s>"], ["th", "e"]]
    assert split("", "<s>the") == [["<s>"], ["th", "e"]]
    assert split("<s>the", " sea") == [["<s>", "th", "e"], ["\u0120sea"]]
    assert split(" \n", "the") == [["<s>"], ["\u0120", "\u010a", "th", "e"]]


def test_encode_refuses_what_the_model_cannot_read():
    tokenizer = tiny_tokenizer(True)
    items = items_of(("the", [" sea"]), ("the river " * 20, [" sea", " the sea and the sea"]))
    longest = scoring.encode(items, tokenizer).lengths.max()
    assert scoring.encode(items, tokenizer, max_length=longest)
    with pytest.raises(UserError, match=rf"line 2: choices\[1\] needs {longest} tokens .* most {longest - 1}; --trunc"):
        scoring.encode(items, tokenizer, max_length=longest - 1)

    whole = sequences_of(scoring.encode(items, tokenizer))
    truncated = sequences_of(scoring.encode(items, tokenizer, max_length=12, truncate_left=True))
    for cut, full in zip(truncated, whole, strict=True):
        assert len(cut.inputs) == min(12, len(full.inputs))
        assert cut.continuation.tolist() == full.continuation.tolist()
        assert cut.context.tolist() == full.context.tolist()[-len(cut.context) :]
    size = len(whole[2].continuation)
    with pytest.raises(UserError, match=rf"line 2: choices\[1\] has {size} tokens .* at most {size - 1}"):
        scoring.encode(items, tokenizer, max_length=size - 1, truncate_left=True)


def test_encode_refuses_choices_and_contexts_without_tokens():
    tokenizer = tiny_tokenizer(False)
    with pytest.raises(UserError, match=r"line 1: choices\[1\] yields no token"):
        scoring.encode(items_of(("", ["sea", "<s>"])), tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="line 2: the context yields no tokens"):
        scoring.encode(items_of(("the", ["sea"]), ("", ["sea"])), tokenizer)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_run_equals_transformers_one_sequence_at_a_time(folded, kind, budget):
    if folded:
        needs_hf()
    model, sequences = tiny_model(kind), random_sequences(seed=4, num_items=12)
    TransformersRunner(model).check(sequences[0].inputs, folded)
    logprobs, found_greedy, stats = run(model, sequences, budget, folded)
    expected = [oracle(model, sequence) for sequence in sequences]
    torch.testing.assert_close(
        torch.from_numpy(logprobs),
        torch.tensor([logprob for logprob, _ in expected], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )
    assert found_greedy.tolist() == [greedy for _, greedy in expected]
    assert stats.tokens == sum(len(s.inputs) for s in sequences)
    assert stats.seconds > 0


def test_run_knows_a_greedy_continuation():
    model, (first, *_) = tiny_model(), random_sequences(seed=5, num_items=1)
    ids = first.context.tolist()
    for _ in range(3):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    greedy = np.array(ids[-3:], dtype=np.int32)
    other = greedy.copy()
    other[2] = (other[2] + 1) % 340
    sequences = [Sequence(0, first.context, greedy), Sequence(0, first.context, other)]
    assert run(model, sequences, 1000, folded=False)[1].tolist() == [True, False]


def test_run_computes_each_shared_row_once():
    needs_hf()
    model, sequences = tiny_model(), random_sequences(seed=6, num_items=12)
    *_, stats = run(model, sequences, 10**6, folded=True, warm_up=True)
    assert stats.rows == trie_size([s.inputs.tolist() for s in sequences])
    assert stats.batches == 1
    *_, plain = run(model, sequences, 10**6, folded=False)
    assert plain.rows >= plain.tokens == stats.tokens > stats.rows


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_a_pass_may_be_gone_in_stretches(folded):
    needs_hf()
    model, sequences = tiny_model(), random_sequences(seed=6, num_items=12)
    logprobs, _, whole = run(model, sequences, 40, folded)
    runner, choices, found = TransformersRunner(model), choices_of(sequences), {}
    stretches = Pass(runner, choices, Budget(40), folded, scoring.scorer(runner, choices))

    def collect(indices, numbers):
        found.update(zip(indices.tolist(), numbers[0].tolist(), strict=True))

    first = stretches.advance(collect, share=0.3)
    assert 0.3 <= stretches.done < 1
    assert stretches.advance(collect, share=0.3) == []
    assert len(stretches.advance(collect, seconds=0.0)) == 1
    counted = replace(stretches.stats)
    assert stretches.repeat(first).seconds > 0
    assert stretches.stats == counted
    stretches.advance(collect)
    assert stretches.advance(collect) == []
    for name in ("tokens", "rows", "head_rows", "batches"):
        assert getattr(stretches.stats, name) == getattr(whole, name)
    assert [found[i] for i in range(len(found))] == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_run_leaves_the_model_as_it_was():
    needs_hf()
    model, sequences = tiny_model(), random_sequences(seed=7, num_items=3)
    before, *_ = run(model, sequences, 10**6, folded=False)
    run(model, sequences, 10**6, folded=True)
    after, *_ = run(model, sequences, 10**6, folded=False)
    assert before.tolist() == after.tolist()


@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])
def test_run_sends_only_distinct_scored_rows_through_the_head(monkeypatch, chunk_rows):
    monkeypatch.setattr(scoring, "MAX_LOGIT_BYTES", chunk_rows * 4 * 340)
    model, sequences = tiny_model(), random_sequences(seed=8, num_items=6)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    logprobs, _, stats = run(model, sequences, 10**6, folded=False)
    batches = plan_batches(TransformersRunner(model), choices_of(sequences), Budget(10**6), False)
    needed = {
        (number, sequences[i].item, *sequences[i].continuation[:end])
        for number, batch in enumerate(batches)
        for i in batch
        for end in range(len(sequences[i].continuation))
    }
    assert sum(seen) == stats.head_rows == len(needed) < sum(len(s.continuation) for s in sequences)
    assert max(seen) <= chunk_rows
    *_, warmed_up = run(model, sequences, 10**6, folded=False, warm_up=True)
    assert warmed_up.head_rows == stats.head_rows
    assert logprobs == pytest.approx([oracle(model, sequence)[0] for sequence in sequences], abs=1e-4)


def test_run_handles_contexts_cut_to_different_lengths():
    tokenizer, model = tiny_tokenizer(True), tiny_model()
    items = items_of(("the river flows and the sea " * 8, [" the", " the sea and the river", " the sea"]))
    sequences = sequences_of(scoring.encode(items, tokenizer, max_length=20, truncate_left=True))
    assert len({len(s.context) for s in sequences}) > 1
    logprobs, *_ = run(model, sequences, 10**6, folded=False)
    assert logprobs == pytest.approx([oracle(model, sequence)[0] for sequence in sequences], abs=1e-4)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        # The sdpa of transformers 5.2, its default for Gemma 2 there, leaves out the cap on attention scores.
        ("Gemma2", {"final_logit_softcapping": 2.0, "attn_implementation": "eager"}),
        ("Cohere", {"logit_scale": 0.25, "pad_token_id": 0}),
    ],
)
def test_logits_are_scaled_and_capped_as_the_model_does_it(kind, changes, folded):
    needs_hf()
    model, sequences = tiny_model(kind, **changes), random_sequences(seed=10, num_items=4)
    runner, choices = TransformersRunner(model), choices_of(sequences)
    runner.check(sequences[0].inputs, folded)
    logprobs = {}

    def on_batch(indices, found):
        logprobs.update(zip(indices.tolist(), found[0].tolist(), strict=True))

    scoring.score(runner, choices, Budget(10**6), folded, on_batch)
    expected = [oracle(model, sequence)[0] for sequence in sequences]
    assert [logprobs[index] for index in range(len(sequences))] == pytest.approx(expected, abs=1e-4)
    bare = torch.nn.functional.linear(torch.eye(32), model.get_output_embeddings().weight)
    assert not torch.allclose(runner.head(torch.eye(32)), bare, rtol=0.1)


@pytest.mark.parametrize("plain", [False, True])
def test_caps_on_attention_scores_are_computed_whatever_transformers_takes_by_default(tmp_path, plain):
    needs_hf()
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.save_pretrained(tmp_path)
    # Scores far above the cap, so that leaving it out is seen.
    model = tiny_model("Gemma2", attn_logit_softcapping=0.2, query_pre_attn_scalar=1, attn_implementation="eager")
    model.save_pretrained(tmp_path)
    questions = [{"context": "the sea and the river", "choices": [" is", " river", " the sea"]}]
    results = Scorer(str(tmp_path), plain=plain).score(questions)
    assert len(list(checked_scores(results, questions, model, tokenizer))) == 1
    uncapped = tiny_model("Gemma2", attn_logit_softcapping=None, query_pre_attn_scalar=1)
    uncapped.load_state_dict(model.state_dict())
    sequence = sequences_of(scoring.encode(items_of((questions[0]["context"], questions[0]["choices"])), tokenizer))[0]
    assert abs(oracle(uncapped, sequence)[0] - oracle(model, sequence)[0]) > 1e-3


def test_check_refuses_logits_that_are_made_of_more_than_hidden_states():
    model, probe = tiny_model(), random_sequences(seed=10, num_items=1)[0].inputs
    forward = model.forward

    def shifted(input_ids, **options):
        outputs = forward(input_ids=input_ids, **options)
        outputs.logits = outputs.logits + input_ids[..., None]
        return outputs

    model.forward = shifted
    with pytest.raises(UserError, match="LlamaForCausalLM makes its logits of more than its hidden states"):
        TransformersRunner(model).check(probe, folded=False)


def test_check_names_a_type_that_cannot_be_folded():
    needs_hf()
    config = transformers.BloomConfig(vocab_size=340, hidden_size=32, n_layer=1, n_head=4)
    runner = TransformersRunner(transformers.BloomForCausalLM(config).eval())
    with pytest.raises(UserError, match=r"(?i)bloom.*--plain runs without folding"):
        runner.check(random_sequences(seed=12, num_items=1)[0].inputs, folded=True)


def test_result_picks_the_best_by_sum_and_per_character():
    (item,) = items_of(("the", ["   sea", "river", "  sea"]))
    found = scoring.result(item, [1, 2, 3], np.array([-3.0, -4.5, -3.0]), np.array([True, False, True]))
    assert found == {
        "logprobs": [-3.0, -4.5, -3.0],
        "tokens": [1, 2, 3],
        "greedy": [True, False, True],
        "best": 0,
        "best_per_char": 1,
    }


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_result_refuses_log_probabilities_that_are_not_finite(value):
    (item,) = items_of(("the", [" sea", " river"]))
    with pytest.raises(UserError, match=r"line 1: choices\[1\] got the log-probability"):
        scoring.result(item, [1, 1], np.array([-1.0, value]), np.array([False, False]))


def test_equal_choices_get_equal_numbers_wherever_they_ran():
    item = scoring.Item("line 1", "", [" a", " b", " a", " a"], {})
    logprobs, greedy = np.array([-1.0, -2.0, -1.0 + 1e-12, -0.5]), np.array([False, True, True, False])
    found = scoring.result(item, [1, 1, 1, 1], logprobs, greedy)
    assert found["logprobs"] == [-1.0, -2.0, -1.0, -1.0]
    assert found["greedy"] == [False, True, False, False]
    assert (found["best"], found["best_per_char"]) == (0, 0)
