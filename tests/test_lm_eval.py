"""`--model radix` of lm-evaluation-harness against the harness' own `hf`, and against single sequences in float64."""

import logging
import os
import random
from types import SimpleNamespace

import pytest
import torch

from helpers.batches import trie_size
from helpers.language_models import TEXT, tiny_model, tiny_tokenizer

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval with its dependencies is not installed", exc_type=ImportError)
huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
radix = pytest.importorskip("radix_ops.lm_eval", exc_type=ImportError)

from lm_eval.api.model import CachingLM  # noqa: E402


def make(cls, model=None, adds_bos=True, **options):
    tokenizer = tiny_tokenizer(adds_bos)
    return cls(pretrained=tiny_model() if model is None else model, tokenizer=tokenizer, **options)


def make_both(model=None, **options):
    model = tiny_model() if model is None else model
    return make(huggingface.HFLM, model, **options), make(radix.RadixLM, model, **options)


def random_requests(seed: int, count: int, longest: int = 60) -> list:
    """Draw requests of three shared prefixes and overlapping continuations of 1 to 5 tokens; a third come twice."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(2, 340) for _ in range(size)] for size in (1, longest // 3, longest)]
    requests = []
    for number in range(count):
        context = rng.choice(prefixes) + [rng.randrange(2, 12) for _ in range(rng.randint(0, 2))]
        requests.append(((f"context {number}", ""), context, [rng.randrange(2, 6) for _ in range(rng.randint(1, 5))]))
    return requests + requests[::3]


def alone(model, request, max_length: int) -> tuple[float, bool]:
    """Run one plain forward of one sequence in float64, cut on its left to max_length tokens of input."""
    _, context, continuation = request
    ids = torch.tensor(context + continuation)[-(max_length + 1) :]
    with torch.no_grad():
        logprobs = model(ids[None, :-1]).logits[0].double().log_softmax(-1)[-len(continuation) :]
    targets = ids[-len(continuation) :]
    return logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all())


def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[-count:]


def check_answers(answers, wanted, abs=1e-4):
    assert [flag for _, flag in answers] == [flag for _, flag in wanted]
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in wanted], abs=abs)


@pytest.mark.parametrize("batch_size", [1, 3, "auto:2"])
@pytest.mark.parametrize("max_length", [20, 128])
def test_requests_alone_and_of_hf(batch_size, max_length):
    model, requests = tiny_model().double(), random_requests(1, 30)
    requests += [(key, context, greedy(model, context, 3)) for key, context, _ in requests[:5]]
    plain, folded = make_both(model, batch_size=3, max_length=max_length)
    folded = make(radix.RadixLM, model, batch_size=batch_size, max_length=max_length)
    answers = folded._loglikelihood_tokens(requests, disable_tqdm=True)
    check_answers(answers, [alone(model, request, max_length) for request in requests], abs=1e-9)
    check_answers(answers, plain._loglikelihood_tokens(requests, disable_tqdm=True), abs=1e-9)
    assert max_length == 20 or sum(flag for _, flag in answers) >= 5


def test_rows_are_computed_once():
    requests = random_requests(2, 60, longest=90)
    inputs = [context + continuation[:-1] for _, context, continuation in requests]
    folded = make(radix.RadixLM, batch_size="auto")
    folded._loglikelihood_tokens(requests, disable_tqdm=True)
    assert folded.radix_stats.tokens == sum(map(len, inputs))
    assert folded.radix_stats.rows == trie_size(inputs)
    assert folded.radix_stats.folded == 1


def test_each_call_tells_what_its_requests_shared(caplog):
    logger = logging.getLogger("lm_eval.models.radix")
    logger.addHandler(caplog.handler)
    try:
        logger.setLevel(logging.INFO)
        folded = make(radix.RadixLM)
        for number, requests in enumerate(
            [random_requests(2, 60, longest=90), [(None, [7, 8, 9], [1]), (None, [3], [1])]]
        ):
            inputs = [context + continuation[:-1] for _, context, continuation in requests]
            tokens, rows = sum(map(len, inputs)), trie_size(inputs)
            folded._loglikelihood_tokens(requests, disable_tqdm=True)
            said = f"radix: {tokens:,} tokens as {rows:,} rows, {tokens / rows:.2f} tokens a row"
            said += ": folding can't pay here, and --model hf takes about as long" if number else ""
            assert caplog.messages[-1] == said
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("batch_size", "found", "allowed"), [("auto", 120, 120), (1, 10**6, 128), (2, 120, 2 * 96), (2, 200, 200)]
)
def test_batches_have_as_many_rows_as_the_batch_size_allows(monkeypatch, batch_size, found, allowed):
    monkeypatch.setattr(radix, "find_budget", lambda *args: SimpleNamespace(max_rows=found))
    requests = [*random_requests(2, 60, longest=90), (("", ""), [5] * 90, [6] * 7)]
    folded, seen = make(radix.RadixLM, batch_size=batch_size), []
    run = folded._rows.run
    folded._rows.run = lambda batch: seen.append(batch.num_rows) or run(batch)
    folded._loglikelihood_tokens(requests, disable_tqdm=True)
    assert len(seen) > 1
    assert allowed / 2 < max(seen) <= allowed


@pytest.mark.parametrize("max_length", [16, 128])
def test_rolling_windows_are_planned_together(max_length):
    plain, folded = make_both(batch_size=2, max_length=max_length)
    requests = [SimpleNamespace(args=(text,)) for text in ("the river " * 60, TEXT[0], "sea", "", "the river " * 59)]
    wanted = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    score, calls = folded._loglikelihood_tokens, []
    folded._loglikelihood_tokens = lambda requests, **options: calls.append(requests) or score(requests, **options)
    assert folded.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, abs=1e-3)
    assert len(calls) == 1
    assert folded.batch_size == 2
    assert folded.radix_stats.rows < folded.radix_stats.tokens


def test_one_text_cut_at_several_places():
    model = tiny_model().double()
    tokens = [5, 6, 7, 8, 9]
    requests = [(("", ""), tokens[:cut], tokens[cut:]) for cut in range(1, 5)]
    answers = make(radix.RadixLM, model, batch_size=8)._loglikelihood_tokens(requests, disable_tqdm=True)
    check_answers(answers, [alone(model, request, 128) for request in requests], abs=1e-9)


def test_equal_logits_are_greedy_as_hf_has_it():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    requests = [(("", ""), [7, 8], [token]) for token in (0, 1, 339)]
    plain, folded = make_both(model, batch_size=4)
    answers = folded._loglikelihood_tokens(requests, disable_tqdm=True)
    assert answers == plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [flag for _, flag in answers].count(True) == 1


@pytest.mark.parametrize(
    "options", [{}, {"softmax_dtype": "float32"}, {"mixed_precision_dtype": "bfloat16"}], ids=["half", "float", "mixed"]
)
def test_half_precision_rounds_as_hf_does(options):
    model = tiny_model() if "mixed_precision_dtype" in options else tiny_model().to(torch.bfloat16)
    plain, folded = make_both(model, batch_size=4, **options)
    requests = random_requests(3, 40)
    wanted = torch.tensor([value for value, _ in plain._loglikelihood_tokens(requests, disable_tqdm=True)])
    answers = torch.tensor([value for value, _ in folded._loglikelihood_tokens(requests, disable_tqdm=True)])
    exact = torch.tensor([alone(model.float(), request, 128)[0] for request in requests])
    assert (answers - exact).abs().mean() <= 1.5 * (wanted - exact).abs().mean()
    is_rounded = bool((answers == answers.to(torch.bfloat16)).all())
    assert is_rounded == bool((wanted == wanted.to(torch.bfloat16)).all()) == ("softmax_dtype" not in options)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "Gemma2",
            {
                "sliding_window": 8,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 3.0,
                "attn_implementation": "eager",  # transformers 5.2 takes sdpa, which ignores the cap
            },
        ),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Mixtral", {"num_local_experts": 4}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("GptOss", {"num_local_experts": 4, "sliding_window": 8}),
    ],
)
def test_heads_and_attention_of_their_own(kind, changes):
    model = tiny_model(kind, pad_token_id=1, **changes)
    plain, folded = make_both(model, batch_size=3)
    requests, positions, run = random_requests(4, 30), [], folded._rows.run
    folded._rows.run = lambda batch: positions.append(batch.num_sequences * batch.max_seqlen_k) or run(batch)
    answers = folded._loglikelihood_tokens(requests, disable_tqdm=True)
    check_answers(answers, plain._loglikelihood_tokens(requests, disable_tqdm=True))
    assert folded.radix_stats.rows < folded.radix_stats.tokens / 2
    # Where attention runs on the padded batch, that is no larger than three sequences of 128 tokens.
    assert (max(positions) <= 3 * 128) == (kind in ("Gemma2", "GptOss"))


def test_lora_is_applied():
    peft = pytest.importorskip("peft")
    base = tiny_model()
    requests = random_requests(5, 20)
    before = make(huggingface.HFLM, base, batch_size=4)._loglikelihood_tokens(requests, disable_tqdm=True)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    plain, folded = make_both(model, batch_size=4)
    answers = folded._loglikelihood_tokens(requests, disable_tqdm=True)
    check_answers(answers, plain._loglikelihood_tokens(requests, disable_tqdm=True))
    assert answers != before


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM gives other logits .* virtual tokens .* --model hf"):
        make(radix.RadixLM, peft.get_peft_model(tiny_model(), config))


def test_what_cannot_fold_is_refused_on_construction():
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=340, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"MambaForCausalLM .*'mamba'.*--model hf evaluates it"):
        make(radix.RadixLM, mamba)
    config = transformers.T5Config(vocab_size=340, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="evaluates causal models; the backend is 'seq2seq'"):
        make(radix.RadixLM, transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match='batch_size must be at least 1 or "auto", got 0'):
        make(radix.RadixLM, batch_size=0)
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="lm_head has a hook"):
        make(radix.RadixLM, model)
    model = tiny_model()
    model.forward = model.forward
    with pytest.raises(ValueError, match="the forward of the model was replaced"):
        make(radix.RadixLM, model)


def test_a_model_that_changed_is_refused():
    folded = make(radix.RadixLM)
    folded.model.model.layers[1].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError, match=r"can't be folded any more: layers.1 has a hook"):
        folded._loglikelihood_tokens(random_requests(6, 3), disable_tqdm=True)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [5], r"request 1 \('c', 'd'\) has a context of no tokens"),
        ([5], [], r"request 1 .* has a continuation of no tokens"),
        ([5], [5] * 17, "request 1 .* has a continuation of 17 tokens, and max_length is 16"),
        ([340], [5], "request 1 .* holds token 340, and the model embeds 340"),
    ],
)
def test_requests_that_cannot_be_scored_are_named_first(context, continuation, message):
    folded = make(radix.RadixLM, max_length=16)
    with pytest.raises(ValueError, match=message):
        folded._loglikelihood_tokens([(("a", "b"), [1], [2]), (("c", "d"), context, continuation)])
    assert folded.radix_stats.rows == 0
    assert folded._loglikelihood_tokens([]) == []


def test_answers_are_cached_batch_by_batch(tmp_path):
    pytest.importorskip("sqlitedict")
    contexts = [f"{number} {TEXT[1]}" for number in range(6)]
    requests = [SimpleNamespace(args=(context, choice)) for context in contexts for choice in (" the sea", " no")]
    folded = make(radix.RadixLM, batch_size=1, max_length=60)
    wanted = make(huggingface.HFLM, folded.model, max_length=60).loglikelihood(requests, disable_tqdm=True)
    cached = CachingLM(folded, str(tmp_path / "answers.db"))
    score, left = folded._score, [2]

    def fail_at_the_third(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return score(*args)

    folded._score = fail_at_the_third
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(requests)
    known = len(cached.dbdict)
    assert 0 < known < len(requests)

    before, folded._score = folded.radix_stats.tokens, score
    check_answers(cached.loglikelihood(requests), wanted)
    assert len(cached.dbdict) == len(requests)
    assert folded.radix_stats.tokens == len(requests) * before / known
    folded.radix_stats.rows = 0
    check_answers(cached.loglikelihood(requests), wanted)
    assert folded.radix_stats.rows == 0


def test_batches_shrink_where_memory_ends():
    model, requests = tiny_model(), random_requests(8, 40)
    folded, seen = make(radix.RadixLM, model, batch_size="auto"), []
    run = folded._rows.run

    def run_small(batch):
        seen.append(batch.num_rows)
        if batch.num_rows > 90:
            raise torch.OutOfMemoryError
        return run(batch)

    folded._rows.run = run_small
    answers = folded._loglikelihood_tokens(requests, disable_tqdm=True)
    check_answers(answers, [alone(model, request, 128) for request in requests])
    assert seen[0] > 90
    assert sum(rows > 90 for rows in seen) <= 3
    folded._rows.run = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        folded._loglikelihood_tokens(requests, disable_tqdm=True)
