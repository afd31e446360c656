"""Finds what makes folding wrong for a decoder stack at the moment: config, parts, hooks, noise. For `radix_ops.hf`."""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as _global_hooks
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modes import is_plain
from .proofs import class_of, is_proven_class, layer_types_of, path_of, proof_of, unproven_config

DEVICES = ("cpu", "cuda")  # attention over rows runs on these
# The proofs compare with these attention implementations; another one may attend to anything.
_KNOWN_ATTENTION = ("eager", "sdpa")
# By stack what its config held when it was last checked, what the check found, and a version: to compare is faster.
_checked_configs: weakref.WeakKeyDictionary[nn.Module, tuple[dict, str | None, int]] = weakref.WeakKeyDictionary()
_next_version = itertools.count(1).__next__
# Fields of a config that make training of a decoder stack random where they are above 0; a head's own don't matter.
RANDOM = re.compile(r"^(?!classifier|summary).*(drop|jitter|noise)")
# Types whose attention has sinks, which no config tells, and the kind of layer that has them, None for all layers.
# transformers 5.24 has these; some don't fold, but the memory of their unfolded batches is estimated, too.
_SINKS = {
    "deepseek_v4": None, "flint": None, "gpt_oss": None, "granite_swa": None, "granitemoe_swa": None, "hy_v4": None,
    "mimo_v2_flash": "sliding_attention",
}  # fmt: skip
# Types whose config has the field of a cap on scores that their attention doesn't read.
_WITHOUT_CAP = ("gemma3_text",)
_HOOK_KINDS = ("forward", "forward_pre", "backward", "backward_pre")
# Hooks of these packages record, ask for gradients, load or gather weights, and don't look at positions.
_HARMLESS_PACKAGES = ("torch", "transformers")
_FULLY_SHARD_ONLY = "sharded models fold only where fully_shard made them"


def why_unfoldable(stack: PreTrainedModel) -> str | None:
    """Return what in the stack's config and parts, which users may have changed, makes folding wrong, or None."""
    config, proof = stack.config, proof_of(stack)
    checked, reason, _ = _checked_configs.get(stack, (None, None, 0))
    if checked != vars(config):
        reason = unproven_config(config, proof)
        _checked_configs[stack] = copy.deepcopy(vars(config)), reason, _next_version()
    if reason is not None:
        return reason
    if config._attn_implementation not in _KNOWN_ATTENTION:
        return (
            f"its attention implementation is {config._attn_implementation!r}; supported are "
            f"{', '.join(_KNOWN_ATTENTION)} (set_attn_implementation)"
        )
    if config._attn_implementation == "sdpa" and has_own_attention(config):
        return (
            "its attention implementation is 'sdpa', which leaves out the cap or the sinks that its scores have; "
            'set_attn_implementation("eager") computes them'
        )
    reason = _replaced_attention(config._attn_implementation) or _misplaced_layers(stack)
    if reason is not None:
        return reason
    for module in parts(stack):
        if not is_proven_class(class_of(module), proof) and class_of(module) is not CheckpointWrapper:
            found = path_of(class_of(module))
            return f"{_name(stack, module)} is {found}, which transformers' own {proof.stack} does not hold"
        reason = _changed(module, config)
        if reason is not None:
            return f"{_name(stack, module)} {reason}"
    return None


def has_own_attention(config) -> bool:
    """Return whether scores have a cap or sinks, which only the model's own attention on padded batches computes.

    `config` is that of a model or of its decoder stack, of any type. The model need not be loaded.
    """
    config = config.get_text_config()
    if config.model_type in _SINKS:
        kind = _SINKS[config.model_type]
        return kind is None or kind in layer_types_of(config)
    return config.model_type not in _WITHOUT_CAP and getattr(config, "attn_logit_softcapping", None) is not None


def config_version(stack: PreTrainedModel) -> int:
    """Return a number that differs between the configs of the stack that `why_unfoldable` has seen."""
    return _checked_configs[stack][2]


def has_several_processes() -> bool:
    """Return whether torch.distributed runs several processes: a forward more on one could wait for the others."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _replaced_attention(name: str) -> str | None:
    """Return who else than transformers answers to an attention implementation's name or makes its masks, or None."""
    for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        function = interface.get(name)
        module = getattr(function, "__module__", None)
        if function is not None and not str(module).startswith("transformers."):
            return f"the attention implementation {name!r} is registered by {module}"
    return None


def _misplaced_layers(stack: PreTrainedModel) -> str | None:
    """Return which layers don't stand where they were made for, or None.

    Plain masks go by the place of a layer, its attention by the layer_idx that it was made with.
    """
    # longcat_flash counts two hidden layers in each of its num_layers.
    wanted = min(stack.config.num_hidden_layers, getattr(stack.config, "num_layers", None) or 2**31)
    for name, layers in stack._modules.items():
        if not isinstance(layers, nn.ModuleList):
            continue
        indices = [_layer_idx(layer) for layer in layers]
        if any(index is not None and index != place for place, index in enumerate(indices)):
            return f"{name} are not in the order that they were made in: their layer_idx are {indices}"
        if any(index is not None for index in indices) and len(layers) < wanted:
            return f"{name} are {len(layers)}, and config.num_hidden_layers is {wanted}"
    return None


def _layer_idx(layer: nn.Module) -> int | None:
    if class_of(layer) is CheckpointWrapper:
        layer = layer.get_submodule("_checkpoint_wrapped_module")
    found = (part.__dict__.get("layer_idx") for part in (layer, *layer._modules.values()) if part is not None)
    return next((index for index in found if index is not None), None)


def why_disturbed(stack: PreTrainedModel) -> str | None:
    """Return which hook or noise makes a token's value depend on more than the tokens up to it, or None."""
    if any(getattr(_global_hooks, f"_global_{kind}_hooks") for kind in _HOOK_KINDS):
        return "a hook on all modules would see rows for positions"
    if stack.training:
        for name, value in vars(stack.config).items():
            if isinstance(value, float) and value > 0 and RANDOM.search(name):
                return f"config.{name} is {value}, which makes training random"
    noise = _noise(stack) if stack.training else None
    if noise is not None:
        return f"the decoder stack {noise}"
    for module in parts(stack):
        reason = None
        if has_foreign_hook(module):
            reason = "has a hook, which would see rows for positions"
        elif module.training:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                reason = "drops out"
            else:
                reason = _noise(module)
        if reason is not None:
            return f"{_name(stack, module)} {reason}"
    return None


def _noise(module: nn.Module) -> str | None:
    """Return which of the module's own settings, whatever the config says since, makes its training random, or None."""
    if getattr(module, "neftune_noise_alpha", None):
        return "adds NEFTune noise"
    settings = module.__dict__.items()
    return next((f"has {n}" for n, x in settings if type(x) is float and x > 0 and RANDOM.search(n)), None)


def parts(stack: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules inside."""
    pending = list(stack._modules.values())
    while pending:
        module = pending.pop()
        if module is not None:
            pending.extend(module._modules.values())
            yield module


def why_quantised(model: nn.Module) -> str | None:
    """Return which weight is a subclass of Tensor, or None.

    What such a weight does in a product is its own affair. Quantised ones, as torchao's in layers that keep their
    class, may round each activation by all others of the batch.
    """
    for module in (model, *parts(model)):
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None or is_plain(weight):
                continue
            # why_misplaced judges DTensors, as fully_shard makes.
            local = weight._local_tensor if type(weight) is DTensor else weight
            if not is_plain(local):
                place = f"{_name(model, module)}.{name}".removeprefix(".")
                return (
                    f"{place} is a {path_of(type(local))}, a subclass of Tensor as quantised weights are; folding is "
                    "known to be right for plain weights only"
                )
    return None


def _name(stack: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in stack.named_modules() if found is module)


def _changed(module: nn.Module, config) -> str | None:
    """Return what about a module differs from what its config says, or None."""
    own = module.__dict__
    if "forward" in own:
        return "has a forward that was replaced" + replacer(module)
    if own.get("is_causal") is False:
        return "has is_causal=False"
    index = own.get("layer_idx")
    if index is None or "sliding_window" not in own:
        return None
    # The plain model's masks follow the config, its attention modules the config as it was when they were made.
    layer_types, window = getattr(config, "layer_types", None), own["sliding_window"]
    if not layer_types:
        wanted = getattr(config, "sliding_window", None)
        return None if window == wanted else f"has sliding_window {window}, and the config {wanted}"
    kind = layer_types[index]
    is_sliding = own.get("is_sliding", window is not None)
    fits = is_sliding and window and window == config.sliding_window if "sliding" in kind else not is_sliding
    return None if fits else f"has sliding_window {window} in a layer of type {kind!r}"


def replacer(module: nn.Module) -> str:
    """Return who replaced its forward, to complete a sentence, or nothing."""
    return ", as accelerate's device hooks do" if hasattr(module, "_hf_hook") else ""


def has_foreign_hook(module: nn.Module) -> bool:
    """Return whether it has a hook other than torch's and transformers' own."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(getattr(hook, "__module__", "").partition(".")[0] not in _HARMLESS_PACKAGES for hook in hooks)


def why_misplaced(model: PreTrainedModel, stack: PreTrainedModel) -> str | None:
    """Return which weights are of a kind, or on a device, that folding can't compute with, or None."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return f"it is tensor parallel; {_FULLY_SHARD_ONLY}"
    reason = why_quantised(model)
    if reason is not None:
        return reason
    is_sharded = any(isinstance(module, FSDPModule) for module in (model, stack))
    devices = set()
    for name, parameter in stack.named_parameters():
        if parameter.device.type not in DEVICES:
            return f"{name} is on {parameter.device}; folding runs on the CPU and on CUDA"
        if isinstance(parameter, DTensor) and sum(p.is_shard() for p in parameter.placements) > is_sharded:
            return f"{name} is a DTensor, as tensor parallelism makes; {_FULLY_SHARD_ONLY}"
        devices.add(parameter.device)
    if len(devices) > 1:
        return f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
    return None
