"""Runs checks in two processes that torch.distributed joins, for tests."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty

import pytest
import torch
from torch import distributed, multiprocessing

Results = dict[tuple[int, str], str | None]  # (rank, name of the check) -> its traceback, or None where it passed

_LONGEST_CHECK = 60  # seconds; of a check that waits forever, assert_passed says that it did not finish


def run(checks: Mapping[str, Callable[[int], None]], folder: Path, backend: str = "gloo") -> Results:
    """Two processes for all checks, one check after another. After one that fails there are no more results."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(folder / "store"), checks, backend, queue)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results: Results = {}
    try:
        while len(results) < 2 * len(checks):
            try:
                rank, name, failure = queue.get(timeout=_LONGEST_CHECK)
            except Empty:
                break
            results[rank, name] = failure
            if failure:
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def assert_passed(results: Results, name: str) -> None:
    failures = [failure for (_, failed), failure in results.items() if failure and failed == name]
    assert not failures, failures[0]
    if not all((rank, name) in results for rank in range(2)):
        pytest.fail("another check failed before it" if any(results.values()) else "it did not finish")


def _work(rank: int, path: str, checks: Mapping[str, Callable[[int], None]], backend: str, queue) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = distributed.FileStore(path, 2)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2)
    for name, check in checks.items():
        try:
            torch.manual_seed(0)
            check(rank)
            queue.put((rank, name, None))
        except BaseException:
            # The other rank may wait for this one, so nothing more can be checked.
            queue.put((rank, name, traceback.format_exc()))
            return
    distributed.destroy_process_group()
