"""Busy loops, which stand for other work on the machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

LOOP = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
while os.getppid() == int(sys.argv[2]):
    for _ in range(10**6): pass
"""


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """Run a loop that never waits on each processor that this process may use; none outlives this process."""
    command = [sys.executable, "-S", "-c", LOOP]
    processors = os.sched_getaffinity(0)
    loops = [
        subprocess.Popen([*command, str(processor), str(os.getpid())], stderr=subprocess.DEVNULL)
        for processor in processors
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
