"""A batch on CUDA, a call of each op that sums or gathers, and what a device did, for tests of the ops there."""

from __future__ import annotations

import json

import numpy as np
import torch

import radix_ops
from helpers.batches import pack, random_positions, random_sequences
from radix_ops import FoldedBatch

RADIX = torch.ops.radix


def sample_batch(count=12, prefix=100, own=30) -> FoldedBatch:
    ids = torch.randint(0, 1000, (count, prefix + own))
    ids[:, :prefix] = ids[0, :prefix]
    return radix_ops.fold(ids.flatten().cuda(), torch.arange(count + 1).cuda() * (prefix + own))


def calls(batch: FoldedBatch, dtype=torch.bfloat16, width=64):
    """Yield (name, function of src, src) of each op that sums or gathers, all of one batch."""
    index, inverse = batch.unfold_index, (batch.unfold_indptr, batch.unfold_members)
    num_rows = batch.num_rows
    rows = torch.randn(num_rows, width, device="cuda").to(dtype)
    tokens = torch.randn(batch.num_tokens, width, device="cuda").to(dtype)
    yield "gather", lambda x: (RADIX.gather(x, index),), rows
    yield "gather.csr", lambda x: (RADIX.gather.csr(x, index, *inverse),), rows
    yield "gather_kv", lambda x: RADIX.gather_kv(x, x[:, : width // 2], index), rows
    yield "gather_kv.csr", lambda x: RADIX.gather_kv.csr(x, x[:, : width // 2], index, *inverse), rows
    yield "scatter_add", lambda x: (RADIX.scatter_add(x, index, num_rows),), tokens
    yield "scatter_add.csr", lambda x: (RADIX.scatter_add.csr(x, index, *inverse, num_rows),), tokens
    yield "scatter_add_kv", lambda x: RADIX.scatter_add_kv(x, x[:, : width // 2], index, num_rows), tokens
    yield (
        "scatter_add_kv.csr",
        lambda x: RADIX.scatter_add_kv.csr(x, x[:, : width // 2], index, *inverse, num_rows),
        tokens,
    )


def fold_arguments(seed=0):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng)
    ids, _, cu_seqlens = pack(sequences)
    return ids, random_positions(rng, sequences), cu_seqlens, int(rng.choice([1, 2, 8, 64]))


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g.cpu(), w.cpu())


def traced(function, path):
    """Return the names and bytes of all that the device and the runtime did."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    return [event for event in json.loads(path.read_text())["traceEvents"] if "cat" in event]


def waits(function, path):
    """Count how often the host waits for the device in a function, without the profiler's own waits."""

    def count(events):
        return sum("Synchronize" in e["name"] for e in events if e["cat"] == "cuda_runtime")

    return count(traced(function, path)) - count(traced(lambda: torch.empty(1, device="cuda").add_(1), path))
