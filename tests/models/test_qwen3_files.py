"""Damaged and hostile folders of a Qwen3 are refused when they are read, by a sentence that names file and value."""

import json
import os
import re

import pytest
import safetensors.torch
import torch
import transformers

from helpers.qwen3_models import oracle
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
HUGE = 2**70


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return oracle(tmp_path_factory.mktemp("model")).config.to_dict()


def wrong(name, what, *values):
    return [({name: value}, f"{name} must be {what}, got {value!r}") for value in values]


def rope(name, what, *values, **others):
    return [
        ({"rope_parameters": {**YARN, **others, name: value}}, f"{name} must be {what}, got {value!r}")
        for value in values
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *wrong("vocab_size", f"a whole number from 1 to {2**24}", 0, -1, "64", 64.0, True, HUGE, [64]),
        *wrong("hidden_size", f"a whole number from 1 to {2**24}", 0, -32, 32.5, HUGE),
        *wrong("num_hidden_layers", f"a whole number from 0 to {2**12}", -3, "3", 3.0, 2**31),
        *wrong("num_attention_heads", f"a whole number from 1 to {2**16}", 0, "4"),
        *wrong("num_key_value_heads", f"a whole number from 1 to {2**16}", 0, -2, "2"),
        *wrong("head_dim", f"a whole number from 1 to {2**16}", 0, -12, "12", 12.0),
        *wrong("rms_norm_eps", "a number from 0", -1e-6, "1e-6", float("nan"), float("inf"), True),
        *wrong("max_position_embeddings", f"a whole number from 1 to {2**31 - 1}", 0, -5, "a", HUGE),
        *wrong("attention_bias", "true or false", "false", 0, 1),
        *wrong("tie_word_embeddings", "true or false", "false", 0),
        *wrong("is_causal", "true or false", "no", 0),
        *wrong("use_bidirectional_attention", "true or false", "all"),
        *wrong("use_sliding_window", "true or false", "true", 1),
        *wrong("attention_dropout", "a number from 0, less than 1", -0.1, 1, "0.1"),
        *wrong("initializer_range", "a number from 0", -1, "a"),
        *wrong("pad_token_id", "from -64 to 63", 64, -65, "0", 1.5),
        *wrong("layer_types", "an array of strings", "full_attention", [1, 2, 3], {"a": 1}),
        *wrong("rope_parameters", "an object", "yarn", [1], 3),
        *wrong("rope_scaling", "an object", "yarn", [1]),
        *[
            (
                {"use_sliding_window": True, "sliding_window": value},
                f"a whole number from 1 to {2**31 - 1}, got {value}",
            )
            for value in (-1, 0, 2.5, HUGE)
        ],
        ({"layer_types": None, "max_window_layers": "a"}, "max_window_layers must be a whole number from 0"),
        *rope("rope_theta", "a number more than 1", "a", 0, -1.0, 1, float("nan"), float("inf"), True),
        *rope("rope_theta", "a number more than 0", "a", 0, rope_type="default"),
        *rope("factor", "a number more than 0", "x", 0, -4.0),
        *rope("beta_fast", "a number more than 0", "x", 0),
        *rope("attention_factor", "a number more than 0", "x", -1),
        *rope("mscale", "a number more than 0", "x", -0.7),
        *rope("truncate", "true or false", "yes"),
        *rope("original_max_position_embeddings", f"a whole number from 1 to {2**31 - 1}", "x", -64, 6.5),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters sets rope_type apart"),
        ({"rope_parameters": {**YARN, "factor": [4]}}, "rope_parameters sets factor apart"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters sets full_attention apart"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"compression_config": {"format": "int"}}, "quantised weights are not supported"),
    ],
)
def test_values_of_a_wrong_kind_are_refused_when_the_config_is_read(config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Qwen3Config.from_dict(config | changes)


def test_a_config_made_by_hand_is_checked_alike(config):
    fields = vars(Qwen3Config.from_dict(config))
    Qwen3Config(**fields)
    for name, value in [("hidden_size", "32"), ("rope", None), ("sliding_windows", (-1, None, None))]:
        with pytest.raises(ValueError, match="must be"):
            Qwen3Config(**{**fields, name: value})


@pytest.fixture
def folder(tmp_path):
    oracle(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, message, kind=ValueError):
    with pytest.raises(kind, match=re.escape(message)) as error:
        Qwen3ForCausalLM.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"\xff{}", "config.json is not UTF-8: byte 0xff at 0"),
        (b"[" * 100_000, "config.json is not JSON that can be read: it is nested too deeply"),
        (b"[1]", "config.json holds list; it must hold a JSON object"),
        (b"null", "config.json holds NoneType; it must hold a JSON object"),
    ],
)
def test_a_config_that_is_no_json_object(folder, raw, message):
    (folder / "config.json").write_bytes(raw)
    refused(folder, message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name} is no regular file; it must be a file")


def test_a_folder_in_place_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors is a folder; it must be a file")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is not JSON"),
        ("[]", "index.json holds list; it must hold a JSON object"),
        ("{}", 'must hold "weight_map", an object of the file of each weight'),
        ({"weight_map": []}, 'must hold "weight_map", an object of the file of each weight'),
        ({"weight_map": {}}, 'must hold "weight_map", an object of the file of each weight'),
        ({"weight_map": {"a": 1}}, "the file of a is 1; it must be one in the same folder"),
        ({"weight_map": {"a": ""}}, "the file of a is ''; it must be one in the same folder"),
        ({"weight_map": {"a": "../else/model.safetensors"}}, "it must be one in the same folder"),
        ({"weight_map": {"a": "x/../../else/model.safetensors"}}, "it must be one in the same folder"),
        ({"weight_map": {"a": "..\\else\\model.safetensors"}}, "it must be one in the same folder"),
        ({"weight_map": {"a": "/etc/model.safetensors"}}, "it must be one in the same folder"),
        ({"weight_map": {"a": "C:model.safetensors"}}, "it must be one in the same folder"),
        ({"weight_map": {"a": "a\0b"}}, "it must be one in the same folder"),
    ],
)
def test_an_index_that_cannot_be_followed(folder, index, message):
    (folder.parent / "else").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "else" / "model.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, message)


def test_an_index_that_names_a_file_that_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    refused(folder, "lacks part.safetensors", FileNotFoundError)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000, -1])
def test_a_cut_file_of_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "model.safetensors is damaged, or no safetensors file")


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats_are_refused(folder, dtype):
    """Cast to floats, steps of some scale would be scored as if they were the weights."""
    weights = weights_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
    refused(folder, f"{name} of {dtype}; weights must be of float32, float64, bfloat16, float16")


def test_two_names_for_one_weight_are_refused(folder):
    weights = weights_of(folder)
    for one, other in [
        ("model.norm.weight", "norm.weight"),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("lm_head.weight", "model.lm_head.weight"),
    ]:
        safetensors.torch.save_file({**weights, other: weights[one] + 1}, folder / "model.safetensors")
        refused(folder, "which are one weight of a Qwen3")


def test_a_head_that_stands_twice_is_refused_where_it_is_tied(tmp_path):
    model = oracle(tmp_path, tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = weights["lm_head.weight"]
    safetensors.torch.save_file({**weights, "model.lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds both lm_head.weight and model.lm_head.weight")


def test_a_name_in_two_shards_is_refused(folder):
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    safetensors.torch.save_file(weights, folder / "a.safetensors")
    safetensors.torch.save_file({"model.norm.weight": weights["model.norm.weight"] + 1}, folder / "b.safetensors")
    found = dict.fromkeys(weights, "a.safetensors") | {"x": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    refused(folder, "holds model.norm.weight twice")


def test_an_adapter_is_not_left_out(folder):
    """transformers would apply it."""
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter (adapter_config.json), which is not applied here: merge it")
    with pytest.raises(ValueError, match="adapter"):
        Qwen3Model.from_pretrained(folder)


def test_configs_that_transformers_reads_are_read(config):
    """config.json files that transformers writes hold nothing that is refused."""
    for changes in ({}, {"rope_parameters": YARN}, {"head_dim": 8}, {"pad_token_id": -1}, {"max_window_layers": 0}):
        made = transformers.Qwen3Config(**{**config, **changes}).to_dict()
        assert Qwen3Config.from_dict(made).hidden_size == 32
        nothing = dict.fromkeys(("rope_scaling", "sliding_window", "pad_token_id", "attention_dropout"))
        assert Qwen3Config.from_dict(made | nothing).hidden_size == 32
