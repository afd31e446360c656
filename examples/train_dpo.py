"""Train by DPO of TRL on folded batches: a prompt is computed once for the chosen and the rejected answer.

    python examples/train_dpo.py

Chosen answers are made of words that begin with "red" or "blue", rejected ones of others. By default a small new model
learns that on the CPU, in less than a minute. Needs trl.
"""

from __future__ import annotations

import random

from datasets import Dataset
from tiny import WORDS, load_tokenizer, parse_arguments, report, sentence
from trl import DPOConfig, DPOTrainer

from radix_ops import trainers


def preferences(num_prompts: int) -> Dataset:
    rng = random.Random(0)
    half = len(WORDS) // 2
    rows = []
    for _ in range(num_prompts):
        prompt = sentence(rng, 96)
        chosen, rejected = (" " + sentence(rng, 12, words) for words in (WORDS[:half], WORDS[half:]))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def main() -> None:
    arguments = parse_arguments(__doc__, steps=40)
    trainer = DPOTrainer(
        arguments.model,
        args=DPOConfig(
            "build/train_dpo", **arguments.options, max_steps=arguments.steps, per_device_train_batch_size=16
        ),
        train_dataset=preferences(256),
        processing_class=load_tokenizer(arguments.model),
    )
    if not arguments.plain:
        trainers.enable(trainer)
    trainer.train()
    report(trainer, "rewards/accuracies")


if __name__ == "__main__":
    main()
