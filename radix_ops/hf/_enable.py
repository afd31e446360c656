"""enable, disable and folded: they put forwards and methods in place of others, and put those back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from .._attention import LAYOUTS, Layout
from .._extras import require
from .._interrupts import uninterrupted

require("transformers", "hf", "radix_ops.hf", least="5.2")  # before any module of this package imports it

from transformers import PreTrainedModel  # noqa: E402

from . import guards, proofs  # noqa: E402
from .forward import VERIFY, Options, StackForward, Verify  # noqa: E402
from .sentences import encode, modules  # noqa: E402

M = TypeVar("M", bound=nn.Module)


def enable(
    model: M,
    threshold: float | None = None,
    layout: Layout = "auto",
    verify: Verify = "first",
    cuda_graphs: bool = True,
) -> M:
    """Make `model` fold its batches, in place, and return it.

    Args:
        model: a transformers model with any head, or what is wrapped around one: PEFT, DistributedDataParallel,
            torch.compile, sentence-transformers (below). Its type and config must be proven to fold exactly
            (docs/models.md), and it must be on the CPU or on one CUDA device. Give the outermost module that is called:
            from a module further in, labels and pooling are out of sight (below).
        threshold: fold a batch where rows / real tokens is at most this; 1.0 folds always, 0 never. By default a batch
            is folded where that pays, by a rule that was measured: at most 95% of its padded positions have to be
            computed, and what is saved outweighs the cost of folding, which depends on the model's width and the
            device. Small models and batches run as before.
        layout: that of `radix_ops.attention`.
        verify: "first" compares the first folded batch, and the first that is longer than a window of the config, with
            the plain model, again when the config changed; "always" compares every one and "never" none. A comparison
            costs a forward of the plain model without gradients.
        cuda_graphs: run folded batches of few rows as captured CUDA graphs where that is right (below).

    The model takes the same arguments and returns the same output class and shapes, padded as the input: input_ids and
    attention_mask [B, T], padded on either side or both, last_hidden_state [B, T, D]. Values and gradients are equal
    up to rounding, gradient checkpointing included, but hidden states at masked positions are zeros where a batch was
    folded (logits there are zeros, or the head's of zeros). Positions of a left-padded row are those of the plain model
    or, where only their distances matter (RoPE), count from its first real token. Rows that hold several packed
    sequences are understood as transformers does: from `position_ids`, without a mask and without a cache.

    Where only `config.use_cache` asks for a cache, the plain model makes it when somebody looks inside, as it would
    have in the call. Looking inside raises RuntimeError where the model has changed since. Of changes to weights, one
    goes unseen: an update in place through `.data` that misses all of the 8 values that are kept of each weight, and
    moves 64 hidden states that are kept by less than `verify` allows.

    On CUDA in bfloat16 and float16 the host takes longer to launch a batch of few rows than the GPU to compute it. So
    without gradients, in eval mode and outside autocast, the second folded batch of about the same sizes is captured as
    a CUDA graph, and later ones replay it. By default and under torch.inference_mode() batches fold then that are
    otherwise too small or share nothing, from the second one of a shape on. Each graph is compared with the model's
    forward on two batches before it is used, and all parts of the model are looked at before each replay: replaced
    weights, hooks, adapters and settings count from the next call on, weights changed in place at once. There are at
    most 64 graphs, which share their memory, and `disable` gives it back. Models run eagerly whose forward waits for
    the device or can't be captured for another reason, that have hooks or compiled parts in the decoder stack, or caps
    or sinks of attention scores. Such batches are padded with rows that nobody sees, with gradients as without, so a
    batch that folds has the same bits in both.

    These calls run as before, with one warning for each reason: an explicit `use_cache=True` or `past_key_values`,
    `output_attentions`, `output_hidden_states` with gradients (rows that sequences share have one together),
    `inputs_embeds`, a mask with holes or of another shape than input_ids, unknown arguments, active dropout or noise,
    hooks inside the decoder stack that aren't torch's or transformers' own (they would see rows, [1, num_rows, D]),
    labels or pooling that read a masked position, transforms of torch.func, tracers, fake tensors, weights that were
    quantised after `enable`. A call that brings both a cache and `use_cache=True`, as `generate()` does in each step,
    runs as before without a warning.

    A SentenceTransformer or CrossEncoder (sentence-transformers 5.0 or newer) trains as before, batch by batch.
    `encode` and `predict`, and whatever calls them, return what they did, in the caller's order, up to rounding. But
    they tokenise all texts first and put those together that share prefixes, prompts included. Batches that pay are
    folded: they have at most as many rows as the library's largest batch would have positions, batch_size times the
    longest text in tokens, and at most four times as many positions. All other texts run in the library's own batches.
    So does everything where results are those of tokens (`output_value`) or depend on their batch's padding, where
    inputs are not texts or pairs of texts, and on a model sharded by fully_shard. A pool's processes plan what they
    get, which are neighbours of the sorted texts; they count in their own `radix_stats`. Where a module behind the
    transformers model reads hidden states at masked positions, batches with such positions run as before. All routes of
    a Router are enabled. A SparseEncoder folds batch by batch; a MultiVectorEncoder is refused.

    torch.export gives the plain model's program; with strict=True, and torch.compile with fullgraph=True, it raises.
    Compiled models run uncompiled where they fold. Attention over rows is differentiable once: a second derivative
    raises RuntimeError.

    Enabling again sets the options anew. `model.radix_stats` counts what was done (`RadixStats`). Copies and pickles
    of an enabled model are enabled, with counts of their own. Code that calls the decoder stack's submodules itself,
    past its forward, is not folded. Where torch.distributed runs several processes, nothing is verified, with one
    warning: a forward more on one of them could wait for the others forever.

    Raises TypeError where there is no transformers model. Raises ValueError for a type, class or config that folding
    isn't known to be right for, for weights that are a subclass of Tensor (quantised ones), for a model on several
    devices or on other devices, and for options out of range. A folded batch that verify finds to be wrong raises
    RuntimeError, and the model is disabled.
    """
    options = _check_options(threshold, layout, verify, cuda_graphs)
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel can't be folded: it calls copies of the model; DistributedDataParallel can")
    encoder = modules.find_encoder(proofs.check_module(model, "enable"))
    owners = [proofs.find_model(model)] if encoder is None else modules.owners_to_fold(encoder)
    stacks = [_foldable_stack(owner) for owner in owners]  # all, before the first is changed
    states = [_state_of(stack) or StackForward(stack) for stack in stacks]
    with uninterrupted():
        for owner, state in zip(owners, states, strict=True):
            state.module.forward = state
            state.options, state.verified, state.stats = options, None, states[0].stats
            state.replays.clear()
            state.add_owner(owner)
        if encoder is not None:
            encode.install(encoder, states)
        outer: Any
        for outer in (encoder, model):
            if outer is not None and not any(outer is owner for owner in owners):
                outer.radix_stats = states[0].stats
    return model


def _foldable_stack(owner: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder stack of a transformers model. Raises ValueError where it can't be folded."""
    stack = proofs.find_stack(owner)
    reason = guards.why_misplaced(owner, stack) or guards.why_unfoldable(stack)
    if reason is None and _state_of(stack) is None and "forward" in vars(stack):
        reason = f"the forward of its decoder stack was replaced{guards.replacer(stack)}"
    if reason is not None:
        raise ValueError(f"{type(owner).__name__} can't be folded: {reason}")
    return stack


def disable(model: nn.Module) -> None:
    """Take back `enable`, attribute by attribute, and `model.radix_stats`; do nothing to a model that isn't enabled.

    Backward passes of folded forwards may still be run. Raises RuntimeError where something else replaced a forward
    since: put back the one that stood there, or delete the attribute, and disable again.
    """
    encoder = modules.find_encoder(proofs.check_module(model, "disable"))
    states = _states_in(model, encoder)
    if not states and _has_stats(model, encoder):
        raise RuntimeError("the forward of the decoder stack was replaced after enable; undo that before disable")
    for state in states:
        state.check_in_place()
    with uninterrupted():
        for state in states:
            state.remove()
        if encoder is not None:
            modules.remove(encoder)
            vars(encoder).pop("radix_stats", None)
        vars(model).pop("radix_stats", None)


@contextlib.contextmanager
def folded(
    model: M,
    threshold: float | None = None,
    layout: Layout = "auto",
    verify: Verify = "first",
    cuda_graphs: bool = True,
) -> Iterator[M]:
    """Enable `model` on entry, and on exit put it back: disabled, or enabled with its former options."""
    encoder = modules.find_encoder(proofs.check_module(model, "folded"))
    before = [(state, state.options, state.verified, [*state.owners]) for state in _states_in(model, encoder)]
    was_installed = encoder is not None and modules.is_installed(encoder)
    outer = [module for module in (encoder, model) if module is not None]
    had_no_stats = [module for module in outer if "radix_stats" not in vars(module)]
    is_enabled = False
    try:
        with uninterrupted():
            enable(model, threshold, layout, verify, cuda_graphs)
            is_enabled = True
        yield model
    finally:
        if is_enabled:
            with uninterrupted():
                if not before:
                    disable(model)
                else:
                    _restore(before, _states_in(model, encoder))
                    if encoder is not None and not was_installed:
                        modules.remove(encoder)
                    for module in had_no_stats:
                        vars(module).pop("radix_stats", None)


def _restore(before: list[tuple], states: list[StackForward]) -> None:
    for state, options, verified, owners in before:
        state.options, state.verified = options, verified
        for owner in [owner for owner in state.owners if not any(owner is other for other in owners)]:
            state.remove_owner(owner)
    for state in states:
        if not any(state is known for known, *_ in before):
            state.remove()


def _check_options(threshold: float | None, layout: Layout, verify: Verify, cuda_graphs: bool) -> Options:
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise TypeError(f"threshold must be a number or None, got {type(threshold).__name__}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, or None, got {threshold}")
    for name, value, allowed in (("layout", layout, LAYOUTS), ("verify", verify, VERIFY)):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs must be a bool, got {type(cuda_graphs).__name__}")
    return Options(threshold, layout, verify, cuda_graphs)


def _state_of(stack: nn.Module) -> StackForward | None:
    forward = vars(stack).get("forward")
    return forward if isinstance(forward, StackForward) else None


def _states_in(model: nn.Module, encoder: nn.Module | None) -> list[StackForward]:
    """Return the states of the enabled stacks inside `model`: all of an encoder's, otherwise the first."""
    states = filter(None, map(_state_of, (model if encoder is None else encoder).modules()))
    return list(states if encoder is not None else itertools.islice(states, 1))


def _has_stats(model: nn.Module, encoder: nn.Module | None) -> bool:
    models = [model] if encoder is None else [part for part in encoder.modules() if isinstance(part, PreTrainedModel)]
    return any("radix_stats" in vars(model) for model in models)
