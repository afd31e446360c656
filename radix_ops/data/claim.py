"""The checks of --output before a run, in the order in which they are made, and its claim for one run at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..engine.errors import UserError
from .matrix import check_incomplete, is_matrix
from .output import HELPER_SUFFIXES, beside, claimed
from .results import check_first_line, check_part


@contextlib.contextmanager
def checked_output(
    output: str | None, *inputs: str, may_be_matrix: bool, overwrite: bool, times_runs: bool
) -> Iterator[None]:
    """Hold `output`, if there is one, for this process alone.

    may_be_matrix: whether the results can go to a .npy file. overwrite: whether what the output holds is replaced.
    times_runs: whether the run has to be a whole one. UserError where the output can't be written or is one of the
    inputs, where it can't hold such results, where another process holds it, or where it holds what, as far as is known
    before a run, no run left.
    """
    if output is not None:
        check_path(output, *inputs)
        if is_matrix(output) and not may_be_matrix:
            raise UserError(f"--output {output}: results are JSON lines, and a .npy file holds a matrix")
    with claimed(output):
        if output is not None:
            _check_existing(output, overwrite, times_runs)
        yield


def check_path(output: str, *inputs: str) -> None:
    """UserError unless `output` can be written and is none of the inputs."""
    if not output or (os.path.exists(output) and not os.path.isfile(output)):
        raise UserError(f"--output {output!r} is not a regular file")
    path = beside(output, "")
    if path.is_symlink():  # no path that has its links resolved is one
        raise UserError(f"--output {output} is a symbolic link that leads back to itself")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"--output {output} can't be written")
    for name in filter(os.path.exists, inputs):
        if path.exists() and path.samefile(name):
            raise UserError(f"--output {output} is the input file itself")
        for helper in (beside(output, suffix) for suffix in HELPER_SUFFIXES):
            if helper.exists() and helper.samefile(name):
                raise UserError(f"--output {output} is made by way of {helper}, which is the input file")


def _check_existing(output: str, overwrite: bool, times_runs: bool) -> None:
    if not is_matrix(output):
        check_part(output)
    if overwrite:
        return
    held = [path for path in (output, beside(output, ".rows")) if os.path.exists(path)]
    if times_runs and held:
        raise UserError(f"--output {held[0]} exists and --compare times whole runs; --overwrite replaces it")
    if is_matrix(output):
        check_incomplete(output)
    elif os.path.isfile(output):
        check_first_line(output)
