"""radix_ops.hf on several processes: fully_shard, ranks of which one has something to fold, tensor parallelism."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers import processes
from helpers.hf_models import TREE, build, error, pad
from radix_ops import hf

SHARED = pad(TREE, "left")
STRANGERS = torch.arange(1, 13).view(3, 4), torch.ones(3, 4, dtype=torch.int64)
UNVERIFIED = "radix_ops: folded batches are not verified where torch.distributed runs several processes"


def gradients(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits = logits[mask.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def shard(model):
    mesh = init_device_mesh("cpu", (2,))  # by itself fully_shard would take a GPU where there is one
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fully_sharded(rank: int, enabled_first: bool, checkpointing: bool):
    """Take three steps, each of which needs both ranks' parameters; rank 0 has something to fold, rank 1 has not."""
    plain, model = build("qwen3_sliding").train(), build("qwen3_sliding").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if enabled_first:
        hf.enable(model, threshold=0.9)
    model = shard(model)
    if not enabled_first:
        hf.enable(model, threshold=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            got = gradients(model, *(SHARED if rank == 0 else STRANGERS))
    warned = [str(warning.message) for warning in caught if "radix_ops" in str(warning.message)]
    assert [text[: len(UNVERIFIED)] for text in warned] == [UNVERIFIED] * (rank == 0)
    assert (model.radix_stats.folded, model.radix_stats.skipped) == ((3, 0) if rank == 0 else (0, 3))
    want = gradients(plain, *SHARED)
    other = gradients(plain, *STRANGERS)  # added to the first
    for name in want:
        assert other[name] is plain.get_parameter(name).grad
        assert error(got[name], other[name].double() / 2) < 1e-5, name
    hf.disable(model)
    model.zero_grad()
    assert "radix_stats" not in vars(model)
    gradients(model, *(SHARED if rank == 0 else STRANGERS))


def check_tensor_parallel_is_refused(rank: int):
    model = build()
    plan = {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    parallelize_module(model.model.layers[0].self_attn, init_device_mesh("cpu", (2,)), plan)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight is a DTensor, as tensor parallelism makes"):
        hf.enable(model)


CHECKS = {
    f"fully_shard, enabled {'before' if first else 'after'}{', checkpointing' if checkpointing else ''}": (
        functools.partial(check_fully_sharded, enabled_first=first, checkpointing=checkpointing)
    )
    for first in (True, False)
    for checkpointing in (True, False)
}
CHECKS["tensor parallelism"] = check_tensor_parallel_is_refused


def test_two_processes(tmp_path):
    processes.run(CHECKS, tmp_path)
