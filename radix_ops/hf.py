"""A transformers model that computes each shared token of a batch once: `enable(model)`, then call it as before.

What stands in for what while a model is enabled, all of it undone by `disable`:

- the forward of the decoder stack, which folds the batch, runs the stack on the rows and unfolds its hidden states;
- the forward of the model around it, which sees labels, says when a batch must not be folded because of them, and runs
  a language model's head on rows where nothing else reads the hidden states.

Configs, weights, hooks and classes stay untouched, and nothing but arguments carries a batch to the layers. So calls
from several threads, and forwards that wait for their backward with gradient checkpointing, can't mix up batches.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import _hf_guards, _hf_heads, _hf_proofs, _hf_verify
from ._hf_fold import HARMLESS_ARGUMENTS, PaddedBatch, run_folded
from .attention import LAYOUTS

# Measured on a CPU with Llama layers 576 wide, 1 to 64 sequences of 16 to 4096 tokens, forward and backward: at equal
# rows folding takes up to 1.05 times as long as the plain model, at 0.93 of the rows it is never slower.
_MAX_ROWS_SHARE = 0.95
# What a layer saves by folding, in positions times parameters, must outweigh what folding costs the host there.
_LEAST_SAVED = {"cpu": 3e7, "cuda": 2e10}
_VERIFY = ("first", "always", "never")
_INTEGERS = (torch.int32, torch.int64)
_CACHES = {"past_key_values", "cache"}  # the argument's name up to transformers 5.23, and since
_STATS_LOCK = threading.Lock()
_FOLDABLE_ARGUMENTS = HARMLESS_ARGUMENTS | {
    "self", "input_ids", "attention_mask", "position_ids", "use_cache", "output_attentions",
}  # fmt: skip
_HARMLESS_IN_A_STACK = {"output_hidden_states", "return_dict"}


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
    threshold: float | None = None
    layout: str = "auto"
    verify: str = "first"


def enable(model: nn.Module, threshold: float | None = None, layout: str = "auto", verify: str = "first") -> nn.Module:
    """Makes `model` fold its batches, in place, and returns it.

    Args:
        model: a transformers model, with whatever head, or what is wrapped around one: PEFT, DistributedDataParallel,
            torch.compile. Of a type and a config that were proven to fold exactly (docs/models.md), on the CPU or on
            one CUDA device. Give the outermost module that is called: of a module further in, labels are out of sight
            (below).
        threshold: fold a batch where rows / real tokens is at most this; 1.0 folds always, 0 never. By default a batch
            is folded where that pays, by a rule that was measured: at most 95% of its padded positions have to be
            computed, and what is saved is large enough beside the cost of folding, which depends on the model's width
            and the device. Small models and batches run as before.
        layout: that of `radix_ops.attention`.
        verify: "first" compares the first folded batch with the plain model, "always" every one and "never" none. It
            costs a forward of the plain model without gradients.

    The model takes the same arguments and returns the same output class and shapes, padded as the input: input_ids
    and attention_mask [B, T], padded on either side or both, last_hidden_state [B, T, D]. Values and gradients are
    equal up to rounding, gradient checkpointing included, with two differences: hidden states and logits at masked
    positions are zeros where a batch was folded, and `past_key_values` is None where only `config.use_cache` asked
    for a cache. Positions of a left-padded row are those that the plain model would have had, or, where only their
    distances matter (RoPE), count from its first real token. Rows that hold several packed sequences are understood as
    transformers does: from `position_ids`, without a mask and without a cache.

    These run as before, with one warning for each reason: an explicit `use_cache=True` or `past_key_values`,
    `output_attentions`, `inputs_embeds`, a mask with holes or of another shape than input_ids, unknown arguments,
    active dropout or noise, hooks inside the decoder stack that aren't torch's or transformers' own (they would see
    rows, [1, num_rows, D]), labels or pooling that read a masked position. A call that brings both a cache and
    `use_cache=True`, as `generate()` does in each step, runs as before without a warning.

    Enabling again sets the options anew. `model.radix_stats` counts what was done (`RadixStats`). Copies and pickles
    of an enabled model are enabled, with counts of their own. What calls the decoder stack's submodules itself, past
    its forward, is not folded. Compiled models run uncompiled where they fold. Where torch.distributed runs several
    processes, nothing is verified, with one warning: a forward more on one of them could wait for the others forever.

    Raises TypeError where there is no transformers model, ValueError for a type, class or config that folding isn't
    known to be right for, for a model on several devices or on others than these, and for options out of range. A
    folded batch that verify finds to be wrong raises RuntimeError, and the model is disabled.
    """
    options = _check_options(threshold, layout, verify)
    owner = _hf_proofs.find_model(model)
    stack = _hf_proofs.find_stack(owner)
    reason = _hf_guards.elsewhere(owner, stack) or _hf_guards.unfoldable(stack)
    if reason is not None:
        raise ValueError(f"{type(owner).__name__} can't be folded: {reason}")
    state = _state_of(stack)
    if state is None:
        if "forward" in vars(stack):
            raise ValueError(
                f"{type(owner).__name__} can't be folded: the forward of its decoder stack was replaced"
                f"{_hf_guards.replacer(stack)}"
            )
        state = stack.forward = _StackForward(stack)
    state.options = options
    state.is_verified = False
    state.add_owner(owner)
    if model is not owner:
        model.radix_stats = state.stats
    return model


def disable(model: nn.Module) -> None:
    """Takes back `enable`, attribute by attribute; `model.radix_stats` goes too. Nothing happens if it isn't enabled.

    Backward passes of folded forwards may still be run. Raises RuntimeError if a forward was replaced since.
    """
    state = _state_in(model)
    if state is None:
        if "radix_stats" in vars(model):
            raise RuntimeError("the forward of the decoder stack was replaced after enable; undo that before disable")
        return
    state.check_in_place()
    state.remove()
    vars(model).pop("radix_stats", None)


@contextlib.contextmanager
def folded(
    model: nn.Module, threshold: float | None = None, layout: str = "auto", verify: str = "first"
) -> Iterator[nn.Module]:
    """`enable` on entry, and on exit the state before: disabled, or enabled with its former options."""
    state = _state_in(model)
    owner = _hf_proofs.find_model(model)
    before = None if state is None else (state.options, state.is_verified, state.is_owner(owner))
    had_stats = "radix_stats" in vars(model)
    enable(model, threshold, layout, verify)
    try:
        yield model
    finally:
        if state is None:
            disable(model)
        else:
            state.options, state.is_verified, was_owner = before
            if not was_owner:
                state.remove_owner(owner)
            if not had_stats:
                vars(model).pop("radix_stats", None)


def _check_options(threshold: float | None, layout: str, verify: str) -> _Options:
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, or None, got {threshold}")
    for name, value, allowed in (("layout", layout, LAYOUTS), ("verify", verify, _VERIFY)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return _Options(threshold, layout, verify)


def _state_of(stack: nn.Module) -> _StackForward | None:
    forward = vars(stack).get("forward")
    return forward if isinstance(forward, _StackForward) else None


def _state_in(model: nn.Module) -> _StackForward | None:
    """The state of the enabled stack inside `model`, if there is one."""
    return next(filter(None, map(_state_of, model.modules())), None)


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


@dataclasses.dataclass
class _Request:
    """What the model around a stack asks of it in one call."""

    state: _StackForward
    obstacle: str | None  # to folding
    wants_rows: bool  # the hidden states as rows, if the batch is folded
    padded: PaddedBatch | None = None  # the batch of those rows

    def unfold(self, outputs):
        """Outputs of a head that ran on rows, in the padded layout."""
        if self.padded is not None:
            outputs.logits = self.padded.unfold(outputs.logits)
        return outputs


# From the forward of a model to that of its stack, further in; neither is computed again by gradient checkpointing.
_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("radix_request", default=None)


class _HeadForward(_Forward):
    """Looks at what the head will read: says of a batch not to fold it, or to leave its hidden states in rows."""

    def __init__(self, module: nn.Module, state: _StackForward):
        super().__init__(module)
        self.state = state

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args, **kwargs):
        request = self._request(args, kwargs)
        token = _request.set(request)
        try:
            outputs = self.__wrapped__(*args, **kwargs)
        finally:
            _request.reset(token)
        return request.unfold(outputs)

    @torch.compiler.disable
    def _request(self, args, kwargs) -> _Request:
        head, state = self.module, self.state
        arguments = _hf_heads.bind(_hf_proofs.class_of(head).forward, head, *args, **kwargs)
        obstacle = None
        if _hf_heads.head_reads_padding(head, arguments):
            obstacle = "labels, pooling or logits_to_keep read a masked position"
        wants_rows = self.previous is None and _hf_heads.may_run_on_rows(head, state.module, arguments)
        return _Request(state, obstacle, wants_rows)


class _StackForward(_Forward):
    """Folds a batch where that is right and pays; keeps what belongs to the enabled model."""

    def __init__(self, stack: PreTrainedModel):
        super().__init__(stack)
        self.options = _Options()
        self.is_verified = False
        self.stats = RadixStats()
        self.owners: list[PreTrainedModel] = []  # the modules whose forwards are ours, but for the stack
        self.warned: set[str] = set()

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args, **kwargs):
        outputs = self._folded(args, kwargs)
        return self.__wrapped__(*args, **kwargs) if outputs is None else outputs

    @torch.compiler.disable
    def _folded(self, args, kwargs):
        """The output of a batch that is folded, None for one that runs as before."""
        stack, options = self.module, self.options
        request = _request.get()
        if request is None or request.state is not self:
            request = _Request(self, None, wants_rows=False)
        arguments = _hf_heads.bind(_hf_proofs.class_of(stack).forward, stack, *args, **kwargs)
        obstacle = request.obstacle or _obstacle(stack, arguments)
        if obstacle:
            self._warn(f"a batch runs unfolded because {obstacle}")
        padded = None
        if obstacle is None and options.threshold != 0:
            padded = _fold(stack, arguments)
            if not _pays(padded, options.threshold, stack.config):
                padded = None
        if padded is None:
            self.stats._add(*_size(arguments), folded=False)
            return None
        further = {name: arguments[name] for name in HARMLESS_ARGUMENTS & arguments.keys()}
        calls = _hf_proofs.proof_of(stack).calls * stack.config.num_hidden_layers
        plain = self._plain_states(arguments)
        outputs = run_folded(stack, padded, further, options.layout, calls, request.wants_rows)
        if plain is not None:
            self._check(outputs, plain, padded, request)
        if request.wants_rows:
            request.padded = padded
        self.stats._add(padded.batch.num_tokens, padded.batch.num_rows, folded=True)
        return outputs

    def _plain_states(self, arguments: dict[str, Any]) -> Tensor | None:
        """What the plain model makes of the batch, if that is to be compared."""
        verify = self.options.verify
        if verify == "never" or (verify == "first" and self.is_verified):
            return None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._warn(
                "folded batches are not verified where torch.distributed runs several processes, since a forward more "
                'on one of them could wait for the others; verify="never" says so in advance'
            )
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: arguments[name] for name in names if arguments.get(name) is not None}
        given["use_cache"] = _makes_cache(self.module, arguments)
        return _hf_verify.plain_states(self.__wrapped__, given)

    def _check(self, outputs, plain: Tensor, padded: PaddedBatch, request: _Request) -> None:
        states = outputs[0]
        with torch.no_grad():
            states = padded.unfold(states) if request.wants_rows else states
        reason = _hf_verify.difference(states, plain, padded.is_real())
        if reason is not None:
            self.remove()
            raise RuntimeError(
                f"folding is wrong for this {type(self.module).__name__}: {reason}. The model is as it was before "
                "enable; please report its config"
            )
        self.is_verified = True

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"radix_ops: {text}", stacklevel=4)

    def is_owner(self, model: PreTrainedModel) -> bool:
        return any(owner is model for owner in self.owners)

    def add_owner(self, model: PreTrainedModel) -> None:
        if not self.is_owner(model):
            self.owners.append(model)
            model.radix_stats = self.stats
            if model is not self.module:
                model.forward = _HeadForward(model, self)

    def remove_owner(self, model: PreTrainedModel) -> None:
        self.owners = [owner for owner in self.owners if owner is not model]
        del model.radix_stats
        if model is not self.module:
            model.forward.restore()

    def remove(self) -> None:
        for owner in list(self.owners):
            self.remove_owner(owner)
        self.restore()

    def check_in_place(self) -> None:
        for owner in self.owners:
            if not isinstance(vars(owner).get("forward"), _Forward):
                raise RuntimeError(
                    f"the forward of {type(owner).__name__} was replaced after enable; undo that before disable"
                )


def _fold(stack: PreTrainedModel, arguments: dict[str, Any]) -> PaddedBatch:
    proof = _hf_proofs.proof_of(stack)
    input_ids, positions = arguments["input_ids"], arguments.get("position_ids")
    if positions is None and proof.positions == "columns":
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    sees_packing = proof.packing and not _makes_cache(stack, arguments)
    return PaddedBatch.fold(input_ids, arguments.get("attention_mask"), positions, sees_packing=sees_packing)


def _pays(padded: PaddedBatch, threshold: float | None, config) -> bool:
    batch, positions = padded.batch, padded.shape.numel()
    if batch.num_rows == 0:
        return False
    if threshold is not None:
        return batch.compact_ratio <= threshold
    # Attention's projections are about 4 times hidden_size squared, those of the MLP (that a token sees) 8 times.
    saved = (positions - batch.num_rows) * 12 * config.hidden_size**2
    return batch.num_rows <= _MAX_ROWS_SHARE * positions and saved >= _LEAST_SAVED[batch.input_ids.device.type]


def _obstacle(stack: PreTrainedModel, arguments: dict[str, Any]) -> str | None:
    """Why the call can't be folded, None if it can; empty where nobody needs a warning."""
    given = {name for name, value in arguments.items() if value is not None}
    if arguments.get("use_cache"):
        return "" if given & _CACHES else "use_cache=True was given"
    if given & _CACHES:
        return "a cache was given"
    if arguments.get("output_attentions", getattr(stack.config, "output_attentions", False)):
        return "attention weights are asked for"
    # Harmless are those that only pass through; what the stack itself names may mean anything to it.
    meant = _hf_heads.named_arguments(_hf_proofs.class_of(stack).forward) & (HARMLESS_ARGUMENTS - _HARMLESS_IN_A_STACK)
    unknown = sorted(given - _FOLDABLE_ARGUMENTS | given & meant)
    if unknown:
        return f"{unknown[0]} was given"
    input_ids = arguments.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS:
        return ""
    if input_ids.numel() == 0:
        return ""
    chunk = getattr(stack.config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (stack.config.layer_types or ()) and input_ids.shape[1] > chunk:
        return f"rows of {input_ids.shape[1]} positions are longer than config.attention_chunk_size={chunk}"
    is_packed = arguments.get("attention_mask") is None and arguments.get("position_ids") is not None
    if is_packed and _is_checkpointing(stack) and not torch.is_grad_enabled():
        # transformers makes a cache then, and sees one sequence, from 5.24 on.
        return "position_ids without a mask are read in several ways with gradient checkpointing without gradients"
    return (
        _layout_obstacle(input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))
        or _hf_guards.unfoldable(stack)
        or _hf_guards.interference(stack)
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
    if arguments.get("use_cache") is not None or not getattr(stack.config, "use_cache", False):
        return False
    return not _is_checkpointing(stack)


def _is_checkpointing(stack: PreTrainedModel) -> bool:
    return bool(getattr(stack, "gradient_checkpointing", False) and stack.training)


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
