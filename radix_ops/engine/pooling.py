"""Pooling: one vector of the hidden states of a text's tokens, as sentence-transformers computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from .runners import States

Pooling: TypeAlias = Literal["last", "mean", "weightedmean", "mean_sqrt_len_tokens", "max", "cls"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
_TOKENS_AT_ONCE = 16_384  # whose hidden states are held in fp32


def tokens_read(poolings: Sequence[str], lengths: np.ndarray, skip: np.ndarray) -> np.ndarray | None:
    """Return the packed tokens that poolings of sequences of these lengths read, or None for all."""
    ends = np.cumsum(lengths)
    read = {"last": ends - 1, "cls": ends - lengths + skip}
    return np.concatenate([read[p] for p in poolings]) if poolings and set(poolings) <= read.keys() else None


def pooled(states: States, poolings: Sequence[str], skip: np.ndarray) -> Tensor:
    """Return the poolings of each of B sequences side by side, [B, len(poolings) * D] in fp32.

    "last" is the state of the last token and "cls" that of the first; "mean" is the mean over the tokens,
    "mean_sqrt_len_tokens" their sum over the root of their number, "weightedmean" has a token's place, from 1, for its
    weight, and "max" is the largest number of each column. All but "last" leave out each sequence's first `skip`
    tokens, int64 [B], which keep their places; every sequence must have more.
    """
    over_tokens = _over_tokens(states, set(poolings), skip) if set(poolings) - {"last", "cls"} else {}
    single = {"last": states.last, "cls": lambda: states.at(states.starts + skip)}
    return torch.cat([over_tokens[p] if p in over_tokens else single[p]().float() for p in poolings], dim=1)


def _over_tokens(states: States, poolings: set[str], skip: np.ndarray) -> dict[str, Tensor]:
    """Return each pooling of several tokens, [B, D] in fp32."""
    device, shape = states.rows.device, (len(states.lengths), states.rows.shape[1])
    sums, weighted = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    largest = torch.full(shape, -torch.inf, device=device)
    sequence_of = np.repeat(np.arange(len(states.lengths)), states.lengths)
    places = np.arange(len(sequence_of)) - states.starts[sequence_of] + 1
    tokens = np.flatnonzero(places > skip[sequence_of])
    for part in np.array_split(tokens, range(_TOKENS_AT_ONCE, len(tokens), _TOKENS_AT_ONCE)):
        rows, index = states.at(part).float(), torch.from_numpy(sequence_of[part]).to(device)
        if poolings & {"mean", "mean_sqrt_len_tokens"}:
            sums += torch.ops.radix.scatter_add(rows, index, shape[0])
        if "weightedmean" in poolings:
            weights = torch.from_numpy(places[part]).to(device)[:, None]
            weighted += torch.ops.radix.scatter_add(rows * weights, index, shape[0])
        if "max" in poolings:
            largest.scatter_reduce_(0, index[:, None].expand_as(rows), rows, "amax")
    counts, skipped = states.lengths - skip, skip * (skip + 1) // 2
    weights_of = states.lengths * (states.lengths + 1) // 2 - skipped

    def over(total: Tensor, divisors: np.ndarray) -> Tensor:
        return total / torch.from_numpy(divisors).to(device, torch.float32)[:, None]

    return {
        "mean": over(sums, counts),
        "mean_sqrt_len_tokens": over(sums, np.sqrt(counts)),
        "weightedmean": over(weighted, weights_of),
        "max": largest,
    }
