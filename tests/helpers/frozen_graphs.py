"""What a captured graph is to a test without a GPU: a model as it was, which reads weights where they lay."""

from __future__ import annotations

import contextlib
import contextvars
import copy

import torch

from radix_ops.graphs import forwards
from radix_ops.hf import replays

_frozen: contextvars.ContextVar = contextvars.ContextVar("frozen", default=None)
_running: contextvars.ContextVar = contextvars.ContextVar("running", default=None)


class FrozenGraph:
    """Stands in for `Captured`: computes what the stack computed when it was captured, whatever became of it."""

    made = replays = 0

    def __init__(self, compute, inputs, count, memory):
        FrozenGraph.made += 1
        self.compute, self.inputs = compute, inputs
        stack = _running.get()
        with torch.inference_mode(False):
            self.stack = copy.deepcopy(stack)
            for kind in ("parameters", "buffers"):
                for ours, theirs in zip(getattr(self.stack, kind)(), getattr(stack, kind)(), strict=True):
                    ours.data = theirs.data

    def replay(self, batch, rows):
        FrozenGraph.replays += 1
        self.inputs.fill(batch, rows)
        return self.replay_as_filled()[: batch.num_rows]

    def replay_as_filled(self):
        token = _frozen.set(self.stack)
        try:
            return self.compute(self.inputs).clone()
        finally:
            _frozen.reset(token)


def install(monkeypatch) -> None:
    """Let graphs be captured on the CPU, and let every batch be bound by the host."""
    monkeypatch.setattr(FrozenGraph, "made", 0)
    monkeypatch.setattr(FrozenGraph, "replays", 0)
    monkeypatch.setattr(forwards, "Captured", FrozenGraph)
    monkeypatch.setattr(forwards, "Memory", lambda *_: torch.empty(0))
    monkeypatch.setattr(forwards, "why_eager", lambda *_: "gradients" if torch.is_grad_enabled() else None)
    monkeypatch.setattr(forwards, "_kernels", lambda *_: (True, True))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(replays, "is_bound_by_host", lambda *_: True)
    compute = replays.Replays._compute

    def compute_frozen(self, stack, batch, layout):
        _running.set(stack)
        return compute(self, stack if _frozen.get() is None else _frozen.get(), batch, layout)

    monkeypatch.setattr(replays.Replays, "_compute", compute_frozen)
