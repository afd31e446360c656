"""The cache in a folded batch's output, where the plain model's output has one. For `radix_ops.hf`.

A folded forward makes none: most callers drop it, and rows are not where the next call looks for keys and values. The
plain model makes it from the batch when somebody looks inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from . import guards, verify
from .calls import CACHES, size_of
from .fold import PaddedBatch
from .modes import is_plain, read_arguments, why_unreadable
from .proofs import class_of
from .stats import RadixStats

_FIELD = next(x.name for x in dataclasses.fields(BaseModelOutputWithPast) if x.name in CACHES)
_ATTRIBUTES = frozenset(vars(DynamicCache()))
_NUM_WITNESSES = 64  # rows of the batch by which a model is known again
_NUM_SAMPLES = 8  # values of each weight by which it is known again
_SAMPLE_STEP = 0.1236  # the share of a weight between two of them: below an eighth, and no multiple of a row
_REMEDY = "pass use_cache=True to a call that another one continues: it runs unfolded"
_lock = threading.RLock()


class PendingCache(DynamicCache):
    """Turns into the plain model's cache of a batch, with its class and all that it holds, when somebody looks inside.

    Until then it holds the batch's ids and mask, and no keys and values. Looking inside raises RuntimeError where the
    model is gone or has changed since, and where several processes would have to make the cache together.
    """

    def __init__(self, batch: _Batch):
        self._batch = batch  # and no layers, so that __getattr__ is asked for them

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.make()
        return getattr(self, name)

    @torch.compiler.disable
    def make(self) -> None:
        with _lock:
            if type(self) is PendingCache:  # and not made by another thread
                made = self._batch.run_plain()
                self.__dict__.update(vars(made))
                self.__class__ = type(made)
                del self._batch

    def __bool__(self) -> bool:
        return True

    def __reduce_ex__(self, protocol: SupportsIndex):
        self.make()
        return self.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"{PendingCache.__name__}(of a folded batch, made when it is used)"


def make_pending(arguments: Mapping[str, Any]) -> None:
    """Make the caches among the arguments of a call before code that may be compiled sees them."""
    for value in arguments.values():
        if isinstance(value, PendingCache):
            value.make()


def add_pending(
    outputs: ModelOutput,
    stack: PreTrainedModel,
    arguments: Mapping[str, Any],
    padded: PaddedBatch,
    stats: RadixStats,
    warned: set[str],
) -> ModelOutput:
    """Return the output, in rows, of a folded call with these arguments, with a cache where it has a field for one."""
    if all(field.name != _FIELD for field in dataclasses.fields(outputs)):
        return outputs
    batch = _Batch(stack, arguments, padded, outputs.last_hidden_state, stats, warned)
    return dataclasses.replace(outputs, **{_FIELD: PendingCache(batch)})


class _Batch:
    """Keeps what the plain model needs to make the cache long after the call as it would have in the call."""

    def __init__(self, stack, arguments, padded: PaddedBatch, rows: Tensor, stats: RadixStats, warned: set[str]):
        # Copies, since callers change theirs in place.
        self.given = {name: value.clone() for name, value in read_arguments(arguments).items()}
        self.stack = weakref.ref(stack)  # outputs keep no model alive
        self.stats, self.warned = stats, warned
        self.device = rows.device.type
        self.modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        self.weights = _Weights(stack)
        # The plain model must make the same as these rows at their places in the flat padded batch.
        end = padded.batch.num_nodes
        witnesses = slice(max(end - _NUM_WITNESSES, 0), end)
        tokens = padded.batch.fold_index[witnesses]
        self.places = (tokens if padded.real is None else padded.real[tokens]).clone()
        self.rows = rows.detach()[:, witnesses].clone()  # [1, len(places), D]

    def run_plain(self) -> DynamicCache:
        stack: Any = self.stack()
        reason = "its model is gone" if stack is None else _why_impossible(stack)
        if reason is None:
            with self._as_in_the_call():
                is_same = self.weights.equal(_Weights(stack))
            reason = None if is_same else "the model's weights or adapters have changed since"
        if reason is not None:
            raise _refusal(reason)
        text = f"radix_ops: a batch runs again, unfolded, because the cache in its output is used; {_REMEDY}"
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=4)
        with self._as_in_the_call(), verify.keep_random(self.given["input_ids"]):
            outputs = class_of(stack).forward(stack, **self.given, use_cache=True, return_dict=True)
            states = outputs.last_hidden_state.detach().flatten(0, 1)[self.places][None]
            is_real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            difference = verify.difference(self.rows, states, is_real, verify.is_exact(stack))
        if difference is not None:
            raise _refusal(f"the model has changed since: {difference}")
        if outputs.get(_FIELD) is None:
            raise _refusal("the model, as it is set, makes none")
        self.stats._add(*size_of(self.given), "the cache in a folded batch's output is used")
        return outputs[_FIELD]

    @contextlib.contextmanager
    def _as_in_the_call(self) -> Iterator[None]:
        is_inference, has_gradients = self.modes
        enabled, dtype = self.autocast
        is_inside = why_unreadable({}) is not None  # a transform or a tracer, which its own tensors do not outlive
        with (
            temporarily_clear_interpreter_stack() if is_inside else contextlib.nullcontext(),
            _disable_current_modes() if is_inside else contextlib.nullcontext(),
            torch.inference_mode(is_inference),
            torch.set_grad_enabled(has_gradients),
            torch.autocast(self.device, dtype=dtype, enabled=enabled),
        ):
            yield


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(f"the cache of a folded batch can't be made: {reason}; {_REMEDY}")


def _why_impossible(stack: PreTrainedModel) -> str | None:
    """Return why the plain model can't make a cache at this moment, or None."""
    if guards.has_several_processes():
        return "torch.distributed runs several processes, and a forward more on one of them could wait for the others"
    if any(isinstance(parameter, DTensor) for parameter in stack.parameters()):
        return "its model is sharded, and gathers its weights only in a call"
    return guards.why_disturbed(stack)


class _Weights:
    """Tells whether saved weights were updated in place or replaced since, or other adapters are at work.

    An update in place through `.data` changes no version, so some values of each weight are kept, too.
    """

    @torch.no_grad()
    def __init__(self, stack: PreTrainedModel):
        self.state: list[tuple] = []
        samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for module in guards.parts(stack):
            own = module.__dict__
            if "_disable_adapters" in own:
                self.state.append((own["_disable_adapters"], str(own.get("_active_adapter"))))
            kept = (x for name, x in own["_buffers"].items() if name not in module._non_persistent_buffers_set)
            for weight in (*own["_parameters"].values(), *kept):
                if weight is not None and is_plain(weight):
                    self.state.append((weight.data_ptr(), None if weight.is_inference() else weight._version))
                    samples.setdefault((weight.device, weight.dtype), []).append(_sample(weight))
        # As bytes, in which NaNs are equal.
        self.samples = [torch.cat(values).view(torch.uint8) for values in samples.values()]

    def equal(self, other: _Weights) -> bool:
        return self.state == other.state and all(map(torch.equal, self.samples, other.samples))


def _sample(weight: Tensor) -> Tensor:
    """Return some values of a weight, spread over its rows and columns."""
    if not weight.is_contiguous() or weight.numel() == 0:
        weight = weight.flatten()
    step = max(1, int(_SAMPLE_STEP * weight.numel()))
    count = min(_NUM_SAMPLES, -(-weight.numel() // step))
    return weight.as_strided((count,), (step,))
