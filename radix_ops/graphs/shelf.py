"""Keeps a bounded number of graphs by the kind of call that they are for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

G = TypeVar("G")

_MOST_GRAPHS = 64  # of about 2 MiB of a GPU's memory each, beside the pool that they share
# A graph that was used within so many calls is not given up for another: kinds that take turns would all be captured
# again and again.
_IN_USE = 8 * _MOST_GRAPHS
_MOST_SEEN = 512


class Shelf(Generic[G]):
    """Graphs by key, of which the least recently used goes for another, unless it is in use."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, G] = OrderedDict()  # the least recently used first
        self._last_used: dict[Hashable, int] = {}
        self._seen: OrderedDict[Hashable, None] = OrderedDict()  # keys without a graph, the last seen at the end
        self._refused: set[Hashable] = set()
        self._count = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def take(self, key: Hashable) -> G | None:
        """Return the graph of a call, or None where it has none."""
        self._count += 1
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self._last_used[key] = self._count
        return graph

    def is_due(self, key: Hashable) -> bool:
        """Return whether a graph is to be made for a call that has none: one like it was seen, and there is room."""
        if key in self._refused:
            return False
        was_seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return was_seen and self._has_room()

    def _has_room(self) -> bool:
        if len(self._graphs) < _MOST_GRAPHS:
            return True
        return self._last_used[next(iter(self._graphs))] + _IN_USE < self._count

    def put(self, key: Hashable, graph: G) -> None:
        """Keep a graph, in place of the least recently used one where there are many."""
        if len(self._graphs) >= _MOST_GRAPHS:
            oldest, _ = self._graphs.popitem(last=False)
            del self._last_used[oldest]
        self._graphs[key] = graph
        self._last_used[key] = self._count
        self._seen.pop(key, None)

    def refuse(self, key: Hashable) -> None:
        """Make no graph for this kind of call."""
        self._refused.add(key)
