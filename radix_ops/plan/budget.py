"""The size of batches: a token budget from the memory that is free and the model's shape."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

# Rows of a batch. Fewer than the least leave a device idle; more than the most make a batch no faster, and a stop loses
# what the current batch did.
LEAST_ROWS = 1024
MOST_ROWS = {"cpu": 4096, "cuda": 65_536}
# Tokens that a batch may unfold, and positions that its padded result may have, for each row.
UNFOLDED_PER_ROW = 8
_SHARE_OF_FREE_MEMORY = 0.5


class Limits(TypedDict):
    """The limits of a folded batch, as `plan_folded` takes them."""

    max_rows: int
    max_tokens: int
    max_positions: int | None


@dataclass(frozen=True)
class Budget:
    """The rows that the model computes of a batch at most, and the limits that follow from them."""

    max_rows: int

    def limits(self, pads_states: bool) -> Limits:
        """Return the limits of a folded batch, as `plan_folded` takes them.

        pads_states: whether the model gives hidden states padded, [sequences, longest, D].
        """
        unfolded = UNFOLDED_PER_ROW * self.max_rows
        return {"max_rows": self.max_rows, "max_tokens": unfolded, "max_positions": unfolded if pads_states else None}


def find_budget(config, dtype: torch.dtype, device: torch.device, longest: int, own_attention: bool) -> Budget:
    """Return the budget for the memory that is free on `device` now; `config` is transformers', `longest` in tokens.

    own_attention: whether the model's own attention computes the scores of padded batches in full.

    Half of the free memory over the bytes of a row, from 1,024 to 4,096 rows on the CPU and 65,536 on CUDA, and at
    least 1.25 times `longest`. A row takes, in elements of `dtype`, what a layer holds at its peak without gradients,

        4 hidden_size + 2 (heads + kv_heads) head_dim + 3 intermediate_size

    and its share of what is unfolded, for each of 8 tokens 2 kv_heads head_dim (keys and values) and 2 hidden_size (a
    padded result). Attention masks add 8 bytes for each of `longest`; with `own_attention` scores add them for each
    head.
    """
    per_row = dtype.itemsize * (_layer_numbers(config) + UNFOLDED_PER_ROW * _token_numbers(config))
    per_row += 8 * longest * (_heads(config) if own_attention else 1)
    rows = int(_SHARE_OF_FREE_MEMORY * free_memory(device) / per_row)
    rows = min(max(rows, LEAST_ROWS), MOST_ROWS[device.type])
    # A sequence that does not fit would be a batch of its own, apart from those that it shares nearly all with.
    return Budget(max(rows, longest + longest // 4))


def _layer_numbers(config) -> int:
    hidden = _number(config, "hidden_size")
    inner = _number(config, "intermediate_size", "n_inner") or 4 * hidden
    experts = _number(config, "moe_intermediate_size") * (_number(config, "num_experts_per_tok") or 1)
    heads = _heads(config) + _kv_heads(config)
    return 4 * hidden + 2 * heads * _head_dim(config) + 3 * max(inner, experts)


def _token_numbers(config) -> int:
    return 2 * _kv_heads(config) * _head_dim(config) + 2 * _number(config, "hidden_size")


def _heads(config) -> int:
    return _number(config, "num_attention_heads") or 1


def _kv_heads(config) -> int:
    return _number(config, "num_key_value_heads") or _heads(config)


def _head_dim(config) -> int:
    return _number(config, "head_dim") or _number(config, "hidden_size") // _heads(config)


def _number(config, *names: str) -> int:
    """Return the first of these that the config says, the largest where it says one a layer, else 0."""
    config = config.get_text_config()
    values = (getattr(config, name, None) for name in names)
    return next((max(value) if isinstance(value, (list, tuple)) else value for value in values if value), 0)


def free_memory(device: torch.device) -> int:
    """Return how many bytes can be allocated; on the CPU the least that the system and the control group leave."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [_available_in_meminfo(), _left_in_control_group()]
    if found[0] is None and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min((size for size in found if size is not None), default=2**62)


def _available_in_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _left_in_control_group() -> int | None:
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
