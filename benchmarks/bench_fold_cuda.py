"""fold on a CUDA device against the radix-mlp package's torch interface, both given and giving CUDA tensors.

Each call is timed on the host's clock, from idle device to idle device.
"""

from __future__ import annotations

import radix_mlp
import torch

import harness
import radix_ops  # noqa: F401  (registers torch.ops.radix)
from bench_fold_cpu import BATCHES, make

TARGETS = {"32 x 2304, 0.89 shared": 20, "2048 x 512, 0.25 shared": 60}


def synchronised(function):
    def call():
        function()
        torch.cuda.synchronize()

    return call


def main() -> None:
    args = harness.parse_cuda(harness.make_parser(__doc__))
    rows = []
    for name, shape in BATCHES.items():
        given = [torch.from_numpy(array).cuda() for array in make(*shape)]
        # Their interface takes int32 faster than int64; ours is given both.
        narrow = [x.int() for x in given]
        want, got = radix_mlp.compute_fold_and_scatter_torch(*narrow), torch.ops.radix.fold(*given)
        assert all(torch.equal(w.long(), g.long()) for w, g in zip(want, got, strict=True)), name
        functions = {
            "radix-mlp": lambda given=narrow: radix_mlp.compute_fold_and_scatter_torch(*given),
            "radix-mlp int64": lambda given=given: radix_mlp.compute_fold_and_scatter_torch(*given),
            "fold": lambda given=given: torch.ops.radix.fold(*given),
            "fold int32": lambda given=narrow: torch.ops.radix.fold(*given),
            "fold_plan": lambda given=given: torch.ops.radix.fold_plan(*given),
        }
        seconds = harness.seconds_per_call({n: synchronised(f) for n, f in functions.items()}, args.rounds)
        theirs = min(seconds["radix-mlp"], seconds["radix-mlp int64"])
        rows.append(
            {
                "batch": name,
                "tokens": len(given[0]),
                "rows": len(got[0]),
                **{f"{method} ms": value * 1e3 for method, value in seconds.items()},
                "radix-mlp / fold": theirs / seconds["fold"],
                "radix-mlp / fold_plan": theirs / seconds["fold_plan"],
                "target": TARGETS.get(name, ""),
            }
        )
    harness.report("fold_cuda", rows, args.save)


if __name__ == "__main__":
    main()
