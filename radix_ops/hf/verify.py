"""Compares a folded batch with the plain model: the guard behind `verify=` of `radix_ops.hf.enable`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Rounding may make these relative errors of a token's hidden state, the largest and the mean, with room: sums in
# another order differ by 1e-6 in float32 and, over 36 layers of random weights in bfloat16, by 0.05. A token that
# attends to something else differs by its own size.
_LIMITS = 1e-2, 1e-3
_HALF_LIMITS = 0.5, 0.1
# In half precision rounding may also decide which experts a token goes to, so this share of tokens is looked at.
_HALF_QUANTILE = 0.99
_POSITIONS_AT_ONCE = 16_384


@contextlib.contextmanager
def keep_random(input_ids: Tensor) -> Iterator[None]:
    """Leave random numbers as they were before a forward on the device of input_ids."""
    with torch.random.fork_rng(devices=[input_ids.device] if input_ids.is_cuda else []):
        yield


@torch.no_grad()
def plain_states(forward: Callable, arguments: dict[str, Any]) -> Tensor:
    """Return last_hidden_state [B, T, D] of the plain forward, made of some rows of the batch at a time.

    Random numbers stay as they were.
    """
    input_ids = arguments["input_ids"]
    count = max(1, _POSITIONS_AT_ONCE // input_ids.shape[1])
    states = []
    with keep_random(input_ids):
        for begin in range(0, len(input_ids), count):
            chosen = {
                name: value[begin : begin + count] if isinstance(value, Tensor) and len(value) > 1 else value
                for name, value in arguments.items()
            }
            states.append(forward(**chosen)[0])
    return torch.cat(states)


def is_exact(stack: nn.Module) -> bool:
    """Return whether its products are computed in float32 or more at this moment: not under autocast, nor as TF32."""
    parameter = next(stack.parameters())
    if torch.is_autocast_enabled(parameter.device.type) or torch.get_float32_matmul_precision() != "highest":
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in stack.parameters() if p.is_floating_point())


@torch.no_grad()
def difference(got: Tensor, want: Tensor, is_real: Tensor, is_exact: bool) -> str | None:
    """Return how states [B, T, D] differ, where is_real [B, T], by more than rounding makes, or None.

    Tokens whose wanted state isn't finite are left out.
    """
    got, want = got[is_real].float(), want[is_real].float()
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.nan_to_num(errors[want.isfinite().all(-1)], nan=torch.inf)
    if len(errors) == 0:
        return None
    largest_allowed, mean_allowed = _LIMITS if is_exact else _HALF_LIMITS
    high = errors.max() if is_exact or len(errors) >= 2**24 else errors.quantile(_HALF_QUANTILE)
    if high <= largest_allowed and errors.mean() <= mean_allowed:
        return None
    return (
        f"hidden states differ from the plain model's by {float(errors.mean()):.2g} of their norm on average and "
        f"{float(errors.max()):.2g} at most, where rounding makes at most {mean_allowed} and {largest_allowed}"
    )
