"""The model at work: batches are folded ahead, computed within its memory at a measured pace, and halved where they
fail."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..plan.choice import Bounds
from .device import Device
from .limits import BatchLimits
from .metrics import Metrics
from .pace import Pace
from .queue import Batch
from .refusals import Failed
from .work import Compute

_FIRST_ROWS, _LEAST_ROWS = 1024, 256  # of a batch, before and after the pace is known
_FAMILY = 4  # times the rows of its first sequence: a batch may have so many, else it shares a long prefix with few
_PATIENCE = 256  # batches that fit into memory before one may be larger again
_LEAD = 0.002  # seconds before a batch is thought to end at which the next is chosen, beside the time of folding
# A batch that takes so many times the seconds that were predicted, and so many seconds, is thought to hang.
_OVERRUN, _LEAST_OVERRUN = 20, 30.0
_FIRST_OVERRUN = 600.0  # seconds of a batch for which nothing is predicted
_FAILURES = 16  # requests in a row that failed, at which the device is thought to be broken
# After an error of the device's no answer of it is right.
_FATAL: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))

_logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A batch that is folded, or what went wrong with it."""

    batch: Batch
    sequences: list[np.ndarray]
    error: Exception | None = None


@dataclass
class Computed:
    """The results of a batch, and when it was computed; or of one sequence why there is none."""

    batch: Batch
    results: list[Any]
    started: float
    ended: float
    error: Failed | None = None


class Machine:
    """A device, its limits and its pace. One thread opens it and computes; others may prepare and ask meanwhile.

    computes: what each kind of batch runs.
    """

    def __init__(self, device: Device, limits: BatchLimits, metrics: Metrics):
        self.computes: dict[str, Compute] = {}
        self._device, self._limits, self._metrics = device, limits, metrics
        self._lock = threading.Lock()
        self._pace, self._fold_seconds = Pace(), 0.0
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)  # of each kind
        self._memory: Bounds | None = None  # the limits that memory sets, as they were found
        self._bounds: Bounds | None = None  # and as they turned out
        self._fitting = self._failures = 0  # batches since one did not fit; requests since one did not fail
        self._running: tuple[Batch, float, float | None] | None = None  # batch, when it started, predicted seconds

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Load the model; batches run until the end."""
        with self._device.open() as memory:
            self._memory = self._bounds = memory
            yield

    def bounds(self, kind: str, first: int) -> Bounds:
        """Return the limits of the next batch, whose first sequence has so many tokens."""
        limits = self._limits
        with self._lock:
            memory, pace = self._bounds, self._paces[kind]
            assert memory is not None
            seconds = self._device.seconds if limits.seconds is None else limits.seconds
            rows = pace.rows_in(seconds, _LEAST_ROWS) if pace.rows_per_second else _FIRST_ROWS
        rows = min(max(rows, _FAMILY * first), memory.max_rows, limits.max_rows or memory.max_rows)
        return replace(memory, max_rows=rows, max_sequences=min(memory.max_sequences, limits.max_sequences))

    def prepare(self, batch: Batch) -> Prepared:
        """Fold a batch."""
        started = time.monotonic()
        sequences = [piece.ids for piece in batch.pieces]
        try:
            ahead = self._device.prepare(sequences, [piece.salt for piece in batch.pieces])
        except Exception as error:
            return Prepared(batch, sequences, error)
        self._fold_seconds = max(0.9 * self._fold_seconds, time.monotonic() - started)
        return Prepared(batch, ahead)

    def compute(self, prepared: Prepared) -> Iterator[Computed]:
        """Compute a batch; where that fails, each half of it by itself, so that a sequence that can't be computed fails
        alone. Sequences of requests that are over by then are left out of the halves.

        Raises what leaves the device broken.
        """
        batch, error, started = prepared.batch, prepared.error, time.monotonic()
        self.start(batch)
        if error is None:
            try:
                results = list(self.computes[batch.kind](prepared.sequences, [p.extra for p in batch.pieces]))
                if len(results) != len(batch):
                    raise RuntimeError(f"{batch.kind} made {len(results)} results of {len(batch)} sequences")
            except _FATAL:
                raise
            except Exception as found:
                error = found.with_traceback(None)  # which would keep the batch's tensors alive
        if error is None:
            ended = time.monotonic()
            self._succeed(batch, ended - started)
            yield Computed(batch, results, started, ended)
            return
        if isinstance(error, torch.OutOfMemoryError):
            self._device.release_memory()
            self._shrink(batch)
        if len(batch) == 1:
            yield self._fail(batch, error, started)
            return
        _logger.warning("a batch of %d sequences failed: %s; it is halved", len(batch), type(error).__name__)
        self._metrics.halved.inc()
        for half in batch.halves():
            live = half.live()
            if len(live):
                yield from self.compute(self.prepare(live))

    def start(self, batch: Batch) -> None:
        """Tell that a batch is computed from now on."""
        now = time.monotonic()
        with self._lock:
            self._running = (batch, now, self._paces[batch.kind].seconds(batch.rows))
        for piece in batch.pieces:
            request = piece.owner
            if not request.started_at:
                request.started_at = now
                request.timings.queued = now - request.queued_at

    def rest(self) -> None:
        """Tell that nothing is computed."""
        with self._lock:
            self._running = None

    def time_to_plan(self) -> float:
        """Return when the next batch is to be chosen: as late as nothing waits for it, for what arrives until then may
        share its prefixes."""
        with self._lock:
            if self._running is None:
                return 0.0
            _, started, predicted = self._running
            return started + 0.9 * (predicted or 0.0) - 2 * self._fold_seconds - _LEAD

    def seconds_of(self, tokens: int) -> float:
        """Return how long so many tokens take at the pace of the last batches."""
        with self._lock:
            rate = self._pace.tokens_per_second
        return tokens / rate if rate else 1.0

    def health(self) -> str | None:
        """Return what is wrong, in a sentence, or None."""
        with self._lock:
            if self._failures >= _FAILURES:
                return f"the last {self._failures} requests that were computed have failed"
            if self._running is not None:
                batch, started, predicted = self._running
                took = time.monotonic() - started
                if took > (_FIRST_OVERRUN if predicted is None else max(_LEAST_OVERRUN, _OVERRUN * predicted)):
                    return f"a batch of {batch.rows} rows has taken {took:.0f} s so far"
        return None

    def snapshot(self) -> dict[str, Any]:
        """Return the batch that is computed and the pace, for people to look at."""
        with self._lock:
            found: dict[str, Any] = {
                "batch": None,
                "rows_per_second": self._pace.rows_per_second,
                "tokens_per_second": self._pace.tokens_per_second,
            }
            if self._running is not None:
                batch, started, _ = self._running
                found["batch"] = {
                    "rows": batch.rows,
                    "tokens": batch.tokens,
                    "sequences": len(batch),
                    "seconds": time.monotonic() - started,
                }
        return found

    def _succeed(self, batch: Batch, seconds: float) -> None:
        with self._lock:
            for pace in (self._pace, self._paces[batch.kind]):
                pace.add(batch.rows, batch.tokens, seconds)
            self._failures = 0
            self._fitting += 1
            memory, bounds = self._memory, self._bounds
            if self._fitting % _PATIENCE == 0 and memory is not None and bounds is not None and bounds != memory:
                rows, tokens = min(2 * bounds.max_rows, memory.max_rows), min(2 * bounds.max_tokens, memory.max_tokens)
                self._bounds = replace(bounds, max_rows=rows, max_tokens=tokens)

    def _fail(self, batch: Batch, error: Exception, started: float) -> Computed:
        _logger.warning("a request failed: %s", type(error).__name__)
        with self._lock:
            self._failures += 1
        batch.pieces[0].owner.has_failed = True
        failed = Failed(f"the computation of this request failed: {type(error).__name__}")
        failed.__cause__ = error
        return Computed(batch, [], started, time.monotonic(), failed)

    def _shrink(self, batch: Batch) -> None:
        """Let the next batches have half of one that didn't fit into memory."""
        if len(batch) == 1:
            return
        with self._lock:
            bounds = self._bounds
            assert bounds is not None
            rows, tokens = min(bounds.max_rows, batch.rows // 2), min(bounds.max_tokens, batch.tokens // 2)
            self._bounds = replace(bounds, max_rows=max(1, rows), max_tokens=max(1, tokens))
            self._fitting = 0
        _logger.warning("out of memory: going on with batches of %d rows at most", max(1, rows))
