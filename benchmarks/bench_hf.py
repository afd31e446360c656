"""radix_ops.hf.enable on transformers' Qwen3 at its real shapes, random weights: against the model as it was.

"plain" is the base model on the padded batch with sdpa, as most users have it; "enabled" the same after `enable` with
its defaults; "eager" and "graph" with threshold=1.0, without CUDA graphs and with them; "packed" the model on the
packed batch with an attention function over torch's varlen_attn registered with transformers' AttentionInterface, which
is the best a user can do without folding. Times are from ids on the device to hidden states there, everything included,
of calls whose graphs were captured before. "of FLOP ratio" is packed / enabled over the ratio of their floating-point
operations.
"""

from __future__ import annotations

import gc
import inspect
import json
import math

import torch
import transformers
from transformers import AttentionInterface

import bench_qwen3
import harness
import radix_ops.hf
from batches import SMALL_BATCHES, Batch, add_data_options, real_batches

WORKLOADS = ("gsm8k_8shot_cot", "msmarco_rerank_top8", "mmlu_4shot_4choice")
_SMALL = (*SMALL_BATCHES, (10, 64, 100), (10, 0, 164), (15, 511, 256))
_WARM_UP = 4  # calls until a graph is captured


def make_packed_attention():
    """Return an attention function for packed rows; `ends` are cu_seqlens and the longest length."""
    from torch.nn.attention.varlen import varlen_attn

    # The signature has moved between releases of torch.
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in names else {}

    def packed_attention(module, query, key, value, attention_mask, ends=None, **kwargs):
        q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
        cu_seqlens, longest = ends
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)[None], None

    return packed_attention


def make_models(name: str, device: str, dtype: torch.dtype) -> tuple[dict, object]:
    """Return models that share their parameters, and our config of that name."""
    ours = bench_qwen3.make_model(name, device, dtype)
    models = {key: bench_qwen3.make_theirs(ours, name) for key in ("plain", "enabled", "eager", "graph")}
    radix_ops.hf.enable(models["enabled"])
    radix_ops.hf.enable(models["eager"], threshold=1.0, cuda_graphs=False)
    radix_ops.hf.enable(models["graph"], threshold=1.0)
    if device == "cuda":
        AttentionInterface.register("bench_packed", make_packed_attention())
        models["packed"] = bench_qwen3.make_theirs(ours, name)
        models["packed"].set_attn_implementation("bench_packed")
    return models, ours.config


def functions_of(models: dict, batch: Batch, names) -> dict:
    lengths = batch.mask.sum(1)
    positions = torch.cat([torch.arange(int(n), device=batch.ids.device) for n in lengths])[None]
    ends = batch.cu_seqlens.int(), int(lengths.max())

    def of(name):
        if name == "packed":
            given = {"input_ids": batch.ids[None], "position_ids": positions, "ends": ends}
        else:
            given = {"input_ids": batch.padded, "attention_mask": batch.mask}
        return lambda: (math.nan, models[name](**given, use_cache=False).last_hidden_state)

    return {name: of(name) for name in names if name in models}


def row_of(name: str, models: dict, config, batch: Batch, args, names) -> dict[str, object]:
    functions = functions_of(models, batch, names)
    want = functions["plain"]()[1][batch.mask.bool()].float()
    row = {"model": name, "batch": batch.name, "positions": batch.padded.numel(), "N": batch.tokens, "M": batch.rows}
    for key, function in functions.items():
        got = [function()[1] for _ in range(_WARM_UP)][-1].float()
        got = got[0] if key == "packed" else got[batch.mask.bool()]
        difference = float((got - want).norm() / want.norm())
        assert difference < 0.2, f"{batch.name}: {key} differs from plain by {difference} of its norm"
        row[f"{key} differs"] = difference
    stats = models["enabled"].radix_stats
    before = stats.folded, stats.replayed
    seconds = bench_qwen3.measure(functions, args.rounds, args.budget)
    row |= {f"{key} ms": value[0] * 1e3 for key, value in seconds.items()}
    row |= {f"plain / {key}": seconds["plain"][0] / seconds[key][0] for key in seconds if key != "plain"}
    if "packed" in seconds:
        ratio = batch.flop_ratio(config)
        row |= {"packed / enabled": seconds["packed"][0] / seconds["enabled"][0], "FLOP ratio": ratio}
        row["of FLOP ratio"] = row["packed / enabled"] / ratio
    return row | {"folds": stats.folded > before[0], "replays": stats.replayed > before[1]}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5, devices=harness.DEVICES)
    parser.add_argument("--models", nargs="+", choices=list(bench_qwen3.SHAPES), help="default: 0.6B and 8B, or small")
    add_data_options(parser, WORKLOADS)
    parser.add_argument("--small", action="store_true", help="measure the small batches alone")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds after which a line has rounds enough")
    args = harness.parse(parser)
    device = args.device
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(15, 2047, 256), (15, 0, 1024)] if device == "cuda" else [(4, 511, 64), (4, 0, 256)]
    batches = [Batch.synthetic(*shape, device) for shape in shapes] + real_batches(args, device)
    small = [Batch.synthetic(*shape, device) for shape in _SMALL]
    for name in args.models or (["small"] if device == "cpu" else ["0.6B", "8B"]):
        models, config = make_models(name, device, dtype)
        with torch.inference_mode():
            rows = []
            for batch in [] if args.small else batches:
                rows.append(row_of(name, models, config, batch, args, ("plain", "enabled", "packed")))
                print(json.dumps(rows[-1]), flush=True)
            if rows:
                harness.report(f"hf_{name}_{device}", rows, args.save)
            rows = [
                row_of(name, models, config, batch, args, ("plain", "eager", "graph", "enabled")) for batch in small
            ]
            harness.report(f"hf_small_batches_{name}_{device}", rows, args.save)
        del models
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
