"""Small random Qwen3 models of transformers, and their outputs for each sequence on its own."""

from __future__ import annotations

import torch
import transformers

from helpers.batches import NAMED

VOCABULARY = 64
LAYOUTS = ("compact", "trie", "unfold")
FILLED = [name for name in NAMED if sum(map(len, NAMED[name]))]
VARIANTS = {
    "plain": {},
    "bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "padding token": {"pad_token_id": 2},  # a token of the batches too
    "windows": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn with scales": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
}


def oracle(folder, dtype=torch.float32, **changes):
    """Save a small random Qwen3 of transformers in `folder`; its norms' weights are not all 1, nor its biases 0."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,  # not hidden_size / num_attention_heads
    }
    config = transformers.Qwen3Config(**{**options, **changes})
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model


def run_theirs(model, sequences):
    """Return hidden states and logits of all packed tokens, each sequence on its own."""
    hidden, logits = [], []
    for sequence in sequences:
        if sequence:
            ids = torch.tensor([sequence])
            state = model.model(ids, use_cache=False).last_hidden_state
            hidden.append(state[0])
            logits.append(model.lm_head(state)[0])
    return torch.cat(hidden), torch.cat(logits)
