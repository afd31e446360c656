"""Runs checks in two processes that torch.distributed joins, for tests."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty

import pytest
import torch
from torch import distributed, multiprocessing

_LONGEST_CHECK = 60  # seconds


def run(checks: Mapping[str, Callable[[int], None]], folder: Path, backend: str = "gloo") -> None:
    """Calls each check with its rank, one after another, in two processes for all; fails with the first that does."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(folder / "store"), checks, backend, queue)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    missing = [(name, rank) for name in checks for rank in range(2)]
    try:
        while missing:
            name, rank, failure = queue.get(timeout=_LONGEST_CHECK)
            missing.remove((name, rank))
            if failure:
                pytest.fail(f"{name}, rank {rank}:\n{failure}")
    except Empty:
        pytest.fail("{}, rank {}: it did not finish".format(*missing[0]))
    finally:
        for process in processes:
            process.kill()
            process.join()


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
            queue.put((name, rank, None))
        except BaseException:
            # The other rank may wait for this one, so nothing more can be checked.
            queue.put((name, rank, traceback.format_exc()))
            return
    distributed.destroy_process_group()
