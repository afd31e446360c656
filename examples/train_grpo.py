"""Train by GRPO of TRL on folded batches: a prompt is computed once for all of its sampled answers.

    python examples/train_grpo.py

The answers are to be made of words that begin with "red". By default a small new model learns that on the CPU, in less
than a minute. Needs trl.
"""

from __future__ import annotations

import random

from datasets import Dataset
from tiny import load_tokenizer, parse_arguments, report, sentence
from trl import GRPOConfig, GRPOTrainer

from radix_ops import trainers


def share_of_red(completions: list[str], **kwargs) -> list[float]:
    words = [text.split() for text in completions]
    return [sum(word.startswith("red") for word in answer) / max(len(answer), 1) for answer in words]


def main() -> None:
    arguments = parse_arguments(__doc__, steps=40)
    rng = random.Random(0)
    trainer = GRPOTrainer(
        arguments.model,
        reward_funcs=share_of_red,
        args=GRPOConfig(
            "build/train_grpo",
            **arguments.options,
            max_steps=arguments.steps,
            num_generations=8,
            max_completion_length=8,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
        ),
        train_dataset=Dataset.from_list([{"prompt": sentence(rng, 96)} for _ in range(256)]),
        processing_class=load_tokenizer(arguments.model),
    )
    if not arguments.plain:
        trainers.enable(trainer)
    trainer.train()
    report(trainer, "reward")


if __name__ == "__main__":
    main()
