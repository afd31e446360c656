"""One run of a command that computes results: resumed where it was stopped, or compared with a plain one."""

from __future__ import annotations

import argparse
import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..data.claim import checked_output
from ..data.fingerprint import fingerprint
from ..data.matrix import MatrixFile, is_matrix, scratch_matrix
from ..data.records import Records
from ..data.results import ResultFile, ResultStream, key_of_parts
from ..engine._engine import Engine
from ..engine.batches import OnBatch, RunStats
from ..engine.embedding import check_finite
from ..engine.inputs import Record
from ..engine.items import Collector, Items
from ..engine.loading import find_device
from .arguments import printable, progress_bar

_RESULTS_AT_ONCE = 1024  # written
Numbers = list[np.ndarray]  # an item's: an array of each kind


@contextlib.contextmanager
def prepared(args: argparse.Namespace, may_be_matrix: bool = False) -> Iterator[dict]:
    """Hold --output for this run, and give the arguments of every engine."""
    with checked_output(
        args.output, args.file, may_be_matrix=may_be_matrix, overwrite=args.overwrite, times_runs=args.compare
    ):
        device = find_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        yield {
            "device": device,
            "dtype": args.dtype,
            "token_budget": args.token_budget,
            "plain": args.plain,
            "trust_remote_code": args.trust_remote_code,
            "lazy": True,
        }


def check_keys(record: Record) -> Record:
    """Return the record. UserError for a key that lines of results have besides those of the engine."""
    record.others((), ("line", "key"))
    return record


@dataclass
class Job:
    """The run of all records of a file through an engine."""

    args: argparse.Namespace
    engine: Engine
    records: Records
    task: str  # part of each result's key
    done: str  # to {count} items, for the summary
    comparison: Comparison
    items: Items = field(init=False)
    base: object = field(init=False)  # the hash that keys start from

    def run(self) -> None:
        """Check and tokenise all input, load the model, then compute what is missing, or compare."""
        engine, mode = self.engine, "plain" if self.args.plain else "folded"
        self.items = engine.encode(with_progress(self.records, "tokenising"))
        engine.load()
        engine.check(self.items, folded=not self.args.plain)
        self.base = fingerprint(engine.runner, self.task, mode, *engine.identity)
        if self.args.compare:
            self._compare()
        else:
            self._run_remaining()

    def fields_of(self, item: int, numbers: Numbers) -> dict:
        return self.engine.result(self.records[item], self.items[item], *numbers)

    def key_of(self, item: int) -> str:
        return key_of(self.base, self.records, self.items, item)

    def _run_remaining(self) -> None:
        results = self._results()
        remaining = remaining_of(self.args, results)
        if len(remaining):
            chosen = self.items.subset(remaining)
            collector = Collector(chosen.ends)

            def on_batch(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
                results.write([(int(remaining[i]), numbers) for i, numbers in collector.add(indices, found)])

            stats = self._execute(chosen, not self.args.plain, on_batch)
            print(summary(self.done.format(count=len(remaining)), stats), file=sys.stderr)
        results.finish()

    def _compare(self) -> None:
        kept = {folded: self.comparison.store(self) for folded in (False, True)}
        plain, folded = (self._execute_into(kept[folded], folded) for folded in (False, True))
        results = self._results() if self.args.output else None
        for first in range(0, len(self.items), _RESULTS_AT_ONCE):
            part = range(first, min(first + _RESULTS_AT_ONCE, len(self.items)))
            for item in part:
                self.comparison.add(self, item, kept[False][item], kept[True][item])
            if results:
                results.write([(item, kept[True][item]) for item in part])
        if results:
            results.finish()
        print(comparison_table(plain, folded), end="\n\n")
        print("\n".join(self.comparison.report(len(self.items))))

    def _execute_into(self, kept: _Store, folded: bool) -> RunStats:
        collector = Collector(self.items.ends)

        def on_batch(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
            for item, numbers in collector.add(indices, found):
                kept[item] = numbers

        return self._execute(self.items, folded, on_batch, warm_up=True)

    def _execute(self, items: Items, folded: bool, on_batch: OnBatch, warm_up: bool = False) -> RunStats:
        lengths = items.lengths
        with progress_bar(int(lengths.sum()), "folded" if folded else "plain", " tokens") as bar:

            def report(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
                on_batch(indices, found)
                bar.update(int(lengths[indices].sum()))

            return self.engine.execute(items, report, folded=folded, warm_up=warm_up)

    def _results(self) -> _Lines | _Rows:
        output, count, overwrite = self.args.output, len(self.items), self.args.overwrite
        if output and is_matrix(output):
            store = self.items.store
            key = key_of_parts(self.base, store.lengths.tobytes(), memoryview(store.input_ids))
            return _Rows(MatrixFile(output, (count, _dim_of(self.engine)), key, overwrite), self.records)
        if output:
            return _Lines(ResultFile(output, count, self.key_of, overwrite, self.records.index_of), self)
        return _Lines(ResultStream(count, self.key_of), self)


def key_of(base, records: Records, items: Items, item: int) -> str:
    """Return the key of an item's result."""
    return key_of_parts(base, records.raw(item), *(ids.tobytes() for ids in items.tokens(item)))


class _Lines:
    """Results as JSON lines."""

    def __init__(self, results: ResultFile | ResultStream, job: Job):
        self._results, self._job = results, job
        self.done, self.finish = results.done, results.finish

    def write(self, found: list[tuple[int, Numbers]]) -> None:
        # A number that isn't finite is an error before any line of its batch is written.
        fields = [{"line": self._job.records.line_of(i)} | self._job.fields_of(i, numbers) for i, numbers in found]
        for (item, _), line in zip(found, fields, strict=True):
            self._results.add(item, line)
        self._results.flush()


class _Rows:
    """Embeddings as the rows of a matrix."""

    def __init__(self, matrix: MatrixFile, records: Records):
        self._matrix, self._records = matrix, records
        self.done, self.finish = matrix.done, matrix.finish

    def write(self, found: list[tuple[int, Numbers]]) -> None:
        rows = np.stack([numbers[0][0] for _, numbers in found])
        check_finite(rows, lambda row: self._records[found[row][0]].where)
        self._matrix.write(np.array([item for item, _ in found]), rows)


class Comparison(ABC):
    """The differences between the results of a plain run and a folded one."""

    def store(self, job: Job) -> _Store:
        """Return what holds the numbers of all items of a run."""
        return {}

    @abstractmethod
    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        """Compare the two results of an item."""

    @abstractmethod
    def report(self, count: int) -> list[str]:
        """Return lines that say how results of so many items differ."""


class Agreement(Comparison):
    """Counts how often `choice`, a field of a result, agrees, and how far `numbers`, another, are apart; the report
    calls them `choices` and `number`."""

    def __init__(self, choice: str, choices: str, number: str, numbers: str):
        self._choice, self._choices, self._number, self._numbers = choice, choices, number, numbers
        self._agree, self._largest = 0, 0.0

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        one, other = job.fields_of(item, plain), job.fields_of(item, folded)
        self._agree += one[self._choice] == other[self._choice]
        self._largest = max(self._largest, *np.abs(np.subtract(one[self._numbers], other[self._numbers])))

    def report(self, count: int) -> list[str]:
        return [
            f"{self._choices} that agree: {self._agree:,} of {count:,}",
            f"largest difference of a {self._number}: {self._largest:.1e}",
        ]


class Closeness(Comparison):
    """Measures how far embeddings are apart."""

    def __init__(self):
        self._largest, self._least_cosine = 0.0, 1.0

    def store(self, job: Job) -> _Store:
        return _MatrixOfNumbers(scratch_matrix((len(job.items), _dim_of(job.engine))))

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        one, other = (numbers[0][0].astype(np.float64) for numbers in (plain, folded))
        check_finite(np.stack([one, other]), lambda row: job.records[item].where)
        self._largest = max(self._largest, float(np.abs(one - other).max()))
        cosine = (one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other))
        self._least_cosine = min(self._least_cosine, float(cosine))

    def report(self, count: int) -> list[str]:
        return [
            f"largest difference of a number: {self._largest:.1e}",
            f"least cosine of two embeddings of one text: {self._least_cosine:.7f}",
        ]


def _dim_of(engine: Any) -> int:
    """Return how many numbers an Embedder's embeddings have."""
    return engine.dim


class _Store(Protocol):
    """Holds the numbers of items."""

    def __setitem__(self, item: int, numbers: Numbers, /) -> None: ...

    def __getitem__(self, item: int, /) -> Numbers: ...


class _MatrixOfNumbers:
    """Items' embeddings as rows of a scratch matrix."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def __setitem__(self, item: int, numbers: Numbers) -> None:
        self._rows[item] = numbers[0][0]

    def __getitem__(self, item: int) -> Numbers:
        return [self._rows[item : item + 1]]


def with_progress(lines, desc: str) -> Iterator:
    """Yield the lines, with a progress bar where they take long."""
    with progress_bar(len(lines), desc, " lines", delay=2) as bar:
        for line in lines:
            yield line
            bar.update()


def remaining_of(args: argparse.Namespace, results) -> np.ndarray:
    """Return the items that are not done yet, and say how many are. From here on the command continues its run."""
    args.continues = True
    remaining = np.flatnonzero(~results.done)
    if len(remaining) < len(results.done):
        held = len(results.done) - len(remaining)
        print(f"{printable(args.output)} holds {held:,} of {len(results.done):,} results already", file=sys.stderr)
    return remaining


def summary(verb: str, stats: RunStats) -> str:
    return (
        f"{verb} {stats.tokens:,} tokens as {stats.rows:,} rows in {stats.seconds:.1f} s "
        f"({stats.tokens / stats.seconds:,.0f} tokens a second)"
    )


def comparison_table(plain: RunStats, folded: RunStats) -> str:
    """Return the two runs side by side, then the speed-up and what share of tokens / rows it is."""
    speed_up, sharing = plain.seconds / folded.seconds, folded.tokens / folded.rows
    counts = {
        "tokens": (plain.tokens, folded.tokens),
        "rows computed": (plain.rows, folded.rows),
        "rows through the head": (plain.head_rows, folded.head_rows),
        "batches": (plain.batches, folded.batches),
    }
    lines = [f"{'':<22}{'plain':>10}{'folded':>10}"]
    lines += [f"{name:<22}{a:>10,}{b:>10,}" for name, (a, b) in counts.items() if a or b]
    lines += [
        f"{'seconds':<22}{plain.seconds:>10.2f}{folded.seconds:>10.2f}",
        f"{'tokens a second':<22}{plain.tokens / plain.seconds:>10,.0f}{folded.tokens / folded.seconds:>10,.0f}",
        "",
        f"padding of the plain run: {plain.rows / plain.tokens - 1:.1%} of its tokens",
        f"speed-up: {speed_up:.2f} times, {speed_up / sharing:.2f} of tokens / rows ({sharing:.2f})",
    ]
    return "\n".join(lines)
