"""Numbers that grow, most of them by 1, such as those of lines among blank ones."""

from __future__ import annotations

import array
from bisect import bisect_left, bisect_right


class Numbering:
    """Holds a growing number for each index from 0; memory is taken by gaps alone.

    numbering[i] is the number of index i, and index_of(number) its index, None where it was left out.
    """

    def __init__(self, first: int):
        self._first = first  # the least number
        self._size = 0
        # Where numbers were left out before an index: the index, and how many are left out up to it.
        self._behind_gaps, self._left_out = array.array("q"), array.array("q")

    def __len__(self) -> int:
        return self._size

    def append(self, number: int) -> None:
        left_out = number - self._first - self._size
        if left_out > (self._left_out[-1] if self._left_out else 0):
            self._behind_gaps.append(self._size)
            self._left_out.append(left_out)
        self._size += 1

    def __getitem__(self, index: int) -> int:
        before = bisect_right(self._behind_gaps, index)
        return index + self._first + (self._left_out[before - 1] if before else 0)

    def index_of(self, number: int) -> int | None:
        index = bisect_left(range(self._size), number, key=self.__getitem__)
        return index if index < self._size and self[index] == number else None
