"""What about a decoder stack, at this moment, makes folding wrong, for `radix_ops.hf`: config, parts, hooks, noise."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as _global_hooks
from transformers import PreTrainedModel

from ._hf_proofs import class_of, is_proven_class, path_of, proof_of, unproven_config

# Attention implementations whose answer the proofs compare with; another name may attend to anything.
_KNOWN_ATTENTION = ("eager", "sdpa")
# Numbers of a config that make training random where they are above 0.
RANDOM = re.compile(r"drop|jitter|noise")
# Whose hooks record, ask for gradients, load or gather weights, and don't look at positions.
_HOOKS_OF = ("torch", "transformers")


def unfoldable(stack: PreTrainedModel) -> str | None:
    """What in the config and the parts of the stack, which users may have changed, makes folding wrong, if anything."""
    config, proof = stack.config, proof_of(stack)
    reason = unproven_config(config, proof)
    if reason is not None:
        return reason
    if config._attn_implementation not in _KNOWN_ATTENTION:
        return (
            f"its attention implementation is {config._attn_implementation!r}; supported are "
            f"{', '.join(_KNOWN_ATTENTION)} (set_attn_implementation)"
        )
    for module in _parts(stack):
        if not is_proven_class(class_of(module), proof):
            found = path_of(class_of(module))
            return f"{_name(stack, module)} is {found}, which transformers' own {proof.stack} does not hold"
        reason = _changed(module, config)
        if reason is not None:
            return f"{_name(stack, module)} {reason}"
    return None


def interference(stack: PreTrainedModel) -> str | None:
    """What at this moment, and perhaps not later, makes a token's value depend on more than the tokens up to it."""
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return "a hook on all modules would see rows for positions"
    if stack.training:
        for name, value in vars(stack.config).items():
            if isinstance(value, float) and value > 0 and RANDOM.search(name):
                return f"config.{name} is {value}, which makes training random"
    for module in _parts(stack):
        reason = None
        if has_foreign_hook(module):
            reason = "has a hook, which would see rows for positions"
        elif module.training:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                reason = "drops out"
            elif getattr(module, "attention_dropout", 0):
                reason = "has attention_dropout"
            elif getattr(module, "neftune_noise_alpha", None):
                reason = "adds NEFTune noise"
        if reason is not None:
            return f"{_name(stack, module)} {reason}"
    return None


def _parts(stack: nn.Module) -> Iterator[nn.Module]:
    """All modules inside."""
    pending = list(stack._modules.values())
    while pending:
        module = pending.pop()
        if module is not None:
            pending.extend(module._modules.values())
            yield module


def _name(stack: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in stack.named_modules() if found is module)


def _changed(module: nn.Module, config) -> str | None:
    own = module.__dict__
    if "forward" in own:
        return "has a forward that was replaced" + replacer(module)
    if own.get("is_causal") is False:
        return "has is_causal=False"
    layer_types, index = getattr(config, "layer_types", None), own.get("layer_idx")
    if not layer_types or "sliding_window" not in own or index is None:
        return None
    # The plain model's masks follow the config, its attention modules what the config was when they were made.
    kind, window = layer_types[index], own["sliding_window"]
    fits = window and window == config.sliding_window if "sliding" in kind else window is None
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


def elsewhere(stack: PreTrainedModel) -> str | None:
    """Where its parameters are, if that is no one place where attention over rows can run."""
    devices = set()
    for name, parameter in stack.named_parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            return f"{name} is on {parameter.device}; folding runs on the CPU and on CUDA"
        if isinstance(parameter, DTensor) and not hasattr(stack, "unshard"):
            return f"{name} is a DTensor, as tensor parallelism makes; of sharded models those by fully_shard fold"
        devices.add(parameter.device)
    if len(devices) > 1:
        return f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
    return None
