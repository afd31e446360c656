"""The ids of a matrix's rows: JSON lines in a file beside it, one for each row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from .log import LONGEST_START, Origin, may_be_torn, origin_of
from .output import beside, companion, open_helper, put_in_place

_ID_KEYS = ("id", "_id")
_KEYS = {"file", "line", "row", "id"}


def ids_path(output: str | Path) -> Path:
    """Return the path of the ids of a matrix."""
    return companion(output, ".ids.jsonl")


def check_ids_path(output: str, overwrite: bool) -> None:
    """UserError where something else than ids of a matrix stands in their place, or where they are made."""
    path, part = ids_path(output), beside(output, ".ids.part")
    if os.path.lexists(part):
        with open_helper(part) as file:
            if not may_be_torn(file.read(LONGEST_START)):
                raise UserError(f"{part} exists and is of no run; remove it, or name another --output")
    if os.path.lexists(path) and not overwrite and not _are_ids(path):
        raise UserError(f"{path} exists, and the ids of {output} go there; --overwrite replaces it")


def _are_ids(path: Path) -> bool:
    with open_helper(path) as file:
        try:
            fields = json.loads(file.readline(2**20) or b"null")
        except ValueError:
            return False
    return isinstance(fields, dict) and bool(origin_of(fields)) and fields.keys() <= _KEYS


def named(origin: Origin, extra: Mapping[str, Any]) -> Origin:
    """Return what tells a row of a matrix: where its record stands, and the record's id, where it has one."""
    found = next((extra[key] for key in _ID_KEYS if extra.get(key) is not None), None)
    return origin if found is None else {**origin, "id": found}


def put_ids(output: str, rows: Iterable[Origin]) -> None:
    """Put the ids of all rows beside the matrix where a row has one, there are several files, or numbers of rows are
    not those of lines, some of which were left out or blank; elsewhere take away those of an earlier matrix."""
    path, part = ids_path(output), beside(output, ".ids.part")
    told = False
    with open_helper(part, os.O_CREAT | os.O_TRUNC) as file:
        for number, fields in enumerate(rows, 1):
            told = told or "id" in fields or "file" in fields or fields.get("line", fields.get("row")) != number
            file.write(json.dumps(fields).encode() + b"\n")
        if told:
            put_in_place(file, part, path)
    if not told:
        part.unlink()
        if os.path.lexists(path) and _are_ids(path):
            path.unlink()
