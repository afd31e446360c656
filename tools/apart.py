"""Run functions in processes of their own, each with a time limit, so that none takes the others with it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

SECONDS = 400


def _in_process(queue, function: Callable, *args) -> None:
    signal.alarm(SECONDS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    queue.put(function(*args))


def _result(call: tuple) -> Any:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_process, args=(queue, *call))
    process.start()
    process.join(SECONDS + 20)
    if process.is_alive():
        process.kill()
        process.join()
    return f"a small one does not finish in {SECONDS} seconds" if queue.empty() else queue.get()


def run_apart(calls: Mapping[str, tuple], jobs: int) -> Iterator[tuple[str, Any]]:
    """Yield each name and what its call, a function and its arguments, returned; a text where it did not."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from zip(calls, pool.map(_result, calls.values()), strict=True)
