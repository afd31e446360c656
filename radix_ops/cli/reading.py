"""Input that is read and checked with a progress bar, and what is said of its rows that can't be used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from radix_ops_command.errors import printable

from ..data.encoding import encode_records
from ..data.folders import data_files
from ..data.records import Records, T
from ..engine.inputs import Record
from ..engine.items import Items
from .progress import progress_bar, say

_LONGEST_MESSAGE = 1000  # characters of a row's
# Columns that tasks read as arrays or numbers: cells of CSV and TSV may hold these as JSON.
ARRAYS = (
    "input_ids",
    "choices",
    "documents",
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "tools",
    "gold",
)


def read_records(
    args: argparse.Namespace, parse: Callable[[Record], T], shape: str, writes_results: bool = True
) -> Records[T]:
    """Read and check all files (see `Records`), with a progress bar where that takes long.

    writes_results: whether rows' other keys go to results, so that none may be one that results hold themselves.
    """
    reserved = ("key", "error") if args.on_error == "record" else ("key",)
    files = data_files(args.files)
    size = sum(os.path.getsize(name) for name in files if os.path.isfile(name))
    with progress_bar(size, "checking the input", "B", delay=2) as bar:
        return Records(
            files,
            parse,
            format=args.format,
            shape=shape,
            on_bytes=bar.update,
            on_error=args.on_error,
            drop=args.drop,
            reserved=reserved if writes_results else (),
            delimiter=args.delimiter,
            header=args.header,
            arrays=ARRAYS,
        )


def encode(records: Records, encoder: Callable[[list], Items]):
    """Return the sequences of all records as items, with a progress bar where that takes long."""
    with progress_bar(len(records), "tokenising", " rows", delay=2) as bar:
        return encode_records(records, encoder, bar.update)


def say_what_is_bad(records: Records) -> None:
    """List rows that were left out, or whose results are errors."""
    if records.bad.count:
        what = "hold an error in place of results" if records.on_error == "record" else "were left out"
        say(f"{records.bad.summary} and {what}:")
        for row in records.bad.lines:
            say(f"  {printable(row)[:_LONGEST_MESSAGE]}")
