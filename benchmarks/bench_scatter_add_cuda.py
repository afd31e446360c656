"""scatter_add on a CUDA device against index_add_, by time, by share of copy bandwidth and by error.

index_add_ includes making the zeros that it adds to, by the faster of int32 and int64 indices. Each call reads another
copy of the source than the calls before it. The error is the Frobenius norm relative to a float64 sum, over that of
rounding the exact sum once.
"""

from __future__ import annotations

import torch

import harness
from bench_scatter_add_cpu import error

RADIX = torch.ops.radix
BATCHES = {  # sequences, shared prefix, own tokens
    "32 x (2048 + 256)": (32, 2048, 256),
    "64 x (128 + 128)": (64, 128, 128),
    "32 x (0 + 2304)": (32, 0, 2304),
    "20000 x (1 + 3)": (20_000, 1, 3),  # one row of 20,000 members
}


def index_add(src: torch.Tensor, num_rows: int, index: torch.Tensor) -> torch.Tensor:
    return src.new_zeros(num_rows, src.shape[1]).index_add_(0, index, src)


def main() -> None:
    args = harness.parse_cuda(harness.make_parser(__doc__))
    measured = harness.bandwidths()
    rows = []
    for name, shape in BATCHES.items():
        batch = harness.shared_prefix_batch(*shape)
        index, wide, num_rows = batch.unfold_index, batch.unfold_index.long(), batch.num_rows
        inverse = (index, batch.unfold_indptr, batch.unfold_members)
        for dtype, width in ((torch.bfloat16, 4096), (torch.bfloat16, 1024), (torch.float32, 1024)):
            src = torch.randn(batch.num_tokens, width, device="cuda").to(dtype)
            exact = torch.zeros(num_rows, width, dtype=torch.float64, device="cuda").index_add_(0, wide, src.double())
            sources = harness.rotating(src)
            functions = {
                "index_add_": lambda s=sources, n=num_rows, i=wide: index_add(next(s), n, i),
                "index_add_ int32": lambda s=sources, n=num_rows, i=index: index_add(next(s), n, i),
                "scatter_add": lambda s=sources, n=num_rows, i=index: RADIX.scatter_add(next(s), i, n),
                "scatter_add.csr": lambda s=sources, n=num_rows, i=inverse: RADIX.scatter_add.csr(next(s), *i, n),
            }
            errors = {method: error(function(), exact) for method, function in functions.items()}
            once = error(exact.to(dtype), exact)
            assert errors["scatter_add"] == errors["scatter_add.csr"]
            assert dtype != torch.bfloat16 or errors["scatter_add"] <= 1.1 * once
            del exact
            seconds = harness.cuda_seconds_per_call(functions, args.rounds)
            seconds["index_add_"] = min(seconds["index_add_"], seconds.pop("index_add_ int32"))
            moved = (batch.num_tokens + num_rows) * width * src.element_size()
            rows.append(
                {
                    "batch": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "row": width,
                    **{f"{method} us": value * 1e6 for method, value in seconds.items()},
                    "index_add_ / .csr": seconds["index_add_"] / seconds["scatter_add.csr"],
                    ".csr over copy bandwidth": moved / seconds["scatter_add.csr"] / measured["copy"],
                    "index_add_ error": errors["index_add_"],
                    "our error": errors["scatter_add"],
                    "error / one rounding": errors["scatter_add"] / once if once else 1.0,
                }
            )
    harness.report("scatter_add_cuda", rows, args.save, {f"{k} TB/s": v / 1e12 for k, v in measured.items()})


if __name__ == "__main__":
    main()
