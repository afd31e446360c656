"""The way of sequences through a runner, in planned batches that shrink where memory ends.

    stats = run(runner, items, budget, folded=True, compute=compute, on_batch=collect)

`compute(indices, inputs)` makes arrays of a batch, one of each kind with a number or more for each of its sequences.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..plan.budget import Budget
from ..plan.planner import Plan, plan_folded, plan_padded
from ..plan.store import TokenStore
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
    """Counts and times of one run, all measured."""

    tokens: int = 0  # of all sequences
    rows: int = 0  # through the decoder stack, a padded run's padding included
    head_rows: int = 0  # through a language model's head
    batches: int = 0
    seconds: float = 0.0


def plan_batches(runner: Runner, items: Items, budget: Budget, folded: bool, pending: np.ndarray | None = None) -> Plan:
    """Plan batches of the items' sequences, or of the `pending` ones: shared prefixes meet, or padding stays small."""
    store, lengths = items.store, items.lengths
    if pending is not None and len(pending) < len(store):
        store, lengths = TokenStore.from_sequences(store[i] for i in pending), lengths[pending]
    if folded:
        return plan_folded(store, **budget.limits(runner.pads_states), lengths=lengths)
    return plan_padded(lengths, max_positions=budget.max_rows, max_padding=runner.max_padding)


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
    before the clock starts. OutOfMemory as `in_memory` has it.
    """

    def compute_batch(indices: np.ndarray) -> Found:
        return compute(indices, [items.store[i][: lengths[i]] for i in indices])

    def plan(pending: np.ndarray, max_rows: int) -> Plan:
        is_first = max_rows == budget.max_rows and len(pending) == len(lengths)
        return first if is_first else plan_batches(runner, items, Budget(max_rows), folded, pending)

    lengths = items.lengths
    stats = RunStats()
    started = time.perf_counter()
    first = plan_batches(runner, items, budget, folded)
    planned = time.perf_counter() - started
    with runner.running(folded):
        if warm_up and len(first):
            compute_batch(list(first)[int(first.rows.argmin())][:_WARM_UP])
        rows_before, head_rows_before = runner.rows, runner.head_rows
        started = time.perf_counter() - planned
        for indices, found in in_memory(len(items.store), budget.max_rows, plan, compute_batch):
            stats.batches += 1
            stats.tokens += int(lengths[indices].sum())
            if on_batch:
                on_batch(indices, found)
        stats.seconds = time.perf_counter() - started
        stats.rows, stats.head_rows = runner.rows - rows_before, runner.head_rows - head_rows_before
    return stats


def in_memory(
    count: int,
    max_rows: int,
    plan: Callable[[np.ndarray, int], Plan],
    compute: Callable[[np.ndarray], T],
) -> Iterator[tuple[np.ndarray, T]]:
    """Yield the indices of each batch of `count` sequences with what `compute` makes of them.

    `plan(pending, max_rows)` makes batches of the sequences `pending`, whose indices count among those. Where a batch
    does not fit into a GPU's memory, it and those behind it are planned anew at half its rows, with a warning in the
    log. OutOfMemory where one sequence alone does not fit.
    """
    pending, max_sequences = np.arange(count), count
    while len(pending):
        is_done = np.zeros(len(pending), bool)
        for chosen, rows in _parts(plan(pending, max_rows), max_sequences):
            found = None
            try:
                found = compute(pending[chosen])
            except torch.OutOfMemoryError as error:
                if len(chosen) == 1:
                    raise OutOfMemory("out of memory: one sequence alone does not fit into it") from error
            if found is None:
                # The handler's traceback would keep the batch's tensors alive.
                torch.cuda.empty_cache()
                _logger.warning("out of memory: going on with batches of half the size")
                # Equal sequences have one row, however many they are.
                max_rows, max_sequences = (rows // 2, max_sequences) if rows > 1 else (1, len(chosen) // 2)
                break
            is_done[chosen] = True
            yield pending[chosen], found
        pending = pending[~is_done]


def _parts(plan: Plan, max_sequences: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches of at most so many sequences, each with the rows of the planned batch that it comes from."""
    for batch, rows in zip(plan, plan.rows.tolist(), strict=True):
        for part in np.array_split(batch, -(-len(batch) // max_sequences)):
            yield part, rows
