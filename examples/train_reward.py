"""Train a reward model by TRL on folded batches: a prompt is computed once for all of its answers.

    python examples/train_reward.py

Each prompt has four answers, which makes three pairs of the best and another. The pairs of a prompt come in one batch,
so its tokens are computed once for six sequences. The best answer is made of words that begin with "red" or "blue", the
others of any. By default a small new model learns that on the CPU, in less than a minute. Needs trl.
"""

from __future__ import annotations

import random

from datasets import Dataset
from tiny import WORDS, load_tokenizer, parse_arguments, report, sentence
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from radix_ops import trainers

PROMPT_LENGTH = 96


def preferences(num_prompts: int) -> Dataset:
    rng = random.Random(0)
    rows = []
    for _ in range(num_prompts):
        prompt = sentence(rng, PROMPT_LENGTH)
        best = " " + sentence(rng, 12, WORDS[: len(WORDS) // 2])
        rows += [{"prompt": prompt, "chosen": best, "rejected": " " + sentence(rng, 12)} for _ in range(3)]
    return Dataset.from_list(rows)


class GroupedRewardTrainer(RewardTrainer):
    """Shuffle prompts with all of their pairs, and not pairs."""

    def _get_train_sampler(self, dataset=None):
        prompts = [tuple(ids[:PROMPT_LENGTH]) for ids in self.train_dataset["chosen_ids"]]
        return trainers.GroupSampler(prompts, seed=self.args.seed)


def main() -> None:
    arguments = parse_arguments(__doc__, steps=60)
    trainer = GroupedRewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, trust_remote_code=False),
        args=RewardConfig(
            "build/train_reward", **arguments.options, max_steps=arguments.steps, per_device_train_batch_size=12
        ),
        train_dataset=preferences(256),
        processing_class=load_tokenizer(arguments.model),
    )
    if not arguments.plain:
        trainers.enable(trainer)
    trainer.train()
    report(trainer, "accuracy")


if __name__ == "__main__":
    main()
