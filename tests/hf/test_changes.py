"""radix_ops.hf on models that were changed since they were made, enabled or verified: never a wrong answer."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface

from helpers.hf_models import SIZES, TREE, Witness, build, build_from, pad
from radix_ops import hf

IDS, MASK = pad(TREE, "left")
REAL = MASK.bool()


def qwen3_moe(**further):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(3)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts, **further)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model


@torch.no_grad()
def check_same(plain, model, match: str) -> None:
    want = plain(IDS, MASK).logits
    with pytest.warns(UserWarning, match=match):
        got = model(IDS, MASK).logits
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("windows", [(None, 2), (3, None)])
def test_window_of_the_config_that_the_attention_does_not_know(windows):
    plain, model = (qwen3_moe(use_sliding_window=windows[0] is not None, sliding_window=windows[0]) for _ in range(2))
    hf.enable(model, threshold=1.0)
    with torch.no_grad():
        model(IDS, MASK)
    assert model.radix_stats.folded == 1
    for each in (plain, model):
        each.config.sliding_window = windows[1]
    check_same(plain, model, "has sliding_window .* and the config")


@pytest.mark.parametrize(
    ("places", "match"), [((1, 0), "layer_idx are"), ((0,), "layers are 1, and config.num_hidden")]
)
def test_layers_in_another_order_or_fewer(places, match):
    plain, model = build("qwen3_sliding"), hf.enable(build("qwen3_sliding"), threshold=1.0)
    for each in (plain, model):
        each.model.layers = torch.nn.ModuleList([each.model.layers[place] for place in places])
    check_same(plain, model, match)
    hf.disable(model)
    with pytest.raises(ValueError, match=match):
        hf.enable(model)


def test_forward_of_the_head_that_was_put_back():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    del model.forward
    labels = IDS.masked_fill(MASK == 0, -100)
    with pytest.warns(UserWarning, match="forward of LlamaForCausalLM was replaced after enable; enable it again"):
        got = model(IDS, MASK, labels=labels).loss
    torch.testing.assert_close(got, plain(IDS, MASK, labels=labels).loss, rtol=0, atol=0)
    hf.enable(model, threshold=1.0)
    model(IDS, MASK)
    assert model.radix_stats.folded == 1
    del model.forward
    hf.disable(model)
    assert "radix_stats" not in vars(model)
    assert "forward" not in vars(model.model)


def test_noise_that_modules_keep_when_the_config_says_none():
    sizes = {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5)
    model = transformers.OPTForCausalLM(config).train()
    model.config.dropout = 0.0
    hf.enable(model, threshold=1.0)
    with pytest.warns(UserWarning, match="has dropout"):
        model(IDS, MASK)
    assert model.radix_stats.skipped == 1


def test_attention_registered_by_others():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    own = AttentionInterface()["sdpa"]

    def other(module, query, key, value, *args, **kwargs):
        out, weights = own(module, query, key, value, *args, **kwargs)
        return out * 0.5, weights

    AttentionInterface.register("sdpa", other)
    try:
        check_same(plain, model, f"'sdpa' is registered by {__name__}")
    finally:
        AttentionInterface.register("sdpa", own)


@pytest.mark.parametrize("name", ["Gemma2", "VaultGemma"])
def test_sdpa_that_leaves_out_a_cap_is_refused(name):
    """transformers before 5.24 takes it by default for these types; set_attn_implementation is how a user goes on."""
    config_class = getattr(transformers, f"{name}Config")
    plain, model = (build_from(config_class(**SIZES, attn_logit_softcapping=0.5)) for _ in range(2))
    plain.set_attn_implementation("eager")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match=r"'sdpa', which leaves out the cap or the sinks .* set_attn_implementation"):
        hf.enable(model)
    model.set_attn_implementation("eager")
    hf.enable(model, threshold=1.0, verify="never")
    with torch.no_grad():
        got, want = model(IDS, MASK).logits[REAL], plain(IDS, MASK).logits[REAL]
    torch.testing.assert_close(got, want)
    assert model.radix_stats.folded == 1


@torch.no_grad()
def test_longer_batches_than_a_window_and_changed_configs_are_verified_anew():
    def plain_forwards(columns: int) -> int:
        with Witness() as witness:
            model(IDS[:, -columns:], MASK[:, -columns:])
        return witness.rows.count(len(IDS) * columns) // 2

    model = hf.enable(build("qwen3_sliding"), threshold=1.0)  # its window is 3
    assert [plain_forwards(columns) for columns in (2, 3, 2, 6, 6, 2)] == [1, 0, 0, 1, 0, 0]
    model.config.bos_token_id = 7
    assert [plain_forwards(columns) for columns in (6, 6)] == [1, 0]


def test_transforms_run_unfolded():
    plain, model = build(attention="eager"), hf.enable(build(attention="eager"), threshold=1.0)
    with pytest.warns(UserWarning, match="vmap, jvp or another transform"):
        got = torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits)(IDS)
    want = torch.func.vmap(lambda ids: plain(ids[None], use_cache=False).logits)(IDS)
    torch.testing.assert_close(got, want)

    def logits(model, scale):
        parameters = {name: p * scale for name, p in model.named_parameters()}
        return torch.func.functional_call(model, parameters, (IDS, MASK)).logits

    one = torch.tensor(1.0)
    got, want = (torch.func.jvp(lambda scale: logits(m, scale), (one,), (one,)) for m in (model, plain))  # noqa: B023
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("threshold", ["a", True])
def test_threshold_of_another_type_is_refused(threshold):
    with pytest.raises(TypeError, match="threshold must be a number or None, got (str|bool)"):
        hf.enable(build(), threshold=threshold)


def test_none_is_refused_by_all():
    with pytest.raises(TypeError, match="disable needs a transformers model, got NoneType"):
        hf.disable(None)
    with pytest.raises(TypeError, match="folded needs a transformers model, got NoneType"), hf.folded(None):
        pass
