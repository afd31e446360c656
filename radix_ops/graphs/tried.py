"""Graphs of models of others' code, each of which is tried before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import Sizes
from .capture import Captured, Memory
from .forwards import Call, CapturedForwards, _Key
from .inputs import StaticInputs
from .watch import Watch, forwards_of, why_not

# How many times as far as two eager runs from each other a replay may be from one.
_FACTOR = 4
# How many calls go by before a module that no graph could stand in for is looked at again; and how often it may change
# before one of its graphs was replayed, as where two adapters take turns.
_PATIENCE, _MOST_CHANGES = 64, 8


class _DiffersError(Exception):
    """A graph does not compute what the forward does."""


class TriedForwards(CapturedForwards):
    """The graphs of a module whose classes the caller has proven, but whose code it does not know.

    Each graph is compared with the forward, on the batch that it was captured from and on another, to the bit where two
    runs of the forward agree to the bit. One that differs, and a forward that can't be captured, are the end of graphs
    for this module (`off`). All parts of the module are looked at before each replay, so no memory is kept of weights
    that were moved or replaced.
    """

    def __init__(self) -> None:
        super().__init__({})
        self._begin()

    def _begin(self) -> None:
        self.off: str | None = None  # why there will be no more graphs
        self._patience = self._changes = 0

    def clear(self) -> None:
        """Give up all graphs and their memory, and what is known against graphs."""
        super().clear()
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> TriedForwards:
        return TriedForwards()

    def __reduce__(self) -> tuple[Any, ...]:
        return TriedForwards, ()

    def replay(self, call: Call, sizes: Sizes) -> Tensor | None:
        """Return the call's result by its graph, or None where it has none, without a run of `compute`."""
        key = self._key(call, sizes)
        if key not in self._graphs:
            return None
        with self._lock, torch.cuda.device(call.weight.device):
            captured = self._graphs.take(key) if self._is_watched(call.module) else None
            if captured is None:
                return None
            self._changes = 0
            return captured.replay(call.batch, call.rows)

    def has(self, call: Call, sizes: Sizes) -> bool:
        """Return whether there is a graph for calls like this one."""
        return self._key(call, sizes) in self._graphs

    def is_due(self, call: Call, sizes: Sizes) -> bool:
        """Return whether `run` would replay or capture a graph for this call; one like it is known from now on."""
        key = self._key(call, sizes)
        if key is None:
            return False
        with self._lock:
            return key in self._graphs or self._graphs.is_due(key)

    def may_watch(self, module: nn.Module) -> bool:
        """Return whether there may be graphs of the module, as it was when it was last looked at."""
        if self.off is not None:
            return False
        with self._lock:
            if self._watch is None and self._patience > 0:
                self._patience -= 1
                return False
            return self._watch is not None or self._is_watching(module)

    def _key(self, call: Call, sizes: Sizes) -> _Key | None:
        return None if self.off is not None else super()._key(call, sizes)

    def _is_watched(self, module: nn.Module) -> bool:
        return self._watch is not None and self._watch.may_replay(module) and self._watch.is_unchanged()

    def _is_watching(self, module: nn.Module) -> bool:
        if not self._is_watched(module):
            self._changes += self._watch is not None
            self._forget()
            if self._changes > _MOST_CHANGES or why_not(module, None) is not None:
                self._patience, self._changes = _PATIENCE, 0
                return False
            self._watch = Watch(module, forwards_of(module), keeps_memory=False)
        return True

    def _captured(
        self, compute: Callable[[StaticInputs], Tensor], inputs: StaticInputs, count: int, memory: Memory
    ) -> Captured:
        compute(inputs)  # may set up what can't be set up in a capture
        captured = super()._captured(compute, inputs, count, memory)
        for by in (0, 1):
            inputs.shift(by)
            try:
                if not _agree(captured, compute, inputs):
                    raise _DiffersError("its results differ from those of the model's own forward")
            finally:
                inputs.shift(-by)
        if not self._is_unchanged():
            raise _DiffersError("the forward changes the model")
        return captured

    def _refuse(self, key: _Key, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._graphs.refuse(key)
            return
        self._forget()
        self.off = str(error) if isinstance(error, _DiffersError) else f"{type(error).__name__}: {error}"
        if isinstance(error, _DiffersError):
            warnings.warn(f"radix_ops: a model runs without CUDA graphs, since {error}", stacklevel=2)


def _agree(captured: Captured, compute: Callable[[StaticInputs], Tensor], inputs: StaticInputs) -> bool:
    want, got = compute(inputs), captured.replay_as_filled()
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return False
    if _same_bits(got, want):
        return True
    again = compute(inputs)
    noise = (again.float() - want.float()).norm()
    return not _same_bits(again, want) and bool((got.float() - want.float()).norm() <= _FACTOR * noise)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
