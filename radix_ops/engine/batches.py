"""The way of sequences through a runner, in planned batches that shrink where memory ends.

    stats = run(runner, items, budget, folded=True, compute=compute, on_batch=collect)

`compute(indices, inputs)` makes arrays of a batch, one of each kind with a number or more for each of its sequences.
"""

from __future__ import annotations

import contextlib
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
    cpu_seconds: float = 0.0  # of all threads of the process


def plan_batches(runner: Runner, items: Items, budget: Budget, folded: bool, pending: np.ndarray | None = None) -> Plan:
    """Plan batches of the items' sequences, or of the `pending` ones: shared prefixes meet, or padding stays small."""
    store, lengths = items.store, items.lengths
    if pending is not None and len(pending) < len(store):
        store, lengths = TokenStore.from_sequences(store[i] for i in pending), lengths[pending]
    if folded:
        return plan_folded(store, **budget.limits(runner.pads_states), lengths=lengths)
    return plan_padded(lengths, max_positions=budget.max_rows, max_padding=runner.max_padding)


class Pass:
    """The way of all sequences through `compute(indices, inputs)` in planned batches, gone a stretch at a time.

    stats: what the stretches so far took. Their time counts planning, folding, the model and what takes the numbers.
    """

    def __init__(self, runner: Runner, items: Items, budget: Budget, folded: bool, compute: Compute):
        self.stats = RunStats()
        self._runner, self._items, self._budget, self._folded = runner, items, budget, folded
        self._compute, self._lengths = compute, items.lengths
        with self._clock():
            self._plan = plan_batches(runner, items, budget, folded)
        self._batches = in_memory(len(items.store), budget.max_rows, self._planned, self._computed)

    @property
    def done(self) -> float:
        """The share of all tokens that is done."""
        return self.stats.tokens / self._plan.num_tokens if self._plan.num_tokens else 1.0

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a few sequences of the smallest batch, which no count or time tells of."""
        if len(self._plan):
            with self._runner.running(self._folded):
                self._computed(list(self._plan)[int(self._plan.rows.argmin())][:_WARM_UP])

    @torch.inference_mode()
    def advance(
        self, on_batch: OnBatch | None = None, *, share: float = 1.0, seconds: float = float("inf")
    ) -> list[np.ndarray]:
        """Go on until the given share of all tokens is done, or so many seconds have passed, and return the batches of
        this stretch. Arrays go to `on_batch(indices, arrays)`.

        OutOfMemory as `in_memory` has it.
        """
        stats = self.stats
        gone: list[np.ndarray] = []
        if self.done >= share:
            return gone
        with self._runner.running(self._folded):
            rows_before, head_rows_before = self._runner.rows, self._runner.head_rows
            started = time.perf_counter()
            with self._clock():
                for indices, found in self._batches:
                    stats.batches += 1
                    stats.tokens += int(self._lengths[indices].sum())
                    gone.append(indices)
                    if on_batch:
                        on_batch(indices, found)
                    if self.done >= share or time.perf_counter() - started >= seconds:
                        break
            stats.rows += self._runner.rows - rows_before
            stats.head_rows += self._runner.head_rows - head_rows_before
        return gone

    @torch.inference_mode()
    def repeat(self, batches: list[np.ndarray]) -> RunStats:
        """Compute batches that are done once more, and return the time that this took."""
        stats = RunStats()
        with self._runner.running(self._folded), self._clock(stats):
            for indices in batches:
                self._computed(indices)
        return stats

    def _computed(self, indices: np.ndarray) -> Found:
        return self._compute(indices, [self._items.store[i][: self._lengths[i]] for i in indices])

    def _planned(self, pending: np.ndarray, max_rows: int) -> Plan:
        if max_rows == self._budget.max_rows and len(pending) == len(self._lengths):
            return self._plan
        return plan_batches(self._runner, self._items, Budget(max_rows), self._folded, pending)

    @contextlib.contextmanager
    def _clock(self, stats: RunStats | None = None) -> Iterator[None]:
        """Add the time until the end to the counts."""
        stats = self.stats if stats is None else stats
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        yield
        stats.seconds += time.perf_counter() - seconds
        stats.cpu_seconds += time.process_time() - cpu_seconds


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

    `warm_up` runs a few sequences before the clock starts. OutOfMemory as `in_memory` has it.
    """
    whole = Pass(runner, items, budget, folded, compute)
    if warm_up:
        whole.warm_up()
    whole.advance(on_batch)
    return whole.stats


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
                _logger.warning(
                    "out of memory: going on with batches of half the size; a token budget sets it from the start"
                )
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
