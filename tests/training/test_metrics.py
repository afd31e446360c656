"""Every number that the other trainers of TRL log, folded against the same trainers as they are."""

from __future__ import annotations

import contextlib
import importlib
import os
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.trl_runs import (
    MARKS,
    OPTIONS,
    assert_same_run,
    count_of_words,
    language_model,
    load,
    saved_models,  # noqa: F401
    sentence,
    tokenizer,
    train,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is an extra, and needs Python 3.11")
import datasets  # noqa: E402

from radix_ops import hf, trainers  # noqa: E402

pytestmark = MARKS


def rows(kind: str) -> datasets.Dataset:
    """Return examples whose prompts come twice and whose lengths differ, so that batches share and pad."""
    rng = random.Random(3)
    found = []
    for i in range(8):
        prompt = sentence(rng, 6, 12)
        for _ in range(2):
            short, long = " " + sentence(rng, 2, 4), " " + sentence(rng, 6, 9)
            answers = {
                "prompts": {},
                "labelled": {"completion": long if i % 2 else short, "label": i % 3 > 0},
                "pairs": {"chosen": short, "rejected": long},
                "triples": {"chosen": short, "rejected": long, "reference": " " + sentence(rng, 3, 5)},
                "hints": {"privileged_context": sentence(rng, 2, 5)},
                "messages": {},
            }[kind]
            row = {"prompt": prompt, **answers}
            if kind == "messages":
                turns = (("user", prompt), ("assistant", short if i % 2 else long))
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            found.append(row)
    return datasets.Dataset.from_list(found)


def is_long(completions, **kwargs):
    """A2PO wants rewards of 0 and 1."""
    return [float(len(text.split()) > 8) for text in completions]


GENERATES = {"max_completion_length": 20}
ANSWERS = GENERATES | {"num_generations": 2}
MESSAGES = {"max_length": 64, "lmbda": 0.0}
# By trainer: the models and functions that it takes beside its model, the columns that it trains on, its options.
EQUAL = {
    "trl.KTO": ({"ref_model"}, "labelled", {}),
    "trl.RLOO": ({"reward_funcs"}, "prompts", ANSWERS | {"beta": 0.1}),
    "trl.Distillation": ({"teacher_model"}, "prompts", GENERATES),
    "trl.experimental.a2po.A2PO": ({"reward_funcs"}, "prompts", GENERATES | {"num_value_samples": 2}),
    "trl.experimental.bema_for_ref_model.DPO": ({"ref_model"}, "pairs", {}),
    "trl.experimental.gkd.GKD": ({"teacher_model"}, "messages", MESSAGES | {"lmbda": 1.0, "max_new_tokens": 20}),
    "trl.experimental.gmpo.GMPO": ({"reward_funcs"}, "prompts", ANSWERS | {"beta": 0.1}),
    "trl.experimental.gold.GOLD": ({"teacher_model"}, "messages", MESSAGES | GENERATES),
    "trl.experimental.iw_opd.IWOPD": ({"teacher_model"}, "messages", {"max_length": 64} | GENERATES),
    "trl.experimental.sdft.SDFT": ((), "hints", ANSWERS | {"distillation_topk": 8}),
    "trl.experimental.sdpo.SDPO": ({"reward_funcs"}, "hints", ANSWERS),
    "trl.experimental.tpo.TPO": ((), "triples", {}),
}
# By trainer the same, and the numbers that it makes of logits at padding.
READ_PADDING = {
    "trl.experimental.cpo.CPO": ((), "pairs", {}, {"logits/chosen", "logits/rejected"}),
    "trl.experimental.orpo.ORPO": ((), "pairs", {}, {"logits/chosen", "logits/rejected"}),
    "trl.experimental.online_dpo.OnlineDPO": (
        {"reward_funcs", "ref_model"},
        "prompts",
        {"max_new_tokens": 20},
        {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"},
    ),
}
# Batches of these trainers never fold, since they hand the decoder stack arguments of the head.
UNFOLDED = {"trl.Distillation": "logits_to_keep was given"}


def byte_tokenizer():
    """Return a tokenizer of one token a letter: GOLD takes tokenizers of bytes alone."""
    names = ["<pad>", "<eos>", "<unk>", *sorted({*"w0123456789", "\u0120"})]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def other_model(folder):
    model = load(folder)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make(folder, tmp_path, name, further, columns, options):
    place, name = name.rsplit(".", 1)
    module = importlib.import_module(place)
    tokenize = byte_tokenizer() if name == "GOLD" else tokenizer()
    tokenize.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenize.padding_side = "left"
    tokenize.save_pretrained(folder / "Qwen3ForCausalLM")  # where trainers look for the teacher's
    given = {"reward_funcs": is_long if name == "A2PO" else count_of_words} | {
        key: other_model(folder) for key in ("teacher_model", "ref_model")
    }
    transformers.set_seed(5)
    return getattr(module, f"{name}Trainer")(
        model=load(folder),
        args=getattr(module, f"{name}Config", trl.DPOConfig)(
            str(tmp_path), **OPTIONS | {"max_steps": 1, "gradient_checkpointing": False} | options
        ),
        train_dataset=rows(columns),
        processing_class=tokenize,
        **{key: given[key] for key in further},
    )


def watch_padding(trainer) -> list[bool]:
    """Return a list that will say of each batch that the model is trained on whether it has padding."""
    seen = []

    def look(module, args, given):
        if torch.is_grad_enabled():
            seen.append(bool((given["attention_mask"] == 0).any()))

    trainer.model.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.filterwarnings("error:radix_ops")
@pytest.mark.parametrize("name", EQUAL)
def test_every_number_is_that_of_the_plain_trainer(folder, tmp_path, name):
    plain, trainer = (make(folder, tmp_path, name, *EQUAL[name]) for _ in range(2))
    if trainers._shuffles_rollouts(plain):
        trainers.keep_groups_together(plain)
    is_padded = watch_padding(plain)
    trainers.enable(trainer, threshold=1.0)
    if "teacher_model" in EQUAL[name][0]:
        hf.enable(trainer.teacher_model, threshold=1.0)
    with pytest.warns(UserWarning, match=UNFOLDED[name]) if name in UNFOLDED else contextlib.nullcontext():
        got = train(trainer)
    # Losses of advantages are 0 at first: sums of terms near 1, whose exponents, near -100, are rounded by 1e-5.
    assert_same_run(got, train(plain), abs_logged=5e-5 if "reward_funcs" in EQUAL[name][0] else 2e-6)
    assert any(is_padded)
    for model in (trainer.model, getattr(trainer, "ref_model", None), getattr(trainer, "teacher_model", None)):
        if hasattr(model, "radix_stats"):
            assert (model.radix_stats.folded == 0) == (name in UNFOLDED)


@pytest.mark.parametrize("name", READ_PADDING)
def test_trainers_that_log_numbers_of_padding_are_refused(folder, tmp_path, name):
    """All their other numbers are those of the plain trainer, where the model is enabled in spite of that."""
    *arguments, numbers = READ_PADDING[name]
    plain, trainer = (make(folder, tmp_path, name, *arguments) for _ in range(2))
    with pytest.raises(ValueError, match="radix_ops.hf.enable") as refusal:
        trainers.enable(trainer, threshold=1.0)
    assert f"{type(trainer).__name__} logs " in str(refusal.value)
    assert all(number in str(refusal.value) for number in numbers)
    assert not hasattr(trainer.model, "radix_stats")
    hf.enable(trainer.model, threshold=1.0)
    got, want = train(trainer), train(plain)
    assert trainer.model.radix_stats.folded > 0
    for one, other in zip(got[0], want[0], strict=True):
        different = {key for key in one if one[key] != pytest.approx(other[key], rel=2e-4, abs=2e-6)}
        assert different <= numbers
    assert different
    assert_same_run(([], got[1]), ([], want[1]))


def test_subclasses_of_those_are_refused_and_namesakes_are_not(folder, tmp_path):
    trainer = make(folder, tmp_path, "trl.experimental.orpo.ORPO", (), "pairs", {})
    trainer.__class__ = type("MyTrainer", (type(trainer),), {})
    with pytest.raises(ValueError, match="MyTrainer logs logits/chosen and logits/rejected"):
        trainers.enable(trainer)
    trainer.__class__ = type("ORPOTrainer", (transformers.Trainer,), {})
    trainers.enable(trainer, threshold=1.0)
    assert hasattr(trainer.model, "radix_stats")


def test_metrics_of_an_evaluation_that_leave_padding_out(folder, tmp_path):
    """transformers gathers the logits of all positions for them."""

    def metrics(prediction):
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        real = labels != -100
        return {"accuracy": (logits.argmax(-1) == labels)[real].mean(), "highest": logits.max(-1)[real].mean()}

    found = []
    for folds in (False, True):
        trainer = language_model(folder, tmp_path, compute_metrics=metrics)
        trainer.eval_dataset = trainer.train_dataset
        if folds:
            trainers.enable(trainer, threshold=1.0)
        found.append({key: x for key, x in trainer.evaluate().items() if not key.endswith(("time", "second"))})
    assert trainer.model.radix_stats.folded > 0
    assert {"eval_accuracy", "eval_highest", "eval_loss"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=2e-4)
