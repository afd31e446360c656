"""Micro-batches and batches that hold whole groups of sequences with one prompt."""

from __future__ import annotations

import pytest
import torch
import transformers

from helpers.batches import trie_size
from helpers.trl_runs import GROUP, MARKS, dpo, grpo, no_warnings_of_ours, saved_models, trl  # noqa: F401
from radix_ops import trainers

pytestmark = MARKS


def rows_of(batch) -> list[list[int]]:
    """Return the tokens of a micro-batch's rows."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def micro_batches(trainer) -> list[dict]:
    """Return the micro-batches that it trains on."""
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

    # Rows and advantages are the same, as many in each micro-batch, and no longer in the data set's order.
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

    # Each prompt is there once, so the rows of a micro-batch are those of its prompts and those that answers add.
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
