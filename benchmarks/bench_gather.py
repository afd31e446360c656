"""gather against index_select.

--device cpu gathers rows of hidden states, ids, and makes a call that is all overhead.
--device cuda gathers K and V together too, against two index_selects. The share is the time that reading each row once
and writing each result once would take at the memory's measured bandwidths, over the time taken: by the bandwidth of
fill in fp32, which is the highest seen, and in bf16. Each call reads another copy of the rows than the calls before it;
a result that fits in the cache is written faster all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import harness
import radix_ops  # noqa: F401  (registers torch.ops.radix)

RADIX = torch.ops.radix
SHAPES = {  # rows, row, packed tokens
    "8 x 8 by 8, overhead": (8, (8,), 8, torch.float32),
    "10,240 rows of 1024, N/M 7.2": (10_240, (1024,), 73_728, torch.bfloat16),
    "10,240 rows of 4096 B, N/M 7.2": (10_240, (1024,), 73_728, torch.float32),
    "K of 8 heads x 128": (10_240, (8, 128), 73_728, torch.bfloat16),
    "576 wide, N/M 4": (2_000, (576,), 8_000, torch.float32),
    "ids": (10_240, (), 73_728, torch.int64),
}
BATCHES = {  # sequences, shared prefix, own tokens
    "32 x (2048 + 256)": (32, 2048, 256),
    "32 x (0 + 2304)": (32, 0, 2304),
    "64 x (128 + 128)": (64, 128, 128),
    "8 x (100 + 28)": (8, 100, 28),
}


def cpu_row(name: str, rounds: int) -> dict[str, object]:
    count, row, length, dtype = SHAPES[name]
    x = torch.randn(count, *row).mul(100).to(dtype)
    index = torch.randint(0, count, (length,), dtype=torch.int32).sort().values
    wide_index = index.long()
    assert torch.equal(RADIX.gather(x, index), x.index_select(0, index))
    seconds = harness.seconds_per_call(
        {"index_select": lambda: x.index_select(0, wide_index), "gather": lambda: RADIX.gather(x, index)}, rounds
    )
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "index_select us": seconds["index_select"] * 1e6,
        "gather us": seconds["gather"] * 1e6,
        "index_select / gather": seconds["index_select"] / seconds["gather"],
    }


def cuda_rows(name: str, rounds: int, measured: dict[str, float]) -> Iterator[dict[str, object]]:
    batch = harness.shared_prefix_batch(*BATCHES[name])
    index, wide = batch.unfold_index, batch.unfold_index.long()
    inverse = (index, batch.unfold_indptr, batch.unfold_members)
    for width in (4096, 1024):
        x = torch.randn(batch.num_rows, width, device="cuda").bfloat16()
        want = x.index_select(0, wide)
        assert torch.equal(RADIX.gather(x, index), want)
        assert torch.equal(RADIX.gather.csr(x, *inverse), want)
        del want
        xs = harness.rotating(x)
        functions = {
            "index_select": lambda xs=xs: next(xs).index_select(0, wide),
            "index_select int32": lambda xs=xs: next(xs).index_select(0, index),
            "gather": lambda xs=xs: RADIX.gather(next(xs), index),
            "gather.csr": lambda xs=xs: RADIX.gather.csr(next(xs), *inverse),
        }
        seconds = harness.cuda_seconds_per_call(functions, rounds)
        yield cuda_row(name, f"{width}", batch, 2 * width, seconds, "gather", measured)
    k, v = (torch.randn(batch.num_rows, 8, 128, device="cuda").bfloat16() for _ in range(2))
    for got in (RADIX.gather_kv(k, v, index), RADIX.gather_kv.csr(k, v, *inverse)):
        assert torch.equal(got[0], k.index_select(0, wide))
        assert torch.equal(got[1], v.index_select(0, wide))
    ks, vs = harness.rotating(k), harness.rotating(v)
    functions = {
        "index_select": lambda: (next(ks).index_select(0, wide), next(vs).index_select(0, wide)),
        "index_select int32": lambda: (next(ks).index_select(0, index), next(vs).index_select(0, index)),
        "gather_kv": lambda: RADIX.gather_kv(next(ks), next(vs), index),
        "gather_kv.csr": lambda: RADIX.gather_kv.csr(next(ks), next(vs), *inverse),
    }
    seconds = harness.cuda_seconds_per_call(functions, rounds)
    yield cuda_row(name, "K and V, 8 x 128", batch, 2 * 2 * 8 * 128, seconds, "gather_kv", measured)


def cuda_row(name, width, batch, row_bytes, seconds, method, measured) -> dict[str, object]:
    theirs = min(seconds["index_select"], seconds["index_select int32"])
    read = batch.num_rows * row_bytes / measured["read"]
    ideal = {fill: read + batch.num_tokens * row_bytes / measured[fill] for fill in ("fill", "fill bf16")}
    return {
        "batch": name,
        "N/M": batch.num_tokens / batch.num_rows,
        "row": width,
        "index_select us": theirs * 1e6,
        "gather us": seconds[method] * 1e6,
        ".csr us": seconds[f"{method}.csr"] * 1e6,
        "index_select / gather": theirs / seconds[method],
        "index_select / .csr": theirs / seconds[f"{method}.csr"],
        "share": ideal["fill"] / seconds[method],
        "share .csr": ideal["fill"] / seconds[f"{method}.csr"],
        "share by bf16 fill": ideal["fill bf16"] / seconds[method],
        "share .csr by bf16 fill": ideal["fill bf16"] / seconds[f"{method}.csr"],
    }


def cpu_cases() -> dict[str, list[harness.Case]]:
    return {"gather_cpu": [functools.partial(cpu_row, name) for name in SHAPES]}


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__, devices=harness.DEVICES))
    if args.device == "cpu":
        harness.report_cases(cpu_cases(), args)
    else:
        measured = harness.bandwidths()
        rows = [row for name in BATCHES for row in cuda_rows(name, args.rounds, measured)]
        harness.report("gather_cuda", rows, args.save, harness.in_terabytes(measured))


if __name__ == "__main__":
    main()
