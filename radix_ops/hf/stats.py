"""Counts of what an enabled model did. For `radix_ops.hf`."""

from __future__ import annotations

import threading

from torch import Tensor

_LOCK = threading.Lock()


class RadixStats:
    """Counts what an enabled model has done so far: `model.radix_stats`. The counts may be set back to 0.

    tokens: real tokens that came in.
    rows: rows that the decoder layers computed; for a skipped batch all its positions, padding included.
    folded: batches that were folded.
    skipped: batches that ran as before, each step of generate() included.
    """

    _tokens: int | Tensor  # on a device a count for which nobody waits before it is read

    def __init__(self, tokens: int = 0, rows: int = 0, folded: int = 0, skipped: int = 0):
        self.tokens, self.rows, self.folded, self.skipped = tokens, rows, folded, skipped

    @property
    def tokens(self) -> int:
        """Real tokens that came in; reading them waits for the device that counted them."""
        if isinstance(self._tokens, Tensor):
            with _LOCK:
                self._tokens = int(self._tokens)
        return self._tokens

    @tokens.setter
    def tokens(self, value: int) -> None:
        self._tokens = value

    def _add(self, tokens: int | Tensor, rows: int, folded: bool) -> None:
        with _LOCK:
            self._tokens = self._tokens + tokens
            self.rows += rows
            self.folded += folded
            self.skipped += not folded

    def _counts(self) -> tuple[int, int, int, int]:
        return self.tokens, self.rows, self.folded, self.skipped

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RadixStats) and self._counts() == other._counts()

    __hash__ = None  # type: ignore[assignment]  # as Python itself sets it

    def __repr__(self) -> str:
        return "RadixStats(tokens={}, rows={}, folded={}, skipped={})".format(*self._counts())
