"""The order of a trie against its ancestors found one by one, and the rows that kernels in Python read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.batches import NAMED, random_sequences, rounds
from helpers.tries import APART, LONG, NESTED_RUNS, ancestors_of, order_of
from radix_ops import FoldedBatch
from radix_ops.ops import trie

RADIX = torch.ops.radix


def batches():
    yield from NAMED.values()
    yield from (LONG, NESTED_RUNS, NESTED_RUNS[::-1], APART, LONG[::-1] + APART + LONG)
    rng = np.random.default_rng(0)
    for _ in rounds(200):
        yield random_sequences(rng)


def test_order_tells_ancestors(device):
    for sequences in batches():
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4, device=device)
        enter, leave, depth, row_of, path = (x.cpu() for x in order_of(batch))
        sees = ancestors_of(batch)
        assert torch.equal((enter <= enter[:, None]) & (enter[:, None] < leave), sees)
        assert torch.equal(depth, (sees.sum(1) - 1).clamp(min=0).int())
        assert torch.equal(enter[row_of[: batch.num_nodes].long()], torch.arange(batch.num_nodes, dtype=torch.int32))
        assert row_of[batch.num_nodes :].tolist() == list(range(batch.num_nodes, batch.num_rows))
        kv_index = batch.kv_index.cpu()
        for row in range(batch.num_nodes):
            on_path = kv_index[path[row] : path[row] + depth[row] + 1].long()
            assert torch.equal(on_path, torch.sort(on_path).values)
            assert torch.equal(on_path, sees[row].nonzero()[:, 0])


def wrapped(number):
    """Return the int64 with the same last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def overflowing(length):
    """Return runs 0 (`length` rows), 1 and 2; the last ends at -2^63: in int64 its length and prefix are positive.

    A kernel that subtracts before it compares writes `length` entries in front of its memory.
    """
    start = length + 1
    last = length + 2 + 3 + wrapped(-(2**63) - start)
    kv_index = torch.zeros(length + 5, dtype=torch.int64)
    kv_index[:length] = torch.arange(length)
    kv_index[length + 4] = 2
    return (
        torch.tensor([0, length, start, -(2**63)]),
        torch.tensor([0, length, length + 2, wrapped(last)]),
        kv_index,
        start,
    )


# Tables of a fold with one number far outside, and what such a number is cut to as int32, which is inside.
FAR_OUTSIDE = [
    (overflowing(4), "differences overflow"),
    ((torch.tensor([0, 2, 3 + 2**32]), torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 2]), 3), "an end of rows"),
    ((torch.tensor([0, 2, 3]), torch.tensor([0, 2, 4 + 2**32]), torch.tensor([0, 1, 0, 2]), 3), "an end of paths"),
    ((torch.tensor([0, 2, 3]), torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2**32, 2]), 3), "a parent"),
    ((torch.tensor([2**32, 2, 3]), torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 2]), 3), "a start"),
    ((torch.tensor([0, -(2**31), 3]).int(), torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 2]), 3), "of int32"),
]


def test_order_refuses_what_no_fold_makes():
    ends, keys = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0, 2])
    RADIX.trie_order(ends, torch.tensor([0, 2, 4]), keys, 3)
    for cu_q, cu_k, kv_index, num_rows in (
        (ends, torch.tensor([0, 2, 4]), keys, 2),  # fewer rows than the runs have
        (ends, torch.tensor([0, 2, 5]), keys, 3),  # more keys than there are
        (ends, torch.tensor([0, 2, 2]), keys, 3),  # a path shorter than its run
        (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 4]), keys, 3),
        (torch.tensor([0, 2, 1]), torch.tensor([0, 2, 4]), keys, 3),
        (ends, torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 2]), 3),  # a parent that comes after its branch
        (ends, torch.tensor([0, 2, 4]), torch.tensor([0, 1, -1, 2]), 3),
        (ends, torch.tensor([0, 2, 4]), torch.tensor([0, 1, 1, 2]), 3),  # a path of one row above to a row of depth 1
        *(runs for runs, _ in FAR_OUTSIDE),
    ):
        with pytest.raises(
            RuntimeError, match=r"must be a fold's, and num_rows at least its rows; run \d does not fit$"
        ):
            RADIX.trie_order(cu_q, cu_k, kv_index, num_rows)
    with pytest.raises(RuntimeError, match="must be equally long and hold at least a 0, got 3 and 2 entries$"):
        RADIX.trie_order(ends, torch.tensor([0, 2]), keys, 3)
    with pytest.raises(RuntimeError, match="num_rows must be from 0 to 2147483646, got -1$"):
        RADIX.trie_order(ends, torch.tensor([0, 2, 4]), keys, -1)


def test_sizes_of_subtrees_may_sum_to_more_than_32_bits(default_device):
    """Each run of a chain holds all below it, and a long one is at its end."""
    chain, long = 1500, 1_500_000
    starts = torch.arange(chain + 1)
    cu_q = torch.cat([starts, torch.tensor([chain + long])])
    lengths = torch.cat([starts[1:], torch.tensor([chain + long])])
    kv_index = torch.cat([torch.arange(n) for n in lengths.tolist()])
    order = RADIX.trie_order(cu_q, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), kv_index, chain + long)
    rows = torch.arange(chain + long, dtype=torch.int32)
    for numbers in (order[0], order[2], order[3]):  # a path: rows are numbered as they stand
        assert torch.equal(numbers, rows)
    assert (order[1] == chain + long).all()


class RowsRead(TorchDispatchMode):
    """Rows of a tensor that calls below it take in, views apart."""

    def __init__(self, tensor):
        super().__init__()
        self.storage = tensor.untyped_storage().data_ptr()
        self.row = tensor[0].numel()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() == self.storage
        for argument in args:
            if isinstance(argument, torch.Tensor) and not is_view:
                self.count += (argument.untyped_storage().data_ptr() == self.storage) * argument.numel() // self.row
        return result


def test_no_key_or_value_is_unfolded():
    """50 sequences share 200 tokens and add 3 each: unfolded, keys would be 10,150 rows; the trie has 350."""
    batch = FoldedBatch.from_sequences([[*range(200), i, i, i] for i in range(1000, 1050)])
    q, k, v = (torch.randn(batch.num_rows, heads, 8) for heads in (4, 2, 2))
    order = order_of(batch)
    arguments = (*order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes, 0.3)
    out, logsumexp = trie.trie_attention(q, k, v, *arguments)
    for tensor in (k, v):
        with RowsRead(tensor) as read:
            trie.trie_attention(q, k, v, *arguments)
        with RowsRead(tensor) as read_backward:
            trie.trie_attention_backward(torch.ones_like(out), q, k, v, out, logsumexp, *arguments)
        # Each row for the edge it stands in, for what is below, and to see whether it is finite; backward, a key
        # makes scores and gradients.
        assert batch.num_rows <= read.count <= 3 * batch.num_rows
        assert batch.num_rows <= read_backward.count <= 5 * batch.num_rows
    assert len(batch.kv_index) == 50 * 203


def test_nothing_below_an_edge_is_computed_alone():
    """The shared 200 rows are read as whole tiles, not once for each of the sequences below."""
    batch = FoldedBatch.from_sequences([[*range(200), i] for i in range(1000, 1050)])
    tables = trie.TrieTables(*order_of(batch), batch.kv_index, batch.cu_seqlens_q, batch.num_nodes)
    edges = trie._Edges.of(tables)
    k = torch.zeros(batch.num_rows, 1, 1)
    below = [t for t in trie._tiles(edges, 0, 256, k, k) if t.mask is None and t.keys.stop - t.keys.start == 200]
    assert [tile.queries.stop - tile.queries.start for tile in below] == [50]
