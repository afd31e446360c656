"""Qwen3 at its real shapes, random weights: the layouts on a folded batch, the same model packed, and transformers'.

"packed" is our model on `radix_ops.pack`: nothing folded, varlen attention. "transformers" is its own model on the
padded batch with sdpa, as most users have it. Layers of our model are compiled (`compile_layers`) on CUDA.
Every time is from ids on the device to hidden states there, the fold and all steps of the host included; "fold ms" is
the part until the batch is made. The grid is that of the RadixMLP paper: 15 sequences of a shared prefix and their own.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path

import torch

import harness
import radix_ops
from radix_ops.models.qwen3 import Qwen3Config, Qwen3Model

SHAPES = {  # hidden_size, intermediate_size, layers, heads, K/V heads, of the models' config.json
    "0.6B": (1024, 3072, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "small": (256, 768, 4, 4, 2),
}
VOCABULARY = 151_936
AT_ONCE = {"0.6B": 7}  # layers that are compiled as one: more where the host is slower than the GPU
PREFIXES, SUFFIXES = (1, 255, 511, 1023, 2047), (256, 1024)
WORKLOADS = (
    "msmarco_rerank_top8",
    "xquad_rerank_top8",
    "gsm8k_8shot_cot",
    "mmlu_4shot_4choice",
    "xquad_article_qa",
    "gsm8k_group5",
)
LAYOUTS = ("unfold", "compact", "trie")
TRAINING = {"0.6B": ((32, 2048, 256), (32, 512, 256)), "4B": ((16, 512, 256),), "small": ((8, 128, 32),)}


def config_of(name: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, kv_heads = SHAPES[name]
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        head_dim=64 if name == "small" else 128,
        rope={"rope_type": "default", "rope_theta": 1e6},
        sliding_windows=(None,) * layers,
        max_position_embeddings=40960,
    )


def make_model(name: str, device: str, dtype: torch.dtype) -> Qwen3Model:
    with torch.device("meta"):
        model = Qwen3Model(config_of(name)).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in parameter_name else parameter.normal_(std=0.02)
    if device == "cuda":
        model.compile_layers(AT_ONCE.get(name, 4), fullgraph=True)
    return model.eval()


def make_theirs(model: Qwen3Model, name: str):
    """Return transformers' model on the same parameters."""
    import transformers
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    ours = model.config
    weight = model.norm.weight
    options = {field: getattr(ours, field) for field in ("vocab_size", "hidden_size", "intermediate_size")}
    options |= {field: getattr(ours, field) for field in ("num_hidden_layers", "num_attention_heads", "head_dim")}
    config = transformers.Qwen3Config(
        **options,
        num_key_value_heads=ours.num_key_value_heads,
        max_position_embeddings=ours.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope["rope_theta"]},
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        theirs = transformers.Qwen3Model(config).to(weight.dtype)
    theirs.load_state_dict(model.state_dict(), assign=True)
    with torch.device(weight.device):
        theirs.rotary_emb = Qwen3RotaryEmbedding(config)
    return theirs.eval()


class Batch:
    """Packed ids, with all numbers that are known before anything is timed."""

    def __init__(self, name: str, ids: torch.Tensor, cu_seqlens: torch.Tensor, device: str):
        self.name, self.ids, self.cu_seqlens = name, ids.to(device), cu_seqlens.to(device)
        folded = radix_ops.fold(ids.cpu(), cu_seqlens.cpu())
        self.tokens, self.rows = folded.num_tokens, folded.num_nodes
        self.depths = int((folded.position_ids.long() + 1).sum())
        lengths = folded.lengths
        self.mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.zeros(self.mask.shape, dtype=torch.int64).masked_scatter_(self.mask, ids.cpu().long())
        self.mask, self.padded = self.mask.long().to(device), padded.to(device)

    @classmethod
    def synthetic(cls, count: int, prefix: int, own: int, device: str) -> Batch:
        ids = torch.randint(VOCABULARY, (count, prefix + own), generator=torch.Generator().manual_seed(prefix + own))
        ids[:, :prefix] = ids[0, :prefix]
        ends = torch.arange(count + 1) * (prefix + own)
        return cls(f"{count} x ({prefix} + {own})", ids.flatten(), ends, device)

    def flops(self, config: Qwen3Config) -> float:
        """Count those of a forward over rows: products with weights, and of each row with the rows on its path."""
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        weights = config.hidden_size * (2 * heads + 2 * kv_heads) * dim
        weights += 3 * config.hidden_size * config.intermediate_size
        return config.num_hidden_layers * (2 * weights * self.rows + 4 * heads * dim * self.depths)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(functions: dict, rounds: int, budget: float) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each function, all in turn, and of its fold; 3 rounds at least where they take long.

    Each round begins with another function, since what ran before decides the clocks of a GPU at its power limit. A
    function returns (when its batch was made, result) and has been called before.
    """
    samples: dict[str, list] = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and (time.perf_counter() - begin) * (done + 1) / done > budget:
            break
        names = list(functions)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            synchronize()
            start = time.perf_counter()
            made, result = functions[name]()
            synchronize()
            samples[name].append((time.perf_counter() - start, made - start))
            del result
    return {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in samples.items()}


def forward_functions(model: Qwen3Model, theirs, batch: Batch) -> dict:
    def of(make, layout):
        def run():
            made = make(batch.ids, batch.cu_seqlens)
            return time.perf_counter(), model(made, layout)

        return run

    def run_theirs():
        made = time.perf_counter()
        return made, theirs(input_ids=batch.padded, attention_mask=batch.mask, use_cache=False).last_hidden_state

    functions = {"packed": of(radix_ops.pack, "compact")}
    functions |= {layout: of(radix_ops.fold, layout) for layout in LAYOUTS}
    return functions | ({"transformers": run_theirs} if theirs is not None else {})


def check(functions: dict, batch: Batch) -> dict[str, object]:
    """Compare every result with packed's; return their differences and whether compact's are the same bits.

    Rounding in bf16 grows from layer to layer, to several percent; a wrong token would be wrong by more than the norm.
    """
    want = functions["packed"]()[1]
    folded = radix_ops.fold(batch.ids, batch.cu_seqlens)
    facts: dict[str, object] = {}
    for name, function in functions.items():
        if name == "packed":
            continue
        result = function()[1]
        result = result[batch.mask.bool()] if name == "transformers" else folded.unfold(result)
        facts[f"{name} differs"] = float((result - want).float().norm() / want.float().norm())
        assert facts[f"{name} differs"] < 0.2, f"{batch.name}: {name} differs from packed: {facts}"
        if name == "compact":
            facts["compact bit-equal"] = bool(torch.equal(result, want))
    return facts


def forward_row(name: str, model, theirs, batch: Batch, args, matmul_rate: float) -> dict[str, object]:
    functions = forward_functions(model, theirs, batch)
    facts = check(functions, batch)
    seconds = measure(functions, args.rounds, args.budget)
    packed = seconds["packed"][0]
    row = {"model": name, "batch": batch.name, "N": batch.tokens, "M": batch.rows, "N/M": batch.tokens / batch.rows}
    row |= {f"{key} ms": value[0] * 1e3 for key, value in seconds.items()}
    row |= {"transformers ms": row.get("transformers ms"), "fold ms": seconds["compact"][1] * 1e3}
    row |= {f"packed / {layout}": packed / seconds[layout][0] for layout in LAYOUTS}
    best = min(seconds[layout][0] for layout in LAYOUTS)
    row |= {"transformers / best": seconds["transformers"][0] / best if "transformers" in seconds else None}
    row |= {"compact over FLOP ideal": seconds["compact"][0] * matmul_rate / batch.flops(model.config)}
    return row | facts


def training_functions(model: Qwen3Model, batch: Batch) -> dict:
    projection = torch.randn(model.config.hidden_size, device=batch.ids.device, dtype=model.norm.weight.dtype)

    def of(make, layout):
        def run():
            made = make(batch.ids, batch.cu_seqlens)
            at = time.perf_counter()
            # The loss of the packed tokens: a row counts as often as it occurs.
            (made.unfold(model(made, layout) @ projection)).float().mean().backward()
            return at, None

        return run

    return {"packed": of(radix_ops.pack, "compact")} | {layout: of(radix_ops.fold, layout) for layout in LAYOUTS}


def training_row(name: str, model: Qwen3Model, batch: Batch, args) -> dict[str, object]:
    """Measure forward and backward, and the peak of memory beyond the parameters and their gradients."""
    row: dict[str, object] = {"model": name, "batch": batch.name, "N/M": batch.tokens / batch.rows}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fitting = {}
    for key, function in training_functions(model, batch).items():
        try:
            function()
            if batch.ids.is_cuda:
                synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                function()
                row[f"{key} GiB"] = (torch.cuda.max_memory_allocated() - held) / 2**30
            fitting[key] = function
        except torch.cuda.OutOfMemoryError:
            row[f"{key} GiB"] = None
            torch.cuda.empty_cache()
    seconds = measure(fitting, args.rounds, args.budget)
    row |= {f"{key} ms": seconds[key][0] * 1e3 if key in seconds else None for key in ("packed", *LAYOUTS)}
    for layout in LAYOUTS:
        both = {"packed", layout} <= seconds.keys()
        row[f"packed / {layout}"] = seconds["packed"][0] / seconds[layout][0] if both else None
    for parameter in model.parameters():
        parameter.grad = None
    return row


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a square product, 8192 wide on CUDA."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    if device == "cuda":
        return 2 * size**3 / harness.cuda_seconds_per_call({"": lambda: a @ b}, 5)[""]
    return 2 * size**3 / harness.seconds_per_call({"": lambda: a @ b}, 3)[""]


def real_batches(args, device: str) -> list[Batch]:
    if args.data is None or not Path(args.data).exists():
        print(f"real prompts: skipped, {args.data or '--data FILE.npz'} is not there")
        return []
    import numpy as np

    with np.load(args.data) as data:
        batches = []
        for name in args.workloads:
            if f"{name}.ids" in data:
                ends = torch.from_numpy(data[f"{name}.cu"])[: args.sequences + 1]
                ids = torch.from_numpy(data[f"{name}.ids"])[: int(ends[-1])]
                batches.append(Batch(f"{name} ({len(ends) - 1})", ids, ends, device))
        return batches


def plot(path: str, device: str) -> None:
    """Draw the speed-up over packed against the fraction of tokens that is shared, from the JSON."""
    from matplotlib import pyplot

    contents = [json.loads(file.read_text()) for file in sorted(harness.RESULTS.glob(f"qwen3_[!tq]*_{device}.json"))]
    rows = [row for content in contents for row in content["rows"] if " x (" in row["batch"]]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for color, layout in enumerate(LAYOUTS):
            for own, line in zip(SUFFIXES, "-:", strict=True):
                cells = [r for r in rows if r["model"] == name and r["batch"].endswith(f" + {own})")]
                points = sorted((1 - 1 / r["N/M"], r[f"packed / {layout}"]) for r in cells)
                if points:
                    label = f"{layout}, {own} own tokens"
                    axis.plot(
                        *zip(*points, strict=True), line, color=f"C{color}", marker="o", markersize=3, label=label
                    )
        ideal = sorted((1 - 1 / r["N/M"], r["N/M"]) for r in rows if r["model"] == name)
        axis.plot(*zip(*ideal, strict=True), color="grey", linestyle="--", label="N/M")
        axis.set(title=f"Qwen3 {name}", xlabel="shared fraction of the tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over packed")
    axes[0][0].legend(fontsize=8)
    environment = contents[0]["environment"]
    figure.suptitle(f"Forward, 15 sequences, {environment.get('gpu', environment['cpu'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5, devices=harness.DEVICES)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="default: all real ones on CUDA, else small")
    parser.add_argument("--data", help="a .npz of packed prompts: NAME.ids and NAME.cu for each NAME")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="NAME", help="of --data (default: six)")
    parser.add_argument("--sequences", type=int, default=128, help="of each real batch, at most (default: 128)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds after which a line has rounds enough")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' model out")
    parser.add_argument("--quick", action="store_true", help="of the grid the longest prefix alone")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the saved results instead of measuring")
    args = harness.parse(parser)
    device = args.device
    if args.plot:
        return plot(args.plot, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64
    matmul_rate = matmul_flops(device, dtype)
    prefixes = PREFIXES[-1:] if args.quick else PREFIXES
    count = 15 if device == "cuda" else 4
    batches = [Batch.synthetic(count, prefix, own, device) for own in SUFFIXES[: len(prefixes)] for prefix in prefixes]
    batches += [Batch.synthetic(count, 0, 1024, device), *real_batches(args, device)]
    measured = {"matmul TFLOP/s": matmul_rate / 1e12}
    for name in args.models or (["small"] if device == "cpu" else ["0.6B", "4B", "8B"]):
        model, rows = make_model(name, device, dtype), []
        theirs = None if args.no_transformers else make_theirs(model, name)
        with torch.no_grad():
            for batch in batches:
                rows.append(forward_row(name, model, theirs, batch, args, matmul_rate))
                print(json.dumps(rows[-1]), flush=True)
        harness.report(f"qwen3_{'quick_' if args.quick else ''}{name}_{device}", rows, args.save, measured)
        if device == "cuda" and name in TRAINING:
            model.compile_layers(fullgraph=True)
        training = [training_row(name, model, Batch.synthetic(*s, device), args) for s in TRAINING.get(name, ())]
        if training:
            harness.report(f"qwen3_training_{name}_{device}", training, args.save, measured)
        del model, theirs
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
