"""What the benchmarks share: alternating timing, the machine's description, JSON results and a table."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def make_parser(description: str, *, threads: int = 1, rounds: int = 7) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads, help=f"threads of torch (default: {threads})")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"alternating rounds, of which the best counts (default: {rounds})"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def seconds_per_call(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The best median of each function over rounds that alternate between them, so that noise hits all alike."""
    calls = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        function()
        calls[name] = max(3, int(0.03 / max((time.perf_counter() - start) / 2, 1e-7)))
    medians: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            # Calls too short for the clock are timed together.
            inner = 1 if calls[name] < 1000 else 100
            samples = []
            for _ in range(max(3, calls[name] // inner)):
                start = time.perf_counter()
                for _ in range(inner):
                    function()
                samples.append((time.perf_counter() - start) / inner)
            medians[name].append(statistics.median(samples))
    return {name: min(values) for name, values in medians.items()}


def environment() -> dict[str, object]:
    packages = {}
    for name in ("torch", "numpy", "radix-ops", "radix-mlp", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_name() -> str:
    """The processor as Linux describes it: model name and count."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def report(name: str, rows: list[dict[str, object]], save: bool) -> None:
    """Prints the rows as a table and, where asked to, writes them with the environment as JSON."""
    columns = list(rows[0])
    table = [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *table, strict=True)]
    for cells in [columns, ["-" * width for width in widths], *table]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
    if save:
        RESULTS.mkdir(exist_ok=True)
        content = {"benchmark": name, "environment": environment(), "rows": rows}
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
