"""A training step's forward and backward as two captured graphs, and what gives their gradients to autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch import FoldedBatch
from .capture import Lane, lane_of
from .inputs import StaticInputs

# Embeds ids, and computes the layers on what that gives.
Embed = Callable[[Tensor], Tensor]
Layers = Callable[[Tensor, StaticInputs], Tensor]


class StepMemory:
    """What the steps of a model share: the pool of what they compute, and the rows that they are given.

    Between a forward and its backward it holds what the backward reads, so one step at a time may be in it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.lane: Lane = lane_of(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._buffers: dict[str, Tensor] = {}
        self._awaited: weakref.ref[Awaited] | None = None

    def rows_of(self, name: str, like: Tensor, count: int) -> Tensor:
        """Return the first `count` rows of a buffer, the same as other steps' where it holds as many."""
        if name not in self._buffers or self._buffers[name].shape[0] < count:
            self._buffers[name] = torch.empty(count, like.shape[1], dtype=like.dtype, device=self.device)
        return self._buffers[name][:count].detach()

    def is_free(self) -> bool:
        """Return whether no forward waits for its backward."""
        awaited = None if self._awaited is None else self._awaited()
        return awaited is None or awaited.is_over

    def hold_for(self, awaited: Awaited) -> None:
        self._awaited = weakref.ref(awaited)


class CapturedStep:
    """A captured forward of a model's layers and its backward, for batches of the same sizes.

    What they compute lies in the pool, where other steps compute, too: it is read from its places there, and nothing
    keeps it from other steps. Results and gradients are copies of the caller's own.
    """

    def __init__(self, layers: Layers, inputs: StaticInputs, states: Tensor, weights: list[Tensor], memory: StepMemory):
        """Capture `layers` on states like these, which ran before, forward and backward.

        The states and `weights`, the leaves that the layers read, have gradients where they require them. Raises
        RuntimeError where a graph can't hold it.
        """
        self._inputs, self._lane, self._memory = inputs, memory.lane, memory
        self._home = torch.cuda.current_stream(memory.device)
        self._layers = layers  # which keep the memory of the weights
        made: dict[str, Any] = {}

        def forward() -> None:
            made["out"] = layers(leaf, inputs)

        def backward() -> None:
            made["grads"] = _gradients(made["out"], [leaf, *weights], self._grad)

        with torch.inference_mode(False), torch.enable_grad():
            self._states = memory.rows_of("states", states, states.shape[0])
            leaf = self._states.detach().requires_grad_(states.requires_grad)
            self._forward = self._lane.capture(forward, memory.pool)
            self._grad = memory.rows_of("gradients", states, made["out"].shape[0])
            self._backward = self._lane.capture(backward, memory.pool, has_backward=True)
        self._out = _place_of(made["out"])
        self.has_gradient = [grad is not None for grad in made["grads"]]  # of the states and of each weight
        self._grads = [_place_of(grad) for grad in made["grads"] if grad is not None]

    def forward(self, batch: FoldedBatch, rows: Tensor | None, embed: Embed) -> tuple[Tensor, Tensor]:
        """Return a batch's embedded states, padding included, and what the layers make of them for the rows wanted."""
        with self._lane.turn() as stream:
            if stream != self._home:
                self._inputs.record_stream(stream)
                self._states.record_stream(stream)
                self._grad.record_stream(stream)
            self._inputs.fill(batch, rows)
            states = embed(self._inputs.batch.input_ids.clone())
            self._states.copy_(states.detach())
            self._forward.replay()
            count = batch.num_rows if rows is None else rows.shape[0]
            return states, self._out[:count].clone()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients that `has_gradient` tells of, for that of the rows wanted."""
        with self._lane.turn():
            count = grad.shape[0]
            self._grad[:count].copy_(grad)
            self._grad[count:].zero_()
            self._backward.replay()
            grads = [torch.empty_like(place) for place in self._grads]
            torch._foreach_copy_(grads, self._grads)
            return grads


def run_once(layers: Layers, inputs: StaticInputs, states: Tensor, weights: list[Tensor]) -> None:
    """Run forward and backward, as a step that is to be captured must have been."""
    with torch.inference_mode(False), torch.enable_grad():
        out = layers(states, inputs)
        _gradients(out, [states, *weights], torch.zeros_like(out))


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Return the gradient of each leaf that out depends on; None for others, and for those that require none."""
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(out, needing, grad, allow_unused=True))
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


class _Array:
    """The bytes of a tensor, as torch reads the arrays of other libraries."""

    def __init__(self, x: Tensor):
        size = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (x.data_ptr(), False), "strides": None, "version": 3
        }  # fmt: skip


def _place_of(x: Tensor) -> Tensor:
    """Return a tensor of the same memory that does not keep it: a pool's stays while there is a graph of it."""
    return torch.as_tensor(_Array(x), device=x.device).view(x.dtype).as_strided(x.shape, x.stride(), 0)


class Awaited:
    """A forward whose backward has not run. It is over, too, when autograd lets go of it."""

    def __init__(self, step: CapturedStep, hidden: Tensor):
        self._step, self._is_spent, self.is_over = step, False, False
        self._hidden = [hidden]

    def take(self) -> Tensor:
        """Return the forward's result, once."""
        return self._hidden.pop()

    def read(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return those of the weights that the backward reads, or may."""
        flags = self._step.has_gradient[1:]
        return [weight for weight, flag in zip(weights, flags, strict=True) if flag or not weight.requires_grad]

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of the states and of the weights, None for those that have none."""
        if self._is_spent:
            raise RuntimeError(
                "a second backward through one forward, whose activations a captured step has given up. Call the model "
                "again, or set its training_graphs to False"
            )
        self._is_spent = True
        grads = iter(self._step.backward(grad))
        self.is_over = True  # what another forward launches comes behind it
        return [next(grads) if flag else None for flag in self._step.has_gradient]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, awaited: Awaited, states: Tensor, *weights: Tensor) -> Tensor:
        ctx.awaited = awaited
        # A weight that is changed before the backward is an error then, as ever.
        ctx.save_for_backward(*awaited.read(weights))
        return awaited.take()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  (raises for weights that were changed)
        return None, *ctx.awaited.gradients(grad)


def attach(awaited: Awaited, states: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the hidden states of a replayed forward, whose backward gives `states` and `weights` their gradients.

    Those are tensors that nobody else holds, one for each weight, so autograd and hooks may keep them.
    """
    return _Attach.apply(awaited, states, *weights)
