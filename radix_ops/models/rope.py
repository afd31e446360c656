"""How fast the pairs of a head's dimensions turn from position to position, with every scaling of a Qwen3's config."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .qwen3_config import Qwen3Config


def inverse_frequencies(config: Qwen3Config, device: torch.device) -> tuple[Tensor, float]:
    """Return how far each pair of dimensions turns a position, [head_dim / 2] in fp32, and the factor of cos and sin.

    A model has no buffer of them, so that casting it casts no frequencies.
    """
    rope, dim, theta = config.rope, config.head_dim, float(config.rope["rope_theta"])
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (pairs / dim)
    if rope["rope_type"] == "default":
        return frequencies, 1.0
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return frequencies / factor, 1.0
    # YaRN: pairs that turn often in the original length stay as they are, slow ones are slowed down by `factor`, and
    # a ramp joins them.
    original = rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((pairs / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = rope.get("attention_factor")
    if scale is None:
        weight, weight_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if weight and weight_all:
            scale = _yarn_scale(factor, weight) / _yarn_scale(factor, weight_all)
        else:
            scale = _yarn_scale(factor, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(scale)


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
