"""Plans of batches in which shared prefixes meet (folded) or padding stays small (padded).

    store = TokenStore.from_sequences(token_lists)
    plan = plan_folded(store, max_rows=16384)
    for indices in plan:  # of the sequences of a batch
        batch = radix_ops.FoldedBatch.from_sequences([store[i] for i in indices])

Sorted by their tokens, sequences stand beside those that they share most with, and a batch is a stretch of that order:
its trie has as many rows as tokens less what neighbours share. What is left to choose is where to cut, and the cuts
that lose the fewest shared tokens are found exactly, in one pass.

For several workers the batches are cut into shards of about equal cost: `plan.shards(8)`.
"""

from .flops import ForwardCost, attention_flops, weight_flops
from .planner import Plan, plan_folded, plan_padded
from .sharding import Shard, Shards
from .store import TokenStore

__all__ = [
    "ForwardCost",
    "Plan",
    "Shard",
    "Shards",
    "TokenStore",
    "attention_flops",
    "plan_folded",
    "plan_padded",
    "weight_flops",
]
