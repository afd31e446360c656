"""Tries, inputs and memory for tests of the trie layout's kernels for Hopper."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from radix_ops import FoldedBatch
from radix_ops.ops import dispatch
from radix_ops.ops.trie import TrieTables

from .batches import NAMED
from .tries import APART, LONG, NESTED_RUNS, order_of


def marks_of(name):
    """Return the marks of tests of an op for Hopper alone."""
    is_there = (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and (name, "CUDA") not in dispatch.REFUSALS
    )
    reason = "needs a GPU of compute capability 9.0, and a build for it"
    return [pytest.mark.cuda, pytest.mark.skipif(not is_there, reason=reason)]


def ops_called(function):
    """Call a function, and return its result and the names of all ops that ran, those inside others too."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = function()
    return result, {event.key for event in profiler.key_averages()}


TRIES = {
    "long": LONG,
    "chain of runs": LONG[::-1] + NESTED_RUNS,
    "apart": APART,
    "fan": [[*range(70), i] for i in range(300)],
    # Paths that end before, at and behind the ends of tiles and of half tiles, with branches of up to six tokens.
    "ragged": [
        [*range(length), 1000 + i, *range(i % 7)]
        for i, length in enumerate([5, 130, 64, 300, 127, 128, 129, 255, 256, 257, 63, 65, 1, 191, 192, 193] * 3)
    ],
    "one token": NAMED["one_token"],
    "one row": [[1]],
    # Rows of 1 to 3 tokens that share nothing, or one token.
    "many": [[i, *range(i % 3)] for i in range(700)] + [[5, 5, i] for i in range(300)],
    # Every key's row is far from its neighbours' rows: of a path of 400, each row begins a run of its own.
    "scattered": [[*range(i), 1000 + i] for i in range(1, 400)],
}


def batch_of(name):
    return FoldedBatch.from_sequences(TRIES[name], pad_multiple_of=4, device="cuda")


def tables_of(batch):
    return TrieTables(*order_of(batch), batch.kv_index, batch.cu_seqlens_q, batch.num_nodes)


def random_of(batch, heads, kv_heads, size, dtype=torch.bfloat16):
    """Return q, k and v, which hold NaN in padding rows."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in (heads, kv_heads, kv_heads):
        x = torch.randn(batch.num_rows, count, size, generator=generator).to("cuda", dtype)
        x[batch.num_nodes :] = float("nan")
        made.append(x)
    return made


def poison_memory(tensor):
    """Leave NaN in the memory that the next tensors of this size are likely to take."""
    for x in (torch.empty_like(tensor), torch.empty(tensor.shape[:2], device=tensor.device)):
        x.fill_(float("nan"))
