"""Shards: stretches of a plan's batches of about equal cost, each for a worker that knows nothing of the others.

    shards = plan.shards(8)
    for number in shards[0].batches:
        indices = plan[number]
    print(shards.imbalance)

Batches share no rows, so it costs nothing to cut between them. A stretch keeps neighbours together: where its batches
don't fit into a worker's memory, smaller ones of the same sequences lose least.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_UNIT_BITS = 60  # of the sum of all costs as a whole number


@dataclass(frozen=True, eq=False)
class Shard:
    """A worker's part of a plan.

    Attributes:
        batches: int64, ascending, the numbers of the batches that it computes: `plan[number]` gives each one's
            sequences. A plan of fewer batches than shards leaves some shards empty.
        num_rows, num_tokens, cost: of these batches, as `Plan` counts them.
    """

    batches: npt.NDArray[np.int64]
    num_rows: int
    num_tokens: int
    cost: float

    def __len__(self) -> int:
        return len(self.batches)


class Shards(tuple[Shard, ...]):
    """The shards of a plan in the order of its batches."""

    @property
    def imbalance(self) -> float:
        """By how much the dearest shard exceeds the mean, as a share of the mean; 0.0 where all cost the same.

        Workers that start together, one shard each, take 1 + imbalance times as long as if all were equal.
        """
        costs = [shard.cost for shard in self]
        return max(costs) * len(costs) / sum(costs) - 1 if any(costs) else 0.0


def cut_shards(rows: np.ndarray, tokens: np.ndarray, costs: np.ndarray, is_done: np.ndarray, num_shards: int) -> Shards:
    """Return shards of the batches of these rows, tokens and costs, [batches]; those that are done are in none."""
    pending = np.flatnonzero(~is_done)
    parts = np.split(pending, cut_evenly(costs[pending], num_shards)[:-1])
    return Shards(
        Shard(part, int(rows[part].sum()), int(tokens[part].sum()), float(sum(costs[part].tolist()))) for part in parts
    )


def cut_evenly(costs: np.ndarray, num_parts: int) -> list[int]:
    """Return where each of `num_parts` stretches of float64 costs [n] ends, the last one at n; some may be empty.

    The dearest stretch is as cheap as stretches can have it. Within that bound the cuts stand where the rest, less what
    single costs exceed a stretch by, is divided most evenly.
    """
    count, units = len(costs), _whole(costs)
    used = np.flatnonzero(units)
    if len(used) <= num_parts:
        # Each cost is a stretch, with what costs nothing before it.
        return [*(used[:-1] + 1).tolist(), *[count] * (num_parts - max(0, len(used) - 1))]
    sums = _sums(units)
    most = _least_bound(sums, int(units.max()), num_parts)
    earliest = [count] * num_parts  # end of each stretch with which the others hold the rest
    for part in range(num_parts - 1, 0, -1):
        earliest[part - 1] = bisect_left(sums, sums[earliest[part]] - most)
    even = _sums(np.minimum(units, _level(units, num_parts)))
    ends, start = [], 0
    for part in range(num_parts - 1):
        goal = even[start] + (even[count] - even[start]) // (num_parts - part)
        end = bisect_left(even, goal, start)
        if end > start + 1 and goal - even[end - 1] <= even[end] - goal:
            end -= 1
        start = min(max(end, earliest[part]), _furthest(sums, start, most))
        ends.append(start)
    return [*ends, count]


def _whole(costs: np.ndarray) -> np.ndarray:
    """Return costs as int64 multiples of a power of 2, so that sums are exact and the same on every machine."""
    total = float(np.cumsum(costs)[-1]) if len(costs) else 0.0
    return np.rint(np.ldexp(costs, _UNIT_BITS - int(np.frexp(total)[1]))).astype(np.int64)


def _sums(units: np.ndarray) -> memoryview:
    """Return the sums of the first 0, 1, ... n units."""
    return memoryview(np.concatenate([[0], np.cumsum(units)]))


def _furthest(sums: memoryview, start: int, most: int) -> int:
    """Return how far a stretch from `start` of at most so many units reaches."""
    return bisect_right(sums, sums[start] + most, start) - 1


def _least_bound(sums: memoryview, largest: int, num_parts: int) -> int:
    """Return the least bound that so many stretches can keep."""
    count = len(sums) - 1
    low = max(largest, -(-sums[count] // num_parts))
    high = low + largest
    while low < high:
        bound, end = (low + high) // 2, 0
        for _ in range(num_parts):
            end = _furthest(sums, end, bound)
        if end == count:
            high = bound
        else:
            low = bound + 1
    return low


def _level(units: np.ndarray, num_parts: int) -> int:
    """Return what stretches cost on average beside those of a single cost that exceeds this."""
    falling = np.sort(units)[::-1][:num_parts]
    rest = int(units.sum()) - np.concatenate([[0], np.cumsum(falling[:-1])])
    levels = rest // np.arange(num_parts, 0, -1)
    return max(1, int(levels[np.argmax(falling <= levels)]))
