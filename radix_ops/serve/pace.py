"""How fast batches are computed: what was measured, and what it says of the next."""

from __future__ import annotations

_KEPT = 0.95  # of the weight that a batch had when the next is measured
_HICCUP, _KNOWN = 4, 8  # a batch counts at most so many times its prediction, once so many are measured
_GROWTH = 4  # times the rows of the largest batch that was measured: no further does a prediction reach


class Pace:
    """The seconds of a batch as a number for each batch and one for each row, fitted to the last batches by least
    squares in which a batch counts 5% less than the one behind it, and a pause of the machine little. The first batch,
    which pays for much that is done once, does not count where another was measured."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, rows, rows ** 2, seconds, rows * seconds
        self._tokens = 0.0
        self._largest = 0.0
        self._batches = 0

    def add(self, rows: int, tokens: int, seconds: float) -> None:
        """Tell of a batch."""
        predicted = self.seconds(rows)
        if predicted and self._batches >= _KNOWN:
            seconds = min(seconds, _HICCUP * predicted)
        kept = 0.0 if self._batches == 1 else _KEPT
        self._batches += 1
        found = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [kept * total + x for total, x in zip(self._sums, found, strict=True)]
        self._tokens = kept * self._tokens + tokens
        self._largest = max(kept * self._largest, rows)

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens of the last batches over their seconds; None before the first."""
        return self._tokens / self._sums[3] if self._sums[3] else None

    @property
    def rows_per_second(self) -> float | None:
        """The rows of the last batches over their seconds; None before the first."""
        return self._sums[1] / self._sums[3] if self._sums[3] else None

    def seconds(self, rows: int) -> float | None:
        """Return how long a batch of so many rows is thought to take; None before the first."""
        if not self._sums[0]:
            return None
        each, per_row = self._fit()
        return each + per_row * rows

    def rows_in(self, seconds: float, least: int) -> int:
        """Return how many rows a batch may have to take so long, `least` at least."""
        if not self._sums[0]:
            return least
        each, per_row = self._fit()
        rows = (seconds - each) / per_row if per_row else float("inf")
        return max(least, int(min(rows, _GROWTH * self._largest)))

    def _fit(self) -> tuple[float, float]:
        count, rows, squares, seconds, products = self._sums
        spread = count * squares - rows * rows
        # Batches of one size tell nothing of what a batch takes without rows.
        per_row = (count * products - rows * seconds) / spread if spread > 1e-6 * count * squares else -1.0
        each = (seconds - per_row * rows) / count
        if per_row < 0 or each < 0:
            return 0.0, seconds / rows if rows else 0.0
        return each, per_row
