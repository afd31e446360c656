"""Qwen3 at its real shapes, random weights: forwards that replay CUDA graphs, and the same forwards run eagerly.

Times are from ids on the device to hidden states there, the fold and all steps of the host included. "packed" folds
nothing. "replay" is the GPU's time of the graph alone, of a batch as it is padded. Every batch takes a graph here, also
beyond the rule of `radix_ops.graphs`. With --compile the layers are compiled, those of the graph, too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import torch

import bench_qwen3
import harness
import radix_ops
from radix_ops.graphs import rule
from radix_ops.models.qwen3 import Qwen3Model

CELLS = ((10, 64, 100), (15, 1, 256), (15, 511, 256), (15, 2047, 256), (4, 64, 64), (32, 300, 100), (15, 0, 300))


def gpu_milliseconds(function: Callable[[], object], calls: int = 10) -> float:
    """Return the GPU's time of a call, of those that follow each other without a gap."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def call_milliseconds(model: Qwen3Model, batch: radix_ops.FoldedBatch) -> list[float]:
    """Return how long the first calls of a kind take: an eager one, one that captures, replays."""
    model.cuda_graphs = False
    model.cuda_graphs = True
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(batch)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measured_row(name: str, model: Qwen3Model, cell: tuple[int, int, int], args) -> dict[str, object]:
    batch = bench_qwen3.Batch.synthetic(*cell, "cuda")

    def of(make, layout: str, has_graphs: bool):
        def run():
            model._cuda_graphs = has_graphs  # past the property, which would give graphs up
            made = make(batch.ids, batch.cu_seqlens)
            return time.perf_counter(), model(made, layout)

        return run

    functions = {
        "packed eager": of(radix_ops.pack, "compact", False),
        "packed graph": of(radix_ops.pack, "compact", True),
        "eager": of(radix_ops.fold, "auto", False),
        "graph": of(radix_ops.fold, "auto", True),
    }
    results = {key: [function()[1] for _ in range(3)][-1].float() for key, function in functions.items()}
    difference = float((results["graph"] - results["eager"]).norm() / results["eager"].norm())
    assert difference < 0.1, f"{batch.name}: a graph differs by {difference}"
    seconds = bench_qwen3.measure(functions, args.rounds, args.budget)
    folded = radix_ops.fold(batch.ids, batch.cu_seqlens)
    call = model._call(folded, "auto", None)
    key = model._graphs._key(call, call.sizes())
    replay = gpu_milliseconds(model._graphs._graphs.take(key)._graph.replay)
    first, capture, *_, last = call_milliseconds(model, folded)
    row = {"model": name, "batch": batch.name, "M": batch.rows, "padded": key[0].rows}
    row |= {f"{way} ms": value[0] * 1e3 for way, value in seconds.items()}
    row |= {"fold ms": seconds["graph"][1] * 1e3, "replay ms": replay, "first ms": first, "capture ms": capture - last}
    graph = seconds["graph"][0]
    row |= {f"{way} / graph": seconds[way][0] / graph for way in ("packed eager", "packed graph", "eager")}
    return row | {"graph / replay": graph * 1e3 / replay}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=9)
    parser.add_argument("--models", nargs="+", choices=bench_qwen3.SHAPES, default=["0.6B", "8B"])
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of a row's rounds, about (default: 4)")
    args = harness.parse_cuda(parser)
    rule._MULTIPLICATIONS = math.inf
    rows = []
    for name in args.models:
        model = bench_qwen3.make_model(name, "cuda", torch.bfloat16)
        if not args.compile:
            model._run._compiled_call_impl = None
        with torch.no_grad():
            for cell in CELLS:
                rows.append(measured_row(name, model, cell, args))
                print(json.dumps(rows[-1]), flush=True)
        del model
        torch.cuda.empty_cache()
    harness.report("graphs_compiled_cuda" if args.compile else "graphs_cuda", rows, args.save)


if __name__ == "__main__":
    main()
