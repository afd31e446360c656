"""radix_ops.hf and weights that are no plain tensors, as quantisation makes them without another class of layer."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.hf_models import TREE, assert_same, build, error, pad
from radix_ops import hf

IDS, MASK = pad(TREE, "right")


class Int8Weight(torch.Tensor):
    """Stands for a quantised weight with dynamic activations: rounds what is multiplied by the largest of the batch."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                x, weight, *bias = args
                scale = x.abs().max() / 127
                return F.linear((x / scale).round() * scale, weight.as_subclass(torch.Tensor), *bias)
            out = function(*args, **(kwargs or {}))
        return out.as_subclass(cls) if function is torch.Tensor.detach else out


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' own kind of parameter."""


def _int8(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Int8Weight), requires_grad=False)


def _four_bits(linear):
    linear.weight = torch.Tensor._make_subclass(Params4bit, linear.weight.detach())


def _rounded_buffer(linear):
    linear.register_buffer("scale", torch.ones(1).as_subclass(Int8Weight))


PLACES = ("model.layers.1.mlp.up_proj", "lm_head")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("quantise", "kind"),
    [
        (_int8, f"weight is a {__name__}.Int8Weight"),
        (_four_bits, f"weight is a {__name__}.Params4bit"),
        (_rounded_buffer, f"scale is a {__name__}.Int8Weight"),
    ],
)
def test_quantised_weights_are_refused_by_name(quantise, kind, place):
    model = build()
    quantise(model.get_submodule(place))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{place}.{kind}, a subclass of Tensor as quantised weights are"):
        hf.enable(model)
    assert [dict(vars(module)) for module in model.modules()] == before


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_weights_quantised_after_enable_run_unfolded(place):
    plain, model = build(), hf.enable(build(), threshold=1.0)
    model(IDS, MASK)
    for each in (plain, model):
        _int8(each.get_submodule(place))
    # The stand-in rounds by a number that depends on the whole batch, padding too.
    want = plain(IDS, MASK).logits
    assert error(plain(IDS[:1], MASK[:1]).logits, want[:1].double()) > 1e-6
    with pytest.warns(UserWarning, match=f"{place}.weight is a {__name__}.Int8Weight"):
        assert_same(model(IDS, MASK).logits, want)
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (1, 1)


@torch.no_grad()
def test_plain_parameters_and_buffers_of_all_makes_are_folded():
    model = build()
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.clone(), requires_grad=False)
    model.model.register_buffer("seen", nn.Buffer(torch.ones(1)))
    copied = hf.enable(copy.deepcopy(model), threshold=1.0)
    torch.testing.assert_close(copied(IDS, MASK).logits[MASK.bool()], model(IDS, MASK).logits[MASK.bool()])
    assert copied.radix_stats.folded == 1


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao, which no extra installs")
def test_weights_of_torchao_are_refused_by_name():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        model = build()
        quantize_(model, config)
        with pytest.raises(ValueError, match=r"weight is a torchao\..+, a subclass of Tensor as quantised weights are"):
            hf.enable(model)
