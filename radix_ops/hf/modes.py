"""Tells calls whose tensors have values from those of transforms and tracers, which have none. For `radix_ops.hf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# torch's own modes that make tensors without values or record what is done; users' modes see what is computed.
_TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
READ = ("input_ids", "attention_mask", "position_ids")  # by the values of these a batch folds
_OUTSIDE = "; outside of that batches fold"
_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Return whether it is torch's own kind of tensor; a subclass may compute in any way."""
    return type(tensor) in _PLAIN


def why_unreadable(arguments: Mapping[str, Any]) -> str | None:
    """Return why a call with these arguments can't look at a batch's values, and what could, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        # Even where arguments are plain, parameters may be its own.
        return f"vmap, jvp or another transform is at work{_OUTSIDE}"
    if torch.jit.is_tracing():
        return f"torch.jit traces the model{_OUTSIDE}"
    for tracer in _TRACERS:
        mode = torch._C._get_dispatch_mode(tracer)
        if mode is not None:
            return f"{type(mode).__name__} is at work{_OUTSIDE}"
    for name in READ:
        tensor = arguments.get(name)
        if not isinstance(tensor, Tensor):
            continue
        if not is_plain(tensor):
            return f"{name} is a {type(tensor).__name__}; give a plain tensor"
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return f"a CUDA graph is captured{_OUTSIDE}"
    return None


def read_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of READ that a call gives."""
    return {name: arguments[name] for name in READ if arguments.get(name) is not None}
