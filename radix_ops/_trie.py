"""Attention over a trie's rows as they stand, with no key or value unfolded.

A row sees its ancestors and itself. `trie_order` numbers the rows in depth-first order, in which every subtree is an
interval: row k is on the path to row q exactly when enter[k] <= enter[q] < leave[k]. At each row the rest of its own
run comes first, so a run stands side by side in this order too.

On the CPU (and on CUDA in float32 and float64) `trie_attention` cuts the runs into edges, rows side by side of which
only the last has further branches, and lets everything below an edge attend to it at once: a key is read once for a
block of queries, not once for each sequence. On CUDA in bfloat16 and float16 `flex` runs torch's FlexAttention over
the blocks that `trie_blocks` finds from the runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._check import MAX_WINDOW, check_index_like, check_qkv, is_finite

# Queries and keys of a tile: its scores stay in the cache.
_TILE_QUERIES, _TILE_KEYS = 256, 512
# Rows and columns of the blocks that FlexAttention skips, or computes without a mask.
BLOCK = 128


def check_order(cu_seqlens_q, cu_seqlens_k, kv_index, kv_indptr, kv_members) -> None:
    check_index_like(
        "trie_order",
        kv_index.device,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        kv_index=kv_index,
        kv_indptr=kv_indptr,
        kv_members=kv_members,
    )


def check_blocks(enter, leave, depth, cu_seqlens_q, cu_seqlens_k, kv_index) -> None:
    check_index_like(
        "trie_blocks",
        enter.device,
        enter=enter,
        leave=leave,
        depth=depth,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        kv_index=kv_index,
    )


def trie_order(cu_seqlens_q, cu_seqlens_k, kv_index, kv_indptr, kv_members):
    """enter, leave, depth, int32 [num_rows], with nothing read on the host. Padding rows enter and leave at -1."""
    check_order(cu_seqlens_q, cu_seqlens_k, kv_index, kv_indptr, kv_members)
    num_rows, num_runs = kv_indptr.shape[0] - 1, cu_seqlens_q.shape[0] - 1
    rows = torch.arange(num_rows, device=kv_index.device)
    if num_runs == 0:
        nowhere = torch.full_like(rows, -1, dtype=torch.int32)
        return nowhere, nowhere.clone(), torch.zeros_like(nowhere)
    starts, first_tokens = cu_seqlens_q[:-1].long(), cu_seqlens_k[:-1].long()
    lengths = cu_seqlens_q.diff().long()
    prefixes = cu_seqlens_k.diff().long() - lengths  # the tokens of a run's sequence before the run

    run = torch.searchsorted(cu_seqlens_q[1:], rows, right=True)
    is_padding = run >= num_runs
    run.clamp_(max=num_runs - 1)
    offset = rows - starts[run]
    depth = prefixes[run] + offset

    # Below row j are the rest of its run and the runs whose prefix leads through it.
    tokens = torch.arange(kv_index.shape[0], device=rows.device)
    owner = torch.searchsorted(cu_seqlens_k[1:], tokens, right=True).clamp_(max=num_runs - 1)
    in_prefix = tokens - first_tokens[owner] < prefixes[owner]
    sums = _exclusive_sum((lengths[owner] * in_prefix)[kv_members.long()])
    size = lengths[run] - offset + sums[kv_indptr[1:]] - sums[kv_indptr[:-1]]

    # A branch is entered after the subtree of the row that follows its parent in the parent's run, and after the
    # branches that left the same parent before it.
    has_parent = prefixes > 0
    parent = torch.where(has_parent, kv_index[(first_tokens + prefixes - 1).clamp(min=0)].long(), -1)
    parent_run = run[parent]  # of a run without a parent: any
    follower = (parent + 1).clamp(max=num_rows - 1)
    is_followed = has_parent & (parent + 1 < starts[parent_run] + lengths[parent_run])
    by_parent, order = parent.sort(stable=True)
    earlier = _exclusive_sum(size[starts[order]])[:-1]
    earlier = earlier - earlier[torch.searchsorted(by_parent, by_parent)]
    hop = torch.empty_like(parent).index_copy_(0, order, earlier)
    hop += torch.where(has_parent, parent - starts[parent_run] + 1, 0) + torch.where(is_followed, size[follower], 0)
    # A run's number is the sum of the hops from the root to it: each round adds twice as many of them.
    hop = torch.nn.functional.pad(hop, (0, 1))
    above = torch.nn.functional.pad(torch.where(has_parent, parent_run, num_runs), (0, 1), value=num_runs)
    for _ in range(num_runs.bit_length()):
        hop, above = hop + hop[above], above[above]

    enter = torch.where(is_padding, -1, hop[run] + offset)
    leave = torch.where(is_padding, -1, enter + size)
    return enter.int(), leave.int(), depth.masked_fill_(is_padding, 0).int()


def _exclusive_sum(x: Tensor) -> Tensor:
    """[n] -> [n + 1], 0 and then the sum up to each element."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))


def num_blocks(num_rows):
    """Blocks of rows in the tables of `trie_blocks`; at least 2, since compiled code treats a size of 1 apart."""
    return torch.sym_max((num_rows + BLOCK - 1) // BLOCK, 2)


def trie_blocks(enter, leave, depth, cu_seqlens_q, cu_seqlens_k, kv_index, sliding_window=0):
    """Which BLOCK x BLOCK blocks of queries and keys FlexAttention computes: counts and indices, int32.

    counts [4, blocks] and indices [4, blocks, blocks]: for each block of queries those of keys that need a mask, and
    those of which every query sees every key; then, for each block of keys, the same of queries. Nothing is evaluated
    by rows x rows: a run visits the blocks on its path, and whether a block is full follows from its intervals' bounds.
    """
    check_blocks(enter, leave, depth, cu_seqlens_q, cu_seqlens_k, kv_index)
    blocks = num_blocks(enter.shape[0])
    num_runs, num_tokens = cu_seqlens_q.shape[0] - 1, kv_index.shape[0]
    visits = torch.zeros(blocks + 1, blocks, dtype=torch.int32, device=enter.device)
    if num_runs and num_tokens:
        tokens = torch.arange(num_tokens, device=enter.device)
        run = torch.searchsorted(cu_seqlens_k[1:], tokens, right=True).clamp_(max=num_runs - 1)
        key_block = kv_index.long() // BLOCK
        is_new = (key_block != key_block.roll(1)) | (tokens == cu_seqlens_k[run])
        first = cu_seqlens_q[run].long() // BLOCK
        behind = (cu_seqlens_q[run + 1].long() - 1) // BLOCK + 1
        ones = is_new.int()
        visits.view(-1).index_add_(0, first * blocks + key_block, ones)
        visits.view(-1).index_add_(0, behind * blocks + key_block, -ones)
    visited = (visits.cumsum(0)[:blocks] > 0).tril_()

    def bounds(x: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        padded = torch.nn.functional.pad(x, (0, blocks * BLOCK - x.shape[0]), value=fill).view(blocks, BLOCK)
        return padded.aminmax(dim=1)

    enter_low, enter_high = bounds(enter, -1)
    leave_low, _ = bounds(leave, -1)
    full = (enter_high <= enter_low[:, None]) & (enter_high[:, None] < leave_low)
    if sliding_window:
        sliding_window = min(sliding_window, MAX_WINDOW)
        depth_low, depth_high = bounds(depth, 0)
        visited &= depth_low[:, None] - depth_high < sliding_window
        full &= depth_high[:, None] - depth_low < sliding_window
    full &= visited
    tables = torch.stack([visited & ~full, full])
    tables = torch.cat([tables, tables.mT])
    return tables.sum(-1, dtype=torch.int32), tables.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()


class _Tile(NamedTuple):
    keys: slice  # rows
    queries: slice  # numbers in depth-first order
    mask: Tensor | None  # bool [queries, keys], True where a query sees a key; None where all do


class _Edges(NamedTuple):
    """The trie as the host walks it: numbers in depth-first order of each row, and where each edge begins and ends."""

    row_of: Tensor  # [M] int64, the row of each number
    first_row: list[int]
    length: list[int]
    enter: list[int]
    leave: list[int]
    depth: Tensor  # [M] int64 by number

    @classmethod
    def of(cls, enter: Tensor, leave: Tensor, depth: Tensor, cu_seqlens_q: Tensor) -> _Edges:
        count = int(cu_seqlens_q[-1]) if cu_seqlens_q.shape[0] else 0
        enter, leave = enter[:count].long(), leave[:count].long()
        row_of = torch.empty_like(enter).index_copy_(0, enter, torch.arange(count, device=enter.device))
        is_first = torch.ones(count, dtype=torch.bool, device=enter.device)
        if count:
            is_first[1:] = leave[1:] != leave[:-1]
            is_first[cu_seqlens_q[:-1].long()] = True
        first = is_first.nonzero()[:, 0]
        ends = torch.cat([first[1:], first.new_tensor([count])]) if count else first
        return cls(
            row_of,
            first.tolist(),
            (ends - first).tolist(),
            enter[first].tolist(),
            leave[first].tolist(),
            depth[:count].long()[row_of],
        )


def _tiles(edges: _Edges, window: int, max_queries: int, k: Tensor, v: Tensor) -> Iterator[_Tile]:
    """Every pair of a query and a key that it sees, once.

    A masked key counts 0 times its value, which is NaN where the value is not finite; a row that others share must not
    take that from a later row. So where keys or values of a tile with a mask are not finite, its queries go one by one.
    """
    depth = edges.depth
    device = depth.device
    for first_row, length, enter, leave in zip(edges.first_row, edges.length, edges.enter, edges.leave, strict=True):
        top = int(depth[enter]) if window else 0
        for low in range(0, length, _TILE_KEYS):
            high = min(low + _TILE_KEYS, length)
            keys = slice(first_row + low, first_row + high)
            start = enter + low
            while start < leave:
                # Up to the tile's last key queries are its own rows, each of which sees the keys up to itself.
                own_end = enter + high
                end = min(start + max_queries, own_end if start < own_end else leave)
                queries = slice(start, end)
                visible = None
                if start < own_end:
                    last = end - enter  # keys behind the last query are seen by none
                    keys_here = slice(keys.start, first_row + min(high, last))
                    columns = torch.arange(low, min(high, last), device=device)
                    distance = torch.arange(start - enter, last, device=device)[:, None] - columns
                    visible = distance >= 0
                    if window:
                        visible &= distance < window
                elif window:
                    keys_here = keys
                    nearest = int(depth[queries].amin()) - (top + high - 1)
                    if nearest >= window:
                        start = end
                        continue
                    distance = depth[queries, None] - torch.arange(top + low, top + high, device=device)
                    visible = distance < window
                else:
                    keys_here = keys
                if visible is not None and bool(visible.all()):
                    visible = None
                if visible is None or is_finite(k[keys_here], v[keys_here]):
                    yield _Tile(keys_here, queries, visible)
                else:
                    for query, row in enumerate(visible):
                        seen = row.nonzero()[:, 0].tolist()
                        if seen:
                            one = slice(keys_here.start + seen[0], keys_here.start + seen[-1] + 1)
                            yield _Tile(one, slice(start + query, start + query + 1), None)
                start = end


def _check(op, q, k, v, enter, leave, depth, cu_seqlens_q, sliding_window) -> None:
    check_qkv(op, q, k, v, sliding_window)
    check_index_like(op, q.device, enter=enter, leave=leave, depth=depth, cu_seqlens_q=cu_seqlens_q)
    num_rows = q.shape[0]
    if not all(x.shape[0] == num_rows for x in (k, enter, leave, depth)):
        raise RuntimeError(
            f"radix::{op}: q, k, v, enter, leave and depth must have equally many rows, got {num_rows}, {k.shape[0]}, "
            f"{v.shape[0]}, {enter.shape[0]}, {leave.shape[0]} and {depth.shape[0]}"
        )


def _by_number(x: Tensor, edges: _Edges, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[rows, H, D] -> [H_kv, M, H / H_kv, D] in depth-first order, contiguous."""
    grouped = x[edges.row_of].to(dtype).unflatten(1, (kv_heads, -1))
    return grouped.permute(1, 0, 2, 3).contiguous()


def _by_row(x: Tensor, edges: _Edges, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The inverse of _by_number, with zeros for padding rows."""
    rows = x.permute(1, 0, 2, 3).flatten(1, 2)
    return torch.zeros(num_rows, *rows.shape[1:], dtype=dtype, device=x.device).index_copy_(
        0, edges.row_of, rows.to(dtype)
    )


def _scores(queries: Tensor, keys: Tensor, tile: _Tile, scale: float) -> Tensor:
    """[H_kv, queries, group, keys], -inf where a query does not see a key."""
    heads, count, group, dim = queries.shape
    scores = torch.bmm(queries.reshape(heads, count * group, dim), keys.permute(1, 2, 0)).mul_(scale)
    scores = scores.view(heads, count, group, keys.shape[0])
    if tile.mask is not None:
        scores.masked_fill_(~tile.mask[None, :, None], float("-inf"))
    return scores


def trie_attention(q, k, v, enter, leave, depth, cu_seqlens_q, scale, sliding_window=0):
    _check("trie_attention", q, k, v, enter, leave, depth, cu_seqlens_q, sliding_window)
    edges = _Edges.of(enter, leave, depth, cu_seqlens_q)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries = _by_number(q, edges, kv_heads, wide)
    count = queries.shape[1]
    # The softmax of what each query has seen so far: the largest score, the sum of exponentials, and that of values.
    largest = torch.full((kv_heads, count, group), float("-inf"), dtype=wide, device=q.device)
    total = torch.zeros_like(largest)
    out = torch.zeros(kv_heads, count, group, v.shape[2], dtype=wide, device=q.device)
    for tile in _tiles(edges, sliding_window, _TILE_QUERIES, k, v):
        keys, values = k[tile.keys].to(wide), v[tile.keys].to(wide)
        scores = _scores(queries[:, tile.queries], keys, tile, scale)
        before, sums, outs = (x[:, tile.queries] for x in (largest, total, out))
        now = torch.maximum(before, scores.amax(-1))
        # A query that has seen no key yet has -inf here, and -inf from itself is NaN.
        base = now.masked_fill(now == float("-inf"), 0)
        fade = (before - base).exp_()
        scores.sub_(base[..., None]).exp_()
        sums.mul_(fade).add_(scores.sum(-1))
        added = torch.bmm(scores.flatten(1, 2), values.transpose(0, 1)).view_as(outs)
        outs.mul_(fade[..., None]).add_(added)
        before.copy_(now)
    out /= total[..., None]
    logsumexp = _by_row((largest + total.log())[..., None], edges, q.shape[0], wide)[:, :, 0].T.contiguous()
    return _by_row(out, edges, q.shape[0], q.dtype), logsumexp


def trie_attention_backward(
    grad_out, q, k, v, out, logsumexp, enter, leave, depth, cu_seqlens_q, scale, sliding_window=0
):
    """The gradients of q, k and v, with the probabilities computed again; sums are in fp32 (fp64 for float64)."""
    _check("trie_attention_backward", q, k, v, enter, leave, depth, cu_seqlens_q, sliding_window)
    edges = _Edges.of(enter, leave, depth, cu_seqlens_q)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[1]
    queries, grads, outs = (_by_number(x, edges, kv_heads, wide) for x in (q, grad_out, out))
    sums = _by_number(logsumexp.T[..., None], edges, kv_heads, wide)
    mean = (grads * outs).sum(-1, keepdim=True)
    grad_q = torch.zeros_like(queries)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for tile in _tiles(edges, sliding_window, _TILE_QUERIES, k, v):
        keys, values = k[tile.keys].to(wide), v[tile.keys].to(wide)
        these_queries, these_grads = (x[:, tile.queries].flatten(1, 2) for x in (queries, grads))
        probabilities = _scores(queries[:, tile.queries], keys, tile, scale).sub_(sums[:, tile.queries]).exp_()
        grad_scores = torch.bmm(these_grads, values.permute(1, 2, 0)).view_as(probabilities)
        grad_scores = grad_scores.sub_(mean[:, tile.queries]).mul_(probabilities).mul_(scale).flatten(1, 2)
        probabilities = probabilities.flatten(1, 2)
        grad_v[tile.keys] += torch.bmm(probabilities.transpose(1, 2), these_grads).transpose(0, 1)
        grad_k[tile.keys] += torch.bmm(grad_scores.transpose(1, 2), these_queries).transpose(0, 1)
        grad_q[:, tile.queries] += torch.bmm(grad_scores, keys.transpose(0, 1)).view_as(grad_q[:, tile.queries])
    return _by_row(grad_q, edges, q.shape[0], q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def flex(q, k, v, enter, leave, counts, indices, depth, oldest, scale):
    """[num_rows, H, D_v] by FlexAttention over `trie_blocks`; in eager mode compiled once for each kind of call.

    `oldest` [num_rows] is the smallest depth that a query sees in its sliding window, or None. FlexAttention itself
    tells batches of fewer than 128 rows from others: they make one more compilation.
    """
    if q.shape[0] == 0:
        return q.sum(-1, keepdim=True).expand(-1, -1, v.shape[2])  # with a gradient, if there is one
    arguments = (q, k, v, enter, leave, counts, indices, depth, oldest)
    if torch.compiler.is_compiling():
        return _flex(*arguments, scale)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    shapes = (tuple(q.shape[1:]), tuple(k.shape[1:]), v.shape[2])
    return _compiled_flex(scale, q.device, q.dtype, shapes, oldest is None, differentiable)(*arguments)


@functools.lru_cache(maxsize=64)
def _compiled_flex(scale, *kind_of_call):
    # Dynamo counts recompilations by code object and gives up after a few; each kind of call gets one of its own.
    own = types.FunctionType(_flex.__code__.replace(), _flex.__globals__, "radix_ops_flex")
    return torch.compile(functools.partial(own, scale=scale), dynamic=True, fullgraph=True)


def _flex(q, k, v, enter, leave, counts, indices, depth, oldest, scale):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def sees(batch, head, query, key):
        visible = (enter[key] <= enter[query]) & (enter[query] < leave[key])
        return visible if oldest is None else visible & (depth[key] >= oldest[query])

    num_rows, value_dim = q.shape[0], v.shape[2]
    by_query, by_key = ([counts[i, None, None], indices[i, None, None]] for i in (0, 2))
    full_by_query, full_by_key = ([counts[i, None, None], indices[i, None, None]] for i in (1, 3))
    mask = BlockMask(
        (num_rows, num_rows),
        *by_query,
        *full_by_query,
        *by_key,
        *full_by_key,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )
    if min(q.shape[2], value_dim) < 16:  # which FlexAttention does not take
        q, k, v = (torch.nn.functional.pad(x, (0, max(16 - x.shape[2], 0))) for x in (q, k, v))
    out = flex_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        # Short batches would take another kernel, and one past that length would compile again.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[0].transpose(0, 1)[:, :, :value_dim]
