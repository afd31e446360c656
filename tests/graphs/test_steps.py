"""Which training steps are captured and replayed. A stand-in for what CUDA does computes where graphs would."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

from helpers.captured_steps import HostMemory, StandIn, eager_step, gradients
from helpers.qwen3_models import oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.graphs import forwards, steps
from radix_ops.models import replaying
from radix_ops.models.qwen3 import Qwen3Model

LONG = [[7, 8] * 40 + [i] * (20 + i) for i in range(5)]
LIKE_LONG = [[5, 6, 9] * 26 + [30 + i] * (20 + i) for i in range(5)]  # of its sizes
SHORT = [[3, 4], [3, 5, 6]]


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "CapturedStep", StandIn)
    monkeypatch.setattr(steps, "StepMemory", HostMemory)
    monkeypatch.setattr(steps, "why_eager", lambda *_: None)
    monkeypatch.setattr(forwards, "why_eager", lambda *_: "no CUDA")
    monkeypatch.setattr(forwards, "_kernels", lambda *_: (True, True))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(replaying, "is_bound_by_host", lambda *_: True)
    for name in ("made", "forwards", "backwards"):
        monkeypatch.setattr(StandIn, name, 0)
    oracle(tmp_path)
    model = Qwen3Model.from_pretrained(tmp_path, torch.bfloat16).train()
    model.training_graphs = True
    return model


def batch_of(sequences=LONG):
    return FoldedBatch.from_sequences(sequences)


def loss_of(model, batch, layout="trie", rows=None):
    return model(batch, layout, rows).float().square().sum()


def eager(model, *arguments):
    return eager_step(model, loss_of, *arguments)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert (got[name] is None) == (grad is None), name
        assert grad is None or torch.equal(got[name], grad), name


def capture(model, batch, *arguments):
    for _ in range(2):
        loss_of(model, batch, *arguments).backward()
    model.zero_grad()
    assert len(model._steps) > 0
    StandIn.forwards = StandIn.backwards = 0


@pytest.mark.parametrize("with_rows", [False, True])
def test_gradients_are_those_of_eager_steps(model, with_rows):
    counts = []
    for sequences in (LONG, LIKE_LONG, LONG, LIKE_LONG):
        batch = batch_of(sequences)
        arguments = batch, "trie", batch.last_rows if with_rows else None
        want_loss, want = eager(model, *arguments)
        loss = loss_of(model, *arguments)
        loss.backward()
        assert torch.equal(loss, want_loss)
        assert_equal(gradients(model), want)
        model.zero_grad()
        counts.append((StandIn.made, StandIn.forwards, StandIn.backwards))
    assert counts == [(0, 0, 0), (1, 1, 1), (1, 2, 2), (1, 3, 3)]


def test_gradients_of_transformers(model, tmp_path):
    """The gradients of a replay are as far from float64's as rounding to bfloat16 makes them."""
    exact = oracle(tmp_path / "exact").double()
    run_theirs(exact, LONG)[0].square().sum().backward()
    batch = batch_of()
    capture(model, batch)
    batch.unfold(model(batch, "trie")).float().square().sum().backward()
    assert StandIn.backwards == 1
    weights = dict(model.named_parameters())
    for name, want in exact.model.named_parameters():
        assert (weights[name].grad.double() - want.grad).norm() <= 0.1 * want.grad.norm(), name


@pytest.mark.parametrize("set_to_none", [False, True])
def test_losses_of_twenty_steps_are_those_of_eager_ones(model, set_to_none):
    """Each step accumulates the gradients of three batches."""
    model.requires_grad_(True)
    other = copy.deepcopy(model)
    other.training_graphs = False
    losses = []
    for each in (model, other):
        optimizer = torch.optim.AdamW(each.parameters(), 1e-3)
        losses.append([])
        for number in range(20):
            for sequences in (LONG, LIKE_LONG, SHORT if number % 2 else LONG):
                loss = loss_of(each, batch_of(sequences)) / 1000
                loss.backward()
                losses[-1].append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][2]
    assert StandIn.backwards > 50
    assert len(other._steps) == 0


def test_a_second_forward_before_the_backward_runs_eagerly(model):
    first, second = batch_of(), batch_of(LIKE_LONG)
    wants = [eager(model, batch)[1] for batch in (first, second)]
    capture(model, first)
    losses = [loss_of(model, batch) for batch in (first, second)]
    assert StandIn.forwards == 1
    for loss, want in zip(reversed(losses), reversed(wants), strict=True):
        loss.backward()
        assert_equal(gradients(model), want)
        model.zero_grad()
    loss_of(model, first)
    assert StandIn.forwards == 2


def test_a_forward_without_a_backward_is_over_when_it_is_let_go(model):
    batch = batch_of()
    want = eager(model, batch)[1]
    capture(model, batch)
    loss = loss_of(model, batch)
    loss_of(model, batch)
    assert StandIn.forwards == 1
    del loss
    loss_of(model, batch).backward()
    assert StandIn.forwards == 2
    assert_equal(gradients(model), want)


def test_a_second_backward_and_a_second_derivative_are_refused(model):
    batch = batch_of()
    capture(model, batch)
    weight = model.norm.weight
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through one forward"):
        loss.backward()
    loss = loss_of(model, batch)
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weights_that_change_before_the_backward_are_an_error_as_ever(model):
    batch = batch_of()
    for _ in range(3):
        loss = loss_of(model, batch)
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        del loss
    assert StandIn.forwards == 2


def test_frozen_weights_have_no_gradients(model):
    batch = batch_of()
    capture(model, batch)
    frozen = [model.embed_tokens.weight, *model.layers[0].parameters(), model.layers[2].mlp.up_proj.weight]
    for weight in frozen:
        weight.requires_grad_(False)
    want = eager(model, batch)[1]
    for _ in range(4):
        loss_of(model, batch).backward()
        assert_equal(gradients(model), want)
        model.zero_grad()
    assert StandIn.backwards == 3
    model.requires_grad_(False)
    assert not model(batch, "trie").requires_grad
    assert StandIn.forwards == 3


def test_hooks_of_weights_get_gradients(model):
    """They may change them, and are called when a gradient has been accumulated."""
    batch = batch_of()
    capture(model, batch)
    weight = model.layers[1].self_attn.k_proj.weight
    seen = []
    weight.register_hook(lambda grad: 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    want = eager(model, batch)[1]
    loss_of(model, batch).backward()
    assert StandIn.backwards == 1
    assert_equal(gradients(model), want)
    assert len(seen) == 2
    assert torch.equal(*seen)


def checkpointing(model):
    model.gradient_checkpointing = True


def hooked(model):
    model.layers[1].register_forward_hook(lambda module, given, out: 2 * out)


def hooked_backward(model):
    model.layers[1].mlp.register_full_backward_hook(lambda module, given, out: (2 * given[0],))


def replaced(model):
    mlp = model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def window(model):
    model.layers[1].self_attn.sliding_window = 3


def weight(model):
    model.norm.weight = torch.nn.Parameter(2 * model.norm.weight.detach())


def same_memory(model):
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach())


CHANGES = [checkpointing, hooked, hooked_backward, replaced, window, weight, same_memory]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_of_the_model_are_seen(model, change):
    batch = batch_of()
    capture(model, batch)
    change(model)
    want_loss, want = eager(model, batch)
    for _ in range(3):
        loss = loss_of(model, batch)
        loss.backward()
        assert torch.equal(loss, want_loss)
        assert_equal(gradients(model), want)
        model.zero_grad()


CIRCUMSTANCES = {
    "anomaly": torch.autograd.detect_anomaly,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_calls_that_no_graph_may_stand_in_for(model, circumstance):
    batch = batch_of()
    want = eager(model, batch)[1]
    capture(model, batch)
    with CIRCUMSTANCES[circumstance]():
        loss_of(model, batch).backward()
    assert StandIn.forwards == 0
    assert_equal(gradients(model), want)


def test_a_forward_inside_a_backward_runs_eagerly(model):
    """Reentrant checkpointing computes it again there."""
    batch = batch_of()
    want = eager(model, batch)[1]
    capture(model, batch)
    one = torch.ones(1, requires_grad=True)
    hidden = torch.utils.checkpoint.checkpoint(lambda _: model(batch, "trie"), one, use_reentrant=True)
    hidden.float().square().sum().backward()
    assert StandIn.forwards == 0
    assert_equal(gradients(model), want)


def test_gradient_checkpointing_takes_no_graphs(model):
    model.gradient_checkpointing = True
    for _ in range(3):
        loss_of(model, batch_of()).backward()
    assert StandIn.made == 0


def test_processes_that_train_together_take_no_graphs(model, tmp_path):
    batch = batch_of()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for _ in range(3):
            loss_of(model, batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert StandIn.made == 0


def test_a_capture_that_fails_is_told_once_for_a_size(model, monkeypatch):
    class Failing(StandIn):
        def __init__(self, *arguments):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(steps, "CapturedStep", Failing)
    batch = batch_of()
    want = eager(model, batch)[1]
    loss_of(model, batch).backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match="without CUDA graphs, since they could not be captured: OutOfMemoryError: no"):
        loss_of(model, batch).backward()
    for _ in range(3):
        assert_equal(gradients(model), want)
        model.zero_grad()
        loss_of(model, batch).backward()


def test_it_is_a_switch(model):
    batch = batch_of()
    capture(model, batch)
    loss = loss_of(model, batch)
    model.training_graphs = False
    assert len(model._steps) == 0
    loss.backward()
    assert_equal(gradients(model), eager(model, batch)[1])
    model._training_graphs = False
    loss_of(model, batch)
    assert StandIn.forwards == 1
    with pytest.raises(TypeError, match="training_graphs must be a bool, got int"):
        model.training_graphs = 1
    assert not Qwen3Model(model.config).training_graphs


def test_copies_and_moves_hold_no_graphs(model):
    batch = batch_of()
    capture(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other._steps) == 0
        want = eager(other, batch)[1]
        for _ in range(3):
            loss_of(other, batch).backward()
            assert_equal(gradients(other), want)
            other.zero_grad()
        assert len(other._steps) == 1
    model.bfloat16()
    assert len(model._steps) == 0


@pytest.mark.filterwarnings("error:radix_ops")
def test_keys_that_are_unfolded_take_no_graphs(model):
    batch = batch_of()
    want = eager(model, batch, "compact")[1]
    for _ in range(3):
        loss_of(model, batch, "compact").backward()
        assert_equal(gradients(model), want)
        model.zero_grad()
    assert StandIn.made == 0
