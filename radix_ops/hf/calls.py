"""Finds out what a call of a decoder stack asks for, and whether it can be folded. For `radix_ops.hf`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import heads, proofs
from .fold import HARMLESS_ARGUMENTS, wants_hidden_states
from .guards import DEVICES
from .modes import READ, why_unreadable

_INTEGERS = (torch.int32, torch.int64)
CACHES = frozenset({"past_key_values", "cache"})  # a cache's name up to transformers 5.23, and since
_FOLDABLE_ARGUMENTS = HARMLESS_ARGUMENTS | {"self", *READ, "use_cache", "output_attentions"}
# Heads pass these on to the stack in every call; with these values they ask for nothing.
_ASKING_NOTHING = {"output_router_logits": False, "logits_to_keep": 0}
_HARMLESS_IN_A_STACK = {"output_hidden_states", "return_dict"}
# These repeat what position_ids say of packed sequences, for kernels other than those of the supported attention.
_BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True)
class Obstacle:
    """A reason not to fold a call.

    reason: it completes "a batch runs unfolded because", and behind "; " says what would let the batch fold.
    """

    reason: str
    is_silent: bool = False  # nobody needs a warning: folding was never to be expected, as in a step of generate()
    sharing: tuple[int, int] | None = None  # tokens and rows, where they were counted


HOLES = Obstacle("attention_mask has holes; let padding stand at the ends of each row alone")


def obstacle_of(stack: PreTrainedModel, arguments: dict[str, Any]) -> Obstacle | None:
    """Return what in the arguments of a call forbids to fold it, or None.

    On CUDA nothing waits for values here: holes in a mask are found by the fold.
    """
    reason = why_unreadable(arguments)
    if reason is not None:
        return Obstacle(reason)
    given = _given(arguments)
    if given & CACHES and arguments.get("use_cache"):
        return Obstacle("it goes on from a cache", is_silent=True)
    reason = _wanted_outputs(stack, arguments, given) or _unknown_argument(stack, arguments, given)
    if reason is not None:
        return Obstacle(reason)
    if not _are_tokens(arguments.get("input_ids")):
        return Obstacle("input_ids hold no tokens", is_silent=True)
    read: dict[str, Any] = {name: arguments.get(name) for name in READ}
    reason = _unfoldable_batch(stack, **read)
    return None if reason is None else Obstacle(reason)


def _given(arguments: dict[str, Any]) -> set[str]:
    """Return the names of the arguments that ask for something."""
    given = {
        name
        for name, value in arguments.items()
        if value is not None and not (isinstance(value, int) and value == _ASKING_NOTHING.get(name))
    }
    if _counts_from_zero(arguments.get("cache_position"), arguments.get("input_ids")):
        given.remove("cache_position")
    return given


def _wanted_outputs(stack: PreTrainedModel, arguments: dict[str, Any], given: set[str]) -> str | None:
    """Return which output that a folded batch doesn't have the call asks for, or None."""
    if arguments.get("use_cache"):
        return "use_cache=True was given; leave it out where nothing is generated"
    if given & CACHES:
        return "a cache was given; leave it out where nothing is generated"
    if arguments.get("output_attentions", getattr(stack.config, "output_attentions", False)):
        return "attention weights are asked for; output_attentions=False makes none"
    if wants_hidden_states(stack, arguments) and torch.is_grad_enabled() and _has_gradients(stack):
        # The gradient of a shared row is the sum of those that the plain model's positions have.
        return (
            "output_hidden_states is on while gradients are, and rows that sequences share have one gradient together "
            "(it folds under torch.no_grad() or without output_hidden_states)"
        )
    return None


def _unknown_argument(stack: PreTrainedModel, arguments: dict[str, Any], given: set[str]) -> str | None:
    """Return which argument isn't known to be harmless, or None.

    Harmless arguments only pass through; what the stack itself names may mean anything to it.
    """
    named = heads.named_arguments(proofs.class_of(stack).forward)
    meant = named & (HARMLESS_ARGUMENTS - _HARMLESS_IN_A_STACK)
    if _is_packed(arguments.get("attention_mask"), arguments.get("position_ids")):
        given = given - (_BOUNDS - named)
    unknown = sorted(given - _FOLDABLE_ARGUMENTS | given & meant)
    return f"{unknown[0]} was given; leave it out if results need not follow it" if unknown else None


def _unfoldable_batch(stack: PreTrainedModel, input_ids: Tensor, attention_mask, position_ids) -> str | None:
    """Return what about the batch itself forbids to fold it, or None."""
    if input_ids.device.type not in DEVICES:
        return f"input_ids are on {input_ids.device}; batches fold on the CPU and on CUDA"
    chunk = getattr(stack.config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (stack.config.layer_types or ()) and input_ids.shape[1] > chunk:
        return (
            f"rows of {input_ids.shape[1]} positions are longer than config.attention_chunk_size={chunk}; shorter "
            "ones fold"
        )
    is_packed = _is_packed(attention_mask, position_ids)
    if is_packed and _is_checkpointing(stack) and not torch.is_grad_enabled():
        # transformers makes a cache then, and sees one sequence, from 5.24 on.
        return (
            "position_ids without a mask are read in several ways with gradient checkpointing without gradients; "
            "model.eval() checkpoints nothing"
        )
    is_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape
    if attention_mask is not None and not is_mask:
        return "attention_mask isn't shaped like input_ids; give one of [B, T]"
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            return "position_ids aren't shaped like input_ids; give them as [B, T] or [1, T]"
        if position_ids.dtype not in _INTEGERS:
            return f"position_ids are {position_ids.dtype}; give them as int64"
    return None


def _are_tokens(input_ids) -> bool:
    is_batch = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.dtype in _INTEGERS
    return is_batch and input_ids.numel() > 0


def _is_packed(attention_mask, position_ids) -> bool:
    """Return whether position_ids alone say where sequences begin."""
    return attention_mask is None and position_ids is not None


def _counts_from_zero(cache_position, input_ids) -> bool:
    """Return whether cache_position is what generate() without a cache gives up to transformers 5.3."""
    if not isinstance(cache_position, Tensor) or not isinstance(input_ids, Tensor):
        return False
    return cache_position.equal(torch.arange(input_ids.shape[-1], device=cache_position.device))


def _has_gradients(stack: PreTrainedModel) -> bool:
    """Return whether hidden states may have gradients."""
    # enable_input_require_grads gives them to outputs of embeddings by a hook.
    return bool(stack.get_input_embeddings()._forward_hooks) or any(p.requires_grad for p in stack.parameters())


def makes_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Return whether the plain forward makes a cache; with one, transformers doesn't look for packed sequences."""
    return _config_asks_for_cache(stack, arguments) and not _is_checkpointing(stack)


def may_return_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Return whether the plain output may hold a cache that nobody asked for but the config.

    With gradient checkpointing it may, from transformers 5.24 on, where gradients are off.
    """
    return _config_asks_for_cache(stack, arguments) and not (_is_checkpointing(stack) and torch.is_grad_enabled())


def _config_asks_for_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    return arguments.get("use_cache") is None and bool(getattr(stack.config, "use_cache", False))


def _is_checkpointing(stack: PreTrainedModel) -> bool:
    return bool(getattr(stack, "gradient_checkpointing", False) and stack.training)


def size_of(arguments: dict[str, Any]) -> tuple[int | Tensor, int]:
    """Return (real tokens, positions) of a batch that runs as it came; a CUDA mask's tokens are counted there."""
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
