"""scatter_add on the CPU against index_add_, by time and by error against a float64 sum."""

from __future__ import annotations

import torch

import harness
from radix_ops import FoldedBatch

BATCHES = {  # sequences, shared prefix, own tokens
    "32 x (2048 + 256)": (32, 2048, 256),
    "64 x (128 + 128)": (64, 128, 128),
}
WIDTH = 1024


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__))
    rows = []
    for name, (count, prefix, own) in BATCHES.items():
        sequences = [[*range(prefix), *range(10_000 * (s + 1), 10_000 * (s + 1) + own)] for s in range(count)]
        batch = FoldedBatch.from_sequences(sequences)
        index, num_rows = batch.unfold_index, batch.num_rows
        wide_index = index.long()
        inverse = batch.unfold_indptr, batch.unfold_members
        for dtype in (torch.bfloat16, torch.float32):
            src = torch.randn(batch.num_tokens, WIDTH).to(dtype)
            exact = torch.zeros(num_rows, WIDTH, dtype=torch.float64).index_add_(0, index, src.double())
            functions = {
                "index_add_": lambda src=src, n=num_rows, i=wide_index: src.new_zeros(n, WIDTH).index_add_(0, i, src),
                "scatter_add": lambda src=src, n=num_rows, i=index: torch.ops.radix.scatter_add(src, i, n),
                "scatter_add.csr": lambda src=src, n=num_rows, i=index, inverse=inverse: (
                    torch.ops.radix.scatter_add.csr(src, i, *inverse, n)
                ),
            }
            errors = {method: error(function(), exact) for method, function in functions.items()}
            once = error(exact.to(dtype), exact)
            assert errors["scatter_add"] == errors["scatter_add.csr"]
            assert dtype != torch.bfloat16 or errors["scatter_add"] <= 1.1 * once
            seconds = harness.seconds_per_call(functions, args.rounds)
            rows.append(
                {
                    "batch": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    **{f"{method} ms": value * 1e3 for method, value in seconds.items()},
                    "index_add_ / .csr": seconds["index_add_"] / seconds["scatter_add.csr"],
                    "index_add_ error": errors["index_add_"],
                    "our error": errors["scatter_add"],
                    "error / one rounding": errors["scatter_add"] / once,
                }
            )
    harness.report("scatter_add_cpu", rows, args.save)


if __name__ == "__main__":
    main()
