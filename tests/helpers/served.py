"""A device and work for the batcher that are made up, so that tests say what they take and when they fail.

Importing it skips a module where the libraries of the extra `serve` are missing.
"""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="the server's libraries are an extra")

from radix_ops.plan.choice import Bounds
from radix_ops.serve.batcher import Batcher
from radix_ops.serve.work import Size, Work

VOCABULARY = 1000
POISON = 999


class MadeDevice:
    """A device that folds nothing; it notes what it is given, and waits where it is told to."""

    folded, keeps_salts, vocab_size, seconds = True, True, VOCABULARY, 0.2

    def __init__(self, bounds: Bounds | None = None, load_error: BaseException | None = None):
        self.bounds = bounds or Bounds(4096, 32768)
        self.load_error = load_error
        self.may_load = threading.Event()
        self.may_load.set()
        self.prepared: list[list[np.ndarray]] = []
        self.released = 0

    @contextlib.contextmanager
    def open(self):
        assert self.may_load.wait(30)
        if self.load_error is not None:
            raise self.load_error
        yield self.bounds

    def prepare(self, sequences, salts):
        self.prepared.append(sequences)
        return sequences

    def release_memory(self):
        self.released += 1


class Gate:
    """A computation of sums that stands still while the gate is closed, and fails for what is poisoned."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.opened, self.entered = threading.Event(), threading.Event()
        self.opened.set()
        self.batches: list[list[list[int]]] = []
        self.extras: list[list] = []
        self.error: type[BaseException] = ValueError
        self.threads: set[int] = set()

    def __call__(self, sequences, extras):
        self.threads.add(threading.get_ident())
        self.batches.append([ids.tolist() for ids in sequences])
        self.extras.append(extras)
        self.entered.set()
        assert self.opened.wait(30)
        time.sleep(self.seconds)
        if any(POISON in ids for ids in sequences):
            raise self.error("poison")
        return [int(ids.sum()) for ids in sequences]


def work_of(*sequences) -> Work:
    return Work([np.array(ids, np.int32) for ids in sequences], list(range(len(sequences))))


def submit(batcher: Batcher, *sequences, kind: str = "sum", **options):
    work = work_of(*sequences)
    return batcher.submit(kind, lambda: work, Size(work.num_tokens, len(sequences)), **options)


@contextlib.contextmanager
def serving(compute, device=None, **options):
    """Run a batcher of one kind, "sum", until the end."""
    batcher = Batcher(device or MadeDevice(), **options)
    batcher.register("sum", compute)
    with batcher:
        assert batcher.wait_until_ready(30)
        yield batcher


@contextlib.contextmanager
def together(batcher: Batcher):
    """Let the requests that are submitted meanwhile wait for each other, so that one batch may take them."""
    machine, queue = batcher._machine, batcher._desk.queue
    plans = machine.time_to_plan
    machine.time_to_plan = lambda: time.monotonic() + 60
    before = queue.requests
    yield
    while len(queue) < queue.requests - before:
        time.sleep(0.001)
    machine.time_to_plan = plans
    with batcher._lock:
        batcher._to_plan.notify()
