"""Triton kernels of radix::trie_attention in bfloat16 and float16: flash attention over the numbers of `trie_order`.

In depth-first order the rows that a block of neighbouring queries sees are the path to its first query, which lies
side by side in kv_index, and the block itself. The higher part of that path is seen by the whole block, so that most
of the work has no mask; below, row k is seen by number n exactly when enter[k] <= n < leave[k]. Likewise the queries
that see a row of a block are an interval of numbers that begins at the block. So no key, value or gradient is copied
or summed outside the kernels, and nothing depends on the order in which blocks finish: results are deterministic.

No value of a table leads outside the tensors, nor makes a loop longer than the batch: numbers of rows and lengths of
paths are held to what there is where they are loaded, which a sound table never feels. A table that is not
`trie_order`'s gives wrong results, of whatever the arguments hold, and no error: to tell would take another launch.

A block of queries holds tokens x query heads of one key/value head (grouped-query attention), so that keys are read
once for all of them. logsumexp is in base 2. Padding rows are given zeros, and never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_LIMIT = tl.constexpr(2**31 - 1)


@triton.jit
def _row_in(row, num_rows):
    """Return a table's row, or the last for what is none: a single instruction, where a mask takes one a load."""
    last = (num_rows - 1).to(tl.uint32)
    return tl.minimum(row.to(tl.uint32, bitcast=True), last).to(tl.int32, bitcast=True)


@triton.jit
def _load_rows(
    x, row, head, stride_row, stride_head, is_row, MASKED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Load [rows, BLOCK], zeros behind SIZE and, with MASKED, where is_row is False."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = x + (row.to(tl.int64)[:, None] * stride_row + head.to(tl.int64) * stride_head + column)
    if MASKED:
        values = tl.load(pointers, mask=is_row[:, None] & (column < SIZE), other=0.0)
    elif SIZE < BLOCK:
        values = tl.load(pointers, mask=column < SIZE, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _store_rows(x, values, row, head, heads, is_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    pointers = x + ((row.to(tl.int64)[:, None] * heads + head) * SIZE + column[None, :])
    tl.store(pointers, values.to(x.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < SIZE))


@triton.jit
def _queries_of_program(
    row_of, num_rows, num_nodes,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Put the programs of one block of numbers side by side, the deepest blocks, which take longest, first."""
    TOKENS: tl.constexpr = BLOCK_M // MEMBERS
    PARTS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // (KV_HEADS * PARTS)
    part = tl.program_id(0) % (KV_HEADS * PARTS)
    kv_head = part // PARTS
    slot = tl.arange(0, BLOCK_M)
    member = part % PARTS * MEMBERS + slot % MEMBERS
    number = block * TOKENS + slot // MEMBERS
    is_slot = (slot < TOKENS * MEMBERS) & (member < GROUP)
    is_query = is_slot & (number < num_nodes)
    row = _row_in(tl.load(row_of + number, mask=is_query, other=0), num_rows)
    return block * TOKENS, kv_head, kv_head * GROUP + member, number, row, is_slot, is_query


@triton.jit
def _keys_of_block(
    row_of, depth, path, kv_index, num_keys, first, num_rows, num_nodes, own_depth, is_query, window,
    TOKENS: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Find the keys of a block of queries: `length` rows of the path to its first number, then its own, `count` in all.

    Key i of the path is at path_rows[i], key i of the block at own_rows[i]. From low to full_low some queries see a
    key, from full_low to full all do, from full on some do.
    """
    first_row = _row_in(tl.load(row_of + first), num_rows)
    # The rows of a path have lower numbers, and lie within kv_index.
    length = tl.maximum(tl.minimum(tl.load(depth + first_row), tl.minimum(first, num_keys)), 0)
    path_at = tl.maximum(tl.minimum(tl.load(path + first_row), num_keys - length), 0)
    count = length + tl.minimum(TOKENS, num_nodes - first)
    shared = tl.maximum(tl.minimum(tl.min(tl.where(is_query, own_depth, _NO_LIMIT)), length), 0)
    full = shared // BLOCK_N * BLOCK_N
    low = 0
    full_low = 0
    if WINDOWED:
        low = tl.maximum(shared + 1 - window, 0) // BLOCK_N * BLOCK_N
        deepest = tl.maximum(tl.minimum(tl.max(own_depth), num_nodes), 0)
        full_low = (tl.maximum(deepest + 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_low = tl.maximum(tl.minimum(full_low, full), low)
    return kv_index + path_at, row_of + (first - length), length, count, low, full_low, full


@triton.jit
def _keys_seen_by_all(
    k, v, path_rows, at, num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = _row_in(tl.load(path_rows + at + tl.arange(0, BLOCK_N)), num_rows)
    keys = _load_rows(k, row, kv_head, stride_kr, stride_kh, True, False, D, BLOCK_D)
    return keys, _load_rows(v, row, kv_head, stride_vr, stride_vh, True, False, DV, BLOCK_DV)


@triton.jit
def _keys_seen_by_some(
    k, v, path_rows, own_rows, at, length, count, first, number, own_depth, leave, depth, window, num_rows, kv_head,
    stride_kr, stride_kh, stride_vr, stride_vh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Load keys and values of the path and the block itself, and [queries, keys] whether they are seen."""
    key = at + tl.arange(0, BLOCK_N)
    is_key = key < count
    row = _row_in(tl.load(tl.where(key < length, path_rows + key, own_rows + key), mask=is_key, other=0), num_rows)
    end = tl.load(leave + row, mask=is_key, other=0)
    # Keys of the path come before every number of the block, as they do here.
    visible = (key[None, :] + (first - length) <= number[:, None]) & (number[:, None] < end[None, :])
    if WINDOWED:
        key_depth = tl.load(depth + row, mask=is_key, other=0)
        visible = visible & (own_depth[:, None] - key_depth[None, :] < window)
    keys = _load_rows(k, row, kv_head, stride_kr, stride_kh, is_key, True, D, BLOCK_D)
    values = _load_rows(v, row, kv_head, stride_vr, stride_vh, is_key, True, DV, BLOCK_DV)
    return keys, values, visible


@triton.jit
def _forward_step(queries, keys, values, visible, largest, total, acc, factor, MASKED: tl.constexpr):
    scores = tl.dot(queries, tl.trans(keys))
    if MASKED:
        scores = tl.where(visible, scores * factor, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # A query that has seen no key yet has -inf here, and -inf from itself is NaN.
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
    else:
        now = tl.maximum(largest, tl.max(scores, 1) * factor)
        base = now
        weights = tl.exp2(scores * factor - base[:, None])
    fade = tl.exp2(largest - base)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None])
    return now, total * fade + tl.sum(weights, 1), acc


_UNSPECIALIZED = ["num_keys", "num_rows", "num_nodes", "window"]  # so that batches of all sizes share one compilation


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q, k, v, out, logsumexp, row_of, leave, depth, path, kv_index, num_keys,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, num_rows, num_nodes, scale, window,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    first, kv_head, head, number, row, is_slot, is_query = _queries_of_program(
        row_of, num_rows, num_nodes, GROUP, MEMBERS, KV_HEADS, BLOCK_M
    )
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if first < num_nodes:
        queries = _load_rows(q, row, head[:, None], stride_qr, stride_qh, is_query, True, D, BLOCK_D)
        if scale < 0:  # the largest score times the factor must be the largest
            queries = -queries
        factor = tl.abs(scale) * _LOG2_E
        own_depth = tl.load(depth + row, mask=is_query, other=0)
        path_rows, own_rows, length, count, low, full_low, full = _keys_of_block(
            row_of, depth, path, kv_index, num_keys, first, num_rows, num_nodes, own_depth, is_query, window,
            BLOCK_M // MEMBERS, WINDOWED, BLOCK_N,
        )  # fmt: skip
        if WINDOWED:
            for at in tl.range(low, full_low, TAIL, num_stages=1):
                keys, values, visible = _keys_seen_by_some(
                    k, v, path_rows, own_rows, at, length, count, first, number, own_depth, leave, depth, window,
                    num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh,
                    D, DV, BLOCK_D, BLOCK_DV, WINDOWED, TAIL,
                )  # fmt: skip
                largest, total, acc = _forward_step(queries, keys, values, visible, largest, total, acc, factor, True)
        for at in tl.range(full_low, full, BLOCK_N, num_stages=STAGES):
            keys, values = _keys_seen_by_all(
                k, v, path_rows, at, num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            )  # fmt: skip
            largest, total, acc = _forward_step(queries, keys, values, True, largest, total, acc, factor, False)
        for at in tl.range(full, count, TAIL, num_stages=1):
            keys, values, visible = _keys_seen_by_some(
                k, v, path_rows, own_rows, at, length, count, first, number, own_depth, leave, depth, window,
                num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh, D, DV, BLOCK_D, BLOCK_DV, WINDOWED, TAIL,
            )  # fmt: skip
            largest, total, acc = _forward_step(queries, keys, values, visible, largest, total, acc, factor, True)

    is_stored = is_slot & (number < num_rows)
    row = tl.where(is_query, row, number)
    acc = tl.where(is_query[:, None], acc / total[:, None], 0.0)
    _store_rows(out, acc, row, head[:, None], GROUP * KV_HEADS, is_stored, DV, BLOCK_DV)
    sums = tl.where(is_query, largest + tl.log2(total), 0.0)
    tl.store(logsumexp + (head.to(tl.int64) * num_rows + row), sums, mask=is_stored)


@triton.jit
def _grad_q_step(queries, grads, keys, values, visible, sums, means, acc, factor, MASKED: tl.constexpr):
    weights = tl.exp2(tl.dot(queries, tl.trans(keys)) * factor - sums[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    grad_scores = weights * (tl.dot(grads, tl.trans(values)) - means[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, acc)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_q_kernel(
    q, k, v, out, grad_out, logsumexp, mean, grad_q, row_of, leave, depth, path, kv_index, num_keys,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, num_rows, num_nodes, scale, window,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store grad_q, and for `backward_kv_kernel` the mean of grad_out * value under each query's weights."""
    first, kv_head, head, number, row, is_slot, is_query = _queries_of_program(
        row_of, num_rows, num_nodes, GROUP, MEMBERS, KV_HEADS, BLOCK_M
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if first < num_nodes:
        factor = scale * _LOG2_E
        queries = _load_rows(q, row, head[:, None], stride_qr, stride_qh, is_query, True, D, BLOCK_D)
        out_stride = GROUP * KV_HEADS * DV
        grads = _load_rows(grad_out, row, head[:, None], out_stride, DV, is_query, True, DV, BLOCK_DV)
        outs = _load_rows(out, row, head[:, None], out_stride, DV, is_query, True, DV, BLOCK_DV)
        means = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
        at_query = head.to(tl.int64) * num_rows + row
        tl.store(mean + at_query, means, mask=is_query)
        sums = tl.load(logsumexp + at_query, mask=is_query, other=0.0)
        own_depth = tl.load(depth + row, mask=is_query, other=0)
        path_rows, own_rows, length, count, low, _, full = _keys_of_block(
            row_of, depth, path, kv_index, num_keys, first, num_rows, num_nodes, own_depth, is_query, window,
            BLOCK_M // MEMBERS, WINDOWED, BLOCK_N,
        )  # fmt: skip
        if WINDOWED:
            full = low
        else:
            for at in tl.range(0, full, BLOCK_N, num_stages=STAGES):
                keys, values = _keys_seen_by_all(
                    k, v, path_rows, at, num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                )  # fmt: skip
                acc = _grad_q_step(queries, grads, keys, values, True, sums, means, acc, factor, False)
        for at in tl.range(full, count, TAIL, num_stages=1):
            keys, values, visible = _keys_seen_by_some(
                k, v, path_rows, own_rows, at, length, count, first, number, own_depth, leave, depth, window,
                num_rows, kv_head, stride_kr, stride_kh, stride_vr, stride_vh, D, DV, BLOCK_D, BLOCK_DV, WINDOWED, TAIL,
            )  # fmt: skip
            acc = _grad_q_step(queries, grads, keys, values, visible, sums, means, acc, factor, True)
    is_stored = is_slot & (number < num_rows)
    acc = tl.where(is_query[:, None], acc * scale, 0.0)
    _store_rows(grad_q, acc, tl.where(is_query, row, number), head[:, None], GROUP * KV_HEADS, is_stored, D, BLOCK_D)


@triton.jit
def _grad_kv_step(
    q, grad_out, logsumexp, mean, row_of, depth, at, end, keys, values, key, leaves, key_depth, kv_head, window,
    grad_k, grad_v, factor, stride_qr, stride_qh, num_rows,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the shares of the queries at .. at + BLOCK_M, pairs of a number and a head of the group."""
    pair = at + tl.arange(0, BLOCK_M)
    number = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    is_query = pair < end
    row = _row_in(tl.load(row_of + number, mask=is_query, other=0) if MASKED else tl.load(row_of + number), num_rows)
    queries = _load_rows(q, row, head[:, None], stride_qr, stride_qh, is_query, MASKED, D, BLOCK_D)
    grads = _load_rows(grad_out, row, head[:, None], GROUP * KV_HEADS * DV, DV, is_query, MASKED, DV, BLOCK_DV)
    at_query = head.to(tl.int64) * num_rows + row
    sums = tl.load(logsumexp + at_query, mask=is_query, other=0.0) if MASKED else tl.load(logsumexp + at_query)
    means = tl.load(mean + at_query, mask=is_query, other=0.0) if MASKED else tl.load(mean + at_query)
    weights = tl.exp2(tl.dot(keys, tl.trans(queries)) * factor - sums[None, :])
    if MASKED:
        visible = (key[:, None] <= number[None, :]) & (number[None, :] < leaves[:, None])
        if WINDOWED:
            own_depth = tl.load(depth + row, mask=is_query, other=0)
            visible = visible & (own_depth[None, :] - key_depth[:, None] < window)
        weights = tl.where(visible, weights, 0.0)
    grad_v = tl.dot(weights.to(grads.dtype), grads, grad_v)
    grad_scores = weights * (tl.dot(values, tl.trans(grads)) - means[None, :])
    grad_k = tl.dot(grad_scores.to(queries.dtype), queries, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_kv_kernel(
    q, k, v, grad_out, logsumexp, mean, grad_k, grad_v, row_of, leave, depth,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, num_rows, num_nodes, scale, window,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    first = tl.program_id(0) // KV_HEADS * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    is_key = key < num_nodes
    row = _row_in(tl.load(row_of + key, mask=is_key, other=0), num_rows)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if first < num_nodes:
        factor = scale * _LOG2_E
        keys = _load_rows(k, row, kv_head, stride_kr, stride_kh, is_key, True, D, BLOCK_D)
        values = _load_rows(v, row, kv_head, stride_vr, stride_vh, is_key, True, DV, BLOCK_DV)
        leaves = tl.maximum(tl.minimum(tl.load(leave + row, mask=is_key, other=0), num_nodes), 0)
        key_depth = tl.load(depth + row, mask=is_key, other=0)
        # Pairs of a number and a head of the group: first those of the block's own numbers, then those that see all
        # of its keys, then those that see some.
        begin = first * GROUP
        end = tl.max(leaves) * GROUP
        own_end = begin + (BLOCK_N * GROUP + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        full_end = own_end
        if not WINDOWED:
            seen_by_all = tl.min(tl.where(is_key, leaves, _NO_LIMIT)) * GROUP
            full_end += tl.maximum(seen_by_all - own_end, 0) // BLOCK_M * BLOCK_M
        for at in tl.range(begin, tl.minimum(own_end, end), BLOCK_M, num_stages=1):
            acc_k, acc_v = _grad_kv_step(
                q, grad_out, logsumexp, mean, row_of, depth, at, end, keys, values, key, leaves, key_depth, kv_head,
                window, acc_k, acc_v, factor, stride_qr, stride_qh, num_rows,
                GROUP, KV_HEADS, D, DV, BLOCK_D, BLOCK_DV, True, WINDOWED, BLOCK_M,
            )  # fmt: skip
        for at in tl.range(own_end, full_end, BLOCK_M, num_stages=STAGES):
            acc_k, acc_v = _grad_kv_step(
                q, grad_out, logsumexp, mean, row_of, depth, at, end, keys, values, key, leaves, key_depth, kv_head,
                window, acc_k, acc_v, factor, stride_qr, stride_qh, num_rows,
                GROUP, KV_HEADS, D, DV, BLOCK_D, BLOCK_DV, False, WINDOWED, BLOCK_M,
            )  # fmt: skip
        for at in tl.range(full_end, end, BLOCK_M, num_stages=1):
            is_seen = True
            if WINDOWED:
                pair = at + tl.arange(0, BLOCK_M)
                query_row = _row_in(tl.load(row_of + pair // GROUP, mask=pair < end, other=0), num_rows)
                nearest = tl.min(tl.load(depth + query_row, mask=pair < end, other=_NO_LIMIT))
                is_seen = nearest - tl.max(key_depth) < window
            if is_seen:
                acc_k, acc_v = _grad_kv_step(
                    q, grad_out, logsumexp, mean, row_of, depth, at, end, keys, values, key, leaves, key_depth,
                    kv_head, window, acc_k, acc_v, factor, stride_qr, stride_qh, num_rows,
                    GROUP, KV_HEADS, D, DV, BLOCK_D, BLOCK_DV, True, WINDOWED, BLOCK_M,
                )  # fmt: skip
    is_stored = key < num_rows
    row = tl.where(is_key, row, key)
    acc_k = tl.where(is_key[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(is_key[:, None], acc_v, 0.0)
    _store_rows(grad_k, acc_k, row, kv_head, KV_HEADS, is_stored, D, BLOCK_D)
    _store_rows(grad_v, acc_v, row, kv_head, KV_HEADS, is_stored, DV, BLOCK_DV)
