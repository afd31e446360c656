"""Token ids, positions and lengths as callers hold them -> int32 or int64 tensors, with every value kept."""

from __future__ import annotations

import array
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ops.checks import INDEX_DTYPES

Integers: TypeAlias = Tensor | npt.NDArray[np.integer[Any]]
TokenIds: TypeAlias = Sequence[SupportsIndex] | Integers
Mask: TypeAlias = Tensor | npt.NDArray[np.bool_ | np.integer[Any] | np.floating[Any]]

# torch stores and converts these, and computes little with them.
_STORED_ONLY = (torch.uint16, torch.uint32, torch.uint64)
_WIDENED = (torch.uint8, torch.int8, torch.int16, *_STORED_ONLY)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INT64 = np.iinfo(np.int64)


def as_tensor(name: str, values: object) -> Tensor:
    """Return a dense tensor as it is, an array of NumPy or of its interfaces, in any order of bytes, as a tensor."""
    if isinstance(values, Tensor):
        return _dense(name, values)
    if hasattr(values, "__cuda_array_interface__"):
        return torch.as_tensor(values)
    if not hasattr(values, "__array__") and not hasattr(values, "__array_interface__"):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {type(values).__name__}")
    return _from_array(name, values)


def as_mask(name: str, values: object) -> Tensor:
    """Return a tensor or an array of bools, integers or floats as a tensor that torch computes with."""
    tensor = as_tensor(name, values)
    if tensor.dtype in _STORED_ONLY:
        return tensor.to(torch.int64)
    if tensor.dtype not in (torch.bool, *INDEX_DTYPES, *_WIDENED, *_FLOATS):
        raise TypeError(f"{name} must hold bools, integers or floats, got {tensor.dtype}")
    return tensor


def as_integers(name: str, tensor: Tensor) -> Tensor:
    """Return int32 and int64 as they are, other integers in int64.

    Raises TypeError for other dtypes and bool, ValueError for a value of uint64 that int64 does not hold; to find one
    on CUDA, the host waits.
    """
    if tensor.dtype in INDEX_DTYPES:
        return tensor
    if tensor.dtype not in _WIDENED:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    if tensor.dtype != torch.uint64:
        return tensor.to(torch.int64)
    signed = tensor.view(torch.int64)
    if torch.compiler.is_compiling():
        torch._assert_async((signed >= 0).all(), f"{name} must hold integers that int64 holds")
    elif (signed < 0).any():
        raise _too_large(name, 2**64 + int(signed[signed < 0][0]))
    return signed


def as_flat_integers(name: str, values: object) -> Tensor:
    """Return a list, array or tensor of one dimension in int64, on the device where it is.

    Raises TypeError for other types, floats and bools, also among integers; ValueError for other shapes and for values
    that int64 does not hold.
    """
    if isinstance(values, (list, tuple)):
        tensor = _from_list(name, values)
    elif isinstance(values, Tensor) or hasattr(values, "__cuda_array_interface__"):
        tensor = as_tensor(name, values)
    else:
        tensor = _from_array(name, values)
    if tensor.dim() != 1:
        raise _not_flat(name, list(tensor.shape))
    return as_integers(name, tensor).to(torch.int64) if len(tensor) else tensor.to(torch.int64)


def as_packed_integers(name: str, sequences: Sequence[Any] | Integers) -> tuple[Tensor, list[int]]:
    """Return the integers of all sequences end to end in int64, on the first device that is not the CPU, and lengths.

    Raises as `as_flat_integers` does for sequence i, named `name[i]`.
    """
    lists = _pack_lists(sequences)
    if lists is not None:
        return lists
    tensors = [as_flat_integers(f"{name}[{i}]", sequence) for i, sequence in enumerate(sequences)]
    place = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
    tensors = [tensor.to(place) for tensor in tensors]
    packed = torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int64, device=place)
    return packed, [len(tensor) for tensor in tensors]


def _pack_lists(sequences: Sequence[Any] | Integers) -> tuple[Tensor, list[int]] | None:
    """Do it at once for lists of Python's integers; None for all else, and where int64 does not hold one."""
    if not isinstance(sequences, (list, tuple)) or not set(map(type, sequences)) <= {list, tuple}:
        return None
    values = array.array("q")
    try:
        for sequence in sequences:
            if not set(map(type, sequence)) <= {int}:
                return None
            values.extend(sequence)
    except OverflowError:
        return None
    packed = torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64, device="cpu")
    return packed, list(map(len, sequences))


def as_integer_list(name: str, values: Sequence[Any]) -> Sequence[int]:
    """Return the values as Python's integers: beside True and np.uint64(3) NumPy makes int64 and float64 of them.

    Raises as `as_flat_integers` does, but takes values of any size.
    """
    if set(map(type, values)) <= {int}:
        return values
    return [_index(name, values, x) for x in values]


def _dense(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind}")
    return tensor


def _from_array(name: str, values: Any) -> Tensor:
    if np.ma.is_masked(values):
        raise TypeError(f"{name} must hold integers, got an array with masked values")
    array = np.asarray(values)
    if array.dtype.kind == "O" and array.ndim == 1:
        return _from_list(name, array.tolist())
    if array.dtype.kind not in "biuf":
        got = type(values).__name__ if array.ndim == 0 else array.dtype
        raise TypeError(f"{name} must hold integers, got {got}")
    # torch takes neither strange strides and byte orders nor, without a warning, arrays that can't be written to.
    usable = np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W", "E"])
    try:
        return torch.from_numpy(usable)
    except TypeError:  # floats wider than its own
        raise TypeError(f"{name} must hold integers, got {array.dtype}") from None


def _from_list(name: str, values: Sequence[Any]) -> Tensor:
    values = as_integer_list(name, values)
    try:
        return torch.from_numpy(np.array(values, np.int64))
    except OverflowError:
        raise _too_large(name, next(x for x in values if not _INT64.min <= x <= _INT64.max)) from None


def _index(name: str, values: Sequence[Any], value: Any) -> int:
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", None):
        raise _not_flat(name, [len(values), len(value)])
    is_bool = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
    try:
        if not is_bool:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must hold integers, got {value!r}")


def _not_flat(name: str, shape: list[int]) -> ValueError:
    return ValueError(f"{name} must be a flat list of token ids, got shape {shape}")


def _too_large(name: str, value: int) -> ValueError:
    return ValueError(f"{name} must hold integers that int64 holds, got {value}")
