"""Launches the kernels of radix::trie_attention on CUDA: sizes of blocks, alignment, limits.

They are the Triton kernels of `trie_triton` and, on Hopper, radix::trie_attention_sm90 with its backward.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.runtime.errors import OutOfResources

from . import dispatch
from .trie import TrieTables
from .trie_triton import backward_kv_kernel, backward_q_kernel, forward_kernel

# (BLOCK_M, BLOCK_N, STAGES, warps): the fastest on an H200 at head_dim 128, one for other GPUs and larger heads that
# keeps its accumulators in registers, and smaller ones for where that does not fit into shared memory.
_CONFIGS = {
    forward_kernel: [(128, 128, 3, 8), (64, 64, 2, 8), (32, 32, 2, 4), (16, 16, 1, 4)],
    backward_q_kernel: [(128, 64, 5, 8), (64, 64, 2, 8), (32, 32, 2, 4), (16, 16, 1, 4)],
    backward_kv_kernel: [(64, 128, 2, 8), (64, 64, 2, 8), (32, 32, 2, 8), (16, 32, 1, 4)],
}
_HOPPER_SIZE = 128  # head_dim of what the ops for Hopper compute
_MOST_MEMBERS = 16  # query heads in one block
_TAIL = 64  # keys of a step with a mask, at most: there are few
# backward_kv_kernel counts pairs of a number and a query head in int32, at most two blocks of numbers past the last.
_INT32_LIMIT, _TWO_BLOCKS = 2**31, 256


class _Launcher:
    """Launches a kernel for one kind of call: device, types, heads, with a window or without.

    Triton's own way from arguments to a compiled kernel takes longer on the host than a small batch on the GPU. All
    addresses and strides are multiples of 16 here (see `_aligned`), so that there is one compiled kernel for a kind,
    and it can be called directly.
    """

    def __init__(self, kernel, device, heads: int, kv_heads: int, size: int, value_size: int, windowed: bool):
        self.kernel, self.heads, self.kv_heads = kernel, heads, kv_heads
        self.sizes = size, value_size, *(max(16, triton.next_power_of_2(x)) for x in (size, value_size)), windowed
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._configure(0 if is_hopper and max(self.sizes[:4]) <= 128 else 1)

    def _configure(self, at: int) -> None:
        self.at, self.compiled = at, None
        block_m, block_n, stages, self.warps = _CONFIGS[self.kernel][at]
        group = self.heads // self.kv_heads
        if self.kernel is backward_kv_kernel:
            self.numbers, self.programs = block_n, self.kv_heads
            self.constants = group, self.kv_heads, *self.sizes, block_m, block_n, stages
        else:
            members = _cdiv(group, _cdiv(group, _MOST_MEMBERS))
            self.numbers, self.programs = block_m // members, self.kv_heads * _cdiv(group, members)
            blocks = block_m, block_n, stages, min(block_n, _TAIL)
            self.constants = group, members, self.kv_heads, *self.sizes, *blocks

    def __call__(self, tensors, q, k, v, num_nodes, scale, window) -> None:
        num_rows = q.shape[0]
        strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
        while True:
            grid = (_cdiv(num_rows, self.numbers) * self.programs, 1, 1)
            arguments = *tensors, *strides, num_rows, num_nodes, scale, window, *self.constants
            if self.compiled is not None:
                self.compiled[grid](*arguments)
                return
            try:
                self.compiled = self.kernel[grid](*arguments, num_warps=self.warps)
                return
            except OutOfResources:
                if self.at + 1 == len(_CONFIGS[self.kernel]):
                    raise
                self._configure(self.at + 1)


_launchers: dict[tuple, _Launcher] = {}


def _launch(kernel, tensors, q, k, v, num_nodes, scale, window) -> None:
    if q.shape[0] == 0:
        return
    kind = q.shape[1], k.shape[1], q.shape[2], v.shape[2], window > 0
    key = kernel.__name__, q.device, q.dtype, kind
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = _Launcher(kernel, q.device, *kind)
    with torch.cuda.device_of(q):
        launcher(tensors, q, k, v, num_nodes, scale, window)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x [rows, heads, size], or a copy whose address and strides are multiples of 16.

    Others would make for slow loads, and for compilations that take minutes.
    """
    row, head, one = x.stride()
    if one == 1 and row % 16 == 0 and head % 16 == 0 and max(row, head) < 2**31 and x.data_ptr() % 16 == 0:
        return x
    size = x.shape[2]
    return x.new_empty(*x.shape[:2], _cdiv(size, 16) * 16)[:, :, :size].copy_(x)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _table(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return x in int32, contiguous and aligned; a value that int32 does not hold is a device assert."""
    if x.dtype != torch.int32:
        narrow = x.int()
        torch._assert_async((narrow == x).all(), f"radix::trie_attention: {name} must hold numbers that int32 holds")
        x = narrow
    return _contiguous(x)


def _query_tables(tables: TrieTables) -> tuple:
    """Return the tables that kernels of queries take, five tensors, and how many entries the last has."""
    names = "row_of", "leave", "depth", "path", "kv_index"
    num_keys = min(tables.kv_index.shape[0], _INT32_LIMIT - 1)
    return *(_table(name, getattr(tables, name)) for name in names), num_keys


def _check_size(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    rows, group = q.shape[0], q.shape[1] // k.shape[1]
    most = _INT32_LIMIT // group - _TWO_BLOCKS
    if rows > most:
        raise RuntimeError(
            f"radix::{op}: the Triton kernels take at most {most} rows with {group} query heads for each key/value "
            f"head, got {rows}; layout 'compact' takes more"
        )


def _is_for_hopper(q: torch.Tensor, v: torch.Tensor, window: int) -> bool:
    """Return whether the ops for Hopper compute what the Triton kernels would.

    On an H200 the forward was 1.7 to 2.3 times as fast at head_dim 128 without a window, the backward 1.7 to 2.6 times.
    The forward takes head_dim 64 and windows, too, which were not measured.
    """
    return q.is_cuda and window == 0 and q.shape[2] == v.shape[2] == _HOPPER_SIZE and _has_hopper(q.device.index)


@functools.cache
def _has_hopper(device_index: int) -> bool:
    names = "radix::trie_attention_sm90", "radix::trie_attention_backward_sm90"
    is_built = not any((name, "CUDA") in dispatch.REFUSALS for name in names)
    return is_built and torch.cuda.get_device_capability(device_index) == (9, 0)


def forward(q, k, v, tables: TrieTables, scale: float, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention [num_rows, H, D_v] and its logsumexp [H, num_rows] in base 2; window 0: none."""
    _check_size("trie_attention", q, k)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    query_tables = _query_tables(tables)
    if _is_for_hopper(q, v, window):
        row_of, leave, depth, path, kv_index, _ = query_tables
        rows = leave, depth, row_of, path
        return torch.ops.radix.trie_attention_sm90(q, k, v, *rows, kv_index, tables.num_nodes, scale, window)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    logsumexp = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    call = q, k, v, tables.num_nodes, scale, window
    _launch(forward_kernel, (q, k, v, out, logsumexp, *query_tables), *call)
    return out, logsumexp


def backward(
    grad_out, q, k, v, out, logsumexp, tables: TrieTables, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    _check_size("trie_attention_backward", q, k)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    grad_out, out, logsumexp = _contiguous(grad_out), _contiguous(out), _contiguous(logsumexp)
    query_tables = _query_tables(tables)
    if _is_for_hopper(q, v, window):
        row_of, leave, depth, path, kv_index, _ = query_tables
        rows = leave, depth, row_of, path
        saved = grad_out, q, k, v, out, logsumexp
        return torch.ops.radix.trie_attention_backward_sm90(*saved, *rows, kv_index, tables.num_nodes, scale)
    mean = torch.empty_like(logsumexp)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    call = q, k, v, tables.num_nodes, scale, window
    _launch(backward_q_kernel, (q, k, v, out, grad_out, logsumexp, mean, grad_q, *query_tables), *call)
    _launch(backward_kv_kernel, (q, k, v, grad_out, logsumexp, mean, grad_k, grad_v, *query_tables[:3]), *call)
    return grad_q, grad_k, grad_v
