"""Sequences that wait for a batch, in the order of their tokens.

    waiting = Waiting()
    waiting.add(piece)  # and more, in any order
    waiting.remove(pieces)  # those that a batch took

Those that share a prefix stand side by side, and what any two share is the least that neighbours between them share.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

_FEW = 8  # that are cheaper removed one by one


class Piece:
    """A token sequence that waits.

    owner, place, extra: whose it is, which of its owner's, and what else its owner knows of it. number: tells when it
    came, 0 or more; the lower goes first where nothing else decides, and no two have the same. salt: sequences of
    different salts count as if they shared nothing.
    """

    __slots__ = ("extra", "ids", "key", "number", "owner", "place", "salt")

    def __init__(
        self,
        ids: np.ndarray,
        owner: Any = None,
        place: int = 0,
        *,
        number: int = 0,
        salt: bytes = b"",
        extra: Any = None,
    ):
        self.ids, self.number, self.salt = ids, number, salt
        self.owner, self.place, self.extra = owner, place, extra
        # Bytes of big-endian numbers that are not negative compare as the numbers do. No salt and length is the start
        # of another.
        self.key = len(salt).to_bytes(4, "big") + salt + ids.astype(">i4").tobytes()

    def __len__(self) -> int:
        return len(self.ids)


def shared_tokens(a: Piece, b: Piece) -> int:
    """Return how many tokens two sequences start with alike."""
    if a.salt != b.salt:
        return 0
    size = min(len(a.ids), len(b.ids))
    if not size:
        return 0
    differs = a.ids[:size] != b.ids[:size]
    first = int(differs.argmax())
    return first if differs[first] else size


class Waiting:
    """Pieces sorted by salt and tokens, equal ones by number, each with what it shares with the one before it.

    Adding one takes O(log B) comparisons and moves 32 bytes for each piece behind it; removing a batch takes time in
    the number of pieces, or of those that are removed where these are few.

    shares: whether shared tokens count; without, it is as if no two pieces shared any.
    """

    def __init__(self, shares: bool = True):
        self._shares = shares
        self._keys: list[tuple[bytes, int]] = []
        self._pieces: list[Piece] = []
        self._shared, self._lengths, self._numbers = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, position: int) -> Piece:
        return self._pieces[position]

    @property
    def shared(self) -> np.ndarray:
        """How many tokens each piece shares with the one before it, int64 [B], a copy; 0 for the first."""
        return np.array(self._shared, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each piece, int64 [B], a copy."""
        return np.array(self._lengths, np.int64)

    @property
    def numbers(self) -> np.ndarray:
        """The number of each piece, int64 [B], a copy."""
        return np.array(self._numbers, np.int64)

    def position(self, piece: Piece) -> int:
        """Return where a piece stands. KeyError where it isn't here."""
        at = bisect.bisect_left(self._keys, (piece.key, piece.number))
        if at == len(self._pieces) or self._pieces[at] is not piece:
            raise KeyError(piece.number)
        return at

    def add(self, piece: Piece) -> None:
        """Put a piece into its place."""
        entry = (piece.key, piece.number)
        at = bisect.bisect_left(self._keys, entry)
        before = shared_tokens(self._pieces[at - 1], piece) if at and self._shares else 0
        if at < len(self._pieces) and self._shares:
            self._shared[at] = shared_tokens(piece, self._pieces[at])
        self._keys.insert(at, entry)
        self._pieces.insert(at, piece)
        self._shared.insert(at, before)
        self._lengths.insert(at, len(piece.ids))
        self._numbers.insert(at, piece.number)

    def remove(self, pieces: Iterable[Piece]) -> None:
        """Take pieces away. KeyError for one that isn't here."""
        self.remove_at(map(self.position, pieces))

    def remove_at(self, positions: Iterable[int]) -> None:
        """Take the pieces at positions away."""
        positions = sorted(positions)
        # What a piece shares with the last one that stays before it is the least on the way there.
        for at in positions:
            if at + 1 < len(self._pieces):
                self._shared[at + 1] = min(self._shared[at], self._shared[at + 1])
        self._keys, self._pieces = _without(self._keys, positions), _without(self._pieces, positions)
        self._shared, self._lengths = _without(self._shared, positions), _without(self._lengths, positions)
        self._numbers = _without(self._numbers, positions)


def _without(column: Any, positions: list[int]) -> Any:
    """Return a list or an array without the elements at positions, which ascend."""
    if len(positions) <= _FEW:
        for at in reversed(positions):
            del column[at]
        return column
    kept, start = column[: positions[0]], positions[0] + 1
    for at in positions[1:]:
        if at > start:
            kept += column[start:at]
        start = at + 1
    kept += column[start:]
    return kept
