"""Token sequences of a file's items, and the numbers that a run finds for them."""

from __future__ import annotations

import array
from collections.abc import Iterable

import numpy as np

from ..plan.planner import TokenStore


class Items:
    """B token sequences that belong to items, item by item: one for each choice of a question, document of a query.

    Memory is that of a TokenStore, which spills to a file, and 8 bytes an item.
    """

    def __init__(self):
        self.store = TokenStore()
        self._ends = array.array("q")

    def append(self, sequences: Iterable) -> None:
        """An item of sequences of token ids, as TokenStore takes them."""
        for ids in sequences:
            self.store.append(ids)
        self._ends.append(len(self.store))

    def __len__(self) -> int:
        return len(self._ends)

    def of(self, item: int) -> range:
        """The sequences of an item."""
        return range(self._ends[item - 1] if item else 0, self._ends[item])

    def __getitem__(self, item: int) -> list:
        """What `append` took."""
        return [self.store[sequence] for sequence in self.of(item)]

    @property
    def ends(self) -> np.ndarray:
        """Behind the last sequence of each item, int64 [items]."""
        return np.array(self._ends, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens of each sequence a model reads, int64 [B]."""
        return self.store.lengths

    def subset(self, items: np.ndarray):
        """A copy that holds the given items alone; all of them are no copy."""
        if len(items) == len(self):
            return self
        chosen = type(self)()
        for item in items:
            chosen.append(self[item])
        return chosen


def first_equals(texts: list[str]) -> list[int]:
    """Of each text the index of the first that is equal to it."""
    first: dict[str, int] = {}
    return [first.setdefault(text, index) for index, text in enumerate(texts)]


class Collector:
    """Gathers numbers of sequences from batches, and says which items have all of theirs.

    `values` holds an array [B] of each of the `dtypes`.
    """

    def __init__(self, ends: np.ndarray, **dtypes):
        self.ends = ends
        self.values = {name: np.zeros(ends[-1] if len(ends) else 0, dtype) for name, dtype in dtypes.items()}
        self._missing = np.diff(ends, prepend=0)

    def add(self, indices: np.ndarray, *found: np.ndarray) -> np.ndarray:
        """Takes an array of each kind for the sequences `indices`; returns the items that are complete by them."""
        for values, numbers in zip(self.values.values(), found, strict=True):
            values[indices] = numbers
        items, counts = np.unique(np.searchsorted(self.ends, indices, "right"), return_counts=True)
        self._missing[items] -= counts
        return items[self._missing[items] == 0]

    def of(self, item: int) -> list[np.ndarray]:
        """The numbers of an item's sequences, an array of each kind."""
        first, end = self.ends[item - 1] if item else 0, self.ends[item]
        return [values[first:end] for values in self.values.values()]
