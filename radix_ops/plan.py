"""Which sequences go into which batch, so that shared prefixes meet (folded) or padding stays small (plain)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

MAX_PADDING = 0.05  # of a plain batch's tokens
MAX_PADDED_AREA = 4  # times the token budget: bounds the padded hidden states that a folded batch returns
NEGLIGIBLE_SHARE = 16  # tokens: sharing counts in steps of this size where a batch is cut
MIN_SORT_GAIN = 0.02  # of the tokens: less is not worth leaving the input's order


@dataclass(frozen=True)
class Sequence:
    """One choice behind its context, as int32 token ids; the model reads all tokens but the last."""

    item: int
    choice: int
    context: np.ndarray  # [context_len], one array shared by all choices of an item
    continuation: np.ndarray  # [continuation_len], the scored tokens

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation) - 1

    @property
    def inputs(self) -> np.ndarray:
        return np.concatenate([self.context, self.continuation[:-1]])  # [length]


def plan_folded(sequences: list[Sequence], token_budget: int) -> list[list[int]]:
    """Batches of sequence indices that keep what shares a prefix together, each at most `token_budget` packed tokens.

    The input's order stays unless sorting items by their tokens shares clearly more. A batch ends in the second half
    of what fits, where neighbours share least: between items rather than between an item's choices, between groups
    rather than between their items. A sequence longer than the budget is a batch of its own.
    """
    order = _group_order(sequences)
    shared = [0] + [_shared_len(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]

    def cost(cut):
        before, after = sequences[order[cut - 1]], sequences[order[cut]]
        return before.item == after.item, shared[cut] // NEGLIGIBLE_SHARE

    batches, start = [], 0
    while start < len(order):
        end, packed, longest = start, 0, 0
        while end < len(order):
            length = sequences[order[end]].length
            packed, longest = packed + length, max(longest, length)
            full = packed > token_budget or (end + 1 - start) * longest > MAX_PADDED_AREA * token_budget
            if full and end > start:
                break
            end += 1
        if end < len(order):
            end = min(range(end, (start + end) // 2, -1), key=cost)
        batches.append(order[start:end])
        start = end
    return batches


def _group_order(sequences: list[Sequence]) -> list[int]:
    groups: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.item, []).append(index)
    given = list(groups.values())
    # Big-endian bytes compare as the token lists do, at memcmp's speed.
    by_tokens = sorted(given, key=lambda group: sequences[group[0]].inputs.astype(">i4").tobytes())

    def neighbours_share(order):
        return sum(_shared_len(sequences[a[0]], sequences[b[0]]) for a, b in itertools.pairwise(order))

    gain = neighbours_share(by_tokens) - neighbours_share(given)
    best = by_tokens if gain > MIN_SORT_GAIN * sum(sequences[group[0]].length for group in given) else given
    return [index for group in best for index in group]


def _shared_len(a: Sequence, b: Sequence) -> int:
    skip = len(a.context) if a.context is b.context else 0
    left, right = (a.continuation[:-1], b.continuation[:-1]) if skip else (a.inputs, b.inputs)
    size = min(len(left), len(right))
    differing = np.flatnonzero(left[:size] != right[:size])
    return skip + int(differing[0] if len(differing) else size)


def plan_plain(sequences: list[Sequence], token_budget: int) -> list[list[int]]:
    """Batches of sequence indices sorted by length, longest first, padding at most MAX_PADDING of a batch's tokens."""
    batches: list[list[int]] = []
    packed = longest = 0
    for index in sorted(range(len(sequences)), key=lambda i: -sequences[i].length):
        length = sequences[index].length
        packed += length
        padding = longest * (len(batches[-1]) + 1) - packed if batches else 0
        if not batches or packed > token_budget or padding > MAX_PADDING * packed:
            batches.append([])
            packed = longest = length
        batches[-1].append(index)
    return batches
