"""`radix-ops classify`: texts labelled with shared prefixes computed once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from radix_ops_command.errors import printable

from ..data.measured import check_metrics
from ..engine import Classifier
from ..engine.classifying import Row
from ..engine.errors import UserError
from ..engine.inputs import Record
from ..engine.label_measures import LabelMeasures
from .compare import Comparison
from .job import Job, Numbers, prepared
from .measured import Measured
from .reading import files_read, read_records

_ARRAYS = ("labels", "predicted")  # which a table may hold as JSON


def run(args: argparse.Namespace) -> None:
    if args.metrics:
        check_metrics(args.metrics, args.overwrite, *files_read(args), *([args.output] if args.output else []))
    with prepared(args) as options:
        engine = Classifier(
            args.model,
            template=args.template,
            problem_type=args.problem_type,
            top_k=args.top_k,
            threshold=args.threshold,
            max_length=args.max_length,
            truncate_right=args.truncate_right,
            **options,
        )
        parser = _Parser(engine)
        records = read_records(args, parser, engine.shape, task=engine.rows_of)
        if args.metrics and not parser.has_gold:
            raise UserError('--metrics needs "gold" or "label", the right labels, and no row has one')
        measured = Measured(args, LabelMeasures(), fields_of, report)
        Job(args, engine, records, "classify", "classified", Differences(measured), measured.add).run()
        if parser.has_gold:
            measured.finish()


class _Parser:
    """Parses records, and notes whether any says which label is right."""

    def __init__(self, engine: Classifier):
        self._engine = engine
        self.has_gold = False

    def __call__(self, record: Record) -> Row:
        row = self._engine.parse(record)
        self.has_gold = self.has_gold or (
            self._engine.problem_type != "regression" and row.extra.get("gold") is not None
        )
        return row


class Differences(Comparison):
    """Measures how far labels' scores are apart, and how often the best ones agree; those of the folded run count."""

    def __init__(self, measured: Measured):
        self._measured, self._largest, self._agree = measured, 0.0, 0

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        engine: Any = job.engine
        row = job.records[item]
        self._measured.add(job.fields_of(item, folded))
        one, other = engine.scores(row, *plain), engine.scores(row, *folded)
        self._agree += int(one.argmax() == other.argmax())
        self._largest = max(self._largest, float(np.abs(one - other).max()))

    def report(self, count: int) -> list[str]:
        return [
            f"best labels that agree: {self._agree:,} of {count:,}",
            f"largest difference of a score: {self._largest:.1e}",
        ]


def fields_of(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what counts of a result, as it stands in a line or a table; None of a row with an error."""
    if result.get("labels") in (None, ""):
        return None
    has_several = result.get("predicted") is not None
    arrays = (*_ARRAYS, "gold") if has_several else _ARRAYS
    fields = {
        name: json.loads(value) if name in arrays and isinstance(value, str) else value
        for name in ("labels", "best", "predicted", "gold")
        if (value := result.get(name)) not in (None, "")
    }
    return fields if has_several else {k: str(v) if k in ("best", "gold") else v for k, v in fields.items()}


def report(found: dict[str, Any]) -> list[str]:
    """Return the lines that tell of the metrics of labels; none where no right label is known."""
    if "accuracy" not in found:
        return []
    num_rows, num_gold, share = found["rows"], found["rows_with_gold"], found["accuracy"]
    rows = f"the {num_gold:,} rows with gold, of {num_rows:,}" if num_gold < num_rows else f"{num_rows:,} rows"
    interval = f"{share['low']:.1%} to {share['high']:.1%}"
    lines = [f"accuracy of {rows}, and its {found['interval']['level']:.0%} interval (Wilson score):"]
    lines.append(f"  {share['value']:.1%}  {interval}")
    names = {label: printable(label) for label in found["labels"]}
    width = max(map(len, (*names.values(), "mean of labels")))
    lines.append(f"{'label':<{width}}{'rows':>9}{'predicted':>11}{'precision':>11}{'recall':>9}{'F1':>9}")
    for label, row in found["labels"].items():
        lines.append(f"{names[label]:<{width}}{row['rows']:>9,}{row['predicted']:>11,}{_shares(row)}")
    if "macro" in found:
        lines.append(f"{'mean of labels':<{width}}{'':>20}{_shares(found['macro'])}")
    return lines


def _shares(row: Mapping[str, float]) -> str:
    return f"{row['precision']:>11.3f}{row['recall']:>9.3f}{row['f1']:>9.3f}"
