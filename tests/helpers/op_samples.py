"""Arguments for every op of torch.ops.radix and radix_losses, how each can be differentiated, and where it has kernels.

`tests/ops/test_every_op.py` holds the tables to what the dispatcher lists: whoever adds an op adds it here.
"""

from __future__ import annotations

import functools

import pytest
import torch

import radix_ops.losses  # noqa: F401  (registers radix_losses)
from helpers.batches import NAMED, pack, to
from radix_ops import FoldedBatch

RADIX, LOSSES = torch.ops.radix, torch.ops.radix_losses
INDEX = torch.tensor([3, 0, 0, 2, 3, 3, 0], dtype=torch.int32)
INVERSE = torch.tensor([0, 3, 3, 4, 7, 7]), torch.tensor([1, 2, 6, 3, 0, 4, 5])

# gradcheck and gradgradcheck hold.
TWICE = "twice"
# gradcheck holds, and the second backward raises.
ONCE = "once"
# The op is another's backward, and its own raises.
BACKWARD = "backward"
INTEGERS = "takes and makes integers alone"
# The op is a part of another, which has the gradient.
PART = "part"
HALF = "in half precision alone, which gradcheck can't take: tests/attention compares with float64"
GRADIENTS = {
    "radix::fold": INTEGERS,
    "radix::fold_plan": INTEGERS,
    "radix::fold_batch": INTEGERS,
    "radix::unpad": INTEGERS,
    "radix::gather": TWICE,
    "radix::gather.csr": TWICE,
    "radix::gather_kv": TWICE,
    "radix::gather_kv.csr": TWICE,
    "radix::scatter_add": TWICE,
    "radix::scatter_add.csr": TWICE,
    "radix::scatter_add_kv": TWICE,
    "radix::scatter_add_kv.csr": TWICE,
    "radix::varlen_attention": ONCE,
    "radix::varlen_attention_backward": BACKWARD,
    "radix::flash_attention": HALF,
    "radix::flash_attention_backward": HALF,
    "radix::trie_order": INTEGERS,
    "radix::trie_attention": ONCE,
    "radix::trie_attention_backward": BACKWARD,
    "radix::trie_attention_rows": ONCE,
    "radix::trie_attention_sm90": PART,
    "radix::trie_attention_backward_sm90": PART,
    "radix::lexicographic_order": INTEGERS,
    "radix::common_prefix_lengths": INTEGERS,
    "radix::cut_batches": INTEGERS,
    "radix_losses::head_plan": INTEGERS,
    "radix_losses::head": ONCE,
    "radix_losses::head_backward": BACKWARD,
}
# (op, dispatch key) -> why there is no kernel.
WITHOUT_KERNEL = {
    ("radix::flash_attention", "CPU"): "torch's flash attention is CUDA's",
    ("radix::flash_attention_backward", "CPU"): "torch's flash attention is CUDA's",
    ("radix::trie_attention_sm90", "CPU"): "it is Hopper's",
    ("radix::trie_attention_backward_sm90", "CPU"): "it is Hopper's",
    ("radix::lexicographic_order", "CUDA"): "batches are planned on the CPU",
    ("radix::common_prefix_lengths", "CUDA"): "batches are planned on the CPU",
    ("radix::cut_batches", "CUDA"): "batches are planned on the CPU",
}
# The compute capability of the one kind of GPU that an op has a kernel for.
CAPABILITIES = {"radix::trie_attention_sm90": (9, 0), "radix::trie_attention_backward_sm90": (9, 0)}
# Ops that only tests call.
FOR_TESTS = {"radix::_fold_by_key": "the CUDA fold under a chosen key, in builds with CUDA"}


def op_of(name: str) -> torch._ops.OpOverload:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _to(device: str, name: str, arguments: tuple) -> tuple:
    """Put the tensors on the device, but for the one that says the host which blocks of logits there are."""
    moved = list(to(device, arguments))
    if name in BLOCKS:
        moved[BLOCKS[name]] = arguments[BLOCKS[name]]
    return tuple(moved)


BLOCKS = {"radix_losses::head": 6, "radix_losses::head_backward": 9}


def samples_of(name: str, device: str = "cpu", dtype=torch.float64, requires_grad=False) -> list[tuple]:
    """Return lists of the op's arguments, over shapes that differ pairwise."""
    samples = [_to(device, name, arguments) for arguments in SAMPLES[name](dtype)]
    for x in (x for arguments in samples for x in arguments if isinstance(x, torch.Tensor)):
        x.requires_grad_(requires_grad and x.is_floating_point())
    return samples


def with_gradient(name: str, arguments: tuple):
    """Return the op as a function of its inputs that need a gradient, to its outputs that have one, and the inputs."""
    inputs = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*tensors):
        given = list(arguments)
        for i, x in zip(inputs, tensors, strict=True):
            given[i] = x
        return tuple(x for x in outputs_of(op_of(name), given) if x.requires_grad and x.numel())

    return function, [arguments[i] for i in inputs]


def outputs_of(function, arguments: tuple) -> list[torch.Tensor]:
    outputs = function(*arguments)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def check_gradient(name: str, arguments: tuple) -> None:
    """Check GRADIENTS of the op at arguments of which those that can need a gradient."""
    kind = GRADIENTS[name]
    if kind == INTEGERS:
        tensors = [x for x in (*arguments, *outputs_of(op_of(name), arguments)) if isinstance(x, torch.Tensor)]
        assert not any(x.is_floating_point() for x in tensors), f"{name} is not of integers"
        return
    function, inputs = with_gradient(name, arguments)
    assert function(*inputs), f"{name} makes nothing that has a gradient"
    if kind in (TWICE, ONCE):
        torch.autograd.gradcheck(function, inputs)
    if kind == TWICE:
        torch.autograd.gradgradcheck(function, inputs)
        return
    result = function(*inputs)[0].square().sum()
    if kind == ONCE:
        (grad,) = torch.autograd.grad(result, inputs[:1], create_graph=True)
        result = grad.sum()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        result.backward()


def _fold(dtype):
    for name in ("nested", "duplicates", "one_token", "no_sequences"):
        for integers in (torch.int32, torch.int64):
            yield (*pack(NAMED[name], integers), 4)


def _fold_batch(dtype):
    for arguments in _fold(dtype):
        yield arguments
        yield *arguments, True
    ids, positions, cu_seqlens, _ = arguments = next(_fold(dtype))
    yield *arguments, True, True
    yield torch.cat([ids, ids]), torch.cat([positions, ids]), cu_seqlens, 1, False, True


def _unpad(dtype):
    for integers in (torch.bool, torch.int32, torch.int64):
        yield (torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).to(integers),)
    yield (torch.tensor([[1, 0, 1], [1, 1, 0]]),)
    yield (torch.ones(0, 3, dtype=torch.bool),)


def _gather(dtype):
    yield torch.randn(5, 4, dtype=dtype), INDEX
    yield torch.randn(4, 5, dtype=dtype).T, INDEX.long()


def _scatter_add(dtype):
    yield torch.randn(7, 3, 2, dtype=dtype), INDEX, 5
    yield torch.randn(7, dtype=dtype), INDEX.long(), 9


def _gather_kv(dtype):
    yield torch.randn(5, 2, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype), INDEX


def _scatter_add_kv(dtype):
    yield torch.randn(7, 2, 3, dtype=dtype), torch.randn(7, 4, dtype=dtype), INDEX, 8


def _csr(plain, dtype):
    """Return the first sample with the inverse of its index, which is one for 5 rows."""
    *tensors, last = next(plain(dtype))
    yield (*tensors, last, *INVERSE) if last is INDEX else (*tensors, *INVERSE, 5)


def _batch():
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8)
    return batch, (batch.cu_seqlens_q, batch.cu_seqlens_k)


def _attention_inputs(batch, num_keys, dtype, sizes=(6, 3)):
    q = torch.randn(batch.num_rows, 4, sizes[0], dtype=dtype)
    return q, *(torch.randn(num_keys, 2, size, dtype=dtype) for size in sizes)


def _varlen_attention(dtype):
    batch, runs = _batch()
    for window in ((), (2,)):
        yield (*_attention_inputs(batch, len(batch.kv_index), dtype), *runs, 0.4, *window)


def _flash_attention(dtype):
    batch, runs = _batch()
    lengths = batch.num_nodes, batch.max_seqlen_q, batch.max_seqlen_k
    for sizes in ((16, 16), (6, 3)):
        for window in (0, 2):
            yield (*_attention_inputs(batch, len(batch.kv_index), dtype, sizes), *runs, *lengths, 0.4, window)


def _trie_order(dtype):
    for name in ("nested", "one_token", "no_sequences"):
        batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=8)
        yield batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_rows


def _trie_attention(dtype):
    batch, runs = _batch()
    tables = *RADIX.trie_order(*runs, batch.kv_index, batch.num_rows), batch.kv_index, runs[0], batch.num_nodes
    for window in ((), (2,)):
        yield (*_attention_inputs(batch, batch.num_rows, dtype), *tables, 0.4, *window)


def _trie_attention_rows(dtype):
    rows = torch.tensor([6, 0, 2, 7, 1])
    for q, k, v, *rest in _trie_attention(dtype):
        yield q[rows].clone(), k, v, rows, *rest


def _trie_attention_sm90(dtype):
    batch, runs = _batch()
    _, leave, depth, row_of, path = RADIX.trie_order(*runs, batch.kv_index, batch.num_rows)
    tables = leave, depth, row_of, path, batch.kv_index, batch.num_nodes
    for size in (64, 128):
        for window in ((), (2,)):
            yield (*_attention_inputs(batch, batch.num_rows, dtype, (size, size)), *tables, 0.1, *window)


def _trie_attention_backward_sm90(dtype):
    for q, k, v, leave, depth, row_of, path, kv_index, num_nodes, scale, *window in _trie_attention_sm90(dtype):
        if q.shape[2] == 128 and not window:
            tables = leave, depth, row_of, path, kv_index, num_nodes, scale
            out, logsumexp = to("cpu", RADIX.trie_attention_sm90(*to("cuda", (q, k, v, *tables))))
            yield torch.randn_like(out), q, k, v, out, logsumexp, *tables


def _attention_backward(forward, op, dtype, device="cpu"):
    for arguments in forward(dtype):
        outputs = op(*to(device, arguments))
        saved = () if isinstance(outputs, torch.Tensor) else to("cpu", outputs)
        q, k, v, *rest = arguments
        yield (torch.randn(*q.shape[:2], v.shape[2], dtype=dtype), q, k, v, *saved, *rest)


def _sequences():
    return torch.tensor([3, 1, 2, 1, 2, 2, 3]), torch.tensor([1, 3, 0]), torch.tensor([2, 4, 3], dtype=torch.int32)


def _lexicographic_order(dtype):
    yield _sequences()


def _common_prefix_lengths(dtype):
    yield (*_sequences(), torch.tensor([1, 0]))


def _cut_batches(dtype):
    yield torch.tensor([2, 4, 3]), torch.tensor([0, 1, 2]), 5, 9, 9, 9
    yield torch.tensor([2, 4], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 2, 9, 9, 9, 1


def _head_plan(dtype):
    batch, _ = _batch()
    for labels in (torch.randint(0, 11, (batch.num_tokens,)), torch.full((batch.num_tokens,), -100)):
        yield labels, batch.unfold_index, batch.cu_seqlens, batch.num_rows, 11, -100, 3


def _head(dtype):
    batch, _ = _batch()
    rows, ranks, labels, *_, blocks = LOSSES.head_plan(*next(_head_plan(dtype)))
    hidden, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((batch.num_rows, 5), (11, 5), (11,)))
    for given, extra in ((bias, "mean"), (None, "entropy"), (bias, "none")):
        yield hidden.clone(), weight.clone(), given, rows, ranks, labels, blocks, 1.5, 2.0, 0.8, dtype, extra


def _head_backward(dtype):
    for arguments in _head(dtype):
        logprobs, extras, statistics = LOSSES.head(*arguments)
        needs = (True, False, True) if arguments[2] is None else (True, True, False)
        yield torch.randn_like(logprobs), torch.randn_like(extras), statistics, *arguments, *needs


SAMPLES = {
    "radix::fold": _fold,
    "radix::fold_plan": _fold,
    "radix::fold_batch": _fold_batch,
    "radix::unpad": _unpad,
    "radix::gather": _gather,
    "radix::gather.csr": functools.partial(_csr, _gather),
    "radix::gather_kv": _gather_kv,
    "radix::gather_kv.csr": functools.partial(_csr, _gather_kv),
    "radix::scatter_add": _scatter_add,
    "radix::scatter_add.csr": functools.partial(_csr, _scatter_add),
    "radix::scatter_add_kv": _scatter_add_kv,
    "radix::scatter_add_kv.csr": functools.partial(_csr, _scatter_add_kv),
    "radix::varlen_attention": _varlen_attention,
    "radix::varlen_attention_backward": functools.partial(
        _attention_backward, _varlen_attention, RADIX.varlen_attention
    ),
    "radix::flash_attention": _flash_attention,
    "radix::flash_attention_backward": functools.partial(
        _attention_backward, _flash_attention, RADIX.flash_attention, device="cuda"
    ),
    "radix::trie_order": _trie_order,
    "radix::trie_attention": _trie_attention,
    "radix::trie_attention_backward": functools.partial(_attention_backward, _trie_attention, RADIX.trie_attention),
    "radix::trie_attention_rows": _trie_attention_rows,
    "radix::trie_attention_sm90": _trie_attention_sm90,
    "radix::trie_attention_backward_sm90": _trie_attention_backward_sm90,
    "radix::lexicographic_order": _lexicographic_order,
    "radix::common_prefix_lengths": _common_prefix_lengths,
    "radix::cut_batches": _cut_batches,
    "radix_losses::head_plan": _head_plan,
    "radix_losses::head": _head,
    "radix_losses::head_backward": _head_backward,
}
