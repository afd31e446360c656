"""Files of a model's folder, which somebody else wrote: each error says which file, what it holds and what it must."""

from __future__ import annotations

import json
import stat
from pathlib import Path, PureWindowsPath


def check_regular(path: Path) -> None:
    """ValueError for what would hang or give no end of bytes when it is read: a pipe, a socket, a device.

    FileNotFoundError where nothing is there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; it must be a file")


def read_json(path: Path):
    """The value that a JSON file holds. ValueError for anything else, FileNotFoundError where nothing is there."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_object(path: Path) -> dict:
    """`read_json` of a file that must hold an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; it must hold a JSON object")
    return found


def is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    windows = PureWindowsPath(path)
    return not windows.anchor and ".." not in windows.parts and "\0" not in path


def shards(index: Path) -> list[str]:
    """The files that a model.safetensors.index.json names, each once. ValueError for what is no such index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index} must hold "weight_map", an object of the file of each weight')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or not is_inside(file):
            raise ValueError(f"{index}: the file of {name} is {file!r}; it must be one in the same folder")
    return sorted(set(weight_map.values()))
