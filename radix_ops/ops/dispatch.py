"""Which kernel runs each op of torch.ops.radix where; its fake kernel and its gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import flash, trie, varlen
from .checks import check_devices, check_index_like

_ALL_OPS = (
    "fold",
    "fold_plan",
    "fold_plan_front",
    "gather",
    "gather.csr",
    "gather_kv",
    "gather_kv.csr",
    "scatter_add",
    "scatter_add.csr",
    "scatter_add_kv",
    "scatter_add_kv.csr",
    "varlen_attention",
    "varlen_attention_backward",
    "flash_attention",
    "flash_attention_backward",
    "trie_order",
    "trie_attention",
    "trie_attention_backward",
    "lexicographic_order",
    "common_prefix_lengths",
    "cut_batches",
)


def _new_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def _index_like(tensor: Tensor, *sizes) -> Tensor:
    return tensor.new_empty(sizes, dtype=torch.int32)


def _check_fold(op, input_ids, position_ids, cu_seqlens):
    check_index_like(op, input_ids.device, input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)


def _fold_outputs(input_ids, position_ids, num_tokens, num_rows):
    return (
        input_ids.new_empty(num_rows),
        position_ids.new_empty(num_rows),
        _index_like(input_ids, num_tokens),
        _index_like(input_ids, num_rows),
    )


@torch.library.register_fake("radix::fold")
def _fold_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1):
    _check_fold("fold", input_ids, position_ids, cu_seqlens)
    return _fold_outputs(input_ids, position_ids, input_ids.shape[0], _new_size())


def _plan_outputs(input_ids, position_ids, num_tokens):
    num_rows, num_runs, num_kv = _new_size(), _new_size(), _new_size()
    return (
        *_fold_outputs(input_ids, position_ids, num_tokens, num_rows),
        _index_like(input_ids, num_rows + 1),
        _index_like(input_ids, num_tokens),
        _index_like(input_ids, num_runs),
        _index_like(input_ids, num_runs + 1),
        _index_like(input_ids, num_runs + 1),
        _index_like(input_ids, num_kv),
        _index_like(input_ids, num_rows + 1),
        _index_like(input_ids, num_kv),
        torch.empty(4, dtype=torch.int64, device="cpu"),
    )


@torch.library.register_fake("radix::fold_plan")
def _fold_plan_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1):
    _check_fold("fold_plan", input_ids, position_ids, cu_seqlens)
    return _plan_outputs(input_ids, position_ids, input_ids.shape[0])


@torch.library.register_fake("radix::fold_plan_front")
def _fold_plan_front_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1):
    _check_fold("fold_plan_front", input_ids, position_ids, cu_seqlens)
    return _plan_outputs(input_ids, position_ids, _new_size())


def _gather_fake(op, x, index, *inverse):
    check_index_like(op, x.device, index=index, **dict(zip(("indptr", "members"), inverse, strict=False)))
    return x.new_empty(index.shape[0], *x.shape[1:])


def _scatter_add_fake(op, src, index, *rest):
    *inverse, num_rows = rest
    check_index_like(op, src.device, index=index, **dict(zip(("indptr", "members"), inverse, strict=False)))
    torch._check(
        index.shape[0] == src.shape[0],
        lambda: (
            f"radix::{op}: index must hold one entry for each row of src, got {index.shape[0]} entries for "
            f"{src.shape[0]} rows"
        ),
    )
    return src.new_empty(num_rows, *src.shape[1:])


def _pair_fake(fake):
    def pair_fake(op, k, v, *rest):
        names = "k and v" if op.startswith("gather") else "src_k and src_v"
        check_devices(op, k.device, v=v)
        torch._check(
            k.shape[0] == v.shape[0],
            lambda: f"radix::{op}: {names} must have equally many rows, got {k.shape[0]} and {v.shape[0]}",
        )
        if k.dtype != v.dtype:
            raise RuntimeError(f"radix::{op}: {names} must have one dtype, got {k.dtype} and {v.dtype}")
        return fake(op, k, *rest), fake(op, v, *rest)

    return pair_fake


for _name, _fake in (("gather", _gather_fake), ("scatter_add", _scatter_add_fake)):
    for _op, _kernel in ((_name, _fake), (f"{_name}_kv", _pair_fake(_fake))):
        for _overload in (_op, f"{_op}.csr"):
            torch.library.register_fake(f"radix::{_overload}", functools.partial(_kernel, _overload))


@torch.library.register_fake("radix::varlen_attention")
def _varlen_attention_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sliding_window=0):
    check_index_like("varlen_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_devices("varlen_attention", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _logsumexp_like(q: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], dtype=dtype)


@torch.library.register_fake("radix::flash_attention")
def _flash_attention_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest):
    check_index_like("flash_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_devices("flash_attention", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), _logsumexp_like(q, torch.float32)


@torch.library.register_fake("radix::lexicographic_order")
def _lexicographic_order_fake(input_ids, starts, lengths):
    check_index_like("lexicographic_order", input_ids.device, input_ids=input_ids, starts=starts, lengths=lengths)
    return starts.new_empty(starts.shape[0], dtype=torch.int64)


@torch.library.register_fake("radix::common_prefix_lengths")
def _common_prefix_lengths_fake(input_ids, starts, lengths, order):
    given = {"input_ids": input_ids, "starts": starts, "lengths": lengths, "order": order}
    check_index_like("common_prefix_lengths", input_ids.device, **given)
    return order.new_empty(order.shape[0], dtype=torch.int64)


@torch.library.register_fake("radix::cut_batches")
def _cut_batches_fake(lengths, shared, max_rows, max_tokens, max_positions, max_sequences, batch_cost=0):
    check_index_like("cut_batches", lengths.device, lengths=lengths, shared=shared)
    return lengths.new_empty(_new_size(), dtype=torch.int64)


@torch.library.register_fake("radix::trie_order")
def _trie_order_fake(cu_seqlens_q, cu_seqlens_k, kv_index, num_rows):
    runs = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_index_like("trie_order", kv_index.device, **runs, kv_index=kv_index)
    return tuple(_index_like(kv_index, num_rows) for _ in range(5))


@torch.library.register_fake("radix::trie_attention")
def _trie_attention_fake(q, k, v, enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes, scale, *window):
    tables = {"enter": enter, "leave": leave, "depth": depth, "row_of": row_of, "path": path, "kv_index": kv_index}
    check_index_like("trie_attention", q.device, **tables, cu_seqlens_q=cu_seqlens_q)
    check_devices("trie_attention", q.device, k=k, v=v)
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), _logsumexp_like(q, wide)


def _attention_backward_fake(grad_out, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _name in ("varlen_attention_backward", "flash_attention_backward", "trie_attention_backward"):
    torch.library.register_fake(f"radix::{_name}", _attention_backward_fake)


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


_radix = torch.ops.radix
_library = torch.library.Library("radix", "IMPL")


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


def _apart_from_autocast(kernel):
    """The kernel in its arguments' dtypes, where autocast would cast its products: a backward pass may run under it."""

    @functools.wraps(kernel)
    def run(first, *others):
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(first, *others)
        with torch.autocast(device, enabled=False):
            return kernel(first, *others)

    return run


for _module, _name, _keys in (
    (varlen, "varlen_attention", ("CPU", "CUDA")),
    (varlen, "varlen_attention_backward", ("CPU", "CUDA")),
    (trie, "trie_attention", ("CUDA",)),
    (trie, "trie_attention_backward", ("CUDA",)),
):
    for _key in _keys:
        _library.impl(_name, _apart_from_autocast(getattr(_module, _name)), _key)
for _name in ("flash_attention", "flash_attention_backward"):
    _library.impl(_name, getattr(flash, _name), "CUDA")


def _no_cuda_kernel(name: str):
    def kernel(*args):
        raise RuntimeError(
            f"radix::{name}: a tensor is on a CUDA device, and this build of radix_ops has no CUDA kernel for the op; "
            "move the tensors to the CPU, or build from source where nvcc is found"
        )

    return kernel


def _on_cuda_only(name: str):
    def kernel(*args):
        raise RuntimeError(f"radix::{name}: tensors must be on a CUDA device; radix::varlen_attention takes others")

    return kernel


def _on_cpu_only(name: str):
    def kernel(*args):
        raise RuntimeError(f"radix::{name}: tensors must be on the CPU; batches are planned there")

    return kernel


for _name in ("flash_attention", "flash_attention_backward"):
    _library.impl(_name, _on_cuda_only(_name), "CPU")
for _name in ("lexicographic_order", "common_prefix_lengths", "cut_batches"):
    _library.impl(_name, _on_cpu_only(_name), "CUDA")
for _op in _ALL_OPS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"radix::{_op}", "CUDA"):
        _library.impl(_op, _no_cuda_kernel(_op), "CUDA")
