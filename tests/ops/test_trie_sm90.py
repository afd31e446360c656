"""The trie layout's forward kernel for Hopper against dense attention in float64 and the Triton kernel beside it."""

from __future__ import annotations

import pytest
import torch

from helpers.hopper import TRIES, batch_of, marks_of, ops_called, poison_memory, random_of, tables_of
from helpers.tries import LONG, NESTED_RUNS, ancestors_of, dense, strided
from radix_ops import FoldedBatch

pytestmark = marks_of("radix::trie_attention_sm90")

# Query heads, key/value heads, head_dim, sliding window, scale.
SHAPES = [
    (2, 2, 128, 0, 0.09),
    (4, 2, 128, 0, 0.09),
    (4, 1, 128, 0, -0.09),
    (8, 1, 128, 0, 0.09),
    (16, 1, 128, 0, 0.09),
    (7, 1, 128, 0, 0.09),  # a group that does not divide the block
    (40, 1, 128, 0, 0.09),  # a group that takes several blocks
    (4, 2, 64, 0, 0.125),
    (4, 2, 128, 40, 0.09),
    (4, 2, 128, 200, 0.09),
    (8, 2, 64, 5, 0.125),
    (4, 2, 128, 1, 0.09),
    (4, 2, 128, 2**31 - 1, 0.0),
]


def run(q, k, v, tables, scale, window):
    poison_memory(q)
    rows = tables.leave, tables.depth, tables.row_of, tables.path
    return torch.ops.radix.trie_attention_sm90(q, k, v, *rows, tables.kv_index, tables.num_nodes, scale, window)


def by_triton(monkeypatch, *arguments):
    from radix_ops.ops import trie_launch

    with monkeypatch.context() as patch:
        patch.setattr(trie_launch, "_is_for_hopper", lambda q, v, window: False)
        return trie_launch.forward(*arguments)


@pytest.mark.parametrize("name", TRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_those_of_dense_attention(name, dtype):
    batch = batch_of(name)
    tables, nodes = tables_of(batch), batch.num_nodes
    path = ancestors_of(batch)[:nodes, :nodes].cuda()
    for heads, kv_heads, size, window, scale in SHAPES:
        q, k, v = random_of(batch, heads, kv_heads, size, dtype)
        sees = path & (tables.depth[:nodes, None] - tables.depth[:nodes] < window) if window else path
        exact = dense(*(x[:nodes].double() for x in (q, k, v)), sees, scale)
        scores = torch.einsum(
            "qhd,khd->hqk", q[:nodes].double(), k[:nodes].double().repeat_interleave(heads // kv_heads, 1)
        )
        sums = (scores * scale).masked_fill_(~sees, float("-inf")).logsumexp(-1) / torch.log(torch.tensor(2.0))
        for layout in (
            lambda x: x,
            lambda x: x.repeat(1, 1, 2)[..., : x.shape[2]],
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            out, logsumexp = run(*map(layout, (q, k, v)), tables, scale, window)
            error = (out[:nodes].double() - exact).norm() / exact.norm()
            assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4), (
                f"{float(error)} {heads, kv_heads, size, window}"
            )
            assert (logsumexp[:, :nodes] - sums).abs().max() < 1e-3
            assert (out[nodes:] == 0).all()
            assert (logsumexp[:, nodes:] == 0).all()


def test_it_is_the_forward_of_trie_attention_where_it_fits(monkeypatch):
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    tables = tables_of(batch)
    for size, value_size, window, is_taken in (
        (128, 128, 0, True),
        (128, 128, 40, False),
        (128, 64, 0, False),
        (64, 64, 0, False),
        (80, 80, 0, False),
    ):
        q, k, _ = random_of(batch, 4, 2, size)
        v = k[..., :value_size]
        got, ops = ops_called(lambda: torch.ops.radix.trie_attention(q, k, v, *tables, 0.1, window))  # noqa: B023
        want = by_triton(monkeypatch, q, k, v, tables, 0.1, window)
        assert ("radix::trie_attention_sm90" in ops) == is_taken
        torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)


def test_rows_off_alignment_are_copied():
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    inputs = random_of(batch, 4, 2, 128)
    want = torch.ops.radix.trie_attention(*inputs, *tables_of(batch), 0.1)
    got = torch.ops.radix.trie_attention(*map(strided, inputs), *tables_of(batch), 0.1)
    assert all(map(torch.equal, got, want))


def test_gradients_of_its_results_are_those_of_dense_attention():
    batch = FoldedBatch.from_sequences(TRIES["ragged"], device="cuda")
    inputs = [x.requires_grad_() for x in random_of(batch, 4, 2, 128)]
    out, _ = torch.ops.radix.trie_attention(*inputs, *tables_of(batch), 0.09)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, ancestors_of(batch).cuda(), 0.09)
    weights = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, weights),
        torch.autograd.grad(exact, exact_inputs, weights.double()),
        strict=True,
    ):
        assert (got.double() - want).norm() / want.norm() < 1e-2


def test_paths_longer_than_16_bits():
    length, answers = 70_000, 3
    batch = FoldedBatch.from_sequences([[*range(length), 10**6, i] for i in range(answers)], device="cuda")
    q, k, v = random_of(batch, 4, 2, 128)
    out, _ = run(q, k, v, tables_of(batch), 0.09, 0)
    for i, row in enumerate((length + 1, length + 2, length + 3)):  # the last rows of the answers
        on_path = [*range(length + 1), length + 1 + i]
        exact = dense(
            q[row : row + 1].double(), k[on_path].double(), v[on_path].double(), torch.tensor(True).cuda(), 0.09
        )
        assert (out[row] - exact[0]).norm() / exact.norm() < 6e-3


@pytest.mark.parametrize("nodes", [0, 3])
def test_rows_behind_the_nodes_are_zeros(nodes):
    batch = FoldedBatch.from_sequences([[1, 2, 3]], pad_multiple_of=512, device="cuda")
    inputs = [torch.full((512, heads, 128), float("nan"), dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)]
    for x in inputs:
        x[:nodes] = 1
    out, logsumexp = run(*inputs, tables_of(batch)._replace(num_nodes=nodes), 0.1, 0)
    assert (out[:nodes] == 1).all()
    assert (out[nodes:] == 0).all()
    assert (logsumexp[:, nodes:] == 0).all()


def test_the_same_bits_on_every_run_and_in_a_graph():
    batch = FoldedBatch.from_sequences(LONG * 3 + TRIES["ragged"] + NESTED_RUNS, device="cuda")
    inputs, tables = random_of(batch, 8, 2, 128), tables_of(batch)
    want = run(*inputs, tables, 0.09, 0)
    for _ in range(5):
        assert all(map(torch.equal, run(*inputs, tables, 0.09, 0), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(*inputs, tables, 0.09, 0)
    for x in got:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, got, want))


def test_refuses_what_it_does_not_take():
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    tables = tables_of(batch)
    q, k, v = random_of(batch, 4, 2, 128)
    for arguments, message in (
        ((q, k, v[..., :64]), "q, k and v must have one dtype, as many rows and one head_dim"),
        ((q, k[1:], v), "as many rows"),
        ((q.float(), k, v), "q must be bfloat16 or float16, got Float"),
        ((q[..., :32], k[..., :32], v[..., :32]), "head_dim must be 64 or 128, got 32"),
        ((q[:, :3], k, v), "the heads of q must be a multiple of those of k and v, got 3, 2 and 2"),
        ((strided(q), k, v), "q must lie at addresses that are multiples of 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*arguments, tables, 0.1, 0)
    with pytest.raises(RuntimeError, match="row_of must be int32 and contiguous"):
        run(q, k, v, tables._replace(row_of=tables.row_of.long()), 0.1, 0)
    with pytest.raises(RuntimeError, match=rf"path must have as many rows as q, {batch.num_rows}, got 3"):
        run(q, k, v, tables._replace(path=tables.path[:3]), 0.1, 0)
    with pytest.raises(RuntimeError, match="num_nodes must be from 0 to"):
        run(q, k, v, tables._replace(num_nodes=batch.num_rows + 1), 0.1, 0)
