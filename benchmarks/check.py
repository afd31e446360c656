"""Hold the benchmarks of the CPU to the saved ratios of a peer's time to that of our call.

`make bench-check` runs it in a few minutes on a quiet machine and fails where a ratio is below 0.8 of that in
benchmarks/results. Times are never compared, since they are a machine's; ratios too depend on the processor, and the
table names that of the saved ones. A case that is below is measured twice more, each time in a process of its own,
since where large arrays lie in memory can make a ratio 0.7 times another process'; its best one counts. Batches of
seconds a call are left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

import bench_attention_cpu
import bench_fold
import bench_gather
import bench_qwen3
import bench_scatter_add
import harness
from batches import Batch

LEAST = 0.8
ROUNDS, MEASUREMENTS = 3, 3
# By table: the columns that tell a row from the others, and its ratios of a peer's time to ours.
COLUMNS = {
    "fold_cpu": (["batch"], ["radix-mlp / fold"]),
    "fold_grid_cpu": (list(bench_fold.GRID), ["radix-mlp / compat"]),
    "gather_cpu": (["shape"], ["index_select / gather"]),
    "scatter_add_cpu": (["batch", "dtype"], ["index_add_ / .csr"]),
    "attention_cpu": (["shape", "heads of", "dtype"], ["packed / trie", "compact / trie"]),
    "qwen3_small_cpu": (["batch"], ["packed / compact", "packed / trie", "transformers / best"]),
}
ATTENTION = ("64 x (100 + 90)", "8 groups of 8 x (60 + 110)", "16 x 256, nothing shared")
QWEN3 = [(4, 511, 256), (4, 0, 1024)]


def cases() -> dict[str, list[harness.Case]]:
    found = bench_fold.cpu_cases() | bench_gather.cpu_cases() | bench_scatter_add.cpu_cases()
    for name, rows in bench_attention_cpu.cpu_cases().items():
        found[name] = [row for row in rows if row.args[0] in ATTENTION]
    model = bench_qwen3.make_model("small", "cpu", torch.float32)
    theirs = bench_qwen3.make_theirs(model, "small")
    found["qwen3_small_cpu"] = [functools.partial(qwen3_row, model, theirs, shape) for shape in QWEN3]
    return found


@torch.no_grad()
def qwen3_row(model, theirs, shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    batch = Batch.synthetic(*shape, "cpu")
    return bench_qwen3.forward_row(
        "small", model, theirs, batch, types.SimpleNamespace(rounds=rounds, budget=10, least_rounds=3), 0.0
    )


def saved_table(name: str) -> dict:
    return json.loads((harness.RESULTS / f"{name}.json").read_text())


def measure_apart(name: str, at: int) -> dict[str, object]:
    """Measure a case in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, name, at, torch.get_num_threads()).result()


def _measure(name: str, at: int, num_threads: int) -> dict[str, object]:
    torch.set_num_threads(num_threads)
    return cases()[name][at](ROUNDS)


def shares(name: str, rows: list[harness.Case]) -> Iterator[tuple[str, str, float, float]]:
    """Yield each ratio of each case: its name, the case, the saved ratio and the one measured here."""
    content = saved_table(name)
    torch.set_num_threads(content["environment"]["threads"])
    keys, ratios = COLUMNS[name]
    saved = {tuple(row[key] for key in keys): row for row in content["rows"]}
    for at, measure in enumerate(rows):
        best: dict[str, float] = {}
        for turn in range(MEASUREMENTS):
            row = measure(ROUNDS) if turn == 0 else measure_apart(name, at)
            case = tuple(row[key] for key in keys)
            for ratio in ratios:
                if row[ratio] is not None:
                    best[ratio] = max(best.get(ratio, 0.0), row[ratio])
            if all(found >= LEAST * saved[case][ratio] for ratio, found in best.items()):
                break
        for ratio, found in best.items():
            yield ratio, ", ".join(map(str, case)), saved[case][ratio], found


def main() -> None:
    below = []
    for name, rows in cases().items():
        print(f"\n{name}, saved on {saved_table(name)['environment']['cpu']}:", flush=True)
        summary = []
        for ratio, group in itertools.groupby(sorted(shares(name, rows)), key=lambda share: share[0]):
            lines = [
                {"table": name, "ratio": ratio, "case": case, "saved": saved, "here": here, "share": here / saved}
                for _, case, saved, here in group
            ]
            worst = min(lines, key=lambda line: line["share"])
            summary.append({"ratio": ratio, "cases": len(lines), "least share": worst["share"], "case": worst["case"]})
            below += [line for line in lines if line["share"] < LEAST]
        harness.report(name, summary, save=False)
    if below:
        print(f"\nBelow {LEAST} of the saved ratio:")
        harness.report("below", below, save=False)
        raise SystemExit(1)
    print(f"\nOn {harness.cpu_name()} every ratio is at least {LEAST} of the saved one.")


if __name__ == "__main__":
    main()
