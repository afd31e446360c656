"""Totals and the latencies of the last requests, for people to look at."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

_LAST = 1000  # requests


class Status:
    """Counts since the start, and quantiles of the last 1,000 latencies. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = self._tokens = self._batches = self._answers = 0
        self._latencies: deque[float] = deque(maxlen=_LAST)

    def add_batch(self, rows: int, tokens: int) -> None:
        """Count a batch."""
        with self._lock:
            self._rows, self._tokens, self._batches = self._rows + rows, self._tokens + tokens, self._batches + 1

    def add_latency(self, seconds: float) -> None:
        """Count an answer, so long after its request."""
        with self._lock:
            self._answers += 1
            self._latencies.append(seconds)

    def snapshot(self) -> dict:
        """Return the counts and quantiles, None before the first answer."""
        with self._lock:
            latencies = sorted(self._latencies)
            found: dict[str, Any] = {
                "total_rows": self._rows,
                "total_tokens": self._tokens,
                "total_batches": self._batches,
                "total_answers": self._answers,
            }
        quantiles = ((name, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)))
        found["latency"] = {
            name: latencies[min(int(share * len(latencies)), len(latencies) - 1)] if latencies else None
            for name, share in quantiles
        }
        return found
