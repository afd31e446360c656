"""Common parts of the benchmarks: alternating timing, the machine's description, JSON results and a table."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import radix_ops

RESULTS = Path(__file__).parent / "results"
DEVICES = ("cpu", "cuda")
FLASH_PACKAGES = ("fa3-fwd", "flash-attn-4")  # the faster forward before the other
# A case measures one row of a benchmark's table, in so many rounds.
Case = Callable[[int], dict[str, object]]


def make_parser(
    description: str, *, threads: int = 1, rounds: int | None = 7, devices: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """Make a parser of the options that benchmarks have in common; --device where there are several devices.

    rounds: None leaves --rounds out.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads, help=f"threads of torch (default: {threads})")
    if rounds is not None:
        help_text = f"alternating rounds, of which the best counts (default: {rounds})"
        parser.add_argument("--rounds", type=int, default=rounds, help=help_text)
    if devices:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=devices, default=found, help=f"default: {found}, as found")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is found; --device cpu measures without one")
    for name in ("threads", "rounds"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    return args


def add_flash_option(parser: argparse.ArgumentParser) -> None:
    """Add --flash-attention, which takes the best that is installed where it is not given."""
    found = "torch"
    if torch.cuda.is_available():
        for found in (*FLASH_PACKAGES, "torch"):
            with contextlib.suppress(RuntimeError):  # not installed
                radix_ops.activate_flash_attention(found)
                break
        radix_ops.activate_flash_attention("torch")
    help_text = f'whose flash attention "best packed" runs (default: {found}, the best that is installed)'
    parser.add_argument("--flash-attention", choices=("torch", *FLASH_PACKAGES), default=found, help=help_text)


def seconds_per_call(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the best median of each function over rounds that alternate between them, so that noise hits all alike."""
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


def parse_cuda(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parse(parser)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    return args


def cuda_seconds_per_call(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the best median of each function, between CUDA events around calls that don't wait for each other."""
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        calls[name] = max(2, min(200, int(2e-3 / _event_seconds(function, 5))))
    medians: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            medians[name].append(statistics.median(_event_seconds(function, calls[name]) for _ in range(5)))
    return {name: min(values) for name, values in medians.items()}


def _event_seconds(function: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def rotating(tensor: torch.Tensor) -> itertools.cycle:
    """Return copies of a tensor in turn, as many as the second-level cache can't hold three times over, 64 at most.

    A call that finds its input in the cache, because the call before it read the same, looks faster than memory is.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = tensor.numel() * tensor.element_size()
    count = min(64, -(-3 * cache // max(size, 1)))
    return itertools.cycle([tensor] + [tensor.clone() for _ in range(count - 1)])


def bandwidths() -> dict[str, float]:
    """Measure bytes a second of the device's memory, by torch's own kernels over 1 GiB: the best of a few ways each.

    copy counts bytes read and written. fill is the fastest dtype's (fp32); torch fills bf16 more slowly.
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    half = target.view(torch.bfloat16)
    size = source.numel() * source.element_size()
    seconds = cuda_seconds_per_call(
        {
            "copy": lambda: target.copy_(source),
            "fill": lambda: target.fill_(1.37),
            "fill bf16": lambda: half.fill_(1.37),
            "read": lambda: source.sum(),
            "read by amax": lambda: source.amax(),
        },
        rounds=3,
    )
    return {
        "copy": 2 * size / seconds["copy"],
        "fill": size / seconds["fill"],
        "fill bf16": size / seconds["fill bf16"],
        "read": size / min(seconds["read"], seconds["read by amax"]),
    }


def in_terabytes(measured: dict[str, float]) -> dict[str, float]:
    """Return bandwidths in TB/s, named so, for `report`."""
    return {f"{name} TB/s": value / 1e12 for name, value in measured.items()}


def environment() -> dict[str, object]:
    packages = {"radix_ops": radix_ops.__version__}
    for name in ("torch", "numpy", "radix-mlp", "transformers", *FLASH_PACKAGES):
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
    } | (cuda_environment() if torch.cuda.is_available() else {})


def cuda_environment() -> dict[str, object]:
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "cuda": torch.version.cuda,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
    }


def cpu_name() -> str:
    """Return the processor as Linux describes it: model name and count."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def shared_prefix_batch(count: int, prefix: int, own: int, device: str = "cuda") -> radix_ops.FoldedBatch:
    """Fold `count` sequences that share `prefix` tokens and have `own` more each."""
    length = prefix + own
    ids = torch.arange(count * length).view(count, length)
    ids[:, :prefix] = ids[0, :prefix]
    return radix_ops.fold(ids.flatten().to(device), (torch.arange(count + 1) * length).to(device))


def report(
    name: str, rows: list[dict[str, object]], save: bool, measured: Mapping[str, float | None] | None = None
) -> None:
    """Print the rows as a table and, where asked to, write them with the environment as JSON.

    `measured` are figures of the machine that the rows are to be read against.
    """
    for label, value in (measured or {}).items():
        print(f"{label}: {_text(value)}")
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    table = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *table, strict=True)]
    for cells in [columns, ["-" * width for width in widths], *table]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
    if save:
        path = write(name, rows, measured)
        print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def write(name: str, rows: list[dict[str, object]], measured: Mapping[str, float | None] | None = None) -> Path:
    """Write the rows with the environment as JSON."""
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "environment": environment()}
    content |= {"measured": dict(measured)} if measured else {}
    content["rows"] = rows
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def report_cases(cases: dict[str, list[Case]], args: argparse.Namespace) -> None:
    """Measure the cases of each table and report them; each is printed as soon as it is measured."""
    for name, cases_of_table in cases.items():
        rows = []
        for case in cases_of_table:
            rows.append(case(args.rounds))
            print(json.dumps(rows[-1]), flush=True)
        report(name, rows, args.save)


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
