"""The file that `--metrics` names: what all results of a run say together, as one JSON object."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import UserError

_KEYS = ("rows_with_gold", "logprob", "judged_queries")  # one of which every such object has beside its rows


def check_metrics(path: str, overwrite: bool, *others: str) -> None:
    """UserError unless the file can be written, is none of the others, which may be folders, and holds nothing but such
    an object.

    overwrite: whether whatever it holds is replaced.
    """
    where = f"--metrics {path}"
    if not path.endswith(".json"):
        raise UserError(f"{where}: the metrics are one JSON object, so the name must end in .json")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"{where} is not a regular file")
    if not target.parent.is_dir():
        raise UserError(f"{where}: its folder does not exist")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError(f"{where} can't be written")
    for other in others:
        if target == Path(os.path.realpath(other)) or (
            target.exists() and os.path.exists(other) and target.samefile(other)
        ):
            raise UserError(f"{where} is {other}, which the run reads or writes itself; name another file")
        if os.path.isdir(other) and target.is_relative_to(os.path.realpath(other)):
            raise UserError(f"{where} would be one of the files of {other}, which the run reads; name another place")
    if target.exists() and not overwrite and not _holds_metrics(target):
        raise UserError(f"{where} exists and holds no metrics; --overwrite replaces it")


def _holds_metrics(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "rows" in found and any(key in found for key in _KEYS)


def write_metrics(path: str, found: Mapping[str, Any]) -> None:
    """Write the object."""
    Path(path).write_text(json.dumps(found, indent=2) + "\n")
