"""Changes of a model that its graphs would not see."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch import nn

from helpers.qwen3_models import oracle
from radix_ops.graphs.watch import Watch, forwards_of, why_not
from radix_ops.models import qwen3
from radix_ops.models.qwen3 import Qwen3Model


@pytest.fixture
def model(tmp_path):
    # As many heads of a size as the model is wide, so that a projection is square.
    oracle(tmp_path, hidden_size=48, num_key_value_heads=4)
    return Qwen3Model.from_pretrained(tmp_path)


def watched(model):
    return Watch(model, qwen3._FORWARDS)


def replaced_data(model):
    weight = model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()


def transposed_data(model):
    weight = model.layers[0].self_attn.k_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t()


def replaced_norm_class(model):
    model.norm = type("OtherNorm", (qwen3.RMSNorm,), {})(48, 1e-6)


def reread_data(model):
    weight = model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.view(torch.bfloat16)[:, ::2]


CHANGES = {
    "data": replaced_data,
    "transposed data": transposed_data,
    "data read in another dtype": reread_data,
    "parameter": lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight.detach().clone())),
    "assigned": lambda m: m.load_state_dict({n: p.clone() for n, p in m.state_dict().items()}, assign=True),
    "dtype": lambda m: m.double(),
    "layer": lambda m: m.layers.__setitem__(1, qwen3.Qwen3Layer(m.config, None)),
    "layer left out": lambda m: m.layers.__delitem__(2),
    "layers in another order": lambda m: setattr(m, "layers", nn.ModuleList([m.layers[1], m.layers[0], m.layers[2]])),
    "class": replaced_norm_class,
    "class in place": lambda m: setattr(m.layers[0].mlp, "__class__", type("OtherMLP", (qwen3.Qwen3MLP,), {})),
    "forward": lambda m: setattr(m.layers[0].mlp, "forward", lambda x: x),
    "hook": lambda m: m.layers[0].register_forward_hook(lambda *_: None),
    "hook before": lambda m: m.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: None),
    "bias": lambda m: setattr(m.layers[0].mlp.up_proj, "bias", nn.Parameter(torch.ones(48))),
    "window": lambda m: setattr(m.layers[0].self_attn, "sliding_window", 5),
    "epsilon": lambda m: setattr(m.norm, "eps", 1e-3),
    "positions": lambda m: m.config.rope.__setitem__("rope_theta", 7.0),
    "train": lambda m: m.train(),
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(
        m.layers[0].mlp.up_proj, "weight", nn.Identity()
    ),
    "compiled": lambda m: m.compile_layers(),
    "compiled in another way": lambda m: setattr(m._run, "_compiled_call_impl", None),
    "norm of rows": lambda m: setattr(m.embed_tokens, "max_norm", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(model, change):
    if change == "compiled in another way":
        model.compile_layers()
    watch = watched(model)
    assert watch.may_replay(model)
    assert watch.is_unchanged()
    CHANGES[change](model)
    assert not (watch.may_replay(model) and watch.is_unchanged())


@pytest.mark.parametrize("change", ["data", "parameter", "assigned"])
def test_the_memory_of_weights_is_kept_while_it_is_watched(model, change):
    """A replay may come before the longer look, and another weight must not come to lie in the old one's place."""
    weight = model.layers[1].mlp.up_proj.weight if change == "data" else model.norm.weight
    before, place = weight.detach().clone(), weight.data_ptr()
    watch = watched(model)
    kept = next(x for x in watch._weights._kept if x.data_ptr() == place)
    CHANGES[change](model)
    del weight
    assert torch.equal(torch.empty(0).set_(kept)[: before.numel()].view_as(before), before)


def test_a_larger_embedding_is_seen_before_a_token_of_it_is_looked_up(model):
    watch = watched(model)
    model.embed_tokens = nn.Embedding(1000, 48)
    assert not watch.may_replay(model)
    model.embed_tokens = nn.Embedding(1000, 48)
    watch = watched(model)
    model.embed_tokens.weight.data = torch.randn(2000, 48)
    assert not watch.may_replay(model)


def test_changes_in_place_need_no_watching(model):
    watch = watched(model)
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    model.requires_grad_(False)
    model.eval()
    assert watch.may_replay(model)
    assert watch.is_unchanged()


def test_a_class_with_another_forward_is_seen(model, monkeypatch):
    watch = watched(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not watch.is_unchanged()
    assert why_not(model, qwen3._FORWARDS) == "the forward of Linear was replaced"


def test_another_model_is_another_one(model, tmp_path):
    watch = watched(model)
    assert not watch.may_replay(Qwen3Model.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("class", "it holds a OtherNorm"),
        ("parametrized", "it holds a ParametrizedLinear"),
        ("forward", "the forward of a Qwen3MLP was replaced"),
        ("hook", "a Qwen3Layer has a hook"),
        ("hook before", "a Linear has a hook"),
        (
            lambda m: m.layers[0].register_buffer("scale", torch.ones(1, device="meta")),
            "it has a buffer of another device or of a class of its own",
        ),
        ("transposed data", "the weight of a Linear is no plain parameter"),
        ("norm of rows", "a Embedding changes its weight"),
    ],
)
def test_no_graph_stands_in_for_what_it_would_leave_out(model, change, reason):
    assert why_not(model, qwen3._FORWARDS) is None
    (CHANGES[change] if isinstance(change, str) else change)(model)
    assert why_not(model, qwen3._FORWARDS) == reason


def test_weights_of_several_dtypes_have_no_graph(model):
    model.norm.double()
    assert why_not(model, qwen3._FORWARDS) == "its weights are of several dtypes or devices"


def test_weights_put_in_place_for_a_call_are_no_parameters(model):
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    watch = watched(model)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return watch.may_replay(model), why_not(model, qwen3._FORWARDS)

    inner = Inner()
    given = {f"model.{name}": value for name, value in tensors.items()}
    may_replay, reason = torch.func.functional_call(inner, given, ())
    assert not may_replay
    assert reason == "the weight of a Embedding is no plain parameter"
    assert watch.may_replay(model)


def test_a_watched_model_dies_with_its_last_reference(model, tmp_path):
    other = Qwen3Model.from_pretrained(tmp_path)
    other._watch_of_a_test = watched(other)
    dead, weight = weakref.ref(other), weakref.ref(other.norm.weight)
    gc.disable()
    try:
        del other
        assert dead() is None
    finally:
        gc.enable()
    assert weight() is None


class Scaled(nn.Module):
    """A module as others write them: a buffer, containers, a config of its own, weights of two dtypes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.scales, self.inner.merged, self.inner.of = {"default": {"by": 2.0}}, [], (1, [2])
        self.inner.config = types.SimpleNamespace(theta=7.0, kinds=["a"])
        self.inner.register_buffer("frequencies", torch.ones(3))
        self.wide = nn.Linear(4, 4).double()
        self.activation = torch.relu


def replaced_buffer(module):
    module.inner.frequencies = module.inner.frequencies.clone()


OTHERS_CHANGES = {
    "buffer": replaced_buffer,
    "no buffer": lambda m: m.inner.register_buffer("frequencies", None),
    "another buffer": lambda m: m.inner.register_buffer("further", torch.ones(1)),
    "in a dict": lambda m: m.inner.scales["default"].__setitem__("by", 3.0),
    "in an empty list": lambda m: m.inner.merged.append("default"),
    "in a tuple": lambda m: m.inner.of[1].append(3),
    "config": lambda m: setattr(m.inner.config, "theta", 9.0),
    "in a config": lambda m: m.inner.config.kinds.append("b"),
    "train": lambda m: m.inner.train(not m.inner.training),
    "function": lambda m: setattr(m, "activation", torch.tanh),
}


@pytest.mark.parametrize("change", OTHERS_CHANGES)
def test_changes_of_modules_of_others_are_seen(change):
    module = Scaled()
    assert why_not(module, None) is None
    watch = Watch(module, forwards_of(module), keeps_memory=False)
    assert watch.is_unchanged()
    OTHERS_CHANGES[change](module)
    assert not watch.is_unchanged()


def test_buffers_that_change_in_place_need_no_watching():
    module = Scaled()
    watch = Watch(module, forwards_of(module), keeps_memory=False)
    module.inner.frequencies.mul_(2)
    assert watch.is_unchanged()


def test_memory_of_weights_is_not_kept_unless_it_is_asked_for():
    module = Scaled()
    watch = Watch(module, forwards_of(module), keeps_memory=False)
    dead = weakref.ref(module.inner.weight.untyped_storage())
    module.inner.weight.data = module.inner.weight.data.clone()
    gc.collect()
    assert dead() is None
    assert not watch.is_unchanged()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.inner, "extra", object()), "a Linear holds extra, a object"),
        (lambda m: setattr(m.inner, "extra", {1: torch.ones(1)}), "a Linear holds extra, a dict"),
        (lambda m: setattr(m.inner, "extra", torch.ones(1)), "a Linear holds extra, a Tensor"),
        (lambda m: setattr(m, "extra", torch.ones(1)), "a Scaled holds extra, a Tensor"),
        (lambda m: m.inner.compile(), "a Linear holds code that torch.compile made"),
        (lambda m: m.inner.register_forward_hook(print), "a Linear has a hook"),
    ],
)
def test_modules_of_others_whose_changes_would_not_be_seen_have_no_graph(change, reason):
    module = Scaled()
    change(module)
    assert why_not(module, None) == reason
