"""Losses of causal language models on the rows of a folded batch, without logits for all of it.

    hidden = model(batch)  # [num_rows, D], the states below the head
    logprobs = token_logprobs(hidden, batch, weight=lm_head.weight)  # [N], one for each packed token
    loss = causal_lm_loss(hidden, batch, labels, weight=lm_head.weight)

A row has a target for each branch behind it. The head runs on rows that have one, once for all of a row's targets, and
never on the last tokens of sequences or on those before labels of -100. At any time there are logits of a block, of at
most rows_per_chunk * V of V the vocabulary (128 MiB in fp32 by default): many rows and a part of the vocabulary. The
backward makes them again. Values and gradients are those of the packed batch, up to rounding.

`hidden` is [num_rows, D], float32, float64, bfloat16 or float16, `weight` [V, D] and `bias` [V] of its dtype; under
autocast they may differ, and products are in autocast's dtype (not of float64, as everywhere). Logits, everything made
of them and the sums that the gradients of weight and hidden are rounded from are in fp32 (fp64 for float64). The order
of what is done to logits is that of transformers' models, of samplers and of TRL:

    logits = hidden @ weight.T + bias
    logits = logits * logit_scale  # cohere's logit_scale, 1 / granite's logits_scaling
    logits = softcap * tanh(logits / softcap)  # gemma's final_logit_softcapping
    logits = logits / temperature

`labels` [N] int32 or int64 stand where their tokens do, unshifted and packed; the batch's own tokens by default. Each
packed token keeps its own, also where tokens share a row and their labels differ. Targets are the tokens that are not
the first of their sequence and whose label is not -100. For a padded batch, `labels[attention_mask.bool()]` packs
labels [B, T], and `x.new_zeros(B, T).masked_scatter(attention_mask.bool(), x)` puts values [N] back.

Each function is deterministic, and differentiable once in hidden, weight and bias; what needs no gradient costs none.
On CUDA the host waits for the device twice a call, however many blocks, and never in the backward; `plan_targets` waits
before the model runs, so that the device need not wait for the host behind it. All raise ValueError for shapes, devices
and values (a label outside the vocabulary too, unless it is ignored or a first token's) and TypeError for types and
dtypes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .batch import FoldedBatch
from .ops.checks import ATTENTION_DTYPES as _DTYPES
from .ops.checks import INDEX_DTYPES
from .ops.head import head_op, head_plan_op
from .ops.head_plan import IGNORED_LABEL, HeadPlan

__all__ = [
    "Targets",
    "causal_lm_loss",
    "plan_targets",
    "sequence_logprobs",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_and_entropy",
]

Reduction: TypeAlias = Literal["mean", "sum", "sequence"]


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """The labels of a batch as its losses need them, on the batch's device. Make them with `plan_targets`."""

    batch: FoldedBatch
    vocabulary: int
    plan: HeadPlan


def plan_targets(
    batch: FoldedBatch,
    labels: Tensor | None = None,
    *,
    vocabulary: int,
    ignore_index: int = IGNORED_LABEL,
    rows_per_chunk: int | None = None,
) -> Targets:
    """Return what losses of this batch take as `labels`: the same results, and no wait for the device in them.

        targets = plan_targets(batch, labels, vocabulary=weight.shape[0])
        logprobs = token_logprobs(model(batch), batch, targets, weight=weight)

    On CUDA the host waits for it twice, here. Where a step is bound by the host, make it before the model runs: the
    host then launches the loss while the device computes the model. Several losses of a batch may share it.

    Args:
        vocabulary: V, the rows of the losses' weight.
        ignore_index: the label of tokens that are no targets.
        rows_per_chunk: as that of the losses, to be given here.
    """
    if not isinstance(batch, FoldedBatch):
        raise TypeError(f"batch must be a FoldedBatch, got {type(batch).__name__}")
    if labels is not None:
        _check_labels(labels, batch)
    _check_integer("vocabulary", vocabulary, 1)
    _check_integer("ignore_index", ignore_index)
    if rows_per_chunk is not None:
        _check_integer("rows_per_chunk", rows_per_chunk, 1)
    return Targets(batch, vocabulary, _plan(batch, labels, vocabulary, ignore_index, rows_per_chunk))


def _plan(batch, labels, vocabulary: int, ignore_index: int, rows_per_chunk: int | None) -> HeadPlan:
    labels = batch.unfold(batch.input_ids) if labels is None else labels
    batch_tables = batch.unfold_index, batch.cu_seqlens, batch.num_rows
    return HeadPlan(*head_plan_op(labels, *batch_tables, vocabulary, ignore_index, rows_per_chunk or 0))


def token_logprobs(
    hidden: Tensor,
    batch: FoldedBatch,
    labels: Tensor | Targets | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return log p(labels[i] | the tokens before i in its sequence) [N]; 0, without a gradient, where i is no target.

    Args, dtypes and errors are those of the module. The result is in fp32 (fp64 for float64), in packed order.
    """
    head = _Head(weight, bias, temperature, logit_scale, softcap, rows_per_chunk)
    return _run_head(hidden, batch, labels, head).logprobs


def token_logprobs_and_entropy(
    hidden: Tensor,
    batch: FoldedBatch,
    labels: Tensor | Targets | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` and `token_entropy`, both [N], for one run of the head."""
    head = _Head(weight, bias, temperature, logit_scale, softcap, rows_per_chunk)
    result = _run_head(hidden, batch, labels, head, extra="entropy")
    return result.logprobs, result.extras


def token_entropy(
    hidden: Tensor,
    batch: FoldedBatch,
    labels: Tensor | Targets | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return the entropy, in nats, of the distribution that predicts token i [N]; 0, without a gradient, for no target.

    It stands where the log-probability of token i does, so that one mask serves both, and a mean over tokens counts a
    row as often as it predicts a token of the batch. The labels only say which tokens are targets.
    """
    head = _Head(weight, bias, temperature, logit_scale, softcap, rows_per_chunk)
    return _run_head(hidden, batch, labels, head, extra="entropy").extras


def sequence_logprobs(
    hidden: Tensor,
    batch: FoldedBatch,
    labels: Tensor | Targets | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "sum",
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return the sum or, with reduction "mean", the mean of each sequence's targets' log-probabilities [B].

    0 for a sequence without a target.
    """
    _check_choice("reduction", reduction, ("sum", "mean"))
    head = _Head(weight, bias, temperature, logit_scale, softcap, rows_per_chunk)
    result = _run_head(hidden, batch, labels, head)
    sums = _sum_sequences(result.logprobs, batch)
    if reduction == "sum":
        return sums
    return sums / _sum_sequences(result.is_target.to(sums.dtype), batch).clamp(min=1)


def causal_lm_loss(
    hidden: Tensor,
    batch: FoldedBatch,
    labels: Tensor | Targets | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED_LABEL,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return the cross entropy of next tokens, as `torch.nn.functional.cross_entropy` has it of the packed batch.

    Args:
        ignore_index: the label of tokens that are no targets, in place of -100.
        label_smoothing: from 0 to 1, the share of each target that is spread evenly over the vocabulary.
        reduction: "mean" over all targets (NaN, without a gradient, where there is none), "sum", or "sequence": the
            sums of each sequence, [B]. To average over more targets than this batch's, as in gradient accumulation,
            divide the sum by their number.
    """
    _check_choice("reduction", reduction, get_args(Reduction))
    _check_integer("ignore_index", ignore_index)
    _check_number("label_smoothing", label_smoothing, "from 0 to 1", lambda x: 0 <= x <= 1)
    head = _Head(weight, bias, temperature, logit_scale, softcap, rows_per_chunk)
    extra = "mean" if label_smoothing else "none"
    result = _run_head(hidden, batch, labels, head, extra, ignore_index)
    losses = -result.logprobs
    if label_smoothing:
        losses = losses * (1 - label_smoothing) - result.extras * label_smoothing
    if reduction == "sequence":
        return _sum_sequences(losses, batch)
    return losses.sum() if reduction == "sum" else losses.sum() / result.is_target.sum()


@dataclasses.dataclass(frozen=True)
class _Head:
    """A language model's head and how it is run, as the functions above take them."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    rows_per_chunk: int | None

    def check(self) -> None:
        """Raise ValueError or TypeError for a number that is not allowed."""
        numbers = {"temperature": self.temperature, "logit_scale": self.logit_scale}
        if self.softcap is not None:
            numbers["softcap"] = self.softcap
        for name, value in numbers.items():
            _check_number(name, value, "above 0 and finite", lambda x: 0 < x < math.inf)
        rows = self.rows_per_chunk
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
            raise TypeError(f"rows_per_chunk must be an int or None, got {type(rows).__name__}")
        if rows is not None and rows < 1:
            raise ValueError(f"rows_per_chunk must be at least 1, got {rows}")


class _Result(NamedTuple):
    logprobs: Tensor  # [N], 0 where there is no target
    extras: Tensor  # [N] likewise: the entropy, or the mean log-probability of the vocabulary; empty for "none"
    is_target: Tensor  # bool [N]


def _run_head(hidden, batch, labels, head: _Head, extra="none", ignore_index=IGNORED_LABEL) -> _Result:
    is_planned = isinstance(labels, Targets)
    dtype = _check_tensors(hidden, batch, None if is_planned else labels, head.weight, head.bias)
    head.check()
    vocabulary = head.weight.shape[0]
    if is_planned:
        _check_targets(labels, batch, vocabulary, ignore_index, head.rows_per_chunk)
        plan = labels.plan
    else:
        plan = _plan(batch, labels, vocabulary, ignore_index, head.rows_per_chunk)
    pairs = plan.rows, plan.pair_ranks, plan.pair_labels, plan.blocks
    scalars = float(head.logit_scale), float(head.softcap or 0), float(head.temperature)
    logprobs, extras, _ = head_op(hidden, head.weight, head.bias, *pairs, *scalars, dtype, extra)

    def to_tokens(of_pairs: Tensor) -> Tensor:  # its gradient sums tokens of one pair in a fixed order
        return torch.ops.radix.gather.csr(of_pairs, plan.token_pair, plan.pair_indptr, plan.pair_members)

    is_target = plan.token_pair < plan.pair_labels.shape[0] - 1
    return _Result(to_tokens(logprobs), extras if extra == "none" else to_tokens(extras), is_target)


def _sum_sequences(values: Tensor, batch: FoldedBatch) -> Tensor:
    """Sum [N] by sequence to [B], deterministic and differentiable."""
    tokens = torch.arange(batch.num_tokens, device=values.device)
    sequences = torch.arange(batch.num_sequences, device=values.device)
    sequence = torch.repeat_interleave(sequences, batch.lengths, output_size=batch.num_tokens)
    return torch.ops.radix.scatter_add.csr(values, sequence, batch.cu_seqlens, tokens, batch.num_sequences)


def _check_tensors(hidden, batch, labels, weight, bias) -> torch.dtype:
    """Return the dtype of the products; raise ValueError or TypeError for tensors that do not fit."""
    if not isinstance(batch, FoldedBatch):
        raise TypeError(f"batch must be a FoldedBatch, got {type(batch).__name__}")
    given = {"hidden": hidden, "weight": weight}
    given |= {} if bias is None else {"bias": bias}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != batch.fold_index.device:
            raise ValueError(f"{name} is on {tensor.device}, but the batch is on {batch.fold_index.device}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor; of a model that fully_shard holds, call the loss in "
                "the forward of the module that the head belongs to, where its parameters are gathered (the gradient "
                "of full_tensor() is one process's own)"
            )
    if hidden.dim() != 2 or hidden.shape[0] != batch.num_rows:
        raise ValueError(f"hidden must have shape [num_rows={batch.num_rows}, D], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, D={hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must have shape [V={weight.shape[0]}], got {list(bias.shape)}")
    if labels is not None:
        _check_labels(labels, batch)

    dtypes = [tensor.dtype for tensor in given.values()]
    kind = hidden.device.type
    autocasts = torch.is_autocast_enabled(kind) and torch.float64 not in dtypes
    if any(dtype not in _DTYPES for dtype in dtypes) or (len(set(dtypes)) > 1 and not autocasts):
        named = ", ".join(f"{tensor.dtype} for {name}" for name, tensor in given.items())
        raise TypeError(
            "hidden, weight and bias must be of one dtype (unless autocast is on), float32, float64, bfloat16 or "
            f"float16, got {named}"
        )
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given.values()):
        raise RuntimeError("radix_ops.losses have no forward-mode gradient; use backward mode")
    return torch.get_autocast_dtype(kind) if autocasts else hidden.dtype


def _check_labels(labels, batch: FoldedBatch) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.device != batch.fold_index.device:
        raise ValueError(f"labels is on {labels.device}, but the batch is on {batch.fold_index.device}")
    if labels.dtype not in INDEX_DTYPES:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}")
    if labels.dim() != 1 or labels.shape[0] != batch.num_tokens:
        raise ValueError(
            f"labels must be packed, one for each of num_tokens={batch.num_tokens}, got shape "
            f"{list(labels.shape)}; attention_mask.bool() picks those of a padded batch"
        )


def _check_targets(targets: Targets, batch: FoldedBatch, vocabulary: int, ignore_index, rows_per_chunk) -> None:
    if targets.batch is not batch:
        raise ValueError("labels are the targets of another batch; plan_targets(batch, ...) makes those of this one")
    if targets.vocabulary != vocabulary:
        raise ValueError(f"labels are targets of vocabulary={targets.vocabulary}, but weight has {vocabulary} rows")
    for name, is_given in (("ignore_index", ignore_index != IGNORED_LABEL), ("rows_per_chunk", rows_per_chunk)):
        if is_given:
            raise ValueError(f"{name} must be given to plan_targets, where labels are targets")


def _check_integer(name: str, value: int, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: float, allowed: str, is_allowed) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
