"""Runs decoder stacks on folded batches of few rows as captured CUDA graphs. For `radix_ops.hf`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._attention import Layout
from ..batch import FoldedBatch
from ..graphs.buckets import Sizes
from ..graphs.forwards import Call, has_kernels
from ..graphs.rule import is_bound_by_host
from ..graphs.tried import TriedForwards
from .fold import run_rows
from .guards import has_own_attention
from .proofs import layer_overrides

_MOST_SHAPES = 512
_HEAD_SIZES = ("head_dim", "qk_head_dim", "v_head_dim")


@dataclasses.dataclass
class Plan:
    """How a folded batch runs where the host matters: padded to the sizes of a graph, whether it is one or not."""

    call: Call
    sizes: Sizes
    may_replay: bool


class _NotStatesAloneError(Exception):
    """A stack returns what a graph would leave out."""


class Replays:
    """The captured graphs of one decoder stack. Copies and pickles of it have none.

    A batch of few rows is padded to a graph's number of rows with gradients and without, so that it has the same bits.
    Without gradients and in eval mode, the second batch of a size is captured, and later ones are replays.
    """

    def __init__(self) -> None:
        self._graphs = TriedForwards()
        self._output: type[ModelOutput] | None = None
        self._begin()

    def _begin(self) -> None:
        self._shapes: dict[torch.Size, None] = {}  # of input_ids that came
        self._multiplications: float | None = None  # of a layer's weights, for a row

    @property
    def off(self) -> str | None:
        """Why there will be no more graphs, or None."""
        return self._graphs.off

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Give up all graphs and their memory, and begin anew."""
        self._graphs.clear()
        self._begin()

    def may_pay(self, stack: PreTrainedModel, input_ids: Tensor) -> bool:
        """Return whether a graph may beat the plain model on input_ids [B, T], of whose shape it is not the first."""
        if not _is_inference() or stack.training or torch.is_autocast_enabled("cuda"):
            return False
        if not has_kernels(_weight_of(stack), _head_dim(stack.config)) or has_own_attention(stack.config):
            return False
        multiplications = input_ids.numel() * self._per_row(stack, input_ids.shape[1])
        if not is_bound_by_host(multiplications, input_ids.device) or not self._graphs.may_watch(stack):
            return False
        came_before = input_ids.shape in self._shapes
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        self._shapes[input_ids.shape] = None
        return came_before

    def plan(self, stack: PreTrainedModel, batch: FoldedBatch, layout: Layout, *, may_replay: bool) -> Plan | None:
        """Return how the batch runs where the host matters, or None where it runs as it is.

        `may_replay`: whether the call asks for nothing but hidden states, and graphs are wanted.
        """
        config = stack.config
        if has_own_attention(config):
            return None

        def compute(batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Tensor:
            return self._compute(stack, batch, layout)

        def is_worth_it(num_rows: int) -> bool:
            return is_bound_by_host(num_rows * self._per_row(stack, batch.max_seqlen_k), batch.input_ids.device)

        weight = _weight_of(stack)
        call = Call(stack, compute, batch, layout, None, weight, _head_dim(config), config.hidden_size, is_worth_it)
        sizes = call.sizes()
        return None if sizes is None else Plan(call, sizes, may_replay and not stack.training)

    def pays(self, stack: PreTrainedModel, plan: Plan, positions: int) -> bool:
        """Return whether the plan's graph is faster than the plain model on so many positions, and there is one."""
        batch = plan.call.batch
        multiplications = positions * self._per_row(stack, batch.max_seqlen_k)
        if not plan.may_replay or not _is_inference() or not is_bound_by_host(multiplications, batch.input_ids.device):
            return False
        return self._graphs.may_watch(stack) and self._graphs.is_due(plan.call, plan.sizes)

    def replay(self, plan: Plan) -> ModelOutput | None:
        """Return the output in rows of a batch that has a graph, which the GPU is still busy with, or None."""
        return self._wrapped(self._graphs.replay(plan.call, plan.sizes) if plan.may_replay else None)

    def has(self, plan: Plan | None) -> bool:
        """Return whether there is a graph for the plan."""
        return plan is not None and plan.may_replay and self._graphs.has(plan.call, plan.sizes)

    def run(self, plan: Plan) -> ModelOutput | None:
        """Return the output in rows of a batch whose graph is captured, perhaps, or None where no graph is wanted."""
        if not plan.may_replay or not self._graphs.may_watch(plan.call.module):
            return None
        try:
            return self._wrapped(self._graphs.run(plan.call, plan.sizes))
        except _NotStatesAloneError as error:
            self._graphs.off = str(error)
            return None

    def _wrapped(self, states: Tensor | None) -> ModelOutput | None:
        return None if states is None or self._output is None else self._output(last_hidden_state=states[None])

    def _compute(self, stack: PreTrainedModel, batch: FoldedBatch, layout: Layout) -> Tensor:
        outputs = run_rows(stack, batch, {}, layout, batch.num_rows)
        states = outputs.last_hidden_state
        if [*outputs] != ["last_hidden_state"] or states.dtype != _weight_of(stack).dtype:
            raise _NotStatesAloneError("its output holds more than hidden states, or those of another dtype")
        self._output = type(outputs)
        return states[0]

    def _per_row(self, stack: PreTrainedModel, longest: int) -> float:
        """Return about how many multiplications a layer has for a row of a batch."""
        config = stack.config
        if self._multiplications is None:
            inside = sum(_used(weight, config) for weight in stack.parameters())
            looked_up = sum(m.weight.numel() for m in stack.modules() if isinstance(m, nn.Embedding))
            self._multiplications = (inside - looked_up) / max(config.num_hidden_layers, 1)
        return self._multiplications + 2 * _field(config, "num_attention_heads") * _head_dim(config) * longest


def _is_inference() -> bool:
    """Return whether nobody compares the result with one that has gradients, for which no graph makes folding pay."""
    return torch.is_inference_mode_enabled()


def _weight_of(stack: PreTrainedModel) -> Tensor:
    return next(weight for weight in stack.parameters() if weight.is_floating_point())


def _used(weight: Tensor, config) -> float:
    """Return how many numbers of a weight a row is multiplied by; experts are stacked in weights of 3 dimensions."""
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / weight.shape[0] if weight.dim() == 3 and chosen else 1.0
    return weight.numel() * min(share, 1.0)


def _head_dim(config) -> int:
    """Return the largest size of a head's queries and values."""
    fields = (*vars(config).items(), *layer_overrides(config))
    known = [value for name, value in fields if name in _HEAD_SIZES and isinstance(value, int)]
    return max(known, default=_field(config, "hidden_size") // _field(config, "num_attention_heads"))


def _field(config, name: str) -> int:
    """Return a field that the config names so or otherwise, the one for all layers where some have their own."""
    return vars(config).get(name) or getattr(config, name)
