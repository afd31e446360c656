"""The calls of flash attention, torch's and those of packages, with one signature for all.

q [rows, H, D], k and v [keys, H_kv, D] have one head_dim, a multiple of 8, and rows and heads at multiples of 16 bytes.
A forward returns out [rows, H, D] and logsumexp [H, rows], in float32 and base e, which any of the backwards takes.
Rows behind the last run are left as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import MAX_WINDOW


class Runs(NamedTuple):
    """Which queries attend to which keys, and how; masks are causal and aligned at the end of keys."""

    cu_seqlens_q: Tensor  # int32 [R + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    window: int  # keys that a query sees; 0: all before it

    @property
    def window_left(self) -> int:
        """How many keys before its own a query sees; -1: all."""
        return min(self.window, MAX_WINDOW) - 1


class Calls(NamedTuple):
    """One implementation of flash attention."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # of q, k, v and runs
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # of grad_out, q, k, v, out, logsumexp and runs


def _torch_forward(q, k, v, runs: Runs):
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *runs[:4], 0.0, runs.window == 0, False, scale=runs.scale, **_torch_window(runs)
    )
    return out, logsumexp


def _torch_backward(grad_out, q, k, v, out, logsumexp, runs: Runs):
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout, which is off
    return torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, logsumexp, *runs[:4], 0.0, runs.window == 0, unused, unused,
        scale=runs.scale, **_torch_window(runs),
    )  # fmt: skip


def _torch_window(runs: Runs) -> dict[str, int]:
    return {"window_size_left": runs.window_left, "window_size_right": 0} if runs.window else {}


TORCH = Calls(_torch_forward, _torch_backward)


def load_fa3_fwd() -> Calls:
    """Load FlashAttention 3's forward for Hopper GPUs, as the package fa3-fwd has it; its backward is torch's."""
    importlib.import_module("fa3_fwd._C")  # registers the op
    op: Any = torch.ops.fa3_fwd.fwd

    def forward(q, k, v, runs: Runs):
        # With one split the sums are the same on every run.
        out, logsumexp, *_ = op(
            q, k, v, cu_seqlens_q=runs.cu_seqlens_q, cu_seqlens_k=runs.cu_seqlens_k, max_seqlen_q=runs.max_seqlen_q,
            max_seqlen_k=runs.max_seqlen_k, softmax_scale=runs.scale, is_causal=True, num_splits=1,
        )  # fmt: skip
        return out, logsumexp

    return TORCH._replace(forward=forward)


def load_flash_attn_4() -> Calls:
    """Load FlashAttention 4, forward and backward, as the package flash-attn-4 has it."""
    interface: Any = importlib.import_module("flash_attn.cute.interface")

    def options(runs: Runs) -> dict[str, Any]:
        window = {"window_size_left": runs.window_left, "window_size_right": 0} if runs.window else {"causal": True}
        return {
            "cu_seqlens_q": runs.cu_seqlens_q, "cu_seqlens_k": runs.cu_seqlens_k, "max_seqlen_q": runs.max_seqlen_q,
            "max_seqlen_k": runs.max_seqlen_k, "softmax_scale": runs.scale, **window,
        }  # fmt: skip

    def forward(q, k, v, runs: Runs):
        with torch.cuda.device(q.device):
            out, logsumexp, *_ = interface._flash_attn_fwd(q, k, v, **options(runs), return_lse=True)
        return out, logsumexp

    def backward(grad_out, q, k, v, out, logsumexp, runs: Runs):
        with torch.cuda.device(q.device):
            return interface._flash_attn_bwd(q, k, v, out, grad_out, logsumexp, **options(runs))[:3]

    return Calls(forward, backward)
