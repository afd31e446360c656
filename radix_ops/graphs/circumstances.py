"""Tells what is at work around a call: what no graph may stand in for, and the settings that choose kernels."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import attention
from torch.nn.modules import module as _every_module
from torch.utils._device import DeviceContext

from ..batch import FoldedBatch
from ..ops.flash_packages import current_flash_attention, may_be_captured

# Whoever sets it looks for the launch that fails. CUDA reads it once.
_IS_BLOCKING = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def why_eager(batch: FoldedBatch, rows: torch.Tensor | None = None) -> str | None:
    """Return why this call, on a batch that is on CUDA or elsewhere, can't be a graph's replay, or None."""
    if torch.is_grad_enabled():
        return "gradients may be asked for"
    tables = (batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    tensors = (batch.input_ids, batch.position_ids, *tables, *(() if rows is None else (rows,)))
    if not all(type(x) is torch.Tensor and x.is_cuda for x in tensors):
        return "a tensor of the batch is on no CUDA device, or of a class of its own"
    if not all(x.dtype == torch.int32 for x in tables):
        return "a table of the batch is not of int32"
    if not may_be_captured():
        return "the flash attention in use was not tried in graphs"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "a graph is being captured"
    if _IS_BLOCKING:
        return "CUDA_LAUNCH_BLOCKING is set"
    if any(getattr(_every_module, name) for name in _HOOKS):
        return "there is a hook on all modules"
    return _why_traced()


def _why_traced() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func is at work"
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return "a tracer or another mode is at work"
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    if any(type(mode) is not DeviceContext for mode in modes):
        return "a TorchFunctionMode is at work"
    return None


def settings() -> tuple[Hashable, ...]:
    """Return what else decides which kernels a forward launches."""
    products: Any = torch.backends.cuda.matmul
    deterministic: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        products.allow_fp16_reduced_precision_reduction,
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_accumulation,
        products.fp32_precision,
        torch.get_default_dtype(),
        torch.backends.cuda.preferred_blas_library(),
        attention.current_flash_attention_impl(),
        current_flash_attention(),
    )
