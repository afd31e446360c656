"""Files beside --output, by way of which one run at a time writes to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..engine.errors import UserError

# The helper files have these names while --output is made: of every kind, of a matrix, of quantised ones, of tables.
_OF_MATRIX = (".part", ".rows", ".rows.tmp")
HELPER_SUFFIXES = (
    *_OF_MATRIX,
    ".lock",
    ".float32",
    *(f".float32{suffix}" for suffix in _OF_MATRIX),
    ".lines",
    ".ids.part",
)
_COMPANIONS = (".ids.jsonl", ".ranges.npy")  # of a matrix
_LOCK_START = b"radix-ops: "


def beside(output: str | Path, suffix: str) -> Path:
    """Return the path of a helper file of `output`, beside what it may be a link to."""
    return Path(os.path.realpath(output) + suffix)


def companion(output: str | Path, suffix: str) -> Path:
    """Return the path of a file that goes with `output`: its name, with this suffix in place of its own."""
    return beside(output, "").with_suffix(suffix)


def companions(output: str | Path) -> list[Path]:
    """Return the paths of all files that may go with `output`."""
    is_matrix = str(output).lower().endswith(".npy")
    return [companion(output, suffix) for suffix in _COMPANIONS] if is_matrix else []


def open_helper(path: Path, flags: int = 0) -> BinaryIO:
    """Open a helper file, to read and write; `flags` are further ones of os.open.

    UserError where a link or anything else but a regular file stands there.
    """
    try:
        number = os.open(path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise UserError(f"{path} is a symbolic link; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{path} is no regular file; remove it")
    return os.fdopen(number, "r+b")


def stands_at(file: BinaryIO, path: Path) -> bool:
    """Return whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def put_in_place(file: BinaryIO, part: Path, path: Path) -> None:
    """Give the open file, which was made as `part`, the name `path`, at once and whole.

    Where `part` was removed meanwhile, what the file holds is written anew. UserError where it was replaced.
    """
    file.flush()
    os.fsync(file.fileno())
    if not stands_at(file, part):
        if os.path.lexists(part):
            raise UserError(f"{part} was replaced by another file while the run wrote to it")
        # The buffer of `file` may be older than what a memory map wrote.
        with os.fdopen(os.dup(file.fileno()), "rb") as held, open_helper(part, os.O_CREAT | os.O_EXCL) as copy:
            held.seek(0)
            shutil.copyfileobj(held, copy, 2**20)
            copy.flush()
            os.fsync(copy.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def claimed(output: str | None) -> Iterator[None]:
    """Hold `output`, if there is one, for this process alone. UserError where another one holds it.

    The lock is the system's, on PATH.lock, so that it goes with its process, however that ends; the file, which says
    whose it is, is removed in the end, and one that a kill left behind is taken over.
    """
    if output is None:
        yield
        return
    path = beside(output, ".lock")
    lock = _lock(path, output)
    try:
        yield
    finally:
        if lock is not None:
            with lock:
                if stands_at(lock, path):
                    path.unlink()


def _lock(path: Path, output: str) -> BinaryIO | None:
    while True:
        file = open_helper(path, os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"--output {output} is being written by {_holder_of(file)}") from error
            # Some file systems have no locks.
            print(
                f"--output {output} can't be locked ({error.strerror}): let no other run write to it", file=sys.stderr
            )
            if not os.path.getsize(path):
                path.unlink()
            return None
        # The run before removes the file before it lets go of it.
        if stands_at(file, path):
            break
        file.close()
    held = file.read(len(_LOCK_START))
    if not _LOCK_START.startswith(held):
        file.close()
        raise UserError(f"{path} exists and is of no run; remove it, or name another --output")
    file.seek(0)
    file.truncate()
    file.write(_LOCK_START + f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    file.flush()
    return file


def _holder_of(lock: BinaryIO) -> str:
    held = lock.read(300)
    known = held.startswith(_LOCK_START) and held.endswith(b"\n")
    name = held.removeprefix(_LOCK_START).decode(errors="replace").strip() if known else ""
    return f"another run{name and ', '}{name}; one at a time can"
