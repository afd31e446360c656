"""Small trainers of TRL and transformers, and judges of what they do, for tests of training.

Importing it skips a module where TRL is missing.
"""

from __future__ import annotations

import json
import os
import random
import warnings

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL counts its uses there
trl = pytest.importorskip("trl", reason="TRL is an extra, and needs Python 3.11")
import datasets  # noqa: E402
import peft  # noqa: E402

datasets.disable_progress_bars()
MARKS = [
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


@pytest.fixture(name="folder", scope="module")
def saved_models(tmp_path_factory):
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
    """Gives GROUP answers to each prompt: both trainers see the same, whatever their models would say."""

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
    names = ("compute_loss_func", "compute_metrics", "eval_dataset")
    further = {key: changes.pop(key) for key in names if key in changes}
    return transformers.Trainer(
        load(folder),
        transformers.TrainingArguments(str(tmp_path), **OPTIONS | changes),
        transformers.DataCollatorForLanguageModeling(tokenize, mlm=False),
        train_dataset=datasets.Dataset.from_list(rows),
        **further,
    )


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], **options)


def train(trainer):
    """Train, and return what was logged and how each parameter changed."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    transformers.set_seed(5)
    trainer.train()
    logged = [
        {key: x for key, x in entry.items() if not key.endswith(("time", "second"))}
        for entry in trainer.state.log_history[:-1]
    ]
    return logged, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


def assert_same_run(got, want, abs_logged=2e-6) -> None:
    for one, other in zip(got[0], want[0], strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=abs_logged)
    trained = {name for name, change in want[1].items() if change.any()}
    assert trained == {name for name, change in got[1].items() if change.any()}
    assert len(trained) > 10
    for name in trained:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=1e-3, atol=2e-6)


@pytest.fixture(name="quiet")
def no_warnings_of_ours():
    """Turn warnings of radix_ops into errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="radix_ops")
        yield
