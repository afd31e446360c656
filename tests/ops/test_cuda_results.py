"""Results of the ops on CUDA: those of the CPU, the same bits on every run, and nothing that was in memory before."""

from __future__ import annotations

import os

import numpy as np
import pytest
import radix_mlp
import torch

from helpers.batches import NAMED, pack, rounds, to
from helpers.cuda_calls import assert_same, calls, fold_arguments, sample_batch
from radix_ops import FoldedBatch, compat

pytestmark = pytest.mark.cuda
RADIX = torch.ops.radix


def test_fold_plan_equals_the_cpu_bit_for_bit():
    for seed in rounds(1500):
        arguments = fold_arguments(seed)
        assert_same(RADIX.fold_plan(*to("cuda", arguments)), RADIX.fold_plan(*arguments))


@pytest.mark.parametrize(
    ("count", "length", "prefix"),
    [(100_000, 3, 1), (3, 100_000, 60_000), (700, 300, 200), (512, 100, 60), (513, 100, 60)],
)
def test_fold_plan_of_wide_and_deep_batches_equals_the_cpu(count, length, prefix):
    ids = torch.randint(0, 50_000, (count, length))
    ids[:, :prefix] = ids[torch.randint(0, 3, (count,)), :prefix]
    arguments = (ids.flatten(), torch.arange(length).repeat(count), torch.arange(count + 1) * length, 128)
    assert_same(RADIX.fold_plan(*to("cuda", arguments)), RADIX.fold_plan(*arguments))


@pytest.mark.parametrize("count", [1, 300, 1023, 1024, 1025, 3000])
def test_orders_of_few_and_of_many_runs_equal_those_of_the_cpu(count):
    rng = np.random.default_rng(count)
    chain = [[*range(i // 3), 5000 + i] for i in range(count)]
    bushy = [[*rng.integers(0, 3, rng.integers(0, 8)).tolist(), 10 + i] for i in range(count)]
    for sequences in (chain, bushy):
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=7)
        assert len(batch.run_sequences) == count
        arguments = batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index
        want = RADIX.trie_order(*arguments, batch.num_rows)
        assert_same(RADIX.trie_order(*to("cuda", arguments), batch.num_rows), want)


@pytest.mark.parametrize("name", NAMED)
def test_folded_batches_made_on_cuda_equal_those_of_the_cpu(name):
    want = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
    got = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4, device="cuda")
    assert got.input_ids.is_cuda
    assert vars(got.to("cpu")).keys() == vars(want).keys()
    for field, value in vars(want).items():
        moved = getattr(got, field)
        assert torch.equal(moved.cpu(), value) if isinstance(value, torch.Tensor) else moved == value, field


def test_padded_batches_folded_on_cuda_equal_those_of_the_cpu():
    rng = np.random.default_rng(0)
    for _ in rounds(200):
        count, width = int(rng.integers(0, 9)), int(rng.integers(0, 40))
        ids = torch.from_numpy(rng.integers(0, 2, (count, width)))
        start, end = np.sort(rng.integers(0, width + 1, (2, count, 1)), axis=0)
        mask = torch.from_numpy((np.arange(width) >= start) & (np.arange(width) < end))
        positions = torch.from_numpy(rng.integers(0, 3, (count, width))) if rng.integers(2) else None
        want = FoldedBatch.from_padded(ids, mask, positions, pad_multiple_of=4)
        given = [None if x is None else x.cuda() for x in (ids, mask, positions)]
        got = FoldedBatch.from_padded(*given, pad_multiple_of=4)
        for field, value in vars(want).items():
            moved = getattr(got, field)
            assert torch.equal(moved.cpu(), value) if isinstance(value, torch.Tensor) else moved == value, field


def test_compat_folds_on_the_device():
    for seed in rounds(100):
        ids, positions, cu_seqlens, multiple = fold_arguments(seed)
        arguments = [x.to("cuda", torch.int32) for x in (ids, positions, cu_seqlens)]
        got = compat.compute_fold_and_scatter_torch(*arguments, multiple)
        want = radix_mlp.compute_fold_and_scatter_torch(*arguments, multiple)
        for g, w in zip(got, want, strict=True):
            assert g.is_cuda
            assert g.dtype == torch.int32
            assert torch.equal(g, w.to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int16])
@pytest.mark.parametrize("width", [64, 63])
def test_sums_of_up_to_128_rows_equal_those_of_the_cpu_bit_for_bit(dtype, width):
    batch = sample_batch(count=128)
    src = (torch.randn(batch.num_tokens, width) * 9).to(dtype)
    on_cpu = [x.cpu() for x in (batch.unfold_index, batch.unfold_indptr, batch.unfold_members)]
    want = RADIX.scatter_add.csr(src, *on_cpu, batch.num_rows)
    inverse = (batch.unfold_index, batch.unfold_indptr, batch.unfold_members)
    assert torch.equal(RADIX.scatter_add.csr(src.cuda(), *inverse, batch.num_rows).cpu(), want)
    assert torch.equal(RADIX.scatter_add(src.cuda(), batch.unfold_index, batch.num_rows).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_bits_on_every_run(dtype):
    batch = sample_batch(count=400, prefix=40, own=3)
    for name, function, src in calls(batch, dtype, width=136):
        want = function(src)
        for _ in range(20):
            assert_same(function(src), want)
        single = name.replace("_kv", "").removesuffix(".csr")
        assert_same(want[:1], next(f(src) for n, f, _ in calls(batch, dtype, width=136) if n == single))


def test_folds_are_the_same_on_every_run():
    ids = torch.randint(0, 2, (3000, 8))
    arguments = to("cuda", (ids.flatten(), torch.arange(8).repeat(3000), torch.arange(3001) * 8))
    want = RADIX.fold_plan(*arguments)
    for _ in range(20):
        assert_same(RADIX.fold_plan(*arguments), want)


reuses_memory = pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="needs an allocator that gives freed memory again"
)


def poisoned(function):
    """Check a function whose new tensors take the memory of freed ones that held NaN and large integers."""
    first = function()
    torch.cuda.synchronize()
    shapes = [(x.numel(), x.element_size()) for x in first if x.is_cuda]
    before = [x.clone() for x in first]
    del first
    garbage = [torch.full((max(n * size, 1),), 255, dtype=torch.uint8, device="cuda") for n, size in shapes * 3]
    # The allocator joins and splits freed blocks, of 512 bytes at least.
    spans = [(x.data_ptr(), x.data_ptr() + -(-len(x) // 512) * 512) for x in garbage]
    del garbage
    second = function()
    for x in second:
        assert not x.is_cuda or not x.numel() or any(begin <= x.data_ptr() < end for begin, end in spans)
    assert_same(second, before)


@reuses_memory
@pytest.mark.parametrize("width", [1, 63, 64, 4096])
def test_outputs_hold_nothing_that_was_in_memory_before(width):
    batch = FoldedBatch.from_sequences(NAMED["nested"] + [list(range(300))] * 40, pad_multiple_of=64, device="cuda")
    for _, function, src in calls(batch, width=width):
        poisoned(lambda function=function, src=src: function(src))


@reuses_memory
@pytest.mark.parametrize("name", ["nested", "duplicates", "strict_prefix_after", "empty_between"])
def test_folds_hold_nothing_that_was_in_memory_before(name):
    arguments = to("cuda", pack(NAMED[name]))
    for op in (RADIX.fold, RADIX.fold_plan, RADIX.fold_batch):
        poisoned(lambda op=op: op(*arguments, 64))
