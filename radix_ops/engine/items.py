"""The token sequences of items, and the numbers that are found for them."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator

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
        """Add an item of sequences of token ids, as TokenStore takes them."""
        for ids in sequences:
            self.store.append(ids)
        self._ends.append(len(self.store))

    def extend(self, items: Items) -> None:
        """Add all items of another store of this kind."""
        for item in range(len(items)):
            self.append(items[item])

    def __len__(self) -> int:
        return len(self._ends)

    def of(self, item: int) -> range:
        """Return the sequences of an item."""
        return range(self._ends[item - 1] if item else 0, self._ends[item])

    def __getitem__(self, item: int) -> list:
        """Return what `append` took for an item."""
        return self.tokens(item)

    def tokens(self, item: int) -> list[np.ndarray]:
        """Return all that tokens tell of an item, as int32 arrays."""
        return [self.store[sequence] for sequence in self.of(item)]

    @property
    def ends(self) -> np.ndarray:
        """Where each item's sequences end, int64 [items]."""
        return np.array(self._ends, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens of each sequence a model reads, int64 [B]."""
        return self.store.lengths

    def subset(self, items: np.ndarray):
        """Return a copy that holds the given items alone, or this one where those are all."""
        if len(items) == len(self):
            return self
        chosen = type(self)()
        for item in items:
            chosen.append(self[item])
        return chosen


def first_equals(texts: list[str]) -> list[int]:
    """Return for each text the index of the first that is equal to it."""
    first: dict[str, int] = {}
    return [first.setdefault(text, index) for index, text in enumerate(texts)]


def shortest_decimals(numbers: np.ndarray) -> list[float]:
    """Return float32 or float16 numbers [N] as the shortest decimals that read back as them."""
    return [float(text) for text in numbers.astype("U")]


class Collector:
    """Gathers the numbers of sequences from batches, and gives an item's out as soon as all its sequences have some.

    No batch holds an item of no sequences: `empty` gives those out. Memory holds the numbers of items that are under
    way alone.
    """

    def __init__(self, ends: np.ndarray):
        self._ends = ends  # int64 [items], as Items.ends
        self._found: dict[int, list[np.ndarray]] = {}
        self._missing: dict[int, int] = {}

    def empty(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield each item that has no sequences, with no numbers."""
        for item in np.flatnonzero(np.diff(self._ends, prepend=0) == 0).tolist():
            yield item, []

    def add(self, indices: np.ndarray, found: tuple[np.ndarray, ...]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Take arrays [len(indices), ...] for the sequences `indices`; yield each item that is complete by them, with
        an array [sequences of the item, ...] for each."""
        items = np.searchsorted(self._ends, indices, "right")
        order = np.argsort(items, kind="stable")
        starts = np.flatnonzero(np.diff(items[order], prepend=-1))
        for chosen in np.split(order, starts[1:]):
            item = int(items[chosen[0]])
            first = int(self._ends[item - 1]) if item else 0
            size = int(self._ends[item]) - first
            if item not in self._found:
                self._found[item] = [np.empty((size, *numbers.shape[1:]), numbers.dtype) for numbers in found]
                self._missing[item] = size
            for held, numbers in zip(self._found[item], found, strict=True):
                held[indices[chosen] - first] = numbers[chosen]
            self._missing[item] -= len(chosen)
            if not self._missing[item]:
                del self._missing[item]
                yield item, self._found.pop(item)
