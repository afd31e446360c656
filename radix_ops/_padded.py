"""Finds the real tokens of a padded batch [B, T] and puts them end to end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._integers import Integers, Mask, as_integers, as_mask, as_tensor

_MASKS = (torch.bool, torch.int32, torch.int64)  # what radix::unpad takes


class Unpadded(NamedTuple):
    """The N tokens of a padded batch, in front of others that count for nothing, and the mask they were found by."""

    input_ids: Tensor  # [B * T]
    cu_seqlens: Tensor  # [B + 1], starts below 0 if a row is no unbroken stretch of 1s
    position_ids: Tensor | None  # [B * T]
    attention_mask: Tensor  # [B, T]
    places: Tensor  # int64 [B * T] where each token stands in the flat padded batch

    def why_broken(self) -> str | None:
        """Return what is wrong with the first row that is no unbroken stretch of 1s, or None; the host waits."""
        ones = self.attention_mask
        mask = ones.bool()
        # A row without holes changes at most twice between padding and tokens, counting both ends as padding.
        outside = mask.new_zeros(mask.shape[0], 1, dtype=torch.int8)
        changes = torch.diff(mask.to(torch.int8), prepend=outside, append=outside)
        is_bad = (changes.abs().sum(1) > 2) | (ones != mask).any(1)
        if not is_bad.any():
            return None
        row = int(is_bad.nonzero()[0])
        return (
            f"attention_mask[{row}] must be one unbroken stretch of 1s with 0s around it (a row with holes "
            f"cannot be folded), got {shorten(self.attention_mask[row])}"
        )


def unpad(input_ids: Integers, attention_mask: Mask, position_ids: Integers | None) -> Unpadded:
    """Return the real tokens of `FoldedBatch.from_padded`'s arguments, without waiting for them.

    The fold refuses cu_seqlens that start below 0: so the host learns of a bad row as it learns of all else.
    """
    ids = as_integers("input_ids", as_tensor("input_ids", input_ids))
    given = {"input_ids": ids, "attention_mask": as_mask("attention_mask", attention_mask)}
    if position_ids is not None:
        given["position_ids"] = as_integers("position_ids", as_tensor("position_ids", position_ids))
    for name, tensor in given.items():
        if tensor.dim() != 2 or tensor.shape != ids.shape:
            raise ValueError(
                "input_ids, attention_mask and position_ids must have one shape [B, T], "
                f"got {list(ids.shape)} for input_ids and {list(tensor.shape)} for {name}"
            )
        if tensor.device != ids.device:
            raise ValueError(f"{name} is on {tensor.device}, but input_ids is on {ids.device}")
    ones = given["attention_mask"]
    mask = ones
    if mask.dtype not in _MASKS:
        mask = (ones != 0).int() + ((ones != 0) & (ones != 1))  # 2 for what is no mask
    cu_seqlens, places = torch.ops.radix.unpad(mask)
    positions = given["position_ids"].flatten()[places] if position_ids is not None else None
    return Unpadded(ids.flatten()[places], cu_seqlens, positions, ones, places)


def shorten(values: Tensor) -> str:
    """Return the first 8 values as an error shows them."""
    shown = values[:8].tolist()
    return f"[{', '.join(map(str, shown))}{', ...' if len(values) > 8 else ''}]"
