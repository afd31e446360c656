"""scatter_add against index_add_, by time and by error against a float64 sum.

The error is the Frobenius norm relative to that sum. With --device cuda the table tells the share of copy bandwidth
too; index_add_ includes making the zeros that it adds to, by the faster of int32 and int64 indices, and each call reads
another copy of the source than the calls before it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

import harness
from radix_ops import FoldedBatch

RADIX = torch.ops.radix
BATCHES = {  # sequences, shared prefix, own tokens
    "32 x (2048 + 256)": (32, 2048, 256),
    "64 x (128 + 128)": (64, 128, 128),
}
CUDA_BATCHES = BATCHES | {
    "32 x (0 + 2304)": (32, 0, 2304),
    "20000 x (1 + 3)": (20_000, 1, 3),  # one row of 20,000 members
}
WIDTH = 1024
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def errors_of(functions: dict, src: torch.Tensor, index: torch.Tensor, num_rows: int) -> dict[str, float]:
    """Return the error of each function, and that of rounding the exact sum once; check ours."""
    exact = torch.zeros(num_rows, src.shape[1], dtype=torch.float64, device=src.device)
    exact.index_add_(0, index, src.double())
    errors = {name: error(function(), exact) for name, function in functions.items()}
    errors["one rounding"] = error(exact.to(src.dtype), exact)
    assert errors["scatter_add"] == errors["scatter_add.csr"]
    assert src.dtype != torch.bfloat16 or errors["scatter_add"] <= 1.1 * errors["one rounding"]
    return errors


def index_add(src: torch.Tensor, num_rows: int, index: torch.Tensor) -> torch.Tensor:
    return src.new_zeros(num_rows, src.shape[1]).index_add_(0, index, src)


def cpu_row(name: str, dtype: str, rounds: int) -> dict[str, object]:
    count, prefix, own = BATCHES[name]
    sequences = [[*range(prefix), *range(10_000 * (s + 1), 10_000 * (s + 1) + own)] for s in range(count)]
    batch = FoldedBatch.from_sequences(sequences)
    index, num_rows = batch.unfold_index, batch.num_rows
    wide = index.long()
    inverse = index, batch.unfold_indptr, batch.unfold_members
    src = torch.randn(batch.num_tokens, WIDTH).to(DTYPES[dtype])
    functions = {
        "index_add_": lambda: index_add(src, num_rows, wide),
        "scatter_add": lambda: RADIX.scatter_add(src, index, num_rows),
        "scatter_add.csr": lambda: RADIX.scatter_add.csr(src, *inverse, num_rows),
    }
    errors = errors_of(functions, src, wide, num_rows)
    seconds = harness.seconds_per_call(functions, rounds)
    return {
        "batch": name,
        "dtype": dtype,
        **{f"{method} ms": value * 1e3 for method, value in seconds.items()},
        "index_add_ / .csr": seconds["index_add_"] / seconds["scatter_add.csr"],
        "index_add_ error": errors["index_add_"],
        "our error": errors["scatter_add"],
        "error / one rounding": errors["scatter_add"] / errors["one rounding"],
    }


def cuda_rows(name: str, rounds: int, measured: dict[str, float]) -> Iterator[dict[str, object]]:
    batch = harness.shared_prefix_batch(*CUDA_BATCHES[name])
    index, wide, num_rows = batch.unfold_index, batch.unfold_index.long(), batch.num_rows
    inverse = (index, batch.unfold_indptr, batch.unfold_members)
    for dtype, width in (("bfloat16", 4096), ("bfloat16", 1024), ("float32", 1024)):
        src = torch.randn(batch.num_tokens, width, device="cuda").to(DTYPES[dtype])
        sources = harness.rotating(src)
        functions = {
            "index_add_": lambda s=sources: index_add(next(s), num_rows, wide),
            "index_add_ int32": lambda s=sources: index_add(next(s), num_rows, index),
            "scatter_add": lambda s=sources: RADIX.scatter_add(next(s), index, num_rows),
            "scatter_add.csr": lambda s=sources: RADIX.scatter_add.csr(next(s), *inverse, num_rows),
        }
        errors = errors_of(functions, src, wide, num_rows)
        seconds = harness.cuda_seconds_per_call(functions, rounds)
        seconds["index_add_"] = min(seconds["index_add_"], seconds.pop("index_add_ int32"))
        moved = (batch.num_tokens + num_rows) * width * src.element_size()
        once = errors["one rounding"]
        yield {
            "batch": name,
            "dtype": dtype,
            "row": width,
            **{f"{method} us": value * 1e6 for method, value in seconds.items()},
            "index_add_ / .csr": seconds["index_add_"] / seconds["scatter_add.csr"],
            ".csr over copy bandwidth": moved / seconds["scatter_add.csr"] / measured["copy"],
            "index_add_ error": errors["index_add_"],
            "our error": errors["scatter_add"],
            "error / one rounding": errors["scatter_add"] / once if once else 1.0,
        }


def cpu_cases() -> dict[str, list[harness.Case]]:
    return {"scatter_add_cpu": [functools.partial(cpu_row, *case) for case in itertools.product(BATCHES, DTYPES)]}


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__, devices=harness.DEVICES))
    if args.device == "cpu":
        harness.report_cases(cpu_cases(), args)
    else:
        measured = harness.bandwidths()
        rows = [row for name in CUDA_BATCHES for row in cuda_rows(name, args.rounds, measured)]
        harness.report("scatter_add_cuda", rows, args.save, harness.in_terabytes(measured))


if __name__ == "__main__":
    main()
