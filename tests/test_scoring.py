"""Scoring: reading, tokenising, planning, and log-probabilities against transformers one sequence at a time."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from radix_ops import plan, scoring
from radix_ops.scoring import ScoreError, Sequence

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = [
    "The following are questions about rivers and the sea. Answer with one of the choices.",
    "Question: Which river flows through Paris? Answer: the Seine, not the river Rhine (or the Thames).",
    "Question: Is the sea saltier than the river? Answer: yes, no, maybe.",
]


def tiny_tokenizer(adds_bos: bool):
    """A byte-level BPE tokenizer of a few merges; <s> is id 0 and </s> id 1."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if adds_bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def tiny_model(kind: str = "Llama", **changes):
    """A two-layer model with random weights, spread enough that choices differ clearly."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 340,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def random_sequences(seed: int, num_items: int, vocab: int = 340) -> list[Sequence]:
    """Items in three groups with a group prefix each, two to five choices of one to six tokens that may start alike."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(2, vocab, size).astype(np.int32) for size in (5, 17, 40)]
    sequences = []
    for item in range(num_items):
        own = rng.integers(2, vocab, rng.integers(1, 12)).astype(np.int32)
        context = np.concatenate([prefixes[rng.integers(3)], own])
        head = rng.integers(2, vocab, 2).astype(np.int32)
        for choice in range(rng.integers(2, 6)):
            tail = rng.integers(2, vocab, rng.integers(1, 5)).astype(np.int32)
            sequences.append(Sequence(item, choice, context, np.concatenate([head[: choice % 3], tail])))
    return sequences


def oracle(model, sequence: Sequence) -> tuple[float, bool]:
    """One plain forward of one unpadded sequence, all its logits, log-softmax in float64."""
    ids = torch.from_numpy(np.concatenate([sequence.context, sequence.continuation]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    first = len(sequence.context)
    logprobs = logits.log_softmax(-1)[first - 1 : -1]
    picked = logprobs[torch.arange(len(ids) - first), ids[first:]]
    return picked.sum().item(), bool((logprobs.argmax(-1) == ids[first:]).all())


def distinct_prefixes(token_lists) -> int:
    return len({tuple(tokens[: end + 1]) for tokens in token_lists for end in range(len(tokens))})


def items_of(*pairs) -> list[scoring.Item]:
    return [scoring.Item(n, f"q.jsonl, line {n}", c, list(choices), {}, b"") for n, (c, choices) in enumerate(pairs, 1)]


GOOD = b'{"context": "a", "choices": ["b"]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "line 2 is blank"),
        (b"   \r", "line 2 is blank"),
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
    with pytest.raises(ScoreError, match=f"questions.jsonl, {message}"):
        scoring.read_items(path)


def test_read_items_refuses_missing_and_empty_files(tmp_path):
    with pytest.raises(ScoreError, match=r"absent.jsonl can't be read: No such file"):
        scoring.read_items(tmp_path / "absent.jsonl")
    with pytest.raises(ScoreError, match="can't be read: Is a directory"):
        scoring.read_items(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ScoreError, match=r"empty.jsonl is empty"):
        scoring.read_items(tmp_path / "empty.jsonl")


def test_read_items_takes_what_editors_write(tmp_path):
    path = tmp_path / "q.jsonl"
    second = '{"context": "\u2028\u00e9", "choices": ["x", "y"], "id": {"a": 1}, "gold": 1}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + second)
    first, other = scoring.read_items(path)
    assert (first.line, first.context, first.choices, first.extra) == (1, "a", ["b"], {})
    assert (other.line, other.context, other.choices) == (2, "\u2028\u00e9", ["x", "y"])
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


def encoded_ids(sequences):
    return [(s.context.tolist(), s.continuation.tolist()) for s in sequences]


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
        (sequence,) = scoring.encode(items_of((context, [choice])), tokenizer)
        return [tokenizer.convert_ids_to_tokens(part.tolist()) for part in (sequence.context, sequence.continuation)]

    # Expected values are lm-evaluation-harness 0.4.13's, printed once.
    assert split("the sea ", "or") == [["<s>", "th", "e", "\u0120sea"], ["\u0120", "or"]]
    assert split("the s", "ea river") == [["<s>", "th", "e", "\u0120s"], ["\u0120river"]]
    assert split("", "the") == [["<s>"], ["th", "e"]]
    assert split("", "<s>the") == [["<s>"], ["th", "e"]]
    assert split("<s>the", " sea") == [["<s>", "th", "e"], ["\u0120sea"]]
    assert split(" \n", "the") == [["<s>"], ["\u0120", "\u010a", "th", "e"]]


def test_encode_shares_one_context_among_choices():
    first, second = scoring.encode(items_of(("the sea", [" yes", " no"])), tiny_tokenizer(True))
    assert first.context is second.context
    assert (first.item, first.choice, second.item, second.choice) == (0, 0, 0, 1)


def test_encode_refuses_what_the_model_cannot_read():
    tokenizer = tiny_tokenizer(True)
    items = items_of(("the", [" sea"]), ("the river " * 20, [" sea", " the sea and the sea"]))
    longest = max(s.length for s in scoring.encode(items, tokenizer))
    assert scoring.encode(items, tokenizer, max_length=longest)
    with pytest.raises(
        ScoreError, match=rf"line 2: choices\[1\] needs {longest} tokens .* most {longest - 1}; --trunc"
    ):
        scoring.encode(items, tokenizer, max_length=longest - 1)

    whole = scoring.encode(items, tokenizer)
    for cut, full in zip(scoring.encode(items, tokenizer, max_length=12, truncate_left=True), whole, strict=True):
        assert cut.length == min(12, full.length)
        assert cut.continuation.tolist() == full.continuation.tolist()
        assert cut.context.tolist() == full.context.tolist()[-len(cut.context) :]
    size = len(whole[2].continuation)
    with pytest.raises(ScoreError, match=rf"line 2: choices\[1\] has {size} tokens .* at most {size - 1}"):
        scoring.encode(items, tokenizer, max_length=size - 1, truncate_left=True)


def test_encode_refuses_choices_and_contexts_without_tokens():
    tokenizer = tiny_tokenizer(False)
    with pytest.raises(ScoreError, match=r"line 1: choices\[1\] yields no token"):
        scoring.encode(items_of(("", ["sea", "<s>"])), tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ScoreError, match="line 2: the context yields no tokens"):
        scoring.encode(items_of(("the", ["sea"]), ("", ["sea"])), tokenizer)


@pytest.mark.parametrize("planner", [plan.plan_folded, plan.plan_plain])
@pytest.mark.parametrize("budget", [1, 100, 700, 10**6])
def test_plans_hold_each_sequence_once_within_the_budget(planner, budget):
    sequences = random_sequences(seed=1, num_items=40)
    batches = planner(sequences, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(sequences)))
    for batch in batches:
        assert len(batch) == 1 or sum(sequences[i].length for i in batch) <= budget


def test_plan_plain_pads_at_most_five_percent():
    sequences = random_sequences(seed=2, num_items=200)
    for batch in plan.plan_plain(sequences, 2000):
        lengths = [sequences[i].length for i in batch]
        assert len(batch) * max(lengths) - sum(lengths) <= 0.05 * sum(lengths)


def test_plan_folded_shares_nearly_all_that_can_be_shared():
    sequences = random_sequences(seed=3, num_items=90)
    total = sum(s.length for s in sequences)
    least = distinct_prefixes([s.inputs.tolist() for s in sequences])
    rows = sum(
        distinct_prefixes([sequences[i].inputs.tolist() for i in batch])
        for batch in plan.plan_folded(sequences, total // 6)
    )
    # Each of the five cuts may cost one group prefix of at most 40 tokens.
    assert rows <= least + 5 * 40
    slices = np.array_split(np.arange(len(sequences)), 6)
    unplanned = sum(distinct_prefixes([sequences[i].inputs.tolist() for i in part]) for part in slices)
    assert rows < unplanned


def test_plan_folded_cuts_between_groups_and_keeps_their_order():
    def item(index, prefix, own):
        context = np.array([prefix] * 50 + [own] * 10, dtype=np.int32)
        return [Sequence(index, c, context, np.array([c + 2, 1], dtype=np.int32)) for c in range(4)]

    groups = [item(0, 9, 1), item(1, 9, 2), item(2, 9, 3), item(3, 5, 1), item(4, 5, 2), item(5, 5, 3)]
    sequences = list(itertools.chain(*groups))
    # Four items fit the budget, but the fourth belongs with those behind it.
    batches = plan.plan_folded(sequences, token_budget=4 * 4 * 61)
    assert batches == [list(range(12)), list(range(12, 24))]


def test_plan_folded_bounds_the_padded_batch():
    lengths = [2000] + [9] * 200
    one = np.array([1], dtype=np.int32)
    sequences = [Sequence(i, 0, np.full(size, i, dtype=np.int32), one) for i, size in enumerate(lengths)]
    for batch in plan.plan_folded(sequences, 4000):
        assert len(batch) * max(sequences[i].length for i in batch) <= 4 * 4000


def needs_hf():
    return pytest.importorskip("radix_ops.hf", exc_type=ImportError)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_run_equals_transformers_one_sequence_at_a_time(folded, kind, budget):
    if folded:
        needs_hf()
    model, sequences = tiny_model(kind), random_sequences(seed=4, num_items=12)
    scoring.check_model(model, sequences, folded)
    scores, stats = scoring.run(model, sequences, budget, folded)
    expected = [oracle(model, sequence) for sequence in sequences]
    torch.testing.assert_close(
        torch.tensor([s.logprob for s in scores], dtype=torch.float64),
        torch.tensor([logprob for logprob, _ in expected], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )
    assert [s.is_greedy for s in scores] == [greedy for _, greedy in expected]
    assert stats.tokens == sum(s.length for s in sequences)
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
    sequences = [Sequence(0, 0, first.context, greedy), Sequence(0, 1, first.context, other)]
    scores, _ = scoring.run(model, sequences, 1000, folded=False)
    assert [s.is_greedy for s in scores] == [True, False]


def test_run_computes_each_shared_row_once():
    needs_hf()
    model, sequences = tiny_model(), random_sequences(seed=6, num_items=12)
    _, stats = scoring.run(model, sequences, 10**6, folded=True)
    assert stats.rows == distinct_prefixes([s.inputs.tolist() for s in sequences])
    assert stats.batches == 1
    _, plain = scoring.run(model, sequences, 10**6, folded=False)
    assert plain.rows >= plain.tokens == stats.tokens > stats.rows


def test_run_leaves_the_model_as_it_was():
    needs_hf()
    model, sequences = tiny_model(), random_sequences(seed=7, num_items=3)
    before, _ = scoring.run(model, sequences, 10**6, folded=False)
    scoring.run(model, sequences, 10**6, folded=True)
    after, _ = scoring.run(model, sequences, 10**6, folded=False)
    assert before == after


@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])
def test_run_sends_only_distinct_scored_rows_through_the_head(monkeypatch, chunk_rows):
    monkeypatch.setattr(scoring, "MAX_LOGIT_BYTES", chunk_rows * 4 * 340)
    model, sequences = tiny_model(), random_sequences(seed=8, num_items=6)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    scores, stats = scoring.run(model, sequences, 10**6, folded=False)
    needed = {
        (number, sequences[i].item, *sequences[i].continuation[:end])
        for number, batch in enumerate(plan.plan_plain(sequences, 10**6))
        for i in batch
        for end in range(len(sequences[i].continuation))
    }
    assert sum(seen) == stats.head_rows == len(needed) < sum(len(s.continuation) for s in sequences)
    assert max(seen) <= chunk_rows
    for score, sequence in zip(scores, sequences, strict=True):
        assert score.logprob == pytest.approx(oracle(model, sequence)[0], abs=1e-4)


def test_run_reports_batches_and_warms_up_outside_of_them():
    model, sequences = tiny_model(), random_sequences(seed=9, num_items=10)
    reported = {}
    scores, stats = scoring.run(
        model, sequences, 200, False, lambda batch, found: reported.update(zip(batch, found, strict=True)), warm_up=True
    )
    assert [reported[i] for i in range(len(sequences))] == scores
    assert stats.tokens == sum(s.length for s in sequences)
    assert stats.batches == len(plan.plan_plain(sequences, 200))


def test_run_handles_contexts_cut_to_different_lengths():
    tokenizer, model = tiny_tokenizer(True), tiny_model()
    items = items_of(("the river flows and the sea " * 8, [" the", " the sea and the river", " the sea"]))
    sequences = scoring.encode(items, tokenizer, max_length=20, truncate_left=True)
    assert len({len(s.context) for s in sequences}) > 1
    scores, _ = scoring.run(model, sequences, 10**6, folded=False)
    for score, sequence in zip(scores, sequences, strict=True):
        assert score.logprob == pytest.approx(oracle(model, sequence)[0], abs=1e-4)


def test_check_model_refuses_logits_that_are_more_than_the_head():
    sequences = random_sequences(seed=10, num_items=1)
    scoring.check_model(tiny_model("Granite", logits_scaling=1.0), sequences, folded=False)
    with pytest.raises(ScoreError, match="GraniteForCausalLM does more to its logits"):
        scoring.check_model(tiny_model("Granite", logits_scaling=8.0), sequences, folded=False)


def test_check_model_refuses_token_ids_past_the_embedding():
    sequences = random_sequences(seed=11, num_items=1)
    largest = max(max(s.context.max(), s.continuation.max()) for s in sequences)
    with pytest.raises(ScoreError, match=f"yields token {largest} and the model embeds {largest}"):
        scoring.check_model(tiny_model(vocab_size=int(largest)), sequences, folded=False)


def test_check_model_names_a_type_that_cannot_be_folded():
    needs_hf()
    config = transformers.BloomConfig(vocab_size=340, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ScoreError, match=r"(?i)bloom.*--plain scores without folding"):
        scoring.check_model(model, random_sequences(seed=12, num_items=1), folded=True)


def test_result_picks_the_best_by_sum_and_per_character():
    (item,) = items_of(("the", ["   sea", "river", "  sea"]))
    sequences = [Sequence(0, c, np.array([1]), np.arange(c + 1)) for c in range(3)]
    found = [scoring.ChoiceScore(value, value == -3.0) for value in (-3.0, -4.5, -3.0)]
    assert scoring.result(item, sequences, found) == {
        "line": 1,
        "logprobs": [-3.0, -4.5, -3.0],
        "tokens": [1, 2, 3],
        "greedy": [True, False, True],
        "best": 0,
        "best_per_char": 1,
    }


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_result_refuses_log_probabilities_that_are_not_finite(value):
    (item,) = items_of(("the", [" sea", " river"]))
    with pytest.raises(ScoreError, match=r"line 1: choices\[1\] got the log-probability"):
        scoring.result(item, [], [scoring.ChoiceScore(-1.0, False), scoring.ChoiceScore(value, False)])


def test_differences_counts_equal_answers():
    items = items_of(("a", ["b", "c"]), ("a", ["b", "c", "d"]))
    one = [scoring.ChoiceScore(v, False) for v in (-1.0, -2.0, -3.0, -2.0, -1.0)]
    two = [scoring.ChoiceScore(v, False) for v in (-1.5, -2.0, -3.0, -0.5, -1.0)]
    assert scoring.differences(items, one, one) == (2, 0.0)
    assert scoring.differences(items, one, two) == (1, 1.5)
