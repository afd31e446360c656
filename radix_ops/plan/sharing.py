"""The sharing of a data set: its trie, its shared prefixes, and the rows of batches by size and order.

    sharing = Sharing(store)  # one sort of the sequences
    sharing.num_tokens / sharing.num_rows  # what one trie of all of them would save
    sharing.batches(sharing.shuffled(), max_sequences=32).num_rows  # of a data loader's batches
    sharing.planned(max_rows=16384).num_rows  # of the planner's

All counts are exact. Sorted by their tokens, sequences stand beside those that they share most with; what any two
share is the least that neighbours between them share. So the tokens are read once, whatever is counted after.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch

from .flops import visible_keys
from .planner import TokenStore, cut, is_worth_sorting, plan_padded

SEED = 0  # for the shuffled order
LEAST_SPEED_UP = 1.05  # that pays: folding itself takes up to 5% where all rows stay
_SAMPLED_SEQUENCES, _SAMPLED_TOKENS = 10_000, 4_000_000


@dataclass(frozen=True, eq=False)
class Batches:
    """Sequences cut into batches: what each has and what it shares with others of its batch."""

    lengths: np.ndarray  # int64 [B] tokens (padded: positions) of each sequence, batch after batch
    shared: np.ndarray  # int64 [B] of them, those that a sequence before it in its batch has computed
    ends: np.ndarray  # int64 [batches] where each batch ends

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_rows(self) -> int:
        """Trie rows of all batches."""
        return int((self.lengths - self.shared).sum())

    def num_keys(self, window: int | None = None) -> int:
        """Return how many keys all rows attend to, causally, each to the `window` tokens up to it or to all."""
        return int((visible_keys(self.lengths, window) - visible_keys(self.shared, window)).sum())

    def num_padded_keys(self, window: int | None = None) -> int:
        """Return how many keys all positions attend to where each batch is padded to its longest sequence."""
        if not len(self):
            return 0
        sizes = np.diff(self.ends, prepend=0)
        longest = np.maximum.reduceat(self.lengths, self.ends - sizes)
        return int((sizes * visible_keys(longest, window)).sum())


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Prefixes that two or more sequences share, one for each place where the trie parts or sequences end.

    Each is counted beyond the next shorter one, so that what all save adds up to num_tokens - num_rows.
    """

    first: np.ndarray  # int64 [P] of the sequences in sorted order, the first that has it
    last: np.ndarray  # int64 [P] the last, included
    start: np.ndarray  # int64 [P] tokens of the next shorter shared prefix of them, 0 if there is none
    stop: np.ndarray  # int64 [P] tokens of the prefix

    def __len__(self) -> int:
        return len(self.first)

    @property
    def num_sequences(self) -> np.ndarray:
        return self.last - self.first + 1

    @property
    def num_saved(self) -> np.ndarray:
        """Tokens that need no row of their own because of it, int64 [P]."""
        return (self.last - self.first) * (self.stop - self.start)


class Sharing:
    """The prefixes that B sequences share. It takes O(tokens + B log B) time and about 100 bytes a sequence.

    lengths: int64 [B], in the caller's order; what stands behind them in the store does not count. order: int64 [B],
    the sequences sorted by their tokens. rank: its inverse. shared: int64 [B], how many tokens each of `order` shares
    with the one before it; 0 for the first.
    """

    def __init__(self, store: TokenStore, lengths: np.ndarray | None = None):
        self.lengths = store.lengths if lengths is None else lengths
        sequences = [torch.from_numpy(x) for x in (store.input_ids, store.starts, self.lengths)]
        order = torch.ops.radix.lexicographic_order(*sequences)
        self.shared = torch.ops.radix.common_prefix_lengths(*sequences, order).numpy()
        self.order = order.numpy()
        self.rank = _inverse(self.order)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_rows(self) -> int:
        """Rows of one trie that holds all sequences."""
        return self.num_tokens - int(self.shared.sum())

    @property
    def tokens_per_row(self) -> float:
        """Tokens over rows of that trie, the most that folding can save; 1 where there are no tokens."""
        return self.num_tokens / self.num_rows if self.num_rows else 1.0

    @property
    def num_common(self) -> int:
        """Tokens that all sequences start with; 0 for fewer than two."""
        return int(self.shared[1:].min()) if len(self) > 1 else 0

    @property
    def num_empty(self) -> int:
        return int((self.lengths == 0).sum())

    @property
    def num_duplicates(self) -> int:
        """Sequences, not empty, that are equal to one that was counted already."""
        return int(self._repeats().sum())

    @property
    def num_strict_prefixes(self) -> int:
        """Sequences, not empty and each counted once, that another one goes on from."""
        lengths = self.lengths[self.order]
        goes_on = np.append((self.shared[1:] == lengths[:-1]) & (lengths[1:] > lengths[:-1]), False)[: len(self)]
        return int((goes_on & (lengths > 0)).sum())

    def _repeats(self) -> np.ndarray:
        lengths = self.lengths[self.order]
        return (self.shared == lengths) & (np.append(0, lengths)[: len(self)] == lengths) & (lengths > 0)

    def given(self) -> np.ndarray:
        return np.arange(len(self))

    def shuffled(self) -> np.ndarray:
        """Return a shuffled order, the same every time."""
        return np.random.default_rng(SEED).permutation(len(self))

    def planned(self, **limits: int | None) -> Batches:
        """Return the batches of `plan_folded` within its limits, of which max_rows must be given."""
        given, best = (self.batches(order, **limits) for order in (self.given(), self.order))
        return best if is_worth_sorting(best.num_rows, given.num_rows) else given

    def batches(
        self, order: np.ndarray, *, max_sequences: int | None = None, max_rows: int | None = None, **limits: int | None
    ) -> Batches:
        """Return batches of `order` (int64 [B]) of at most so many sequences or so many rows; one of the two is given.

        Sequences of `self.order` and rows are cut where the planner cuts, within its further limits; of any other order
        every `max_sequences` sequences are a batch, as a data loader has them.
        """
        if (max_sequences is None) == (max_rows is None):
            raise ValueError("either max_sequences or max_rows must be given")
        if max_sequences is not None and order is not self.order:
            ends = _ends(len(self), max_sequences)
        else:
            full = max_rows or (max_sequences or 0) * self.num_tokens // max(1, len(self))
            shared = self._shared(self.rank[order])
            ends = cut(self.lengths[order], shared, full, max_rows=max_rows, max_sequences=max_sequences, **limits)
        batch = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        ranks = self.rank[order]
        ranks = ranks[np.lexsort((ranks, batch))]
        shared = self._shared(ranks)
        shared[ends[:-1]] = 0
        return Batches(self.lengths[self.order[ranks]], shared, ends)

    def packed(self) -> Batches:
        """Return batches without folding and padding: each token is a row."""
        return _unfolded(self.lengths, _ends(len(self), 1))

    def padded(self, *, max_sequences: int | None = None, max_positions: int | None = None) -> Batches:
        """Return batches by length, padded to their longest: each position is a row. One of the two limits is given."""
        if max_sequences is not None:
            lengths, ends = -np.sort(-self.lengths), _ends(len(self), max_sequences)
        elif max_positions is None:
            raise ValueError("either max_sequences or max_positions must be given")
        else:
            plan = plan_padded(self.lengths, max_positions=max_positions)
            lengths, ends = self.lengths[plan.order], plan.ends
        sizes = np.diff(ends, prepend=0)
        return _unfolded(np.repeat(lengths[ends - sizes], sizes), ends)

    def _shared(self, ranks: np.ndarray) -> np.ndarray:
        """Return how many tokens each sequence of these ranks shares with the one before it; int64, 0 for the first."""
        found = np.zeros(len(ranks), np.int64)
        low, high = np.minimum(ranks[1:], ranks[:-1]), np.maximum(ranks[1:], ranks[:-1])
        # The least of shared[low + 1 .. high] is that of two stretches of 2 ** level that cover them.
        levels = np.frexp(high - low)[1] - 1
        least = self.shared  # [i]: the least of shared[i .. i + 2 ** level - 1]
        for level in range(levels.max(initial=-1) + 1):
            pairs, size = np.flatnonzero(levels == level), 2**level
            found[pairs + 1] = np.minimum(least[low[pairs] + 1], least[high[pairs] + 1 - size])
            least = np.minimum(least[:-size], least[size:])
        return found

    def prefixes(self) -> Prefixes:
        """Return all shared prefixes, at most B - 1. Takes a Python step a sequence."""
        columns = first, last, start, stop = tuple(array("q") for _ in range(4))
        open_prefixes = [(0, 0)]  # of the sequences before: (tokens, first sequence), shortest first
        for at, tokens in enumerate([*self.shared[1:].tolist(), 0], start=1):
            begin = at - 1
            while open_prefixes[-1][0] > tokens:
                length, begin = open_prefixes.pop()
                first.append(begin)
                last.append(at - 1)
                start.append(max(tokens, open_prefixes[-1][0]))
                stop.append(length)
            if tokens > open_prefixes[-1][0]:
                open_prefixes.append((tokens, begin))
        return Prefixes(*(np.array(column, np.int64) for column in columns))


def _unfolded(lengths: np.ndarray, ends: np.ndarray) -> Batches:
    return Batches(lengths, np.zeros_like(lengths), ends)


def _ends(count: int, size: int) -> np.ndarray:
    """Return where batches of `size` of `count` sequences end."""
    return np.minimum(np.arange(size, count + size, size), count)


def _inverse(order: np.ndarray) -> np.ndarray:
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank


def sharing_from_end(store: TokenStore, lengths: np.ndarray) -> dict:
    """Return tokens over rows of one trie of the first `sequences`, at most 10,000 and 4,000,000 tokens: `from_start`,
    read from their starts, and `from_end`, read from their ends."""
    count = int(np.searchsorted(np.cumsum(lengths[:_SAMPLED_SEQUENCES]), _SAMPLED_TOKENS, "right"))
    sequences = [store[i][:length] for i, length in enumerate(lengths[:count].tolist())]
    tries = [Sharing(TokenStore.from_sequences(s)) for s in (sequences, [ids[::-1] for ids in sequences])]
    ratios = [trie.num_tokens / max(1, trie.num_rows) for trie in tries]
    return {"sequences": count, "from_start": ratios[0], "from_end": ratios[1]}
