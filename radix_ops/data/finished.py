"""What proves, without a model, that an output holds the results of a job that is asked for again.

job = FinishedJob(options, model, inputs, output)  # before the run
job.remember(count, files, said)  # behind it, as long as the run holds its output
job.found()  # of a later process: how many results there are and what the run said, None where that is not proven
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_VERSION = 1
_LIBRARIES = ("torch", "transformers", "tokenizers", "sentence-transformers", "safetensors", "gguf", "jinja2")
_MOST_FILES, _MOST_BYTES, _MOST_RECORDS = 10_000, 2**36, 1000  # of inputs the bytes, which are read
_TICK = 0.02  # seconds: file systems tell such times apart, or whole seconds
_HUB_TIMEOUT = 10  # seconds
Stamps = dict[str, tuple[int, ...]]


class FinishedJob:
    """A job, told by all that decides about its results: options, versions of libraries, the model's files by name,
    size, times and inode, and the bytes of its inputs.

    The proof is a small file of the user's cache folder (XDG_CACHE_HOME, ~/.cache): it names the job and the output's
    own files by size, times and inode, so that whatever changes any of them makes it void. It is an extra: what can't
    be told, such as the bytes of a pipe, is not proven, and errors of the cache folder are none of the job's.

    Args:
        options: whatever decides about results beside model and inputs; of a file that one names the bytes count.
        model: a folder, a .gguf file or a hub id.
        inputs: files, or folders of them.
    """

    def __init__(self, options: Mapping[str, Any], model: str, inputs: Iterable[str], output: str):
        self._options, self._model, self._inputs = dict(options), model, list(inputs)
        self._record = Path(_cache_folder(), f"{_digest_of(os.path.realpath(output))[:32]}.json")
        self._before = self._stamps()

    def _stamps(self) -> tuple[Stamps, Stamps] | None:
        """Return those of the model's files and of what else is read; None where there are others than files, or too
        many bytes."""
        folder = _model_folder(self._model)
        found = None if folder is None else stamps_of([folder], is_deep=not self._model.endswith(".gguf"))
        inputs = None if "-" in self._inputs else stamps_of([*self._inputs, *_paths_among(self._options.values())])
        if not found or not inputs or sum(size for size, *_ in inputs.values()) > _MOST_BYTES:
            return None
        return found, inputs

    def _name(self, model: Stamps) -> str:
        """Return a hash that tells the job from others."""
        versions = {name: _version_of(name) for name in _LIBRARIES}
        files = {name: _bytes_of([name]) for name in _paths_among(self._options.values())}
        inputs = [self._inputs, _bytes_of(self._inputs)]
        return _digest_of([_VERSION, self._options, versions, files, self._model, model, inputs])

    def remember(self, count: int, files: Iterable[str | Path], said: list[tuple[str, str]]) -> None:
        """Keep the proof that `files`, the output and what goes with it, hold all `count` results; `said` is what the
        run said behind them, as (stream, text)."""
        with contextlib.suppress(OSError):
            names = [os.path.realpath(path) for path in files]
            held = stamps_of(names)
            if self._before is None or held is None or not all(map(_is_told, (held, self._before[0]))):
                return
            if self._stamps() != self._before:  # before much is read
                return
            found = {"job": self._name(self._before[0]), "count": count, "files": held, "said": said}
            # A change from here on has another time than all that was.
            time.sleep(_TICK)
            if self._stamps() == self._before and stamps_of(names) == held:
                _write(self._record, found)

    def found(self) -> tuple[int, list[tuple[str, str]]] | None:
        """Return (how many results there are, what the run said of them); None where that is not proven."""
        if self._before is None:
            return None
        try:
            record = json.loads(self._record.read_bytes())
            files = {name: tuple(stamp) for name, stamp in record["files"].items()}
            if stamps_of(files) != files or record["job"] != self._name(self._before[0]):
                return None
            said = [(str(name), str(text)) for name, text in record["said"]]
            return (int(record["count"]), said) if _is_newest(self._model) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def stamps_of(paths: Iterable[str | Path], is_deep: bool = True) -> Stamps | None:
    """Return size, times and inode of each file, and of those in folders; None where anything else stands there, or too
    many files do."""
    found: Stamps = {}
    try:
        for path in paths:
            for name in _walk(os.fspath(path), is_deep):
                status = os.stat(name)
                if not stat.S_ISREG(status.st_mode) or len(found) == _MOST_FILES:
                    return None
                found[name] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    except OSError:
        return None
    return found


def _walk(path: str, is_deep: bool = True) -> Iterable[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(folders) if is_deep else []
        yield from (os.path.join(folder, name) for name in sorted(names))


def _is_told(stamps: Stamps) -> bool:
    """Return whether a later change has another time, even where a file system counts whole seconds."""
    now = time.time_ns()
    return all(changed % 10**9 or now - changed > 10 * 10**9 for _, _, changed, _ in stamps.values())


def _model_folder(model: str) -> str | None:
    """Return the folder of a model's files; None where the hub's cache has none."""
    if os.path.isdir(model):
        return os.path.realpath(model)
    if model.endswith(".gguf"):
        return os.path.dirname(os.path.realpath(model)) if os.path.isfile(model) else None
    commit, cached = _cached_commit(model)
    return None if commit is None else str(cached / "snapshots" / commit)


def _cached_commit(model: str) -> tuple[str | None, Path]:
    """Return the commit of the hub's model that its cache has, if it has one, and where the cache has the model."""
    try:
        from huggingface_hub import constants

        cached = Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
        return (cached / "refs" / "main").read_text().strip(), cached
    except (ImportError, OSError, ValueError):
        return None, Path()


def _is_newest(model: str) -> bool:
    """Return whether the hub has no other version of a model of its; where it can't be asked, that is not known."""
    if os.path.exists(model):
        return True
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        return HfApi().model_info(model, timeout=_HUB_TIMEOUT).sha == _cached_commit(model)[0]
    except Exception:  # the connection's, of whatever library makes it
        return False


def _paths_among(values: Iterable[object]) -> list[str]:
    """Return the files and folders that options name."""
    flat = (one for value in values for one in (value if isinstance(value, (list, tuple)) else [value]))
    return sorted({one for one in flat if isinstance(one, str) and "\0" not in one and os.path.exists(one)})


def _bytes_of(paths: Iterable[str]) -> str:
    """Return a hash of the names and the bytes of files, and of those in folders."""
    found = hashlib.sha256()
    for path in paths:
        for name in _walk(path):
            found.update(f"{os.path.relpath(name, path)} {os.path.getsize(name)}\n".encode(errors="surrogateescape"))
            with open(name, "rb") as file:
                while part := file.read(2**20):
                    found.update(part)
    return found.hexdigest()


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _version_of(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return os.path.join(base, "radix_ops", "finished")


def _write(path: Path, record: dict) -> None:
    """Write a record at once and whole, and keep the newest ones alone."""
    if not path.is_absolute():  # nobody's home is known
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(record, file)
    os.replace(file.name, path)
    kept = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime_ns, reverse=True)
    for old in kept[_MOST_RECORDS:]:
        old.unlink(missing_ok=True)
