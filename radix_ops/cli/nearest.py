"""The nearest pairs of the texts of a run of `radix-ops embed`, told on standard error."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from radix_ops_command.errors import printable

from ..data.matrix import scratch_matrix
from ..data.records import Records
from ..data.result_formats import MATRIX, format_of
from ..engine import Embedder
from ..engine.embedding import Text
from ..engine.pairs import nearest_pairs
from .field_of_results import FieldOfResults

_SHOWN = 50  # characters of a text


class Nearest:
    """The nearest pairs of a run's embeddings."""

    def __init__(self, args: argparse.Namespace, engine: Embedder, records: Records[Text]):
        self._args, self._records = args, records
        self._field: FieldOfResults | None = None
        if args.output is None or not format_of(args.output, MATRIX).is_matrix:
            self._field = FieldOfResults("embedding", args.output, records, self._take)
            self._rows = scratch_matrix((len(records), engine.dim))
            self._has_row = np.zeros(len(records), bool)

    def add(self, result: dict[str, Any]) -> None:
        """Take a result where no --output holds it."""
        if self._field is not None:
            self._field.add(result)

    def _take(self, item: int, embedding: Any) -> None:
        self._rows[item], self._has_row[item] = embedding, True

    def finish(self, device) -> None:
        """Find the pairs, and tell of them."""
        if self._field is None:
            rows, items = np.load(self._args.output, mmap_mode="r"), np.arange(len(self._records))
        else:
            self._field.finish()
            items = np.flatnonzero(self._has_row)
            rows = self._rows if len(items) == len(self._rows) else self._rows[items]
        cosines, pairs = nearest_pairs(rows, self._args.pairs, device)
        print(f"the nearest of {len(items):,} texts, by cosine:", file=sys.stderr)
        for cosine, pair in zip(cosines.tolist(), items[pairs].tolist(), strict=True):
            print(f"  {cosine:.4f}  {'  |  '.join(map(self._shown, pair))}", file=sys.stderr)

    def _shown(self, item: int) -> str:
        text = printable(self._records[item].text)
        place = " ".join(f"{name} {value}" for name, value in self._records.origin(item).items())
        return f"{place}: {text if len(text) <= _SHOWN else text[:_SHOWN] + ' ...'}"
