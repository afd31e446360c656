"""The data files that paths name: files as they are, folders by the data files in them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import UserError
from .beir import is_beir
from .kinds import ENDINGS, PACKED_ENDINGS, kind_by_name
from .streams import STANDARD_INPUT

# Files about the data, as datasets and the hub leave them beside it.
_ABOUT = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def data_files(paths: Sequence[str]) -> list[str]:
    """Return the files of all paths in order, those of a folder sorted; a BEIR folder stays one. UserError for a folder
    without data, one whose files are of several kinds, and a file that is named twice."""
    found = [name for path in paths for name in (_in_folder(path) if os.path.isdir(path) else [path])]
    seen: dict[str, str] = {}
    for name in found:
        real = name if name == STANDARD_INPUT else os.path.realpath(name)
        if real in seen:
            raise UserError(f"{name} is among the input files twice")
        seen[real] = name
    return found


def _in_folder(folder: str) -> list[str]:
    if is_beir(folder):
        return [folder]
    if os.path.isfile(about := os.path.join(folder, "dataset_dict.json")):
        splits = _read(about).get("splits", [])
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one: {os.path.join(folder, splits[0])}")
    if os.path.isfile(about := os.path.join(folder, "state.json")):
        return [os.path.join(folder, file["filename"]) for file in _read(about)["_data_files"]]
    files = sorted(
        str(path)
        for path in Path(folder).rglob("*")
        if kind_by_name(path.name)
        and path.name not in _ABOUT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        known = " ".join(ENDINGS)
        raise UserError(f"{folder} holds no data file; their names end in {known}, perhaps with {PACKED_ENDINGS[0]}")
    kinds = {kind_by_name(file): file for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds files of several kinds, such as {' and '.join([*kinds.values()][:2])}; name the files"
        )
    return files


def _read(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found["_data_files"] if "_data_files" in found else found["splits"]:
            return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} can't be read as datasets wrote it: {error!r}") from error
    raise UserError(f"{path} names no data")
