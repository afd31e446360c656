"""Sequences taken through a runner in planned batches, in halves where memory ends.

    stats = run(runner, items, budget, folded=True, compute=compute, on_batch=collect)

`compute(indices, inputs)` makes arrays of a batch, one of each kind with a number or more for each of its sequences.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..plan.budget import Budget
from ..plan.planner import Plan, plan_folded, plan_padded
from .errors import OutOfMemory
from .items import Items
from .runners import Runner

Found = tuple[np.ndarray, ...]
Compute = Callable[[np.ndarray, list[np.ndarray]], Found]
OnBatch = Callable[[np.ndarray, Found], object]
T = TypeVar("T")

_WARM_UP = 4  # sequences: a whole batch may be the whole job

_logger = logging.getLogger(__name__)


@dataclass
class RunStats:
    """What one run did; all counts and times are measured."""

    tokens: int = 0  # of all sequences
    rows: int = 0  # that went through the decoder stack, a padded run's padding included
    head_rows: int = 0  # that went through a language model's head
    batches: int = 0
    seconds: float = 0.0


def plan_batches(runner: Runner, items: Items, budget: Budget, folded: bool) -> Plan:
    """Return batches of the items' sequences: shared prefixes meet, or padding stays small."""
    if folded:
        return plan_folded(items.store, **budget.limits(runner.pads_states), lengths=items.lengths)
    return plan_padded(items.lengths, max_positions=budget.max_rows, max_padding=runner.max_padding)


@torch.inference_mode()
def run(
    runner: Runner,
    items: Items,
    budget: Budget,
    folded: bool,
    compute: Compute,
    on_batch: OnBatch | None = None,
    warm_up: bool = False,
) -> RunStats:
    """Take all sequences through `compute(indices, inputs)`, whose arrays go to `on_batch(indices, arrays)`.

    The time counts planning, folding, the model and `on_batch`; `warm_up` runs a few sequences of the smallest batch
    before the clock starts. OutOfMemory as `in_halves` has it.
    """

    def compute_batch(indices: np.ndarray) -> Found:
        return compute(indices, [items.store[i][: lengths[i]] for i in indices])

    lengths = items.lengths
    stats = RunStats()
    started = time.perf_counter()
    plan = plan_batches(runner, items, budget, folded)
    planned = time.perf_counter() - started
    with runner.running(folded):
        if warm_up and len(plan):
            compute_batch(list(plan)[int(plan.rows.argmin())][:_WARM_UP])
        rows_before, head_rows_before = runner.rows, runner.head_rows
        started = time.perf_counter() - planned
        for indices, found in in_halves(plan, compute_batch):
            stats.batches += 1
            stats.tokens += int(lengths[indices].sum())
            if on_batch:
                on_batch(indices, found)
        stats.seconds = time.perf_counter() - started
        stats.rows, stats.head_rows = runner.rows - rows_before, runner.head_rows - head_rows_before
    return stats


def in_halves(batches: Iterable[np.ndarray], compute: Callable[[np.ndarray], T]) -> Iterator[tuple[np.ndarray, T]]:
    """Yield each batch of indices with what `compute` makes of it, in parts where memory does not hold the whole.

    A batch that does not fit into a GPU's memory, and those behind it, run in halves, with a warning in the log.
    OutOfMemory where one sequence alone does not fit.
    """
    num_parts = 1
    for batch in batches:
        waiting = np.array_split(batch, min(num_parts, len(batch)))
        while waiting:
            part = waiting.pop(0)
            found = None
            try:
                found = compute(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise OutOfMemory("out of memory: one sequence alone does not fit into it") from error
            if found is not None:
                yield part, found
                continue
            # Outside of the handler nothing holds on to what was computed.
            torch.cuda.empty_cache()
            num_parts *= 2
            _logger.warning("out of memory: going on with batches of half the size")
            waiting = [half for part in (part, *waiting) for half in np.array_split(part, min(2, len(part)))]
