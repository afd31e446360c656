"""Captured CUDA graphs under radix_ops.hf, of several model types, against transformers on a GPU."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys

import pytest
import torch
import transformers

from helpers.hf_models import SIZES, TREE, assert_within_budget, pad
from radix_ops import hf

pytestmark = pytest.mark.cuda
LARGER = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
EXPERTS = {**LARGER, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": (transformers.LlamaConfig, LARGER),
    "qwen3": (transformers.Qwen3Config, LARGER),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        LARGER | {"sliding_window": 40, "query_pre_attn_scalar": 16, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention"
        ]},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {**LARGER, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gpt2": (transformers.GPT2Config, {
        "vocab_size": 60, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }),
    "olmo2": (transformers.Olmo2Config, LARGER),
    "mixtral": (transformers.MixtralConfig, EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, EXPERTS | {"num_experts": 4}),
}  # fmt: skip
DENSE = ("llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "olmo2")
LONG = [[7] * 3 + [i % 50 + 1 for i in range(90)] + [51 + i] * (3 + 20 * i) for i in range(4)]
LIKE_LONG = [[5] * 3 + [i % 40 + 1 for i in range(91)] + [50 + i] * (4 + 19 * i) for i in range(4)]  # of its sizes


def make(name: str, head=transformers.AutoModelForCausalLM, **options):
    config_class, given = CONFIGS[name]
    given = given | ({} if name == "gpt2" else {"max_position_embeddings": 512}) | options
    torch.manual_seed(3)
    model = head.from_config(config_class(**given, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model.cuda()


def given_of(sequences, side="right"):
    ids, mask = (x.cuda() for x in pad(sequences, side))
    return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSE)
def test_replays_are_within_the_error_budget(name, dtype):
    model = make(name)
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model.to(dtype))
    hf.enable(model, threshold=1.0, verify="always")
    given, other = given_of(LONG), given_of(LIKE_LONG)
    for _ in range(3):
        model(**given)
    got = model(**other).logits
    assert model.radix_stats.replayed == 3, model.radix_stats
    assert model.radix_stats.no_graphs is None
    real = other["attention_mask"].bool()
    assert_within_budget(got[real], plain(**other).logits[real], exact(**other).logits[real])


@torch.no_grad()
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_right_replayed_or_not(name, experts):
    """Rounding sends a token to other experts here and there, in the plain model as well."""
    model = make(name).bfloat16()
    model.set_experts_implementation(experts)
    plain = copy.deepcopy(model)
    hf.enable(model, threshold=1.0)
    for sequences in (LONG, LONG, LIKE_LONG, LONG, LIKE_LONG):
        given = given_of(sequences)
        got, want = (each(**given).logits[given["attention_mask"].bool()].float() for each in (model, plain))
        assert (got - want).norm(dim=-1).div(want.norm(dim=-1)).quantile(0.9) < 0.1
    assert (model.radix_stats.replayed > 0) == (model.radix_stats.no_graphs is None)
    if experts == "eager":
        assert model.radix_stats.no_graphs is not None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_classifiers_replay(name):
    model = make(name, transformers.AutoModelForSequenceClassification).bfloat16()
    plain = copy.deepcopy(model)
    hf.enable(model, threshold=1.0)
    for sequences in (LONG, LONG, LIKE_LONG, LONG):
        given = given_of(sequences)
        torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=0.1, atol=0.1)
    assert model.radix_stats.replayed == 3


@torch.inference_mode()
def test_defaults_fold_a_small_batch_that_comes_again():
    model = make("qwen3").bfloat16()
    hf.enable(model)
    given = given_of(LONG)
    for _ in range(6):
        model(**given)
    assert (model.radix_stats.skipped, model.radix_stats.folded, model.radix_stats.replayed) == (2, 4, 4)


@torch.no_grad()
def test_a_compiled_model_is_right():
    torch._dynamo.reset()
    model = make("qwen3").bfloat16()
    plain = copy.deepcopy(model)
    hf.enable(model, threshold=1.0)
    compiled = torch.compile(model)
    for sequences in (LONG, LONG, LIKE_LONG, LONG):
        given = given_of(sequences)
        real = given["attention_mask"].bool()
        got, want = (each(**given).logits[real].float() for each in (compiled, plain))
        assert (got - want).norm() <= 0.05 * want.norm()
    torch._dynamo.reset()


@torch.no_grad()
def test_memory_is_given_back():
    given = given_of(LONG)
    model = make("llama").bfloat16()
    for each in (make("llama").bfloat16(), model):  # what is kept for the process
        hf.enable(each, threshold=1.0)
        for _ in range(3):
            each(**given)
        assert each.radix_stats.replayed == 2
        hf.disable(each)
    del each
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    hf.enable(model, threshold=1.0)
    for _ in range(3):
        model(**given)
    graphs = torch.cuda.memory_allocated() - before
    assert graphs > 0
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model.cpu()  # its weights are not held, though graphs read them
    assert torch.cuda.memory_allocated() <= before + graphs - weights
    hf.disable(model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before - weights


def test_a_token_out_of_range_is_a_device_assert():
    script = """
import torch, transformers
from radix_ops import hf
config = transformers.LlamaConfig(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16)
model = hf.enable(transformers.LlamaModel(config).eval().cuda().bfloat16(), threshold=1.0)
def run(last):
    model(torch.tensor([[1, 2, 3], [1, 2, last]]).cuda(), use_cache=False)
with torch.no_grad():
    for _ in range(4):
        run(5)
    torch.cuda.synchronize()
    assert model.radix_stats.replayed == 3
    print("replays", flush=True)
    run(60)
    torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "replays" in run.stdout, run.stderr
    assert run.returncode != 0
    assert "device-side assert" in run.stderr


@torch.no_grad()
def test_streams_get_their_own_results():
    model = make("qwen3").bfloat16()
    hf.enable(model, threshold=1.0)
    batches = [given_of(LONG), given_of(LIKE_LONG), given_of(TREE)]
    wants = [[model(**given).logits for _ in range(3)][-1] for given in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            results.append(model(**batches[i % 3]).logits)
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        real = batches[i % 3]["attention_mask"].bool()
        assert torch.equal(result[real], wants[i % 3][real]), i
