"""Folders and configs of a Qwen3: those that transformers reads mean the same here, others are refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers

from helpers.batches import NAMED
from helpers.qwen3_models import VARIANTS, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_files_and_base_models_load(tmp_path, tied):
    theirs = oracle(tmp_path / "whole", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    theirs.model.save_pretrained(tmp_path / "base")
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    whole = Qwen3ForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(Qwen3ForCausalLM.from_pretrained(tmp_path / "sharded")(batch), whole(batch))
    for folder in ("whole", "sharded", "base"):
        assert torch.equal(Qwen3Model.from_pretrained(tmp_path / folder)(batch), whole.model(batch))
    if tied:
        assert torch.equal(Qwen3ForCausalLM.from_pretrained(tmp_path / "base")(batch), whole(batch))
        assert whole.lm_head.weight is whole.model.embed_tokens.weight
    else:
        with pytest.raises(ValueError, match="lacks lm_head.weight"):
            Qwen3ForCausalLM.from_pretrained(tmp_path / "base")


def test_dtypes(tmp_path):
    oracle(tmp_path, torch.bfloat16)
    assert Qwen3ForCausalLM.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    model = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    with torch.no_grad():
        low, high = model.bfloat16()(batch).float(), model.float()(batch)
    assert (low - high).norm() <= 0.05 * high.norm()


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    theirs = oracle(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        Qwen3Model.from_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"as a pickle \(pytorch_model.bin\), which can run code .*save_pretrained"):
        Qwen3Model.from_pretrained(tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path):
    oracle(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return Qwen3ForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"mlp.\w+.weight must have shape .*, but the file has"):
        load(intermediate_size=56)
    with pytest.raises(ValueError, match=r"lacks model.layers.3.input_layernorm.weight, .* and more"):
        load(num_hidden_layers=4, layer_types=None)
    with pytest.raises(ValueError, match=r"holds model.layers.2.\S+, which a Qwen3 does not have"):
        load(num_hidden_layers=2, layer_types=None)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        Qwen3Config.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        Qwen3Config.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type must be \"qwen3\", got 'qwen2'"),
        ({"hidden_size": None, "rms_norm_eps": None}, "the config lacks hidden_size, rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"use_bidirectional_attention": True}, "attention that is not causal"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must name 3 layers"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "of chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "set no window"),
    ],
)
def test_configs_are_refused(tmp_path, changes, message):
    config = oracle(tmp_path).config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(config)


@pytest.mark.parametrize("variant", ["yarn", "windows"])
def test_the_config_form_of_transformers_4(tmp_path, variant):
    config = oracle(tmp_path, **VARIANTS[variant]).config.to_dict()
    want = Qwen3Config.from_dict(config)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    config.pop("layer_types")
    assert Qwen3Config.from_dict(config) == want


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},  # beside rope_parameters, as model cards say
        {"rope_parameters": {"type": "default", "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "yarn", "factor": None}, "original_max_position_embeddings": 4096},
        {"use_sliding_window": True, "sliding_window": 2, "layer_types": None, "max_window_layers": None},
    ],
)
def test_configs_written_by_hand_mean_what_they_mean_to_transformers(tmp_path, changes):
    oracle(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    batch = FoldedBatch.from_sequences([list(range(40))])
    with torch.no_grad():
        got = Qwen3ForCausalLM.from_pretrained(tmp_path)(batch)
        torch.testing.assert_close(got, run_theirs(theirs, [list(range(40))])[1], rtol=1e-4, atol=1e-4)


def test_an_index_left_behind_by_shards_is_not_read(tmp_path):
    oracle(tmp_path).save_pretrained(tmp_path, max_shard_size="20KB")
    newer = oracle(tmp_path)
    with torch.no_grad():
        newer.lm_head.weight.mul_(2)
    newer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert torch.equal(Qwen3ForCausalLM.from_pretrained(tmp_path).lm_head.weight, newer.lm_head.weight)


def test_tied_files_may_hold_either_name_but_not_two_tensors(tmp_path):
    model = oracle(tmp_path, tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"])

    def load(tensors):
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        return Qwen3ForCausalLM.from_pretrained(tmp_path)

    for tensors in (weights, weights | {"lm_head.weight": head.clone()}):
        assert torch.equal(load(tensors).lm_head.weight, head)
    alone = {name: tensor for name, tensor in weights.items() if "embed" not in name} | {"lm_head.weight": head}
    assert torch.equal(load(alone).model.embed_tokens.weight, head)
    with pytest.raises(ValueError, match="lm_head.weight that differs from the embedding"):
        load(weights | {"lm_head.weight": head + 1})


def test_dtypes_and_folders_are_refused_by_name(tmp_path):
    oracle(tmp_path)
    assert Qwen3Model.from_pretrained(tmp_path, dtype="bfloat16").norm.weight.dtype == torch.bfloat16
    assert Qwen3Model.from_pretrained(tmp_path, device="cpu:0").norm.weight.device.type == "cpu"
    for dtype in (torch.int8, "half precision"):
        with pytest.raises(ValueError, match="dtype must be None or one of float32, float64, bfloat16, float16, got"):
            Qwen3Model.from_pretrained(tmp_path, dtype=dtype)
    for name in ("./nowhere/at/all", ""):
        with pytest.raises(FileNotFoundError, match="is no folder, and could not be read from the Hugging Face hub"):
            Qwen3Model.from_pretrained(name)
    with pytest.raises(TypeError, match="config must be the dict of a config.json, got Qwen3Config"):
        Qwen3Config.from_dict(Qwen3Config.from_pretrained(tmp_path))
