"""Qwen3 at its real shapes, random weights: the layouts on a folded batch, the same model packed, and transformers'.

"packed" is our model on `radix_ops.pack`: nothing folded, nothing padded, varlen attention, no CUDA graph. "best
packed" is the same as users have it, small batches as CUDA graphs; it and "auto" run FlashAttention 3 or 4 where that
is installed (--flash-attention), and all else torch's flash attention. "unfold" is the way of the RadixMLP paper.
"transformers" is its own model on the padded batch with sdpa, as most users have it. Layers of our model are compiled
(`compile_layers`) on CUDA. Every time is from ids on the device to hidden states there, the fold and all steps of the
host included; "fold ms" is the part until the batch is made. Every result is compared with packed's before it is timed.
"of FLOP ratio" is the best layout's speed-up over the FLOP ratio (see batches.py).

--cells grid, the default, is the paper's: 15 sequences of a shared prefix and their own, and real prompts of --data.
--cells small has batches whose forward the host may take longer for than the GPU, and some that share nothing; "auto"
is the one layout there.
--cells long has contexts of 8,192 to 32,768 tokens and the tries of agents, without transformers, and trains under
gradient checkpointing.
"""

from __future__ import annotations

import gc
import json
import statistics
import time

import torch

import harness
import radix_ops
from batches import SMALL_BATCHES, VOCABULARY, Batch, add_data_options, agentic_batches, long_batches, real_batches
from radix_ops.models.qwen3 import Qwen3Config, Qwen3Model

SHAPES = {  # hidden_size, intermediate_size, layers, heads, K/V heads, of the models' config.json
    "0.6B": (1024, 3072, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "small": (256, 768, 4, 4, 2),
}
AT_ONCE = {"0.6B": 7}  # layers that are compiled as one: more where the host is slower than the GPU
PREFIXES, SUFFIXES = (1, 255, 511, 1023, 2047), (256, 1024)
SMALL = ((10, 64, 100), (15, 1, 256), (15, 511, 256), (15, 2047, 256), *SMALL_BATCHES)
NOTHING_SHARED = ((15, 0, 300), (15, 0, 1024), (128, 0, 512))
LAYOUTS = ("unfold", "compact", "trie")
WAYS = (*LAYOUTS, "auto")
PARTS = ("forward", "training")
WARM_UP = (4, 64, 16)
TRAINING = {"0.6B": ((32, 2048, 256), (32, 512, 256)), "4B": ((16, 512, 256),), "small": ((8, 128, 32),)}


def config_of(name: str, layers: int | None = None) -> Qwen3Config:
    hidden, intermediate, all_layers, heads, kv_heads = SHAPES[name]
    layers = layers or all_layers
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


def make_model(
    name: str, device: str, dtype: torch.dtype, layers: int | None = None, at_once: int | None = None
) -> Qwen3Model:
    """Make the model, or its first `layers`; `at_once` of them are compiled as one."""
    with torch.device("meta"):
        model = Qwen3Model(config_of(name, layers)).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in parameter_name else parameter.normal_(std=0.02)
    if device == "cuda":
        model.compile_layers(at_once or AT_ONCE.get(name, 4), fullgraph=True)
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def warm_up(functions: dict) -> None:
    """Compile and tune what all batches run."""
    for function in functions.values():
        function()


def measure(functions: dict, rounds: int, budget: float, least: int = 3) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each function, all in turn, and of its fold; `least` rounds where they take long.

    Each round begins with another function, since what ran before decides the clocks of a GPU at its power limit. A
    function returns (when its batch was made, result) and has been called before.
    """
    samples: dict[str, list] = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and (time.perf_counter() - begin) * (done + 1) / done > budget:
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


def forward_functions(
    model: Qwen3Model, theirs, batch: Batch, layouts: tuple[str, ...] = LAYOUTS, best_flash: str = "torch"
) -> dict:
    def of(make, layout, flash="torch"):
        def run():
            radix_ops.activate_flash_attention(flash)
            made = make(batch.ids, batch.cu_seqlens)
            return time.perf_counter(), model(made, layout)

        return run

    def run_packed():
        radix_ops.activate_flash_attention("torch")
        made = radix_ops.pack(batch.ids, batch.cu_seqlens)
        return time.perf_counter(), model._compute(made, "compact", None)

    def run_theirs():
        made = time.perf_counter()
        return made, theirs(input_ids=batch.padded, attention_mask=batch.mask, use_cache=False).last_hidden_state

    functions = {"packed": run_packed}
    if batch.ids.is_cuda:
        functions["best packed"] = of(radix_ops.pack, "compact", best_flash)
    for layout in layouts:
        functions[layout] = of(radix_ops.fold, layout, best_flash if layout == "auto" else "torch")
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
        if name != "best packed":
            result = result[batch.mask.bool()] if name == "transformers" else folded.unfold(result)
        facts[f"{name} differs"] = float((result - want).float().norm() / want.float().norm())
        assert facts[f"{name} differs"] < 0.2, f"{batch.name}: {name} differs from packed: {facts}"
        if name == "compact":
            facts["compact bit-equal"] = bool(torch.equal(result, want))
    return facts


def sizes(name: str, model: Qwen3Model, batch: Batch) -> dict[str, object]:
    row = {"model": name, "layers": model.config.num_hidden_layers, "batch": batch.name}
    row |= {"N": batch.tokens, "M": batch.rows, "N/M": batch.tokens / batch.rows}
    return row | {"FLOP ratio": batch.flop_ratio(model.config)}


def speed_ups(seconds: dict, flop_ratio: float) -> dict[str, float | None]:
    """Return packed's time over each layout's, None where one did not fit, and the best of them over the FLOP ratio."""
    packed = seconds.get("packed", (None,))[0]
    ways = [way for way in WAYS if way in seconds] or LAYOUTS
    ratios = {way: packed / seconds[way][0] if packed and way in seconds else None for way in ways}
    best = max((ratio for ratio in ratios.values() if ratio), default=None)
    row = {f"packed / {layout}": ratio for layout, ratio in ratios.items()}
    return row | {"of FLOP ratio": best and best / flop_ratio}


def forward_row(name: str, model, theirs, batch: Batch, args, matmul_rate: float) -> dict[str, object]:
    flash = args.flash_attention
    layouts = ("auto",) if args.cells == "small" else LAYOUTS if flash == "torch" else WAYS
    functions = forward_functions(model, theirs, batch, layouts, flash)
    facts = check(functions, batch)
    if batch.ids.is_cuda and batch.rows <= 2**14:  # such may be captured at their second call
        warm_up(functions)
    seconds = measure(functions, args.rounds, args.budget, args.least_rounds)
    row = sizes(name, model, batch)
    row |= {f"{key} ms": value[0] * 1e3 for key, value in seconds.items()}
    row |= {"transformers ms": row.get("transformers ms"), "fold ms": seconds[layouts[-1]][1] * 1e3}
    row |= speed_ups(seconds, row["FLOP ratio"])
    best = min(seconds[layout][0] for layout in layouts)
    if "best packed" in seconds:
        row["flash attention of best packed"] = flash
        row["best packed / best"] = min(seconds["packed"], seconds["best packed"])[0] / best
        row["of FLOP ratio, over best packed"] = row["best packed / best"] / row["FLOP ratio"]
    row |= {"transformers / best": seconds["transformers"][0] / best if "transformers" in seconds else None}
    ideal = batch.flops(model.config) / matmul_rate
    row |= {f"{layout} over FLOP ideal": seconds[layout][0] / ideal for layout in layouts if layout != "unfold"}
    return row | facts


def training_functions(model: Qwen3Model, batch: Batch, best_flash: str = "torch") -> dict:
    projection = torch.randn(model.config.hidden_size, device=batch.ids.device, dtype=model.norm.weight.dtype)

    def of(make, layout, flash="torch"):
        def run():
            radix_ops.activate_flash_attention(flash)
            made = make(batch.ids, batch.cu_seqlens)
            at = time.perf_counter()
            # The loss of the packed tokens: a row counts as often as it occurs.
            (made.unfold(model(made, layout) @ projection)).float().mean().backward()
            return at, None

        return run

    functions = {"packed": of(radix_ops.pack, "compact")}
    if best_flash != "torch":
        functions["best packed"] = of(radix_ops.pack, "compact", best_flash)
    return functions | {layout: of(radix_ops.fold, layout) for layout in LAYOUTS}


def training_row(name: str, model: Qwen3Model, batch: Batch, args) -> dict[str, object]:
    """Measure forward and backward, and the peak of memory beyond the parameters and their gradients."""
    row = sizes(name, model, batch) | {"checkpointing": model.gradient_checkpointing}
    watched = {
        part: model.get_parameter(part)
        for part in ("layers.0.self_attn.v_proj.weight", "layers.0.mlp.down_proj.weight")
    }
    fitting, want = {}, None
    for key, function in training_functions(model, batch, args.flash_attention).items():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            if batch.ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            function()
            if batch.ids.is_cuda:
                row[f"{key} GiB"] = (torch.cuda.max_memory_allocated() - held) / 2**30
        except torch.cuda.OutOfMemoryError:
            row[f"{key} GiB"] = None
            torch.cuda.empty_cache()
            continue
        fitting[key] = function
        found = {part: parameter.grad.float().clone() for part, parameter in watched.items()}
        if key == "packed":
            want = found
        elif want is not None:
            off = max(float((found[part] - want[part]).norm() / want[part].norm()) for part in watched)
            assert off < 0.3, f"{batch.name}: gradients of {key} differ from packed's by {off} of their norm"
            row[f"{key} gradients differ"] = off
    seconds = measure(fitting, args.rounds, args.budget, args.least_rounds)
    row |= {f"{key} ms": seconds[key][0] * 1e3 if key in seconds else None for key in ("packed", *LAYOUTS)}
    if {"packed", "best packed"} <= seconds.keys():
        row |= {"best packed ms": seconds["best packed"][0] * 1e3}
        best = min(seconds[key][0] for key in LAYOUTS if key in seconds)
        row["best packed / best"] = min(seconds["packed"], seconds["best packed"])[0] / best
        row["flash attention of best packed"] = args.flash_attention
    for parameter in model.parameters():
        parameter.grad = None
    return row | speed_ups(seconds, row["FLOP ratio"])


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a square product, 8192 wide on CUDA."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    if device == "cuda":
        return 2 * size**3 / harness.cuda_seconds_per_call({"": lambda: a @ b}, 5)[""]
    return 2 * size**3 / harness.seconds_per_call({"": lambda: a @ b}, 3)[""]


def note(name: str, rows: list[dict[str, object]], save: bool, measured: dict[str, float]) -> None:
    """Print the last row, and save all, so that a run that is cut off leaves what it found."""
    print(json.dumps(rows[-1]), flush=True)
    if save:
        harness.write(name, rows, measured)


def forward_batches(args, device: str) -> list[Batch]:
    if args.cells == "long":
        return long_batches(device)
    if args.cells == "small":
        return [Batch.synthetic(*shape, device) for shape in (*SMALL, *NOTHING_SHARED)]
    prefixes = PREFIXES[-1:] if args.quick else PREFIXES
    count = 15 if device == "cuda" else 4
    batches = [Batch.synthetic(count, prefix, own, device) for own in SUFFIXES[: len(prefixes)] for prefix in prefixes]
    return [*batches, Batch.synthetic(count, 0, 1024, device), *real_batches(args, device)]


def training_batches(args, name: str, device: str) -> list[Batch]:
    """Return those of a model that is trained; 8B's gradients and states leave no room beside long contexts."""
    if args.cells == "small":
        return []
    if args.cells == "long":
        return [] if name in ("4B", "8B") else [*agentic_batches(device), long_batches(device)[0]]
    return [Batch.synthetic(*shape, device) for shape in TRAINING.get(name, ())]


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5, devices=harness.DEVICES)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="default: all real ones on CUDA, else small")
    parser.add_argument(
        "--cells", choices=("grid", "small", "long"), default="grid", help="the batches (default: grid)"
    )
    parser.add_argument("--layers", type=int, help="of each model, from the first on (default: all)")
    add_data_options(parser)
    harness.add_flash_option(parser)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds after which a line has rounds enough")
    parser.add_argument("--least-rounds", type=int, default=3, help="of a line that takes longer (default: 3)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' model out")
    parser.add_argument("--quick", action="store_true", help="of the grid the longest prefix alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: both)")
    args = harness.parse(parser)
    if args.data and args.cells != "grid":
        parser.error("--data belongs to --cells grid")
    device, is_long = args.device, args.cells == "long"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64
    matmul_rate = matmul_flops(device, dtype)
    batches = forward_batches(args, device) if "forward" in args.parts else []
    measured = {"matmul TFLOP/s": matmul_rate / 1e12}
    kind = f"{args.cells}_" if args.cells != "grid" else "quick_" if args.quick else ""
    for name in args.models or (["small"] if device == "cpu" else ["0.6B", "4B", "8B"]):
        # A layer of long contexts takes the GPU longer than the host.
        model, rows = make_model(name, device, dtype, args.layers, 1 if is_long else None), []
        theirs = None if args.no_transformers or args.cells != "grid" else make_theirs(model, name)
        if batches:
            with torch.no_grad():
                for shape in (WARM_UP, (4, 0, 64)):
                    warm_up(forward_functions(model, theirs, Batch.synthetic(*shape, device), WAYS))
                for batch in batches:
                    rows.append(forward_row(name, model, theirs, batch, args, matmul_rate))
                    note(f"qwen3_{kind}{name}_{device}", rows, args.save, measured)
            harness.report(f"qwen3_{kind}{name}_{device}", rows, args.save, measured)
        if device == "cuda" and name in TRAINING:
            model.compile_layers(1 if is_long else 4, fullgraph=True)
        model.gradient_checkpointing = is_long
        training, trained = [], training_batches(args, name, device) if "training" in args.parts else []
        if trained:
            warm_up(training_functions(model, Batch.synthetic(*WARM_UP, device)))
        for batch in trained:
            training.append(training_row(name, model, batch, args))
            note(f"qwen3_training_{kind}{name}_{device}", training, args.save, measured)
        if training:
            harness.report(f"qwen3_training_{kind}{name}_{device}", training, args.save, measured)
        del model, theirs
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
