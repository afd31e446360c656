"""Memory for tests of tensors with more than 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radix_ops.plan.budget import free_memory


def require_memory(gibibytes: float) -> None:
    """Skip a test where torch's default device has less memory left than that twice: another job may take as much."""
    if free_memory(torch.get_default_device()) < 2 * gibibytes * 2**30:
        pytest.skip(f"needs {2 * gibibytes:g} GiB of free memory")


def untouched_zeros(rows: int, columns: int) -> torch.Tensor:
    """Return zeros in int8. On the CPU they take memory only where they are read or written."""
    if torch.get_default_device().type != "cpu":
        return torch.zeros(rows, columns, dtype=torch.int8)
    return torch.from_numpy(np.zeros((rows, columns), dtype=np.int8))
