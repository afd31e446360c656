"""The API of radix_mlp: compute_fold_and_scatter."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import radix_ops

from . import _fold

UInt32s: TypeAlias = npt.NDArray[np.uint32]

_UINT32 = np.dtype(np.uint32)
_fold_uint32 = ctypes.CDLL(str(Path(radix_ops.__file__).with_name("_C.abi3.so"))).radix_fold_uint32
_fold_uint32.restype = ctypes.c_int64
_fold_uint32.argtypes = [
    *[ctypes.c_void_p] * 2,
    ctypes.c_int64,
    ctypes.c_void_p,
    *[ctypes.c_int64] * 2,
    ctypes.c_void_p,
]
# These take a quarter of the time of array.ctypes.data.
_address_of, _first_byte = ctypes.addressof, ctypes.c_char.from_buffer
_SMALL = 4096  # elements: to copy them takes less time than to find out where they are


def compute_fold_and_scatter(
    input_ids: UInt32s,
    position_ids: UInt32s,
    cu_seq_lengths: UInt32s,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[UInt32s, UInt32s, UInt32s, UInt32s]:
    """Fold packed sequences given as uint32 arrays.

    Args:
        input_ids: [N] uint32.
        position_ids: [N] uint32.
        cu_seq_lengths: [B + 1] uint32, 0 and then the end of each sequence; may be empty if N is 0.
        pad_multiple_of: rounds the number of rows up to a multiple of it; None: no padding.
        bound_checks: changes nothing. Everything is checked, and nothing is read out of bounds.

    Returns compact_input_ids, compact_position_ids, scatter_indices [N] (token -> row) and fold_gather (row -> the
    token where it first occurs), all uint32, parts of one array. Raises TypeError for another type or dtype, ValueError
    for shapes, for a pad_multiple_of below 1 and for malformed cu_seq_lengths.
    """
    # A small fold takes no longer than what surrounds it, so a glance tells the usual.
    is_usual = (
        type(input_ids) is type(position_ids) is type(cu_seq_lengths) is np.ndarray
        and input_ids.dtype == position_ids.dtype == cu_seq_lengths.dtype == _UINT32
        and input_ids.ndim == cu_seq_lengths.ndim == 1
        and input_ids.shape == position_ids.shape
    )
    if not is_usual:
        _check(input_ids, position_ids, cu_seq_lengths)
    multiple = 1 if pad_multiple_of is None else _fold.multiple_of(pad_multiple_of)
    length, ends = len(input_ids), len(cu_seq_lengths)
    most = -(-length // multiple) * multiple
    out = np.empty(3 * most + length, _UINT32)
    if length <= _SMALL and ends <= _SMALL:
        sources: tuple[Any, Any, Any] = (input_ids.tobytes(), position_ids.tobytes(), cu_seq_lengths.tobytes())
    else:
        sources = _pointer(input_ids), _pointer(position_ids), _pointer(cu_seq_lengths)
    ids, positions, bounds = sources
    target = _address_of(_first_byte(out)) if length > 0 else None
    num_rows = _fold_uint32(ids, positions, length, bounds, ends - 1, multiple, target)
    if num_rows < 0:
        ids, positions, bounds = (
            torch.from_numpy(x.astype(np.int64)) for x in (input_ids, position_ids, cu_seq_lengths)
        )
        rows, places, scatter, gather = (
            x.numpy().astype(np.uint32) for x in _fold.fold(ids, positions, bounds, multiple)
        )
        return rows, places, scatter, gather
    return out[:num_rows], out[most : most + num_rows], out[3 * most :], out[2 * most : 2 * most + num_rows]


def _check(*arrays: Any) -> None:
    for name, array in zip(_fold.NAMES, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array of uint32, got {type(array).__name__}")
        if array.dtype != _UINT32:
            raise TypeError(f"{name} must be uint32, got {array.dtype}")
    _fold.check_shapes([array.shape for array in arrays])


def _pointer(array: UInt32s) -> ctypes.c_void_p:
    """Return a pointer to the elements, one after another, which it keeps alive."""
    return np.require(array, requirements=["C", "A"]).ctypes.data_as(ctypes.c_void_p)
