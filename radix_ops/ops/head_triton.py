"""Triton kernels for a block of a loss's logits, each one pass over them; `head._Plain` says what they compute.

They serve half precision, where the rounding of states, weights and gradients hides that of their exp, which is good to
about 1e-6 of its value in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_NO_LOGIT = tl.constexpr(-1e4)  # its exp() is 0, where 0 * -inf would be NaN


@triton.jit
def _statistics_kernel(logits, highest, total, spread, num_columns, HAS_SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row reads it from first to last."""
    row = tl.program_id(0).to(tl.int64)
    high, sum_of_row, spread_of_row = tl.load(highest + row), tl.load(total + row), 0.0
    if HAS_SPREAD:
        spread_of_row = tl.load(spread + row)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * num_columns + column, mask=column < num_columns, other=float("-inf"))
        risen = tl.maximum(high, tl.max(logit, 0))
        anchor = tl.where(risen == float("-inf"), 0.0, risen)
        kept = tl.exp(high - anchor)
        fall = logit - anchor
        weight = tl.exp(fall)
        if HAS_SPREAD:
            rise = anchor - tl.where(high == float("-inf"), 0.0, high)
            spread_of_block = tl.sum(tl.where(weight > 0, -weight * fall, 0.0), 0)
            spread_of_row = (spread_of_row + sum_of_row * rise) * kept + spread_of_block
        sum_of_row = sum_of_row * kept + tl.sum(weight, 0)
        high = risen
    tl.store(highest + row, high)
    tl.store(total + row, sum_of_row)
    if HAS_SPREAD:
        tl.store(spread + row, spread_of_row)


@triton.jit
def _gradient_kernel(
    logits,
    out,
    highest,
    constant,
    linear,
    shift,
    bent,
    num_columns,
    HAS_LINEAR: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IS_BENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < num_columns
    place = row * num_columns + column
    logit = tl.load(logits + place, mask=is_column, other=0.0)
    fall = logit - tl.load(highest + row)
    line = tl.load(constant + row)
    if HAS_LINEAR:
        line += tl.load(linear + row) * tl.maximum(fall, _NO_LOGIT)
    gradient = tl.exp(fall) * line
    if HAS_SHIFT:
        gradient += tl.load(shift + row)
    if IS_BENT:
        gradient *= 1.0 - bent * logit * logit
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=is_column)


def update_statistics(logits: Tensor, highest: Tensor, total: Tensor, spread: Tensor | None) -> None:
    rows, columns = logits.shape
    with torch.cuda.device_of(logits):
        _statistics_kernel[(rows,)](
            logits,
            highest,
            total,
            highest if spread is None else spread,
            columns,
            HAS_SPREAD=spread is not None,
            BLOCK=_BLOCK,
        )


def gradient(logits: Tensor, terms, bent: float, dtype: torch.dtype) -> Tensor:
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=dtype, device=logits.device)
    highest, constant, linear, shift = terms
    with torch.cuda.device_of(logits):
        _gradient_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            logits,
            out,
            highest,
            constant,
            highest if linear is None else linear,
            highest if shift is None else shift,
            bent,
            columns,
            HAS_LINEAR=linear is not None,
            HAS_SHIFT=shift is not None,
            IS_BENT=bent != 0,
            BLOCK=_BLOCK,
        )
    return out
