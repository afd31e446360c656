"""A hash of all that decides about a run's results, so that an interrupted run is continued by the same run alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK_BYTES = 32 * 2**20  # hashed at a time, and copied from a GPU
_MOST_THREADS = 16


def fingerprint(runner, *further):
    """Return a SHA-256, as hashlib's object, of the model and of `further`, which decides about results too.

    Of the model it takes the class, the config, and of each parameter and buffer (those that are not saved, too) the
    name, dtype, shape and every byte; on any device it is the same. It reads about 1 GB/s a thread.
    """
    config = runner.hf_config.to_dict()
    config = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    kind = f"{type(runner.model).__module__}.{type(runner.model).__qualname__}"
    base = hashlib.sha256(json.dumps([further, kind, config], sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS)) as pool:
        for name, tensor in _tensors(runner.model):
            base.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            for digest in pool.map(_digest, _chunks(tensor)):
                base.update(digest)
    return base


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            yield from _plain(name, tensor.detach())


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensor, or those that a tensor subclass (a quantised weight) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES)


def _digest(part: Tensor) -> bytes:
    return hashlib.sha256(part.cpu().numpy()).digest()
