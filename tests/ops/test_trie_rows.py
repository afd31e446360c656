"""Attention of some rows alone over a trie: the kernels against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from helpers import processes
from helpers.tries import APART, LONG, NESTED_RUNS, SHAPES, ancestors_of, dense, order_of, strided
from radix_ops import FoldedBatch
from radix_ops.ops import trie_rows

RADIX = torch.ops.radix
EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TRIES = [LONG, NESTED_RUNS[:60], NESTED_RUNS[40::-1] + APART[:3], [[1, 2, 3], [1, 2], [4]]]


def tables_of(batch):
    return *order_of(batch), batch.kv_index, batch.cu_seqlens_q, batch.num_nodes


def inputs_of(batch, shape, dtype):
    """Return the queries, keys and values of all rows; padding rows hold NaN, which must not matter."""
    heads, kv_heads, size, value_size, *_ = shape
    sizes = (heads, size), (kv_heads, size), (kv_heads, value_size)
    tensors = [torch.randn(batch.num_rows, *size).to(dtype) for size in sizes]
    for x in tensors:
        x[batch.num_nodes :] = float("nan")
    return tensors


def rows_of(batch, count):
    """Draw rows in any order, some of them twice and some of padding."""
    return torch.cat([torch.randint(batch.num_rows, (count,)), torch.tensor([batch.num_rows - 1, 0, 0])])


def dense_of(batch, tensors, rows, scale, window):
    nodes, depth = batch.num_nodes, order_of(batch)[2]
    sees = ancestors_of(batch)[:nodes, :nodes]
    if window:
        sees = sees & (depth[:nodes, None] - depth[:nodes] < window)
    want = dense(*(x[:nodes] for x in tensors), sees, scale)
    padding = want.new_zeros(batch.num_rows - nodes, *want.shape[1:])
    return torch.cat([want, padding])[rows]


def check(sequences, shape, dtype, count, layout=lambda x: x):
    window, scale = shape[4:]
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
    tensors, rows = inputs_of(batch, shape, dtype), rows_of(batch, count)
    q, k, v = layout(tensors[0][rows]), layout(tensors[1]), layout(tensors[2])
    got = RADIX.trie_attention_rows(q, k, v, rows, *tables_of(batch), scale, window)
    assert (got.dtype, got.shape) == (dtype, (len(rows), shape[0], shape[3]))
    want = dense_of(batch, [x.double() for x in tensors], rows, scale, window)
    error = (got.double() - want).norm() / want.norm().clamp(min=1.0)
    assert error < EPSILON[dtype], (float(error), shape, dtype, count)
    assert not got[rows >= batch.num_nodes].any()


def check_all():
    torch.manual_seed(0)
    for shape in SHAPES:
        for sequences in TRIES:
            for count in (0, 3, 40, 300):
                check(sequences, shape, torch.float32, count)
        for dtype in EPSILON:
            check(LONG, shape, dtype, 50, strided)


@pytest.mark.parametrize("capability", ["default", "avx2", ""])
def test_equals_dense_attention_in_every_width(capability):
    """The widest that the processor has comes last, whatever these tests run under."""
    run = processes.run_python(__file__, ATEN_CPU_CAPABILITY=capability)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_are_those_of_dense_attention(window, device):
    batch = FoldedBatch.from_sequences(NESTED_RUNS[30::-1] + APART[:2], pad_multiple_of=8)
    shape = (4, 2, 8, 16, window, 0.3)
    tensors = [x.requires_grad_() for x in inputs_of(batch, shape, torch.float64)]
    rows = torch.randperm(batch.num_rows)[:20]
    rows = torch.cat([rows, rows[:3], rows[:1], torch.tensor([batch.num_rows - 1])])
    grad_out = torch.randn(len(rows), 4, 16, dtype=torch.float64)
    want = torch.autograd.grad(dense_of(batch, tensors, rows, 0.3, window), tensors, grad_out)
    moved = [x.detach().to(device).requires_grad_() for x in tensors]
    q, k, v = moved
    there = rows.to(device)
    tables = *(x.to(device) for x in tables_of(batch)[:-1]), batch.num_nodes
    # Padding rows are NaN, and so is what their queries take.
    out = RADIX.trie_attention_rows(RADIX.gather(q, there), k, v, there, *tables, 0.3, window)
    got = torch.autograd.grad(out, moved, grad_out.to(device))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w.nan_to_num())


def test_the_same_bits_for_any_number_of_threads():
    batch = FoldedBatch.from_sequences(LONG * 3 + NESTED_RUNS + APART)
    q, k, v = inputs_of(batch, (6, 2, 64, 64), torch.float32)
    rows, threads, results = rows_of(batch, 100), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(RADIX.trie_attention_rows(q[rows], k, v, rows, *tables_of(batch), 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("window", [0, 3])
def test_the_way_of_many_queries_on_cuda(window):
    """Its parts run on the CPU too: queries at their rows among zeros, and attention over all rows."""
    batch = FoldedBatch.from_sequences(NESTED_RUNS[30::-1] + APART[:2], pad_multiple_of=8)
    tensors = [x.nan_to_num() for x in inputs_of(batch, (4, 2, 8, 16), torch.float64)]
    rows = rows_of(batch, 50)
    got = trie_rows.trie_attention_rows(tensors[0][rows], *tensors[1:], rows, *tables_of(batch), 0.3, window)
    torch.testing.assert_close(got, dense_of(batch, tensors, rows, 0.3, window))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_those_who_see_it(value):
    batch = FoldedBatch.from_sequences([*LONG, [7, 8, 9]])
    q, k, v = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    rows = torch.cat([rows_of(batch, 60), torch.tensor([660, 899])])
    clean = RADIX.trie_attention_rows(q[rows], k, v, rows, *tables_of(batch), 0.25)
    for x, row in ((k, 3), (v, 200), (v, 650), (k, 899)):
        changed = x.clone()
        changed[row, 1, 5] = value
        given = (changed, v) if x is k else (k, changed)
        out = RADIX.trie_attention_rows(q[rows], *given, rows, *tables_of(batch), 0.25)
        sees = ancestors_of(batch)[rows, row]
        torch.testing.assert_close(out[~sees], clean[~sees])
        assert sees.any()
        assert (out[sees] != clean[sees]).any()


def test_indices_may_be_int64_or_int32():
    batch = FoldedBatch.from_sequences(LONG)
    q, k, v = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    rows = rows_of(batch, 20)
    tables = tables_of(batch)
    want = RADIX.trie_attention_rows(q[rows], k, v, rows, *tables, 0.25)
    wide = [x.long() if isinstance(x, torch.Tensor) else x for x in tables]
    assert torch.equal(RADIX.trie_attention_rows(q[rows], k, v, rows.int(), *wide, 0.25), want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": torch.tensor([0, 7])}, "rows[1] is 7, out of range for 6 rows (allowed: 0 to 5)"),
        ({"rows": torch.tensor([-1, 0])}, "rows[0] is -1, out of range for 6 rows (allowed: 0 to 5)"),
        ({"rows": torch.tensor([0])}, "rows must hold one row for each of the 2 queries, got 1"),
        ({"rows": torch.tensor([0.0, 1.0])}, "rows must be int32 or int64, got "),
        ({"rows": torch.tensor([[0, 1]])}, "rows must have 1 dimension, got shape [1, 2]"),
        ({"v": torch.ones(5, 1, 8)}, "k and v must have equal rows and heads, got [6, 1, 8] and [5, 1, 8]"),
        ({"depth": torch.tensor([0, 1])}, "depth must have as many rows as k, 6, got 2"),
        ({"num_nodes": 7}, "num_nodes must be from 0 to the 6 rows of k, got 7"),
    ],
)
def test_wrong_arguments_are_refused(changed, message, device):
    if device == "cuda" and "out of range" in message:
        pytest.skip("a device assert, after which a process can't go on")
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4, 5], [6]])
    names = "q", "k", "v", "rows", "enter", "leave", "depth", "row_of", "path", "kv_index", "cu_q", "num_nodes"
    k = torch.ones(batch.num_rows, 1, 8)
    arguments = dict(zip(names, (torch.ones(2, 2, 8), k, k, torch.tensor([0, 3]), *tables_of(batch)), strict=True))
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (arguments | changed).values()]
    with pytest.raises(RuntimeError) as error:
        RADIX.trie_attention_rows(*given, 1.0)
    assert str(error.value).startswith(f"radix::trie_attention_rows: {message}")


if __name__ == "__main__":
    check_all()
