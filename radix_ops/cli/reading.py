"""Input that is read and checked with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..data.records import Records, T
from ..engine.inputs import Record
from .progress import progress_bar


def read_records(path: str, parse: Callable[[Record], T], shape: str, format: str | None = "jsonl") -> Records[T]:
    """Read and check the whole file (see `Records`), with a progress bar where that takes long."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with progress_bar(size, "checking the input", "B", delay=2) as bar:
        return Records(path, parse, format=format, shape=shape, on_bytes=bar.update)
