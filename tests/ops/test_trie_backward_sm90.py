"""The trie layout's backward for Hopper against dense attention in float64, and the Triton kernels beside it."""

from __future__ import annotations

import pytest
import torch

from helpers.hopper import TRIES, batch_of, marks_of, ops_called, poison_memory, random_of, tables_of
from helpers.tries import LONG, NESTED_RUNS, ancestors_of, dense, strided
from radix_ops import FoldedBatch

pytestmark = marks_of("radix::trie_attention_backward_sm90")

# Query heads, key/value heads, scale.
SHAPES = [
    (2, 2, 0.09),
    (4, 2, 0.09),
    (4, 1, -0.09),
    (8, 1, 0.09),
    (32, 1, 0.09),
    (7, 1, 0.09),  # a group that does not divide a tile
    (40, 1, 0.09),  # a group that takes several blocks of queries
    (6, 2, 0.0),
]


def forward(q, k, v, tables, scale):
    rows = tables.leave, tables.depth, tables.row_of, tables.path
    return torch.ops.radix.trie_attention_sm90(q, k, v, *rows, tables.kv_index, tables.num_nodes, scale)


def backward(grad_out, q, k, v, out, logsumexp, tables, scale):
    for x in (q, k, v):
        poison_memory(x)
    rows = tables.leave, tables.depth, tables.row_of, tables.path
    saved = grad_out, q, k, v, out, logsumexp
    return torch.ops.radix.trie_attention_backward_sm90(*saved, *rows, tables.kv_index, tables.num_nodes, scale)


def by_triton(monkeypatch, *arguments):
    from radix_ops.ops import trie_launch

    with monkeypatch.context() as patch:
        patch.setattr(trie_launch, "_is_for_hopper", lambda q, v, window: False)
        return trie_launch.backward(*arguments, 0)


def saved_of(batch, heads, kv_heads, scale, dtype=torch.bfloat16):
    """Return the arguments of the backward, with NaN in the padding rows of all but the forward's results."""
    q, k, v = random_of(batch, heads, kv_heads, 128, dtype)
    grad_out = random_of(batch, heads, heads, 128, dtype)[1]
    tables = tables_of(batch)
    return grad_out, q, k, v, *forward(q, k, v, tables, scale), tables, scale


def error_of(got, exact):
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1.0))


@pytest.mark.parametrize("name", TRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_dense_attention(name, dtype, monkeypatch):
    batch = batch_of(name)
    nodes = batch.num_nodes
    path = ancestors_of(batch)[:nodes, :nodes].cuda()
    for heads, kv_heads, scale in SHAPES:
        grad_out, q, k, v, *rest = saved_of(batch, heads, kv_heads, scale, dtype)

        def exactly(dtype, inputs=(q, k, v), grad_out=grad_out, scale=scale):
            wide = [x[:nodes].to(dtype).requires_grad_() for x in inputs]
            return torch.autograd.grad(dense(*wide, path, scale), wide, grad_out[:nodes].to(dtype))

        exact, plain = exactly(torch.float64), exactly(dtype)
        triton = by_triton(monkeypatch, grad_out, q, k, v, *rest)
        for layout in (
            lambda x: x,
            lambda x: x.repeat(1, 1, 2)[..., : x.shape[2]],
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            grads = backward(grad_out, *map(layout, (q, k, v)), *rest)
            for of, got, want, by_plain, beside in zip("qkv", grads, exact, plain, triton, strict=True):
                assert (got[nodes:] == 0).all()
                error = error_of(got[:nodes], want)
                floor = 1e-3 if dtype == torch.bfloat16 else 1e-4
                allowed = 1.3 * max(error_of(by_plain, want), error_of(beside[:nodes], want)) + floor
                assert error <= allowed, f"{of}: {error} > {allowed} {heads, kv_heads, scale}"


def test_it_is_the_backward_of_trie_attention_where_it_fits(monkeypatch):
    from radix_ops.ops import trie_launch

    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    tables = tables_of(batch)
    for size, window, is_taken in ((128, 0, True), (128, 40, False), (64, 0, False)):
        q, k, v = random_of(batch, 4, 2, size)
        saved = torch.randn_like(q), q, k, v, *torch.ops.radix.trie_attention(q, k, v, *tables, 0.1, window)
        got, ops = ops_called(lambda: torch.ops.radix.trie_attention_backward(*saved, *tables, 0.1, window))  # noqa: B023
        with monkeypatch.context() as patch:
            patch.setattr(trie_launch, "_is_for_hopper", lambda q, v, window: False)
            want = trie_launch.backward(*saved, tables, 0.1, window)
        assert ("radix::trie_attention_backward_sm90" in ops) == is_taken
        for x, y in zip(got, want, strict=True):
            assert error_of(x, y.double()) < 1e-2


def test_rows_off_alignment_and_any_gradient_are_copied():
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    tables = tables_of(batch)
    inputs = random_of(batch, 4, 2, 128)
    grad_out = torch.randn(batch.num_rows, 1, 1, device="cuda", dtype=torch.bfloat16).expand(-1, 4, 128)
    results = []
    for layout, grad in ((lambda x: x, grad_out.contiguous()), (strided, grad_out)):
        made = [layout(x).requires_grad_() for x in inputs]
        out, _ = torch.ops.radix.trie_attention(*made, *tables, 0.1)
        results.append(torch.autograd.grad(out, made, grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("nodes", [0, 3])
def test_rows_behind_the_nodes_are_zeros(nodes):
    batch = FoldedBatch.from_sequences([[1, 2, 3]], pad_multiple_of=512, device="cuda")
    q, k, v = (torch.full((512, heads, 128), float("nan"), dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
    for x in (q, k, v):
        x[:nodes] = 1
    tables = tables_of(batch)._replace(num_nodes=nodes)
    grads = backward(q.clone(), q, k, v, *forward(q, k, v, tables, 0.1), tables, 0.1)
    for x in grads:
        assert x[:nodes].isfinite().all()
        assert (x[nodes:] == 0).all()


def test_nothing_for_no_rows():
    batch = FoldedBatch.from_sequences([], device="cuda")
    assert [x.shape for x in backward(*saved_of(batch, 4, 2, 0.1))] == [(0, 4, 128), (0, 2, 128), (0, 2, 128)]


def test_many_rows_behind_a_long_path(monkeypatch):
    sequences = [[*range(20_000), 10**6 + i, *range(i)] for i in range(0, 600, 7)]
    batch = FoldedBatch.from_sequences(sequences, device="cuda")
    saved = saved_of(batch, 4, 1, 0.09)
    for got, want in zip(backward(*saved), by_triton(monkeypatch, *saved), strict=True):
        assert error_of(got, want.double()) < 1e-2


def test_the_same_bits_on_every_run_and_in_a_graph():
    batch = FoldedBatch.from_sequences(LONG * 3 + TRIES["ragged"] + NESTED_RUNS, device="cuda")
    saved = saved_of(batch, 8, 2, 0.09)
    want = backward(*saved)
    for _ in range(20):
        assert all(map(torch.equal, backward(*saved), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [x * 1 for x in backward(*saved)]  # which read right behind the kernels
    for _ in range(5):
        for x in got:
            x.zero_()
        graph.replay()
        assert all(map(torch.equal, got, want))


def test_refuses_what_it_does_not_take():
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    saved = saved_of(batch, 4, 2, 0.1)
    grad_out, q, k, v, out, logsumexp, *rest = saved
    results = "must have the shape and dtype that the forward gives"
    for arguments, message in (
        (
            (grad_out, q, k, v[..., :64], out, logsumexp),
            "q, k and v must have one dtype, as many rows and one head_dim",
        ),
        ((grad_out[1:], q, k, v, out, logsumexp), f"grad_out {results}"),
        ((grad_out, q, k, v, out.half(), logsumexp), f"out {results}"),
        ((grad_out, q, k, v, out, logsumexp.T), f"logsumexp {results}"),
        ((strided(grad_out), q, k, v, out, logsumexp), "grad_out must be contiguous"),
        ((grad_out, strided(q), k, v, out, logsumexp), "q must lie at addresses that are multiples of 16 bytes"),
        ((*(x[..., :64].contiguous() for x in (grad_out, q, k, v, out)), logsumexp), "head_dim must be 128, got 64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*arguments, *rest)
