"""Causal attention over compact rows, behind one function: three layouts, on the CPU and on CUDA."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .batch import FoldedBatch
from .ops import flash, trie, trie_rows
from .ops.checks import ATTENTION_DTYPES

Layout: TypeAlias = Literal["auto", "compact", "trie", "unfold"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# "packed" is "compact" where the keys of every sequence stand as they are needed.
_Way: TypeAlias = Literal["compact", "packed", "trie", "unfold"]
# Where attention runs and autocast works. To ask torch.amp instead would break graphs compiled by torch 2.11.
_AUTOCAST_DEVICES = ("cpu", "cuda")
# How often unfolding must repeat keys on average for "auto" to take "trie" on the CPU in half precision.
_REPEATS_FOR_TRIE = 16
# How many times fewer rows must be wanted than there are for "auto" to take "trie" for them alone.
_ROWS_FOR_TRIE = 4


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: FoldedBatch,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    layout: Layout = "auto",
) -> Tensor:
    """Let each row attend to the rows on its path from the start of its sequence.

    Args:
        q: [num_rows, H, D], float32, float64, bfloat16 or float16.
        k: [num_rows, H_kv, D] of the same dtype and device; H is a multiple of H_kv (grouped-query attention: head h
            of q reads head h * H_kv // H of k and v). Under autocast dtypes may differ: what is not float64 is cast
            to autocast's dtype, as for scaled_dot_product_attention.
        v: [num_rows, H_kv, D_v], otherwise as k.
        batch: the batch that the rows belong to, on the same device.
        scale: factor of the scores, 1 / sqrt(D) by default.
        sliding_window: each token sees itself and at most sliding_window - 1 tokens before it; None: all of them.
        layout: how it is computed, not what.
            "compact" leaves q as it is and unfolds the keys and values of the sequences that add rows, so that each
            row's attention is computed once. Where nothing is shared, nothing is unfolded.
            "trie" unfolds nothing and attends to the rows as they stand: the least memory, and the most to gain where
            long prefixes are shared.
            "unfold" unfolds q, k and v, attends all packed tokens and folds the output, as RadixMLP does (arXiv
            2601.15013): for comparison.
            "auto" takes "trie" on CUDA where our kernels run, unless nothing is shared; on the CPU in float32 and
            float64, and in bfloat16 and float16 where unfolding would repeat keys 16 times or more on average;
            "compact" elsewhere. In compiled code it does not look at the batch, so that one graph serves all.

    With and without gradients it is computed in one way, to the same bits. On the CPU those of "trie" are the same for
    any number of threads; "compact" and "unfold" multiply by torch's scaled_dot_product_attention and bmm, whose last
    bits may change with it.

    On CUDA in bfloat16 and float16, compute capability 8.0 or more, head_dim up to 256, kernels do it (torch's flash
    attention, or that of `radix_ops.activate_flash_attention`, and ours for "trie", in Triton, which are compiled in a
    second or two on the first call of a kind: dtype, heads, with a window or without), and nothing waits for the host.
    All else is correct and, on CUDA, slow: a loop on the host over the runs. Values that are not finite stay in the
    sequences they come from on the CPU; on CUDA they may spread to rows before them in the same sequence, as in any
    flash attention, and to other sequences.

    Returns [num_rows, H, D_v]; padding rows are exactly zero, and so are their gradients. Differentiable once; the
    backward may need the result as it was returned, so don't change it in place.
    Raises ValueError for shapes, devices and values, TypeError for dtypes, RuntimeError for a batch altered by hand.
    """
    q, k, v = map(cast_for_autocast, (q, k, v))
    check_attention(q, k, v, batch, sliding_window)
    return attend(q, k, v, batch, plan_attention(batch, layout), scale, sliding_window)


def cast_for_autocast(x: Tensor) -> Tensor:
    """Return x as torch's autocast hands it to scaled_dot_product_attention: in autocast's dtype, float64 as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class AttentionPlan(NamedTuple):
    """One way to attend for every layer of a forward, made once: all that attention needs beside its batch."""

    layout: _Way
    order: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None  # of radix::trie_order, for "trie"
    otherwise: _Way | None = None  # for "auto": the way for tensors that "trie" is not faster for
    has_padding: bool = False  # num_rows > num_nodes; known for "packed"
    repeats: float = 0.0  # how often unfolding would repeat a key, where that is known


def check_layout(layout: Layout) -> None:
    """Raise ValueError for a layout that does not exist."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def plan_attention(batch: FoldedBatch, layout: Layout) -> AttentionPlan:
    """Choose how all layers attend, without waiting for the device.

    Raises ValueError for a layout that does not exist; on the CPU, RuntimeError for a batch altered by hand.
    """
    check_layout(layout)
    is_compiling = torch.compiler.is_compiling()
    if batch.cu_seqlens_q.device.type == "cpu" and not is_compiling:
        batch._check_num_nodes()
    is_choice = layout == "auto"
    way: _Way = "compact" if layout == "auto" else layout
    has_padding, repeats = False, 0.0
    # Compiled code has one graph for all batches.
    if way == "compact" and not is_compiling:
        # Rows of runs that share nothing need no unfolding.
        if batch.kv_index.shape[0] == batch.num_nodes:
            way, has_padding = "packed", batch.num_rows > batch.num_nodes
        repeats = batch.kv_index.shape[0] / max(batch.num_nodes, 1)
    if way == "trie" or (is_choice and not (way == "packed" and batch.kv_index.is_cuda)):
        runs = batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index
        enter, leave, depth, row_of, path = torch.ops.radix.trie_order(*runs, batch.num_rows)
        order = enter, leave, depth, row_of, path
        return AttentionPlan("trie", order, way if is_choice else None, has_padding, repeats)
    return AttentionPlan(way, has_padding=has_padding)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: FoldedBatch,
    plan: AttentionPlan,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend by a plan, with arguments that are known to be right."""
    window, factor = sliding_window or 0, _factor(q, scale)
    tables = _tables(q, v, batch, plan)
    if tables is not None:
        return torch.ops.radix.trie_attention(q, k, v, *tables, factor, window)[0]
    way = plan.otherwise or plan.layout
    if way == "unfold":
        queries, keys, values = (batch.unfold(x) for x in (q, k, v))
        lengths = batch.num_tokens, batch.max_seqlen_k, batch.max_seqlen_k
        out = _varlen(queries, keys, values, batch.cu_seqlens, batch.cu_seqlens, lengths, factor, window)
        return _zero_padding_rows(batch.fold(out), batch)
    # Inductor must see no relation of num_rows and num_nodes, of which it then loses one: neither comparison nor cut.
    if way == "packed" and not (plan.has_padding and torch.compiler.is_compiling()):
        keys, values = (x[: batch.num_nodes] if plan.has_padding else x for x in (k, v))
    else:
        keys, values = torch.ops.radix.gather_kv.csr(k, v, batch.kv_index, batch.kv_indptr, batch.kv_members)
    lengths = batch.num_nodes, batch.max_seqlen_q, batch.max_seqlen_k
    return _varlen(q, keys, values, batch.cu_seqlens_q, batch.cu_seqlens_k, lengths, factor, window)


def plan_rows(batch: FoldedBatch, layout: Layout, plan: AttentionPlan, count: int) -> AttentionPlan:
    """Choose how a layer attends for `count` rows alone, where all others attend by `plan`.

    Few queries need no unfolded keys: "auto" takes "trie" for them, where our kernels run, whatever is shared.
    """
    if layout != "auto" or torch.compiler.is_compiling() or count * _ROWS_FOR_TRIE > batch.num_rows:
        return plan
    order = plan.order or plan_attention(batch, "trie").order
    return plan._replace(layout="trie", order=order, otherwise=plan.otherwise or plan.layout, repeats=math.inf)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    batch: FoldedBatch,
    plan: AttentionPlan,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend by a plan for the queries q [W, H, D] of some rows, k and v being those of all: [W, H, D_v].

    Rows that come twice must have equal queries; the first of them takes the whole gradient. The ways that unfold keys
    attend for all rows, with zeros for other queries: each row has the bits of `attend`.
    """
    tables = _tables(q, v, batch, plan)
    if tables is not None:
        return torch.ops.radix.trie_attention_rows(q, k, v, rows, *tables, _factor(q, scale), sliding_window or 0)
    out = attend(trie_rows.placed(q, rows, batch.num_rows), k, v, batch, plan, scale, sliding_window)
    return torch.ops.radix.gather(out, rows)


def _factor(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)


def _tables(q: Tensor, v: Tensor, batch: FoldedBatch, plan: AttentionPlan) -> trie.TrieTables | None:
    """Return the tables by which a plan attends for these tensors, where its way is "trie"."""
    if plan.order is None or (plan.otherwise is not None and not _trie_is_faster(q, v, plan)):
        return None
    return trie.TrieTables(*plan.order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    lengths: tuple[int, int, int],  # queries in all, the longest run, the longest sequence
    scale: float,
    window: int,
) -> Tensor:
    if flash.has_kernels(q, v):
        return torch.ops.radix.flash_attention(q, k, v, ends_q, ends_k, *lengths, scale, window)[0]
    return torch.ops.radix.varlen_attention(q, k, v, ends_q, ends_k, scale, window)


def _trie_is_faster(q: Tensor, v: Tensor, plan: AttentionPlan) -> bool:
    """Tell whether "auto" takes "trie" for these tensors.

    On an H200 "trie" was 1.0 to 1.3 times as fast as "compact" in whole models, and 0.96 to 1.26 times in training.
    With FlashAttention 3 (fa3-fwd) in "compact" the forward of attention alone was 0.9 to 1.6 times as fast by "trie"
    at head_dim 128, and 0.5 to 1 times at 64 (benchmarks/bench_attention_cuda.py): "auto" does not look at whose flash
    attention runs. On CPUs of 2 cores it was faster in float32, forward and backward
    (benchmarks/bench_attention_cpu.py). In bfloat16 and float16 its forward was faster only from about 16 repeats of a
    key on, where the CPU multiplies bfloat16 in hardware. Whether a gradient is wanted must not matter: a policy that
    is trained is compared with its reference, which is not.
    """
    if q.is_cuda:
        return trie.has_kernels(q, v)
    return q.dtype in (torch.float32, torch.float64) or plan.repeats >= _REPEATS_FOR_TRIE


def _zero_padding_rows(rows: Tensor, batch: FoldedBatch) -> Tensor:
    if not torch.compiler.is_compiling() and batch.num_rows == batch.num_nodes:
        return rows
    is_padding = torch.arange(batch.num_rows, device=rows.device) >= batch.num_nodes
    return rows.masked_fill(is_padding[:, None, None], 0)


def check_attention(q: Tensor, k: Tensor, v: Tensor, batch: FoldedBatch, sliding_window: int | None) -> None:
    """Raise what `attention` does for arguments that are wrong."""
    if not isinstance(batch, FoldedBatch):
        raise TypeError(f"batch must be a FoldedBatch, got {type(batch).__name__}")
    if sliding_window is not None and (isinstance(sliding_window, bool) or not isinstance(sliding_window, int)):
        raise TypeError(f"sliding_window must be an int or None, got {type(sliding_window).__name__}")
    if sliding_window is not None and not 1 <= sliding_window < 2**63:
        raise ValueError(f"sliding_window must be at least 1, or None for no window, got {sliding_window}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[0] != batch.num_rows:
            raise ValueError(
                f"{name} must have shape [num_rows={batch.num_rows}, heads, head_dim], got {list(x.shape)}"
            )
        if x.dtype not in ATTENTION_DTYPES or x.dtype != q.dtype:
            raise TypeError(
                "q, k and v must be of one dtype, float32, float64, bfloat16 or float16, "
                f"got {q.dtype} for q and {x.dtype} for {name}"
            )
        if x.device != batch.fold_index.device:
            raise ValueError(f"{name} is on {x.device}, but the batch is on {batch.fold_index.device}")
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q must have at least one head and a head_dim of at least 1, got {list(q.shape)}")
    if q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q [rows, H, D], k [rows, H_kv, D] and v [rows, H_kv, D_v] must agree in D and H_kv, and H be a multiple "
            f"of H_kv, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
