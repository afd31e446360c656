"""Training on folded batches by two processes, against plain transformers in one: FSDP2, DDP, and what goes along."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from helpers import processes
from helpers.hf_models import error
from helpers.training import ROADS, Ours, num_targets, plain_logprobs, plain_model
from radix_ops import FoldedBatch, hf
from radix_ops.models.qwen3 import Qwen3Layer

# Micro-batches by step and rank. All differ in tokens, in rows, and in what their sequences share.
STEPS = [
    [
        [[[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2], [5, 6, 7, 8, 9, 1], [5, 6, 3]], [[4, 4, 4]] * 3],
        [[[1, 2, 3], [7, 4, 5, 6, 7, 8, 9, 10]], [[9, 8, 7], [9, 8, 7, 6], [9, 8]]],
    ],
    [
        [[[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 1, 3]], [[11, 12], [11, 13], [11, 14, 15, 16]]],
        [[[20, 21, 22, 23, 24, 25]] * 2 + [[20, 21, 30]], [[59, 58, 57], [59, 58, 56]]],  # the last without a target
    ],
]
SHARING = [STEPS[0][0][0], STEPS[1][1][0]]
CHOSEN = [[[5, 6, 7, 8, 9], [5, 6, 7, 8, 2]], [[1, 2, 3], [1, 2, 4, 5]]]
REJECTED = [[[5, 6, 7, 1], [5, 6, 7, 8, 3]], [[1, 2, 9, 9, 9, 9], [1, 2, 8]]]
LAYERS = (Qwen3Layer, Qwen3DecoderLayer)
# Reentrant checkpointing of older versions runs the hooks of fully_shard again in backward, and loses what the first of
# two forwards gave to the gradients.
PLAIN_IS_RIGHT = Version(transformers.__version__) >= Version("5.23")


def shard(module: nn.Module, **options) -> nn.Module:
    """Shard the module on the device that it is on; by itself fully_shard would take a GPU where there is one."""
    mesh = init_device_mesh(next(module.parameters()).device.type, (2,))
    inner = module.model if hasattr(module.model, "layers") else module.model.model
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def checkpoint_layers(module: nn.Module, how: str | None) -> None:
    model = module.model
    if how in CheckpointImpl.__members__:
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl[how])
        apply_activation_checkpointing(module, wrapper, check_fn=lambda part: isinstance(part, LAYERS))
    elif how is not None and isinstance(module, Ours):
        model.model.gradient_checkpointing = True
    elif how is not None:
        # transformers renames this; the old name serves all its supported versions.
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how in ("REENTRANT", "reentrant"):
        model.enable_input_require_grads()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([full(parameter.grad).flatten() for parameter in module.parameters()])


def flat_parameters(module: nn.Module) -> Tensor:
    return torch.cat([full(parameter.detach()).flatten() for parameter in module.parameters()])


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    # A larger eps than the default keeps Adam from making much of gradients that are rounding alone.
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)


def accumulating(module: nn.Module, is_last: bool):
    if isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext() if is_last else module.no_sync()
    module.set_requires_gradient_sync(is_last)
    return contextlib.nullcontext()


def train_step(module: nn.Module, inputs, optimizer, micro_batches, count: int) -> tuple[Tensor, Tensor]:
    """Return the loss, a mean over the `count` targets of all ranks, and the norm of its gradient."""
    optimizer.zero_grad()
    total = torch.zeros((), device=next(module.parameters()).device)
    for i, sequences in enumerate(micro_batches):
        with accumulating(module, is_last=i == len(micro_batches) - 1):
            loss = -module(*inputs(sequences)).sum() / count
            (loss * distributed.get_world_size()).backward()  # ranks' gradients are averaged
        total += loss.detach()
    distributed.all_reduce(total)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    optimizer.step()
    return total, full(norm)


def check_training(rank: int, road: str, parallel: str, checkpointing: str | None, device: str = "cpu"):
    plain, module = plain_model().to(device), ROADS[road]().to(device)
    inputs = functools.partial(module.inputs, device=device)
    checkpoint_layers(module, checkpointing)
    stats = None if road == "ours" else module.model.radix_stats
    module = shard(module) if parallel == "fsdp" else DistributedDataParallel(module)
    optimizer, plain_optimizer = optimizer_of(module), optimizer_of(plain)
    for step in STEPS:
        batches = [sequences for micro_batches in step for sequences in micro_batches]
        count = num_targets(batches)
        plain_optimizer.zero_grad()
        want = -sum(plain_logprobs(plain, sequences).sum() for sequences in batches) / count
        want.backward()
        want_norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        got, norm = train_step(module, inputs, optimizer, step[rank], count)
        torch.testing.assert_close((got, norm), (want.detach(), want_norm), rtol=1e-5, atol=0)
        assert want_norm > 0.5  # so that gradients were clipped
        assert error(flat_gradient(module), flat_gradient(plain).double()) < 1e-5
        plain_optimizer.step()
    assert error(flat_parameters(module), flat_parameters(plain).double()) < 1e-6
    assert stats is None or (stats.folded, stats.skipped) == (4, 0)


def check_two_forwards_before_one_backward(rank: int, road: str, checkpointing: str, **changes):
    """Compare a preference loss over chosen and rejected answers, each a batch of its own.

    Where plain transformers gets this wrong, sharded and checkpointed alike, folded batches have plain's gradient.
    """

    def loss(logprobs):
        scores = []
        for sequences in (CHOSEN[rank], REJECTED[rank]):
            parts = logprobs(sequences).split([len(s) for s in sequences])
            scores.append(torch.stack([part.sum() for part in parts]))
        return -F.logsigmoid(scores[0] - scores[1]).mean()

    plain, module = plain_model(**changes), ROADS[road](**changes)
    checkpoint_layers(module, checkpointing)
    shard(module, reshard_after_forward=True)
    loss(lambda sequences: module(*module.inputs(sequences))).backward()
    loss(lambda sequences: plain_logprobs(plain, sequences)).backward()
    want = flat_gradient(plain)
    distributed.all_reduce(want)
    want = want.double() / 2
    if checkpointing == "reentrant" and not PLAIN_IS_RIGHT:
        unfolded = ROADS[road](**changes)
        hf.disable(unfolded.model)
        checkpoint_layers(unfolded, checkpointing)
        shard(unfolded, reshard_after_forward=True)
        loss(lambda sequences: unfolded(*unfolded.inputs(sequences))).backward()
        wrong = flat_gradient(unfolded).double()
        assert error(wrong, want) > 0.1
        want = wrong
    assert error(flat_gradient(module), want) < 1e-5
    assert road == "ours" or module.model.radix_stats.folded == 2


def check_idle_rank(rank: int, road: str):
    plain, module = plain_model(), shard(ROADS[road]())
    sequences = STEPS[0][0][0]
    plain_logprobs(plain, sequences).sum().backward()
    module(*module.inputs(sequences if rank == 0 else [])).sum().backward()
    assert error(flat_gradient(module), flat_gradient(plain).double() / 2) < 1e-5


def check_mixed_precision(rank: int, road: str, device: str = "cpu"):
    """Gradients are as far from float64 as plain transformers' in bfloat16, within a factor of 2."""
    size = {"head_dim": 16}  # flash attention takes no 12
    exact, plain = plain_model(**size).to(device).double(), plain_model(**size).to(device).bfloat16()
    for model in (exact, plain):
        for sequences in (STEPS[0][0][0], STEPS[0][1][0]):
            plain_logprobs(model, sequences).sum().backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    module = shard(ROADS[road](**size).to(device), mp_policy=policy)
    logprobs = module(*module.inputs(STEPS[0][rank][0], device))
    logprobs.sum().backward()
    got, want = flat_gradient(module), flat_gradient(exact) / 2
    assert (logprobs.dtype, got.dtype) == (torch.float32, torch.float32)
    assert 1e-4 < error(got, want) <= 2 * error(flat_gradient(plain) / 2, want)


def check_resumed(rank: int, road: str, folder: str):
    """Parameters keep their names, and a run that goes on from a checkpoint goes the same way."""

    def build(seed: int):
        module = ROADS[road](seed=seed)
        checkpoint_layers(module, "NO_REENTRANT")
        return shard(module), optimizer_of(module)

    def state_of(module, optimizer):
        return dict(zip(("model", "optimizer"), state_dict.get_state_dict(module, optimizer), strict=True))

    module, optimizer = build(seed=1)
    train_step(module, module.inputs, optimizer, STEPS[0][rank], 10)
    saved = state_of(module, optimizer)
    plain = plain_model(seed=3)
    assert list(saved["model"]) == [f"model.{name}" for name in plain.state_dict()]
    dcp.save(saved, checkpoint_id=folder)
    wrapped = nn.ModuleDict({"model": plain})
    dcp.load({"model": wrapped.state_dict()}, checkpoint_id=folder, no_dist=True)
    assert torch.equal(flat_parameters(plain), flat_parameters(module))

    other, other_optimizer = build(seed=2)
    loaded = state_of(other, other_optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    state_dict.set_state_dict(
        other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    for each, its_optimizer in ((module, optimizer), (other, other_optimizer)):
        train_step(each, each.inputs, its_optimizer, STEPS[1][rank], 10)
    assert torch.equal(flat_parameters(other), flat_parameters(module))


def check_embeddings(rank: int):
    """`embed` is no forward, so fully_shard is told of it."""
    plain, model = plain_model(), Ours().model
    register_fsdp_forward_method(shard(model), "embed")
    sequences = STEPS[0][rank][0]
    got = model.embed(FoldedBatch.from_sequences(sequences))
    want = [plain.model(torch.tensor([s]), use_cache=False).last_hidden_state[0, -1] for s in sequences]
    want = F.normalize(torch.stack(want), dim=-1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for embeddings in (got, want):
        F.cross_entropy(embeddings @ embeddings.T, torch.arange(len(sequences)).flip(0)).backward()
    pairs = zip(model.model.named_parameters(), plain.model.parameters(), strict=True)
    for (name, parameter), plain_parameter in pairs:
        distributed.all_reduce(plain_parameter.grad)
        assert error(full(parameter.grad), plain_parameter.grad.double() / 2) < 1e-5, name


def check_compiled_layers(rank: int):
    """Layers that are compiled before they are sharded have one graph together, for batches of all sizes."""
    graphs = CompileCounterWithBackend("eager")
    plain, module = plain_model(use_sliding_window=False), Ours(use_sliding_window=False)
    for layer in module.model.model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=graphs)
    shard(module)
    for i in range(2):
        sequences = SHARING[i - rank]
        module(*module.inputs(sequences)).sum().backward()
        plain_logprobs(plain, sequences).sum().backward()
        assert graphs.frame_count == 1
    want = flat_gradient(plain)
    distributed.all_reduce(want)
    assert error(flat_gradient(module), want.double() / 2) < 1e-5


def check_head_that_is_sharded_alone(rank: int):
    module = Ours()
    fully_shard(module.model.lm_head, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor; of a model that fully_shard"):
        shard(module)(*module.inputs(CHOSEN[rank]))


CHECKS = {
    "fsdp, ours": functools.partial(check_training, road="ours", parallel="fsdp", checkpointing="attribute"),
    "fsdp, hf": functools.partial(check_training, road="hf", parallel="fsdp", checkpointing="not reentrant"),
    "ddp, ours": functools.partial(check_training, road="ours", parallel="ddp", checkpointing=None),
    "ddp, hf": functools.partial(check_training, road="hf", parallel="ddp", checkpointing="reentrant"),
    "fsdp, hf with labels": functools.partial(
        check_training, road="hf with labels", parallel="fsdp", checkpointing="not reentrant"
    ),
    "ddp, hf with labels": functools.partial(check_training, road="hf with labels", parallel="ddp", checkpointing=None),
    "embeddings": check_embeddings,
    "compiled layers": check_compiled_layers,
}
for _road, _how, _changes in [
    ("ours", "NO_REENTRANT", {"tie_word_embeddings": True}),
    ("hf", "reentrant", {}),
    ("hf", "REENTRANT", {}),
    ("hf", "NO_REENTRANT", {"tie_word_embeddings": True}),
]:
    CHECKS[f"two forwards, {_road}, {_how}"] = functools.partial(
        check_two_forwards_before_one_backward, road=_road, checkpointing=_how, **_changes
    )
for _road in ROADS:
    CHECKS[f"idle rank, {_road}"] = functools.partial(check_idle_rank, road=_road)
    CHECKS[f"mixed precision, {_road}"] = functools.partial(check_mixed_precision, road=_road)
CHECKS["head alone"] = check_head_that_is_sharded_alone


def test_two_processes(tmp_path):
    checks = dict(CHECKS)
    for road in ("ours", "hf"):
        checks[f"resumed, {road}"] = functools.partial(check_resumed, road=road, folder=str(tmp_path / road))
    processes.run(checks, tmp_path)


CUDA_CHECKS = {}
for _road in ROADS:
    CUDA_CHECKS[f"fp32, {_road}"] = functools.partial(CHECKS[f"fsdp, {_road}"], device="cuda")
    CUDA_CHECKS[f"bf16, {_road}"] = functools.partial(CHECKS[f"mixed precision, {_road}"], device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices(tmp_path):
    processes.run(CUDA_CHECKS, tmp_path, "nccl")
