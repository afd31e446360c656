"""Which transformers models fold exactly, and in which configs: what `make models` proved, held against a model.

`hf_models.json` is the allow-list. Of each model type it holds the classes that its decoder stack is made of and the
values of its config that were run, folded against plain. What it does not hold is refused by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import activation
from transformers import MODEL_MAPPING, PreTrainedModel

# Their frequencies depend on the config alone; those of "dynamic" and "longrope" on the longest position of a batch,
# which left padding moves.
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
# What else rope_parameters may hold; other keys, such as scales of the scores by position, have to be proven.
_ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
        "truncate",
    }
)  # fmt: skip
# Config fields that change neither what a row computes nor who attends to whom, or that are checked elsewhere.
_HARMLESS_FIELDS = frozenset(
    {
        "use_cache", "output_hidden_states", "output_attentions", "return_dict", "tie_word_embeddings", "architectures",
        "transformers_version", "problem_type", "id2label", "label2id", "dtype", "torch_dtype", "model_type",
        "tokenizer_class", "auto_map", "chunk_size_feed_forward", "layer_types", "rope_parameters", "rope_scaling",
        "is_causal", "is_encoder_decoder", "max_window_layers", "torchscript", "task_specific_params",
        "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "quantization_config",
    }
)  # fmt: skip
# Values that no proof may allow, whatever it finds: by them the loss counts tokens, or attention is not causal.
NEVER = {
    "is_causal": False, "output_router_logits": True, "use_bidirectional_attention": True, "is_encoder_decoder": True,
    "add_cross_attention": True,
}  # fmt: skip
# Numbers whose names say that they may decide who attends to whom, or scale by position: right only if they were run.
SUSPICIOUS = re.compile(
    r"chunk|block|index_|sparse|compress|floor|attn_scale|temperature|stride|local|global|window|memory|segment|every"
)
NUMBER = "a number"
# Modules of torch's that treat each token by itself, whatever a model was proven with.
_TOKENWISE = frozenset(
    {
        nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict,
        nn.Sequential, nn.ParameterList, nn.ParameterDict,
        *(getattr(activation, name) for name in activation.__all__ if "Softm" not in name and "Attention" not in name),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """What `make models` found out about a model type: that its decoder stack folds exactly, and on which terms."""

    module: str  # of the stack's class
    stack: str  # the class that owns the embedding and the layers
    classes: list[str]  # of the modules inside
    # Of each field of the config that may be a bool, a string or None, those that were run; NUMBER where a number was.
    values: Mapping[str, list]
    layer_types: list[str]
    calls: int  # of attention, for each layer
    positions: str  # a left-padded row counts from its first real token ("tokens") or column ("columns"), or "any"
    packing: bool  # whether steps of the positions other than 1 part sequences
    heads: list[str] = field(default_factory=list)  # classes whose outputs were compared, labels too
    head_on_rows: bool = False  # whether the causal LM's head may run on rows

    @functools.cached_property
    def stack_class(self) -> type:
        return getattr(importlib.import_module(self.module), self.stack)


@functools.cache
def proofs() -> tuple[dict[str, Proof], dict[str, str]]:
    """The proven types, and why others are not."""
    content = json.loads((Path(__file__).parent / "hf_models.json").read_text())
    return {name: Proof(**proof) for name, proof in content["proven"].items()}, content["refused"]


def proof_of(stack: PreTrainedModel) -> Proof:
    return proofs()[0][stack.config.model_type]


def find_model(model: nn.Module) -> PreTrainedModel:
    """The outermost model of transformers' in `model`, which may be wrapped by PEFT, DDP, torch.compile and others.

    Raises TypeError where there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"enable needs a transformers model, got {type(model).__name__}")
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"enable needs a transformers PreTrainedModel, got {type(model).__name__}, which holds none")
    return found


def find_stack(model: PreTrainedModel) -> PreTrainedModel:
    """The module that owns the embedding and the decoder layers, of a model that can be folded.

    Raises ValueError for a model that folding isn't known to be right for.
    """
    name = type(model).__name__
    stack = innermost_stack(model)
    model_type = getattr(model.config, "model_type", None)
    proven, refused = proofs()
    if model_type not in proven or stack.config.model_type != model_type:
        raise ValueError(
            f"{name} is of model type {model_type!r}, which folding is not known to be right for"
            f"{': ' + refused[model_type] if model_type in refused else ''}; docs/models.md lists those that it is"
        )
    proof = proven[model_type]
    reason = _unknown_head(model, stack, proof)
    if class_of(stack) is not proof.stack_class:
        reason = f"its decoder stack is {path_of(class_of(stack))} and not transformers' own {proof.stack}"
    if reason is not None:
        raise ValueError(f"{name} can't be folded: {reason}")
    return stack


def innermost_stack(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost module of transformers' that holds an embedding and a list of layers."""

    def holds_all(module: nn.Module) -> bool:
        children = list(module.modules())
        has_layers = any(isinstance(child, nn.ModuleList) and len(child) for child in children)
        return has_layers and any(isinstance(child, nn.Embedding) for child in children)

    while True:
        inner = (child for child in model.modules() if child is not model and isinstance(child, PreTrainedModel))
        found = next((child for child in inner if holds_all(child)), None)
        if found is None:
            return model
        model = found


def class_of(module: nn.Module) -> type:
    """Its class, without the one that fully_shard derives."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_tokenwise(cls: type) -> bool:
    """Whether its modules are known to treat each token by itself: torch's own, and PEFT's around projections."""
    if cls in _TOKENWISE:
        return True
    if not cls.__module__.startswith("peft.tuners."):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return issubclass(cls, BaseTunerLayer)


def _unknown_head(model: PreTrainedModel, stack: PreTrainedModel, proof: Proof) -> str | None:
    """Of transformers' own heads those that were run; a user's are taken to read all that they can."""
    cls = class_of(model)
    is_base = cls is MODEL_MAPPING.get(type(model.config), None)  # whose hidden states are the stack's
    if model is stack or is_base or not cls.__module__.startswith("transformers.") or cls.__name__ in proof.heads:
        return None
    return f"which hidden states a {cls.__name__} reads is not proven"


def is_proven_class(cls: type, proof: Proof) -> bool:
    if is_tokenwise(cls):
        return True
    return path_of(cls) in proof.classes and cls is getattr(importlib.import_module(cls.__module__), cls.__qualname__)


def leaves(config) -> Iterator[tuple[str, Any]]:
    """All fields of a config that may matter to folding, by name; dicts and lists by what they hold.

    Fields that the config's class does not declare, as files from a hub hold them, matter to nobody, but for those of
    NEVER.
    """
    declared = set(getattr(type(config), "__dataclass_fields__", ()))
    declared |= set(inspect.signature(type(config).__init__).parameters)

    def below(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from below(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                yield from below(name, item)
        else:
            yield name, value

    for name, value in vars(config).items():
        if name in declared and not is_harmless(name):
            yield from below(name, value)


def is_harmless(name: str) -> bool:
    """Whether a field of a config changes nothing that folding depends on: activations, ids of tokens."""
    words = name.split("_")
    return name.startswith("_") or name in _HARMLESS_FIELDS or "act" in words or name.endswith(("token_id", "_ids"))


def unproven_config(config, proof: Proof) -> str | None:
    """A field of the config whose value the proof says nothing about."""
    for name, value in NEVER.items():
        if getattr(config, name, None) is value:
            return f"config.{name} is {value}"
    for name, value in leaves(config):
        kind = NUMBER if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        is_plain_number = kind == NUMBER and not SUSPICIOUS.search(name)
        if kind not in proof.values[name] if name in proof.values else not is_plain_number:
            return f"config.{name} is {value!r}, which is not proven for {config.model_type!r}"
    unproven = set(getattr(config, "layer_types", None) or ()) - set(proof.layer_types)
    if unproven:
        return f"config.layer_types holds {min(unproven)!r}, which is not proven for {config.model_type!r}"
    return _unproven_rope(getattr(config, "rope_parameters", None) or {}, proof)


def _unproven_rope(parameters: Mapping[str, Any], proof: Proof) -> str | None:
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for one in nested or [parameters]:
        rope_type = one.get("rope_type", "default")
        if rope_type not in FIXED_ROPE:
            return f"rope_type {rope_type!r} depends on the padded length; supported are {', '.join(FIXED_ROPE)}"
        unknown = sorted(key for key in one.keys() - _ROPE_KEYS if f"rope_parameters.{key}" not in proof.values)
        if unknown:
            return f"rope_parameters hold {unknown[0]!r}, which is not proven for it"
    return None
