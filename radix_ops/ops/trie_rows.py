"""Attention over a trie for the queries of some rows alone.

csrc/cpu computes it on the CPU. On CUDA, in bfloat16 and float16, a few queries walk their paths each on its own, by
the kernel of `trie_rows_triton`; many share what they read, and stand at their rows among zeros in `trie_attention`.
The gradient is computed so everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import trie
from .checks import check_index_like, check_qkv, check_storages

# Rows for each query from which on queries walk alone. On an H200, for last rows, that took 0.15 to 0.5 times as long
# at 64 as the Triton kernel for all rows, and 0.25 to 0.9 times at 32; csrc/cuda's is about twice as fast as that one.
_ROWS_PER_QUERY = 64


def placed(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Put x [W, ...] at its rows of [num_rows, ...], among zeros.

    Rows that come twice must have equal x: the first of them counts, and takes the whole gradient.
    """
    first, is_first = _first_places(rows, num_rows)
    # What is written twice is written in any order, so it must be the same bits; and its gradient is read once.
    x = torch.where(is_first.view(-1, *[1] * (x.dim() - 1)), x, x.detach()[first])
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy(0, rows.long(), x)


def _first_places(rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return where in rows [W] each first comes, int64 [W], and whether that is here."""
    index, places = rows.long(), torch.arange(rows.shape[0], device=rows.device)
    first = torch.full((num_rows,), 2**62, device=rows.device).scatter_reduce(0, index, places, "amin")[index]
    return first, first == places


def trie_attention_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *arguments) -> Tensor:
    count = len(trie.TrieTables._fields)
    tables = trie.TrieTables(*arguments[:count])
    scale, window = (*arguments[count:], 0)[:2]
    _check(q, k, v, rows, tables, window)
    if trie.has_kernels(q, v) and q.shape[0] * _ROWS_PER_QUERY <= k.shape[0]:
        from . import trie_rows_triton

        return trie_rows_triton.forward(q, k, v, rows, tables, scale, window)
    out = trie.trie_attention(placed(q, rows, k.shape[0]), k, v, *arguments)[0]
    return out.index_select(0, rows)


def gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *arguments) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v, as those of all rows, of which others than these have none."""
    num_rows = k.shape[0]
    queries = placed(q, rows, num_rows)
    out, logsumexp = torch.ops.radix.trie_attention(queries, k, v, *arguments)
    grads = torch.ops.radix.scatter_add(grad_out, rows, num_rows)
    grad_q, grad_k, grad_v = torch.ops.radix.trie_attention_backward(grads, queries, k, v, out, logsumexp, *arguments)
    _, is_first = _first_places(rows, num_rows)
    return torch.ops.radix.gather(grad_q, rows).masked_fill(~is_first[:, None, None], 0), grad_k, grad_v


def _check(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, tables: trie.TrieTables, sliding_window: int) -> None:
    def fail(message: str):
        raise RuntimeError(f"radix::trie_attention_rows: {message}")

    indices = {"rows": rows} | tables.tensors()
    check_index_like("trie_attention_rows", q.device, **indices)
    check_storages("trie_attention_rows", **indices)
    check_qkv("trie_attention_rows", q, k, v, sliding_window)
    if rows.shape[0] != q.shape[0]:
        fail(f"rows must hold one row for each of the {q.shape[0]} queries, got {rows.shape[0]}")
    for name, tensor in tables.by_row().items():
        if tensor.shape[0] != k.shape[0]:
            fail(f"{name} must have as many rows as k, {k.shape[0]}, got {tensor.shape[0]}")
    if not 0 <= tables.num_nodes <= k.shape[0]:
        fail(f"num_nodes must be from 0 to the {k.shape[0]} rows of k, got {tables.num_nodes}")
