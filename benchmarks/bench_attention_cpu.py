"""Attention over tries on the CPU: the trie layout's kernels against the compact layout, and packed sequences.

compact and packed run torch's scaled_dot_product_attention a run (a sequence) at a time; packed attends all tokens, as
where nothing is folded. Each is the best of several rounds that take turns; "both" is a forward and its backward. In
the comb each row of a long sequence has one more leaf.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

import harness
from radix_ops import FoldedBatch, attention, pack
from radix_ops._attention import attend, plan_attention

# Sequences that share a prefix, its length and that of the rest, and how many such groups there are.
SHAPES = {
    "15 x (2047 + 256)": (15, 2047, 256, 1),
    "64 x (100 + 90)": (64, 100, 90, 1),
    "8 groups of 8 x (60 + 110)": (8, 60, 110, 8),
    "4 x (1024 + 1024)": (4, 1024, 1024, 1),
    "6 groups of 4 x (1800 + 2)": (4, 1800, 2, 6),
    "16 x 256, nothing shared": (1, 0, 256, 16),
}
COMB = 400
# Heads of q, heads of k and v, head_dim.
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen3-0.6B": (16, 8, 128)}
LARGEST_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def sequences_of(shape: str) -> list[list[int]]:
    if shape not in SHAPES:
        return [[*range(i), 10**6] for i in range(1, COMB)] + [list(range(COMB))]
    count, shared, rest, groups = SHAPES[shape]
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(groups):
        prefix = rng.integers(0, 30_000, shared).tolist()
        sequences += [prefix + rng.integers(0, 30_000, rest).tolist() for _ in range(count)]
    return sequences


def row(shape: str, name: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    sequences = sequences_of(shape)
    folded = FoldedBatch.from_sequences(sequences)
    heads, kv_heads, size = HEADS[name]
    rows = [torch.randn(folded.num_rows, count, size).to(dtype) for count in (heads, kv_heads, kv_heads)]
    plans = {layout: plan_attention(folded, layout) for layout in ("trie", "compact")}
    calls = {layout: functools.partial(attend, *rows, folded, plan) for layout, plan in plans.items()}
    if shape in SHAPES:
        tokens = [folded.unfold(x) for x in rows]
        packed = pack(torch.tensor(list(itertools.chain.from_iterable(sequences))), folded.cu_seqlens)
        calls["packed"] = functools.partial(attend, *tokens, packed, plan_attention(packed, "compact"))
    exact = attention(*(x.double() for x in rows), folded, layout="compact")
    error = float((calls["trie"]() - exact).norm() / exact.norm())
    assert error < LARGEST_ERROR[dtype], error
    inputs = [x.clone().requires_grad_() for x in rows]
    grad = torch.randn_like(calls["trie"]())
    for layout, plan in plans.items():
        forward = functools.partial(attend, *inputs, folded, plan)
        calls[f"{layout} both"] = lambda f=forward: torch.autograd.grad(f(), inputs, grad)
    seconds = harness.seconds_per_call(calls, rounds)
    return {
        "shape": shape,
        "heads of": name,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": folded.num_nodes,
        "keys repeated": len(folded.kv_index) / folded.num_nodes,
        **{f"{call_name} ms": 1e3 * value for call_name, value in seconds.items()},
        "compact / trie": seconds["compact"] / seconds["trie"],
        "packed / trie": seconds["packed"] / seconds["trie"] if "packed" in seconds else None,
        "compact / trie, both": seconds["compact both"] / seconds["trie both"],
        "error": error,
    }


def cpu_cases() -> dict[str, list[harness.Case]]:
    # Unfolded, the comb has 100 times its rows.
    models = {shape: list(HEADS) for shape in SHAPES} | {f"comb of {COMB:,}": list(HEADS)[:1]}
    cases = [(shape, name, dtype) for shape, names in models.items() for name in names for dtype in LARGEST_ERROR]
    return {"attention_cpu": [functools.partial(row, *case) for case in cases]}


def main() -> None:
    args = harness.parse(harness.make_parser(__doc__, threads=2, rounds=5))
    harness.report_cases(cpu_cases(), args)


if __name__ == "__main__":
    main()
