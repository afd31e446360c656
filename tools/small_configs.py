"""Configs of transformers models that are small, without randomness in training, and the ways in which they vary."""

from __future__ import annotations

import functools
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from radix_ops.hf import guards, proofs

# Fields by name: widths, counts, and what a batch of 14 tokens must exceed to see it at work.
SMALL = {
    name: value
    for value, names in (
        (99, "vocab_size vocab_size_per_layer_input"),
        (64, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_sequence_length"),
        # Longer than the batches, as those must be that radix_ops.hf folds.
        (64, "attention_chunk_size"),
        (48, "intermediate_size ffn_dim n_inner d_ff dff decoder_ffn_dim encoder_ffn_dim dim_ff ffn_hidden_size"),
        (48, "intermediate_size_mlp shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size"),
        (32, "hidden_size n_embd d_model embed_dim word_embed_proj_dim emb_dim dim dim_model embedding_size"),
        (16, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim"),
        (16, "expert_ffn_hidden_size"),
        (12, "v_head_dim swa_v_head_dim"),
        (8, "head_dim attention_head_dim dim_head global_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim"),
        (8, "hidden_size_per_layer_input laurel_rank kv_channels swa_head_dim"),
        (5, "sliding_window local_attention window_size sliding_window_size"),
        (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim index_topk"),
        (4, "swa_num_attention_heads"),
        (3, "floor_scale log_scaling_n_floor"),
        (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
        (2, "num_key_value_heads num_kv_heads multi_query_group_num index_n_heads swa_num_key_value_heads"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
        (1, "n_group topk_group n_shared_experts first_k_dense_replace num_expert_groups"),
        (0, "pad_token_id num_kv_shared_layers"),
        (1, "bos_token_id"),
        (98, "eos_token_id image_token_id"),
    )
    for name in names.split()
}
# Set where the default is None, too: by default other fields decide, which are not small then.
_ALWAYS = {
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group",
    "topk_group", "pad_token_id",
}  # fmt: skip
# Some types need these besides.
_FURTHER: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dory": {
        "num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "layer_types": None,
    },
    "llama4_text": {
        "num_hidden_layers": 4, "layer_types": None, "attn_scale": 0.5, "attn_temperature_tuning": False,
    },
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 3,
            "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        }
    },
    "xmod": {"default_language": "en_XX"},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}  # fmt: skip
# Folded where their default config is changed: llama4 scales by position, and dbrx doesn't run by default.
NOT_BY_DEFAULT = {"llama4_text", "dbrx"}
# By these, values above the longest sequence are proven; radix_ops.hf skips batches that are longer.
BOUNDS = {"attention_chunk_size"}
# These act by attn_temperature_tuning alone, which is refused: it scales by the row of a batch.
WITHOUT_EFFECT = {"floor_scale", "attn_scale"}
# Values of fields that are strings or lists, where neither default nor annotation tells.
_CHOICES: dict[str, tuple] = {
    "topk_method": ("greedy", "group_limited_greedy"),
    "mlp_only_layers": ([0], []),
    "dtype": (),
}
# Shapes, which say nothing of who attends to whom.
_SHAPE = re.compile(
    "(_size|_dim|_rank|heads?|_embd|_positions|_ctx|position_embeddings|d_model|dff|channels|layers?|bytes|per_stack)$"
)
# How many layers there are, and of what kind.
_COUNT = re.compile("layers?$|^first_k_dense_replace$")
NUMBERS = {"sliding_window": 3, "clip_qkv": 0.5, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}


@functools.cache
def default_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type]()


def _value(config, name: str) -> Any:
    """Return a field's value, None where layers have values of their own."""
    return vars(config).get(config.attribute_map.get(name, name))


def small_arguments(model_type: str) -> dict[str, Any]:
    """Return arguments of the type's config class that make it small and without randomness in training."""
    default = default_config(model_type)
    config_class = type(default)
    known = proofs.declared_fields(default, of_all=False) | set(default.attribute_map)
    settable = {name for name in known if not isinstance(getattr(config_class, name, None), property)}
    arguments = {
        name: value
        for name, value in SMALL.items()
        if name in settable and (_value(default, name) is not None or name in _ALWAYS)
    }
    arguments |= {
        name: 0.0 for name in settable if guards.RANDOM.search(name) and isinstance(_value(default, name), float)
    }
    arguments = {default.attribute_map.get(name, name): value for name, value in arguments.items()}
    if "qk_nope_head_dim" in arguments:  # latent attention has a head_dim and K/V heads of its own
        arguments.pop("head_dim", None)
        arguments["num_key_value_heads"] = 4
    kinds = list(dict.fromkeys(_value(default, "layer_types") or ()))
    if kinds and "layer_types" in settable:
        count = max(2, len(kinds))
        arguments |= {"layer_types": (kinds * 2)[:count], "num_hidden_layers": count}
    return arguments | _FURTHER.get(model_type, {})


def with_far_positions(arguments: dict[str, Any], last: int) -> dict[str, Any]:
    """Add room for positions up to `last`."""
    limits = {name for name, value in SMALL.items() if value == 64}
    return arguments | {name: last + 1 for name in arguments if name in limits}


def with_default_layers(model_type: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a narrow config with the layers of the default one, their kinds and their order."""
    default = default_config(model_type)
    dropped = {name for name in arguments if _COUNT.search(name) or name.endswith("layer_types")}
    dropped -= set(_FURTHER.get(model_type, ())) - {"num_hidden_layers", "layer_types"}
    kept = {name: value for name, value in arguments.items() if name not in dropped}
    return kept if _value(default, "num_hidden_layers") else arguments


def _annotated(config_class: type, name: str) -> tuple[set[type], list]:
    """Return the types that the field is declared with, and its literal values."""
    owner = next((cls for cls in config_class.__mro__ if name in vars(cls).get("__annotations__", {})), None)
    if owner is None:
        return set(), []
    hint = vars(owner)["__annotations__"][name]
    if isinstance(hint, str):
        hint = eval(hint, {"torch": torch, **vars(sys.modules[owner.__module__])})
    found, literals, pending = set(), [], [hint]
    while pending:
        hint = pending.pop()
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            pending.extend(typing.get_args(hint))
        elif origin is typing.Literal:
            literals.extend(typing.get_args(hint))
        elif origin is typing.Annotated:
            pending.append(typing.get_args(hint)[0])
        elif hint is not None:
            found.add(origin or hint)
    return found, literals


def choices(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield a field of the config and another value of it: a bool, a string or None, or a number where it is None."""
    for name, value in vars(config).items():
        if proofs.is_harmless(name) or name not in proofs.declared_fields(config):
            continue
        hints, literals = _annotated(type(config), name)
        others = [*literals, *_CHOICES.get(name, ())]
        if isinstance(value, bool) or bool in hints:
            others += [True, False]
        if type(None) in hints:
            others.append(None)
        if (value is None or name in NUMBERS) and (int in hints or float in hints):
            others.append(NUMBERS.get(name, SMALL.get(name, 2 if int in hints else 0.5)))
        for other in others:
            is_same = type(other) is type(value) and other == value
            if not is_same and proofs.NEVER.get(name, ...) is not other:
                yield name, other


def layer_choices(model_type: str, arguments: dict[str, Any], config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield arguments that choose the layers that attend to a window, its width and the layers' feed-forwards."""
    default = default_config(model_type)
    declared = proofs.declared_fields(default)
    kinds = list(dict.fromkeys(_value(config, "layer_types") or ()))
    small = {"num_hidden_layers": 2}
    if kinds:
        if "layer_types" in arguments:
            for kind in kinds if len(kinds) > 1 else ():
                yield small | {"layer_types": [kind] * 2}
            # The config makes these of other fields.
            yield {"layer_types": None, "num_hidden_layers": 4}
        if "sliding_window" in declared and "sliding_attention" not in kinds and "full_attention" in kinds:
            switch = {"use_sliding_window": True} if "use_sliding_window" in declared else {}
            mixed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
            yield small | switch | mixed
            yield small | switch | mixed | {"layer_types": ["sliding_attention"] * 2}
            if "max_window_layers" in declared:
                yield small | switch | {"sliding_window": 3, "max_window_layers": 1, "layer_types": None}
    elif "use_sliding_window" in declared:
        yield {"use_sliding_window": True, "sliding_window": 3}
        yield {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    if "num_kv_shared_layers" in declared:
        shared = {"num_kv_shared_layers": 2, "num_hidden_layers": 4}
        yield shared | ({"layer_types": (kinds * 4)[:4]} if kinds else {})
    feeds = list(dict.fromkeys(_value(default, "mlp_layer_types") or ()))
    for feed in feeds:
        yield small | {"mlp_layer_types": [feed] * 2} | ({"layer_types": (kinds * 2)[:2]} if kinds else {})
    if len(feeds) > 1:
        yield small | {"mlp_layer_types": feeds[:2]} | ({"layer_types": (kinds * 2)[:2]} if kinds else {})
    if "no_rope_layers" in declared:
        yield {"no_rope_layers": [i % 2 for i in range(config.num_hidden_layers)]}
    if model_type == "dbrx":
        yield {"attn_config": arguments["attn_config"] | {"clip_qkv": None}}
    if "num_experts" in declared and _value(default, "num_experts") is None:
        yield {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 8,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        }


def rope_choices(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield rope_parameters of each kind whose frequencies don't depend on the length of a batch."""
    given = _value(config, "rope_parameters")
    if not given:
        return
    further = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0},
    }
    for kind, more in further.items():
        original = {"original_max_position_embeddings": 16} if more else {}
        if any(isinstance(value, dict) for value in given.values()):
            nested = {
                name: one and {**one, "rope_type": kind, **original, **more}
                for name, one in given.items()
                if one is None or isinstance(one, dict)
            }
            yield {"rope_parameters": nested}
        else:
            yield {"rope_parameters": {**given, "rope_type": kind, **original, **more}}


def numbers(config: PreTrainedConfig) -> Iterator[tuple[str, list]]:
    """Yield a numeric field of the config and other values of it, small ones first."""
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if proofs.is_harmless(name) or name not in proofs.declared_fields(config):
            continue
        if guards.RANDOM.search(name) or (_SHAPE.search(name) and not proofs.SUSPICIOUS.search(name)):
            continue
        if isinstance(value, int):
            others = [1, 2, 3, value + 1, 2 * value, value - 1, 0]
        else:
            others = [2 * value, value / 2, 1.0] if value else [0.5, 1.0]
        yield name, [other for other in dict.fromkeys(others) if other != value and other >= 0]
