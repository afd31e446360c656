"""TokenStore: many token sequences end to end, in memory or, past a bound, in a temporary file."""

from __future__ import annotations

import array
import os
import tempfile
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from .._integers import TokenIds, as_integer_list

_LEAST_CAPACITY = 4096
_MAX_ID = 2**31 - 1


class TokenStore:
    """Sequences of token ids as one int32 array, 4 bytes a token.

    Past `max_memory` bytes the tokens stand in a temporary file that is mapped into memory, where the system keeps what
    is being read; the file goes when the store does. Sequences can be appended at any time; an append that fails, as on
    a full disk, leaves the store as it was. After a fork each process has a store of its own.
    """

    def __init__(self, max_memory: int = 2**30):
        if max_memory < 0:
            raise ValueError(f"max_memory must not be negative, got {max_memory}")
        self.max_memory = max_memory
        self._ends = array.array("q")
        self._waiting = np.empty(0, np.int32)  # in memory, behind those in the file
        self._num_waiting = 0
        self._num_written = 0  # in the file, which may hold more behind them where a write failed
        self._file: IO[bytes] | None = None
        self._writer = 0  # the process whose file it is
        self._mapped: npt.NDArray[np.int32] | None = None

    @classmethod
    def from_sequences(cls, sequences: Iterable[TokenIds]) -> TokenStore:
        """Make a store of lists, arrays or tensors of token ids; errors are those of `append`."""
        store = cls()
        for sequence in sequences:
            store.append(sequence)
        return store

    @classmethod
    def from_packed(cls, input_ids: TokenIds, cu_seqlens: TokenIds) -> TokenStore:
        """Make a store of packed sequences: ids [N] end to end and the cumulative lengths [B + 1], 0 first.

        Raises TypeError for cu_seqlens that are no integers, ValueError where they do not start at 0, decrease or do
        not end at N; otherwise as `append`.
        """
        ends = np.asarray(cu_seqlens)
        if ends.size and ends.dtype.kind not in "iu":
            raise TypeError(f"cu_seqlens must hold integers, got {ends.dtype}")
        ends = ends.astype(np.int64)  # unsigned ones that are too large come out negative
        if (
            ends.ndim != 1
            or not len(ends)
            or ends[0] != 0
            or (ends[1:] < ends[:-1]).any()
            or ends[-1] != len(input_ids)
        ):
            raise ValueError(f"cu_seqlens must start at 0, not decrease and end at the {len(input_ids)} tokens")
        store = cls()
        store.append(input_ids)
        store._ends = array.array("q", ends[1:].tobytes())
        return store

    def append(self, ids: TokenIds) -> None:
        """Add a sequence: a list, array or tensor of token ids, which may be empty.

        Raises TypeError for anything but integers, ValueError for more than one dimension and for ids that are negative
        or larger than int32 holds.
        """
        name = f"sequence {len(self)}"
        if isinstance(ids, torch.Tensor):
            ids = ids.detach().cpu()
        if np.ma.is_masked(ids):
            raise TypeError(f"{name} must hold integers, got an array with masked values")
        if not isinstance(ids, (list, tuple)):
            found = np.asarray(ids)
            ids = found.tolist() if found.dtype == object and found.ndim == 1 else found
        if isinstance(ids, (list, tuple)):
            ids = as_integer_list(name, ids)
        found = np.asarray(ids)
        if found.ndim != 1:
            raise ValueError(f"{name} must be a flat list of token ids, got shape {list(found.shape)}")
        if len(found):
            if isinstance(ids, (list, tuple)) and found.dtype.kind not in "iu":
                found = np.asarray(ids, object)  # Python's integers may be beyond 64 bits
            if found.dtype.kind not in "iuO":
                raise TypeError(f"{name} must hold integers, got {found.dtype}")
            if _largest(found) > _MAX_ID:
                raise ValueError(f"{name} must hold token ids from 0 to {_MAX_ID}, got {found.min()} to {found.max()}")
        self._reserve(len(found))
        self._waiting[self._num_waiting : self._num_waiting + len(found)] = found
        self._num_waiting += len(found)
        self._ends.append(self.num_tokens + len(found))

    def _reserve(self, length: int) -> None:
        # Once there is a file, what waits for it is kept small.
        most = self.max_memory // 4 if self._file is None else min(self.max_memory // 4, 2**22)
        if self._num_waiting + length > max(_LEAST_CAPACITY, most):
            self._write()
        if self._num_waiting + length > len(self._waiting):
            larger = np.empty(max(2 * len(self._waiting), self._num_waiting + length), np.int32)
            larger[: self._num_waiting] = self._waiting[: self._num_waiting]
            self._waiting = larger

    def _write(self) -> None:
        """Move what is in memory behind what is in the file; it stays in memory where that fails."""
        if self._file is None:
            self._file, self._writer = _temporary_file(), os.getpid()
        elif self._writer != os.getpid():
            # The process that this one was forked from goes on to write to its file.
            own = _temporary_file()
            if self._num_written:
                _write_at(own, 0, self._map(self._num_written))
            self._file, self._writer = own, os.getpid()
        _write_at(self._file, 4 * self._num_written, self._waiting[: self._num_waiting])
        self._num_written += self._num_waiting
        self._waiting, self._num_waiting = np.empty(_LEAST_CAPACITY, np.int32), 0
        self._mapped = None

    def _map(self, num_tokens: int) -> npt.NDArray[np.int32]:
        assert self._file is not None
        # Copy on write: torch takes no read-only arrays, and nobody writes.
        return np.memmap(self._file, np.int32, "c", shape=(num_tokens,))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | np.integer[Any]) -> npt.NDArray[np.int32]:
        """Return the ids of a sequence, int32; a view, not to be written to."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the store holds {len(self)} sequences, asked for {index}")
        index = int(index) % len(self)
        start = self._ends[index - 1] if index else 0
        return self.input_ids[start : self._ends[index]]

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences."""
        return self._ends[-1] if self._ends else 0

    @property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """All tokens, int32 [num_tokens]; a view, not to be written to. A store on disk gives a mapped file."""
        if self._file is None:
            return self._waiting[: self._num_waiting]
        if self._num_waiting:
            self._write()
        if self._mapped is None:
            self._mapped = self._map(self._num_written)
        return self._mapped

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 [len(store)]."""
        return np.diff(np.array(self._ends, np.int64), prepend=0)  # type: ignore[return-value]  # as NumPy has it

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each sequence starts in `input_ids`, int64 [len(store)]."""
        return np.array(self._ends, np.int64) - self.lengths


def _largest(ids: np.ndarray) -> int:
    """Return the largest id, or one above the largest allowed where one is negative."""
    if ids.dtype == object:
        return int(ids.max()) if ids.min() >= 0 else 2**64
    if not ids.dtype.isnative:
        ids = ids.astype(ids.dtype.newbyteorder("="))
    # Without its sign a negative id is a large one.
    return int((ids.view(f"u{ids.dtype.itemsize}") if ids.dtype.itemsize >= 4 else ids.astype(np.uint32)).max())


def _temporary_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="radix_ops-", buffering=0)


def _write_at(file: IO[bytes], offset: int, ids: np.ndarray) -> None:
    """Write to a place that is known, so that what an earlier write left half done is written over."""
    content = memoryview(ids.view(np.uint8))
    while len(content):
        size = os.pwrite(file.fileno(), content, offset)
        content, offset = content[size:], offset + size
