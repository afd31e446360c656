"""Floating-point operations of a forward pass through a transformer's decoder layers, from numbers alone.

Norms, activations, RoPE, softmax and moving data count as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one row through all layers."""

    linear: float  # in products with weights
    attention: Mapping[int | None, int]  # with each key, by the tokens that layers look back at; None: all
    folds_attention: bool = True  # whether attention is computed on rows, too, and not on the padded batch

    def of(self, num_rows: int, num_keys: Callable[[int | None], int]) -> float:
        """Return the FLOPs of rows that attend to num_keys(window) keys in all, where a row sees at most `window`."""
        return self.linear * num_rows + sum(flops * num_keys(window) for window, flops in self.attention.items())


def weight_flops(num_weights: int) -> int:
    """Return the FLOPs of one row in products with so many weights."""
    return 2 * num_weights


def attention_flops(num_heads: int, query_width: int, value_width: int) -> int:
    """Return the FLOPs of one row with one key in one layer; a key is as wide as a query."""
    return 2 * num_heads * (query_width + value_width)
