"""Kernels of radix::varlen_attention: causal attention of runs over their sequences, a block of queries at a time.

On the CPU they serve every dtype; on CUDA float32, float64 and what flash attention can't take, where they wait for the
host to read the runs. Run r holds the queries [cu_seqlens_q[r], cu_seqlens_q[r+1]) and the keys
[cu_seqlens_k[r], cu_seqlens_k[r+1]); its last query stands at its last key. Query rows behind the last run are
padding: their output and gradient are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_gradient, check_index_like, check_qkv, check_storages, is_finite

# Queries that share one dense mask: as a whole, the mask of 2048 queries over 8192 keys would take 128 MiB in fp32.
_MAX_BLOCK_ROWS = 256
# Scores that the backward holds at a time, over all heads.
_MAX_BLOCK_SCORES = 1 << 24


class _Block(NamedTuple):
    rows: slice  # of q
    keys: slice  # of k and v
    mask: Tensor | None  # bool [rows, keys], True where a query sees a key; None where all do


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, sliding_window) -> tuple[list[int], list[int]]:
    def fail(message: str):
        raise RuntimeError(f"radix::varlen_attention: {message}")

    check_qkv("varlen_attention", q, k, v, sliding_window)
    check_index_like("varlen_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_storages("varlen_attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if not ends_q or len(ends_q) != len(ends_k) or ends_q[0] != 0 or ends_k[0] != 0:
        fail(
            "cu_seqlens_q and cu_seqlens_k must be equally long and start at 0, "
            f"got {_shorten(ends_q)} and {_shorten(ends_k)}"
        )
    for r in range(len(ends_q) - 1):
        length_q, length_k = ends_q[r + 1] - ends_q[r], ends_k[r + 1] - ends_k[r]
        if not 0 <= length_q <= length_k:
            fail(f"run {r} has {length_q} queries and {length_k} keys; 0 <= queries <= keys is needed")
    if ends_q[-1] > q.shape[0]:
        fail(f"cu_seqlens_q ends at {ends_q[-1]}, past the {q.shape[0]} rows of q")
    if ends_k[-1] != k.shape[0]:
        fail(f"cu_seqlens_k must end at the {k.shape[0]} rows of k, got {ends_k[-1]}")
    return ends_q, ends_k


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ... {values[-1]}]"


def _without_overlap(x: Tensor) -> Tensor:
    """Return x [n, H, D], copied where its rows or heads lie within each other.

    torch's attention on the CPU computes anything for such queries, as `as_strided` makes them; expanded ones are fine.
    """
    is_apart = all(x.stride(d) == 0 or x.stride(d) >= x.shape[2] for d in (0, 1) if x.shape[d] > 1)
    return x if is_apart else x.contiguous()


def _blocks(ends_q: list[int], ends_k: list[int], window: int, max_rows, k: Tensor, v: Tensor) -> Iterator[_Block]:
    """Yield every query once, in blocks of at most `max_rows(number of keys)` rows.

    A masked key counts 0 times its value, which is NaN where the value is not finite. A row that others share must not
    take that from a later token of one sequence, so there each query is a block of its own and sees no mask.
    """
    for r in range(len(ends_q) - 1):
        first_row, end_row = ends_q[r], ends_q[r + 1]
        first_key, end_key = ends_k[r], ends_k[r + 1]
        # The key that a row stands at is row + offset.
        offset = end_key - end_row
        row = first_row
        while row < end_row:
            block_end = min(row + max_rows(end_key - first_key), end_row)
            lowest = max(first_key, row + offset - window + 1) if window else first_key
            keys = slice(lowest, block_end + offset)
            maskable = slice(lowest if window else row + offset, keys.stop)
            if block_end - row > 1 and not is_finite(k[maskable], v[maskable]):
                for single in range(row, block_end):
                    first = max(first_key, single + offset - window + 1) if window else first_key
                    yield _Block(slice(single, single + 1), slice(first, single + offset + 1), None)
            else:
                yield _Block(
                    slice(row, block_end), keys, _mask(block_end - row, keys.stop - keys.start, window, k.device)
                )
            row = block_end


def _mask(num_rows: int, num_keys: int, window: int, device: torch.device) -> Tensor | None:
    """Let row i see the last `window` keys (all, if 0) up to num_keys - num_rows + i, where it stands."""
    if num_rows == 1:
        return None
    diagonal = num_keys - num_rows
    mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device).tril_(diagonal)
    if window:
        mask = mask.triu_(diagonal - window + 1)
    return mask


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sliding_window=0):
    ends_q, ends_k = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, sliding_window)
    q, k, v = map(_without_overlap, (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for block in _blocks(ends_q, ends_k, sliding_window, lambda num_keys: _MAX_BLOCK_ROWS, k, v):
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[block.rows], k[block.keys], v[block.keys]))
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=block.mask, scale=scale, enable_gqa=True
        )
        out[block.rows] = attended.squeeze(0).transpose(0, 1)
    out[ends_q[-1] :] = 0
    return out


def varlen_attention_backward(grad_out, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sliding_window=0):
    """Return the gradients of q, k and v; probabilities are computed again, sums are in fp32 (fp64 for float64)."""
    ends_q, ends_k = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, sliding_window)
    check_gradient("varlen_attention", grad_out, q, v)
    grad_out, q, k, v = map(_without_overlap, (grad_out, q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[1], k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))

    def by_kv_head(x: Tensor) -> Tensor:  # [n, H, D] -> [H_kv, n * H / H_kv, D]
        grouped = x.to(wide).unflatten(1, (kv_heads, heads // kv_heads))
        return grouped.permute(1, 0, 2, 3).flatten(1, 2)

    def by_row(x: Tensor) -> Tensor:  # the inverse of by_kv_head
        return x.unflatten(1, (-1, heads // kv_heads)).permute(1, 0, 2, 3).flatten(1, 2)

    def max_rows(num_keys: int) -> int:
        return max(1, min(_MAX_BLOCK_ROWS, _MAX_BLOCK_SCORES // (heads * num_keys)))

    for block in _blocks(ends_q, ends_k, sliding_window, max_rows, k, v):
        queries, grads = by_kv_head(q[block.rows]), by_kv_head(grad_out[block.rows])
        keys, values = (x[block.keys].to(wide).transpose(0, 1) for x in (k, v))  # [H_kv, keys, D]
        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
        if block.mask is not None:
            scores.masked_fill_(~block.mask.repeat_interleave(heads // kv_heads, 0), float("-inf"))
        probabilities = scores.softmax(-1)
        grad_v[block.keys] += torch.bmm(probabilities.transpose(1, 2), grads).transpose(0, 1)
        grad_probabilities = torch.bmm(grads, values.transpose(1, 2))
        mean = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        grad_scores = grad_probabilities.sub_(mean).mul_(probabilities).mul_(scale)
        grad_q[block.rows] = by_row(torch.bmm(grad_scores, keys))
        grad_k[block.keys] += torch.bmm(grad_scores.transpose(1, 2), queries).transpose(0, 1)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
