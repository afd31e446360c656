"""Files of a model's folder, which somebody else wrote: each error says which file, what it holds and what it must."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any


def check_regular(path: Path) -> None:
    """Raise ValueError for what would hang or give no end of bytes when it is read: a pipe, a socket, a device.

    FileNotFoundError where nothing is there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; it must be a file")


def check_folder(folder: Path) -> None:
    """Raise ValueError for a model's folder that holds more than files and folders: who reads it may wait for ever."""
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
            mode = entry.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ValueError(f"{entry.path} is no regular file; a model's folder must hold files and folders alone")


def check_no_adapter(folder: Path) -> None:
    """Raise ValueError for a folder of an adapter, whose weights are none of a whole model."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which is not applied here: merge it into its model "
            "(peft's merge_and_unload), and save that"
        )


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. ValueError for anything else, FileNotFoundError where nothing is there."""
    return _read(path, "JSON", json.loads)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file. ValueError for anything else, FileNotFoundError where nothing is there."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef,import-not-found]
        except ImportError as error:
            raise ValueError(f"{path} is TOML, which takes Python 3.11 or tomli: pip install tomli") from error
    return _read(path, "TOML", tomllib.loads)


def _read(path: Path, kind: str, parse: Callable[[str], Any]) -> Any:
    """Return what `parse` makes of the text of a file of this kind; see `read_json`."""
    check_regular(path)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not {kind} that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file must hold."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; it must hold a JSON object")
    return found


def is_inside(path: str) -> bool:
    """Tell whether a relative path stays in its folder, on any system."""
    windows = PureWindowsPath(path)
    return not windows.anchor and ".." not in windows.parts and "\0" not in path


def shards(index: Path) -> list[str]:
    """Return the files that a model.safetensors.index.json names, each once. ValueError for what is no such index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index} must hold "weight_map", an object of the file of each weight')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or not is_inside(file):
            raise ValueError(f"{index}: the file of {name} is {file!r}; it must be one in the same folder")
    return sorted(set(weight_map.values()))
