"""Triton kernel of radix::trie_attention_rows in bfloat16 and float16, for few queries.

Each query walks its path, which lies side by side in kv_index, alone: a program holds the query heads of one key/value
head. So a query has the same bits in whatever batch it comes, as long as its path holds the same keys. No value of a
table leads outside the tensors, as in `trie_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .checks import MAX_WINDOW
from .trie import TrieTables
from .trie_launch import _aligned, _cdiv, _table
from .trie_triton import _LOG2_E, _forward_step, _load_rows, _row_in, _store_rows

# (BLOCK_N, STAGES, warps): keys of a step, steps that are loaded ahead; the next where that does not fit.
_CONFIGS = ((64, 3, 4), (32, 2, 4), (16, 1, 4))
_BLOCK_M = 16  # query heads of a program, the least that a matrix product takes


@triton.jit(do_not_specialize=["num_keys", "num_rows", "window"])
def rows_kernel(
    q, k, v, out, enter, depth, path, kv_index, num_keys,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, num_rows, scale, window,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend for one query; enter, depth and path are those of the queries' rows."""
    PARTS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    query = tl.program_id(0) // (KV_HEADS * PARTS)
    part = tl.program_id(0) % (KV_HEADS * PARTS)
    kv_head = part // PARTS
    slot = tl.arange(0, BLOCK_M)
    member = part % PARTS * MEMBERS + slot
    is_head = (slot < MEMBERS) & (member < GROUP)
    head = kv_head * GROUP + member
    place = tl.full([BLOCK_M], 0, tl.int32) + query
    queries = _load_rows(q, place, head[:, None], stride_qr, stride_qh, is_head, True, D, BLOCK_D)
    if scale < 0:  # the largest score times the factor must be the largest
        queries = -queries
    factor = tl.abs(scale) * _LOG2_E
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Rows of padding have no path.
    is_node = tl.load(enter + query) >= 0
    length = tl.maximum(tl.minimum(tl.load(depth + query) + 1, num_keys), 0)
    length = tl.where(is_node, length, 0)
    path_rows = kv_index + tl.maximum(tl.minimum(tl.load(path + query), num_keys - length), 0)
    low = 0
    if WINDOWED:
        low = tl.maximum(length - window, 0)
    full = low + (length - low) // BLOCK_N * BLOCK_N
    for at in tl.range(low, full, BLOCK_N, num_stages=STAGES):
        row = _row_in(tl.load(path_rows + at + tl.arange(0, BLOCK_N)), num_rows)
        keys = _load_rows(k, row, kv_head, stride_kr, stride_kh, True, False, D, BLOCK_D)
        values = _load_rows(v, row, kv_head, stride_vr, stride_vh, True, False, DV, BLOCK_DV)
        largest, total, acc = _forward_step(queries, keys, values, True, largest, total, acc, factor, False)
    if full < length:
        key = full + tl.arange(0, BLOCK_N)
        is_key = key < length
        row = _row_in(tl.load(path_rows + key, mask=is_key, other=0), num_rows)
        keys = _load_rows(k, row, kv_head, stride_kr, stride_kh, is_key, True, D, BLOCK_D)
        values = _load_rows(v, row, kv_head, stride_vr, stride_vh, is_key, True, DV, BLOCK_DV)
        visible = is_key[None, :] & (slot[:, None] >= 0)
        largest, total, acc = _forward_step(queries, keys, values, visible, largest, total, acc, factor, True)
    acc = tl.where(length > 0, acc / total[:, None], 0.0)
    _store_rows(out, acc, place, head[:, None], GROUP * KV_HEADS, is_head, DV, BLOCK_DV)


_fitting: dict[tuple, int] = {}  # the configuration that fits, for heads of a size


def forward(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, tables: TrieTables, scale: float, window: int) -> Tensor:
    """Return the attention [W, H, D_v] of the queries q [W, H, D] of some rows; window 0: none."""
    out = q.new_empty(*q.shape[:2], v.shape[2])
    if q.shape[0] == 0:
        return out
    # A row that there is not is a device assert here.
    of_queries = [x.index_select(0, rows).int() for x in (tables.enter, tables.depth, tables.path)]
    q, k, v, kv_index = _aligned(q), _aligned(k), _aligned(v), _table("kv_index", tables.kv_index)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    members = _cdiv(group, _cdiv(group, _BLOCK_M))
    sizes = q.shape[2], v.shape[2], *(max(16, triton.next_power_of_2(x.shape[2])) for x in (q, v)), window > 0
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    grid = (q.shape[0] * kv_heads * _cdiv(group, members),)
    numbers = k.shape[0], scale, min(window, MAX_WINDOW), group, members, kv_heads, *sizes, _BLOCK_M
    kind = q.device, sizes
    with torch.cuda.device_of(q):
        for at in range(_fitting.get(kind, 0), len(_CONFIGS)):
            block_n, stages, warps = _CONFIGS[at]
            arguments = q, k, v, out, *of_queries, kv_index, kv_index.shape[0], *strides, *numbers, block_n, stages
            try:
                rows_kernel[grid](*arguments, num_warps=warps)
            except OutOfResources:
                if at + 1 == len(_CONFIGS):
                    raise
            else:
                _fitting[kind] = at
                break
    return out
