"""gather on the CPU against index_select: rows of hidden states, ids, and a call that is all overhead."""

from __future__ import annotations

import torch

import harness
import radix_ops  # noqa: F401  (registers torch.ops.radix)

GATHER = torch.ops.radix.gather
SHAPES = {  # rows, row, packed tokens
    "8 x 8 by 8, overhead": (8, (8,), 8, torch.float32),
    "10,240 rows of 1024, N/M 7.2": (10_240, (1024,), 73_728, torch.bfloat16),
    "10,240 rows of 4096 B, N/M 7.2": (10_240, (1024,), 73_728, torch.float32),
    "K of 8 heads x 128": (10_240, (8, 128), 73_728, torch.bfloat16),
    "576 wide, N/M 4": (2_000, (576,), 8_000, torch.float32),
    "ids": (10_240, (), 73_728, torch.int64),
}


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__))
    rows = []
    for name, (count, row, length, dtype) in SHAPES.items():
        x = torch.randn(count, *row).mul(100).to(dtype)
        index = torch.randint(0, count, (length,), dtype=torch.int32).sort().values
        wide_index = index.long()
        assert torch.equal(GATHER(x, index), x.index_select(0, index))
        seconds = harness.seconds_per_call(
            {
                "index_select": lambda x=x, i=wide_index: x.index_select(0, i),
                "gather": lambda x=x, i=index: GATHER(x, i),
            },
            args.rounds,
        )
        rows.append(
            {
                "shape": name,
                "dtype": str(dtype).removeprefix("torch."),
                "index_select us": seconds["index_select"] * 1e6,
                "gather us": seconds["gather"] * 1e6,
                "index_select / gather": seconds["index_select"] / seconds["gather"],
            }
        )
    harness.report("gather_cpu", rows, args.save)


if __name__ == "__main__":
    main()
