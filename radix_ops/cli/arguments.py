"""What the subcommands share: their common arguments, reading input with progress, and checks of outputs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from ..data.output import HELPER_SUFFIXES, beside
from ..data.records import Records, T
from ..data.streams import LONGEST_LINE
from ..engine.errors import UserError
from ..engine.inputs import LONGEST_TEXT, Record

FILE_HELP = f"""\
FILE may be compressed by gzip, or a pipe. Blank lines of JSONL are skipped, and lines are counted with them. A line
has {LONGEST_LINE:,} bytes at most, and a text in it {LONGEST_TEXT:,}.
"""
MOST_THREADS = 1024


def printable(text: str) -> str:
    """The text on one line; what doesn't print, or could move a terminal's cursor, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def add_command(commands, name: str, summary: str, description: str, run: Callable) -> argparse.ArgumentParser:
    """A parser for the subcommand, whose description keeps its line breaks."""
    parser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=("jsonl", "text"),
        help="of FILE: jsonl, or text, one text a line (default: text where its name ends in .txt, else jsonl)",
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the model's folder or repository brings along; without it such code never runs",
    )


def utf8_text(text: str) -> str:
    """A type for arguments: what a tokenizer can read. Bytes that aren't UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from error
    return text


def positive_int(text: str) -> int:
    """A type for arguments: a whole number from 1."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {2**31 - 1}")
    return value


def thread_count(text: str) -> int:
    """A type for arguments: a number of threads."""
    value = positive_int(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} threads are more than {MOST_THREADS}")
    return value


def progress_bar(total: int, desc: str, unit: str, delay: float = 0):
    """A tqdm bar on standard error; with a delay it shows only what takes longer (seconds)."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("radix-ops needs tqdm: pip install tqdm") from error
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=delay)


def read_records(path: str, parse: Callable[[Record], T], shape: str, format: str | None = "jsonl") -> Records[T]:
    """The whole file, checked (see `Records`), with a progress bar where that takes long."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with progress_bar(size, "checking the input", "B", delay=2) as bar:
        return Records(path, parse, format=format, shape=shape, on_bytes=bar.update)


def check_output(output: str | None, *inputs: str) -> None:
    """UserError unless `output` can be written and is none of the inputs."""
    if output is None:
        return
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
