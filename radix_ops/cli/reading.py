"""Input that is read and checked with a progress bar, and what is said of its rows that can't be used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from radix_ops_command.errors import printable

from ..data.beir import is_beir
from ..data.encoding import encode_records
from ..data.folders import data_files
from ..data.records import Records, T
from ..data.shapes import adapter
from ..engine.errors import UserError
from ..engine.inputs import Record
from ..engine.items import Items
from ..engine.shapes.questions import columns_without_header
from ..engine.shapes.recognition import shapes_of
from .progress import progress_bar, say

_LONGEST_MESSAGE = 1000  # characters of a row's
# Columns that tasks read as arrays or as numbers: cells of CSV and TSV hold these as JSON.
ARRAYS = (
    *("input_ids", "context_ids", "choices_ids", "attention_mask"),
    *("choices", "contexts", "options", "endings"),
    *("documents", "relevance", "passages", "positive", "negative", "pos", "neg"),
    *("positive_passages", "negative_passages"),
    *("messages", "prompt", "chosen", "rejected", "completion", "tools"),
    "labels",
)
NUMBERS = ("gold", "answer_index")


def files_read(args: argparse.Namespace) -> list[str]:
    """Return all files and folders that options name and a run reads, but for the model's."""
    options = (getattr(args, name, None) for name in ("template", "ranges", "qrels", "candidates", "config"))
    return [*args.files, *(name for name in options if name is not None and os.path.isfile(name))]


def read_records(
    args: argparse.Namespace,
    parse: Callable[[Record], T],
    shape: str,
    writes_results: bool = True,
    task: str | None = None,
) -> Records[T]:
    """Read and check all files (see `Records`), with a progress bar where that takes long.

    writes_results: whether rows' other keys go to results, so that none may be one that results hold themselves.
    task: the command, whose rows of the hub are known, where it has some, and --column and --shape say how to read; or
        "prompt", where a template names the keys that it reads.
    """
    columns = _columns(args) if task else {}
    if getattr(args, "shape", None) and not shapes_of(str(task)):
        raise UserError("--shape says which keys of a row are read, and here the template says that")
    if task:
        adapt = adapter(task, columns, getattr(args, "shape", None), getattr(args, "text_key", "text"))
        read: Callable[[Record], T] = lambda record: parse(adapt(record))  # noqa: E731
    else:
        read = parse
    _check_folders(args)
    reserved = ("key", "error") if args.on_error == "record" else ("key",)
    files = data_files(args.files)
    size = sum(os.path.getsize(name) for name in files if os.path.isfile(name))
    with progress_bar(size, "checking the input", "B", delay=2) as bar:
        return Records(
            files,
            read,
            format=args.format,
            shape=shape,
            on_bytes=bar.update,
            on_error=args.on_error,
            drop=args.drop,
            marks=_marks(args, columns),
            reserved=reserved if writes_results else (),
            delimiter=args.delimiter,
            header=args.header,
            arrays=(*ARRAYS, *_roots(columns, ARRAYS)),
            numbers=(*NUMBERS, *_roots(columns, NUMBERS)),
            headless=columns_without_header if task in ("score", "inspect") else lambda cells: None,
            split=getattr(args, "split", None),
            candidates=getattr(args, "candidates", None),
        )


def _columns(args: argparse.Namespace) -> dict[str, str]:
    columns: dict[str, str] = {}
    for given in args.column:
        for key, path in given.items():
            if columns.setdefault(key, path) != path:
                raise UserError(f"--column names {columns[key]} and {path} for {key}; a key has one column")
    return columns


def _roots(columns: dict[str, str], keys: tuple[str, ...]) -> list[str]:
    """Return the columns that paths lead into, of those for the keys, and of those that have parts."""
    return [path.split(".")[0] for key, path in columns.items() if key in keys or "." in path]


def _marks(args: argparse.Namespace, columns: dict[str, str]) -> list[str]:
    shape = getattr(args, "shape", None)
    return [f"{key}={path}" for key, path in columns.items()] + ([f"--shape {shape}"] if shape else [])


def _check_folders(args: argparse.Namespace) -> None:
    """UserError for a BEIR folder where no queries with documents are read, and for its options without one."""
    folder = next((path for path in args.files if is_beir(path)), None)
    if folder is not None and not hasattr(args, "split"):
        raise UserError(f"{folder} is a BEIR folder, which rerank reads; name its corpus or its queries to read texts")
    option = next((name for name in ("split", "candidates") if getattr(args, name, None)), None)
    if folder is None and option:
        raise UserError(f"--{option} is for a BEIR folder, one with corpus.jsonl and queries.jsonl")


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
