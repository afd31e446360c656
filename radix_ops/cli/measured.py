"""What all results of a run say together: told on standard error, and written where asked. For score and classify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..data.measured import write_metrics
from ..data.records import Records
from ..engine.label_measures import LabelMeasures
from ..engine.measures import ACCURACIES, Measures, is_of_text
from .compare import Agreement, Comparison
from .job import Job, Numbers
from .progress import say

_NAMES = dict(zip(ACCURACIES, ("by sum (acc)", "per token", "per character (acc_norm)"), strict=True))
# The fields of results that count, which a table may hold as JSON.
_OF_QUESTION = ("logprobs", "tokens", "best", "best_per_char", "gold")
_OF_TEXT = ("logprob", "tokens", "words", "bytes")


class Measured:
    """The measures of a run. It reads them from --output, which holds what an earlier run left, too; without one it
    gets each result by `add`.

    `fields_of` returns what `measures` counts of a result, or None; `report` makes lines of what they found.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        measures: Measures | LabelMeasures,
        fields_of: Callable[[Mapping[str, Any]], dict[str, Any] | None],
        report: Callable[[dict[str, Any]], list[str]],
    ):
        self._output, self._path = args.output, args.metrics
        self._measures, self._fields_of, self._report = measures, fields_of, report

    def add(self, result: Mapping[str, Any]) -> None:
        """Count a result where no --output holds it."""
        if self._output is None:
            self._count(result)

    def finish(self) -> None:
        """Tell and write what all results say."""
        if self._output is not None:
            Records(self._output, lambda record: self._count(record.fields))
        found = self._measures.found()
        for line in self._report(found):
            say(line)
        if self._path:
            write_metrics(self._path, found)

    def _count(self, result: Mapping[str, Any]) -> None:
        fields = self._fields_of(result)
        if fields is not None:
            self._measures.add(fields)


def fields_of(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what counts of a result of score, as it stands in a line or a table; None of a row with an error."""
    tokens = _value(result.get("tokens"))
    if tokens is None:
        return None
    names = _OF_TEXT if is_of_text({"tokens": tokens}) else _OF_QUESTION
    fields = {name: _value(result[name]) for name in names if name in result}
    return {name: value for name, value in fields.items() if value is not None}


def _value(value: Any) -> Any:
    return (json.loads(value) if value else None) if isinstance(value, str) else value


class Differences(Comparison):
    """Measures how far scores are apart, and how often answers agree; those of the folded run count."""

    def __init__(self, measured: Measured):
        self._measured, self._is_of_texts, self._largest = measured, False, 0.0
        self._answers = Agreement("best", "answers", "choice's log-probability", "logprobs")

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        found = job.fields_of(item, folded)
        self._measured.add(found)
        self._is_of_texts = is_of_text(found)
        if self._is_of_texts:
            difference = np.subtract(job.fields_of(item, plain)["logprob"], found["logprob"])
            self._largest = max(self._largest, float(np.abs(difference)))
        else:
            self._answers.add(job, item, plain, folded)

    def report(self, count: int) -> list[str]:
        if self._is_of_texts:
            return [f"largest difference of a text's log-probability: {self._largest:.1e}"]
        return self._answers.report(count)


def report(found: dict[str, Any]) -> list[str]:
    """Return the lines that tell of metrics; none where no right choice is known."""
    if "logprob" in found:
        return _of_texts(found)
    if "accuracy" not in found:
        return []
    num_rows, num_gold = found["rows"], found["rows_with_gold"]
    rows = f"the {num_gold:,} rows with gold, of {num_rows:,}" if num_gold < num_rows else f"{num_rows:,} rows"
    lines = [f"accuracy of {rows}, and its {found['interval']['level']:.0%} interval (Wilson score):"]
    for name, share in found["accuracy"].items():
        lines.append(f"  {_NAMES[name]:<26}{share['value']:>6.1%}  {share['low']:.1%} to {share['high']:.1%}")
    if "calibration" in found:
        lines += _of_calibration(found["calibration"])
    return lines


def _of_calibration(found: dict[str, Any]) -> list[str]:
    lines = [f"{'confidence':<14}{'answers':>9}{'mean confidence':>18}{'accuracy':>11}"]
    for row in found["bins"]:
        bounds = f"{row['above']:.1f} to {row['up_to']:.1f}"
        lines.append(f"{bounds:<14}{row['answers']:>9,}{row['confidence']:>18.3f}{row['accuracy']:>11.3f}")
    return [*lines, f"expected calibration error: {found['expected_calibration_error']:.4f}"]


def _of_texts(found: dict[str, Any]) -> list[str]:
    units = [
        f"{_number(found[f'{unit}_perplexity'])} a {unit} ({found[f'{unit}s']:,} {unit}s)"
        for unit in ("token", "word", "byte")
        if f"{unit}_perplexity" in found  # texts that were token ids have no words
    ]
    bits = f", bits a byte {_number(found['bits_per_byte'])}" if "bits_per_byte" in found else ""
    return [
        f"perplexity of {found['rows']:,} texts: {', '.join(units)}",
        f"log-probability {found['logprob']:,.3f}{bits}",
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4f}"
