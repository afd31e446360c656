"""Progress of what takes long, on standard error: bars on a terminal, and lines elsewhere, as in a log."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

from ..engine.errors import needs

_SECONDS = 10  # between two lines of a log
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {elapsed} so far, {remaining} left"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {elapsed} so far"
_is_quiet = False


def progress_bar(total: int, desc: str, unit: str, delay: float = 0) -> Any:
    """Return a tqdm bar on standard error; it shows after `delay` seconds.

    Where that is no terminal, a line tells of it every few seconds, and none of what is done sooner.
    """
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "unit_scale": True}
    if not _on_terminal():
        delay = max(delay, _SECONDS)
        line = _LINE if total else _LINE_WITHOUT_TOTAL
        options |= {"file": _Lines(sys.stderr), "mininterval": _SECONDS, "bar_format": line}
    needs("tqdm", "hf")
    from tqdm import tqdm

    return tqdm(**options, delay=delay, disable=_is_quiet)


def with_progress(lines, desc: str) -> Iterator:
    """Yield the lines, with a progress bar where they take long."""
    with progress_bar(len(lines), desc, " lines", delay=2) as bar:
        for line in lines:
            yield line
            bar.update()


def say(message: str) -> None:
    """Print a line to standard error, unless the command is quiet."""
    if not _is_quiet:
        print(message, file=sys.stderr)


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """Print no progress if `quiet`; leave out the bars of libraries then, and where standard error is no terminal."""
    global _is_quiet
    before, _is_quiet = _is_quiet, quiet
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_is_no_load_report)
    try:
        with contextlib.nullcontext() if _on_terminal() and not quiet else _without_bars():
            yield
    finally:
        reports.removeFilter(_is_no_load_report)
        _is_quiet = before


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Disable tqdm's bars, but for those that ask for theirs."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    init = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(init, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = init


def _is_no_load_report(record: logging.LogRecord) -> bool:
    """The engine itself refuses a checkpoint that lacks weights; more than are needed do no harm."""
    return "LOAD REPORT" not in record.getMessage()


def _on_terminal() -> bool:
    return sys.stderr.isatty()


class _Lines:
    """A file for tqdm that gets a line for each state of the bar."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
