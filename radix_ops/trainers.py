"""Trainers of transformers and TRL on folded batches.

    trainer = GRPOTrainer(model, ...)
    radix_ops.trainers.enable(trainer)
    trainer.train()

docs/training.md says what that changes and what stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from . import hf  # isort: skip  (says what installs transformers, where it is missing)

from transformers import Trainer

from ._attention import Layout
from .hf import loss
from .hf.forward import Verify

__all__ = ["GroupSampler", "enable", "keep_groups_together", "loss_on_rows"]

T = TypeVar("T", bound=Trainer)

_PREFERENCES = ("logits/chosen", "logits/rejected")
# TRL's trainers log these numbers of logits at padding, which folded batches don't have.
_READ_PADDING = {
    "CPOTrainer": _PREFERENCES,
    "ORPOTrainer": _PREFERENCES,
    "OnlineDPOTrainer": tuple(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward")),
}


def enable(trainer: T, threshold: float | None = None, layout: Layout = "auto", verify: Verify = "first") -> T:
    """Make a trainer run its models folded, in place, and return it. Call it before `train()`.

    It calls `radix_ops.hf.enable`, with the same options and errors, on the model and on the reference model, if the
    trainer has one (a PEFT model without its adapters is the same model). It applies `keep_groups_together` to TRL's
    GRPO and RLOO trainers, and `loss_on_rows` to a trainer that computes its loss as transformers' Trainer does; TRL's
    other trainers compute their losses as before. Where a trainer adds the load-balancing loss of experts, all its
    batches run unfolded.

    Raises TypeError for an object that is no Trainer. Raises ValueError for a trainer with a `model_init`, which makes
    a new model each time it trains (enable the model there), and for those of TRL's trainers that log numbers made of
    logits at padding.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers Trainer, got {type(trainer).__name__}")
    if trainer.model_init is not None:
        raise ValueError("a trainer with model_init makes a new model to train; call radix_ops.hf.enable in model_init")
    if getattr(trainer, "aux_loss_enabled", False):
        # The trainer asks for router logits of batches that it trains on, so these run unfolded. It doesn't ask for
        # those of the batches that they are compared with, and folding would set equal outputs apart by rounding.
        threshold = 0
    for kind in type(trainer).__mro__:
        if kind.__name__ in _READ_PADDING and kind.__module__.startswith("trl."):
            raise ValueError(
                f"{type(trainer).__name__} logs {' and '.join(_READ_PADDING[kind.__name__])} over padding too, where "
                "folded batches have no logits, so these numbers alone would not be those of the plain trainer; if "
                "you can do without them, call radix_ops.hf.enable(trainer.model) in place of this"
            )
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    for model in models:
        if isinstance(model, nn.Module):
            hf.enable(model, threshold, layout, verify)
    if _shuffles_rollouts(trainer):
        keep_groups_together(trainer)
    if type(trainer).compute_loss is Trainer.compute_loss and "compute_loss" not in vars(trainer):
        trainer.compute_loss = _LossOnRows(trainer.compute_loss)
    return trainer


@contextlib.contextmanager
def loss_on_rows() -> Iterator[None]:
    """Let enabled causal language models that are called with labels return the loss, and None for logits, inside.

    Where the batch was folded and the loss is transformers' own of logits that are neither scaled nor capped, it comes
    from the rows by `radix_ops.losses.causal_lm_loss`: equal up to rounding, and logits exist for a block at a time.
    Other models and calls have the same output as outside.
    """
    token = loss.wanted.set(True)
    try:
        yield
    finally:
        loss.wanted.reset(token)


class _LossOnRows:
    """Stands in for a Trainer's compute_loss: models make no logits where it is asked for the loss alone."""

    def __init__(self, compute_loss):
        self.compute_loss = compute_loss

    def __call__(self, model, inputs, return_outputs: bool = False, **kwargs):
        with contextlib.nullcontext() if return_outputs else loss_on_rows():
            return self.compute_loss(model, inputs, return_outputs, **kwargs)


def keep_groups_together(trainer: Trainer) -> Trainer:
    """Make one of TRL's GRPO or RLOO trainers split its rollouts by whole groups, in place, and return it.

    TRL shuffles the rows of a generation batch and cuts them into micro-batches, so the answers to a prompt end up in
    different ones. Here the groups keep the shuffled order of their first rows, and each group's rows follow one
    another, so groups are cut only where a micro-batch is no multiple of num_generations. The same rows are used as
    often as before, with the same advantages. Batches that hold images are left as they are.

    Raises TypeError for a trainer that doesn't shuffle rollouts as those of TRL 1.16 do.
    """
    if not _shuffles_rollouts(trainer):
        raise TypeError(f"trainer must be a GRPOTrainer or RLOOTrainer of TRL, got {type(trainer).__name__}")
    if not isinstance(trainer._prepare_inputs, _GroupedInputs):
        trainer._prepare_inputs = _GroupedInputs(trainer)
    return trainer


def _shuffles_rollouts(trainer: Trainer) -> bool:
    return hasattr(trainer, "_buffered_inputs") and hasattr(trainer.args, "steps_per_generation")


class _GroupedInputs:
    """Stands in for the _prepare_inputs of one of TRL's trainers, and regroups the micro-batches that it makes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.prepare = trainer._prepare_inputs

    def __call__(self, generation_batch):
        trainer = self.trainer
        before = trainer._buffered_inputs
        inputs = self.prepare(generation_batch)
        batches = trainer._buffered_inputs
        if batches is before:
            return inputs
        place = [batch is inputs for batch in batches].index(True)
        trainer._buffered_inputs = _regrouped(batches)
        return trainer._buffered_inputs[place]


def _regrouped(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the micro-batches of a generation batch with the same rows, those of one prompt one after another."""
    num_rows = len(batches[0]["prompt_ids"])

    def is_rows(value: Any) -> bool:
        return value is not None and not (isinstance(value, Tensor) and value.dim() == 0)

    whole: dict[str, Any] = {
        name: _joined([batch[name] for batch in batches]) if is_rows(value) else value
        for name, value in batches[0].items()
    }
    if any(is_rows(value) and len(value) != num_rows * len(batches) for value in whole.values()):
        return batches
    order = _order_of_groups(whole["prompt_ids"].masked_fill(whole["prompt_mask"] == 0, -1))
    chunks = order.split(num_rows)
    return [{name: _pick(x, rows) if is_rows(x) else x for name, x in whole.items()} for rows in chunks]


def _joined(values: list) -> Tensor | list:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def _pick(values: Tensor | list, rows: Tensor) -> Tensor | list:
    return values[rows.to(values.device)] if isinstance(values, Tensor) else [values[row] for row in rows.tolist()]


def _order_of_groups(prompts: Tensor) -> Tensor:
    """Return the order [N] of prompts [N, T] in which equal ones stand side by side, by their first rows."""
    group = prompts.unique(dim=0, return_inverse=True)[1]
    rows = torch.arange(len(prompts), device=prompts.device)
    first = torch.full_like(rows, len(prompts)).scatter_reduce_(0, group, rows, "amin")
    return first[group].argsort(stable=True)


class GroupSampler(Sampler[int]):
    """Samples the indices of a data set, shuffled anew in each epoch by whole groups.

    Args:
        groups: what each example shares with others, such as its prompt; any hashable.
        seed: the order of an epoch depends on it and on the epoch alone.

    A Trainer takes it from its `_get_train_sampler`. Groups follow one another in random order and keep the data set's
    order inside, so a batch cuts groups at its ends alone.
    """

    def __init__(self, groups: Sequence[Hashable], seed: int = 0):
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self.groups = list(members.values())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch; a Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for group in torch.randperm(len(self.groups), generator=generator).tolist():
            yield from self.groups[group]
