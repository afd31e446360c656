"""Trainers of TRL and transformers, folded against the same trainers as they are."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import trie_size
from tokenizers import Tokenizer, models, pre_tokenizers

from radix_ops import hf, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL counts its uses there
trl = pytest.importorskip("trl", reason="TRL is an extra, and needs Python 3.11")
import datasets  # noqa: E402
import peft  # noqa: E402

datasets.disable_progress_bars()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]
WORDS = [f"w{i}" for i in range(61)]
GROUP = 4


def tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved tiny models: a trainer loads its reference model from where the model came from."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    for kind, head, further in (
        ("Qwen3", "ForCausalLM", {}), ("Qwen3", "ForSequenceClassification", {}), ("Qwen3Moe", "ForCausalLM", experts)
    ):  # fmt: skip
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes, **further)
        getattr(transformers, kind + head)(config).save_pretrained(folder / (kind + head))
    return folder


def load(folder, name="Qwen3ForCausalLM"):
    return getattr(transformers, name).from_pretrained(folder / name)


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def preferences(num_prompts=12):
    rng = random.Random(1)
    rows = []
    for _ in range(num_prompts):
        prompt = sentence(rng, 14, 20)
        rows += [
            {"prompt": prompt, "chosen": " " + sentence(rng, 4, 8), "rejected": " " + sentence(rng, 4, 8)}
            for _ in range(2)
        ]
    return datasets.Dataset.from_list(rows)


OPTIONS = {
    "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "save_strategy": "no",
    "use_cpu": True, "bf16": False, "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "seed": 3,
}  # fmt: skip


def dpo(folder, tmp_path, model=None, **changes):
    options = {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    return trl.DPOTrainer(
        model or load(folder),
        args=trl.DPOConfig(str(tmp_path), **OPTIONS | changes),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        **options,
    )


def reward(folder, tmp_path, **changes):
    return trl.RewardTrainer(
        load(folder, "Qwen3ForSequenceClassification"),
        args=trl.RewardConfig(str(tmp_path), **OPTIONS | changes),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


def sft(folder, tmp_path, **changes):
    rows = preferences().rename_column("chosen", "completion").remove_columns("rejected")
    return trl.SFTTrainer(
        load(folder),
        args=trl.SFTConfig(str(tmp_path), **OPTIONS | {"shuffle_dataset": False} | changes),
        train_dataset=rows,
        processing_class=tokenizer(),
    )


class Rollouts:
    """GROUP answers to each prompt, from a file: both runs train on the same, whatever the models would say."""

    def __init__(self, tmp_path):
        rng = random.Random(2)
        answers = {
            sentence(rng, 12, 20): [
                [rng.randrange(3, 64) for _ in range(rng.randint(3, 8))] + [1] for _ in range(GROUP)
            ]
            for _ in range(16)
        }
        (tmp_path / "rollouts.json").write_text(json.dumps(answers))
        self.answers = json.loads((tmp_path / "rollouts.json").read_text())
        self.dataset = datasets.Dataset.from_list([{"prompt": prompt} for prompt in self.answers])

    def __call__(self, prompts, trainer):
        places = [prompts[:i].count(prompt) % GROUP for i, prompt in enumerate(prompts)]
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        answers = [self.answers[prompt][place] for prompt, place in zip(prompts, places, strict=True)]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}


def count_of_words(completions, **kwargs):
    return [float(sum(word in text.split() for word in WORDS[:25])) for text in completions]


GRPO = {"num_generations": GROUP, "max_completion_length": 9, "per_device_train_batch_size": 8, "beta": 0.1}


def grpo(folder, tmp_path, kind="GRPO", replays=True, **changes):
    transformers.set_seed(5)
    rollouts = Rollouts(tmp_path)
    return getattr(trl, f"{kind}Trainer")(
        load(folder),
        reward_funcs=count_of_words,
        args=getattr(trl, f"{kind}Config")(str(tmp_path), **OPTIONS | GRPO | changes),
        train_dataset=rollouts.dataset,
        processing_class=tokenizer(),
        **({"rollout_func": rollouts} if replays else {}),
    )


def language_model(folder, tmp_path, **changes):
    tokenize = tokenizer()
    rows = [tokenize(row["prompt"] + row["chosen"]) for row in preferences()]
    rows = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]
    further = {key: changes.pop(key) for key in ("compute_loss_func", "eval_dataset") if key in changes}
    return transformers.Trainer(
        load(folder),
        transformers.TrainingArguments(str(tmp_path), **OPTIONS | changes),
        transformers.DataCollatorForLanguageModeling(tokenize, mlm=False),
        train_dataset=datasets.Dataset.from_list(rows),
        **further,
    )


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], **options)


REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
RUNS = {
    "dpo": (dpo, REENTRANT),
    "dpo, lora": (dpo, {"peft_config": lora()}),
    "grpo": (grpo, {"gradient_accumulation_steps": 2, "gradient_checkpointing": False}),
    "grpo, old log-probabilities": (grpo, {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}),
    "grpo, its own answers": (grpo, {"replays": False}),
    "reward": (reward, {}),
    "sft": (sft, {}),
    "sft, padding-free": (sft, {"padding_free": True, "max_length": None}),
    "sft, packed": (sft, {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}),
    "trainer": (language_model, {"gradient_accumulation_steps": 2}),
    "trainer, smoothed": (language_model, {"label_smoothing_factor": 0.1}),
}


def train(trainer):
    """(what it logged, how each parameter changed)."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    transformers.set_seed(5)
    trainer.train()
    logged = [
        {key: x for key, x in entry.items() if not key.endswith(("time", "second"))}
        for entry in trainer.state.log_history[:-1]
    ]
    return logged, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


def assert_same_run(got, want) -> None:
    for one, other in zip(got[0], want[0], strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-6)
    trained = {name for name, change in want[1].items() if change.any()}
    assert trained == {name for name, change in got[1].items() if change.any()}
    assert len(trained) > 10
    for name in trained:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=1e-3, atol=2e-6)


@pytest.fixture
def quiet():
    """Nothing of ours to say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="radix_ops")
        yield


@pytest.mark.parametrize("run", RUNS)
def test_folded_run_is_the_plain_run(folder, tmp_path, run, quiet):
    make, changes = RUNS[run]
    plain, trainer = make(folder, tmp_path, **changes), make(folder, tmp_path, **changes)
    if make is grpo:
        trainers.keep_groups_together(plain)
    trainers.enable(trainer, threshold=1.0)
    forwards = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: forwards.append(0) or compute_loss(*args, **kwargs)
    assert_same_run(train(trainer), train(plain))
    stats = trainer.model.radix_stats
    assert stats.folded >= len(forwards) > 0
    if changes.get("replays", True):
        assert (stats.skipped, stats.rows < stats.tokens) == (0, True)
    if getattr(trainer, "ref_model", None) is not None:
        stats = trainer.ref_model.radix_stats
        assert stats.folded > 0
        assert (stats.skipped, stats.rows < stats.tokens) == (0, True)


def test_fifty_steps_stay_as_close_as_other_padding_does(folder, tmp_path):
    """Rounding is all that folding changes, and it adds up as that of padding to other lengths does."""

    def run(folds, **changes):
        trainer = grpo(folder, tmp_path, max_steps=50, gradient_checkpointing=False, **changes)
        trainers.keep_groups_together(trainer)
        if folds:
            trainers.enable(trainer, threshold=1.0)
        logged, changed = train(trainer)
        assert not folds or trainer.model.radix_stats.folded == 50
        return torch.tensor([entry["loss"] for entry in logged]), torch.cat([x.flatten() for x in changed.values()])

    losses, changed = run(False)
    padded, folded = run(False, pad_to_multiple_of=8), run(True)
    assert losses.std() > 1e-2
    for want, by_padding, by_folding in zip((losses, changed), padded, folded, strict=True):
        assert 0 < (by_padding - want).norm() < 1e-4 * want.norm()
        assert (by_folding - want).norm() <= 3 * (by_padding - want).norm()


def rows_of(batch) -> list[list[int]]:
    """The tokens of a micro-batch's rows."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def micro_batches(trainer) -> list[dict]:
    """Those that it trains on."""
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs) or compute_loss(model, inputs, *args, **kwargs)
    )
    transformers.set_seed(5)
    trainer.train()
    return seen


@pytest.mark.parametrize(("kind", "rows", "steps"), [("GRPO", 4, 4), ("GRPO", 6, 2), ("RLOO", 8, 2)])
def test_micro_batches_hold_whole_groups(folder, tmp_path, kind, rows, steps, quiet):
    options = {
        "kind": kind, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": 2,
        "replays": kind == "GRPO", "beta": 0.0, "learning_rate": 0.0,
    }  # fmt: skip
    shuffled = micro_batches(grpo(folder, tmp_path, **options))
    trainer = trainers.enable(grpo(folder, tmp_path, **options), threshold=1.0)
    grouped = micro_batches(trainer)
    assert len(grouped) == len(shuffled) == 2 * steps

    # The same rows with the same advantages, as many in each micro-batch, in an order that is no longer the data set's.
    for begin in (0, steps):
        pairs = [
            sorted(
                (row, float(a))
                for b in part[begin : begin + steps]
                for row, a in zip(rows_of(b), b["advantages"], strict=True)
            )
            for part in (grouped, shuffled)
        ]
        assert pairs[0] == pairs[1]
    assert all(len(rows_of(batch)) == rows for batch in grouped)

    def prompts(batch):
        return [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]

    order = [prompt for batch in grouped[:steps] for prompt in prompts(batch)]
    assert all(order[i] == order[i + 1] for i in range(len(order) - 1) if (i + 1) % GROUP)
    assert all(len(set(prompts(batch))) == -(-rows // GROUP) for batch in grouped)

    # Each prompt once, so the rows of a micro-batch are those of its prompts and those that answers add.
    ratios = []
    for part in (grouped, shuffled):
        sequences = [rows_of(batch) for batch in part]
        ratios.append(sum(map(trie_size, sequences)) / sum(len(row) for batch in sequences for row in batch))
    stats = trainer.model.radix_stats
    if kind == "GRPO":
        assert stats.rows == sum(trie_size(rows_of(batch)) for batch in grouped)
        assert stats.rows / stats.tokens == pytest.approx(ratios[0])
    assert ratios[0] < 0.6
    assert ratios[0] < ratios[1] - 0.05


def test_groups_of_batches_that_go_on_are_shuffled(folder, tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 0.0, "max_steps": 4}
    trainer = grpo(folder, tmp_path, beta=0.0, **options)
    plain = grpo(folder, tmp_path, beta=0.0, **options)
    generated = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        generated.append([x["prompt"] for x in inputs]) or score(inputs)
    )
    seen = micro_batches(trainers.keep_groups_together(trainers.keep_groups_together(trainer)))
    trained = [trainer.processing_class.decode(rows_of(batch)[0]) for batch in seen]
    orders = []
    for step in range(4):
        prompts = list(dict.fromkeys(generated[step]))
        orders.append(
            [next(i for i, p in enumerate(prompts) if text.startswith(p)) for text in trained[4 * step : 4 * step + 4]]
        )
        assert sorted(orders[-1]) == [0, 1, 2, 3]
    assert len(set(map(tuple, orders))) > 1
    assert type(plain._prepare_inputs) is not type(trainer._prepare_inputs)


def test_model_enabled_before_its_trainer_is_made(folder, tmp_path, quiet):
    """TRL replaces the model's forward then; it precomputes reference log-probabilities before anyone sees it."""
    options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    model = hf.enable(load(folder), threshold=1.0)
    trainer = dpo(folder, tmp_path / "folded", model, **options)
    num_batches = len(preferences()) // 4
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (num_batches - 1, 1)
    assert_same_run(train(trainer), train(dpo(folder, tmp_path / "plain", **options)))
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (num_batches + 1, 1)
    hf.disable(model)


def test_evaluation_checkpoints_and_resuming(folder, tmp_path, quiet):
    options = {
        "eval_dataset": preferences(3), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    want = train(dpo(folder, tmp_path / "plain", **options))
    trainer = trainers.enable(dpo(folder, tmp_path / "folded", **options), threshold=1.0)
    got = train(trainer)
    assert_same_run(got, want)
    assert any("eval_loss" in entry for entry in got[0])

    resumed = trainers.enable(dpo(folder, tmp_path / "resumed", **options), threshold=1.0)
    transformers.set_seed(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "folded" / "checkpoint-1"))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded" / "checkpoint-2")
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter)
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=0, atol=0)
    assert resumed.model.radix_stats.folded == 1 + 2
    assert not hasattr(saved, "radix_stats")


def test_bf16_autocast(folder, tmp_path, quiet):
    want = train(dpo(folder, tmp_path, bf16=True))
    trainer = trainers.enable(dpo(folder, tmp_path, bf16=True), threshold=1.0)
    got = train(trainer)
    assert [entry["loss"] for entry in got[0]] == pytest.approx([entry["loss"] for entry in want[0]], abs=2e-2)
    assert (trainer.model.radix_stats.folded, trainer.ref_model.radix_stats.folded) == (2, 2)


def test_dropout_of_adapters_runs_unfolded(folder, tmp_path):
    options = {"peft_config": lora(lora_dropout=0.5)}
    trainer = trainers.enable(dpo(folder, tmp_path, disable_dropout=False, **options), threshold=1.0)
    with pytest.warns(UserWarning, match="lora_dropout.default drops out"):
        trainer.train()
    assert trainer.model.radix_stats.folded == 0
    trainer = trainers.enable(dpo(folder, tmp_path, **options), threshold=1.0)  # whose config disables dropout
    trainer.train()
    assert trainer.model.radix_stats.skipped == 0


def test_load_balancing_of_experts_counts_tokens_and_not_rows(folder, tmp_path):
    """So batches whose router logits are asked for run unfolded, and without that loss they fold."""

    def run(folds, **options):
        name = folder / "Qwen3MoeForCausalLM"
        trainer = dpo(folder, tmp_path, transformers.AutoModelForCausalLM.from_pretrained(name), **options)
        if folds:
            trainers.enable(trainer, threshold=1.0)
        return trainer, train(trainer)

    with pytest.warns(UserWarning, match="radix_ops: a batch runs unfolded because output_router_logits was given"):
        trainer, got = run(True)
    want = run(False)[1]
    assert "aux_loss" in want[0][0]
    assert_same_run(got, want)
    assert (trainer.model.radix_stats.folded, trainer.ref_model.radix_stats.folded) == (0, 2)
    trainer, got = run(True, router_aux_loss_coef=0.0)
    assert_same_run(got, run(False, router_aux_loss_coef=0.0)[1])
    assert (trainer.model.radix_stats.folded, trainer.model.radix_stats.skipped) == (2, 0)


def test_data_set_in_groups(folder, tmp_path):
    class Grouped(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return trainers.GroupSampler([tuple(ids) for ids in self.train_dataset["prompt_ids"]], self.args.seed)

    trainer = dpo(folder, tmp_path)
    trainer.__class__ = Grouped
    trainers.enable(trainer, threshold=1.0)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs["input_ids"]) or compute_loss(model, inputs, *args, **kwargs)
    )
    trainer.train()
    for ids in seen:  # 4 pairs, two of each of two prompts, chosen before rejected
        assert len({tuple(row[:14].tolist()) for row in ids}) == 2
    assert trainer.model.radix_stats.rows < 0.55 * trainer.model.radix_stats.tokens


@pytest.mark.parametrize("name", ["train_dpo", "train_grpo", "train_reward"])
def test_example(name, tmp_path, monkeypatch, capsys, quiet):
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setattr(sys, "argv", [name, "--steps", "5"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    report = capsys.readouterr().out
    rows, tokens = map(int, re.search(r"^model: (\d+) rows for (\d+) tokens", report, re.MULTILINE).groups())
    assert 0 < rows < 0.7 * tokens
    assert re.search(r"\d at first, \d", report)
