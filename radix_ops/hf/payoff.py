"""The rule by which folding a batch saves more than it costs. For `radix_ops.hf`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .fold import PaddedBatch

# Measured on a CPU with Llama layers 576 wide, 1 to 64 sequences of 16 to 4096 tokens, forward and backward: at equal
# rows folding takes up to 1.05 times as long as the plain model, at 0.93 of the rows it is never slower.
_MAX_ROWS_SHARE = 0.95
# Folding must save more than it costs the host: positions saved times hidden_size ** e must be at least `least`, for
# (e, least). On a CPU time goes with the layers' products. On a GPU it went with hidden_size, from 1024 to 4096, and
# batches too small to fill it gain nothing (benchmarks/bench_hf.py).
_LEAST_SAVED = {"cpu": (2, 2.5e6), "cuda": (1, 6.5e6)}


def may_pay(positions: int, threshold: float | None, stack: PreTrainedModel, device: torch.device) -> bool:
    """Return whether folding a batch of so many positions may pay, whatever its sequences share."""
    exponent, least = _LEAST_SAVED[device.type]
    return threshold is not None or positions * stack.config.hidden_size**exponent >= least


def pays(
    num_rows: int,
    num_tokens: int,
    positions: int,
    threshold: float | None,
    stack: PreTrainedModel,
    device: torch.device,
) -> bool:
    """Return whether folding pays for a batch of `num_tokens` real tokens that would run as `positions`."""
    if num_rows == 0:
        return False
    if threshold is not None:
        return num_rows / num_tokens <= threshold
    return num_rows <= _MAX_ROWS_SHARE * positions and may_pay(positions - num_rows, None, stack, device)


def pays_for(padded: PaddedBatch, threshold: float | None, stack: PreTrainedModel) -> bool:
    """Return whether folding `padded` pays."""
    batch, positions = padded.batch, padded.shape.numel()
    return pays(batch.num_rows, batch.num_tokens, positions, threshold, stack, batch.input_ids.device)
