"""A transformers model that computes each shared token of a batch once: `enable(model)`, then call it as before.

What stands in for what while a model is enabled, all of it undone by `disable`:

- the forward of the decoder stack, which folds the batch, runs the stack on the rows and unfolds its hidden states;
- the forward of the model around it, which sees labels and says when a batch must not be folded because of them.

Configs, weights, hooks and classes stay untouched, and nothing but arguments carries a batch to the layers. So calls
from several threads, and forwards that wait for their backward with gradient checkpointing, can't mix up batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import _hf_types
from ._hf_fold import HARMLESS_ARGUMENTS, PaddedBatch, run_folded
from .attention import LAYOUTS

# Measured on a CPU with Llama layers 576 wide, 1 to 64 sequences of 16 to 4096 tokens, forward and backward: at equal
# rows folding takes up to 1.05 times as long as the plain model, at 0.93 of the rows it is never slower.
_MAX_ROWS_SHARE = 0.95
_INTEGERS = (torch.int32, torch.int64)
_STATS_LOCK = threading.Lock()
_FOLDABLE_ARGUMENTS = HARMLESS_ARGUMENTS | {
    "self", "input_ids", "attention_mask", "position_ids", "use_cache", "output_attentions",
}  # fmt: skip


@dataclasses.dataclass
class RadixStats:
    """What an enabled model has done so far: `model.radix_stats`. The counts may be set back to 0."""

    tokens: int = 0  # real tokens that came in
    rows: int = 0  # rows that the decoder layers computed; of a skipped batch all positions, padding included
    folded: int = 0  # batches that were folded
    skipped: int = 0  # batches that ran as before, each step of generate() included

    def _add(self, tokens: int, rows: int, folded: bool) -> None:
        with _STATS_LOCK:
            self.tokens += tokens
            self.rows += rows
            self.folded += folded
            self.skipped += not folded


@dataclasses.dataclass(frozen=True)
class _Options:
    threshold: float | None
    layout: str


def enable(model: PreTrainedModel, threshold: float | None = None, layout: str = "auto") -> PreTrainedModel:
    """Makes `model` fold its batches, in place, and returns it.

    Args:
        model: a transformers model of type llama or qwen3 on the CPU, with whatever head. Give the outermost module
            that is called: of a module further in, labels are out of sight (below).
        threshold: fold a batch where rows / real tokens is at most this; 1.0 folds always, 0 never. By default a batch
            is folded where at most 95% of its padded positions have to be computed.
        layout: that of `radix_ops.attention`.

    The model takes the same arguments and returns the same output class and shapes, padded as the input: input_ids
    and attention_mask [B, T], padded on either side or both, last_hidden_state [B, T, D]. Values and gradients are
    equal up to rounding, gradient checkpointing included, with two differences: hidden states at masked positions are
    zeros where a batch was folded, and `past_key_values` is None where only `config.use_cache` asked for a cache.
    Positions count from each row's first real token unless `position_ids` are given. Rows that hold several packed
    sequences are understood as transformers does: from `position_ids`, without a mask and without a cache.

    These run as before, with one warning for each reason: an explicit `use_cache=True` or `past_key_values`,
    `output_attentions`, `inputs_embeds`, a mask with holes or of another shape than input_ids, unknown arguments,
    active dropout or noise, hooks inside the decoder stack that aren't torch's or transformers' own (they would see
    rows, [1, num_rows, D]), labels or pooling that read a masked position. A call that brings both a cache and
    `use_cache=True`, as `generate()` does in each step, runs as before without a warning.

    Enabling again sets the options anew. `model.radix_stats` counts what was done (`RadixStats`). Copies and pickles
    of an enabled model are enabled, with counts of their own. What calls the decoder stack's submodules itself, past
    its forward, is not folded.

    Raises TypeError for anything but a transformers model, ValueError for a type, class or config that folding isn't
    known to be right for, for a model elsewhere than on the CPU, and for options out of range.
    """
    options = _check_options(threshold, layout)
    stack = _hf_types.find_stack(model)
    state = _state_of(stack)
    if state is None:
        if "forward" in vars(stack):
            raise ValueError(f"{type(model).__name__} can't be folded: the forward of its decoder stack was replaced")
        state = stack.forward = _StackForward(stack)
    state.options = options
    state.add_owner(model)
    return model


def disable(model: PreTrainedModel) -> None:
    """Takes back `enable`, attribute by attribute; `model.radix_stats` goes too. Nothing happens if it isn't enabled.

    Backward passes of folded forwards may still be run. Raises RuntimeError if a forward was replaced since.
    """
    state = _state_of(getattr(model, "base_model", model))
    if state is None:
        if "radix_stats" in vars(model):
            raise RuntimeError("the forward of the decoder stack was replaced after enable; undo that before disable")
        return
    state.check_in_place()
    for owner in list(state.owners):
        state.remove_owner(owner)
    state.restore()


@contextlib.contextmanager
def folded(model: PreTrainedModel, threshold: float | None = None, layout: str = "auto") -> Iterator[PreTrainedModel]:
    """`enable` on entry, and on exit the state before: disabled, or enabled with its former options."""
    state = _state_of(getattr(model, "base_model", model))
    options, was_owner = (None, False) if state is None else (state.options, state.is_owner(model))
    enable(model, threshold, layout)
    try:
        yield model
    finally:
        if state is None:
            disable(model)
        else:
            state.options = options
            if not was_owner:
                state.remove_owner(model)


def _check_options(threshold: float | None, layout: str) -> _Options:
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, or None, got {threshold}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    return _Options(threshold, layout)


def _state_of(stack: nn.Module) -> _StackForward | None:
    forward = vars(stack).get("forward")
    return forward if isinstance(forward, _StackForward) else None


class _Forward:
    """Stands in for a module's forward. An object and not a closure, so that it copies and pickles with the module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.previous = vars(module).get("forward")

    @property
    def __wrapped__(self):
        """The forward that stood here before, where inspect.signature finds the arguments."""
        return self.previous or types.MethodType(type(self.module).forward, self.module)

    def restore(self) -> None:
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous


class _HeadForward(_Forward):
    """Says of a batch not to fold it where the head or its loss reads a hidden state that folding leaves at zero."""

    def __call__(self, *args, **kwargs):
        arguments = _hf_types.bind(type(self.module).forward, self.module, *args, **kwargs)
        if _hf_types.head_reads_padding(self.module, arguments):
            kwargs["radix_obstacle"] = "labels, pooling or logits_to_keep read a masked position"
        return self.__wrapped__(*args, **kwargs)


class _StackForward(_Forward):
    """Folds a batch where that is right and pays; keeps what belongs to the enabled model."""

    def __init__(self, stack: PreTrainedModel):
        super().__init__(stack)
        self.options = _Options(None, "auto")
        self.stats = RadixStats()
        self.owners: list[PreTrainedModel] = []  # the modules given to enable
        self.warned: set[str] = set()

    def __call__(self, *args, radix_obstacle: str | None = None, **kwargs):
        stack, options = self.module, self.options
        arguments = _hf_types.bind(type(stack).forward, stack, *args, **kwargs)
        obstacle = _obstacle(stack, arguments) if radix_obstacle is None else radix_obstacle
        if obstacle:
            self._warn(obstacle)
        if obstacle is None and options.threshold != 0:
            padded = PaddedBatch.fold(
                *(arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids")),
                sees_packing=not _makes_cache(stack, arguments),
            )
            if _pays(padded, options.threshold):
                self.stats._add(padded.batch.num_tokens, padded.batch.num_rows, folded=True)
                further = {name: arguments[name] for name in HARMLESS_ARGUMENTS & arguments.keys()}
                return run_folded(stack, padded, further, options.layout)
        self.stats._add(*_size(arguments), folded=False)
        return self.__wrapped__(*args, **kwargs)

    def _warn(self, obstacle: str) -> None:
        if obstacle not in self.warned:
            self.warned.add(obstacle)
            warnings.warn(f"radix_ops: a batch runs unfolded because {obstacle}", stacklevel=3)

    def is_owner(self, model: PreTrainedModel) -> bool:
        return any(owner is model for owner in self.owners)

    def add_owner(self, model: PreTrainedModel) -> None:
        if not self.is_owner(model):
            self.owners.append(model)
            model.radix_stats = self.stats
            if model is not self.module:
                model.forward = _HeadForward(model)

    def remove_owner(self, model: PreTrainedModel) -> None:
        self.owners = [owner for owner in self.owners if owner is not model]
        del model.radix_stats
        if model is not self.module:
            model.forward.restore()

    def check_in_place(self) -> None:
        for owner in self.owners:
            if not isinstance(vars(owner).get("forward"), _Forward):
                raise RuntimeError(
                    f"the forward of {type(owner).__name__} was replaced after enable; undo that before disable"
                )


def _pays(padded: PaddedBatch, threshold: float | None) -> bool:
    if padded.batch.num_rows == 0:
        return False
    if threshold is not None:
        return padded.batch.compact_ratio <= threshold
    return padded.batch.num_rows <= _MAX_ROWS_SHARE * padded.shape.numel()


def _obstacle(stack: PreTrainedModel, arguments: dict[str, Any]) -> str | None:
    """Why the call can't be folded, None if it can; empty where nobody needs a warning."""
    given = {name for name, value in arguments.items() if value is not None}
    if arguments.get("use_cache"):
        return "" if "past_key_values" in given else "use_cache=True was given"
    if arguments.get("output_attentions", getattr(stack.config, "output_attentions", False)):
        return "attention weights are asked for"
    unknown = sorted(given - _FOLDABLE_ARGUMENTS)
    if unknown:
        return f"{unknown[0]} was given"
    input_ids = arguments.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS:
        return ""
    if input_ids.numel() == 0:
        return ""
    return (
        _layout_obstacle(input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))
        or _hf_types.unfoldable(stack)
        or _hf_types.interference(stack)
    )


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


def _makes_cache(stack: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether the plain forward would make a cache; with one, transformers doesn't look for packed sequences."""
    if arguments.get("use_cache") is not None or not stack.config.use_cache:
        return False
    return not (stack.gradient_checkpointing and stack.training)


def _size(arguments: dict[str, Any]) -> tuple[int, int]:
    """(real tokens, positions) of a batch that runs as it came."""
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    if not isinstance(source, Tensor) or source.dim() < 2:
        return 0, 0
    positions = source.shape[0] * source.shape[1]
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or positions == 0:
        return positions, positions
    return int(mask[:, -source.shape[1] :].to(torch.bool).sum()), positions
