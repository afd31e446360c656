"""The gradient of each op of torch.ops.radix that has one."""

from __future__ import annotations

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_radix = torch.ops.radix
_library = torch.library.Library("radix", "IMPL")


class _KeysBelowAutograd(dict):
    """A dispatch key set's bits -> the key set of the kernels below autograd; computing it each time costs 0.3 us."""

    def __missing__(self, bits: int) -> torch._C.DispatchKeySet:
        keys = torch._C.DispatchKeySet.from_raw_repr(bits) & torch._C._after_autograd_keyset
        self[bits] = keys
        return keys


_below_autograd = _KeysBelowAutograd()


def _register_autograd(
    op: torch._ops.OpOverload, num_inputs: int, save, backward, jvp=None, saves_outputs: bool = False
) -> None:
    """Gives `op` gradients for its first `num_inputs` arguments.

    `save(*arguments)` is (tensors, rest), what `backward((*tensors,), rest, *grads)` and `jvp` likewise need. With
    `saves_outputs` the op's outputs stand before the tensors, and only the first of them has a gradient.
    `torch.library.register_autograd` takes three times as long on a call that needs no gradient, which is more than a
    small gather itself takes, and drops forward-mode tangents without a word.
    """

    # An Autograd kernel runs at one level of function transforms; torch.autograd.Function would start from the top.
    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *args):
            tensors, ctx.rest = save(*args)
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op.redispatch(_below_autograd[keyset.raw_repr()], *args)
            if saves_outputs:
                tensors = (*outputs, *tensors)
                ctx.mark_non_differentiable(*outputs[1:])
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            grad_inputs = backward(ctx.saved_tensors, ctx.rest, *grads)
            return (None, *grad_inputs, *[None] * (len(ctx.needs_input_grad) - 1 - num_inputs))

        @staticmethod
        def jvp(ctx, _, *tangents):
            if jvp is None:
                raise RuntimeError(f"{op.name()} has no forward-mode gradient; use backward mode")
            return jvp(ctx.saved_tensors, ctx.rest, *tangents[:num_inputs])

    Function.__name__ = Function.__qualname__ = op.name().replace("::", "_").replace(".", "_")
    redispatch = op._handle.redispatch_boxed
    grad_enabled = torch.is_grad_enabled

    def autograd_kernel(keyset, first, *others):
        # None, which the kernel refuses, arrives here too.
        needs_gradient = (first is not None and first.requires_grad) or (
            num_inputs > 1 and any(x is not None and x.requires_grad for x in others[: num_inputs - 1])
        )
        # Inside a dual level, any tensor may carry a tangent.
        if (needs_gradient and grad_enabled()) or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return Function.apply(keyset, first, *others)
        return redispatch(_below_autograd[keyset.raw_repr()], first, *others)

    _library.impl(op, autograd_kernel, "Autograd", with_keyset=True)


def _register_linear(gather, scatter_add, num_inputs: int) -> None:
    """Gradients of a gather and a scatter_add of `num_inputs` tensors, each the other's transpose.

    Between the tensors and num_rows stand index and, in the .csr overloads, its inverse.
    """

    def as_tuple(result):
        return result if num_inputs > 1 else (result,)

    _register_autograd(
        gather,
        num_inputs,
        lambda *arguments: (arguments[num_inputs:], arguments[0].shape[0]),
        lambda saved, num_rows, *grads: as_tuple(scatter_add(*grads, *saved, num_rows)),
        lambda saved, num_rows, *tangents: gather(*tangents, *saved),
    )
    _register_autograd(
        scatter_add,
        num_inputs,
        lambda *arguments: (arguments[num_inputs:-1], arguments[-1]),
        lambda saved, num_rows, *grads: as_tuple(gather(*grads, *saved)),
        lambda saved, num_rows, *tangents: scatter_add(*tangents, *saved, num_rows),
    )


_register_linear(_radix.gather.default, _radix.scatter_add.default, 1)
_register_linear(_radix.gather.csr, _radix.scatter_add.csr, 1)
_register_linear(_radix.gather_kv.default, _radix.scatter_add_kv.default, 2)
_register_linear(_radix.gather_kv.csr, _radix.scatter_add_kv.csr, 2)


def _register_attention(name: str, backward_name: str, num_tensors: int, saves_outputs: bool) -> None:
    """Gradients of q, k and v, the first of `num_tensors` tensor arguments, and none of the backward's own."""
    op, backward_op = getattr(_radix, name).default, getattr(_radix, backward_name).default

    def backward(saved, rest, grad_out, *_):
        if not saves_outputs:
            return backward_op(grad_out, *saved, *rest)
        out, logsumexp, q, k, v, *others = saved
        return backward_op(grad_out, q, k, v, out, logsumexp, *others, *rest)

    def no_double_backward(saved, rest, *grads):
        raise RuntimeError(
            f"radix::{name} can be differentiated once; its gradient has no gradient of its own. For second "
            "derivatives compute without folding: a transformers model with attn_implementation='eager' after "
            "radix_ops.hf.disable(model) or hf.enable(model, threshold=0), other attention in plain PyTorch"
        )

    # The dispatcher drops trailing arguments that hold their defaults.
    _register_autograd(
        op,
        3,
        lambda *arguments: (arguments[:num_tensors], arguments[num_tensors:]),
        backward,
        saves_outputs=saves_outputs,
    )
    _register_autograd(backward_op, 4, lambda *arguments: ((), None), no_double_backward)


_register_attention("varlen_attention", "varlen_attention_backward", 5, saves_outputs=False)
_register_attention("flash_attention", "flash_attention_backward", 5, saves_outputs=True)
_register_attention("trie_attention", "trie_attention_backward", 10, saves_outputs=True)
