"""Captures what a function launches as a CUDA graph, and replays it, without waiting for the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..batch import FoldedBatch
from .inputs import StaticInputs

_broken: list[torch.cuda.CUDAGraph] = []  # torch's allocator still points to them


class Lane:
    """What all graphs on a device share, whatever model they are of: one is captured, and one runs, at a time.

    The products of a graph use a workspace of cuBLAS that belongs to the stream of its capture, so two graphs must not
    run side by side. torch gives workspaces up where it makes graphs of its own; they lie in a pool that nothing else
    is taken from, so that a graph may go on using its own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.Lock()
        self._capture_stream = torch.cuda.Stream(device)
        self._workspaces = torch.cuda.MemPool()
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None  # of the turn before

    @contextlib.contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream]:
        """Let what is launched on the current stream begin when the turn before is done."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and stream != self._stream:
                stream.wait_event(self._done)
            self._stream = stream
            try:
                yield stream
            finally:
                self._done.record(stream)

    def capture(self, function: Callable[[], object], pool: Any, *, has_backward: bool = False) -> torch.cuda.CUDAGraph:
        """Return a graph of what `function`, which was called before, launches; its memory is of `pool`.

        `has_backward` tells that it runs a backward pass of what a capture recorded, in the thread where torch does.
        Other threads may use the device meanwhile. Raises what the function raises, and RuntimeError where it does what
        a graph can't hold.
        """
        with self._lock, torch.cuda.stream(self._capture_stream):
            self._take_workspace()
            if has_backward:
                one = torch.ones(1, device=self.device, requires_grad=True)
                with torch.enable_grad():
                    torch.autograd.grad(_InBackward.apply(one, self._take_workspace), one)
            graph = torch.cuda.CUDAGraph()
            # Python may collect other graphs meanwhile, which the stricter modes don't allow.
            graph.capture_begin(pool=pool, capture_error_mode="relaxed")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._end(graph, pool)
                raise
            self._end(graph, pool)
            return graph

    def _take_workspace(self) -> None:
        """Let cuBLAS have its workspace for this stream and this thread, of which each has its own."""
        one, out = (torch.ones(1, 1, device=self.device) for _ in range(2))
        with torch.cuda.use_mem_pool(self._workspaces, self.device):
            torch.mm(one, one, out=out)

    def _end(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # A capture that was broken off leaves torch's allocator in it.
            _broken.append(graph)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
                torch._C._cuda_releasePool(self.device.index, pool)
            raise


class _InBackward(torch.autograd.Function):
    """Calls a function where a backward pass runs: on the stream of the forward, in a thread of torch's."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.function()
        return grad, None


_lanes: dict[torch.device, Lane] = {}
_lanes_lock = threading.Lock()


def lane_of(device: torch.device) -> Lane:
    with _lanes_lock, torch.cuda.device(device):
        if device not in _lanes:
            _lanes[device] = Lane(device)
        return _lanes[device]


class Memory:
    """What the graphs of a model share: the pool of what they compute, and the rows that they return."""

    def __init__(self, device: torch.device, dtype: torch.dtype, width: int):
        self.device, self.lane = device, lane_of(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._rows = torch.empty(0, width, dtype=dtype, device=device)

    def rows(self, count: int) -> Tensor:
        """Return [count, width], of the same memory as other calls' where it holds as many."""
        if count > self._rows.shape[0]:
            with torch.inference_mode(False):
                self._rows = self._rows.new_empty(count, self._rows.shape[1])
        return self._rows[:count]


class Captured:
    """A captured forward with the buffers that it reads and writes."""

    def __init__(self, compute: Callable[[StaticInputs], Tensor], inputs: StaticInputs, count: int, memory: Memory):
        """Capture a forward that ran with these inputs before. Raises RuntimeError where a graph can't hold it."""
        self._inputs, self._lane = inputs, memory.lane
        self._out = memory.rows(count)
        self._home = torch.cuda.current_stream(memory.device)
        self._graph = self._lane.capture(lambda: self._out.copy_(compute(inputs)), memory.pool)

    def replay(self, batch: FoldedBatch, rows: Tensor | None) -> Tensor:
        """Return the result for a batch of the same sizes, a tensor of its own."""
        with self._lane.turn() as stream:
            if stream != self._home:
                self._inputs.record_stream(stream)
                self._out.record_stream(stream)
            self._inputs.fill(batch, rows)
            self._graph.replay()
            return self._out[: batch.num_rows if rows is None else rows.shape[0]].clone()

    def replay_as_filled(self) -> Tensor:
        """Return the result for what its buffers hold, padding included, on the stream of the capture's caller."""
        with self._lane.turn():
            self._graph.replay()
            return self._out.clone()
