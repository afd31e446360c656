"""The kind of an input file, by its name, its first bytes and what was asked for, and its rows."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .beir import BeirSource, is_beir
from .delimited import HINTS, Headless, read_delimited
from .ids import IdSource
from .json_arrays import read_array
from .sources import CopiedSource, LineSource, Source
from .streams import BOM, STANDARD_INPUT, ByteFile, StreamError
from .tables import read_arrow, read_parquet

Kind = Literal["jsonl", "json", "text", "csv", "tsv", "parquet", "arrow", "npz"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npz": "npz",
}
PACKED_ENDINGS = (".gz", ".gzip", ".zst", ".zstd")
KINDS: tuple[Kind, ...] = ("jsonl", "json", "text", "csv", "tsv", "parquet", "arrow", "npz")
_BINARY: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"PK": "npz"}
_GUESSES = {
    "json": "looks like a JSON array: name it .json, or read it with --format json",
    "jsonl": "looks like JSON lines: name it .jsonl, or read it with --format jsonl",
    "objects": "looks like JSON lines: --format jsonl reads its objects, and --format text its lines as they are",
    "lines": "looks like JSON over several lines: write one object a line, or an array of them",
    "text": f"is not JSON, and its name does not say what else it is: --format {{{','.join(KINDS)}}} does",
}


@dataclass(frozen=True)
class Reading:
    """How files are read.

    format: the kind of all files; by default what each one's name and first bytes say.
    delimiter: what parts the cells of CSV; a comma by default.
    header: the columns of CSV and TSV whose files have no header.
    arrays, numbers: the columns of CSV and TSV whose cells may hold arrays or objects, and whole numbers, as JSON.
    headless: what knows a first row of CSV or TSV that is no header; see `read_delimited`.
    drop: the columns of tables that are not read.
    split, candidates: the judgements of a BEIR folder, and the run file of its candidates; see `BeirSource`.
    """

    format: Kind | None = None
    delimiter: str | None = None
    header: tuple[str, ...] | None = None
    arrays: Collection[str] = ()
    numbers: Collection[str] = ()
    headless: Headless = lambda cells: None
    drop: Collection[str] = ()
    split: str | None = None
    candidates: str | None = None


def kind_by_name(path: str) -> Kind | None:
    """Return the kind that the name's ending says, behind those of gzip and zstd; None for an ending not known."""
    name = os.path.basename(path).lower()
    for packed in PACKED_ENDINGS:
        name = name.removesuffix(packed)
    return ENDINGS.get(os.path.splitext(name)[1])


def open_source(path: str, reading: Reading) -> Source:
    """Open a file, or a BEIR folder. StreamError for a file of no kind that can be read; OSError where it can't be."""
    if is_beir(path):
        return BeirSource(path, reading.split, reading.candidates)
    name = "standard input" if path == STANDARD_INPUT else path
    named = reading.format or kind_by_name(path)
    if named == "npz":
        return IdSource(name, path)
    file = ByteFile(path)
    start = file.head.removeprefix(BOM).lstrip(b" \t\r\n")[:1]
    kind = named or next((kind for sign, kind in _BINARY.items() if file.head.startswith(sign) and kind != "npz"), None)
    if kind in (None, "json") and reading.format is None:
        kind = "json" if start == b"[" else "jsonl"
    if kind in ("parquet", "arrow"):
        _check_is_binary(file, kind, start)
        names: dict[str, list[str]] = {}
        rows = (read_parquet if kind == "parquet" else read_arrow)(name, file, reading.drop, names)
        return CopiedSource(name, file, rows, label_names=names)
    if kind == "json":
        file.check_is_utf8()
        return CopiedSource(name, file, read_array(name, file))
    if kind in ("csv", "tsv"):
        delimiter = reading.delimiter or ("," if kind == "csv" else "\t")
        header = None if reading.header is None else list(reading.header)
        rows = read_delimited(name, file, delimiter, header, _values(reading), reading.headless)
        return CopiedSource(name, file, rows, HINTS)
    if kind == "text" and reading.format is None and _starts_an_object(file.head):
        raise StreamError(f" {_GUESSES['objects']}")
    return LineSource(name, file, kind == "text", None if reading.format else _guess(named, start, file.head))


def _values(reading: Reading) -> dict[str, tuple[type, ...]]:
    """Return the types that cells of a column may hold as JSON."""
    names = {*reading.arrays, *reading.numbers}
    return {name: (list, dict) * (name in reading.arrays) + (int,) * (name in reading.numbers) for name in names}


def _starts_an_object(head: bytes) -> bool:
    """Return whether the first line starts as a JSON object does."""
    return re.match(rb'\{\s*"[^"\n]*"\s*:', head.removeprefix(BOM)) is not None


def _guess(named: Kind | None, start: bytes, head: bytes) -> str | None:
    """Return what a file is whose first line is no JSON; None where nothing else is likely."""
    if start == b"[":
        return _GUESSES["json"]
    if head.removeprefix(BOM).lstrip().partition(b"\n")[0].strip() == b"{":
        return _GUESSES["lines"]
    return None if named else _GUESSES["text"]


def _check_is_binary(file: ByteFile, kind: Kind, start: bytes) -> None:
    found = next((kind for sign, kind in _BINARY.items() if file.head.startswith(sign)), None)
    if found == kind:
        return
    wanted = {"parquet": "Parquet", "arrow": "Arrow"}[kind]
    if not file.head:
        raise StreamError(f" is empty; {wanted} has a head and a foot")
    if file.looks_like is not None:
        raise StreamError(f" is read as {wanted}, and it {file.looks_like}")
    guess = {b"{": _GUESSES["jsonl"], b"[": _GUESSES["json"]}.get(start, "is no such file: it does not start as one")
    raise StreamError(f" is read as {wanted}, and it {guess}")
