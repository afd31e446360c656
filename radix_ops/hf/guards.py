"""What about a decoder stack, at this moment, makes folding wrong, for `radix_ops.hf`: config, parts, hooks, noise."""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Iterator

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

# Attention implementations whose answer the proofs compare with; another name may attend to anything.
_KNOWN_ATTENTION = ("eager", "sdpa")
# What the config of each stack held when it was last checked, and what the check found: to compare is faster.
_checked_configs: weakref.WeakKeyDictionary[nn.Module, tuple[dict, str | None, int]] = weakref.WeakKeyDictionary()
_next_version = itertools.count(1).__next__
# Numbers of a config that make training of a decoder stack random where they are above 0; a head's own don't matter.
RANDOM = re.compile(r"^(?!classifier|summary).*(drop|jitter|noise)")
# Types whose attention has sinks, which no config tells, and the kind of layer that has them, None for all layers.
# transformers 5.24 has these; those that don't fold are here because plain runs need a budget, too.
_SINKS = {
    "deepseek_v4": None, "flint": None, "gpt_oss": None, "granite_swa": None, "granitemoe_swa": None, "hy_v4": None,
    "mimo_v2_flash": "sliding_attention",
}  # fmt: skip
# Types whose config has the field of a cap on scores that their attention doesn't read.
_WITHOUT_CAP = ("gemma3_text",)
_HOOK_KINDS = ("forward", "forward_pre", "backward", "backward_pre")
# Whose hooks record, ask for gradients, load or gather weights, and don't look at positions.
_HOOKS_OF = ("torch", "transformers")


def unfoldable(stack: PreTrainedModel) -> str | None:
    """What in the config and the parts of the stack, which users may have changed, makes folding wrong, if anything."""
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
    reason = _registered_by_others(config._attn_implementation) or _misplaced_layers(stack)
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
    """Return whether attention is the model's own, on the padded batch: it alone caps scores and knows sinks.

    `config` is that of a model or of its decoder stack. The model needs not be loaded, nor be of a type that folds.
    """
    config = config.get_text_config()
    if config.model_type in _SINKS:
        kind = _SINKS[config.model_type]
        return kind is None or kind in layer_types_of(config)
    return config.model_type not in _WITHOUT_CAP and getattr(config, "attn_logit_softcapping", None) is not None


def config_version(stack: PreTrainedModel) -> int:
    """Another number for each config of the stack that `unfoldable` has seen."""
    return _checked_configs[stack][2]


def _registered_by_others(name: str) -> str | None:
    """Who else than transformers answers to the name of an attention implementation, or makes masks for it."""
    for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        function = interface.get(name)
        module = getattr(function, "__module__", None)
        if function is not None and not str(module).startswith("transformers."):
            return f"the attention implementation {name!r} is registered by {module}"
    return None


def _misplaced_layers(stack: PreTrainedModel) -> str | None:
    """Plain masks go by the place of a layer, its attention by the layer_idx that it was made with."""
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
        layer = layer._checkpoint_wrapped_module
    found = (part.__dict__.get("layer_idx") for part in (layer, *layer._modules.values()) if part is not None)
    return next((index for index in found if index is not None), None)


def interference(stack: PreTrainedModel) -> str | None:
    """What at this moment, and perhaps not later, makes a token's value depend on more than the tokens up to it."""
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
    """What of its own makes its training random, whatever the config says since."""
    if getattr(module, "neftune_noise_alpha", None):
        return "adds NEFTune noise"
    return next(
        (f"has {n}" for n, x in module.__dict__.items() if type(x) is float and x > 0 and RANDOM.search(n)), None
    )


def parts(stack: nn.Module) -> Iterator[nn.Module]:
    """All modules inside."""
    pending = list(stack._modules.values())
    while pending:
        module = pending.pop()
        if module is not None:
            pending.extend(module._modules.values())
            yield module


def quantised(model: nn.Module) -> str | None:
    """A weight that is a tensor subclass: what becomes of it in a product is its own affair.

    Quantised ones, as torchao's in layers whose class stays, may round each activation by all others of a batch.
    """
    for module in (model, *parts(model)):
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None or is_plain(weight):
                continue
            local = weight._local_tensor if type(weight) is DTensor else weight  # fully_shard's, judged by `elsewhere`
            if not is_plain(local):
                place = f"{_name(model, module)}.{name}".removeprefix(".")
                return (
                    f"{place} is a {path_of(type(local))}, a subclass of Tensor as quantised weights are; folding is "
                    "known to be right for plain weights alone"
                )
    return None


def _name(stack: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in stack.named_modules() if found is module)


def _changed(module: nn.Module, config) -> str | None:
    own = module.__dict__
    if "forward" in own:
        return "has a forward that was replaced" + replacer(module)
    if own.get("is_causal") is False:
        return "has is_causal=False"
    index = own.get("layer_idx")
    if index is None or "sliding_window" not in own:
        return None
    # The plain model's masks follow the config, its attention modules what the config was when they were made.
    layer_types, window = getattr(config, "layer_types", None), own["sliding_window"]
    if not layer_types:
        wanted = getattr(config, "sliding_window", None)
        return None if window == wanted else f"has sliding_window {window}, and the config {wanted}"
    kind = layer_types[index]
    is_sliding = own.get("is_sliding", window is not None)
    fits = is_sliding and window and window == config.sliding_window if "sliding" in kind else not is_sliding
    return None if fits else f"has sliding_window {window} in a layer of type {kind!r}"


def replacer(module: nn.Module) -> str:
    """Who replaced its forward, if that is known."""
    return ", as accelerate's device hooks do" if hasattr(module, "_hf_hook") else ""


def has_foreign_hook(module: nn.Module) -> bool:
    """Whether it has a hook besides torch's and transformers' own, which record, ask for gradients or load weights."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(getattr(hook, "__module__", "").partition(".")[0] not in _HOOKS_OF for hook in hooks)


def elsewhere(model: PreTrainedModel, stack: PreTrainedModel) -> str | None:
    """Where the stack's parameters are, and as what, if attention over rows can't run there."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return "it is tensor parallel; of sharded models those by fully_shard alone fold"
    reason = quantised(model)
    if reason is not None:
        return reason
    is_sharded = any(isinstance(module, FSDPModule) for module in (model, stack))
    devices = set()
    for name, parameter in stack.named_parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            return f"{name} is on {parameter.device}; folding runs on the CPU and on CUDA"
        if isinstance(parameter, DTensor) and sum(p.is_shard() for p in parameter.placements) > is_sharded:
            return (
                f"{name} is a DTensor, as tensor parallelism makes; of sharded models those by fully_shard alone fold"
            )
        devices.add(parameter.device)
    if len(devices) > 1:
        return f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
    return None
