"""How long this process' threads waited for a processor that other work held, as Linux counts it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Contention:
    """Adds up the waiting and the computing of this process over the stretches that are measured."""

    def __init__(self):
        self._waited = self._computed = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Count from here to the end."""
        waited, computed = _waited(), time.process_time()
        yield
        self._waited += max(0.0, _waited() - waited)  # of a thread that has ended nothing is known any more
        self._computed += time.process_time() - computed

    @property
    def share(self) -> float:
        """Waiting as a share of waiting and computing; 0 where the system doesn't tell."""
        return self._waited / max(self._waited + self._computed, 1e-9)


def _waited() -> float:
    """Return the seconds that threads queued for a processor, and those that were taken from a virtual machine."""
    return _queued() + _stolen()


def _queued() -> float:
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError, IndexError, ValueError):
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


def _stolen() -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0
