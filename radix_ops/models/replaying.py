"""Models whose forward on few rows replays a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._attention import Layout
from ..batch import FoldedBatch
from ..graphs.forwards import Call, CapturedForwards
from ..graphs.rule import is_bound_by_host
from ..graphs.steps import CapturedSteps
from .qwen3_config import Qwen3Config


class ReplayingModel(nn.Module):
    """A decoder stack, whose forward calls `_run_call`."""

    config: Qwen3Config
    gradient_checkpointing: bool
    embed_tokens: nn.Embedding
    # Of the class, for models that were pickled without.
    _cuda_graphs = True
    _graphs: CapturedForwards | None = None
    _training_graphs = False
    _steps: CapturedSteps | None = None
    _has_graphs_of_torch = False  # those of torch.compile

    def _check(self, batch: FoldedBatch, layout: Layout = "auto", rows: Tensor | None = None) -> None:
        """Raise what the forward does for its arguments."""
        raise NotImplementedError

    def _compute(self, batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Tensor:
        """Return the hidden states of the rows wanted, None: of all, for arguments that are right."""
        raise NotImplementedError

    @property
    def cuda_graphs(self) -> bool:
        """Whether calls bound by the host replay captured CUDA graphs, True at first; False gives their memory back.

        It concerns calls in eval mode without gradients on CUDA, in bfloat16 and float16, of so few rows that the host
        matters to their time: on an H100 up to some 8,000 rows of a 0.6B model, and 1,000 of one of 8B. Such a batch is
        padded to a number of rows that others share, whatever this is and with gradients too, so its result has the
        same bits either way. The second batch of a size is captured, and all later ones are replays. Weights changed in
        place are read where they are; replaced ones are seen by the next call, and their old memory is kept until then.
        Calls with hooks, under autocast, in modes and transforms of torch, and models with layers of other classes run
        as if this were False.
        """
        return self._cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        if not isinstance(wanted, bool):
            raise TypeError(f"cuda_graphs must be a bool, got {type(wanted).__name__}")
        self._cuda_graphs = wanted
        if not wanted and self._graphs is not None:
            self._graphs.clear()

    @property
    def training_graphs(self) -> bool:
        """Whether training steps bound by the host replay captured CUDA graphs, False at first, since they hold memory.

        It concerns calls with gradients that are otherwise as those of `cuda_graphs`, in training mode too: forward and
        backward of the layers are a graph each, and the embedding, the head and the loss run as they do. Results and
        gradients have the same bits as without, where kernels give the same bits twice (the backward of torch's flash
        attention does not). The second batch of a size is captured, and all later ones are replays.

        Between steps the graphs hold what the largest step takes without them: its activations, or the layers'
        gradients where those are more. At most 64 sizes have graphs at a time. False gives all back.

        One forward at a time is a replay: others before its backward run eagerly, and so do calls under gradient
        checkpointing, hooks on saved tensors and on parts of the model, anomaly detection, where a process group is
        there (DDP, FSDP), and with layout "compact" on batches that share rows. Gradients are accumulated, and hooks on
        weights are called, as without; those of a step come all at once. A second backward through one forward
        (retain_graph) raises RuntimeError, as do second derivatives.
        """
        return self._training_graphs

    @training_graphs.setter
    def training_graphs(self, wanted: bool) -> None:
        if not isinstance(wanted, bool):
            raise TypeError(f"training_graphs must be a bool, got {type(wanted).__name__}")
        self._training_graphs = wanted
        if not wanted and self._steps is not None:
            self._steps.clear()

    def warm_up(self, batch: FoldedBatch, layout: Layout = "auto", rows: Tensor | None = None) -> bool:
        """Capture the graph that forward(batch, layout, rows) replays, and return whether it does.

        Batches of about the same sizes share a graph; `embed` and `rerank` ask for `batch.last_rows`. Raises for
        its arguments what the forward does.
        """
        self._check(batch, layout, rows)
        call = self._call(batch, layout, rows)
        sizes = call.sizes()
        if sizes is None or self._graphs is None or not self._may_replay():
            return False
        with torch.no_grad():
            return self._graphs.warm_up(call, sizes)

    def _run_call(self, batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Tensor:
        """Return what _compute returns, on padded rows where the host matters, and as a replay where it may."""
        call = self._call(batch, layout, rows)
        sizes = call.sizes()
        if sizes is None:
            return self._compute(batch, layout, rows)
        replayed = None
        if torch.is_grad_enabled():
            if self._steps is not None and self._may_replay_steps():
                replayed = self._steps.run(call, sizes)
        elif self._graphs is not None and self._may_replay():
            replayed = self._graphs.run(call, sizes)
        return call.run_padded(sizes) if replayed is None else replayed

    def _may_replay(self) -> bool:
        return self._cuda_graphs and not self.training and not self._has_graphs_of_torch

    def _may_replay_steps(self) -> bool:
        return self._training_graphs and not self.gradient_checkpointing and not self._has_graphs_of_torch

    def _call(self, batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Call:
        config = self.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        weights = config.hidden_size * (2 * (heads + kv_heads) * dim + 3 * config.intermediate_size)

        def is_worth_it(num_rows: int) -> bool:
            return is_bound_by_host(num_rows * (weights + 2 * heads * dim * batch.max_seqlen_k), batch.input_ids.device)

        weight = self.embed_tokens.weight
        return Call(self, self._compute, batch, layout, rows, weight, dim, config.hidden_size, is_worth_it)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What moves or casts weights gives their old memory back at once, and so that of graphs.
        self._clear_graphs()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            self._clear_graphs()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def _clear_graphs(self) -> None:
        for graphs in (self._graphs, self._steps):
            if graphs is not None:
                graphs.clear()


class ReplayingHead(nn.Module):
    """A head on a `model` that replays."""

    model: ReplayingModel

    @property
    def cuda_graphs(self) -> bool:
        """See `Qwen3Model.cuda_graphs`."""
        return self.model.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        self.model.cuda_graphs = wanted

    @property
    def training_graphs(self) -> bool:
        """See `Qwen3Model.training_graphs`."""
        return self.model.training_graphs

    @training_graphs.setter
    def training_graphs(self, wanted: bool) -> None:
        self.model.training_graphs = wanted

    def warm_up(self, batch: FoldedBatch, layout: Layout = "auto", rows: Tensor | None = None) -> bool:
        """See `Qwen3Model.warm_up`."""
        return self.model.warm_up(batch, layout, rows)


def asks_for_graphs(
    mode: str | None = None, options: dict[str, Any] | None = None, backend: Any = None, **others: Any
) -> bool:
    """Return whether torch.compile with these options makes CUDA graphs of its own, which no other graph can hold."""
    is_of_inductor = mode in ("reduce-overhead", "max-autotune") or bool((options or {}).get("triton.cudagraphs"))
    return is_of_inductor or backend == "cudagraphs"
