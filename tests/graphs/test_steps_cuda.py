"""Training steps of the Qwen3 as replayed CUDA graphs, against transformers and against the same steps run eagerly."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import transformers

import radix_ops
import radix_ops.losses
from helpers.batches import NAMED
from helpers.captured_steps import eager_step, gradients
from helpers.graph_batches import ALONE, LIKE_SHARED, NESTED, SHARED, folded, packed
from helpers.qwen3_models import FILLED, run_theirs
from radix_ops.models.qwen3 import Qwen3ForCausalLM, Qwen3Model

pytestmark = pytest.mark.cuda

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def model(folder):
    model = Qwen3Model.from_pretrained(folder, torch.bfloat16, "cuda").train()
    model.training_graphs = True
    return model


def loss_of(model, batch, layout="auto", rows=None):
    return batch_sum(model(batch, layout, rows))


def batch_sum(hidden):
    return (hidden.float().square() * torch.linspace(0.1, 1, hidden.shape[1], device="cuda")).sum()


def eager(model, *arguments):
    return eager_step(model, loss_of, *arguments)


def capture(model, batch, *arguments):
    count = len(model._steps)
    for _ in range(2):
        loss_of(model, batch, *arguments).backward()
    model.zero_grad()
    assert len(model._steps) == count + 1


def distances(got, want):
    return {name: float((got[name].double() - grad.double()).norm()) ** 2 for name, grad in want.items()}


@pytest.mark.parametrize("with_rows", [False, True])
def test_bits_are_those_of_eager_steps(model, with_rows):
    """Another batch goes through the graphs than was captured."""
    for first, second in ((SHARED, LIKE_SHARED), (NESTED, NESTED), (LIKE_SHARED, SHARED)):
        batch, other = folded(first), folded(second)
        arguments = [(b, "trie", b.last_rows if with_rows else None) for b in (batch, other)]
        wants = [eager(model, *each) for each in arguments]
        if first is not LIKE_SHARED:
            capture(model, *arguments[0])
        compute, Qwen3Model._compute_layers = Qwen3Model._compute_layers, None
        try:
            for each, (want_loss, want) in [*zip(arguments, wants, strict=True)] * 2:
                loss = loss_of(model, *each)
                loss.backward()
                assert torch.equal(loss, want_loss)
                for name, grad in gradients(model).items():
                    assert torch.equal(grad, want[name]), name
                model.zero_grad()
        finally:
            Qwen3Model._compute_layers = compute


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["auto", "compact", "trie"])
def test_error_is_at_most_twice_that_of_transformers(folder, dtype, layout):
    """It is taken over all batches together. Gradients of torch's flash attention are not the same bits each time."""
    model = Qwen3Model.from_pretrained(folder, dtype, "cuda").train()
    model.training_graphs = True
    theirs, exact = (
        transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=d).cuda().eval() for d in (dtype, torch.float64)
    )
    errors = {"ours": {}, "theirs": {}}
    for sequences in [SHARED, NESTED, ALONE, *(NAMED[name] for name in FILLED)]:
        for make in (folded, packed):
            batch = make(sequences)
            capture_once(model, batch, layout)
            batch_sum(batch.unfold(model(batch, layout))).backward()
            results = {"ours": gradients(model)}
            model.zero_grad()
            for name, other in (("theirs", theirs), ("exact", exact)):
                other.zero_grad()
                with torch.device("cuda"):
                    hidden = run_theirs(other, sequences)[0]
                    (hidden.double().square() * torch.linspace(0.1, 1, 64)).sum().backward()
                results[name] = {name: p.grad for name, p in other.model.named_parameters()}
            for name in ("ours", "theirs"):
                for weight, distance in distances(results[name], results["exact"]).items():
                    errors[name][weight] = errors[name].get(weight, 0) + distance
    assert len(model._steps) >= 3
    assert sum(errors["ours"].values()) <= 2**2 * sum(errors["theirs"].values())
    for name, squared in errors["ours"].items():
        assert squared <= 3**2 * errors["theirs"][name], name


def capture_once(model, batch, layout):
    for _ in range(2):
        loss_of(model, batch, layout).backward()
    model.zero_grad()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_losses_of_twenty_steps_are_those_of_eager_ones(model, set_to_none):
    """Each accumulates the gradients of three batches, and others are evaluated in between."""
    other = copy.deepcopy(model)
    other.training_graphs = False
    losses = []
    for each in (model, other):
        optimizer = torch.optim.AdamW(each.parameters(), 1e-3)
        losses.append([])
        for _ in range(20):
            for sequences in (SHARED, LIKE_SHARED, NESTED):
                loss = loss_of(each, folded(sequences), "trie") / 1000
                with torch.no_grad():
                    losses[-1].append(loss_of(each.eval(), folded(LIKE_SHARED), "trie"))
                each.train()
                loss.backward()
                losses[-1].append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    assert len(model._steps) == 2
    assert len(other._steps) == 0
    assert all(map(torch.equal, *losses))
    assert float(losses[0][-1]) < float(losses[0][5])


def test_what_a_caller_keeps_is_its_own(model):
    batch, other = folded(), folded(LIKE_SHARED)
    capture(model, batch, "trie")
    _, want = eager(model, batch, "trie")
    names, weights = zip(*model.named_parameters(), strict=True)
    seen = []
    weights[3].register_hook(seen.append)
    hidden = model(batch, "trie")
    kept_hidden = hidden.detach().clone()
    grads = torch.autograd.grad(batch_sum(hidden), weights)
    loss_of(model, batch, "trie").backward()
    accumulated = [p.grad for p in weights]
    for p in weights:
        p.grad = None
    places = {x.data_ptr() for x in [*grads, *accumulated, *seen]}
    for _ in range(3):
        loss_of(model, other, "trie").backward()
    assert places.isdisjoint(p.grad.data_ptr() for p in weights)
    assert torch.equal(hidden, kept_hidden)
    for name, one, two in zip(names, grads, accumulated, strict=True):
        assert torch.equal(one, want[name]), name
        assert torch.equal(two, want[name]), name
    assert all(torch.equal(x, want[names[3]]) for x in seen[:2])


def test_one_forward_at_a_time_waits_for_its_backward(model):
    batches = [folded(sequences) for sequences in (SHARED, NESTED, LIKE_SHARED)]
    wants = [eager(model, batch, "trie")[1] for batch in batches]
    for batch in batches[:2]:
        capture(model, batch, "trie")
    for order in ((0, 1, 2), (2, 1, 0)):
        losses = [loss_of(model, batch, "trie") for batch in batches]
        for i in order:
            losses[i].backward()
            for name, grad in gradients(model).items():
                assert torch.equal(grad, wants[i][name]), (name, i)
            model.zero_grad()


def test_weights_that_change_before_the_backward_are_an_error_as_ever(model):
    batch = folded()
    capture(model, batch, "trie")
    loss = loss_of(model, batch, "trie")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_streams_take_turns(model):
    batches = [folded(), folded(LIKE_SHARED)]
    capture(model, batches[0], "trie")
    wants = [eager(model, batch, "trie") for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    names, weights = zip(*model.named_parameters(), strict=True)
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            loss = loss_of(model, batches[i % 2], "trie")
            results.append((loss.detach(), torch.autograd.grad(loss, weights)))
    torch.cuda.synchronize()
    for i, (loss, grads) in enumerate(results):
        want_loss, want = wants[i % 2]
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(grad, want[name]) for name, grad in zip(names, grads, strict=True))


def test_workspaces_that_torch_gives_up_are_still_there(model):
    batch = folded([[i % 60 for i in range(3000)]])
    capture(model, batch, "trie")
    _, want = eager(model, batch, "trie")
    torch._C._cuda_clearCublasWorkspaces()
    scratch = [torch.full((2**22,), 7, dtype=torch.int64, device="cuda") for _ in range(4)]  # where they lay, perhaps
    for _ in range(3):
        loss_of(model, batch, "trie").backward()
        for name, grad in gradients(model).items():
            assert torch.equal(grad, want[name]), name
        model.zero_grad()
    assert all(bool((x == 7).all()) for x in scratch)


def test_kinds_share_the_memory_and_give_it_back(model):
    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    large, others = [[i % 60 for i in range(6000)]], [[i % 60 for i in range(n)] for n in (5000, 4000, 3000)]
    capture(model, folded(large), "trie")
    model.training_graphs = False
    model.training_graphs = True
    before = reserved()  # with the workspaces of graphs, which stay
    capture(model, folded(large), "trie")
    of_one = reserved() - before
    for sequence in others:
        capture(model, folded([sequence]), "trie")
    assert reserved() - before <= 2 * of_one
    model.training_graphs = False
    assert reserved() - before <= 0.1 * of_one


def test_nothing_waits_for_the_device(model):
    """Neither the capture nor a replay."""
    batch, other = folded(), folded(NESTED)
    capture(model, batch, "trie")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in (other, other, other, batch):
            loss_of(model, each, "trie").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(model._steps) == 2


def test_deterministic_algorithms_fill_what_is_not_written_with_nan(model):
    batch = folded()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        want_loss, want = eager(model, batch, "trie")
        capture(model, batch, "trie")
        loss = loss_of(model, batch, "trie")
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, want_loss)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, want[name]), name


def test_compiled_layers_are_captured(model):
    torch._dynamo.reset()
    model.compile_layers(1)
    try:
        batch = folded()
        want_loss, want = eager(model, batch, "trie")
        capture(model, batch, "trie")
        loss = loss_of(model, batch, "trie")
        loss.backward()
        assert torch.equal(loss, want_loss)
        for name, grad in gradients(model).items():
            assert torch.equal(grad, want[name]), name
    finally:
        model._run._compiled_call_impl = None
        torch._dynamo.reset()


def test_heads_train_with_graphs(folder):
    model = Qwen3ForCausalLM.from_pretrained(folder, torch.bfloat16, "cuda").train()
    batch = folded()
    labels = torch.tensor([token for s in SHARED for token in s]).cuda()

    def step():
        model.zero_grad()
        targets = radix_ops.losses.plan_targets(batch, labels, vocabulary=model.config.vocab_size)
        hidden = model.model(batch, "trie")
        loss = radix_ops.losses.causal_lm_loss(hidden, batch, targets, weight=model.lm_head.weight)
        loss.backward()
        return loss.detach(), gradients(model)

    want_loss, want = step()
    model.training_graphs = True
    for _ in range(3):
        loss, got = step()
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(got[name], grad) for name, grad in want.items())
    assert len(model.model._steps) == 1
