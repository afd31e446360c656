"""Further processes for tests: Python's, forks, and two that torch.distributed joins."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty

import pytest
import torch
from torch import distributed, multiprocessing

# A process hangs after so many seconds: a machine may be slow, or busy with other things.
LONGEST = 900
# Small tensors gain nothing from threads, and tests that run beside each other would wait for each other's. Any number
# of threads is right: `make test-elsewhere` asks for others.
NUM_THREADS = int(os.environ.get("RADIX_TEST_THREADS", "1"))


def python_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a Python with this one's modules and number of threads; variables given go first."""
    same = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(NUM_THREADS)}
    return {**os.environ, **same, **variables}


def run_python(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments; its output is text."""
    command, environment = [sys.executable, *arguments], python_environment(**variables)
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LONGEST)


def in_a_fork(work: Callable[[], object]) -> int:
    """Fork a process that runs work() and ends with 0 unless that raises; return its id."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def run(checks: Mapping[str, Callable[[int], None]], folder: Path, backend: str = "gloo") -> None:
    """Call each check with its rank, one after another, in two processes for all; fail with the first that does."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    # The processes import test modules by file before they unpickle checks: Python finds none of them by name.
    functions = (getattr(check, "func", check) for check in checks.values())
    files = {function.__module__: inspect.getfile(function) for function in functions}
    arguments = (str(folder / "store"), files, pickle.dumps(checks), backend, queue)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    missing = [(name, rank) for name in checks for rank in range(2)]
    try:
        while missing:
            name, rank, failure = queue.get(timeout=LONGEST)
            missing.remove((name, rank))
            if failure:
                pytest.fail(f"{name}, rank {rank}:\n{failure}")
    except Empty:
        pytest.fail("{}, rank {}: it did not finish".format(*missing[0]))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(rank: int, path: str, files: Mapping[str, str], pickled: bytes, backend: str, queue) -> None:
    torch.set_num_threads(NUM_THREADS)
    for name, file in files.items():
        specification = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    checks = pickle.loads(pickled)
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
