"""The loss of one of transformers' causal language models on the rows of a folded batch, without all its logits."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..losses import Reduction, causal_lm_loss
from ..ops.head_plan import IGNORED_LABEL
from .fold import PaddedBatch
from .heads import is_rowwise
from .proofs import class_of
from .twins import shallow_copy, with_part

# Says that models that are called with labels return their loss without logits.
wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("radix_loss_on_rows", default=False)


def applies(head: PreTrainedModel, stack: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Return whether a call asks for a causal language model's plain loss, and nothing else reads its logits."""
    labels, input_ids = arguments.get("labels"), arguments.get("input_ids")
    if not wanted.get() or not isinstance(labels, Tensor) or not isinstance(input_ids, Tensor):
        return False
    if labels.shape != input_ids.shape or not is_rowwise(head, stack, arguments):
        return False
    if any(arguments.get(name) is not None for name in ("shift_labels", "ignore_index")):
        return False
    lm_head = head.get_output_embeddings()
    if type(lm_head) is not nn.Linear or hasattr(lm_head.weight, "full_tensor"):
        return False
    is_plain = head.loss_function is LOSS_MAPPING["ForCausalLM"] and lm_head.out_features == head.config.vocab_size
    return is_plain and _passes_logits_on(head, stack)


class RowLoss:
    """Stands in for a head's forward in one call: returns the loss and no logits.

    `padded` is the batch, if its stack left it in rows.
    """

    def __init__(self, head: PreTrainedModel):
        self.head = head
        self.padded: PaddedBatch | None = None

    @torch.compiler.disable
    def __call__(self, *args, **kwargs):
        twin = _with_functions(self.head, lambda states: states, self._loss)
        outputs = class_of(self.head).forward(twin, *args, **kwargs)
        return dataclasses.replace(outputs, logits=None)

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch=None, **kwargs) -> Tensor:
        """Compute the loss of what the head takes for logits: hidden states, [1, num_rows, D] or unfolded [B, T, D]."""
        states, padded, lm_head = logits, self.padded, self.head.get_output_embeddings()
        packed = None if padded is None else _packed_labels(padded, labels.to(states.device))
        if padded is None or packed is None:
            states = states if padded is None else padded.unfold(states)
            return self.head.loss_function(lm_head(states), labels, vocab_size, num_items_in_batch, **kwargs)
        reduction: Reduction = "mean" if num_items_in_batch is None else "sum"
        head = {"weight": lm_head.weight, "bias": lm_head.bias}
        loss = causal_lm_loss(states[0], padded.batch, packed, reduction=reduction, **head).float()
        return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)


def _packed_labels(padded: PaddedBatch, labels: Tensor) -> Tensor | None:
    """Return the labels of tokens [num_tokens] out of labels [B, T], or None where the plain loss counts others, too.

    It counts labels at masked positions behind a token, and of tokens that begin a sequence behind another one.
    """
    flat = labels.flatten()
    if padded.real is not None:
        return flat[padded.real] if bool((labels[~padded.is_real()] == IGNORED_LABEL).all()) else None
    starts = padded.batch.cu_seqlens[:-1]
    behind_others = starts[starts % labels.shape[1] != 0]
    return flat if bool((flat[behind_others] == IGNORED_LABEL).all()) else None


def _passes_logits_on(head: PreTrainedModel, stack: PreTrainedModel) -> bool:
    """Return whether the head's forward gives logits to its loss as they are, neither scaled nor capped, by a trial."""
    given: list[Tensor] = []
    taken: list[Tensor] = []

    def loss(logits, *args, **kwargs):
        taken.append(logits)
        return logits.sum()

    def seen(states: Tensor) -> Tensor:
        given.append(states)
        return states

    states = torch.zeros(1, 2, stack.config.hidden_size)
    stand_in: Any = nn.Identity()
    stand_in.forward = lambda *args, **kwargs: _OnlyStates(states)
    twin = _with_functions(head, seen, loss)
    twin = with_part(twin, stack, stand_in)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    class_of(head).forward(twin, input_ids=ids, labels=ids, use_cache=False, return_dict=True)
    return len(given) == len(taken) == 1 and given[0] is taken[0]


class _OnlyStates:
    """Stands for the output of any decoder stack that was asked for nothing but hidden states."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor | None:
        return None if index else self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _with_functions(head: PreTrainedModel, make_logits, loss) -> PreTrainedModel:
    """Return a twin of the head that makes logits by another function than its projection, and has another loss."""
    lm_head = head.get_output_embeddings()
    twin = with_part(head, lm_head, shallow_copy(lm_head, forward=make_logits))
    return shallow_copy(twin, _loss_function=loss)
