"""radix_ops.hf on several processes: fully_shard, ranks of which one has something to fold, tensor parallelism."""

from __future__ import annotations

import functools
import traceback
import warnings

import pytest
import torch
from hf_models import TREE, build, error, pad
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def check_fully_sharded(rank: int, enabled_first: bool, checkpointing: bool):
    """Rank 0 has something to fold, rank 1 has not; three steps, of which each needs both ranks' parameters."""
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


def work(rank: int, path: str, queue) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(path, 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, check in CHECKS.items():
        try:
            check(rank)
            queue.put((rank, name, None))
        except BaseException:
            # The other rank may wait for this one, so nothing more can be checked.
            queue.put((rank, name, traceback.format_exc()))
            return
    distributed.destroy_process_group()


CHECKS = {
    f"fully_shard, enabled {'before' if first else 'after'}{', checkpointing' if checkpointing else ''}": (
        functools.partial(check_fully_sharded, enabled_first=first, checkpointing=checkpointing)
    )
    for first in (True, False)
    for checkpointing in (True, False)
}
CHECKS["tensor parallelism"] = check_tensor_parallel_is_refused


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(rank, name of the check) -> its traceback, or None where it passed; two processes for all checks."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    path = str(tmp_path_factory.mktemp("store") / "store")
    processes = [context.Process(target=work, args=(rank, path, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < 2 * len(CHECKS):
            rank, name, failure = queue.get(timeout=120)
            found[rank, name] = failure
            if failure:
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(results, name, rank):
    failures = [failure for failure in results.values() if failure]
    assert (rank, name) in results, "another check failed before it" if failures else "it did not finish"
    assert results[rank, name] is None, results[rank, name]
