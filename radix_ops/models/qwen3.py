"""Qwen3 on folded batches: a decoder that computes each shared token once.

    batch = radix_ops.FoldedBatch.from_sequences(token_lists)
    model = Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    logits = model(batch)  # [num_rows, vocabulary]; batch.unfold(logits) has one row for each token

Parameters have the names that transformers gives them, and results agree with transformers' Qwen3 up to rounding. The
model is that of the Qwen3 technical report (arXiv 2505.09388); YaRN is arXiv 2309.00071.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._attention import AttentionPlan, Layout, attend, attend_rows, check_layout, plan_attention, plan_rows
from ..batch import FoldedBatch
from ..graphs.forwards import CapturedForwards
from ..graphs.steps import CapturedSteps
from ..ops.checks import INDEX_DTYPES
from .pretrained import Pretrained
from .qwen3_config import Qwen3Config
from .replaying import ReplayingHead, ReplayingModel, asks_for_graphs
from .rope import inverse_frequencies

__all__ = ["Qwen3Config", "Qwen3ForCausalLM", "Qwen3Model"]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [rows, heads, head_dim], whose halves are the two coordinates of the pairs, by [rows, 1, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y, to the same bits, as a difference.

    torch.compile makes one call of a sum and the product before it, which copies x first; so it can join the norm
    behind it.
    """
    return torch.sub(x, y, alpha=-1)


class _Wanted(NamedTuple):
    """The rows whose hidden states are wanted, how far their positions turn queries, and how those attend."""

    rows: Tensor  # [W]
    cos: Tensor  # [W, 1, head_dim]
    sin: Tensor
    plan: AttentionPlan


def _initialise(module: nn.Module, std: float) -> None:
    """Draw the weights of a new model as transformers does."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and not module.weight.is_meta:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, sliding_window: int | None):
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim, self.sliding_window = dim, sliding_window
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: FoldedBatch,
        plan: AttentionPlan,
        wanted: _Wanted | None = None,
    ) -> Tensor:
        of_queries = x if wanted is None else torch.ops.radix.gather(x, wanted.rows)
        q, k, v = (
            proj(given).unflatten(-1, (-1, self.head_dim))
            for proj, given in ((self.q_proj, of_queries), (self.k_proj, x), (self.v_proj, x))
        )
        q = _turn(self.q_norm(q), *((cos, sin) if wanted is None else (wanted.cos, wanted.sin)))
        k = _turn(self.k_norm(k), cos, sin)
        # Norms and angles keep fp32 under autocast, projections do not.
        q, k, window = q.to(v.dtype), k.to(v.dtype), self.sliding_window
        if wanted is None:
            out = attend(q, k, v, batch, plan, sliding_window=window)
        else:
            out = attend_rows(q, k, v, wanted.rows, batch, wanted.plan, sliding_window=window)
        return self.o_proj(out.flatten(1))


class Qwen3MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3Layer(nn.Module):
    def __init__(self, config: Qwen3Config, sliding_window: int | None):
        super().__init__()
        self.self_attn = Qwen3Attention(config, sliding_window)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: FoldedBatch,
        plan: AttentionPlan,
        wanted: _Wanted | None = None,
    ) -> Tensor:
        """Return the hidden states [num_rows, hidden_size] behind the layer, or those of the rows wanted alone."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, batch, plan, wanted)
        x = _add(x if wanted is None else torch.ops.radix.gather(x, wanted.rows), attended)
        return _add(x, self.mlp(self.post_attention_layernorm(x)))


class _Run(nn.Module):
    """A few layers in a row, which `Qwen3Model.compile_layers` compiles as one; they belong to the model."""

    def forward(
        self, layers: list[nn.Module], x: Tensor, *arguments: Any, wanted: _Wanted | None, checkpoints: bool
    ) -> Tensor:
        """Return what the last of them makes, of the rows wanted alone."""
        for number, layer in enumerate(layers, 1):
            given = *arguments, wanted if number == len(layers) else None
            x = checkpoint(layer, x, *given, use_reentrant=False) if checkpoints else layer(x, *given)
        return x


class Qwen3Model(Pretrained, ReplayingModel):
    """The decoder without a head. Set `gradient_checkpointing` to compute layers again in the backward pass.

    Forwards of few rows replay CUDA graphs; `cuda_graphs` says which.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Qwen3Layer(config, window) for window in config.sliding_windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._run, self._at_once = _Run(), max(config.num_hidden_layers, 1)
        self._graphs = CapturedForwards(_FORWARDS)
        self._steps = CapturedSteps(_FORWARDS, Qwen3Model._embed, Qwen3Model._compute_layers)
        self.apply(functools.partial(_initialise, std=config.initializer_range))

    def forward(self, batch: FoldedBatch, layout: Layout = "auto", rows: Tensor | None = None) -> Tensor:
        """Return the hidden states [num_rows, hidden_size] after the last norm; those of padding rows mean nothing.

        With `rows` [W], compact rows in int32 or int64, return theirs [W, hidden_size], in that order. They may come
        twice, and nothing waits for the host to read them. The last layer then computes the keys and values of all
        rows, and all else of those rows alone, unless more than two thirds are wanted. So the last bits differ from
        those of all rows (products choose their kernels by the number of rows). They are the same with and without
        gradients.

        Raises TypeError for another batch or other rows, ValueError for another device, for a sequence longer than the
        config's positions and, on the CPU and not in compiled code, for positions past them and ids outside the
        vocabulary (on CUDA a device assert); RuntimeError for rows that there are not (on CUDA a device assert), and in
        training with dropout, which tokens that share a row can't have apart.
        """
        self._check(batch, layout, rows)
        run = self._compute if torch.compiler.is_compiling() else self._run_call
        return run(batch, layout, rows)

    def _compute(self, batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Tensor:
        return self._compute_layers(self._embed(batch.input_ids), batch, layout, rows)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)

    def _compute_layers(self, x: Tensor, batch: FoldedBatch, layout: Layout, rows: Tensor | None) -> Tensor:
        frequencies, scale = inverse_frequencies(self.config, x.device)
        angles = torch.outer(batch.position_ids.to(torch.float32), frequencies)
        angles = torch.cat([angles, angles], -1)[:, None]
        cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
        plan = plan_attention(batch, layout)
        arguments = cos, sin, batch, plan
        checkpoints = self.gradient_checkpointing and torch.is_grad_enabled()
        layers = list(self.layers)
        wanted = None
        if rows is not None and layers and _few_rows_pay(rows, batch):
            turns = torch.ops.radix.gather(cos, rows), torch.ops.radix.gather(sin, rows)
            wanted = _Wanted(rows, *turns, plan_rows(batch, layout, plan, rows.shape[0]))
        for first in range(0, len(layers), self._at_once):
            end = first + self._at_once
            wanted_here = wanted if end >= len(layers) else None
            x = self._run(layers[first:end], x, *arguments, wanted=wanted_here, checkpoints=checkpoints)
        if rows is not None and wanted is None:
            x = torch.ops.radix.gather(x, rows)
        return self.norm(x)

    def compile_layers(self, at_once: int = 4, **options: Any) -> None:
        """Compile `at_once` layers in a row by torch.compile with `options`, one graph for all such rows of layers.

        More at once cost less of the host at each call, and longer compilation on the first: what lies between a
        compiled graph and its caller takes about as long as launching a layer. The plan of attention is made outside,
        so a batch that shares nothing unfolds nothing (and has a graph of its own). Raises ValueError for at_once < 1.
        """
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {at_once}")
        self._at_once = at_once
        self._run.compile(**{"dynamic": True} | options)
        self._has_graphs_of_torch = asks_for_graphs(**options)

    def embed(self, batch: FoldedBatch, dim: int | None = None, layout: Layout = "auto") -> Tensor:
        """Return embeddings [B, dim] in fp32, of length 1: the state of each sequence's last token.

        It is cut to its first `dim` numbers (Matryoshka; all of them by default). Raises ValueError if a sequence is
        empty or dim out of range, TypeError if dim is no int.
        """
        size = self.config.hidden_size
        if dim is not None:
            _check_is_int("dim", dim)
            if not 1 <= dim <= size:
                raise ValueError(f"dim must be from 1 to hidden_size={size}, got {dim}")
        self._check(batch)
        return F.normalize(self(batch, layout, batch.last_rows)[:, :dim].float(), dim=-1)

    def _check(self, batch: FoldedBatch, layout: Layout = "auto", rows: Tensor | None = None) -> None:
        if not isinstance(batch, FoldedBatch):
            raise TypeError(f"batch must be a FoldedBatch, got {type(batch).__name__}")
        ids, weight = batch.input_ids, self.embed_tokens.weight
        if ids.device != weight.device:
            raise ValueError(
                f"the batch is on {ids.device}, but the model is on {weight.device}; "
                f'batch.to("{weight.device}", non_blocking=True) takes it there'
            )
        if self.training and self.config.attention_dropout:
            raise RuntimeError(
                f"attention_dropout={self.config.attention_dropout}: tokens that share a row can't be dropped apart; "
                "set it to 0, or the model to eval()"
            )
        check_layout(layout)
        _check_rows(rows, batch)
        longest = self.config.longest_sequence
        if torch.compiler.is_compiling():
            torch._check(batch.max_seqlen_k <= longest, lambda: "a sequence is longer than the config's positions")
        elif batch.max_seqlen_k > longest:
            raise ValueError(
                f"a sequence of {batch.max_seqlen_k} tokens is longer than the {longest} positions of the config "
                "(max_position_embeddings, times the factor of rope_parameters)"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must be from 0 to {self.config.vocab_size - 1}, got values from {low} to {high}"
                )
            low, high = (int(bound) for bound in batch.position_ids.aminmax())
            if low < 0 or high >= longest:
                raise ValueError(
                    f"position_ids must be from 0 to {longest - 1}, the last position of the config, got values "
                    f"from {low} to {high}"
                )


def _check_is_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _check_rows(rows: Tensor | None, batch: FoldedBatch) -> None:
    if rows is None:
        return
    if not isinstance(rows, Tensor) or rows.dtype not in INDEX_DTYPES or rows.dim() != 1:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a 1-D tensor of int32 or int64, got {got}")
    if rows.device != batch.input_ids.device:
        raise ValueError(f"rows is on {rows.device}, but the batch is on {batch.input_ids.device}")


def _few_rows_pay(rows: Tensor, batch: FoldedBatch) -> bool:
    """Tell whether the last layer computes rows apart; compiled code has one graph for any number of them.

    On an H200 at 0.6B a third less to compute was what their gathers and the scattered queries cost.
    """
    return torch.compiler.is_compiling() or 3 * rows.shape[0] <= 2 * batch.num_rows


_KINDS = Qwen3Model, Qwen3Layer, Qwen3Attention, Qwen3MLP, RMSNorm, _Run, nn.Embedding, nn.Linear, nn.ModuleList
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _KINDS}


class Qwen3ForCausalLM(Pretrained, ReplayingHead):
    """The decoder with its language-model head."""

    model: Qwen3Model

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _initialise(self.lm_head, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch: FoldedBatch, rows: Tensor | None = None, layout: Layout = "auto") -> Tensor:
        """Return logits [len(rows), vocabulary] of the compact rows wanted (1-D int32 or int64), by default of all.

        `Qwen3Model` says what rows cost, and which bits they have.
        """
        return self.lm_head(self.model(batch, layout, rows))

    def embed(self, batch: FoldedBatch, dim: int | None = None, layout: Layout = "auto") -> Tensor:
        """See `Qwen3Model.embed`."""
        return self.model.embed(batch, dim, layout)

    def rerank(self, batch: FoldedBatch, *, yes_id: int = 9693, no_id: int = 2152, layout: Layout = "auto") -> Tensor:
        """Return [B] in fp32: after each sequence, the probability of token `yes_id` against `no_id`.

        It is the score of Qwen3-Reranker, whose tokenizer has these ids for "yes" and "no". Raises ValueError if a
        sequence is empty or an id outside the vocabulary, TypeError if one is no int.
        """
        for name, token in (("yes_id", yes_id), ("no_id", no_id)):
            _check_is_int(name, token)
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"{name} must be from 0 to {self.config.vocab_size - 1}, got {token}")
        self.model._check(batch)
        last = self.model(batch, layout, batch.last_rows)
        logits = F.linear(last, torch.stack([self.lm_head.weight[no_id], self.lm_head.weight[yes_id]]))
        return logits.float().softmax(-1)[:, 1]
