"""What a call of a decoder stack asks for, and whether that can be folded, for `radix_ops.hf`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import heads, proofs
from .fold import HARMLESS_ARGUMENTS, wants_hidden_states
from .modes import why_unreadable

_INTEGERS = (torch.int32, torch.int64)
_CACHES = {"past_key_values", "cache"}  # the argument's name up to transformers 5.23, and since
_FOLDABLE_ARGUMENTS = HARMLESS_ARGUMENTS | {
    "self", "input_ids", "attention_mask", "position_ids", "use_cache", "output_attentions",
}  # fmt: skip
# What heads pass on to the stack in every call.
_SAYING_NOTHING = {"output_router_logits": False, "logits_to_keep": 0}
_HARMLESS_IN_A_STACK = {"output_hidden_states", "return_dict"}
# Where packed sequences begin, as position_ids say, too: for kernels other than those of the supported attention.
_BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def obstacle_of(stack: PreTrainedModel, arguments: dict[str, Any]) -> str | None:
    """What of its arguments forbids to fold the call, None if nothing does; empty where nobody needs a warning."""
    unreadable = why_unreadable(arguments)
    if unreadable is not None:
        return unreadable
    given = {
        name
        for name, value in arguments.items()
        if value is not None and not (isinstance(value, int) and value == _SAYING_NOTHING.get(name))
    }
    if _counts_from_zero(arguments.get("cache_position"), arguments.get("input_ids")):
        given.remove("cache_position")
    if arguments.get("use_cache"):
        return "" if given & _CACHES else "use_cache=True was given"
    if given & _CACHES:
        return "a cache was given"
    if arguments.get("output_attentions", getattr(stack.config, "output_attentions", False)):
        return "attention weights are asked for"
    if wants_hidden_states(stack, arguments) and torch.is_grad_enabled() and _has_gradients(stack):
        # Rows that sequences share have one gradient, the sum of what the plain model's positions have.
        return (
            "output_hidden_states is on while gradients are, and rows that sequences share have one gradient together "
            "(it folds under torch.no_grad() or without output_hidden_states)"
        )
    # Harmless are those that only pass through; what the stack itself names may mean anything to it.
    named = heads.named_arguments(proofs.class_of(stack).forward)
    meant = named & (HARMLESS_ARGUMENTS - _HARMLESS_IN_A_STACK)
    is_packed = arguments.get("attention_mask") is None and arguments.get("position_ids") is not None
    if is_packed:
        given -= _BOUNDS - named
    unknown = sorted(given - _FOLDABLE_ARGUMENTS | given & meant)
    if unknown:
        return f"{unknown[0]} was given"
    input_ids = arguments.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS:
        return ""
    if input_ids.numel() == 0:
        return ""
    if input_ids.device.type not in ("cpu", "cuda"):
        return f"input_ids are on {input_ids.device}"
    chunk = getattr(stack.config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (stack.config.layer_types or ()) and input_ids.shape[1] > chunk:
        return f"rows of {input_ids.shape[1]} positions are longer than config.attention_chunk_size={chunk}"
    if is_packed and _is_checkpointing(stack) and not torch.is_grad_enabled():
        # transformers makes a cache then, and sees one sequence, from 5.24 on.
        return "position_ids without a mask are read in several ways with gradient checkpointing without gradients"
    return _layout_obstacle(input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))


def _counts_from_zero(cache_position, input_ids) -> bool:
    """As generate() without a cache gives it up to transformers 5.3."""
    if not isinstance(cache_position, Tensor) or not isinstance(input_ids, Tensor):
        return False
    return cache_position.equal(torch.arange(input_ids.shape[-1], device=cache_position.device))


def _layout_obstacle(input_ids: Tensor, attention_mask, position_ids) -> str | None:
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            return "attention_mask isn't shaped like input_ids"
        mask = attention_mask.to(torch.bool)
        num_stretches = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        if (num_stretches > 1).any():
            return "attention_mask has holes"
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            return "position_ids aren't shaped like input_ids"
        if position_ids.dtype not in _INTEGERS:
            return f"position_ids are {position_ids.dtype}"
    return None


def _has_gradients(stack: PreTrainedModel) -> bool:
    """Whether hidden states may have gradients."""
    # enable_input_require_grads makes outputs of embeddings have them by a hook.
    return bool(stack.get_input_embeddings()._forward_hooks) or any(p.requires_grad for p in stack.parameters())


def makes_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether the plain forward would make a cache; with one, transformers doesn't look for packed sequences."""
    if arguments.get("use_cache") is not None or not getattr(stack.config, "use_cache", False):
        return False
    return not _is_checkpointing(stack)


def may_return_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether the plain output may hold a cache that nobody asked for but the config.

    With gradient checkpointing, from transformers 5.24 on, where gradients are off.
    """
    if arguments.get("use_cache") is not None or not getattr(stack.config, "use_cache", False):
        return False
    return not (_is_checkpointing(stack) and torch.is_grad_enabled())


def _is_checkpointing(stack: PreTrainedModel) -> bool:
    return bool(getattr(stack, "gradient_checkpointing", False) and stack.training)


def size_of(arguments: dict[str, Any]) -> tuple[int | Tensor, int]:
    """(real tokens, positions) of a batch that runs as it came; the first on the mask's device, if not the CPU."""
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    if not isinstance(source, Tensor) or source.dim() < 2:
        return 0, 0
    positions = source.shape[0] * source.shape[1]
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or positions == 0 or why_unreadable(arguments) is not None:
        return positions, positions
    tokens = mask[:, -source.shape[1] :].to(torch.bool).sum()
    return tokens if mask.is_cuda else int(tokens), positions
