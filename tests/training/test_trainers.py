"""Trainers of TRL and transformers, folded against the same trainers as they are."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

from helpers.hf_models import error
from helpers.trl_runs import (
    MARKS,
    assert_same_run,
    dpo,
    grpo,
    language_model,
    load,
    lora,
    no_warnings_of_ours,  # noqa: F401
    preferences,
    reward,
    saved_models,  # noqa: F401
    sft,
    train,
)
from radix_ops import hf, trainers

pytestmark = MARKS
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


def test_fifty_steps_stay_as_close_to_float64_as_those_of_the_plain_run(folder, tmp_path):
    """Folding changes nothing but rounding, which adds up as that of the plain run does."""

    def run(folds, exact=False):
        trainer = grpo(folder, tmp_path, max_steps=50, gradient_checkpointing=False)
        trainers.keep_groups_together(trainer)
        if exact:
            trainer.model.double()
            trainer.ref_model.double()
        if folds:
            trainers.enable(trainer, threshold=1.0)
        logged, changed = train(trainer)
        assert not folds or trainer.model.radix_stats.folded == 50
        return torch.tensor([entry["loss"] for entry in logged]), torch.cat([x.flatten() for x in changed.values()])

    exact, plain, folded = run(False, exact=True), run(False), run(True)
    assert exact[1].dtype == torch.float64
    assert exact[0].std() > 1e-2
    for want, theirs, ours in zip(exact, plain, folded, strict=True):
        assert error(theirs, want.double()) < 1e-4
        assert error(ours, want.double()) <= 3 * error(theirs, want.double()) + torch.finfo(torch.float32).eps


def test_model_enabled_before_its_trainer_is_made(folder, tmp_path, quiet):
    """TRL replaces the model's forward then; it precomputes reference log-probabilities before anyone sees it."""
    options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    model = hf.enable(load(folder), threshold=1.0)
    trainer = dpo(folder, tmp_path / "folded", model, **options)
    num_batches = len(preferences()) // 4
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (num_batches - 1, 1)
    got, want = train(trainer), train(dpo(folder, tmp_path / "plain", **options))
    for logged, _ in (got, want):
        # References come from batches of other rows, so rewards before the first step are 0 up to rounding, which
        # decides which is the larger.
        assert abs(logged[0]["rewards/margins"]) < 1e-6
        del logged[0]["rewards/accuracies"]
    assert_same_run(got, want)
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
    trainer = trainers.enable(dpo(folder, tmp_path, **options), threshold=1.0)  # its config disables dropout
    trainer.train()
    assert trainer.model.radix_stats.skipped == 0


def test_load_balancing_of_experts_counts_tokens_and_not_rows(folder, tmp_path):
    """No batch folds, nor one of the reference, and without that loss both do.

    Before the first step model and reference are equal, and their rewards are 0 where both are computed one way.
    """

    def run(folds, **options):
        name = folder / "Qwen3MoeForCausalLM"
        trainer = dpo(folder, tmp_path, transformers.AutoModelForCausalLM.from_pretrained(name), **options)
        if folds:
            trainers.enable(trainer, threshold=1.0, layout="compact")
        return trainer, train(trainer)

    with pytest.warns(UserWarning, match="radix_ops: a batch runs unfolded because output_router_logits was given"):
        trainer, got = run(True)
    want = run(False)[1]
    assert "aux_loss" in want[0][0]
    assert_same_run(got, want)
    for model in (trainer.model, trainer.ref_model):
        assert (model.radix_stats.folded, model.radix_stats.skipped) == (0, 2)
    trainer, got = run(True, router_aux_loss_coef=0.0)
    assert_same_run(got, run(False, router_aux_loss_coef=0.0)[1])
    assert (trainer.model.radix_stats.folded, trainer.model.radix_stats.skipped) == (2, 0)


@pytest.mark.parametrize("name", ["train_dpo", "train_grpo", "train_reward"])
def test_example(name, tmp_path, monkeypatch, capsys, quiet):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setattr(sys, "argv", [name, "--steps", "5"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    report = capsys.readouterr().out
    rows, tokens = map(int, re.search(r"^model: (\d+) rows for (\d+) tokens", report, re.MULTILINE).groups())
    assert 0 < rows < 0.7 * tokens
    assert re.search(r"\d at first, \d", report)
