"""fold against the radix-mlp package.

--device cpu runs on one thread: ids and positions are int64 for ours, uint32 for theirs. A second table compares
radix_ops.compat, which takes and gives what radix-mlp does, over a grid like that of radix-mlp's own benches, by the
time that each spends on the processor.
--device cuda compares with radix-mlp's torch interface; both take and give CUDA tensors. Each call is timed on the
host's clock, from idle device to idle device. A second table has the ways from ids to a batch and the plan of its
attention.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import radix_mlp
import torch

import harness
from radix_ops import FoldedBatch, compat, fold  # registers torch.ops.radix
from radix_ops._attention import plan_attention

BATCHES = {  # sequences, tokens each, shared fraction
    "32 x 2304, 0.89 shared": (32, 2304, 0.89),
    "32 x 512, nothing shared": (32, 512, 0.0),
    "2048 x 512, 0.25 shared": (2048, 512, 0.25),
    "16384 x 32, nothing shared": (16384, 32, 0.0),
    "32 x 512, all the same": (32, 512, 1.0),
}
TARGETS = {
    "cpu": dict(zip(BATCHES, (10, 10, 10, 10, 3), strict=True)),
    "cuda": {"32 x 2304, 0.89 shared": 20, "2048 x 512, 0.25 shared": 60},
}
SHAPES = ((10, 64, 100), (15, 1, 256), (15, 511, 256), (15, 2047, 256), (128, 0, 512))  # sequences, prefix, own tokens
VOCABULARY = 151_936
GRID = {
    "batch": (1, 2, 8, 32, 256, 2048),
    "length": (3, 32, 512),
    "shared": (0.0, 0.25, 0.5, 0.75, 1.0),
    "pad_multiple_of": (None, 8),
}


def make(count: int, length: int, shared: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    prefix = int(length * shared)
    ids = rng.integers(0, VOCABULARY, (count, length))
    ids[:, :prefix] = ids[0, :prefix]
    return [ids.flatten(), np.tile(np.arange(length), count), np.arange(count + 1) * length]


def processor_seconds(functions: dict, rounds: int) -> dict[str, float]:
    """Return the least mean time on the processor of a few calls, over rounds that alternate between the functions."""
    best = dict.fromkeys(functions, float("inf"))
    calls = {}
    for name, function in functions.items():
        start = time.thread_time()
        function()
        calls[name] = max(1, int(0.002 / max(time.thread_time() - start, 1e-6)))
    for _, (name, function) in itertools.product(range(rounds), functions.items()):
        start = time.thread_time()
        for _ in range(calls[name]):
            function()
        best[name] = min(best[name], (time.thread_time() - start) / calls[name])
    return best


def cpu_row(name: str, rounds: int) -> dict[str, object]:
    theirs = [array.astype(np.uint32) for array in make(*BATCHES[name])]
    ours = [torch.from_numpy(array) for array in make(*BATCHES[name])]
    want, got = radix_mlp.compute_fold_and_scatter(*theirs), torch.ops.radix.fold(*ours)
    assert all(np.array_equal(w, g.numpy()) for w, g in zip(want, got, strict=True)), name
    seconds = harness.seconds_per_call(
        {
            "radix-mlp": lambda: radix_mlp.compute_fold_and_scatter(*theirs),
            "fold": lambda: torch.ops.radix.fold(*ours),
            "fold_plan": lambda: torch.ops.radix.fold_plan(*ours),
        },
        rounds,
    )
    tokens = len(ours[0])
    return {
        "batch": name,
        "tokens": tokens,
        "rows": len(got[0]),
        "radix-mlp ms": seconds["radix-mlp"] * 1e3,
        "fold ms": seconds["fold"] * 1e3,
        "fold Mtok/s": tokens / seconds["fold"] / 1e6,
        "fold_plan ms": seconds["fold_plan"] * 1e3,
        "radix-mlp / fold": seconds["radix-mlp"] / seconds["fold"],
        "target": TARGETS["cpu"][name],
    }


def grid_row(count: int, length: int, shared: float, multiple: int | None, rounds: int) -> dict[str, object]:
    given = [array.astype(np.uint32) for array in make(count, length, shared)]
    want = radix_mlp.compute_fold_and_scatter(*given, multiple)
    got = compat.compute_fold_and_scatter(*given, multiple)
    assert all(np.array_equal(w, g) for w, g in zip(want, got, strict=True)), (count, length, shared, multiple)
    seconds = processor_seconds(
        {
            "radix-mlp": lambda: radix_mlp.compute_fold_and_scatter(*given, multiple),
            "compat": lambda: compat.compute_fold_and_scatter(*given, multiple),
        },
        4 * rounds,
    )
    return {
        **dict(zip(GRID, (count, length, shared, multiple), strict=True)),
        "rows": len(got[0]),
        **{f"{name} us": value * 1e6 for name, value in seconds.items()},
        "radix-mlp / compat": seconds["radix-mlp"] / seconds["compat"],
    }


def cuda_row(name: str, rounds: int) -> dict[str, object]:
    given = [torch.from_numpy(array).cuda() for array in make(*BATCHES[name])]
    # Their interface takes int32 faster than int64; ours is given both.
    narrow = [x.int() for x in given]
    want, got = radix_mlp.compute_fold_and_scatter_torch(*narrow), torch.ops.radix.fold(*given)
    assert all(torch.equal(w.long(), g.long()) for w, g in zip(want, got, strict=True)), name
    functions = {
        "radix-mlp": lambda: radix_mlp.compute_fold_and_scatter_torch(*narrow),
        "radix-mlp int64": lambda: radix_mlp.compute_fold_and_scatter_torch(*given),
        "fold": lambda: torch.ops.radix.fold(*given),
        "fold int32": lambda: torch.ops.radix.fold(*narrow),
        "fold_plan": lambda: torch.ops.radix.fold_plan(*given),
    }
    seconds = harness.seconds_per_call({n: synchronised(f) for n, f in functions.items()}, rounds)
    theirs = min(seconds["radix-mlp"], seconds["radix-mlp int64"])
    return {
        "batch": name,
        "tokens": len(given[0]),
        "rows": len(got[0]),
        **{f"{method} ms": value * 1e3 for method, value in seconds.items()},
        "radix-mlp / fold": theirs / seconds["fold"],
        "radix-mlp / fold_plan": theirs / seconds["fold_plan"],
        "target": TARGETS["cuda"].get(name, ""),
    }


def batch_row(count: int, prefix: int, own: int, rounds: int) -> dict[str, object]:
    ids, _, ends = (torch.from_numpy(x).cuda() for x in make(count, prefix + own, 0.0))
    padded = ids.view(count, -1)
    padded[:, :prefix] = padded[0, :prefix].clone()
    mask, lists = torch.ones_like(padded), padded.tolist()
    mask[0, -1] = 0
    functions = {
        "fold": lambda: fold(ids, ends),
        "fold and plan": lambda: plan_attention(fold(ids, ends), "trie"),
        "from_padded": lambda: FoldedBatch.from_padded(padded, mask),
        "from lists": lambda: FoldedBatch.from_sequences(lists, device="cuda"),
    }
    seconds = harness.seconds_per_call({n: synchronised(f) for n, f in functions.items()}, rounds)
    return {
        "batch": f"{count} x ({prefix} + {own})",
        "tokens": len(ids),
        "rows": fold(ids, ends).num_rows,
        **{f"{way} us": value * 1e6 for way, value in seconds.items()},
    }


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    def call():
        function()
        torch.cuda.synchronize()

    return call


def cpu_cases() -> dict[str, list[harness.Case]]:
    return {
        "fold_cpu": [functools.partial(cpu_row, name) for name in BATCHES],
        "fold_grid_cpu": [functools.partial(grid_row, *cell) for cell in itertools.product(*GRID.values())],
    }


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__, devices=harness.DEVICES))
    if args.device == "cpu":
        harness.report_cases(cpu_cases(), args)
    else:
        harness.report("fold_cuda", [cuda_row(name, args.rounds) for name in BATCHES], args.save)
        harness.report("fold_batch_cuda", [batch_row(*shape, args.rounds) for shape in SHAPES], args.save)


if __name__ == "__main__":
    main()
