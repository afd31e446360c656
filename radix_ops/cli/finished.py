"""A finished job that is asked for again: the command answers from the proof of it, and loads no model."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import radix_ops_command
from radix_ops_command.errors import printable

from ..data.finished import FinishedJob
from ..data.output import companions
from ..engine.errors import UserError
from ..engine.loading import find_device
from .progress import say

# Arguments that decide nothing about results, or stand for themselves.
_OTHERS = (
    "run", "command", "config", "files", "model", "output", "overwrite", "metrics", "memory", "continues",
)  # fmt: skip
_MOST_SAID = 2**20  # characters


def answers(args: argparse.Namespace) -> bool:
    """Return whether --output is known to hold all results of this very job, and if so say what its run said."""
    job = None if getattr(args, "overwrite", True) else _job_of(args)
    found = job and job.found()
    if not found:
        return False
    count, said = found
    say(f"{printable(args.output)} holds {count:,} of {count:,} results already")
    for name, text in said:
        getattr(sys, name).write(text)
    return True


class Memory:
    """Remembers a run that comes to its end: `results_are_there` from there on, with all that it says behind them."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._job = args, _job_of(args)  # which looks at all files before they are read
        self._count: int | None = None
        self._said: list[tuple[str, str]] = []
        self._streams = contextlib.ExitStack()

    def results_are_there(self, count: int) -> None:
        """Note that --output holds so many results, which are all."""
        self._count = count
        for name in ("stdout", "stderr"):
            self._streams.enter_context(_heard(name, self._said))

    def keep(self) -> None:
        """Keep the proof. The run must still hold its output."""
        size = sum(len(text) for _, text in self._said)
        if self._job is not None and self._count is not None and size <= _MOST_SAID:
            files = [self._args.output, *companions(self._args.output), getattr(self._args, "metrics", None)]
            there = [file for file in files if file is not None and os.path.exists(file)]
            self._job.remember(self._count, there, self._said)

    def close(self) -> None:
        self._streams.close()


def _job_of(args: argparse.Namespace) -> FinishedJob | None:
    """Return the job of a run that writes results, None where it can't be told by its files alone."""
    if getattr(args, "output", None) is None or args.compare or args.trust_remote_code:
        return None
    options: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in _OTHERS}
    try:
        # The device decides about the default dtype.
        options |= {"command": args.run, "device": str(find_device(args.device))}
    except UserError:
        return None
    options |= {"metrics": f"to {getattr(args, 'metrics', None)}", "version": radix_ops_command.__version__}
    return FinishedJob(options, args.model, args.files, args.output)


@contextlib.contextmanager
def _heard(name: str, said: list[tuple[str, str]]) -> Iterator[None]:
    """Note what is written to a standard stream, but for bars that a carriage return moves."""
    stream: TextIO | None = getattr(sys, name)
    if stream is None:
        yield
        return
    setattr(sys, name, _Heard(stream, name, said))
    try:
        yield
    finally:
        setattr(sys, name, stream)


class _Heard:
    def __init__(self, stream: TextIO, name: str, said: list[tuple[str, str]]):
        self._stream, self._name, self._said = stream, name, said

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._said.append((self._name, text))
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
