"""Registers an op's gradient: by kernels of our own where torch has what they need, else by torch.library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclasses.dataclass(frozen=True)
class Formula:
    """The gradient of `op` for its first `num_inputs` arguments.

    `save(*arguments)` returns (tensors, rest), for `backward((*tensors,), rest, *grads)` and `jvp` likewise. With
    `saves_outputs` the op's outputs stand before the tensors, and only the first of them has a gradient.
    """

    op: torch._ops.OpOverload
    num_inputs: int
    save: Callable
    backward: Callable
    jvp: Callable | None = None
    saves_outputs: bool = False

    def save_for_backward(self, ctx, arguments: tuple, outputs) -> tuple[Tensor, ...]:
        tensors, ctx.rest = self.save(*arguments)
        if self.saves_outputs:
            tensors = (*outputs, *tensors)
            ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*tensors)
        return tensors


class _KeysBelowAutograd(dict):
    """Maps a dispatch key set's bits to the key set of the kernels below autograd; to compute it costs 0.3 us."""

    def __init__(self, keys_of_bits: Callable[[int], torch._C.DispatchKeySet], below: torch._C.DispatchKeySet):
        super().__init__()
        self.keys_of_bits, self.below = keys_of_bits, below

    def __missing__(self, bits: int) -> torch._C.DispatchKeySet:
        keys = self[bits] = self.keys_of_bits(bits) & self.below
        return keys


@dataclasses.dataclass(frozen=True)
class _SingleLevel:
    """Private parts of torch, which an Autograd kernel needs to run at one level of function transforms."""

    function: type  # torch.autograd.Function would start from the top level
    enabled: Callable[[], AbstractContextManager]
    below_autograd: Callable[[], AbstractContextManager]
    keys_below: _KeysBelowAutograd

    @classmethod
    def find(cls) -> _SingleLevel | None:
        """Return the parts of this torch; None where one is gone, as each may with a release."""
        try:
            from torch._functorch.utils import enable_single_level_autograd_function
            from torch.autograd.function import _SingleLevelFunction

            forward_ad._current_level  # noqa: B018  (read by the kernels)
            return cls(
                _SingleLevelFunction,
                enable_single_level_autograd_function,
                torch._C._AutoDispatchBelowAutograd,
                _KeysBelowAutograd(torch._C.DispatchKeySet.from_raw_repr, torch._C._after_autograd_keyset),
            )
        except (ImportError, AttributeError):
            return None


def _register_single_level(formula: Formula, parts: _SingleLevel) -> None:
    op, num_inputs = formula.op, formula.num_inputs
    keys_below, enabled, grad_enabled = parts.keys_below, parts.enabled, torch.is_grad_enabled

    base: Any = parts.function

    class Function(base):
        @staticmethod
        def forward(ctx, keyset, *arguments):
            with parts.below_autograd():
                outputs = op.redispatch(keys_below[keyset.raw_repr()], *arguments)
            ctx.save_for_forward(*formula.save_for_backward(ctx, arguments, outputs))
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            grad_inputs = formula.backward(ctx.saved_tensors, ctx.rest, *grads)
            return (None, *grad_inputs, *[None] * (len(ctx.needs_input_grad) - 1 - num_inputs))

        @staticmethod
        def jvp(ctx, _, *tangents):
            if formula.jvp is None:
                raise RuntimeError(f"{op.name()} has no forward-mode gradient; use backward mode")
            return formula.jvp(ctx.saved_tensors, ctx.rest, *tangents[:num_inputs])

    Function.__name__ = Function.__qualname__ = op.name().replace("::", "_").replace(".", "_")
    # The op's own redispatch calls this one, and takes a little longer.
    redispatch = getattr(getattr(op, "_handle", None), "redispatch_boxed", op.redispatch)

    def autograd_kernel(keyset, first, *others):
        # None, which the kernel refuses, arrives here too.
        needs_gradient = (first is not None and first.requires_grad) or (
            num_inputs > 1 and any(x is not None and x.requires_grad for x in others[: num_inputs - 1])
        )
        # Inside a dual level, any tensor may carry a tangent.
        if (needs_gradient and grad_enabled()) or forward_ad._current_level >= 0:
            with enabled():
                return Function.apply(keyset, first, *others)
        return redispatch(keys_below[keyset.raw_repr()], first, *others)

    _library.impl(op, autograd_kernel, "Autograd", with_keyset=True)


class _RefusingTangents(torch.library.Library):
    """Makes kernels of torch.library, which drop forward-mode tangents without a word, refuse them."""

    def impl(self, op_name, fn, *arguments, **options):
        def kernel(*inputs):
            if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
                raise RuntimeError(
                    f"radix::{op_name} has no forward-mode gradient with torch {torch.__version__}; use backward mode"
                )
            return fn(*inputs)

        super().impl(op_name, kernel, *arguments, **options)


def _register_with_library(formula: Formula) -> None:
    def setup_context(ctx, inputs, output):
        formula.save_for_backward(ctx, inputs, output)

    def backward(ctx, *grads):
        grad_inputs = formula.backward(ctx.saved_tensors, ctx.rest, *grads)
        return (*grad_inputs, *[None] * (len(ctx.needs_input_grad) - formula.num_inputs))

    torch.library.register_autograd(formula.op.name(), backward, setup_context=setup_context, lib=_library)


_single_level: Any = _SingleLevel.find()
_library = (_RefusingTangents if _single_level is None else torch.library.Library)("radix", "IMPL")


def register(formula: Formula) -> None:
    """Give an op its gradient.

    `torch.library.register_autograd` takes three times as long on a call that needs no gradient, which is more than a
    small gather itself takes, and knows neither forward mode nor torch.func's transforms: it serves a torch that lacks
    what kernels of our own need.
    """
    if _single_level is None:
        _register_with_library(formula)
    else:
        _register_single_level(formula, _single_level)
