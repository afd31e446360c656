"""Which forwards replay a captured graph, and which graphs are kept."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .._attention import Layout
from ..batch import FoldedBatch
from ..ops import flash, trie
from .buckets import Sizes, sizes_of
from .capture import Captured, Memory
from .circumstances import settings, why_eager
from .inputs import StaticInputs
from .padding import padded_to
from .shelf import Shelf
from .watch import Forwards, Watch, why_not

_LAYOUTS = ("auto", "compact", "trie")

_Key = tuple[Sizes, Layout, tuple[Hashable, ...]]


@dataclasses.dataclass
class Call:
    """A forward of `module`, on the batch's device: compute(batch, layout, rows), and what to know of it."""

    module: nn.Module
    compute: Callable[[FoldedBatch, Layout, Tensor | None], Tensor]
    batch: FoldedBatch
    layout: Layout
    rows: Tensor | None  # those wanted, which the result has; None: all
    weight: Tensor  # one of its weights, which are of one dtype, as the result is
    head_dim: int  # of attention
    width: int  # of the result
    is_worth_it: Callable[[int], bool]  # whether the host takes longer than the GPU for so many rows

    @property
    def num_wanted(self) -> int:
        return self.batch.num_rows if self.rows is None else self.rows.shape[0]

    @property
    def by_trie(self) -> bool:
        """Whether attention goes by the trie and not by sequences, for a layout and weights that have kernels."""
        if self.layout != "auto":
            return self.layout == "trie"
        is_shared = self.batch.kv_index.shape[0] != self.batch.num_nodes
        return is_shared and _kernels(self.weight.dtype, self.weight.device, self.head_dim)[1]

    def sizes(self) -> Sizes | None:
        """Return the sizes that the batch is padded to, or None where it is computed as it is.

        They depend on nothing but the model, the batch and the layout: with gradients and without, replayed or not,
        products have as many rows, and so the same bits.
        """
        batch, layout, weight = self.batch, self.layout, self.weight
        if not has_kernels(weight, self.head_dim) or layout not in _LAYOUTS or batch.num_nodes == 0:
            return None
        _, by_trie = _kernels(weight.dtype, weight.device, self.head_dim)
        if layout == "trie" and not by_trie:
            return None
        if self.rows is not None and self.rows.shape[0] == 0:
            return None
        sizes = sizes_of(batch, by_trie=self.by_trie, num_wanted=None if self.rows is None else self.num_wanted)
        return sizes if self.is_worth_it(sizes.rows) else None

    def run_padded(self, sizes: Sizes) -> Tensor:
        """Return the result, computed on as many rows as a graph's."""
        rows, count = self.rows, self.num_wanted
        if rows is not None and sizes.wanted is not None:
            # A row that the batch does not have must stay one.
            there = torch.where(rows < self.batch.num_rows, rows, -1)
            rows = torch.cat([there, there.new_zeros(sizes.wanted - count)])
        return self.compute(padded_to(self.batch, sizes.rows), self.layout, rows)[:count]


class CapturedForwards:
    """The graphs of one model; copies and pickles of it are empty.

    The first batch of a kind (sizes, layout, settings of torch) runs eagerly; the second is captured, which takes
    about as long as an eager run; later ones are replays. There are at most 64 graphs, in one memory pool: the least
    recently used one goes, unless all are in use. A lock keeps threads apart, and events streams: graphs on a device
    run one after another, those of other models, too. Results are the caller's own. Nothing waits for the device.
    """

    def __init__(self, forwards: Forwards):
        """`forwards` are the classes of modules that a graph may stand in for, and their forwards."""
        self._forwards = forwards
        self._lock = threading.Lock()
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedForwards:
        return CapturedForwards(self._forwards)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedForwards, (self._forwards,)

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._graphs: Shelf[Captured] = Shelf()
        self._memory: Memory | None = None

    def run(self, call: Call, sizes: Sizes) -> Tensor | None:
        """Return the result of a call that is padded to these sizes, or None where no graph may stand in for it."""
        key = self._key(call, sizes)
        return None if key is None else self._run_watched(key, call)

    def warm_up(self, call: Call, sizes: Sizes) -> bool:
        """Capture the graph of calls like this one, if there is none yet, and return whether there is one."""
        key = self._key(call, sizes)
        if key is not None:
            self._run_watched(key, call, at_once=True)
        return key in self._graphs

    def _key(self, call: Call, sizes: Sizes) -> _Key | None:
        """Return the kind of a call: what its graph has fixed. None where there is to be no graph for it."""
        if why_eager(call.batch, call.rows) is not None:
            return None
        return sizes, call.layout, settings()

    def _run_watched(self, key: _Key, call: Call, at_once: bool = False) -> Tensor | None:
        weight = call.weight
        with self._lock, torch.cuda.device(weight.device):
            for _ in range(2):  # again where a change was seen
                if not self._is_watching(call.module):
                    return None
                if self._memory is None:
                    self._memory = Memory(weight.device, weight.dtype, call.width)
                result = self._run(key, call, self._memory, at_once)
                if result is not None:
                    return result
                self._forget()
        return None

    def _is_watching(self, module: nn.Module) -> bool:
        """Return whether the module is watched: from this moment on where it was not, or was changed."""
        if self._watch is None or not self._watch.may_replay(module):
            if why_not(module, self._forwards) is not None:
                return False
            self._forget()
            self._watch = Watch(module, self._forwards)
        return True

    def _run(self, key: _Key, call: Call, memory: Memory, at_once: bool) -> Tensor | None:
        """Return the result, or None where the module is not the one that is watched."""
        captured = self._graphs.take(key)
        if captured is None:
            inputs = StaticInputs(key[0], memory.device)
            inputs.fill(call.batch, call.rows)

            def compute(inputs: StaticInputs) -> Tensor:
                # In one mode, so that compiled layers have one graph.
                with torch.inference_mode(False), torch.no_grad():
                    return call.compute(inputs.batch, call.layout, inputs.rows())

            if at_once or not self._graphs.is_due(key):
                result = compute(inputs)[: call.num_wanted]
                if not at_once:
                    return result
            if not self._is_unchanged():
                return None
            captured = self._capture(key, compute, inputs, memory)
            if captured is None:
                return compute(inputs)[: call.num_wanted]
        result = captured.replay(call.batch, call.rows)
        return result if self._is_unchanged() else None  # the GPU is busy meanwhile

    def _is_unchanged(self) -> bool:
        return self._watch is not None and self._watch.is_unchanged()

    def _capture(
        self, key: _Key, compute: Callable[[StaticInputs], Tensor], inputs: StaticInputs, memory: Memory
    ) -> Captured | None:
        """Capture a graph and keep it; return None, and warn, where that fails."""
        count = key[0].rows if key[0].wanted is None else key[0].wanted
        try:
            captured = self._captured(compute, inputs, count, memory)
        except Exception as error:
            # What is wrong with the call itself its eager run will tell.
            self._memory = None  # a pool can't be used again
            self._refuse(key, error)
            return None
        self._graphs.put(key, captured)
        return captured

    def _captured(
        self, compute: Callable[[StaticInputs], Tensor], inputs: StaticInputs, count: int, memory: Memory
    ) -> Captured:
        return Captured(compute, inputs, count, memory)

    def _refuse(self, key: _Key, error: Exception) -> None:
        """Make no graph for such calls any more, since it could not be captured."""
        self._graphs.refuse(key)
        warnings.warn(
            f"radix_ops: batches of {key[0].rows} rows run without a CUDA graph, since it could not be captured: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )


def has_kernels(weight: Tensor, head_dim: int) -> bool:
    """Return whether a model with such weights attends by kernels that a graph holds."""
    return weight.dtype in flash.DTYPES and _kernels(weight.dtype, weight.device, head_dim)[0]


@functools.cache
def _kernels(dtype: torch.dtype, device: torch.device, head_dim: int) -> tuple[bool, bool]:
    """Return whether flash attention, and attention over tries, have kernels that a graph holds."""
    if torch.version.cuda is None or torch.cuda.get_allocator_backend() != "native":  # which has pools for graphs
        return False, False
    probe = torch.empty(0, 1, head_dim, dtype=dtype, device=device)
    return flash.has_kernels(probe, probe), trie.has_kernels(probe, probe)
