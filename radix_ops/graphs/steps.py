"""Which training steps replay captured graphs, forward and backward, and which graphs are kept."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _every_module

from .._attention import Layout
from ..batch import FoldedBatch
from .buckets import Sizes
from .circumstances import settings, why_eager
from .forwards import Call
from .inputs import StaticInputs
from .shelf import Shelf
from .step import Awaited, CapturedStep, StepMemory, attach, run_once
from .twin import Twin
from .watch import Forwards, why_not

_GLOBAL_HOOKS = ("_global_backward_hooks", "_global_backward_pre_hooks")

_Key = tuple[Sizes, Layout, tuple[Hashable, ...]]


class CapturedSteps:
    """The steps of one model; copies and pickles of it are empty.

    The first batch of a kind (sizes, layout, settings of torch) runs eagerly; the second is captured, which takes about
    as long as two eager steps; later ones are replays. One forward at a time may wait for its backward: others run
    eagerly meanwhile. Gradients are the caller's own. Nothing waits for the device.
    """

    def __init__(
        self,
        forwards: Forwards,
        embed: Callable[[Any, Tensor], Tensor],
        layers: Callable[[Any, Tensor, FoldedBatch, Layout, Tensor | None], Tensor],
    ):
        """`forwards` are the classes of modules that a graph may stand in for, and their forwards.

        layers(module, embed(module, ids), batch, layout, rows) is the forward of a module. Ids are embedded eagerly:
        the gradient of an embedding is large, and a graph would keep a second one.
        """
        self._arguments = forwards, embed, layers
        self._lock = threading.Lock()
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedSteps:
        return CapturedSteps(*self._arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedSteps, self._arguments

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Give up all graphs and their memory; what a backward still needs goes with its forward's result."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._twin: Twin | None = None
        self._steps: Shelf[CapturedStep] = Shelf()
        self._memory: StepMemory | None = None
        self._ran: set[Hashable] = set()

    def run(self, call: Call, sizes: Sizes) -> Tensor | None:
        """Return the result of a call that is padded to these sizes, or None where it has to run eagerly."""
        if _why_eager(call) is not None:
            return None
        device = call.weight.device
        with self._lock, torch.cuda.device(device):
            twin = self._twin_of(call.module)
            if twin is None or twin.has_hooks() or not any(twin.needs):
                return None
            if self._memory is None:
                self._memory = StepMemory(device)
            if not self._memory.is_free():
                return None
            key = sizes, call.layout, settings()
            step = self._steps.take(key)
            if step is None and self._steps.is_due(key) and self._is_unchanged(twin):
                step = self._capture(key, call, twin, self._memory)
            if step is None:
                return None
            return self._replay(step, call, twin, self._memory)

    def _twin_of(self, module: nn.Module) -> Twin | None:
        """Return the module's twin, a new one where it was changed, or None where no graph may stand in for it."""
        if self._twin is None or not self._twin.may_replay(module):
            forwards = self._arguments[0]
            if why_not(module, forwards) is not None:
                return None
            self._forget()
            self._twin = Twin(module, forwards)
        return self._twin

    def _is_unchanged(self, twin: Twin) -> bool:
        """Return whether the twin still is one; where it is not, give up what was captured of it."""
        if twin.is_unchanged():
            return True
        self._forget()
        return False

    def _replay(self, step: CapturedStep, call: Call, twin: Twin, memory: StepMemory) -> Tensor | None:
        embed = self._arguments[1]
        states, hidden = step.forward(call.batch, call.rows, lambda ids: embed(call.module, ids))
        if not self._is_unchanged(twin):  # the GPU is busy meanwhile
            return None
        awaited = Awaited(step, hidden)
        memory.hold_for(awaited)
        return attach(awaited, states, twin.weights)

    def _capture(self, key: _Key, call: Call, twin: Twin, memory: StepMemory) -> CapturedStep | None:
        """Capture a step and keep it; return None, and warn, where that fails."""
        (sizes, layout, _), (_, embed, compute) = key, self._arguments
        try:
            inputs = StaticInputs(sizes, memory.device)
            inputs.fill(call.batch, call.rows)
            module, weights = twin.made(call.module)
            embedded = embed(call.module, inputs.batch.input_ids)
            states = embedded.detach().requires_grad_(embedded.requires_grad)

            def layers(states: Tensor, inputs: StaticInputs) -> Tensor:
                return compute(module, states, inputs.batch, layout, inputs.rows())

            kind = key[1:], sizes.wanted is None, sizes.keys == sizes.rows
            if kind not in self._ran:
                run_once(layers, inputs, states, weights)  # kernels are compiled on their first run
                self._ran.add(kind)
            step = CapturedStep(layers, inputs, states, weights, memory)
        except Exception as error:
            # What is wrong with the call itself its eager run will tell.
            self._steps.refuse(key)
            self._memory = None  # a pool can't be used again
            warnings.warn(
                f"radix_ops: training steps of {sizes.rows} rows run without CUDA graphs, since they could not be "
                f"captured: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return None
        self._steps.put(key, step)
        return step


def _why_eager(call: Call) -> str | None:
    """Return why this call can't be a captured step, or None."""
    batch = call.batch
    with torch.no_grad():  # gradients, which a forward's graph refuses, are what a step is for
        reason = why_eager(batch, call.rows)
    if reason is not None:
        return reason
    if batch.kv_index.shape[0] != batch.num_nodes and not call.by_trie:
        return "keys are unfolded, whose gradients are summed by tables that no two batches have of one size"
    if torch.is_anomaly_enabled():
        return "anomalies are looked for"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved tensors have hooks"
    if torch._C._current_graph_task_id() != -1:
        return "a backward pass is at work"
    if any(getattr(_every_module, name) for name in _GLOBAL_HOOKS):
        return "there is a hook on all modules"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "other processes take part, whose gradients travel while a backward runs"
    return None
