"""Plans of batches on the CPU: time and memory for a million sequences and, with --data, the rows of real prompts.

The million sequences of 128 tokens are made in shuffled order and stored; memory is what the process gained from before
the store to after the plan. Real prompts, which tools/make_prompts.py makes, are shuffled and planned;
"grouped" are the batches of the same budget with the groups side by side, "one trie" all of them in one batch.
"""

from __future__ import annotations

import itertools
import resource
import time
from pathlib import Path

import numpy as np

import harness
from batches import Prompts, read_prompts
from radix_ops.plan import TokenStore, plan_folded

SEQUENCES, LENGTH, GROUP, SHARED = 1_000_000, 128, 8, 96
BUDGETS = (8192, 16384, 65536)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def many(rng) -> dict:
    before = peak()
    order = rng.permutation(SEQUENCES)
    store, append = TokenStore(), 0.0
    for index in order:
        # Each sequence comes from seeds of its own, so that nothing but the store holds the data.
        group = np.random.Generator(np.random.SFC64(int(index) // GROUP)).integers(0, 150_000, SHARED, dtype=np.int32)
        own = np.random.Generator(np.random.SFC64(SEQUENCES + int(index))).integers(
            0, 150_000, LENGTH - SHARED, dtype=np.int32
        )
        ids = np.concatenate([group, own])
        started = time.perf_counter()
        store.append(ids)
        append += time.perf_counter() - started
    started = time.perf_counter()
    plan = plan_folded(store, max_rows=16384)
    return {
        "data": f"{SEQUENCES:,} x {LENGTH}, shuffled groups of {GROUP}",
        "tokens": plan.num_tokens,
        "rows": plan.num_rows,
        "unplanned rows": plan.given_rows,
        "store s": append,
        "plan s": time.perf_counter() - started,
        "memory / ids": (peak() - before) / (4 * plan.num_tokens),
    }


def real(name: str, prompts: Prompts, budget: int, rng) -> dict:
    ids = prompts.ids
    sequences = [ids[a:b] for a, b in itertools.pairwise(prompts.cu)]
    grouped = TokenStore.from_sequences(sequences)
    shuffled = TokenStore.from_sequences(sequences[i] for i in rng.permutation(len(sequences)))
    plan = plan_folded(shuffled, max_rows=budget)
    best = plan_folded(grouped, max_rows=budget, order="given").num_rows
    one_trie = plan_folded(grouped, max_rows=len(ids)).num_rows
    return {
        "data": name,
        "budget": budget,
        "tokens": plan.num_tokens,
        "unplanned rows": plan.given_rows,
        "rows": plan.num_rows,
        "grouped rows": best,
        "one trie": one_trie,
        "rows / grouped": plan.num_rows / best,
        "rows / one trie": plan.num_rows / one_trie,
    }


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=None)
    parser.add_argument("--data", type=Path, help="a .npz of real prompts, as tools/make_prompts.py makes it")
    args = harness.parse(parser)
    data = read_prompts(args.data) if args.data else {}
    rng = np.random.default_rng(0)
    harness.report("plan_cpu", [many(rng)], args.save)
    if data:
        results = [real(name, prompts, budget, rng) for name, prompts in data.items() for budget in BUDGETS]
        harness.report("plan_real_cpu", results, args.save)


if __name__ == "__main__":
    main()
