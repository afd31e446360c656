"""The guard of radix_ops.hf: a folded batch is held against the plain model, and a wrong one is never returned."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from helpers.hf_models import TREE, Witness, build, no_warnings, pad
from radix_ops import hf
from radix_ops.hf import verify as verification

IDS, MASK = pad(TREE, "left")
ROWS = 9


@pytest.fixture
def mixing_mlp(monkeypatch):
    """Let MLPs look at all positions, which no check of classes, hooks or configs sees."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x - x.mean(-2, keepdim=True)))


@pytest.mark.usefixtures("mixing_mlp")
@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wrong_batch_is_an_error_and_disables(dtype, verify):
    model = build().to(dtype)
    before = [dict(vars(module)) for module in model.modules()]
    plain = model(IDS, MASK).logits
    hf.enable(model, threshold=1.0, verify=verify)
    with pytest.raises(RuntimeError, match=r"folding is wrong for this LlamaModel: hidden states differ .+ as it was"):
        model(IDS, MASK)
    assert [dict(vars(module)) for module in model.modules()] == before
    torch.testing.assert_close(model(IDS, MASK).logits, plain, rtol=0, atol=0)


@pytest.mark.usefixtures("mixing_mlp")
@torch.no_grad()
def test_never_verifies_nothing():
    model = hf.enable(build(), threshold=1.0, verify="never")
    model(IDS, MASK)
    assert model.radix_stats.folded == 1


@torch.no_grad()
@pytest.mark.parametrize(("verify", "plain_forwards"), [("first", 1), ("always", 3), ("never", 0)])
def test_forwards_of_the_plain_model(verify, plain_forwards):
    model = hf.enable(build(), threshold=1.0, verify=verify)
    with Witness() as witness:
        for _ in range(3):
            model(IDS, MASK)
    assert witness.rows.count(ROWS) == 2 * 3
    assert witness.rows.count(IDS.numel()) == 2 * plain_forwards
    hf.enable(model, threshold=1.0)  # it verifies again
    with Witness() as witness:
        model(IDS, MASK)
    assert witness.rows.count(IDS.numel()) == 2


def test_verifying_leaves_random_numbers_and_gradients_alone(monkeypatch):
    forward = Qwen3MLP.forward

    def consume(self, x):
        torch.rand(3)
        return forward(self, x)

    monkeypatch.setattr(Qwen3MLP, "forward", consume)
    results = []
    for verify in ("always", "never"):
        model = hf.enable(build("qwen3"), threshold=1.0, verify=verify).train()
        torch.manual_seed(7)
        model(IDS, MASK).logits.square().sum().backward()
        results.append((torch.rand(4), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    for verified, not_verified in zip(*results, strict=True):
        torch.testing.assert_close(verified, not_verified, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("rows_of_positions", [1, 3])
def test_large_batches_are_verified_a_few_rows_at_a_time(monkeypatch, rows_of_positions):
    monkeypatch.setattr(verification, "_POSITIONS_AT_ONCE", 2 * IDS.shape[1])
    positions = (torch.arange(IDS.shape[1]) % 5).expand(rows_of_positions if rows_of_positions == 1 else len(IDS), -1)
    model = hf.enable(build(), threshold=1.0)
    with Witness() as witness, no_warnings():
        model(IDS, MASK, position_ids=positions)
    assert witness.rows[:6] == [2 * IDS.shape[1]] * 6
    assert model.radix_stats.folded == 1


def test_difference():
    want = torch.randn(2, 50, 8)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, 0] = False
    noisy = want * (1 + 1e-5 * torch.randn_like(want))
    assert verification.difference(noisy, want, real, True) is None
    padding, one, bad = want.clone(), want.clone(), want.clone()
    padding[1, 0] = 9  # it is not compared
    assert verification.difference(padding, want, real, True) is None
    one[0, 7] += 0.1
    assert "at most, where rounding makes at most 0.001 and 0.01" in verification.difference(one, want, real, True)
    bad[0, 7] = torch.nan
    assert "inf at most" in verification.difference(bad, want, real, True)
    # NaNs and infinities of the plain model can't be compared.
    assert verification.difference(want, bad, real, True) is None
    half = [x.to(torch.bfloat16) for x in (want, want * 1.02, want.roll(1, 1))]
    assert verification.difference(half[1], half[0], real, False) is None
    assert "hidden states differ" in verification.difference(half[2], half[0], real, False)


@torch.no_grad()
def test_limits_are_those_of_the_products_precision():
    model = build()
    assert verification.is_exact(model)
    assert verification.is_exact(build().double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not verification.is_exact(model)
        hf.enable(model, threshold=1.0, verify="always")(IDS, MASK)
    torch.set_float32_matmul_precision("high")
    try:
        assert not verification.is_exact(model)
    finally:
        torch.set_float32_matmul_precision("highest")
    model.model.layers[1].to(torch.bfloat16)
    assert not verification.is_exact(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding"])
def test_half_precision_passes(name, dtype):
    model = hf.enable(build(name).to(dtype), threshold=1.0, verify="always")
    for side in ("left", "right", "both"):
        model(*pad(TREE, side))
    assert model.radix_stats.folded == 3
