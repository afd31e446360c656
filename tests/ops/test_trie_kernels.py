"""The Triton kernels of the trie layout against dense attention in float64, over ancestors found one by one.

Where there is no GPU, Triton's interpreter runs the same kernels in a process of its own; CUDA tests of `attention`
cover them too.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from helpers import processes
from helpers.batches import NAMED
from helpers.tries import LONG, NESTED_RUNS, SHAPES, ancestors_of, dense, order_of, strided
from radix_ops import FoldedBatch
from radix_ops.ops.trie import TrieTables

SHORT = [[*range(45), i] for i in range(3)] + [[*range(15), 5, *range(20)], list(range(30)), [*range(15), 5]]


def tables_of(batch):
    return TrieTables(*order_of(batch), batch.kv_index, batch.cu_seqlens_q, batch.num_nodes)


def check(sequences, shape, dtype, device, tolerance, layout=lambda x: x):
    from radix_ops.ops import trie_launch

    heads, kv_heads, size, value_size, window, scale = shape
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4, device=device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(batch.num_rows, *shape, generator=generator).to(device, dtype)

    q, k, v = random(heads, size), random(kv_heads, size), random(kv_heads, value_size)
    grad_out = random(heads, value_size)
    for x in (q, k, v, grad_out):
        x[batch.num_nodes :] = float("nan")  # what padding rows hold must not matter
    q, k, v = map(layout, (q, k, v))
    tables = tables_of(batch)
    out, logsumexp = trie_launch.forward(q, k, v, tables, scale, window)
    grads = trie_launch.backward(grad_out, q, k, v, out, logsumexp, tables, scale, window)

    nodes = batch.num_nodes
    sees = ancestors_of(batch)[:nodes, :nodes].to(device)
    if window:
        sees &= tables.depth[:nodes, None] - tables.depth[:nodes] < window
    inputs = [x[:nodes].double().requires_grad_() for x in (q, k, v)]
    want = dense(*inputs, sees, scale)
    wanted = torch.autograd.grad(want, inputs, grad_out[:nodes].double())
    for name, got, exact in zip(("out", "q", "k", "v"), (out, *grads), (want, *wanted), strict=True):
        error = (got[:nodes].double() - exact).norm() / max(exact.norm(), 1.0)
        assert error < tolerance, f"{name}: {float(error)} {shape} {dtype} {sequences}"
        assert (got[nodes:] == 0).all(), f"{name}: padding rows"


def damaged(names, tables, seed):
    """Yield the tables, by name, with one of them wrong, with all wrong here and there, and with too few keys."""
    sound = dict(zip(names, tables, strict=True))
    for name, table in sound.items():
        for value in (-(2**31), 2**31 - 1):
            yield {**sound, name: torch.full_like(table, value)}
    generator = torch.Generator().manual_seed(seed)
    for share in (0.1, 0.5, 1.0):
        for size in (2**31 - 1, 2 * len(sound["row_of"])):
            wrong = {}
            for name, table in sound.items():
                values = torch.randint(-size, size, table.shape, generator=generator, dtype=torch.int32)
                is_wrong = torch.rand(table.shape, generator=generator) < share
                wrong[name] = torch.where(is_wrong.to(table.device), values.to(table.device), table)
            yield wrong
    for count in (0, 3):
        yield {**sound, "kv_index": sound["kv_index"][:count].clone()}


def watch_memory():
    """Make a load or a store of the interpreter raise where it lies in no tensor of its launch."""
    import numpy
    from triton.runtime import interpreter

    from radix_ops.ops import trie_launch

    launch, builder = trie_launch._launch, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    bounds = []

    def watched_launch(kernel, tensors, *arguments):
        for x in tensors:
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                bounds.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        launch(kernel, tensors, *arguments)
        bounds.clear()

    def check_pointers(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(numpy.int64)
        is_inside = numpy.zeros(addresses.shape, bool)
        for start, end in bounds:
            is_inside |= (addresses >= start) & (addresses + size <= end)
        assert is_inside.all(), "memory outside the arguments"

    def watched_load(self, pointers, mask, *arguments):
        check_pointers(pointers, mask)
        return load(self, pointers, mask, *arguments)

    def watched_store(self, pointers, values, mask, *arguments):
        check_pointers(pointers, mask)
        return store(self, pointers, values, mask, *arguments)

    trie_launch._launch, builder.create_masked_load, builder.create_masked_store = (
        watched_launch,
        watched_load,
        watched_store,
    )


def interpret_damaged():
    from radix_ops.ops import trie_launch

    set_small_blocks()
    watch_memory()
    names = "row_of", "leave", "depth", "path", "kv_index"
    # Keys that all queries of a block see, queries that see all keys of a block, and padding rows.
    batch = FoldedBatch.from_sequences([[*range(34), i, *range(7)] for i in range(2)], pad_multiple_of=4)
    q, k, v = (torch.randn(batch.num_rows, heads, 16) for heads in (2, 1, 1))
    tables = tables_of(batch)
    sound = [getattr(tables, name) for name in names]
    for window in (0, 9):
        for wrong in ({}, *damaged(names, sound, window)):
            arguments = tables._replace(**wrong), 0.3, window
            out, logsumexp = trie_launch.forward(q, k, v, *arguments)
            trie_launch.backward(out, q, k, v, out, logsumexp, *arguments)
    print("interpreted")


def set_small_blocks():
    """Set blocks so small that short batches have full ones, masked ones and several."""
    from radix_ops.ops import trie_launch, trie_triton

    for kernel, config in (("forward", (32, 16)), ("backward_q", (32, 16)), ("backward_kv", (16, 32))):
        # The first is Hopper's.
        trie_launch._CONFIGS[getattr(trie_triton, f"{kernel}_kernel")] = [None, (*config, 1, 4)]


def interpret_wide():
    """Check that tables in int64 mean the same as in int32, and numbers too large for int32 are no others."""
    from radix_ops.ops import trie_launch

    set_small_blocks()
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8)
    q, k, v = (torch.randn(batch.num_rows, heads, 16) for heads in (2, 1, 1))
    tables = tables_of(batch)
    names = "leave", "depth", "row_of", "path", "kv_index"
    wide = tables._replace(**{name: getattr(tables, name).long() for name in names})
    want, got = (trie_launch.forward(q, k, v, given, 0.3, 0) for given in (tables, wide))
    assert all(map(torch.equal, got, want))
    backward = trie_launch.backward
    assert all(map(torch.equal, *(backward(want[0], q, k, v, *want, given, 0.3, 0) for given in (wide, tables))))
    for name in names:
        for far in (2**32, -(2**32)):
            table = getattr(wide, name).clone()
            table[1] += far  # which int32 would read as what stood there
            calls = (
                lambda given: trie_launch.forward(q, k, v, given, 0.3, 0),
                lambda given: backward(want[0], q, k, v, *want, given, 0.3, 0),
            )
            for call in calls:
                with pytest.raises(RuntimeError, match=f"{name} must hold numbers that int32 holds"):
                    call(wide._replace(**{name: table}))
    print("interpreted")


def interpret():
    set_small_blocks()
    for shape in SHAPES:
        check(SHORT, shape, torch.float32, "cpu", 1e-5)
    check(SHORT[::-1] + [[7, i, 9] for i in range(9)], SHAPES[0], torch.float32, "cpu", 1e-5)
    check(SHORT, SHAPES[0], torch.float16, "cpu", 3e-3)
    for name in ("nested", "one_token"):
        check(NAMED[name], SHAPES[0], torch.float32, "cpu", 1e-5, strided)
    print("interpreted")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed, which no CPU needs")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_kernels runs them on the GPU; triton 3.6 can't interpret them"
)
@pytest.mark.parametrize("what", ["sound", "damaged", "wide"])
def test_kernels_interpreted(what):
    """Sound tables, in int64 too, give right results; damaged ones no load and no store outside the arguments."""
    result = processes.run_python(__file__, what, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "interpreted\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed, which no CPU needs")
@pytest.mark.parametrize("group", [1, 7, 40])
def test_more_pairs_than_int32_counts_are_refused(group, monkeypatch):
    """They are refused before anything is launched: the tensors here are views of one row."""
    from radix_ops.ops import trie_launch

    tables = tables_of(FoldedBatch.from_sequences([[1]]))
    launched = []
    monkeypatch.setattr(trie_launch, "_launch", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(trie_launch, "_contiguous", lambda x: x)
    most = 2**31 // group - 256
    for rows in (most, most + 1):
        q, k = (torch.zeros(1, heads, 16, device="meta").expand(rows, -1, -1) for heads in (group, 1))
        sums = torch.zeros(group, 1, device="meta").expand(-1, rows)
        calls = {
            "trie_attention": lambda q=q, k=k: trie_launch.forward(q, k, k, tables, 1.0, 0),
            "trie_attention_backward": lambda q=q, k=k, sums=sums: trie_launch.backward(
                q, q, k, k, q, sums, tables, 1.0, 0
            ),
        }
        for op, call in calls.items():
            if rows == most:
                call()
                continue
            message = (
                rf"radix::{op}: the Triton kernels take at most {most} rows with {group} query heads .* got {rows}"
            )
            with pytest.raises(RuntimeError, match=message):
                call()
    assert len(launched) == 3


@pytest.mark.cuda
@pytest.mark.parametrize(
    "shape", [*SHAPES, (4, 2, 128, 128, 0, 0.09), (4, 1, 256, 256, 200, 0.06), (2, 2, 80, 80, 0, 1)]
)
def test_kernels(shape):
    for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        for sequences in (LONG, LONG[::-1] + NESTED_RUNS, NAMED["nested"], NAMED["one_token"]):
            check(sequences, shape, dtype, "cuda", tolerance)
        check(LONG, shape, dtype, "cuda", tolerance, strided)


@pytest.mark.cuda
def test_results_are_the_same_bits_on_every_run():
    batch = FoldedBatch.from_sequences(LONG * 3 + NESTED_RUNS, device="cuda")
    runs = batch.cu_seqlens_q, batch.cu_seqlens_k
    order = torch.ops.radix.trie_order(*runs, batch.kv_index, batch.num_rows)
    q, k, v = (torch.randn(batch.num_rows, h, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for _ in range(5):
        tables = *order, batch.kv_index, runs[0], batch.num_nodes
        out, _ = torch.ops.radix.trie_attention(*inputs, *tables, 0.125)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize(("window", "size"), [(0, 64), (40, 64), (0, 128)])
def test_damaged_tables_change_nothing_but_results(window, size):
    batch = FoldedBatch.from_sequences(LONG + NESTED_RUNS, pad_multiple_of=4, device="cuda")
    names = "enter", "leave", "depth", "row_of", "path", "kv_index", "cu_seqlens_q"
    sound = *order_of(batch), batch.kv_index, batch.cu_seqlens_q
    inputs = [torch.randn(batch.num_rows, heads, size, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]

    def compute(tables):
        arguments = *tables.values(), batch.num_nodes, 0.125, window
        out, logsumexp = torch.ops.radix.trie_attention(*inputs, *arguments)
        grads = torch.ops.radix.trie_attention_backward(out, *inputs, out, logsumexp, *arguments)
        torch.cuda.synchronize()
        return out, logsumexp, *grads

    want = compute(dict(zip(names, sound, strict=True)))
    copies = [x.clone() for x in inputs]
    for tables in damaged(names, sound, window):
        before = [x.clone() for x in tables.values()]
        compute(tables)
        for got, copy in zip((*inputs, *tables.values()), (*copies, *before), strict=True):
            assert torch.equal(got, copy)
    for got, exact in zip(compute(dict(zip(names, sound, strict=True))), want, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.cuda
def test_offsets_past_32_bits():
    """Heads lie 2^31 elements apart."""
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((batch.num_rows, 2, 16), (16, 2**31, 1))
    near = torch.randn(far.shape, dtype=torch.bfloat16, device="cuda")
    far.copy_(near)
    from radix_ops.ops import trie_launch

    arguments = tables_of(batch), 0.25, 0
    want = trie_launch.forward(near, near, near, *arguments)
    for q, k, v in ((far, near, near), (near, far, near), (near, near, far)):
        for got, exact in zip(trie_launch.forward(q, k, v, *arguments), want, strict=True):
            assert torch.equal(got, exact)


if __name__ == "__main__":
    {"sound": interpret, "damaged": interpret_damaged, "wide": interpret_wide}[sys.argv[1]]()
