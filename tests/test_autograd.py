"""Gradients of gather and scatter_add, twice, and opcheck of every op."""

from __future__ import annotations

import pytest
import torch
from batches import NAMED, pack

from radix_ops import FoldedBatch

RADIX = torch.ops.radix
INDEX = torch.tensor([3, 0, 0, 2, 3, 3, 0], dtype=torch.int32)
INDPTR, MEMBERS = torch.tensor([0, 3, 3, 4, 7, 7]), torch.tensor([1, 2, 6, 3, 0, 4, 5])


def sample_inputs(requires_grad=False, dtype=torch.float64):
    """(op, arguments) for every op of torch.ops.radix, over shapes that differ pairwise."""
    x = torch.randn(5, 4, dtype=dtype, requires_grad=requires_grad)
    src = torch.randn(7, 3, 2, dtype=dtype, requires_grad=requires_grad)
    scalars = torch.randn(7, dtype=dtype, requires_grad=requires_grad)
    strided = torch.randn(4, 5, dtype=dtype, requires_grad=requires_grad).T
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8)
    q = torch.randn(batch.num_rows, 4, 6, dtype=dtype, requires_grad=requires_grad)
    k, v = (torch.randn(len(batch.kv_index), 2, d, dtype=dtype, requires_grad=requires_grad) for d in (6, 3))
    runs = (batch.cu_seqlens_q, batch.cu_seqlens_k)
    yield RADIX.gather.default, (x, INDEX)
    yield RADIX.gather.default, (strided, INDEX.long())
    yield RADIX.gather.csr, (x, INDEX, INDPTR, MEMBERS)
    yield RADIX.scatter_add.default, (src, INDEX, 5)
    yield RADIX.scatter_add.default, (scalars, INDEX.long(), 9)
    yield RADIX.scatter_add.csr, (src, INDEX, INDPTR, MEMBERS, 5)
    yield RADIX.varlen_attention.default, (q, k, v, *runs, 0.4)
    yield RADIX.varlen_attention.default, (q, k, v, *runs, 0.4, 2)


def fold_inputs():
    for name in ("nested", "duplicates", "one_token", "no_sequences"):
        for dtype in (torch.int32, torch.int64):
            yield (*pack(NAMED[name], dtype), 4)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(requires_grad, dtype):
    for op, arguments in sample_inputs(requires_grad, dtype):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("op", [RADIX.fold.default, RADIX.fold_plan.default])
def test_opcheck_of_folds(op):
    for arguments in fold_inputs():
        torch.library.opcheck(op, arguments)


def test_opcheck_of_the_attention_backward():
    for op, arguments in sample_inputs():
        if op is RADIX.varlen_attention.default:
            grad_out = torch.randn_like(op(*arguments))
            torch.library.opcheck(RADIX.varlen_attention_backward.default, (grad_out, *arguments))


def test_gradcheck_and_gradgradcheck():
    for op, arguments in sample_inputs(requires_grad=True):
        differentiable = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        rest = arguments[len(differentiable) :]

        def function(*tensors, op=op, rest=rest):
            return op(*tensors, *rest)

        torch.autograd.gradcheck(function, differentiable)
        if op is not RADIX.varlen_attention.default:
            torch.autograd.gradgradcheck(function, differentiable)


@pytest.mark.parametrize("name", NAMED)
def test_gradient_through_fold_and_unfold_with_padding_rows(name):
    """Padding rows repeat token 0, so their gradient belongs to it; none of the gradients here is zero."""
    batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
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


def test_attention_refuses_double_backward():
    op, arguments = next(
        pair for pair in sample_inputs(requires_grad=True) if pair[0] is RADIX.varlen_attention.default
    )
    (grad,) = torch.autograd.grad(op(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_inputs_that_need_no_gradient_get_none():
    x = torch.randn(5, 4)
    assert not RADIX.gather(x, INDEX).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not RADIX.gather(x, INDEX).requires_grad
    with torch.inference_mode():
        assert RADIX.gather(x, INDEX).is_inference()


def reference_of(op, arguments):
    """The same function in torch's own differentiable ops."""
    rest = arguments[1:]
    if op in (RADIX.gather.default, RADIX.gather.csr):
        return lambda x: x.index_select(0, rest[0])
    return lambda x: x.new_zeros(rest[-1], *x.shape[1:]).index_add(0, rest[0], x)


LINEAR = [pair for pair in sample_inputs() if pair[0] is not RADIX.varlen_attention.default]


@pytest.mark.parametrize(("op", "arguments"), LINEAR, ids=[str(op) + str(i) for i, (op, _) in enumerate(LINEAR)])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "vjp", "grad", "dual"])
def test_function_transforms(op, arguments, transform):
    x, rest = arguments[0], arguments[1:]
    ours, theirs = (lambda x: op(x, *rest).sin()), (lambda x: reference_of(op, arguments)(x).sin())

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


def test_attention_refuses_forward_mode():
    op, arguments = next(pair for pair in sample_inputs() if pair[0] is RADIX.varlen_attention.default)
    with pytest.raises(RuntimeError, match="forward-mode gradient"):
        torch.func.jvp(lambda q: op(q, *arguments[1:]), (arguments[0],), (arguments[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode gradient"):
        op(torch.autograd.forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
