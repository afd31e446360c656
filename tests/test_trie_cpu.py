"""The CPU kernel of trie_attention against dense attention in float64, over ancestors found one by one.

It is compiled for three widths of vectors. ATEN_CPU_CAPABILITY chooses one when a process first attends, so the
narrower ones run in processes of their own.
"""

from __future__ import annotations

import numpy as np
import processes
import pytest
import torch
from batches import NAMED, random_sequences, rounds
from test_trie import APART, LONG, NESTED_RUNS, ancestors_of, order_of
from test_trie_kernels import SHAPES, dense, strided

from radix_ops import FoldedBatch

RADIX = torch.ops.radix
EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# Tiles of keys behind each other, blocks of rows of many sequences, and lanes that fill no vector.
TRIES = [
    [[*range(225), i] for i in range(3)] + [[*range(75), 5, *range(100)], list(range(160)), [*range(75), 5]],
    NESTED_RUNS[:60],
    NESTED_RUNS[40::-1] + APART[:3],
    NAMED["nested"],
    NAMED["one_token"],
]
MORE_SHAPES = [(3, 3, 5, 1, 0, 1.0), (100, 1, 8, 8, 70, 0.5), (9, 3, 64, 64, 0, 0.125), (2, 1, 200, 136, 0, 0.07)]


def inputs_of(batch, shape, dtype):
    heads, kv_heads, size, value_size, *_ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, size), (kv_heads, size), (kv_heads, value_size)
    tensors = [torch.randn(batch.num_rows, *size, generator=generator).to(dtype) for size in sizes]
    for x in tensors:
        x[batch.num_nodes :] = float("nan")  # what padding rows hold must not matter
    return tensors


def attend(batch, tensors, scale, window=0, tables=None):
    order = order_of(batch) if tables is None else tables
    return RADIX.trie_attention(*tensors, *order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes, scale, window)


def seen(batch, window):
    nodes, depth = batch.num_nodes, order_of(batch)[2]
    sees = ancestors_of(batch)[:nodes, :nodes]
    return sees & (depth[:nodes, None] - depth[:nodes] < window) if window else sees


def check(sequences, shape, dtype, layout=lambda x: x):
    window, scale = shape[4:]
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
    nodes = batch.num_nodes
    tensors = inputs_of(batch, shape, dtype)
    out, logsumexp = attend(batch, [layout(x) for x in tensors], scale, window)
    assert (out.dtype, logsumexp.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    q, k, v = (x[:nodes].double() for x in tensors)
    sees = seen(batch, window)
    want = dense(q, k, v, sees, scale)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    sums = scores.masked_fill(~sees, float("-inf")).logsumexp(-1)
    for got, exact in ((out[:nodes], want), (logsumexp[:, :nodes], sums)):
        error = (got.double() - exact).norm() / exact.norm().clamp(min=1.0)
        assert error < EPSILON[dtype], (float(error), shape, dtype)
    assert not out[nodes:].any()
    assert not logsumexp[:, nodes:].any()


def check_all():
    for dtype in EPSILON:
        for shape in SHAPES + MORE_SHAPES if dtype.itemsize > 2 else SHAPES[:3]:
            for sequences in TRIES:
                check(sequences, shape, dtype)
            check(TRIES[0], shape, dtype, strided)
    rng = np.random.default_rng(0)
    for _ in rounds(50):
        sequences = random_sequences(rng)
        if any(sequences):
            check(sequences, SHAPES[int(rng.integers(len(SHAPES)))], torch.float64)


def test_equals_dense_attention():
    check_all()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_equals_dense_attention_on_older_processors(capability):
    run = processes.run_python(__file__, ATEN_CPU_CAPABILITY=capability)
    assert run.returncode == 0, run.stderr


def test_a_wide_range_of_scores():
    """Sums fade by factors down to 0, where a larger score comes tiles later, and all but one weight vanish."""
    batch = FoldedBatch.from_sequences(LONG)
    sees = seen(batch, 0)
    for dtype in (torch.float32, torch.float64):
        q, k, v = inputs_of(batch, (2, 1, 8, 8), dtype)
        k *= torch.linspace(0.1, 60, batch.num_rows, dtype=dtype)[:, None, None]
        out, _ = attend(batch, (q, k, v), 1.0)
        want = dense(q.double(), k.double(), v.double(), sees, 1.0)
        assert (out.double() - want).norm() / want.norm() < 30 * EPSILON[dtype]
    huge = torch.full_like(k, -1e200)
    out, logsumexp = attend(batch, (q.abs(), huge, v), 1e200)
    assert out.isnan().all()
    assert not logsumexp.isfinite().any()


def test_the_same_bits_for_any_number_of_threads():
    batch = FoldedBatch.from_sequences(LONG * 3 + NESTED_RUNS + APART)
    tensors = inputs_of(batch, (6, 2, 64, 64), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(attend(batch, tensors, 0.125))
    finally:
        torch.set_num_threads(threads)
    for out, logsumexp in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(logsumexp, results[0][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_only_those_who_see_it(value):
    """Rows, within one sequence too: a hidden key adds nothing and not 0 times its value."""
    batch = FoldedBatch.from_sequences([*LONG, [7, 8, 9]])
    sees = seen(batch, 0)
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    clean, _ = attend(batch, tensors, 0.25)
    for which, row in ((1, 3), (2, 3), (2, 200), (2, 650), (1, 899), (2, batch.num_rows - 2)):
        changed = [x.clone() for x in tensors]
        changed[which][row, 1, 5] = value
        out, _ = attend(batch, changed, 0.25)
        torch.testing.assert_close(out[~sees[:, row]], clean[~sees[:, row]])
        assert torch.equal(out[:, :2], clean[:, :2])  # of the other head of k and v
        differs = out[:, 2:, 5] if which == 2 else out[:, 2:].sum(-1)
        assert (differs[sees[:, row]] != clean[sees[:, row], 2:, 5]).any()


def test_index_tensors_may_be_int64():
    batch = FoldedBatch.from_sequences(LONG)
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    want = attend(batch, tensors, 0.25)
    got = attend(batch, tensors, 0.25, tables=[x.long() for x in order_of(batch)])
    assert all(map(torch.equal, got, want))


def test_refuses_tables_that_lead_outside():
    batch = FoldedBatch.from_sequences(LONG)
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    order = order_of(batch)
    for position, name in enumerate(("enter", "leave", "depth", "row_of", "path")):
        for value in (-1, 2**31 - 1):
            tables = [x.clone() for x in order]
            tables[position][7] = value
            with pytest.raises(RuntimeError, match=rf"^radix::trie_attention: {name}\[7\] is {value}, out of range"):
                attend(batch, tensors, 0.25, tables=tables)
    with pytest.raises(RuntimeError, match=r"row_of must be the inverse of enter, but enter\[row_of\[1\]\] is 0$"):
        attend(batch, tensors, 0.25, tables=[*order[:3], torch.zeros_like(order[3]), order[4]])
    with pytest.raises(RuntimeError, match=r"leave\[0\] must be more than enter\[0\], 0, got 0$"):
        attend(batch, tensors, 0.25, tables=[order[0], torch.zeros_like(order[1]), *order[2:]])
    kv_index = batch.kv_index.clone()
    kv_index[3] = batch.num_rows
    with pytest.raises(RuntimeError, match=r"^radix::trie_attention: kv_index\[3\] is \d+, out of range"):
        RADIX.trie_attention(*tensors, *order, kv_index, batch.cu_seqlens_q, batch.num_nodes, 0.25)
    with pytest.raises(RuntimeError, match=r"path and depth of row \d+ lead past the end of kv_index$"):
        RADIX.trie_attention(*tensors, *order, batch.kv_index[:-5], batch.cu_seqlens_q, batch.num_nodes, 0.25)
    with pytest.raises(RuntimeError, match="num_nodes must be from 0 to the [0-9]+ rows of q, got -1$"):
        RADIX.trie_attention(*tensors, *order, batch.kv_index, batch.cu_seqlens_q, -1, 0.25)
    with pytest.raises(RuntimeError, match=r"path must have as many rows as q, \d+, got 3$"):
        RADIX.trie_attention(
            *tensors, *order[:4], order[4][:3], batch.kv_index, batch.cu_seqlens_q, batch.num_nodes, 0.25
        )


def test_refuses_heads_that_do_not_fit():
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]])
    rows = batch.num_rows
    q, k = torch.zeros(rows, 4, 8), torch.zeros(rows, 2, 8)
    for tensors, message in (
        ((q[0], k, k), r"q must have shape \[rows, heads, head_dim\], got \[4, 8\]"),
        ((q, k.double(), k), "q, k and v must have one dtype, got Float for q and Double for k"),
        ((q, k[1:], k), "k must have as many rows as q, 3, got 2"),
        ((q, k, k[:, :1]), r"k and v must have equal rows and heads, got \[3, 2, 8\] and \[3, 1, 8\]"),
        ((q, k[..., :4], k), "q and k must have one head_dim, got 8 and 4"),
        ((q[:, :3], k, k), "the 3 heads of q must be a multiple of the 2 heads of k and v"),
        ((q[..., :0], k[..., :0], k), "q must have at least one head and a head_dim of at least 1"),
        ((q.int(), k.int(), k.int()), "q must be float32, float64, bfloat16 or float16, got Int"),
    ):
        with pytest.raises(RuntimeError, match=f"^radix::trie_attention: {message}"):
            attend(batch, tensors, 1.0)
    with pytest.raises(RuntimeError, match=r"sliding_window must be at least 0 \(0: none\), got -1$"):
        attend(batch, (q, k, k), 1.0, -1)


if __name__ == "__main__":
    check_all()
