"""Shares of rows with their confidence intervals."""

from __future__ import annotations

import math
from typing import Any

LEVEL, _QUANTILE = 0.95, 1.959963984540054  # of the normal distribution, for both sides
INTERVAL = {"method": "Wilson score", "level": LEVEL}


def share_of(correct: int, count: int) -> dict[str, Any]:
    """Return the number that is "correct", its share of `count` as "value", and the ends of its interval as "low" and
    "high"."""
    low, high = wilson_interval(correct, count)
    return {"correct": correct, "value": correct / count, "low": low, "high": high}


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927), without continuity correction, at 95%."""
    share, square = correct / count, _QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    # Rounding must not take the ends of the scale out of the interval.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == count else middle + half)
