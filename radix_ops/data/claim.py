"""The checks of --output before a run, in the order in which they are made, and its claim for one run at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..engine.errors import UserError
from .converted import check_unfinished, is_filled
from .libraries import pyarrow
from .log import REPLACE, check_first_line, check_part
from .matrix import check_incomplete
from .matrix_ids import check_ids_path
from .output import HELPER_SUFFIXES, beside, claimed, companions
from .quantised import check_ranges_path
from .result_formats import ResultFormat, format_of
from .result_writers import writer_of


@contextlib.contextmanager
def checked_output(
    output: str | None,
    *inputs: str,
    kinds: tuple[str, ...] = (),
    has_ranges: bool = False,
    overwrite: bool,
    times_runs: bool,
) -> Iterator[None]:
    """Hold `output`, if there is one, for this process alone.

    kinds: formats that the results can go to beside those of every command. has_ranges: whether ranges go beside a
    matrix. overwrite: whether what the output holds is replaced. times_runs: whether the run has to be a whole one.

    UserError where the output can't be written or is one of the inputs, where its name asks for a format that can't
    hold such results or for a library that is missing, where another process holds it, or where it holds what, as far
    as is known before a run, no run left.
    """
    if output is None:
        yield
        return
    check_path(output, *inputs)
    form = format_of(output, *kinds)
    if form.needs_pyarrow:
        pyarrow(f"--output {output}")
    with claimed(output):
        _check_existing(output, form, overwrite, times_runs)
        if has_ranges and form.is_matrix:
            check_ranges_path(output, overwrite)
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
        if os.path.isdir(name) and Path(os.path.realpath(name)) in path.parents:
            raise UserError(f"--output {output} stands in the input folder {name}, whose files are read")
        if path.exists() and path.samefile(name):
            raise UserError(f"--output {output} is the input file itself, or another one that the run reads")
        for helper in (*(beside(output, suffix) for suffix in HELPER_SUFFIXES), *companions(output)):
            if helper.exists() and helper.samefile(name):
                raise UserError(f"--output {output} is made by way of {helper}, which is the input file")


def _check_existing(output: str, form: ResultFormat, overwrite: bool, times_runs: bool) -> None:
    if form.grows:
        check_part(output)
    elif form.is_matrix:
        check_ids_path(output, overwrite)
    else:
        check_unfinished(output)
    if overwrite:
        return
    left = [Path(output), *(beside(output, suffix) for suffix in (".rows", ".float32", ".float32.rows", ".lines"))]
    held = [path for path in left if path.exists()]
    if times_runs and held:
        raise UserError(f"--output {held[0]} exists and --compare times whole runs; --overwrite replaces it")
    if form.is_matrix:
        check_incomplete(output)
    elif form.grows:
        if os.path.isfile(output):
            check_first_line(output)
    elif not _may_hold(output, form):
        raise UserError(f"--output {output} exists and holds no results; {REPLACE}")


def _may_hold(output: str, form: ResultFormat) -> bool:
    """Return whether there is no file, or one that a run left."""
    path, under_way = Path(output), beside(output, ".lines").exists()
    return under_way or not is_filled(path) or writer_of(form).may_hold(path)
