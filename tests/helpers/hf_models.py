"""Tiny transformers models with peaked attention, padded batches and judges of outputs, for tests of radix_ops.hf."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, Qwen3Config

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
    "bos_token_id": 1, "eos_token_id": 59,
}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama_biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"attention_bias": True}),
    "qwen3_sliding": (Qwen3Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
}
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
for _rope_type, _more in {"linear": {}, "yarn": {}, "llama3": LLAMA3}.items():
    CONFIGS[f"llama_{_rope_type}"] = (LlamaConfig, {"rope_parameters": {"rope_type": _rope_type, **ROPE, **_more}})

proven_gpt2 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10.4"), reason="gpt2 folds from transformers 5.10.4 on"
)

# Sequences that share, a duplicate, a strict prefix and a stranger.
TREE = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2], [5, 6, 7, 8, 9, 1], [5, 6, 3], [5, 6], [4]]


@functools.cache
def _built(name: str, head: str, attention: str):
    config_class, changes = CONFIGS[name]
    config = config_class(**{**SIZES, **changes}, attn_implementation=attention)
    model = getattr(transformers, config_class.__name__.removesuffix("Config") + head)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        is_norm = parameter.dim() == 1 and bool(parameter.eq(1).all())
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + is_norm
    return model


def build(name: str = "llama", head: str = "ForCausalLM", attention: str = "sdpa"):
    """Return a model of its own in eval mode; equal arguments give equal weights."""
    return copy.deepcopy(_built(name, head, attention))


def build_from(config):
    """Return a language model of the config in eval mode, with peaked attention."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model


def gpt2():
    """Return a model whose positions are learnt, and count columns."""
    sizes = {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return build_from(transformers.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def pad(sequences: list[list[int]], side: str):
    """Return input_ids and attention_mask [B, T], T three past the longest sequence, with any tokens at the padding."""
    width = max(map(len, sequences)) + 3
    ids = torch.randint(1, 60, (len(sequences), width), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        space = width - len(sequence)
        start = {"right": 0, "left": space, "both": min(1 + row % 3, space)}[side]
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=ids.dtype)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


def alone(model, sequences: list[list[int]]) -> torch.Tensor:
    """Return the logits [N, V] of all tokens, each sequence computed without padding, mask or neighbours."""
    return torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences if s])


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.detach()
    return float((x.detach().double() - exact).norm() / exact.norm())


def assert_within_budget(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Allow `got` to be twice as far from `exact` as plain PyTorch in the same dtype, and two rounding steps."""
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    # Norms compute in float32 even in a float64 model, so no dtype is more exact than that.
    step = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)
    assert error(got, exact) <= 2 * error(plain, exact) + 2 * step


def assert_same(got, plain) -> None:
    """Check that both are equal bit for bit."""
    assert type(got) is type(plain)
    if isinstance(plain, DynamicCache):
        got, plain = ([x for layer in cache.layers for x in (layer.keys, layer.values)] for cache in (got, plain))
    if isinstance(plain, torch.Tensor):
        torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True)
    elif isinstance(plain, dict):
        assert got.keys() == plain.keys()
        for key in plain:
            assert_same(got[key], plain[key])
    elif isinstance(plain, (tuple, list)):
        assert len(got) == len(plain)
        for one, other in zip(got, plain, strict=True):
            assert_same(one, other)
    else:
        assert got == plain


class Witness(TorchDispatchMode):
    """Sees what a model does inside, from outside radix_ops."""

    def __init__(self):
        super().__init__()
        self.attention_calls = 0  # of the folded attention
        self.rows: list[int] = []  # that went through the MLP of each layer, in order

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ops = torch.ops.radix
        self.attention_calls += func in (ops.varlen_attention.default, ops.trie_attention.default)
        if func is torch.ops.aten.silu.default:
            self.rows.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
