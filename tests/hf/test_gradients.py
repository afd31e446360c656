"""Gradients with respect to what an enabled model hands out: the plain model's, or the batch runs as before."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

from helpers.hf_models import TREE, assert_same, build, error, gpt2, no_warnings, pad, proven_gpt2
from radix_ops import hf, trainers

IDS, MASK = pad(TREE, "both")
REAL = MASK.bool()
UNFOLDED = r"output_hidden_states is on while gradients are, .+ \(it folds under torch.no_grad\(\) or without"
MODELS = {"llama": build, "qwen3, base": lambda: build("qwen3", head="Model"), "gpt2": gpt2}


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("name", [*list(MODELS)[:-1], pytest.param("gpt2", marks=proven_gpt2)])
def test_hidden_states_have_the_gradients_of_the_plain_model(name, by_config):
    def gradients(model):
        model.config.output_hidden_states = by_config
        further = {} if by_config else {"output_hidden_states": True}
        out = model(input_ids=IDS, attention_mask=MASK, **further)
        for states in out.hidden_states:
            states.retain_grad()
        (out[0][:, -1, 7] + out.hidden_states[1].square().mean()).sum().backward()
        return [states.grad for states in out.hidden_states]

    plain, model = MODELS[name](), hf.enable(MODELS[name](), threshold=1.0)
    want = gradients(plain)
    assert all(grad is not None for grad in want)
    with pytest.warns(UserWarning, match=UNFOLDED):
        assert_same(gradients(model), want)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "radix_ops")
        assert_same(gradients(model), want)


def test_hidden_states_without_gradients_fold():
    model = hf.enable(build(), threshold=1.0)
    with no_warnings():
        with torch.no_grad():
            model(IDS, MASK, output_hidden_states=True)
        model.requires_grad_(False)
        states = model(IDS, MASK, output_hidden_states=True).hidden_states
    assert not any(x.requires_grad for x in states)
    assert model.radix_stats.folded == 2
    # Adapters on a frozen model need gradients of its embedded tokens.
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match=UNFOLDED):
        states = model(IDS, MASK, output_hidden_states=True).hidden_states
    assert all(x.requires_grad for x in states)


@pytest.mark.parametrize(
    ("head", "output"),
    [("Model", "last_hidden_state"), ("ForCausalLM", "logits"), ("ForTokenClassification", "logits")],
)
def test_outputs_of_a_folded_batch_have_the_gradients_of_the_plain_model(head, output):
    """The gradient of each output holds, whatever is computed from it, and so does that of what a stack's hook sees."""

    def gradients(model):
        seen = []
        if head != "Model":
            model.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
        labels = {"labels": (IDS % 3).masked_fill(~REAL, -100)} if head == "ForTokenClassification" else {}
        out = model(IDS, MASK, **labels)
        loss = out[output][REAL].square().mean() + (out.loss if labels else 0)
        wanted = [out[output], *seen]
        for x in wanted:
            x.retain_grad()
        loss.backward()
        return [x.grad[REAL] for x in wanted]

    plain, model = build(head=head), hf.enable(build(head=head), threshold=1.0)
    got, want = gradients(model), gradients(plain)
    assert model.radix_stats.folded == 1
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs.double()) < 1e-5


def test_hooks_of_all_modules_on_gradients_run_unfolded():
    def shapes(model):
        seen = []
        with torch.nn.modules.module.register_module_full_backward_hook(
            lambda module, grads_in, grads_out: seen.append([x.shape for x in grads_out if x is not None])
        ):
            model(IDS, MASK).logits.sum().backward()
        return seen

    plain, model = build(), hf.enable(build(), threshold=1.0)
    with pytest.warns(UserWarning, match="a hook on all modules would see rows for positions"):
        assert shapes(model) == shapes(plain)


@pytest.mark.parametrize("layout", ["compact", "trie", "unfold"])
def test_second_derivatives_name_the_remedy_and_it_works(layout):
    def second(model):
        weight = model.model.layers[0].self_attn.q_proj.weight
        loss = model(IDS, MASK).logits[REAL].square().mean()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    plain, model = build(attention="eager"), hf.enable(build(attention="eager"), threshold=1.0, layout=layout)
    with pytest.raises(RuntimeError, match=r"attn_implementation='eager' after radix_ops.hf.disable\(model\) or"):
        second(model)
    assert_same(second(hf.enable(model, threshold=0)), second(plain))
    hf.disable(model)
    assert_same(second(model), second(plain))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_jacobians_by_batched_gradients(attention):
    def rows(model):
        logits = model(IDS, MASK).logits[REAL][:4, 0]
        wanted = [model.model.norm.weight, model.model.layers[0].self_attn.q_proj.weight]
        return torch.autograd.grad(logits, wanted, torch.eye(4), is_grads_batched=True)

    plain, model = build(attention=attention), hf.enable(build(attention=attention), threshold=1.0)
    for ours, theirs in zip(rows(model), rows(plain), strict=True):
        assert error(ours, theirs.double()) < 1e-5
    assert model.radix_stats.folded == 1


@pytest.mark.parametrize("wanted", ["logits", "loss", "loss on rows"])
@pytest.mark.parametrize("layout", ["auto", "compact", "trie"])
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding"])
def test_forward_is_the_same_with_and_without_gradients(name, layout, wanted):
    """They are equal bit for bit, so that a policy and its reference agree where their weights do."""
    model = hf.enable(build(name), threshold=1.0, layout=layout)
    ids, mask = pad(TREE, "right")
    labels = None if wanted == "logits" else ids.masked_fill(mask == 0, -100)
    results = []
    for with_gradients in (True, False):
        with (
            torch.set_grad_enabled(with_gradients),
            trainers.loss_on_rows() if wanted == "loss on rows" else contextlib.nullcontext(),
        ):
            out = model(ids, mask, labels=labels)
            results.append([x.detach() for x in (out.logits, out.loss) if x is not None])
    assert model.radix_stats.folded == 2
    assert_same(*results)
