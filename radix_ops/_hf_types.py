"""Which transformers models can be folded, when not, and where their heads read hidden states. For `radix_ops.hf`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

# Their frequencies depend on the config alone; those of "dynamic" and "longrope" on the longest position of a batch,
# which left padding moves.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
# Attention implementations whose answer the tests compare with; another name may attend to anything.
_KNOWN_ATTENTION = ("eager", "sdpa")
_IGNORED_LABEL = -100
# Whose modules inside a decoder stack work on one token at a time, as far as the families' tests and checks go.
_KNOWN_PACKAGES = ("torch", "transformers", "peft")
# Path -> name of the class behind the family's prefix; projections and embeddings may be adapted or quantised.
_PARTS_OF_STACK = {"rotary_emb": "RotaryEmbedding", "norm": "RMSNorm"}
_PARTS_OF_LAYER = {
    "self_attn": "Attention", "mlp": "MLP", "input_layernorm": "RMSNorm", "post_attention_layernorm": "RMSNorm",
}  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """A model type that the tests prove: attention is causal and all else works on one token at a time.

    Positions enter by RoPE alone, so those of a left-padded row may count from its first real token.
    """

    module: str
    prefix: str

    def own(self, name: str) -> type:
        """transformers' class of the family with that name behind the prefix."""
        return getattr(importlib.import_module(self.module), self.prefix + name)


FAMILIES = {
    "llama": _Family("transformers.models.llama.modeling_llama", "Llama"),
    "qwen3": _Family("transformers.models.qwen3.modeling_qwen3", "Qwen3"),
}


def find_stack(model: nn.Module) -> PreTrainedModel:
    """The module that owns the embedding and the decoder layers, of a model that can be folded.

    Raises TypeError for what isn't a transformers model, ValueError for one that folding isn't known to be right for.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; enable the transformers model inside it" if isinstance(model, nn.Module) else ""
        raise TypeError(f"enable needs a transformers PreTrainedModel, got {name}{hint}")
    model_type = getattr(model.config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"{name} is of model type {model_type!r}, which folding is not known to be right for; "
            f"supported are {', '.join(FAMILIES)}"
        )
    stack = model.base_model
    reason = _unlike_family(stack, FAMILIES[model_type]) or unfoldable(stack)
    if reason is not None:
        raise ValueError(f"{name} can't be folded: {reason}")
    for parameter_name, parameter in stack.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"{name} can't be folded: models of transformers fold on the CPU alone, and {parameter_name} is on "
                f"{parameter.device}"
            )
    return stack


def _unlike_family(stack: nn.Module, family: _Family) -> str | None:
    """How the stack differs from transformers' own, which the family's tests are about."""
    expected = {"": "Model", **_PARTS_OF_STACK}
    if type(stack) is family.own("Model"):
        for index in range(len(stack.layers)):
            expected[f"layers.{index}"] = "DecoderLayer"
            expected |= {f"layers.{index}.{path}": name for path, name in _PARTS_OF_LAYER.items()}
    for path, name in expected.items():
        found, wanted = type(stack.get_submodule(path)), family.own(name)
        if found is not wanted:
            return (
                f"{path or 'its decoder stack'} is {found.__module__}.{found.__qualname__} "
                f"and not transformers' own {wanted.__name__}"
            )
    if stack.rotary_emb.rope_type not in _FIXED_ROPE:
        return (
            f"rope_type {stack.rotary_emb.rope_type!r} depends on the padded length; "
            f"supported are {', '.join(_FIXED_ROPE)}"
        )
    return None


def attention_modules(stack: PreTrainedModel) -> list[nn.Module]:
    """The attention modules that the stack's forward runs."""
    return [layer.self_attn for layer in stack.layers[: stack.config.num_hidden_layers]]


def unfoldable(stack: PreTrainedModel) -> str | None:
    """What in the config, or in modules that users may have changed since, makes folding wrong, if anything."""
    config = stack.config
    if not getattr(config, "is_causal", True):
        return "config.is_causal is False"
    if config._attn_implementation not in _KNOWN_ATTENTION:
        return (
            f"its attention implementation is {config._attn_implementation!r}; "
            f"supported are {', '.join(_KNOWN_ATTENTION)}"
        )
    for index, layer in enumerate(stack.layers[: config.num_hidden_layers]):
        attention = layer.self_attn
        if "forward" in vars(layer) or "forward" in vars(attention):
            return f"the forward of layer {index} was replaced, as device hooks do"
        if not attention.is_causal:
            return f"is_causal of the attention in layer {index} is False"
        if "sliding_window" in vars(attention):
            # The plain model's masks follow the config, its attention modules what the config was when they were made.
            layer_type, window = config.layer_types[index], attention.sliding_window
            is_sliding = layer_type == "sliding_attention" and window and window == config.sliding_window
            if not is_sliding and not (layer_type == "full_attention" and window is None):
                return f"layer {index} is of type {layer_type!r} and has sliding_window {window}"
    return None


def interference(stack: PreTrainedModel) -> str | None:
    """What at this moment makes a token's value depend on more than the tokens up to it, if anything."""
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return "a hook on all modules would see rows for positions"
    pending = list(stack._modules.values())
    while pending:
        module = pending.pop()
        if module is None:
            continue
        pending.extend(module._modules.values())
        reason = None
        if "forward" in module.__dict__:
            reason = "has a forward that was replaced"
        elif type(module).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            reason = f"is of type {type(module).__qualname__}, which is not known to work on one token at a time"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            reason = "has a hook, which would see rows for positions" if _has_foreign_hook(module) else reason
        if module.training:
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                reason = "drops out"
            elif getattr(module, "attention_dropout", 0):
                reason = "has attention_dropout"
            elif getattr(module, "neftune_noise_alpha", None):
                reason = "adds NEFTune noise"
        if reason is not None:
            name = next(name for name, found in stack.named_modules() if found is module)
            return f"{name} {reason}"
    return None


def _has_foreign_hook(module: nn.Module) -> bool:
    """Whether it has a hook besides torch's and transformers' own, which record, ask for gradients or load weights."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(getattr(hook, "__module__", "").partition(".")[0] not in ("transformers", "torch") for hook in hooks)


@functools.cache
def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)


def bind(function: Callable, /, *args, **kwargs) -> dict[str, Any]:
    """All arguments of the call by name. Raises TypeError as the call would."""
    signature = _signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments


def head_reads_padding(head: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Whether the head's loss or pooling, for a call with `arguments`, depends on a hidden state at a masked position.

    Exact for transformers' own heads and losses; of others every loss is taken to, where there is padding. Outputs
    that are masked positions' own, like their logits, don't count.
    """
    input_ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if not isinstance(input_ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        return False
    mask = mask.to(device=input_ids.device, dtype=torch.bool)
    if mask.all():
        return False
    forward = type(head).forward
    if forward is GenericForSequenceClassification.forward:
        return not mask.gather(1, _pooled_column(head, input_ids)).all()
    if forward is GenericForQuestionAnswering.forward:
        return arguments.get("start_positions") is not None and arguments.get("end_positions") is not None
    if arguments.get("use_cache") is False and _kept_logits_read_padding(arguments.get("logits_to_keep"), mask):
        return True
    if labels is None:
        return False
    ignored = _IGNORED_LABEL
    if forward is FAMILIES[head.config.model_type].own("ForCausalLM").forward:
        loss = "ForCausalLM"
        ignored = arguments.get("ignore_index", ignored)
        shifted = arguments.get("shift_labels")
        labels = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
    elif forward is GenericForTokenClassification.forward:
        loss = "ForTokenClassification"
    else:
        return True
    # Labels of kept logits alone have another shape, or the same in another order.
    reordered = labels.shape != mask.shape or isinstance(arguments.get("logits_to_keep"), Tensor)
    if reordered or head.loss_function is not LOSS_MAPPING[loss]:
        return True
    return bool(((labels.to(mask.device) != ignored) & ~mask).any())


def _kept_logits_read_padding(logits_to_keep: int | Tensor | None, mask: Tensor) -> bool:
    """Whether a caller that picks positions, as generate(use_cache=False) does, picks a masked one."""
    if isinstance(logits_to_keep, Tensor):
        return not mask[:, logits_to_keep.to(mask.device)].all()
    return bool(logits_to_keep) and not mask[:, -logits_to_keep:].all()


def _pooled_column(head: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[B, 1] the column whose hidden state GenericForSequenceClassification scores."""
    pad_token_id = head.config.get_text_config().pad_token_id
    if pad_token_id is None:
        return torch.full((input_ids.shape[0], 1), input_ids.shape[1] - 1, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * (input_ids != pad_token_id)).argmax(1, keepdim=True)
