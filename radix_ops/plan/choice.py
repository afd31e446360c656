"""The choice of a batch of sequences that wait: those that must be in it, and with them those that share most.

    choice = Choice(waiting, Bounds(max_rows=16384, max_tokens=131072))
    choice.take(piece)  # the one whose turn it is
    choice.take_mates()  # those that share a prefix with the batch, by the rows that they add

Each mate that is taken may bring others closer: documents of its query then add fewer rows than the first document of
any other query, and follow it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .waiting import Piece, Waiting

# A mate shares at least this part of its tokens with the batch. Where all share a little, as a BOS token or the head of
# a template, the batch that takes one share gets the others' share without looking for them.
LEAST_SHARE = 1 / 8
_NUMBER_BITS = 40
_AT_FIRST = 8  # of thousands of candidates that are sorted; each time that they are used up, so many times more
_PATIENCE = 1024  # steps without a piece that fits before the search ends, of which a misfit counts as
_MISFIT = 16
_NEAR = 32  # neighbours on a side that Python looks at one by one


@dataclass(frozen=True)
class Bounds:
    """The limits of a batch: rows of its trie, packed tokens, sequences times the longest, sequences, and padding as a
    share of its tokens."""

    max_rows: int
    max_tokens: int = 2**62
    max_positions: int | None = None
    max_sequences: int = 2**62
    max_padding: float | None = None


class Choice:
    """A batch that grows, of pieces of `waiting`, which must not change meanwhile.

    The first piece is taken whatever its size; others only within the bounds. The outcome depends on the pieces and the
    calls alone. A call takes time in the pieces that it takes and in those whose share with the batch grows.

    positions: of those taken. added: the rows that each added to those before it. rows, tokens, longest: of all.
    """

    def __init__(self, waiting: Waiting, bounds: Bounds):
        self.positions: list[int] = []
        self.added: list[int] = []
        self.rows = self.tokens = self.longest = 0
        self._waiting, self._bounds = waiting, bounds
        self._shared, self._lengths, self._numbers = waiting.shared, waiting.lengths, waiting.numbers
        self._best = np.zeros(len(waiting), np.int64)  # tokens that each shares with the batch
        self._taken = np.zeros(len(waiting), bool)
        # The same memory, whose single numbers Python reads several times as fast.
        self._shared_of, self._length_of = memoryview(self._shared), memoryview(self._lengths)
        self._best_of, self._is_taken = memoryview(self._best), memoryview(self._taken)
        self._number_of = memoryview(self._numbers)
        self._heap: list[tuple[int, int, int]] = []  # (rows added and number, position, run or -1)
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces that are taken, in that order."""
        return [self._waiting[position] for position in self.positions]

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is taken."""
        return bool(self._is_taken[self._waiting.position(piece)])

    def take(self, piece: Piece, share: float = 1.0) -> bool:
        """Take a piece that isn't taken. Return False, and leave it, where it doesn't fit within the bounds, or within
        this share of their rows."""
        position = self._waiting.position(piece)
        rows = self.rows + self._length_of[position] - self._best_of[position]
        if not self._fits(position) or (self.positions and rows > share * self._bounds.max_rows):
            return False
        self._take(position)
        return True

    def take_mates(self) -> None:
        """Take pieces that share a prefix with the batch while they fit: that which adds the fewest rows, then that
        which came first."""
        heap, steps = self._heap, 0
        while heap and steps < _PATIENCE:
            key, position, run = heap[0]
            rows = key >> _NUMBER_BITS
            is_current = not self._is_taken[position] and rows == self._length_of[position] - self._best_of[position]
            if is_current and self.rows + rows > self._bounds.max_rows:
                return  # all others add as many at least
            following = self._runs[run].next() if run >= 0 else None
            if following:
                heapq.heapreplace(heap, (*following, run))
            else:
                heapq.heappop(heap)
            if not is_current:
                steps += 1  # it is in the batch, or shares more with it since
            elif self._fits(position):
                self._take(position)
                steps = 0
            else:
                steps += _MISFIT

    def take_alike(self) -> None:
        """Take pieces while they fit, first those whose length is nearest to the longest of the batch's."""
        apart = np.abs(self._lengths - self.longest)
        steps = 0
        for position in np.lexsort((self._numbers, apart)).tolist():
            if self._is_taken[position]:
                continue
            if self._fits(position):
                self._take(position)
                steps = 0
            else:
                steps += _MISFIT
                if steps >= _PATIENCE:
                    return

    def _fits(self, position: int) -> bool:
        if not self.positions:
            return True
        bounds, length = self._bounds, self._length_of[position]
        count, tokens = len(self.positions) + 1, self.tokens + length
        padded = count * max(self.longest, length)
        return (
            count <= bounds.max_sequences
            and tokens <= bounds.max_tokens
            and self.rows + length - self._best_of[position] <= bounds.max_rows
            and (bounds.max_positions is None or padded <= bounds.max_positions)
            and (bounds.max_padding is None or padded - tokens <= bounds.max_padding * tokens)
        )

    def _take(self, position: int) -> None:
        length, depth = self._length_of[position], self._best_of[position]
        self.positions.append(position)
        self.added.append(length - depth)
        self._is_taken[position] = True
        self.rows += length - depth
        self.tokens += length
        if length > self.longest:
            self.longest = length
        # Those that share more with this piece than it shared with the batch are a stretch around it, and none of them
        # shared more with the batch than it did.
        shared, after = self._shared_of, position + 1
        if shared[position] > depth:
            if position > _NEAR and min(shared[after - _NEAR : after]) > depth:
                least = _least_above(lambda size: self._shared[max(after - size, 1) : after][::-1], depth)
                self._best[position - len(least) : position] = least[::-1]
                self._offer(position - len(least), position)
            else:
                self._walk(depth, range(position - 1, -1, -1), 1)
        if after < len(shared) and shared[after] > depth:
            if after + _NEAR < len(shared) and min(shared[after : after + _NEAR]) > depth:
                least = _least_above(lambda size: self._shared[after : after + size], depth)
                self._best[after : after + len(least)] = least
                self._offer(after, after + len(least))
            else:
                self._walk(depth, range(after, len(shared)), 0)

    def _walk(self, depth: int, neighbours: range, ahead: int) -> None:
        """Raise what the few neighbours on one side share with the batch while it is more than `depth`, and make them
        candidates. ahead: where `shared` says what a neighbour shares with the one nearer to the piece."""
        shared, best, room = self._shared_of, self._best_of, self._bounds.max_rows - self.rows
        least = 2**62
        for at in neighbours:
            edge = shared[at + ahead]
            if edge < least:
                if edge <= depth:
                    return
                least = edge
            best[at] = least
            length = self._length_of[at]
            if not self._is_taken[at] and least >= LEAST_SHARE * length and length - least <= room:
                key = (length - least) << _NUMBER_BITS | self._number_of[at]
                heapq.heappush(self._heap, (key, at, -1))

    def _offer(self, first: int, end: int) -> None:
        """Make the mates among many pieces candidates."""
        lengths, best = self._lengths[first:end], self._best[first:end]
        rows = lengths - best
        is_mate = ~self._taken[first:end] & (best >= LEAST_SHARE * lengths)
        is_mate &= self.rows + rows <= self._bounds.max_rows
        positions = np.flatnonzero(is_mate)
        run = _Run(rows[positions] << _NUMBER_BITS | self._numbers[first + positions], first + positions)
        if candidate := run.next():
            heapq.heappush(self._heap, (*candidate, len(self._runs)))
            self._runs.append(run)


def _least_above(stretch: Callable[[int], np.ndarray], depth: int) -> np.ndarray:
    """Return the running minima of shared tokens while above `depth`; `stretch` gives these up to a size."""
    size = 8 * _NEAR
    while True:
        least = np.minimum.accumulate(stretch(size))
        reach = int(np.count_nonzero(least > depth))  # the first ones, since they don't rise
        if reach < len(least) or len(least) < size:
            return least[:reach]
        size *= 8


class _Run:
    """Candidates with their keys, which come out by these."""

    def __init__(self, keys: np.ndarray, positions: np.ndarray):
        self._keys, self._positions = keys, positions
        self._sorted: list[tuple[int, int]] = []  # the next ones, the last first
        self._size = _AT_FIRST

    def next(self) -> tuple[int, int] | None:
        """Return the next candidate's key and position, or None."""
        if not self._sorted:
            if not len(self._keys):
                return None
            self._sort_some()
        return self._sorted.pop()

    def _sort_some(self) -> None:
        keys, positions = self._keys, self._positions
        self._keys, self._positions = keys[:0], positions[:0]
        size, self._size = self._size, _AT_FIRST * self._size
        if len(keys) > 2 * size:
            order = np.argpartition(keys, size)
            self._keys, self._positions = keys[order[size:]], positions[order[size:]]
            keys, positions = keys[order[:size]], positions[order[:size]]
        order = np.argsort(keys)[::-1]
        self._sorted = list(zip(keys[order].tolist(), positions[order].tolist(), strict=True))
