"""Right calls of every CPU op over random batches, and checks of their results, for tests/ops/fuzz_ops.py."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from helpers.batches import pack, random_positions, random_sequences
from radix_ops import FoldedBatch, attention, reference

RADIX = torch.ops.radix
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("auto", "compact", "trie", "unfold")
LOOSE = {"rtol": 3e-2, "atol": 3e-2}
TABLES = [field.name for field in dataclasses.fields(FoldedBatch)]


def random_batch(rng):
    """Return sequences, their packed arguments of a fold in either width, and their batch."""
    longest = int(rng.choice([6, 6, 6, 20, 300]))
    sequences = [sequence[:longest] for sequence in random_sequences(rng)]
    arrays = list(pack(sequences))
    if rng.integers(4) == 0:
        arrays[1] = random_positions(rng, sequences)
    arrays = [x.to(torch.int32) if rng.integers(2) else x for x in arrays]
    multiple = int(rng.choice([1, 1, 4]))
    *tensors, counts, ends = RADIX.fold_batch(*arrays, multiple)
    batch = FoldedBatch(*tensors, ends, *counts.tolist())
    if rng.integers(2):
        wide = {name: getattr(batch, name) for name in TABLES}
        batch = FoldedBatch(**{k: x.long() if isinstance(x, torch.Tensor) else x for k, x in wide.items()})
    return arrays, multiple, batch


def random_call(rng, name, made):
    """Return the function that calls op `name`, and right arguments for it."""
    arrays, multiple, batch = made
    rows, tokens, runs = batch.num_rows, batch.num_tokens, (batch.cu_seqlens_q, batch.cu_seqlens_k)
    unfold = batch.unfold_index, batch.unfold_indptr, batch.unfold_members
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]

    def numbers(*shape):
        return torch.randn(shape).to(dtype)

    if name == "fold_batch":
        return RADIX.fold_batch, (*arrays, multiple, bool(rng.integers(2)), bool(rng.integers(2)))
    if name in ORACLES_OF_FOLDS:
        return getattr(RADIX, name), (*arrays, multiple)
    if name == "unpad":
        return RADIX.unpad, (_random_mask(rng),)
    if name == "trie_order":
        return RADIX.trie_order, (*runs, batch.kv_index, rows)
    if name.startswith(("gather", "scatter_add")):
        packet, _, overload = name.partition(".")
        width = tuple(int(n) for n in rng.integers(1, 5, int(rng.integers(3))))
        length = rows if name.startswith("gather") else tokens
        tensors = (numbers(length, *width), numbers(length))[: 2 if "_kv" in name else 1]
        index = unfold if overload else unfold[:1]
        num_rows = () if name.startswith("gather") else (rows,)
        return getattr(getattr(RADIX, packet), overload or "default"), (*tensors, *index, *num_rows)
    if name in ORACLES_OF_PLANS:
        return _call_of_plan(rng, name, arrays)

    group, kv_heads, size, value_size = (int(n) for n in rng.integers(1, 4, 4))
    q, k, v = numbers(rows, group * kv_heads, size), numbers(rows, kv_heads, size), numbers(rows, kv_heads, value_size)
    how = 0.5, int(rng.choice([0, 0, 1, 3]))
    grad = (numbers(rows, group * kv_heads, value_size),) if name.endswith("backward") else ()
    if name.startswith("varlen"):
        return getattr(RADIX, name), (*grad, q, k[batch.kv_index], v[batch.kv_index], *runs, *how)
    if name == "attention":
        layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
        return _attention_of(layout), (q, k, v, *(getattr(batch, name) for name in TABLES))
    tables = *RADIX.trie_order(*runs, batch.kv_index, rows), batch.kv_index, batch.cu_seqlens_q, batch.num_nodes, *how
    if name == "trie_attention_rows":
        count = int(rng.integers(2 * rows + 1))
        wanted = torch.tensor([int(rng.integers(rows)) for _ in range(count)], dtype=torch.int64)
        return RADIX.trie_attention_rows, (q[wanted], k, v, wanted, *tables)
    results = RADIX.trie_attention(q, k, v, *tables) if grad else ()
    return getattr(RADIX, name), (*grad, q, k, v, *results, *tables)


def _random_mask(rng):
    count, width = int(rng.integers(5)), int(rng.integers(7))
    ends = torch.from_numpy(rng.integers(0, width + 1, (2, count, 1))).sort(0).values
    columns = torch.arange(width)
    mask = (columns >= ends[0]) & (columns < ends[1])
    return mask.to((torch.bool, torch.int32, torch.int64)[int(rng.integers(3))])


def _call_of_plan(rng, name, arrays):
    ids, _, ends = arrays
    sequences = ids, ends[:-1], ends.diff()
    if name == "lexicographic_order":
        return RADIX.lexicographic_order, sequences
    order = RADIX.lexicographic_order(*sequences)
    if name == "common_prefix_lengths":
        return RADIX.common_prefix_lengths, (*sequences, order)
    limits = (int(n) for n in rng.integers(1, 60, 4))
    shared = RADIX.common_prefix_lengths(*sequences, order)
    return RADIX.cut_batches, (sequences[2][order], shared, *limits, int(rng.integers(9)))


def _attention_of(layout):
    def attend(q, k, v, *tables):
        batch = FoldedBatch(**dict(zip(TABLES, tables, strict=True)))
        needs_gradient = [x.detach().requires_grad_(x.is_floating_point()) for x in (q, k, v)]
        out = attention(*needs_gradient, batch, layout=layout)
        return out.detach(), *torch.autograd.grad(out.float().sum(), needs_gradient)

    return attend


def check_fold(arguments, results, _):
    ids, positions, cu_seqlens, multiple, *how = arguments
    end = int(cu_seqlens[-1])
    if how and how[0]:  # from zero
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        positions = torch.arange(end) - starts
    if len(results) == 14:
        assert torch.equal(results[13], cu_seqlens.int())
        results = results[:13]
    for got, want in zip(results, reference.fold(ids[:end], positions[:end], cu_seqlens, multiple), strict=False):
        assert torch.equal(got, want)
    if len(results) == 4:
        return
    unfold_index, indptr, members, sequences, cu_q, cu_k, kv_index, kv_indptr, kv_members, counts = (
        results[2:3] + results[4:]
    )
    num_rows = len(results[3])
    assert_inverse(unfold_index, indptr, members, num_rows)
    assert_inverse(kv_index, kv_indptr, kv_members, num_rows)
    lengths = cu_seqlens.diff()
    assert torch.equal(cu_k.diff().long(), lengths[sequences].long())
    own = [rows.tolist() for rows in unfold_index.split(lengths.tolist())]
    assert kv_index.tolist() == [row for s in sequences.tolist() for row in own[s]]
    assert [
        row
        for rows, n in zip((own[s] for s in sequences.tolist()), cu_q.diff().tolist(), strict=True)
        for row in rows[len(rows) - n :]
    ] == list(range(int(counts[0])))


def check_unpad(arguments, results, _):
    mask = arguments[0]
    cu_seqlens, places = results
    real = mask.flatten().nonzero()[:, 0]
    changes = torch.nn.functional.pad((mask == 1).int(), (1, 1)).diff(dim=1)
    broken = ((changes != 0).sum(1) > 2) | ((mask != 0) & (mask != 1)).any(1)
    assert cu_seqlens[0] == -broken.sum()
    assert ((places >= 0) & (places < max(mask.numel(), 1))).all()
    if not broken.any():
        assert cu_seqlens.tolist() == [0, *mask.long().sum(1).cumsum(0).tolist()]
        assert torch.equal(places[: len(real)], real)


def assert_inverse(index, indptr, members, num_rows):
    wanted = [[] for _ in range(num_rows)]
    for i, row in enumerate(index.tolist()):
        wanted[row].append(i)
    assert [sorted(part) for part in torch.tensor_split(members, indptr[1:-1].tolist())] == wanted if num_rows else True


def check_gather(arguments, results, _):
    tensors = arguments[: len(results)]
    index = arguments[len(results)].long()
    for x, got in zip(tensors, results, strict=True):
        torch.testing.assert_close(got, x[index], rtol=0, atol=0, equal_nan=True)


def check_scatter_add(arguments, results, _):
    index, num_rows = arguments[len(results)].long(), arguments[-1]

    def sums(x):
        return torch.zeros(num_rows, *x.shape[1:], dtype=x.dtype).index_add_(0, index, x)

    counts = torch.bincount(index, minlength=num_rows)
    for src, got in zip(arguments, results, strict=False):
        if not src.is_floating_point():
            torch.testing.assert_close(got, sums(src.long()).to(src.dtype))
            continue
        wide = src.double()
        if bool((wide.abs() > 1e30).any()):
            continue  # sums of numbers near the largest depend on their order
        # Each addition rounds in the dtype of sums by what the row has summed up to there, the result once in its own.
        rounding = torch.finfo(torch.promote_types(src.dtype, torch.float32)).eps
        allowed = sums(wide.abs()) * counts.view(-1, *[1] * (src.dim() - 1)) * rounding
        exact, limits = sums(wide), torch.finfo(src.dtype)
        allowed += exact.abs() * limits.eps + limits.smallest_normal
        is_near = (got.double() - exact).abs() <= allowed
        is_beyond = ~(exact.abs() + allowed < limits.max)  # as are sums of values that are not finite
        assert bool((is_near | is_beyond).all())
        want = exact.to(src.dtype)
        is_special = ~want.isfinite()
        if src.dtype.itemsize > 2:
            torch.testing.assert_close(got[is_special], want[is_special], equal_nan=True)


def check_attention(arguments, results, _):
    q, k, v, cu_q, cu_k, scale, window = arguments
    want = reference.varlen_attention(q.double(), k.double(), v.double(), cu_q, cu_k, scale, window)
    assert results[0].shape == want.shape
    compare_finite(results[0], want, (q, k, v), scale)


def compare_finite(got, want, tensors, scale):
    if all(bool(x.isfinite().all()) and bool((x.double().abs() < 1e3).all()) for x in tensors) and abs(scale) < 10:
        torch.testing.assert_close(got.double(), want, **LOOSE)


def check_trie_order(arguments, results, _):
    cu_q, cu_k, kv_index, num_rows = arguments
    enter, leave, depth, row_of, path = (x.tolist() for x in results)
    ends_q, ends_k, keys = cu_q.tolist(), cu_k.tolist(), kv_index.tolist()
    parent = {}
    for r, (first, end) in enumerate(itertools.pairwise(ends_q)):
        prefix = ends_k[r + 1] - ends_k[r] - (end - first)
        for row in range(first, end):
            parent[row] = row - 1 if row > first else keys[ends_k[r] + prefix - 1] if prefix else None
            assert path[row] == ends_k[r]
    count = len(parent)
    assert sorted(enter[:count]) == list(range(count))
    assert [enter[row] for row in row_of[:count]] == list(range(count))
    assert row_of[count:] == list(range(count, num_rows))
    for row in range(count):
        ancestors, at = set(), row
        while at is not None:
            ancestors.add(at)
            at = parent[at]
        assert {k for k in range(count) if enter[k] <= enter[row] < leave[k]} == ancestors
        assert depth[row] == len(ancestors) - 1


def check_trie_attention(arguments, results, is_right):
    q, _, v, *_, num_nodes, _, _ = arguments
    assert results[0].shape == (len(q), q.shape[1], v.shape[2])
    assert not results[0][num_nodes:].any()
    if is_right:
        torch.testing.assert_close(results[0].double(), attended(*arguments), **LOOSE)


def attended(q, k, v, enter, leave, depth, row_of, path, kv_index, cu_q, num_nodes, scale, window):
    """Return the attention of all rows in float64."""
    unfolded = k.double()[kv_index], v.double()[kv_index]
    # A path ends where the next run's first row says that its own begins, the last at the end of all.
    starts = [*path[cu_q[:-1].long()].tolist(), len(kv_index)]
    return reference.varlen_attention(q.double(), *unfolded, cu_q, torch.tensor(starts), scale, window)


def check_trie_attention_rows(arguments, results, is_right):
    q, k, v, rows, *tables = arguments
    assert results[0].shape == (len(q), q.shape[1], v.shape[2])
    if is_right:
        every = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)
        torch.testing.assert_close(results[0].double(), attended(every, k, v, *tables)[rows], **LOOSE)


def check_gradients(arguments, results, _):
    for got, x in zip(results, arguments[1:4], strict=True):
        assert got.shape == x.shape


def check_attention_of_batch(arguments, results, is_right):
    assert results[0].shape == (len(arguments[0]), arguments[0].shape[1], arguments[2].shape[2])
    assert not is_right or all(bool(x.isfinite().all()) for x in results)


def sequences_of(ids, starts, lengths):
    return [ids[s : s + n].tolist() for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def check_order(arguments, results, _):
    sequences = sequences_of(*arguments)
    assert results[0].tolist() == sorted(range(len(sequences)), key=sequences.__getitem__)


def check_common_prefixes(arguments, results, _):
    sequences, order = sequences_of(*arguments[:3]), arguments[3].tolist()
    want = [0] * min(len(order), 1)
    for a, b in itertools.pairwise(order):
        pairs = zip(sequences[a], sequences[b], strict=False)
        want.append(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert results[0].tolist() == want


def check_cuts(arguments, results, _):
    lengths, shared, (max_rows, max_tokens, max_positions, max_sequences, batch_cost) = (
        arguments[0].tolist(),
        arguments[1].tolist(),
        arguments[2:],
    )

    def fits(first, end):
        part = lengths[first:end]
        rows = sum(part) - sum(shared[first + 1 : end])
        limited = rows <= max_rows and sum(part) <= max_tokens and len(part) <= max_sequences
        return len(part) == 1 or (limited and len(part) * max(part) <= max_positions)

    def cost_of(first):
        return batch_cost + (shared[first] if first else 0)

    best = [0]
    for end in range(1, len(lengths) + 1):
        best.append(min(best[first] + cost_of(first) for first in range(end) if fits(first, end)))
    ends = [0, *results[0].tolist()]
    assert ends[-1] == len(lengths)
    assert all(first < end and fits(first, end) for first, end in itertools.pairwise(ends))
    assert sum(cost_of(first) for first in ends[:-1]) == best[-1]


# By op, a check of its results: check(arguments, results, whether the arguments are those of a batch).
ORACLES_OF_FOLDS = dict.fromkeys(("fold", "fold_plan", "fold_batch"), check_fold)
ORACLES_OF_PLANS = {
    "lexicographic_order": check_order,
    "common_prefix_lengths": check_common_prefixes,
    "cut_batches": check_cuts,
}
ORACLES = {
    **ORACLES_OF_FOLDS,
    "unpad": check_unpad,
    **ORACLES_OF_PLANS,
    **dict.fromkeys(("gather", "gather.csr", "gather_kv", "gather_kv.csr"), check_gather),
    **dict.fromkeys(("scatter_add", "scatter_add.csr", "scatter_add_kv", "scatter_add_kv.csr"), check_scatter_add),
    "varlen_attention": check_attention,
    "varlen_attention_backward": check_gradients,
    "trie_order": check_trie_order,
    "trie_attention": check_trie_attention,
    "trie_attention_backward": check_gradients,
    "trie_attention_rows": check_trie_attention_rows,
    # Attention on a batch made by hand, in each layout, and its gradients.
    "attention": check_attention_of_batch,
}
