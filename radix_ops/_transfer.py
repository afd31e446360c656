"""Small tensors of the CPU on their way to a CUDA device: as parts of one buffer they travel in one copy."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Each part starts at a multiple of it, as an allocation by CUDA does.
_ALIGNMENT = 256


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on `device`, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pin_together(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors of the CPU into one buffer in pinned memory, and return its parts."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, device="cpu", pin_memory=True)
    parts = _parts(buffer, tensors)
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor)
    return parts


def copy_together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of the CPU to a CUDA device in one piece, without waiting for it, and return its parts."""
    if not _are_pinned_together(tensors):
        tensors = pin_together(tensors)
    buffer = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensors[0].untyped_storage())
    return _parts(buffer.to(device, non_blocking=True), tensors)


def _starts(tensors: list[Tensor]) -> list[int]:
    """Return where each part starts, in bytes, and the size of the buffer."""
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors)
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


def _parts(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    views = {dtype: buffer.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    parts = []
    for start, tensor in zip(_starts(tensors), tensors, strict=False):
        part = views[tensor.dtype].narrow(0, start // tensor.element_size(), tensor.numel())
        parts.append(part if tensor.dim() == 1 else part.view(tensor.shape))
    return parts


def _are_pinned_together(tensors: list[Tensor]) -> bool:
    starts, storage = _starts(tensors), tensors[0].untyped_storage()
    return (
        storage.nbytes() == starts[-1]
        and all(
            x.is_contiguous()
            and x.untyped_storage().data_ptr() == storage.data_ptr()
            and x.storage_offset() * x.element_size() == start
            for x, start in zip(tensors, starts, strict=False)
        )
        and tensors[0].is_pinned()
    )
