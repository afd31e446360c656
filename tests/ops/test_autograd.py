"""Gradients of gather and scatter_add, twice, and opcheck of every op."""

from __future__ import annotations

import pytest
import torch

from helpers.batches import NAMED, pack, to
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
INDEX = torch.tensor([3, 0, 0, 2, 3, 3, 0], dtype=torch.int32)
INDPTR, MEMBERS = torch.tensor([0, 3, 3, 4, 7, 7]), torch.tensor([1, 2, 6, 3, 0, 4, 5])


def sample_inputs(requires_grad=False, dtype=torch.float64, device="cpu"):
    """(op, arguments) for every op of torch.ops.radix that has a kernel, over shapes that differ pairwise."""
    for op, arguments in _sample_inputs(dtype):
        on_device = to(device, arguments)
        for argument in on_device:
            if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                argument.requires_grad_(requires_grad)
        yield op, on_device


def _sample_inputs(dtype):
    x = torch.randn(5, 4, dtype=dtype)
    src = torch.randn(7, 3, 2, dtype=dtype)
    scalars = torch.randn(7, dtype=dtype)
    strided = torch.randn(4, 5, dtype=dtype).T
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8)
    q = torch.randn(batch.num_rows, 4, 6, dtype=dtype)
    k, v = (torch.randn(len(batch.kv_index), 2, d, dtype=dtype) for d in (6, 3))
    runs = (batch.cu_seqlens_q, batch.cu_seqlens_k)
    yield RADIX.gather.default, (x, INDEX)
    yield RADIX.gather.default, (strided, INDEX.long())
    yield RADIX.gather.csr, (x, INDEX, INDPTR, MEMBERS)
    yield RADIX.scatter_add.default, (src, INDEX, 5)
    yield RADIX.scatter_add.default, (scalars, INDEX.long(), 9)
    yield RADIX.scatter_add.csr, (src, INDEX, INDPTR, MEMBERS, 5)
    pair = torch.randn(5, 2, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    yield RADIX.gather_kv.default, (*pair, INDEX)
    yield RADIX.gather_kv.csr, (*pair, INDEX, INDPTR, MEMBERS)
    pair = torch.randn(7, 2, 3, dtype=dtype), torch.randn(7, 4, dtype=dtype)
    yield RADIX.scatter_add_kv.default, (*pair, INDEX, 8)
    yield RADIX.scatter_add_kv.csr, (*pair, INDEX, INDPTR, MEMBERS, 5)
    yield RADIX.varlen_attention.default, (q, k, v, *runs, 0.4)
    yield RADIX.varlen_attention.default, (q, k, v, *runs, 0.4, 2)
    order = RADIX.trie_order(*runs, batch.kv_index, batch.num_rows)
    k, v = (torch.randn(batch.num_rows, 2, d, dtype=dtype) for d in (6, 3))
    trie = (*order, batch.kv_index, runs[0], batch.num_nodes)
    yield RADIX.trie_attention.default, (q, k, v, *trie, 0.4)
    yield RADIX.trie_attention.default, (q, k, v, *trie, 0.4, 2)


ATTENTION = (RADIX.varlen_attention.default, RADIX.trie_attention.default)


def first_output(result):
    return result[0] if isinstance(result, tuple) else result


def fold_inputs():
    for name in ("nested", "duplicates", "one_token", "no_sequences"):
        for dtype in (torch.int32, torch.int64):
            yield (*pack(NAMED[name], dtype), 4)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(requires_grad, dtype, device):
    for op, arguments in sample_inputs(requires_grad, dtype, device):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("op", [RADIX.fold.default, RADIX.fold_plan.default, RADIX.fold_plan_front.default])
def test_opcheck_of_folds(op, device):
    for arguments in fold_inputs():
        torch.library.opcheck(op, to(device, arguments))


def test_opcheck_of_the_attention_backwards(device):
    for op, arguments in sample_inputs(device=device):
        if op is RADIX.varlen_attention.default:
            grad_out = torch.randn_like(op(*arguments))
            torch.library.opcheck(RADIX.varlen_attention_backward.default, (grad_out, *arguments))
        if op is RADIX.trie_attention.default:
            outputs = op(*arguments)
            grad_out = torch.randn_like(outputs[0])
            q, k, v, *rest = arguments
            torch.library.opcheck(RADIX.trie_attention_backward.default, (grad_out, q, k, v, *outputs, *rest))


@pytest.mark.parametrize("name", ["nested", "one_token", "no_sequences"])
def test_opcheck_of_the_trie(name, device):
    batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=8, device=device)
    runs = (batch.cu_seqlens_q, batch.cu_seqlens_k)
    arguments = (*runs, batch.kv_index, batch.num_rows)
    torch.library.opcheck(RADIX.trie_order.default, arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_flash_attention(requires_grad, dtype):
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8, device="cuda")
    lengths = (batch.num_nodes, batch.max_seqlen_q, batch.max_seqlen_k)
    for dim, value_dim in ((16, 16), (6, 3)):
        q = torch.randn(batch.num_rows, 4, dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        k = torch.randn(len(batch.kv_index), 2, dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        v = torch.randn(len(batch.kv_index), 2, value_dim, dtype=dtype, device="cuda", requires_grad=requires_grad)
        for window in (0, 2):
            arguments = (q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k, *lengths, 0.4, window)
            torch.library.opcheck(RADIX.flash_attention.default, arguments, rtol=1e-2, atol=1e-2)
            with pytest.raises(RuntimeError, match="radix::flash_attention: q, k and v must be bfloat16 or float16"):
                RADIX.flash_attention(q.float(), k.float(), v.float(), *arguments[3:])


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


def test_gradcheck_and_gradgradcheck(device):
    for op, arguments in sample_inputs(requires_grad=True, device=device):
        differentiable = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        rest = arguments[len(differentiable) :]

        def function(*tensors, op=op, rest=rest):
            result = op(*tensors, *rest)
            return result[0] if op is RADIX.trie_attention.default else result

        torch.autograd.gradcheck(function, differentiable)
        if op not in ATTENTION:
            torch.autograd.gradgradcheck(function, differentiable)


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


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_refuses_double_backward(attention):
    op, arguments = next(pair for pair in sample_inputs(requires_grad=True) if pair[0] is attention)
    loss = first_output(op(*arguments)).square().sum()
    (grad,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_one_of_two_gradients(device):
    """A loss that reads K alone, and inputs of which one needs no gradient."""
    for op, (k, v, *rest) in sample_inputs(requires_grad=True, device=device):
        if "_kv" in op.name():
            out_k, out_v = op(k, v, *rest)
            grads = torch.autograd.grad(out_k.square().sum(), (k, v), retain_graph=True)
            (want,) = torch.autograd.grad(op(k, v.detach(), *rest)[0].square().sum(), k)
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


def reference_of(op, arguments):
    """The same function in torch's own differentiable ops."""
    rest = arguments[1:]
    if op in (RADIX.gather.default, RADIX.gather.csr):
        return lambda x: x.index_select(0, rest[0])
    return lambda x: x.new_zeros(rest[-1], *x.shape[1:]).index_add(0, rest[0], x)


SINGLE = ("gather", "gather.csr", "scatter_add", "scatter_add.csr")
LINEAR = [pair for pair in sample_inputs() if pair[0].name().removeprefix("radix::") in SINGLE]


@pytest.mark.parametrize(("op", "arguments"), LINEAR, ids=[str(op) + str(i) for i, (op, _) in enumerate(LINEAR)])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "vjp", "grad", "dual"])
def test_function_transforms(op, arguments, transform, device):
    arguments = to(device, arguments)
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


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev"])
def test_function_transforms_of_pairs(transform, device):
    """Against the same ops on one tensor at a time, which are tested above."""
    for op, (k, v, *rest) in sample_inputs(device=device):
        if "_kv" not in op.name():
            continue
        single = getattr(getattr(RADIX, op.name().split("::")[1].split(".")[0].removesuffix("_kv")), op._overloadname)
        ours = lambda k, v, op=op, rest=rest: tuple(x.sin() for x in op(k, v, *rest))  # noqa: E731
        theirs = lambda k, v, op=single, rest=rest: tuple(op(x, *rest).sin() for x in (k, v))  # noqa: E731
        if transform == "jvp":
            got, want = (torch.func.jvp(function, (k, v), (k.cos(), v.cos())) for function in (ours, theirs))
        else:
            got, want = (getattr(torch.func, transform)(function, argnums=(0, 1))(k, v) for function in (ours, theirs))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_refuses_forward_mode(attention):
    op, arguments = next(pair for pair in sample_inputs() if pair[0] is attention)
    with pytest.raises(RuntimeError, match="forward-mode gradient"):
        torch.func.jvp(lambda q: op(q, *arguments[1:]), (arguments[0],), (arguments[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode gradient"):
        op(torch.autograd.forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
