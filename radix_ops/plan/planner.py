"""Plans: the cuts of a sorted or given order into batches that lose the fewest shared tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .flops import ForwardCost, visible_keys
from .sharding import Shards, cut_shards
from .store import TokenStore

_LEAST_GAIN = 0.02  # the share of rows that sorting must save
_BATCH_COST = 0.01  # the share of max_rows that a batch more must save, which keeps batches from being cut small
_NO_LIMIT = 2**62
_LIMITS = ("max_rows", "max_tokens", "max_positions", "max_sequences")
Order: TypeAlias = Literal["auto", "sorted", "given"]
_ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, eq=False)
class Plan:
    """Batches of sequences. Iterating gives the indices of each batch's sequences, int64 arrays; `plan[i]` gives one.

    Attributes:
        order: [B] the sequences, batch after batch.
        ends: [len(plan)] where each batch ends in `order`.
        rows: [len(plan)] the trie rows of each batch; of a padded plan its positions.
        tokens: [len(plan)] the tokens of each batch.
        costs: float64 [len(plan)] the FLOPs of each batch where the planner was given a model's cost, else its rows.
        given_rows: of a folded plan, all rows of batches in the caller's order, within the same limits.
    """

    order: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]
    given_rows: int | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, batch: int) -> npt.NDArray[np.int64]:
        batch = range(len(self))[batch]  # IndexError, and numbers from the end
        return self.order[self.ends[batch - 1] if batch else 0 : self.ends[batch]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return iter(np.split(self.order, self.ends[:-1]) if len(self.ends) else [])

    @property
    def num_rows(self) -> int:
        """The rows of all batches."""
        return int(self.rows.sum())

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences."""
        return int(self.tokens.sum())

    @property
    def compact_ratio(self) -> float:
        """Rows over tokens; 1.0 means that nothing is shared (or that there are no tokens)."""
        return self.num_rows / self.num_tokens if self.num_tokens else 1.0

    def shards(self, num_shards: int, done: npt.NDArray[np.bool_] | None = None) -> Shards:
        """Cut the batches into shards of about equal cost, one for each of `num_shards` workers or more.

        done: bool [B], the sequences whose results are known: batches that hold no others cost nothing and are left
            out.

        The batches are those of the plan whatever the shards and whatever is done, so that shards add no rows, and
        answers don't depend on the number of workers or on a restart. A shard is a stretch of batches, and of all such
        cuts those are taken whose dearest shard is the cheapest. `shards.imbalance` tells by how much it exceeds the
        mean, which is at most the cost of one batch. Deterministic; takes O((batches + 60 shards) log batches) time.
        Raises TypeError and ValueError for num_shards that are not from 1 to 2^20 and for `done` that doesn't fit.
        """
        _check_limit("num_shards", num_shards, optional=False, bits=20)
        done = np.zeros(len(self.order), bool) if done is None else np.asarray(done)
        if done.shape != self.order.shape or done.dtype != bool:
            raise ValueError(
                f"done must hold a bool for each of {len(self.order)} sequences, got {done.dtype} of shape {done.shape}"
            )
        is_done = np.logical_and.reduceat(done[self.order], _starts(self.ends)) if len(self) else done
        return cut_shards(self.rows, self.tokens, self.costs, is_done, int(num_shards))


def plan_folded(
    store: TokenStore,
    *,
    max_rows: int,
    max_tokens: int | None = None,
    max_positions: int | None = None,
    max_sequences: int | None = None,
    lengths: npt.NDArray[np.integer] | None = None,
    order: Order = "auto",
    cost: ForwardCost | None = None,
) -> Plan:
    """Plan batches in which shared prefixes meet.

    Args:
        store: the B sequences.
        max_rows: of a batch, at most so many rows of its trie: what the model computes.
        max_tokens: of a batch, at most so many packed tokens: what attention in the "compact" layout unfolds.
        max_positions: sequences of a batch times the longest: what a padded result takes.
        max_sequences: of a batch.
        lengths: int [B]: of each sequence only so many tokens count, counted from its start. All by default.
        order: "sorted": by tokens, which shares most; equal sequences stay in their order. "given": the caller's.
            "auto": sorted where that makes at least 2% fewer rows.
        cost: of a model, by which `Plan.costs` counts; it does not change the batches.

    A sequence beyond a limit is a batch of its own. Of all cuts of the order into batches within the limits, those are
    taken that lose the fewest shared tokens, each batch counted as 1% of max_rows (in the caller's order, tokens shared
    with the sequence just before). Rows are exact. Takes O(tokens + B log B) time, about 100 bytes a sequence besides
    the store, and reads of a sequence what it shares with its neighbours. Raises ValueError and TypeError for
    limits below 1 and lengths that don't fit.
    """
    if not isinstance(store, TokenStore):
        raise TypeError(f"store must be a TokenStore, got {type(store).__name__}; TokenStore.from_sequences makes one")
    limits = {"max_rows": max_rows, "max_tokens": max_tokens, "max_positions": max_positions}
    limits["max_sequences"] = max_sequences
    for name, limit in limits.items():
        _check_limit(name, limit, optional=name != "max_rows")
    if not isinstance(order, str) or order not in _ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, _ORDERS))}, got {order!r}")
    _check_cost(cost)
    lengths = _checked_lengths(lengths, store)
    sequences = torch.from_numpy(store.input_ids), torch.from_numpy(store.starts), torch.from_numpy(lengths)

    ranked = torch.ops.radix.lexicographic_order(*sequences).numpy()
    given = _cut(sequences, np.arange(len(store)), limits, ranked, cost)
    if order == "given":
        return given
    best = _cut(sequences, ranked, limits, ranked, cost, given.num_rows)
    return best if order == "sorted" or is_worth_sorting(best.num_rows, given.num_rows) else given


def is_worth_sorting(sorted_rows: int, given_rows: int) -> bool:
    """Return whether batches in sorted order have so many fewer rows that the caller's order is left for them."""
    return sorted_rows <= (1 - _LEAST_GAIN) * given_rows


def cut(lengths: np.ndarray, shared: np.ndarray, full_rows: int, **limits: int | None) -> np.ndarray:
    """Return where batches of an order end, int64 [batches], that lose the fewest shared tokens within the limits.

    lengths, shared: int64 [B], the tokens of each sequence and those that it shares with the one before it. full_rows:
    of a full batch; each batch counts as 1% of them. limits: those of `plan_folded`, None for none.
    """
    limits = {name: limits.get(name) or _NO_LIMIT for name in _LIMITS}
    cost = max(1, int(_BATCH_COST * full_rows))
    found = torch.ops.radix.cut_batches(torch.from_numpy(lengths), torch.from_numpy(shared), **limits, batch_cost=cost)
    return found.numpy()


def _cut(
    sequences: tuple[Tensor, Tensor, Tensor],
    order: npt.NDArray[np.int64],
    limits: dict[str, Any],
    ranked: npt.NDArray[np.int64],
    cost: ForwardCost | None,
    given_rows: int | None = None,
) -> Plan:
    """Return the plan of `order`, whose rows are counted in the sorted order, `ranked`."""
    lengths = sequences[2].numpy()[order]
    shared = torch.ops.radix.common_prefix_lengths(*sequences, torch.from_numpy(order)).numpy()
    ends = cut(lengths, shared, limits["max_rows"], **limits)
    starts = _starts(ends)
    if order is not ranked:
        batch_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        rank = np.empty_like(ranked)
        rank[ranked] = np.arange(len(ranked))
        by_rank = order[np.lexsort((rank[order], batch_of))]
        shared = torch.ops.radix.common_prefix_lengths(*sequences, torch.from_numpy(by_rank)).numpy()
    shared[starts] = 0
    tokens, rows = _sums(lengths, starts), _sums(lengths - shared, starts)

    def num_keys(window: int | None) -> np.ndarray:
        if cost and not cost.folds_attention:
            return _padded_keys(lengths, ends, window)
        return _sums(visible_keys(lengths, window) - visible_keys(shared, window), starts)

    total = int(rows.sum())
    return Plan(order, ends, rows, tokens, _costs(cost, rows, num_keys), total if given_rows is None else given_rows)


def _costs(
    cost: ForwardCost | None, rows: np.ndarray, num_keys: Callable[[int | None], np.ndarray]
) -> npt.NDArray[np.float64]:
    """Return the FLOPs of each batch, or its rows; in float64, for no int64 holds those of long sequences."""
    counted = rows.astype(np.float64)
    return cost.of(counted, lambda window: num_keys(window).astype(np.float64)) if cost else counted


def _starts(ends: np.ndarray) -> np.ndarray:
    """Return where batches that end there start."""
    return np.concatenate([ends[:0], [0], ends[:-1]]) if len(ends) else ends


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of each batch's values; int64, so that no order of adding changes it."""
    return np.add.reduceat(values, starts) if len(starts) else starts


def _padded_keys(lengths: np.ndarray, ends: np.ndarray, window: int | None) -> np.ndarray:
    """Return the keys that all positions of each batch attend to where it is padded to its longest sequence."""
    if not len(ends):
        return ends
    longest = np.maximum.reduceat(lengths, _starts(ends)).astype(np.float64)  # no int64 holds the keys of any length
    return np.diff(ends, prepend=0) * visible_keys(longest, window)


def plan_padded(
    lengths: npt.NDArray[np.integer],
    *,
    max_positions: int,
    max_padding: float = 0.05,
    cost: ForwardCost | None = None,
) -> Plan:
    """Plan batches of sequences of similar length [B], longest first.

    A batch has at most `max_positions` positions (sequences times longest), of which at most `max_padding` of its
    tokens are padding. A sequence longer than that is a batch of its own. cost: of a model, by which `Plan.costs`
    counts, padding included; it does not change the batches.
    """
    _check_limit("max_positions", max_positions, optional=False)
    if not max_padding >= 0:
        raise ValueError(f"max_padding must not be negative, got {max_padding}")
    _check_cost(cost)
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be a flat array of lengths, none negative, got shape {lengths.shape}")
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    ends, first, longest, packed = [], 0, 0, 0
    for at, length in enumerate(lengths.tolist()):
        if at == first:
            longest = length
        positions, tokens = longest * (at + 1 - first), packed + length
        if at > first and (positions > max_positions or positions - tokens > max_padding * tokens):
            ends.append(at)
            first, longest, tokens = at, length, length
        packed = tokens
    cuts = np.array([*ends, len(lengths)] if len(lengths) else [], np.int64)
    starts = _starts(cuts)
    rows = np.diff(cuts, prepend=0) * lengths[starts]
    costs = _costs(cost, rows, lambda window: _padded_keys(lengths, cuts, window))
    return Plan(order, cuts, rows, _sums(lengths, starts), costs)


def _check_cost(cost: ForwardCost | None) -> None:
    if cost is not None and not isinstance(cost, ForwardCost):
        raise TypeError(f"cost must be a ForwardCost or None, got {type(cost).__name__}")


def _check_limit(name: str, value, optional: bool, bits: int = 62) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not 1 <= value <= 2**bits:
        raise ValueError(f"{name} must be from 1 to 2^{bits}, got {value}")


def _checked_lengths(lengths, store: TokenStore) -> np.ndarray:
    if lengths is None:
        return store.lengths
    lengths = np.asarray(lengths)
    if lengths.shape != (len(store),) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"lengths must hold one whole number for each of {len(store)} sequences, "
            f"got {lengths.dtype} of shape {lengths.shape}"
        )
    lengths = lengths.astype(np.int64)
    wrong = np.flatnonzero((lengths < 0) | (lengths > store.lengths))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"lengths[{i}] must be from 0 to the sequence's {store.lengths[i]} tokens, got {lengths[i]}")
    return lengths
