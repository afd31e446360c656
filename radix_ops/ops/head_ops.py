"""What `radix_ops.losses` is made of, as ops that torch.compile takes as they are: torch.ops.radix_losses.*

head_plan has sizes that depend on its input. head is differentiable once, in hidden, weight and bias, with a gradient
that head_backward makes for those of them that need one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import backward, forward
from .head_plan import HeadPlan, plan_head

_PLAN = "Tensor rows, Tensor pair_ranks, Tensor pair_labels, Tensor blocks"
_OPTIONS = "float logit_scale, float softcap, float temperature, ScalarType dtype, str extra"
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, {_PLAN}, {_OPTIONS}"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"

head_plan = torch.library.custom_op(
    "radix_losses::head_plan",
    lambda *arguments: tuple(plan_head(*arguments)),
    mutates_args=(),
    schema="(Tensor labels, Tensor unfold_index, Tensor cu_seqlens, SymInt num_rows, SymInt vocabulary, "
    "int ignore_index, int rows_per_chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
head = torch.library.custom_op(
    "radix_losses::head",
    forward,
    mutates_args=(),
    schema=f"({_HEAD}) -> (Tensor logprobs, Tensor extras, Tensor statistics)",
)
head_backward = torch.library.custom_op(
    "radix_losses::head_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor grad_logprobs, Tensor grad_extras, Tensor statistics, {_HEAD}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor)",
)


@head_plan.register_fake
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


@head.register_fake
def _head_fake(
    hidden, weight, bias, rows, pair_ranks, pair_labels, blocks, logit_scale, softcap, temperature, dtype, extra
):
    num_pairs = pair_labels.shape[0]
    logprobs = hidden.new_empty(num_pairs, dtype=torch.promote_types(dtype, torch.float32))
    return logprobs, logprobs.new_empty(0 if extra == "none" else num_pairs), logprobs.new_empty(3, rows.shape[0])


@head_backward.register_fake
def _head_backward_fake(grad_logprobs, grad_extras, statistics, hidden, weight, bias, *rest):
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    grad_bias = grad_logprobs.new_empty(weight.shape[0] if needs_bias else 0)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


def _save(ctx, inputs, output) -> None:
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *inputs[:7])


def _backward(ctx, grad_logprobs, grad_extras, _):
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    grads = head_backward(grad_logprobs, grad_extras, *ctx.saved_tensors, *ctx.options, *needs)
    none = [None] * (len(ctx.needs_input_grad) - 3)
    return (*[grad if needed else None for grad, needed in zip(grads, needs, strict=True)], *none)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "radix_ops.losses can be differentiated once; their gradients have no gradient of their own. For second "
        "derivatives compute the loss from logits"
    )


head.register_autograd(_backward, setup_context=_save)
head_backward.register_autograd(_no_double_backward)
