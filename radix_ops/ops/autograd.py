"""The gradient of each op of torch.ops.radix that has one."""

from __future__ import annotations

import torch

from . import trie_rows
from .autograd_kernels import Formula, register

_radix = torch.ops.radix


def _register_linear(gather, scatter_add, num_inputs: int) -> None:
    """Register the gradients of a gather and a scatter_add of `num_inputs` tensors, each the other's transpose.

    Between the tensors and num_rows stand index and, in the .csr overloads, its inverse.
    """

    def as_tuple(result):
        return result if num_inputs > 1 else (result,)

    register(
        Formula(
            gather,
            num_inputs,
            save=lambda *arguments: (arguments[num_inputs:], arguments[0].shape[0]),
            backward=lambda saved, num_rows, *grads: as_tuple(scatter_add(*grads, *saved, num_rows)),
            jvp=lambda saved, num_rows, *tangents: gather(*tangents, *saved),
        )
    )
    register(
        Formula(
            scatter_add,
            num_inputs,
            save=lambda *arguments: (arguments[num_inputs:-1], arguments[-1]),
            backward=lambda saved, num_rows, *grads: as_tuple(gather(*grads, *saved)),
            jvp=lambda saved, num_rows, *tangents: scatter_add(*tangents, *saved, num_rows),
        )
    )


_register_linear(_radix.gather.default, _radix.scatter_add.default, 1)
_register_linear(_radix.gather.csr, _radix.scatter_add.csr, 1)
_register_linear(_radix.gather_kv.default, _radix.scatter_add_kv.default, 2)
_register_linear(_radix.gather_kv.csr, _radix.scatter_add_kv.csr, 2)


def _register_attention(name: str, backward_name: str, num_tensors: int, saves_outputs: bool) -> None:
    """Register the gradients of q, k and v, the first of `num_tensors` tensors; the backward gets one that raises."""
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

    def save(*arguments):
        # The dispatcher may drop trailing arguments that hold their defaults.
        return arguments[:num_tensors], arguments[num_tensors:]

    register(Formula(op, 3, save, backward, saves_outputs=saves_outputs))
    register(Formula(backward_op, 4, lambda *arguments: ((), None), no_double_backward))


_register_attention("varlen_attention", "varlen_attention_backward", 5, saves_outputs=False)
_register_attention("flash_attention", "flash_attention_backward", 5, saves_outputs=True)
_register_attention("trie_attention", "trie_attention_backward", 10, saves_outputs=True)
register(
    Formula(
        _radix.trie_attention_rows.default,
        3,
        save=lambda *arguments: (arguments[:11], arguments[11:]),
        backward=lambda saved, rest, grad_out: trie_rows.gradients(grad_out, *saved, *rest),
    )
)
