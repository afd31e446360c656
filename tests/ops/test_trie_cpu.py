"""The CPU kernels of trie_attention against dense attention in float64, over ancestors found one by one.

They are compiled for three widths of vectors. ATEN_CPU_CAPABILITY chooses one when a process first attends, so the
narrower ones run in processes of their own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import processes
from helpers.batches import NAMED, random_sequences, rounds
from helpers.tries import APART, LONG, NESTED_RUNS, SHAPES, ancestors_of, dense, order_of, strided
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# They have tiles of keys behind each other, blocks of rows of many sequences, and lanes that fill no vector.
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


def grad_of(batch, out):
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grad_out[batch.num_nodes :] = float("nan")
    return grad_out


def attend(batch, tensors, scale, window=0, tables=None):
    order = order_of(batch) if tables is None else tables
    return RADIX.trie_attention(*tensors, *order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes, scale, window)


def attend_backward(batch, tensors, scale, window, grad_out, outputs, tables=None):
    order = order_of(batch) if tables is None else tables
    tables = *order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes
    return RADIX.trie_attention_backward(grad_out, *tensors, *outputs, *tables, scale, window)


def gradients_of(batch, tensors, scale, grad_out):
    return attend_backward(batch, tensors, scale, 0, grad_out, attend(batch, tensors, scale))


def seen(batch, window):
    nodes, depth = batch.num_nodes, order_of(batch)[2]
    sees = ancestors_of(batch)[:nodes, :nodes]
    return sees & (depth[:nodes, None] - depth[:nodes] < window) if window else sees


def check(sequences, shape, dtype, layout=lambda x: x):
    window, scale = shape[4:]
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
    nodes = batch.num_nodes
    tensors = inputs_of(batch, shape, dtype)
    laid_out = [layout(x) for x in tensors]
    out, logsumexp = attend(batch, laid_out, scale, window)
    assert (out.dtype, logsumexp.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    q, k, v = (x[:nodes].double().requires_grad_() for x in tensors)
    sees = seen(batch, window)
    want = dense(q, k, v, sees, scale)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    sums = scores.masked_fill(~sees, float("-inf")).logsumexp(-1)
    for got, exact in ((out[:nodes], want), (logsumexp[:, :nodes], sums)):
        error = (got.double() - exact).norm() / exact.norm().clamp(min=1.0)
        assert error < EPSILON[dtype], (float(error), shape, dtype)
    assert not out[nodes:].any()
    assert not logsumexp[:, nodes:].any()
    grad_out = grad_of(batch, out)
    grads = attend_backward(batch, laid_out, scale, window, layout(grad_out), (layout(out), logsumexp))
    exact_grads = torch.autograd.grad(want, (q, k, v), grad_out[:nodes].double())
    for got, exact in zip(grads, exact_grads, strict=True):
        # A row that sees itself alone has gradients of 0, of numbers as large as grad_out.
        error = (got[:nodes].double() - exact).norm() / exact.norm().clamp(min=0.1 * grad_out[:nodes].double().norm())
        assert error < 3 * EPSILON[dtype], (float(error), shape, dtype)
        assert not got[nodes:].any()


def check_all():
    most_shapes = len(rounds(40))
    for dtype in EPSILON:
        shapes = MORE_SHAPES + SHAPES if dtype == torch.float32 else SHAPES[:3]
        for shape in shapes[:most_shapes]:
            for sequences in TRIES:
                check(sequences, shape, dtype)
            check(TRIES[0], shape, dtype, strided)
    rng = np.random.default_rng(0)
    for _ in rounds(20):
        sequences = random_sequences(rng)
        if any(sequences):
            check(sequences, SHAPES[int(rng.integers(len(SHAPES)))], torch.float64)


@pytest.mark.parametrize("capability", ["default", "avx2", ""])
def test_equals_dense_attention_in_every_width(capability):
    """The widest that the processor has comes last, whatever these tests run under."""
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
            outputs = attend(batch, tensors, 0.125)
            grad_out = grad_of(batch, outputs[0])
            results.append((*outputs, *attend_backward(batch, tensors, 0.125, 0, grad_out, outputs)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_only_those_who_see_it(value):
    """Within one sequence too, a hidden key adds nothing and not 0 times its value."""
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_of_what_is_not_finite(value):
    """A key or value that is not finite reaches the gradients of those who see it, and of all that those see; a query
    or a gradient that is not, those of what it sees."""
    batch = FoldedBatch.from_sequences([*LONG, [7, 8, 9]])
    sees = seen(batch, 0)
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    grad_out = grad_of(batch, tensors[0])
    clean = gradients_of(batch, tensors, 0.25, grad_out)
    for which, row in ((0, 3), (1, 3), (2, 3), (2, 200), (3, 200), (0, 650), (1, 899), (3, batch.num_rows - 2)):
        changed = [x.clone() for x in (*tensors, grad_out)]
        changed[which][row, -1, 5] = value
        grads = gradients_of(batch, changed[:3], 0.25, changed[3])
        queries = sees[:, row] if which in (1, 2) else torch.eye(batch.num_rows, dtype=torch.bool)[row]
        keys = sees[queries].any(0)
        for got, want, reached in zip(grads, clean, (queries, keys, keys), strict=True):
            torch.testing.assert_close(got[~reached], want[~reached])
            assert torch.equal(got[:, 0], want[:, 0])  # of the other head of k and v
        assert not grads[0][queries, -1].isfinite().any(-1).all()


def test_the_gradient_may_have_any_strides():
    """sum() hands back one number, expanded; others transposed."""
    batch = FoldedBatch.from_sequences(NESTED_RUNS[:20])
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    one = torch.ones(()).expand(batch.num_rows, 4, 16)
    across = torch.randn(16, 4, batch.num_rows).permute(2, 1, 0)
    for grad_out in (one, across):
        want = gradients_of(batch, tensors, 0.25, grad_out.contiguous())
        assert all(map(torch.equal, gradients_of(batch, tensors, 0.25, grad_out), want))


def loose(x):
    """Return the same numbers, with a stride that no address may be made of wherever it leads to nothing."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [2**62 if size <= 1 or not x.numel() else stride for size, stride in sizes])


@pytest.mark.parametrize(
    ("sequences", "shape"),
    [([[7]], (4, 2, 8, 8)), ([[1, 2, 3], [1, 2]], (1, 1, 8, 1)), ([], (4, 2, 8, 8)), ([[1, 2], [1, 3]], (4, 2, 8, 0))],
    ids=["one row", "one head", "no rows", "empty values"],
)
def test_a_stride_that_leads_to_nothing_may_be_any_number(sequences, shape):
    """Its product with the size of an element overflows, which UBSan sees and `make sanitize` shows."""
    batch = FoldedBatch.from_sequences(sequences)
    tensors = inputs_of(batch, shape, torch.float32)
    outputs = attend(batch, tensors, 0.25)
    grad_out = grad_of(batch, outputs[0])
    wants = *outputs, *attend_backward(batch, tensors, 0.25, 0, grad_out, outputs)
    loose_tensors, loose_outputs = ([loose(x) for x in some] for some in (tensors, outputs))
    gots = attend(batch, loose_tensors, 0.25)
    gots = *gots, *attend_backward(batch, loose_tensors, 0.25, 0, loose(grad_out), loose_outputs)
    assert all(map(torch.equal, gots, wants))


def test_index_tensors_may_be_int64():
    batch = FoldedBatch.from_sequences(LONG)
    tensors = inputs_of(batch, (4, 2, 16, 16), torch.float32)
    want = attend(batch, tensors, 0.25)
    got = attend(batch, tensors, 0.25, tables=[x.long() for x in order_of(batch)])
    assert all(map(torch.equal, got, want))


if __name__ == "__main__":
    check_all()
