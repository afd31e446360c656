"""Twins of modules: what is replaced in them, what they share, and that the original stays as it is."""

import torch
from torch import nn

from helpers.hf_models import build
from radix_ops.hf import twins

IDS = torch.tensor([[1, 2, 3, 4]])


def attributes(model):
    return [(id(module), {name: id(value) for name, value in vars(module).items()}) for module in model.modules()]


@torch.no_grad()
def test_part_is_replaced_wherever_it_stands_and_all_else_is_shared():
    model = build()
    model.model.layers[1].mlp = model.model.layers[0].mlp  # one module in two places
    before, want = attributes(model), model(IDS).logits
    zero = nn.Identity()
    zero.forward = torch.zeros_like
    twin = twins.with_part(model, model.model.layers[0].mlp, zero)
    assert [layer.mlp for layer in twin.model.layers] == [zero, zero]
    assert attributes(model) == before
    assert torch.equal(model(IDS).logits, want)
    assert not torch.equal(twin(IDS).logits, want)
    assert twin.model.layers[0].self_attn is model.model.layers[0].self_attn
    assert twin.lm_head is model.lm_head
    left = set(map(id, twin.parameters())) ^ {id(p) for name, p in model.named_parameters() if "mlp" not in name}
    assert not left


def test_attributes_change_in_the_twin_alone():
    model = build()
    before = attributes(model)
    layer = model.model.layers[1].self_attn
    twin = twins.twin_of(model, lambda module: {"scaling": 0.0} if module is layer else {})
    assert attributes(model) == before
    assert [layer.self_attn.scaling == 0 for layer in twin.model.layers] == [False, True]
    assert twin.model.layers[0] is model.model.layers[0]
    assert type(twin) is type(model)
    assert twins.twin_of(model, lambda module: {}) is model


def test_twin_of_a_compiled_module_is_not_bound_to_it():
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    twin = twins.with_part(model, model[0], nn.Identity())
    x = torch.ones(1, 2)
    assert torch.equal(twin(x), x)
    assert not torch.equal(model(x), x)
