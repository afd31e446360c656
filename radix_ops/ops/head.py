"""Log-probabilities of (row, label) pairs under a language model's head, a block of logits at a time.

torch.ops.radix_losses holds them as ops that torch.compile takes as they are: head_plan, whose sizes depend on its
input; head, differentiable once in hidden, weight and bias; and head_backward, which makes the gradients that are
needed.

Both passes go through the same blocks, each a product of the rows and of a part of the head's weight, so the backward
makes the very logits again that the forward saw. A row's statistics are kept relative to its highest logit so far.
With p the row's distribution, z its logits, g the gradients of its pairs and e that of its extra value:

    logprob[label] = z[label] - log(sum(exp(z)))    d/dz = g * (1[label] - p)
    entropy = -sum(p * log(p))                      d/dz = -e * p * (log(p) + entropy)
    mean log-probability = mean(z) - log(sum)       d/dz = e * (1 / vocabulary - p)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head_plan import Block, HeadPlan, blocks_of, plan_head

# exp() of it is 0 in fp32 and fp64; where the logit is -inf, 0 * -inf would be NaN.
_NO_LOGIT = -1e4


class _Call(NamedTuple):
    """The arguments of radix_losses::head, in the order of its schema."""

    hidden: Tensor  # [num_rows, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    rows: Tensor  # this and the next three as in HeadPlan
    pair_ranks: Tensor
    pair_labels: Tensor
    blocks: Tensor
    logit_scale: float
    softcap: float  # 0: none
    temperature: float
    dtype: torch.dtype  # of the products
    extra: str  # "none", "entropy" or "mean"


_NUM_TENSORS = _Call._fields.index("logit_scale")


class _Head:
    """The head on the rows of a plan: its products in `dtype`, what they add up to in fp32 (fp64 for float64)."""

    def __init__(self, call: _Call):
        self.dtype, self.wide = call.dtype, torch.promote_types(call.dtype, torch.float32)
        self.operand_dtype = _operand_dtype(call.hidden.device, call.dtype)
        self.weight, self.bias = call.weight, call.bias
        self.softcap, self.logit_scale, self.temperature = call.softcap, call.logit_scale, call.temperature
        self.states = self.operand(call.hidden.index_select(0, call.rows))  # [R, D]
        self.blocks = blocks_of(call.blocks, call.rows.shape[0], call.weight.shape[0])
        block_rows, block_columns = call.blocks[:2].tolist()
        self.buffer = self.states.new_empty(block_rows * block_columns, dtype=self.wide)

    @property
    def kernels(self):
        """The kernels that read logits: Triton's where rounding to half precision hides that of their exp."""
        if self.operand_dtype != self.wide:
            from . import head_triton

            return head_triton
        return _Plain

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(self.operand_dtype)

    def logits(self, block: Block, weight: Tensor) -> Tensor:
        """Return [rows, columns] in the buffer: softcap(logit_scale * (states @ weight.T + bias)) / temperature.

        The order is that of transformers' models, whose logits samplers divide by the temperature.
        """
        rows, columns = block.rows.stop - block.rows.start, block.columns.stop - block.columns.start
        logits = self.buffer[: rows * columns].view(rows, columns)
        factor = self.logit_scale / (self.softcap or self.temperature)
        _multiply_into(logits, self.states[block.rows], weight.T, alpha=factor)
        if self.bias is not None:
            logits.add_(self.bias[block.columns].to(self.dtype).to(self.wide) * factor)
        return logits.tanh_().mul_(self.softcap / self.temperature) if self.softcap else logits


def _operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the factors' dtype: only CUDA multiplies half-precision matrices to a result in fp32."""
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """Set out to beta * out + alpha * a @ b, summed in out's dtype; at beta = 0 what out held does not matter."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


class _Plain:
    """Both kernels in PyTorch's own ops; they overwrite the logits that they read."""

    @staticmethod
    def update_statistics(logits: Tensor, highest: Tensor, total: Tensor, spread: Tensor | None) -> None:
        """Add logits [rows, columns] to the statistics of each row.

        highest: the largest logit z so far; total: sum(exp(d)) with d = z - highest; spread: -sum(exp(d) * d).
        """
        risen = torch.maximum(highest, logits.amax(1))
        # Where no logit of a row is finite yet, inf - inf would be NaN.
        anchor = risen.masked_fill(risen == -torch.inf, 0)
        kept = (highest - anchor).exp_()
        weights = logits.sub_(anchor[:, None]).exp_()
        block_total = weights.sum(1)
        if spread is not None:
            rise = anchor - highest.masked_fill(highest == -torch.inf, 0)
            spread.addcmul_(total, rise).mul_(kept).add_(torch.special.entr(weights, out=weights).sum(1))
        total.mul_(kept).add_(block_total)
        highest.copy_(risen)

    @staticmethod
    def gradient(logits: Tensor, terms: _RowTerms, bent: float, dtype: torch.dtype) -> Tensor:
        """Return (exp(d) * (constant + linear * d) + shift) * (1 - bent * z**2) with d = z - highest, in `dtype`."""
        highest, constant, linear, shift = terms
        slope = None
        if bent:
            slope = torch.addcmul(logits.new_ones(()), logits, logits, value=-bent)
        fall = logits.sub_(highest)
        if linear is None:
            gradient = fall.exp_().mul_(constant)
        else:
            line = torch.addcmul(constant, linear, fall.clamp_(min=_NO_LOGIT))
            gradient = fall.exp_().mul_(line)
        if shift is not None:
            gradient.add_(shift)
        return (gradient if slope is None else gradient.mul_(slope)).to(dtype)


def forward(*arguments):
    """Return logprobs [U + 1], the extra of each pair's row [U + 1], the last of both 0, and statistics [3, R]."""
    call = _Call(*arguments)
    head = _Head(call)
    weight, pair_ranks, pair_labels, extra = call.weight, call.pair_ranks, call.pair_labels, call.extra
    num_rows, num_pairs, vocabulary = call.rows.shape[0], pair_labels.shape[0] - 1, weight.shape[0]
    statistics = head.buffer.new_zeros(3, num_rows)
    highest, total, third = statistics
    highest.fill_(-torch.inf)
    spread = third if extra == "entropy" else None
    logprobs = head.buffer.new_zeros(num_pairs + 1)
    for block in head.blocks:
        logits = head.logits(block, head.operand(weight[block.columns]))
        row_in_block = pair_ranks[block.pairs] - block.rows.start
        logprobs[block.pairs] = logits[row_in_block, pair_labels[block.pairs] - block.columns.start]
        if extra == "mean":
            third[block.rows] += logits.sum(1)
        head.kernels.update_statistics(
            logits, highest[block.rows], total[block.rows], None if spread is None else spread[block.rows]
        )
    ranks = pair_ranks[:num_pairs]
    log_total = total.log()
    logprobs[:num_pairs].sub_(highest[ranks]).sub_(log_total[ranks])
    if extra == "none":
        return logprobs, logprobs.new_empty(0), statistics
    if extra == "entropy":
        third.div_(total).add_(log_total)
        of_rows = third
    else:
        of_rows = third / vocabulary - highest - log_total
    return logprobs, torch.cat([of_rows[ranks], of_rows.new_zeros(1)]), statistics


class _RowTerms(NamedTuple):
    """Terms by row from which `_Plain.gradient` makes a logit's gradient."""

    highest: Tensor
    constant: Tensor
    linear: Tensor | None
    shift: Tensor | None

    def at(self, *index) -> _RowTerms:
        linear, shift = (None if x is None else x[index] for x in (self.linear, self.shift))
        return _RowTerms(self.highest[index], self.constant[index], linear, shift)


def _row_terms(grad_logprobs, grad_extra, statistics, pair_ranks, extra, slope, vocabulary) -> _RowTerms:
    num_rows = statistics.shape[1]

    def sum_by_row(of_pairs: Tensor) -> Tensor:  # pairs that are no targets fall behind the rows
        return torch.ops.radix.scatter_add(of_pairs, pair_ranks, num_rows + 1)[:num_rows]

    highest, total, third = statistics
    of_probabilities = -sum_by_row(grad_logprobs)
    if extra == "none":
        return _RowTerms(highest, of_probabilities * slope / total, None, None)
    of_extra = sum_by_row(grad_extra)
    if extra == "mean":
        constant = (of_probabilities - of_extra) * slope / total
        return _RowTerms(highest, constant, None, of_extra * (slope / vocabulary))
    # The logarithm of a probability is d - log(total).
    constant = (of_probabilities - of_extra * (third - total.log())) * slope / total
    return _RowTerms(highest, constant, -of_extra * slope / total, None)


def backward(grad_logprobs, grad_extra, statistics, *arguments):
    """Return the gradients of hidden, weight and bias; empty tensors for those that are not needed."""
    *for_call, needs_hidden, needs_weight, needs_bias = arguments
    call = _Call(*for_call)
    head = _Head(call)
    hidden, weight, pair_ranks, pair_labels = call.hidden, call.weight, call.pair_ranks, call.pair_labels
    slope, num_rows, vocabulary = call.logit_scale / call.temperature, call.rows.shape[0], weight.shape[0]
    terms = _row_terms(grad_logprobs, grad_extra, statistics, pair_ranks, call.extra, slope, vocabulary)
    bent = (call.temperature / call.softcap) ** 2 if call.softcap else 0.0

    grad_states = head.buffer.new_zeros(num_rows if needs_hidden else 0, weight.shape[1])
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0)
    grad_bias = head.buffer.new_zeros(vocabulary if needs_bias else 0)
    for block in head.blocks:
        weight_part = head.operand(weight[block.columns])
        logits = head.logits(block, weight_part)
        ranks = pair_ranks[block.pairs]
        places = ranks - block.rows.start, pair_labels[block.pairs] - block.columns.start
        of_pairs = terms.at(ranks)
        shift = grad_logprobs[block.pairs] * slope
        of_pairs = of_pairs._replace(shift=shift if of_pairs.shift is None else of_pairs.shift + shift)
        at_labels = _Plain.gradient(logits[places], of_pairs, bent, head.operand_dtype)
        gradient = head.kernels.gradient(logits, terms.at(block.rows, None), bent, head.operand_dtype)
        # No two pairs have one place, so that the result is the same on every run.
        gradient[places] = at_labels

        if needs_hidden:
            _multiply_into(grad_states[block.rows], gradient, weight_part, beta=1.0)
        if needs_weight:
            if block.rows.start == 0:
                sums = head.buffer.new_empty(weight_part.shape)
            _multiply_into(sums, gradient.T, head.states[block.rows], beta=float(block.rows.start > 0))
            if block.rows.stop == num_rows:
                grad_weight[block.columns] = sums
        if needs_bias:
            grad_bias[block.columns] += gradient.sum(0, dtype=head.wide)
        del gradient  # the next block's takes its place
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    if needs_hidden:
        grad_hidden.index_copy_(0, call.rows, grad_states.to(hidden.dtype))
    return grad_hidden, grad_weight, grad_bias.to(grad_bias.dtype if call.bias is None else call.bias.dtype)


_PLAN = "Tensor rows, Tensor pair_ranks, Tensor pair_labels, Tensor blocks"
_OPTIONS = "float logit_scale, float softcap, float temperature, ScalarType dtype, str extra"
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, {_PLAN}, {_OPTIONS}"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"

head_plan_op = torch.library.custom_op(
    "radix_losses::head_plan",
    lambda *arguments: tuple(plan_head(*arguments)),
    mutates_args=(),
    schema="(Tensor labels, Tensor unfold_index, Tensor cu_seqlens, SymInt num_rows, SymInt vocabulary, "
    "int ignore_index, int rows_per_chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
head_op = torch.library.custom_op(
    "radix_losses::head",
    forward,
    mutates_args=(),
    schema=f"({_HEAD}) -> (Tensor logprobs, Tensor extras, Tensor statistics)",
)
head_backward_op = torch.library.custom_op(
    "radix_losses::head_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor grad_logprobs, Tensor grad_extras, Tensor statistics, {_HEAD}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor)",
)


@head_plan_op.register_fake
def _head_plan_fake(labels, unfold_index, cu_seqlens, num_rows, vocabulary, ignore_index, rows_per_chunk):
    new_size = torch.library.get_ctx().new_dynamic_size
    num_tokens, num_pairs = labels.shape[0], new_size()

    def integers(size) -> Tensor:
        return labels.new_empty(size, dtype=torch.int64)

    return tuple(
        HeadPlan(
            rows=integers(new_size()),
            pair_ranks=integers(num_pairs),
            pair_labels=integers(num_pairs),
            token_pair=integers(num_tokens),
            pair_indptr=integers(num_pairs + 1),
            pair_members=integers(num_tokens),
            blocks=torch.empty(new_size(), dtype=torch.int64, device="cpu"),
        )
    )


@head_op.register_fake
def _head_fake(*arguments):
    call = _Call(*arguments)
    num_pairs = call.pair_labels.shape[0]
    logprobs = call.hidden.new_empty(num_pairs, dtype=torch.promote_types(call.dtype, torch.float32))
    extras = logprobs.new_empty(0 if call.extra == "none" else num_pairs)
    return logprobs, extras, logprobs.new_empty(3, call.rows.shape[0])


@head_backward_op.register_fake
def _head_backward_fake(grad_logprobs, grad_extras, statistics, *arguments):
    (hidden, weight, bias), (needs_hidden, needs_weight, needs_bias) = arguments[:3], arguments[-3:]
    grad_bias = grad_logprobs.new_empty(weight.shape[0] if needs_bias else 0)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


def _save(ctx, inputs, output) -> None:
    statistics = output[2]
    ctx.options = inputs[_NUM_TENSORS:]
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(statistics, *inputs[:_NUM_TENSORS])


def _backward(ctx, grad_logprobs, grad_extras, _):
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    grads = head_backward_op(grad_logprobs, grad_extras, *ctx.saved_tensors, *ctx.options, *needs)
    none = [None] * (len(ctx.needs_input_grad) - 3)
    return (*[grad if needed else None for grad, needed in zip(grads, needs, strict=True)], *none)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "radix_ops.losses can be differentiated once; their gradients have no gradient of their own. For second "
        "derivatives compute the loss from logits"
    )


head_op.register_autograd(_backward, setup_context=_save)
head_backward_op.register_autograd(_no_double_backward)
