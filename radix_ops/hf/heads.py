"""Finds out which hidden states the head of a transformers model reads. For `radix_ops.hf`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..ops.head_plan import IGNORED_LABEL
from .guards import has_foreign_hook
from .modes import why_unreadable
from .proofs import class_of, is_proven_class, proof_of

# Kinds of heads that may read a masked position without labels.
_POOLING = ("ForSequenceClassification", "ForQuestionAnswering")


def causal_lm_class(config) -> type | None:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


@functools.cache
def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)


def bind(function: Callable, /, *args, **kwargs) -> dict[str, Any]:
    """Return all arguments of the call by name. Raises TypeError as the call would."""
    signature = _signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments


@functools.cache
def named_arguments(function: Callable) -> frozenset[str]:
    return frozenset(_signature(function).parameters)


def head_reads_padding(head: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Return whether the head's loss or pooling depends on a hidden state at a masked position.

    That is exact for transformers' own heads and losses. Any other loss is taken to depend on all positions. Outputs
    of the masked positions themselves, such as their logits, don't count.
    """
    if why_unreadable(arguments) is not None:
        return False  # it won't be folded
    input_ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if not isinstance(input_ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        return False
    kind = _kind_of(head)
    keeps_some = arguments.get("use_cache") is False and arguments.get("logits_to_keep") is not None
    if labels is None and not keeps_some and kind not in _POOLING:
        return False
    mask = mask.to(device=input_ids.device, dtype=torch.bool)
    if mask.all():  # where the host waits for a GPU
        return False
    if kind == "ForSequenceClassification":
        return not mask.gather(1, _pooled_column(head, input_ids)).all()
    if kind == "ForQuestionAnswering":
        return arguments.get("start_positions") is not None and arguments.get("end_positions") is not None
    if arguments.get("use_cache") is False and _kept_logits_read_padding(arguments.get("logits_to_keep"), mask):
        return True
    if labels is None:
        return False
    ignored = IGNORED_LABEL
    if kind == "ForCausalLM":
        ignored = arguments.get("ignore_index", ignored)
        shifted = arguments.get("shift_labels")
        labels = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
    elif kind != "ForTokenClassification":
        return True
    # Labels of kept logits have another shape, or the same shape in another order.
    reordered = labels.shape != mask.shape or isinstance(arguments.get("logits_to_keep"), Tensor)
    if reordered or head.loss_function is not LOSS_MAPPING[kind]:
        return True
    return bool(((labels.to(mask.device) != ignored) & ~mask).any())


def _kind_of(head: PreTrainedModel) -> str | None:
    """Return how one of transformers' own heads reads hidden states, by the end of its class's name, or None."""
    forward = class_of(head).forward
    if forward is getattr(causal_lm_class(head.config), "forward", None):
        return "ForCausalLM"
    name = forward.__qualname__.rpartition(".")[0]
    if not forward.__module__.startswith("transformers."):
        return None
    kinds = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
    return next((kind for kind in kinds if name.endswith(kind)), None)


def may_run_on_rows(head: PreTrainedModel, stack: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Return whether only a language model's head reads the hidden states, all of them and each by itself."""
    return arguments.get("labels") is None and is_rowwise(head, stack, arguments)


def is_rowwise(head: PreTrainedModel, stack: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Return whether only a language model's head, and perhaps its loss, reads the hidden states, each by itself."""
    if class_of(head) is not causal_lm_class(head.config) or not proof_of(stack).head_on_rows:
        return False
    kept = arguments.get("logits_to_keep")
    if isinstance(kept, Tensor) or kept:
        return False
    if arguments.get("return_dict", getattr(head.config, "return_dict", True)) is False:
        return False
    inside = {id(module) for module in stack.modules()}
    around = [stack, *(module for module in head.modules() if module is not head and id(module) not in inside)]
    proof = proof_of(stack)
    return not any(
        has_foreign_hook(module)
        or (module is not stack and ("forward" in vars(module) or not is_proven_class(class_of(module), proof)))
        for module in around
    )


def _kept_logits_read_padding(logits_to_keep: int | Tensor | None, mask: Tensor) -> bool:
    """Return whether a caller that picks positions, as generate(use_cache=False) does, picks a masked one."""
    if isinstance(logits_to_keep, Tensor):
        return not mask[:, logits_to_keep.to(mask.device)].all()
    return bool(logits_to_keep and not mask[:, -logits_to_keep:].all())


def _pooled_column(head: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the column [B, 1] whose hidden state transformers' ForSequenceClassification heads score."""
    pad_token_id = head.config.get_text_config().pad_token_id
    if pad_token_id is None:
        return torch.full((input_ids.shape[0], 1), input_ids.shape[1] - 1, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * (input_ids != pad_token_id)).argmax(1, keepdim=True)
