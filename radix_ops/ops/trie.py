"""Attention over a trie's rows as they stand, with no key or value unfolded.

A row sees its ancestors and itself. `trie_order` numbers the rows in depth-first order, in which every subtree is an
interval: row k is on the path to row q exactly when enter[k] <= enter[q] < leave[k]. At each row the rest of its own
run comes first, so a run stands side by side in this order too.

On the CPU csrc/cpu computes it. On CUDA in bfloat16 and float16 forward and backward are the kernels that `trie_launch`
launches, of `trie_triton` and csrc/cuda. Other dtypes on CUDA are computed here: the runs are cut into edges, rows side
by side of which only the last has further branches, and everything below an edge attends to it at once, so that a key
is read once for a block of queries, not once for each sequence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import flash
from .checks import MAX_WINDOW, check_gradient, check_index_like, check_qkv, check_saved, check_storages, is_finite

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Queries and keys of a tile: its scores stay in the cache.
_TILE_QUERIES, _TILE_KEYS = 256, 512


class TrieTables(NamedTuple):
    """The tables of radix::trie_attention, in the order of its schema: those of radix::trie_order and of the fold."""

    enter: Tensor  # [num_rows], as the next four
    leave: Tensor
    depth: Tensor
    row_of: Tensor
    path: Tensor
    kv_index: Tensor  # [K]
    cu_seqlens_q: Tensor  # [R + 1]
    num_nodes: int

    def by_row(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("enter", "leave", "depth", "row_of", "path")}

    def tensors(self) -> dict[str, Tensor]:
        return self.by_row() | {"kv_index": self.kv_index, "cu_seqlens_q": self.cu_seqlens_q}


def _split(arguments: tuple) -> tuple[TrieTables, float, int]:
    """Split the arguments behind an op's tensors into tables, scale and sliding_window, which may be left out."""
    count = len(TrieTables._fields)
    scale, window = (*arguments[count:], 0)[:2]
    return TrieTables(*arguments[:count]), scale, window


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
    def of(cls, tables: TrieTables) -> _Edges:
        count = tables.num_nodes
        enter, leave, depth, row_of = (
            x[:count].long() for x in (tables.enter, tables.leave, tables.depth, tables.row_of)
        )
        if count and not bool(((leave > enter) & (leave <= count)).all()):
            raise RuntimeError("radix::trie_attention: leave must be more than enter, and at most num_nodes")
        is_first = torch.ones(count, dtype=torch.bool, device=enter.device)
        if count:
            is_first[1:] = leave[1:] != leave[:-1]
            is_first[tables.cu_seqlens_q[:-1].long()] = True
        first = is_first.nonzero()[:, 0]
        ends = torch.cat([first[1:], first.new_tensor([count])]) if count else first
        return cls(
            row_of,
            first.tolist(),
            (ends - first).tolist(),
            enter[first].tolist(),
            leave[first].tolist(),
            depth[row_of],
        )


def _tiles(edges: _Edges, window: int, max_queries: int, k: Tensor, v: Tensor) -> Iterator[_Tile]:
    """Yield every pair of a query and a key that it sees, once.

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


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, tables: TrieTables, sliding_window: int) -> None:
    check_index_like(op, q.device, **tables.tensors())
    check_storages(op, **tables.tensors())
    check_qkv(op, q, k, v, sliding_window)
    for name, tensor in {"k and v": k, **tables.by_row()}.items():
        if tensor.shape[0] != q.shape[0]:
            raise RuntimeError(f"radix::{op}: {name} must have as many rows as q, {q.shape[0]}, got {tensor.shape[0]}")
    if not 0 <= tables.num_nodes <= q.shape[0]:
        raise RuntimeError(
            f"radix::{op}: num_nodes must be from 0 to the {q.shape[0]} rows of q, got {tables.num_nodes}"
        )


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Return whether the kernels of `trie_triton` compute it."""
    return _HAS_TRITON and flash.has_kernels(q, v)


def _by_number(x: Tensor, edges: _Edges, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Bring [rows, H, D] to [H_kv, M, H / H_kv, D] in depth-first order, contiguous."""
    grouped = x[edges.row_of].to(dtype).unflatten(1, (kv_heads, -1))
    return grouped.permute(1, 0, 2, 3).contiguous()


def _by_row(x: Tensor, edges: _Edges, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Invert _by_number, with zeros for padding rows."""
    rows = x.permute(1, 0, 2, 3).flatten(1, 2)
    return torch.zeros(num_rows, *rows.shape[1:], dtype=dtype, device=x.device).index_copy_(
        0, edges.row_of, rows.to(dtype)
    )


def _scores(queries: Tensor, keys: Tensor, tile: _Tile, scale: float) -> Tensor:
    """Return [H_kv, queries, group, keys], -inf where a query does not see a key."""
    heads, count, group, dim = queries.shape
    scores = torch.bmm(queries.reshape(heads, count * group, dim), keys.permute(1, 2, 0)).mul_(scale)
    scores = scores.view(heads, count, group, keys.shape[0])
    if tile.mask is not None:
        scores.masked_fill_(~tile.mask[None, :, None], float("-inf"))
    return scores


def trie_attention(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    tables, scale, window = _split(arguments)
    _check("trie_attention", q, k, v, tables, window)
    if has_kernels(q, v):
        from . import trie_launch

        return trie_launch.forward(q, k, v, tables, scale, min(window, MAX_WINDOW))
    edges = _Edges.of(tables)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries = _by_number(q, edges, kv_heads, wide)
    count = queries.shape[1]
    # The softmax over the keys seen so far: the largest score, the sum of exponentials, and that of values.
    largest = torch.full((kv_heads, count, group), float("-inf"), dtype=wide, device=q.device)
    total = torch.zeros_like(largest)
    out = torch.zeros(kv_heads, count, group, v.shape[2], dtype=wide, device=q.device)
    for tile in _tiles(edges, window, _TILE_QUERIES, k, v):
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


def trie_attention_backward(grad_out, q, k, v, out, logsumexp, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; probabilities are computed again, sums are in fp32 (fp64 for float64)."""
    tables, scale, window = _split(arguments)
    _check("trie_attention_backward", q, k, v, tables, window)
    check_gradient("trie_attention_backward", grad_out, q, v)
    check_saved("trie_attention_backward", q, v, out, logsumexp)
    if has_kernels(q, v):
        from . import trie_launch

        return trie_launch.backward(grad_out, q, k, v, out, logsumexp, tables, scale, min(window, MAX_WINDOW))
    edges = _Edges.of(tables)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[1]
    queries, grads, outs = (_by_number(x, edges, kv_heads, wide) for x in (q, grad_out, out))
    sums = _by_number(logsumexp.T[..., None], edges, kv_heads, wide)
    mean = (grads * outs).sum(-1, keepdim=True)
    grad_q = torch.zeros_like(queries)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for tile in _tiles(edges, window, _TILE_QUERIES, k, v):
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
