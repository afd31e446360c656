"""Where the results of a job go: lines of standard output, a file of lines or of a format made of them, or a matrix."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..data.converted import ConvertedFile
from ..data.log import Origin
from ..data.matrix import MatrixFile
from ..data.matrix_ids import named, put_ids
from ..data.quantised import QuantisedMatrixFile, check_count
from ..data.result_formats import MATRIX, TREC, ResultFormat, format_of
from ..data.result_writers import writer_of
from ..data.results import ResultFile, ResultStream, key_of_parts
from ..data.trec import TrecIds
from ..engine.embedding import check_finite
from ..engine.errors import UserError

if TYPE_CHECKING:
    from .job import Job, Numbers


class Results(Protocol):
    """Takes the results of items in any order.

    done: which items have one, bool [items].
    is_finished: whether the file is in its place already.
    """

    done: np.ndarray
    is_finished: bool

    def write(self, found: list[tuple[int, Numbers]]) -> None: ...

    def finish(self) -> None: ...


def format_of_job(job: Job) -> ResultFormat | None:
    """Return the format of a job's --output, None where results go to standard output."""
    return None if job.args.output is None else format_of(job.args.output, MATRIX, TREC)


def finds_ranges(args: argparse.Namespace) -> bool:
    """Return whether the ranges of int8 embeddings are those of the run's own, which are known in the end."""
    return getattr(args, "output_dtype", None) == "int8" and not args.ranges


def check_records(job: Job) -> None:
    """Refuse records that --output can't hold, as --on-error says: those that a TREC run can't name. UserError for one
    text alone where ranges are those of all."""
    form, records = format_of_job(job), job.records
    if form is not None and form.is_matrix and finds_ranges(job.args):
        check_count(job.args.output, len(records))
    if form is not None and form.kind == TREC:
        ids, reasons = TrecIds(), {}
        for item, query in enumerate(records):
            try:
                ids.check(query.where, query.extra.get("query_id"), records.origin(item), query.ids or ())
            except UserError as error:
                reasons[item] = error
        records.refuse(reasons)


def results_of(job: Job) -> Results:
    """Open what a job's results go to."""
    form, count = format_of_job(job), len(job.items)
    if form is None:
        return _Lines(ResultStream(count, job.key_of), job)
    arguments = job.args.output, count, job.key_of, job.args.overwrite, job.records.index_of
    if form.grows:
        return _Lines(ResultFile(*arguments), job)
    return _Rows(job) if form.is_matrix else _Lines(ConvertedFile(*arguments, writer_of(form)), job)


class _Lines:
    """Results as JSON lines, perhaps on the way to another format."""

    def __init__(self, results: ResultFile | ResultStream | ConvertedFile, job: Job):
        self._results, self._job = results, job
        self.done, self.is_finished, self.finish = results.done, results.is_finished, results.finish

    def write(self, found: list[tuple[int, Numbers]]) -> None:
        # A number that isn't finite is an error before any line of its batch is written.
        fields = [self._job.records.origin(i) | self._job.fields_of(i, numbers) for i, numbers in found]
        for (item, _), line in zip(found, fields, strict=True):
            self._results.add(item, line)
            if self._job.on_result and item not in self._job.records.refused:
                self._job.on_result(line)
        self._results.flush()


class _Rows:
    """Embeddings as the rows of a matrix."""

    def __init__(self, job: Job):
        store, args = job.items.store, job.args
        key = key_of_parts(job.base, store.lengths.tobytes(), memoryview(store.input_ids))
        arguments = args.output, (len(job.items), job.dim), key, args.overwrite
        engine: Any = job.engine
        self._job, self._convert = job, engine.convert
        self._matrix: QuantisedMatrixFile | MatrixFile
        if finds_ranges(args):
            self._matrix = QuantisedMatrixFile(*arguments)  # of the engine's float32
        else:
            self._matrix = MatrixFile(*arguments, args.output_dtype)
        self.done, self.is_finished = self._matrix.done, self._matrix.is_finished

    def write(self, found: list[tuple[int, Numbers]]) -> None:
        rows = np.stack([numbers[0][0] for _, numbers in found])
        where = lambda row: self._job.records[found[row][0]].where  # noqa: E731
        check_finite(rows, where)
        self._matrix.write(np.array([item for item, _ in found]), self._convert(rows, where))

    def finish(self) -> None:
        put_ids(self._job.args.output, self._named())
        self._matrix.finish()

    def _named(self) -> Iterator[Origin]:
        return (named(self._job.records.origin(item), text.extra) for item, text in enumerate(self._job.records))
