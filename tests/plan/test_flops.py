"""FLOPs by a config against those that torch counts, and the speed-ups that `radix-ops inspect` makes of them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.commands import inspect_json, write_jsonl

pytest.importorskip("transformers")
import transformers

from radix_ops.engine.costs import forward_cost
from radix_ops.engine.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fold_checks
import small_configs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Dense and with experts, shared ones too; projections of other widths, latent attention, windows, Conv1D.
KINDS = [
    "llama",
    "qwen3",
    "gpt2",
    "gptj",
    "opt",
    "phi3",
    "gemma2",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "jetmoe",
]


def config_of(kind, **changes):
    return transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(tmp_path, kind):
    config = fold_checks.config_of(kind, small_configs.small_arguments(kind))
    config.save_pretrained(tmp_path)
    cost = forward_cost(str(tmp_path))
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    for length in (5, 12):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(2, 2 + length)[None], use_cache=False)
        # Older transformers make the angles of rotary embeddings by a product of matrices, of inner width 1.
        counts = counter.get_flop_counts()
        of_angles = sum(sum(found.values()) for name, found in counts.items() if name.endswith(".rotary_emb"))
        # Eager attention computes all pairs, masked ones too.
        wanted = cost.linear * length + sum(cost.attention.values()) * length**2
        assert counter.get_total_flops() - of_angles == wanted


def test_flops_of_windows_and_of_the_cases_that_are_refused(tmp_path, capsys):
    def cost_of(kind, **changes):
        config_of(kind, **changes).save_pretrained(tmp_path)
        return forward_cost(str(tmp_path))

    assert cost_of("mistral", sliding_window=8).attention == {8: 256}
    assert cost_of("mistral", sliding_window=None).attention == {None: 256}
    layers = ["sliding_attention", "full_attention"]
    assert cost_of("gemma2", head_dim=8, sliding_window=8, layer_types=layers).attention == {8: 128, None: 128}
    assert cost_of("qwen2", use_sliding_window=False, sliding_window=8).attention == {None: 256}
    assert cost_of("gemma2", head_dim=8).folds_attention is False
    assert cost_of("llama").folds_attention is True
    for kind, message in (
        ("bert", "is of model type 'bert'"),
        ("diffllama", "FLOPs of model type 'diffllama' are not known"),
        ("gemma4_text", "differs from layer to layer"),
    ):
        with pytest.raises(UserError, match=message):
            cost_of(kind)


def test_speed_ups_of_a_model_count_attention(capsys, tmp_path):
    config_of("llama").save_pretrained(tmp_path / "model")
    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2]]
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": ids} for ids in sequences])
    # The file holds token ids, so the folder needs no tokenizer.
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    heads_width, inner = config["hidden_size"], config["intermediate_size"]
    linear = 2 * 2 * (2 * heads_width * heads_width + 2 * heads_width * heads_width // 2 + 3 * heads_width * inner)
    attention = 2 * 2 * heads_width * 2

    def total(depths):
        return linear * len(depths) + attention * sum(depths)

    packed = total([d for s in sequences for d in range(1, len(s) + 1)])
    folded = total([1, 2, 3, 4, 5, 5, 6])
    padded = total([*range(1, 7), *range(1, 6), 1, 2])
    summary = inspect_json(capsys, file, "--model", tmp_path / "model")
    batches = next(batches for batches in summary["batches"] if "max_rows" in batches)
    assert batches["planned"]["speed_up"] == pytest.approx(packed / folded)
    assert batches["padded"]["positions"] == 13
    assert batches["padded"]["speed_up"] == pytest.approx(padded / folded)
