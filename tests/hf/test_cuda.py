"""radix_ops.hf on CUDA: against the same model before enable, and in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from helpers.cuda_calls import waits
from helpers.hf_models import TREE, assert_within_budget, build, error, no_warnings, pad
from radix_ops import hf
from radix_ops.hf.fold import PaddedBatch

pytestmark = pytest.mark.cuda
EXACT = {False: torch.float64, True: torch.float32}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": 4,
}  # fmt: skip
# Features that attention over rows lacks (a cap of the scores, sinks), learned positions, experts, latent attention.
OTHERS = {
    "gemma2": {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_dropout": 0.0},
    "gpt2": {
        "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def make(name: str):
    if name not in OTHERS:
        return build(name)
    config_class = transformers.CONFIG_MAPPING[name]
    given = OTHERS[name] if name == "gpt2" else {**SIZES, **OTHERS[name]}
    config = config_class(**{"vocab_size": 60, **given}, attn_implementation="eager")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (logits * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", *OTHERS])
def test_output_and_gradients(name, dtype, side):
    ids, mask = (x.cuda() for x in pad(TREE, side))
    real = mask.bool()
    original = make(name)
    plain, model, exact = (copy.deepcopy(original).cuda() for _ in range(3))
    has_experts = name in ("gpt_oss", "mixtral")  # their products know no float64
    plain, model, exact = plain.to(dtype), model.to(dtype), exact.to(dtype).to(EXACT[has_experts])
    hf.enable(model, threshold=1.0, verify="always")
    with no_warnings():
        got = model(input_ids=ids, attention_mask=mask).logits[real]
    assert model.radix_stats.folded == 1
    assert model.radix_stats.rows < model.radix_stats.tokens
    want = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits[real]
    if name == "gpt2":  # its learned positions count padding
        best = exact(input_ids=ids, attention_mask=mask, use_cache=False).logits[real]
    else:
        best = torch.cat([exact(torch.tensor([s], device=ids.device), use_cache=False).logits[0] for s in TREE])
    if has_experts and dtype != torch.float32:
        assert error(got, best.double()) < 0.2  # rounding sends some tokens to other experts
        return
    if has_experts:
        assert error(got, best.double()) < 1e-5
    else:
        assert_within_budget(got, want, best)
    ours, base, exactly = gradients(model, got), gradients(plain, want), gradients(exact, best)
    largest = max(float(g.norm()) for g in exactly.values())
    for key, gradient in exactly.items():
        # A gradient that is nothing but rounding, such as that of a key's bias, has no relative error.
        if float(gradient.norm()) > 1e-3 * largest:
            allowed = 1e-5 if has_experts else 3 * error(base[key], gradient) + 4 * torch.finfo(dtype).eps
            assert error(ours[key], gradient.double()) <= allowed, key


@torch.no_grad()
@pytest.mark.parametrize("layout", ["compact", "trie", "unfold"])
def test_layouts(layout):
    model = build("llama").cuda().to(torch.bfloat16)
    ids, mask = (x.cuda() for x in pad(TREE, "left"))
    want = model(ids, mask).logits
    with hf.folded(model, threshold=1.0, layout=layout):
        got = model(ids, mask).logits
    assert error(got[mask.bool()], want[mask.bool()].double()) < 0.05


@torch.no_grad()
def test_generate():
    model = build("qwen3_sliding").cuda()
    ids, mask = (x.cuda() for x in pad(TREE, "left"))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, **options)
    with hf.folded(model, threshold=1.0), no_warnings():
        assert torch.equal(model.generate(ids, **options), plain)


def test_checkpointing_and_autocast():
    ids, mask = (x.cuda() for x in pad(TREE, "right"))
    plain, model = build("llama").cuda().train(), build("llama").cuda().train()
    hf.enable(model, threshold=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for each in (plain, model):
        with torch.autocast("cuda", torch.bfloat16):
            logits = each(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        grads.append(gradients(each, logits))
    assert model.radix_stats.folded == 1
    for name, gradient in grads[0].items():
        assert error(grads[1][name], gradient.double()) < 0.05, name


@torch.no_grad()
def test_compiled_model():
    plain = build("llama").cuda()
    model = hf.enable(build("llama").cuda(), threshold=1.0)
    model.compile()
    ids, mask = (x.cuda() for x in pad(TREE, "right"))
    torch.testing.assert_close(model(ids, mask).logits[mask.bool()], plain(ids, mask).logits[mask.bool()])
    assert model.radix_stats.folded == 1


@torch.no_grad()
def test_default_threshold_depends_on_the_device():
    model = hf.enable(build("llama").cuda())
    model(torch.ones(40, 63, dtype=torch.int64, device="cuda"))
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (0, 1)
    hf.disable(model)
    hf.enable(model.cpu())
    model(torch.ones(40, 63, dtype=torch.int64))
    assert model.radix_stats.folded == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "mixtral"])
def test_cache_is_that_of_the_plain_model(name, dtype):
    ids, mask = (x.cuda() for x in pad(TREE, "left"))
    plain = make(name).to(device="cuda", dtype=dtype)
    model = hf.enable(copy.deepcopy(plain), threshold=1.0, verify="never")
    got, want = (each(ids, attention_mask=mask, return_dict=False)[1] for each in (model, plain))
    assert model.radix_stats.folded == 1
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)


@torch.no_grad()
def test_captured_graphs_are_the_plain_models():
    ids = torch.randint(1, 60, (4, 6), device="cuda")
    model = hf.enable(build().cuda(), threshold=0, verify="never")
    model(ids, use_cache=False)  # libraries set things up in a first call, which can't be captured
    hf.enable(model, threshold=1.0, verify="never")
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="a CUDA graph is captured"), torch.cuda.graph(graph):
        logits = model(ids, use_cache=False).logits
    ids.copy_(ids.flip(0))
    graph.replay()
    assert model.radix_stats.folded == 0
    torch.testing.assert_close(logits, build().cuda()(ids, use_cache=False).logits)


def test_the_host_waits_once_to_fold_a_padded_batch(tmp_path):
    ids = torch.randint(0, 50, (4, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    for given in (mask, None):
        assert waits(lambda given=given: PaddedBatch.fold(ids, given, None, sees_packing=True), tmp_path / "trace") == 1
