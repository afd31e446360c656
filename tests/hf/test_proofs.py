"""The list that radix_ops.hf goes by: twelve families are proven again, and what is not on it is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from helpers.hf_models import Witness, error
from radix_ops import hf
from radix_ops.hf import fold, guards, proofs

# transformers renames gradient checkpointing; the old name serves all its supported versions.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fold_checks  # noqa: E402
import models_page  # noqa: E402
import prove_models  # noqa: E402
import small_configs  # noqa: E402

CONTENT = json.loads((ROOT / "radix_ops" / "hf" / "models.json").read_text())
proves = pytest.mark.skipif(
    transformers.__version__ != CONTENT["transformers"], reason="the list was made with another version of transformers"
)
FAMILIES = (
    "deepseek_v3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "llama", "llama4_text", "mistral", "mixtral",
    "opt", "qwen3",
)  # fmt: skip
WRONG_TYPES = (
    "bamba", "bert", "bloom", "deepseek_v32", "falcon_h1", "jamba", "kimi_linear", "lfm2", "mamba", "nemotron_h",
    "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "zamba",
)  # fmt: skip
# Configs of well-known checkpoints say this besides sizes.
CHECKPOINTS = {
    "gemma2-9b": ("gemma2", {"query_pre_attn_scalar": 256, "cache_implementation": "hybrid"}),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "eos_token_id": 200002, "pad_token_id": 199999, "swiglu_limit": 7.0, "experts_per_token": 4,
            "initial_context_length": 4096, "attention_bias": True,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
        },
    ),
    "llama-3.1-8b-instruct": (
        "llama",
        {
            "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral-7b-v0.1": ("mistral", {"sliding_window": 4096, "head_dim": None}),
    "mistral-7b-v0.3": ("mistral", {"sliding_window": None, "torch_dtype": "bfloat16"}),
    "mixtral-8x7b": ("mixtral", {"sliding_window": None, "output_router_logits": False, "num_local_experts": 8}),
    "opt-125m": ("opt", {"word_embed_proj_dim": 768, "do_layer_norm_before": True, "prefix": "</s>"}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024, "do_layer_norm_before": False}),
    "phi-3-small": ("phi3", {"sliding_window": 2047, "rope_scaling": None, "auto_map": {"AutoConfig": "x.Y"}}),
    "qwen2.5-7b": ("qwen2", {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}),
    "qwen3-8b": ("qwen3", {"head_dim": 128, "use_sliding_window": False, "sliding_window": None}),
    "qwen3-8b, 128k": (
        "qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    ),
}  # fmt: skip
WRONG_CONFIGS = {
    "not causal": ("qwen3", {"is_causal": False}, "is_causal is False"),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "scaled by position": ("llama4_text", {"attn_temperature_tuning": True}, "attn_temperature_tuning is True"),
    "windows in the masks alone": (
        "qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_"
    ),
    "frequencies by length": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"
    ),
    "unknown choice": (
        "deepseek_v2", {"topk_method": "best", "num_experts_per_tok": 6}, "topk_method is 'best'"
    ),
    "losses that count tokens": ("mixtral", {"output_router_logits": True}, "output_router_logits is True"),
}  # fmt: skip


def proof_of(model_type: str) -> proofs.Proof:
    return proofs.proofs()[0][model_type]


def skip_if_absent(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("this version of transformers has no such type")


def build(model_type: str, **changed):
    skip_if_absent(model_type)
    return fold_checks.build(model_type, small_configs.small_arguments(model_type) | changed)


def test_runtime_goes_by_the_committed_list():
    proven, refused = proofs.proofs()
    assert {name: dataclasses.asdict(proof) for name, proof in proven.items()} == CONTENT["proven"]
    assert refused == CONTENT["refused"]
    assert not proven.keys() & refused.keys()
    assert len(proven) >= 85


def test_page_says_what_the_list_says():
    assert (ROOT / "docs" / "models.md").read_text() == models_page.page(CONTENT)


@proves
def test_list_covers_every_causal_type():
    assert {*CONTENT["proven"], *CONTENT["refused"]} == set(prove_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@proves
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_is_proven_again(model_type):
    listed, found = proof_of(model_type), prove_models.prove(model_type, only_base=True)
    for name in ("module", "stack", "calls", "packing", "heads", "head_on_rows"):
        assert getattr(found, name) == getattr(listed, name)
    assert found.positions in ("any", listed.positions)
    assert set(found.classes) <= set(listed.classes)
    assert set(found.layer_types) <= set(listed.layer_types)
    for name, kinds in found.values.items():
        assert set(kinds) <= set(listed.values[name])


def without_windows(attend):
    return lambda q, k, v, batch, plan, scale, sliding_window: attend(q, k, v, batch, plan, scale, None)


def without_gradients_of_values(attend):
    return lambda q, k, v, *further: attend(q, k, v.detach(), *further)


@pytest.mark.parametrize("fault", [without_windows, without_gradients_of_values])
def test_proof_fails_where_folding_is_wrong(monkeypatch, fault):
    model = build("mistral")
    assert fold_checks.positions_that_fit(model, 1) == {"tokens", "columns"}
    monkeypatch.setattr(fold, "attend", fault(fold.attend))
    with pytest.raises(fold_checks.Refused, match="folded, it differs"):
        fold_checks.positions_that_fit(model, 1)


def test_proof_tells_where_left_padded_rows_count_from():
    assert fold_checks.positions_that_fit(build("gpt2"), 1) == {"columns"}
    assert fold_checks.positions_that_fit(build("opt"), 1) == {"tokens"}


def test_proof_fails_where_scores_are_scaled_by_row():
    with pytest.raises(fold_checks.Refused, match="folded, it differs"):
        fold_checks.positions_that_fit(build("llama4_text", attn_temperature_tuning=True), 1)


@proves
@pytest.mark.parametrize("model_type", ["qwen3_next", "recurrent_gemma", "bert", "bloom", "deepseek_v32", "bart"])
def test_proof_of_a_wrong_type_is_refused_with_a_reason(model_type):
    assert prove_models.prove_or_refuse(model_type) == CONTENT["refused"][model_type]


def test_proof_does_not_rest_on_names():
    """If qwen3_next were let through and run, its layers other than attention would be noticed."""
    model = build("qwen3_next", layer_types=["linear_attention", "full_attention"])
    with pytest.raises(fold_checks.Refused, match="its attention is called 1 times and not 2"):
        fold_checks.positions_that_fit(model, 1)


def test_proof_needs_causal_attention():
    with pytest.raises(fold_checks.Refused, match="not causal"):
        prove_models.run_plain(build("llama", is_causal=False))


@pytest.mark.parametrize("model_type", WRONG_TYPES)
def test_wrong_types_are_refused_by_name(model_type):
    skip_if_absent(model_type)
    config = AutoConfig.for_model(model_type)
    if model_type == "bert":
        config.is_decoder = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"'{model_type}', which folding is not known to be right for: [a-z ]{{8}}"):
        hf.enable(model)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_configs_are_refused_by_value(name):
    model_type, changed, message = WRONG_CONFIGS[name]
    config = AutoConfig.for_model(model_type, **changed)
    assert message in proofs.unproven_config(config, proof_of(model_type))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configs_of_checkpoints_are_proven(name):
    model_type, values = CHECKPOINTS[name]
    config = AutoConfig.for_model(model_type, **values, _name_or_path=name, use_cache=True)
    assert proofs.unproven_config(config, proof_of(model_type)) is None


def test_values_of_single_layers_are_looked_at():
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    if not hasattr(config, "per_layer_config"):
        pytest.skip("this version of transformers has one config for all layers")
    config.per_layer_config = {1: {"num_key_value_heads": 4}}
    assert proofs.unproven_config(config, proof_of("llama")) is None
    for values, message in (({"is_causal": False}, "is_causal"), ({"skip": ["self_attn"]}, "skip")):
        config = AutoConfig.for_model("llama", num_hidden_layers=2)
        config.is_causal = True
        config.per_layer_config = {1: values}
        assert message in proofs.unproven_config(config, proof_of("llama"))


def test_classes_that_borrow_a_name_are_not_proven():
    llama = transformers.models.llama.modeling_llama
    proof = proof_of("llama")
    assert proofs.is_proven_class(llama.LlamaAttention, proof)
    remote = type("LlamaAttention", (llama.LlamaAttention,), {"__module__": llama.__name__})
    assert proofs.path_of(remote) == proofs.path_of(llama.LlamaAttention)
    assert not proofs.is_proven_class(remote, proof)


def test_a_type_that_is_proven_again_keeps_the_version_that_it_holds_from():
    listed = CONTENT["proven"]["llama"]
    again = listed | {"since": "99.1", "classes": listed["classes"][1:]}
    assert prove_models.merged(CONTENT, {"llama": again})["proven"] == CONTENT["proven"]
    differs = again | {"calls": 2}
    assert prove_models.merged(CONTENT, {"llama": differs})["proven"]["llama"] == differs


def test_older_transformers_than_a_proof_holds_for_is_refused():
    newer = dataclasses.replace(proof_of("llama"), since="99.1")
    with (
        fold_checks.allowed("llama", newer),
        pytest.raises(ValueError, match="from transformers 99.1 on, and this is 5"),
    ):
        hf.enable(build("llama"))


def test_types_that_this_transformers_lacks_are_no_error():
    proof = dataclasses.replace(
        proof_of("llama"), module="transformers.models.none", classes=["transformers.none.None"]
    )
    assert proof.stack_class is None
    assert not proofs.is_proven_class(transformers.LlamaModel, proof)


@pytest.mark.parametrize(
    ("model_type", "path"), [("opt", "model.decoder"), ("llama4_text", "model"), ("gpt_neox", "gpt_neox")]
)
def test_stack_is_found(model_type, path):
    model = build(model_type)
    assert proofs.find_stack(model) is model.get_submodule(path)


def variants(model_type: str):
    """Yield arguments of a config and its model: by default, with a cap on scores and without, by kinds of layers."""
    arguments, model = prove_models.first_model(model_type)
    if transformers.__version__ == CONTENT["transformers"] or guards.why_unfoldable(proofs.find_stack(model)) is None:
        yield arguments, model
    changes = [{"layer_types": [kind] * 2, "num_hidden_layers": 2} for kind in set(proofs.layer_types_of(model.config))]
    if hasattr(model.config, "attn_logit_softcapping"):
        changes += [{"attn_logit_softcapping": cap} for cap in (None, 2.0)]
    for changed in changes:
        with contextlib.suppress(fold_checks.Unbuildable):
            other = fold_checks.build(model_type, arguments | changed)
            if guards.why_unfoldable(proofs.find_stack(other)) is None:
                yield arguments | changed, other


@torch.no_grad()
@pytest.mark.parametrize("model_type", CONTENT["proven"])
def test_config_tells_whose_attention_is_its_own(model_type):
    skip_if_absent(model_type)
    if Version(transformers.__version__) < Version(proof_of(model_type).since):
        pytest.skip("not proven for this version of transformers")
    for arguments, model in variants(model_type):
        told = guards.has_own_attention(fold_checks.config_of(model_type, arguments))  # no model is made of it
        stack = proofs.find_stack(model)
        with hf.folded(stack, threshold=1.0, verify="never"), Witness() as witness:
            stack(input_ids=fold_checks.pad("right")[0][:, :9])
            assert stack.radix_stats.folded == 1
        assert told == (witness.attention_calls < proof_of(model_type).calls * stack.config.num_hidden_layers)
        assert guards.has_own_attention(model.config) == guards.has_own_attention(stack.config) == told


@pytest.mark.parametrize("model_type", ["deepseek_v4", "hy_v4"])
def test_config_of_a_type_with_sinks_that_does_not_fold_tells_it(model_type):
    skip_if_absent(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    assert any(name.endswith("sinks") for name, _ in model.named_parameters())
    assert guards.has_own_attention(model.config)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "mimo_v2_flash"])
def test_caps_and_sinks_in_half_precision(model_type, dtype):
    """The model's own attention computes them, within twice the error of the same model in the same dtype.

    All experts see all tokens, since rounding may choose others.
    """
    model = build(model_type, **({} if model_type == "gemma2" else {"num_experts_per_tok": 4}))
    ids, mask = fold_checks.pad("both")
    exact = model(ids, mask, use_cache=False).logits[mask.bool()]
    model.to(dtype)
    plain = model(ids, mask, use_cache=False).logits[mask.bool()]
    with hf.folded(model, threshold=1.0):
        got = model(ids, mask).logits[mask.bool()]
        assert model.radix_stats.folded == 1
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps
