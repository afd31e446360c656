"""The cost of a forward pass through a transformers model's decoder layers, read off its config; no weights are read.

Experts count as often as a token visits them. The embedding and the output head, whose rows depend on the task, don't
count. Types that multiply more than their weights once by each row have no known cost.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..plan.flops import ForwardCost, attention_flops, weight_flops
from .errors import UserError
from .loading import load_config, loading

# radix_ops folds these types, but torch's FlopCounterMode counts other FLOPs on small models of them, or can't count.
_NOT_COUNTED = ("dbrx", "diffllama", "gemma3n_text", "hrm_text", "llama4_text", "longcat_flash")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k")


def forward_cost(name: str, trust_remote_code: bool = False) -> ForwardCost:
    """Return the cost of a model of transformers by folder, hub id or .gguf file; no weights are read.

    UserError where radix_ops does not fold such models, and where the config doesn't say enough.
    """
    config = load_config(name, trust_remote_code=trust_remote_code).get_text_config()
    from ..hf.guards import has_own_attention
    from ..hf.proofs import proofs

    proven, refused = proofs()
    if config.model_type not in proven:
        reason = refused.get(config.model_type, "not known to be right for folding")
        raise UserError(
            f"--model {name} is of model type {config.model_type!r}: {reason}; without --model nothing is said of FLOPs"
        )
    if config.model_type in _NOT_COUNTED:
        raise UserError(f"--model {name}: FLOPs of model type {config.model_type!r} are not known")
    from transformers import AutoModel

    with loading("layers", name), torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    try:
        linear, attention = _linear_flops(model, name), _attention_flops(config, name)
    except RuntimeError as error:  # transformers raises it for fields that differ from layer to layer
        raise UserError(f"the config of {name} differs from layer to layer, so FLOPs are not known") from error
    return ForwardCost(linear, attention, folds_attention=not has_own_attention(config))


def _linear_flops(model: nn.Module, name: str) -> float:
    total = 0.0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and path.endswith("experts"):
            raise UserError(
                f"experts of {name} are not counted with this version of transformers, so FLOPs are not known"
            )
        if isinstance(module, nn.Embedding):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if key.endswith("bias"):
                continue
            if weight.ndim == 3:  # all experts' in one
                total += weight_flops(weight.numel()) * _experts_per_token(model.config, name) / len(weight)
            elif weight.ndim == 2:
                total += weight_flops(weight.numel())
    return total


def _experts_per_token(config, name: str) -> int:
    found = next((getattr(config, key) for key in _EXPERTS_PER_TOKEN if getattr(config, key, None)), None)
    if found is None:
        raise UserError(f"the config of {name} does not say how many experts a token visits, so FLOPs are not known")
    return found


def _attention_flops(config, name: str) -> dict[int | None, int]:
    heads, layers = (_number(config, key, name) for key in ("num_attention_heads", "num_hidden_layers"))
    if getattr(config, "qk_nope_head_dim", None):  # latent attention
        query = config.qk_nope_head_dim + config.qk_rope_head_dim
    else:
        query = getattr(config, "head_dim", None) or _number(config, "hidden_size", name) // heads
    value = getattr(config, "v_head_dim", None) or query
    windows = Counter(_window(config, kind) for kind in getattr(config, "layer_types", None) or [None] * layers)
    return {window: count * attention_flops(heads, query, value) for window, count in windows.items()}


def _window(config, layer_type: str | None) -> int | None:
    """Return how many tokens a layer of this type looks back at, None for all."""
    slides = layer_type == "sliding_attention" or (layer_type is None and getattr(config, "use_sliding_window", True))
    return getattr(config, "sliding_window", None) if slides else None


def _number(config, key: str, name: str) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int):
        raise UserError(f"the config of {name} has the {key} {value!r}, so FLOPs are not known")
    return value
