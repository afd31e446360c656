"""Whether a call computes on values of tensors that can be read, for `radix_ops.hf`: not in transforms and tracers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Those of torch's own that stand for tensors without values or record what is done; users' see what is computed.
_TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_READ = ("input_ids", "attention_mask", "position_ids")
_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is torch's own kind of tensor and no subclass, which may compute in any way."""
    return type(tensor) in _PLAIN


def why_unreadable(arguments: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments can't look at a batch's values and fold by them; None if it can."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "vmap, jvp or another transform is at work"  # whatever they hold: parameters may be theirs alone
    if torch.jit.is_tracing():
        return "torch.jit traces the model"
    for tracer in _TRACERS:
        mode = torch._C._get_dispatch_mode(tracer)
        if mode is not None:
            return f"{type(mode).__name__} is at work"
    for name in _READ:
        tensor = arguments.get(name)
        if not isinstance(tensor, Tensor):
            continue
        if not is_plain(tensor):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is captured"
    return None
