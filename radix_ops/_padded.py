"""Finds the real tokens of a padded batch [B, T] and puts them end to end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._integers import Integers, Mask, as_integers, as_mask, as_tensor


class Unpadded(NamedTuple):
    """The tokens of a padded batch as `fold` takes them, and the mask that they were found by."""

    input_ids: Tensor  # [N], on CUDA [B * T] with the N tokens in front
    cu_seqlens: Tensor  # [B + 1]
    position_ids: Tensor | None  # as input_ids
    attention_mask: Tensor  # [B, T]
    is_bad: Tensor  # [B] bool, True for a row that is no unbroken stretch of 1s

    def check_rows(self) -> None:
        """Raise ValueError for the first bad row; the host waits."""
        if self.is_bad.any():
            row = int(self.is_bad.nonzero()[0])
            raise ValueError(
                f"attention_mask[{row}] must be one unbroken stretch of 1s with 0s around it (a row with holes "
                f"cannot be folded), got {shorten(self.attention_mask[row])}"
            )


def unpad(input_ids: Integers, attention_mask: Mask, position_ids: Integers | None) -> Unpadded:
    """Return the real tokens of `FoldedBatch.from_padded`'s arguments; on CUDA, without waiting for them.

    There a bad row makes cu_seqlens start below 0: the host learns of it as it learns of all else, by the fold.
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
    mask = ones.bool()
    lengths = mask.sum(1)
    # A row without holes changes at most twice between padding and tokens, counting both ends as padding.
    outside = mask.new_zeros(mask.shape[0], 1, dtype=torch.int8)
    changes = torch.diff(mask.to(torch.int8), prepend=outside, append=outside)
    is_bad = (changes.abs().sum(1) > 2) | (ones != mask).any(1)
    if mask.is_cuda:
        cu_seqlens = torch.cat([-is_bad.sum()[None], lengths.cumsum(0)])
        # The first place up to which i + 1 tokens stand; behind the last token any place.
        counts = torch.arange(1, mask.numel() + 1, device=mask.device)
        places = torch.searchsorted(mask.flatten().cumsum(0), counts).clamp_(max=mask.numel() - 1)
    else:
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        places = mask.flatten().nonzero()[:, 0]
    positions = given["position_ids"].flatten()[places] if position_ids is not None else None
    found = Unpadded(ids.flatten()[places], cu_seqlens, positions, ones, is_bad)
    if not mask.is_cuda:
        found.check_rows()
    return found


def shorten(values: Tensor) -> str:
    """Return the first 8 values as an error shows them."""
    shown = values[:8].tolist()
    return f"[{', '.join(map(str, shown))}{', ...' if len(values) > 8 else ''}]"
