"""Tables that trie_attention and its backward refuse on the CPU, before they read or write anything by one."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from helpers import processes
from helpers.tries import LONG, order_of
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
BATCH = FoldedBatch.from_sequences(LONG)
NAMES = ("enter", "leave", "depth", "row_of", "path")
both = pytest.mark.parametrize("op", ["trie_attention", "trie_attention_backward"])


def tensors_of(rows, heads=4, kv_heads=2):
    return [torch.ones(rows, count, 8) for count in (heads, kv_heads, kv_heads)]


def call(op, tensors=None, window=0, batch=BATCH, **tables):
    """Call the op with the arguments given in place of the right ones."""
    tensors = tensors or tensors_of(batch.num_rows)
    right = dict(zip(NAMES, order_of(batch), strict=True))
    right |= {name: getattr(batch, name) for name in ("kv_index", "cu_seqlens_q", "num_nodes")}
    tables = (right | tables).values()
    if op == "trie_attention":
        return RADIX.trie_attention(*tensors, *tables, 1.0, window)
    q, _, v = tensors
    out = torch.ones(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    sums = torch.ones(q.shape[:2][::-1])
    return RADIX.trie_attention_backward(out, *tensors, out, sums, *tables, 1.0, window)


def refused(op, message):
    return pytest.raises(RuntimeError, match=rf"^radix::{op}: {message}")


@both
def test_refuses_tables_that_lead_outside(op):
    order = dict(zip(NAMES, order_of(BATCH), strict=True))
    for wide in (False, True):
        for name in (*NAMES, "kv_index"):
            for value in (-1, 2**31 - 1, *([2**31 + 7, -(2**63)] if wide else [])):
                table = order.get(name, BATCH.kv_index).clone().to(torch.int64 if wide else torch.int32)
                table[7] = value
                with refused(op, rf"{name}\[7\] is {value}, out of range"):
                    call(op, **{name: table})
    with refused(op, r"path and depth of row \d+ lead past the end of kv_index$"):
        call(op, kv_index=BATCH.kv_index[:-5])
    with refused(op, "num_nodes must be from 0 to the [0-9]+ rows of q, got -1$"):
        call(op, num_nodes=-1)
    with refused(op, r"path must have as many rows as q, \d+, got 3$"):
        call(op, path=order["path"][:3])


@both
def test_refuses_tables_of_no_trie(op):
    """Each table is within bounds. Places far outside must not be walked, nor two rows be written as one."""
    _, leave, depth, row_of, path = order_of(BATCH)

    def changed(table, row, by):
        table = table.clone()
        table[row] += by
        return table

    with refused(op, r"row_of must be the inverse of enter, but enter\[row_of\[1\]\] is 0$"):
        call(op, row_of=torch.zeros_like(row_of))
    with refused(op, r"leave\[0\] must be more than enter\[0\], 0, got 0$"):
        call(op, leave=torch.zeros_like(leave))
    for far in (1, 10**6, 10**9):
        with refused(op, rf"leave\[0\] must be at most {BATCH.num_nodes}, where the subtree around it ends"):
            call(op, leave=leave + far)
    with refused(op, r"leave\[5\] must be at most \d+, where the subtree around it ends, got"):
        call(op, leave=changed(leave, 5, 1))
    for by in (-1, 1):
        with refused(op, rf"depth\[400\] must be the 400 rows that enter and leave put above it, got {400 + by}$"):
            call(op, depth=changed(depth, 400, by))
    with refused(op, r"kv_index must hold the path to row 3 from path\[3\], 1, on$"):
        call(op, path=changed(path, 3, 1))
    for position in (0, 400, int(path[-1]) + 10):
        with refused(op, r"kv_index must hold the path to row \d+ from path\[\d+\], \d+, on$"):
            call(op, kv_index=changed(BATCH.kv_index, position, 1))


@both
def test_refuses_heads_that_do_not_fit(op):
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]])
    q, k, _ = tensors_of(batch.num_rows)
    for tensors, message in (
        ((q[0], k, k), r"q must have shape \[rows, heads, head_dim\], got \[4, 8\]"),
        ((q, k.double(), k), "q, k and v must have one dtype, got Float for q and Double for k"),
        ((q, k[1:], k), "k must have as many rows as q, 3, got 2"),
        ((q, k, k[:, :1]), r"k and v must have equal rows and heads, got \[3, 2, 8\] and \[3, 1, 8\]"),
        ((q, k[..., :4], k), "q and k must have one head_dim, got 8 and 4"),
        ((q[:, :3], k, k), "the 3 heads of q must be a multiple of the 2 heads of k and v"),
        ((q[..., :0], k[..., :0], k), "q must have at least one head and a head_dim of at least 1"),
        ((q.int(), k.int(), k.int()), "q must be float32, float64, bfloat16 or float16, got Int"),
    ):
        with refused(op, message):
            call(op, tensors, batch=batch)
    with refused(op, r"sliding_window must be at least 0 \(0: none\), got -1$"):
        call(op, (q, k, k), -1, batch)


def test_the_backward_refuses_results_that_do_not_fit():
    q, k, v = tensors_of(BATCH.num_rows)
    tables = *order_of(BATCH), BATCH.kv_index, BATCH.cu_seqlens_q, BATCH.num_nodes
    out, sums = RADIX.trie_attention(q, k, v, *tables, 1.0)
    rows = BATCH.num_rows
    for grad_out, result, logsumexp, message in (
        (out[1:], out, sums, rf"grad_out must have the shape \[{rows}, 4, 8\] and the dtype of the result, Float, got"),
        (out.double(), out, sums, "grad_out must have the shape"),
        (out, out[..., 1:], sums, r"out must have the shape .* got \[\d+, 4, 7\] and Float$"),
        (out, out, sums.T, rf"logsumexp must be \[4, {rows}\] in float32, got \[{rows}, 4\] and Float$"),
        (out, out, sums.double(), r"logsumexp must be .* and Double$"),
    ):
        with refused("trie_attention_backward", message):
            RADIX.trie_attention_backward(grad_out, q, k, v, result, logsumexp, *tables, 1.0)


def rewrite_while_it_runs():
    """Call both ops for a while beside a thread that writes tables outside and back."""
    tables = dict(zip(NAMES, (x.clone() for x in order_of(BATCH)), strict=True)) | {"kv_index": BATCH.kv_index.clone()}
    stop = time.monotonic() + 2

    def rewrite():
        while time.monotonic() < stop:
            for table in tables.values():
                saved = table[600:800].clone()
                table[600:800] = 2**31 - 1
                table[600:800] = saved

    writer = threading.Thread(target=rewrite)
    writer.start()
    want = {op: call(op) for op in ("trie_attention", "trie_attention_backward")}
    while time.monotonic() < stop:
        for op, result in want.items():
            # An error is an answer too.
            with contextlib.suppress(RuntimeError):
                assert all(map(torch.equal, call(op, **tables), result))
    writer.join()


def test_tables_that_another_thread_rewrites_are_refused_or_right():
    run = processes.run_python(__file__)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    rewrite_while_it_runs()
