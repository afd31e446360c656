"""One field of all results of a run, for what they say together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..data.log import origin_of
from ..data.records import Records


class FieldOfResults:
    """Gives `take(item, value)` the field `name` of each result that has it, an error of a row left out.

    The results are those of --output, which holds what an earlier run left, too; without one they come by `add`.
    """

    def __init__(self, name: str, output: str | None, records: Records, take: Callable[[int, Any], object]):
        self._name, self._output, self._records, self._take = name, output, records, take

    def add(self, result: dict[str, Any]) -> None:
        """Take a result where no --output holds it."""
        if self._output is None:
            item = self._records.index_of(origin_of(result))
            assert item is not None
            self._give(item, result)

    def finish(self) -> None:
        """Take the results that --output holds, which are all and in order."""
        if self._output is not None:
            items = itertools.count()
            Records(self._output, lambda record: self._give(next(items), record.fields))

    def _give(self, item: int, result: Mapping[str, Any]) -> None:
        value = result.get(self._name)
        if value is not None:
            self._take(item, json.loads(value) if isinstance(value, str) else value)  # a table may hold JSON
