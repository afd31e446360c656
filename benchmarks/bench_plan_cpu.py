"""Plans of batches on the CPU, and their shards: time and memory for up to a million sequences, how even shards are
and, with --data, the rows of real prompts.

Sequences of 128 tokens are made in shuffled order, stored, planned and cut into 64 shards, each size in a process of
its own; memory is what that gained from before the store to after the shards. Real prompts, which tools/make_prompts.py
makes, are shuffled and planned; "grouped" are the batches of the same budget with the groups side by side, "one trie"
all of them in one batch.

Shards are cut by the FLOPs of a Qwen3-0.6B. Their rows are counted by folding each of their batches; "planned apart"
are the rows of plans made of each shard's sequences alone. Real prompts stand 100 times under different first tokens.
The worst imbalance is that of all batch sizes and numbers of shards tried that make 20 batches a shard or more.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from pathlib import Path

import numpy as np

import harness
from batches import Prompts, read_prompts
from radix_ops import FoldedBatch
from radix_ops.plan import ForwardCost, TokenStore, attention_flops, plan_folded, weight_flops

SIZES = (7_813, 78_125, 1_000_000)  # 10^6, 10^7 and 1.28 * 10^8 tokens
LENGTH, GROUP, SHARED = 128, 8, 96
BUDGETS = (8192, 16384, 65536)
SHARDED, COPIES = ("gsm8k_8shot_cot", "msmarco_rerank_top8"), 100
SHARDS = {1: 16384, 2: 16384, 4: 16384, 64: 2048}  # and the rows of their batches
TRIED_BUDGETS = (2048, 2560, 3072, 3584, 4096, 8192, 16384, 32768, 49152, 65536, 98304, 131072)
TRIED_SHARDS = (2, 4, 8, 16, 32, 64, 128)
_LAYER_WEIGHTS = 1024 * (16 + 2 * 8 + 16) * 128 + 3 * 1024 * 3072
QWEN3_06B = ForwardCost(28 * weight_flops(_LAYER_WEIGHTS), {None: 28 * attention_flops(16, 128, 128)})


def peak() -> int:
    """Return the most memory that the program had, that of the program that started it left out, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def many(count: int) -> dict:
    before = peak()
    order = np.random.default_rng(0).permutation(count)
    store, append = TokenStore(), 0.0
    for index in order:
        # Each sequence comes from seeds of its own, so that nothing but the store holds the data.
        group = np.random.Generator(np.random.SFC64(int(index) // GROUP)).integers(0, 150_000, SHARED, dtype=np.int32)
        own = np.random.Generator(np.random.SFC64(count + int(index))).integers(
            0, 150_000, LENGTH - SHARED, dtype=np.int32
        )
        ids = np.concatenate([group, own])
        started = time.perf_counter()
        store.append(ids)
        append += time.perf_counter() - started
    started = time.perf_counter()
    plan = plan_folded(store, max_rows=16384, cost=QWEN3_06B)
    planned = time.perf_counter()
    shards = plan.shards(64)
    ended = time.perf_counter()
    return {
        "data": f"{count:,} x {LENGTH}, shuffled groups of {GROUP}",
        "tokens": plan.num_tokens,
        "rows": plan.num_rows,
        "unplanned rows": plan.given_rows,
        "store s": append,
        "plan s": planned - started,
        "batches": len(plan),
        "64 shards ms": 1000 * (ended - planned),
        "imbalance": shards.imbalance,
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


def copied(prompts: Prompts, rng) -> TokenStore:
    """Put the prompts, shuffled, into a store so many times, each time under another first token."""
    sequences = [prompts.ids[a:b] for a, b in itertools.pairwise(prompts.cu)]
    store = TokenStore()
    for index in rng.permutation(COPIES * len(sequences)).tolist():
        copy, of = divmod(index, len(sequences))
        store.append(np.concatenate([[200_000 + copy], sequences[of]]))
    return store


def made(rng) -> dict[str, TokenStore]:
    """Make shapes that are hard to divide."""
    giant = [rng.integers(0, 150_000, 2000)]
    for _ in range(40_000):
        parent = giant[rng.integers(len(giant))][:1900]
        keep = rng.integers(min(200, len(parent)), len(parent) + 1)
        giant.append(np.concatenate([parent[:keep], rng.integers(0, 150_000, rng.integers(1, 200))]))
    tail = np.minimum(40 * rng.pareto(1.1, 40_000) + 4, 2048).astype(int)
    long = [rng.integers(0, 150_000, length) for length in [400_000, *[200] * 20_000]]
    copies = [np.full(2000, i) for i in range(2000) for _ in range(rng.integers(1, 40))]
    shapes = {
        "one giant trie": giant,
        "singletons with a long tail": [rng.integers(0, 150_000, length) for length in tail],
        "one sequence of 400,000 tokens": long,
        "duplicates": copies,
        "fewer batches than 64": long[1:101],
    }
    return {name: TokenStore.from_sequences(sequences) for name, sequences in shapes.items()}


def sharded(name: str, store: TokenStore, num_shards: int, budget: int) -> dict:
    plan = plan_folded(store, max_rows=budget, cost=QWEN3_06B)
    shards = plan.shards(num_shards)
    batches = [[[store[i] for i in plan[number]] for number in shard.batches] for shard in shards]
    rows = sum(FoldedBatch.from_sequences(batch).num_rows for shard in batches for batch in shard)
    apart = sum(plan_folded(TokenStore.from_sequences(itertools.chain(*b)), max_rows=budget).num_rows for b in batches)
    return {
        "data": name,
        "budget": budget,
        "shards": num_shards,
        "tokens": plan.num_tokens,
        "rows": plan.num_rows,
        "batches / shard": len(plan) / num_shards,
        "rows / plan": rows / plan.num_rows,
        "planned apart / plan": apart / plan.num_rows,
        "imbalance": shards.imbalance,
        "dearest batch / mean shard": float(plan.costs.max() * num_shards / plan.costs.sum()),
    }


def worst(name: str, store: TokenStore) -> dict:
    found = []
    for budget in TRIED_BUDGETS:
        plan = plan_folded(store, max_rows=budget, cost=QWEN3_06B)
        tried = (num_shards for num_shards in TRIED_SHARDS if len(plan) >= 20 * num_shards)
        found += [(plan.shards(num).imbalance, budget, num, len(plan) / num) for num in tried]
    names = ("worst imbalance", "budget", "shards", "batches / shard")
    return {"data": name, "cuts tried": len(found)} | dict(zip(names, max(found), strict=True))


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=None)
    parser.add_argument("--data", type=Path, help="a .npz of real prompts, as tools/make_prompts.py makes it")
    args = harness.parse(parser)
    data = read_prompts(args.data) if args.data else {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        harness.report("plan_cpu", pool.map(many, SIZES, chunksize=1), args.save)
    rng = np.random.default_rng(0)
    stores = {f"{name} x {COPIES}": copied(data[name], rng) for name in SHARDED if name in data}
    stores |= made(rng)
    cases = itertools.product(stores.items(), SHARDS.items())
    harness.report("plan_shards_cpu", [sharded(*of, *shards) for of, shards in cases], args.save)
    large = {name: store for name, store in stores.items() if store.num_tokens >= 10**6}
    harness.report("plan_imbalance_cpu", [worst(*of) for of in large.items()], args.save)
    if data:
        rng = np.random.default_rng(0)
        results = [real(name, prompts, budget, rng) for name, prompts in data.items() for budget in BUDGETS]
        harness.report("plan_real_cpu", results, args.save)


if __name__ == "__main__":
    main()
