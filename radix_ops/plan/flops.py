"""Floating-point operations of a forward pass through a transformer's decoder layers, from numbers alone.

Norms, activations, RoPE, softmax and moving data count as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one row through all layers. ValueError for any that are negative or beyond 1e30."""

    linear: float  # in products with weights
    attention: Mapping[int | None, int]  # with each key, by the tokens that layers look back at; None: all
    folds_attention: bool = True  # whether attention is computed on rows, too, and not on the padded batch

    def __post_init__(self):
        for name, flops in (("linear", self.linear), *((f"attention[{w}]", f) for w, f in self.attention.items())):
            if not 0 <= flops <= 1e30:
                raise ValueError(f"{name} must be FLOPs from 0 to 1e30, got {flops}")

    @overload
    def of(self, num_rows: int, num_keys: Callable[[int | None], int]) -> float: ...

    @overload
    def of(self, num_rows: np.ndarray, num_keys: Callable[[int | None], np.ndarray]) -> np.ndarray: ...

    def of(self, num_rows: Any, num_keys: Callable[[int | None], Any]) -> Any:
        """Return the FLOPs of rows that attend to num_keys(window) keys in all, where a row sees at most `window`; an
        array of those of each batch where the numbers are arrays."""
        return self.linear * num_rows + sum(flops * num_keys(window) for window, flops in self.attention.items())


def weight_flops(num_weights: int) -> int:
    """Return the FLOPs of one row in products with so many weights."""
    return 2 * num_weights


def attention_flops(num_heads: int, query_width: int, value_width: int) -> int:
    """Return the FLOPs of one row with one key in one layer; a key is as wide as a query."""
    return 2 * num_heads * (query_width + value_width)


def visible_keys(lengths: np.ndarray, window: int | None = None) -> np.ndarray:
    """Return how many keys all tokens of a sequence attend to, causally, each to `window` or to all, in the
    dtype of `lengths`."""
    inside = lengths if window is None else np.minimum(lengths, window)
    return inside * (inside + 1) // 2 + (lengths - inside) * (window or 0)
