"""torch.compile and torch.export: one graph for batches of all sizes, forward and backward."""

from __future__ import annotations

import pytest
import torch

import radix_ops
from helpers.batches import NAMED, pack, to
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
FIRST = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [1, 2, 5, 7], [8, 9], [1, 2, 3], [1, 2, 5]]
OTHERS = [
    [[1, 2], [1, 3], [4, 5, 6]],
    [[1, 2, 3]] * 3,
    [[7, 7, 7, 7, 7, 7, 7], [7, 7, 7, 8]],
    [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [], [1, 2, 3, 4]],
    [list(range(100)), [*range(50), 7, 7]],
]


def rows_and_back(ids, positions, cu_seqlens, table, weight):
    """Fold, look up, gather, multiply and unfold, as every model does."""
    compact_ids, _, unfold_index, fold_index = RADIX.fold(ids, positions, cu_seqlens, 4)
    rows = table[compact_ids] @ weight + RADIX.gather(table[ids], fold_index)
    return RADIX.gather(rows, unfold_index)


def plain(ids, positions, cu_seqlens, table, weight):
    # Tokens at equal paths have equal ids, so the first occurrence of a token holds the token itself.
    return table[ids] @ weight + table[ids]


def parameters(device="cpu"):
    shapes = ((101, 23), (23, 23))
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


def check(function, sequences, device):
    arguments, tensors = to(device, pack(sequences)), parameters(device)
    got, want = function(*arguments, *tensors), plain(*arguments, *tensors)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(got, tensors, weights), torch.autograd.grad(want, tensors, weights), strict=True
    ):
        torch.testing.assert_close(g, w)


@pytest.fixture
def no_recompiles():
    torch._dynamo.reset()
    # Sizes that happen to be equal in the first batch must not be taken for one.
    with torch._dynamo.config.patch(error_on_recompile=True), torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_recompiles")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_for_lengths_never_seen(backend, device):
    compiled = torch.compile(rows_and_back, backend=backend, fullgraph=True, dynamic=True)
    for sequences in [FIRST, *OTHERS]:
        check(compiled, sequences, device)


@pytest.mark.parametrize("name", ["one_token", "one_empty", "no_sequences", "single"])
def test_compile_is_right_for_sizes_0_and_1(name, device):
    torch._dynamo.reset()
    compiled = torch.compile(rows_and_back, backend="aot_eager", fullgraph=True, dynamic=True)
    check(compiled, FIRST, device)
    check(compiled, NAMED[name], device)


@pytest.mark.usefixtures("no_recompiles")
def test_compile_of_the_csr_ops_and_scatter_add(device):
    def function(x, batch_index, indptr, members, num_rows):
        rows = RADIX.scatter_add.csr(x.sin(), batch_index, indptr, members, num_rows)
        rows = rows * RADIX.scatter_add(x, batch_index, num_rows)
        keys, values = RADIX.gather_kv.csr(rows, rows[:, 1:], batch_index, indptr, members)
        return RADIX.gather.csr(rows, batch_index, indptr, members) + keys + values.sum(1, keepdim=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for sequences in [FIRST, *OTHERS]:
        batch = FoldedBatch.from_sequences(sequences, device=device)
        x = torch.randn(batch.num_tokens, 5, dtype=torch.float64, device=device, requires_grad=True)
        arguments = (x, batch.unfold_index, batch.unfold_indptr, batch.unfold_members, batch.num_rows)
        got, want = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("gather_kv", ((5, 2), (4, 2)), "k and v must have equally many rows, got 5 and 4"),
        ("scatter_add_kv", ((3, 2), (4, 2)), "src_k and src_v must have equally many rows, got 3 and 4"),
        ("scatter_add", ((4, 2),), "index must hold one entry for each row of src, got 3 entries for 4 rows"),
    ],
)
def test_fakes_refuse_lengths_that_differ(name, shapes, message):
    index = torch.zeros(3, dtype=torch.int64, device="meta")
    rest = (index,) if "gather" in name else (index, 5)
    with pytest.raises(RuntimeError, match=f"radix::{name}: {message}"):
        getattr(RADIX, name)(*(torch.zeros(shape, device="meta") for shape in shapes), *rest)


@pytest.mark.usefixtures("no_recompiles")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_attention_over_a_batch(backend):
    def function(batch, table):
        q = table[batch.input_ids].unflatten(-1, (4, 6))
        out = radix_ops.attention(q, q[:, :2], q[:, 2:], batch)
        return batch.unfold(out.flatten(1) * 2)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    table = torch.randn(101, 24, requires_grad=True)
    for sequences in [FIRST, *OTHERS]:
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
        got, want = compiled(batch, table), function(batch, table)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), table)[0] for y in (got, want)))


@pytest.mark.usefixtures("no_recompiles")
def test_compile_with_the_fold_inside(device):
    def function(ids, cu_seqlens, table):
        batch = radix_ops.fold(ids, cu_seqlens)
        return batch.unfold(table[batch.input_ids] * 2)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    table = torch.randn(101, 23, device=device)
    for sequences in [FIRST, *OTHERS]:
        ids, _, cu_seqlens = to(device, pack(sequences))
        torch.testing.assert_close(compiled(ids, cu_seqlens, table), table[ids] * 2)


@pytest.mark.usefixtures("no_recompiles")
def test_compile_of_pooling_and_unfolded_attention_with_the_fold_inside():
    def function(ids, cu_seqlens, table):
        batch = radix_ops.fold(ids, cu_seqlens, pad_multiple_of=4)
        q = table[batch.input_ids].unflatten(-1, (4, 6))
        return radix_ops.attention(q, q, q, batch, layout="unfold")[batch.last_rows]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    table = torch.randn(101, 24)
    for sequences in [FIRST, *OTHERS[:3]]:
        ids, _, cu_seqlens = pack(sequences)
        torch.testing.assert_close(compiled(ids, cu_seqlens, table), function(ids, cu_seqlens, table))


class Frame(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.weight = map(torch.nn.Parameter, parameters())

    def forward(self, ids, positions, cu_seqlens):
        return rows_and_back(ids, positions, cu_seqlens, self.table, self.weight)


def test_export_serves_lengths_never_seen(tmp_path, device):
    frame = Frame().to(device)
    tokens, ends = torch.export.Dim("tokens"), torch.export.Dim("ends")
    shapes = ({0: tokens}, {0: tokens}, {0: ends})
    program = torch.export.export(frame, to(device, pack(FIRST)), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "frame.pt2")
    loaded = torch.export.load(tmp_path / "frame.pt2").module()
    for sequences in [FIRST, *OTHERS]:
        arguments = to(device, pack(sequences))
        torch.testing.assert_close(loaded(*arguments), plain(*arguments, frame.table, frame.weight))


class OverBatch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(101, 24))

    def forward(self, batch):
        q = self.table[batch.input_ids].unflatten(-1, (4, 6))
        return batch.unfold(radix_ops.attention(q, q, q, batch).flatten(1))


def test_export_of_a_module_over_a_batch():
    module = OverBatch()
    first = FoldedBatch.from_sequences(FIRST)
    dynamic = torch.export.Dim.AUTO
    leaves = torch.utils._pytree.tree_leaves(first)
    shapes = [{0: dynamic} if isinstance(leaf, torch.Tensor) else dynamic for leaf in leaves]
    program = torch.export.export(module, (first,), dynamic_shapes=(shapes,))
    for sequences in [FIRST, OTHERS[3], OTHERS[4]]:
        batch = FoldedBatch.from_sequences(sequences)
        torch.testing.assert_close(program.module()(batch), module(batch))
