"""The rule by which a forward is faster as a graph: to launch its kernels one by one takes a good part of its time."""

from __future__ import annotations

import functools

import torch

# Multiplications of a layer, weights and attention together, up to which an H200 was faster with a graph: a Qwen3 at
# the sizes of 0.6B and 8B, bf16. At the border the host launched a layer in 0.4 ms, the GPU took 0.7 ms, and a graph 5%
# less, since its kernels follow each other sooner; padding takes up to 3% (benchmarks/bench_graphs.py).
_MULTIPLICATIONS = 2.2e11
_H100_PROCESSORS = 132
# How much less than a multiprocessor of a Hopper GPU those of older ones compute.
_BEFORE_HOPPER = 0.4


def is_bound_by_host(multiplications: float, device: torch.device) -> bool:
    """Return whether the host matters to a forward whose layers have so many multiplications, in half precision."""
    return multiplications <= _MULTIPLICATIONS * _speed(device)


@functools.cache
def _speed(device: torch.device) -> float:
    """Return how much an H100's worth of multiplications the device computes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count / _H100_PROCESSORS * (1.0 if properties.major >= 9 else _BEFORE_HOPPER)
