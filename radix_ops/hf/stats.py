"""Counts of what an enabled model did. For `radix_ops.hf`."""

from __future__ import annotations

import html
import itertools
import threading
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LOCK = threading.Lock()
_EDGES = (1.0, 1.05, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)  # of N/M
# A reason may name a shape, so that there is no end to them.
_MOST_REASONS, _OTHERS = 32, "other reasons"


class RadixStats:
    """Counts what an enabled model has done so far: `model.radix_stats`. `reset()` sets all counts back to 0.

    tokens: real tokens that came in.
    rows: rows that the decoder layers computed; for a skipped batch all its positions, padding included.
    folded: batches that were folded.
    replayed: those of them that ran as a captured CUDA graph.
    no_graphs: why no more folded batches will run as CUDA graphs, None where nothing is known that forbids it.
    skipped: batches that ran as before, each step of generate() included.
    reasons: how many of the skipped ones ran as before for which reason.
    tokens_per_row: how many batches shared how much, by N/M, tokens over rows of the trie: {1.5: 2, 2.0: 7} for two
        from 1.5 to less than 2, the next of 1, 1.05, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32 and 64, and seven from 2. It
        counts those that were folded and those that were not because that would not pay, where the rows were counted.

    Two are equal where the first four counts are.
    """

    _tokens: int | Tensor  # on a device a count for which nobody waits before it is read
    # Of the class, for counts that were pickled without.
    replayed = 0
    no_graphs: str | None = None

    def __init__(
        self,
        tokens: int = 0,
        rows: int = 0,
        folded: int = 0,
        skipped: int = 0,
        reasons: Mapping[str, int] | None = None,
        tokens_per_row: Mapping[float, int] | None = None,
    ):
        self.tokens, self.rows, self.folded, self.skipped = tokens, rows, folded, skipped
        self._reasons, self._tokens_per_row = dict(reasons or {}), dict(tokens_per_row or {})

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

    @property
    def reasons(self) -> dict[str, int]:
        """Why batches were skipped, the most frequent reason first."""
        with _LOCK:
            return dict(sorted(self._reasons.items(), key=lambda item: -item[1]))

    @property
    def tokens_per_row(self) -> dict[float, int]:
        """How many batches have which N/M, by the least of each span."""
        with _LOCK:
            return dict(sorted(self._tokens_per_row.items()))

    def reset(self) -> None:
        """Set all counts back to 0."""
        with _LOCK:
            self._tokens = self.rows = self.folded = self.skipped = self.replayed = 0
            self._reasons, self._tokens_per_row = {}, {}

    def _add(
        self,
        tokens: int | Tensor,
        rows: int,
        reason: str | None = None,
        sharing: tuple[int, int] | None = None,
        is_replayed: bool = False,
    ) -> None:
        """Count a batch: folded, or skipped for a reason; `sharing` is its tokens and the rows of its trie."""
        with _LOCK:
            self._tokens = self._tokens + tokens
            self.rows += rows
            self.folded += reason is None
            self.skipped += reason is not None
            self.replayed += is_replayed
            if reason is not None:
                if reason not in self._reasons and len(self._reasons) >= _MOST_REASONS:
                    reason = _OTHERS
                self._reasons[reason] = self._reasons.get(reason, 0) + 1
            if sharing is not None and sharing[1]:
                edge = _EDGES[max(0, bisect_right(_EDGES, sharing[0] / sharing[1]) - 1)]
                self._tokens_per_row[edge] = self._tokens_per_row.get(edge, 0) + 1

    def __getstate__(self) -> dict[str, Any]:
        with _LOCK:
            return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"_reasons": {}, "_tokens_per_row": {}} | state)  # pickles may be older than these counts

    def _counts(self) -> tuple[int, int, int, int]:
        return self.tokens, self.rows, self.folded, self.skipped

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RadixStats) and self._counts() == other._counts()

    __hash__ = None  # type: ignore[assignment]  # as Python itself sets it

    def __repr__(self) -> str:
        counts = "tokens={}, rows={}, folded={}, skipped={}".format(*self._counts())
        further: dict[str, Any] = {"replayed": self.replayed, "no_graphs": self.no_graphs}
        further |= {"reasons": self.reasons, "tokens_per_row": self.tokens_per_row}
        return f"RadixStats({', '.join([counts, *(f'{name}={value}' for name, value in further.items() if value)])})"

    def _repr_html_(self) -> str:
        tokens, rows, folded, skipped = self._counts()
        cells = [
            ("tokens", f"{tokens:,}"),
            ("rows", f"{rows:,}" + (f" ({tokens / rows:.2f} tokens a row)" if rows else "")),
            ("batches folded", f"{folded:,}"),
            *((("of them as CUDA graphs", f"{self.replayed:,}"),) if self.replayed else ()),
            ("batches skipped", f"{skipped:,}"),
            *((f"because {reason}", f"{count:,}") for reason, count in self.reasons.items()),
            *(() if self.no_graphs is None else (("no CUDA graphs because", html.escape(self.no_graphs)),)),
            *((f"batches of {span} tokens a row", f"{count:,}") for span, count in self._spans()),
        ]
        lines = (f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in cells)
        return f"<table>{''.join(lines)}</table>"

    def _spans(self) -> list[tuple[str, int]]:
        """Return the spans of N/M in words, with the batches of each."""
        ends = dict(itertools.pairwise(_EDGES))
        counted = self.tokens_per_row.items()
        return [(f"{low:g} to {ends[low]:g}" if low in ends else f"{low:g} or more", n) for low, n in counted]
