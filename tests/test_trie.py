"""The order and the blocks of a trie against its ancestors found one by one, and what the CPU kernel reads."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from batches import NAMED, random_sequences, rounds
from torch.utils._python_dispatch import TorchDispatchMode

from radix_ops import FoldedBatch, _trie

RADIX = torch.ops.radix
BLOCK = _trie.BLOCK
LONG = [[*range(900), i] for i in range(3)] + [[*range(300), 5, *range(400)], list(range(650)), [*range(300), 5]]
# Run r + 1 leaves run r at its last token: the deepest tree of runs.
NESTED_RUNS = [[*range(i), 1000 + i] for i in range(200)]
APART = [[*([100 + i] * 60), *range(i * 3)] for i in range(8)]


def batches():
    yield from NAMED.values()
    yield from (LONG, NESTED_RUNS, NESTED_RUNS[::-1], APART, LONG[::-1] + APART + LONG)
    rng = np.random.default_rng(0)
    for _ in rounds(200):
        yield random_sequences(rng)


def order_of(batch):
    return RADIX.trie_order(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.kv_indptr, batch.kv_members)


def ancestors_of(batch):
    """bool [num_rows, num_rows], where the row of the first index sees that of the second."""
    sees = torch.zeros(batch.num_rows, batch.num_rows, dtype=torch.bool)
    for rows in batch.unfold_index.cpu().split(batch.lengths.tolist()):
        for depth, row in enumerate(rows.tolist()):
            sees[row, rows[: depth + 1].long()] = True
    return sees


def test_order_tells_ancestors(device):
    for sequences in batches():
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4, device=device)
        enter, leave, depth = (x.cpu() for x in order_of(batch))
        sees = ancestors_of(batch)
        assert torch.equal((enter <= enter[:, None]) & (enter[:, None] < leave), sees)
        assert torch.equal(depth, (sees.sum(1) - 1).clamp(min=0).int())
        assert sorted(enter[: batch.num_nodes].tolist()) == list(range(batch.num_nodes))


@pytest.mark.parametrize("window", [0, 1, 50])
def test_blocks_are_those_of_the_mask(window, device):
    for sequences in batches():
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4, device=device)
        order = order_of(batch)
        counts, indices = RADIX.trie_blocks(*order, batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, window)
        size = counts.shape[1]
        assert size == max(2, -(-batch.num_rows // BLOCK))
        tables = torch.zeros(4, size, size, dtype=torch.bool)
        for table in range(4):
            for row in range(size):
                tables[table, row, indices[table, row, : counts[table, row]].cpu().long()] = True
        partial, full = tables[:2]
        assert torch.equal(tables[2], partial.T)
        assert torch.equal(tables[3], full.T)
        sees = ancestors_of(batch)
        if window:
            depth = order[2].cpu()
            sees &= depth[:, None] - depth < window
        mask = torch.zeros(size * BLOCK, size * BLOCK, dtype=torch.bool)
        mask[: batch.num_rows, : batch.num_rows] = sees
        mask = mask.view(size, BLOCK, size, BLOCK).transpose(1, 2)
        assert torch.equal(full, mask.all(-1).all(-1))
        wanted = mask.any(-1).any(-1)
        assert not (wanted & ~partial & ~full).any()
        if not window:  # which is cut by bounds of depths
            assert torch.equal(partial | full, wanted)


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


def test_no_key_or_value_is_unfolded_on_the_cpu():
    """50 sequences share 200 tokens and add 3 each: unfolded, keys would be 10,150 rows; the trie has 350."""
    batch = FoldedBatch.from_sequences([[*range(200), i, i, i] for i in range(1000, 1050)])
    q, k, v = (torch.randn(batch.num_rows, heads, 8) for heads in (4, 2, 2))
    order = order_of(batch)
    arguments = (*order, batch.cu_seqlens_q, 0.3)
    out, logsumexp = _trie.trie_attention(q, k, v, *arguments)
    for tensor in (k, v):
        with RowsRead(tensor) as read:
            _trie.trie_attention(q, k, v, *arguments)
        with RowsRead(tensor) as read_backward:
            _trie.trie_attention_backward(torch.ones_like(out), q, k, v, out, logsumexp, *arguments)
        # Each row for the edge it stands in, for what is below, and to see whether it is finite; backward, a key
        # makes scores and gradients.
        assert batch.num_rows <= read.count <= 3 * batch.num_rows
        assert batch.num_rows <= read_backward.count <= 5 * batch.num_rows
    assert len(batch.kv_index) == 50 * 203


def test_nothing_below_an_edge_is_computed_alone():
    """The shared 200 rows are read as whole tiles, not once for each of the sequences below."""
    batch = FoldedBatch.from_sequences([[*range(200), i] for i in range(1000, 1050)])
    edges = _trie._Edges.of(*order_of(batch), batch.cu_seqlens_q)
    k = torch.zeros(batch.num_rows, 1, 1)
    below = [t for t in _trie._tiles(edges, 0, 256, k, k) if t.mask is None and t.keys.stop - t.keys.start == 200]
    assert [tile.queries.stop - tile.queries.start for tile in below] == [50]


def test_flex_compiles_once_for_batches_never_seen():
    """As dynamo sees it, on the CPU; the kernels it makes on CUDA are test_attention's."""
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(_trie._flex, scale=0.25), dynamic=True, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sequences in (LONG, [[*range(150), i] for i in range(41)], APART, [[1, 2, 3], [1, 2, 4]]):
            batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
            enter, leave, depth = order_of(batch)
            blocks = RADIX.trie_blocks(enter, leave, depth, batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
            q, k, v = (torch.randn(batch.num_rows, heads, 16) for heads in (4, 2, 2))
            got = compiled(q, k, v, enter, leave, *blocks, depth, None)
            want, _ = RADIX.trie_attention(q, k, v, enter, leave, depth, batch.cu_seqlens_q, 0.25)
            torch.testing.assert_close(got[: batch.num_nodes], want[: batch.num_nodes])
    torch._dynamo.reset()
