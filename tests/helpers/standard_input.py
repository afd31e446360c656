"""Standard input of this process, replaced by a pipe or a file for a while."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def standard_input(content: bytes | Path) -> Iterator[None]:
    """Give standard input that content, through a pipe, or that file."""
    held = os.dup(0)
    if isinstance(content, Path):
        end = os.open(content, os.O_RDONLY)
    else:
        end, given = os.pipe()
        threading.Thread(target=lambda: _write(given, content)).start()
    os.dup2(end, 0)
    try:
        yield
    finally:
        os.dup2(held, 0)
        os.close(held)
        os.close(end)


def _write(given: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(given, "wb") as file:
        file.write(content)
