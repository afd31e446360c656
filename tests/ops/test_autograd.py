"""Gradients of padding rows, of one of a pair and under function transforms, and calls that need none."""

from __future__ import annotations

import pytest
import torch

from helpers.batches import NAMED, to
from helpers.op_samples import INDEX, op_of, samples_of
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
SINGLE = "radix::gather", "radix::gather.csr", "radix::scatter_add", "radix::scatter_add.csr"
PAIRS = "radix::gather_kv", "radix::gather_kv.csr", "radix::scatter_add_kv", "radix::scatter_add_kv.csr"
ATTENTION = "radix::varlen_attention", "radix::trie_attention"


@pytest.mark.cuda
def test_flash_attention_refuses_other_dtypes():
    for arguments in samples_of("radix::flash_attention", "cuda", torch.float32):
        with pytest.raises(RuntimeError, match="radix::flash_attention: q, k and v must be bfloat16 or float16"):
            RADIX.flash_attention(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_trie_attention_in_half_precision(requires_grad, dtype):
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8, device="cuda")
    runs = batch.cu_seqlens_q, batch.cu_seqlens_k
    order = RADIX.trie_order(*runs, batch.kv_index, batch.num_rows)
    for dim, value_dim in ((16, 16), (6, 3)):
        q = torch.randn(batch.num_rows, 4, dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        k = torch.randn(batch.num_rows, 2, dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        v = torch.randn(batch.num_rows, 2, value_dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        for window in (0, 2):
            arguments = (q, k, v, *order, batch.kv_index, runs[0], batch.num_nodes, 0.4, window)
            torch.library.opcheck(RADIX.trie_attention.default, arguments)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.usefixtures("default_device")
def test_gradient_through_fold_and_unfold_with_padding_rows(name, device):
    """Padding rows repeat token 0, so their gradient belongs to it; none of the gradients here is zero."""
    batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4, device=device)
    x = torch.randn(batch.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    grad_rows = torch.randn(batch.num_rows, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(batch.fold(x), x, grad_rows)
    want = torch.zeros_like(got).index_add_(0, batch.fold_index.long(), grad_rows)
    torch.testing.assert_close(got, want)

    rows = torch.randn(batch.num_rows, 3, dtype=torch.float64, requires_grad=True)
    grad_tokens = torch.randn(batch.num_tokens, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(batch.unfold(rows), rows, grad_tokens)
    want = torch.zeros_like(got).index_add_(0, batch.unfold_index.long(), grad_tokens)
    torch.testing.assert_close(got, want)


def test_one_of_two_gradients(device):
    """A loss reads K alone, and one of the inputs needs no gradient."""
    for name in PAIRS:
        for k, v, *rest in samples_of(name, device, requires_grad=True):
            out_k, out_v = op_of(name)(k, v, *rest)
            grads = torch.autograd.grad(out_k.square().sum(), (k, v), retain_graph=True)
            (want,) = torch.autograd.grad(op_of(name)(k, v.detach(), *rest)[0].square().sum(), k)
            torch.testing.assert_close(grads[0], want)
            assert not grads[1].any()
            assert out_v.requires_grad


def test_inputs_that_need_no_gradient_get_none():
    x = torch.randn(5, 4)
    assert not RADIX.gather(x, INDEX).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not RADIX.gather(x, INDEX).requires_grad
    with torch.inference_mode():
        assert RADIX.gather(x, INDEX).is_inference()


def reference_of(name, arguments):
    """Return the same function in torch's own differentiable ops."""
    rest = arguments[1:]
    if "gather" in name:
        return lambda x: x.index_select(0, rest[0])
    return lambda x: x.new_zeros(rest[-1], *x.shape[1:]).index_add(0, rest[0], x)


LINEAR = [(name, arguments) for name in SINGLE for arguments in samples_of(name)]


@pytest.mark.parametrize(("name", "arguments"), LINEAR, ids=[f"{name}{i}" for i, (name, _) in enumerate(LINEAR)])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "vjp", "grad", "dual"])
def test_function_transforms(name, arguments, transform, device):
    arguments = to(device, arguments)
    x, rest = arguments[0], arguments[1:]
    ours, theirs = (lambda x: op_of(name)(x, *rest).sin()), (lambda x: reference_of(name, arguments)(x).sin())

    def run(function):
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (x.cos(),))[1]
        if transform == "vjp":
            value, pull = torch.func.vjp(function, x)
            return pull(value.cos())[0]
        if transform == "grad":
            return torch.func.grad(lambda x: function(x).sum())(x)
        if transform == "dual":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, x.cos())
                return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        return getattr(torch.func, transform)(function)(x)

    torch.testing.assert_close(run(ours), run(theirs))


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev"])
def test_function_transforms_of_pairs(transform, device):
    """Pairs agree with the same ops on one tensor at a time, which are tested above."""
    for name in PAIRS:
        k, v, *rest = samples_of(name, device)[0]
        pair, single = op_of(name), op_of(name.replace("_kv", ""))
        ours = lambda k, v, op=pair, rest=rest: tuple(x.sin() for x in op(k, v, *rest))  # noqa: E731
        theirs = lambda k, v, op=single, rest=rest: tuple(op(x, *rest).sin() for x in (k, v))  # noqa: E731
        if transform == "jvp":
            got, want = (torch.func.jvp(function, (k, v), (k.cos(), v.cos())) for function in (ours, theirs))
        else:
            got, want = (getattr(torch.func, transform)(function, argnums=(0, 1))(k, v) for function in (ours, theirs))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_refuses_forward_mode(attention):
    op, arguments = op_of(attention), samples_of(attention)[0]
    with pytest.raises(RuntimeError, match="forward-mode gradient"):
        torch.func.jvp(lambda q: op(q, *arguments[1:]), (arguments[0],), (arguments[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode gradient"):
        op(torch.autograd.forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
