"""The transformers models that fold exactly, and their configs: what `make models` proved, held against a model.

`models.json` is the allow-list. It holds for each model type the classes that its decoder stack is made of and the
values of its config with which folded and plain models were run and agreed. Anything else is refused by name.
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

import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import activation
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

_PROOFS = Path(__file__).parent / "models.json"
# Frequencies of these kinds depend on the config alone; those of "dynamic" and "longrope" on the longest position of a
# batch, which left padding moves.
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
# rope_parameters may hold these keys; others, such as scales of the scores by position, have to be proven.
_ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
        "truncate",
    }
)  # fmt: skip
# These config fields change neither what a row computes nor who attends to whom, or are checked elsewhere.
_HARMLESS_FIELDS = frozenset(
    {
        "use_cache", "output_hidden_states", "output_attentions", "return_dict", "tie_word_embeddings", "architectures",
        "transformers_version", "problem_type", "id2label", "label2id", "dtype", "torch_dtype", "model_type",
        "tokenizer_class", "auto_map", "chunk_size_feed_forward", "layer_types", "rope_parameters", "rope_scaling",
        "is_causal", "is_encoder_decoder", "max_window_layers", "torchscript", "task_specific_params",
        "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "quantization_config",
    }
)  # fmt: skip
# No proof may allow these values, whatever it finds: with them the loss counts tokens, or attention is not causal.
NEVER = {
    "is_causal": False, "output_router_logits": True, "use_bidirectional_attention": True, "is_encoder_decoder": True,
    "add_cross_attention": True,
}  # fmt: skip
# Numbers with such names may decide who attends to whom, or scale by position: they are right only if they were run.
SUSPICIOUS = re.compile(
    r"chunk|block|index_|sparse|compress|floor|attn_scale|temperature|stride|local|global|window|memory|segment|every"
)
NUMBER = "a number"
# transformers' own masks read these fields, whether the config's class declares them or not.
WINDOWS = frozenset({"sliding_window", "attention_chunk_size"})
# torch's own modules that treat each token by itself, whatever a model was proven with.
_TOKENWISE = frozenset(
    {
        nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict,
        nn.Sequential, nn.ParameterList, nn.ParameterDict,
        *(getattr(activation, name) for name in activation.__all__ if "Softm" not in name and "Attention" not in name),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """The terms on which the decoder stack of a model type folds exactly, as `make models` found them."""

    module: str  # where the stack's class is defined
    stack: str  # the class that owns the embedding and the layers
    classes: list[str]  # of the modules inside
    # The values that were run of each field of the config that may be a bool, a string or None; NUMBER is all numbers.
    values: Mapping[str, list]
    layer_types: list[str]
    calls: int  # of attention, in each layer
    positions: str  # a left-padded row counts from its first real token ("tokens") or column ("columns"), or "any"
    packing: bool  # whether a new sequence begins wherever positions don't go up by 1
    heads: list[str] = field(default_factory=list)  # classes whose outputs and losses were compared
    head_on_rows: bool = False  # whether the causal LM's head may run on rows
    since: str = "0"  # the oldest version of transformers that it holds for, and for all later ones that were tried

    @functools.cached_property
    def stack_class(self) -> type | None:
        """The class of the stack, None where this version of transformers lacks it."""
        return _found(f"{self.module}.{self.stack}")

    @functools.cached_property
    def known_classes(self) -> frozenset[type | None]:
        return frozenset(map(_found, self.classes))


def _found(path: str) -> type | None:
    """Return the class of that `path_of`, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


@functools.cache
def proofs() -> tuple[dict[str, Proof], dict[str, str]]:
    """Return the proven types, and for others why they are not."""
    content = json.loads(_PROOFS.read_text(encoding="utf-8"))
    return {name: Proof(**proof) for name, proof in content["proven"].items()}, content["refused"]


def proof_of(stack: PreTrainedModel) -> Proof:
    return proofs()[0][stack.config.model_type]


def check_module(model: nn.Module, caller: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} needs a transformers model, got {type(model).__name__}")
    return model


def find_model(model: nn.Module) -> PreTrainedModel:
    """Return the outermost transformers model in `model`, which may be wrapped by PEFT, DDP, torch.compile and others.

    Raises TypeError where there is none.
    """
    check_module(model, "enable")
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise no_model_in(model)
    return found


def no_model_in(model: nn.Module) -> TypeError:
    return TypeError(f"enable needs a transformers PreTrainedModel, got {type(model).__name__}, which holds none")


def find_stack(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module of a model that owns the embedding and the decoder layers.

    Raises ValueError for a model that folding isn't known to be right for.
    """
    name = type(model).__name__
    stack = innermost_stack(model)
    model_type = getattr(model.config, "model_type", None)
    proven, refused = proofs()
    if model_type not in proven or stack.config.model_type != model_type:
        raise ValueError(
            f"{name} is of model type {model_type!r}, which folding is not known to be right for"
            f"{': ' + refused[model_type] if model_type in refused else ''}; docs/models.md and "
            f"{_PROOFS} list the types that fold"
        )
    proof = proven[model_type]
    if Version(transformers.__version__) < Version(proof.since):
        raise ValueError(
            f"{name} is of model type {model_type!r}, which is known to fold from transformers {proof.since} on, and "
            f"this is {transformers.__version__}"
        )
    reason = _unknown_head(model, stack, proof)
    if class_of(stack) is not proof.stack_class:
        reason = f"its decoder stack is {path_of(class_of(stack))} and not transformers' own {proof.stack}"
    if reason is not None:
        raise ValueError(f"{name} can't be folded: {reason}")
    return stack


def innermost_stack(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost transformers model that holds an embedding and a list of layers."""

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


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, looking through the one that fully_shard derives."""
    classes: Any = type(module).__mro__
    return classes[2] if isinstance(module, FSDPModule) else type(module)


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_tokenwise(cls: type) -> bool:
    """Return whether such modules are known to treat each token by itself: some of torch's, and PEFT's projections."""
    if cls in _TOKENWISE:
        return True
    if not cls.__module__.startswith("peft.tuners."):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return issubclass(cls, BaseTunerLayer)


def _unknown_head(model: PreTrainedModel, stack: PreTrainedModel, proof: Proof) -> str | None:
    """Return which of transformers' own heads was never run, or None. A user's head is taken to read everything."""
    cls = class_of(model)
    is_base = cls is MODEL_MAPPING.get(type(model.config), None)  # its hidden states are the stack's
    if model is stack or is_base or not cls.__module__.startswith("transformers.") or cls.__name__ in proof.heads:
        return None
    return f"it is not proven which hidden states a {cls.__name__} reads"


def is_proven_class(cls: type, proof: Proof) -> bool:
    return is_tokenwise(cls) or cls in proof.known_classes


def declared_fields(config, of_all: bool = True) -> set[str]:
    """Return the fields that a config's class declares and, with `of_all`, those that transformers reads of any."""
    declared = set(getattr(type(config), "__dataclass_fields__", ()))
    declared |= set(inspect.signature(type(config).__init__).parameters)
    return declared | WINDOWS if of_all else declared


def layer_overrides(config) -> Iterator[tuple[str, Any]]:
    """Yield the fields, and their values, that single layers override."""
    for overrides in getattr(vars(config).get("_heterogeneity_spec"), "per_layer_overrides", {}).values():
        yield from overrides.items()


def layer_types_of(config) -> list[str]:
    return getattr(config, "layer_types", None) or []


def leaves(config) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each field of a config that may matter to folding, and of what fields hold inside.

    Fields that the config's class does not declare, as files from a hub have them, matter to nobody, but for NEVER.
    """
    declared = declared_fields(config)

    def below(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from below(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                yield from below(name, item)
        elif isinstance(value, PreTrainedConfig):
            for key, item in leaves(value):
                yield f"{name}.{key}", item
        else:
            yield name, value

    for name, value in vars(config).items():
        if name in declared and not is_harmless(name):
            yield from below(name, value)
    for name, value in layer_overrides(config):
        yield from below(name, value)
    for rope in _ropes(config):
        yield "rope_parameters.rope_type", rope.get("rope_type", "default")
        for key, value in rope.items():
            if key not in _ROPE_KEYS:
                yield from below(f"rope_parameters.{key}", value)


def _ropes(config) -> list[Mapping[str, Any]]:
    """Return the parameters of a config's rotary embeddings: one set, or one for each type of layer."""
    given = vars(config).get("rope_parameters") or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or ([given] if given else [])


def kind_of(value: Any) -> Any:
    """Return how a proof lists a value: a number stands for all numbers."""
    return NUMBER if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def is_harmless(name: str) -> bool:
    """Return whether a config's field, such as an activation or a token's id, changes nothing that folding needs."""
    words = name.split("_")
    return name.startswith("_") or name in _HARMLESS_FIELDS or "act" in words or name.endswith(("token_id", "_ids"))


def unproven_config(config, proof: Proof) -> str | None:
    """Return which field of the config has a value that the proof doesn't allow, or None."""
    overrides = list(layer_overrides(config))
    for name, value in NEVER.items():
        own = vars(config).get(name, getattr(type(config), name, None))
        if own is value or (name, value) in overrides:
            return f"config.{name} is {value}"
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in FIXED_ROPE:
            return f"rope_type {kind!r} depends on the padded length; supported are {', '.join(FIXED_ROPE)}"
    for name, value in leaves(config):
        if not is_proven(name, value, proof):
            return f"config.{name} is {value!r}, which is not proven for {config.model_type!r}"
    unproven = set(layer_types_of(config)) - set(proof.layer_types)
    if unproven:
        return f"config.layer_types holds {min(unproven)!r}, which is not proven for {config.model_type!r}"
    return None


def is_proven(name: str, value: Any, proof: Proof) -> bool:
    kind = kind_of(value)
    if name not in proof.values:
        return kind == NUMBER and not SUSPICIOUS.search(name)
    # In Python True equals 1.
    return any(type(one) is type(other) and one == other for one in (kind, value) for other in proof.values[name])
