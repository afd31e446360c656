"""gather on a CUDA device against index_select, and K and V together against two index_selects.

The share is the time that reading each row once and writing each result once would take at the memory's measured
bandwidths, over the time taken: by the bandwidth of fill in fp32, which is the highest seen, and in bf16. Each call
reads another copy of the rows than the calls before it; a result that fits in the cache is written faster all the same.
"""

from __future__ import annotations

import torch

import harness

RADIX = torch.ops.radix
BATCHES = {  # sequences, shared prefix, own tokens
    "32 x (2048 + 256)": (32, 2048, 256),
    "32 x (0 + 2304)": (32, 0, 2304),
    "64 x (128 + 128)": (64, 128, 128),
    "8 x (100 + 28)": (8, 100, 28),
}


def main() -> None:
    args = harness.parse_cuda(harness.make_parser(__doc__))
    measured = harness.bandwidths()
    rows = []
    for name, shape in BATCHES.items():
        batch = harness.shared_prefix_batch(*shape)
        index, wide = batch.unfold_index, batch.unfold_index.long()
        inverse = (index, batch.unfold_indptr, batch.unfold_members)
        tokens_per_row = batch.num_tokens / batch.num_rows
        for width in (4096, 1024):
            x = torch.randn(batch.num_rows, width, device="cuda").bfloat16()
            want = x.index_select(0, wide)
            assert torch.equal(RADIX.gather(x, index), want)
            assert torch.equal(RADIX.gather.csr(x, *inverse), want)
            del want
            xs = harness.rotating(x)
            seconds = harness.cuda_seconds_per_call(
                {
                    "index_select": lambda xs=xs, i=wide: next(xs).index_select(0, i),
                    "index_select int32": lambda xs=xs, i=index: next(xs).index_select(0, i),
                    "gather": lambda xs=xs, i=index: RADIX.gather(next(xs), i),
                    "gather.csr": lambda xs=xs, inverse=inverse: RADIX.gather.csr(next(xs), *inverse),
                },
                args.rounds,
            )
            rows.append(row(name, f"{width}", tokens_per_row, seconds, "gather", x, batch, measured))
        k, v = (torch.randn(batch.num_rows, 8, 128, device="cuda").bfloat16() for _ in range(2))
        for got in (RADIX.gather_kv(k, v, index), RADIX.gather_kv.csr(k, v, *inverse)):
            assert torch.equal(got[0], k.index_select(0, wide))
            assert torch.equal(got[1], v.index_select(0, wide))
        ks, vs = harness.rotating(k), harness.rotating(v)
        seconds = harness.cuda_seconds_per_call(
            {
                "index_select": lambda ks=ks, vs=vs, i=wide: (next(ks).index_select(0, i), next(vs).index_select(0, i)),
                "index_select int32": lambda ks=ks, vs=vs, i=index: (
                    next(ks).index_select(0, i),
                    next(vs).index_select(0, i),
                ),
                "gather_kv": lambda ks=ks, vs=vs, i=index: RADIX.gather_kv(next(ks), next(vs), i),
                "gather_kv.csr": lambda ks=ks, vs=vs, i=inverse: RADIX.gather_kv.csr(next(ks), next(vs), *i),
            },
            args.rounds,
        )
        rows.append(
            row(name, "K and V, 8 x 128", tokens_per_row, seconds, "gather_kv", torch.cat([k, v], 1), batch, measured)
        )
    harness.report("gather_cuda", rows, args.save, {f"{k} TB/s": v / 1e12 for k, v in measured.items()})


def row(name, width, tokens_per_row, seconds, method, x, batch, measured) -> dict[str, object]:
    row_bytes = x[0].numel() * x.element_size()
    theirs = min(seconds["index_select"], seconds["index_select int32"])
    read = batch.num_rows * row_bytes / measured["read"]
    ideal = {fill: read + batch.num_tokens * row_bytes / measured[fill] for fill in ("fill", "fill bf16")}
    return {
        "batch": name,
        "N/M": tokens_per_row,
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


if __name__ == "__main__":
    main()
