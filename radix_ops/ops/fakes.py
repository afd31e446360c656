"""Registers the fake kernel of each op of torch.ops.radix, which gives its results' shapes and dtypes alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .checks import check_devices, check_index_like


def _new_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def _index_like(tensor: Tensor, *sizes) -> Tensor:
    return tensor.new_empty(sizes, dtype=torch.int32)


def _check_fold(op, input_ids, position_ids, cu_seqlens):
    check_index_like(op, input_ids.device, input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)


def _fold_outputs(input_ids, position_ids, num_tokens, num_rows):
    return (
        input_ids.new_empty(num_rows),
        position_ids.new_empty(num_rows),
        _index_like(input_ids, num_tokens),
        _index_like(input_ids, num_rows),
    )


@torch.library.register_fake("radix::fold")
def _fold_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1):
    _check_fold("fold", input_ids, position_ids, cu_seqlens)
    return _fold_outputs(input_ids, position_ids, input_ids.shape[0], _new_size())


def _plan_outputs(input_ids, position_ids, num_tokens):
    num_rows, num_runs, num_kv = _new_size(), _new_size(), _new_size()
    return (
        *_fold_outputs(input_ids, position_ids, num_tokens, num_rows),
        _index_like(input_ids, num_rows + 1),
        _index_like(input_ids, num_tokens),
        _index_like(input_ids, num_runs),
        _index_like(input_ids, num_runs + 1),
        _index_like(input_ids, num_runs + 1),
        _index_like(input_ids, num_kv),
        _index_like(input_ids, num_rows + 1),
        _index_like(input_ids, num_kv),
        torch.empty(4, dtype=torch.int64, device="cpu"),
    )


@torch.library.register_fake("radix::fold_plan")
def _fold_plan_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1):
    _check_fold("fold_plan", input_ids, position_ids, cu_seqlens)
    return _plan_outputs(input_ids, position_ids, input_ids.shape[0])


@torch.library.register_fake("radix::fold_batch")
def _fold_batch_fake(input_ids, position_ids, cu_seqlens, pad_multiple_of=1, from_zero=False, front=False):
    _check_fold("fold_batch", input_ids, position_ids, cu_seqlens)
    positions = input_ids.new_empty(0, dtype=torch.int64) if from_zero else position_ids
    tables = _plan_outputs(input_ids, positions, _new_size() if front else input_ids.shape[0])
    return *tables, _index_like(input_ids, cu_seqlens.shape[0])


@torch.library.register_fake("radix::unpad")
def _unpad_fake(attention_mask):
    lengths = attention_mask.shape[0] + 1, attention_mask.numel()
    return _index_like(attention_mask, lengths[0]), attention_mask.new_empty(lengths[1], dtype=torch.int64)


def _gather_fake(op, x, index, *inverse):
    check_index_like(op, x.device, index=index, **dict(zip(("indptr", "members"), inverse, strict=False)))
    return x.new_empty(index.shape[0], *x.shape[1:])


def _scatter_add_fake(op, src, index, *rest):
    *inverse, num_rows = rest
    check_index_like(op, src.device, index=index, **dict(zip(("indptr", "members"), inverse, strict=False)))
    torch._check(
        index.shape[0] == src.shape[0],
        lambda: (
            f"radix::{op}: index must hold one entry for each row of src, got {index.shape[0]} entries for "
            f"{src.shape[0]} rows"
        ),
    )
    return src.new_empty(num_rows, *src.shape[1:])


def _pair_fake(fake):
    def pair_fake(op, k, v, *rest):
        names = "k and v" if op.startswith("gather") else "src_k and src_v"
        check_devices(op, k.device, v=v)
        torch._check(
            k.shape[0] == v.shape[0],
            lambda: f"radix::{op}: {names} must have equally many rows, got {k.shape[0]} and {v.shape[0]}",
        )
        if k.dtype != v.dtype:
            raise RuntimeError(f"radix::{op}: {names} must have one dtype, got {k.dtype} and {v.dtype}")
        return fake(op, k, *rest), fake(op, v, *rest)

    return pair_fake


for _name, _fake in (("gather", _gather_fake), ("scatter_add", _scatter_add_fake)):
    for _op, _kernel in ((_name, _fake), (f"{_name}_kv", _pair_fake(_fake))):
        for _overload in (_op, f"{_op}.csr"):
            torch.library.register_fake(f"radix::{_overload}", functools.partial(_kernel, _overload))


@torch.library.register_fake("radix::varlen_attention")
def _varlen_attention_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sliding_window=0):
    check_index_like("varlen_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_devices("varlen_attention", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _logsumexp_like(q: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], dtype=dtype)


@torch.library.register_fake("radix::flash_attention")
def _flash_attention_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest):
    check_index_like("flash_attention", q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_devices("flash_attention", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), _logsumexp_like(q, torch.float32)


@torch.library.register_fake("radix::lexicographic_order")
def _lexicographic_order_fake(input_ids, starts, lengths):
    check_index_like("lexicographic_order", input_ids.device, input_ids=input_ids, starts=starts, lengths=lengths)
    return starts.new_empty(starts.shape[0], dtype=torch.int64)


@torch.library.register_fake("radix::common_prefix_lengths")
def _common_prefix_lengths_fake(input_ids, starts, lengths, order):
    given = {"input_ids": input_ids, "starts": starts, "lengths": lengths, "order": order}
    check_index_like("common_prefix_lengths", input_ids.device, **given)
    return order.new_empty(order.shape[0], dtype=torch.int64)


@torch.library.register_fake("radix::cut_batches")
def _cut_batches_fake(lengths, shared, max_rows, max_tokens, max_positions, max_sequences, batch_cost=0):
    check_index_like("cut_batches", lengths.device, lengths=lengths, shared=shared)
    return lengths.new_empty(_new_size(), dtype=torch.int64)


@torch.library.register_fake("radix::trie_order")
def _trie_order_fake(cu_seqlens_q, cu_seqlens_k, kv_index, num_rows):
    runs = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_index_like("trie_order", kv_index.device, **runs, kv_index=kv_index)
    return tuple(_index_like(kv_index, num_rows) for _ in range(5))


@torch.library.register_fake("radix::trie_attention")
def _trie_attention_fake(q, k, v, enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes, scale, *window):
    tables = {"enter": enter, "leave": leave, "depth": depth, "row_of": row_of, "path": path, "kv_index": kv_index}
    check_index_like("trie_attention", q.device, **tables, cu_seqlens_q=cu_seqlens_q)
    check_devices("trie_attention", q.device, k=k, v=v)
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), _logsumexp_like(q, wide)


@torch.library.register_fake("radix::trie_attention_rows")
def _trie_attention_rows_fake(q, k, v, rows, *rest):
    names = "rows", "enter", "leave", "depth", "row_of", "path", "kv_index", "cu_seqlens_q"
    check_index_like("trie_attention_rows", q.device, **dict(zip(names, (rows, *rest), strict=False)))
    check_devices("trie_attention_rows", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.register_fake("radix::trie_attention_sm90")
def _trie_attention_sm90_fake(q, k, v, leave, depth, row_of, path, kv_index, num_nodes, scale, sliding_window=0):
    tables = {"leave": leave, "depth": depth, "row_of": row_of, "path": path, "kv_index": kv_index}
    check_index_like("trie_attention_sm90", q.device, **tables)
    check_devices("trie_attention_sm90", q.device, k=k, v=v)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), _logsumexp_like(q, torch.float32)


def _attention_backward_fake(grad_out, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _name in (
    "varlen_attention_backward",
    "flash_attention_backward",
    "trie_attention_backward",
    "trie_attention_backward_sm90",
):
    torch.library.register_fake(f"radix::{_name}", _attention_backward_fake)
